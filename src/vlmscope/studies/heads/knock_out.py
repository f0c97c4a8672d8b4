"""What happens without heads: one at a time, and together against random ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlmscope.models.inputs import Edit
from vlmscope.patching import engine
from vlmscope.patching.scores import logit_difference
from vlmscope.patching.trace import Images
from vlmscope.progress import progress
from vlmscope.sites import Site
from vlmscope.stats import rng, sign_flip
from vlmscope.studies.heads.attention import measured
from vlmscope.studies.heads.observe import Array, Key, Observed, Study

RANDOM = 10
"""How many sets of random heads are knocked out."""


def change_measures(study: Study, observed: Sequence[Observed]) -> Iterator[pd.DataFrame]:
    """The change of LD without each head (`zero`, `mean`, `resample`), and with it patched in (`effect`)."""
    changes = knock_out(study, observed)
    effects = [one.effect for one in observed if one.effect is not None]
    if effects:
        changes["effect"] = np.stack(effects)
    for name, scores in changes.items():
        p = sign_flip(scores, rng(study.seed, name, "signs"))
        yield measured(range(len(study.heads)), name, scores, observed, 0.0, p)


def mean_activations(observed: Sequence[Observed]) -> dict[Key, Tensor]:
    """Over the examples, for each kind: `(layers, heads, width)`."""
    keys = observed[0].activations
    return {key: torch.stack([one.activations[key] for one in observed]).mean(0) for key in keys}


def knock_out(study: Study, observed: Sequence[Observed]) -> dict[str, Array]:
    """LD without each head, less LD: `(examples, heads)` for each way of knocking it out."""
    count = len(observed)
    other = (np.arange(count) + rng(study.seed, "resample").integers(1, count)) % count
    means = mean_activations(observed)
    found = {name: np.zeros((count, len(study.heads))) for name in ("zero", "mean", "resample")}
    with progress(count, what="knock-outs") as step:
        for number, one in enumerate(observed):
            values = {"zero": None, "mean": means, "resample": observed[other[number]].activations}
            images = Images()
            alone = replace(one.pair, corrupt=one.pair.clean, edits=())
            for name, given in values.items():
                instead = {site: _value(study, site, given) for site in one.placed}
                patched = engine.patch(study.model, alone, one.placed, "noise", values=instead, images=images)
                for numbers, scores in patched.chunks:
                    found[name][number, numbers] = scores.ld.cpu().numpy() - one.ld_clean
            step(0, number + 1)
    return found


def together(study: Study, observed: Sequence[Observed]) -> pd.DataFrame:
    """Accuracy and LD with no head, these heads, and random ones of the same layers knocked out."""
    means = mean_activations(observed)
    sets = [("these heads", how, study.heads) for how in ("mean", "zero")]
    drawn = [random_heads(study, number) for number in range(RANDOM)]
    sets += [("random heads", "mean", heads) for heads in drawn if len(heads) == len(study.heads)]
    clean = [(one.is_right, one.ld_clean) for one in observed]
    rows = [("none", "", "", len(clean), *np.mean(clean, axis=0))]
    with progress(len(sets), what="sets of heads") as step:
        for number, (name, how, heads) in enumerate(sets):
            values = None if how == "zero" else means
            edits = [Edit(site, "set", _value(study, site, values)) for site in heads]
            runs = [(one.pair, study.model.run(one.pair.clean, edits)) for one in observed]
            found = [(int(x.argmax()) == pair.answer, logit_difference(x, pair)) for pair, x in runs]
            rows.append((name, how, " ".join(map(str, heads)), len(found), *np.mean(found, axis=0)))
            step(0, number + 1)
    return pd.DataFrame(rows, columns=["set", "knockout", "heads", "n", "accuracy", "ld"])


def _value(study: Study, site: Site, values: Mapping[Key, Tensor] | None) -> Tensor:
    """What stands in a head's place: zero, or its activation among those of its kind."""
    return torch.zeros(1) if values is None else values[site.tower, site.kind][study.place(site)][None]


def random_heads(study: Study, number: int) -> list[Site]:
    """As many other heads of the same layers; of other layers where a layer has too few."""
    taken = {(s.tower, s.kind, s.layer, s.units[0]) for s in study.heads}
    drawn: list[Site] = []
    for tower, kind in study.keys:
        shape = study.model.shapes[tower]
        free = [
            (layer, head)
            for layer in shape.having(kind)
            for head in range(shape.heads[kind])
            if (tower, kind, layer, head) not in taken
        ]
        rng(study.seed, "random heads", number, tower, kind).shuffle(free)
        for site in (study.heads[n] for n in study.numbers((tower, kind))):
            same = [place for place in free if place[0] == site.layer]
            free = same + [place for place in free if place[0] != site.layer]
            if free:
                layer, head = free.pop(0)
                drawn.append(replace(site, layer=layer, units=(head,)))
    return drawn

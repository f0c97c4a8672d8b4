"""Measures of heads, each against its null and with an interval: what they look at, read and move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmscope.models.inputs import Edit
from vlmscope.patching import engine
from vlmscope.patching.scores import logit_difference
from vlmscope.progress import progress
from vlmscope.sites import Site
from vlmscope.stats import FEWEST, interval, p_values, q_values, ranks, rng
from vlmscope.stored import formats
from vlmscope.studies.heads.asked import Array, AskedHeads, Key
from vlmscope.studies.heads.observe import Attention, Observed, of_heads

MOST = 400
"""Over how many examples attention is compared with shuffled masks, at most."""
SHUFFLES = 10_000
RANDOM = 10
"""How many sets of random heads are knocked out."""

SHARE = 0.01
"""A head that moves no more than this share of the gap between the clean and the corrupt run moves
nothing."""
DIRECT = 0.2
"""What does less than this share of its effect on its own way to the answer does it by others."""

ON_MASKS = {
    "auc": "area under the ROC curve of attention minus the all-heads mean, object against rest",
    "pointing": "whether the patch that gets the most attention is on the object",
    "mass": "share of the attention to the image that is on the object",
    "iou_fixed": "overlap of the object with the patches that get more than from the average head",
    "iou_best": "the same at the best of 19 thresholds",
}
ON_ALL = {
    "outlier_mass": "attention to the class token and to patches of outlying norm, but not to the object nor "
    "to what stands out in the picture",
    "norm_rank": "rank of the norm of what is attended to, from 0 to 1",
    "entropy": "entropy of the attention, 1 if it is uniform",
}
READ = {
    "on_image": "share of the attention that is on the image",
    "on_options": "on the words of the answer and the foil",
    "on_others": "on all other words",
    "on_first": "on the first token",
    "switch": "how much attention goes from the foil's word to the answer's as the picture changes",
    "copies": "how often it raises the word first that it reads, less how often the other",
    "by_attention": "patched in, LD: its attention alone",
    "by_queries": "its queries alone",
    "by_keys": "its keys alone",
    "by_values": "the values alone that it reads",
    "from_image": "attention and values, of the image alone",
    "from_options": "of the words of the answer and the foil alone",
    "from_others": "of all other words alone",
    "direct": "patched in whole, with all that comes behind it as it was",
}


def measures_of(
    asked: AskedHeads, observed: Sequence[Observed], use: NDArray[np.bool_], gap: float
) -> pd.DataFrame:
    """A row a head (its `number`) and measure, a head after the other, with q-values over heads.

    `use` says of which examples each head is measured: `(examples, heads)`; `gap` is LD(clean) − LD(corrupt).
    """
    tables, changes = [], _knock_out(asked, observed, use)
    for which, heads in _alike(use.T):
        some = of_heads(asked, [one for one, used in zip(observed, which, strict=True) if used], heads)
        without = {name: scores[which][:, heads] for name, scores in changes.items()}
        moved = _change_measures(*some, without, SHARE * gap)
        found = [*_attention_measures(*some), *moved, *_read_measures(*some)]
        tables.append(
            pd.concat(found).assign(number=lambda x, heads=heads: x["number"].map(dict(enumerate(heads))))
        )
    table = pd.concat(tables).sort_values("number", kind="stable", ignore_index=True)
    return table.assign(q_value=table.groupby("measure")["p_value"].transform(q_values))


def _alike(rows: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.bool_], list[int]]]:
    """Each row that is not all false, once, and the numbers of the rows that are the same."""
    same: dict[bytes, list[int]] = {}
    for number, row in enumerate(rows):
        same.setdefault(row.tobytes(), []).append(number)
    yield from ((rows[numbers[0]], numbers) for numbers in same.values() if rows[numbers[0]].any())


def _attention_measures(asked: AskedHeads, observed: Sequence[Observed]) -> Iterator[pd.DataFrame]:
    """The measures of all heads that look at the image, a table for each kind and measure (`_measured`)."""
    for key in asked.keys:
        looking = [one for one in observed if key in one.attention][:MOST]
        if not looking:
            continue
        found = [one.attention[key] for one in looking]
        pairs = list(zip(looking, found, strict=True))
        heads = np.stack([_spread(one, x, x.maps) for one, x in pairs])
        average = np.stack([_spread(one, x, x.average[None]) for one, x in pairs])
        for column, name in enumerate(ON_ALL):
            own, null = heads[..., column], average[..., column]
            p = _p(own - null)
            yield _measured(asked.numbers(key), name, own, null.mean(), p)
        for which in ("object", "foil"):
            yield from _on_masks(asked, key, [one for one in looking if which in one.masks], which)


def _measured(heads: Sequence[int], name: str, scores: Array, null: Array | float, p: Array) -> pd.DataFrame:
    """A row a head, from its scores `(examples, heads)`."""
    low, high = interval(scores)
    table = pd.DataFrame({"number": heads, "measure": name, "value": scores.mean(0), "low": low})
    return table.assign(high=high, null=null, p_value=p, n=len(scores))


def _p(scores: Array, least: float = 0.0) -> Array:
    """p-values of means; of scores that are all the same and beyond `least`, that of the sign test."""
    p, same = p_values(scores, least=least), np.ptp(scores, axis=0) == 0
    beyond = np.abs(scores[0]) > max(least, 1e-9)
    return np.where(same & beyond & (len(scores) >= FEWEST), 2.0 ** (1 - len(scores)), p)


def _on_masks(
    asked: AskedHeads, key: Key, observed: Sequence[Observed], which: str
) -> Iterator[pd.DataFrame]:
    """Attention against masks, and against the masks of other examples as the null."""
    masks = [one.masks[which] for one in observed]
    if len(masks) < 2 or len({mask.size for mask in masks}) > 1:
        return  # pictures of other grids cannot lend their masks
    objects = np.stack(masks).astype(float)
    overlaps = [_overlap(one.attention[key], objects) for one in observed]
    order = np.arange(len(observed))
    draw = rng(asked.seed, "masks", which)
    others = np.array([draw.permutation(order) for _ in range(SHUFFLES)])
    for name in ON_MASKS:
        values = np.stack([overlap[name] for overlap in overlaps])  # (examples, heads, masks)
        own = values[order, :, order]
        null = np.stack([values[order, head, others].mean(1) for head in range(values.shape[1])], axis=1)
        p = (1 + (null >= own.mean(0) - 1e-12).sum(0)) / (1 + SHUFFLES)
        name = name if which == "object" else f"{name}_foil"
        yield _measured(asked.numbers(key), name, own, null.mean(0), p)


def _spread(one: Observed, attention: Attention, maps: Array) -> Array:
    """Mass on outliers, mean rank of the norm, and entropy, of each head's attention: `(heads, 3)`.

    High norms that mean something are no outliers: those of the objects asked about, and of what stands out
    in the picture (the artifacts of vision transformers are where patches look like their neighbours;
    Darcet et al. 2024).
    """
    inside = attention.cells >= 0
    dull = attention.plain.copy()
    for mask in one.masks.values():
        dull[inside] &= ~mask[attention.cells[inside]]
    use = np.ones(len(inside), bool) if inside.sum() + 1 >= len(inside) else inside
    norms, maps, inside, dull = attention.norms[use], maps[:, use], inside[use], dull[use]
    middle = np.median(norms)
    reach = 3 * 1.4826 * np.median(np.abs(norms - middle))
    outlying = ((norms > middle + max(reach, 1e-6 * middle)) & dull) | ~inside
    share = maps / np.maximum(maps.sum(1, keepdims=True), 1e-300)
    rank = (ranks(norms) - 0.5) / len(norms)
    entropy = -(share * np.log(np.clip(share, 1e-300, None))).sum(1) / np.log(len(norms))
    return np.stack([(share * outlying).sum(1), (share * rank).sum(1), entropy], axis=1)


def _overlap(attention: Attention, objects: Array) -> dict[str, Array]:
    """The measures `ON_MASKS` of one example's attention against each of several masks: `(heads, masks)`."""
    inside = np.flatnonzero(attention.cells >= 0)
    inside = inside[np.argsort(attention.cells[inside])]
    maps = attention.maps[:, inside]
    above = maps - attention.average[inside]
    size, patches = objects.sum(1), maps.shape[1]
    sums = ranks(above.T).T @ objects.T
    auc = (sums - size * (size + 1) / 2) / (size * np.clip(patches - size, 1, None))

    def iou(chosen: NDArray[np.bool_]) -> Array:
        both = chosen.astype(float) @ objects.T
        return np.asarray(both / (size + chosen.sum(1, keepdims=True) - both))

    cuts = np.quantile(above, np.linspace(0.05, 0.95, 19), axis=1)
    return {
        "auc": auc,
        "pointing": objects[:, maps.argmax(1)].T,
        "iou_fixed": iou(above > 0),
        "iou_best": np.max([iou(above > cut[:, None]) for cut in cuts], axis=0),
        "mass": (maps / np.maximum(maps.sum(1, keepdims=True), 1e-300)) @ objects.T,
    }


def attention_maps(asked: AskedHeads, observed: Sequence[Observed]) -> pd.DataFrame:
    """The attention of each head to each patch of some examples, for the figures."""
    parts = []
    for one in observed:
        for number, site in enumerate(asked.heads):
            key = (site.tower, site.kind)
            if (attention := one.attention.get(key)) is None:
                continue
            inside = attention.cells >= 0
            cells, paid = attention.cells[inside], attention.maps[asked.numbers(key).index(number)][inside]
            mask = one.masks.get("object")
            rows, columns = attention.grid
            table = {
                "example": one.id,
                "site": str(site),
                "row": cells // columns,
                "column": cells % columns,
                "attention": paid,
                "difference": paid - attention.average[inside],
                "object": False if mask is None else mask[cells],
                "rows": rows,
                "columns": columns,
            }
            parts.append(pd.DataFrame(table))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"example": []})


def _change_measures(
    asked: AskedHeads, observed: Sequence[Observed], without: Mapping[str, Array], least: float
) -> Iterator[pd.DataFrame]:
    """The change of LD without each head (`zero`, `mean`, `resample`), and with it patched in (`effect`)."""
    effects = [one.effect for one in observed if one.effect is not None]
    for name, scores in {**without, **({"effect": np.stack(effects)} if effects else {})}.items():
        yield _measured(range(len(asked.heads)), name, scores, least, _p(scores, least))


def _read_measures(asked: AskedHeads, observed: Sequence[Observed]) -> Iterator[pd.DataFrame]:
    """The measures of what heads read (`READ`), each of the examples and heads that have it."""
    for name in READ:
        if name == "copies":
            yield from _copies(observed)
            continue
        nowhere = np.full(len(asked.heads), np.nan)
        every = np.stack([one.reading.scores.get(name, nowhere) for one in observed])
        for which, heads in _alike(~np.isnan(every).T):
            some = [one for one, there in zip(observed, which, strict=True) if there]
            scores = every[which][:, heads]
            if name.startswith("on_"):
                null = np.stack([one.reading.nulls[name] for one in some])[:, heads]
                yield _measured(heads, name, scores, null.mean(0), _p(scores - null))
            elif name.startswith("from_") or name == "direct":
                # Whether it is more (or less) than a share of the whole effect.
                share = DIRECT if name == "direct" else 0.5
                whole = np.stack([np.asarray(one.effect) for one in some])[:, heads]
                yield _measured(heads, name, scores, share * whole.mean(0), _p(scores - share * whole))
            else:
                yield _measured(heads, name, scores, 0.0, _p(scores))


def _copies(observed: Sequence[Observed]) -> Iterator[pd.DataFrame]:
    """How often a head that reads one option's word instead of the other raises it above all words, less how
    often the other: 1 always, −1 never but the other; against the words of other examples."""
    for which, heads in _alike(np.stack([one.reading.raised[:, 0] >= 0 for one in observed]).T):
        some = [one for one, there in zip(observed, which, strict=True) if there]
        raised = np.stack([one.reading.raised[heads] for one in some])  # examples, heads, (most, least)
        words = np.array([(one.pair.answer, one.pair.foil) for one in some])
        same = (raised[:, :, None] == words[None, None]).mean(-1)  # examples, heads, words of examples
        turned = (raised[:, :, None] == words[None, None, :, ::-1]).mean(-1)
        each, order = same - turned, np.arange(len(some))
        null = each.mean(2)
        own = each[order, :, order]
        yield _measured(heads, "copies", own, null.mean(0), _p(own - null))


def _mean_activations(observed: Sequence[Observed]) -> dict[Key, Tensor]:
    """Over the examples, for each kind: `(layers, heads, width)`."""
    keys = observed[0].activations
    return {key: torch.stack([one.activations[key] for one in observed]).mean(0) for key in keys}


def _knock_out(asked: AskedHeads, observed: Sequence[Observed], use: NDArray[np.bool_]) -> dict[str, Array]:
    """LD without each head, less LD: `(examples, heads)` for each way of knocking it out, over the examples
    that the head is measured on (`use`); null elsewhere."""
    ways = ("zero", "mean", "resample")
    found = np.full((len(ways), *use.shape), np.nan)
    groups = []
    for which, heads in _alike(use.T):
        some = [one for one, used in zip(observed, which, strict=True) if used]
        shift = rng(asked.seed, "resample").integers(1, len(some))
        others = [one.activations for one in (*some[shift:], *some[:shift])]
        groups.append((heads, iter(others), which, _mean_activations(some)))
    with progress(len(observed), what="knock-outs") as step:
        for number, one in enumerate(observed):
            cuts = [
                (way, head, _value(asked, one.placed[head], given))
                for heads, others, which, means in groups
                if which[number]
                for way, given in enumerate((None, means, next(others)))
                for head in heads
            ]
            alone = replace(one.pair, corrupt=one.pair.clean, edits=())
            sites, values = [one.placed[head] for _, head, _ in cuts], [value for *_, value in cuts]
            patched = engine.patch(asked.model, alone, sites, "noise", values=values)
            for numbers, scores in patched.chunks:
                way, head, _ = zip(*(cuts[n] for n in numbers), strict=True)
                found[way, number, head] = scores.ld.cpu().numpy() - one.ld_clean
            step(0, number + 1)
    return dict(zip(ways, found, strict=True))


def together(asked: AskedHeads, observed: Sequence[Observed], use: NDArray[np.bool_]) -> pd.DataFrame:
    """Accuracy and LD with no head, these heads, and random ones of the same layers knocked out.

    Each example runs without those heads that are measured on it (`use`). Where a layer has too few other
    heads there are no random ones to compare with.
    """
    means = _mean_activations(observed)
    parts = [
        (
            replace(asked, heads=[asked.heads[n] for n in np.flatnonzero(which)]),
            [observed[n] for n in examples],
        )
        for which, examples in _alike(use)
    ]
    sets = [("these heads", how, [some.heads for some, _ in parts]) for how in ("mean", "zero")]
    drawn = [[_random_heads(some, number) for some, _ in parts] for number in range(RANDOM)]
    if all(len(heads) == len(some.heads) for heads, (some, _) in zip(drawn[0], parts, strict=True)):
        sets += [("random heads", "mean", each) for each in drawn]
    clean = [(one.is_right, one.ld_clean) for _, some in parts for one in some]
    rows = [("none", "", "", len(clean), *np.mean(clean, axis=0))]
    with progress(len(sets), what="sets of heads") as step:
        for number, (name, how, each) in enumerate(sets):
            values, found = None if how == "zero" else means, []
            for heads, (_, some) in zip(each, parts, strict=True):
                edits = [Edit(site, "set", _value(asked, site, values)) for site in heads]
                runs = [(one.pair, asked.model.run(one.pair.clean, edits)) for one in some]
                found += [(int(x.argmax()) == pair.answer, logit_difference(x, pair)) for pair, x in runs]
            names = dict.fromkeys(str(site) for heads in each for site in heads)
            rows.append((name, how, " ".join(names), len(found), *np.mean(found, axis=0)))
            step(0, number + 1)
    return pd.DataFrame(rows, columns=formats.HEADS.tables["together.csv"].names)


def _value(asked: AskedHeads, site: Site, values: Mapping[Key, Tensor] | None) -> Tensor:
    """What stands in a head's place: zero, or its activation among those of its kind."""
    return torch.zeros(1) if values is None else values[site.tower, site.kind][asked.place(site)][None]


def _random_heads(asked: AskedHeads, number: int) -> list[Site]:
    """As many other heads of the same layers; fewer where a layer has too few."""
    taken = {(s.tower, s.kind, s.layer, s.units[0]) for s in asked.heads}
    drawn: list[Site] = []
    for tower, kind, layer in dict.fromkeys((s.tower, s.kind, s.layer) for s in asked.heads):
        here = [s for s in asked.heads if (s.tower, s.kind, s.layer) == (tower, kind, layer)]
        every = range(asked.model.shapes[tower].heads[kind])
        free = [head for head in every if (tower, kind, layer, head) not in taken]
        rng(asked.seed, "random heads", number, tower, kind, layer).shuffle(free)
        drawn += [replace(site, units=(head,)) for site, head in zip(here, free, strict=False)]
    return drawn

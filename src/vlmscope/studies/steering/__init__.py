"""Steering: a direction from two sets, where it works, what it does, and what it harms.

The direction at a site is the difference of means over the two sets, mean(h | with) − mean(h | without), of
the stream at one position or over the image's tokens; it is added to the runs of other examples without.
What it is worth stands beside random directions of its length, and beside what it changes where nothing
should change. Directions are built on one half of the examples and measured on the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import special
from torch import Tensor

from vlmscope import stored
from vlmscope.data import Examples, listed
from vlmscope.errors import SEED, DataError, VlmscopeError, number, whole
from vlmscope.progress import progress
from vlmscope.runs.model import Model
from vlmscope.sites import Site, Sites
from vlmscope.stats import LEVEL, interval, q_values
from vlmscope.stored import formats
from vlmscope.studies.sets import sets_of
from vlmscope.studies.steering.direction import Direction, check_at
from vlmscope.studies.steering.effects import (
    Case,
    Chosen,
    Effects,
    asked,
    cases_of,
    changes,
    directed_places,
    mean_states,
    plain_scores,
    random_like,
)

DIRECTION = "direction.safetensors"
RANDOM = 10
"""How many random directions a direction is compared with."""
SAID = 20
"""How many answers of each set are generated."""
MOST = 1000.0
"""The largest strength."""


@dataclass(frozen=True, eq=False)
class Steered:
    """A direction, and what it does.

    `layers` has a row for each site and strength: the mean `effect` over held-out examples without, with its
    interval, that of random directions of the same length (`null`, and where another of these would be with
    95 %), `p_value` and `q_value` of the difference, and whether it `works`: the interval is above 0, the q
    below 0.05. `chosen` is the site with the largest effect on the examples that built the direction.
    `measures` are of the chosen sites: how far the next word's distribution moves where it should not (`kl`,
    in nats), how many answers change, how many say the word. `captions` are the answers themselves.
    """

    direction: Direction
    layers: pd.DataFrame
    measures: pd.DataFrame
    captions: pd.DataFrame
    about: Mapping[str, Any] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tables, `direction.safetensors` and, last, `steer.json`; raises `StoreError`."""
        tables = {name: getattr(self, Path(name).stem) for name in formats.STEER.tables}
        formats.STEER.save(folder, self.about, {**tables, DIRECTION: self.direction.bytes()})

    @classmethod
    def claim(cls, folder: str | os.PathLike[str]) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        formats.STEER.claim(folder, DIRECTION)


def read(folder: str | os.PathLike[str]) -> Steered:
    """What `Steered.save` has written; raises `StoreError` where that is not all there."""
    about, tables = stored.read(Path(folder), formats.STEER)
    direction = Direction.load(Path(folder) / DIRECTION, Path(folder))
    return Steered(direction, about=about, **tables)


def steer(
    model: Model,
    examples: Examples,
    sites: Sites,
    *,
    without: Examples | None = None,
    label: str | None = None,
    corrupt: str | None = None,
    word: str | None = None,
    others: Examples | None = None,
    strengths: Sequence[float] = (1.0,),
    keep_norm: bool = False,
    at: str = "read",
    random: int = RANDOM,
    said: int = SAID,
    seed: int = 0,
    data: str = "examples",
) -> Steered:
    """Build a direction from examples with something and examples without it, and measure it on others.

    The two sets are `examples` and those `without`; or the `examples` that have a `label` and those that
    have not; or each example's clean and corrupt image or text (`sets.sets_of`). `sites` are places of a
    whole kind, each one position or several that are averaged (`decoder.*.resid@readout`, or `@image`). The
    effect is the change of the log-probability of a `word` (by default the label's value) as the answer, or,
    with `corrupt` and no word, of each example's own LD, in held-out runs without. `others` are examples in
    which nothing should change: by default those held out that have it already.

    A direction is added `strengths` times, with `keep_norm` such that a position keeps its length; answers
    are generated with it added at `read`, or at every one of the `words`. `random` directions of the same
    length are its null. At most `said` answers of each set are generated.

    Raises `DataError` for sets that are none (`sets_of`), `SiteError` for a site that is not one place.

    >>> import vlmscope
    >>> model, examples = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=8)
    >>> found = steer(model, examples, "decoder.2.resid@readout", corrupt="image", random=2, said=1)
    >>> found.direction.best, found.layers["n"].tolist()
    ('decoder.2.resid@readout', [4])
    """
    check_at(at)
    random = whole(random, "the number of random directions", 2, 1000)
    said, seed = whole(said, "the number of answers", 1), whole(seed, "the seed", most=SEED)
    strengths = [number(x, "the strength", -MOST, MOST) for x in strengths]
    if not strengths or 0 in strengths or len({*strengths}) < len(strengths):
        raise VlmscopeError("the strengths are none, twice the same, or 0; give such as 1 and 2")
    sets = sets_of(examples, without=without, label=label, corrupt=corrupt)
    if without is not None and word is None:
        raise VlmscopeError(
            "with two sets of examples (--without) name the --word that the direction is to say"
        )
    word = word or (label.partition("=")[2] if label else None)
    places = directed_places(model, sites)
    names, halves = ("built with", "built without", "with", "without"), sets.halves(seed)
    parts = [some for half in halves for some in half]
    cases = {name: cases_of(model, some, word, name) for name, some in zip(names, parts, strict=True)}
    lacking, aside = ([case.example for case in cases[name]] for name in ("without", "with"))
    told = {
        "without": asked(model, lacking[:said], "without"),
        "others": asked(model, aside if others is None else listed(others), "others"),
    }
    vectors = _difference(model, places, cases["built with"], cases["built without"])
    about = {"sets": _described(without, label, corrupt, data), "word": word or "", "data": data}
    if at == "words":  # positions that name no word are refused before anything else is computed
        for site in places:
            _direction(model, vectors, site, about).edits(model, cases["with"][0].pair.clean, at=at)
    metric = "ld" if word is None else "logprob"
    drawn = {site: [v, *random_like(v, site, random, seed)] for site, v in vectors.items()}
    alone, how = {site: [v] for site, v in vectors.items()}, (strengths, keep_norm, metric)
    first = changes(model, cases["built without"], alone, *how, "building").mean(0)[..., 0]
    layers = _layers(changes(model, cases["without"], drawn, *how, "layers"), first, places, strengths)
    chosen = [places[int(n)] for n in first.argmax(0)]
    uses = [
        Chosen(model, site, strength, keep_norm, at, drawn[site])
        for site, strength in zip(chosen, strengths, strict=True)
    ]
    measures, captions = _measures(uses, layers, told, said, word)
    gap = [plain_scores(model, cases[name], metric).mean() for name in ("with", "without")]
    best = places[int(first.max(1).argmax())]
    content = {
        "format": formats.STEER.name,
        "model": model.name,
        "weights": model.fingerprint(),
        **about,
        "others": "held-out examples with it" if others is None else "other examples",
        "counts": {name: len(some) for name, some in cases.items()},
        "gap": float(gap[0] - gap[1]),
        "strengths": strengths,
        "keep_norm": keep_norm,
        "at": at,
        "random": random,
        "seed": seed,
    }
    direction = _direction(model, vectors, best, about)
    return Steered(direction, layers, measures, captions, content)


def _measures(
    uses: Sequence[Chosen],
    layers: pd.DataFrame,
    told: Mapping[str, Sequence[Case]],
    said: int,
    word: str | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of measures of the chosen sites, and the answers that some of them count."""
    rows, captions = [], []
    with progress(len(uses), what="strengths") as step:
        for n, used in enumerate(uses, start=1):
            own = layers[(layers["site"] == str(used.site)) & (layers["strength"] == used.strength)].iloc[0]
            rows.append(used.row("effect", "without", *own[["effect", "low", "high", "null", "n"]]))
            rows.append(used.divergence(told["others"]))
            for name, some in told.items():
                captions.append(used.answers(some[:said], name))
                rows += used.shares(captions[-1], name, word)
            step(0, n)
    return pd.DataFrame(rows), pd.concat(captions, ignore_index=True)


def _difference(
    model: Model, places: Sequence[Site], having: Sequence[Case], lacking: Sequence[Case]
) -> dict[Site, Tensor]:
    """The mean with less the mean without, at each place; raises `DataError` where nothing differs."""
    two = [mean_states(model, places, cases) for cases in (having, lacking)]
    vectors = {site: two[0][site].mean(0) - two[1][site].mean(0) for site in places}
    if same := next((site for site, vector in vectors.items() if not vector.any()), None):
        raise DataError(
            f"the two sets do not differ at {same}, so there is no direction; name other sites (--sites)"
        )
    wide = torch.promote_types(model.dtype, torch.float32)
    return {site: vector.to(wide) for site, vector in vectors.items()}


def _direction(model: Model, vectors: dict[Site, Tensor], best: Site, about: dict[str, str]) -> Direction:
    return Direction(
        {str(site): vector for site, vector in vectors.items()}, model.fingerprint(), str(best), about
    )


def _described(without: Examples | None, label: str | None, corrupt: str | None, data: str) -> str:
    """The two sets in words."""
    if label is not None:
        return f"{label} against the rest of {data}"
    if corrupt is not None:
        return f"clean against corrupt {corrupt} of {data}"
    other = str(without) if isinstance(without, (str, Path)) else "other examples"
    return f"{data} against {other}"


def _layers(
    effects: Effects, first: Effects, places: Sequence[Site], strengths: Sequence[float]
) -> pd.DataFrame:
    """The table of sites and strengths: the first of the directions against the others, which are random."""
    rows = []
    random = effects.shape[-1] - 1
    for p, site in enumerate(places):
        for s, strength in enumerate(strengths):
            own, nulls = effects[:, p, s, 0], effects[:, p, s, 1:].mean(0)
            (low,), (high,) = interval(own[:, None])
            null, spread = nulls.mean(), nulls.std(ddof=1) * np.sqrt(1 + 1 / random)
            reach = spread * special.stdtrit(random - 1, 1 - LEVEL / 2)
            t = (own.mean() - null) / spread if spread > 0 else np.nan
            place = (str(site), site.tower, site.layer, site.kind, site.position, strength, len(own))
            ends = (own.mean(), low, high, null, null - reach, null + reach)
            rows.append(
                (*place, *ends, 2 * special.stdtr(random - 1, -abs(t)), p == int(first[:, s].argmax()))
            )
    table = pd.DataFrame(rows, columns=formats.STEER.tables["layers.csv"].names[:-2])
    table["q_value"] = q_values(table["p_value"])
    table["works"] = (table["low"] > 0) & (table["effect"] > table["null"]) & (table["q_value"] < LEVEL)
    return table

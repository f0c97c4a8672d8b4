"""What directions do: in many held-out runs at once, and in what a model answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmscope.data.example import Example, find_roles
from vlmscope.errors import DataError, ExampleError, SiteError, shown
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.patching import engine
from vlmscope.patching.scores import Baselines, score
from vlmscope.patching.trace import Images
from vlmscope.progress import progress
from vlmscope.runs.forward import forward, read
from vlmscope.runs.model import Model, check_model
from vlmscope.runs.prepare import encode
from vlmscope.sites import Site, Sites, expand, parse
from vlmscope.stats import interval, rng, share_interval
from vlmscope.stored import formats
from vlmscope.studies.sets import FEWEST
from vlmscope.studies.steering.direction import Direction, moved

NUMBERS = 2**26
"""Numbers of values that one call of the engine is given, about."""

Effects = NDArray[np.float64]
"""Changes of a metric: examples × sites × strengths × directions."""
Vectors = Mapping[Site, Sequence[Tensor]]
"""Directions by site, as many at each."""


class Case(NamedTuple):
    """An example with the pair of equal runs that it is scored in."""

    example: Example
    pair: Pair


def directed_places(model: Model, sites: Sites) -> list[Site]:
    """The places that a direction can be at: of a whole kind, in one layer; raises `SiteError` for others."""
    check_model(model)
    found = expand(parse(sites), model.shapes)
    for site in found:
        if len(site.parts) > 1 or site.part or site.source:
            raise SiteError(
                f"bad site {shown(site)}: a direction and a probe are of a whole kind in one layer, such as "
                "decoder.*.resid@readout"
            )
    return found


def cases_of(model: Model, examples: Sequence[Example], word: str | None, name: str) -> list[Case]:
    """The examples that can be scored, each with its pair: of a word, or of its own answer and foil.

    Those that cannot are left out with a warning; raises `DataError` where too few are left.
    """

    def pair(example: Example) -> Pair:
        alone = replace(example, corrupt_image=None, corrupt_prompt=None)
        if word is not None:
            alone = replace(alone, answer=word, foil="", roles=dict(example.roles))
        return model.prepare(alone, word is not None)

    return _runnable(examples, pair, name)


def asked(model: Model, examples: Sequence[Example], name: str) -> list[Case]:
    """As `cases_of`, each with what the model is asked, and nothing behind the prompt."""

    def pair(example: Example) -> Pair:
        images = [example.clean_image, *example.more_images]
        inputs = encode(model, images, example.clean_prompt, example.roles)
        return Pair(inputs, inputs, 0, None)

    return _runnable(examples, pair, name)


def _runnable(examples: Sequence[Example], pair: Callable[[Example], Pair], name: str) -> list[Case]:
    found, reasons = [], []
    for example in examples:
        try:
            found.append(Case(example, pair(example)))
        except ExampleError as error:
            reasons.append(f"'{example.id}': {error}")
    if len(found) < max(1, min(FEWEST // 2, len(examples))):
        why = f"; {reasons[0]}" if reasons else ""
        raise DataError(f"too few examples ({name}) can be run: {len(found)} of {len(examples)}{why}")
    if reasons:
        text = f"{len(reasons)} of {len(examples)} examples ({name}) are left out; {reasons[0]}"
        warnings.warn(text, stacklevel=4)
    return found


def one_place(model: Model, site: Site, inputs: Inputs) -> Site:
    """A site in one run; raises `SiteError` for a pattern of positions."""
    found = model.places(site, inputs)
    if len(found) > 1:
        raise SiteError(
            f"bad site {shown(site)}: names {len(found)} places; expected one position, or a name for "
            "several that are averaged, such as readout or image"
        )
    return found[0]


def states(model: Model, sites: Sequence[Site], inputs: Inputs) -> dict[Site, Tensor]:
    """The activations at sites in one run, `(positions, width)` each."""
    placed = {site: one_place(model, site, inputs) for site in sites}
    values = forward(model, inputs, keep={site.point for site in sites}).values
    return {site: read(model, values[site.point], there) for site, there in placed.items()}


def mean_states(model: Model, sites: Sequence[Site], cases: Sequence[Case]) -> dict[Site, Tensor]:
    """One vector an example and site, the mean over the site's positions: `(examples, width)`, float64."""
    each = [states(model, sites, case.pair.clean) for case in cases]
    return {site: torch.stack([one[site].double().mean(0).cpu() for one in each]) for site in sites}


def random_like(vector: Tensor, site: Site, many: int, seed: int) -> list[Tensor]:
    """Random directions as long as a vector."""
    found = []
    for turn in range(many):
        drawn = torch.from_numpy(rng(seed, "direction", site, turn).standard_normal(len(vector)))
        found.append((drawn * (vector.double().norm() / drawn.norm())).to(vector))
    return found


def changes(
    model: Model,
    cases: Sequence[Case],
    vectors: Vectors,
    strengths: Sequence[float],
    keep_norm: bool,
    metric: str,
    what: str,
) -> Effects:
    """How far each direction at each strength moves a metric in each example, at the engine's speed."""
    many = len(next(iter(vectors.values())))
    found = np.zeros((len(cases), len(vectors), len(strengths), many))
    with progress(len(cases), what=what) as step:
        for number, case in enumerate(cases):
            before = states(model, list(vectors), case.pair.clean)
            images = Images()
            for some in _batches(before, many * len(strengths)):
                sites, values, at = [], [], []
                for site in some:
                    place, there = one_place(model, site, case.pair.clean), list(vectors).index(site)
                    for s, strength in enumerate(strengths):
                        for n, vector in enumerate(vectors[site]):
                            sites.append(place)
                            values.append(moved(before[site], strength * vector, keep_norm))
                            at.append((there, s, n))
                patched = engine.patch(
                    model, case.pair, sites, "noise", values=values, metric=metric, images=images
                )
                for numbers, scores in patched.chunks:
                    gained = (scores.value - patched.clean.value).cpu().numpy()
                    for row, value in zip(numbers, gained.tolist(), strict=True):
                        found[(number, *at[row])] = value
            step(0, number + 1)
    return found


def _batches(before: Mapping[Site, Tensor], rows: int) -> Iterator[list[Site]]:
    """Sites whose values fit together."""
    batch: list[Site] = []
    total = 0
    for site, value in before.items():
        if batch and total + rows * value.numel() > NUMBERS:
            yield batch
            batch, total = [], 0
        batch.append(site)
        total += rows * value.numel()
    yield batch


def plain_scores(model: Model, cases: Sequence[Case], metric: str) -> Effects:
    """A metric of the runs as they are."""
    found = []
    for _, pair in cases:
        logits = forward(model, pair.clean, positions=len(pair.answers)).logits
        base = Baselines(logits, logits, pair.answers, pair.foil)
        found.append(float(score(logits[None], base, metric).value))
    return np.array(found)


@dataclass(frozen=True, eq=False)
class Chosen:
    """One direction as it is used: at a site, with a strength, and a random one beside it."""

    model: Model
    site: Site
    strength: float
    keep_norm: bool
    at: str
    vectors: Sequence[Tensor]

    def row(
        self, measure: str, of: str, value: Any, low: Any, high: Any, null: Any, n: int
    ) -> dict[str, Any]:
        """A row of the table of measures."""
        place = {"strength": self.strength, "site": str(self.site), "measure": measure, "set": of}
        return place | {"value": value, "low": low, "high": high, "null": null, "n": int(n)}

    def divergence(self, cases: Sequence[Case]) -> dict[str, Any]:
        """How far the next word's distribution moves, KL(before ‖ after) in nats."""
        vectors = {self.site: self.vectors}
        found = changes(self.model, cases, vectors, [self.strength], self.keep_norm, "kl", "divergence")[
            :, 0, 0
        ]
        (low,), (high,) = interval(found[:, :1])
        return self.row("kl", "others", found[:, 0].mean(), low, high, found[:, 1:].mean(), len(found))

    def answers(self, cases: Sequence[Case], of: str) -> pd.DataFrame:
        """What the model answers before, with the direction, and with a random one."""
        rows = []
        for example, pair in cases:
            inputs = pair.clean
            said = [self.model.answer(inputs)]
            for vector in self.vectors[:2]:
                direction = Direction({str(self.site): vector}, self.model.fingerprint(), str(self.site))
                edits = direction.edits(
                    self.model, inputs, self.strength, at=self.at, keep_norm=self.keep_norm
                )
                said.append(self.model.answer(inputs, edits))
            rows.append((self.strength, of, example.id, example.clean_prompt, *said, said[0] != said[1]))
        return pd.DataFrame(rows, columns=formats.STEER.tables["captions.csv"].names)

    def shares(self, said: pd.DataFrame, of: str, word: str | None) -> list[dict[str, Any]]:
        """How many answers change, and how many say the word."""
        low, high = share_interval(said["changed"])
        null, n = (said["random"] != said["before"]).mean(), len(said)
        rows = [self.row("changed", of, said["changed"].mean(), low, high, null, n)]
        if word is not None:
            says = {
                name: np.array([bool(find_roles(text, {"word": word})) for text in said[name]])
                for name in ("before", "after", "random")
            }
            for name, when in (("says before", "before"), ("says", "after")):
                low, high = share_interval(says[when])
                null = says["random"].mean() if when == "after" else np.nan
                rows.append(self.row(name, of, says[when].mean(), low, high, null, n))
        return rows

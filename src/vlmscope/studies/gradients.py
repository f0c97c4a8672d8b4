"""Estimates of patches, as rows of `attribute`, and the exact patches that say how good they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmscope.data.example import Example
from vlmscope.layout import slots
from vlmscope.models.inputs import Pair
from vlmscope.patching import engine, reference
from vlmscope.patching.gradients import estimate
from vlmscope.patching.trace import Images
from vlmscope.sites import Site
from vlmscope.stats import rng
from vlmscope.studies.recheck import RowsOf, check_exact
from vlmscope.studies.rows import add_scores, answer_of, result_of, words_of
from vlmscope.studies.run_writer import Todo
from vlmscope.studies.task import Attribution, Result

Array = NDArray[np.float64]


def estimated(
    task: Attribution, job: Todo, sites: Sequence[Site], step: Callable[[int, float], None]
) -> Result:
    """The scores of one example, means over its pairs, and exact effects of some of its sites."""
    assert task.method != "direct"
    model, example = task.model, task.examples[job.number]
    pairs = task.pairs(example)
    layout = pairs[0].clean.layout
    placed = model.placed(sites, pairs[0].clean)
    how: dict[str, Any] = {"method": task.method, **({"steps": task.steps} if task.steps else {})}
    totals, base = np.zeros(len(placed)), defaultdict[str, float](float)
    for number, pair in enumerate(pairs):
        found = estimate(model, pair, placed, task.direction, metric=task.metric, **how)
        totals += found.scores / len(pairs)
        add_scores(base, found.clean, found.corrupt, len(pairs))
        step(len(placed), (number + 1) / len(pairs) / (2 if task.verify else 1))
    exact: dict[int, float] = {}
    if task.verify:
        kinds = [(site.tower, site.kind, site.part) for site in placed]
        some = to_verify(kinds, totals, task.verify, task.seed, example.id)
        exact = dict(zip(some, _exact(task, pairs, [placed[n] for n in some]), strict=True))
    names = {tower: slots(there) for tower, there in layout.items()}
    common = {"example": example.id, "corruption": task.kind}
    rows = [
        {
            **common,
            **words_of(site, layout[site.tower], names[site.tower]),
            "score": score,
            "exact": exact.get(number),
        }
        for number, (site, score) in enumerate(zip(placed, totals.tolist(), strict=True))
    ]
    return result_of(task, job, rows, pairs[0], {**base, **answer_of(task, job, example, pairs[0])})


def to_verify(
    kinds: Sequence[tuple[str, ...]], scores: Array, many: int, seed: int, example: str
) -> list[int]:
    """Of each kind the numbers of the `many` best scores, and of as many others, drawn at random."""
    by_kind = defaultdict(list)
    for number, kind in enumerate(kinds):
        by_kind[kind].append(number)
    found: list[int] = []
    for kind, numbers in by_kind.items():
        order = np.argsort(-np.abs(scores[numbers]), kind="stable")
        best, rest = order[:many], np.sort(order[many:])
        drawn = rng(seed, "verify", example, *kind).permutation(rest)[:many]
        found += [numbers[n] for n in [*best, *drawn]]
    return found


def _exact(
    task: Attribution, pairs: Sequence[Pair], sites: Sequence[Site], way: ModuleType = engine
) -> Array:
    """What patches change of the metric, against the run that is patched: means over pairs."""
    found, images = np.zeros(len(sites)), Images()
    for pair in pairs:
        more = {"images": images} if way is engine else {}
        patched = way.patch(task.model, pair, sites, task.direction, metric=task.metric, **more)
        base = patched.clean if task.direction == "noise" else patched.corrupt
        for numbers, scores in patched.chunks:
            found[numbers] += (scores.value - base.value).cpu().numpy() / len(pairs)
    return found


def check_effects(task: Attribution, base: pd.DataFrame, rows_of: RowsOf) -> dict[str, Any] | None:
    """Recompute some random exact effects by plain forwards; None if there are none."""

    def recompute(example: Example, some: pd.DataFrame) -> Array:
        pairs = task.pairs(example)
        return _exact(task, pairs, task.model.placed(some["site"].tolist(), pairs[0].clean), reference)

    return check_exact(task, base, rows_of, "effects", recompute)

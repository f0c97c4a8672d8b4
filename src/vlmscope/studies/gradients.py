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
from vlmscope.patching.scores import agrees
from vlmscope.patching.trace import Images
from vlmscope.sites import Site
from vlmscope.stats import rng
from vlmscope.studies.recheck import CHECKED, drawn_examples, verdict
from vlmscope.studies.rows import RowsOf, result_of, words_of
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
        for run, scores in (("clean", found.clean), ("corrupt", found.corrupt)):
            for name in ("p", "ld", "value"):
                base[f"{name}_{run}"] += getattr(scores, name).item() / len(pairs)
        step(len(placed), (number + 1) / len(pairs) / (2 if task.verify else 1))
    exact: dict[int, float] = {}
    if task.verify:
        some = _some(task, example, placed, totals)
        exact = dict(zip(some, _exact(task, pairs, [placed[n] for n in some]), strict=True))
    answered: dict[str, Any] = {}
    if not job.done:
        predicted = model.answer(pairs[0].clean)
        answered = {"predicted": predicted, "correct": agrees(predicted, example.answer)}
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
    return result_of(task, job, rows, pairs[0], {**base, **answered})


def _some(task: Attribution, example: Example, placed: Sequence[Site], scores: Array) -> list[int]:
    """Of each kind of site the numbers of the best, and of as many others, drawn at random."""
    kinds = defaultdict(list)
    for number, site in enumerate(placed):
        kinds[site.tower, site.kind, site.part].append(number)
    found: list[int] = []
    for kind, numbers in kinds.items():
        order = np.argsort(-np.abs(scores[numbers]), kind="stable")
        best, rest = order[: task.verify], np.sort(order[task.verify :])
        drawn = rng(task.seed, "verify", example.id, *kind).permutation(rest)[: task.verify]
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


def check_exact(task: Attribution, base: pd.DataFrame, rows_of: RowsOf) -> dict[str, Any] | None:
    """Recompute some random exact effects by plain forwards; None if there are none."""
    drawn = drawn_examples(task, CHECKED, base)
    rows = rows_of(drawn)
    rows = rows[rows["exact"].notna()]
    if rows.empty:
        return None
    rows = rows.iloc[rng(task.seed, "check", "rows").permutation(len(rows))[:CHECKED]]
    largest = 0.0
    for name, some in rows.groupby("example", sort=False):
        pairs = task.pairs(drawn[str(name)])
        sites = task.model.placed(some["site"].tolist(), pairs[0].clean)
        again = _exact(task, pairs, sites, reference)
        largest = max(largest, float(np.abs(again - some["exact"].to_numpy()).max()))
    said = f"{len(rows)} exact effects were recomputed by plain forwards and differ"
    return verdict(task, len(rows), largest, base[["value_clean", "value_corrupt"]], said)

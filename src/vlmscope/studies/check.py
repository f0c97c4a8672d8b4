"""Every run checks itself: random rows of it are recomputed by the slow reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.data.example import Example
from vlmscope.patching import reference
from vlmscope.patching.scores import ROUNDING
from vlmscope.stats import rng
from vlmscope.studies.task import Task

ALARM = 100
"""A difference of so many roundings is none of rounding."""
CHECKED = 5
"""How many random rows of a run the reference recomputes."""


def check_rows(
    task: Task, count: int, base: pd.DataFrame, effects_of: Callable[[list[str]], pd.DataFrame]
) -> dict[str, Any] | None:
    """Recompute some random rows: how many, and the largest difference; None where there is nothing to check.

    Which ones depends on the seed and the table; they are spread over kinds and examples.
    """
    draw = rng(task.seed, "check")
    ran = base.loc[~base["excluded"].astype(bool), "example"]
    known = {example.id: example for example in task.examples}
    ids = [name for name in ran.drop_duplicates(keep=False) if name in known]
    if count < 1 or task.engine == "reference" or not ids:
        return None
    chosen = [ids[n] for n in draw.permutation(len(ids))[:count]]
    rows = effects_of(chosen)
    rows = rows[np.isfinite(rows["value"])].drop_duplicates(["example", "site"])
    if rows.empty:
        return None
    rows = rows.iloc[draw.permutation(len(rows))]
    kinds = [rows["tower"], rows["kind"], rows["unit"].astype("string").str.get(0).fillna("")]
    turns = pd.DataFrame({"kind": rows.groupby(kinds).cumcount(), "of": rows.groupby("example").cumcount()})
    rows = rows.loc[turns.sort_values(["kind", "of"], kind="stable").index[:count]]
    largest = 0.0
    for name, some in rows.groupby("example", sort=False):
        again = _recomputed(task, known[str(name)], some["site"].tolist())
        largest = max(largest, float(np.abs(again - some["value"].to_numpy()).max()))
    size = max(1.0, float(rows["value"].abs().max()))
    if largest > ALARM * ROUNDING[task.model.precision] * size:
        warnings.warn(
            f"{len(rows)} random rows were recomputed by plain forwards and differ by up to {largest:.2g}, "
            "more than rounding does: do not trust this run, and compute it anew with --engine reference",
            stacklevel=2,
        )
    return {"rows": len(rows), "largest": largest}


def _recomputed(task: Task, example: Example, sites: Sequence[str]) -> np.ndarray[Any, Any]:
    """The metric of patches of one example, one plain forward each."""
    pairs = task.pairs(example)
    total = np.zeros(len(sites))
    for pair in pairs:
        placed = task.model.placed(sites, pair.clean)
        values = task.values(example, pair, placed)
        again = reference.patch(task.model, pair, placed, task.direction, values=values, metric=task.metric)
        for numbers, scores in again.chunks:
            total[numbers] += scores.value.cpu().numpy() / len(pairs)
    return total

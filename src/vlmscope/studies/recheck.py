"""Every run checks itself: a few of its numbers are computed again, one plain forward each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from vlmscope.data.example import Example
from vlmscope.patching.scores import ROUNDING
from vlmscope.stats import rng
from vlmscope.studies.task import Task

CHECKED = 5
"""How many random rows of a run the reference recomputes."""
RowsOf = Callable[[Collection[str]], pd.DataFrame]
"""What reads the rows of some examples, by their ids."""
ALARM = 100
"""A difference of so many roundings is none of rounding."""


def drawn_examples(task: Task, count: int, base: pd.DataFrame) -> dict[str, Example]:
    """Some examples that ran, by their ids, drawn to be looked at again."""
    ran, known = base.loc[~base["excluded"].astype(bool), "example"], {*task.ids}
    ids = [name for name in ran.drop_duplicates(keep=False) if name in known]
    return task.named(ids[n] for n in rng(task.seed, "check").permutation(len(ids))[:count])


def check_exact(
    task: Task,
    base: pd.DataFrame,
    rows_of: RowsOf,
    what: str,
    recompute: Callable[[Example, pd.DataFrame], np.ndarray[Any, Any]],
) -> dict[str, Any] | None:
    """Recompute some random exact effects by plain forwards; None if there are none."""
    drawn = drawn_examples(task, CHECKED, base)
    rows = rows_of(drawn)
    rows = rows[rows["exact"].notna()]
    if rows.empty:
        return None
    rows = rows.iloc[rng(task.seed, "check", "rows").permutation(len(rows))[:CHECKED]]
    largest = 0.0
    for name, some in rows.groupby("example", sort=False):
        again = recompute(drawn[str(name)], some)
        largest = max(largest, float(np.abs(again - some["exact"].to_numpy()).max()))
    said = f"{len(rows)} exact {what} were recomputed by plain forwards and differ"
    return verdict(task, len(rows), largest, base[["value_clean", "value_corrupt"]], said)


def verdict(
    task: Task, rows: int, largest: float, values: ArrayLike, said: str, way_out: str = ""
) -> dict[str, Any]:
    """What `run.json` keeps of a check of so many rows; an alarm where they differ by more than rounding does
    in numbers of the size of `values`. `said` says what differs."""
    size = max(1.0, float(np.nanmax(np.abs(np.asarray(values, float)), initial=0.0)))
    if largest > ALARM * ROUNDING[task.model.precision] * size:
        warnings.warn(
            f"{said} by up to {largest:.2g}, more than rounding does: do not trust this run{way_out}",
            stacklevel=3,
        )
    return {"rows": rows, "largest": largest}

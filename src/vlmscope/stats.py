"""Intervals and tests for means over examples, and random draws that depend on nothing but their names.

Where one random generator serves a whole study, whatever is measured before moves what is measured
after. So every draw has its own, by the seed and by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special  # of scipy.stats the import alone takes half a second of every command

Scores = NDArray[np.float64]

FEWEST = 10
"""Of fewer examples there is no interval and no p-value: neither would hold what it says."""
LEVEL = 0.05
"""Intervals hold 95 %, tests and false discovery rates allow 5 %."""


def _digest(seed: int, words: Iterable[object]) -> bytes:
    return hashlib.sha256(repr((seed, *map(str, words))).encode()).digest()


def rng(seed: int, *words: object) -> np.random.Generator:
    """The generator of one draw: `words` name the measure, the head or word, the example.

    >>> first, again, other = (rng(0, "auc", name).random() for name in ("a", "a", "b"))
    >>> first == again, first == other
    (True, False)
    """
    return np.random.default_rng(int.from_bytes(_digest(seed, words), "big"))


def shuffled(seed: int, ids: Iterable[str], *words: object) -> list[int]:
    """The places of `ids` in an order that the ids decide, not the order in which they are given.

    >>> ids, turned = ["a", "b", "c"], ["c", "a", "b"]
    >>> [ids[n] for n in shuffled(0, ids)] == [turned[n] for n in shuffled(0, turned)]
    True
    """
    keys = [_digest(seed, (*words, name)) for name in ids]
    return sorted(range(len(keys)), key=keys.__getitem__)


def interval(scores: Scores, other: Scores | None = None) -> Scores:
    """The 95 % interval of the mean of each column of `(examples, columns)`: `(2, columns)`.

    With `other`, scores of other examples, it is that of the difference of the two means.

    It holds what either of two says: Student's t (Welch's, of two), and t corrected for skewness (Johnson
    1978) by the monotone cubic of Hall (1992). Student's alone misses the mean of skewed scores too often,
    the corrected one that of symmetric scores with long tails. What it covers is measured in docs/numbers.md:
    at least 93 % at 10 examples of symmetric scores, and at 20 of scores with a skewness up to 5. An effect
    that most examples lack, in one of ten say, wants 50: what no example shows, no interval can know.

    Where there are fewer than `FEWEST` examples, or all scores are the same, there is none: nulls.

    >>> interval(np.arange(20.0)[:, None]).round(2).tolist()
    [[6.73], [12.27]]
    """
    found = _estimate(scores, other)
    t = special.stdtrit(found.freedom, [[1 - LEVEL / 2], [LEVEL / 2]])
    corrected = 3 / found.skew * (np.cbrt(1 + found.skew * (t - found.skew / 6)) - 1)
    ends = np.stack([np.maximum(t[0], corrected[0]), np.minimum(t[1], corrected[1])])
    return np.asarray(found.mean - found.error * ends)


def p_values(scores: Scores, other: Scores | None = None, *, least: ArrayLike = 0.0) -> Scores:
    """Two-sided p-values that the mean of each column of `(examples, columns)` is 0, or within ±`least`.

    With `other`, that the difference of the two means is. The inversion of `interval`: the larger p of
    Student's t and of t corrected for skewness, so that a p is below 0.05 just where the interval leaves 0
    out. Nulls where there is no interval.

    >>> p_values(np.arange(20.0)[:, None] - 6.73).round(3).tolist()
    [0.05]
    """
    found = _estimate(scores, other)
    t = np.sign(found.mean) * np.maximum(np.abs(found.mean) - least, 0) / found.error
    corrected = t + found.skew * t**2 / 3 + found.skew**2 * t**3 / 27 + found.skew / 6
    # What the correction turns around is no evidence.
    size = np.minimum(np.abs(t), np.maximum(corrected * np.sign(t), 0))
    return np.asarray(2 * special.stdtr(found.freedom, -size))


def q_values(p: ArrayLike) -> Scores:
    """p-values after Benjamini and Hochberg (1995); a null is no test, and counts for none.

    >>> q_values([0.01, np.nan, 0.04]).tolist()
    [0.02, nan, 0.04]
    """
    found = np.array(p, dtype=float)
    there = np.flatnonzero(~np.isnan(found))
    falling = there[np.argsort(-found[there], kind="stable")]
    scaled = found[falling] * (len(there) / np.arange(len(there), 0, -1))
    found[falling] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return found


def ranks(values: ArrayLike) -> Scores:
    """The ranks down each column, from 1; of values that are the same, the mean of theirs. Nulls in all of a
    column that holds one.

    >>> ranks([0.5, 0.1, 0.5]).tolist()
    [2.5, 1.0, 2.5]
    """
    given = np.asarray(values, dtype=float)
    found = pd.DataFrame(given).rank().to_numpy().reshape(given.shape)
    return np.where(np.isnan(given).any(0), np.nan, found)


def share_interval(yes: ArrayLike) -> Scores:
    """The 95 % interval of the share of true values, by Clopper and Pearson (1934): exact, for any number.

    >>> share_interval([True] * 12).round(3).tolist()
    [0.735, 1.0]
    """
    each = np.asarray(yes, dtype=bool)
    many, no = int(each.sum()), int((~each).sum())
    low = special.betaincinv(many, no + 1, LEVEL / 2) if many else 0.0
    high = special.betaincinv(many + 1, no, 1 - LEVEL / 2) if no else 1.0
    return np.array([low, high])


def share_bound(yes: int, of: int) -> float:
    """The 95 % upper bound of a share of which `yes` were seen among `of`, by Clopper and Pearson (1934);
    1 where none was looked at.

    >>> round(share_bound(0, 59), 3), share_bound(0, 0)
    (0.05, 1.0)
    """
    return 1.0 if yes >= of else float(special.betaincinv(yes + 1, of - yes, 1 - LEVEL))


class _Estimate(NamedTuple):
    """Means or their differences, with standard error (null: none) and skewness (never 0)."""

    mean: Scores
    error: Scores
    skew: Scores
    freedom: Scores


def _estimate(scores: Scores, other: Scores | None) -> _Estimate:
    mean, square, cube = _moments(scores)
    freedom = np.full_like(mean, len(scores) - 1)
    if other is not None:
        minus, square_of, cube_of = _moments(other)
        parts = square**2 / max(1, len(scores) - 1) + square_of**2 / max(1, len(other) - 1)
        freedom = (square + square_of) ** 2 / np.where(parts > 0, parts, np.nan)
        mean, square, cube = mean - minus, square + square_of, cube - cube_of
    error = np.sqrt(np.where(square > 0, square, np.nan))
    skew = cube / error**3
    # The cubic's limit at 0, to six digits.
    return _Estimate(mean, error, np.where(np.abs(skew) < 1e-4, 1e-4, skew), freedom)


def _moments(scores: Scores) -> tuple[Scores, Scores, Scores]:
    """Mean of columns, and the variance (0 where all scores are the same) and third moment of that mean."""
    n = len(scores)
    if n < FEWEST:
        none = np.full(scores.shape[1], np.nan)
        return (scores.mean(0) if n else none), none, none
    mean = scores.mean(0)
    away = scores - mean
    rounding = 8 * np.finfo(np.float64).eps * np.abs(scores).max(0)
    square = (away**2).mean(0)
    square = np.where(square > rounding**2, square, 0.0)
    # Johnson's skewness is of moments over n, his standard error over n − 1.
    return mean, square / (n - 1), (away**3).mean(0) * (n / (n - 1)) ** 1.5 / n**2

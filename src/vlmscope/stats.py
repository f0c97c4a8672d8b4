"""Intervals and tests for means over examples, as deterministic as what they are asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vlmscope.seeds import rng as generator

Scores = NDArray[np.float64]

FEWEST = 12
"""Fewer examples than this cannot show much: a sign-flip test of 6 has no p below 0.03."""
_BATCH = 500


def sign_flip(scores: Scores, rng: np.random.Generator) -> Scores:
    """Two-sided p-values that the means of the columns of `(examples, heads)` are zero.

    If a head does nothing, each example's score is as likely to have the other sign. All heads of
    an example are flipped together, so what they share stays shared. The number of random flips
    (9,999, or 40 a head if that is more) leaves room for the correction over all heads.
    """
    many, heads = scores.shape
    flips = max(9_999, 40 * heads - 1)
    seen = np.abs(scores.mean(0)) * (1 - 1e-12)  # the same sums in another order are no smaller
    reached = np.zeros(heads)
    for some in _batches(flips):
        signs = rng.choice(np.array([-1.0, 1.0]), size=(some, many))
        reached += (np.abs(signs @ scores) / many >= seen).sum(0)
    return (reached + 1) / (flips + 1)


def bootstrap(scores: Scores, rng: np.random.Generator, *, draws: int = 4_000) -> Scores:
    """The 95 % percentile interval of the means of the columns, examples drawn anew: `(2, heads)`."""
    return _quantiles(_drawn(len(scores), rng, draws), scores)


def _drawn(many: int, rng: np.random.Generator, draws: int = 4_000) -> list[NDArray[np.int64]]:
    """How often each example is in each draw, some draws at a time."""
    return [rng.multinomial(many, np.full(many, 1 / many), size=some) for some in _batches(draws)]


def _quantiles(drawn: Sequence[NDArray[np.int64]], scores: Scores) -> Scores:
    means = np.concatenate([some @ scores / len(scores) for some in drawn])
    return np.asarray(np.quantile(means, [0.025, 0.975], axis=0))


@lru_cache(maxsize=4)
def _drawn_of(ids: tuple[str, ...]) -> list[NDArray[np.int64]]:
    """Every figure of a run asks for the draws of the same examples."""
    return _drawn(len(ids), generator(0, "interval", *ids))


def interval(scores: Scores, ids: Sequence[str]) -> Scores:
    """`bootstrap`, with draws that the names of the examples decide: `(2, columns)`.

    The same examples are drawn anew in the same way, in whatever order they come and whatever else
    is asked about them, so that a mean has one interval in all tables and figures. Of one example there
    is no interval: nulls.

    >>> scores = np.arange(6.0).reshape(3, 2)
    >>> one, other = interval(scores, ["a", "b", "c"]), interval(scores[::-1, :1], ["c", "b", "a"])
    >>> bool((one[:, :1] == other).all())
    True
    """
    if len(ids) < 2:
        return np.full((2, scores.shape[1]), np.nan)
    order = sorted(range(len(ids)), key=lambda n: ids[n])
    return _quantiles(_drawn_of(tuple(ids[n] for n in order)), scores[order])


def _batches(many: int) -> Iterator[int]:
    for start in range(0, many, _BATCH):
        yield min(_BATCH, many - start)

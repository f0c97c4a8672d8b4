"""Intervals and tests for means over examples, as deterministic as what they are asked about.

Where one random generator serves a whole study, whatever is measured before moves what is measured
after. So every draw has its own, by the seed and by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

FEWEST = 12
"""Fewer examples than this cannot show much: a sign-flip test of 6 has no p below 0.03."""
_BATCH = 500


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


def sign_flip(scores: Scores, generator: np.random.Generator) -> Scores:
    """Two-sided p-values that the means of the columns of `(examples, heads)` are zero.

    If a head does nothing, each example's score is as likely to have the other sign. All heads of
    an example are flipped together, so what they share stays shared. The number of random flips
    (9,999, or 40 a head if that is more) leaves room for the correction over all heads.
    """
    examples, heads = scores.shape
    flips = max(9_999, 40 * heads - 1)
    size = np.abs(scores.mean(0)) * (1 - 1e-12)  # the same sums in another order are no smaller
    reached = np.zeros(heads)
    for batch in _batches(flips):
        signs = generator.choice(np.array([-1.0, 1.0]), size=(batch, examples))
        reached += (np.abs(signs @ scores) / examples >= size).sum(0)
    return (reached + 1) / (flips + 1)


def bootstrap(scores: Scores, generator: np.random.Generator, *, draws: int = 4_000) -> Scores:
    """The 95 % percentile interval of the means of the columns, examples drawn anew: `(2, heads)`."""
    return _quantiles(_drawn(len(scores), generator, draws), scores)


def _drawn(examples: int, generator: np.random.Generator, draws: int = 4_000) -> NDArray[np.int64]:
    """How often each example is in each draw: `(draws, examples)`."""
    share = np.full(examples, 1 / examples)
    return np.concatenate([generator.multinomial(examples, share, size=batch) for batch in _batches(draws)])


def _quantiles(drawn: NDArray[np.int64], scores: Scores) -> Scores:
    return np.asarray(np.quantile(drawn @ scores / len(scores), [0.025, 0.975], axis=0))


@lru_cache(maxsize=16)
def _drawn_of(ids: tuple[str, ...]) -> NDArray[np.int64]:
    """Every figure of a run asks for the draws of the same examples."""
    return _drawn(len(ids), rng(0, "interval", *ids))


def interval(scores: Scores, ids: Sequence[str]) -> Scores:
    """`bootstrap`, with draws that the names of the examples decide: `(2, columns)`.

    The same examples are drawn anew in the same way, in whatever order they come and whatever else
    is asked about them, so that a mean has one interval in all tables and figures. Of one example there
    is no interval: nulls.

    >>> scores = np.arange(6.0).reshape(3, 2)
    >>> found, turned = interval(scores, ["a", "b", "c"]), interval(scores[::-1, :1], ["c", "b", "a"])
    >>> bool((found[:, :1] == turned).all())
    True
    """
    if len(ids) < 2:
        return np.full((2, scores.shape[1]), np.nan)
    order = sorted(range(len(ids)), key=lambda n: ids[n])
    return _quantiles(_drawn_of(tuple(ids[n] for n in order)), scores[order])


def _batches(total: int) -> Iterator[int]:
    for start in range(0, total, _BATCH):
        yield min(_BATCH, total - start)

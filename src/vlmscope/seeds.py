"""Random numbers that depend on what they are for and on nothing else.

Where one generator serves a whole study, whatever is measured before moves what is measured after. So
every draw has its own, by the seed and by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


def _digest(seed: int, words: Iterable[object]) -> bytes:
    return hashlib.sha256(repr((seed, *map(str, words))).encode()).digest()


def rng(seed: int, *words: object) -> np.random.Generator:
    """The generator of one draw: `words` name the measure, the head or word, the example.

    >>> one, again, other = (rng(0, "auc", name).random() for name in ("a", "a", "b"))
    >>> one == again, one == other
    (True, False)
    """
    return np.random.default_rng(int.from_bytes(_digest(seed, words), "big"))


def shuffled(seed: int, ids: Iterable[str], *words: object) -> list[int]:
    """The places of `ids` in an order that the ids decide, not the order in which they are given.

    >>> one, other = ["a", "b", "c"], ["c", "a", "b"]
    >>> [one[n] for n in shuffled(0, one)] == [other[n] for n in shuffled(0, other)]
    True
    """
    keys = [_digest(seed, (*words, name)) for name in ids]
    return sorted(range(len(keys)), key=keys.__getitem__)

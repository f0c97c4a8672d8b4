"""Metrics: functions of the logits at the read-out position.

Formulas as in NOTICE (arXiv 2406.16320) and Zhang & Nanda (arXiv 2309.16042). They are
computed in float32 at least, whatever the model's precision, and given in float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

_NOISE = re.compile(r"[^\w\s]|\b(a|an|the)\b")

ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "4bit": 1e-2}
"""What rounding does to a logit difference, as a share of the largest logit, by `Model.precision`. Weights of
4 bits are computed with in bfloat16."""


class Score(NamedTuple):
    """P(answer) and LD = logit(answer) − logit(foil), a value a row."""

    p: Float[Tensor, "*rows"]
    ld: Float[Tensor, "*rows"]


def score(logits: Float[Tensor, "*rows vocabulary"], answer: int, foil: int) -> Score:
    """P(answer) over the whole vocabulary, and the logit difference.

    >>> import torch
    >>> p, ld = score(torch.tensor([2.0, 0.0, 0.0]), answer=0, foil=1)
    >>> round(p.item(), 4), ld.item()
    (0.787, 2.0)
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    total = logits.logsumexp(-1).double()
    answers, foils = logits[..., answer].double(), logits[..., foil].double()
    return Score((answers - total).exp(), answers - foils)


def largest(*logits: Float[Tensor, "*rows vocabulary"]) -> float:
    """The size of the largest finite logit of some runs."""
    return max(float(one[one.isfinite()].abs().max()) for one in logits)


def least_gap(precision: str, size: float) -> float:
    """The smallest |LD(clean) − LD(corrupt)|, in logits, that `effect` is divided by.

    Ten times what rounding does in this precision (`ROUNDING`) where the largest logit has this size: then
    it moves `effect` by at most about a tenth.

    >>> least_gap("float32", 20.0), least_gap("bfloat16", 20.0)
    (0.002, 2.0)
    """
    return 10 * ROUNDING[precision] * size


def effect(ld: float, ld_clean: float, ld_corrupt: float, least: float = 0.0) -> float | None:
    """(LD − LD(corrupt)) / (LD(clean) − LD(corrupt)); None where the gap is no larger than `least`.

    >>> effect(1.0, 3.0, -1.0)
    0.5
    >>> effect(1.0, 1.0, 1.0) is None, effect(1.0, 1.3, 1.0, least=0.5) is None
    (True, True)
    """
    gap = ld_clean - ld_corrupt
    return (ld - ld_corrupt) / gap if abs(gap) > least else None


def agrees(said: str, answer: str) -> bool:
    """Whether two answers are the same but for case, punctuation, articles and blanks.

    >>> agrees("A red-brown dog.", "red brown Dog"), agrees("dog", "dogs")
    (True, False)
    """
    plain = [_NOISE.sub(" ", text.casefold()).split() for text in (said, answer)]
    return plain[0] == plain[1]


class Patched(NamedTuple):
    """What a sweep over one pair gives: two baselines, the size of their largest logit, and chunks of rows
    as they are computed.

    A chunk is the numbers of its sites (in the sweep's order, each exactly once over all chunks)
    and their scores.
    """

    clean: Score
    corrupt: Score
    size: float
    chunks: Iterator[tuple[list[int], Score]]

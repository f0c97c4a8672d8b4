"""Metrics: functions of the logits at the positions that are scored.

Formulas as in NOTICE (arXiv 2406.16320) and Zhang & Nanda (arXiv 2309.16042). They are
computed in float32 at least, whatever the model's precision, and given in float64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.errors import VlmscopeError
from vlmscope.models.inputs import Pair
from vlmscope.runs.network import upcast
from vlmscope.sites import Site

_NOISE = re.compile(r"[^\w\s]|\b(a|an|the)\b")

ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "4bit": 1e-2}
"""What rounding does to a logit difference, as a share of the largest logit, by `Model.precision`. Weights of
4 bits are computed with in bfloat16."""


class Baselines(NamedTuple):
    """What a metric may compare with: the logits of the two runs that differ by the corruption, and the token
    ids of the answer (one a position) and of the foil."""

    clean: Float[Tensor, "positions vocabulary"]
    corrupt: Float[Tensor, "positions vocabulary"]
    answers: tuple[int, ...]
    foil: int | None


Metric = Callable[[Float[Tensor, "rows vocabulary"], Baselines], Float[Tensor, "rows"]]
"""From the logits of many runs at the read-out position to one number a run."""


class Score(NamedTuple):
    """P(answer), LD = logit(answer) − logit(foil) (NaN without a foil) and the metric, a value a row; and the
    log-probability of each token of the answer by itself, in nats."""

    p: Float[Tensor, "*rows"]
    ld: Float[Tensor, "*rows"]
    value: Float[Tensor, "*rows"]
    tokens: Float[Tensor, "*rows positions"]


def _kl(logits: Float[Tensor, "rows vocabulary"], base: Baselines) -> Float[Tensor, "rows"]:
    """KL(clean ‖ run) in nats, of the next token's distribution."""
    clean, here = (x.double().log_softmax(-1) for x in (base.clean[-1:], logits))
    terms = clean.exp() * (clean - here)
    return terms.where(clean.exp() > 0, 0.0).sum(-1)


METRICS = ("ld", "p", "logprob", "kl")
"""The logit difference; the answer's probability; the log-probability of the whole answer, token by token;
the Kullback-Leibler divergence of the next token's distribution from the clean run's."""


def check_metric(metric: str | Metric) -> None:
    """Raises `VlmscopeError` for the name of a metric that there is not."""
    if isinstance(metric, str) and metric not in METRICS:
        raise VlmscopeError(f"unknown metric '{metric}'; expected one of {', '.join(METRICS)}, or a function")


def score(
    logits: Float[Tensor, "rows positions vocabulary"], base: Baselines, metric: str | Metric = "ld"
) -> Score:
    """P(answer) over the whole vocabulary (of all its tokens, where it has several positions), the logit
    difference (of one token alone), and the metric.

    >>> import torch
    >>> logits = torch.tensor([[[2.0, 0.0, 0.0]]])
    >>> found = score(logits, Baselines(logits[0], logits[0], (0,), 1))
    >>> round(found.p.item(), 4), found.ld.item()
    (0.787, 2.0)
    """
    check_metric(metric)
    logits = upcast(logits)
    total = logits.logsumexp(-1).double()
    at = torch.arange(logits.shape[1], device=logits.device)
    answers = logits[:, at, torch.tensor(base.answers, device=logits.device)].double()
    tokens = answers - total
    logprob = tokens.sum(-1)
    p, ld = logprob.exp(), torch.full_like(logprob, torch.nan)
    if base.foil is not None and len(base.answers) == 1:
        ld = answers[:, 0] - logits[:, 0, base.foil].double()
    if not isinstance(metric, str):
        value = metric(logits[:, -1], base).double()
        if value.shape != p.shape:
            raise VlmscopeError(f"the metric gave the shape {tuple(value.shape)}; expected {tuple(p.shape)}")
        return Score(p, ld, value, tokens)
    named = {"ld": ld, "p": p, "logprob": logprob}
    value = named[metric] if metric in named else _kl(logits[:, -1], base)
    return Score(p, ld, value, tokens)


def logit_difference(logits: Float[Tensor, "vocabulary"], pair: Pair) -> float:
    """LD of one run at the read-out position.

    >>> import torch
    >>> from vlmscope.models.inputs import Inputs
    >>> nothing = Inputs({}, {})
    >>> logit_difference(torch.tensor([2.0, 0.5]), Pair(nothing, nothing, 0, 1))
    1.5
    """
    return float(score(logits[None, None], Baselines(logits[None], logits[None], pair.answers, pair.foil)).ld)


def unpatched(
    clean: Float[Tensor, "positions vocabulary"],
    corrupt: Float[Tensor, "positions vocabulary"],
    pair: Pair,
    metric: str | Metric,
) -> tuple[Baselines, Score, Score, float]:
    """The two runs of a pair: what metrics compare with, the runs' scores, and the size of the largest finite
    logit."""
    base, runs = Baselines(clean, corrupt, pair.answers, pair.foil), (clean, corrupt)
    first, second = (Score(*(x[0] for x in score(run[None], base, metric))) for run in runs)
    return base, first, second, max(float(run[run.isfinite()].abs().max()) for run in runs)


def least_gap(precision: str, size: float) -> float:
    """The smallest |LD(clean) − LD(corrupt)|, in logits, that `effect` is divided by.

    Ten times what rounding does in this precision where the largest logit has this size, so that it moves
    `effect` by at most about a tenth.

    >>> least_gap("float32", 20.0), least_gap("bfloat16", 20.0)
    (0.002, 2.0)
    """
    return 10 * ROUNDING[precision] * size


def effect(value: float, clean: float, corrupt: float, least: float = 0.0) -> float | None:
    """(value − corrupt) / (clean − corrupt), of LD or another metric; None where the gap is no larger than
    `least`.

    >>> effect(1.0, 3.0, -1.0)
    0.5
    >>> effect(1.0, 1.0, 1.0) is None, effect(1.0, 1.3, 1.0, least=0.5) is None
    (True, True)
    """
    gap = clean - corrupt
    return (value - corrupt) / gap if abs(gap) > least else None


def agrees(predicted: str, answer: str) -> bool:
    """Whether two answers are the same but for case, punctuation, articles and blanks.

    >>> agrees("A red-brown dog.", "red brown Dog"), agrees("dog", "dogs")
    (True, False)
    """
    plain = [_NOISE.sub(" ", text.casefold()).split() for text in (predicted, answer)]
    return plain[0] == plain[1]


Chunks = Iterator[tuple[list[int], Score]]
"""The numbers of sites (each once over all chunks) and their scores, as they are computed."""


class Patched(NamedTuple):
    """What a sweep over one pair gives: two baselines, the size of their largest logit, and chunks of rows.
    The engine's `more` gives those of further sites at the same points, with no run computed again."""

    clean: Score
    corrupt: Score
    size: float
    chunks: Chunks
    more: Callable[[Sequence[Site]], Chunks] | None = None

"""How well a ranking, a rule or labels find what was planted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from planting import APART, TRUE, Part
from scipy import stats

LABELS = {
    "reader": ("detection",),
    "suppressor": ("suppression",),
    "mover": ("aggregate reader",),
    "selector": ("option selector",),
    "copier": ("mover",),
    "sink": ("outlier suppression", "sink", "none"),
    "blind": ("none", "unclear"),
    "diffuse": ("none", "unclear"),
    "salient": ("none", "unclear"),
    "random": ("none", "unclear"),
}
"""What each kind of head may be called. A decoy, and a head that nothing was planted in, has no function;
the mover reads by its values what readers wrote at a word that is no option."""
CLASS_OF = {
    "detection": "reader",
    "suppression": "suppressor",
    "aggregate reader": "mover",
    "option selector": "selector",
    "mover": "copier",
    "outlier suppression": "sink",
    "sink": "sink",
    "none": "random",
    "unclear": "random",
}


def auroc(score: ArrayLike, true: ArrayLike) -> float:
    """The chance that a true part is ranked above another (ties count half)."""
    score, true = np.asarray(score, float), np.asarray(true, bool)
    ranks = stats.rankdata(score)
    many = true.sum()
    return float((ranks[true].sum() - many * (many + 1) / 2) / (many * (~true).sum()))


def average_precision(score: ArrayLike, true: ArrayLike) -> float:
    """The mean over true parts of the precision down to each; parts with equal scores share theirs."""
    score, true = np.asarray(score, float), np.asarray(true, bool)
    steps = np.unique(score)[::-1]
    found = np.array([true[score >= step].sum() for step in steps])
    taken = np.array([(score >= step).sum() for step in steps])
    gained = np.diff(found, prepend=0)
    return float((gained * found / taken).sum() / true.sum())


def ranking(
    scores: Mapping[Part, float], roles: Mapping[Part, str], true: Sequence[str] = TRUE
) -> dict[str, float]:
    """AUROC and average precision of |score|; carriers, backups and locators are left out."""
    parts = [part for part in scores if roles.get(part) not in (*APART, "idle")]
    size = [abs(scores[part]) for part in parts]
    is_true = [roles.get(part) in true for part in parts]
    share = float(np.mean(is_true))
    return {"auroc": auroc(size, is_true), "ap": average_precision(size, is_true), "ap_random": share}


def chosen(found: set[Part], roles: Mapping[Part, str], every: Sequence[Part]) -> dict[str, float]:
    """Of a rule that picks parts: how many it picks, how many of these were not planted to matter, and the
    share of the true parts that it picks."""
    true = [part for part in every if roles.get(part) in TRUE]
    false = [part for part in found if roles.get(part) not in (*TRUE, *APART)]
    return {
        "picked": len(found),
        "false": len(false),
        "recall": len([part for part in true if part in found]) / max(1, len(true)),
    }


def confusion(labels: Mapping[Part, str], roles: Mapping[Part, str]) -> list[tuple[str, str]]:
    """Of each head what it is and what its label makes it: itself where the label is allowed."""
    pairs = []
    for part, label in labels.items():
        truth = roles.get(part, "random")
        if truth in LABELS:
            pairs.append((truth, truth if label in LABELS[truth] else CLASS_OF.get(label, label)))
    return pairs


def macro_f1(pairs: Sequence[tuple[str, str]]) -> tuple[float, dict[str, float]]:
    """The mean over classes of F1, and that of each class."""
    each = {}
    for name in LABELS:
        hits = sum(truth == name == said for truth, said in pairs)
        either = sum((truth == name) + (said == name) for truth, said in pairs)
        if any(truth == name for truth, _ in pairs):
            each[name] = 2 * hits / either if either else 0.0
    return float(np.mean(list(each.values()))), each


def share(yes: Sequence[bool]) -> dict[str, float | None]:
    """How many of these are, as a share, with the upper end of its exact 95 % interval."""
    if not len(yes):
        return {"share": 0.0, "most": None, "of": 0}
    high = stats.binomtest(sum(yes), len(yes)).proportion_ci(method="exact").high
    return {"share": sum(yes) / len(yes), "most": float(high), "of": len(yes)}


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over models, its one-sided lower 95 % limit (Student's t; none of one model), the
    smallest, and how many."""
    found = np.asarray([v for v in values if np.isfinite(v)], float)
    mean, many = float(found.mean()), len(found)
    low = None
    if many > 1:
        low = mean - float(stats.t.ppf(0.95, many - 1) * found.std(ddof=1) / many**0.5)
    return {"mean": mean, "lower95": low, "least": float(found.min()), "models": many}

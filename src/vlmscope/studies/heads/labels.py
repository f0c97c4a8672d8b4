"""What a head is called, by rules over its measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LABELS = ("detection", "suppression", "outlier suppression", "none", "unclear")
LEVEL = 0.05
SHARE = 0.01
"""An effect below this share of the gap between clean and corrupt runs counts as none ..."""
LITTLE = 0.05
"""... and one that is surely below this share as little."""
AUC = 0.6
"""Attention that separates the object by less than this does not detect it, however surely."""
MASS = 0.5
"""The share of its attention that a head of outliers has on them, at least."""

WORDS = {
    "auc": "attention to the object, AUC",
    "auc_foil": "attention to the foil's object, AUC",
    "outlier_mass": "attention to outliers and class token",
    "effect": "patched in, LD",
    "mean": "knocked out, LD",
}
"""The measures that a label is read off, and what its evidence calls them."""


def label(found: Mapping[str, Any], gap: float) -> tuple[str, str]:
    """The label of a head and its evidence, from its measures (`value`, `low`, `high`, `q_value`).

    An effect counts if its interval excludes zero and it is at least 1 % of `gap`; it is little
    if the interval lies within 5 % of it.
    """

    def moves(name: str) -> int:
        """Whether it moves LD up (1) or down (−1) by what counts."""
        row = found.get(name)
        if row is None or not abs(row.value) >= SHARE * gap:
            return 0
        return int(row.low > 0) - int(row.high < 0)

    def lands(name: str) -> bool:
        """Whether its attention separates what is meant."""
        row = found.get(name)
        return bool(row and row.q_value <= LEVEL and row.low > 0.5 and row.value >= AUC)

    changes = [found[name] for name in ("mean", "effect") if name in found]
    is_little = all(max(abs(row.low), abs(row.high)) <= LITTLE * gap for row in changes)
    on_outliers = "outlier_mass" in found and found["outlier_mass"].low > MASS
    on_object, on_foil, without = lands("auc"), lands("auc_foil"), moves("mean")
    favours = moves("effect") == 1 if "effect" in found else without == -1
    if on_outliers and is_little:
        name = "outlier suppression"
    elif on_object and favours and without != 1:
        name = "detection"
    elif (on_object and without == 1 and not favours) or (on_foil and without == -1):
        name = "suppression"
    elif is_little and not (moves("effect") or without or on_outliers or on_object or on_foil):
        name = "none"
    else:
        name = "unclear"
    blind = [] if "entropy" in found else ["does not look at the image"]
    return name, "; ".join([*blind, *(_words(n, found[n]) for n in WORDS if n in found)])


def _words(name: str, row: Any) -> str:
    sign = "+" if name in ("effect", "mean") else ""
    null = "" if sign else f" (null {row.null:.2f})"
    return f"{WORDS[name]} {row.value:{sign}.2f} [{row.low:{sign}.2f}, {row.high:{sign}.2f}]{null}"

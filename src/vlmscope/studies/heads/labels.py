"""What a head is called: rules over its measures, each against its null, and the evidence in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmscope.stats import FEWEST, LEVEL, share_interval

LABELS = (
    "detection",
    "suppression",
    "option selector",
    "mover",
    "negative mover",
    "aggregate reader",
    "relay",
    "outlier suppression",
    "sink",
    "none",
    "unclear",
)
LITTLE = 0.05
"""An effect that is surely below this share of the gap is little."""
EXCESS = 0.2
"""Attention that exceeds its null by less than this share of what it could is not on an object, however
surely."""
SWITCH = 0.1
"""A selector switches as much of its attention, at least."""
MASS = 0.5
"""The share of its attention that a head has on what it is called after, at least."""
COPIES = 0.5
"""How often a mover raises the word first that it reads (less how often the other), at least."""
LOOKS = ("auc", "pointing", "mass")
"""Any of these shows that attention is on an object: a sharp head has the first, a broad one the second, at
most. Each is tested at a third of the level."""

WORDS = {
    "on_image": "attention to the image",
    "auc": "to the object, AUC",
    "pointing": "strongest patch on the object",
    "mass": "of the image's, on the object",
    "auc_foil": "to the foil's object, AUC",
    "pointing_foil": "strongest patch on the foil's object",
    "mass_foil": "of the image's, on the foil's object",
    "outlier_mass": "on outliers off the object and the class token",
    "on_first": "on the first token",
    "on_others": "on words that are no option",
    "switch": "switches to the option that the picture shows",
    "copies": "raises the option first that it reads",
    "effect": "patched in, LD",
    "by_attention": "its attention alone",
    "by_values": "its values alone",
    "from_image": "read from the image alone",
    "from_options": "from the options alone",
    "from_others": "from other words alone",
    "direct": "on its own way to the answer",
    "mean": "knocked out, LD",
}
"""The measures that labels are read off, and what evidence calls them."""
SIGNED = "effect mean by_attention by_values from_image from_options from_others direct".split()
Rows = Mapping[str, Any]
"""A row of the table of measures for each measure of a head."""


class Label(NamedTuple):
    """The name, the measure that it rests on with its value, null and q-value (nulls where it rests on
    none), and all the evidence in words."""

    label: str
    measure: str
    value: float
    null: float
    q_value: float
    evidence: str


def doubts(clean: Sequence[float], corrupt: Sequence[float] | None) -> str | None:
    """Why a model does not surely know a task, from its LD in clean runs, and in those that show the foil: no
    head of such a model has a function. None where it does.

    >>> doubts([2.0, 1.5] * 10, [-1.0, -2.0] * 10) is None
    True
    >>> doubts([2.0, -1.5] * 10, None)
    'LD is above 0 in 10 of 20 clean runs, which is no more than chance'
    """
    for lds, sign, where in (
        (clean, 1, "above 0 in {} of {} clean"),
        (corrupt, -1, "below 0 in {} of {} corrupt"),
    ):
        right = [sign * ld > 0 for ld in lds or ()]
        if right and not share_interval(right)[0] > 0.5:
            return f"LD is {where.format(sum(right), len(right))} runs, which is no more than chance"
    return None


def label(found: Rows, gap: float, doubt: str | None) -> Label:
    """What a head is called. `gap` is LD(clean) − LD(corrupt); with a `doubt` that the model knows the
    task, it is called nothing."""
    name, on = ("unclear", None) if doubt else _rule(found, gap)
    row = found.get(on or "")
    words = [f"the model does not know the task: {doubt}"] * bool(doubt)
    words += [
        _words(each, found[each]) for each in sorted(WORDS, key=lambda each: each != on) if each in found
    ]
    value, null, q = (np.nan, np.nan, np.nan) if row is None else (row.value, row.null, _q(row))
    return Label(name, on or "", value, null, q, "; ".join(words))


def _rule(found: Rows, gap: float) -> tuple[str, str | None]:
    """The label, and the measure that it rests on."""
    acts = {name: _moves(found, name) for name in ("effect", "mean") if name in found}
    cause = "effect" if "effect" in found else "mean"
    favours = acts[cause] == (1 if cause == "effect" else -1)
    if any(acts.values()):
        if _sees(found):
            return _of_image(found, favours, acts["mean"])
        return _of_text(found, favours) if _reads_words(found) else ("unclear", None)
    changes = [found[name] for name in acts]
    # What changes nothing at all, in any example, has no interval.
    is_none = [row.value == 0 and row.n >= FEWEST for row in changes]
    reach = [max(abs(row.low), abs(row.high)) for row in changes]
    if not all(no or most <= LITTLE * gap for no, most in zip(is_none, reach, strict=True)):
        return "unclear", None
    for measure, name in (("outlier_mass", "outlier suppression"), ("on_first", "sink")):
        if _most(found, measure):
            return name, measure
    return "none", cause


def _of_image(found: Rows, favours: bool, without: int) -> tuple[str, str | None]:
    on_object, on_foil = _lands(found, ""), _lands(found, "_foil")
    takes = without == 1 or _moves(found, "effect") == -1
    if on_object and favours and without != 1:
        return "detection", on_object
    if on_object and takes and not favours and without != -1:
        return "suppression", on_object
    if on_foil and without == -1:
        return "suppression", on_foil
    return "unclear", None


def _of_text(found: Rows, favours: bool) -> tuple[str, str | None]:
    if favours and _exceeds(found, "switch", SWITCH):
        return "option selector", "switch"
    if favours and _exceeds(found, "copies", COPIES):
        return "mover", "copies"
    if _sure(found, "copies") and found["copies"].value <= -COPIES:
        return "negative mover", "copies"
    if _most(found, "on_others") and _beyond(found, "from_others"):
        return "aggregate reader", "from_others"
    if _within(found, "direct"):
        return "relay", "direct"
    return "unclear", None


def _sure(found: Rows, name: str) -> bool:
    return name in found and found[name].q_value <= LEVEL


def _moves(found: Rows, name: str) -> int:
    """Whether it surely moves LD up (1) or down (−1) by what counts."""
    return int(np.sign(found[name].value)) if _sure(found, name) else 0


def _exceeds(found: Rows, name: str, least: float) -> bool:
    return _sure(found, name) and found[name].value - found[name].null >= least


def _lands(found: Rows, which: str) -> str | None:
    """The measure by which its attention is on an object most surely, if it is."""
    there = [found[look + which] for look in LOOKS if look + which in found]
    names = [
        row.measure for row in there if _q(row) <= LEVEL and row.value - row.null >= EXCESS * (1 - row.null)
    ]
    return min(names, key=lambda name: found[name].q_value, default=None)


def _q(row: Any) -> float:
    """The false discovery rate of a measure; of a look at an object it is that of the surest of three."""
    looks = len(LOOKS) if row.measure.removesuffix("_foil") in LOOKS else 1
    return min(1.0, looks * float(row.q_value)) if row.q_value == row.q_value else float("nan")


def _most(found: Rows, name: str) -> bool:
    """Whether most of its attention is there, and surely more than its null."""
    return _exceeds(found, name, 0.0) and found[name].value > MASS and not found[name].low <= MASS


def _beyond(found: Rows, name: str) -> bool:
    """Whether a part of the effect is surely more than its share of the whole."""
    if not _sure(found, name):
        return False
    row = found[name]
    return bool(abs(row.value) > abs(row.null) and row.value * row.null > 0)


def _within(found: Rows, name: str) -> bool:
    """Whether a part of the effect is surely less than its share of the whole, whatever its sign."""
    return _sure(found, name) and abs(found[name].value) < abs(found[name].null)


def _reads_words(found: Rows) -> bool:
    """Whether less than half of its effect, surely, comes from the image; where that is not known, whether
    most of what it pays goes elsewhere."""
    return _within(found, "from_image") if "from_image" in found else True


def _sees(found: Rows) -> bool:
    """Whether it reads the image: most of its effect comes from there, or where that is not known, most of
    what it pays."""
    if "from_image" in found:
        return _beyond(found, "from_image")
    return "on_image" in found and found["on_image"].value > MASS


def _words(name: str, row: Any) -> str:
    sign = "+" if name in SIGNED else ""
    ends = "" if np.isnan(row.low) else f" [{row.low:{sign}z.2f}, {row.high:{sign}z.2f}]"
    q = "" if np.isnan(_q(row)) else f", q {_q(row):.2g}"
    return f"{WORDS[name]} {row.value:{sign}z.2f}{ends} (null {row.null:z.2f}{q})"

"""Two sets that differ by one thing: examples with it, and examples without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example, fingerprint
from vlmscope.errors import DataError, ExampleError, nearest, shown
from vlmscope.stats import shuffled

FEWEST = 4
"""Of so many examples one half builds, and the other half tests."""


class Sets(NamedTuple):
    """Examples whose clean run has something, and examples whose clean run has not."""

    having: list[Example]
    lacking: list[Example]

    def halves(self, seed: int) -> tuple[Sets, Sets]:
        """Two halves of both, by a seed and the examples' ids; what was one example stays in one half."""
        names = list(dict.fromkeys(example.id for some in self for example in some))
        place = {names[n]: turn for turn, n in enumerate(shuffled(seed, names, "halves"))}
        parts: tuple[Sets, Sets] = Sets([], []), Sets([], [])
        for some, built, held in zip(self, *parts, strict=True):
            order = sorted(some, key=lambda example: place[example.id])
            first = order[: (len(order) + 1) // 2]
            built += first
            held += order[len(first) :]
        return parts


def sets_of(
    examples: Examples,
    *,
    without: Examples | None = None,
    label: str | None = None,
    corrupt: str | None = None,
) -> Sets:
    """The two sets that are meant, by one of three ways.

    `without`: `examples` have it, these do not. `label`, written as `COLUMN=VALUE`: those of the `examples`
    whose group COLUMN (or `answer`, `foil`, or one of the words that they `shows`) is VALUE have it, the
    others do not. `corrupt`, `image` or `text`: each example's clean picture or prompt has it, its corrupt
    one does not.

    Raises `DataError` if none or several ways are given, a set has fewer than `FEWEST` examples, or a
    picture with its prompt is in both sets.

    >>> from vlmscope.data import examples
    >>> sets = sets_of(examples("states", limit=40), label="shows=circle")
    >>> all("circle" in example.shows for example in sets.having), len(sets.having) + len(sets.lacking)
    (True, 40)
    """
    given = [*listed(examples)]
    if sum(way is not None for way in (without, label, corrupt)) != 1:
        raise DataError(
            "two sets are needed, with and without; give one of --without (other examples), --label "
            "COLUMN=VALUE, or --corrupt image or text"
        )
    if without is not None:
        sets = Sets(given, [*listed(without)])
    elif label is not None:
        sets = _labelled(given, label)
    else:
        sets = Sets(given, _corrupted(given, str(corrupt)))
    for name, some in zip(("with", "without"), sets, strict=True):
        if len(some) < FEWEST:
            raise DataError(
                f"too few examples {name}: {len(some)}; expected at least {FEWEST}, half to build and half "
                "to test (intervals take 20)"
            )
    contents = [{_content(example): example.id for example in some} for some in sets]
    if both := contents[0].keys() & contents[1].keys():
        names = sorted(contents[0][one] for one in both)
        raise DataError(
            f"the two sets overlap: {len(both)} pictures with their prompts are in both, such as "
            f"{shown(names[0])}; take them out of one"
        )
    return sets


def _labelled(given: Sequence[Example], label: str) -> Sets:
    column, is_label, value = label.partition("=")
    if not (is_label and column and value):
        raise DataError(f"bad label {shown(label)}; expected COLUMN=VALUE, such as shows=dog or color=red")
    held = values_of(given, column)
    sets: Sets = Sets([], [])
    for example, values in zip(given, held, strict=True):
        (sets.having if value.casefold() in values else sets.lacking).append(example)
    if not sets.having or not sets.lacking:
        which = "every" if sets.having else "no"
        some = dict.fromkeys(value for values in held for value in sorted(values))
        raise DataError(
            f"{which} example has {shown(column)} {shown(value)}; expected one of {', '.join(list(some)[:8])}"
            f"{nearest(value, some)}"
        )
    return sets


def values_of(given: Sequence[Example], column: str) -> list[set[str]]:
    """What each example has in a column, in small letters: a group, `answer`, `foil`, or all that it `shows`.

    Raises `DataError` for a column that no example has.
    """
    held = [_values(example, column) for example in given]
    if not any(held):
        known = dict.fromkeys(["answer", "foil", "shows", *(name for one in given for name in one.groups)])
        raise DataError(
            f"no example has a {shown(column)}; expected one of {', '.join(known)}{nearest(column, known)}"
        )
    return held


def _values(example: Example, column: str) -> set[str]:
    if column == "shows":
        return {*example.shows}
    own = {"answer": example.answer, "foil": example.foil, **example.groups}
    return {own[column].casefold()} if own.get(column) else set()


def _corrupted(given: Sequence[Example], corrupt: str) -> list[Example]:
    if corrupt not in ("image", "text"):
        raise DataError(f"no sets by the corruption {shown(corrupt)}; expected image or text")
    found = []
    for one in given:
        alone = replace(one, corrupt_image=None, corrupt_prompt=None)
        if corrupt == "image" and one.corrupt_image is not None:
            found.append(replace(alone, clean_image=one.corrupt_image))
        elif corrupt == "text" and one.corrupt_prompt is not None:
            found.append(replace(alone, clean_prompt=one.corrupt_prompt, roles={}))
        else:
            raise ExampleError(
                f"example {shown(one.id)} has no corrupt {corrupt}; give every example one, or two sets by "
                "--without or --label"
            )
    return found


def _content(example: Example) -> str:
    """What tells a picture with its prompt from others."""
    alone = Example("", example.clean_image, example.clean_prompt, "", "", more_images=example.more_images)
    return fingerprint([alone])

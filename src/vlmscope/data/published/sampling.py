"""Drawing without replacement, balanced over groups and over the order of the two options."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from vlmscope.data.example import Example, find_roles
from vlmscope.data.published.layout import Pictures, count

ORDERS = ("answer first", "foil first")

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Drawn(Generic[Made]):
    """One draw: the group it is of, what was made, and which option comes first."""

    group: str
    made: Made
    order: str


def balanced(
    items: Mapping[str, Sequence[Item]],
    make: Callable[[Item], Made | None],
    *,
    size: int,
    limit: int | None,
    dropped: dict[str, int],
) -> list[Drawn[Made]]:
    """The same number from every group, in turns; `items` come in the order of their drawing.

    `make` opens what an item needs, and returns None where it cannot be used; then the next one
    takes its place. At most `size` a group, or `limit` in all; it ends where a group has no more.
    Groups without items take no part. The orders take turns so that they differ by at most one
    in each group and in all; without a limit, a last round that would make them uneven is left.

    >>> drawn = balanced({"a": [1, 2, 3], "b": [4, 5]}, str, size=9, limit=None, dropped={})
    >>> [(one.group, one.made, one.order) for one in drawn]
    [('a', '1', 'answer first'), ('b', '4', 'foil first'),
     ('a', '2', 'foil first'), ('b', '5', 'answer first')]
    """
    groups = [group for group, some in items.items() if some]
    wanted = size * len(groups) if limit is None else limit
    streams = {group: iter(items[group]) for group in groups}
    drawn: list[Drawn[Made]] = []
    rounds, short = 0, None
    while groups and len(drawn) < wanted and short is None:
        turn: list[Drawn[Made]] = []
        for place, group in enumerate(groups[: wanted - len(drawn)]):
            made = next((one for item in streams[group] if (one := make(item)) is not None), None)
            if made is None:
                short = group
                break
            turn.append(Drawn(group, made, ORDERS[(place + rounds) % 2]))
        else:
            drawn += turn
            rounds += 1
    if limit is None and rounds > 1 and rounds % 2:
        del drawn[-len(groups) :]
    left = sum(1 for group in groups for _ in streams[group])
    rest = "enough were drawn" if short is None else f"no more {short!r} to balance them with"
    count(dropped, f"left over: {rest}", left)
    return drawn


def shuffled(items: Iterable[Item], *key: object) -> list[Item]:
    """The items in an order that `key` alone draws.

    >>> shuffled(range(5), "states", 0) == shuffled(range(5), "states", 0)
    True
    """
    some = list(items)
    random.Random("/".join(map(str, key))).shuffle(some)
    return some


class Decks:
    """Images by label, handed out as partners of other images, in an order that the seed draws.

    An image comes again only when all of its label were handed out, and no pair comes twice,
    the other way round neither.
    """

    def __init__(self, files: Mapping[str, Sequence[Path]], pictures: Pictures, *key: object):
        self._pictures = pictures
        self._paired: set[frozenset[Path]] = set()
        self._given = dict.fromkeys(files, 0)
        self._decks = {label: deque(shuffled(some, *key, label)) for label, some in files.items()}

    def partner(self, path: Path, labels: Iterable[str]) -> tuple[str, Path] | None:
        """A label and an image of it that can be read, from the label that gave fewest so far."""
        for label in sorted(labels, key=lambda one: self._given[one]):
            deck = self._decks[label]
            for other in list(deck):
                pair = frozenset((path, other))
                if pair not in self._paired and self._pictures.readable(other):
                    self._paired.add(pair)
                    self._given[label] += 1
                    deck.remove(other)
                    deck.append(other)
                    return label, other
        return None


def example(
    name: str,
    images: tuple[Path, Path | None],
    prompt: str,
    options: tuple[str, str],
    *,
    groups: Mapping[str, str],
    words: Mapping[str, str] | None = None,
    corrupt_prompt: str | None = None,
) -> Example:
    """An example whose roles are those that its CSV form would give it.

    `images` and `options` are the clean one and the corrupt one.

    >>> made = example("1", (Path("a.png"), None), "red or blue?", ("red", "blue"), groups={})
    >>> made.roles
    {'answer': (0, 3), 'foil': (7, 11)}
    """
    answer, foil = options
    return Example(
        id=name,
        clean_image=images[0],
        clean_prompt=prompt,
        answer=answer,
        foil=foil,
        corrupt_image=images[1],
        corrupt_prompt=corrupt_prompt,
        roles=find_roles(prompt, {**(words or {}), **groups, "answer": answer, "foil": foil}),
        groups=dict(groups),
    )


def in_order(order: str, answer: str, foil: str) -> tuple[str, str]:
    """The two options as they stand in the prompt.

    >>> in_order("foil first", "red", "blue")
    ('blue', 'red')
    """
    return (answer, foil) if order == ORDERS[0] else (foil, answer)

"""Drawing from a published set without replacement, balanced over groups and the order of the options."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from vlmscope.data.example import Example
from vlmscope.data.images import open_image
from vlmscope.data.published.layout import looks_like
from vlmscope.data.questions import ORDERS
from vlmscope.errors import DataError, ExampleError

SIZE = 500
"""How many examples of a group are drawn at most, as in the NOTICE paper."""
MISSING = "the image is not there"
UNREADABLE = "the image cannot be read"

Fetch: TypeAlias = Callable[[Mapping[str, str], Path], Mapping[str, str]]
"""Downloads addresses to files of these names in a folder; returns what could not be had, with the reason."""
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass
class Source:
    """The folder of a published set, what is drawn from it, and what was left out by the reason.

    `limit` is the number of examples in all; `fetch` downloads images that are missing.
    """

    name: str
    root: Path
    limit: int | None = None
    seed: int = 0
    fetch: Fetch | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    _known: dict[Path, bool] = field(default_factory=dict)
    _paired: set[tuple[str, frozenset[Path]]] = field(default_factory=set)

    def drop(self, why: str, number: int = 1) -> None:
        if number:
            self.dropped[why] = self.dropped.get(why, 0) + number

    def not_here(self, expected: str) -> DataError:
        """The error for a folder that lacks what the set has."""
        other = looks_like(self.root)
        way_out = f"unpack {self.name} there, or give the folder it is in"
        if other and other != self.name:
            way_out = f"it looks like {other}: ask for {other}, or give {self.name}'s folder"
        return DataError(f"{self.root}: no {expected}; {way_out}")

    def with_images(self, rows: Sequence[Any], files: Mapping[Any, Path], such: str) -> list[Any]:
        """The rows whose `image` is among the files; raises `DataError` where none is, which says where it is
        expected (`such`)."""
        kept = [row for row in rows if row.image in files]
        if rows and not kept:
            where = such.format(rows[0].image)
            raise DataError(f"{self.root}: none of the images of the tables; expected {where}")
        self.drop(MISSING, len(rows) - len(kept))
        return kept

    def is_readable(self, path: Path) -> bool:
        """Whether an image can be read: each is opened once, when it is first asked for, and counted."""
        if path not in self._known:
            try:
                open_image(path)
                self._known[path] = True
            except ExampleError:
                self._known[path] = False
                self.drop(UNREADABLE)
        return self._known[path]

    def partner(self, path: Path, others: Iterable[Path], question: str = "") -> Path | None:
        """The first of the others that can be read, if it is not its pair (for this question) already."""
        for other in others:
            pair = question, frozenset((path, other))
            if pair not in self._paired and self.is_readable(other):
                self._paired.add(pair)
                return other
        return None

    def shuffled(self, items: Iterable[Item], *key: object) -> list[Item]:
        """The items in an order that the set's name and `key` alone draw."""
        mixed = list(items)
        random.Random("/".join(map(str, (self.name, *key)))).shuffle(mixed)
        return mixed

    def balanced(
        self, items: Mapping[str, Sequence[Item]], make: Callable[[Item], Made | None], size: int = SIZE
    ) -> list[tuple[str, str, Made]]:
        """The same number from every group, in turns, as (group, order of the options, what was made).

        `items` come in the order of their drawing. `make` opens what an item needs, and returns None where
        it cannot be used; then the next one takes its place. At most `size` a group, or `limit` in all; it
        ends where a group has no more. Groups without items take no part. The orders take turns so that they
        differ by at most one in each group and in all; without a limit, a last round that would make them
        uneven is left.

        >>> Source("", Path()).balanced({"a": [1, 2, 3], "b": [4, 5]}, str)
        [('a', 'answer first', '1'), ('b', 'foil first', '4'),
         ('a', 'foil first', '2'), ('b', 'answer first', '5')]
        """
        groups = [group for group, members in items.items() if members]
        wanted = size * len(groups) if self.limit is None else self.limit
        streams = {group: iter(items[group]) for group in groups}
        drawn: list[tuple[str, str, Made]] = []
        rounds, short = 0, None
        while groups and len(drawn) < wanted and short is None:
            turn: list[tuple[str, str, Made]] = []
            for place, group in enumerate(groups[: wanted - len(drawn)]):
                made = next((one for item in streams[group] if (one := make(item)) is not None), None)
                if made is None:
                    short = group
                    break
                turn.append((group, ORDERS[(place + rounds) % 2], made))
            else:
                drawn += turn
                rounds += 1
        if self.limit is None and rounds > 1 and rounds % 2:
            del drawn[-len(groups) :]
        rest = "enough were drawn" if short is None else f"no more {short!r} to balance them with"
        self.drop(f"left over: {rest}", sum(1 for group in groups for _ in streams[group]))
        return drawn


def label_examples(
    source: Source,
    name: str,
    images: Mapping[str, Sequence[Path]],
    groups: Mapping[str, Sequence[str]],
    rivals: Callable[[str, Path], Sequence[str]],
    ask: Callable[[str, str, str], dict[str, Any]],
    what: str,
) -> list[Example]:
    """Examples whose clean image is of one label and whose corrupt one of another; balanced over groups.

    `rivals` are the labels that an image can stand against, in the order of their drawing; those that gave
    fewest partners so far come first. An image is the clean one at most once; as a partner it comes again
    only when all of its label were handed out. `ask` makes the prompt, the options and the groups from the
    two labels and the order of the options. Ids begin with `name`; `what`
    an image without a partner lacks is counted.
    """
    given = dict.fromkeys(images, 0)
    decks = {label: source.shuffled(files, "foils", source.seed, label) for label, files in images.items()}

    def make(item: tuple[str, Path]) -> tuple[str, Path, str, Path] | None:
        label, path = item
        if not source.is_readable(path):
            return None
        for rival in sorted(rivals(label, path), key=given.__getitem__):
            if other := source.partner(path, decks[rival]):
                given[rival] += 1
                decks[rival].remove(other)
                decks[rival].append(other)
                return label, path, rival, other
        source.drop(f"no image of {what} is left")
        return None

    items = {
        group: source.shuffled(
            ((label, path) for label in labels for path in images[label]), group, source.seed
        )
        for group, labels in groups.items()
    }
    examples: list[Example] = []
    for _, order, (label, path, rival, other) in source.balanced(items, make):
        asked = ask(label, rival, order)
        words = (label.replace(" ", "-"), path.stem, asked["foil"].replace(" ", "-"))
        examples.append(Example("-".join((name, *words)), path, corrupt_image=other, **asked))
    return examples

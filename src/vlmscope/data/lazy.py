"""Examples that are made when they are asked for, by their numbers; few of them are held."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import overload
from weakref import WeakValueDictionary

from vlmscope.data.example import Example, fingerprint
from vlmscope.errors import ExampleError

LOOKED_AT = 16
"""Examples whose pictures the hash of a set reads."""


class Lazy(Sequence[Example], ABC):
    """Examples by their numbers; `about` is what they are made of, pictures left out.

    The first ones asked for and the last are held, `window` of them; what a caller holds is not made again.
    `ids` are those of all, and `roles` the names of all roles, in the order in which they come.
    """

    ids: list[str]
    roles: dict[str, None]

    def __init__(self, about: bytes, window: int) -> None:
        self._about, self._window = about, window
        self._known = WeakValueDictionary[int, Example]()
        self._held: list[Example] = []

    @abstractmethod
    def make(self, number: int) -> Example:
        """An example; raises `ExampleError` where it cannot be read."""

    @overload
    def __getitem__(self, number: int) -> Example: ...

    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...

    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        found = self._known.get(number)
        if found is None:
            found = self._known[number] = self.make(number)
            del self._held[self._window - 1 :]
            self._held.append(found)
        return found

    def __eq__(self, other: object) -> bool:
        """As a list of the same examples."""
        if not isinstance(other, list | Lazy):
            return NotImplemented
        return len(self) == len(other) and all(a is b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, others: Sequence[Example]) -> list[Example]:
        return [*self, *others]

    def __radd__(self, others: Sequence[Example]) -> list[Example]:
        return [*others, *self]

    def __repr__(self) -> str:
        between = f", {self.ids[0]} to {self.ids[-1]}" if self.ids else ""
        return f"<{len(self)} examples{between}>"

    def digest(self, number: int) -> str:
        """The fingerprint of an example; none of one that cannot be made."""
        with suppress(ExampleError):
            return fingerprint([self[number]])
        return ""

    @property
    def hash(self) -> str:
        """The SHA-256 of what the examples are made of, and of the first of them with their pictures."""
        first = [self.digest(number) for number in range(min(LOOKED_AT, len(self)))]
        return hashlib.sha256(self._about + " ".join(first).encode()).hexdigest()


class Digests(Sequence[str]):
    """The fingerprints of examples, each made when it is asked for."""

    def __init__(self, examples: Lazy) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> list[str]: ...

    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self._examples.digest(one) for one in range(len(self))[number]]
        return self._examples.digest(number)


def ids_of(examples: Sequence[Example]) -> list[str]:
    """The ids of all examples."""
    return examples.ids if isinstance(examples, Lazy) else [example.id for example in examples]


def roles_of(examples: Sequence[Example]) -> dict[str, None]:
    """The names of all roles, in the order in which they come."""
    if isinstance(examples, Lazy):
        return examples.roles
    return {role: None for example in examples for role in example.roles}


def readable(examples: Sequence[Example]) -> Iterator[Example]:
    """All but those that cannot be read."""
    for number in range(len(examples)):
        with suppress(ExampleError):
            yield examples[number]

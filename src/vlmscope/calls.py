"""Calls that do not need each other, so that several processes can make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Calls = Iterable[tuple[Any, ...]]
"""Calls `(function, *given)` that do not need each other."""
Do = Callable[[Calls], Iterable[Any]]
"""What gives that of calls, in their order; other processes may make them."""


def in_turn(calls: Calls) -> Iterator[Any]:
    """What calls give, made by this process."""
    for function, *given in calls:
        yield function(*given)

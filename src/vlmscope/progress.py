"""How far a long computation is: a bar on a terminal and in a notebook, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from tqdm.auto import tqdm

EVERY = 30.0
"""Seconds from one line to the next where the output is neither a terminal nor a notebook."""
STATE = "{n:.0f}/{total:.0f} {unit}{postfix}, {elapsed} gone, {remaining} left"


class Step(Protocol):
    def __call__(self, patches: int, done: float, total: int | None = None) -> None:
        """Patches since the last call; how many are done in all, and, where that changes, of how many."""


@contextmanager
def progress(total: int, done: int = 0, quiet: bool = False, what: str = "examples") -> Iterator[Step]:
    """Show on standard error how many of `total` are done, with rate and time left; yields what to call.

    A computation that is over before the first line is due prints none.
    """
    start, computed = time.perf_counter(), 0
    with tqdm(total=total, initial=done, unit=what, disable=quiet, miniters=0, **_manner(sys.stderr)) as bar:

        def step(patches: int, done: float, total: int | None = None) -> None:
            nonlocal computed
            computed += patches
            if computed:
                rate = computed / (time.perf_counter() - start)
                bar.set_postfix_str(f"{rate:,.0f} patches/s", refresh=False)
            bar.total = total or bar.total
            bar.update(done - bar.n)

        yield step


def _manner(stream: TextIO) -> dict[str, Any]:
    if stream.isatty() or type(stream).__module__.startswith("ipykernel"):
        return {"bar_format": f"|{{bar}}| {STATE}"}
    return {"bar_format": STATE, "mininterval": EVERY, "delay": EVERY, "file": _Lines(stream)}


class _Lines:
    """A stream on which each state of a bar becomes a line, instead of being written over the last one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if state := text.strip():
            print(state, file=self.stream)

    def flush(self) -> None:
        self.stream.flush()

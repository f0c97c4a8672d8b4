"""Options that no command can take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from random import Random

from frame import Case

NUMBERS = (
    *("-1", "9" * 5000, "3.²", "nan", "inf", "-inf", "1e999", "", " ", "0x10", "10**12", "x"),
    "\x1b[31m1",
)
SWEEP = (
    "sweep --model toy-blip --data states --sites encoder.0.resid@answer --corrupt noise --out out".split()
)
FLAGS = ("--limit", "--seed", "--draws", "--noise-scale", "--check")


def cases(random: Random, top: Path) -> Iterator[Case]:
    for number in itertools.count():
        folder = top / f"case-{number}" / "here"
        folder.mkdir(parents=True)
        flag, value = random.choice(FLAGS), random.choice(NUMBERS)
        yield Case(f"{flag} {value[:20]!r}", [*SWEEP, flag, value], folder)

"""The fuzzer: wrong inputs of every category, a line for each that was answered wrongly, and the counts.

    python tests/fuzz/run.py [--seed N] [--cases N] [--only CATEGORY ...]

The last line says of how many wrong inputs how many were answered as promised (`frame.judge`).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "wrong")]

import frame  # noqa: E402
from frame import FAULTS, judge  # noqa: E402

CATEGORIES = sorted(file.stem for file in (HERE / "wrong").glob("*.py"))
"""The modules of cases: each has `cases(random, folder)`, without end."""
IMPORTED = "cli.main checkpoint studies.sweep studies.heads studies.circuits notice neurons report".split()


class Wrong(NamedTuple):
    """A wrong answer: to which case, and what was wrong with it."""

    category: str
    what: str
    fault: str
    detail: str


def fuzz(category: str, seed: int, count: int) -> list[Wrong]:
    """Judge so many cases of a category; the wrong answers."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub is imported
    # Everything is imported before the first fork, so that a case costs its command alone.
    for name in IMPORTED:
        importlib.import_module(f"vlmscope.{name}")
    wrong = []
    with tempfile.TemporaryDirectory() as top:
        scratch = Path(top, "scratch")
        scratch.mkdir()
        made = importlib.import_module(category).cases(random.Random(f"{seed} {category}"), Path(top))
        for case in itertools.islice(made, count):
            fault, detail = judge(case, scratch)
            shutil.rmtree(case.folder.parent, ignore_errors=True)
            if fault:
                wrong.append(Wrong(category, case.what, fault, detail))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--cases", type=int, default=300, help="of each category")
    parser.add_argument("--only", nargs="*", default=CATEGORIES, choices=CATEGORIES)
    parser.add_argument("--seconds", type=float, default=frame.SECONDS, help="for an answer")
    given = parser.parse_args()
    frame.SECONDS = given.seconds
    every: dict[str, int] = {}
    for category in given.only:
        start = time.monotonic()
        wrong = fuzz(category, given.seed, given.cases)
        for one in wrong:
            print(f"{category}: {one.fault}: {one.what}: {one.detail!r}")
        faults = Counter(one.fault for one in wrong)
        counts = ", ".join(f"{faults[fault]} {fault}" for fault in FAULTS if faults[fault])
        seconds = time.monotonic() - start
        print(f"{category}: {given.cases} cases in {seconds:.0f} s, {counts or 'all answered'}", flush=True)
        every[category] = len(wrong)
    cases = given.cases * len(every)
    print(json.dumps({"seed": given.seed, "cases": cases, "wrong": sum(every.values())} | every))
    sys.exit(any(every.values()))


if __name__ == "__main__":
    main()

"""The fuzzer: wrong inputs of every category, a line for each that was answered wrongly, and the counts.

    python tests/fuzz/run.py [--seed N] [--cases N] [--only CATEGORY ...] [--jobs N]

Each category is a process of its own, so that what befalls one ends no other. The last lines say of how many
wrong inputs how many were not answered as promised (`frame.judge`): in words, and as JSON.
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
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads, and torch falls over that
    # Everything is imported before the first fork, so that a case costs its command alone.
    for name in IMPORTED:
        importlib.import_module(f"vlmscope.{name}")
    wrong = []
    with tempfile.TemporaryDirectory() as top:
        scratch = Path(top, "scratch")
        scratch.mkdir()
        made = importlib.import_module(category).cases(random.Random(f"{seed} {category}"), Path(top))
        begun = time.monotonic()
        for number, case in enumerate(itertools.islice(made, count)):
            if number and number % 50 == 0:
                each = (time.monotonic() - begun) / number
                done = f"{category}: {number} of {count} cases, {len(wrong)} wrong, {each:.2f} s each"
                print(done, file=sys.stderr, flush=True)
            fault, detail = judge(case, scratch)
            shutil.rmtree(case.folder.parent, ignore_errors=True)
            if fault:
                wrong.append(Wrong(category, case.what, fault, detail))
                print(f"{category}: {fault}: {case.what}: {detail!r}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--cases", type=int, default=300, help="of each category")
    parser.add_argument("--only", nargs="*", default=CATEGORIES, choices=CATEGORIES)
    parser.add_argument("--seconds", type=float, default=frame.SECONDS, help="for an answer")
    parser.add_argument("--jobs", type=int, default=1, help="categories at once")
    given = parser.parse_args()
    frame.SECONDS = given.seconds
    if len(given.only) == 1:
        every: dict[str, int | None] = {given.only[0]: said(given.only[0], given.seed, given.cases)}
    else:
        numbers = f"--seed {given.seed} --cases {given.cases} --seconds {given.seconds}".split()
        parts = [[*numbers, "--only", category] for category in given.only]
        done = frame.apart(__file__, parts, given.jobs)
        every = {name: one and one[name] for name, one in zip(given.only, done, strict=True)}
    words = [f"{name} {'not finished' if many is None else many}" for name, many in every.items()]
    if len(every) > 1:
        print(f"wrong of {given.cases} cases each: {', '.join(words)}")
    cases, wrong = given.cases * len(every), sum(filter(None, every.values()))
    print(json.dumps({"seed": given.seed, "cases": cases, "wrong": wrong} | every))
    sys.exit(any(many != 0 for many in every.values()))


def said(category: str, seed: int, cases: int) -> int:
    """Say what was answered wrongly in a category; how many that were."""
    start = time.monotonic()
    wrong = fuzz(category, seed, cases)
    faults = Counter(one.fault for one in wrong)
    counts = ", ".join(f"{faults[fault]} {fault}" for fault in FAULTS if faults[fault])
    print(
        f"{category}: {cases} cases in {time.monotonic() - start:.0f} s, {counts or 'all answered'}",
        flush=True,
    )
    return len(wrong)


if __name__ == "__main__":
    main()

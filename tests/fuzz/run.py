"""The fuzzer: wrong inputs of every category, a line for each that was answered wrongly, and the counts.

    python tests/fuzz/run.py [--seed N] [--cases N] [--only CATEGORY ...] [--jobs N]

Each category is a process of its own, so that what befalls one ends no other; all are forked from one in
which everything is imported. The last lines say of how many wrong inputs how many were not answered as
promised (`frame.judge`): in words, and as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
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
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub is imported
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads, and torch falls over that
    # Everything is imported before the first fork, so that a case costs its command alone.
    for name in (*(f"vlmscope.{name}" for name in IMPORTED), *given.only):
        importlib.import_module(name)
    every = apart(given.only, given.jobs, given.seed, given.cases)
    words = [f"{name} {'not finished' if many is None else many}" for name, many in every.items()]
    if len(every) > 1:
        print(f"wrong of {given.cases} cases each: {', '.join(words)}")
    cases, wrong = given.cases * len(every), sum(filter(None, every.values()))
    print(json.dumps({"seed": given.seed, "cases": cases, "wrong": wrong} | every))
    sys.exit(any(many != 0 for many in every.values()))


def apart(categories: list[str], jobs: int, seed: int, cases: int) -> dict[str, int | None]:
    """How many of each category were answered wrongly; None if its process did not get to its end."""
    fork = multiprocessing.get_context("fork")
    left, running, every = list(categories), dict[Connection, str](), dict[str, int | None]()
    while left or running:
        while left and len(running) < jobs:
            here, there = fork.Pipe(duplex=False)
            running[here] = left.pop(0)
            fork.Process(target=tell, args=(there, running[here], seed, cases)).start()
            there.close()
        for here in wait(list(running)):
            name = running.pop(here)
            try:
                every[name] = here.recv()
            except EOFError:
                every[name] = None
    return {name: every[name] for name in categories}


def tell(there: Connection, category: str, seed: int, cases: int) -> None:
    there.send(said(category, seed, cases))


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

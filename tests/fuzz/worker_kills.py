"""Workers and drivers, killed at random moments, and what has to be there afterwards.

    python tests/fuzz/worker_kills.py [--kills 200] [--seed N] [--limit 120] [--seconds N]

A sweep runs with two workers, of which each is killed (SIGKILL) at a moment drawn when it is first seen,
within its first seconds: while it imports, loads, computes or writes. Now and then the driver is killed
instead, after which the same command goes on, sometimes without workers. Between kills, who reads finds whole
files only. Each run has at most 12 kills, none after two thirds of its examples (an example on which three
workers die is left out); then it is left alone, and its table, its baselines and its check have to be those
of an undisturbed process, bit for bit, and nothing else may be in its folder.

After `--seconds` no other run is begun. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

from vlmscope.errors import VlmscopeError
from vlmscope.studies.run_folder import Run, read_run

COMMAND = "sweep --model toy-blip --data states --corrupt image --sites".split()
COMMAND += "encoder.*.cross.h*@* encoder.*.resid@*".split()
PATIENCE = 900.0
"""Seconds after which a command hangs."""
MOST = 12
"""Kills of one run."""
LIVES, DRIVER_LIVES, DRIVERS = (2.0, 10.0), (1.0, 12.0), 0.4
"""Seconds that workers and drivers live; which share of drivers is killed."""
WORKER = b"vlmscope.studies.workers.local"
"""What the command of a worker's process names."""


def start(out: Path, limit: int, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vlmscope", *COMMAND, "--limit", str(limit), *words, "--out", str(out)]
    log = (out.parent / "err.txt").open("wb")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=False)


def workers_of(first: int) -> list[int]:
    """The workers among the processes that come from another one."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue  # it has just ended
    found = []
    for pid, name in names.items():
        above = pid
        while above > 1 and above != first:
            above = parents.get(above, 0)
        if above == first and WORKER in name:
            found.append(pid)
    return found


def read(out: Path) -> Run | None:
    """What a reader finds: nothing yet, or whole files."""
    if not (out / "run.json").exists():
        return None
    run = read_run(out)
    assert run.effects()["example"].isin(run.baselines()["example"]).all(), "rows that nothing commits"
    return run


def one_run(random: Random, folder: Path, limit: int, whole: Run, left: int) -> Counter[str]:
    """A run that is killed at most so many times."""
    out, kills = folder / "run", Counter[str]()
    wanted = min(left, random.randint(MOST // 2, MOST))
    while True:
        alone = bool(kills["driver"]) and random.random() < 0.3
        driver, begun = start(out, limit, *([] if alone else ["--workers", "2"])), time.monotonic()
        dies = random.random() < DRIVERS or alone
        ends = {driver.pid: begun + random.uniform(*DRIVER_LIVES) if dies else float("inf")}
        while driver.poll() is None:
            time.sleep(random.uniform(0.02, 0.3))
            now, run = time.monotonic(), read(out)
            assert now - begun < PATIENCE, f"hangs after {dict(kills)}"
            if run is not None and len(run.baselines()) > limit * 2 / 3:
                continue
            for pid in [driver.pid, *workers_of(os.getpid())]:
                if kills.total() < wanted and now > ends.setdefault(pid, now + random.uniform(*LIVES)):
                    ends[pid] = float("inf")
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        kills["driver" if pid == driver.pid else "worker"] += 1
        if driver.returncode == 0:
            break
        said = (folder / "err.txt").read_text()
        assert driver.returncode == -signal.SIGKILL or "died before they could begin" in said, said
    run = read(out)
    assert run is not None and run.finished
    assert run.effects().equals(whole.effects()), f"another table after {dict(kills)}"
    assert run.baselines().equals(whole.baselines()), f"other baselines after {dict(kills)}"
    assert run.check == whole.check, f"another check after {dict(kills)}"
    odd = [str(file) for file in out.rglob(".*") if file.name != ".lock"]
    assert not odd, f"left: {odd}"
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    random, kills, runs, wrong = Random(given.seed), Counter[str](), 0, 0
    begun = time.monotonic()
    end = begun + given.seconds
    with tempfile.TemporaryDirectory() as top:
        assert start(Path(top) / "whole", given.limit).wait() == 0, (Path(top) / "err.txt").read_text()
        whole = read_run(Path(top) / "whole")
        while kills.total() < given.kills and time.monotonic() < end:
            folder = Path(top) / "one"
            folder.mkdir()
            try:
                kills += one_run(random, folder, given.limit, whole, given.kills - kills.total())
            except (AssertionError, VlmscopeError) as error:
                wrong += 1
                print(f"run {runs}: {error}", flush=True)
            runs += 1
            shutil.rmtree(folder)
            print(f"{runs} runs, {dict(kills)}, {wrong} wrong", file=sys.stderr, flush=True)
    seconds = round(time.monotonic() - begun)
    print(json.dumps({"seed": given.seed, "runs": runs, **kills, "wrong": wrong, "seconds": seconds}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

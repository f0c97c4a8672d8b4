"""Two workers against one process: the same table, in which time.

    python benchmarks/workers.py [--limit 200] [--few 40] [--rounds 1] [--out benchmarks/results/NAME.json]

Sweeps all heads and modules of toy-blip's encoder at all tokens, as a person would: `vlmscope sweep`, then
the same with `--workers 2`, with one thread a process. `whole` counts everything,
with the models' loading; `steady` what is computed between the first part and the last
one, in examples a second. Checks that the tables are equal bit for bit. On a machine that does something
else, too, the ratio says little: `load` is how many others wanted a core when each command began.

`peaks` are the most bytes that each process held (what the system counts as resident, with the libraries
that processes share), of a run of `--few` examples, too, and of a process that loads the model and does
nothing else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vlmscope.cli.machine import _running
from vlmscope.studies.run_folder import parts_of, read_run

COMMAND = "sweep --model toy-blip --data states --corrupt image --check 0 --sites".split()
COMMAND += "encoder.*.attn.h*@* encoder.*.cross.h*@* encoder.*.resid@* encoder.*.mlp@*".split()


LOADS = "import vlmscope; vlmscope.load('toy-blip'); print(open('/proc/self/status').read())"
WORKER = b"vlmscope.studies.workers.local"
"""What the command of a worker's process names."""


def peak(status: str) -> int:
    """The most bytes that a process has held, of its /proc/PID/status."""
    return next(int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith("VmHWM"))


def peaks(driver: int) -> dict[int, int]:
    """Those of a process and of its workers, as far as these are there now."""
    found, parents, workers = {}, {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):  # it has just ended
            pid, status = int(folder.name), (folder / "status").read_text()
            parents[pid] = int(status.split("PPid:")[1].split()[0])
            found[pid] = peak(status)
            if WORKER in (folder / "cmdline").read_bytes():
                workers.append(pid)
    return {pid: found[pid] for pid in [driver, *workers] if driver in _above(pid, parents) and pid in found}


def _above(pid: int, parents: dict[int, int]) -> list[int]:
    above = [pid]
    while above[-1] in parents:
        above.append(parents[above[-1]])
    return above


def timed(limit: int, out: Path, *words: str) -> dict[str, Any]:
    """Seconds of a command, examples a second between its first part and its end, and peaks of memory."""
    load, start = max(0, _running() - 1), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmscope", *COMMAND, "--limit", str(limit), *words, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    held: dict[int, int] = {}
    while True:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=0.5)
            break
        held |= peaks(process.pid)
    assert status == 0, "vlmscope sweep failed"
    seconds = time.perf_counter() - start
    first, *_, last = (part.stat().st_mtime for part in parts_of(out))
    steady = (limit - 1) / (last - first)
    return {"seconds": seconds, "steady": steady, "load": load, "peaks": list(held.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--few", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    loaded = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        few = timed(arguments.few, Path(folder) / "few", "--workers", "2")
    rounds = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            one = timed(arguments.limit, place / "one")
            two = timed(arguments.limit, place / "two", "--workers", "2")
            tables = [
                (run.effects(), run.baselines()) for run in map(read_run, (place / "one", place / "two"))
            ]
        assert all(a.equals(b) for a, b in zip(*tables, strict=True)), "the tables differ"
        patches = len(tables[0][0])
        rounds.append({"one": one, "two": two})
        print(f"one {one['seconds']:.1f} s, two {two['seconds']:.1f} s; {patches:,} patches, tables equal")
    best = {
        name: max(each["two"]["steady"] for each in rounds) / max(each["one"]["steady"] for each in rounds)
        if name == "steady"
        else min(each["one"]["seconds"] for each in rounds) / min(each["two"]["seconds"] for each in rounds)
        for name in ("whole", "steady")
    }
    result = {
        "benchmark": "workers",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "torch": torch.__version__,
        "examples": arguments.limit,
        "patches": patches,
        "rounds": rounds,
        "model_alone": peak(loaded),
        "few": {"examples": arguments.few, **few},
        "times_faster": best,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"peaks: {peak(loaded) / 1e9:.2f} GB the model alone, and of driver and workers:")
    for many, one in ((arguments.few, few), (arguments.limit, rounds[-1]["two"])):
        print(f"  {many} examples: {', '.join(f'{size / 1e9:.2f}' for size in one['peaks'])} GB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

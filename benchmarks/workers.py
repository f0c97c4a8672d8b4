"""Two workers against one process: the same table, in which time.

    python benchmarks/workers.py [--limit 200] [--rounds 1] [--out benchmarks/results/NAME.json]

Sweeps all heads and modules of toy-blip's encoder at all tokens, as a person would: `vlmscope sweep`, then
the same with `--workers 2` (Ray has to be installed), with one thread a process. `whole` counts everything,
with the start of Ray and the models' loading; `steady` what is computed between the first part and the last
one, in examples a second. Checks that the tables are equal bit for bit. On a machine that does something
else, too, the ratio says little: `load` is how many others wanted a core when each command began. The last
line is JSON.
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
from pathlib import Path
from typing import Any

import torch

from vlmscope.cli.machine import _running
from vlmscope.studies.run_folder import parts_of, read_run

COMMAND = "sweep --model toy-blip --data states --corrupt image --check 0 --sites".split()
COMMAND += "encoder.*.attn.h*@* encoder.*.cross.h*@* encoder.*.resid@* encoder.*.mlp@*".split()


def timed(limit: int, out: Path, *words: str) -> dict[str, Any]:
    """Seconds of a command, and examples a second between its first part and its end."""
    load, start = max(0, _running() - 1), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmscope", *COMMAND, "--limit", str(limit), *words, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    assert process.wait() == 0, "vlmscope sweep failed"
    seconds = time.perf_counter() - start
    first, *_, last = (part.stat().st_mtime for part in parts_of(out))
    return {"seconds": seconds, "steady": (limit - 1) / (last - first), "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
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
        "times_faster": best,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

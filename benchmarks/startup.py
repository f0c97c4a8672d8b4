"""What a command on a toy costs beyond importing torch and transformers with the classes that it uses.

    python benchmarks/startup.py [--rounds 5] [--out benchmarks/results/NAME.json]

Each line is a process of its own, all of them in turn for each round; the least of the rounds counts, in
seconds on the clock and in seconds of CPU (on a busy machine only the latter says something). `beyond` is the
difference to the imports alone. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

IMPORTS = "import torch, transformers; from transformers import BlipForQuestionAnswering, BlipProcessor"
SWEEP = "sweep --model toy-blip --data states --limit 2 --corrupt image --sites encoder.*.cross.h*@answer"
COMMANDS = {"help": ["--help"], "models": ["models", "toy-blip"], "sweep": SWEEP.split()}


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds on the clock, and of CPU."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def measured(rounds: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number in range(rounds):
        found["imports"].append(timed([sys.executable, "-c", IMPORTS]))
        for name, words in COMMANDS.items():
            with tempfile.TemporaryDirectory() as folder:
                out = ["--out", f"{folder}/{number}"] if name == "sweep" else []
                found[name].append(timed([sys.executable, "-m", "vlmscope", *words, *out]))
    least = {
        name: [round(min(column), 2) for column in zip(*times, strict=True)] for name, times in found.items()
    }
    wall, cpu = least["imports"]
    return {
        name: {"wall": a, "cpu": b, "wall_beyond": round(a - wall, 2), "cpu_beyond": round(b - cpu, 2)}
        for name, (a, b) in least.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seconds = measured(arguments.rounds)
    for name, row in seconds.items():
        print(f"{name:<10}" + "  ".join(f"{what} {value:6.2f}" for what, value in row.items()))
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    result = {"benchmark": "startup", "machine": machine, "rounds": arguments.rounds, "seconds": seconds}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The whole NOTICE pipeline on the toys: time, memory, and whether its findings hold.

    python benchmarks/notice.py [--limit 200] [--base] [--workers N] [--out benchmarks/results/NAME.json]

Runs `vlmscope notice` on `toy-blip` and the three built-in sets as a person would, in a process of
its own, with `--limit` examples and with a quarter of them (memory should be the same), and reads
from its tables: the rank correlation of the heads' effects between halves of the examples, and how
far accuracy drops without the important heads and without random ones. With `--base` the estimate for
1,500 examples on a model of BLIP-base's shape is set against two examples computed. With `--workers` the
same runs with so many, too, and all tables have to be equal, bit for bit. The last
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
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from blip import base_model, photographs
from scipy.stats import spearmanr

from vlmscope.data import BUILT_IN
from vlmscope.notice.pipeline import default_sites
from vlmscope.studies import circuits
from vlmscope.studies.plan import estimate
from vlmscope.studies.run_folder import read_run, table_in
from vlmscope.studies.sweep import into_folder, swept
from vlmscope.studies.task import task_of


def pipeline(limit: int, out: Path, *more: str) -> tuple[float, float]:
    """Seconds and peak memory in GiB of one run of the command; of workers, the process that started them."""
    command = [
        sys.executable,
        "-m",
        "vlmscope",
        "notice",
        "--model",
        "toy-blip",
        "--data",
        *BUILT_IN,
        "--limit",
        str(limit),
        "--out",
        str(out),
        *more,
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "vlmscope notice failed"
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def check_equal(out: Path, other: Path) -> None:
    """All that two folders of the pipeline hold: the same, bit for bit."""
    for file in sorted(out.rglob("run.json")):
        runs = [read_run(file.parent), read_run(other / file.parent.relative_to(out))]
        for name in {table_in(runs[0].spec), "baselines"}:
            one, two = (getattr(run, name)() for run in runs)
            assert one.equals(two), f"{file.parent.name}: {name} differ"
    for file in sorted([*out.glob("*.csv"), *out.glob("circuits/*.csv"), *out.glob("[hf]*/*/*.csv")]):
        assert file.read_bytes() == (other / file.relative_to(out)).read_bytes(), f"{file} differs"


def halves(out: Path) -> dict[str, dict[str, float]]:
    """For each run: Spearman's correlation over all its heads between two halves of the examples."""
    found = {}
    for folder in sorted((out / "runs").iterdir()):
        grids = circuits.head_scores(read_run(folder))
        wide = pd.concat([w.add_prefix(f"{key}") for key, w in grids.items()], axis=1)
        half = circuits.first_half(list(wide.index))
        one, other = wide[half], wide[~half]
        found[folder.name] = {
            "examples": len(wide),
            "heads": wide.shape[1],
            "mean_abs": float(spearmanr(one.abs().mean(), other.abs().mean())[0]),
            "mean": float(spearmanr(one.mean(), other.mean())[0]),
        }
    return found


def knock_outs(out: Path) -> dict[str, dict[str, float | None]]:
    """For each set: accuracy with no head, the important heads, and random ones knocked out; None where too
    few other heads are in their layers."""
    found = {}
    for folder in sorted((out / "heads").iterdir()):
        table = pd.read_csv(folder / "together.csv")
        whole = table.loc[table["set"] == "none", "accuracy"].item()
        mean = table[table["knockout"] == "mean"].groupby("set")["accuracy"].mean()
        these = whole - mean["these heads"]
        random = whole - mean["random heads"] if "random heads" in mean else None
        heads = len(table.loc[table["set"] == "these heads", "heads"].iloc[0].split())
        found[folder.name] = {
            "heads": heads,
            "accuracy": whole,
            "drop": these,
            "drop_of_random": random,
            "times": these / random if random is not None and random > 0 else None,
        }
    return found


def base(folder: Path) -> dict[str, float]:
    """The estimate for 1,500 examples of BLIP-base's shape, and two of them computed."""
    model = base_model()
    one = photographs(folder)
    examples = [replace(one, id=f"e{n}") for n in range(1500)]
    sites = default_sites(model)
    said = estimate(task_of(model, examples, sites, "image"))
    start = time.perf_counter()
    run = into_folder(swept(model, examples[:2], sites, "image"), folder / "run")
    seconds = (time.perf_counter() - start) / 2 * 1500
    size = sum(p.stat().st_size for p in (run.path / "effects").iterdir()) / 2 * 1500
    return {
        "patches_an_example": said.patches,
        "estimated_hours": said.seconds / 3600,
        "hours_from_two_computed": seconds / 3600,
        "estimated_gb": said.bytes / 1e9,
        "gb_from_two_computed": size / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--base", action="store_true", help="also a model of BLIP-base's shape")
    parser.add_argument("--workers", type=int, help="also with so many")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quarter = pipeline(max(arguments.limit // 4, 10), folder / "quarter")
        seconds, memory = pipeline(arguments.limit, folder / "all")
        result = {
            "benchmark": "notice",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
            "torch": torch.__version__,
            "examples": arguments.limit,
            "seconds": seconds,
            "peak_memory_gib": memory,
            "peak_memory_gib_of_a_quarter": quarter[1],
            "halves": halves(folder / "all"),
            "knock_outs": knock_outs(folder / "all"),
        }
        if arguments.workers:
            took, _ = pipeline(arguments.limit, folder / "several", "--workers", str(arguments.workers))
            check_equal(folder / "all", folder / "several")
            result |= {
                "workers": arguments.workers,
                "seconds_with_workers": took,
                "times_faster": seconds / took,
            }
        if arguments.base:
            result["base"] = base(folder)
    text = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

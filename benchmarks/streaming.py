"""A large data set on disk: how soon a run of it begins, and the memory that it takes, by its examples.

    python benchmarks/streaming.py [--rows 1000 100000] [--seconds 30] [--workers 2] [--out FILE.json]

Writes sets of small pictures of noise as Parquet files and as `save_to_disk` does, and starts
`vlmscope sweep --data hf://FOLDER` on each, as a person would. `first` is the time from the command to its
first part on disk, `cpu` what of that its process computed (on a machine that does something else, too, this
says more). `peak` is the most memory that the process holds until it is stopped after so many seconds, `own`
what of that is no file that is mapped, which the system can take back (with `--workers`, of the largest
worker; Ray has to be installed). Checks that the examples that were run have the table that they have as a
list in memory. `end` is what the baselines of a finished run take to be read: its folder is written here,
without a model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from PIL import Image

import vlmscope
from vlmscope.studies.run_folder import BASELINES, EFFECTS, Held, parts_of, read_run, table_of
from vlmscope.studies.run_writer import open_run

PROMPT = "what colour is the circle?"
SITES = "encoder.*.resid@last"
COMMAND = ["sweep", "--model", "toy-blip", "--corrupt", "noise", "--sites", SITES, "--check", "0"]
COMMAND += ["--draws", "1"]
PARTS = 3
"""Parts of a run that is measured, at least."""


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="PNG")
    return file.getvalue()


def made(rows: int, form: str, folder: Path) -> Path:
    """A set of so many rows."""
    features = datasets.Features(
        {
            "clean_image": datasets.Image(),
            **dict.fromkeys(("clean_prompt", "answer", "foil"), datasets.Value("string")),
        }
    )
    columns = {
        "clean_image": [{"bytes": picture(number), "path": None} for number in range(rows)],
        "clean_prompt": [PROMPT] * rows,
        "answer": ["red"] * rows,
        "foil": ["blue"] * rows,
    }
    found = datasets.Dataset.from_dict(columns, features=features)
    if form == "parquet":
        found.to_parquet(folder / "train.parquet", batch_size=1000)
    else:
        found.save_to_disk(folder)
    return folder


def memory(process: int) -> tuple[int, int]:
    """The most memory that a process has held, and what is its own now, in bytes; 0 of one that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {
        words[0]: int(words[1]) * 1024 for line in lines if len(words := line.split()) > 1 and "kB" in line
    }
    return found.get("VmHWM:", 0), found.get("RssAnon:", 0)


def seconds_of(process: int) -> float:
    """CPU seconds of a process."""
    cells = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(cells[11]) + int(cells[12])) / os.sysconf("SC_CLK_TCK")


def workers_of(process: int) -> list[int]:
    """Ray's workers below a process."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            about = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        parents[int(status.parent.name)] = int(about["PPid"]), about["Name"].strip()
    found = []
    for child, (parent, name) in parents.items():
        while parent in parents and parent != process:
            parent = parents[parent][0]
        if parent == process and name.startswith("ray::"):
            found.append(child)
    return found


def measured(name: str, out: Path, seconds: float, cache: Path, workers: int) -> dict[str, Any]:
    """The time to the first part, and peak memory; the command is stopped."""
    words = ["--workers", str(workers)] * bool(workers)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmscope", *COMMAND, "--data", name, "--out", str(out), *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first, cpu, peak, own = 0.0, 0.0, 0, 0
    while process.poll() is None:
        time.sleep(0.05)
        for one in workers_of(process.pid) if workers else [process.pid]:
            most, now = memory(one)
            peak, own = max(peak, most), max(own, now)
        parts, passed = len(parts_of(out)), time.perf_counter() - start
        if parts and not first:
            first, cpu = passed, seconds_of(process.pid)
        if parts >= PARTS and passed > seconds:
            process.send_signal(signal.SIGINT)
            process.wait()
    assert first, "vlmscope sweep failed"
    return {"first": first, "cpu": cpu, "peak": peak, "own": own}


def check(name: str, out: Path) -> int:
    """The examples that were run have the table that they have as a list in memory: how many."""
    run = read_run(out)
    held = run.baselines()["example"].tolist()
    pictures = {name: Image.open(io.BytesIO(picture(int(name)))) for name in held[:5]}
    some = [vlmscope.Example(name, image, PROMPT, "red", "blue") for name, image in pictures.items()]
    noise = vlmscope.Noise("multiply", "image", None, 1)
    table = vlmscope.sweep(vlmscope.load("toy-blip"), some, SITES, noise, check=0)
    there = run.effects()
    pd.testing.assert_frame_equal(
        there[there["example"].isin(held[:5])].reset_index(drop=True), table, check_exact=True
    )
    return len(held)


def end(rows: int, folder: Path) -> dict[str, float]:
    """Seconds and memory to read the baselines of a finished run, in a process of its own."""
    spec = {"model": "none", "data": "none", "n_examples": rows, "sites": []}
    left_out = pd.DataFrame([{"example": "0", "corruption": "image", "excluded": True, "reason": "none"}])
    row = table_of(left_out.reindex(columns=BASELINES.names), BASELINES)
    with open_run(folder, spec) as writer:
        for number in range(rows):
            writer.copy(Held(number, 0, None, ""), EFFECTS.empty_table(), row)
            if number % 200 == 199:  # what a part of 10 seconds holds
                writer.flush()
        writer.finish()
    script = (
        "import re, sys, time; from pathlib import Path; from vlmscope.studies.run_folder import read_run; "
        "most = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]); "
        "before, start = most(), time.perf_counter(); many = len(read_run(sys.argv[1]).baselines()); "
        "print(many, time.perf_counter() - start, 1024 * (most() - before))"
    )
    said = subprocess.run([sys.executable, "-c", script, folder], check=True, capture_output=True, text=True)
    many, seconds, most = said.stdout.split()
    assert int(many) == rows, "the folder does not hold what was written"
    return {"seconds": float(seconds), "peak": float(most)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    results = []
    for rows in arguments.rows:
        for form in ("parquet", "saved"):
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                (place / "set").mkdir()
                name = f"hf://{made(rows, form, place / 'set')}"
                one = measured(name, place / "run", arguments.seconds, place / "cache", arguments.workers)
                ran = check(name, place / "run")
            results.append({"rows": rows, "form": form, "ran": ran, **one})
            said = f"first part after {one['first']:.1f} s ({one['cpu']:.1f} s of CPU)"
            held = f"peak {one['peak'] / 1e6:.0f} MB, its own {one['own'] / 1e6:.0f} MB"
            print(f"{rows:,} rows, {form}: {said}, {held}", flush=True)
    ends = {}
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            ends[rows] = end(rows, Path(folder) / "run")
        read = ends[rows]
        print(f"{rows:,} examples at the end: {read['seconds']:.1f} s, {read['peak'] / 1e6:.0f} MB more")
    result = {
        "benchmark": "streaming",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "torch": torch.__version__,
        "datasets": datasets.__version__,
        "workers": arguments.workers,
        "runs": results,
        "end": ends,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What a run will take, beside what it takes; a job array that does it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from models import blip, example
from test_cli import refused, run  # noqa: F401

import vlmscope
from vlmscope.cli.options import Given
from vlmscope.errors import DataError
from vlmscope.studies.plan import plan
from vlmscope.studies.sweep import swept

WORDS = ["--model", "toy-blip", "--data", "states", "--limit", "4", "--corrupt", "image"]
WORDS += ["--sites", "encoder.*.cross.h*@answer", "encoder.*/3.resid@answer", "--check", "2"]


def test_what_a_run_will_take() -> None:
    given = Given(model="toy-blip", data="states", limit=5)
    options = {"sites": "encoder.*.cross.h*@answer", "corrupt": "image"}
    found = plan(swept, given, options, shards=2)
    rows = len(vlmscope.sweep(given.load(), given.examples(), **options))
    assert found.examples * found.each.patches == rows == 60
    assert found.each.seconds > 0 and found.memory > 2e8 and found.on_device is None
    assert found.seconds == pytest.approx(found.each.seconds * 3 / 5 + found.loading)
    assert found.each.bytes == 5 * (found.each.bytes // 5) > 5000


def test_the_job_array_ends_with_the_run_that_was_planned(run, tmp_path, monkeypatch) -> None:  # noqa: F811
    """Its jobs in any order, one of them twice; then what it says at its end."""
    monkeypatch.chdir(tmp_path)
    status, said, err = run("plan", *WORDS, "--out", "my run", "--shards", "2", "--slurm", "jobs.sh")
    assert status == 0 and not err and sorted(Path().iterdir()) == [Path("jobs.sh")]
    assert said.startswith("4 examples × 15 patches: about 60 rows, ") and said.endswith("sbatch jobs.sh\n")
    assert "each of 2 shards: " in said and "measured on example 2 of the data, here (cpu, 1 thread)" in said
    script = Path("jobs.sh").read_text()
    assert "#SBATCH --array=1-2\n" in script and "#SBATCH --time=0:06:00\n" in script
    assert "#SBATCH --gpus" not in script and "--direction" not in script
    for job in "212":
        assert run(*words_of("jobs.sh", tmp_path, job))[0] == 0
    last = script.splitlines()[-1].removeprefix("# ")
    assert last == "vlmscope merge 'my run-shards'/* --out 'my run'"
    Path("last.sh").write_text(last)
    assert run(*words_of("last.sh", tmp_path))[0] == 0
    assert run("sweep", *WORDS, "--out", "whole")[0] == 0
    assert vlmscope.read_run("my run").effects().equals(vlmscope.read_run("whole").effects())


def words_of(script: str, folder: Path, job: str = "") -> list[str]:
    """What the shell calls vlmscope with."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "vlmscope").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (folder / "bin" / "vlmscope").chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": job}
    done = subprocess.run(["bash", script], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_plans_of_what_cannot_be_planned(run, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    plan = ["plan", *WORDS, "--out", "run"]
    refused(run(*plan, "--screen", "atp"), "what a screen finds is not known before; plan its sweep without")
    refused(run(*plan, "--shards", "5"), "4 examples do not make 5 shards; take at most 4")
    refused(run(*plan, "--slurm", "."), ".: is a folder, a device or a pipe; name a file")
    assert not list(tmp_path.iterdir())


class Unfit:
    """Examples that lack what the corruption uses."""

    def load(self) -> vlmscope.Model:
        return blip()

    def examples(self) -> list[vlmscope.Example]:
        return [replace(example(), corrupt_image=None)] * 2


def test_nothing_is_said_where_nothing_ran() -> None:
    with pytest.raises(DataError, match="none of the first 2 examples could be run, so nothing was measured"):
        plan(swept, Unfit(), {"sites": "encoder.0.resid@last", "corrupt": "image"})

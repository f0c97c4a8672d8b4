"""The fuzzer for a minute from one seed; for an hour (`-m slow`) from a new one, which it names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
CATEGORIES = sorted(file.stem for file in (RUN.parent / "wrong").glob("*.py"))


def lines(cases: int, *options: str, **environment: str) -> str:
    command = [sys.executable, str(RUN), "--cases", str(cases), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_wrong_inputs_are_answered_in_one_line(good: Path) -> None:
    # A busy machine is given more time than the promise.
    assert not lines(4, "--seed", "0", "--seconds", "60", VLMSCOPE_FUZZ_FOLDERS=str(good))


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_many_wrong_inputs_are_answered_in_one_line(category: str) -> None:
    assert not lines(400, "--only", category)

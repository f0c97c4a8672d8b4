"""The fuzzer for a minute, from a seed of its own each time (it is named where something is found)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
CATEGORIES = sorted(file.stem for file in (RUN.parent / "wrong").glob("*.py"))


def lines(category: str, cases: int) -> str:
    command = [sys.executable, str(RUN), "--cases", str(cases), "--only", category]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("category", CATEGORIES)
def test_wrong_inputs_are_answered_in_one_line(category: str) -> None:
    assert not lines(category, 12)


@pytest.mark.slow
@pytest.mark.parametrize("category", CATEGORIES)
def test_many_wrong_inputs_are_answered_in_one_line(category: str) -> None:
    assert not lines(category, 400)

"""Some accidents while vlmscope writes, from one seed; and Ctrl-C before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")


def lines(*options: object) -> str:
    """What the accidents say, where one is not survived."""
    command = [sys.executable, str(KILLS), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_whatever_is_killed_ends_the_same_when_it_is_run_again() -> None:
    assert not lines("--kills", 6, "--others", 5, "--seed", 0, "--only", "sweep", "circuits", "find")


@pytest.mark.slow
def test_thousand_kills() -> None:
    assert not lines("--kills", 1000, "--others", 200)


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class Stop:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Stop)
sys.argv = ["vlmscope", "models", "toy-blip"]
import vlmscope.__main__
vlmscope.__main__.main()
"""


@pytest.mark.parametrize("module", ["vlmscope.cli", "typer", "vlmscope.cli.options", "torch", "numpy"])
def test_an_interruption_is_one_line_whatever_is_being_imported(module: str) -> None:
    script = INTERRUPTED.format(module=module)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = (done.returncode, done.stdout, done.stderr)
    assert said == (130, "", "interrupted; run the same command again to go on\n")


def test_the_entry_point_is_the_one_that_answers_interruptions() -> None:
    text = (KILLS.parents[2] / "pyproject.toml").read_text("utf-8")
    assert 'vlmscope = "vlmscope.__main__:main"' in text

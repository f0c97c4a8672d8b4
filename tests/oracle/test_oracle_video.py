"""The same tests over the families of `video_zoo`, in a process that has torchvision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCHVISION = Path(sys.prefix) / "torchvision"
"""Where `run.py check` puts it."""


@pytest.mark.skipif(not TORCHVISION.is_dir(), reason="torchvision is installed by `run.py check`")
@pytest.mark.skipif("VLMSCOPE_TORCHVISION" in os.environ, reason="this process is that process")
def test_families_that_need_torchvision():
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--tb=short", here],
        env={**os.environ, "VLMSCOPE_TORCHVISION": str(TORCHVISION)},
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout

"""The families of `video_families`, in a process that has torchvision; nothing else is to see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCHVISION = Path(sys.prefix) / "torchvision"
"""Where `run.py check` puts it."""
OF_FAMILIES = (
    "test_families.py",
    "test_lens.py::test_what_states_say",
    "test_direct.py::test_writers_sum_to_the_logit_difference",
    "test_direct.py::test_each_writer_by_hand",
    "test_direct.py::test_heads_split_over_what_they_read",
    "test_edges.py::test_edges_sum_to_attribution_patching_of_writers",
    "test_edges.py::test_exact_edges_are_plain_forwards[qwen3-vl]",
    "test_tails.py::test_runs_go_on_from_a_layer",
)


@pytest.mark.skipif(not TORCHVISION.is_dir(), reason="torchvision is installed by `run.py check`")
def test_families_that_need_torchvision():
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *(here / name for name in OF_FAMILIES)],
        env={**os.environ, "VLMSCOPE_TORCHVISION": str(TORCHVISION)},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout

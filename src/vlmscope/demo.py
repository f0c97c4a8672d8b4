"""The NOTICE pipeline on what ships with the package: three sets, two corruptions, one report."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmscope import notice
from vlmscope.data import BUILT_IN


def run(out: Path, limit: int) -> Path:
    """Run `notice` over `toy-blip` and its three sets, and say what it finds."""
    torch.set_num_threads(1)  # the toy is so small that a second thread only gets in the way
    return notice.run(notice.Spec("toy-blip", BUILT_IN, limit=limit, device="cpu"), out, print)

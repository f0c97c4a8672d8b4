"""Nothing in the tests may use the network (but `HF_HUB_OFFLINE=0 pytest -m checkpoint`)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that the tests start compute on one thread, too: then their numbers are the same.
os.environ["OMP_NUM_THREADS"] = "1"

import sys

import pytest
import torch

if torchvision := os.environ.get("VLMSCOPE_TORCHVISION"):
    # For processors that also read videos. Its compiled operators do not load beside a CPU build of
    # torch, and importing it needs the schemas of two of them; resizing needs none.
    sys.path.insert(0, torchvision)
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

torch.set_num_threads(1)  # the models are tiny: a second thread only waits

LONG = ("test_families_that_need_torchvision",)
"""This takes minutes; begun last, it would keep a single worker busy at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(LONG))


@pytest.fixture
def in_float64(monkeypatch):
    """Norms and softmaxes of transformers compute in float32 in any model: no differences can be taken."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

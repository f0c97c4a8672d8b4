"""Nothing in the tests may use the network (but `HF_HUB_OFFLINE=0 pytest -m checkpoint`)."""

import os
import re
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes that the tests start compute on one thread, too: then their numbers are the same.
os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import pytest
import torch
from filelock import FileLock

if torchvision := os.environ.get("VLMSCOPE_TORCHVISION"):
    # For processors that also read videos. Its compiled operators do not load beside a CPU build of
    # torch, and importing it needs the schemas of two of them; resizing needs none.
    sys.path.insert(0, torchvision)
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

torch.set_num_threads(1)  # the models are tiny: a second thread only waits

checked = jaxtyping.jaxtyped


def checked_shapes(*, typechecker):
    """Checks what names a shape. All else is mypy's: to check every function took 40 % of the tests' time."""

    def wrap(made):
        function = made.__init__ if isinstance(made, type) else made
        words = re.findall(r"\w+", str(getattr(function, "__annotations__", "")))
        names = getattr(function, "__globals__", {})
        is_shaped = any("jaxtyping" in repr(names.get(word)) for word in words)
        return checked(made, typechecker=typechecker) if is_shaped else made

    return wrap


jaxtyping.jaxtyped = checked_shapes  # which the import hook of `--jaxtyping-packages` puts on everything

LONG = ("test_families_that_need_torchvision",)
"""This takes minutes; begun last, it would keep a single worker busy at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.name.startswith(LONG))


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A good folder of results of each kind, one for all workers: copy it before you change it."""
    sys.path[:0] = [str(Path(__file__).parent / "fuzz"), str(Path(__file__).parent / "fuzz" / "wrong")]
    from folders import good_folders

    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent
    with FileLock(top / "good.lock"):
        return good_folders(top)


@pytest.fixture
def in_float64(monkeypatch):
    """Norms and softmaxes of transformers compute in float32 in any model: no differences can be taken."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

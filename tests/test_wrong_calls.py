"""Public names called with what they do not take: one line that names what was wrong, or a TypeError."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import vlmscope
from vlmscope.errors import VlmscopeError
from vlmscope.notice import Spec

NO_NUMBER = (None, "x", 1.5, -1, True, [], float("nan"), 10**5000, object())
NO_TEXT = (3, None, b"states", [], object(), True)
NO_PATH = (None, 3, 1.5, [], object(), "\0", "x" * 5000, "gone")
NO_SITES = (None, 3, 1.5, b"x", [None], [3], object(), "encoder", ["encoder.0.resid@answer", 3], "\0")
NO_EXAMPLES = (None, 3, object(), [3], ["states"], [None], {"a": 1}, "stats", b"states")
NO_CHOICE = ("x", "", 3, [], "Image", object(), True)
WRONG: dict[str, tuple[Any, ...]] = {
    "seed": NO_NUMBER,
    "limit": (*NO_NUMBER[1:], 0),
    "check": NO_NUMBER,
    "draws": (*NO_NUMBER, 0, 10**12),
    "scale": ("x", float("nan"), float("inf"), -1.0, True, [], 10**400, 0.0),
    "name": NO_TEXT,
    "file": NO_PATH,
    "path": NO_PATH,
    "folder": NO_PATH,
    "parts": (None, 3, [3], ["gone"], object(), [], "gone"),
    "model": (None, "toy-blip", 3, object()),
    "examples": NO_EXAMPLES,
    "sites": NO_SITES,
    "site": NO_SITES[:6],
    "source": NO_SITES[1:],
    "text": (None, 3, "", "x", [], b"encoder.0.resid@answer", "encoder.0.resid@²"),
    "corrupt": NO_CHOICE,
    "direction": NO_CHOICE,
    "engine": NO_CHOICE,
    "metric": NO_CHOICE,
    "patch": NO_CHOICE,
    "form": NO_CHOICE,
    "at": NO_CHOICE,
    "op": NO_CHOICE,
    "value": (None, "1", [], object()),
    "dtype": (None, "float8", 3, [], "torch", object()),
    "device": ("tpu9", 3.5, [], "", object()),
    "data": (None, (), "states", ["states"], ("states", "states"), (3,), ("",)),
    "table": (None, 3, [], pd.DataFrame(), pd.DataFrame({"tower": ["encoder"]})),
    "out": (3, 1.5, object()),
}


@dataclass(frozen=True)
class Call:
    """A public name, and good values of the arguments that are spoilt in turn."""

    name: str
    good: dict[str, Any]
    spoilt: str


def calls() -> list[Call]:
    one = {"model": "model", "examples": "examples", "sites": "encoder.0.resid@answer"}
    return [
        Call("load", {"name": "toy-blip"}, "name dtype device"),
        Call("examples", {"name": "states", "limit": 1}, "name limit seed"),
        Call(
            "sweep", one, "model examples sites corrupt direction engine metric patch seed check out source"
        ),
        Call("steer", one | {"corrupt": "image"}, "model examples sites corrupt seed"),
        Call("probe", one | {"label": "kind"}, "model examples sites corrupt seed"),
        Call("Direction.load", {}, "path"),
        Call("baselines", {"model": "model", "examples": "examples"}, "model examples corrupt seed"),
        Call("Noise", {}, "form at scale draws"),
        Call("Edit", {"site": "encoder.0.resid@answer", "op": "set", "value": 0.0}, "site op value"),
        Call("Pattern.parse", {"text": "encoder.0.resid@answer"}, "text"),
        Call("read_csv", {}, "path"),
        Call("read_run", {}, "path"),
        Call("open", {}, "folder"),
        Call("WeightEdit.load", {}, "path"),
        Call("write_report", {"parts": ["gone"], "out": "out.html"}, "parts"),
        Call("head_table", {}, "table"),
        Call("token_table", {}, "table"),
    ]


def faults(folder: str) -> list[str]:
    """The calls that were not refused, or not in one line; nothing may be written into the folder."""
    os.chdir(folder)
    real = {"model": vlmscope.load("toy-blip"), "examples": vlmscope.examples("states", limit=1)}
    found = []
    for call in calls():
        good = {name: real.get(name, value) for name, value in call.good.items()}
        function: Any = vlmscope
        for name in call.name.split("."):
            function = getattr(function, name)
        for argument, number in ((a, n) for a in call.spoilt.split() for n in range(len(WRONG[a]))):
            said = "was taken"
            try:
                function(**good | {argument: WRONG[argument][number]})
            except (VlmscopeError, TypeError) as error:
                said = "" if str(error) and "\n" not in str(error) and len(str(error)) < 400 else str(error)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            written = [path.name for path in Path(folder).iterdir()]
            if said or written:
                found.append(f"{call.name}, {argument} number {number}: {said[:200]} {written}")
    return found


def test_an_argument_of_another_kind(tmp_path):
    """In a process of its own, where the types of tensors are not checked for these tests."""
    code = f"import test_wrong_calls as wrong; print(*wrong.faults({str(tmp_path)!r}), sep='\\n')"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert not done.returncode and not done.stdout.strip(), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("model", value) for value in (None, 3, "", "a\0")),
        *(("data", value) for value in WRONG["data"]),
        *(("corrupt", value) for value in ((), "image", ("image", "image"), ("sound",), (3,))),
        *(("sites", value) for value in (None, "encoder.0.resid@answer", (3,), ("x",))),
        *(("limit", value) for value in ("3", 0, 1.0, True, 10**12)),
        *(("seed", value) for value in (None, -1, "1", 2**32)),
        *(("select", value) for value in (1, None, "true")),
        *(("position", value) for value in (3, "", ())),
        *(("function_examples", value) for value in (None, 1, "5")),
        *(("dtype", value) for value in (None, "float8", torch.float32)),
    ],
)
def test_a_specification_of_other_types(name, value):
    with pytest.raises(VlmscopeError, match=r"^notice: |^bad site "):
        Spec(**{"model": "toy-blip", "data": ("states",)} | {name: value})


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({1: (torch.tensor([-1]), torch.ones(3, 1))}, "counted from 0"),
        ({1: (torch.tensor([2, 2]), torch.ones(3, 2))}, "name each neuron once"),
        ({1: (torch.tensor([2]), torch.full((3, 1), torch.nan))}, "adds what is no number"),
        ({1: (torch.tensor([2]), torch.ones(3, 2))}, "expected a column for each"),
        ({-1: (torch.tensor([2]), torch.ones(3, 1))}, "the layer of an edit is '-1'"),
        ({1: (torch.tensor([], dtype=torch.int64), torch.ones(3, 0))}, "expected a column for each"),
    ],
)
def test_columns_that_no_edit_has(columns, words):
    with pytest.raises(VlmscopeError, match=words):
        vlmscope.WeightEdit(columns, "0" * 64)


def test_an_edit_does_not_reach_beyond_the_model():
    toy = vlmscope.load("toy-llava")
    for columns, words in (
        ({3: (torch.tensor([256]), torch.ones(96, 1))}, "of neurons 0 to 255"),
        ({4: (torch.tensor([0]), torch.ones(96, 1))}, "has no neurons in layer 4"),
        ({3: (torch.tensor([0]), torch.ones(95, 1))}, "columns of 96 numbers"),
    ):
        edit = vlmscope.WeightEdit(columns, toy.fingerprint())
        with pytest.raises(VlmscopeError, match=words), vlmscope.edited(toy, edit):
            pass

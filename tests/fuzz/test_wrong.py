"""What was once answered wrongly, given to the functions that read it; and that the good lines are good."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "wrong")]

import edits  # noqa: E402
import good  # noqa: E402
import sites  # noqa: E402
import toml  # noqa: E402
from frame import Case, answer  # noqa: E402

from vlmscope.checkpoint import load  # noqa: E402
from vlmscope.data import examples  # noqa: E402
from vlmscope.errors import SiteError, StoreError, VlmscopeError  # noqa: E402
from vlmscope.neurons import WeightEdit  # noqa: E402
from vlmscope.notice import Spec  # noqa: E402
from vlmscope.studies.task import check_sites  # noqa: E402

SLOW = ("demo", "heads", "neurons perturb", "neurons edit")
"""Good lines that take longer than a case may, or that find nothing to edit."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return good.folders(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def toy():
    return load("toy-blip"), examples("states", limit=1)


@pytest.mark.parametrize("number", range(len(sites.FIRST)))
def test_an_expression_that_is_no_site(toy, number):
    start = time.monotonic()
    with pytest.raises(SiteError):
        check_sites(*toy, sites.FIRST[number])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("number", range(len(toml.FIRST)))
def test_a_file_that_is_no_specification(number, tmp_path):
    start = time.monotonic()
    (tmp_path / "spec.toml").write_bytes(toml.FIRST[number])
    with pytest.raises(VlmscopeError, match=r"spec\.toml: "):
        Spec.from_toml(tmp_path / "spec.toml")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", [name for name in edits.FORGED if name != "no on"])
def test_a_file_that_is_no_edit(name, folders):
    file = next(folders) / "edit.safetensors"
    file.write_bytes(edits.FORGED[name](edits.parts(file)))
    with pytest.raises(
        StoreError, match=r"edit\.safetensors: (not an edit|cannot be read as an edit|has been changed)"
    ):
        WeightEdit.load(file)


@pytest.mark.parametrize("command", [command for command in good.LINES if command not in SLOW])
def test_the_good_lines_are_good(command, folders, tmp_path):
    """Else what is made of them would be refused for another reason than it should be."""
    assert dict(good.commands()).keys() == good.LINES.keys()
    given = answer(Case(command, good.line(command), next(folders)), tmp_path)
    assert given.status == 0, given.err

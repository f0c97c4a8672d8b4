"""Shares of a run, put together: the table, and the pictures, of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from models import blip, example, picture, sweep_to

import vlmscope
from vlmscope.errors import DataError, StoreError, VlmscopeError
from vlmscope.studies.run_folder import Run
from vlmscope.studies.run_writer import Writer
from vlmscope.studies.screen import screened
from vlmscope.studies.sweep import into_folder, sweep

SITES = ["encoder.*.cross.h*@answer", "encoder.0.resid@*"]


def given(count: int = 5) -> list[vlmscope.Example]:
    """The last of them cannot be run."""
    found = [replace(example(), id=f"e{n}", clean_image=picture(n + 3)) for n in range(count)]
    return [*found[:-1], replace(found[-1], corrupt_image=None)]


def pictures(run: Run) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run.path / "examples").iterdir()}


def equal(run: Run, whole: Run) -> None:
    """The same rows, bit for bit, and the same pictures."""
    table = "attributions" if "method" in whole.spec else "effects"
    for name in (table, "baselines"):
        one, other = getattr(run, name)(), getattr(whole, name)()
        pd.testing.assert_frame_equal(one, other, check_exact=True)
        assert len(one)
    assert pictures(run) == pictures(whole)
    assert run.finished and whole.finished
    assert (run.spec, run.description) == (whole.spec, whole.description)
    counts = [json.loads((each.path / "done.json").read_text()) for each in (run, whole)]
    assert counts[0] == counts[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as a whole, and as three shards, the last one first."""
    folder, model = tmp_path_factory.mktemp("made"), blip()
    for name, shard in (("whole", None), ("3", (3, 3)), ("2", (2, 3)), ("1", (1, 3))):
        sweep_to(folder / name, model, given(), SITES, shard=shard)
    return folder


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> list[Path]:
    """Copies that a test may spoil, in an order of their own."""
    return [shutil.copytree(made / name, tmp_path / name) for name in "213"]


def test_a_shard_is_every_so_many_examples_and_says_so(made: Path) -> None:
    held = [vlmscope.read_run(made / name).baselines()["example"].tolist() for name in "123"]
    assert held == [["e0", "e3"], ["e1", "e4"], ["e2"]]
    spec = vlmscope.read_run(made / "2").spec
    assert (spec["shard"], spec["n_examples"]) == ("2/3", 5)
    with pytest.raises(StoreError, match='shard is "2/3" there, absent here'):
        sweep(blip(), given(), SITES, out=made / "2")


def test_shards_put_together_are_the_whole_run(made: Path, shards: list[Path], tmp_path: Path) -> None:
    run = vlmscope.merge(shards, tmp_path / "merged")
    equal(run, vlmscope.read_run(made / "whole"))
    checks = [check for shard in shards if (check := vlmscope.read_run(shard).check)]
    assert run.check == {"rows": 15, "largest": max(check["largest"] for check in checks)}
    before = {file: file.stat().st_mtime_ns for file in run.path.glob("*/part-*")}
    assert vlmscope.merge(shards, run.path) == run
    assert {file: file.stat().st_mtime_ns for file in run.path.glob("*/part-*")} == before
    # as any run: more can be added
    rows = len(run.effects())
    with pytest.warns(UserWarning, match="left out; 'e4'"):
        table = sweep(blip(), given(), [*SITES, "encoder.1.resid@last"], out=run.path, check=0)
    assert len(table) == rows + 4


def test_a_merge_that_was_stopped_goes_on(
    made: Path, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, count = Writer.copy, []

    def stop(writer: Writer, *piece: Any) -> None:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        honest(writer, *piece)

    monkeypatch.setattr(Writer, "copy", stop)
    with pytest.raises(KeyboardInterrupt):
        vlmscope.merge(shards, tmp_path / "merged")
    begun = vlmscope.read_run(tmp_path / "merged")
    assert len(begun.baselines()) == 2 and not begun.finished
    equal(vlmscope.merge(shards, tmp_path / "merged"), vlmscope.read_run(made / "whole"))


def test_sites_that_were_added_to_the_shards_are_merged(tmp_path: Path) -> None:
    """An example then has several pieces, of which the later ones have no baselines."""
    model, first = blip(), given()[:3]
    for out, shard in (("1", (1, 2)), ("2", (2, 2)), ("whole", None)):
        for sites in (SITES[:1], SITES):
            sweep(model, first, sites, out=tmp_path / out, shard=shard, check=0)
    run = vlmscope.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    equal(run, vlmscope.read_run(tmp_path / "whole"))


def test_means_are_those_of_all_examples(tmp_path: Path) -> None:
    model, first, sites = blip(), given()[:3], "encoder.1.resid@last"
    whole = sweep(model, first, sites, None, patch="mean")
    parts = [sweep(model, first, sites, None, patch="mean", shard=(n, 2)) for n in (1, 2)]
    both = pd.concat(parts).sort_values("example", ignore_index=True)
    pd.testing.assert_frame_equal(both, whole, check_exact=True)


def test_what_is_made_of_the_whole_table_is_made_anew(tmp_path: Path) -> None:
    """Shards of a screen rank by all examples; agreement and what was missed are of the merged table."""
    model, first, estimated = blip(), given()[:4], {"method": "atp", "verify": 2}
    for out, shard in (("1", (1, 2)), ("2", (2, 2)), ("whole", None)):
        place = tmp_path / "s" / out
        into_folder(screened(model, first, SITES, out=place, top=3, check=0, shard=shard), place)
        own = {"out": tmp_path / "a" / out, "shard": shard}
        vlmscope.attribute(model, first, SITES[1], "image", **estimated, **own)
    for kind, beside in (("s", "screen.json"), ("a", "agreement.json")):
        run = vlmscope.merge([tmp_path / kind / "1", tmp_path / kind / "2"], tmp_path / kind / "merged")
        whole = vlmscope.read_run(tmp_path / kind / "whole")
        equal(run, whole)
        wanted = (whole.path / beside).read_text()
        assert (run.path / beside).read_text() == wanted
        assert (tmp_path / kind / "1" / beside).read_text() != wanted


def test_a_shard_that_is_none() -> None:
    model = blip()
    for shard, words in (
        ((5, 4), "the shard is '5'; expected a whole number from 1 to 4"),
        ((0, 4), "the shard is '0'"),
        ((1, 0), "the number of shards is '0'"),
        ("1/4", r"the shard is '1/4'; expected two numbers, such as \(1, 4\)"),
    ):
        with pytest.raises(VlmscopeError, match=words):
            sweep(model, given(), SITES, shard=shard)  # type: ignore[arg-type]
        with pytest.raises(VlmscopeError, match=words):
            vlmscope.attribute(
                model,
                given(),
                "decoder.*.attn@readout",
                shard=shard,  # type: ignore[arg-type]
            )
    with pytest.raises(DataError, match="5 examples do not make 6 shards; take at most 5"):
        sweep(model, given(), SITES, shard=(1, 6))


def spoilt(folder: Path, **changes: Any) -> None:
    """Write other things into a shard's specification."""
    content = json.loads((folder / "run.json").read_text())
    content["spec"] |= changes
    (folder / "run.json").write_text(json.dumps(content))


def lose_a_part(shards: list[Path]) -> None:
    for name in ("baselines", "effects"):
        (shards[1] / name / "part-000000.parquet").unlink()


def move_a_part(shards: list[Path]) -> None:
    for name in ("baselines", "effects"):
        shutil.copy(shards[0] / name / "part-000000.parquet", shards[2] / name / "part-000009.parquet")


VERSIONS = {"versions": {"torch": "1"}}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda shards: shards.pop(), "1 of 3 shards are missing: 3/3; run them .--shard 3/3"),
        (lambda shards: shards.__delitem__(slice(2)), "2 of 3 shards are missing: 1/3, 2/3; run them"),
        (lambda shards: shards.append(shards[0]), r"2: is shard 2/3, as .*2 is; name each once"),
        (
            lambda shards: spoilt(shards[1], **VERSIONS),
            r"1: a shard of another run than .*: versions\.\w+ is",
        ),
        (lambda shards: spoilt(shards[1], seed=7), "seed is 0 there, 7 here. Name those of one run"),
        (lambda shards: spoilt(shards[1], n_examples=4), "n_examples is 5 there, 4 here"),
        (
            lambda shards: spoilt(shards[1], shard="1/4"),
            "is shard 1/4, and .* is 2/3; name the shards of one",
        ),
        (lambda shards: spoilt(shards[1], shard="4/3"), "run.json: is damaged .shard '4/3'"),
        (
            lambda shards: spoilt(shards[1], shard=7),
            "run.json: is damaged .spec.shard is '7'; expected a text",
        ),
        (lose_a_part, "1: shard 1/3 lacks 1 of its 2 examples .the first is number 0 of the data.; run its"),
        (move_a_part, "3: holds example number 1, which is not of shard 3/3"),
        (lambda shards: shards.clear(), "there are no folders to merge"),
    ],
)
def test_folders_that_are_not_the_shards_of_one_run(
    shards: list[Path], tmp_path: Path, spoil: Callable[[list[Path]], object], words: str
) -> None:
    spoil(shards)
    with pytest.raises(VlmscopeError, match=words):
        vlmscope.merge(shards, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_whole_run_is_no_shard_and_no_place_for_others(made: Path, shards: list[Path]) -> None:
    with pytest.raises(StoreError, match="whole: is no shard, but a whole run; name folders that were"):
        vlmscope.merge([*shards, made / "whole"], made / "merged")
    with pytest.raises(StoreError, match='1: holds another run: shard is "1/3" there, absent here'):
        vlmscope.merge(shards, shards[1])

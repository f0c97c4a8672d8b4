"""Examples that stay on disk until they are asked for: a run of them is that of the same examples as a list.

A few lines stand for the library `datasets`, so that this is tested where it is not installed, too;
`test_hub.py` has the library itself.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import blip, picture
from pretend_workers import Pretended
from test_shards import equal

import vlmscope
from vlmscope.data import hub
from vlmscope.data.example import fingerprint
from vlmscope.data.lazy import LOOKED_AT
from vlmscope.data.rows import WINDOW, Parquet, Rows
from vlmscope.errors import DataError, ExampleError, StoreError
from vlmscope.studies.sweep import swept

PROMPT = "is this red or blue?"
SITES = ["encoder.0.resid@answer"]
MANY = 2 * LOOKED_AT
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Image:
    """The feature of that name."""


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is used of `datasets` for folders of Parquet files."""

    def features(schema: pa.Schema) -> dict[str, Any]:
        return {field.name: Image() if field.type == PICTURE else field.type for field in schema}

    def builder(path: str, config: str | None) -> Any:
        paths = [str(file) for file in sorted(Path(path).glob("*.parquet"))]
        return SimpleNamespace(
            config=SimpleNamespace(data_files={"train": paths}), info=SimpleNamespace(features=None)
        )

    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict", "ClassLabel")
    cache = {"HF_DATASETS_CACHE": tmp_path / "cache", "HF_CACHE_HOME": tmp_path / "cache"}
    nothing = {"disable_progress_bars": lambda: None, "are_progress_bars_disabled": lambda: True}
    found = SimpleNamespace(
        Image=Image,
        Features=SimpleNamespace(from_arrow_schema=features),
        config=SimpleNamespace(HF_HUB_OFFLINE=False, **cache),
        get_dataset_split_names=lambda path, config: ["train"],
        load_dataset_builder=builder,
        **{name: type(name, (), {}) for name in kinds},
        **nothing,
    )
    monkeypatch.setitem(sys.modules, "datasets", found)


def png(number: int) -> dict[str, Any]:
    file = io.BytesIO()
    picture(number, 24).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def saved(folder: Path, many: int = MANY, files: int = 2, **columns: list[Any]) -> str:
    """A folder of Parquet files, of several groups of rows each; its name as data."""
    folder.mkdir()
    table = pa.table(
        {
            "clean_image": pa.array([png(n) for n in range(many)], PICTURE),
            "corrupt_image": pa.array([png(n + 5) for n in range(many)], PICTURE),
            "unused": pa.array([png(0)] * many, PICTURE),
            "clean_prompt": [PROMPT] * many,
            "answer": ["red"] * many,
            "foil": ["blue"] * many,
        }
    )
    for name, cells in columns.items():
        place = table.column_names.index(name) if name in table.column_names else len(table.column_names)
        kind = PICTURE if name.endswith("image") else None
        table = table.remove_column(place) if place < table.num_columns else table
        table = table.add_column(place, name, pa.array(cells, kind))
    each = -(-many // files)
    for number in range(files):
        pq.write_table(table.slice(number * each, each), folder / f"{number}.parquet", row_group_size=5)
    return f"hf://{folder}"


def kept(tmp_path: Path) -> int:
    """Pictures that have become files."""
    return len([*(tmp_path / "cache").rglob("*")]) - 1 if (tmp_path / "cache").exists() else 0


# --- rows --------------------------------------------------------------------------------------------------


def test_an_example_is_made_when_it_is_asked_for(tmp_path: Path) -> None:
    found = vlmscope.examples(saved(tmp_path / "set", id=[f"e{n}" for n in range(MANY)]))
    assert isinstance(found, Rows) and len(found) == MANY
    assert found.ids == [f"e{n}" for n in range(MANY)] and [*found.roles] == ["answer", "foil"]
    assert kept(tmp_path) == 0, "no picture is read before"
    order = [*range(MANY)]
    Random(0).shuffle(order)
    for number in [*order, -1]:
        one = found[number]
        assert one.id == f"e{number % MANY}"
        assert Path(one.clean_image).read_bytes() == png(number % MANY)["bytes"]  # type: ignore[arg-type]
        assert Path(one.corrupt_image).read_bytes() == png(number % MANY + 5)["bytes"]  # type: ignore[arg-type]
    assert [one.id for one in found[1:7:3]] == ["e1", "e4"] and len([*found]) == MANY
    with pytest.raises(IndexError):
        found[MANY]


@pytest.mark.parametrize("limit", [1, 5, 17, MANY, MANY + 1, None])
def test_a_limit_takes_the_first(limit: int | None, tmp_path: Path) -> None:
    found = vlmscope.examples(saved(tmp_path / "set"), limit=limit)
    assert len(found) == min(limit or MANY, MANY) == len([one.id for one in found])


def test_no_more_files_are_opened_than_a_limit_needs_and_no_more_rows_held_than_a_window(
    tmp_path: Path,
) -> None:
    saved(tmp_path / "set", files=4)
    opened: list[str] = []

    def note(path: str) -> str:
        opened.append(Path(path).name)
        return path

    paths = [str(file) for file in sorted((tmp_path / "set").iterdir())]
    table = Parquet(paths, note, 9)
    assert opened == ["0.parquet", "1.parquet"] and len(table) == 9
    table = Parquet(paths, note)
    assert [table.row(number)["answer"] for number in range(MANY)] == ["red"] * MANY
    pq.write_table(pa.table({"n": range(10 * WINDOW)}), tmp_path / "one.parquet")
    large = Parquet([str(tmp_path / "one.parquet")], str)
    for number in (0, 7 * WINDOW + 3, 2, 10 * WINDOW - 1):
        assert large.row(number) == {"n": number} and len(large._batch) <= WINDOW


def test_words_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 31: correct_answer is empty"):
        vlmscope.examples(saved(tmp_path / "a", answer=["red"] * (MANY - 1) + [None]))
    ids = [str(n) for n in range(MANY)]
    ids[3] = ids[31] = "x"
    with pytest.raises(DataError, match="row 31: the id 'x' is row 3's"):
        vlmscope.examples(saved(tmp_path / "b", id=ids))
    assert kept(tmp_path) == 0


def test_a_picture_that_is_none_is_one_row(tmp_path: Path) -> None:
    images = [png(n) for n in range(MANY)]
    images[1] = None  # type: ignore[call-overload]
    images[2] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    found = vlmscope.examples(saved(tmp_path / "set", clean_image=images))
    with pytest.raises(ExampleError, match=r"set, row 1: clean_image_path is empty"):
        found[1]
    with pytest.warns(UserWarning, match="2 of 4 examples were left out; '1': .*row 1: clean_image_path"):
        table = vlmscope.sweep(blip(), vlmscope.examples(f"hf://{tmp_path}/set", limit=4), SITES)
    assert table["example"].unique().tolist() == ["0", "3"]


# --- runs --------------------------------------------------------------------------------------------------


def test_a_run_of_rows_is_that_of_a_list_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with the fingerprints of a list: so a folder of either is gone on with by the other."""
    rows = vlmscope.examples(saved(tmp_path / "set"), limit=6)
    model, whole = blip(), [*rows]
    vlmscope.sweep(model, whole, SITES, out=tmp_path / "list")
    vlmscope.sweep(model, rows, SITES, out=tmp_path / "rows")
    one, other = (vlmscope.read_run(tmp_path / name) for name in ("list", "rows"))
    equal(one, type(other)(other.path, {**other.spec, "data_hash": one.spec["data_hash"]}, other.description))
    assert one.digests() == other.digests() == {example.id: fingerprint([example]) for example in whole}
    assert one.check == other.check

    def never(*_: Any) -> Any:
        raise AssertionError("an example is computed again")

    monkeypatch.setattr("vlmscope.studies.rows.patch_example", never)
    vlmscope.sweep(model, rows, SITES, out=tmp_path / "list")
    vlmscope.sweep(model, whole, SITES, out=tmp_path / "rows")


def test_other_examples_are_refused(tmp_path: Path) -> None:
    """Also by several processes; whatever the hash of all that the specification has."""
    model = blip()
    name = saved(tmp_path / "set")
    vlmscope.sweep(model, vlmscope.examples(name), SITES, out=tmp_path / "run", check=0)
    before = json.loads((tmp_path / "run" / "run.json").read_text())
    images = [png(n) for n in range(MANY)]
    images[MANY - 3] = png(0)
    more = saved(tmp_path / "more", MANY + 1, clean_image=[*images, png(1)])
    with pytest.raises(StoreError, match=f"holds other examples: number {MANY - 3} is not the same"):
        vlmscope.sweep(model, vlmscope.examples(more), SITES, out=tmp_path / "run")
    crew = Pretended(Random(0)).team(2, Loaded(more))
    options = {"sites": SITES, "corrupt": "image", "data": "examples", "check": 0}
    with pytest.raises(StoreError, match=f"holds other examples: number {MANY - 3} is not the same"):
        crew.fill(tmp_path / "run", swept, options)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == before
    longer = saved(tmp_path / "longer", MANY + 1)
    crew = Pretended(Random(0)).team(2, Loaded(longer))
    run, asked = crew.fill(tmp_path / "run", swept, options)
    assert asked == len(run.baselines()) == MANY + 1


@dataclass
class Loaded:
    """What workers are given."""

    data: str

    def load(self) -> Any:
        return blip()

    def examples(self) -> Any:
        return vlmscope.examples(self.data)


def test_shards_are_of_the_same_set(tmp_path: Path) -> None:
    """By the words of all, the sizes of all pictures and what the first of them hold."""
    name, model = saved(tmp_path / "set", 6), blip()
    vlmscope.sweep(model, vlmscope.examples(name), SITES, out=tmp_path / "whole", check=0)
    for which in (1, 2):
        own = {"out": tmp_path / str(which), "shard": (which, 2), "check": 0}
        vlmscope.sweep(model, vlmscope.examples(name), SITES, **own)
    equal(
        vlmscope.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged"),
        vlmscope.read_run(tmp_path / "whole"),
    )
    images = [png(n) for n in range(6)]
    images[0] = png(9)
    for what, columns in {"pictures": {"clean_image": images}, "words": {"foil": ["green"] * 6}}.items():
        other = vlmscope.examples(saved(tmp_path / what, 6, **columns))  # type: ignore[arg-type]
        shutil.rmtree(tmp_path / "2")
        vlmscope.sweep(model, other, SITES, out=tmp_path / "2", shard=(2, 2), check=0)
        with pytest.raises(StoreError, match="a shard of another run .*data_hash"):
            vlmscope.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "no")


def test_means_and_others_are_of_rows(tmp_path: Path) -> None:
    images = [png(n) for n in range(5)]
    images[1] = None  # type: ignore[call-overload]
    rows = vlmscope.examples(saved(tmp_path / "set", 5, clean_image=images))
    whole = [rows[number] for number in (0, 2, 3, 4)]
    for patch in ("mean", "resample"):
        with pytest.warns(UserWarning, match="1 of 5 examples were left out"):
            found = vlmscope.sweep(blip(), rows, SITES, None, patch=patch, check=2)  # type: ignore[arg-type]
        want = vlmscope.sweep(blip(), whole, SITES, None, patch=patch, check=2)  # type: ignore[arg-type]
        if patch == "mean":
            assert np.array_equal(found["value"], want["value"])
        assert found["example"].tolist() == want["example"].tolist()


def test_a_hub_file_is_read_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Files:
        def open(self, path: str, mode: str) -> tuple[str, str]:
            return path, mode

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Files)
    assert hub._file("hf://datasets/a/b@0/c.parquet") == ("hf://datasets/a/b@0/c.parquet", "rb")
    assert hub._file("/a/c.parquet") == "/a/c.parquet"

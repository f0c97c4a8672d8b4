"""Folders of results that somebody else has made: one clear line, and nothing outside of them is read."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vlmscope
from vlmscope import stored
from vlmscope.errors import StoreError
from vlmscope.report import page, write_report
from vlmscope.stored import Table
from vlmscope.studies import circuits, run_folder
from vlmscope.studies.run_folder import read_run

sys.path[:0] = [str(Path(__file__).parent / "fuzz"), str(Path(__file__).parent / "fuzz" / "wrong")]

from folders import list_anew  # noqa: E402


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good / "run", tmp_path / "run"))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- nothing outside of a folder ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_picture_elsewhere_is_not_read(run, tmp_path, way):
    private = tmp_path / "private"
    (run / "examples").rename(private)
    if way == "folder":
        (run / "examples").symlink_to(private)
    else:
        shutil.copytree(private, run / "examples")
        (run / "examples" / "0000-clean.png").unlink()
        (run / "examples" / "0000-clean.png").symlink_to(private / "0000-clean.png")
    with pytest.raises(StoreError, match="a link, and none is followed there"):
        write_report([run], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "file", ["heads/heads.json", "heads/maps.parquet", "heads/functions.csv", "heads/patches"]
)
def test_no_link_in_a_folder_is_followed(good, tmp_path, file):
    shutil.copytree(good / "heads", tmp_path / "heads")
    (tmp_path / file).rename(tmp_path / "private")
    (tmp_path / file).symlink_to(tmp_path / "private")
    with pytest.raises(StoreError, match="a link, and none is followed"):
        write_report([tmp_path / "heads"], tmp_path / "r.html")


def test_runs_of_a_notice_folder_are_in_it(good, tmp_path):
    folder = Path(shutil.copytree(good / "notice", tmp_path / "notice"))
    (folder / "runs" / "states-text").rename(tmp_path / "private")
    (folder / "runs" / "states-text").symlink_to(tmp_path / "private")
    for read in (lambda: write_report([folder], tmp_path / "r.html"), lambda: circuits.find([folder])):
        with pytest.raises(StoreError, match="a link, and none is followed"):
            read()
    with pytest.raises(StoreError, match="a link, and none is followed"):
        vlmscope.open(folder)
    shutil.copytree(tmp_path / "private", tmp_path / "out" / "states-text")
    table = pd.read_csv(folder / "selection.csv").replace("states", "../../out/states")
    table.to_csv(folder / "selection.csv", index=False)
    list_anew(folder / "selection.csv")
    with pytest.raises(StoreError, match=r"no run '\.\./\.\./out/states-image' in it"):
        vlmscope.open(folder)


def pipe(file: Path) -> None:
    os.mkfifo(file)


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(5 * 2**30)


@pytest.mark.parametrize("name", ["run.json", "baselines/part-000000.parquet", "examples/0000.json"])
@pytest.mark.parametrize(
    "make",
    [pipe, sparse, Path.mkdir, lambda file: file.symlink_to("/dev/zero"), lambda f: f.symlink_to(f.name)],
)
def test_what_is_no_file_is_not_waited_for(run, tmp_path, name, make: Callable[[Path], None]):
    (run / name).unlink()
    make(run / name)
    with pytest.raises(StoreError, match=r"device or a pipe|of which at most|a folder|a link|is damaged"):
        write_report([run], tmp_path / "r.html")
    if not name.startswith("examples"):
        for read in (lambda: circuits.find([run]), lambda: vlmscope.open(run).baselines()):
            with pytest.raises(StoreError):
                read()


def test_an_example_without_the_text_that_was_corrupted(good, tmp_path):
    folder = shutil.copytree(good / "notice" / "faithfulness" / "states-text", tmp_path / "f")
    file = folder / "examples" / "0000.json"
    words = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({key: text for key, text in words.items() if key != "corrupt_prompt"}))
    with pytest.raises(StoreError, match="no corrupt_prompt"):
        write_report([folder], tmp_path / "r.html")


# --- each example once -----------------------------------------------------------------------------------


def test_a_part_that_was_copied_does_not_count_twice(run, tmp_path):
    for name in ("effects", "baselines"):
        part = run / name / "part-000000.parquet"
        shutil.copy(part, part.with_name("part-000001.parquet"))
    for read in (read_run(run).effects, read_run(run).baselines, lambda: circuits.find([run])):
        with pytest.raises(StoreError, match=r"holds examples that another part holds.*if it is a copy"):
            read()


def test_effects_of_other_examples_than_the_baselines_are_refused(run):
    part = run / "baselines" / "part-000000.parquet"
    table = pq.read_table(part)
    names = pa.array(["another", *table["example"].to_pylist()[1:]])
    pq.write_table(table.set_column(0, table.schema.field(0), names), part)
    with pytest.raises(StoreError, match="its rows are of another example than its baselines"):
        read_run(run).effects()


def test_a_part_that_comes_while_a_run_is_read(tmp_path, monkeypatch):
    """As when somebody looks at a run that goes on: what is there when it is asked for, and no more."""
    model, folder = vlmscope.load("toy-blip", device="cpu"), tmp_path / "run"
    for limit in (1, 2):
        given = vlmscope.examples("states", limit=limit)
        vlmscope.sweep(model, given, "encoder.0.cross.h0@answer", out=folder)
    (folder / "done.json").unlink()
    parts = [folder / name / "part-000001.parquet" for name in ("effects", "baselines")]
    contents = {part: part.read_bytes() for part in parts}
    for part in parts:
        part.unlink()
    read = run_folder.files.read

    def late(file, *given, **more):
        found = read(file, *given, **more)
        if file.suffix == ".parquet":
            for part, content in contents.items():
                part.write_bytes(content)
        return found

    monkeypatch.setattr(run_folder.files, "read", late)
    assert len(read_run(folder).effects()) == 1
    assert len(read_run(folder).effects()) == 2


def test_effects_of_an_example_that_was_left_out_are_refused(run):
    part = run / "baselines" / "part-000000.parquet"
    table = pq.read_table(part)
    number = table.schema.get_field_index("excluded")
    left = pa.array([True, *[False] * (table.num_rows - 1)])
    pq.write_table(table.set_column(number, table.schema.field(number), left), part)
    with pytest.raises(StoreError, match="its rows are of another example than its baselines"):
        read_run(run).effects()


def test_a_folder_whose_name_is_not_utf_8_is_good(run, tmp_path):
    folder = Path(str(tmp_path / "run-\udc80"))
    run.rename(folder)
    assert len(read_run(folder).effects()) == read_run(folder).patches() == 894
    assert "run-\\udc80" in write_report([folder], tmp_path / "r.html").read_text("utf-8")
    with pytest.warns(UserWarning, match="6 examples"):
        found = circuits.find([folder])
    found.save(tmp_path / "c")
    assert circuits.read(tmp_path / "c").heads["run"].unique().tolist() == ["run-\\udc80"]


def test_a_kind_of_folder_is_named_once():
    """In `stored.formats`, or where all of it is written and read; a second copy could differ."""
    sources = [file.read_text("utf-8") for file in Path(vlmscope.__file__).parent.rglob("*.py")]
    names = Counter(name for text in sources for name in re.findall(r'"(vlmscope-[a-z]+-[0-9]+)"', text))
    assert "vlmscope-steer-1" in names and set(names.values()) == {1}, names


@pytest.mark.parametrize(
    "kind",
    "run circuits heads tracing notice lens attribution knockout steer probe".split()
    + "find describe perturb edit edges explanation".split(),
)
def test_a_good_folder_of_each_kind_is_read_and_reported(good, tmp_path, kind):
    assert vlmscope.open(good / kind)
    assert write_report([good / kind], tmp_path / "r.html").is_file()


# --- tables and manifests ------------------------------------------------------------------------------

COLUMNS = "name:text tower:tower layer:grid position:place n:int share:share? size:float any:number flag:bool"
ROW = {
    "name": "a",
    "tower": "encoder",
    "layer": 0,
    "position": 7,
    "n": 1,
    "share": 0.5,
    "size": 1.5,
    "any": 2.5,
    "flag": True,
}


def read_back(file: Path, frame: pd.DataFrame, key: str = "") -> pd.DataFrame:
    if file.suffix == ".csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_parquet(file, index=False)
    return stored.table(file, Table(COLUMNS, key), "write it anew")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_good_table_comes_back(tmp_path, name):
    frame = pd.DataFrame([ROW, ROW | {"name": "NA", "share": None, "any": float("inf")}])
    pd.testing.assert_frame_equal(read_back(tmp_path / name, frame), frame, check_dtype=False)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tower": "<b>"}, "column tower: '<b>' is none of"),
        ({"layer": 1000}, "column layer: 1000 to 1000 is not from 0 to 999"),
        ({"layer": -1}, "column layer: -1 to -1"),
        ({"position": 2**24}, "column position: 16777216 to 16777216 is not from 0 to 16777215"),
        ({"n": "x"}, "is no number|column n: not of type int"),
        ({"n": 1.5}, "is no number|column n: not of type int"),
        ({"n": None}, "is no number|column n"),
        ({"share": 1.5}, "column share"),
        ({"size": float("inf")}, "column size: not finite"),
        ({"size": None}, "column size: (lacks values|not of type)"),
        ({"flag": "yes"}, "damaged"),
        ({"name": "x" * 70_000}, "column name: not text, or too long"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path, name, change, message):
    with pytest.raises(StoreError, match=message) as caught:
        read_back(tmp_path / name, pd.DataFrame([ROW | change]))
    assert str(caught.value).endswith("; write it anew")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_other_columns_and_rows_are_refused(tmp_path, name):
    frame = pd.DataFrame([ROW])
    for odd in (frame.assign(more=1), frame.drop(columns="n"), frame.rename(columns={"n": "m"})):
        with pytest.raises(StoreError, match="other columns than name tower layer"):
            read_back(tmp_path / name, odd)
    with pytest.raises(StoreError, match="no rows"):
        read_back(tmp_path / name, frame.head(0))
    with pytest.raises(StoreError, match="two rows of the same name"):
        read_back(tmp_path / name, pd.concat([frame, frame]), key="name")


def test_what_pandas_notes_beside_a_table_turns_no_number_into_text(tmp_path):
    frame = pd.DataFrame([ROW])
    noted = pa.Table.from_pandas(frame, preserve_index=False).schema.metadata
    odd = pa.Table.from_pandas(frame.assign(name=1), preserve_index=False).replace_schema_metadata(noted)
    pq.write_table(odd, tmp_path / "t.parquet")
    with pytest.raises(StoreError, match="column name: not text"):
        stored.table(tmp_path / "t.parquet", Table(COLUMNS), "write it anew")


@pytest.mark.parametrize("cell", ["0x10", "1_0", "٣", " 1", "--1", "9" * 5000, "1e5", ""])
def test_what_python_calls_a_number_is_none_of_a_table(tmp_path, cell):
    with pytest.raises(StoreError, match="is no number"):
        read_back(tmp_path / "t.csv", pd.DataFrame([ROW | {"n": cell}]))


def test_a_small_file_does_not_fill_the_memory(run):
    part = run / "effects" / "part-000000.parquet"
    schema = pq.read_schema(part)
    many = pa.chunked_array([pa.nulls(2**22, type=schema[0].type)] * 16)
    table = pa.table(dict.fromkeys(schema.names, many)).replace_schema_metadata(schema.metadata)
    pq.write_table(table, part, compression="zstd")
    assert part.stat().st_size < 2**22
    with pytest.raises(ValueError, match="67,108,864 rows of"):
        stored.parquet(part.read_bytes())
    with pytest.raises(StoreError, match="this part is damaged"):
        read_run(run).effects()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is damaged .not JSON."),
        ('{"n": 1, "n": 2, "words": []}', "is damaged .not JSON."),
        ('{"n": ' + "9" * 5000 + "}", "is damaged .not JSON."),
        ('{"n": ' + "9" * 300 + ', "words": []}', "n is '9+ … 9+'; expected a whole number"),
        ('{"n": true, "words": []}', "n is 'True'; expected a whole number"),
        ('{"n": 1, "words": [1]}', r"words\[0\] is '1'; expected a text"),
        ('{"n": 1, "words": {}}', "words is '{}'; expected a list"),
        ('{"n": 1}', "no words"),
        ('{"n": 1, "words": [], "x": "<b>"}', "x is '<b>'; expected a number"),
    ],
)
def test_a_manifest_of_another_shape(tmp_path, text, message):
    (tmp_path / "about.json").write_text(text)
    shape = {"n": int, "words": [str], "x?": (float, None)}
    with pytest.raises(StoreError, match=message) as caught:
        stored.manifest(tmp_path / "about.json", shape, "write it anew")
    assert str(caught.value).endswith("; write it anew")


@pytest.mark.parametrize("field", ["examples", "draws", "scale", "left_out_of_each_repeat"])
def test_a_text_where_a_number_is_is_refused(good, tmp_path, field):
    folder = Path(shutil.copytree(good / "tracing", tmp_path / "t"))
    about = json.loads((folder / "tracing.json").read_text())
    inner = about["noise"] if field in ("draws", "scale") else about
    inner[field] = ["<script>"] if field.startswith("left") else "<script>"
    (folder / "tracing.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match=rf"{field}.* is '<script>'; expected a"):
        write_report([folder], tmp_path / "r.html")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("find/captions.csv", lambda content: content[: content.index(b"\n", len(content) // 2) + 1]),
        ("find/neurons.parquet", lambda content: content + b"PAR1"),
        ("describe/pictures/0000.png", None),
        ("lens/pictures/0000.png", None),
        ("lens/lens.parquet", lambda content: content + b"PAR1"),
        ("notice/selection.csv", lambda content: content.replace(b",1,", b",2,")),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused(good, tmp_path, name, harm):
    """One that is whole in itself: fewer rows, another number, another picture."""
    folder = Path(shutil.copytree(good / Path(name).parts[0], tmp_path / Path(name).parts[0]))
    file = tmp_path / name
    vlmscope.open(folder)
    if harm is None:
        Image.new("RGB", (8, 8)).save(file)
    else:
        file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(StoreError, match=rf"{file.name}: is damaged .*(SHA-256|magic|footer)"):
        vlmscope.open(folder)


def test_a_file_that_no_manifest_lists_is_refused(good, tmp_path):
    folder = Path(shutil.copytree(good / "find", tmp_path / "find"))
    about = json.loads((folder / "neurons.json").read_text())
    del about["files"]["captions.csv"]
    (folder / "neurons.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match=r"captions\.csv: is damaged .*SHA-256"):
        vlmscope.open(folder)
    del about["files"]
    (folder / "neurons.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match=r"neurons\.json: is damaged \(no files\)"):
        vlmscope.open(folder)


# --- where a report goes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("added", ["r-figures/mine.png", "r-figures/inner/x", "r.html"])
def test_what_is_no_report_is_not_replaced(good, tmp_path, added):
    (tmp_path / added).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / added).write_text("<title>vlmscope report</title>")
    before = everything(tmp_path)
    with pytest.raises(
        StoreError, match=r"(is not replaced|no result of this command); choose another --out"
    ):
        write_report([good / "circuits"], tmp_path / "r.html")
    assert everything(tmp_path) == before


def test_a_report_replaces_its_own_figures_alone(good, tmp_path):
    write_report([good / "run"], tmp_path / "r.html")
    first = everything(tmp_path)
    write_report([good / "circuits"], tmp_path / "r.html")
    second = everything(tmp_path)
    assert not [name for name in second if "run0" in name] and len(second) < len(first)
    (tmp_path / "r-figures" / "mine.txt").write_text("mine")
    with pytest.raises(
        StoreError, match=r"mine\.txt: is no figure of a report, so r-figures is not replaced"
    ):
        write_report([good / "circuits"], tmp_path / "r.html")
    assert (tmp_path / "r-figures" / "mine.txt").read_text() == "mine"


def test_a_damaged_folder_or_a_full_disk_leaves_the_last_report(good, run, tmp_path, monkeypatch):
    write_report([run], tmp_path / "r.html")
    before = everything(tmp_path)
    (run / "effects" / "part-000000.parquet").write_bytes(b"PAR1")
    before[str(run / "effects" / "part-000000.parquet")] = b"PAR1"
    with pytest.raises(StoreError, match="this part is damaged"):
        write_report([run], tmp_path / "r.html")
    assert everything(tmp_path) == before

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="the disk is full"):
        write_report([good / "circuits"], tmp_path / "r.html")
    monkeypatch.undo()
    assert everything(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r-figures", "r.html", "run"]


def test_places_where_no_report_can_be(good, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere")
    for out, message in (
        (".", r"ends in \.html"),
        (tmp_path / "file" / "r.html", "Not a directory"),
        (tmp_path / "folder.html", "is there, and no result of this command"),
        (tmp_path / "link.html", "is there, and no result of this command"),
    ):
        with pytest.raises(StoreError, match=message):
            write_report([good / "circuits"], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html", "link.html"]
    assert write_report([good / "circuits"], tmp_path / "new" / "folder" / "r.html").is_file()
    (tmp_path / "new").chmod(0o500)
    if os.geteuid():  # root may write there
        with pytest.raises(StoreError, match="cannot be written"):
            write_report([good / "circuits"], tmp_path / "new" / "r.html")
    assert page.MANIFEST in {path.name for path in (tmp_path / "new" / "folder" / "r-figures").iterdir()}


def test_pictures_that_are_none(run, tmp_path):
    picture = run / "examples" / "0000-clean.png"
    for harm in (lambda: Image.new("1", (9000, 9000)).save(picture), lambda: picture.write_bytes(b"GIF89a")):
        harm()
        with pytest.raises(StoreError, match=r"0000-clean.png: is damaged .*delete that file"):
            write_report([run], tmp_path / "r.html")


def test_a_part_that_cannot_be_read_is_not_called_damaged(run):
    part = run / "effects" / "part-000000.parquet"
    part.rename(run / "kept")
    part.symlink_to(run / "kept")
    with pytest.raises(StoreError, match="a link, and none is followed there") as caught:
        read_run(run).effects()
    assert "elete" not in str(caught.value) and "damaged" not in str(caught.value)


def test_a_full_memory_is_not_called_damage(run, monkeypatch):
    def full(source: pq.ParquetFile) -> pa.Table:
        raise pa.ArrowMemoryError("malloc of size 99 failed")

    monkeypatch.setattr(pq.ParquetFile, "read", full)
    with pytest.raises(MemoryError, match="malloc of size"):
        read_run(run).effects()


def test_a_part_that_is_gone_from_a_finished_run_is_missed(run):
    (run / "baselines" / "part-000000.parquet").unlink()
    for read in (read_run(run).baselines, read_run(run).effects):
        with pytest.raises(
            StoreError, match=r"holds other \w+ than the \d+ that were written; delete .*done.json"
        ):
            read()

"""Data sets by way of `datasets`: from objects, from folders, by `hf://`; what is wrong is one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pretend_hub
import pytest
from models import picture
from PIL import Image
from test_cli import refused, run  # noqa: F401 - a fixture

import vlmscope
from vlmscope.data import hub
from vlmscope.data.example import fingerprint
from vlmscope.data.images import open_image
from vlmscope.data.rows import Rows
from vlmscope.errors import DataError, VlmscopeError
from vlmscope.notice.spec import Spec, name_of

PROMPT = "is this red or blue?"


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The library, with a cache of its own."""
    import datasets as found

    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def rows(many: int = 3, **more) -> dict:
    """Columns that need no mapping."""
    return {
        "clean_image": [picture(n, 24) for n in range(many)],
        "clean_prompt": [PROMPT] * many,
        "answer": ["red"] * many,
        "foil": ["blue"] * many,
        **more,
    }


def made(datasets, **more):
    return datasets.Dataset.from_dict(rows(**more)).cast_column("clean_image", datasets.Image())


# -- without the library -------------------------------------------------------------------------


def test_the_extra_is_named_where_it_is_not_installed(run, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(sys.modules, "datasets", None)
    command = ("sweep", "--model", "toy-blip", "--sites", "encoder.*.resid@answer", "--corrupt", "image")
    refused(run(*command, "--data", "hf://a/b", "--out", tmp_path / "run"), "pip install 'vlmscope[hub]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("hf://owner/name", (False, "owner/name", None)),
        ("hf://owner/name/config:train", (False, "owner/name/config", "train")),
        ("hf://squad:test", (False, "squad", "test")),
        ("hf:///no/where:train", (True, "/no/where", "train")),
        ("hf://./here", (True, "./here", None)),
    ],
)
def test_names(name, place):
    folder, path, split = hub._place(name)
    assert (folder is not None, path, split) == place


def test_a_specification_of_notice(tmp_path):
    spec = Spec("toy-blip", ("hf://a/b:train",), columns="answer=label")
    spec.save(tmp_path / "notice.toml")
    assert Spec.from_toml(tmp_path / "notice.toml") == spec and name_of(spec.data[0]) == "b-train"
    with pytest.raises(VlmscopeError, match="columns are of hf:// sets, and none is named"):
        Spec("toy-blip", ("states",), columns="answer=label")


def test_columns_by_name_or_mapped():
    def own(there, columns=None):
        return hub._own_names("x", there, hub._mapping(columns))

    names = ["clean_image", "clean_prompt", "answer", "foil", "mask", "mask_foil", "image_2", "noun"]
    assert own(names) == {
        "clean_image_path": "clean_image",
        "clean_prompt": "clean_prompt",
        "correct_answer": "answer",
        "incorrect_answer": "foil",
        "mask_path_object": "mask",
        "mask_path_foil": "mask_foil",
        "image_path_2": "image_2",
        "noun": "noun",
    }
    found = own(["image", "question", "label"], "clean_image=image, clean_prompt=question,answer=label")
    assert found == {"clean_image_path": "image", "clean_prompt": "question", "correct_answer": "label"}
    assert own([*hub.NAMES.values(), "clean_prompt"])["correct_answer"] == "correct_answer"
    with pytest.raises(
        DataError,
        match="x: no column clean_prompt, answer; it has 'clean_image', 'label'; map them: --columns "
        "clean_prompt=COLUMN,answer=COLUMN",
    ):
        own(["clean_image", "label"])
    with pytest.raises(DataError, match="x: no column 'lable'; it has 'clean_image', 'label'; did you mean"):
        own(["clean_image", "label"], "answer=lable")
    with pytest.raises(DataError, match="'answer' maps nothing; expected NAME=COLUMN"):
        own(["clean_image", "label"], "answer")


def test_pictures_outside_of_a_set_of_the_hub_are_not_read(monkeypatch, tmp_path):
    secret = tmp_path / "secret.png"
    picture(0, 24).save(secret)
    config = SimpleNamespace(HF_DATASETS_CACHE=tmp_path / "cache", HF_CACHE_HOME=tmp_path / "home")
    foreign, own = (hub._Pictures(SimpleNamespace(config=config), trusted) for trusted in (False, True))
    at = {"bytes": None, "path": str(secret)}
    assert own.file(at, "clean_image_path") == str(secret)
    for path in (str(secret), str(tmp_path / "cache" / ".." / "secret.png"), "https://example.org/a.png"):
        with pytest.raises(ValueError, match="outside of the data set"):
            foreign.file({"bytes": None, "path": path}, "clean_image_path")
    with pytest.raises(ValueError, match="no picture"):
        own.file("a text", "clean_image_path")

    # what a stream of the hub names of itself is read from there
    class Files:
        def read_bytes(self, path):
            return {"hf://datasets/a/b@0/c.png": secret.read_bytes()}[path]

    monkeypatch.setattr("huggingface_hub.HfFileSystem", Files)
    kept = foreign.file({"bytes": None, "path": "hf://datasets/a/b@0/c.png"}, "clean_image_path")
    assert Path(kept).read_bytes() == secret.read_bytes() and Path(kept).is_relative_to(tmp_path / "cache")


# -- with it -------------------------------------------------------------------------------------


def test_an_object_is_as_its_rows(datasets, tmp_path):
    found = vlmscope.examples(made(datasets, noun=["cat", "dog", "owl"], box=[[0.0, 1.0, 8.0, 9.5]] * 3))
    assert [one.id for one in found] == ["0", "1", "2"]
    one = found[1]
    assert (one.clean_prompt, one.answer, one.foil, one.groups["noun"]) == (PROMPT, "red", "blue", "dog")
    assert one.masks == {"object": (0.0, 1.0, 8.0, 9.5)}
    assert (np.asarray(open_image(one.clean_image)) == np.asarray(picture(1, 24))).all()
    # the same again, elsewhere: hashes are of the content
    again = made(datasets, noun=["x", "y", "z"], box=[[0.0, 1.0, 8.0, 9.5]] * 3)
    datasets.config.HF_DATASETS_CACHE = tmp_path / "other"
    assert fingerprint(vlmscope.examples(again)) == fingerprint(found)
    assert len(list((tmp_path / "other" / "vlmscope").iterdir())) == 3


def test_labels_of_classes_are_their_names(datasets):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["red", "blue"]),
        }
    )
    given = {"image": [picture(0, 24)] * 2, "question": [PROMPT] * 2, "label": [1, 0]}
    given = datasets.Dataset.from_dict(given, features=features)
    columns = {"clean_image": "image", "clean_prompt": "question", "answer": "label"}
    assert [(one.answer, one.foil) for one in vlmscope.examples(given, columns=columns)] == [
        ("blue", ""),
        ("red", ""),
    ]


def test_folders_and_splits(datasets, tmp_path):
    both = datasets.DatasetDict({"train": made(datasets), "test": made(datasets).select([0])})
    both.save_to_disk(tmp_path / "saved")
    both["train"].save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    both["train"].to_parquet(tmp_path / "files" / "train-00000.parquet")
    both["test"].to_parquet(tmp_path / "files" / "test-00000.parquet")
    want = fingerprint(vlmscope.examples(both["train"]))
    for place in ("saved:train", "one", "one", "files:train"):
        assert fingerprint(vlmscope.examples(f"hf://{tmp_path / place}")) == want, place
    assert len(vlmscope.examples(f"hf://{tmp_path}/files:train", limit=2)) == 2
    assert len(vlmscope.examples(f"hf://{tmp_path}/files:test", limit=20)) == 1
    for place, says in (
        ("saved", "has the splits train, test; name one"),
        ("saved:tests", "no split 'tests'; it has train, test; did you mean 'test'"),
        ("files", "has the splits test, train|has the splits train, test"),
        ("none:train", "no folder"),
    ):
        with pytest.raises(DataError, match=says):
            vlmscope.examples(f"hf://{tmp_path / place}")
    with pytest.raises(DataError, match="has the splits train, test"):
        vlmscope.examples(both)


def test_a_limit_reads_no_more_rows(datasets):
    seen = []

    def million():
        for n in range(1_000_000):
            seen.append(n)
            yield {"clean_image": picture(n % 7, 8), "clean_prompt": PROMPT, "answer": "red", "foil": "blue"}

    features = made(datasets).features
    found = vlmscope.examples(datasets.IterableDataset.from_generator(million, features=features), limit=20)
    assert len(found) == 20 and len(seen) <= 21
    seen[:] = []
    assert len(vlmscope.examples(datasets.IterableDataset.from_generator(million), limit=20)) == 20
    assert len(seen) <= 42, "the first row is looked at for its columns"


def test_rows_that_make_no_example_are_named(datasets):
    lacks = made(datasets, answer=["red", None, "blue"])
    with pytest.raises(DataError, match="row 1: correct_answer is empty"):
        vlmscope.examples(lacks)
    with pytest.raises(DataError, match="row 2: the id 'a' is row 0's"):
        vlmscope.examples(made(datasets, id=["a", "b", "a"]))
    with pytest.raises(DataError, match="clean_image_path is 'a text', no picture"):
        vlmscope.examples(datasets.Dataset.from_dict(rows() | {"clean_image": ["a text"] * 3}))
    with pytest.raises(DataError, match="has no rows"):
        vlmscope.examples(made(datasets).select([]))


def test_a_broken_picture_is_one_example_that_is_left_out(datasets):
    broken = {"bytes": b"no picture", "path": None}
    images = [broken, {"bytes": hub_png(0), "path": None}]
    given = datasets.Dataset.from_dict(rows(2) | {"clean_image": images, "corrupt_image": images[::-1]})
    for name in ("clean_image", "corrupt_image"):
        given = given.cast_column(name, datasets.Image())
    with pytest.warns(UserWarning, match="left out; '0': .*not an image"):
        vlmscope.sweep(vlmscope.load("toy-blip"), [*vlmscope.examples(given), good()], SITES)


SITES = "encoder.0.resid@last"


def hub_png(n: int) -> bytes:
    file = io.BytesIO()
    picture(n, 24).save(file, format="PNG")
    return file.getvalue()


def good():
    return vlmscope.Example("good", picture(0, 24), PROMPT, "red", "blue", corrupt_image=picture(1, 24))


def test_a_hub_that_asks_for_a_token_or_is_not_there(datasets, monkeypatch):
    def gated(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it."
        )

    monkeypatch.setattr(datasets, "get_dataset_split_names", gated)
    with pytest.raises(
        DataError, match=r"cannot read hf://a/b: .*gated.*; the hub asks for a token: .*login"
    ):
        vlmscope.examples("hf://a/b")
    monkeypatch.undo()
    with pytest.raises(
        DataError, match="cannot read hf://nobody/nothing:train: .*; it needs the network or a copy"
    ):
        vlmscope.examples("hf://nobody/nothing:train")
    with pytest.raises(DataError, match="names no data set"):
        vlmscope.examples("hf://a/b/c/d")


def test_a_hub_is_read_by_the_blocks_that_are_needed(datasets, tmp_path):
    """The library's own client, and a server on this machine in the hub's place."""
    many = 40
    given = made(datasets, many=many)
    for number in range(2):
        given.select(range(20 * number, 20 * number + 20)).to_parquet(tmp_path / f"train-{number}.parquet")
    text = (
        "import json, sys, vlmscope\n"
        "from vlmscope.data.example import fingerprint\n"
        "found = vlmscope.examples('hf://owner/set:train', limit=7)\n"
        "try: vlmscope.examples('hf://owner/none', limit=7)\n"
        "except vlmscope.VlmscopeError as error: said = str(error)\n"
        "print(json.dumps([type(found).__name__, len(found), fingerprint(found), said]))\n"
        "if sys.argv[1:]:\n"
        "    print(json.dumps(fingerprint(vlmscope.examples('hf://owner/set:train'))))"
    )
    with pretend_hub.served() as there:
        files = {f"data/train-0000{n}-of-00002.parquet": tmp_path / f"train-{n}.parquet" for n in range(2)}
        content = {name: file.read_bytes() for name, file in files.items()}
        there.repositories["owner/set"] = pretend_hub.Repository(False, content)
        own = {"HF_ENDPOINT": there.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
        options = {"env": {**os.environ, **own}, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", text], **options)
        assert done.returncode == 0, done.stderr
        kind, count, digest, said = json.loads(done.stdout)
        assert (kind, count) == ("Rows", 7) and digest == fingerprint(vlmscope.examples(given, limit=7))
        assert said.startswith("cannot read hf://owner/none: ") and there.ranges
        assert not any("train-00001" in one for one in there.asked), "the second file is not opened"
        done = subprocess.run([sys.executable, "-c", text, "whole"], **options)
        whole = json.loads(done.stdout.splitlines()[-1])
        assert whole == fingerprint(vlmscope.examples(given))
        assert any("train-00001" in one for one in there.asked)


def test_what_the_library_reads_stays_where_it_is(datasets, tmp_path):
    """A data set on disk, in memory, in another order, and as Parquet files: the same examples, not one of
    whose pictures is a file before it is asked for."""
    given = made(datasets, many=40, answer=["red", "green"] * 20)
    given.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    given.to_parquet(tmp_path / "files" / "train.parquet", batch_size=7)
    found = [vlmscope.examples(one) for one in (given, f"hf://{tmp_path}/saved", f"hf://{tmp_path}/files")]
    assert all(isinstance(one, Rows) and len(one) == 40 for one in found)
    assert not (tmp_path / "cache" / "vlmscope").exists()
    assert len({fingerprint(one) for one in found}) == 1
    order = given.select([*range(39, -1, -3)])
    assert [one.answer for one in vlmscope.examples(order)] == [order[n]["answer"] for n in range(len(order))]
    assert found[0].hash == found[1].hash != vlmscope.examples(order).hash
    with_format = given.with_transform(lambda rows: rows | {"answer": ["blue?"] * len(rows["answer"])})
    assert vlmscope.examples(with_format)[0].answer == "blue?"


def test_a_command_and_the_column_option(datasets, run, tmp_path, capsys):  # noqa: F811
    other = made(datasets).rename_columns({"answer": "label", "clean_prompt": "question"})
    other = other.add_column("corrupt_image", [{"bytes": hub_png(5), "path": None}] * 3)
    other.cast_column("corrupt_image", datasets.Image()).save_to_disk(tmp_path / "saved")
    name = f"hf://{tmp_path}/saved"
    capsys.readouterr()  # the library's own bar
    command = ("sweep", "--model", "toy-blip", "--sites", SITES, "--corrupt", "image", "--limit", "2")
    refused(run(*command, "--data", name, "--out", tmp_path / "a"), "no column clean_prompt, answer; it has")
    columns = ("--columns", "answer=label,clean_prompt=question")
    status, said, err = run(*command, "--data", name, *columns, "--out", tmp_path / "a")
    assert status == 0 and "2 patches of 2 examples" in said, err
    assert json.loads((tmp_path / "a" / "run.json").read_text())["spec"]["data"] == name
    refused(run(*command, "--data", "states", *columns, "--out", tmp_path / "b"), "--columns is of hf://")


def test_the_library_may_be_given_anywhere(datasets):
    table = vlmscope.baselines(vlmscope.load("toy-blip"), made(datasets), "noise")
    assert table["example"].tolist() == ["0", "1", "2"]


def test_pictures_of_any_kind(datasets):
    grey = Image.new("L", (8, 8), 7)
    found = vlmscope.examples(datasets.Dataset.from_dict(rows() | {"clean_image": [grey] * 3}))
    assert open_image(found[0].clean_image).getpixel((0, 0)) == (7, 7, 7)

"""What somebody else has made: names, texts, pictures and tables that no data should have."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from families import FAMILIES
from models import blip, llava, picture
from PIL import Image
from test_published_data import plant_folder, plant_svo, svo_rows

from vlmscope import files
from vlmscope.cli.main import _row as example_of
from vlmscope.data.example import Box, Example, fingerprint
from vlmscope.data.images import small_png
from vlmscope.data.published import build
from vlmscope.data.published.objects import coco, pope
from vlmscope.data.table import read_csv, read_table, write_csv
from vlmscope.errors import DataError, ExampleError, StoreError, VlmscopeError, plain
from vlmscope.notice import Spec
from vlmscope.runs.model import Model
from vlmscope.studies.heads import covered

HEADER = "clean_image_path,clean_prompt,correct_answer,incorrect_answer"
ROW = "a.png,red or blue?,red,blue"


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Writes a CSV file of a header and rows."""

    def write(header: str = HEADER, *rows: str) -> Path:
        path = tmp_path / "my.csv"
        path.write_text("\n".join([header, *(rows or [ROW])]), "utf-8")
        return path

    return write


# Names


def test_nothing_is_downloaded_through_a_link(tmp_path: Path) -> None:
    plant_svo(tmp_path / "root", svo_rows(3), images=False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match="images: a link, through which nothing is downloaded; make it a folder"
    ):
        build("svo-probes", tmp_path / "root", download=True)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("x")
    for name in ("my.csv", ".my.csv.tmp"):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "here-images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    one = Example("1", tmp_path / "a.png", "red or blue?", "red", "blue")
    with pytest.raises(StoreError, match=r"my.csv: is there, with other content"):
        write_csv(tmp_path / "my.csv", [one])
    assert target.read_text() == "x"
    with pytest.raises(DataError, match="here-images: a link, through which nothing is written"):
        write_csv(tmp_path / "here.csv", [replace(one, clean_image=Image.new("RGB", (2, 2)))])
    assert not list((tmp_path / "elsewhere").iterdir())


def test_no_pipe_is_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="pipe: "):
        files.write(tmp_path / "pipe", b"x")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["...csv", "x" * 240 + ".csv", "-x.csv", ".csv"])
def test_a_data_file_is_called_what_a_folder_can_be(name: str) -> None:
    with pytest.raises(VlmscopeError, match=r"would be called .* in the results; rename the file"):
        Spec("toy-blip", (f"sets/{name}",))


def test_pictures_of_other_files_have_plain_names(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    asked = {"image": "a/..", "text": "red?", "label": "yes"}
    file.write_text(json.dumps(asked))
    with pytest.raises(DataError, match=r"not a file of POPE .*'a/\.\.' is no plain name of a file"):
        pope(file, tmp_path)
    file.write_text(
        json.dumps({"images": [{"id": 1, "file_name": "/x\0"}], "categories": [], "annotations": []})
    )
    with pytest.raises(DataError, match="is no plain name of a file"):
        coco(file, tmp_path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    plant_folder(tmp_path, each=2)
    (tmp_path / "cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes((tmp_path / "cat" / "0.jpg").read_bytes())
    with pytest.raises(
        DataError, match=r"caf\\udce9\.jpg: a name that is not UTF-8, which no table can hold"
    ):
        build("folder", tmp_path)
    one = Example("1", tmp_path / os.fsdecode(b"\xe9.png"), "red or blue?", "red", "blue")
    with pytest.raises(DataError, match=r"'1': clean_image_path '.*\\udce9\.png' is not UTF-8; rename it"):
        write_csv(tmp_path / "my.csv", [one])
    assert not (tmp_path / "my.csv").exists()


# Devices, pipes, and what cannot be read


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Whoever opens it waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_nobody_waits_for_a_pipe(pipe: Path) -> None:
    example = Example("1", pipe, "red or blue?", "red", "blue")
    assert fingerprint([example]) == fingerprint([replace(example, clean_image=Path("/dev/zero"))])
    for read in (coco, pope):
        with pytest.raises(DataError, match="pipe: a device or a pipe; expected "):
            read(pipe, pipe.parent)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("svo-probes", "svo_probes.csv"),
        ("clevr", "clevr.csv"),
        ("coco-qa", "color.csv"),
        ("folder", "prompt.txt"),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "endless", "loop"])
def test_no_published_set_waits(tmp_path: Path, name: str, file: str, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / file)
    else:
        (tmp_path / file).symlink_to("/dev/zero" if kind == "endless" else file)
    with pytest.raises(DataError, match=r"a device or a pipe|cannot be read \(Too many levels"):
        build(name, tmp_path)


@pytest.mark.parametrize("name", ["faces", "folder", "mit-states", "clevr"])
def test_a_folder_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    for root in (tmp_path / ("x" * 300), tmp_path / "\0", tmp_path / "loop"):
        (tmp_path / "loop").is_symlink() or (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(DataError, match="cannot be read|no such folder"):
            build(name, root)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    plant_folder(tmp_path, each=2)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); check permissions"):
        build("folder", tmp_path)


# Tables


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{HEADER}\n{ROW}\n".encode("utf-16-le"), "line 1: not text .* UTF-16"),
        (f"{HEADER}\n{ROW}\0\n".encode(), r"line 2: not text \(a byte of zeros"),
        (f"{HEADER},k\x1bd\n{ROW},x\n".encode(), r"a column 'k\\x1bd', with characters that are not seen"),
        (f"\ufeff\ufeff{HEADER}\n{ROW}\n".encode(), r"a column '\\ufeffclean_image_path'"),
        ((HEADER + ",c" * 100_000 + f"\n{ROW}\n").encode(), "100,004 columns; expected at most 1,000"),
        (f"{HEADER}\n{ROW}\x07\n".encode(), r"line 2: incorrect_answer .* control character '\\x07' at 4"),
        (f"{HEADER},id\n{ROW},a\x1bb\n".encode(), "line 2: id .* has the control character"),
        (
            f"{HEADER},box,mask_path\n{ROW},1 1 2 2,m.png\n".encode(),
            "mask_path_object and box_object are both",
        ),
    ],
)
def test_refuses_tables_that_are_none(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "my.csv").write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_csv(tmp_path / "my.csv")


def test_any_number_of_pictures(table: Callable[..., Path]) -> None:
    names = ",".join(f"image_path_{n}" for n in range(12, 1, -1))
    [one] = read_csv(table(f"{HEADER},{names}", f"{ROW},{','.join(f'{n}.png' for n in range(12, 1, -1))}"))
    assert [path.name for path in one.more_images] == [f"{n}.png" for n in range(2, 13)]
    assert not one.groups


@pytest.mark.parametrize(
    "name", ["image_path", "image_path_1", "image_path_02", "image_path_x", "mask_path_"]
)
def test_no_column_of_pictures_becomes_a_group(table: Callable[..., Path], name: str) -> None:
    with pytest.raises(DataError, match=f"no picture or object is called '{name}'; further pictures are"):
        read_csv(table(f"{HEADER},{name}", f"{ROW},b.png"))


def test_a_published_table_is_read_as_it_is_or_not(table: Callable[..., Path]) -> None:
    """A comma too many would move what stands behind it, a column that is there twice hides the first."""
    with pytest.raises(DataError, match="line 2: 5 cells where the header has 4"):
        read_table(table(HEADER, "a.png,red, or blue?,red,blue"), ["clean_prompt"])
    with pytest.raises(DataError, match="two columns 'clean_prompt'"):
        read_table(table(f"{HEADER},clean_prompt", f"{ROW},x"), ["clean_prompt"])


def test_cells_that_a_spreadsheet_computes_read_back(tmp_path: Path) -> None:
    cells = ["=1+1", "+1", "-1", "@x", "'=1", "''"]
    picture = tmp_path / "a.png"
    some = [
        Example(f"{n}{cell}", picture, f"{cell} or b?", cell, "b", groups={"kind": cell})
        for n, cell in enumerate(cells)
    ]
    write_csv(tmp_path / "my.csv", some)
    back = read_csv(tmp_path / "my.csv")
    assert [(e.id, e.answer, e.clean_prompt, dict(e.groups)) for e in back] == [
        (e.id, e.answer, e.clean_prompt, dict(e.groups)) for e in some
    ]


def test_a_question_of_a_megabyte(tmp_path: Path) -> None:
    plant_folder(tmp_path, each=1)
    for text in ("word " * 200_000 + "{x} {y}", "\x1b[2J {x} {y}"):
        (tmp_path / "prompt.txt").write_text(text)
        with pytest.raises(DataError, match=r"prompt\.txt: .* expected a question of at most 1,000"):
            build("folder", tmp_path)


def test_what_is_not_seen_is_an_escape() -> None:
    """Private and unassigned characters are no printable ones."""
    assert plain("a\ue000\U0008db53\ufdd0 b") == "a\\ue000\\U0008db53\\ufdd0 b"


# Prompts and answers


@pytest.fixture(scope="module", params=["llava", "blip-vqa", *FAMILIES])
def family(request: pytest.FixtureRequest) -> Model:
    return {"llava": llava, "blip-vqa": blip, **FAMILIES}[request.param]()  # type: ignore[no-any-return]


def test_no_prompt_or_answer_holds_a_token_of_its_own(family: Model) -> None:
    """Typed in a prompt, a placeholder would make another number of pictures, an end token an end."""
    question = "is this circle red or blue ?"
    mark = str(getattr(family.processor, "image_token", None))
    tokens = {*family.processor.tokenizer.all_special_tokens}
    assert tokens
    good = Example("1", picture(1), question, "red", "blue")
    family.prepare(good)
    for token in sorted(tokens):
        prompt = f"is this {token} circle red or blue ?"
        wrong = "holds '.*', which is no word but a token of its own; take it out"
        if token == mark:
            prompt, wrong = f"{token} {token} {prompt}", "placeholder"
        with pytest.raises(ExampleError, match=wrong):
            family.inputs(picture(1), prompt)
        with pytest.raises(ExampleError, match="the (answer|foil) holds '.*', which is no word"):
            family.prepare(replace(good, answer=f"red {token}"))


def test_no_picture_and_a_placeholder() -> None:
    with pytest.raises(ExampleError, match="1 placeholders '<image>' and there are no images"):
        llava().inputs(None, "<image> red or blue ?")


def test_what_stands_for_a_picture_is_no_word_of_a_whole_text_either() -> None:
    """Gemma 3's processor puts other tokens in the placeholder's place."""
    model = FAMILIES["gemma3"]()
    inner = model.processor.tokenizer.convert_ids_to_tokens(model.hf.config.image_token_id)
    mark = model.processor.image_token
    assert inner != mark
    with pytest.raises(ExampleError, match="is no word but a token of its own"):
        model.inputs(picture(1), f"{mark} red {inner} or blue ?")


@pytest.mark.parametrize("text", ["red\x00", "\x1b[31mred", "red\udcff", "\x9b", "red\x07 or blue"])
def test_control_characters_are_no_words(text: str) -> None:
    model = blip()
    with pytest.raises(
        ExampleError, match="the prompt .* has the control character '.*' at [0-9]; take it out"
    ):
        model.inputs(picture(1), text)
    with pytest.raises(ExampleError, match="the foil .* has the control character"):
        model.prepare(Example("1", picture(1), "red or blue ?", "red", text))


@pytest.mark.parametrize("text", [" ", "\t\n", "\u00a0\u3000", "\u202e\u202d", "\u200b", "\u0301\u0302"])
def test_nothing_to_read(text: str) -> None:
    with pytest.raises(ExampleError, match="the prompt '.*' has nothing to read in it; write words"):
        blip().inputs(picture(1), text)
    with pytest.raises(ExampleError, match="the answer .* (is empty|has nothing to read in it)"):
        blip().prepare(Example("1", picture(1), "red or blue ?", text, "blue"))


def test_more_than_a_model_reads() -> None:
    """What two answers share is fed, and a whole answer is: both have to fit into the decoder."""
    shared = "red " * 600
    model = blip()
    with pytest.raises(ExampleError, match="what answer and foil share, .* has 601 tokens, the model takes"):
        model.prepare(Example("1", picture(1), "red or blue ?", f"{shared}red", f"{shared}blue"))
    with pytest.raises(ExampleError, match="the model takes at most"):
        model.prepare(Example("1", picture(1), "red or blue ?", shared, ""), whole=True)
    for text in ("red " * 30_000, "x" * 10**6):
        with pytest.raises(
            ExampleError, match=r"the prompt .{1,70} has 1.0,000|1,000,000 characters; expected"
        ):
            model.inputs(picture(1), text)


# What people open


def test_no_spreadsheet_computes_what_is_written_for_people(tmp_path: Path) -> None:
    words = ["=1+1", "+a", "-a", "@x", "\tx", "\rx", "'=x", "''+x", "-2", "+1.5", "'-2", "red", "", "'", "-"]
    table = pd.DataFrame({"word": words, "=score": range(len(words)), "mixed": [1, None, "=x"] * 5})
    files.save(tmp_path, "about.json", {"format": "words"}, {"words.csv": table})
    with (tmp_path / "words.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    for cell in (*header, *(cell for row in rows for cell in row)):
        assert cell[:1] not in tuple("=+-@\t\r") or float(cell) is not None, cell
    assert [row[0] for row in rows if row[0].startswith("'=")] == ["'=1+1"]
    assert [row[2] for row in rows[:3]] == ["1", "", "'=x"]
    assert [files.from_text(row[0]) for row in rows] == words
    assert files.from_text(header[1]) == "=score"


def test_a_file_that_only_looks_like_one() -> None:
    with pytest.raises(DataError, match=r"/proc/self/mem: cannot be read \(Input/output error\)"):
        files.read("/proc/self/mem", "a table")
    with pytest.raises(DataError, match="has more than the 0 MiB that are read"):
        files.read("/proc/self/maps", "a table", largest=10)


@pytest.mark.parametrize(
    "box",
    [
        (1e300, 1e300, 2e300, 2e300),
        (500, 500, 900, 900),
        (math.nan, 0, 9, 9),
        (0.1, 0.1, 0.2, 0.2),
        (9, 9, 1, 1),
    ],
)
def test_a_box_without_a_pixel(box: Box) -> None:
    one = Example("1", Image.new("RGB", (40, 30)), "red or blue?", "red", "blue", masks={"object": box})
    with pytest.raises(ExampleError, match="the mask of 'object' is empty; draw the object white"):
        covered(one, "object", (4, 4))


def test_a_box_that_reaches_beyond_its_picture() -> None:
    one = Example(
        "1", Image.new("RGB", (40, 40)), "red?", "red", "blue", masks={"object": (20, 0, 1e300, 1e9)}
    )
    assert covered(one, "object", (2, 2)).tolist() == [[False, True], [False, True]]


def test_an_id_comes_before_a_number(table: Callable[..., Path]) -> None:
    """And ids that differ in capitals alone are two examples."""
    path = table(f"id,{HEADER}", f"1,{ROW}", f"0,{ROW}", f"a,{ROW}", f"A,{ROW}")
    assert [example_of(f"{path}:{one}").id for one in ("0", "1", "2", "a", "A")] == ["0", "1", "a", "a", "A"]


def test_no_stored_picture_waits_for_a_pipe(pipe: Path) -> None:
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(ExampleError, match="a device or a pipe; expected an image"):
            small_png(path)

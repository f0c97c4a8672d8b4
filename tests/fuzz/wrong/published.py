"""Published data sets that are broken: tables, labels, images and names in them."""

from __future__ import annotations

import csv
import io
import os
import random as chance
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random

from frame import Case, answer
from PIL import Image
from sets import copied, folders

sys.path.append(str(Path(__file__).parents[2]))

from test_published_data import svo_rows

from vlmscope.data.published.svo_probes import COLUMNS as SVO

OUT = "built.csv"


def paint(path: Path) -> None:
    """A tiny image whose content is told by its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = chance.Random(path.name + path.parent.name).randrange(1 << 24)
    Image.new("RGB", (8, 8), (color >> 16, color >> 8 & 255, color & 255)).save(path)


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def svo_probes(root: Path) -> None:
    some = svo_rows(9)
    write_table(root / "svo_probes.csv", [SVO, *([row[name] for name in SVO] for row in some)])
    for row in some:
        for which in ("pos", "neg"):
            paint(root / "images" / f"{row[f'{which}_image_id']}.png")


def mit_states(root: Path) -> None:
    for name in (
        "ripe apple",
        "unripe apple",
        "sliced apple",
        "diced apple",
        "peeled apple",
        "wrinkled apple",
    ):
        for n in range(2):
            paint(root / name / f"{n}.png")


def faces(root: Path) -> None:
    for emotion in ("angry", "happy", "sad"):
        for n in range(3):
            paint(root / "images" / "train" / emotion / f"{n}.png")


def coco_qa(root: Path) -> None:
    (root / "train2017").mkdir()
    for kind, answers in (("color", ("red", "gray", "blue")), ("count", ("two", "four", "three"))):
        rows: list[Sequence[object]] = [["", f"train_image_id_{kind}", f"question_{kind}", f"answer_{kind}"]]
        for n, said in enumerate(answers):
            image = 100 * (kind == "count") + n
            rows.append(
                [n, image, "what is the color of the dog" if kind == "color" else "how many dogs", said]
            )
            paint(root / "train2017" / f"{image:012d}.png")
        write_table(root / f"coco_{kind}.csv", rows)


def clevr(root: Path) -> None:
    rows: list[Sequence[object]] = [["", "Image_IDs", "Questions_Answers"]]
    one, other = "large red cube", "small gray ball"
    for number in range(4):
        left = number % 2 == 0
        asked = [
            {"question": f"Is the {one} {relation} the {other}?", "answer": int(holds)}
            for relation, holds in (
                ("left of", left),
                ("right of", not left),
                ("behind", left),
                ("in front of", not left),
            )
        ]
        name = f"CLEVR_val_{number:06d}"
        rows.append([number, name, repr(asked)])
        paint(root / "images" / "val" / f"{name}.png")
    write_table(root / "clevr.csv", rows)


def folder(root: Path) -> None:
    for label in ("cat", "cow", "owl"):
        for n in range(3):
            paint(root / label / f"{n}.png")
    (root / "prompt.txt").write_text("is this a {x} or a {y}?")


SETS: dict[str, Callable[[Path], None]] = {
    "svo-probes": svo_probes,
    "mit-states": mit_states,
    "faces": faces,
    "coco-qa": coco_qa,
    "clevr": clevr,
    "folder": folder,
}


@cache
def planted(name: str) -> Path:
    """A good tree, which is there until the process ends."""
    root = Path(tempfile.mkdtemp(prefix="vlmscope-fuzz-")) / "root"
    root.mkdir()
    SETS[name](root)
    __import__("atexit").register(shutil.rmtree, root.parent, ignore_errors=True)
    return root


def argv_of(name: str) -> list[str]:
    return ["data", name, "--root", "root", "--out", OUT]


def tables_of(root: Path) -> list[Path]:
    return sorted(root.glob("*.csv"))


def images_of(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))


# Each makes a good tree wrong, and says what it did; it returns None where it does not apply.

Edit = Callable[[Random, Path], str | None]


def nothing(random: Random, root: Path) -> str:
    shutil.rmtree(root)
    how = random.choice(["away", "a file", "a pipe", "empty", "a loop", "a name of 300", "hidden"])
    if how == "a file":
        root.write_text("x")
    elif how == "a pipe":
        os.mkfifo(root)
    elif how == "empty":
        root.mkdir()
    elif how == "a loop":
        root.symlink_to(root.name)
    elif how == "hidden":
        (root / ".git").mkdir(parents=True)
    return f"the root is {how}"


def table_is_none(random: Random, root: Path) -> str | None:
    if not (tables := tables_of(root)):
        return None
    table = random.choice(tables)
    content = table.read_bytes()
    table.unlink()
    how = random.choice(
        ["pipe", "folder", "loop", "device", "empty", "utf-16", "cp1252", "nul", "header", "huge", "quote"]
    )
    bad = {
        "empty": b"",
        "utf-16": content.decode().encode("utf-16"),
        "cp1252": content.replace(b"\n", b"\ncaf\xe9", 1),
        "nul": content.replace(b",", b"\0,", 1),
        "header": content.splitlines()[0],
        "quote": content.replace(b"\n", b'\n"', 1),
    }
    if how == "pipe":
        os.mkfifo(table)
    elif how == "folder":
        table.mkdir()
    elif how == "loop":
        table.symlink_to(table.name)
    elif how == "device":
        table.symlink_to("/dev/zero")
    elif how == "huge":
        with table.open("wb") as file:
            file.truncate(2**33)
    else:
        table.write_bytes(bad[how])
    return f"{table.name}: {how}"


def column_is_wrong(random: Random, root: Path) -> str | None:
    if not (tables := tables_of(root)):
        return None
    table = random.choice(tables)
    head, *rest = table.read_text().split("\n")
    names = head.split(",")
    needed = [n for n, name in enumerate(names) if name]
    at = random.choice(needed)
    how = random.choice(["away", "twice", "other", "100000"])
    if how == "away":
        names[at] = ""
    elif how == "twice":
        names.append(names[at])
    elif how == "other":
        names[at] = "\x1b[31m" + names[at][::-1]
    else:
        names[at] = "x"
        names += [f"x{n}" for n in range(100_000)]
    table.write_text("\n".join([",".join(names), *rest]))
    return f"{table.name}: column {at} {how}"


def too_many_cells(random: Random, root: Path) -> str | None:
    if not (tables := tables_of(root)):
        return None
    table = random.choice(tables)
    lines = table.read_text().split("\n")
    at = random.randrange(1, len(lines) - 1)
    lines[at] += random.choice([",x", ",,,,"])
    table.write_text("\n".join(lines))
    return f"{table.name}: too many cells in line {at + 1}"


def questions_are_none(random: Random, root: Path) -> str | None:
    path = root / "prompt.txt"
    if not path.exists():
        return None
    bad: dict[str, bytes] = {
        "no {x}": b"is this it?",
        "{x} twice": b"{x} {x} {y}",
        "Windows-1252": b"caf\xe9 {x} {y}",
        "UTF-16": "{x} {y}".encode("utf-16"),
        "a NUL": b"\0 {x} {y}",
        "a control character": b"\x1b[2J {x} {y}",
        "1 MB": b"word " * 200_000 + b"{x} {y}",
        "format": b"{x.__class__} {y}",
        "nothing": b"",
    }
    what = random.choice([*bad, "pipe", "folder", "zero"])
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bad[what])
    return f"prompt.txt: {what}"


def images_are_none(random: Random, root: Path) -> str:
    how = random.choice(["empty", "text", "pipe", "device", "loop", "folder", "away"])
    for path in images_of(root):
        path.unlink()
        if how == "pipe":
            os.mkfifo(path)
        elif how == "device":
            path.symlink_to("/dev/zero")
        elif how == "loop":
            path.symlink_to(path.name)
        elif how == "folder":
            path.mkdir()
        elif how != "away":
            path.write_text("no image" if how == "text" else "")
    return f"images: {how}"


def name_is_odd(random: Random, root: Path) -> str:
    image = random.choice(images_of(root))
    # Folders of labels and files of images: what is no text can be in no table.
    path = random.choice([image, image.parent])
    odd = (
        os.fsencode(path.name).replace(b".", b"\xff.") + b""
        if path == image
        else os.fsencode(path.name) + b"\xff"
    )
    path.rename(path.parent / os.fsdecode(odd))
    return f"a name that is not UTF-8: {odd!r}"


WRONG: tuple[Edit, ...] = (
    *(nothing, table_is_none, table_is_none, column_is_wrong, too_many_cells, questions_are_none),
    *(images_are_none, name_is_odd),
)


# These leave a tree as good as it was.


def row_more(random: Random, root: Path) -> str | None:
    """A row that makes no example: an image of an odd name, or no question."""
    path = root / "svo_probes.csv"
    if not path.exists():
        return None
    row = dict(zip(SVO, next(csv.reader(io.StringIO(path.read_text().splitlines()[1]))), strict=True))
    bad = [
        "../../x",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "x" * 300,
        "a\x1b[31mb",
        "\u202e1",
        "con\\..\\x",
        "-1",
        "~",
    ]
    row |= {"id": "999", random.choice(["pos_image_id", "neg_image_id"]): random.choice(bad)}
    out = io.StringIO()
    csv.writer(out).writerow([row[name] for name in SVO])
    path.write_text(path.read_text() + out.getvalue())
    return f"a row more: {row}"


def file_more(random: Random, root: Path) -> str:
    """Files that are none of the set's."""
    name = random.choice(
        ["README.txt", ".hidden.png", "x" * 250, "\x1b[31m.md", "a\u202eb", "-x", "'; ls", "=1+1"]
    )
    (random.choice([root, images_of(root)[0].parent]) / name).write_text("x")
    return f"a file more: {name!r}"


def pipe_more(random: Random, root: Path) -> str:
    os.mkfifo(root / "pipe.txt")
    (root / "loop").symlink_to("loop")
    return "a pipe and a loop more"


def line_ends(random: Random, root: Path) -> str | None:
    for table in tables_of(root):
        ends = random.choice([b"\r\n", b"\r"])
        content = table.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", ends)
        table.write_bytes(random.choice([b"", b"\xef\xbb\xbf"]) + content)
    return "other line ends"


RIGHT: tuple[Edit, ...] = (file_more, pipe_more, line_ends)


def built(folder: Path, name: str) -> Callable[[str], bool]:
    """Whether the table that was built is that of the good tree, byte for byte."""

    def right(out: str) -> bool:
        return (folder / OUT).read_bytes() == table_of(name)

    return right


@cache
def table_of(name: str) -> bytes:
    """What is built from the good tree."""
    with tempfile.TemporaryDirectory() as top:
        folder, scratch = Path(top, "here"), Path(top, "scratch")
        scratch.mkdir()
        copied(planted(name))(folder / "root")
        given = answer(Case("good", argv_of(name), folder), scratch)
        assert given.status == 0, given.err
        return (folder / OUT).read_bytes()


def bytes_changed(random: Random, root: Path) -> str | None:
    """A byte of a table that is another: it may still be a table, of other rows."""
    if not (tables := tables_of(root)):
        return None
    table = random.choice(tables)
    content = bytearray(table.read_bytes())
    at = random.randrange(len(content))
    content[at : at + random.choice((0, 1))] = random.choice(
        [b'"', b"\0", b"\xff", b"\n", b",", b"\x1b", b"'"]
    )
    table.write_bytes(content)
    return f"{table.name}: byte {at} {content[at : at + 1]!r}"


def holds(folder: Path) -> Callable[[str], bool]:
    """Whether what was built is a table whose pictures are there and whose texts are printable."""

    def right(out: str) -> bool:
        with (folder / OUT).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        paths = [row[c] for row in rows for c in ("clean_image_path", "corrupt_image_path") if row[c]]
        texts = [row[c] for row in rows for c in ("id", "clean_prompt", "correct_answer", "incorrect_answer")]
        return (
            bool(rows)
            and all((folder / path).resolve().is_relative_to(folder.resolve()) for path in paths)
            and all(text.isprintable() and text for text in texts)
            and not any("svo-999" in row["id"] for row in rows)
        )

    return right


def cases(random: Random, top: Path) -> Iterator[Case]:
    for here in folders(top):
        name = random.choice(list(SETS))
        copied(planted(name))(here / "root")
        argv = argv_of(name)
        kind = random.random()
        if kind < 0.6:
            what = random.choice(WRONG)(random, here / "root")
            if what:
                yield Case(f"{name}: {what}", argv, here)
        elif kind < 0.8:
            what = random.choice(RIGHT)(random, here / "root")
            if what:
                yield Case(f"{name}: {what}", argv, here, may_change=(OUT,), right=built(here, name))
        elif kind < 0.95:
            what = random.choice((bytes_changed, row_more))(random, here / "root")
            if what:
                yield Case(f"{name}: {what}", argv, here, may_change=(OUT,), right=holds(here))
        else:
            other = random.choice([one for one in SETS if one != name])
            wrong = random.choice([["--limit", "0"], ["--download"], ["--root", "root/prompt.txt"]])
            if name == "svo-probes" and wrong == ["--download"]:
                continue
            argv = [*argv, *wrong] if random.random() < 0.6 else argv_of(other)
            # A folder of labels may be anything.
            right = holds(here) if argv[1] == "folder" else lambda out: False
            yield Case(f"{name}: {argv}", argv, here, may_change=(OUT,), right=right)

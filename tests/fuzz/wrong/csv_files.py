"""Tables of examples: other encodings, quotes and columns, cells that no example can have."""

from __future__ import annotations

import io
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pandas as pd
from frame import Case
from hypothesis import strategies as st
from sets import DATA, EXAMPLE, FIND, HEADS, IMAGE, TEXT, changed, drawn, fill, folders, rows, same, table

GOOD = table(rows())
CONTROL = "\x00 \x01 \x07 \x08 \x1b[2J \x7f \x9b".split()


def _columns(edit: Callable[[list[str]], list[str]]) -> bytes:
    lines = GOOD.decode().splitlines()
    return "\n".join([",".join(edit(lines[0].split(","))), *lines[1:]]).encode()


def _line(number: int, edit: Callable[[str], str]) -> bytes:
    lines = GOOD.decode().splitlines()
    lines[number] = edit(lines[number])
    return "\n".join(lines).encode()


ALWAYS: dict[str, bytes] = {
    "nothing": b"",
    "blanks": b" \n\t\n",
    "a header alone": GOOD.splitlines()[0],
    "a header of bytes alone": b"\xef\xbb\xbf",
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-16 without its mark": GOOD.decode().encode("utf-16-le"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "Windows-1252": changed(clean_prompt="is this café yellow or green?").decode().encode("cp1252"),
    "a NUL": changed(clean_prompt="is this cross \0 yellow or green?"),
    "a NUL in a name": changed(clean_image_path="clean\0-0.png"),
    "a NUL in an id": changed(id="a\0b"),
    "semicolons": GOOD.replace(b",", b";"),
    "tabs": GOOD.replace(b",", b"\t"),
    "deep quotes": _line(1, lambda line: '"' * 20_001 + line),
    "many quotes": _line(1, lambda line: line.replace("is this", '"' * 2000)),
    "a cell of 5 MB": changed(clean_prompt="is this " * 650_000),
    "a cell of 120 kB": changed(clean_prompt="yellow or green " * 8_000),
    "an answer of 100 kB": changed(correct_answer="yellow " * 15_000),
    "an id of 100 kB": changed(id="\x1b" * 100_000),
    "100,000 columns": _columns(lambda names: names + [f"column{n}" for n in range(100_000)]),
    "100,000 columns that are filled": table([dict(rows()[0]) | {f"c{n}": "x" for n in range(100_000)}]),
    "100,000 columns of one name": _columns(lambda names: names + ["x"] * 100_000),
    "a column twice": _columns(lambda names: [*names, "clean_prompt"]),
    "a column twice, with blanks": _columns(lambda names: [*names, " kind "]),
    "mask_path and mask_path_object": changed(mask_path_object="mask-0.png"),
    "mask_path and box_object": changed(box_object="1 1 9 9"),
    "image_path": changed(image_path="clean-1.png"),
    "image_path_0": changed(image_path_0="clean-1.png"),
    "image_path_1": changed(image_path_1="clean-1.png"),
    "image_path_02": changed(image_path_02="clean-1.png"),
    "image_path_two": changed(image_path_two="clean-1.png"),
    "image_path_²": changed(**{"image_path_²": "clean-1.png"}),
    "mask_path_ of nothing": changed(mask_path_="mask-0.png"),
    "box_ of nothing": changed(box_="1 1 9 9"),
    "two ids but for blanks": changed(1, id="  example 0 "),
    "two ids": changed(1, id="example 0"),
    "an id of nothing": changed(id=" "),
    "the answer twice": changed(incorrect_answer="yellow"),
    "the answer twice, in capitals": changed(incorrect_answer=" YELLOW "),
    "a mark of bytes twice": b"\xef\xbb\xbf" * 2 + GOOD,
    "a control character in a column": _columns(lambda names: [*names[:-1], "k\x1b[31mind"]),
    "a column turned around": _columns(lambda names: [*names[:-1], "k\u202eind"]),
    "a lone carriage return in a row": _line(1, lambda line: line.replace("is this", "is\rthis", 1)),
    "too many cells": _line(1, lambda line: line + ",x"),
    "too few cells": _line(1, lambda line: line.rpartition(",")[0]),
    "no pictures": changed(clean_image_path="nowhere.png"),
    "a file of 300 MB": b"",
}


def _put_always(folder: Path, what: str) -> None:
    fill(folder, ALWAYS[what])
    if what == "a file of 300 MB":
        with (folder / DATA).open("wb") as file:
            file.truncate(300 * 2**20)


def _names(random: Random) -> tuple[str, Callable[[Path], object]]:
    """Names of files that no table can be read from."""

    def link(folder: Path) -> None:
        (folder / "a.csv").symlink_to("b.csv")
        (folder / "b.csv").symlink_to("a.csv")

    names: dict[str, Callable[[Path], object]] = {
        "/dev/zero": lambda folder: None,
        "/dev/stdin": lambda folder: None,
        "/proc/self/mem": lambda folder: None,
        "pipe.csv": lambda folder: __import__("os").mkfifo(folder / "pipe.csv"),
        "folder.csv": lambda folder: (folder / "folder.csv").mkdir(),
        "a.csv": link,
        "x" * 300 + ".csv": lambda folder: None,
        "x/" * 2500 + ".csv": lambda folder: None,
        "no\udcff.csv": lambda folder: None,
        "\x1b[31mno.csv": lambda folder: None,
        "no\nsuch.csv": lambda folder: None,
        "": lambda folder: None,
        ".": lambda folder: None,
        "..": lambda folder: None,
        "states ": lambda folder: None,
        "STATES": lambda folder: None,
        "data.csv/x": lambda folder: None,
        "~/data.csv": lambda folder: None,
    }
    name = random.choice(list(names))
    return name, names[name]


def _one(random: Random) -> bytes:
    """The table with one or several bytes that are others, away, or twice."""
    content = bytearray(GOOD)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(content))
        how = random.randrange(4)
        if how == 0:
            content[at] = random.randrange(256)
        elif how == 1:
            del content[at : at + random.choice((1, 5, 50))]
        elif how == 2:
            content[at:at] = random.choice((b'"', b",", b"\n", b"\r", b"\0", b"\xff", b'""', b"\x1b", b"\t"))
        else:
            content[at:at] = content[at : at + random.choice((1, 5, 50))]
    return bytes(content)


def _by_pandas(content: bytes) -> Callable[[Path], object]:
    """The table as pandas reads it, written anew."""

    def put(folder: Path) -> None:
        read = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, encoding="utf-8-sig")
        fill(folder, read.to_csv(index=False).encode())

    return put


def _right(folder: Path, argv: list[str], content: bytes) -> Callable[[str], bool]:
    def right(out: str) -> bool:
        try:
            return same(folder, argv, _by_pandas(content), None)(out)
        except (ValueError, pd.errors.ParserError):
            return False

    return right


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=12)
CELLS = st.tuples(st.sampled_from(["id", "kind", "group", "clean_image_path", "correct_answer"]), TEXTS)


def _equal(random: Random) -> tuple[str, bytes]:
    """The same table in another form."""
    every = [dict(row) for row in rows()]
    names = list(every[0])
    random.shuffle(names)
    how = random.randrange(7)
    forms: list[tuple[str, bytes]] = [
        ("another order of columns", table([{name: row[name] for name in names} for row in every])),
        ("Windows' line ends", table(every, "\r\n")),
        ("the line ends of old Macs", table(every, "\r")),
        ("a mark of bytes", b"\xef\xbb\xbf" + GOOD),
        ("empty lines", GOOD.replace(b"\n", b"\n\n , \n", 1)),
        ("mixed line ends", GOOD.replace(b"\n", b"\r\n", 1)),
        ("blanks around cells", changed(correct_answer=" yellow  ", clean_image_path=" clean-0.png\t")),
    ]
    return forms[how]


def cases(random: Random, top: Path) -> Iterator[Case]:
    place = folders(top)
    always = list(ALWAYS)
    random.shuffle(always)
    commands = (EXAMPLE, EXAMPLE, EXAMPLE, IMAGE, TEXT, FIND)
    for what in always:
        folder = next(place)
        _put_always(folder, what)
        argv = random.choice((EXAMPLE, IMAGE) if "pictures" not in what else (EXAMPLE,))
        if what == "no pictures" or "cell" in what or "answer of" in what:
            argv = EXAMPLE
        yield Case(what, argv, folder)
    while True:
        for column, text in drawn(CELLS, random, 8):
            folder = next(place)
            content = changed(**{column: text})
            fill(folder, content)
            yield Case(f"{column} {text!r}", EXAMPLE, folder, right=_right(folder, EXAMPLE, content))
        for _ in range(12):
            folder = next(place)
            content = _one(random)
            fill(folder, content)
            yield Case("other bytes", EXAMPLE, folder, right=_right(folder, EXAMPLE, content))
        for _ in range(3):
            folder = next(place)
            what, content = _equal(random)
            fill(folder, content)
            argv = random.choice(commands)
            yield Case(what, argv, folder, may_change=("out",), right=same(folder, argv))
        for _ in range(5):
            folder = next(place)
            fill(folder)
            name, put = _names(random)
            put(folder)
            argv = [name if word == DATA else word for word in random.choice((IMAGE, FIND, HEADS))]
            if random.random() < 0.5:
                argv = [*EXAMPLE[:-1], f"{name}:0"]
            yield Case(f"data {name[:40]!r}", argv, folder)
        for character in random.sample(CONTROL, 3):
            folder = next(place)
            column = random.choice(["clean_prompt", "corrupt_prompt", "correct_answer", "incorrect_answer"])
            content = changed(**{column: rows()[0][column][:3] + character + rows()[0][column][3:]})
            fill(folder, content)
            yield Case(f"{character!r} in {column}", EXAMPLE, folder)
        folder = next(place)
        letters = "".join(random.choices(string.printable + "é\u0301\u200d\u202e😀", k=200))
        fill(folder, letters.encode())
        yield Case("letters", EXAMPLE, folder)

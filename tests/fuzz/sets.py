"""Good data, which the categories about data make wrong, and what the commands say of it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
from frame import Answer, Case, answer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from vlmscope.data import examples
from vlmscope.models.families import families

# What each case would import for itself.
families(["BlipForQuestionAnswering", "LlavaForConditionalGeneration"])

Fill = Callable[[Path], object]
"""Fills a folder with what a command is given."""

DATA = "data.csv"
EXAMPLE = f"models toy-blip --example {DATA}:0".split()
SWEEP = f"sweep --model toy-blip --data {DATA} --sites decoder.2.resid@readout --out out".split()
IMAGE, TEXT = [*SWEEP, "--corrupt", "image"], [*SWEEP, "--corrupt", "text"]
HEADS = f"heads --model toy-blip --data {DATA} --sites encoder.1.cross.h2@answer --out out".split()
FIND = f"neurons find --model toy-llava --data {DATA} --top 3 --out out".split()


@lru_cache
def rows() -> tuple[dict[str, str], ...]:
    """Two examples as cells; their pictures are what `fill` writes."""
    found = []
    for n, one in enumerate(examples("states", limit=2)):
        places = {f"{which}_image_path": f"{which}-{n}.png" for which in ("clean", "corrupt")}
        words = {"clean_prompt": one.clean_prompt, "corrupt_prompt": str(one.corrupt_prompt)}
        options = {"correct_answer": one.answer, "incorrect_answer": one.foil}
        groups = {"mask_path": f"mask-{n}.png", "kind": one.groups["kind"]}
        found.append({"id": f"example {n}"} | places | words | options | groups)
    return tuple(found)


@lru_cache
def pictures() -> Mapping[str, bytes]:
    """The pictures of `rows`, as PNG files, by their names."""
    found = {}
    for n, one in enumerate(examples("states", limit=2)):
        for name, picture in (
            ("clean", one.clean_image),
            ("corrupt", one.corrupt_image),
            ("mask", one.masks["object"]),
        ):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")  # type: ignore[union-attr]
            found[f"{name}-{n}.png"] = buffer.getvalue()
    return found


def table(cells: Sequence[Mapping[str, str]], ending: str = "\n") -> bytes:
    """A CSV file of such rows."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(dict.fromkeys(name for row in cells for name in row)), restval="", lineterminator=ending
    )
    writer.writeheader()
    writer.writerows(cells)
    return out.getvalue().encode("utf-8", "surrogateescape")


def fill(folder: Path, content: bytes | None = None) -> None:
    """The pictures and the table, or another content of it."""
    for name, picture in pictures().items():
        (folder / name).write_bytes(picture)
    (folder / DATA).write_bytes(table(rows()) if content is None else content)


def changed(number: int = 0, **cells: str) -> bytes:
    """The table with other cells in one row; what only that row has is a new column."""
    every = [dict(row) for row in rows()]
    every[number] |= cells
    return table(every)


def one(**cells: str) -> bytes:
    """A table of the first row alone, with other cells."""
    return table([dict(rows()[0]) | cells])


def folders(top: Path) -> Iterator[Path]:
    for number in itertools.count():
        folder = top / f"case-{number}" / "here"
        folder.mkdir(parents=True)
        yield folder


def outcome(given: Answer, folder: Path) -> str:
    """All that a command has said and written: standard output, and the tables in `out`."""
    said = [str(given.status), given.out.replace(str(folder), "")]
    for file in sorted((folder / "out").rglob("*")):
        if file.suffix == ".parquet":
            said += [file.name, pd.read_parquet(file).to_csv()]
        elif file.suffix == ".csv":
            said += [file.name, file.read_text("utf-8")]
    return "\n".join(said)


_KNOWN: dict[str, str] = {}


def of_good(argv: Sequence[str], put: Fill, key: str | None = None) -> str:
    """The outcome of a command in a folder of its own; under a `key` it is run once."""
    name = json.dumps([*argv, key])
    if key is not None and name in _KNOWN:
        return _KNOWN[name]
    with tempfile.TemporaryDirectory() as top:
        folder, scratch = Path(top, "here"), Path(top, "scratch")
        for one in (folder, scratch):
            one.mkdir()
        put(folder)
        case = Case("good", list(argv), folder)
        _KNOWN[name] = found = outcome(answer(case, scratch), folder)
    return found


def same(
    folder: Path, argv: Sequence[str], put: Fill = fill, key: str | None = "good"
) -> Callable[[str], bool]:
    """Whether the outcome in a folder is that of good data."""

    def right(out: str) -> bool:
        found = outcome(Answer(0, out, "", 0.0), folder)
        return found == of_good(argv, put, key)

    return right


def drawn(strategy: SearchStrategy[Any], random: Random, many: int = 40) -> list[Any]:
    """So many values of a strategy of hypothesis."""
    found: list[Any] = []

    @seed(random.getrandbits(64))
    @settings(
        max_examples=many,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def keep(value: Any) -> None:
        found.append(value)

    keep()
    random.shuffle(found)
    return found


def copied(tree: Path) -> Fill:
    return lambda folder: shutil.copytree(tree, folder, dirs_exist_ok=True)

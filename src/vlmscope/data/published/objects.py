"""Which objects pictures show, from the files that hallucination is measured on.

`coco` reads the instances of COCO, whose 80 categories CHAIR counts (Rohrbach et al. 2018, arXiv
1809.02156); `pope` the questions of POPE (Li et al. 2023, arXiv 2305.10355).
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmscope import files
from vlmscope.data.example import Example, check_text
from vlmscope.errors import DataError, shown


def coco(
    instances: Path | str, images: Path | str, prompt: str = "Describe this image."
) -> tuple[list[Example], list[str]]:
    """An example for each picture of `instances_*.json` that is in the folder, and the categories' names.

    Raises `DataError` if the file is not COCO's, or none of its pictures are there.
    """
    path, folder = Path(instances), Path(images)
    shown: dict[Any, set[str]] = defaultdict(set)
    with _reading(path, "COCO's instances", "instances_val2014.json"):
        whole = json.loads(files.read(path, "COCO's instances", largest=2**31))
        names = {one["id"]: str(one["name"]).casefold() for one in whole["categories"]}
        pictures = {one["id"]: folder / _name(one["file_name"]) for one in whole["images"]}
        for one in whole["annotations"]:
            shown[one["image_id"]].add(names[one["category_id"]])
    found = [
        Example(
            id=file.stem, clean_image=file, clean_prompt=prompt, answer="", foil="", shows=frozenset(shown[n])
        )
        for n, file in pictures.items()
        if file.is_file()
    ]
    if not found:
        raise DataError(
            f"{folder}: none of the {len(pictures)} pictures of {path.name} is there; name theirs"
        )
    return found, list(names.values())


def pope(questions: Path | str, images: Path | str) -> list[Example]:
    """The yes-or-no questions of a POPE file, one JSON object a line, whose pictures are in the folder.

    Raises `DataError` if the file is not POPE's, or none of its pictures are there.
    """
    path, folder = Path(questions), Path(images)
    found: list[Example] = []
    with _reading(path, "a file of POPE", "lines with image, text and label"):
        text = files.read(path, "a file of POPE").decode()
        lines = [(n, line) for n, line in enumerate(text.split("\n")) if line.strip()]
        for number, line in lines:
            one = json.loads(line)
            answer = str(one["label"]).strip().casefold()
            if answer not in ("yes", "no"):
                raise ValueError(f"label {shown(answer)} in line {number + 1}")
            file = folder / _name(one["image"])
            if file.is_file():
                foil = "no" if answer == "yes" else "yes"
                check_text(f"the question in line {number + 1}", question := str(one["text"]))
                found.append(Example(str(one.get("question_id", number)), file, question, answer, foil))
    if not found:
        raise DataError(f"{folder}: none of the pictures of the {len(lines)} questions is there; name theirs")
    return found


def _name(text: object) -> str:
    """The name of a picture in the folder, without the folders that some files have before it."""
    name = str(text).rpartition("/")[2]
    if not files.is_plain_name(name):
        raise ValueError(f"{shown(text)} is no plain name of a file")
    return name


@contextlib.contextmanager
def _reading(path: Path, what: str, expected: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not {what} ({error!r}); expected {expected}") from error

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

from vlmscope.data.example import Example
from vlmscope.errors import DataError


def coco(
    instances: Path | str, images: Path | str, prompt: str = "Describe this image."
) -> tuple[list[Example], list[str]]:
    """An example for each picture of `instances_*.json` that is in the folder, and the categories' names.

    Raises `DataError` if the file is not COCO's, or none of its pictures are there.
    """
    path, folder = Path(instances), Path(images)
    shown: dict[Any, set[str]] = defaultdict(set)
    with _reading(path, "COCO's instances", "instances_val2014.json"):
        whole = json.loads(path.read_text("utf-8"))
        names = {one["id"]: str(one["name"]).casefold() for one in whole["categories"]}
        files = {one["id"]: folder / Path(str(one["file_name"])).name for one in whole["images"]}
        for one in whole["annotations"]:
            shown[one["image_id"]].add(names[one["category_id"]])
    found = [
        Example(
            id=file.stem, clean_image=file, clean_prompt=prompt, answer="", foil="", shows=frozenset(shown[n])
        )
        for n, file in files.items()
        if file.is_file()
    ]
    if not found:
        raise DataError(f"{folder}: none of the {len(files)} pictures of {path.name} is there")
    return found, list(names.values())


def pope(questions: Path | str, images: Path | str) -> list[Example]:
    """The yes-or-no questions of a POPE file, one JSON object a line, whose pictures are in the folder.

    Raises `DataError` if the file is not POPE's, or none of its pictures are there.
    """
    path, folder = Path(questions), Path(images)
    found: list[Example] = []
    with _reading(path, "a file of POPE", "lines with image, text and label"):
        lines = [(n, line) for n, line in enumerate(path.read_text("utf-8").splitlines()) if line.strip()]
        for number, line in lines:
            one = json.loads(line)
            answer = str(one["label"]).strip().casefold()
            if answer not in ("yes", "no"):
                raise ValueError(f"label {answer!r} in line {number + 1}")
            file = folder / Path(str(one["image"])).name
            if file.is_file():
                foil = "no" if answer == "yes" else "yes"
                found.append(
                    Example(str(one.get("question_id", number)), file, str(one["text"]), answer, foil)
                )
    if not found:
        raise DataError(f"{folder}: none of the pictures of the {len(lines)} questions is there")
    return found


@contextlib.contextmanager
def _reading(path: Path, what: str, expected: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not {what} ({error!r}); expected {expected}") from error

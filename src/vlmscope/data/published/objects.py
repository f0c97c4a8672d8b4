"""Which objects pictures show, from the files that hallucination is measured on.

`coco` reads the instances of COCO, whose 80 categories CHAIR counts (Rohrbach et al. 2018, arXiv 1809.02156);
`pope` the questions of POPE (Li et al. 2023, arXiv 2305.10355).
"""

from __future__ import annotations

import json
from collections import defaultdict
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
    try:
        whole = json.loads(path.read_text("utf-8"))
        names = {one["id"]: str(one["name"]).casefold() for one in whole["categories"]}
        files = {one["id"]: str(one["file_name"]) for one in whole["images"]}
        shown: dict[Any, set[str]] = defaultdict(set)
        for one in whole["annotations"]:
            shown[one["image_id"]].add(names[one["category_id"]])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not COCO's instances ({error!r}); expected instances_val2014.json"
        ) from error
    found = [
        Example(
            id=Path(file).stem,
            clean_image=folder / Path(file).name,
            clean_prompt=prompt,
            answer="",
            foil="",
            shows=frozenset(shown[number]),
        )
        for number, file in files.items()
        if (folder / Path(file).name).is_file()
    ]
    if not found:
        raise DataError(f"{folder}: none of the {len(files)} pictures of {path.name} is there")
    return found, list(names.values())


def pope(questions: Path | str, images: Path | str) -> list[Example]:
    """The yes-or-no questions of a POPE file, one JSON object a line, whose pictures are in the folder.

    Raises `DataError` if the file is not POPE's, or none of its pictures are there.
    """
    path, folder = Path(questions), Path(images)
    found, lines = [], 0
    try:
        for number, line in enumerate(path.read_text("utf-8").splitlines()):
            if not line.strip():
                continue
            lines += 1
            one = json.loads(line)
            answer = str(one["label"]).strip().casefold()
            if answer not in ("yes", "no"):
                raise ValueError(f"label {answer!r} in line {number + 1}")
            file = folder / Path(str(one["image"])).name
            if file.is_file():
                foil = "no" if answer == "yes" else "yes"
                name = str(one.get("question_id", number))
                found.append(Example(name, file, str(one["text"]), answer, foil))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a file of POPE ({error!r}); expected lines with image, text and label"
        ) from error
    if not found:
        raise DataError(f"{folder}: none of the pictures of the {lines} questions is there")
    return found

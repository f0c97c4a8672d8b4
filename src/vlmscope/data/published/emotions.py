"""Photographs of faces by emotion: "is this person feeling happy or sad?".

As distributed (FER-2013 and its kin): `images/train/{emotion}/*.jpg`, also `train/{emotion}` or
`{emotion}`; the folders' names, nouns or adjectives, become adjectives. The corrupt image is one
of the other emotion. Questions as in NOTICE (Golovanevsky et al., arXiv 2406.16320).
"""

from __future__ import annotations

from pathlib import Path

from vlmscope.data.example import Example
from vlmscope.data.published.folder import pair_labels
from vlmscope.data.published.layout import EMOTIONS, Pictures, count, folders_in, images_in, not_here
from vlmscope.errors import DataError

NAME = "faces"
PLACES = ("images/train", "train", "images", "")
UNKNOWN = "a folder whose name is no emotion"
EMPTY = "a folder without images"


def load(root: Path, limit: int | None, seed: int, dropped: dict[str, int]) -> list[Example]:
    """The examples of the release in `root`; what was left out is counted in `dropped`."""
    return pair_labels(
        NAME,
        read_emotions(root, dropped),
        ask,
        Pictures(dropped),
        limit=limit,
        seed=seed,
        dropped=dropped,
        kind="emotion",
    )


def read_emotions(root: Path, dropped: dict[str, int]) -> dict[str, list[Path]]:
    """The images of each emotion, by its adjective, from the first place that has any folders."""
    folders = next((some for place in PLACES if (some := _emotions_in(root / place))), [])
    if len(folders) < 2:
        raise not_here(NAME, root, "two folders or more named by emotions, such as train/happy")
    above = folders[0].parent
    count(dropped, UNKNOWN, len(folders_in(above)) - len(folders))
    found: dict[str, list[Path]] = {}
    for folder in folders:
        found.setdefault(EMOTIONS[folder.name.casefold()], []).extend(images_in(folder))
    full = {emotion: files for emotion, files in found.items() if files}
    if len(full) < 2:
        raise DataError(
            f"{above}: {len(folders)} folders of emotions, and {len(full)} with images; expected "
            f"images in two or more, such as {folders[0].name}/1.jpg; unpack {NAME} again"
        )
    count(dropped, EMPTY, len(found) - len(full))
    return full


def ask(first: str, second: str) -> str:
    """The question with its two options.

    >>> ask("happy", "surprised")
    'is this person feeling happy or surprised?'
    """
    return f"is this person feeling {first} or {second}?"


def _emotions_in(folder: Path) -> list[Path]:
    return [one for one in folders_in(folder) if one.name.casefold() in EMOTIONS]

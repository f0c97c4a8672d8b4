"""Photographs of faces by emotion: "is this person feeling happy or sad?".

As distributed (FER-2013 and its kin): `images/train/{emotion}/*.jpg`, also `train/{emotion}` or
`{emotion}`; the folders' names, nouns or adjectives, become adjectives. The corrupt image is one of the
other emotion. Questions as in NOTICE (Golovanevsky et al., arXiv 2406.16320).
"""

from __future__ import annotations

from pathlib import Path

from vlmscope.data.example import Example
from vlmscope.data.published.folder import ask_labels
from vlmscope.data.published.layout import EMOTIONS, folders_in, images_in
from vlmscope.data.published.sampling import Source
from vlmscope.errors import DataError

PLACES = ("images/train", "train", "images", "")


def load(source: Source) -> list[Example]:
    """The examples of the release; what was left out is counted in `source`."""
    return ask_labels(source, read_emotions(source), "is this person feeling {x} or {y}?", "emotion")


def read_emotions(source: Source) -> dict[str, list[Path]]:
    """The images of each emotion, by its adjective, from the first place that has any folders."""
    for place in PLACES:
        above = source.root / place
        folders = [folder for folder in folders_in(above) if folder.name.casefold() in EMOTIONS]
        if folders:
            break
    if len(folders) < 2:
        raise source.not_here("two folders or more named by emotions, such as train/happy")
    source.drop("a folder whose name is no emotion", len(folders_in(above)) - len(folders))
    found: dict[str, list[Path]] = {}
    for folder in folders:
        found.setdefault(EMOTIONS[folder.name.casefold()], []).extend(images_in(folder))
    full = {emotion: files for emotion, files in found.items() if files}
    if len(full) < 2:
        raise DataError(
            f"{above}: {len(folders)} folders of emotions, and {len(full)} with images; expected "
            f"images in two or more, such as {folders[0].name}/1.jpg; unpack {source.name} again"
        )
    source.drop("a folder without images", len(found) - len(full))
    return full

"""What lies in a data set's folder: its images, and which set's layout it has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from vlmscope import files
from vlmscope.data.words import read_words
from vlmscope.errors import DataError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))

_FOLDERS = read_words(Path(__file__).with_name("folders.toml"))
EMOTIONS = {name: adjective for adjective, names in _FOLDERS["emotions"].items() for name in names}
"""The names that releases of face data sets give their folders, and the adjective of each."""
STATES = {adjective: kind for kind, adjectives in _FOLDERS["states"].items() for adjective in adjectives}
"""The adjectives of MIT-States and the kind of each: `color`, `shape`, `texture` or `none`."""


def looks_like(root: Path) -> str | None:
    """The name of the data set whose layout a folder has, where it can be told.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as root:
    ...     for emotion in ("happy", "sad"):
    ...         Path(root, "train", emotion).mkdir(parents=True)
    ...     looks_like(Path(root))
    'faces'
    """
    if (root / "svo_probes.csv").is_file():
        return "svo-probes"
    headers = [header_of(file) for file in sorted(root.glob("*.csv"))]
    if any("Questions_Answers" in header for header in headers):
        return "clevr"
    if any(name.startswith("train_image_id") for header in headers for name in header):
        return "coco-qa"
    for place in ("", "images", "train", "images/train"):
        names = [folder.name.casefold() for folder in folders_in(root / place)]
        if sum(name in EMOTIONS for name in names) > 1:
            return "faces"
        if sum(" " in name and name.split()[0] in STATES for name in names) > 1:
            return "mit-states"
    return None


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden ones; none where there is no such folder."""
    return [folder / name for name in _names(folder) if (folder / name).is_dir()]


def images_in(folder: Path) -> list[Path]:
    """The files in a folder that are images by their names, sorted by name.

    >>> images_in(Path("no such folder"))
    []
    """
    # There may be 100,000 names, for which paths are slow.
    return [folder / name for name in _names(folder) if os.path.splitext(name)[1].lower() in SUFFIXES]  # noqa: PTH122


def _names(folder: Path) -> list[str]:
    """The names in a folder, sorted, without hidden ones; none where there is no such folder."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in names:
        if not files.is_text(name):
            raise DataError(f"{folder / name}: a name that is not UTF-8, which no table can hold; rename it")
    return names


def by_stem(folders: Iterable[Path]) -> dict[str, Path]:
    """The images in some folders by their names without the suffix; the first one counts."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in images_in(folder):
            found.setdefault(path.stem, path)
    return found


def header_of(path: Path) -> list[str]:
    """The column names in a file's first line, as well as they can be read."""
    try:
        first = files.read(path, "a CSV file").partition(b"\n")[0][:10_000]
    except DataError:
        return []
    return re.split(r"[,;\t]", first.decode("utf-8-sig", "replace").strip())

"""What lies in a data set's folder: its images and tables, and what to say where they are not."""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlmscope.data.images import open_image
from vlmscope.errors import DataError, ExampleError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
UNREADABLE = "the image cannot be read"

EMOTIONS = {
    "anger": "angry",
    "angry": "angry",
    "contempt": "contemptuous",
    "disgust": "disgusted",
    "disgusted": "disgusted",
    "fear": "fearful",
    "fearful": "fearful",
    "happiness": "happy",
    "happy": "happy",
    "neutral": "neutral",
    "sad": "sad",
    "sadness": "sad",
    "surprise": "surprised",
    "surprised": "surprised",
}
"""The names that releases of face data sets give their folders, and the adjective of each."""

ADJECTIVES = frozenset(
    """
    ancient barren bent blunt bright broken browned brushed burnt caramelized chipped clean clear
    closed cloudy cluttered coiled cooked cored cracked creased crinkled crumpled crushed curved
    cut damp dark deep dented diced dirty draped dry dull empty engraved eroded fallen filled foggy
    folded frayed fresh frozen full grimy heavy huge inflated large lightweight loose mashed melted
    modern moldy molten mossy muddy murky narrow new old open painted peeled pierced pressed pureed
    raw ripe ripped rough ruffled runny rusty scratched sharp shattered shiny short sliced small
    smooth spilled splintered squished standing steaming straight sunny tall thawed thick
    thin tight tiny toppled torn unpainted unripe upright verdant viscous weathered wet whipped
    wide wilted windblown winding worn wrinkled young
    """.split()
)
"""The adjectives of MIT-States."""


def check_root(name: str, root: Path) -> None:
    """Refuse a folder that cannot hold the data set `name` at all."""
    if not root.exists():
        raise DataError(f"{root}: no such folder; expected the folder that holds {name} as it is distributed")
    if not root.is_dir():
        raise DataError(f"{root}: a file; expected the folder that holds {name}")
    if not any(root.iterdir()):
        raise DataError(f"{root}: an empty folder; unpack {name} there, or give the folder it is in")


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
        if sum(" " in name and name.split()[0] in ADJECTIVES for name in names) > 1:
            return "mit-states"
    return None


def not_here(name: str, root: Path, expected: str) -> DataError:
    """The error for a folder that does not hold what `name` has."""
    other = looks_like(root)
    if other and other != name:
        return DataError(
            f"{root}: no {expected}; it looks like {other}: ask for {other}, or give {name}'s folder"
        )
    return DataError(f"{root}: no {expected}; unpack {name} there, or give the folder it is in")


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden ones; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = (one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    return sorted(found, key=lambda one: one.name)


def images_in(folder: Path) -> list[Path]:
    """The files in a folder that are images by their names, sorted by name.

    >>> images_in(Path("no such folder"))
    []
    """
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES  # noqa: PTH122 (100,000 names)
            and not entry.name.startswith(".")
        ]
    return [folder / name for name in sorted(names)]


def by_stem(folders: Iterable[Path]) -> dict[str, Path]:
    """The images in some folders by their names without the suffix; the first one counts."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in images_in(folder):
            found.setdefault(path.stem, path)
    return found


class Pictures:
    """Which images can be read: each is opened once, when it is first asked for, and counted.

    >>> dropped = {}
    >>> Pictures(dropped).readable(Path("no such image.png")), dropped
    (False, {'the image cannot be read': 1})
    """

    def __init__(self, dropped: dict[str, int]) -> None:
        self._dropped = dropped
        self._known: dict[Path, bool] = {}

    def readable(self, path: Path) -> bool:
        if path not in self._known:
            try:
                open_image(path)
                self._known[path] = True
            except ExampleError:
                self._known[path] = False
                count(self._dropped, UNREADABLE)
        return self._known[path]


def count(dropped: dict[str, int], why: str, number: int = 1) -> None:
    """Add to what was dropped, and why."""
    if number:
        dropped[why] = dropped.get(why, 0) + number


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that has these columns (and maybe others).

    Raises `DataError` where the file cannot be read or lacks one, with the name that is nearest.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = [(name or "").strip() for name in rows.fieldnames or ()]
        rows.fieldnames = header
        check_columns(path, header, columns)
        return [
            {name: (cell or "").strip() for name, cell in row.items() if isinstance(name, str)}
            for row in rows
            if any(isinstance(cell, str) and cell.strip() for cell in row.values())
        ]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); get the file again") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error}); get the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_columns(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse a table that lacks a column; its error names the nearest that is there."""
    missing = [name for name in columns if name not in header]
    if not missing:
        return
    near = {name: difflib.get_close_matches(name, header, n=1, cutoff=0.5) for name in missing}
    lacks = [f"{name} (is it {near[name][0]!r}?)" if near[name] else name for name in missing]
    raise DataError(
        f"{path}: no column {', '.join(lacks)}; the file has "
        f"{', '.join(name for name in header if name) or 'none'}; expected {', '.join(columns)}"
    )


def header_of(path: Path) -> list[str]:
    """The column names in a file's first line, as well as they can be read."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return re.split(r"[,;\t]", file.readline(10_000).strip())
    except OSError:
        return []

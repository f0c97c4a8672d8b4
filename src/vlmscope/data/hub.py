"""Examples from data sets of the Hugging Face hub, or in its forms on disk, by way of `datasets`."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from vlmscope import files
from vlmscope.data.example import Example
from vlmscope.data.images import png
from vlmscope.data.rows import Arrow, Parquet, Rows
from vlmscope.data.table import BOX, MASK, MORE, checked, example_of
from vlmscope.errors import DataError, ExampleError, VlmscopeError, line, nearest, shown

HUB = "hf://"
"""What the name of a data set begins with that `datasets` reads."""
NEEDED = ("clean_image", "clean_prompt", "answer")
NAMES = {
    "clean_image": "clean_image_path",
    "corrupt_image": "corrupt_image_path",
    "answer": "correct_answer",
    "foil": "incorrect_answer",
}
"""The columns of the CSV form that are called otherwise here; its own names are taken, too."""
UNREAD = object()
"""What stands for a picture where the words of a row are looked at."""
_SPLIT = re.compile(r"(.+?)(?::([\w.-]+))?", re.DOTALL)
_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:/([\w.-]+))?", re.ASCII)
_PICTURE = re.compile(rf"(clean|corrupt)_image_path|{MASK}(_.*)?|{MORE}_.*", re.DOTALL)


Columns: TypeAlias = str | Mapping[str, str] | None
"""Our names of columns to a set's own, or as `answer=label,clean_prompt=question`."""


def is_set(given: object) -> bool:
    """Whether something is a data set of the library `datasets`, or the dictionary of its splits."""
    library = sys.modules.get("datasets")
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    return library is not None and isinstance(given, tuple(getattr(library, kind) for kind in kinds))


def read(given: Any, columns: Columns = None, limit: int | None = None) -> Sequence[Example]:
    """The first examples of a data set: `hf://NAME[/CONFIG][:SPLIT]`, `hf://FOLDER[:SPLIT]` or an object.

    Columns are called as the fields of `Example` are (`mask_NAME`, `box_NAME`, `image_2` …) or as in the CSV
    form; `columns` maps these names to the set's own, `answer=label,clean_prompt=question` or a mapping.
    Labels of classes become their names; what else holds text or numbers is a group.

    The words of all rows are read and checked here; pictures, and the examples with them, where one is asked
    for (`rows.Rows`): they become files in the cache of `datasets`, by the SHA-256 of their content. With a
    `limit` no more rows than that are read, where the hub can be reached by streaming. A stream of another
    form than Parquet can be read only from its beginning to its end: its examples are all made here.

    Raises `DataError` in one line where that cannot be done, or the columns are not there.
    """
    datasets = _library()
    name = given if isinstance(given, str) else f"this {type(given).__name__}"
    with _one_line(name):
        found = _opened(datasets, given, limit) if isinstance(given, str) else _one_split(given, None, name)
        own = _own_names(name, _columns(datasets, found), _mapping(columns))
        features = _features(datasets, found)
        labels = {c: f.int2str for c, f in features.items() if isinstance(f, datasets.ClassLabel)}
        images = [column for column, feature in features.items() if _is_image(datasets, feature)]
        pictures = _Pictures(datasets, trusted=not (isinstance(given, str) and _place(given)[0] is None))
        make = partial(_example, own, labels, pictures)
        unread = sorted({column for to, column in own.items() if column in images and _PICTURE.fullmatch(to)})
        words = [column for column in dict.fromkeys(own.values()) if column not in images]
        if not isinstance(found, Parquet):
            for column in images:
                found = found.cast_column(column, datasets.Image(decode=False))
            if not isinstance(found, datasets.Dataset) or found.format["type"] is not None:
                rows = enumerate(itertools.islice(found, limit))
                return list(_checked(name, ((number, partial(make, number, row)) for number, row in rows)))
            found = found.select_columns([*words, *unread])
            found = Arrow(found if limit is None else found.select(range(min(limit, len(found)))))
        else:
            found.only([*words, *unread])

        def checked(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
            cells = ({**row, **dict.fromkeys(unread, UNREAD)} for row in rows)
            return _checked(name, ((number, partial(make, number, row)) for number, row in enumerate(cells)))

        def made(number: int, row: Mapping[str, Any]) -> Example:
            try:
                return make(number, row)
            except (ValueError, ExampleError) as problem:
                raise ExampleError(f"{name}, row {number}: {problem}") from problem

        reading = partial(_one_line, name)
        return Rows(found, words, unread, checked=checked, made=made, reading=reading)


def _checked(name: str, rows: Iterable[tuple[int, Callable[[], Example]]]) -> Iterator[Example]:
    """The examples of all rows, of which there has to be one."""
    several = checked(name, rows, "row", "map another column to id")
    if (first := next(several, None)) is None:
        raise DataError(f"{name}: has no rows; name another split")
    yield first
    yield from several


def _example(
    own: Mapping[str, str],
    labels: Mapping[str, Callable[[int], str]],
    pictures: _Pictures,
    number: int,
    row: Mapping[str, Any],
) -> Example:
    """What a row is; raises `ValueError` or `ExampleError` if it makes none."""
    cells = {"id": str(number)}
    for to, column in own.items():
        value = row.get(column)
        if column in labels and isinstance(value, int):
            value = labels[column](value) if value >= 0 else None
        cell = pictures.file(value, to) if _PICTURE.fullmatch(to) else _cell(value)
        if cell is not None:
            cells[to] = cell
    return example_of(Path(), {"incorrect_answer": "", **cells})


def _place(name: str) -> tuple[Path | None, str, str | None]:
    """The folder that a name means, if any, else what it is called on the hub; and the split."""
    rest = name.removeprefix(HUB)
    found = _SPLIT.fullmatch(rest)
    if found is None:
        raise DataError(f"{shown(name)} names no data set; expected {HUB}OWNER/NAME[/CONFIG][:SPLIT]")
    if not rest.startswith(("/", ".")):
        return None, found[1], found[2]
    if Path(rest).is_dir():
        return Path(rest), rest, None
    return Path(found[1]), found[1], found[2]


def _opened(datasets: Any, name: str, limit: int | None) -> Any:
    """One split of a data set; streamed where only its beginning is wanted."""
    folder, path, split = _place(name)
    config = None
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"{name}: no folder {folder}; expected one of save_to_disk, or of files")
        if any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
            return _one_split(datasets.load_from_disk(str(folder)), split, name)
    else:
        known = _ID.fullmatch(path)
        if known is None:
            raise DataError(f"{shown(name)} names no data set; expected {HUB}OWNER/NAME[/CONFIG][:SPLIT]")
        path, config = known[1], known[2]
    splits = datasets.get_dataset_split_names(path, config)
    split = _of_splits(splits, split, name)
    # Offline there is no stream, but what the cache holds.
    is_offline = folder is None and datasets.config.HF_HUB_OFFLINE
    if not is_offline and (folder is not None or limit is not None):
        builder = datasets.load_dataset_builder(path, config)
        paths = [str(file) for file in (builder.config.data_files or {}).get(split, ())]
        if paths and all(file.endswith(".parquet") for file in paths):
            found = Parquet(paths, _file, limit)
            if builder.info.features in (None, _features(datasets, found)):
                return found
    return datasets.load_dataset(path, config, split=split, streaming=limit is not None and not is_offline)


def _file(path: str) -> Any:
    """A file of a data set, here or on the hub, to be read in any order."""
    if not path.startswith(HUB):
        return path
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(path, "rb")


def _one_split(found: Any, split: str | None, name: str) -> Any:
    if isinstance(found, dict):
        return found[_of_splits(list(found), split, name)]
    if split is not None and str(found.split) != split:
        raise DataError(f"{name}: has no split {shown(split)}, only {found.split}; leave it out")
    return found


def _of_splits(splits: list[str], split: str | None, name: str) -> str:
    known = ", ".join(map(str, splits))
    if split is None and len(splits) == 1:
        return str(splits[0])
    if split is None:
        raise DataError(f"{name}: has the splits {known}; name one, as {HUB}…:{next(iter(splits), 'train')}")
    if split not in splits:
        raise DataError(f"{name}: no split {shown(split)}; it has {known}{nearest(split, map(str, splits))}")
    return split


def _features(datasets: Any, found: Any) -> dict[str, Any]:
    """The types of a set's columns, where they are known."""
    if isinstance(found, Parquet):
        return dict(datasets.Features.from_arrow_schema(found.schema))
    return dict(found.features or {})


def _is_image(datasets: Any, feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    )


def _columns(datasets: Any, found: Any) -> list[str]:
    """The names of a set's columns; a stream without a list of them has its first row looked at."""
    return list(_features(datasets, found) or found.column_names or next(iter(found), {}))


def _mapping(columns: Columns) -> dict[str, str]:
    if not isinstance(columns, str):
        return dict(columns or {})
    pairs = [pair.partition("=") for pair in columns.split(",")]
    if odd := next((pair for pair in pairs if not (pair[0].strip() and pair[2].strip())), None):
        raise DataError(f"--columns: {shown(''.join(odd))} maps nothing; expected NAME=COLUMN")
    return {to.strip(): column.strip() for to, _, column in pairs}


def _own_names(name: str, there: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """The set's own column for each column of the CSV form."""
    known = ", ".join(map(shown, there)) or "none"
    if odd := next((column for column in given.values() if column not in there), None):
        raise DataError(f"{name}: no column {shown(odd)}; it has {known}{nearest(odd, there)}")
    taken = {*given.values()}
    all_names = {column: column for column in there if column not in taken} | dict(given)
    own = {_csv_name(to): column for to, column in all_names.items()}
    if missing := [to for to in NEEDED if NAMES.get(to, to) not in own]:
        lacks, way_out = ", ".join(missing), ",".join(f"{to}=COLUMN" for to in missing)
        raise DataError(f"{name}: no column {lacks}; it has {known}; map them: --columns {way_out}")
    return own


def _csv_name(name: str) -> str:
    for ours, theirs in (("mask", MASK), ("image", MORE)):
        name = re.sub(rf"{ours}(?!_path)(?=_|$)", theirs, name) if name.startswith(ours) else name
    name = f"{name}_object" if name in (MASK, BOX) else name
    return NAMES.get(name, name)


def _cell(value: Any) -> str | None:
    """The text of a cell, as a CSV file would hold it; None for what has none."""
    if isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, int | float) for one in value):
        return " ".join(f"{one:.10g}" for one in value)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return None


class _Pictures:
    """Pictures of rows as files, by the SHA-256 of their content."""

    def __init__(self, datasets: Any, trusted: bool) -> None:
        self.folder = Path(datasets.config.HF_DATASETS_CACHE) / "vlmscope"
        self.caches = [Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE)]
        self.trusted = trusted

    def file(self, value: Any, column: str) -> str | None:
        """The file of a picture; None where there is none. Raises `ValueError` for what is no picture."""
        if value is None:
            return None
        if value is UNREAD:
            return "not read"
        if isinstance(value, Image.Image):
            return self._kept(png(value))
        if not isinstance(value, dict) or not {"bytes", "path"} & value.keys():
            raise ValueError(f"{column} is {shown(value)}, no picture (cast the column to datasets.Image)")
        if value.get("bytes") is not None:
            return self._kept(value["bytes"])
        path = str(value.get("path"))
        if path.startswith("hf://datasets/"):
            from huggingface_hub import HfFileSystem

            return self._kept(HfFileSystem().read_bytes(path))
        # A set from the hub may name any file of this machine, or any address.
        if not (self.trusted or any(Path(path).resolve().is_relative_to(c.resolve()) for c in self.caches)):
            raise ValueError(f"{column} is at {shown(path)}, outside of the data set (leave the limit out)")
        return str(Path(path).absolute())

    def _kept(self, content: bytes) -> str:
        file = self.folder / hashlib.sha256(content).hexdigest()
        try:
            same = files.read(file, "a picture") == content
        except DataError:
            same = False
        if not same:
            files.write(file, content)
        return str(file)


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except Exception as error:  # one that does not fit the machine raises errors of its own
        raise DataError(
            f"{HUB} needs datasets, which cannot be imported ({line(str(error), 100)}); "
            "pip install 'vlmscope[hub]' brings it"
        ) from error


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Read without bars and warnings; turn what `datasets` and the hub raise into one line."""
    datasets = _library()
    bars, level = datasets.are_progress_bars_disabled(), logging.root.manager.disable
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (VlmscopeError, MemoryError):
        raise
    except Exception as error:  # of any kind: its builders read whatever is there
        said = line(str(error).strip() or type(error).__name__, 200).rstrip(".")
        way_out = "it needs the network or a copy in the local cache (or give a folder)"
        if re.search(r"gated|authenticated|log ?in|\b40[13]\b|token", said, re.IGNORECASE):
            way_out = "the hub asks for a token: agree to its conditions on its page, then `hf auth login`"
        raise DataError(f"cannot read {name}: {said}; {way_out}") from error
    finally:
        logging.disable(level)
        if not bars:
            datasets.enable_progress_bars()

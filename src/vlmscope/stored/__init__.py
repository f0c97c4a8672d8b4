"""Folders of results, read: somebody else may have made them, so nothing of them is taken unchecked.

No link in a folder is followed, so nothing outside of it is read. A manifest has the keys and types of its
shape, and a table exactly the columns that its writer writes (`formats`); each file that a manifest lists is
as it was written. Anything else is a `StoreError` that says what is odd and ends with a way out.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlmscope import files
from vlmscope.data.images import SMALL
from vlmscope.errors import StoreError, line, shown
from vlmscope.sites import KINDS, TOWERS

LARGEST = 2**31
"""Bytes up to which a Parquet file is read."""
CELLS = 2**24
"""Of how many cells a Parquet file may be, however small; so that a small one cannot fill the memory."""
LONGEST = 2**16
"""Characters in a text of a table or a manifest."""
GRID = 1000
"""Layers, heads, rows and columns are numbers below this: figures have room for each of them."""
PLACES = 2**24
"""Positions are numbers below this: no model reads that many tokens."""

_WITH_NULLS = {"bool": "boolean", "int": "Int64"}
"""The types of pandas that hold nulls beside truth values and whole numbers."""
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|nan|[-+]?inf", re.IGNORECASE)
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_FOREIGN = (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError)
"""What the readers of JSON, CSV and Parquet raise for what somebody else has made."""
FOREIGN = (*_FOREIGN, pa.ArrowException, csv.Error)


class Table(NamedTuple):
    """The columns of a table, `name:type` each, and the `key`: those that no two rows have in common.

    Types: `text`, `bool`, `int` (not negative), `grid` and `place` (an `int` below `GRID`, `PLACES`), `float`
    (finite), `share` (from 0 to 1), `number` (any), `tower`, `kind`. One that ends in `?` may be null.
    """

    columns: str
    key: str = ""
    is_optional: bool = False
    may_be_empty: bool = False

    @property
    def names(self) -> list[str]:
        """What the columns are called."""
        return [column.partition(":")[0] for column in self.columns.split()]


class Format(NamedTuple):
    """What a folder holds: a manifest with its shape (`fits`), and tables by the name of their file."""

    manifest: str
    shape: Mapping[Any, Any]
    tables: Mapping[str, Table]
    way_out: str = "write that folder anew with the command that made it"

    @property
    def name(self) -> str:
        """What the manifest says that the folder is."""
        return str(self.shape.get("format") or self.shape["what"])

    def claim(self, folder: str | os.PathLike[str], *others: str) -> Mapping[str, Any]:
        """Refuse, before anything is computed, a folder that these tables and other files could not be
        written to (`StoreError`); gives the manifest that is there, empty where there is none."""
        return files.claim(folder, self.manifest, self.name, [*self.tables, *others])

    def save(
        self, folder: str | os.PathLike[str], about: Mapping[str, Any], content: Mapping[str, Any]
    ) -> None:
        """Write tables and what else belongs to them and, last, the manifest, as `files.save` does."""
        files.save(folder, self.manifest, about, content)


Tables = dict[str, pd.DataFrame]
Pictures = dict[str, bytes]


def read(folder: Path, form: Format) -> tuple[dict[str, Any], Tables]:
    """The manifest of a folder and its tables, by the stem of their file; an optional one may be missing."""
    about, tables, _ = _read(folder, form)
    return about, tables


def read_one(folder: Path, *forms: Format) -> tuple[str, dict[str, Any], Tables, Pictures]:
    """As `read`, of that format that `what` in the manifest names; and which that is, and the PNG files that
    the table `pictures` lists, by the example that each is of."""
    first, names = forms[0], tuple(form.name for form in forms)
    about = manifest(folder / first.manifest, {"what": str}, first.way_out, folder)
    fits(about, {"what": names}, folder / first.manifest, first.way_out)
    form = forms[names.index(about["what"])]
    about, tables, listed = _read(folder, form)
    pictures = {}
    for row in tables.pop("pictures", pd.DataFrame()).itertuples():
        name = f"pictures/{Path(row.file).name}"
        pictures[row.example] = picture(folder / name, form.way_out, folder, listed.get(name, ""))
    return form.name, about, tables, pictures


def _read(folder: Path, form: Format) -> tuple[dict[str, Any], Tables, dict[str, str]]:
    """The manifest, the tables, and the digests of all files that belong to them."""
    shape = {**form.shape, "files": {str: str}, "unfinished?": bool}
    about = manifest(folder / form.manifest, shape, form.way_out, folder)
    if about.pop("unfinished", False):
        raise StoreError(f"{folder}: was not written to its end; run the same command again")
    listed = about.pop("files")
    names = [name for name, one in form.tables.items() if not one.is_optional or name in listed]
    way_out, tables = form.way_out, {}
    for name in names:
        digest = listed.get(name, "")
        tables[Path(name).stem] = table(folder / name, form.tables[name], way_out, folder, digest)
    return about, tables, listed


def manifest(file: Path, shape: Any, way_out: str, folder: Path | None = None) -> dict[str, Any]:
    """The JSON object in a file of a folder (by default the one that it lies in), of a shape."""
    content = files.read(
        file, f"a JSON file that vlmscope wrote; {way_out}", StoreError, within=folder or file.parent
    )
    try:
        about = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except FOREIGN as error:
        raise StoreError(f"{file}: is damaged (not JSON); {way_out}") from error
    if not isinstance(about, dict):
        raise StoreError(f"{file}: is damaged (not a JSON object); {way_out}")
    fits(about, shape, file, way_out)
    return about


def fits(value: Any, shape: Any, file: Path, way_out: str) -> None:
    """Raise `StoreError` for JSON that is not of a shape.

    A shape is a type (`int`, `float`: any number, `str`, `bool`, None), a text: that very one, `[shape]`: a
    list, `{key: shape}`: an object with these keys (one that ends in `?` may be missing, further ones are as
    they are), `{str: shape}`: an object with any keys, or a tuple of shapes, one of which it has.
    """
    if odd := next(_odd(value, shape, ""), None):
        raise StoreError(f"{file}: is damaged ({odd}); {way_out}")


def table(
    file: Path, form: Table, way_out: str, folder: Path | None = None, digest: str | None = None
) -> pd.DataFrame:
    """The table in a file of a folder (by default the one that it lies in); `.parquet` or else CSV.

    Of an empty table columns may be missing. In CSV a text is never null, so an empty one is a text. With a
    `digest`, the file is as it was written.
    """
    expected, columns = f"a table that vlmscope wrote; {way_out}", _columns(form)
    largest = LARGEST if file.suffix == ".parquet" else files.LARGEST
    content = files.read(file, expected, StoreError, largest, within=folder or file.parent)
    try:
        frame = _frame(parquet(content)) if file.suffix == ".parquet" else _from_csv(content, columns)
        if frame.empty and not form.may_be_empty:
            raise ValueError("no rows")
        frame = _checked(frame, columns, form.key.split())
        _is_as_written(content, digest)
        return frame
    except FOREIGN as error:
        raise StoreError(f"{file}: is damaged ({line(str(error), 150)}); {way_out}") from error


def _is_as_written(content: bytes, digest: str | None) -> None:
    """Raise ValueError for other bytes than were written; after what is odd about them, which says more."""
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("it is not as it was written, by the SHA-256 beside it")


def _frame(table: pa.Table) -> pd.DataFrame:
    # What pandas notes beside a table turns numbers into text where it says so.
    return table.replace_schema_metadata(None).to_pandas()


def parquet(content: bytes) -> pa.Table:
    """The table in a Parquet file; raises one of `FOREIGN` for what is none, or would fill the memory."""
    source = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    about = source.metadata
    size = sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups))
    if about.num_rows * max(1, about.num_columns) > max(CELLS, 256 * len(content)) or size > 2**28 + 64 * len(
        content
    ):
        raise ValueError(f"{about.num_rows:,} rows of {size:,} bytes in a file of {len(content):,}")
    try:
        found = source.read()
    except pa.ArrowMemoryError as error:  # which says nothing against the file
        raise MemoryError(str(error)) from error
    found.validate(full=True)
    return found


def picture(file: Path, way_out: str, folder: Path | None = None, digest: str | None = None) -> bytes:
    """A PNG in a folder, as its bytes; raises `StoreError` for what is none, or is larger than vlmscope's.

    With a `digest`, the file is as it was written.
    """
    from PIL import Image

    content = files.read(
        file, f"a picture that vlmscope wrote; {way_out}", StoreError, within=folder or file.parent
    )
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
            if max(opened.size) > 4 * SMALL:
                raise ValueError(f"{opened.size[0]} × {opened.size[1]} pixels")
            opened.convert("RGB")
        if not content.endswith(b"IEND\xaeB`\x82"):
            raise ValueError("cut off")
        _is_as_written(content, digest)
    except Exception as error:  # Pillow's decoders meet broken data with errors of many kinds
        raise StoreError(f"{file}: is damaged ({line(str(error), 150)}); {way_out}") from error
    return content


def no_links(path: Path, folder: Path) -> None:
    """Raise `StoreError` where a link leads from a folder to what is called a part of it."""
    for place in (path, *path.parents):
        if place == folder:
            return
        if place.is_symlink():
            raise StoreError(
                f"{place}: a link, and none is followed in a folder of results; name {path} itself"
            )


# --- JSON --------------------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that is there twice")
    return found


def _odd(value: Any, shape: Any, where: str) -> Iterator[str]:
    """What is odd about a value, in words."""
    if isinstance(shape, tuple):
        if all(next(_odd(value, one, where), None) for one in shape):
            yield from _odd(value, shape[0], where)
    elif isinstance(shape, list) and isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _odd(inner, shape[0], f"{where}[{number}]")
    elif isinstance(shape, Mapping) and isinstance(value, dict):
        if str in shape:
            for key, inner in value.items():
                yield from _odd(inner, shape[str], f"{where}.{key}")
            return
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                yield from _odd(value[name], inner, f"{where}.{name}" if where else name)
            elif name == key:
                yield f"no {where}.{name}" if where else f"no {name}"
    elif not _is(value, shape):
        words = shown(shape) if isinstance(shape, str) else _WORDS.get(_of(shape), "null")
        yield f"{line(where, 60) or 'it'} is {shown(value, 40)}; expected {words}"


_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _of(shape: Any) -> Any:
    return type(shape) if isinstance(shape, (list, Mapping)) else shape


def _is(value: Any, shape: Any) -> bool:
    if isinstance(shape, str) or shape is None:
        return bool(value == shape)
    if shape is str:
        return isinstance(value, str) and len(value) <= LONGEST
    if shape is bool:
        return isinstance(value, bool)
    if shape is float:
        return isinstance(value, float) or _is(value, int)
    return shape is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


# --- tables ------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    name: str
    type: str
    may_be_null: bool


def _columns(form: Table) -> list[_Column]:
    pairs = [column.split(":") for column in form.columns.split()]
    return [_Column(name, kind.removesuffix("?"), kind.endswith("?")) for name, kind in pairs]


def _from_csv(content: bytes, columns: list[_Column]) -> pd.DataFrame:
    # What a file name lacks of UTF-8 is a lone surrogate, which no table can hold: it becomes its escape.
    text = content.decode("utf-8", "surrogatepass").encode("utf-8", "backslashreplace").decode("utf-8")
    header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    if odd := next((n for n, row in enumerate(rows, start=2) if len(row) != len(header)), None):
        raise ValueError(f"row {odd} does not have the {len(header)} columns of the first")
    _same_columns(header, columns, not rows)
    types = {column.name: column for column in columns}
    cells = zip(*rows, strict=True) if rows else ([] for _ in header)
    return pd.DataFrame(
        {name: _parsed(list(each), types[name]) for name, each in zip(header, cells, strict=True)}
    )


def _parsed(cells: list[str], column: _Column) -> list[Any]:
    if column.type in ("text", "tower", "kind"):
        return [files.from_text(cell) for cell in cells]
    is_null = [column.may_be_null and not cell for cell in cells]
    if column.type == "bool":
        known = {"True": True, "False": False}
        return [None if null else known[cell] for cell, null in zip(cells, is_null, strict=True)]
    if column.type in ("int", "grid", "place"):
        given = zip(cells, is_null, strict=True)
        return [None if null else int(_matching(_WHOLE, cell)) for cell, null in given]
    return [float(_matching(_NUMBER, cell)) if cell else math.nan for cell in cells]


def _matching(pattern: re.Pattern[str], cell: str) -> str:
    if not pattern.fullmatch(cell):
        raise ValueError(f"{shown(cell, 40)} is no number")
    return cell


def _same_columns(names: list[str], columns: list[_Column], is_empty: bool) -> None:
    expected = [column.name for column in columns]
    if names == expected or (is_empty and len(set(names)) == len(names) and set(names) <= set(expected)):
        return
    odd = sorted(set(names) ^ set(expected)) or names
    raise ValueError(f"other columns than {' '.join(expected[:3])} …: {shown(', '.join(odd), 80)}")


def _checked(frame: pd.DataFrame, columns: list[_Column], key: list[str]) -> pd.DataFrame:
    """The frame, if it has the columns and their values are of the types; raises ValueError."""
    _same_columns([str(name) for name in frame.columns], columns, frame.empty)
    if frame.empty:
        return frame.reindex(columns=[column.name for column in columns])
    for column in columns:
        if column.may_be_null and column.type in _WITH_NULLS:
            frame[column.name] = frame[column.name].astype(_WITH_NULLS[column.type])
        if odd := _odd_column(frame[column.name], column):
            raise ValueError(f"column {column.name}: {odd}")
    if key and frame.duplicated(key).any():
        raise ValueError(f"two rows of the same {', '.join(key)}")
    return frame


def _odd_column(values: pd.Series[Any], column: _Column) -> str | None:
    there = values[values.notna()]
    is_float = column.type in ("float", "share", "number")
    if len(there) < len(values) and not column.may_be_null and column.type != "number":
        return "lacks values"
    if column.type in ("text", "tower", "kind"):
        known = {"tower": TOWERS, "kind": KINDS}.get(column.type)
        for text in there.unique():
            if not isinstance(text, str) or len(text) > LONGEST:
                return "not text, or too long"
            if known and text not in known:
                return f"{shown(text, 40)} is none of {', '.join(known)}"
        return None
    kind = values.dtype.kind if len(there) or not is_float else "f"
    if kind not in ("b" if column.type == "bool" else "fiu" if is_float else "iu"):
        return f"not of type {column.type}"
    if column.type in ("float", "share") and there.astype(float).abs().max() > 1e100:
        return "not finite"
    whole = {"int": (0, 2**53), "grid": (0, GRID - 1), "place": (0, PLACES - 1)}
    low, high = {"share": (-1e-9, 1 + 1e-9), **whole}.get(column.type, (None, None))
    if low is not None and len(there) and (there.min() < low or there.max() > high):
        return f"{there.min()} to {there.max()} is not from {max(low, 0):g} to {high:.0f}"
    return None

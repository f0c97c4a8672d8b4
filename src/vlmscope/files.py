"""Files: the one way to read what somebody else may have made, and whole files or none on the way out.

Only regular files of a sensible size are read, never devices, pipes or what has no end. A file is written
under a temporary name, synced and renamed. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vlmscope.errors import DataError, ExampleError, StoreError, VlmscopeError

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

PICTURE = 384
"""Longest side, in pixels, of a stored example picture."""
LARGEST = 2**28
"""Bytes up to which a file that somebody names is read."""
LONGEST_NAME = 200
"""Bytes of a file's name: file systems end at 255, and what is written beside it has a longer one."""
_PLAIN_NAME = re.compile(r"[\w@+][\w .,@+()-]*(?<![ .])")
_FORMULA, _NUMBER = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def regular(
    file: str | os.PathLike[str],
    expected: str,
    error: type[VlmscopeError] = DataError,
    largest: float = math.inf,
) -> BinaryIO:
    """A regular file, opened for reading; raises `error`, with what was `expected`, for anything else.

    No pipe is waited for, and what has no end, or more than `largest` bytes, is not begun with.
    """
    try:
        # Without O_NONBLOCK a pipe that nobody writes to would be waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size <= largest:
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except (OSError, ValueError) as problem:  # a name with a NUL is a ValueError
        missing = isinstance(problem, FileNotFoundError)
        why = (
            "no such file" if missing else f"cannot be read ({getattr(problem, 'strerror', None) or problem})"
        )
    else:
        why = "a device or a pipe"
        if stat.S_ISDIR(status.st_mode):
            why = "a folder"
        elif stat.S_ISREG(status.st_mode):
            why = f"has {status.st_size / 2**20:,.0f} MiB, of which at most {largest / 2**20:,.0f} are read"
    raise error(f"{file}: {why}; expected {expected}")


def read(
    file: str | os.PathLike[str],
    expected: str,
    error: type[VlmscopeError] = DataError,
    largest: int = LARGEST,
) -> bytes:
    """The content of a regular file; raises as `regular` does."""
    try:
        with regular(file, expected, error, largest) as stream:
            content = stream.read(largest + 1)
    except OSError as problem:  # the system's own files, such as /proc/self/mem, and broken disks
        raise error(f"{file}: cannot be read ({problem.strerror}); expected {expected}") from problem
    if len(content) > largest:
        raise error(
            f"{file}: has more than the {largest / 2**20:,.0f} MiB that are read; expected {expected}"
        )
    return content


def save(
    folder: str | os.PathLike[str],
    manifest: str,
    about: Mapping[str, Any],
    files: Mapping[str, pd.DataFrame | str],
) -> None:
    """Write tables (`.parquet` or `.csv`) and texts, and last the JSON that says what the folder is."""
    path = Path(folder)
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)
        (path / manifest).unlink(missing_ok=True)
    for name, content in files.items():
        if isinstance(content, str):
            write(path / name, content.encode("utf-8"))
        elif name.endswith(".csv"):
            write(path / name, to_csv(content))
        else:
            buffer = io.BytesIO()
            content.to_parquet(buffer, index=False)
            write(path / name, buffer.getvalue())
    write_json(path / manifest, about)


def to_csv(table: pd.DataFrame) -> bytes:
    """A table as a CSV file that `from_csv` reads back, without what a spreadsheet would compute.

    A text that begins like a formula gets an apostrophe in front, as people type it; numbers are as they are.

    >>> import pandas
    >>> to_csv(pandas.DataFrame({"word": ["=1+1", "-2", "red"], "score": [-1, 2, 3]})).split()
    [b'word,score', b"'=1+1,-1", b'-2,2', b'red,3']
    """
    safe = _with(_as_text, table)
    text = safe.to_csv(index=False)
    if "\r" in text:  # which is quoted only where lines end with one, and would end the line
        text = safe.to_csv(index=False, lineterminator="\r\n")
    return text.encode("utf-8", "surrogatepass")


def from_csv(file: str | os.PathLike[str], **options: Any) -> pd.DataFrame:
    """A table that `to_csv` has made; `options` are those of `pandas.read_csv`."""
    import pandas as pd

    return _with(_from_text, pd.read_csv(file, **options))


def _with(change: Callable[[Any], Any], table: pd.DataFrame) -> pd.DataFrame:
    """A table with some of its texts changed, those of the header too."""
    texts = {}
    for name in table.select_dtypes(exclude=["number", "bool"]):
        cells = table[name].astype(object)
        # Others stay the objects that they are: pandas would make numbers of what looks like some.
        if at := [n for n, cell in enumerate(cells) if change(cell) is not cell]:
            cells.iloc[at] = [change(cells.iloc[n]) for n in at]
            texts[name] = cells.astype(table[name].dtype)
    return table.assign(**texts).rename(columns=change)


def _as_text(cell: Any) -> Any:
    """An apostrophe more before what begins like a formula, apostrophes aside, and is no number."""
    is_formula = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


def _from_text(cell: Any) -> Any:
    return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and _FORMULA.match(cell) else cell


def write(file: Path, content: bytes) -> None:
    """Write a whole file or nothing: readers never see half of one, a power cut included.

    Nothing but a file is replaced: no device, pipe or folder, and a link itself, not what it leads to.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    with storing(file):
        if file.exists() and not file.is_file():
            raise OSError("not a file")
        try:
            # What a killed process left goes, and so does a link to somewhere else.
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A lone surrogate (from an undecodable file name) becomes the JSON escape of itself.
    write(file, text.encode("utf-8", "backslashreplace"))


def read_json(file: Path, way_out: str) -> dict[str, Any]:
    """The JSON object in a file; raises `StoreError`, which ends with the way out, where there is none."""
    try:
        content = json.loads(read(file, f"a file that vlmscope wrote; {way_out}", StoreError))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file}: is damaged (not JSON); {way_out}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file}: is damaged (not a JSON object); {way_out}")
    return content


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; names on disk need not be.

    >>> is_text("café"), is_text("caf\\udce9")
    (True, False)
    """
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def is_plain_name(text: str) -> bool:
    """Whether a text is the name of a file or folder, on any system: no path, nothing hidden or odd.

    What data names becomes a name on disk only if it is one.

    >>> is_plain_name("COCO_val2014_000000000042"), is_plain_name("my data (2)")
    (True, True)
    >>> any(map(is_plain_name, ("", "..", "a/b", ".x", "-x", "x" * 300, "a\\nb")))
    False
    """
    return bool(_PLAIN_NAME.fullmatch(text)) and len(text.encode()) <= LONGEST_NAME


def is_temporary(path: Path) -> bool:
    """Whether a killed process has left this file."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the system says while something is written into a `StoreError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreError(
                f"{path}: the disk is full. What was written before is safe; "
                "free some space and run the same command again"
            ) from error
        raise StoreError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder's "
            "permissions or choose another --out"
        ) from error


def png(picture: Path | Image.Image) -> bytes:
    """A small copy of a picture; raises `ExampleError` for what is none."""
    from PIL import Image, ImageOps

    if not isinstance(picture, Image.Image):
        content = read(picture, "a picture", ExampleError)
        try:
            with Image.open(io.BytesIO(content)) as opened:
                return png(opened.copy())
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ExampleError(f"{picture}: not a picture that can be read ({error})") from error
    image = ImageOps.exif_transpose(picture).convert("RGB")
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

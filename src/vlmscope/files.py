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
import stat
from collections.abc import Iterator, Mapping
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
_FULL = (errno.ENOSPC, errno.EDQUOT)


def regular(
    file: str | os.PathLike[str],
    expected: str,
    error: type[VlmscopeError] = DataError,
    largest: float = math.inf,
    *,
    within: Path | None = None,
) -> BinaryIO:
    """A regular file, opened for reading; raises `error`, with what was `expected`, for anything else.

    No pipe is waited for, and what has no end, or more than `largest` bytes, is not begun with. With
    `within`, a folder that the file lies in, no link is followed on the way from there.
    """
    try:
        descriptor = _descriptor(file, within)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size <= largest:
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except (OSError, ValueError) as problem:  # a name with a NUL is a ValueError
        missing = isinstance(problem, FileNotFoundError)
        if within is not None and getattr(problem, "errno", None) in (errno.ELOOP, errno.ENOTDIR):
            problem = ValueError("a link, and none is followed there")
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
    *,
    within: Path | None = None,
) -> bytes:
    """The content of a regular file; raises as `regular` does."""
    with regular(file, expected, error, largest, within=within) as stream:
        return stream.read(largest)


def _descriptor(file: str | os.PathLike[str], within: Path | None) -> int:
    # Without O_NONBLOCK a pipe that nobody writes to would be waited for.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    if within is None:
        return os.open(file, flags)
    *parents, name = Path(file).relative_to(within).parts
    if ".." in (*parents, name):
        raise ValueError("outside of the folder")
    folder = os.open(within, flags | os.O_DIRECTORY)
    try:
        for parent in parents:
            inner = os.open(parent, flags | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


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
            write(path / name, content.to_csv(index=False).encode("utf-8", "surrogatepass"))
        else:
            buffer = io.BytesIO()
            content.to_parquet(buffer, index=False)
            write(path / name, buffer.getvalue())
    write_json(path / manifest, about)


def write(file: Path, content: bytes) -> None:
    """Write a whole file or nothing: readers never see half of one, a power cut included."""
    temporary = file.with_name(f".{file.name}.tmp")
    with storing(file):
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
        try:
            with Image.open(picture) as opened:
                return png(opened.copy())
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ExampleError(f"{picture}: not a picture that can be read ({error})") from error
    image = ImageOps.exif_transpose(picture).convert("RGB")
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

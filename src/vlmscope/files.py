"""Files: the one way to read what somebody else may have made, and whole files or none on the way out.

Only regular files of a sensible size are read, never devices, pipes or what has no end. A file is written
under a temporary name, synced and renamed. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from vlmscope.errors import DataError, ExampleError, StoreError, VlmscopeError, shown

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

PICTURE = 384
"""Longest side, in pixels, of a stored example picture."""
LARGEST = 2**28
"""Bytes up to which a file that somebody names is read."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAIT = 10.0
"""Seconds for which a writer waits for another one in the same folder."""


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
        return stream.read(os.fstat(stream.fileno()).st_size)  # room is made for as many as are asked for


def claim(folder: str | os.PathLike[str], manifest: str, kind: str, names: Iterable[str]) -> set[str]:
    """Refuse, before anything is computed, a folder in which `save` could not write these names.

    Whatever is there under one of them has to be listed in a manifest of the same kind (its `format`): then
    vlmscope made it. Gives the names that are listed; raises `StoreError`.
    """
    path, ours = Path(folder), set[str]()
    if (path / manifest).exists():
        about = read_json(path / manifest, "choose another --out or delete the folder")
        there = about.get("format") or about.get("what")  # `what` is that of neurons
        if there != kind:
            raise StoreError(
                f"{path}: holds {shown(there)}, where {kind} is to be written; choose another "
                "--out or delete the folder"
            )
        listed = about.get("files")
        ours = {str(name) for name in listed if _is_inside(str(name))} if isinstance(listed, list) else ours
    for name in names:
        file = path / name
        mine = not file.is_dir() if name in ours else any(one.startswith(f"{name}/") for one in ours)
        if not mine and os.path.lexists(file):
            raise StoreError(f"{file}: is there, and no result of this command; choose another --out")
    try_place(path)
    return ours


def claim_file(file: Path) -> None:
    """Refuse, before anything is computed, what is no file, or could not be written."""
    if file.exists() and not file.is_file():
        what = "a folder" if file.is_dir() else "a device or a pipe"
        raise StoreError(f"{file}: is {what}; name a file")
    try_place(file.parent)


def try_place(folder: Path) -> None:
    """Write a nameless file into a folder, or into the nearest above it that is there, to see if one can."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    with storing(there):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"0")


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
    content: Mapping[str, pd.DataFrame | str | bytes | Path],
) -> None:
    """Write files that belong together, all or none, and the JSON that says what they are and lists them.

    `content` are tables (`.parquet` or `.csv`), texts, bytes, and files that lie on the same disk, which are
    moved. All is written under temporary names first. Then the old manifest becomes one that says
    `unfinished`, all is renamed, what the old one listed is removed, and the new manifest comes last. So a
    failure changes nothing; behind a kill among the renames readers refuse the folder, and the same command
    mends it. Raises `StoreError`, as `claim` does.
    """
    path = Path(folder)
    pairs: list[tuple[Path, Path]] = []
    with _folders(path, content), storing(path), locked(path):
        ours = claim(path, manifest, str(about.get("format") or about.get("what")), content) | {*content}
        begun = {**about, "files": sorted(ours), "unfinished": True}
        whole = {**about, "files": sorted(content)}
        try:
            pairs.append((_put(path / f"{manifest}.begun", _json(begun)), path / manifest))
            for name, one in content.items():
                made = one if isinstance(one, Path) else _put(path / name, _bytes(name, one))
                pairs.append((made, path / name))
            pairs.append((_put(path / manifest, _json(whole)), path / manifest))
            for temporary, file in pairs[:-1]:
                temporary.replace(file)
            for name in ours - {*content}:
                (path / name).unlink(missing_ok=True)
            for place in {file.parent for _, file in pairs}:
                _sync(place)
            temporary, file = pairs[-1]
            temporary.replace(file)
            _sync(path)
        except BaseException:
            for temporary, _ in pairs:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            raise


@contextlib.contextmanager
def _folders(path: Path, names: Iterable[str]) -> Iterator[None]:
    """The folders of files below `path`; those that were not there before are removed again on failure."""
    places = {path, *((path / name).parent for name in names)}
    new = sorted({p for place in places for p in (place, *place.parents) if not os.path.lexists(p)})
    try:
        with storing(path):
            for place in new:
                place.mkdir(exist_ok=True)
        yield
    except BaseException:
        for place in reversed(new):
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def write(file: Path, content: bytes, ends: Path | None = None) -> None:
    """Write a whole file or nothing: readers never see half of one, a power cut included.

    `ends` is a file that is no longer true then; it is removed right before.
    """
    if file.exists() and not file.is_file():
        raise StoreError(f"{file}: is no file; choose another --out")
    with storing(file), locked(file.parent):
        temporary = _put(file, content)
        try:
            if ends is not None:
                ends.unlink(missing_ok=True)
            temporary.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync(file.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while something is written into it; the system lets go when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    text = f"{folder}: another process is writing there; wait for it or choose another --out"
                    raise StoreError(text) from None
                time.sleep(0.01)
                continue
            except OSError:
                pass  # a network file system without locks: better to write than to refuse
            break
        yield
    finally:
        os.close(descriptor)


def _put(file: Path, content: bytes) -> Path:
    """Write and sync a temporary beside a file, for a rename; none is left behind a failure."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        # What a killed process left goes, and so does a link to somewhere else.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _bytes(name: str, content: pd.DataFrame | str | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode("utf-8")
    if name.endswith(".csv"):
        return content.to_csv(index=False).encode("utf-8", "surrogatepass")
    buffer = io.BytesIO()
    content.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _json(content: Mapping[str, Any]) -> bytes:
    # A lone surrogate (from an undecodable file name) becomes the JSON escape of itself.
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _is_inside(name: str) -> bool:
    """Whether a name from a manifest stays below its folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def write_json(file: Path, content: Mapping[str, Any], ends: Path | None = None) -> None:
    """`write` a JSON object."""
    write(file, _json(content), ends)


def read_json(file: Path, way_out: str) -> dict[str, Any]:
    """The JSON object in a file; raises `StoreError`, which ends with the way out, where there is none."""
    try:
        content = json.loads(read(file, f"a file that vlmscope wrote; {way_out}", StoreError))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file}: is damaged (not JSON); {way_out}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file}: is damaged (not a JSON object); {way_out}")
    return content


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

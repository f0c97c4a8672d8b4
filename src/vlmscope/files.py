"""Files: the one way to read what somebody else may have made, and whole files or none on the way out.

Only regular files of a sensible size are read, never devices, pipes or what has no end. A file is written
under a temporary name, synced and renamed. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vlmscope.errors import DataError, StoreError, VlmscopeError, shown

if TYPE_CHECKING:
    import pandas as pd

try:
    import fcntl
except ImportError:  # on Windows, where folders cannot be locked
    fcntl = None  # type: ignore[assignment]

LARGEST = 2**28
"""Bytes up to which a file that somebody names is read."""
LONGEST_NAME = 200
"""Bytes of a file's name: file systems end at 255, and what is written beside it has a longer one."""
_PLAIN_NAME = re.compile(r"[\w@+][\w .,@+()-]*(?<![ .])")
_FORMULA, _NUMBER = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAIT = 10.0  # seconds for another writer


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
    try:
        with regular(file, expected, error, largest, within=within) as stream:
            content = stream.read((os.fstat(stream.fileno()).st_size or largest) + 1)
    except OSError as problem:  # the system's own files, such as /proc/self/mem, and broken disks
        raise error(f"{file}: cannot be read ({problem.strerror}); expected {expected}") from problem
    if len(content) > largest:
        most = f"{largest / 2**20:,.0f} MiB"
        raise error(f"{file}: has more than the {most} that are read; expected {expected}")
    return content


def claim(
    folder: str | os.PathLike[str], manifest: str, kind: str, names: Iterable[str]
) -> Mapping[str, Any]:
    """Refuse, before anything is computed, a folder in which `save` could not write these names.

    Whatever is there under one of them has to be listed in a manifest of the same kind (its `format` or
    `what`): then vlmscope made it. Gives that manifest, empty where there is none; raises `StoreError`.
    """
    path, about = Path(folder), dict[str, Any]()
    if os.path.lexists(path / manifest):
        about = read_json(path / manifest, "choose another --out or delete the folder")
        if _kind(about) != kind:
            text = f"{path}: holds {shown(_kind(about))}, where {kind} is to be written"
            raise StoreError(f"{text}; choose another --out or delete the folder")
    ours = listed(path, about)
    for name in names:
        file = path / name
        if (name not in ours and os.path.lexists(file)) or not _is_inside(path, name):
            raise StoreError(f"{file}: is there, and no result of this command; choose another --out")
    try_place(path)
    return about


def claim_file(file: Path) -> None:
    """Refuse, before anything is computed, what is no file, or could not be written."""
    if file.exists() and not file.is_file():
        raise StoreError(f"{file}: is a folder, a device or a pipe; name a file")
    try_place(file.parent)


def is_kept(file: Path, content: Callable[[], bytes]) -> bool:
    """Whether a file is there as it would be written; raises `StoreError` if it is there and is not."""
    if not os.path.lexists(file):
        return False
    if not file.is_file() or file.read_bytes() != content():
        raise StoreError(f"{file}: is there, with other content; delete it or choose another --out")
    return True


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
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
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
    """Write files that belong together, all or none, and the JSON that says what they are.

    Its `files` has the SHA-256 of each by its name. `content` are tables (`.parquet` or `.csv`), texts,
    bytes, and files on the same disk, which are moved; any name may be of a file in a folder below. All is
    written under temporary names first. Then the old manifest becomes one that says `unfinished`, all is
    renamed, what the old one listed goes, and the new manifest comes last. So a failure changes nothing;
    behind a kill among the renames readers refuse the folder, and the same command mends it.
    """
    path, pairs, digests = Path(folder), list[tuple[Path, Path]](), dict[str, str]()
    with _folders(path, [*content, manifest]), storing(path), locked(path), _undone(pairs):
        ours = listed(path, claim(path, manifest, _kind(about), content)) | {*content}
        begun = {**about, "files": dict.fromkeys(sorted(ours), ""), "unfinished": True}
        pairs.append((_put(path / f"{manifest}.begun", _json(begun)), path / manifest))
        for name, one in sorted(content.items()):
            made = one if isinstance(one, Path) else _put(path / name, _bytes(name, one))
            pairs.append((made, path / name))
            _sync(made)
            with made.open("rb") as stream:
                digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
        pairs.append((_put(path / manifest, _json({**about, "files": digests})), path / manifest))
        with _uninterrupted():
            for temporary, file in pairs[:-1]:
                temporary.replace(file)
            for name in ours - {*content}:
                if not (path / name).is_dir():
                    (path / name).unlink(missing_ok=True)
            for place in {file.parent for _, file in pairs}:
                _sync(place)
            pairs[-1][0].replace(pairs[-1][1])
            _sync(path)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the few renames in here, so that they are all made or none."""
    mask = getattr(signal, "pthread_sigmask", None)  # which Windows lacks
    before = mask(signal.SIG_BLOCK, [signal.SIGINT]) if mask else ()
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """An empty folder on the same disk, for what somebody else's code writes before `save` moves it."""
    folder = folder.absolute()  # so that it has a name, be it the current one
    place = folder.with_name(f".{folder.name}.tmp")
    with _folders(folder.parent, ()), storing(folder):
        place.mkdir(exist_ok=True)
        with locked(place):
            try:
                for left in place.iterdir():  # by a process that was killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)


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


def to_csv(table: pd.DataFrame) -> bytes:
    """A table as a CSV file without what a spreadsheet would compute.

    A text that begins like a formula gets an apostrophe in front, as people type it; numbers are as they are.

    >>> import pandas
    >>> to_csv(pandas.DataFrame({"word": ["=1+1", "-2", "red"], "score": [-1, 2, 3]})).split()
    [b'word,score', b"'=1+1,-1", b'-2,2', b'red,3']
    """
    safe = table.rename(columns=_as_text)
    for name in safe.select_dtypes(exclude=["number", "bool"]):
        cells = safe[name].astype(object)
        # Others stay the objects that they are: pandas would make numbers of what looks like some.
        if at := [n for n, cell in enumerate(cells) if _as_text(cell) is not cell]:
            cells.iloc[at] = [_as_text(cells.iloc[n]) for n in at]
            safe = safe.assign(**{name: cells})
    text = safe.to_csv(index=False)
    if "\r" in text:  # which is quoted only where lines end with one, and would end the line
        text = safe.to_csv(index=False, lineterminator="\r\n")
    return text.encode("utf-8", "surrogatepass")


def _as_text(cell: Any) -> Any:
    """An apostrophe more before what begins like a formula, apostrophes aside, and is no number."""
    is_formula = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


def from_text(cell: Any) -> Any:
    """The text that `to_csv` has written as a cell."""
    return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and _FORMULA.match(cell) else cell


def write(file: Path, content: bytes | Path, ends: Path | None = None) -> None:
    """Write a whole file or nothing: readers never see half of one, a power cut included.

    `content` may be a file on the same disk, which is moved; `ends`, no longer true then, is removed before.
    """
    if file.exists() and not file.is_file():
        raise StoreError(f"{file}: is no file; choose another --out")
    with _folders(file.parent, ()), storing(file), locked(file.parent):
        temporary = content if isinstance(content, Path) else _put(file, content)
        with _undone([(temporary, file)]):
            if ends is not None:
                ends.unlink(missing_ok=True)
            temporary.replace(file)
        _sync(file.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder while something is written into it; the system lets go when the process ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + _WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    text = f"{folder}: another process is writing there; wait for it or choose another --out"
                    raise StoreError(text) from None
                time.sleep(0.01)
            except OSError:
                break  # a network file system without locks: better to write than to refuse
        yield
    finally:
        os.close(descriptor)


def _put(file: Path, content: bytes) -> Path:
    """Write and sync a temporary beside a file, for a rename; none is left behind a failure."""
    temporary = file.with_name(f".{file.name}.tmp")
    with _undone([(temporary, file)]):
        # What a killed process left goes, and so does a link to somewhere else.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    return temporary


@contextlib.contextmanager
def _undone(pairs: Sequence[tuple[Path, Path]]) -> Iterator[None]:
    """Remove the temporaries, the first of each pair, if something fails."""
    try:
        yield
    except BaseException:
        for temporary, _ in pairs:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(path, os.O_RDONLY)
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
        return to_csv(content)
    buffer = io.BytesIO()
    content.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _json(content: Mapping[str, Any]) -> bytes:
    # A lone surrogate (from an undecodable file name) becomes the JSON escape of itself.
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _kind(about: Mapping[str, Any]) -> str:
    return str(about.get("format") or about.get("what"))


def listed(folder: Path, about: Mapping[str, Any]) -> set[str]:
    """The names that a manifest lists, of files below its folder."""
    names = about["files"] if isinstance(about.get("files"), dict) else ()
    return {name for name in names if _is_inside(folder, name)}


def _is_inside(folder: Path, name: str) -> bool:
    """Whether the file of a name lies below a folder, where no link leads elsewhere."""
    parent, real = (folder / name).parent, os.path.realpath  # Path.resolve raises where links go round
    return ".." not in parent.parts[len(folder.parts) :] and Path(real(parent)).is_relative_to(real(folder))


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


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8; names on disk need not be.

    >>> is_text("café"), is_text("caf\\udce9")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        text = "the disk is full. What was written before is safe; free some space and run the command again"
        if error.errno not in _FULL:
            why = error.strerror or error
            text = f"cannot be written ({why}); check the folder's permissions or choose another --out"
        raise StoreError(f"{path}: {text}") from error

"""Results on disk: a run is a folder of Parquet parts that can be continued after a crash.

    run.json                      the specification, written first
    effects/part-000000.parquet   a row per patch
    baselines/part-000000.parquet a row per example; its presence commits the effects part
    examples/0003.json, *.png     a few examples, to look at
    done.json                     counts, written last

Every file is written under a temporary name, synced and renamed, so a reader sees whole files
only. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmscope.errors import ExampleError, StoreError

if TYPE_CHECKING:
    from PIL import Image

try:
    import fcntl
except ImportError:  # Windows has no flock; there two processes are not kept apart
    fcntl = None  # type: ignore[assignment]


def _schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    """A name that ends in `?` is a column that may be null."""
    return pa.schema([pa.field(c.removesuffix("?"), t, nullable=c.endswith("?")) for c, t in columns.items()])


EFFECTS = _schema(
    {
        "example": pa.string(),
        "corruption": pa.string(),
        "site": pa.string(),
        "tower": pa.string(),
        "layer": pa.int32(),
        "kind": pa.string(),
        "unit?": pa.string(),
        "position?": pa.int32(),
        "token?": pa.string(),
        "role?": pa.string(),
        "slot": pa.string(),
        "p_patched": pa.float64(),
        "p_restored": pa.float64(),
        "logit_diff": pa.float64(),
        "effect?": pa.float64(),
    }
)
"""The columns of `effects`: a row per patch."""

BASELINES = _schema(
    {
        "example": pa.string(),
        "corruption": pa.string(),
        "p_clean?": pa.float64(),
        "p_corrupt?": pa.float64(),
        "ld_clean?": pa.float64(),
        "ld_corrupt?": pa.float64(),
        "answer_token?": pa.string(),
        "foil_token?": pa.string(),
        "predicted?": pa.string(),
        "correct?": pa.bool_(),
        "excluded": pa.bool_(),
        "reason?": pa.string(),
    }
)
"""The columns of `baselines`: a row per example."""

FORMAT = "vlmscope-run-2"
ROWS, SECONDS = 100_000, 10.0
"""A part is written when this many rows wait, or when so much time has passed since the last."""

PICTURE = 384
"""Longest side, in pixels, of a stored example picture."""

_INDEX = b"vlmscope.index"
_PART = re.compile(r"part-(\d{6,})\.parquet")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIELDS = ("id", "clean_prompt", "corrupt_prompt", "answer", "foil")


# --- writing ---------------------------------------------------------------------------------


def open_run(
    path: str | os.PathLike[str], spec: Mapping[str, Any], description: Mapping[str, Any] | None = None
) -> Writer:
    """Create the run folder `path`, or continue the one that is there.

    A folder is continued only if its `run.json` holds the same `spec`. `description` is kept
    beside it and not compared. Both must be JSON.

    Raises `StoreError` if another specification, something that is no run, or another process
    is there.
    """
    folder = Path(path)
    spec = dict(json.loads(json.dumps(spec)))
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file; a run needs a folder. Choose another --out")
    with _storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / "run.json"
        if not manifest.exists() and any(_is_foreign(p) for p in folder.iterdir()):
            raise StoreError(f"{folder}: not empty, and not a run folder (no run.json). Choose another --out")
        lock = _lock(folder)
    try:
        if manifest.exists():
            _same_spec(folder, _manifest(folder)["spec"], spec)
        else:
            content = {"format": FORMAT, "spec": spec, "description": dict(description or {})}
            _write_json(manifest, content)
        return Writer(folder, lock)
    except BaseException:
        os.close(lock)
        raise


class Writer:
    """Adds examples to a run. Made by `open_run`; a context manager.

    `done` holds the indices of the examples that are safe on disk. What was added is written
    from time to time, at `flush`, at `finish`, and when the `with` block is left, also by an
    exception.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.done: set[int] = set()
        self._lock = lock
        self._waiting: dict[int, tuple[pa.Table, pa.Table]] = {}
        self._written = time.monotonic()
        with _storing(path):
            for name in ("effects", "baselines"):
                (path / name).mkdir(exist_ok=True)
            _sweep_up(path)
        parts = _parts(path)
        for part in parts:
            _footer(part, "effects")
            self.done.update(index for index, _ in _footer(part, "baselines"))
        self._next = 1 + max((int(_PART.fullmatch(p.name)[1]) for p in parts), default=-1)  # type: ignore[index]

    def add(self, index: int, effects: pd.DataFrame, baselines: pd.DataFrame) -> None:
        """Take the rows of example number `index`; both tables need exactly the columns of
        `EFFECTS` and `BASELINES` (an empty frame stands for no rows)."""
        if index in self.done or index in self._waiting:
            raise ValueError(f"example {index} is already in {self.path}")
        self._waiting[index] = (_table(effects, EFFECTS), _table(baselines, BASELINES))
        rows = sum(e.num_rows for e, _ in self._waiting.values())
        if rows >= ROWS or time.monotonic() - self._written > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one part. The effects go first; the baselines commit them."""
        if self._waiting:
            name = f"part-{self._next:06d}.parquet"
            effects, baselines = self.path / "effects" / name, self.path / "baselines" / name
            with _storing(self.path):
                (self.path / "done.json").unlink(missing_ok=True)
            _write(effects, _parquet({i: e for i, (e, _) in self._waiting.items()}))
            try:
                _write(baselines, _parquet({i: b for i, (_, b) in self._waiting.items()}))
            except StoreError:
                effects.unlink(missing_ok=True)
                raise
            self.done.update(self._waiting)
            self._waiting.clear()
            self._next += 1
        self._written = time.monotonic()

    def finish(self) -> None:
        """Write what waits, and mark the run as finished."""
        self.flush()
        run = read_run(self.path)
        baselines = run.baselines()
        counts = {
            "examples": len(self.done),
            "excluded": int(baselines["excluded"].sum()),
            "baselines": len(baselines),
            "effects": run.patches(),
        }
        _write_json(self.path / "done.json", counts)

    def add_pictures(self, index: int, example: Mapping[str, Any]) -> None:
        """Keep a small copy of example number `index` for the report.

        `example` has the fields of `Example` (so `vars(example)` will do): `id`, `clean_image`,
        `corrupt_image`, `clean_prompt`, `corrupt_prompt`, `answer`, `foil`; what is missing or
        None is left out. Raises `ExampleError` if a picture cannot be read.
        """
        folder = self.path / "examples"
        with _storing(folder):
            folder.mkdir(exist_ok=True)
        for name in ("clean", "corrupt"):
            picture = example.get(f"{name}_image")
            if picture is not None:
                _write(folder / f"{index:04d}-{name}.png", _png(picture))
        words = {k: str(example[k]) for k in _FIELDS if example.get(k) is not None}
        _write_json(folder / f"{index:04d}.json", words)

    def close(self) -> None:
        """Let go of the folder, without writing what waits."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            # After a StoreError the disk would refuse again: what waits is computed anew.
            if not isinstance(error, StoreError):
                self.flush()
        except StoreError as second:
            if error is None:
                raise
            error.add_note(f"and what was computed last could not be stored: {second}")
        finally:
            self.close()


# --- reading ---------------------------------------------------------------------------------


class Run:
    """A run folder, read. Made by `read_run`; works while a run is not finished, too."""

    def __init__(self, path: Path, spec: dict[str, Any], description: dict[str, Any]) -> None:
        self.path = path
        self.spec = spec
        self.description = description

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "done.json").exists()

    def effects(self, where: pc.Expression | None = None) -> pd.DataFrame:
        """The table of patches (columns as in `EFFECTS`), in the order of the examples.

        `where` keeps the rows of which it is true, such as `pc.field("tower") == "encoder"`; only
        those are ever held in memory together.
        """
        return _read(self.path, "effects", EFFECTS, where)

    def baselines(self) -> pd.DataFrame:
        """The table of examples (columns as in `BASELINES`), in their order."""
        return _read(self.path, "baselines", BASELINES)

    def patches(self) -> int:
        """How many patches there are."""
        return sum(_rows(part, "effects") for part in _parts(self.path))

    def ran(self) -> int:
        """How many examples were patched."""
        return int((~self.baselines()["excluded"]).sum())

    def pictures(self) -> list[dict[str, Any]]:
        """The examples kept to look at: `index`, the words that `Writer.add_pictures` was given,
        and `clean_image`, `corrupt_image` as paths, or None where there is no picture."""
        found = []
        for file in sorted((self.path / "examples").glob("[0-9]*.json")):
            words = _json(file, "delete that file; it is only there to be looked at")
            images = {
                f"{n}_image": p if (p := file.with_name(f"{file.stem}-{n}.png")).exists() else None
                for n in ("clean", "corrupt")
            }
            found.append({"index": int(file.stem), **words, **images})
        return sorted(found, key=lambda example: example["index"])


def read_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder for reading; raises `StoreError` if it is none."""
    folder = Path(path)
    if not folder.exists():
        raise StoreError(f"{folder}: no such folder; expected a run, as 'vlmscope sweep' writes one")
    if not (folder / "run.json").is_file():
        raise StoreError(f"{folder}: not a run folder (no run.json in it)")
    manifest = _manifest(folder)
    return Run(folder, manifest["spec"], manifest.get("description") or {})


def _read(folder: Path, name: str, schema: pa.Schema, where: pc.Expression | None = None) -> pd.DataFrame:
    pieces: list[tuple[int, pa.Table]] = []
    for part in _parts(folder):
        file = folder / name / part.name
        sizes = _footer(part, name)
        with _reading(file, part):
            table = pq.read_table(pa.BufferReader(file.read_bytes()), page_checksum_verification=True)
            if table.schema.names != schema.names or table.num_rows != sum(n for _, n in sizes):
                raise ValueError("not the columns or rows that were written")
        start = 0
        for index, rows in sizes:
            piece = table.slice(start, rows)
            pieces.append((index, piece if where is None else piece.filter(where)))
            start += rows
    pieces.sort(key=lambda piece: piece[0])
    plain = schema.remove_metadata()
    tables = [t.replace_schema_metadata(None).cast(plain) for _, t in pieces]
    return _frame(pa.concat_tables([plain.empty_table(), *tables]))


def typed(frame: pd.DataFrame, schema: pa.Schema) -> pd.DataFrame:
    """A table in memory with the columns and types that one read from a run folder has."""
    return _frame(_table(frame, schema))


def bytes_of(effects: pd.DataFrame) -> int:
    """How many bytes a table of patches takes on disk."""
    return len(_parquet({0: _table(effects, EFFECTS)}))


def _frame(table: pa.Table) -> pd.DataFrame:
    # Whole numbers and truths that may be null stay what they are.
    types = {"position": "Int32", "correct": "boolean"}
    return table.to_pandas().astype({k: t for k, t in types.items() if k in table.schema.names})


def _parts(folder: Path) -> list[Path]:
    """The baselines parts, which are the committed ones, in the order they were written."""
    found = [p for p in (folder / "baselines").glob("part-*.parquet") if _PART.fullmatch(p.name)]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def _footer(part: Path, name: str) -> list[tuple[int, int]]:
    """The examples in a part, with the number of rows of each: `(index, rows)`."""
    file = part.parent.parent / name / part.name
    with _reading(file, part):
        metadata = pq.read_schema(file).metadata or {}
        return [(int(index), int(rows)) for index, rows in json.loads(metadata[_INDEX])]


def _rows(part: Path, name: str) -> int:
    return sum(rows for _, rows in _footer(part, name))


@contextlib.contextmanager
def _reading(file: Path, part: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        raise StoreError(
            f"{file}: this part {what}. Delete {part} and run the same command again: "
            "the examples in it are computed anew"
        ) from error


# --- run.json --------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    way_out = "choose another --out or delete the folder"
    content = _json(file, way_out)
    if content.get("format") != FORMAT:
        raise StoreError(
            f"{file}: format {content.get('format')!r}, this version reads {FORMAT!r}; "
            "use the version of vlmscope that wrote it"
        )
    if not isinstance(content.get("spec"), dict):
        raise StoreError(f"{file}: is damaged (no spec in it); {way_out}")
    return content


def _json(file: Path, way_out: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror}); {way_out}") from error
    except ValueError as error:
        raise StoreError(f"{file}: is damaged (not JSON); {way_out}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file}: is damaged (not a JSON object); {way_out}")
    return content


def _same_spec(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    old, new = dict(_flat(there)), dict(_flat(here))
    differ = [k for k in {**old, **new} if old.get(k, "absent") != new.get(k, "absent")]
    if differ:
        lines = "; ".join(
            f"{k} is {_short(old.get(k, 'absent'))} there, {_short(new.get(k, 'absent'))} here"
            for k in differ[:6]
        )
        more = f"; and {len(differ) - 6} more" if len(differ) > 6 else ""
        raise StoreError(
            f"{folder}: holds another run: {lines}{more}. Choose another --out or delete the folder"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(inner, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}"


# --- files -----------------------------------------------------------------------------------


def _table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    if frame.empty and not len(frame.columns):
        return schema.empty_table()
    if set(frame.columns) != set(schema.names):
        odd = sorted(set(frame.columns) ^ set(schema.names))
        raise ValueError(f"wrong columns {odd}; expected {schema.names}")
    columns = []
    for field in schema:
        # A NaN in a required number is what the model said, and stays one.
        is_null = field.nullable or not pa.types.is_floating(field.type)
        column = pa.array(frame[field.name], type=field.type, from_pandas=is_null)
        if column.null_count and not field.nullable:
            raise ValueError(f"column '{field.name}' lacks {column.null_count} values")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _parquet(tables: Mapping[int, pa.Table]) -> bytes:
    sizes = [[index, table.num_rows] for index, table in tables.items()]
    whole = pa.concat_tables(tables.values())
    whole = whole.replace_schema_metadata({_INDEX: json.dumps(sizes).encode()})
    buffer = io.BytesIO()
    pq.write_table(whole, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def _png(picture: Path | Image.Image) -> bytes:
    from PIL import Image, ImageOps

    if not isinstance(picture, Image.Image):
        try:
            with Image.open(picture) as opened:
                return _png(opened.copy())
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ExampleError(f"{picture}: not a picture that can be read ({error})") from error
    image = ImageOps.exif_transpose(picture).convert("RGB")
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A lone surrogate (from an undecodable file name) becomes the JSON escape of itself.
    _write(file, text.encode("utf-8", "backslashreplace"))


def _write(file: Path, content: bytes) -> None:
    """Write a whole file or nothing: readers never see half of one, a power cut included."""
    temporary = file.with_name(f".{file.name}.tmp")
    with _storing(file):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
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


def _is_foreign(path: Path) -> bool:
    return not (path.name == ".lock" or _is_temporary(path))


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _sweep_up(folder: Path) -> None:
    """Remove what a killed run left: temporary files, and effects that no baselines commit."""
    committed = {p.name for p in _parts(folder)}
    for where in (folder, folder / "effects", folder / "baselines", folder / "examples"):
        _remove(where, _is_temporary)
    _remove(folder / "effects", lambda p: bool(_PART.fullmatch(p.name)) and p.name not in committed)


def _remove(folder: Path, which: Callable[[Path], bool]) -> None:
    paths: Iterable[Path] = folder.iterdir() if folder.is_dir() else ()
    for path in [p for p in paths if which(p)]:
        path.unlink()


def _lock(folder: Path) -> int:
    """Hold the folder for this process; the system lets go when the process ends, however."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(
            f"{folder}: another process is writing to this run; wait for it or choose another --out"
        ) from None
    except OSError:
        pass  # a network file system without locks: better to run than to refuse
    return descriptor

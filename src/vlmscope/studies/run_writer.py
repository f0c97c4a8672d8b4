"""Writing a run folder: what is committed is safe, what is not is computed again, and more can be added.

Every file is written whole (`files`); the rows of a part go first, and its baselines commit them. One process
holds the folder and commits (`Writer`); others may make parts for it (`Waiting`), beside what is there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pandas as pd
import pyarrow as pa
from filelock import FileLock, Timeout

from vlmscope import files
from vlmscope.data.images import small_png
from vlmscope.errors import StoreError
from vlmscope.files import is_temporary, storing, write_json
from vlmscope.studies.run_folder import (
    BASELINES,
    FORMAT,
    PART,
    TABLES,
    Held,
    columns_of,
    held_in,
    parquet,
    parts_of,
    read_manifest,
    read_run,
    table_in,
    table_of,
)

GROWS = ("sites", "n_examples", "data_hash")
"""What of a specification may become more when a folder is continued; all else has to be the same."""
ROWS, SECONDS = 100_000, 10.0
"""A part is written when this many rows wait, or when so much time has passed since the last.

The first example is written at once and the time grows from there, twofold each, so that a run that is killed
again and again gets on, and a long one has few parts."""

_FIELDS = ("id", "clean_prompt", "corrupt_prompt", "answer", "foil")


def open_run(
    path: str | os.PathLike[str],
    spec: Mapping[str, Any],
    description: Mapping[str, Any] | None = None,
    *,
    digests: Sequence[str] = (),
    same: Callable[[], object] | None = None,
) -> Writer:
    """Create the run folder `path`, or continue the one that is there.

    A folder is continued if its `run.json` holds the same `spec`, but for what can grow (`GROWS`): site
    expressions are added to those that are there, and the examples with these `digests` begin with those
    that are there; where another process knows these, `same` asks it, as `check_examples` does. `description`
    is kept beside it and not compared. All must be JSON.

    Raises `StoreError` if another specification, other examples, something that is no run, or another
    process is there.
    """
    folder = Path(path)
    spec = dict(json.loads(json.dumps(spec)))
    claim(folder)
    manifest = folder / "run.json"
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold(folder, str(folder))
    try:
        content = {"format": FORMAT, "spec": spec, "description": dict(description or {}), "check": None}
        if manifest.exists():
            there = read_manifest(folder)
            content = there | {"spec": _grown(folder, there["spec"], spec)}
            (same or partial(check_examples, folder, digests))()
            writer = Writer(folder, content, lock, digests)
            if content == there:
                return writer
        write_json(manifest, content, ends=folder / "done.json")
        return Writer(folder, content, lock, digests)
    except BaseException:
        lock.release()
        raise


def claim(folder: Path) -> None:
    """Refuse, before anything is computed, a folder that is no run and not empty, or cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file; a run needs a folder. Choose another --out")
    with storing(folder):
        if folder.exists() and not (folder / "run.json").exists() and any(map(_is_foreign, folder.iterdir())):
            raise StoreError(f"{folder}: not empty, and not a run folder (no run.json). Choose another --out")
    files.try_place(folder)


def check_examples(folder: Path, digests: Sequence[str]) -> None:
    """Refuse a run folder that holds other examples than those with these digests."""
    held = {(one.number, one.digest) for part in parts_of(folder) for one in held_in(part, "baselines")}
    for number, digest in sorted(held):
        if number < len(digests) and digest != digests[number]:
            raise StoreError(
                f"{folder}: holds other examples: number {number} is not the same there and here. "
                "More can follow those that are there; for others choose another --out or delete the folder"
            )


class Todo(NamedTuple):
    """An example's number, the site expressions at which it is to be patched, and those that are done."""

    number: int
    sites: list[str]
    done: list[str]


class Part(NamedTuple):
    """Rows of some examples and their baselines, as they are written: bytes, or files of these beside."""

    held: list[Held]
    rows: bytes | Path
    baselines: bytes | Path


class Waiting:
    """Examples that wait until it is time to write them as one part."""

    def __init__(self, spec: Mapping[str, Any], sites: Sequence[str], digests: Sequence[str] = ()) -> None:
        self.sites, self._digests = sites, digests
        self._columns = columns_of(spec)
        self._examples: list[tuple[Held, pa.Table, pa.Table]] = []
        self._written, self._wait = time.monotonic(), 0.0

    def add(self, index: int, rows: pd.DataFrame, baselines: pd.DataFrame, sites: Sequence[str]) -> None:
        """Take an example, as `Writer.add` does."""
        is_excluded = bool(len(baselines) and baselines["excluded"].any())
        numbers = None if is_excluded else [self.sites.index(name) for name in sites]
        digest = self._digests[index] if index < len(self._digests) else ""
        table = table_of(rows, self._columns)
        self.keep(Held(index, table.num_rows, numbers, digest), table, table_of(baselines, BASELINES))

    def keep(self, held: Held, rows: pa.Table, baselines: pa.Table) -> None:
        """Take what a part holds of an example."""
        self._examples.append((held, rows, baselines))

    def __contains__(self, index: int) -> bool:
        return any(held.number == index for held, _, _ in self._examples)

    def is_due(self) -> bool:
        """Whether it is time; see `ROWS` and `SECONDS`."""
        waits = sum(held.rows for held, _, _ in self._examples)
        return waits >= ROWS or time.monotonic() - self._written > min(self._wait, SECONDS)

    def part(self) -> Part | None:
        """What waits, as one part."""
        if not self._examples:
            return None
        held = [held for held, _, _ in self._examples]
        rows = parquet([(held, table) for held, table, _ in self._examples])
        own = [(held._replace(rows=table.num_rows), table) for held, _, table in self._examples]
        return Part(held, rows, parquet(own))

    def is_written(self) -> None:
        """Nothing waits any more."""
        if self._examples:
            self._wait = 2 * self._wait or 1.0
        self._examples.clear()
        self._written = time.monotonic()


class Writer:
    """Adds examples to a run. Made by `open_run`; a context manager.

    `done` says of which examples what is safe on disk. What was added is written from time to time, at
    `flush`, at `finish`, and when the `with` block is left, also by an exception.
    """

    def __init__(
        self, path: Path, content: dict[str, Any], lock: FileLock, digests: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.sites: list[str] = content["spec"].get("sites") or []
        self.check: dict[str, Any] | None = content.get("check")
        self.done: dict[int, set[int] | None] = {}
        self.table = table_in(content["spec"])
        self._content, self._lock = content, lock
        self._waiting = Waiting(content["spec"], self.sites, digests)
        with storing(path):
            for name in (self.table, "baselines"):
                (path / name).mkdir(exist_ok=True)
            remove_leftovers(path)
        parts = parts_of(path)
        for part in parts:
            held_in(part, self.table)
            for held in held_in(part, "baselines"):
                self._note(held)
        self._next = 1 + max((int(PART.fullmatch(p.name)[1]) for p in parts), default=-1)  # type: ignore[index]

    def _note(self, held: Held) -> None:
        before = self.done.get(held.number, set())
        self.done[held.number] = None if held.sites is None or before is None else before | {*held.sites}

    def missing(self, index: int, sites: Sequence[str]) -> list[str]:
        """Those of the site expressions at which example number `index` has not been patched."""
        done = self.done.get(index, set())
        return [] if done is None else [s for s in sites if self.sites.index(s) not in done]

    def todo(self, numbers: Iterable[int], sites: Sequence[str]) -> list[Todo]:
        """What the folder lacks of the examples of these numbers."""
        jobs = []
        for number in numbers:
            missing = self.missing(number, sites)
            if number not in self.done or missing:
                lacking = set(self.missing(number, self.sites))
                done = [s for s in self.sites if s not in lacking]
                jobs.append(Todo(number, missing, done))
        return jobs

    def add(
        self, index: int, rows: pd.DataFrame, baselines: pd.DataFrame, sites: Sequence[str] | None = None
    ) -> None:
        """Take the rows of example number `index` at these site expressions (by default all of the run's).

        Both need exactly the columns of this folder's table and of `BASELINES` (an empty frame stands for no
        rows). An example that is excluded is done at all sites, be they added later.
        """
        names = self.sites if sites is None else sites
        if index in self._waiting or (index in self.done and not self.missing(index, names)):
            raise ValueError(f"example {index} is already in {self.path}")
        self._waiting.add(index, rows, baselines, names)
        self._flush_in_time()

    def copy(self, held: Held, rows: pa.Table, baselines: pa.Table) -> None:
        """Take what a part of another folder holds of an example, unless it is here already."""
        done = self.done.get(held.number, set())
        if held.number in self.done and (done is None or {*(held.sites or ())} <= done):
            return
        self._waiting.keep(held, rows, baselines)
        self._flush_in_time()

    def _flush_in_time(self) -> None:
        if self._waiting.is_due():
            self.flush()

    def flush(self) -> None:
        """Write what waits as one part."""
        part = self._waiting.part()
        if part is not None:
            self.take(part)
        self._waiting.is_written()

    def take(self, part: Part) -> None:
        """Write a part. The rows go first; the baselines commit them."""
        name = f"part-{self._next:06d}.parquet"
        rows = self.path / self.table / name
        self._write(rows, part.rows)
        try:
            self._write(self.path / "baselines" / name, part.baselines, ends=self.path / "done.json")
        except StoreError:
            rows.unlink(missing_ok=True)
            raise
        for held in part.held:
            self._note(held)
        self._next += 1

    def keep_check(self, check: Mapping[str, Any]) -> None:
        """Keep in `run.json` how many rows were recomputed, and the largest difference."""
        self.check = dict(check)
        self._content["check"] = self.check
        still_there(self.path)
        write_json(self.path / "run.json", self._content)

    @property
    def is_checked(self) -> bool:
        """Whether what the check has found, and what was made beside it, is of all that is there."""
        return self.check is not None and (self.path / "done.json").exists()

    def finish(self) -> None:
        """Write what waits, and mark the run as finished."""
        self.flush()
        run = read_run(self.path)
        baselines = run.baselines()
        counts = {
            "examples": len(self.done),
            "excluded": int(baselines["excluded"].sum()),
            "baselines": len(baselines),
            self.table: run.patches(),
        }
        write_json(self.path / "done.json", counts)

    def _write(self, file: Path, content: bytes | Path, ends: Path | None = None) -> None:
        still_there(self.path)
        files.write(file, content, ends)

    def close(self) -> None:
        """Let go of the folder, without writing what waits."""
        self._lock.release()

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


def add_pictures(folder: Path, index: int, example: Mapping[str, Any]) -> None:
    """Keep a small copy of example number `index` for the report.

    `example` has the fields of `Example` (so `vars(example)` will do): `id`, `clean_image`,
    `corrupt_image`, `clean_prompt`, `corrupt_prompt`, `answer`, `foil`; what is missing or
    None is left out. Raises `ExampleError` if a picture cannot be read.
    """
    pictures = {
        name: small_png(example[f"{name}_image"])
        for name in ("clean", "corrupt")
        if example.get(f"{name}_image") is not None
    }
    keep_pictures(
        folder, index, pictures, {k: str(example[k]) for k in _FIELDS if example.get(k) is not None}
    )


def keep_pictures(folder: Path, index: int, pictures: Mapping[str, bytes], words: Mapping[str, str]) -> None:
    """Write the pictures of an example, as PNG, and then its words."""
    with storing(folder):
        (folder / "examples").mkdir(exist_ok=True)
    for name, content in pictures.items():
        still_there(folder)
        files.write(folder / "examples" / f"{index:04d}-{name}.png", content)
    still_there(folder)
    write_json(folder / "examples" / f"{index:04d}.json", words)


def still_there(folder: Path) -> None:
    """Refuse to write into a folder that is gone: it would come back without what says what it is."""
    if not (folder / "run.json").exists():
        raise StoreError(f"{folder}: is gone, or its run.json; run the same command again")


def _grown(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """The specification of a folder that is continued; raises `StoreError` if it is another run's."""
    if differ := differing(there, here, GROWS):
        raise StoreError(
            f"{folder}: holds another run: {differ}. Choose another --out or delete the folder"
            + (
                " (a mean or resampled activation is of all examples, so none can be added)"
                if "examples_of_the_patch" in differ
                else ""
            )
        )
    grown = {**there}
    if "sites" in here:
        grown["sites"] = list(dict.fromkeys([*(there.get("sites") or []), *here["sites"]]))
    if here.get("n_examples", 0) > there.get("n_examples", 0):
        grown |= {k: here[k] for k in ("n_examples", "data_hash") if k in here}
    return grown


def differing(there: Mapping[str, Any], here: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """In words, what differs between two specifications, without some of it; empty if nothing does."""
    old, new = (dict(_flat({k: v for k, v in s.items() if k not in without})) for s in (there, here))
    differ = [k for k in {**old, **new} if old.get(k, "absent") != new.get(k, "absent")]
    lines = [
        f"{k} is {_short(old.get(k, 'absent'))} there, {_short(new.get(k, 'absent'))} here"
        for k in differ[:6]
    ]
    return "; ".join(lines + [f"and {len(differ) - 6} more"] * (len(differ) > 6))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(inner, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}"


def _is_foreign(path: Path) -> bool:
    return not (path.name == ".lock" or is_temporary(path))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left: temporary files, and rows that no baselines commit."""
    committed = {p.name for p in parts_of(folder)}
    for where in (folder, *(folder / name for name in (*TABLES, "baselines", "examples"))):
        for path in list(where.iterdir()) if where.is_dir() else []:
            is_loose = where.name in TABLES and PART.fullmatch(path.name) and path.name not in committed
            if is_loose or is_temporary(path):
                path.unlink()


def hold(folder: Path, what: str) -> FileLock:
    """Hold a folder for this process, in which `what` is written; the system lets go when the process ends,
    however. Raises `StoreError` where another one holds it."""
    lock = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"{what}: another process is writing it; wait for it or choose another --out"
        ) from None
    except (OSError, NotImplementedError):
        pass  # a network file system without locks: better to run than to refuse
    return lock

"""Examples that stay on disk, or on the hub, until they are asked for: rows of a table, by their numbers."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any, Protocol

from vlmscope.data.example import Example
from vlmscope.data.lazy import Lazy

BATCH = 1000
"""Rows whose words are read at once."""
WINDOW = 32
"""Rows that are held with their pictures."""


class Table(Protocol):
    """Rows that can be read by their numbers."""

    def __len__(self) -> int: ...

    def row(self, number: int) -> Mapping[str, Any]:
        """All cells of a row."""

    def words(self, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """These columns of all rows, some rows at a time."""

    def sizes(self, columns: Sequence[str]) -> Iterator[bytes]:
        """What is known of the pictures in these columns without reading them."""


class Rows(Lazy):
    """The examples of a table, of which the last one asked for is held; and all ids.

    `checked` makes the examples of all rows from their `words`, without their pictures, and raises for those
    that make none; `made` is that of a row with its number, and raises `ExampleError` where its pictures are
    none. `reading` is what rows are read within.
    """

    def __init__(
        self,
        table: Table,
        words: Sequence[str],
        pictures: Sequence[str],
        *,
        checked: Callable[[Iterable[Mapping[str, Any]]], Iterator[Example]],
        made: Callable[[int, Mapping[str, Any]], Example],
        reading: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._table, self._made, self._reading = table, made, reading
        self.ids: list[str] = []
        self.roles: dict[str, None] = {}
        about = hashlib.sha256()
        rows = (row for batch in table.words(words) for row in batch)
        for example in checked(rows):
            self.ids.append(example.id)
            self.roles.update(dict.fromkeys(example.roles))
            prompts = [example.clean_prompt, example.corrupt_prompt, example.answer, example.foil]
            boxes = {name: box for name, box in example.masks.items() if isinstance(box, tuple)}
            about.update(json.dumps([example.id, *prompts, dict(example.roles), boxes]).encode() + b"\n")
        for size in table.sizes(pictures):
            about.update(size)
        super().__init__(about.digest(), window=1)

    def __len__(self) -> int:
        return len(self._table)

    def make(self, number: int) -> Example:
        with self._reading():
            return self._made(number, self._table.row(number))


class Arrow:
    """A `datasets.Dataset`, whose rows are on disk and mapped into memory, or are there already."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def row(self, number: int) -> Mapping[str, Any]:
        return self.found[number]  # type: ignore[no-any-return]

    def words(self, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        for table in self._tables(columns):
            yield table.to_pylist()

    def sizes(self, columns: Sequence[str]) -> Iterator[bytes]:
        """How many bytes each picture has: of a column of pictures their offsets alone are read."""
        import pyarrow.compute as pc

        for table in self._tables(columns):
            for column in columns:
                content = table[column].combine_chunks()
                lengths = pc.binary_length(content.field("bytes")).to_pylist()
                yield repr(lengths).encode()

    def _tables(self, columns: Sequence[str]) -> Iterator[Any]:
        if columns:
            yield from self.found.select_columns(list(columns)).with_format("arrow").iter(BATCH)


class Parquet:
    """Parquet files, of which a window of rows is held.

    `opened` opens a file of these paths; with a `limit`, no more files than that needs.
    """

    def __init__(self, paths: Iterable[str], opened: Callable[[str], Any], limit: int | None = None) -> None:
        self._opened, self._limit = opened, limit
        self._groups: list[tuple[str, int]] = []
        self._sizes: list[list[tuple[str, int, int]]] = []
        many: list[int] = []
        self.schema: Any = None
        for path in paths:
            if limit is not None and sum(many) >= limit:
                break
            file = self._file(path)
            self.schema = self.schema or file.schema_arrow
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                cells = [group.column(n) for n in range(group.num_columns)]
                self._groups.append((path, number))
                self._sizes.append(
                    [(c.path_in_schema, c.total_compressed_size, c.total_uncompressed_size) for c in cells]
                )
                many.append(group.num_rows)
        self._starts = [0, *accumulate(many)]
        self._batches: Iterator[Any] = iter(())
        self._columns: list[str] | None = None
        self._group, self._start = -1, 0
        self._batch: Any = ()

    def only(self, columns: Sequence[str]) -> Parquet:
        """Read no other columns."""
        self._columns = list(columns)
        return self

    def _file(self, path: str) -> Any:
        from pyarrow import parquet

        # With a buffer a column of pictures is read page by page, not whole.
        return parquet.ParquetFile(self._opened(path), buffer_size=2**20, pre_buffer=False)

    def __len__(self) -> int:
        return min(self._starts[-1], self._starts[-1] if self._limit is None else self._limit)

    def row(self, number: int) -> Mapping[str, Any]:
        group = bisect_right(self._starts, number) - 1
        if group != self._group or number < self._start:
            path, within = self._groups[group]
            self._batches = self._file(path).iter_batches(
                WINDOW, row_groups=[within], columns=self._columns, use_threads=False
            )
            self._group, self._start, self._batch = group, self._starts[group], next(self._batches)
        while number >= self._start + len(self._batch):
            self._start += len(self._batch)
            self._batch = next(self._batches)
        return self._batch.slice(number - self._start, 1).to_pylist()[0]

    def words(self, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        left = len(self)
        for path in dict.fromkeys(path for path, _ in self._groups):
            for batch in self._file(path).iter_batches(BATCH, columns=list(columns), use_threads=False):
                yield batch.slice(0, left).to_pylist()
                left -= min(left, len(batch))
                if not left:
                    return

    def sizes(self, columns: Sequence[str]) -> Iterator[bytes]:
        """How many bytes the columns of each row group have, as the files say at their ends."""
        for sizes in self._sizes:
            yield repr([size for size in sizes if size[0].partition(".")[0] in columns]).encode()

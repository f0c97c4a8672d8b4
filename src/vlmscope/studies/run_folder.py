"""Results on disk: a run is a folder of Parquet parts that a crash does not harm, and that can grow.

    run.json                      the specification, written first; what the run's check has found
    effects/part-000000.parquet   a row per patch
    baselines/part-000000.parquet a row per example; its presence commits the effects part
    examples/0003.json, *.png     a few examples, to look at
    done.json                     counts, written last

Every file is written under a temporary name, synced and renamed, so a reader sees whole files
only. Nothing is pickled. A part says in its metadata which examples it holds and at which of the run's
site expressions, so more examples and more sites become further parts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmscope.errors import StoreError
from vlmscope.files import read_json


def _schema(columns: str) -> pa.Schema:
    """`name:type` each; a type that ends in `?` may be null."""
    types = {"text": pa.string(), "int": pa.int32(), "float": pa.float64(), "bool": pa.bool_()}
    pairs = (column.split(":") for column in columns.split())
    return pa.schema([pa.field(n, types[t.removesuffix("?")], nullable=t.endswith("?")) for n, t in pairs])


EFFECTS = _schema(
    "example:text corruption:text site:text tower:text layer:int kind:text unit:text? position:int? "
    "token:text? role:text? slot:text p_patched:float p_restored:float? p_change:float logit_diff:float? "
    "ld_change:float? value:float? effect:float?"
)
"""The columns of `effects`: a row per patch.

`p_change`, `ld_change` are against the run that was edited; `value` is the metric. Where there is no corrupt
run `p_restored`, `logit_diff` and `effect` are null, and without a foil so are the logit differences."""

BASELINES = _schema(
    "example:text corruption:text p_clean:float? p_corrupt:float? ld_clean:float? ld_corrupt:float? "
    "value_clean:float? value_corrupt:float? "
    "answer_token:text? foil_token:text? predicted:text? correct:bool? excluded:bool reason:text?"
)
"""The columns of `baselines`: a row per example."""

FORMAT = "vlmscope-run-3"
_INDEX = b"vlmscope.index"
PART = re.compile(r"part-(\d{6,})\.parquet")


class Held(NamedTuple):
    """What a part holds of an example: at which site expressions, by their numbers; None for all."""

    number: int
    rows: int
    sites: list[int] | None
    digest: str


@dataclass(frozen=True)
class Run:
    """A run folder, read. Made by `read_run`; works while a run is not finished, too.

    `spec` and `description` are those of `open_run`. `check` is None, or says how many random `rows` the
    slow reference has recomputed, and the `largest` difference of the metric.
    """

    path: Path
    spec: dict[str, Any] = field(repr=False)
    description: dict[str, Any] = field(default_factory=dict, repr=False)
    check: dict[str, Any] | None = None

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
        return sum(held.rows for part in parts_of(self.path) for held in held_in(part, "effects"))

    def ran(self) -> int:
        """How many examples were patched."""
        return int((~self.baselines()["excluded"]).sum())

    def check_line(self) -> str:
        """What the check has found, as the command line says it."""
        if not self.check:
            return "not checked: no row was recomputed by plain forwards"
        rows, largest = self.check["rows"], self.check["largest"]
        return f"checked: {rows} random rows recomputed by plain forwards differ by at most {largest:.2g}"

    def pictures(self) -> list[dict[str, Any]]:
        """The examples kept to look at: `index`, the words that `Writer.add_pictures` was given,
        and `clean_image`, `corrupt_image` as paths, or None where there is no picture."""
        found = []
        for file in (self.path / "examples").glob("[0-9]*.json"):
            words = read_json(file, "delete that file; it is only there to be looked at")
            images = {
                f"{n}_image": p if (p := file.with_name(f"{file.stem}-{n}.png")).exists() else None
                for n in ("clean", "corrupt")
            }
            found.append({"index": int(file.stem), **words, **images})
        return sorted(found, key=lambda example: example["index"])


def read_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder for reading; raises `StoreError` if it is none."""
    folder = Path(path)
    if not os.path.exists(folder):  # noqa: PTH110 - no error for any name
        raise StoreError(f"{folder}: no such folder; expected a run, as 'vlmscope sweep' writes one")
    if not (folder / "run.json").is_file():
        raise StoreError(f"{folder}: not a run folder (no run.json in it)")
    content = read_manifest(folder)
    return Run(folder, content["spec"], content.get("description") or {}, content.get("check"))


def _read(folder: Path, name: str, schema: pa.Schema, where: pc.Expression | None = None) -> pd.DataFrame:
    pieces: list[tuple[int, pa.Table]] = []
    for part in parts_of(folder):
        file = folder / name / part.name
        with _reading(file, part):
            table = pq.read_table(pa.BufferReader(file.read_bytes()), page_checksum_verification=True)
            entries = _entries(table.schema)
            if table.schema.names != schema.names or table.num_rows != sum(held.rows for held in entries):
                raise ValueError("not the columns or rows that were written")
        start = 0
        for held in entries:
            piece = table.slice(start, held.rows)
            pieces.append((held.number, piece if where is None else piece.filter(where)))
            start += held.rows
    pieces.sort(key=lambda piece: piece[0])
    plain = schema.remove_metadata()
    tables = [t.replace_schema_metadata(None).cast(plain) for _, t in pieces]
    return _frame(pa.concat_tables([plain.empty_table(), *tables]))


def typed(frame: pd.DataFrame, schema: pa.Schema) -> pd.DataFrame:
    """A table in memory with the columns and types that one read from a run folder has."""
    return _frame(table_of(frame, schema))


def bytes_of(effects: pd.DataFrame) -> int:
    """How many bytes a table of patches takes on disk."""
    table = table_of(effects, EFFECTS)
    return len(parquet([(Held(0, table.num_rows, None, ""), table)]))


def _frame(table: pa.Table) -> pd.DataFrame:
    # Whole numbers and truths that may be null stay what they are.
    types = {"position": "Int32", "correct": "boolean"}
    return table.to_pandas().astype({k: t for k, t in types.items() if k in table.schema.names})


def parts_of(folder: Path) -> list[Path]:
    """The baselines parts, which are the committed ones, in the order they were written."""
    found = [p for p in (folder / "baselines").glob("part-*.parquet") if PART.fullmatch(p.name)]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def held_in(part: Path, name: str) -> list[Held]:
    """The examples in a part, from its footer alone."""
    file = part.parent.parent / name / part.name
    with _reading(file, part):
        return _entries(pq.read_schema(file))


def _entries(schema: pa.Schema) -> list[Held]:
    return [Held(*entry) for entry in json.loads((schema.metadata or {})[_INDEX])]


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


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    way_out = "choose another --out or delete the folder"
    content = read_json(file, way_out)
    if content.get("format") != FORMAT:
        raise StoreError(
            f"{file}: format {content.get('format')!r}, this version reads {FORMAT!r}; "
            "use the version of vlmscope that wrote it"
        )
    if not isinstance(content.get("spec"), dict):
        raise StoreError(f"{file}: is damaged (no spec in it); {way_out}")
    return content


def table_of(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    if frame.empty and not len(frame.columns):
        return schema.empty_table()
    if set(frame.columns) != set(schema.names):
        odd = sorted(set(frame.columns) ^ set(schema.names))
        raise ValueError(f"wrong columns {odd}; expected {schema.names}")
    columns = []
    for column in schema:
        # A NaN in a required number is what the model said, and stays one.
        is_null = column.nullable or not pa.types.is_floating(column.type)
        values = pa.array(frame[column.name], type=column.type, from_pandas=is_null)
        if values.null_count and not column.nullable:
            raise ValueError(f"column '{column.name}' lacks {values.null_count} values")
        columns.append(values)
    return pa.Table.from_arrays(columns, schema=schema)


def parquet(tables: Sequence[tuple[Held, pa.Table]]) -> bytes:
    whole = pa.concat_tables(table for _, table in tables)
    whole = whole.replace_schema_metadata({_INDEX: json.dumps([held for held, _ in tables]).encode()})
    buffer = io.BytesIO()
    pq.write_table(whole, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()

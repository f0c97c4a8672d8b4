"""Results on disk: a run is a folder of Parquet parts that a crash does not harm, and that can grow.

    run.json                      the specification, written first; what the run's check has found
    effects/part-000000.parquet   a row per patch; of `attribute` they are attributions/, a row per site, of
                                  `edges` edges/, a row per edge, of `faithfulness` measured/, a circuit
    baselines/part-000000.parquet a row per example; its presence commits the part beside it
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmscope import files, stored
from vlmscope.errors import DataError, StoreError, shown
from vlmscope.stored.places import check_ends, check_places


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

ATTRIBUTIONS = _schema(
    "example:text corruption:text site:text tower:text layer:int kind:text unit:text? position:int? "
    "token:text? role:text? slot:text score:float? exact:float?"
)
"""The columns of `attributions`: a row per site. `score` is in the unit of `logit_diff`; `exact` is what
a patch of the site, where one was made, changes of the metric, against the run that was patched."""

EDGES = _schema("example:text corruption:text source:text target:text score:float? exact:float?")
"""The columns of `edges`: a row per edge, `score` and `exact` as in `ATTRIBUTIONS`."""

MEASURED = _schema("example:text corruption:text circuit:text p:float ld:float? value:float?")
"""The columns of `measured`: a row per circuit, by its name; `value` is the metric."""

CROSSED = EFFECTS.append(pa.field("source_site", pa.string(), nullable=False))
"""The columns of `effects` where values come from another site than they go to."""

BASELINES = _schema(
    "example:text corruption:text p_clean:float? p_corrupt:float? ld_clean:float? ld_corrupt:float? "
    "value_clean:float? value_corrupt:float? "
    "answer_token:text? foil_token:text? predicted:text? correct:bool? excluded:bool reason:text?"
)
"""The columns of `baselines`: a row per example."""

FORMAT = "vlmscope-run-3"
_CORRUPT = {"kind": str, "form?": str, "at?": str, "scale?": (float, None), "draws?": int}
SPEC = {
    "model?": str,
    "weights?": (str, None),
    "data?": str,
    "n_examples?": int,
    "data_hash?": str,
    "sites?": [str],
    "corrupt?": _CORRUPT,
    "direction?": str,
    "engine?": str,
    "metric?": str,
    "patch?": str,
    "from?": str,
    "shard?": str,
    "dtype?": str,
    "device?": str,
    "seed?": int,
    "select?": bool,
    "versions?": {str: (str, None)},
}
"""The shape of a run's specification (`stored.fits`); a report of patches needs all but `OPTIONAL`."""
OPTIONAL = ("from?", "shard?")
OF_ATTRIBUTE = {"method?": str, "word?": (str, None), "verify?": int, "steps?": int, "tower?": str}
"""What a run of `attribute`, or (`tower`) of `edges`, has besides, in the place of what is of patches."""
OF_FAITHFULNESS = {"circuits?": {"digest": str, "chosen": [str], "fraction": (float, None)}}
"""What a run of `faithfulness` has besides: which circuits there are, and the one that is reported."""
TABLES = ("effects", "attributions", "edges", "measured")
_COUNTS = {"examples": int, "excluded": int, "baselines": int, **{f"{name}?": int for name in TABLES}}
_TOWER = {"layers?": int, "heads?": int, "grid?": [int]}
_SHAPE = {
    "format": FORMAT,
    "spec": SPEC | OF_ATTRIBUTE | OF_FAITHFULNESS,
    "description?": ({"towers?": {str: _TOWER}}, None),
    "check?": ({"rows": int, "largest": float}, None),
}
_WORDS = {"id": str} | {f"{name}?": str for name in ("clean_prompt", "corrupt_prompt", "answer", "foil")}
_INDEX = b"vlmscope.index"
PART = re.compile(r"part-(\d{6,})\.parquet")


class Held(NamedTuple):
    """What a part holds of an example: at which site expressions, by their numbers; None for all."""

    number: int
    rows: int
    sites: list[int] | None
    digest: str


def table_in(spec: Mapping[str, Any]) -> str:
    """Which of `TABLES` a run of this specification holds."""
    own = {"circuits": "measured", "tower": "edges", "method": "attributions"}
    return next((table for key, table in own.items() if key in spec), "effects")


def columns_of(spec: Mapping[str, Any]) -> pa.Schema:
    """The columns of that table."""
    own = {"edges": EDGES, "attributions": ATTRIBUTIONS, "measured": MEASURED}
    return own.get(table_in(spec), CROSSED if "from" in spec else EFFECTS)


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
        """The table of patches (columns as in `EFFECTS`, or `CROSSED`), in the order of the examples.

        `where` keeps the rows of which it is true, such as `pc.field("tower") == "encoder"`; only
        those are ever held in memory together. Raises `StoreError` for a run of `attribute`.
        """
        return self._rows("effects", where)

    def attributions(self, where: pc.Expression | None = None) -> pd.DataFrame:
        """The table of scores (columns as in `ATTRIBUTIONS`) of a run of `attribute`; as `effects`."""
        return self._rows("attributions", where)

    def edges(self, where: pc.Expression | None = None) -> pd.DataFrame:
        """The table of edges (columns as in `EDGES`) of a run of `edges`, a row an example and edge; as
        `effects`."""
        return self._rows("edges", where)

    def measured(self) -> pd.DataFrame:
        """The table of circuits (columns as in `MEASURED`) of a run of `faithfulness`; as `effects`."""
        return self._rows("measured", None)

    def rows(self, where: pc.Expression | None = None) -> pd.DataFrame:
        """The one of these tables that this run holds."""
        return self._rows(table_in(self.spec), where)

    def digests(self) -> dict[str, str]:
        """The fingerprints of the examples that were run, by their ids."""
        pieces = pieces_of(self.path, "baselines", BASELINES)
        rows = ((held.digest, table) for _, held, table in pieces if table.num_rows)
        return {
            table["example"][0].as_py(): digest for digest, table in rows if not table["excluded"][0].as_py()
        }

    def answers(self, weights: str, dtype: str) -> dict[str, str]:
        """What a model answers, by the examples' fingerprints, if the run is of its weights and precision."""
        if (self.spec.get("weights"), self.spec.get("dtype")) != (weights, dtype):
            return {}
        pieces = pieces_of(self.path, "baselines", BASELINES)
        said = {held.digest: table["predicted"][0].as_py() for _, held, table in pieces if table.num_rows}
        return {digest: word for digest, word in said.items() if digest and word is not None}

    def _rows(self, name: str, where: pc.Expression | None) -> pd.DataFrame:
        if name != (there := table_in(self.spec)):
            raise StoreError(f"{self.path}: a run that holds {there}, no {name}; name one that does")
        return _read(self.path, name, columns_of(self.spec), where)

    def baselines(self) -> pd.DataFrame:
        """The table of examples (columns as in `BASELINES`), in their order."""
        return _read(self.path, "baselines", BASELINES)

    def patches(self) -> int:
        """How many patches there are, or scores (of edges, too)."""
        name = table_in(self.spec)
        return sum(held.rows for part in parts_of(self.path) for held in held_in(part, name))

    def ran(self) -> int:
        """How many examples were patched."""
        return int((~self.baselines()["excluded"]).sum())

    def check_line(self) -> str:
        """What the check has found, as the command line says it."""
        method = self.spec.get("method")
        if not self.check:
            if method and method not in ("direct", "exact") and not self.spec.get("verify"):
                return (
                    "not verified: nothing was patched exactly, so nothing says how good these estimates are"
                )
            return "not checked: no row was recomputed by plain forwards"
        rows, largest = self.check["rows"], self.check["largest"]
        if method == "direct":
            return (
                f"checked: in {rows} examples all writers and biases sum to the model's own to {largest:.2g}"
            )
        return f"checked: {rows} random rows recomputed by plain forwards differ by at most {largest:.2g}"

    def pictures(self) -> list[dict[str, Any]]:
        """The examples kept to look at: `index`, the words that `run_writer.add_pictures` was given,
        and `clean_image`, `corrupt_image` as the bytes of a PNG, or None where there is no picture."""
        way_out = "delete that file; it is only there to be looked at"
        found, is_text = [], self.spec.get("corrupt", {}).get("kind") == "text"
        shape = _WORDS | ({"corrupt_prompt": str} if is_text else {})
        for file in (self.path / "examples").glob("[0-9]*.json"):
            if not re.fullmatch("[0-9]{1,9}", file.stem):
                continue
            words = stored.manifest(file, shape, way_out, self.path)
            images = {
                f"{n}_image": stored.picture(p, way_out, self.path) if os.path.lexists(p) else None
                for n in ("clean", "corrupt")
                for p in [file.with_name(f"{file.stem}-{n}.png")]
            }
            known = {name: words[name] for name in (key.removesuffix("?") for key in _WORDS) if name in words}
            found.append({"index": int(file.stem), **known, **images})
        return sorted(found, key=lambda example: example["index"])


def read_run(path: str | os.PathLike[str], within: Path | None = None) -> Run:
    """Open a run folder for reading; raises `StoreError` if it is none.

    `within` is a folder that it is a part of, from which no link leads to it.
    """
    folder = Path(path)
    if within is not None:
        stored.no_links(folder, within)
    if not os.path.exists(folder):  # noqa: PTH110 - no error for any name
        raise StoreError(f"{folder}: no such folder; expected a run, as 'vlmscope sweep' writes one")
    if not os.path.lexists(folder / "run.json"):
        raise StoreError(
            f"{folder}: not a run folder (no run.json in it); name one, as 'vlmscope sweep' writes it"
        )
    content = read_manifest(folder)
    return Run(folder, content["spec"], content.get("description") or {}, content.get("check"))


def _read(folder: Path, name: str, schema: pa.Schema, where: pc.Expression | None = None) -> pd.DataFrame:
    done = folder / "done.json"
    # While a run goes on parts come: baselines are read of no fewer than those whose rows are.
    is_done, parts = os.path.lexists(done), parts_of(folder)
    pieces = pieces_of(folder, name, schema, parts)
    if name in TABLES:
        pieces = same_examples(pieces, pieces_of(folder, "baselines", BASELINES))
    rows, tables, held_rows = 0, [schema.empty_table()], list[tuple[int, int]]()
    for _, some in groupby(pieces, key=itemgetter(0)):  # a part at a time: only what is wanted of it stays
        wanted = []
        for _, held, table in some:
            rows += table.num_rows
            wanted.append(table if where is None else table.filter(where))
            held_rows.append((held.number, wanted[-1].num_rows))
        tables.append(pa.concat_tables(wanted).combine_chunks())  # a slice an example is larger than its rows
    if is_done and os.path.lexists(done):
        counts = stored.manifest(done, _COUNTS, f"delete {done} and run the same command again", folder)
        if counts.get(name) != rows:
            raise StoreError(
                f"{folder}: holds other {name} than the {counts.get(name, 0):,} that were written; "
                f"delete {done} and run the same command again: what is missing is computed anew"
            )
    whole = pa.concat_tables(tables)
    numbers, counts = np.array(held_rows or [(0, 0)]).T
    if (np.diff(numbers) < 0).any():
        whole = whole.take(np.argsort(np.repeat(numbers, counts), kind="stable"))
    return _frame(whole)


def pieces_of(
    folder: Path, name: str, schema: pa.Schema, parts: Sequence[Path] | None = None
) -> Iterator[Piece]:
    """The rows of each example in each part (or these); raises `StoreError` for what is not as it was
    written."""
    done: dict[int, list[set[int] | None]] = {}
    for part in parts_of(folder) if parts is None else parts:
        file = folder / name / part.name
        with _reading(file, part):
            content = files.read(file, "a part of a run", within=folder)
            table = stored.parquet(content)
            entries = _entries(table.schema)
            table = table.replace_schema_metadata(None)
            if not table.schema.equals(schema) or table.num_rows != sum(held.rows for held in entries):
                raise ValueError("not the columns or rows that were written")
            if name == "edges":
                check_ends(table)
            elif "site" in schema.names:
                check_places(table)
        start = 0
        for held in entries:
            sites = None if held.sites is None else {*held.sites}
            before = done.setdefault(held.number, [])
            if any(sites is None or one is None or sites & one for one in before):
                raise StoreError(
                    f"{file}: holds examples that another part holds, too, so that they would count twice; "
                    f"delete {part} if it is a copy"
                )
            before.append(sites)
            yield part, held, table.slice(start, held.rows)
            start += held.rows


Piece = tuple[Path, Held, pa.Table]


def same_examples(effects: Iterable[Piece], baselines: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces of effects; raises `StoreError` where patches are of an example that the baselines lack, or
    that was left out."""
    names = {}
    for _, held, table in baselines:
        if table.num_rows and not table["excluded"][0].as_py():
            names[held.number] = table["example"][0].as_py()
    for part, held, table in effects:
        if held.rows and table["example"].unique().to_pylist() != [names.get(held.number)]:
            raise StoreError(
                f"{part}: its rows are of another example than its baselines. Delete it and run the same "
                "command again: the examples in it are computed anew"
            )
        yield part, held, table


def typed(frame: pd.DataFrame, schema: pa.Schema) -> pd.DataFrame:
    """A table in memory with the columns and types that one read from a run folder has."""
    return _frame(table_of(frame, schema))


def bytes_of(effects: pd.DataFrame) -> int:
    """How many bytes a table of patches takes on disk."""
    table = table_of(effects, CROSSED if "source_site" in effects else EFFECTS)
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
    folder = part.parent.parent
    file = folder / name / part.name
    with _reading(file, part), files.regular(file, "a part of a run", within=folder) as stream:
        return _entries(pq.read_schema(stream))


def _entries(schema: pa.Schema) -> list[Held]:
    entries = [Held(*entry) for entry in json.loads((schema.metadata or {})[_INDEX])]
    for number, rows, sites, digest in entries:
        numbers = [number, rows, *(sites or ())]
        if not isinstance(digest, str) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("not the index that was written")
    return entries


@contextlib.contextmanager
def _reading(file: Path, part: Path) -> Iterator[None]:
    try:
        yield
    except (DataError, *stored.FOREIGN) as error:
        if isinstance(error, DataError) and os.path.lexists(file):  # which says nothing against its content
            raise StoreError(str(error)) from error
        what = "is damaged" if os.path.lexists(file) else "is missing"
        raise StoreError(
            f"{file}: this part {what}. Delete {part} and run the same command again: "
            "the examples in it are computed anew"
        ) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    file, way_out = folder / "run.json", "take it from a copy of the folder, or sweep into another --out"
    content = stored.manifest(file, {}, way_out)
    if content.get("format") != FORMAT:
        raise StoreError(
            f"{file}: format {shown(content.get('format'))}, this version reads '{FORMAT}'; "
            "use the version of vlmscope that wrote it"
        )
    stored.fits(content, _SHAPE, file, way_out)
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


def parquet_of(frame: pd.DataFrame) -> bytes:
    """A table as a Parquet file by itself."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), buffer, compression="zstd")
    return buffer.getvalue()


def parquet(tables: Sequence[tuple[Held, pa.Table]]) -> bytes:
    whole = pa.concat_tables(table for _, table in tables)
    whole = whole.replace_schema_metadata({_INDEX: json.dumps([held for held, _ in tables]).encode()})
    buffer = io.BytesIO()
    pq.write_table(whole, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()

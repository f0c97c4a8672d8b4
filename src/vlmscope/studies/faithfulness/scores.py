"""Where a ranking of parts comes from: attributions, effects, circuits, edges, or a file of importances.

A part is a head, a neuron, or all of a sublayer (`decoder.3.attn.h1`, `decoder.3.mlp.n7`, `decoder.3.mlp`),
at all positions; or an edge (`image->decoder.3.attn.v1`). A positive score says that the part upholds the
behaviour of the clean run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd

from vlmscope.data.example import Example, fingerprint
from vlmscope.errors import DataError, StoreError, plain, shown
from vlmscope.patching.graph import Edge, check_tower
from vlmscope.runs.network import Network
from vlmscope.stats import FEWEST
from vlmscope.stored import formats
from vlmscope.studies import circuits
from vlmscope.studies.agreement import UNSIGNED
from vlmscope.studies.faithfulness import mib
from vlmscope.studies.faithfulness.parts import KINDS, Edges, named
from vlmscope.studies.run_folder import Run, read_run, table_in
from vlmscope.studies.tables import change_of, is_single

HALVES = 4
"""Examples that can be halved, at least."""


class Scores(NamedTuple):
    """Scores of parts, an example a row (one row where it is not known of which examples they are).

    `digests` are the fingerprints of the examples, by the rows' names, None where these are not known.
    `circuit` is one that is given as such. Scores without a sign have one ranking alone. `least` is the
    |mean| that a head of a circuit has to exceed, where `circuits` is what found them, else None. `edges` are
    the parts, where these are edges. `answers` are what the model answers, by `digests`, where it was asked.
    """

    what: str
    table: pd.DataFrame
    digests: Mapping[str, str] | None = None
    data: str | None = None
    circuit: frozenset[str] | None = None
    signed: bool = True
    least: float | None = None
    edges: Edges | None = None
    answers: Mapping[str, str] = MappingProxyType({})


class Split(NamedTuple):
    """The rows that rank, the examples that choose a size, and those on which circuits are measured."""

    rows: list[str]
    choosing: list[Example]
    measured: list[Example]
    held_out: bool


def read(source: str | os.PathLike[str], model: Network, corruption: str, data: str) -> Scores:
    """The scores in a run folder of `sweep`, `attribute` or `edges`, a folder of `circuits`, or a file of
    MIB's.

    Raises `StoreError` for what is none, and for scores of another model or corruption (`corruption` is its
    kind, `none` where there is none).
    """
    path = Path(source)
    if not path.is_dir():
        scores, kept, of = mib.read(path, model)
        return Scores("importances", pd.DataFrame([scores], index=["all"]), circuit=kept, edges=of)
    if (path / formats.CIRCUITS.manifest).exists():
        run, position = _run_of(path, corruption, data)
        _check(run, model, corruption)
        grids = circuits.head_scores(run, position)
        tables = []
        for (tower, kind, _), scores in grids.items():
            names = [f"{tower}.{layer}.{kind}.h{head}" for layer, head in scores.columns]
            tables.append(scores.set_axis(names, axis=1))
        least = circuits.SHARE * circuits.gap_of(run.baselines())
        return _of_run(run, model, "circuits", pd.concat(tables, axis=1).dropna(), least=least)
    run = read_run(path)
    _check(run, model, corruption)
    if table_in(run.spec) == "measured":
        raise StoreError(f"{path}: holds circuits that were measured, no scores; name the folder they are of")
    sign = -1.0 if run.spec.get("direction") == "noise" else 1.0
    if table_in(run.spec) in ("attributions", "edges"):
        sign = -sign if run.spec.get("metric") == "kl" else sign
    if table_in(run.spec) == "edges":
        return _of_edges(run, model, sign)
    if table_in(run.spec) == "attributions":
        method, rows = run.spec["method"], run.attributions()
        scores = by_part(rows.assign(score=sign * rows["score"]), path)
        return _of_run(run, model, f"attributions ({method})", scores, signed=method != UNSIGNED)
    rows = run.effects()
    value = change_of(rows)
    return _of_run(run, model, "effects", by_part(rows.assign(score=sign * rows[value]), path))


def _of_edges(run: Run, model: Network, sign: float) -> Scores:
    rows, tower = run.edges(), str(run.spec["tower"])
    check_tower(model, tower)
    ends = rows[["source", "target"]].drop_duplicates().itertuples(index=False, name=None)
    parts = Edges(tower, model.shapes[tower], {named(*edge): (Edge(*edge),) for edge in ends})
    table = (sign * rows.pivot_table("score", "example", ["source", "target"])).rename_axis(index=None)
    table = table.set_axis([named(*edge) for edge in table], axis=1)
    return _of_run(run, model, f"edges ({run.spec['method']})", table, edges=parts)


def _of_run(
    run: Run,
    model: Network,
    what: str,
    table: pd.DataFrame,
    *,
    signed: bool = True,
    least: float | None = None,
    edges: Edges | None = None,
) -> Scores:
    digests = {name: digest for name, digest in run.digests().items() if name in table.index}
    answers = run.answers(model.fingerprint(), model.precision)
    return Scores(what, table, digests, str(run.spec.get("data")), None, signed, least, edges, answers)


def _check(run: Run, model: Network, corruption: str) -> None:
    spec = run.spec
    if spec.get("weights") != model.fingerprint():
        raise StoreError(
            f"{run.path}: scores of another model ({shown(spec.get('model'))}, with other weights than "
            f"{shown(model.name)} has); name the model that they are of, or score this one"
        )
    there = (spec.get("corrupt") or {}).get("kind", "none")
    if there not in ("none", corruption):
        raise StoreError(
            f"{run.path}: scores of another kind, {there} corrupted and not {corruption}; give --corrupt "
            f"{there}, or score with {corruption} corrupted"
        )


def _run_of(folder: Path, corruption: str, data: str) -> tuple[Run, str | None]:
    """The run that a circuit was found in, and where its heads were read out."""
    found = circuits.read(folder)
    runs = []
    for name in found.about["runs"]:
        places = (Path(name), folder.parent / "runs" / Path(name).name)  # of notice, wherever it is now
        there = next((place for place in places if (place / "run.json").exists()), None)
        if there is None:
            raise StoreError(
                f"{folder}: its run {shown(name)} is not there, so there are no scores by example; name the "
                "run's folder itself"
            )
        runs.append(read_run(there))
    kinds = [(run.spec.get("corrupt") or {}).get("kind") for run in runs]
    same = [run for run, kind in zip(runs, kinds, strict=True) if kind == corruption]
    named = [run for run in same if run.spec.get("data") == data] or same
    if len(named) != 1:
        held = ", ".join(f"{run.path.name} ({kind})" for run, kind in zip(runs, kinds, strict=True))
        raise StoreError(
            f"{folder}: its runs are {held}; expected one of this data with {corruption} corrupted: name the "
            "run's folder itself"
        )
    heads = found.heads[found.heads["run"] == plain(named[0].path.resolve().name)]
    at = set(heads["position"]) if len(heads) else set(found.heads["position"])
    return named[0], at.pop() if len(at) == 1 else None


def by_part(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Scores by example and part: sums over positions, or what a patch of all positions at once has.

    Left out are the stream itself, edges, windows and sums, queries, keys, values and patterns; and a
    sublayer as a whole where its heads or neurons have scores.

    >>> row = {"example": "a", "tower": "decoder", "layer": 0, "kind": "attn", "unit": "h1", "score": 1.5}
    >>> places = [{"site": f"decoder.0.attn.h1@{n}", "slot": str(n), "position": n} for n in range(2)]
    >>> table = pd.DataFrame([row | place for place in places])
    >>> by_part(table, Path("run")).to_dict()
    {'decoder.0.attn.h1': {'a': 3.0}}
    """
    unit = rows["unit"].astype("string")
    one = is_single(rows) & rows["kind"].isin(KINDS) & (unit.isna() | unit.str.fullmatch(r"[hn]\d+"))
    rows = rows[one.astype(bool)]
    if rows.empty:
        raise StoreError(
            f"{path}: has scores of no head, neuron or sublayer, which circuits are made of; score such "
            "sites as 'decoder.*.attn.h*@all' and 'decoder.*.mlp@all'"
        )
    where = rows["tower"] + "." + rows["layer"].astype(str) + "." + rows["kind"]
    whole = rows["unit"].isna()
    kept = ~whole | ~where.isin(where[~whole].unique())
    rows, where = rows[kept], where[kept]
    part = where + ("." + rows["unit"].astype("string")).fillna("")
    rows = rows.assign(part=part.astype(str), several=rows["position"].isna())
    # All positions at once say more than a sum over them, and that more than a name for some.
    rank = np.where(rows["slot"] == "all", 0, np.where(rows["several"], 2, 1))
    rows = rows[rank == pd.Series(rank, rows.index).groupby(rows["part"]).transform("min")]
    rows = rows.drop_duplicates(["example", "part", "position", "slot"])
    found = rows.pivot_table("score", "example", "part", aggfunc="sum", sort=False)
    return found.dropna(axis=1, how="all").rename_axis(index=None, columns=None)


def split(scores: Scores, given: Sequence[Example], data: str, seed: int, most: int) -> Split:
    """Which examples rank, and which are measured: no example does both.

    Where at least 10 of the given ones have no scores, these are measured. Else the examples with scores are
    halved: the first half ranks, the other is measured. Up to `most` of the former choose a size.

    Raises `DataError` where there are too few, `StoreError` for scores of other data.
    """
    digests = {example.id: fingerprint([example]) for example in given}
    if scores.digests is None:  # nobody knows which examples these are of
        _enough(len(given), 0)
        half = circuits.first_half(list(digests), seed)
        choosing = [one for one, first in zip(given, half, strict=True) if first]
        measured = [one for one, first in zip(given, half, strict=True) if not first]
        return Split(list(scores.table.index), choosing[:most], measured, False)
    held = {digest: name for name, digest in scores.digests.items()}
    shared = [one for one in given if digests[one.id] in held]
    fresh = [one for one in given if digests[one.id] not in held]
    if not shared and scores.data != data:
        raise StoreError(
            f"the scores are of other data: of {shown(scores.data)}, and none of their examples is in "
            f"{shown(data)}; name the data that they are of (with more examples than have scores)"
        )
    if len(fresh) >= FEWEST:
        return Split(list(scores.table.index), shared[:most], fresh, True)
    _enough(len(shared), len(fresh))
    half = circuits.first_half([digests[one.id] for one in shared], seed)
    first = [one for one, is_first in zip(shared, half, strict=True) if is_first]
    rows = [held[digests[one.id]] for one in first]
    measured = [one for one, is_first in zip(shared, half, strict=True) if not is_first]
    return Split(rows, first[:most], [*measured, *fresh], True)


def _enough(halved: int, others: int) -> None:
    if halved < HALVES:
        raise DataError(
            f"too few examples for halves: {halved} with scores, {others} without; expected at least "
            f"{HALVES} with scores (half ranks, half is measured), or {FEWEST} without; give more examples"
        )

"""What the pipeline has written, read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope import stored
from vlmscope.errors import StoreError, shown
from vlmscope.notice.kept import Sweep
from vlmscope.notice.spec import Spec
from vlmscope.stored import formats
from vlmscope.studies import circuits, heads
from vlmscope.studies.faithfulness import Faithful
from vlmscope.studies.faithfulness import read as read_faithful
from vlmscope.studies.run_folder import Run, read_run


@dataclass(frozen=True)
class Notice:
    """What the pipeline has computed: the runs by data set and corruption, the circuits, the heads by set,
    what the circuit of each run carries, and the same of edges (none where the model has none)."""

    spec: Spec
    runs: dict[Sweep, Run]
    selection: pd.DataFrame
    circuits: circuits.Found
    heads: dict[str, heads.Functions]
    faithfulness: dict[Sweep, Faithful]
    edges: dict[Sweep, Run]
    mechanisms: dict[Sweep, Faithful]


def read(folder: str | os.PathLike[str]) -> Notice:
    """What `run` has written; raises `StoreError` where that is not all there yet."""
    path, way_out = Path(folder), "run the same command again"
    chosen = stored.read(path, formats.SELECTION)[1]["selection"]
    spec = Spec.from_toml(path / "notice.toml")
    runs, there = {}, {run.name: run for run in path.glob("runs/*")}
    for name, corrupt in chosen[["data", "corruption"]].drop_duplicates().itertuples(index=False):
        if f"{name}-{corrupt}" not in there:
            raise StoreError(f"{path}: no run {shown(f'{name}-{corrupt}')} in it; {way_out}")
        runs[name, corrupt] = read_run(there[f"{name}-{corrupt}"], path)
    functions = {}
    for of_set in path.glob("heads/*"):
        stored.no_links(of_set, path)
        functions[of_set.name] = heads.read(of_set)

    def of_runs(name: str, read_one: Callable[[Path], Any]) -> dict[Sweep, Any]:
        places = {key: path / name / "-".join(key) for key in runs}
        places = {key: place for key, place in places.items() if place.is_dir()}
        for place in places.values():
            stored.no_links(place, path)
        return {key: read_one(place) for key, place in places.items()}

    stored.no_links(path / "circuits", path)
    return Notice(
        spec,
        runs,
        chosen,
        circuits.read(path / "circuits"),
        functions,
        of_runs("faithfulness", read_faithful),
        of_runs("edges", lambda place: read_run(place, path)),
        of_runs("mechanism", read_faithful),
    )

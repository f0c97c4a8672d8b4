"""Places in tables of results that somebody else may have made: only those that a model can have."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from vlmscope.sites import KINDS, TOWERS
from vlmscope.stored import GRID, LONGEST, PLACES

_UNIT = re.compile(r"b|[hqkvpn](\d{1,7}|\[[\d,]{1,9999}\])", re.ASCII)
_SITE = re.compile(r"[a-z]+\.\d{1,3}(/\d{1,3})?\.[a-z_]+[.@]", re.ASCII)
_END = re.compile(r"[a-z]{1,20}|[a-z]{1,20}\.\d{1,3}\.((attn|cross)\.[hqkv]\d{1,7}|mlp|deepstack)", re.ASCII)


def check_ends(edges: pa.Table) -> None:
    """Raise ValueError for a writer or reader that no model has."""
    for name in ("source", "target"):
        for end in edges[name].unique().to_pylist():
            if not _END.fullmatch(end):
                raise ValueError(f"unknown {name} {end}")


def check_places(effects: pa.Table) -> None:
    """Raise ValueError for a place that no model has."""
    for name, known in (("tower", TOWERS), ("kind", KINDS)):
        if odd := set(effects[name].unique().to_pylist()) - set(known):
            raise ValueError(f"unknown {name} {min(odd)}")
    for unit in effects["unit"].unique().to_pylist():
        if unit is not None and not _UNIT.fullmatch(unit):
            raise ValueError(f"unknown unit {unit}")
    for name, limit in (("layer", GRID), ("position", PLACES)):
        ends = pc.min_max(effects[name])
        if ends["min"].is_valid and not 0 <= ends["min"].as_py() <= ends["max"].as_py() < limit:
            raise ValueError(f"{name} {ends['min']} to {ends['max']}, which is not from 0 to {limit - 1}")
    named = {name for name in ("site", "source_site") if name in effects.column_names}
    for site in [site for name in named for site in effects[name].unique().to_pylist()]:
        if len(site) > LONGEST or not _SITE.match(site):
            raise ValueError(f"unknown site {site}")
    if len(max(effects["slot"].unique().to_pylist(), key=len, default="")) > 1000:
        raise ValueError("a slot of more than 1,000 characters")

"""The numbers of what was measured: the curve, its areas, and the circuit that is reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.stats import LEVEL
from vlmscope.stored import formats
from vlmscope.studies.faithfulness.curve import Shares, area
from vlmscope.studies.faithfulness.measure import Circuits
from vlmscope.studies.faithfulness.parts import Parts

COLUMNS, PARTS = (formats.FAITHFULNESS.tables[name].names for name in ("faithfulness.parquet", "circuit.csv"))


def null(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def table_of(
    shares: Shares,
    order: Mapping[str, Sequence[int]],
    fractions: Sequence[float],
    curve: Circuits,
    circuits: Circuits,
) -> pd.DataFrame:
    rows = []
    for ranking in order:
        for fraction in fractions:
            name = f"{ranking} {fraction:g}"
            drawn = _drawn(shares, name, circuits) or [shares.of(name)]
            nulls = (float(np.mean(drawn)), min(drawn), max(drawn))
            rows.append((ranking, fraction, len(curve[name]), *shares.with_ends(name), *nulls))
    return pd.DataFrame(rows, columns=COLUMNS)


def _drawn(shares: Shares, name: str, circuits: Circuits) -> list[float]:
    """f of the random circuits of a circuit's size."""
    return [
        shares.of(other)
        for other in circuits
        if other.startswith("random ") and other.endswith(f" like {name}")
    ]


def areas(
    shares: Shares, order: Mapping[str, Sequence[int]], fractions: Sequence[float], curve: Circuits
) -> dict[str, Any]:
    found = {}
    for what, ranking in (("cpr", "signed"), ("cmd", "absolute")):
        names = [f"{ranking} {fraction:g}" for fraction in fractions]
        f = np.array([shares.of(name) for name in names])
        drawn = shares.drawn(names)
        if what == "cmd":
            f, drawn = np.abs(1 - f), np.abs(1 - drawn)
        value = float(area(fractions, f))
        ends = shares.interval(value, area(fractions, drawn)) if shares.sure else (np.nan, np.nan)
        found[what] = dict(zip(("value", "low", "high"), map(null, (value, *ends)), strict=True))
    return found


def reported(
    shares: Shares, chosen: frozenset[int], fraction: float | None, circuits: Circuits, severity: str
) -> dict[str, Any]:
    f, low, high = shares.with_ends("chosen")
    without, least, most = shares.with_ends("without")
    drawn = np.array(_drawn(shares, "chosen", circuits))
    p = float((1 + (drawn >= f - 1e-12).sum()) / (1 + len(drawn))) if len(drawn) else None
    mean = float(drawn.mean()) if len(drawn) else None
    passes = mean is not None and p is not None and p <= LEVEL and low > mean and severity != "unknown"
    drops = [_drop(shares, number)[1] for number in sorted(chosen)] if _is_small(shares, chosen) else None
    return {
        "fraction": fraction,
        "kept": len(chosen),
        "f": null(f),
        "low": null(low),
        "high": null(high),
        "without": null(without),
        "without_low": null(least),
        "without_high": null(most),
        "random": None if mean is None else null(mean),
        "random_high": float(drawn.max()) if len(drawn) and np.isfinite(drawn).all() else None,
        "draws": len(drawn),
        "p_value": p,
        "passes": bool(passes),
        "needed": None if drops is None else sum(low > 0 for low in drops),
    }


def _is_small(shares: Shares, chosen: frozenset[int]) -> bool:
    return bool(chosen) and all(f"less {number}" in shares.names for number in chosen)


def _drop(shares: Shares, number: int) -> tuple[float, float, float]:
    """What f of the chosen circuit loses without one part, with its interval."""
    return _more(shares, "chosen", f"less {number}")


def _more(shares: Shares, one: str, other: str) -> tuple[float, float, float]:
    """By how much f of a circuit exceeds that of another, with its interval."""
    value, both = shares.of(one) - shares.of(other), shares.drawn([one, other])
    ends = shares.interval(value, both[:, 0] - both[:, 1]) if shares.sure else (np.nan, np.nan)
    return value, *ends


def kinds_of(parts: Parts, circuit: frozenset[int]) -> dict[str, int]:
    """How many parts of a circuit there are, by what they are."""
    nouns = parts.nouns
    return dict(Counter(nouns[number] for number in sorted(circuit)))


def with_groups(shares: Shares, parts: Parts) -> list[dict[str, Any]]:
    """What the circuit carries together with all parts of a tower (or kind), and what these carry alone."""
    found = []
    for name, group in parts.groups.items():
        numbers = (
            *shares.with_ends(f"with {name}"),
            *_more(shares, f"with {name}", "chosen")[:2],
            shares.of(f"only {name}"),
        )
        values = dict(zip(formats.GROUP, map(null, numbers), strict=True))
        found.append({"group": name, "kinds": kinds_of(parts, group), **values})
    return found


def parts_table(
    shares: Shares, named: pd.Series[float], parts: Parts, chosen: frozenset[int]
) -> pd.DataFrame:
    rows, names, places = [], parts.names, parts.places
    for number, score in zip(sorted(chosen), named, strict=True):
        drop = _drop(shares, number) if _is_small(shares, chosen) else (np.nan,) * 3
        rows.append((names[number], *places[number], score, *drop))
    found = pd.DataFrame(rows, columns=PARTS)
    return found.sort_values("score", key=abs, ascending=False, ignore_index=True)

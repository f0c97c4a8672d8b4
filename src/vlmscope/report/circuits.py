"""The section of what `circuits` wrote: important heads of each run, universal heads over runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope.report import figures
from vlmscope.report.captions import KINDS, TOWERS, largest_change, over_examples, plural, upper_first
from vlmscope.report.folder import read_json
from vlmscope.report.gallery import Gallery, Section, Shown, render
from vlmscope.studies.tables import Known


def section(folder: Path, gallery: Gallery) -> Section:
    about, heads = read_json(folder / "circuits.json"), pd.read_parquet(folder / "heads.parquet")
    universal = pd.read_csv(folder / "universal.csv")
    gaps = {str(name): float(gap) for name, gap in about.get("gaps", {}).items()}
    known = {name: Known(**fields) for name, fields in about.get("known", {}).items()}
    first = gallery.show(
        "universal",
        figures.universal(heads, gap=max(gaps.values(), default=0.0)),
        _caption(heads, universal, about.get("chance", [])),
        heads,
    )
    shown = [("", first)]
    for (tower, kind), rows in heads.groupby(["tower", "kind"], sort=False):
        name = f"{KINDS[str(kind)]} heads, {TOWERS[str(tower)]}"
        shown.append((upper_first(name), _panels(f"{tower}-{kind}", rows, gaps, gallery)))
    text = render(
        "circuits.html",
        warnings=[(name, text) for name, each in known.items() for text in each.sentences[1:]],
        figures=shown,
    )
    is_unknown = bool(known) and all(each.severity == "unknown" for each in known.values())
    return Section("Important and universal heads", text, is_unknown)


def _caption(heads: pd.DataFrame, universal: pd.DataFrame, chance: list[dict[str, Any]]) -> str:
    runs = heads["run"].nunique()
    everywhere = universal[universal["universal"]]
    names = [f"{r.tower} L{r.layer} {r.kind} H{r.head}" for r in everywhere.itertuples()]
    confirmed = (heads["important"] & heads["confirmed"]).sum()
    against = "; ".join(
        f"{c['tower']} {c['kind']}: {c['in_every_run']} of {c['heads']}, {c['expected']:.2g} expected, "
        f"p = {c['p_value']:.2g}"
        for c in chance
        if c["in_every_run"]
    )
    important = int(heads["important"].sum())
    return (
        f"{plural(important, 'head')} over {plural(runs, 'run')} {'is' if important == 1 else 'are'} important (dots), "
        f"{confirmed} of these confirmed (rings). Important in every run: {', '.join(names) or 'none'}. "
        + (f"Against chance: {against}. " if against and runs > 1 else "")
        + f"{over_examples(heads)} The colour scale is this figure's own."
    )


def _panels(name: str, rows: pd.DataFrame, gaps: dict[str, float], gallery: Gallery) -> Shown:
    """Layers x heads of each run, with a dot on the important ones."""
    tables, marks, cells = {}, {}, {}
    for run, table in rows.groupby("run", sort=False):
        title = f"{run}, at {table['position'].iloc[0]}, n = {table['n'].max()}"
        tables[title] = table.pivot(index="layer", columns="head", values="mean")
        cells[title] = table.rename(columns={"ci_low": "low", "ci_high": "high"})
        important = table[table["important"]]
        marks[title] = list(zip(important["layer"], important["head"], strict=True))
    gap = max((gaps.get(str(run), 0.0) for run in rows["run"].unique()), default=0.0)
    count = sum(map(len, marks.values()))
    caption = largest_change(cells, figures.full_colour(tables.values(), gap=gap))
    drawn = figures.panels(tables, marks=marks, gap=gap)
    return gallery.show(name, drawn, f"{caption} A dot marks an important head ({count} in all).", rows)

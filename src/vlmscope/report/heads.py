"""The sections of what `circuits` and `heads` wrote: which heads matter, and what they do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from vlmscope import stored
from vlmscope.errors import StoreError
from vlmscope.report import figures, image_maps
from vlmscope.report.gallery import Gallery, Section, Shown, render
from vlmscope.report.words import KINDS, TOWERS, upper_first
from vlmscope.stored import formats
from vlmscope.studies.known import Known
from vlmscope.studies.run_folder import read_run


def circuits_section(folder: Path, gallery: Gallery) -> Section:
    about, tables = stored.read(folder, formats.CIRCUITS)
    heads, everywhere = tables["heads"], tables["universal"].query("universal")
    gaps = {name: float(gap) for name, gap in about["gaps"].items()}
    known = {name: Known(each["severity"], each["sentences"]) for name, each in about["known"].items()}
    drawn = figures.universal(heads, gap=max(gaps.values(), default=0.0))
    values = {
        "heads": heads,
        "confirmed": int((heads["important"] & heads["confirmed"].isin([True])).sum()),
        "everywhere": [f"{r.tower} L{r.layer} {r.kind} H{r.head}" for r in everywhere.itertuples()],
        "chance": about["chance"],
    }
    shown = [("", gallery.show("universal", drawn, heads, "universal", **values))]
    for (tower, kind), rows in heads.groupby(["tower", "kind"], sort=False):
        heading = upper_first(f"{KINDS[str(kind)]} heads, {TOWERS[str(tower)]}")
        shown.append((heading, _by_run(f"{tower}-{kind}", rows, gaps, gallery)))
    warnings = [(name, text) for name, each in known.items() for text in each.sentences[1:]]
    no_edges = about.get("no_edges")
    text = render("circuits.html", warnings=warnings, no_edges=no_edges, figures=shown)
    is_unknown = bool(known) and all(each.severity == "unknown" for each in known.values())
    return Section("Important and universal heads", text, is_unknown)


def _by_run(name: str, rows: pd.DataFrame, gaps: dict[str, float], gallery: Gallery) -> Shown:
    """Layers x heads of each run, with a dot on the important ones."""
    tables, marks, cells = {}, {}, {}
    for run, table in rows.groupby("run", sort=False):
        title = f"{run}, at {table['position'].iloc[0]}, n = {table['n'].max()}"
        tables[title] = table.pivot(index="layer", columns="head", values="mean")
        cells[title] = table.rename(columns={"ci_low": "low", "ci_high": "high"})
        important = table[table["important"]]
        marks[title] = list(zip(important["layer"], important["head"], strict=True))
    gap = max(gaps.get(str(run), 0.0) for run in rows["run"].unique())
    return gallery.show_panels(name, cells, gap, tables=tables, marks=marks, data=rows)


def section(folder: Path, gallery: Gallery) -> Section:
    about, tables = stored.read(folder, formats.HEADS)
    heads, together = tables["functions"], tables["together"]
    attention = _attention(folder, tables, gallery)
    is_mean = together["knockout"] == "mean"
    accuracy = {
        name: together.loc[(together["set"] == name) & (is_mean | (name == "none")), "accuracy"]
        for name in ("none", "these heads", "random heads")
    }
    if accuracy["none"].empty or accuracy["these heads"].empty:
        raise StoreError(f"{folder / 'together.csv'}: lacks rows; {formats.HEADS.way_out}")
    text = render(
        "heads.html",
        model=about["model"],
        n=heads["n"].max(),
        fewest=heads["n"].min(),
        held_out=about.get("held_out") is not None,
        counts=heads["label"].value_counts().to_dict(),
        whole=accuracy["none"].iloc[0],
        these=accuracy["these heads"].iloc[0],
        random=accuracy["random heads"],
        doubt=about["doubt"],
        heads=_labelled(heads, tables["measures"]),
        figures=[("Where they look, and what the patches do", attention)] if attention else [],
    )
    return Section(f"What heads do: {Path(str(about['data'])).name}", text)


def _labelled(heads: pd.DataFrame, measures: pd.DataFrame) -> pd.DataFrame:
    """What the page has of each head: its label with what it rests on, and how far it moves LD."""
    moved = {}
    for row in measures[measures["measure"] == "effect"].itertuples():
        ends = "" if pd.isna(row.low) else f" [{row.low:+z.2f}, {row.high:+z.2f}]"
        moved[row.site] = f"{row.value:+z.2f}{ends}".replace("-", "\N{MINUS SIGN}")
    shown = heads.assign(**{"patched in, LD": heads["site"].map(moved)} if moved else {})
    names = {"site": "head", "measure": "by", "q_value": "q"}
    columns = ["site", "label", "measure", "value", "null", "q_value", *shown.columns[len(heads.columns) :]]
    return shown[[*columns, "evidence"]].rename(columns=names)


def _attention(folder: Path, tables: Mapping[str, pd.DataFrame], gallery: Gallery) -> Shown | None:
    """Where the five heads look that move LD most, where the pictures are kept."""
    heads, maps = tables["functions"], tables["maps"]
    if maps.empty or not os.path.lexists(folder / "patches"):
        return None
    run = read_run(folder / "patches", folder)
    pictures = image_maps.clean_pictures(run.pictures())
    # How far each head moves LD: patched in where that was done, else knocked out.
    size = tables["measures"].pivot_table(index="site", columns="measure", values="value").abs()
    moved = [size[name] for name in ("effect", "mean") if name in size]
    size = heads["site"].map(moved[0] if moved else {}).fillna(0.0)
    sites = heads["site"][size.sort_values(ascending=False).index]
    sites = [site for site in sites if site in set(maps["site"])][:5]
    maps = maps[maps["site"].isin(sites)]
    maps = maps.sort_values("site", key=lambda column: column.map(sites.index), kind="stable")
    if not set(maps["example"]) & set(pictures):
        return None
    titles = {r.site: f"{r.tower} L{r.layer} H{r.head}\n{r.label}" for r in heads.itertuples()}
    drawn = image_maps.attention(maps, pictures, run.effects(), titles=titles)
    return gallery.show("attention", drawn, maps, "attention")

"""The sections of what `circuits` and `heads` wrote: which heads matter, and what they do."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vlmscope import files
from vlmscope.report import figures, image_maps
from vlmscope.report.gallery import Gallery, Section, Shown, about_of, render
from vlmscope.report.words import KINDS, TOWERS, upper_first
from vlmscope.studies.known import Known
from vlmscope.studies.run_folder import read_run


def circuits_section(folder: Path, gallery: Gallery) -> Section:
    about, heads = about_of(folder, "circuits"), pd.read_parquet(folder / "heads.parquet")
    everywhere = files.from_csv(folder / "universal.csv").query("universal")
    gaps = {str(name): float(gap) for name, gap in about.get("gaps", {}).items()}
    known = {name: Known(**fields) for name, fields in about.get("known", {}).items()}
    drawn = figures.universal(heads, gap=max(gaps.values(), default=0.0))
    values = {
        "heads": heads,
        "everywhere": [f"{r.tower} L{r.layer} {r.kind} H{r.head}" for r in everywhere.itertuples()],
        "chance": [found for found in about.get("chance", []) if found["in_every_run"]],
    }
    shown = [("", gallery.show("universal", drawn, heads, "universal", **values))]
    for (tower, kind), rows in heads.groupby(["tower", "kind"], sort=False):
        heading = upper_first(f"{KINDS[str(kind)]} heads, {TOWERS[str(tower)]}")
        shown.append((heading, _by_run(f"{tower}-{kind}", rows, gaps, gallery)))
    warnings = [(name, text) for name, each in known.items() for text in each.sentences[1:]]
    text = render("circuits.html", warnings=warnings, figures=shown)
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
    about, heads = about_of(folder, "heads"), files.from_csv(folder / "functions.csv")
    attention, together = _attention(folder, heads, gallery), files.from_csv(folder / "together.csv")
    these = (together["set"] == "these heads") & (together["knockout"] == "mean")
    text = render(
        "heads.html",
        model=about["model"],
        n=heads["n"].max(),
        counts=heads["label"].value_counts().to_dict(),
        whole=together.loc[together["set"] == "none", "accuracy"].iloc[0],
        these=together.loc[these, "accuracy"].iloc[0],
        random=together.loc[together["set"] == "random heads", "accuracy"],
        heads=heads[["site", "label", "evidence"]].rename(columns={"site": "head"}),
        figures=[("Where they look, and what the patches do", attention)] if attention else [],
    )
    return Section(f"What heads do: {Path(str(about['data'])).name}", text)


def _attention(folder: Path, heads: pd.DataFrame, gallery: Gallery) -> Shown | None:
    """Where the five heads look that move LD most, where the pictures are kept."""
    maps = pd.read_parquet(folder / "maps.parquet")
    if maps.empty or not (folder / "patches" / "run.json").is_file():
        return None
    run = read_run(folder / "patches")
    pictures = {e["id"]: e["clean_image"] for e in run.pictures() if e.get("clean_image")}
    # How far each head moves LD: patched in where that was done, else knocked out.
    size = (
        files.from_csv(folder / "measures.csv")
        .pivot_table(index="site", columns="measure", values="value")
        .abs()
    )
    size = heads["site"].map(size["effect" if "effect" in size else "mean"]).fillna(0.0)
    sites = heads["site"][size.sort_values(ascending=False).index]
    sites = [site for site in sites if site in set(maps["site"])][:5]
    maps = maps[maps["site"].isin(sites)]
    maps = maps.sort_values("site", key=lambda column: column.map(sites.index), kind="stable")
    if not set(maps["example"]) & set(pictures):
        return None
    titles = {r.site: f"{r.tower} L{r.layer} H{r.head}\n{r.label}" for r in heads.itertuples()}
    drawn = image_maps.attention(maps, pictures, run.effects(), titles=titles)
    return gallery.show("attention", drawn, maps, "attention")

"""The section of what `heads` wrote: what each head does, with its evidence."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vlmscope.report import image_maps
from vlmscope.report.folder import read_json
from vlmscope.report.gallery import Gallery, Section, Shown, render
from vlmscope.studies.run_folder import read_run


def section(folder: Path, gallery: Gallery) -> Section:
    about, heads = read_json(folder / "heads.json"), pd.read_csv(folder / "functions.csv")
    attention = _attention(folder, heads, gallery)
    text = render(
        "heads.html",
        model=about["model"],
        n=heads["n"].max(),
        counts=", ".join(f"{n} {label}" for label, n in heads["label"].value_counts().items()),
        together=_together(pd.read_csv(folder / "together.csv")),
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
    largest = _size(pd.read_csv(folder / "measures.csv"), heads).sort_values(ascending=False).index
    sites = [site for site in heads["site"][largest] if site in set(maps["site"])][:5]
    maps = maps[maps["site"].isin(sites)]
    maps = maps.sort_values("site", key=lambda column: column.map(sites.index), kind="stable")
    if not set(maps["example"]) & set(pictures):
        return None
    titles = {r.site: f"{r.tower} L{r.layer} H{r.head}\n{r.label}" for r in heads.itertuples()}
    return gallery.show(
        "attention",
        image_maps.attention(maps, pictures, run.effects(), titles=titles),
        "Attention minus the mean over all heads, for the heads that move LD most; the line is the object's "
        "outline in patches. At the right the change of LD when a single patch, as the language model reads it, "
        "is taken from the clean image.",
        maps,
    )


def _size(measures: pd.DataFrame, heads: pd.DataFrame) -> pd.Series[float]:
    """How far each head moves LD: patched in where that was done, else knocked out."""
    by = measures.pivot_table(index="site", columns="measure", values="value").abs()
    column = "effect" if "effect" in by else "mean"
    return heads["site"].map(by[column]).fillna(0.0)


def _together(table: pd.DataFrame) -> str:
    whole = table.loc[table["set"] == "none", "accuracy"].iloc[0]
    is_mean = (table["set"] == "these heads") & (table["knockout"] == "mean")
    these = table.loc[is_mean, "accuracy"].iloc[0]
    text = f"With all of them set to their mean at once, accuracy falls from {whole:.0%} to {these:.0%}"
    random = table.loc[table["set"] == "random heads", "accuracy"]
    if random.empty:
        return f"{text}; there are too few other heads to compare with."
    return (
        f"{text}; with equally many random heads of the same layers, to {random.mean():.0%} "
        f"({len(random)} draws, from {random.min():.0%} to {random.max():.0%})."
    )

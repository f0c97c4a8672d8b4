"""The section of what `neurons` wrote: found, described, perturbed or edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope import files
from vlmscope.errors import StoreError
from vlmscope.report import figures, image_maps
from vlmscope.report.gallery import Gallery, Section, Shown, about_of, render

MEASURES = ("auc", "selectivity", "overlap", "overlap, shuffled", "p drop, zero")
"""The measures that are drawn, of those that were taken."""
ROWS = 6
"""Neurons in one figure."""


def section(folder: Path, gallery: Gallery) -> Section:
    about = about_of(folder, "neurons")
    sections = {
        "find": ("Neurons that contribute to words", _find),
        "describe": ("Neurons, one by one", _describe),
        "perturb": ("Words without their neurons", _perturb),
        "edit": (f"Edit: {about.get('from')} to {about.get('to') or 'anything else'}", _edit),
    }
    what = str(about.get("what"))
    if what not in sections:
        raise StoreError(f"{folder / 'neurons.json'}: is of another version; write that folder anew")
    title, values = sections[what]
    return Section(title, render(f"neurons_{what}.html", about=about, **values(folder, gallery)))


def _csv(file: Path) -> pd.DataFrame:
    """A table in which a word such as `null` or `NA` is a word."""
    return files.from_csv(file, keep_default_na=False)


def _pictures(folder: Path) -> dict[str, Path]:
    """The pictures of a folder, by example."""
    if not (folder / "pictures.csv").is_file():
        return {}
    table = files.from_csv(folder / "pictures.csv", dtype=str, keep_default_na=False)
    return {row.example: folder / "pictures" / Path(row.file).name for row in table.itertuples()}


def _find(folder: Path, gallery: Gallery) -> dict[str, Any]:
    layers = _csv(folder / "layers.csv")
    layers = layers.pivot_table(index="word", columns="layer", values="neurons", fill_value=0).astype(int)
    return {
        "captions": _csv(folder / "captions.csv"),
        "tokens": _csv(folder / "tokens.csv").head(20),
        "layers": layers.add_prefix("layer ").reset_index(),
    }


def _describe(folder: Path, gallery: Gallery) -> dict[str, Any]:
    driving, measured, measures = _csv(folder / "driving.csv"), None, pd.DataFrame()
    if (folder / "measures.csv").is_file():
        table = files.from_csv(folder / "measures.csv")
        drawn = figures.measures(table, [name for name in MEASURES if name in set(table["measure"])])
        measured = gallery.show("measures", drawn, table, "measures")
        measures = table[table["method"] == "contribution"].drop(columns="method")
    return {
        "cards": _csv(folder / "cards.csv").drop(columns="weights"),
        "maps": _maps(folder, gallery),
        "driving": driving[driving["rank"] <= 3],
        "measured": measured,
        "measures": measures,
    }


def _maps(folder: Path, gallery: Gallery) -> list[Shown]:
    """The maps of neurons, then those of means, a few rows a figure."""
    maps, pictures = pd.read_parquet(folder / "maps.parquet"), _pictures(folder)
    is_mean = maps["neuron"].str.contains(": mean of top")
    shown = []
    for what, rows in (("maps", maps[~is_mean]), ("means", maps[is_mean])):
        names = list(rows["neuron"].unique())
        for start in range(0, len(names), ROWS):
            held = rows[rows["neuron"].isin(names[start : start + ROWS])]
            drawn = image_maps.neuron_maps(held, pictures)
            shown.append(gallery.show(f"{what}-{start // ROWS}", drawn, held, what))
    return shown


def _perturb(folder: Path, gallery: Gallery) -> dict[str, Any]:
    return {"perturbed": _csv(folder / "perturb.csv")}


def _edit(folder: Path, gallery: Gallery) -> dict[str, Any]:
    columns, pictures = files.from_csv(folder / "columns.csv"), _pictures(folder)
    captions = _csv(folder / "captions.csv")
    captions = captions[captions["example"].isin(pictures)].drop_duplicates("example")
    objects = folder / "objects.csv"
    return {
        "columns": len(columns),
        "share": (columns["change"] / columns["length"].clip(lower=1e-12)).median(),
        "measures": files.from_csv(folder / "measures.csv"),
        "captions": captions.sort_values("has", ascending=False, kind="stable"),
        "pictures": pictures,
        "objects": files.from_csv(objects) if objects.is_file() else None,
    }

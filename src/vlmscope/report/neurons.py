"""The section of what `neurons` wrote: found, described, perturbed or edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope import stored
from vlmscope.errors import StoreError
from vlmscope.report import figures, image_maps
from vlmscope.report.gallery import Gallery, Section, Shown, render
from vlmscope.stats import LEVEL
from vlmscope.stored import Pictures, Tables, formats

MEASURES = ("auc", "auc, image", "selectivity", "overlap", "overlap, shuffled", "p drop, zero", "lost, zero")
"""The measures that are drawn, of those that were taken."""
ROWS = 6
"""Neurons in one figure."""


def section(folder: Path, gallery: Gallery) -> Section:
    what, about, tables, pictures = stored.read_one(folder, *formats.NEURONS.values())
    mapped = set(tables["maps"]["example"]) if "maps" in tables else set()
    if lacking := mapped - set(pictures):
        raise StoreError(
            f"{folder}: no picture of an example in it ({min(lacking)}); {formats.NEURONS[what].way_out}"
        )
    sections = {
        "find": ("Neurons that contribute to words", _find),
        "describe": ("Neurons, one by one", _describe),
        "perturb": ("Words without their neurons", _perturb),
        "edit": (f"Edit: {about.get('from')} to {about.get('to') or 'anything else'}", _edit),
    }
    title, values = sections[what]
    return Section(title, render(f"neurons_{what}.html", about=about, **values(tables, pictures, gallery)))


def _find(tables: Tables, pictures: Pictures, gallery: Gallery) -> dict[str, Any]:
    layers = tables["layers"].pivot_table(index="word", columns="layer", values="neurons", fill_value=0)
    return {
        "captions": tables["captions"],
        "tokens": tables["tokens"].head(20),
        "layers": layers.astype(int).add_prefix("layer ").reset_index(),
    }


def _describe(tables: Tables, pictures: Pictures, gallery: Gallery) -> dict[str, Any]:
    driving, measured, measures = tables["driving"], None, pd.DataFrame()
    table = tables.get("measures", pd.DataFrame(columns=["measure"]))
    if names := [name for name in MEASURES if name in set(table["measure"])]:
        drawn = figures.measures(table, names)
        measured = gallery.show("measures", drawn, table, "measures")
        measures = table[table["method"] == "contribution"].drop(columns="method")
    lost = measures[measures["measure"] == "lost, zero"] if len(measures) else measures
    return {
        "cards": tables["cards"].drop(columns="weights"),
        "maps": _maps(tables["maps"], pictures, gallery),
        "driving": driving[driving["rank"] <= 3],
        "measured": measured,
        "measures": measures,
        "lost": [
            (row.word, round(row.value * row.n), row.n, row.null, row.p_value) for row in lost.itertuples()
        ],
        "carried": [row.word for row in lost.itertuples() if row.value > row.null and row.q_value <= LEVEL],
        "left_out": tables.get("left_out"),
    }


def _maps(maps: pd.DataFrame, pictures: Pictures, gallery: Gallery) -> list[Shown]:
    """The maps of neurons, then those of means, a few rows a figure."""
    is_mean = maps["neuron"].str.contains(": mean of top")
    shown = []
    for what, rows in (("maps", maps[~is_mean]), ("means", maps[is_mean])):
        names = list(rows["neuron"].unique())
        for start in range(0, len(names), ROWS):
            held = rows[rows["neuron"].isin(names[start : start + ROWS])]
            drawn = image_maps.neuron_maps(held, pictures)
            shown.append(gallery.show(f"{what}-{start // ROWS}", drawn, held, what))
    return shown


def _perturb(tables: Tables, pictures: Pictures, gallery: Gallery) -> dict[str, Any]:
    return {"perturbed": tables["perturb"]}


def _edit(tables: Tables, pictures: Pictures, gallery: Gallery) -> dict[str, Any]:
    captions, columns = tables["captions"], tables["columns"]
    measures = tables["measures"]
    captions = captions[captions["example"].isin(pictures)].drop_duplicates("example")
    return {
        "columns": len(columns),
        "share": (columns["change"] / columns["length"].clip(lower=1e-12)).median(),
        "measures": measures,
        "drawn": gallery.show("edit", figures.edit(measures), measures, "edit"),
        "captions": captions.sort_values("has", ascending=False, kind="stable"),
        "pictures": pictures,
        "objects": tables.get("objects"),
    }

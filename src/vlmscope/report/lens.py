"""The section of what `lens` wrote: what states say, on the picture, and how some words do over layers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from vlmscope import stored
from vlmscope.report import figures, image_maps
from vlmscope.report.gallery import Gallery, Section, render
from vlmscope.report.words import short_number
from vlmscope.stored import formats
from vlmscope.studies.tables import means

PICTURES = 2
"""Pictures on which words are drawn."""


def section(folder: Path, gallery: Gallery) -> Section:
    _, about, tables, pictures = stored.read_one(folder, formats.LENS)
    said, told = tables["lens"], tables["words"]
    shown = []
    for number, name in enumerate([name for name in said["example"].unique() if name in pictures][:PICTURES]):
        rows = image_maps.in_cells(said[said["example"] == name])
        if not rows.empty:
            drawn = image_maps.word_plates(rows, pictures[name])
            best = rows.loc[rows["p" if rows["p"].notna().any() else "logit"].idxmax()]
            shown.append(
                ("", gallery.show(f"words-{number}", drawn, rows, "word_plates", example=name, best=best))
            )
    cells = over_layers(told)
    if not cells.empty:
        lines = figures.words_over_layers(cells)
        heading = "Words that were asked about"
        shown.append((heading, gallery.show("asked", lines, cells, "words_over_layers", rows=cells)))
    text = render(
        "lens.html",
        about=about,
        figures=shown,
        said=_read_out(said),
        cells=_shown(cells),
        sites=about["sites"],
    )
    return Section(f"What states say: {Path(str(about['data'])).name}", text)


def over_layers(told: pd.DataFrame) -> pd.DataFrame:
    """Means over examples, a row a place, kind of word and layer: `beaten` with its 95 % interval, `rank`,
    `p`, `null_p` and `n`. The tokens of the image are one place, each example's mean over them."""
    rows = told[told["beaten"].notna()]
    place = rows["slot"].map(lambda slot: "image" if slot.startswith("image") else slot)
    rows = rows.assign(place=place.replace("readout", "read-out position"))
    order = rows["place"].value_counts().index[:4]  # of many slots those that most examples have
    rows = rows[rows["place"].isin(["image", "read-out position", *order[:2]])]
    keys = ["place", "what", "layer"]
    found = means(rows, keys, "beaten", intervals=True).rename(columns={"mean": "beaten"}).drop(columns="sd")
    for value in ("rank", "p", "null_p"):
        found = found.merge(
            means(rows, keys, value)[[*keys, "mean"]].rename(columns={"mean": value}), on=keys
        )
    return found.sort_values(keys, ignore_index=True, kind="stable")


def _read_out(said: pd.DataFrame) -> pd.DataFrame:
    """What the first example's read-out position says, a row a layer."""
    rows = said[(said["slot"] == "readout") & (said["example"] == said["example"].iloc[0])]
    words = [r.predicted if pd.isna(r.p) else f"{r.predicted} ({r.p:.0%})" for r in rows.itertuples()]
    table = rows.assign(words=words).groupby(["site", "layer"], sort=False)["words"].agg(", ".join)
    return table.reset_index()[["layer", "site", "words"]]


def _shown(cells: pd.DataFrame) -> pd.DataFrame:
    """The numbers of the figure as the page shows them: text."""
    table = cells[["place", "what", "layer", "rank", "p", "null_p", "beaten", "n"]].copy()
    for name in ("p", "null_p"):
        table[name] = [short_number(number).removeprefix("+") for number in table[name]]
    return table

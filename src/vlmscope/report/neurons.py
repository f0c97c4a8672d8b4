"""The section of what `neurons` wrote: found, described, perturbed or edited."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope.errors import StoreError
from vlmscope.report import figures, image_maps
from vlmscope.report.folder import read_json, read_pictures
from vlmscope.report.gallery import Gallery, Section, Shown, render

MEASURES = ("auc", "selectivity", "overlap", "overlap, shuffled", "p drop, zero")
"""The measures that are drawn, of those that were taken."""
PER_FIGURE = 6


def section(folder: Path, gallery: Gallery) -> Section:
    about = read_json(folder / "neurons.json")
    write = {"find": _find, "describe": _describe, "perturb": _perturb, "edit": _edit}
    if about.get("what") not in write:
        raise StoreError(f"{folder / 'neurons.json'}: is of another version; write that folder anew")
    return write[str(about["what"])](folder, gallery, about)


def _csv(file: Path) -> pd.DataFrame:
    """A table in which a word such as `null` or `NA` is a word."""
    return pd.read_csv(file, keep_default_na=False)


def _find(folder: Path, gallery: Gallery, about: Mapping[str, Any]) -> Section:
    layers = _csv(folder / "layers.csv")
    layers = layers.pivot_table(index="word", columns="layer", values="neurons", fill_value=0)
    layers.columns = [f"layer {n}" for n in layers.columns]
    text = render(
        "neurons_find.html",
        model=about["model"],
        captions=_csv(folder / "captions.csv"),
        tokens=_csv(folder / "tokens.csv").head(20),
        layers=layers.astype(int).reset_index(),
    )
    return Section("Neurons that contribute to words", text)


def _describe(folder: Path, gallery: Gallery, about: Mapping[str, Any]) -> Section:
    cards, driving = _csv(folder / "cards.csv"), _csv(folder / "driving.csv")
    measured, measures = None, None
    if (folder / "measures.csv").is_file():
        measures = pd.read_csv(folder / "measures.csv")
        measured = gallery.show(
            "measures",
            figures.measures(measures, [name for name in MEASURES if name in set(measures["measure"])]),
            "Measured on pictures on which the neurons were not chosen, with 95 % intervals. The null are neurons "
            "chosen by shuffled labels for the same token; for shuffled patches it is chance.",
            measures,
        )
        measures = measures[measures["method"] == "contribution"].drop(columns="method")
    text = render(
        "neurons_describe.html",
        model=about["model"],
        cards=cards.drop(columns="weights"),
        maps=[("", shown) for shown in _maps(folder, gallery)],
        driving=driving[driving["rank"] <= 3],
        measured=measured,
        measures=measures,
    )
    return Section("Neurons, one by one", text)


def _maps(folder: Path, gallery: Gallery) -> list[Shown]:
    """The maps of neurons, then those of means, a few rows a figure."""
    maps, pictures = pd.read_parquet(folder / "maps.parquet"), read_pictures(folder)
    is_mean = maps["neuron"].str.contains(": mean of top")
    captions = {
        "maps": "Activation over the patches of the pictures that drive each neuron most; the line is around the "
        "patches above the 95th percentile.",
        "means": "The mean activation of a word's top neurons over the pictures that drive it most.",
    }
    shown = []
    for (what, caption), rows in zip(captions.items(), (maps[~is_mean], maps[is_mean]), strict=True):
        names = list(rows["neuron"].unique())
        for start in range(0, len(names), PER_FIGURE):
            some = rows[rows["neuron"].isin(names[start : start + PER_FIGURE])]
            drawn = image_maps.neuron_maps(some, pictures)
            shown.append(gallery.show(f"{what}-{start // PER_FIGURE}", drawn, caption, some))
    return shown


def _perturb(folder: Path, gallery: Gallery, about: Mapping[str, Any]) -> Section:
    text = render("neurons_perturb.html", model=about["model"], perturbed=_csv(folder / "perturb.csv"))
    return Section("Words without their neurons", text)


def _edit(folder: Path, gallery: Gallery, about: Mapping[str, Any]) -> Section:
    captions, columns = _csv(folder / "captions.csv"), pd.read_csv(folder / "columns.csv")
    pictures = read_pictures(folder)
    captions = captions[captions["example"].isin(pictures)].drop_duplicates("example")
    objects = folder / "objects.csv"
    text = render(
        "neurons_edit.html",
        model=about["model"],
        columns=len(columns),
        size=about["size"],
        share=f"{(columns['change'] / columns['length'].clip(lower=1e-12)).median():.0%}",
        measures=pd.read_csv(folder / "measures.csv"),
        captions=captions.sort_values("has", ascending=False, kind="stable"),
        pictures=pictures,
        objects=pd.read_csv(objects) if objects.is_file() else None,
    )
    return Section(f"Edit: {about['from']} to {about.get('to') or 'anything else'}", text)

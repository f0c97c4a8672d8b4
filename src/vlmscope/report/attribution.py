"""The section of a run of `attribute`: which heads and patches account for the logit difference."""

from __future__ import annotations

import pandas as pd

from vlmscope import stored
from vlmscope.report.gallery import Gallery, Section, Shown, render
from vlmscope.report.ranking import strongest
from vlmscope.report.run import cells_by_kind, on_pictures
from vlmscope.report.words import KINDS, TOWERS, ends, short_number, upper_first
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import OF_ATTRIBUTE, SPEC, Run
from vlmscope.studies.tables import is_head, is_single, means

VALUE = "score"
NEEDED = "model? data? corrupt? method? word?"
"""What the page says of a run, by the names in its shape."""


def section(run: Run, title: str, gallery: Gallery) -> Section:
    """The section of a run of `attribute`, whose table is read once."""
    needed = {name.removesuffix("?"): (SPEC | OF_ATTRIBUTE)[name] for name in NEEDED.split()}
    stored.fits(run.spec, needed, run.path / "run.json", "attribute again into another --out")
    base, table, word = run.baselines(), run.attributions(), run.spec["word"]
    known, excluded = knows(base), base["excluded"].astype(bool)
    examples = run.pictures()
    pictures = {e["id"]: e["clean_image"] for e in examples if e.get("clean_image") and "id" in e}
    shown: list[tuple[str, Shown]] = []
    for tower in TOWERS:
        rows = table[(table["tower"] == tower) & table[VALUE].notna()]
        cells = cells_by_kind(rows[is_head(rows)], VALUE, True)
        if cells:
            panels = {upper_first(KINDS[kind]) + " heads": each for kind, each in cells.items()}
            shown.append((f"Heads, {TOWERS[tower]}", gallery.show_panels(f"{tower}-heads", panels, 0.0)))
        shown += on_pictures(_patches(rows), pictures, 0.0, VALUE, gallery)
    text = render(
        "attribution.html",
        run=run,
        word=word,
        known=known,
        corrupted=run.spec["corrupt"]["kind"] != "none",
        ran=base[~excluded],
        left=int(excluded.sum()),
        figures=shown,
        layers=_layers(table),
        strongest=_strongest(table),
    )
    name = f"{upper_first(run.spec['method'])} effects: {title}"
    return Section(name, text, known.severity == "unknown" and word is None)


def _patches(rows: pd.DataFrame) -> pd.DataFrame:
    """What all heads of a layer bring of each patch of the picture, as a patch's own row."""
    edges = rows[rows["site"].str.contains("<", regex=False) & rows["position"].notna()]
    edges = edges[edges["token"].str.fullmatch(r"[0-9]{1,3},[0-9]{1,3}").fillna(False).astype(bool)]
    whole = edges["unit"].isna()
    edges = edges[~whole if (~whole).any() else whole]
    keys = ["example", "corruption", "tower", "layer", "kind", "position", "token", "slot"]
    found = edges.groupby(keys, sort=False)[VALUE].sum().reset_index()
    return found.assign(site=found["tower"] + "." + found["layer"].astype(str), unit=None, role=None)


def _layers(table: pd.DataFrame) -> pd.DataFrame:
    """What each layer's parts give in all, by kind, means over examples; only what is there."""
    rows = table[is_single(table) & (table["unit"] != "b") & table[VALUE].notna()]
    part = rows["unit"].astype("string").str.get(0).map({"h": " heads", "n": " neurons"}).fillna("")
    sums = (
        rows.assign(what=rows["kind"] + part).groupby(["example", "layer", "what"], sort=False)[VALUE].sum()
    )
    cells = means(sums.reset_index(), ["layer", "what"], VALUE)
    table = cells.pivot(index="layer", columns="what", values="mean").reset_index()
    table.columns.name = None
    return table.rename(columns={"resid_pre": "embedding"})


def _strongest(table: pd.DataFrame) -> pd.DataFrame:
    """The largest scores as the page shows them: text; edges only where there is nothing else."""
    is_edge = table["site"].str.contains("<", regex=False)
    found = strongest(table[~is_edge] if (~is_edge & (table["unit"] != "b")).any() else table, 15, VALUE)
    return pd.DataFrame(
        {
            "site": found["site"],
            "mean score": found["mean"].map(short_number),
            "95 % interval": list(map(ends, found["low"], found["high"])),
            "SD": found["sd"],
            "examples": found["n"],
        }
    )

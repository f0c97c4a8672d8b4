"""The section of a run of `attribute`: which sites account for the logit difference, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from vlmscope import stored
from vlmscope.report import image_maps
from vlmscope.report.figures import scores_and_effects
from vlmscope.report.gallery import Gallery, Section, Shown, render
from vlmscope.report.ranking import strongest
from vlmscope.report.run import cells_by_kind, on_pictures, patching
from vlmscope.report.words import KINDS, TOWERS, ends, short_number, upper_first
from vlmscope.studies.agreement import UNSIGNED, agreement, lines
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import OF_ATTRIBUTE, SPEC, Run
from vlmscope.studies.tables import is_head, is_single, means

VALUE = "score"
NEEDED = {"direct": "model? data? corrupt? method? word?"}
ESTIMATES = "model? data? corrupt? method? verify? direction? metric?"
"""What the page says of a run, by the names in its shape."""
NAMES = {
    "direct": "Direct effects",
    "atp": "Attribution patching",
    "atp-star": "Attribution patching (AtP*)",
    "relp": "Relevance patching",
    "ig": "Integrated gradients",
}
MOST = 9
"""Panels of a figure of scores and effects, at most."""


def section(run: Run, title: str, gallery: Gallery) -> Section:
    """The section of a run of `attribute`, whose table is read once."""
    method = run.spec["method"]
    names = NEEDED.get(method, ESTIMATES).split()
    needed = {name.removesuffix("?"): (SPEC | OF_ATTRIBUTE)[name] for name in names}
    stored.fits(run.spec, needed, run.path / "run.json", "attribute again into another --out")
    base, table, word = run.baselines(), run.attributions(), run.spec.get("word")
    known, excluded = knows(base), base["excluded"].astype(bool)
    pictures = image_maps.clean_pictures(run.pictures())
    signed = method != UNSIGNED
    found = agreement(table, run.spec["verify"], signed=signed) if run.spec.get("verify") else {}
    shown: list[tuple[str, Shown]] = []
    if found:
        kinds = dict(list(found.items())[:MOST])
        rows = table[table["exact"].notna()]
        rows = rows if signed else rows.assign(exact=rows["exact"].abs())
        drawn = scores_and_effects(rows, kinds)
        words = {"rows": rows, "method": NAMES.get(method, method)}
        shown.append(
            ("Scores and exact patches", gallery.show("exact", drawn, rows, "scores_and_effects", **words))
        )
    for tower in TOWERS:
        rows = table[(table["tower"] == tower) & table[VALUE].notna()]
        cells = cells_by_kind(rows[is_head(rows)], VALUE, True)
        if cells:
            panels = {upper_first(KINDS[kind]) + " heads": each for kind, each in cells.items()}
            shown.append((f"Heads, {TOWERS[tower]}", gallery.show_panels(f"{tower}-heads", panels, 0.0)))
        shown += on_pictures(_patches(rows), pictures, 0.0, VALUE, gallery)
        if method != "direct":
            shown += _modules(rows[rows["unit"].isna()], tower, pictures, gallery)
    text = render(
        "attribution.html",
        run=run,
        word=word,
        method=method,
        agreement=[] if not found else lines(found),
        patching="" if method == "direct" else patching(run.spec),
        known=known,
        corrupted=run.spec["corrupt"]["kind"] != "none",
        ran=base[~excluded],
        left=int(excluded.sum()),
        figures=shown,
        layers=_layers(table) if method == "direct" else pd.DataFrame(),
        strongest=_strongest(table),
    )
    name = f"{NAMES.get(method, method)}: {title}"
    return Section(name, text, known.severity == "unknown" and word is None)


def _modules(
    rows: pd.DataFrame, tower: str, pictures: Mapping[str, bytes], gallery: Gallery
) -> Iterator[tuple[str, Shown]]:
    """Whole kinds in one tower: over the picture, and layers by tokens."""
    is_patch = image_maps.is_patch(rows)
    yield from on_pictures(rows[is_patch], pictures, 0.0, VALUE, gallery)
    cells = {} if tower == "vision" else cells_by_kind(rows[~is_patch], VALUE, False)
    if cells:
        panels = {upper_first(KINDS[kind]): each for kind, each in cells.items()}
        yield f"Layers and tokens, {TOWERS[tower]}", gallery.show_panels(f"{tower}-tokens", panels, 0.0)


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

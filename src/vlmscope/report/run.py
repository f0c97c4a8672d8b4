"""The section of one run, and that of several runs beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from vlmscope.report import figures, image_maps
from vlmscope.report.captions import (
    KINDS,
    TOWERS,
    ends,
    kinds_in,
    largest_change,
    long,
    short_number,
    upper_first,
)
from vlmscope.report.folder import read_json
from vlmscope.report.gallery import Gallery, Section, Shown, render
from vlmscope.report.ranking import strongest
from vlmscope.studies.run_folder import Run
from vlmscope.studies.tables import head_cells, head_slot, knows, token_cells, wide

Cells = dict[str, pd.DataFrame]
"""The cells of a table of layers, by kind."""
Headed = Iterator[tuple[str, Shown]]
"""Figures with their headings."""


class Reported(NamedTuple):
    """A run in the report, and the cells of its figures by tower, of whole modules or of heads."""

    section: Section
    cells: dict[tuple[str, bool], Cells]


def report(run: Run, title: str, gallery: Gallery) -> Reported:
    """The section of a run, whose table is read once."""
    base, effects = run.baselines(), run.effects()
    known, excluded = knows(base), base["excluded"].astype(bool)
    gap = (base["ld_clean"] - base["ld_corrupt"]).mean()
    gap = 0.0 if pd.isna(gap) else abs(float(gap))
    examples = run.pictures()
    cells: dict[tuple[str, bool], Cells] = {}
    shown: list[tuple[str, Shown]] = []
    single = effects[~effects["site"].str.contains("/", regex=False) & effects["logit_diff"].notna()]
    for tower in TOWERS:
        rows = single[single["tower"] == tower]
        modules = rows[rows["unit"].isna()]
        patches = image_maps.is_patch(modules)
        cells[tower, False] = {} if tower == "vision" else _tokens(modules[~patches], tower)
        cells[tower, True] = _heads(rows, tower)
        shown += _images(modules[patches], tower, examples, gap, gallery)
        for has_heads, heading in ((False, "Layers and tokens"), (True, "Heads")):
            if found := cells[tower, has_heads]:
                name = f"{tower}-{'heads' if has_heads else 'tokens'}"
                titled = {_panel_title(kind, table): table for kind, table in found.items()}
                shown.append((f"{heading}, {TOWERS[tower]}", _panels(name, titled, gap, gallery)))
    text = render(
        "run.html",
        known=known,
        facts=_facts(run),
        check=read_json(run.path / "run.json").get("check"),
        examples=examples,
        ran=base[~excluded],
        left=base[excluded],
        figures=shown,
        strongest=_strongest(effects),
    )
    return Reported(Section(title, text, known.severity == "unknown"), cells)


def together(reported: Sequence[Reported], gallery: Gallery) -> list[Section]:
    """What at least two runs have patched of a tower and kind, beside each other."""
    shown = []
    held = {
        (tower, has_heads, kind): None
        for each in reported
        for (tower, has_heads), cells in each.cells.items()
        for kind in cells
        if tower != "vision"
    }
    for tower, has_heads, kind in held:
        panels, gaps = {}, []
        for each in reported:
            cells = each.cells[tower, has_heads].get(kind)
            if cells is not None:
                at = f", at {cells.attrs['slot']}" if has_heads else ""
                panels[f"{each.section.title}{at}, n = {cells['n'].max()}"] = cells
                gaps.append(cells.attrs["gap"] or 0.0)
        if len(panels) > 1:
            name = f"{tower}-{kind}{'' if has_heads else '-tokens'}"
            title = f"{upper_first(KINDS[kind])}{' heads' if has_heads else ''}, {TOWERS[tower]}"
            shown.append((title, _panels(name, panels, max(gaps), gallery)))
    if not shown:
        return []
    unknown = [each.section.title for each in reported if each.section.is_unknown]
    text = render("together.html", unknown=unknown, figures=shown)
    return [Section("All runs", text, len(unknown) == len(reported))]


def corruption(spec: dict[str, Any]) -> str:
    """What a run corrupts, in words."""
    corrupt = spec.get("corrupt") or {}
    if corrupt.get("kind") != "noise":
        return f"{corrupt.get('kind', 'unknown')} corrupted"
    return (
        f"noise on the {corrupt.get('at')} ({corrupt.get('form')}, scale {corrupt.get('scale')}, "
        f"{corrupt.get('draws')} draws)"
    )


def _facts(run: Run) -> dict[str, str]:
    spec = run.spec
    source, base = ("clean", "corrupt") if spec.get("direction") != "noise" else ("corrupt", "clean")
    versions = ", ".join(f"{name} {version}" for name, version in (spec.get("versions") or {}).items())
    return {
        "model": f"{spec.get('model')} (weights {str(spec.get('weights'))[:12]}…)",
        "data": f"{spec.get('data')}, {spec.get('n_examples')} examples",
        "corruption": corruption(spec),
        "patching": f"{source} activations into the {base} run ({spec.get('direction')})",
        "sites": ", ".join(map(str, spec.get("sites") or [])),
        "computed": f"{spec.get('engine')} engine, {spec.get('dtype')}, {spec.get('device')}, "
        f"seed {spec.get('seed')}; {versions}",
        "folder": str(run.path) + ("" if run.finished else " (not finished)"),
    }


def _strongest(effects: pd.DataFrame) -> pd.DataFrame:
    """The strongest sites as the page shows them: text."""
    table = strongest(effects, n=15)
    has_place = table["site"].str.contains("@", regex=False)
    intervals = zip(table["low"], table["high"], strict=True)
    return pd.DataFrame(
        {
            "site": table["site"].where(has_place, table["site"] + " at " + table["slot"]),
            "token": table["token"],
            "mean change of LD": table["mean"].map(short_number),
            "95 % interval": [ends(low, high) for low, high in intervals],
            "SD": table["sd"],
            "examples": table["n"],
        }
    )


def _tokens(rows: pd.DataFrame, tower: str) -> Cells:
    """Layer x slot of each kind; patches of the image have figures of their own."""
    return {kind: token_cells(rows, tower=tower, kind=kind, intervals=True) for kind in kinds_in(rows)}


def _heads(rows: pd.DataFrame, tower: str) -> Cells:
    """Layer x head of each kind of attention, where the tower is read out."""
    heads = rows[rows["unit"].astype("string").str.startswith("h").fillna(False).astype(bool)]
    return {
        kind: head_cells(
            heads, tower=tower, kind=kind, slot=head_slot(heads[heads["kind"] == kind]), intervals=True
        )
        for kind in kinds_in(heads)
    }


def _panel_title(kind: str, cells: pd.DataFrame) -> str:
    heads = f" heads at {cells.attrs['slot']}" if "head" in cells else ""
    return f"{upper_first(KINDS[kind])}{heads}"


def _panels(name: str, cells: Cells, gap: float, gallery: Gallery) -> Shown:
    """A figure of tables of cells side by side; the cells are its data."""
    tables = {title: wide(table) for title, table in cells.items()}
    caption = largest_change(cells, figures.full_colour(tables.values(), gap=gap))
    return gallery.show(name, figures.panels(tables, gap=gap), caption, long(cells))


def _images(
    rows: pd.DataFrame, tower: str, examples: Sequence[dict[str, Any]], gap: float, gallery: Gallery
) -> Headed:
    """The effect of image patches, over the first kept picture."""
    if rows.empty:
        return
    places = rows["token"].str.split(",", expand=True).astype(int)
    grid = (int(places[0].max()) + 1, int(places[1].max()) + 1)
    pictures = {e["id"]: e["clean_image"] for e in examples if e.get("clean_image")}
    rows = rows[rows["position"].notna() & rows["example"].isin(list(pictures))]
    for kind in kinds_in(rows):
        cells = rows[rows["kind"] == kind]
        example = cells["example"].iloc[0]
        cells = cells[cells["example"] == example]
        if len(cells) < 2:
            continue
        best = cells.loc[cells["logit_diff"].abs().idxmax()]
        yield (
            f"Image patches, {KINDS[kind]}, {TOWERS[tower]}",
            gallery.show(
                f"{tower}-{kind}-image",
                image_maps.image_grid(cells, pictures[example], grid, kind=kind, tower=tower, gap=gap),
                f"Each patch of the image on its own, over the clean picture of one example, {example}. The colour "
                f"scale is this figure's own. The largest change of LD is {short_number(best['logit_diff'])}, at "
                f"layer {best['layer']}, patch {best['token']} (row,column).",
                cells,
            ),
        )

"""The section of one run, and that of several runs beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import pandas as pd

from vlmscope import stored
from vlmscope.report import flows, image_maps
from vlmscope.report.gallery import Gallery, Section, Shown, render
from vlmscope.report.heat_maps import CHANGED, IN_LOGITS
from vlmscope.report.ranking import strongest
from vlmscope.report.words import KINDS, TOWERS, ends, kinds_in, short_number, upper_first
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import OPTIONAL, SPEC, Run
from vlmscope.studies.tables import cells_of, change_of, head_slot, is_head, is_single, wide

MOST = 6
"""Panels of a figure of sources, at most."""
Cells = dict[str, pd.DataFrame]
"""The cells of a table of layers, by kind."""


class Reported(NamedTuple):
    """A run in the report, and the cells of its figures by tower, of whole modules or of heads."""

    section: Section
    cells: dict[tuple[str, bool], Cells]


def report(run: Run, title: str, gallery: Gallery) -> Reported:
    """The section of a run, whose table is read once."""
    whole = {name if name in OPTIONAL else name.removesuffix("?"): shape for name, shape in SPEC.items()}
    stored.fits(run.spec, whole, run.path / "run.json", "sweep again into another --out")
    base, effects = run.baselines(), run.effects()
    known, excluded = knows(base), base["excluded"].astype(bool)
    gap = (base["ld_clean"] - base["ld_corrupt"]).mean()
    gap = 0.0 if pd.isna(gap) else abs(float(gap))
    examples = run.pictures()
    pictures = image_maps.clean_pictures(examples)
    cells: dict[tuple[str, bool], Cells] = {}
    shown: list[tuple[str, Shown]] = []
    value = change_of(effects)
    single = effects[is_single(effects) & effects[value].notna()]
    if "source_site" in effects:
        shown += list(_crossed(single, value, gap, gallery))
        single = single.head(0)
    for tower in TOWERS:
        rows = single[single["tower"] == tower]
        modules = rows[rows["unit"].isna()]
        is_patch = image_maps.is_patch(modules)
        shown += on_pictures(modules[is_patch], pictures, gap, value, gallery)
        cells[tower, False] = {} if tower == "vision" else cells_by_kind(modules[~is_patch], value, False)
        cells[tower, True] = cells_by_kind(rows[is_head(rows)], value, True)
        for of_heads, heading in ((False, "Layers and tokens"), (True, "Heads")):
            panels = {
                upper_first(KINDS[kind]) + (f" heads at {table.attrs['slot']}" if of_heads else ""): table
                for kind, table in cells[tower, of_heads].items()
            }
            if panels:
                name = f"{tower}-{'heads' if of_heads else 'tokens'}"
                shown.append((f"{heading}, {TOWERS[tower]}", gallery.show_panels(name, panels, gap)))
    shown += flows.figures_of(effects, gallery)
    text = render(
        "run.html",
        run=run,
        spec=run.spec,
        corruption=corruption(run.spec),
        patching=patching(run.spec),
        metric=run.spec.get("metric", "ld"),
        changed=CHANGED[value],
        left_out=_left_out(effects),
        known=known,
        examples=examples,
        ran=base[~excluded],
        left=base[excluded],
        figures=shown,
        strongest=_strongest(effects, value),
    )
    return Reported(Section(title, text, known.severity == "unknown"), cells)


def together(reported: Sequence[Reported], gallery: Gallery) -> list[Section]:
    """What at least two runs have patched of a tower and kind, beside each other."""
    shown = []
    for tower, of_heads, kind, values in product(TOWERS, (False, True), KINDS, (IN_LOGITS, ("p_change",))):
        panels, gaps = {}, []
        for each in reported:
            cells = each.cells[tower, of_heads].get(kind)
            if cells is not None and tower != "vision" and cells.attrs["value"] in values:
                at = f", at {cells.attrs['slot']}" if of_heads else ""
                panels[f"{each.section.title}{at}, n = {cells['n'].max()}"] = cells
                gaps.append(cells.attrs["gap"] or 0.0)
        if len(panels) > 1:
            name = f"{tower}-{kind}{'' if of_heads else '-tokens'}{'' if values is IN_LOGITS else '-p'}"
            heading = f"{upper_first(KINDS[kind])}{' heads' if of_heads else ''}, {TOWERS[tower]}"
            shown.append((heading, gallery.show_panels(name, panels, max(gaps))))
    if not shown:
        return []
    unknown = [each.section.title for each in reported if each.section.is_unknown]
    text = render("together.html", unknown=unknown, figures=shown)
    return [Section("All runs", text, len(unknown) == len(reported))]


def corruption(spec: dict[str, Any]) -> str:
    """What a run corrupts, in words."""
    corrupt = spec.get("corrupt") or {"kind": "unknown"}
    if corrupt["kind"] != "noise":
        return f"{corrupt['kind'].replace('none', 'nothing')} corrupted"
    form = f"{corrupt.get('form')}, scale {corrupt.get('scale')}, {corrupt.get('draws')} draws"
    return f"noise on the {corrupt.get('at')} ({form})"


def name(spec: dict[str, Any]) -> str:
    """What tells a run from others of its data: corruption, what is patched, and its metric."""
    words = [] if (spec.get("corrupt") or {}).get("kind") == "none" else [corruption(spec)]
    if spec.get("patch", "clean") != "clean" or "from" in spec:
        words.append(patching(spec))
    elif spec.get("direction") == "noise":
        words.append("corrupt into clean")
    if spec.get("metric", "ld") != "ld":
        words.append(f"metric {spec['metric']}")
    return ", ".join(words)


def patching(spec: dict[str, Any]) -> str:
    """What a run writes into which other run, in words."""
    place = f" from {spec['from']}" if "from" in spec else ""
    if any("<" in site for site in spec.get("sites", ())):
        return f"attention knocked out of the clean run ({spec['patch']})"
    if (patch := spec.get("patch", "clean")) == "resample":
        return f"clean run with activations resampled from other examples{place}"
    if patch != "clean":
        return f"{patch} ablation of the clean run{place}"
    if place and (spec.get("corrupt") or {}).get("kind") == "none":
        return f"activations of the run itself{place}"
    ends = ("corrupt", "clean") if spec.get("direction") == "noise" else ("clean", "corrupt")
    return f"{ends[0]} activations{place} into the {ends[1]} run"


def _left_out(effects: pd.DataFrame) -> str:
    """One sentence about patches that have no place in a figure of layers, or nothing."""
    is_set = effects["unit"].astype("string").str.startswith("h[").fillna(False).astype(bool)
    odd = effects.loc[is_set | effects["site"].str.contains(" + ", regex=False), "site"]
    text = "Sets of heads and sums of sites, such as {}, are in no figure: they are no single heads."
    return "" if odd.empty else text.format(odd.iloc[0])


def _crossed(rows: pd.DataFrame, value: str, gap: float, gallery: Gallery) -> Iterator[tuple[str, Shown]]:
    """Where values come from another place: the layers that they go to by those that they are from, at the
    slots that most examples hold."""
    rows = rows[rows["unit"].isna()]
    if rows.empty:
        return
    origin = rows["source_site"].str.partition("@")[0]
    rows = rows.assign(slot=origin, at=rows["slot"], position=pd.NA).drop(columns="source_site")
    for tower, some in rows.groupby("tower", sort=False):
        panels = {}
        for at in (
            some.groupby("at")["example"].nunique().sort_values(ascending=False, kind="stable").index[:MOST]
        ):
            here = some[some["at"] == at]
            for kind in kinds_in(here):
                cells = cells_of(here, kind=kind, value=value, intervals=True)
                order = sorted(cells.attrs["order"], key=lambda name: int(name.split(".")[1].split("/")[0]))
                cells.attrs |= {"order": order, "labels": {name: name for name in order}, "roles": []}
                panels[f"{upper_first(KINDS[kind])} at {at}"] = cells
        heading = f"Layers and where their values come from, {TOWERS[str(tower)]}"
        tables = {title: wide(each).rename_axis(columns="values from") for title, each in panels.items()}
        yield heading, gallery.show_panels(f"{tower}-from", panels, gap, tables=tables)


def _strongest(effects: pd.DataFrame, value: str) -> pd.DataFrame:
    """The strongest sites as the page shows them: text."""
    if "source_site" in effects:
        parts = effects.groupby("source_site", sort=False)
        each = [strongest(rows, 15, value).assign(source=source) for source, rows in parts]
        table = pd.concat(each, ignore_index=True) if each else strongest(effects).assign(source="")
        table = table.sort_values("mean", key=abs, ascending=False, ignore_index=True).head(15)
    else:
        table = strongest(effects, n=15, value=value)
    has_place = table["site"].str.contains("@", regex=False)
    return pd.DataFrame(
        {
            "site": table["site"].where(has_place, table["site"] + " at " + table["slot"]),
            **({"from": table["source"]} if "source" in table else {}),
            "token": table["token"],
            f"mean {CHANGED[value]}": table["mean"].map(short_number),
            "95 % interval": list(map(ends, table["low"], table["high"])),
            "SD": table["sd"],
            "examples": table["n"],
        }
    )


def cells_by_kind(rows: pd.DataFrame, value: str, of_heads: bool) -> Cells:
    """Of each kind in one tower: layer x slot, or layer x head where the tower is read out."""
    found = {}
    for kind in kinds_in(rows):
        slot = head_slot(rows[rows["kind"] == kind]) if of_heads else None
        found[kind] = cells_of(rows, kind=kind, slot=slot, value=value, intervals=True)
    return found


def on_pictures(
    rows: pd.DataFrame, pictures: Mapping[str, bytes], gap: float, value: str, gallery: Gallery
) -> Iterator[tuple[str, Shown]]:
    """The effect of image patches of one tower, over the first kept picture, with its heading."""
    kept = rows[rows["position"].notna() & rows["example"].isin(list(pictures))]
    for kind in kinds_in(kept):
        cells = kept[kept["kind"] == kind]
        example, tower = cells["example"].iloc[0], cells["tower"].iloc[0]
        cells = cells[cells["example"] == example]
        if len(cells) > 1:
            shape = tuple(image_maps.places(rows)[["row", "column"]].max() + 1)
            drawn = image_maps.image_grid(cells, pictures[example], shape, kind=kind, value=value, gap=gap)
            best = cells.loc[cells[value].abs().idxmax()]
            words = {"example": example, "best": best, "value": value, "what": CHANGED[value]}
            heading = f"Image patches, {KINDS[kind]}, {TOWERS[tower]}"
            yield heading, gallery.show(f"{tower}-{kind}-image", drawn, cells, "image", **words)

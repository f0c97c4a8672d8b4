"""The sections of what `steer` and `probe` wrote: layers by effect, beside their nulls."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from vlmscope import stored
from vlmscope.report.canvas import DARK, Margins, add_legend, grid, set_frame, set_layers, set_title
from vlmscope.report.gallery import Gallery, Section, render
from vlmscope.report.words import KINDS, TOWERS, ends, percent, short_number, upper_first
from vlmscope.stored import formats

BLUE, ORANGE, GREY = "#4C78A8", "#B07020", "#9a9a9a"
Line = tuple[str, str, str | None, str | None, str]
"""Columns of a mean and of its ends, what it is called, and its colour."""


def steered(folder: Path, gallery: Gallery) -> Section:
    """Where a direction works, what it does to answers, and what it harms."""
    about, tables = stored.read(folder, formats.STEER)
    layers, measures = tables["layers"], tables["measures"]
    lines = [
        ("null", "random directions as long, and 95 % of them", "null_low", "null_high", GREY),
        ("effect", "the direction, with its 95 % interval", "low", "high", BLUE),
    ]
    scored = f"log P({about['word']})" if about["word"] else "LD"
    panels = {
        f"{_place(rows)}, strength {strength:g}": rows
        for (_, _, _, strength), rows in layers.groupby(["tower", "kind", "position", "strength"], sort=False)
    }
    drawn = by_layer(panels, [(f"change of {scored}", lines)])
    taken = layers[layers["chosen"].astype(bool)]
    best = taken.loc[taken["effect"].idxmax()]
    shown = gallery.show("layers", drawn, layers, "steering", best=best, rows=layers, scored=scored)
    captions = tables["captions"]
    text = render(
        "steer.html",
        about=about,
        scored=scored,
        shown=shown,
        works=layers.loc[layers["works"].astype(bool), "site"].nunique(),
        sites=layers["site"].nunique(),
        measures=measures.assign(
            interval=[
                ends(row.low, row.high, short_number if row.measure in ("effect", "kl") else percent)
                for row in measures.itertuples()
            ]
        )[["strength", "site", "measure", "set", "value", "interval", "null", "n"]],
        changed=captions[captions["changed"].astype(bool)].head(20).drop(columns="changed"),
    )
    return Section(f"Direction: {about['sets']}", text)


def probed(folder: Path, gallery: Gallery) -> Section:
    """What probes read off layers, above what patches of the same sites move."""
    about, tables = stored.read(folder, formats.PROBE)
    table = tables["probes"]
    right = [
        ("chance", "majority class", None, None, GREY),
        ("shuffled", "shuffled labels", None, None, DARK),
        ("accuracy", "probe", "low", "high", BLUE),
    ]
    if table["held_out"].notna().any():
        right.append(("held_out", f"{about['held_out']} never seen", "held_out_low", "held_out_high", ORANGE))
    moved = [("effect", "patch of the site", "effect_low", "effect_high", BLUE)]
    groups = table.groupby(["tower", "kind", "position"], sort=False)
    panels = {_place(rows): rows for _, rows in groups}
    drawn = by_layer(panels, [("accuracy", right), ("effect of a patch (logits)", moved)])
    best = table.loc[table["accuracy"].idxmax()]
    shown = gallery.show("probes", drawn, table, "probes", best=best, rows=table)
    columns = "site n accuracy chance shuffled p_value held_out effect".split()
    text = render("probe.html", about=about, shown=shown, table=table[columns])
    return Section(f"Probes of {about['label']}", text)


def _place(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{upper_first(KINDS[first['kind']])} at {first['position']}, {TOWERS[first['tower']]}"


def by_layer(
    panels: Mapping[str, pd.DataFrame],
    rows: Sequence[tuple[str, Sequence[Line]]],
    *,
    ax: Iterable[Axes] | None = None,
) -> list[Axes]:
    """Lines over layers, with bands for their ends: a panel for each table, by its title, and each of `rows`,
    which are what stands at the side and the lines. `ax` are axes to draw into, one a panel."""
    across = min(3, len(panels)) if len(rows) == 1 else len(panels)
    columns = min(2, across)  # one panel is not wider than a line of the legend
    entries = {line[1] for _, lines in rows for line in lines}
    margins = Margins(0.75, 0.6 + 0.18 * -(-len(entries) // columns), 0.15, 0.55, across=0.55, down=0.85)
    axes = grid(ax, len(panels) * len(rows), across, (3.2, 2.0), margins)
    drawn = [(table, title, label, lines) for label, lines in rows for title, table in panels.items()]
    for n, (spot, (table, title, label, lines)) in enumerate(zip(axes, drawn, strict=True)):
        table = table.sort_values("layer")
        for column, name, low, high, colour in lines:
            spot.plot(table["layer"], table[column], "-o", color=colour, ms=3.5, lw=1.5, label=name)
            if low is not None and high is not None:
                spot.fill_between(table["layer"], table[low], table[high], color=colour, alpha=0.2, lw=0)
        spot.axhline(0.0, color="#cccccc", lw=0.8, zorder=0)
        if n < len(panels):
            set_title(spot, textwrap.fill(title, 46), 8.5)
        if n % across == 0:
            spot.set_ylabel(label, fontsize=8.5)
        set_layers(spot)
        set_frame(spot)
    add_legend(axes, columns)
    return axes

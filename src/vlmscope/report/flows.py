"""The flow of information: what cutting edges of attention does to the answer, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pandas as pd
from matplotlib.axes import Axes

from vlmscope.report.canvas import (
    DARK,
    Margins,
    add_legend,
    grid,
    set_frame,
    set_layers,
    set_title,
    text_width,
)
from vlmscope.report.gallery import Gallery, Shown
from vlmscope.report.words import KINDS, TOWERS, upper_first
from vlmscope.studies.tables import flow_table, is_edge

COLOURS = ("#4C78A8", "#D0502D", "#3F8F5B", "#8A5FA8", "#B8860B", "#5B5B5B", "#C2588E", "#2E9CA6")
"""One for each line; what is beyond moves the answer less and is left to the table."""
VALUES = {"p_change": "change of P(answer)", "ld_change": "change of LD (logits)"}


def flow(effects: pd.DataFrame, *, ax: Iterable[Axes] | None = None) -> list[Axes]:
    """Layers to the right, upwards the mean change of P(answer) and of LD when an edge is cut there: a line
    an edge (such as `last<image`), with its 95 % interval.

    `effects` is the table of `vlmscope.knockout`, or the rows of one tower and kind of it; knock-outs of
    single heads are left out. The edges that move the answer most are drawn, eight at most. `ax` are axes to
    draw into, one a panel. Gives the axes: of P(answer), and of LD where there is a foil.

    >>> import vlmscope
    >>> model, examples = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=2)
    >>> table = vlmscope.knockout(model, examples, ["decoder.*.attn@last<image", "decoder.*.attn@last<text"])
    >>> [axes.get_ylabel() for axes in flow(table)]
    ['change of P(answer)', 'change of LD (logits)']
    """
    tables = {value: _lines(effects, value) for value in VALUES if effects[value].notna().any()}
    first = next(iter(tables.values()))
    sizes = first.groupby("line", sort=False)["mean"].agg(lambda mean: mean.abs().max())
    names = list(sizes.sort_values(ascending=False, kind="stable").index[: len(COLOURS)])
    below = 0.55 + 0.2 * -(-len(names) // 2)
    size, margins = (4.2, 2.6), Margins(0.75, below, 0.15, 0.3, across=0.8)
    axes = grid(ax, len(tables), len(tables), size, margins)
    for spot, (value, table) in zip(axes, tables.items(), strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            line = table[table["line"] == name].sort_values("layer")
            spot.fill_between(line["layer"], line["low"], line["high"], color=colour, alpha=0.15, lw=0)
            spot.plot(line["layer"], line["mean"], color=colour, lw=1.6, marker="o", ms=3, label=name)
        spot.axhline(0.0, color=DARK, lw=0.6)
        set_layers(spot)
        spot.set_ylabel(VALUES[value], fontsize=9, color=DARK)
        set_frame(spot, "y")
    set_title(axes[0], _title(effects))
    add_legend(axes, 2 if max(map(text_width, names)) < 3.5 else 1)
    return axes


def figures_of(effects: pd.DataFrame, gallery: Gallery) -> Iterator[tuple[str, Shown]]:
    """A figure for each tower and kind whose edges were cut, with its heading."""
    rows = effects[is_edge(effects) & effects["unit"].isna()]
    for (tower, kind), some in rows.groupby(["tower", "kind"], sort=False):
        table = flow_table(some).merge(
            flow_table(some, value="ld_change")
            if some["ld_change"].notna().any()
            else flow_table(some).head(0),
            on=["edge", "tower", "kind", "unit", "window", "layer", "n"],
            how="left",
            suffixes=("", "_ld"),
        )
        best = table.loc[table["mean"].abs().idxmax()]
        drawn = gallery.show(f"{tower}-{kind}-flow", flow(some), table, "flow", rows=table, best=best)
        yield f"Flow of information, {KINDS[kind]}, {TOWERS[tower]}", drawn


def _lines(effects: pd.DataFrame, value: str) -> pd.DataFrame:
    """The table of the flow, with the name of each line: its edge, and its window where there are several."""
    table = flow_table(effects[effects["unit"].isna()], value=value)
    name = table["edge"]
    if table["window"].nunique() > 1:
        name = name + ", window of " + table["window"].astype(str)
    if len(table[["tower", "kind"]].drop_duplicates()) > 1:
        name = table["tower"] + " " + table["kind"] + " " + name
    return table.assign(line=name)


def _title(effects: pd.DataFrame) -> str:
    windows = flow_table(effects[effects["unit"].isna()])["window"]
    kinds = effects[["tower", "kind"]].drop_duplicates()
    words = "attention" if len(kinds) > 1 else f"{KINDS[kinds.iloc[0, 1]]}, {TOWERS[kinds.iloc[0, 0]]}"
    return upper_first(words) + (
        f", windows of {windows.max()} layers" if windows.nunique() == 1 < windows.max() else ""
    )

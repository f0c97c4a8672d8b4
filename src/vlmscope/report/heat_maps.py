"""Heat maps of tables, layers upwards: one in given axes, or several in a grid with one colour scale.

Red is towards the answer, blue towards the foil, white is no change, grey was not patched. What is next
to nothing has next to no colour: the scale of a figure does not end below `FLOOR` of the run's gap.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from math import cos, radians, sin
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from vlmscope.errors import DataError
from vlmscope.report.canvas import (
    BAR,
    DARK,
    NOT_PATCHED,
    Margins,
    add_bar,
    centred,
    drawable,
    figure_of,
    grid,
    set_title,
    text_width,
)
from vlmscope.report.words import short_number

VALUES = {
    "logit_diff": "change in logit difference (logits)",
    "ld_change": "change in logit difference (logits)",
    "p_change": "change in P(answer)",
    "value": "the metric after the patch",
    "effect": "normalised effect (1: as the clean run)",
    "p_restored": "change in P(answer)",
    "p_patched": "P(answer) after the patch",
    "score": "score (logits)",
    "restored": "share of P(answer) restored (1: clean)",
}
"""The columns that can be drawn, with what stands at the colour bar."""

FLOOR = 0.1
"""The share of the mean gap LD(clean) − LD(corrupt) below which no colour scale of `logit_diff` ends; also
where the scale of `effect`, which is a share of the gap already, may end."""
CHANGED = {
    "logit_diff": "change of LD",
    "ld_change": "change of LD",
    "p_change": "change of P(answer)",
    "score": "score",
}
"""What the columns that patches are ranked by are called in captions."""
PALE = 0.05
"""The share of full colour below which a cell looks white."""
IN_LOGITS = ("logit_diff", "ld_change", "score")
LEAST = {"effect": FLOOR, "p_restored": 0.02, "p_change": 0.02, "restored": 1.0}
"""Where a colour scale may end at all, whatever the gap: shares, probabilities; 0.05 for all others."""


def colour_scale(
    tables: Iterable[pd.DataFrame], value: str = "logit_diff", gap: float = 0.0
) -> ScalarMappable:
    """One colour scale: centred at zero for a change, with a floor; from 0 to 1 for a probability."""
    if value == "p_patched":
        return ScalarMappable(Normalize(0.0, 1.0), "viridis")
    return centred(tables, max(LEAST.get(value, 0.05), FLOOR * abs(gap) if value in IN_LOGITS else 0.0))


def full_colour(tables: Iterable[pd.DataFrame], value: str = "logit_diff", gap: float = 0.0) -> float:
    """Where the colour scale of these tables ends, as `panels` draws them."""
    return float(colour_scale(tables, value, gap).get_clim()[1])


def panels(
    tables: Mapping[str, pd.DataFrame],
    *,
    value: str | None = None,
    marks: Mapping[str, Iterable[tuple[int, int]]] | None = None,
    gap: float | None = None,
    ax: Axes | Iterable[Axes] | None = None,
) -> list[Axes]:
    """Tables of `token_table` or `head_table` side by side, with one colour scale for all.

    The keys are the titles; `value` is by default the column that the first table is of. `marks` names cells,
    (row label, column label), that get a dot, by title; without it the strongest cells of a head table are
    outlined. `gap` is the mean LD(clean) − LD(corrupt) that the floor knows, by default the largest in
    the tables' `attrs`. `ax` are axes to draw into, one a table. Gives the axes of the tables.
    """
    if not tables:
        raise DataError("no tables to draw")
    whole = list(tables.values())
    value = value or str(whole[0].attrs.get("value", "logit_diff"))
    if gap is None:
        gap = max(table.attrs.get("gap") or 0.0 for table in whole)
    scale, names = colour_scale(whole, value, gap), list(map(column_names, whole))
    one_index = ax is None and all(table.index.equals(whole[0].index) for table in whole)
    one_header = ax is None and all(each == names[0] for each in names)
    width = float(np.clip(0.36 * max(table.shape[1] for table in whole), 2.7, 11.0))
    height = float(np.clip(0.26 * max(table.shape[0] for table in whole), 1.3, 6.0))
    across = 3 if width <= 4.3 and len(tables) != 4 else 2 if width <= 6.2 else 1
    titles = [_wrapped(title, width + (len(tables) == 1)) for title in tables]
    above = 0.16 + 0.16 * max(title.count("\n") + 1 for title in titles)
    outside = [_outside(table, each, width) for table, each in zip(whole, names, strict=True)]
    left, below = max(beside for beside, _ in outside), max(under for _, under in outside)
    apart = (max(0.2, left - 0.45) if one_index else left, above if one_header else above + below)
    axes = grid(ax, len(tables), across, (width, height), Margins(left, below, BAR, above, *apart))
    for n, (spot, (title, table)) in enumerate(zip(axes, tables.items(), strict=True)):
        set_title(spot, titles[n])
        heat_map(spot, table, scale, None if marks is None else marks.get(title, ()))
        spot.tick_params(left=False, bottom=False)
        if one_header and n + across < len(axes):
            spot.set_xticks(())
        else:
            label_columns(spot, names[n], [c in table.attrs.get("roles", ()) for c in table.columns])
            spot.set_xlabel(str(table.columns.name or ""), fontsize=9, color=DARK)
        if one_index and n % across:
            spot.set_yticks(())
        else:
            label_rows(spot, table)
    add_bar(axes, scale, VALUES[value])
    return axes


def _outside(table: pd.DataFrame, names: Sequence[str], width: float) -> tuple[float, float]:
    """What the labels of a table take at its left and below, in inches."""
    angle = radians(_angle(names, width))
    widths = [text_width(name) for name in names]
    starts = [wide * cos(angle) - (n + 0.5) * width / len(names) for n, wide in enumerate(widths)]
    beside, under = (0.2 + 0.2 * bool(axis.name) for axis in (table.index, table.columns))
    left = max(text_width(str(label)) + beside for label in ["", *table.index])
    return max([left, *starts]) if angle else left, under + (max(widths) * sin(angle) if angle else 0.05)


def heat_map(
    axes: Axes, table: pd.DataFrame, scale: ScalarMappable, marks: Iterable[tuple[Any, Any]] | None = None
) -> None:
    """The cells, without labels; with dots on the `marks`, or in a head table the strongest outlined."""
    axes.spines[:].set_visible(False)
    axes.set_facecolor(NOT_PATCHED)
    if table.empty:
        axes.set(xlim=(0, table.shape[1]), ylim=(0, 1))
        axes.text(table.shape[1] / 2, 0.5, "nothing of this kind\nin the table", ha="center", va="center")
        return
    cells = np.ma.masked_invalid(table.to_numpy(dtype=float))
    style = {"edgecolors": "white", "linewidth": 0.6} if cells.shape[1] <= 60 else {"rasterized": True}
    axes.pcolormesh(cells, cmap=scale.cmap, norm=scale.norm, **style)  # type: ignore[arg-type]
    if marks is None and table.columns.name == "head":
        _outline_strongest(axes, cells, scale)
    elif places := [(table.columns.get_loc(c), table.index.get_loc(r)) for r, c in marks or ()]:
        across, up = np.transpose(places) + 0.5  # with a light rim, to be seen on any colour
        axes.scatter(across, up, s=22, color=DARK, edgecolors="white", linewidths=1.0)


def column_names(table: pd.DataFrame) -> list[str]:
    """What stands below the columns: labels, and how many examples a column holds if fewer than others."""
    labels, n = table.attrs.get("labels", {}), table.attrs.get("n", {})
    most = max(n.values(), default=0)
    return [
        drawable(str(labels.get(column, column)).replace("\n", "□"), 24)
        + (f"  n={n[column]}" if n.get(column, most) < most else "")
        for column in table.columns
    ]


def label_rows(axes: Axes, table: pd.DataFrame) -> None:
    """Some layers, or all names."""
    rows = spread(list(range(len(table))), 16 if table.index.name == "layer" else len(table))
    axes.set_yticks([n + 0.5 for n in rows], [str(table.index[n]) for n in rows], fontsize=8, color=DARK)
    axes.set_ylabel(table.index.name, fontsize=9, color=DARK)


def label_columns(axes: Axes, names: Sequence[str], is_bold: Sequence[bool]) -> None:
    """All names while they fit; of 600 tokens every so many, and always those in bold."""
    step = -(-len(names) // 48)
    near = max(1, step // 2)
    bold = {n for n, each in enumerate(is_bold) if each}
    others = {n for n in range(0, len(names), step) if not any(abs(n - k) < near for k in bold)}
    shown = sorted(bold | others)
    width = axes.bbox.width / figure_of(axes).dpi
    angle, labels = _angle(names, width), [names[n] for n in shown]
    style: dict[str, Any] = {"parse_math": False, "fontsize": 8, "color": DARK}
    if angle:
        style |= {"rotation": angle, "rotation_mode": "anchor", "ha": "right"}
        style["va"] = "center" if angle == 90 else "top"
    axes.set_xticks([n + 0.5 for n in shown], labels, **style)
    for n, tick in zip(shown, axes.get_xticklabels(), strict=True):
        tick.set_fontweight("bold" if n in bold else "normal")


def spread(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[n] for n in dict.fromkeys(places)]


def _angle(names: Sequence[str], width: float) -> int:
    """How the names of columns of so many inches are turned: not at all if they fit, many by 90 degrees."""
    is_flat = max(map(text_width, names), default=0.0) + 0.08 <= width / max(1, len(names))
    return 0 if is_flat else 90 if len(names) > 24 else 45


def _outline_strongest(
    axes: Axes, cells: np.ma.MaskedArray[tuple[int, int], np.dtype[np.float64]], scale: ScalarMappable
) -> None:
    """Outline the three strongest cells that have a colour; write the value where a cell is wide enough."""
    size = np.abs(cells.filled(0.0))
    for flat in np.argsort(-size, axis=None, kind="stable")[:3]:
        row, column = divmod(int(flat), cells.shape[1])
        if size[row, column] < PALE * scale.get_clim()[1]:
            continue
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="black", lw=1.4))
        if cells.shape[1] <= 16:
            red, green, blue, _ = scale.to_rgba(cells[row, column])
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            text = short_number(float(cells[row, column]))
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color=ink)


def _wrapped(text: str, width: float) -> str:
    """A title in lines that fit a panel of so many inches."""
    lines = drawable(text, 200).split("\n")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, int(11.5 * width + 3)) or [""])

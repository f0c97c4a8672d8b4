"""Figures of a table of patches, for notebooks, papers and the report.

`layer_by_token` and `layer_by_head` take the effects table of `read_run` or `sweep`, `panels` tables of
`vlmscope.token_table` and `vlmscope.head_table`. All draw into the matplotlib axes `ax` if they are given,
else into a new figure, and give the axes: a notebook shows them, and `axes.figure.savefig("heads.pdf")`
writes PNG, SVG or PDF by the suffix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from vlmscope.report.canvas import (
    BAR,
    DARK,
    Margins,
    add_bar,
    add_legend,
    grid,
    set_frame,
    set_layers,
    set_title,
    text_width,
)
from vlmscope.report.faithfulness import carried_by_size
from vlmscope.report.flows import flow
from vlmscope.report.heat_maps import panels
from vlmscope.report.words import KINDS, TOWERS, upper_first
from vlmscope.studies.agreement import part_of
from vlmscope.studies.tables import change_of, head_table, token_table

__all__ = [
    "carried_by_size",
    "edit",
    "flow",
    "layer_by_head",
    "layer_by_token",
    "measures",
    "panels",
    "scores_and_effects",
    "universal",
    "words_over_layers",
]

COLOURS = ["#1f5f99", "#c1442e", "#3b8540", "#8a5fa8", "#b0792b", "#555555"]
"""Of lines, one a word."""


def layer_by_token(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    value: str | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heat map of `vlmscope.token_table`: layers upwards, slots to the right, roles in bold.

    Below a slot stands its token where that is the same in all examples, and `n` where it holds fewer
    examples than other columns. By default `value` is `ld_change`, against the run that was patched, or
    `p_change` where there is no logit difference; so it is in all figures of a table of patches.

    >>> import vlmscope
    >>> model, examples = vlmscope.load("toy-blip"), vlmscope.examples("states", limit=2)
    >>> effects = vlmscope.sweep(model, examples, "encoder.*.resid@text*")
    >>> axes = layer_by_token(effects)
    >>> axes.get_title()
    'Residual stream after each block, text encoder\\nmean over 2 examples'
    """
    table = token_table(effects, tower=tower, kind=kind, value=value or change_of(effects))
    return panels({title or _title(effects, table, ", {}"): table}, ax=ax)[0]


def layer_by_head(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    slot: str = "readout",
    value: str | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heat map of `vlmscope.head_table`: layers upwards, heads to the right, the strongest outlined."""
    table = head_table(effects, tower=tower, kind=kind, slot=slot, value=value or change_of(effects))
    return panels({title or _title(effects, table, f" heads, {{}} at {table.attrs['slot']}"): table}, ax=ax)[
        0
    ]


def universal(heads: pd.DataFrame, *, most: int = 30, gap: float = 0.0, ax: Axes | None = None) -> Axes:
    """Heads (rows) over runs (columns): the mean `logit_diff`, a dot where a head is important.

    `heads` is the table of `circuits.find`. Heads that are important somewhere are shown, those
    important in most runs first, `most` at the most; a ring marks what the other half confirms.
    """
    name = [f"{r.tower} L{r.layer} {r.kind} H{r.head} @{r.position}" for r in heads.itertuples()]
    rows = heads.assign(name=name, size=heads["mean"].abs())
    order = rows.groupby("name").agg(count=("important", "sum"), size=("size", "mean"))
    order = order[order["count"] > 0].sort_values(["count", "size"], ascending=False).head(most)[::-1]
    runs = list(rows["run"].unique())
    table = rows.pivot_table(index="name", columns="run", values="mean").reindex(order.index)[runs]
    table = table.rename_axis(index="", columns="")
    table.attrs["n"] = rows.groupby("run")["n"].max().to_dict()
    important = rows[rows["important"] & rows["name"].isin(order.index)]
    marks = {"": list(zip(important["name"], important["run"], strict=True))}
    (axes,) = panels({"": table}, marks=marks, gap=gap, ax=ax)
    confirmed = important[important["confirmed"].isin([True])]
    across, up = table.columns.get_indexer(confirmed["run"]), table.index.get_indexer(confirmed["name"])
    axes.scatter(across + 0.5, up + 0.5, s=75, facecolors="none", edgecolors=DARK, linewidths=1.0)
    for tick, count in zip(axes.get_yticklabels(), order["count"], strict=True):
        tick.set_fontweight("bold" if count == len(runs) else "normal")
    return axes


def measures(table: pd.DataFrame, names: Sequence[str], *, ax: Iterable[Axes] | None = None) -> list[Axes]:
    """A panel a measure: for each word its value with its interval, and its null up to the 95th percentile.

    `table` is the `measures` of `vlmscope.neurons.measure`; `ax` are axes to draw into, one a name.
    """
    words = list(dict.fromkeys(table["word"]))[::-1]
    size = (1.9, max(0.9, 0.24 * len(words)))
    left = max(text_width(word) for word in words) + 0.2
    axes = grid(ax, len(names), len(names), size, Margins(left, 0.65, 0.15, 0.35, across=0.25))
    for n, (spot, name) in enumerate(zip(axes, names, strict=True)):
        rows = table[(table["measure"] == name) & (table["method"] == "contribution")]
        at = rows["word"].map(words.index)
        spot.hlines(at, rows["ci_low"], rows["ci_high"], color="#4C78A8", lw=2.2)
        spot.plot(rows["value"], at, "o", color="#1f3f66", ms=4.5, label="the word's neurons")
        spot.hlines(at - 0.2, rows["null"], rows["null_95"], color="#B07020", lw=1.2)
        spot.plot(rows["null"], at - 0.2, "x", color="#B07020", ms=5, label="null")
        set_title(spot, name, 9.5)
        spot.set_ylim(-0.6, len(words) - 0.4)
        shown = words if n == 0 or ax is not None else [""] * len(words)
        spot.set_yticks(range(len(words)), shown)
        set_frame(spot, "x")
    add_legend(axes, 3)
    return axes


def edit(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """What an edit does, with intervals: beside it what was before, and the same edit of random columns.

    `table` is the first that `vlmscope.neurons.assess` gives; `ax` are axes to draw into.

    >>> row = {"measure": "generality", "value": 1.0, "low": 0.7, "high": 1.0, "before": 0, "random": 0.2}
    >>> axes = edit(pd.DataFrame([row]))
    >>> [text.get_text() for text in axes.get_yticklabels()]
    ['generality']
    """
    rows = table[~table["measure"].isin(["repetition", "length"])][::-1]
    left = max(map(text_width, rows["measure"]), default=0) + 0.2
    (spot,) = grid(ax, 1, 1, (3.4, max(0.9, 0.24 * len(rows))), Margins(left, 0.65, 0.15, 0.15))
    at = range(len(rows))
    spot.hlines(at, rows["low"], rows["high"], color="#4C78A8", lw=2.2)
    spot.plot(rows["value"], at, "o", color="#1f3f66", ms=4.5, label="edited")
    spot.plot(rows["before"], at, "|", color="#333333", ms=9, mew=1.6, label="before")
    spot.plot(rows["random"], at, "x", color="#B07020", ms=5, label="random columns")
    spot.set_yticks(at, rows["measure"])
    spot.set_ylim(-0.6, len(rows) - 0.4)
    spot.set_xlim(-0.03, 1.03)
    set_frame(spot, "x")
    add_legend([spot], 3)
    return spot


def scores_and_effects(
    table: pd.DataFrame, found: Mapping[str, Any], *, ax: Iterable[Axes] | None = None
) -> list[Axes]:
    """What `attribute` estimates (across) against exact patches (upwards), a panel a kind of site, coloured
    by layer, with the rank correlation; on the dotted line the two are equal.

    `table` holds the verified rows, `found` is its agreement; `ax` are axes to draw into, one a kind.
    """
    names, part = list(found), part_of(table)
    name = table["tower"] + "." + table["kind"] + ("." + part).where(part != "", "")
    margins = Margins(0.75, 0.6, BAR, 0.55, across=0.75, down=1.0)
    axes = grid(ax, len(names), 3, (2.3, 2.3), margins)
    # Where the logits read, there is no layer: it stands as -1.
    colours = colormaps["viridis"].with_extremes(under=DARK)
    scale = ScalarMappable(Normalize(0, max(1, int(table["layer"].max()))), colours)
    for spot, kind in zip(axes, names, strict=True):
        rows = table[(name == kind) & table["exact"].notna()]
        ends = rows[["score", "exact"]].stack()
        spot.axline((ends.min(), ends.min()), (ends.max() or 1.0,) * 2, color="#999999", lw=1, ls=":")
        spot.scatter(rows["score"], rows["exact"], s=9, c=scale.to_rgba(rows["layer"].to_numpy()), lw=0)
        known = found[kind]["spearman"]
        set_title(spot, f"{kind}\nrank correlation {'unknown' if known is None else f'{known:.2f}'}", 9.5)
        spot.set_xlabel("score", fontsize=9)
        spot.set_ylabel("exact patch", fontsize=9)
        set_frame(spot)
    add_bar(axes, scale, "layer")
    return axes


def words_over_layers(cells: pd.DataFrame, *, ax: Iterable[Axes] | None = None) -> list[Axes]:
    """How words that were asked about do over layers, a column a place.

    Above is the share of other words of its type that each beats (0.5: the null), below its probability, and
    dashed that of its null.

    `cells` has a row a `place`, `what` (answer, foil …) and `layer`: the means `beaten` with `low` and
    `high`, `p` and `null_p`. `ax` are axes to draw into, two a place.
    """
    places, words = list(dict.fromkeys(cells["place"])), list(dict.fromkeys(cells["what"]))
    colours = dict(zip(words, COLOURS * len(words), strict=False))
    margins = Margins(0.8, 0.95, 0.15, 0.35, across=0.7, down=0.3)
    axes = grid(ax, 2 * len(places), len(places), (3.2, 1.7), margins)
    for n, place in enumerate(places):
        above, below = axes[n], axes[len(places) + n]
        above.axhline(0.5, color="#999999", lw=1, ls=":")
        for what, rows in cells[cells["place"] == place].groupby("what", sort=False):
            style: dict[str, Any] = {"color": colours[str(what)], "lw": 1.6, "marker": "o", "ms": 2.5}
            above.plot(rows["layer"], rows["beaten"], label=str(what), **style)
            above.fill_between(
                rows["layer"], rows["low"], rows["high"], color=style["color"], alpha=0.15, lw=0
            )
            below.plot(rows["layer"], rows["p"], **style)
            below.plot(rows["layer"], rows["null_p"], "--x", color=style["color"], lw=1, ms=3)
        set_title(above, place, 9.5)
        above.set_ylim(-0.02, 1.02)
        below.set_yscale("log")
        below.yaxis.set_major_locator(LogLocator(numticks=5))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        below.yaxis.set_minor_locator(NullLocator())
        for spot, label in ((above, "others beaten"), (below, "P(word)")):
            spot.set_ylabel(label if n == 0 else "", fontsize=9)
            set_layers(spot)
            set_frame(spot)
        above.set_xlabel("")  # that of the panel below
    add_legend(axes, 6)
    return axes


def _title(effects: pd.DataFrame, table: pd.DataFrame, form: str) -> str:
    attrs = table.attrs
    words = upper_first(KINDS[attrs["kind"]]) + form.format(TOWERS[attrs["tower"]])
    if attrs["examples"] == 1:
        return f"{words}\n" + " ".join(f"one example: {effects['example'].iloc[0]}".split())
    return f"{words}\nmean over {attrs['examples']} examples"

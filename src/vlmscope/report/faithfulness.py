"""The section of what `faithfulness` wrote: how much circuits carry over their sizes, and one of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vlmscope import stored
from vlmscope.report.canvas import DARK, Margins, add_legend, grid, set_frame, set_title
from vlmscope.report.gallery import Gallery, Section, render
from vlmscope.report.graph import DRAWN, graph
from vlmscope.report.words import ends, percent, short_number
from vlmscope.stored import formats
from vlmscope.studies.run_folder import read_run

BLUE, GREY = "#4C78A8", "#9a9a9a"
TITLES = {"signed": "Ranked by score (CPR)", "absolute": "Ranked by the size of the score (CMD)"}


def section(folder: Path, gallery: Gallery) -> Section:
    """The curve of f with its null, and the circuit that is reported."""
    about, tables = stored.read(folder, formats.FAITHFULNESS)
    if os.path.lexists(folder / "run.json"):  # what is damaged of the run is said, though it is not drawn
        run = read_run(folder)
        run.measured()
        run.pictures()
    table, circuit, own = tables["faithfulness"], tables["circuit"], about["circuit"]
    best = {"fraction": own["kept"] / about["parts"], "f": own["f"]}
    drawn = carried_by_size(table, best)
    shown = gallery.show("curve", drawn, table, "carried", rows=table, about=about)
    figures, are_edges = [("", shown)], "edge" in about["kinds"]
    if are_edges:
        edges = circuit["part"].str.partition("->")[[0, 2]].set_axis(["source", "target"], axis=1)
        edges["score"] = circuit["score"]
        own = gallery.show("graph", graph(edges), edges, "graph", rows=edges, most=DRAWN)
        figures.append(("The edges of the circuit", own))
    text = render(
        "faithfulness.html",
        about=about,
        said=about["lines"],
        figures=figures,
        are_edges=are_edges,
        circuit=circuit.assign(
            score=circuit["score"].map(short_number),
            interval=[ends(row.low, row.high, percent) for row in circuit.itertuples()],
            drop=circuit["drop"].map(lambda drop: "" if pd.isna(drop) else percent(drop)),
        )[["part", "score", "drop", "interval"]],
        is_small=bool(circuit["drop"].notna().any()),
    )
    what = "Circuits of edges" if are_edges else "Circuits"
    title = f"{what}: {Path(about['data']).name}, {about['corrupt']} corrupted"
    return Section(title, text, about["known"]["severity"] == "unknown")


def carried_by_size(
    table: pd.DataFrame, reported: dict[str, float] | None = None, *, ax: Iterable[Axes] | None = None
) -> list[Axes]:
    """f over sizes, with its interval and the random circuits: a panel a ranking.

    `reported` is the circuit to mark, its `fraction` and `f`. Sizes at which no part is kept are left out.

    >>> columns = "ranking fraction kept f low high random random_low random_high".split()
    >>> rows = [("signed", 0.1, 1, 0.5, 0.4, 0.6, 0.1, 0.0, 0.2), ("signed", 1.0, 9, *[1.0] * 6)]
    >>> len(carried_by_size(pd.DataFrame(rows, columns=columns)))
    1
    """
    rankings = list(dict.fromkeys(table["ranking"]))
    margins = Margins(0.75, 0.95, 0.2, 0.4, across=0.6)
    axes = grid(ax, len(rankings), len(rankings), (3.6, 2.4), margins)
    for spot, ranking in zip(axes, rankings, strict=True):
        rows = table[(table["ranking"] == ranking) & (table["kept"] > 0)]
        x = rows["fraction"]
        for end, style in ((0.0, "-"), (1.0, ":")):
            spot.axhline(end, color="#cccccc", lw=0.8, ls=style, zorder=0)
        spot.fill_between(x, rows["random_low"], rows["random_high"], color=GREY, alpha=0.25, lw=0)
        label = "random circuits of the same layers, from least to most"
        spot.plot(x, rows["random"], "-o", color=GREY, ms=3, lw=1.2, label=label)
        spot.fill_between(
            x, rows["low"].astype(float), rows["high"].astype(float), color=BLUE, alpha=0.2, lw=0
        )
        label = "the best parts" + (", with 95 % interval" if rows["low"].notna().any() else "")
        spot.plot(x, rows["f"], "-o", color=BLUE, ms=3.5, lw=1.6, label=label)
        if reported and reported["f"] is not None and ranking == "signed":
            place = (reported["fraction"], reported["f"])
            spot.plot(*place, "o", ms=9, mfc="none", mec=DARK, mew=1.2, label="the circuit that is reported")
        spot.set_xscale("log")
        spot.xaxis.set_major_locator(FixedLocator(_ticks(x)))
        spot.xaxis.set_minor_locator(NullLocator())
        spot.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        spot.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
        set_title(spot, TITLES.get(ranking, ranking), 9)
        spot.set_xlabel("parts that are kept", fontsize=8.5)
        set_frame(spot)
    axes[0].set_ylabel("share of the behaviour (f)", fontsize=8.5)
    add_legend(axes, len(rankings))
    return axes


def _ticks(fractions: pd.Series[float]) -> list[float]:
    """Sizes that have room for their names: of those close together the larger."""
    found: list[float] = []
    for share in sorted(set(fractions), reverse=True):
        if not found or share <= found[-1] / 1.9:
            found.append(share)
    return found

"""Edges drawn as a graph: writers below, readers above."""

from __future__ import annotations

import re
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from vlmscope.report.canvas import DARK, Margins, figure_of, grid
from vlmscope.studies.edge_tables import ENDS

DRAWN = 40
"""Edges in the figure, at most: the largest."""
COLOURS = {"q": "#8A5FA8", "k": "#B8860B", "v": "#3F8F5B", "mlp": "#4C78A8", "end": "#D0502D"}
"""By what reads."""
NAMES = {"q": "queries", "k": "keys", "v": "values", "mlp": "MLPs", "end": "logits"}
BENT = {"q": 0.12, "k": -0.12, "v": 0.0, "mlp": 0.06, "end": 0.0}
WIDEST = 5.0
"""Points, of the largest edge."""
_NODE = re.compile(r"[a-z]+\.(\d+)\.([a-z]+)(?:\.[hqkv](\d+))?")


class _Node(NamedTuple):
    x: float
    y: float
    name: str


def graph(table: pd.DataFrame, *, most: int = DRAWN, ax: Axes | None = None) -> Axes:
    """The edges with the largest |score|, `most` at the most: writers below, readers above, layer by layer.

    What enters the tower is at the bottom, its end on top; heads stand in a row by their number, the MLP
    at the right behind them. A line is as wide as its |score|, dashed where that is negative; its colour says
    what reads: a head's query, key or value, an MLP, the logits. `table` is that of `vlmscope.edges`.

    >>> rows = {"source": ["image", "decoder.0.attn.h1"], "target": ["decoder.0.attn.v1", "logits"]}
    >>> graph(pd.DataFrame({**rows, "score": [1.0, -0.5]})).get_ylabel()
    'layer'
    """
    order = table["score"].abs().sort_values(ascending=False, kind="stable").index[:most]
    drawn = table.loc[order]
    drawn = drawn[drawn["score"] != 0]
    ends = [*table["source"].unique(), *table["target"].unique()]
    found = [match for end in ends if (match := _NODE.fullmatch(end))]
    layers = 1 + max((int(match[1]) for match in found), default=0)
    heads = 1 + max((int(match[3]) for match in found if match[3]), default=0)
    size = (min(9.0, max(3.6, 0.5 * heads + 1.6)), min(11.0, 1.4 + 0.75 * layers))
    (spot,) = grid(ax, 1, 1, size, Margins(0.6, 0.75, 0.2, 0.2))
    nodes = {end: _node(end, layers, heads) for end in ends}
    for node in {*nodes.values()}:
        spot.plot(node.x, node.y, "o", color="#d8d8d8", ms=3, zorder=1)
    largest = drawn["score"].abs().max() if len(drawn) else 1.0
    kinds = []
    for source, target, score in drawn[["source", "target", "score"]].iloc[::-1].itertuples(index=False):
        kind = "end" if target in ENDS else target.split(".")[-1][0] if target.count(".") == 3 else "mlp"
        kinds.append(kind)
        spot.add_patch(
            FancyArrowPatch(
                nodes[source][:2],
                nodes[target][:2],
                connectionstyle=f"arc3,rad={BENT[kind]}",
                arrowstyle="-",
                color=COLOURS[kind],
                lw=max(0.4, WIDEST * abs(score) / largest),
                ls="-" if score > 0 else (0, (2, 1.5)),
                alpha=0.75,
                zorder=2,
            )
        )
    for node in {nodes[end] for name in ("source", "target") for end in drawn[name]}:
        spot.plot(node.x, node.y, "o", color=DARK, ms=4.5, zorder=3)
        above = (4, -9) if node.y < 0 else (4, 3)
        spot.annotate(node.name, node[:2], above, textcoords="offset points", fontsize=7.5, zorder=4)
    spot.set_yticks(range(layers), [str(n) for n in range(layers)], fontsize=8)
    spot.set_ylabel("layer", fontsize=9, color=DARK)
    spot.set_xticks([])
    spot.set_xlim(-0.6, heads + 1.1)
    spot.set_ylim(-1.2, layers + 0.35)
    spot.spines[["top", "right", "bottom"]].set_visible(False)
    keys = [
        Line2D([], [], color=COLOURS[kind], lw=2.5, label=NAMES[kind]) for kind in COLOURS if kind in kinds
    ]
    if (drawn["score"] < 0).any():
        keys.append(Line2D([], [], color=DARK, lw=1.5, ls=(0, (2, 1.5)), label="negative"))
    figure_of(spot).legend(handles=keys, fontsize=8, loc="lower center", ncols=3, frameon=False)
    return spot


def _node(end: str, layers: int, heads: int) -> _Node:
    """Where a writer or reader stands; a head's query, key and value are the head."""
    match = _NODE.fullmatch(end)
    if match is None:
        if end in ENDS:
            return _Node((heads - 1) / 2, layers - 0.05, end)
        return _Node(0.25 * heads if end == "embed" else 0.7 * heads, -0.75, end)
    layer, kind, head = int(match[1]), match[2], match[3]
    if head is not None:
        return _Node(float(head), layer + (0.2 if kind == "cross" else 0.0), f"h{head}")
    return _Node(heads + 0.2, layer + 0.45, "MLP" if kind == "mlp" else kind)

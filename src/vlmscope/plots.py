"""Figures of a table of patches.

`vlmscope.token_table`, `vlmscope.head_table` and `strongest` hold the numbers; `layer_by_token`,
`layer_by_head`, `panels` and `image_grid` draw them. All take the effects table of `read_run` or
`sweep`, and return a `matplotlib.figure.Figure` (pyplot is not involved): a notebook shows it,
`savefig` writes it.

Red is towards the answer, blue towards the foil, white is no change, grey was not patched. What is next
to nothing has next to no colour: the scale of a figure does not end below `FLOOR` of the run's gap.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image

from vlmscope.tables import choose, head_table, mean_gap, means, token_table

VALUES = {
    "logit_diff": "change in logit difference (logits)",
    "effect": "normalised effect (1: as the clean run)",
    "p_restored": "change in P(answer)",
    "p_patched": "P(answer) after the patch",
    "restored": "share of P(answer) restored (0: corrupted, 1: clean)",
}
"""The columns that can be drawn, with what stands at the colour bar."""

KINDS = {
    "resid": "residual stream after each block",
    "resid_pre": "residual stream before each block",
    "attn": "self-attention",
    "cross": "cross-attention",
    "mlp": "MLP",
    "deepstack": "features added behind each block (DeepStack)",
    "output": "the tower's output",
}
TOWERS = {"vision": "vision tower", "qformer": "Q-Former", "encoder": "text encoder", "decoder": "decoder"}

FLOOR = 0.1
"""The share of the mean gap LD(clean) − LD(corrupt) below which no colour scale of `logit_diff` ends; also
where the scale of `effect`, which is a share of the gap already, may end."""
LEAST = {"logit_diff": 0.05, "effect": FLOOR, "p_restored": 0.02, "restored": 1.0}
"""Where a colour scale may end at all, whatever the gap: logits, shares, probabilities."""

_DIVERGING, _MISSING, _INK = "RdBu_r", "#d4d4d4", "#222222"
_Picture: TypeAlias = str | Path | Image.Image


# --- tables ----------------------------------------------------------------------------------


def strongest(effects: pd.DataFrame, n: int = 10) -> pd.DataFrame:
    """The `n` sites with the largest |mean `logit_diff`| over examples, largest first; sites that fewer
    than half of the table's examples hold come behind all others.

    Patches are one site if they agree in tower, layer (and its window), kind, unit and slot. Columns:
    `site`, `corruption`, `slot`, `token` (where it is the same in all examples), `mean`, `sd` (over
    examples; null for one), `low` and `high` (95 % bootstrap interval), `n`, the number of examples.

    `site` can be swept again. A role, `readout` and a place of the picture name themselves. Any other slot
    (`3`, `answer+1`, `-2`) stands as a position, `@5` or `@-2`, where that is the slot in every example;
    where it is not, no expression means the slot, and `site` ends before the @.
    """
    keys = ["corruption", "tower", "depth", "kind", "part", "slot"]
    columns = ["site", "corruption", "slot", "token", "mean", "sd", "low", "high", "n"]
    if effects.empty:
        return pd.DataFrame(columns=columns)
    rows = effects.assign(
        depth=effects["site"].str.split(".", n=2).str[1],  # with the window, where it has one
        part=effects["unit"].astype(object).fillna(""),
    )
    # One number for six columns of text, which are then not sorted out again each time.
    rows["cell"] = rows.groupby(keys, sort=False).ngroup()
    found = means(rows, ["cell"]).merge(rows.drop_duplicates("cell")[["cell", *keys]], on="cell")
    half = found["corruption"].map(rows.groupby("corruption")["example"].nunique()) / 2
    order = pd.DataFrame({"few": found["n"] < half, "size": -found["mean"].abs()})
    found = found.loc[order.sort_values(["few", "size"], kind="stable").index].head(n)
    shown = rows[rows["cell"].isin(found["cell"])]
    found = found.merge(means(shown, ["cell"], intervals=True)[["cell", "low", "high"]], on="cell")
    tokens = shown.groupby("cell")["token"].agg(["first", "nunique"])
    tokens = tokens["first"].where(tokens["nunique"] == 1).rename("token")
    found = found.merge(tokens, left_on="cell", right_index=True)
    found = found.merge(_positions(effects), on=["corruption", "tower", "slot"], how="left")
    place = found["tower"] + "." + found["depth"] + "." + found["kind"]
    unit = found["part"].where(found["part"] == "", "." + found["part"])
    found["site"] = place + unit + ("@" + found["at"]).where(found["at"] != "", "")
    return found[columns].reset_index(drop=True)


def _positions(effects: pd.DataFrame) -> pd.DataFrame:
    """How a site expression names each slot of each tower: column `at`, empty where none does."""
    keys = ["corruption", "tower", "slot"]
    rows = effects[[*keys, "example", "position", "role"]].drop_duplicates([*keys, "example"])
    has_name = rows["slot"].str.fullmatch(r"readout|image\[\d+,\d+\]") | rows["position"].isna()
    has_name |= rows["slot"] == rows["role"]
    own = rows[has_name].drop_duplicates(keys)
    parts = [own.assign(at=own["slot"])[[*keys, "at"]]]
    # The end of an example is known from its read-out position, or in an encoder from what is counted
    # from its end.
    from_end = pd.to_numeric(rows["slot"], errors="coerce").where(rows["slot"].str.startswith("-"))
    end = (rows["position"] + 1).where(rows["slot"] == "readout")
    end = end.fillna((rows["position"] - from_end).where(rows["tower"] == "encoder"))
    ends = end.groupby([rows[k] for k in ("corruption", "tower", "example")]).transform("max")
    held = rows.groupby(keys)["slot"].transform("size")
    for place in (rows["position"], rows["position"] - ends):
        at = rows.assign(at=place).dropna(subset=["at"])
        one_slot = at.groupby(["corruption", "tower", "at"])["slot"].transform("nunique") == 1
        one_place = at.groupby(keys)["at"].transform("nunique") == 1
        whole = at.groupby(keys)["at"].transform("size") == held[at.index]
        same = at[one_slot & one_place & whole].drop_duplicates(keys)
        parts.append(same.assign(at=same["at"].astype(int).astype(str))[[*keys, "at"]])
    found = pd.concat([*parts, rows[keys].assign(at="")], ignore_index=True)
    return found.drop_duplicates(keys)


def tracing_tables(
    table: pd.DataFrame, *, tower: str, window: int = 1, length: int = 0
) -> dict[str, pd.DataFrame]:
    """Layer × token tables of the share restored, by kind, from the table of `tracing.trace`.

    `length` is that of the questions in tokens, 0 where tokens are averaged by slot.
    """
    same = (table["window"] == window) & (table["length"] == length)
    rows = table[(table["tower"] == tower) & same]
    found = {}
    for kind in [k for k in KINDS if k in set(rows["kind"])]:
        some = rows[rows["kind"] == kind]
        columns = some.sort_values("order", kind="stable").drop_duplicates("at")
        beside = "" if length else (" " + columns["token"].astype(object)).fillna("")
        wide = some.pivot(index="layer", columns="at", values="restored")[list(columns["at"])]
        wide.columns.name = "slot" if not length else "token"
        wide.attrs = {
            "labels": dict(zip(columns["at"], columns["at"] + beside, strict=True)),
            "roles": list(columns.loc[columns["is_role"].astype(bool), "at"]),
            "n": some.groupby("at")["n"].max().to_dict(),
            "examples": int(some["n"].max()),
        }
        found[kind] = wide
    return found


def most_restored(table: pd.DataFrame, n: int = 5) -> pd.DataFrame:
    """The rows of `tracing.trace`'s table with the largest share restored; those that fewer than half of the
    examples hold (of their tower and length) come behind all others."""
    most = table.groupby(["tower", "length"])["n"].transform("max")
    order = pd.DataFrame({"few": table["n"] < most / 2, "size": -table["restored"]})
    return table.loc[order.sort_values(["few", "size"], kind="stable").index].head(n)


# --- figures ---------------------------------------------------------------------------------


class _Shown(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def layer_by_token(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    value: str = "logit_diff",
    title: str | None = None,
) -> Figure:
    """Heat map of `vlmscope.token_table`: layers upwards, slots to the right, roles in bold.

    Below a slot stands its token where that is the same in all examples, and `n` where it holds fewer
    examples than other columns.
    """
    table = token_table(effects, tower=tower, kind=kind, value=value)
    shown = f"{_upper(KINDS[table.attrs['kind']])}, {TOWERS[table.attrs['tower']]}"
    return panels({title or f"{shown}\n{_over(effects, table)}": table}, value=value)


def layer_by_head(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    slot: str = "readout",
    value: str = "logit_diff",
    title: str | None = None,
) -> Figure:
    """Heat map of `vlmscope.head_table`: layers upwards, heads to the right, the strongest outlined."""
    table = head_table(effects, tower=tower, kind=kind, slot=slot, value=value)
    shown = f"{_upper(KINDS[table.attrs['kind']])} heads, {TOWERS[table.attrs['tower']]}"
    title = title or f"{shown} at {table.attrs['slot']}\n{_over(effects, table)}"
    return panels({title: table}, value=value)


def panels(
    tables: Mapping[str, pd.DataFrame],
    *,
    value: str = "logit_diff",
    marks: Mapping[str, Iterable[tuple[int, int]]] | None = None,
    gap: float | None = None,
) -> Figure:
    """Tables of `token_table` or `head_table` side by side, with one colour scale for all.

    The keys are the titles. `marks` names cells, (row label, column label), that get a dot, by title;
    without it the strongest cells of a head table are outlined. `gap` is the mean LD(clean) − LD(corrupt)
    that the scale's floor knows, by default the largest in the tables' `attrs`.
    """
    known = [t.attrs["gap"] for t in tables.values() if t.attrs.get("gap")]
    gap = max(known, default=0.0) if gap is None else gap
    scale = _scale(list(tables.values()), value, gap)
    across = min(len(tables), 3 if _width(tables) <= 5 else 2 if _width(tables) <= 7.5 else 1)
    across = 2 if len(tables) == 4 and across == 3 else across
    down = -(-len(tables) // max(across, 1))
    titles = [_wrapped(title, _width(tables)) for title in tables]
    lines = max((title.count("\n") for title in titles), default=0)
    height = max((_height(t) for t in tables.values()), default=2.0) + 0.16 * lines
    figure = _Shown(
        figsize=(max(across, 1) * _width(tables) + 0.9, max(down, 1) * height),
        layout="constrained",
        facecolor="white",
    )
    axes = figure.subplots(max(down, 1), max(across, 1), squeeze=False)
    flat = list(axes.flat)
    for spot, (title, table), shown in zip(flat, tables.items(), titles, strict=False):
        _heat_map(spot, table, scale, None if marks is None else marks.get(title, ()))
        spot.set_title(shown, fontsize=10, color=_INK, parse_math=False)
    for spot in flat[len(tables) :]:
        spot.set_axis_off()
    bar = figure.colorbar(scale, ax=flat, shrink=min(1.0, 4.5 / (down * height)), pad=0.02)
    _label_bar(bar, value)
    return figure


def full_colour(tables: Iterable[pd.DataFrame], value: str = "logit_diff", gap: float = 0.0) -> float:
    """Where the colour scale of these tables ends, as `panels` draws them."""
    return float(_scale(list(tables), value, gap).get_clim()[1])


def image_grid(
    effects: pd.DataFrame,
    picture: _Picture,
    grid: tuple[int, int],
    *,
    kind: str | None = None,
    tower: str | None = None,
    value: str = "logit_diff",
    layers: Sequence[int] | None = None,
    gap: float | None = None,
) -> Figure:
    """Effects at image patches, drawn over the picture: the mean of all layers, and a panel a layer.

    `grid` is (rows, columns) of the patches; patches are told by their token, `row,column`. At most
    six layers are drawn unless `layers` names them. `effects` should hold one example: the one of
    `picture`. Towers and kinds are chosen as in `vlmscope.token_table`, the vision tower first; `gap` as
    in `panels`.
    """
    rows = effects[effects["position"].notna() & is_patch(effects)]
    tower = "vision" if tower is None and "vision" in set(rows["tower"]) else tower
    rows = choose(rows, tower=tower, kind=kind, value=value)
    places = rows["token"].str.split(",", expand=True).astype(int)
    found = means(rows.assign(column=places[0] * grid[1] + places[1]), ["layer", "column"], value)
    table = found.pivot(index="layer", columns="column", values="mean").sort_index()
    table = table.reindex(columns=range(grid[0] * grid[1]))
    gap = (mean_gap(rows) or 0.0) if gap is None else gap
    layers = _spread(list(table.index), 6) if layers is None else list(layers)
    drawn = {f"layer {layer}": table.loc[layer] for layer in layers}
    if len(table) > 1 and value != "p_patched":
        drawn = {f"mean of {len(table)} layers": table.mean(), **drawn}
    scale = _scale([pd.DataFrame(drawn)], value, gap)
    shown = _open(picture)
    across = min(len(drawn) + 1, 4)
    down = -(-(len(drawn) + 1) // across)
    figure = _Shown(figsize=(2.5 * across + 1.1, 2.75 * down), layout="constrained", facecolor="white")
    flat = list(figure.subplots(down, across, squeeze=False).flat)
    for spot in flat:
        spot.set_axis_off()
    flat[0].imshow(shown, extent=(0, 1, 0, 1), aspect=shown.height / shown.width)
    flat[0].set_title("picture", fontsize=10, color=_INK)
    for spot, (title, cells) in zip(flat[1:], drawn.items(), strict=False):
        _overlay(spot, shown, cells.to_numpy(dtype=float).reshape(grid), scale)
        spot.set_title(title, fontsize=10, color=_INK)
    bar = figure.colorbar(scale, ax=flat, shrink=min(1.0, 3.5 / (2.75 * down)), pad=0.02)
    _label_bar(bar, value)
    return figure


def universal(heads: pd.DataFrame, *, most: int = 30, gap: float = 0.0) -> Figure:
    """Heads (rows) over runs (columns): the mean `logit_diff`, a dot where a head is important.

    `heads` is the table of `circuits.find`. Heads that are important somewhere are shown, those
    important in most runs first, `most` at the most; a ring marks what the other half confirms.
    """
    rows = heads.assign(
        name=heads["tower"]
        + " L"
        + heads["layer"].astype(str)
        + " "
        + heads["kind"]
        + " H"
        + heads["head"].astype(str)
        + " @"
        + heads["position"]
    )
    runs = list(dict.fromkeys(rows["run"]))
    count = rows.groupby("name")["important"].sum()
    size = rows.assign(size=rows["mean"].abs()).groupby("name")["size"].mean()
    order = pd.DataFrame({"count": count, "size": size}).query("count > 0")
    names = list(order.sort_values(["count", "size"], ascending=False).index[:most])[::-1]
    table = rows.pivot_table(index="name", columns="run", values="mean").reindex(names)[runs]
    scale = _scale([table], "logit_diff", gap)
    wide, high = 0.62 * len(runs) + 3.6, 0.27 * max(len(names), 3) + 1.9
    figure = _Shown(figsize=(wide, high), layout="constrained", facecolor="white")
    axes = figure.subplots()
    if not names:
        _heat_map(axes, table, scale)
        return figure
    axes.set_facecolor(_MISSING)
    cells = np.ma.masked_invalid(table.to_numpy(dtype=float))
    axes.pcolormesh(cells, cmap=scale.cmap, norm=scale.norm, edgecolors="white", linewidth=0.8)  # type: ignore[arg-type]
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)
    everywhere = {n for n in names if count[n] == len(runs)}
    axes.set_yticks([i + 0.5 for i in range(len(names))], names)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name in everywhere else "normal")
    labels = [_drawable(run, 24) for run in runs]
    axes.set_xticks(
        [i + 0.5 for i in range(len(runs))],
        labels,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        parse_math=False,
    )
    where = {name: i for i, name in enumerate(names)}
    shown = rows[rows["important"] & rows["name"].isin(names)]
    places = [
        (where[r.name_], runs.index(r.run)) for r in shown.rename(columns={"name": "name_"}).itertuples()
    ]
    _dots(axes, places)
    sure = shown[shown["confirmed"]].rename(columns={"name": "name_"})
    axes.scatter(
        [runs.index(r.run) + 0.5 for r in sure.itertuples()],
        [where[r.name_] + 0.5 for r in sure.itertuples()],
        s=75,
        facecolors="none",
        edgecolors=_INK,
        linewidths=1.0,
    )
    bar = figure.colorbar(scale, ax=axes, shrink=min(1.0, 4.0 / high), pad=0.03)
    _label_bar(bar, "logit_diff")
    return figure


def attention(
    maps: pd.DataFrame,
    pictures: Mapping[str, _Picture],
    patches: pd.DataFrame | None = None,
    *,
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """A row an example: its picture, the attention of each head, and what its patches do.

    `maps` is the table that `heads.write` keeps: attention minus the all-heads mean, on one scale for
    all; the object's patches have an outline. `patches` are effects of patching the image's patches,
    on a scale of their own at the right. `titles` are for the sites of the heads.
    """
    names = [n for n in dict.fromkeys(maps["example"]) if n in pictures]
    sites = list(dict.fromkeys(maps["site"]))
    across = 1 + len(sites) + (patches is not None)
    figure = _Shown(
        figsize=(1.75 * across + 1.6, 1.95 * len(names) + 0.3), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(len(names), across, squeeze=False)
    scale = _centred([maps[["difference"]]])
    own = None
    if patches is not None:
        own = _scale([patches[["logit_diff"]]], "logit_diff", mean_gap(patches) or 0.0)
    for line, name in zip(axes, names, strict=True):
        shown = _open(pictures[name])
        mine = maps[maps["example"] == name]
        size = (int(mine["rows"].iloc[0]), int(mine["columns"].iloc[0]))
        line[0].imshow(shown, extent=(0, 1, 0, 1), aspect=shown.height / shown.width)
        for spot, site in zip(line[1:], sites, strict=False):
            cells = _cells(mine[mine["site"] == site], "difference", size)
            _overlay(spot, shown, cells, scale)
            _outline(spot, _cells(mine[mine["site"] == site], "object", size))
        if patches is not None and own is not None:
            some = patches[(patches["example"] == name) & is_patch(patches)]
            places = some["token"].str.split(",", expand=True).astype(int)
            some = some.assign(row=places[0], column=places[1])
            _overlay(line[-1], shown, _cells(some, "logit_diff", size), own)
            _outline(line[-1], _cells(mine[mine["site"] == sites[0]], "object", size))
        for spot in line:
            spot.set_axis_off()
    heads = [(titles or {}).get(site, site) for site in sites]
    said = ["picture", *heads, *(["patched in"] if patches is not None else [])]
    for spot, title in zip(axes[0], said, strict=True):
        spot.set_title(title, fontsize=8.5, color=_INK)
    height = 1.95 * len(names)
    bars = [(scale, "attention minus all-heads mean", axes[:, : 1 + len(sites)])]
    bars += [(own, VALUES["logit_diff"], axes[:, -1:])] if own is not None else []
    for mapped, text, where in bars:
        bar = figure.colorbar(mapped, ax=list(where.flat), shrink=min(1.0, 2.6 / height), pad=0.02)
        _label_bar(bar, "logit_diff")
        bar.set_label(text, fontsize=9, color=_INK)
    return figure


def neuron_maps(maps: pd.DataFrame, pictures: Mapping[str, _Picture]) -> Figure:
    """A row a neuron (or mean of several): its activation over the patches of the pictures that drive it most.

    `maps` is the table of `vlmscope neurons describe`. Each row has a scale of its own, centred at zero; the
    outline is around the patches above the 95th percentile.
    """
    names = list(dict.fromkeys(maps["neuron"]))
    across = max(maps.groupby("neuron", sort=False)["example"].nunique())
    figure = _Shown(
        figsize=(2.1 * across + 1.3, 2.3 * len(names) + 0.2), layout="constrained", facecolor="white"
    )
    axes = figure.subplots(len(names), across, squeeze=False)
    for line, name in zip(axes, names, strict=True):
        mine = maps[maps["neuron"] == name]
        scale = _centred([mine[["activation"]]])
        for spot in line:
            spot.set_axis_off()
        for spot, (example, cells) in zip(line, mine.groupby("example", sort=False), strict=False):
            size = (int(cells["row"].max()) + 1, int(cells["column"].max()) + 1)
            _overlay(spot, _open(pictures[str(example)]), _cells(cells, "activation", size), scale)
            _outline(spot, _cells(cells.assign(mask=cells["mask"].astype(float)), "mask", size))
            spot.set_title(_drawable(str(example), 24), fontsize=7.5, color=_INK)
        line[0].text(
            -0.06,
            0.5,
            name,
            rotation=90,
            va="center",
            ha="right",
            fontsize=9,
            color=_INK,
            transform=line[0].transAxes,
        )
        bar = figure.colorbar(scale, ax=list(line), shrink=0.8, pad=0.02)
        _label_bar(bar, "logit_diff")
        bar.set_label("activation", fontsize=8.5, color=_INK)
    return figure


def measures(table: pd.DataFrame, names: Sequence[str]) -> Figure:
    """A panel a measure: for each word its value with its interval, and beside it the null and random neurons.

    `table` is the `measures` of `vlmscope.neurons.measure`.
    """
    words = list(dict.fromkeys(table["word"]))
    figure = _Shown(
        figsize=(2.2 * len(names) + 0.9, max(2.2, 0.24 * len(words) + 1.3)),
        layout="constrained",
        facecolor="white",
    )
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    place = {word: len(words) - 1 - n for n, word in enumerate(words)}
    for spot, name in zip(axes, names, strict=True):
        mine = table[(table["measure"] == name) & (table["method"] == "contribution")]
        at = mine["word"].map(place)
        spot.hlines(at, mine["ci_low"], mine["ci_high"], color="#4C78A8", lw=2.2)
        spot.plot(mine["value"], at, "o", color="#1f3f66", ms=4.5, label="the word's neurons")
        spot.plot(mine["null"], at, "|", color="#333333", ms=9, mew=1.6, label="null")
        spot.plot(mine["random"], at, "x", color="#B07020", ms=5, label="random neurons")
        spot.set_title(name, fontsize=9.5, color=_INK)
        spot.set_yticks(list(place.values()), list(place), fontsize=8.5)
        spot.tick_params(axis="x", labelsize=8)
        spot.grid(axis="x", color="#e5e5e5")
        spot.set_axisbelow(True)
        spot.spines[["top", "right"]].set_visible(False)
        spot.margins(y=max(0.04, 0.5 / len(words)))
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def _cells(rows: pd.DataFrame, value: str, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    found = np.full(size, np.nan)
    found[rows["row"].to_numpy(int), rows["column"].to_numpy(int)] = rows[value].to_numpy(float)
    return found


def _outline(axes: Axes, cells: np.ndarray[Any, Any]) -> None:
    """A line around the cells that are set."""
    inside = np.pad(np.nan_to_num(cells) > 0, 1)
    rows, columns = cells.shape
    for r, c in zip(*np.nonzero(inside), strict=True):
        left, top = (c - 1) / columns, 1 - (r - 1) / rows
        right, bottom = c / columns, 1 - r / rows
        for beyond, xs, ys in (
            (inside[r - 1, c], (left, right), (top, top)),
            (inside[r + 1, c], (left, right), (bottom, bottom)),
            (inside[r, c - 1], (left, left), (top, bottom)),
            (inside[r, c + 1], (right, right), (top, bottom)),
        ):
            if not beyond:
                axes.plot(xs, ys, color="white", lw=2.4, solid_capstyle="round")
                axes.plot(xs, ys, color=_INK, lw=1.2, solid_capstyle="round")


def is_patch(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which patches are of one patch of the image: their token is `row,column`."""
    token = rows["token"].astype("string")
    return token.str.fullmatch(r"\d+,\d+").fillna(False).astype(bool)


def _overlay(axes: Axes, picture: Image.Image, cells: np.ndarray[Any, Any], scale: ScalarMappable) -> None:
    axes.imshow(picture.convert("L"), extent=(0, 1, 0, 1), cmap="gray", vmin=-128, vmax=300)
    size = np.abs(np.nan_to_num(cells)) / (scale.get_clim()[1] or 1.0)
    axes.imshow(
        cells,
        extent=(0, 1, 0, 1),
        cmap=scale.cmap,
        norm=scale.norm,  # type: ignore[arg-type]
        alpha=np.where(np.isnan(cells), 0.0, 0.1 + 0.8 * np.clip(size, 0, 1)),
        interpolation="nearest",
    )
    axes.set_aspect(picture.height / picture.width)


def _open(picture: _Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    with Image.open(picture) as opened:
        return opened.convert("RGB")


def _spread(items: list[int], many: int) -> list[int]:
    places = np.unique(np.linspace(0, len(items) - 1, min(many, len(items))).round().astype(int))
    return [int(items[i]) for i in places]


def _scale(tables: Sequence[pd.DataFrame], value: str, gap: float = 0.0) -> ScalarMappable:
    """One colour scale: centred at zero for a change, with a floor; from 0 to 1 for a probability."""
    if value == "p_patched":
        return ScalarMappable(Normalize(0.0, 1.0), "viridis")
    return _centred(tables, max(LEAST[value], FLOOR * abs(gap) if value == "logit_diff" else 0.0))


def _centred(tables: Sequence[pd.DataFrame], least: float = 0.0) -> ScalarMappable:
    sizes = [np.abs(t.to_numpy(dtype=float)) for t in tables]
    finite = [float(s[np.isfinite(s)].max(initial=0.0)) for s in sizes]
    limit = max([least, *finite]) or 1.0
    return ScalarMappable(Normalize(-limit, limit), _DIVERGING)


def _label_bar(bar: Any, value: str) -> None:
    bar.set_label(VALUES[value], fontsize=9, color=_INK)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _heat_map(
    axes: Axes, table: pd.DataFrame, scale: ScalarMappable, marks: Iterable[tuple[int, int]] | None = None
) -> None:
    if table.empty:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing of this kind\nin the table", ha="center", va="center")
        return
    cells = np.ma.masked_invalid(table.to_numpy(dtype=float))
    down, across = cells.shape
    lines = {"edgecolors": "white", "linewidth": 0.6} if across <= 60 else {"rasterized": True}
    axes.set_facecolor(_MISSING)
    axes.pcolormesh(cells, cmap=scale.cmap, norm=scale.norm, **lines)  # type: ignore[arg-type]
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)
    layers = _spread(list(range(down)), 16)
    axes.set_yticks([i + 0.5 for i in layers], [str(table.index[i]) for i in layers])
    axes.set_ylabel("layer", fontsize=9, color=_INK)
    name = str(table.columns.name or "")
    _label_columns(axes, _names(table), [c in table.attrs.get("roles", ()) for c in table.columns])
    axes.set_xlabel(name, fontsize=9, color=_INK)
    if marks is not None:
        _dots(axes, [(table.index.get_loc(r), table.columns.get_loc(c)) for r, c in marks])
    elif name == "head":
        _mark(axes, cells, scale)


def _names(table: pd.DataFrame) -> list[str]:
    """What stands below the columns: labels, and how many examples a column holds if fewer than others."""
    said, n = table.attrs.get("labels", {}), table.attrs.get("n", {})
    names = [_drawable(str(said.get(column, column)), 24) for column in table.columns]
    most = max(n.values(), default=0)
    return [
        f"{name}  n={n[column]}" if n.get(column, most) < most else name
        for name, column in zip(names, table.columns, strict=True)
    ]


def _label_columns(axes: Axes, names: list[str], roles: list[bool]) -> None:
    """All names while they fit; of 600 tokens every so many, and always those with a role."""
    step = -(-len(names) // 48)
    near = max(1, step // 2)
    keep = {i for i, is_role in enumerate(roles) if is_role}
    keep |= {i for i in range(0, len(names), step) if not any(abs(i - k) < near for k in keep)}
    shown = sorted(keep)
    labels = [names[i] for i in shown]
    is_flat = max((len(x) for x in labels), default=0) <= 2 and len(shown) <= 32
    axes.set_xticks([i + 0.5 for i in shown], labels, parse_math=False)
    for i, tick in zip(shown, axes.get_xticklabels(), strict=True):
        tick.set_fontweight("bold" if roles[i] else "normal")
        if not is_flat:
            tick.set(rotation=90 if len(shown) > 24 else 45, rotation_mode="anchor")
            tick.set(ha="right", va="center" if len(shown) > 24 else "top")


def _dots(axes: Axes, places: Sequence[tuple[Any, Any]]) -> None:
    """A dot with a light rim, to be seen on any colour."""
    if places:
        axes.scatter(
            [c + 0.5 for _, c in places],
            [r + 0.5 for r, _ in places],
            s=22,
            color=_INK,
            edgecolors="white",
            linewidths=1.0,
        )


def _mark(axes: Axes, cells: np.ma.MaskedArray[Any, Any], scale: ScalarMappable) -> None:
    """Outline the three strongest cells; write the value where a cell is wide enough."""
    size = np.abs(cells.filled(0.0))
    order = [int(i) for i in np.argsort(-size, axis=None, kind="stable")[:3]]
    for flat in order:
        row, column = divmod(flat, cells.shape[1])
        if size[row, column] == 0.0:
            continue
        box = mpl.patches.Rectangle((column, row), 1, 1, fill=False, edgecolor="black", lw=1.4)
        axes.add_patch(box)
        if cells.shape[1] <= 16:
            red, green, blue, _ = scale.to_rgba(cells[row, column])
            is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(
                column + 0.5,
                row + 0.5,
                short_number(float(cells[row, column])),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if is_dark else "black",
            )


def short_number(number: float) -> str:
    """A signed number of three figures, with a true minus.

    >>> short_number(-0.01234), short_number(12.345), short_number(0.0)
    ('−0.0123', '+12.3', '0')
    """
    if number == 0.0:
        return "0"
    decimals = min(6, max(0, 2 - int(np.floor(np.log10(abs(number))))))
    text = f"{number:+.{decimals}f}" if abs(number) >= 1e-4 else f"{number:+.1e}"
    return text.replace("-", "−")


def _width(tables: Mapping[str, pd.DataFrame]) -> float:
    widest = max((len(t.columns) for t in tables.values()), default=1)
    return float(np.clip(1.2 + 0.36 * widest, 3.4, 12.0))


def _height(table: pd.DataFrame) -> float:
    labels = [len(name) for name in _names(table)]
    below = 0.35 + 0.065 * max(labels, default=0) * (1.0 if len(labels) > 24 else 0.75)
    return float(np.clip(0.26 * len(table), 1.3, 6.0)) + below + 0.75


def _wrapped(title: str, width: float) -> str:
    """A title in lines that fit a panel of so many inches."""
    lines = _drawable(title, 200).split("\n")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, int(10.5 * width)) or [""])


def _over(effects: pd.DataFrame, table: pd.DataFrame) -> str:
    many = table.attrs.get("examples", 0)
    if many == 1:
        return " ".join(f"one example: {effects['example'].iloc[0]}".split())
    return f"mean over {many} examples"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _drawable(text: str, longest: int) -> str:
    """`text` shortened, without line breaks of its own or characters the font does not have."""
    lines = [
        "".join(c if c.isprintable() and _has_glyph(c) else "□" for c in line) for line in text.split("\n")
    ]
    return "\n".join(x if len(x) <= longest else x[: longest - 1] + "…" for x in lines)


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    return bool(get_font(findfont(FontProperties())).get_char_index(ord(character)))

"""Figures of a table of patches.

The tables `token_table`, `head_table` and `strongest` hold the numbers; `layer_by_token`,
`layer_by_head`, `panels` and `image_grid` draw them. All take the effects table of `read_run` or
`sweep`, average first within an example and then over examples, and return a
`matplotlib.figure.Figure` (pyplot is not involved): a notebook shows it, `savefig` writes it.

Red is towards the answer, blue towards the foil, white is no change, grey was not patched.
"""

from __future__ import annotations

import io
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
    "output": "the tower's output",
}
TOWERS = {
    "vision": "vision tower",
    "qformer": "Q-Former",
    "encoder": "text encoder",
    "decoder": "decoder",
}

OTHER = "other"
"""The column of tokens that have no role and do not stand in every example."""

_DIVERGING, _MISSING, _INK = "RdBu_r", "#d4d4d4", "#222222"
_REPEAT = ["example", "corruption"]
_Picture: TypeAlias = str | Path | Image.Image


# --- tables ----------------------------------------------------------------------------------


def strongest(effects: pd.DataFrame, n: int = 10) -> pd.DataFrame:
    """The `n` sites with the largest |mean `logit_diff`| over examples, largest first.

    Patches are one site if they agree in tower, layer, kind, unit and role (in position, where
    there is no role). Columns: `site` (an expression that can be swept again), `corruption`,
    `token` (where it is the same in all examples), `mean`, `sd` (over examples; null for one) and
    `n`, the number of examples.
    """
    keys = ["corruption", "tower", "layer", "kind", "unit", "at"]
    columns = ["site", "corruption", "token", "mean", "sd", "n"]
    if effects.empty:
        return pd.DataFrame(columns=columns)
    layer = effects["site"].str.split(".", n=2).str[1]  # with the window, where it has one
    rows = effects.assign(
        at=_at(effects), layer=layer, unit=effects["unit"].astype(object).fillna("")
    )
    each = rows.groupby([*keys, "example"], as_index=False)["logit_diff"].mean()
    found = each.groupby(keys)["logit_diff"].agg(["mean", "std", "count"])
    tokens = rows.groupby(keys)["token"].agg(["first", "nunique"])
    found["token"] = tokens["first"].where(tokens["nunique"] == 1)
    found = found.rename(columns={"std": "sd", "count": "n"}).reset_index()
    unit = found["unit"].where(found["unit"] == "", "." + found["unit"])
    place = found["tower"] + "." + found["layer"] + "." + found["kind"]
    found["site"] = place + unit + "@" + found["at"]
    order = found["mean"].abs().sort_values(ascending=False, kind="stable").index
    return found.loc[order, columns].head(n).reset_index(drop=True)


def token_table(
    effects: pd.DataFrame, *, kind: str = "resid", tower: str = "encoder", value: str = "logit_diff"
) -> pd.DataFrame:
    """Mean `value` by layer (rows) and token (columns), of patches of a whole `kind`.

    Where all examples have the same tokens, a column is a position (`2 circle (noun)`). Otherwise
    it is a role, a token that stands in every example, or `OTHER`.
    """
    rows = _select(effects, tower, kind, value)
    return _by_token(rows[rows["unit"].isna()], value)


def head_table(
    effects: pd.DataFrame,
    *,
    kind: str = "cross",
    tower: str = "encoder",
    role: str | None = None,
    position: int | None = None,
    value: str = "logit_diff",
) -> pd.DataFrame:
    """Mean `value` by layer (rows) and head (columns) at one role or one position.

    With neither given, at the column of `token_table` with the largest mean absolute value.
    The table's `attrs["place"]` names it.
    """
    rows = _select(effects, tower, kind, value)
    rows = rows[rows["unit"].astype("string").str.fullmatch(r"h\d+").fillna(False).astype(bool)]
    place = role if role is not None else None if position is None else f"position {position}"
    if role is not None:
        rows = rows[rows["role"] == role]
    elif position is not None:
        rows = rows[rows["position"] == position]
    elif len(rows):
        place, rows = _strongest_place(rows, value)
    heads = rows["unit"].str.slice(1).astype(int)
    table = _mean(rows.assign(column=heads), value)
    if len(table):
        table = table.reindex(columns=range(int(table.columns.max()) + 1))
    table.columns.name = "head"
    table.attrs["place"] = place
    return table


def tracing_tables(
    table: pd.DataFrame, *, tower: str = "encoder", window: int = 1, length: int = 0
) -> dict[str, pd.DataFrame]:
    """Layer × token tables of the share restored, by kind, from the table of `tracing.trace`.

    `length` is that of the questions in tokens, 0 where tokens are averaged by role.
    """
    same = (table["window"] == window) & (table["length"] == length)
    rows = table[(table["tower"] == tower) & same]
    found = {}
    for kind in [k for k in KINDS if k in set(rows["kind"])]:
        some = rows[rows["kind"] == kind]
        wide = some.pivot_table(index="layer", columns="at", values="restored")
        wide = wide[list(some.groupby("at")["order"].mean().sort_values(kind="stable").index)]
        wide.columns.name = "token"
        wide.attrs["roles"] = set(some.loc[some["is_role"].astype(bool), "at"])
        wide.attrs["examples"] = round(some["n"].max())
        found[kind] = wide
    return found


def _strongest_place(rows: pd.DataFrame, value: str) -> tuple[str, pd.DataFrame]:
    labels = columns_of(rows)["column"]
    cells = rows.assign(column=labels).groupby(["column", "layer", "unit"])[value].mean()
    strength = cells.abs().groupby("column").mean().fillna(0.0)
    named = strength.drop(OTHER, errors="ignore")
    place = str((named if len(named) else strength).idxmax())
    return place, rows[labels == place]


def _select(effects: pd.DataFrame, tower: str, kind: str, value: str) -> pd.DataFrame:
    if value not in VALUES:
        raise ValueError(f"no value '{value}' to draw; expected one of {', '.join(VALUES)}")
    single = ~effects["site"].str.contains("/", regex=False)  # no windows of layers
    return effects[(effects["tower"] == tower) & (effects["kind"] == kind) & single]


def _by_token(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    labels = columns_of(rows)
    table = _mean(rows.assign(column=labels["column"]), value)
    order = labels.groupby("column")["order"].mean().sort_values(kind="stable")
    table = table[[c for c in order.index if c in table]]
    table.columns.name = "token"
    table.attrs["roles"] = set(labels.loc[labels["is_role"], "column"])
    return table


def _mean(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """Over the rows of an example first, so that a role of two tokens does not count twice."""
    each = rows.groupby([*_REPEAT, "layer", "column"], sort=False)[value].mean()
    table = each.groupby(["layer", "column"]).mean().unstack("column")
    if len(table):
        table = table.reindex(range(int(table.index.min()), int(table.index.max()) + 1))
    table.index.name = "layer"
    table.attrs["examples"] = len(rows[_REPEAT].drop_duplicates())
    return table


def _at(rows: pd.DataFrame) -> pd.Series[str]:
    """What stands after the @: the role, or else the position, or else what the site says."""
    position = rows["position"].astype("Int32").astype("string")
    said = rows["site"].astype("string").str.replace(r"^.*@", "", regex=True)
    return rows["role"].astype("string").fillna(position).fillna(said).astype(object)


def columns_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The token column of a figure that each patch belongs to.

    Columns: `column`, its label; `order`, from left to right; `is_role`.
    """
    role, token = rows["role"].astype(object), rows["token"].astype(object).fillna("")
    position = rows["position"].astype("Int32")
    is_role, is_one = role.notna(), position.notna()
    at = _at(rows)
    together = is_role.map({True: "", False: "@"}) + at
    if rows[is_one].drop_duplicates(["position", "token"])["position"].is_unique:
        marks = (" (" + role + ")").where(is_role, "")
        column = (position.astype(str) + " " + token + marks).where(is_one, together)
        return pd.DataFrame({"column": column, "order": _order(position), "is_role": is_role})
    plain = rows[is_one & ~is_role]
    seen_in = plain.drop_duplicates([*_REPEAT, "token"]).groupby("token").size()
    everywhere = set(seen_in[seen_in == len(rows[_REPEAT].drop_duplicates())].index)
    column = at.where(is_role, token.where(token.isin(everywhere), OTHER))
    column = column.where(is_one, together)
    order = _order(position).where(column != OTHER, np.inf)
    return pd.DataFrame({"column": column, "order": order, "is_role": is_role})


def _order(position: pd.Series[int]) -> pd.Series[float]:
    """Patches of several positions at once come last but for `OTHER`."""
    return position.astype("Float64").fillna(1e9).astype(float)


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
    kind: str = "resid",
    tower: str = "encoder",
    value: str = "logit_diff",
    title: str | None = None,
) -> Figure:
    """Heat map of `token_table`: layers upwards, tokens to the right, roles in bold."""
    table = token_table(effects, kind=kind, tower=tower, value=value)
    name = f"{_upper(KINDS.get(kind, kind))}, {TOWERS.get(tower, tower)}"
    return panels({title or f"{name}\n{_over(effects, table)}": table}, value=value)


def layer_by_head(
    effects: pd.DataFrame,
    *,
    kind: str = "cross",
    tower: str = "encoder",
    role: str | None = None,
    position: int | None = None,
    value: str = "logit_diff",
    title: str | None = None,
) -> Figure:
    """Heat map of `head_table`: layers upwards, heads to the right, the strongest outlined."""
    table = head_table(effects, kind=kind, tower=tower, role=role, position=position, value=value)
    name = f"{_upper(KINDS.get(kind, kind))} heads, {TOWERS.get(tower, tower)}"
    at = f" at {table.attrs['place']}" if table.attrs["place"] else ""
    return panels({title or f"{name}{at}\n{_over(effects, table)}": table}, value=value)


def panels(
    tables: Mapping[str, pd.DataFrame],
    *,
    value: str = "logit_diff",
    marks: Mapping[str, Iterable[tuple[int, int]]] | None = None,
) -> Figure:
    """Tables of `token_table` or `head_table` side by side, with one colour scale for all.

    The keys are the titles. `marks` names cells, (row label, column label), that get a dot, by title;
    without it the strongest cells of a head table are outlined.
    """
    scale = _scale(list(tables.values()), value)
    across = min(len(tables), 3 if _width(tables) <= 5 else 2 if _width(tables) <= 7.5 else 1)
    across = 2 if len(tables) == 4 and across == 3 else across
    down = -(-len(tables) // max(across, 1))
    height = max((_height(t) for t in tables.values()), default=2.0)
    figure = _Shown(
        figsize=(max(across, 1) * _width(tables) + 0.9, max(down, 1) * height),
        layout="constrained",
        facecolor="white",
    )
    axes = figure.subplots(max(down, 1), max(across, 1), squeeze=False)
    flat = list(axes.flat)
    for spot, (title, table) in zip(flat, tables.items(), strict=False):
        _heat_map(spot, table, scale, None if marks is None else marks.get(title, ()))
        spot.set_title(_drawable(title, 90), fontsize=10, color=_INK, parse_math=False)
    for spot in flat[len(tables) :]:
        spot.set_axis_off()
    bar = figure.colorbar(scale, ax=flat, shrink=min(1.0, 4.5 / (down * height)), pad=0.02)
    _label_bar(bar, value)
    return figure


def image_grid(
    effects: pd.DataFrame,
    picture: _Picture,
    grid: tuple[int, int],
    *,
    kind: str = "resid",
    tower: str = "vision",
    value: str = "logit_diff",
    layers: Sequence[int] | None = None,
) -> Figure:
    """Effects at image patches, drawn over the picture: the mean of all layers, and a panel a layer.

    `grid` is (rows, columns) of the patches; patches are told by their token, `row,column`. At most
    six layers are drawn unless `layers` names them. `effects` should hold one example: the one of
    `picture`.
    """
    rows = _select(effects, tower, kind, value)
    rows = rows[rows["unit"].isna() & rows["position"].notna() & is_patch(rows)]
    places = rows["token"].str.split(",", expand=True).astype(int)
    table = _mean(rows.assign(column=places[0] * grid[1] + places[1]), value)
    table = table.reindex(columns=range(grid[0] * grid[1]))
    layers = _spread(list(table.index), 6) if layers is None else list(layers)
    drawn = {f"layer {layer}": table.loc[layer] for layer in layers}
    if len(table) > 1 and value != "p_patched":
        drawn = {f"mean of {len(table)} layers": table.mean(), **drawn}
    scale = _scale([pd.DataFrame(drawn)], value)
    shown = _open(picture)
    across = min(len(drawn) + 1, 4)
    down = -(-(len(drawn) + 1) // across)
    figure = _Shown(
        figsize=(2.5 * across + 1.1, 2.75 * down), layout="constrained", facecolor="white"
    )
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


def universal(heads: pd.DataFrame, *, most: int = 30) -> Figure:
    """Heads (rows) over runs (columns): the mean `logit_diff`, a dot where a head is important.

    `heads` is the table of `circuits.find`. Heads that are important somewhere are shown, those
    important in most runs first, `most` at the most; a ring marks what the other half confirms.
    """
    rows = heads.assign(
        name=heads["tower"] + " L" + heads["layer"].astype(str) + " " + heads["kind"]
        + " H" + heads["head"].astype(str) + " @" + heads["position"]
    )  # fmt: skip
    runs = list(dict.fromkeys(rows["run"]))
    count = rows.groupby("name")["important"].sum()
    size = rows.assign(size=rows["mean"].abs()).groupby("name")["size"].mean()
    order = pd.DataFrame({"count": count, "size": size}).query("count > 0")
    names = list(order.sort_values(["count", "size"], ascending=False).index[:most])[::-1]
    table = rows.pivot_table(index="name", columns="run", values="mean").reindex(names)[runs]
    scale = _scale([table], "logit_diff")
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
    axes.set_xticks([i + 0.5 for i in range(len(runs))], labels, rotation=45, ha="right",
                    rotation_mode="anchor", parse_math=False)  # fmt: skip
    where = {name: i for i, name in enumerate(names)}
    shown = rows[rows["important"] & rows["name"].isin(names)]
    places = [(where[r.name_], runs.index(r.run)) for r in shown.rename(columns={"name": "name_"}).itertuples()]  # fmt: skip
    _dots(axes, places)
    sure = shown[shown["confirmed"]].rename(columns={"name": "name_"})
    axes.scatter([runs.index(r.run) + 0.5 for r in sure.itertuples()],
                 [where[r.name_] + 0.5 for r in sure.itertuples()],
                 s=75, facecolors="none", edgecolors=_INK, linewidths=1.0)  # fmt: skip
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
    figure = _Shown(figsize=(1.75 * across + 1.6, 1.95 * len(names) + 0.3), layout="constrained",
                    facecolor="white")  # fmt: skip
    axes = figure.subplots(len(names), across, squeeze=False)
    scale = _scale([maps[["difference"]]], "logit_diff")
    own = None if patches is None else _scale([patches[["logit_diff"]]], "logit_diff")
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
    figure = _Shown(figsize=(2.1 * across + 1.3, 2.3 * len(names) + 0.2), layout="constrained",
                    facecolor="white")  # fmt: skip
    axes = figure.subplots(len(names), across, squeeze=False)
    for line, name in zip(axes, names, strict=True):
        mine = maps[maps["neuron"] == name]
        scale = _scale([mine[["activation"]]], "logit_diff")
        for spot in line:
            spot.set_axis_off()
        for spot, (example, cells) in zip(line, mine.groupby("example", sort=False), strict=False):
            size = (int(cells["row"].max()) + 1, int(cells["column"].max()) + 1)
            _overlay(spot, _open(pictures[str(example)]), _cells(cells, "activation", size), scale)
            _outline(spot, _cells(cells.assign(mask=cells["mask"].astype(float)), "mask", size))
            spot.set_title(_drawable(str(example), 24), fontsize=7.5, color=_INK)
        line[0].text(-0.06, 0.5, name, rotation=90, va="center", ha="right", fontsize=9, color=_INK,
                     transform=line[0].transAxes)  # fmt: skip
        bar = figure.colorbar(scale, ax=list(line), shrink=0.8, pad=0.02)
        _label_bar(bar, "logit_diff")
        bar.set_label("activation", fontsize=8.5, color=_INK)
    return figure


def measures(table: pd.DataFrame, names: Sequence[str]) -> Figure:
    """A panel a measure: for each word its value with its interval, and beside it the null and random neurons.

    `table` is the `measures` of `vlmscope.concepts.measure`.
    """
    words = list(dict.fromkeys(table["word"]))
    figure = _Shown(figsize=(2.2 * len(names) + 0.9, max(2.2, 0.24 * len(words) + 1.3)),
                    layout="constrained", facecolor="white")  # fmt: skip
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
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
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


def _overlay(
    axes: Axes, picture: Image.Image, cells: np.ndarray[Any, Any], scale: ScalarMappable
) -> None:
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


def _scale(tables: Sequence[pd.DataFrame], value: str) -> ScalarMappable:
    """One colour scale: centred at zero for a change, from 0 to 1 for a probability."""
    if value == "p_patched":
        return ScalarMappable(Normalize(0.0, 1.0), "viridis")
    sizes = [np.abs(t.to_numpy(dtype=float)) for t in tables]
    finite = [float(s[np.isfinite(s)].max(initial=0.0)) for s in sizes]
    limit = max(finite, default=0.0) or 1.0
    limit = max(limit, 1.0) if value == "restored" else limit  # a share, the same in all figures
    return ScalarMappable(Normalize(-limit, limit), _DIVERGING)


def _label_bar(bar: Any, value: str) -> None:
    bar.set_label(VALUES[value], fontsize=9, color=_INK)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _heat_map(
    axes: Axes,
    table: pd.DataFrame,
    scale: ScalarMappable,
    marks: Iterable[tuple[int, int]] | None = None,
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
    _label_columns(axes, [str(c) for c in table.columns], table.attrs.get("roles", set()))
    axes.set_xlabel(name, fontsize=9, color=_INK)
    if marks is not None:
        _dots(axes, [(table.index.get_loc(r), table.columns.get_loc(c)) for r, c in marks])
    elif name == "head":
        _mark(axes, cells, scale)


def _label_columns(axes: Axes, names: list[str], roles: set[str]) -> None:
    """All names while they fit; of 600 tokens every so many, and always those with a role."""
    step = -(-len(names) // 48)
    near = max(1, step // 2)
    keep = {i for i, name in enumerate(names) if name in roles}
    keep |= {i for i in range(0, len(names), step) if not any(abs(i - k) < near for k in keep)}
    shown = sorted(keep)
    labels = [_drawable(names[i], 24) for i in shown]
    is_flat = max((len(x) for x in labels), default=0) <= 2 and len(shown) <= 32
    axes.set_xticks([i + 0.5 for i in shown], labels, parse_math=False)
    for i, tick in zip(shown, axes.get_xticklabels(), strict=True):
        tick.set_fontweight("bold" if names[i] in roles else "normal")
        if not is_flat:
            tick.set(rotation=90 if len(shown) > 24 else 45, rotation_mode="anchor")
            tick.set(ha="right", va="center" if len(shown) > 24 else "top")


def _dots(axes: Axes, places: Sequence[tuple[Any, Any]]) -> None:
    """A dot with a light rim, to be seen on any colour."""
    if places:
        axes.scatter([c + 0.5 for _, c in places], [r + 0.5 for r, _ in places],
                     s=22, color=_INK, edgecolors="white", linewidths=1.0)  # fmt: skip


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
    labels = [len(_drawable(str(c), 24)) for c in table.columns]
    below = 0.35 + 0.065 * max(labels, default=0) * (1.0 if len(labels) > 24 else 0.75)
    return float(np.clip(0.26 * len(table), 1.3, 6.0)) + below + 0.75


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
        "".join(c if c.isprintable() and _has_glyph(c) else "□" for c in line)
        for line in text.split("\n")
    ]
    return "\n".join(x if len(x) <= longest else x[: longest - 1] + "…" for x in lines)


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    return bool(get_font(findfont(FontProperties())).get_char_index(ord(character)))

"""Maps over the patches of pictures: effects, attention and activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from PIL import Image

from vlmscope.report.canvas import BAR, INK, Margins, add_bar, centred, drawable, grid, title
from vlmscope.report.heat_maps import VALUES, colour_scale, spread
from vlmscope.studies.tables import choose, mean_gap, means

Picture: TypeAlias = str | Path | Image.Image
Cells: TypeAlias = np.ndarray[Any, Any]


def is_patch(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which patches are of one patch of the image: their token is `row,column`."""
    return rows["token"].astype("string").str.fullmatch(r"\d+,\d+").fillna(False).astype(bool)


def places(rows: pd.DataFrame) -> pd.DataFrame:
    """The `row` and `column` in the image of patches of which `is_patch` holds."""
    found = rows["token"].str.split(",", expand=True).astype(int)
    return rows.assign(row=found[0], column=found[1])


def image_grid(
    effects: pd.DataFrame,
    picture: Picture,
    shape: tuple[int, int],
    *,
    kind: str | None = None,
    tower: str | None = None,
    value: str = "logit_diff",
    layers: Sequence[int] | None = None,
    gap: float | None = None,
    ax: Iterable[Axes] | None = None,
) -> list[Axes]:
    """Effects at image patches, drawn over the picture: the mean of all layers, and a panel a layer.

    `shape` is (rows, columns) of the patches; patches are told by their token, `row,column`. At most
    six layers are drawn unless `layers` names them. `effects` should hold one example: the one of
    `picture`. Towers and kinds are chosen as in `vlmscope.token_table`, the vision tower first; `gap` as
    in `panels`. `ax` are axes to draw into: for the picture, the mean (if there are several layers, and `value`
    is a change) and each layer.
    """
    rows = effects[effects["position"].notna() & is_patch(effects)]
    tower = "vision" if tower is None and "vision" in set(rows["tower"]) else tower
    rows = choose(rows, tower=tower, kind=kind, value=value)
    found = means(places(rows), ["layer", "row", "column"], value)
    by_layer = {layer: _cells(cells, "mean", shape) for layer, cells in found.groupby("layer")}
    layers = spread(list(by_layer), 6) if layers is None else list(layers)
    drawn = {f"layer {layer}": by_layer[layer] for layer in layers}
    if len(by_layer) > 1 and value != "p_patched":
        mean = found.groupby(["row", "column"], as_index=False)["mean"].mean()
        drawn = {f"mean of {len(by_layer)} layers": _cells(mean, "mean", shape), **drawn}
    scale = colour_scale(drawn.values(), value, (mean_gap(rows) or 0.0) if gap is None else gap)
    image = _open(picture)
    margins = Margins(right=BAR, down=0.35)
    axes = grid(ax, len(drawn) + 1, 4, (2.3, 2.3), margins)
    _draw_picture(axes[0], image)
    title(axes[0], "picture")
    for spot, (name, cells) in zip(axes[1:], drawn.items(), strict=True):
        _overlay(spot, image, cells, scale)
        title(spot, name)
    add_bar(axes, scale, VALUES[value])
    return axes


def attention(
    maps: pd.DataFrame,
    pictures: Mapping[str, Picture],
    patches: pd.DataFrame | None = None,
    *,
    titles: Mapping[str, str] | None = None,
    ax: Iterable[Axes] | None = None,
) -> list[Axes]:
    """A row an example: its picture, the attention of each head, and what its patches do.

    `maps` is the table that `heads.write` keeps: attention minus the all-heads mean, on one scale for
    all; the object's patches have an outline. `patches` are effects of patching the image's patches,
    on a scale of their own at the right. `titles` are for the sites of the heads. `ax` are axes to draw into,
    row by row.
    """
    names = [name for name in maps["example"].unique() if name in pictures]
    sites = list(maps["site"].unique())
    columns = ["picture", *((titles or {}).get(site, site) for site in sites)]
    columns += [] if patches is None else ["patched in"]
    across = len(columns)
    axes = grid(ax, len(names) * across, across, (1.65, 1.65), Margins(bottom=0.9, top=0.45))
    scale = centred([maps["difference"]])
    own = None
    if patches is not None:
        patches = places(patches[is_patch(patches)])
        own = colour_scale([patches["logit_diff"]], "logit_diff", mean_gap(patches) or 0.0)
    for start, name in enumerate(names):
        spots = axes[start * across : (start + 1) * across]
        image, rows = _open(pictures[name]), maps[maps["example"] == name]
        shape = (int(rows["rows"].iloc[0]), int(rows["columns"].iloc[0]))
        _draw_picture(spots[0], image)
        for spot, site in zip(spots[1:], sites, strict=False):
            of_site = rows[rows["site"] == site]
            _overlay(spot, image, _cells(of_site, "difference", shape), scale)
            _outline(spot, _cells(of_site, "object", shape))
        if patches is not None and own is not None:
            effects = patches[patches["example"] == name]
            _overlay(spots[-1], image, _cells(effects, "logit_diff", shape), own)
            _outline(spots[-1], _cells(rows[rows["site"] == sites[0]], "object", shape))
    for spot, text in zip(axes, columns, strict=False):
        title(spot, text, 8.5)
    last = axes[-across:]
    add_bar(last[1 : 1 + len(sites)], scale, "attention minus all-heads mean", below=True)
    if own is not None:
        add_bar(last[-1:], own, VALUES["logit_diff"], below=True)
    return axes


def neuron_maps(
    maps: pd.DataFrame, pictures: Mapping[str, Picture], *, ax: Iterable[Axes] | None = None
) -> list[Axes]:
    """A row a neuron (or mean of several): its activation over the patches of the pictures that drive it most.

    `maps` is the table of `vlmscope neurons describe`. Each row has a scale of its own, centred at zero; the
    outline is around the patches above the 95th percentile. `ax` are axes to draw into, row by row.
    """
    by_neuron = dict(list(maps.groupby("neuron", sort=False)))
    across = max(rows["example"].nunique() for rows in by_neuron.values())
    margins = Margins(left=0.4, right=BAR, down=0.35)
    axes = grid(ax, len(by_neuron) * across, across, (1.9, 1.9), margins)
    for start, (name, rows) in enumerate(by_neuron.items()):
        scale = centred([rows["activation"]])
        spots = axes[start * across : (start + 1) * across]
        for spot in spots:
            spot.set_axis_off()
        for spot, (example, cells) in zip(spots, rows.groupby("example", sort=False), strict=False):
            shape = (int(cells["row"].max()) + 1, int(cells["column"].max()) + 1)
            _overlay(spot, _open(pictures[str(example)]), _cells(cells, "activation", shape), scale)
            _outline(spot, _cells(cells, "mask", shape))
            title(spot, drawable(str(example), 24), 7.5)
        spots[0].text(
            -0.06,
            0.5,
            name,
            rotation=90,
            va="center",
            ha="right",
            fontsize=9,
            color=INK,
            transform=spots[0].transAxes,
        )
        add_bar(spots, scale, "activation")
    return axes


def _cells(rows: pd.DataFrame, value: str, shape: tuple[int, int]) -> Cells:
    found = np.full(shape, np.nan)
    found[rows["row"].to_numpy(int), rows["column"].to_numpy(int)] = rows[value].to_numpy(float)
    return found


def _outline(axes: Axes, cells: Cells) -> None:
    """A line around the cells that are set."""
    inside = np.nan_to_num(cells) > 0
    rows, columns = cells.shape
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])  # (x, y) around a cell, y downwards
    beyond = [(-1, 0), (0, 1), (1, 0), (0, -1)]  # what is next to each side of it
    framed = np.pad(inside, 1)
    lines = [
        np.array([column, row]) + corners[side : side + 2]
        for row, column in np.argwhere(inside)
        for side, (down, right) in enumerate(beyond)
        if not framed[row + 1 + down, column + 1 + right]
    ]
    lines = [np.array([0, 1]) + line * np.array([1, -1]) / np.array([columns, rows]) for line in lines]
    for colour, width in (("white", 2.4), (INK, 1.2)):
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width, capstyle="round"))


def _draw_picture(axes: Axes, picture: Image.Image) -> None:
    axes.set_axis_off()
    axes.imshow(picture, extent=(0, 1, 0, 1), aspect=picture.height / picture.width)


def _overlay(axes: Axes, picture: Image.Image, cells: Cells, scale: ScalarMappable) -> None:
    """Cells over a pale picture: the larger, the less of it is seen."""
    axes.set_axis_off()
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


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    with Image.open(picture) as opened:
        return opened.convert("RGB")

"""Maps over the patches of pictures: effects, attention and activations, each figure in one pair of axes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.patheffects import withStroke
from PIL import Image

from vlmscope.errors import DataError
from vlmscope.report.canvas import BAR, DARK, Margins, centred, draw_bar, drawable, grid
from vlmscope.report.heat_maps import CHANGED, VALUES, colour_scale, spread
from vlmscope.studies.tables import change_of, choose, mean_gap, means

Picture: TypeAlias = str | Path | bytes | Image.Image
Cells: TypeAlias = np.ndarray[Any, Any]
Bar: TypeAlias = tuple[ScalarMappable, str]


class Tile(NamedTuple):
    """A picture, or cells over it in the colours of a scale, with a line around those of the outline and a
    word in each, by row and column."""

    picture: Image.Image
    title: str
    cells: Cells | None = None
    scale: ScalarMappable | None = None
    outline: Cells | None = None
    words: Mapping[tuple[int, int], str] | None = None


def clean_pictures(examples: Iterable[Mapping[str, Any]]) -> dict[str, bytes]:
    """The clean pictures of the examples that a run keeps to look at, by their ids."""
    return {e["id"]: e["clean_image"] for e in examples if e.get("clean_image") and "id" in e}


def is_patch(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which patches are of one patch of the image: their token is `row,column`."""
    return rows["token"].astype("string").str.fullmatch(r"[0-9]{1,3},[0-9]{1,3}").fillna(False).astype(bool)


def places(rows: pd.DataFrame) -> pd.DataFrame:
    """Patches of which `is_patch` holds, with their `row` and `column` in the image."""
    found = rows["token"].astype("string").str.extract(r"(\d+),(\d+)").astype(int)
    return rows.assign(row=found[0], column=found[1])


def image_grid(
    effects: pd.DataFrame,
    picture: Picture,
    shape: tuple[int, int],
    *,
    kind: str | None = None,
    tower: str | None = None,
    value: str | None = None,
    layers: Sequence[int] | None = None,
    gap: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Effects at image patches, drawn over the picture: the mean of all layers, and a tile a layer.

    `shape` is (rows, columns) of the patches; patches are told by their token, `row,column`. At most
    six layers are drawn unless `layers` names them. `effects` should hold one example: the one of
    `picture`. Towers and kinds are chosen as in `vlmscope.token_table`, the vision tower first; `gap` as
    in `panels`.
    """
    rows = effects[effects["position"].notna() & is_patch(effects)]
    tower = "vision" if tower is None and "vision" in set(rows["tower"]) else tower
    value = value or change_of(rows)
    rows = choose(rows, tower, kind, value)
    found = means(places(rows), ["layer", "row", "column"], value)
    by_layer = {int(layer): _cells(cells, "mean", shape) for layer, cells in found.groupby("layer")}
    layers = spread(list(by_layer), 6) if layers is None else list(layers)
    drawn = {}
    if len(by_layer) > 1 and value != "p_patched":
        mean = found.groupby(["row", "column"], as_index=False)["mean"].mean()
        drawn[f"mean of {len(by_layer)} layers"] = _cells(mean, "mean", shape)
    drawn |= {f"layer {layer}": by_layer[layer] for layer in layers}
    scale = colour_scale(drawn.values(), value, (mean_gap(rows) or 0.0) if gap is None else gap)
    image = _open(picture)
    tiles = [Tile(image, "picture"), *(Tile(image, name, cells, scale) for name, cells in drawn.items())]
    return _mosaic(
        [tiles[n : n + 4] for n in range(0, len(tiles), 4)], [(scale, VALUES[value])], ax, size=2.3, down=0.35
    )


def attention(
    maps: pd.DataFrame,
    pictures: Mapping[str, Picture],
    patches: pd.DataFrame | None = None,
    *,
    titles: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A row an example: its picture, the attention of each head, and what its patches do.

    `maps` is the table that `heads.write` keeps: attention minus the all-heads mean, on one scale; the object
    has an outline. `patches` are effects of the image's patches, on a scale of their own. `titles` are for
    the sites of the heads.
    """
    bars = [(centred([maps["difference"]]), "attention minus all-heads mean")]
    if patches is not None:
        patches = places(patches[is_patch(patches)])
        change = change_of(patches)
        own = colour_scale([patches[change]], change, mean_gap(patches) or 0.0)
        bars.append((own, f"patched in: {CHANGED[change]}"))
    lines: list[list[Tile]] = []
    for name, rows in maps[maps["example"].isin(list(pictures))].groupby("example", sort=False):
        image = _open(pictures[str(name)])
        shape = (int(rows["rows"].iloc[0]), int(rows["columns"].iloc[0]))
        line = [Tile(image, "picture")]
        for site, cells in rows.groupby("site", sort=False):
            shown, around = _cells(cells, "difference", shape), _cells(cells, "object", shape)
            line.append(Tile(image, (titles or {}).get(str(site), str(site)), shown, bars[0][0], around))
        if patches is not None:
            shown = _cells(patches[patches["example"] == name], change, shape)
            line.append(Tile(image, "patched in", shown, bars[1][0], line[1].outline))
        lines.append(line if not lines else [tile._replace(title="") for tile in line])
    return _mosaic(lines, bars, ax, size=1.65, down=0.1)


def neuron_maps(maps: pd.DataFrame, pictures: Mapping[str, Picture], *, ax: Axes | None = None) -> Axes:
    """A row a neuron (or mean of several): its activation over the patches of the pictures that drive it.

    `maps` is the table of `vlmscope neurons describe`. Each row has a scale of its own, centred at zero; the
    outline is around the patches above the 95th percentile.
    """
    lines, bars = [], []
    for name, rows in maps.groupby("neuron", sort=False):
        scale, line = centred([rows["activation"]]), []
        for example, cells in rows.groupby("example", sort=False):
            shape = (int(cells["row"].max()) + 1, int(cells["column"].max()) + 1)
            shown, around = _cells(cells, "activation", shape), _cells(cells, "mask", shape)
            line.append(Tile(_open(pictures[str(example)]), drawable(str(example), 24), shown, scale, around))
        lines.append(line)
        bars.append((scale, f"{name}: activation"))
    return _mosaic(lines, bars, ax, size=1.9, down=0.3)


def word_plates(
    rows: pd.DataFrame, picture: Picture, layers: Sequence[int] | None = None, *, ax: Axes | None = None
) -> Axes:
    """The word that each patch of a picture says at each layer, as strong as it is likely (or its logit is
    large, where the probabilities are not known).

    `rows` are those of one example in the table of `vlmscope.lens` that have a place in the picture (their
    slot is `image[row,column]`). At most four layers are drawn unless `layers` names them.
    """
    rows = in_cells(rows[rows["rank"] == 1])
    shape = (int(rows["row"].max()) + 1, int(rows["column"].max()) + 1)
    value, bar, limits = "p", "P(word)", (0.0, 1.0)
    if rows["p"].isna().all():
        value, bar, limits = "logit", "logit", (rows["logit"].min(), rows["logit"].max())
    scale = ScalarMappable(Normalize(*limits), "YlOrBr")
    image = _open(picture)
    side = max(shape[1] * image.height, shape[0] * image.width) / max(image.size)
    size = float(np.clip(0.52 * side, 2.6, 11.0))
    tiles = []
    for layer in spread(sorted(rows["layer"].unique()), 4) if layers is None else layers:
        own = rows[rows["layer"] == layer]
        words = {(r.row, r.column): _word(r.predicted) for r in own.itertuples()}
        tiles.append(Tile(image, f"layer {layer}", _cells(own, value, shape), scale, words=words))
    across = max(1, int(12 // size))
    lines = [tiles[n : n + across] for n in range(0, len(tiles), across)]
    return _mosaic(lines, [(scale, bar)], ax, size=size, down=0.35)


def word_maps(
    cells: pd.DataFrame,
    picture: Picture,
    shape: tuple[int, int],
    titles: Mapping[int, str],
    least: float = 0.0,
    *,
    ax: Axes | None = None,
) -> Axes:
    """What each cell of a picture does to each word, in nats: a tile a word, each on a scale of its own, that
    ends at `least` where all effects are smaller.

    `cells` are those of `vlmscope.explain`, where a row may be a group of cells; `titles` are the words that
    are drawn, by their number.
    """
    image, tiles = _open(picture), []
    for word, title in titles.items():
        shown = np.full(shape, np.nan)
        for unit in cells[cells["word"] == word].itertuples():
            shown[unit.row : unit.row + unit.rows, unit.column : unit.column + unit.columns] = unit.exact
        tiles.append(Tile(image, title, shown, centred([shown], least)))
    lines = [tiles[n : n + 4] for n in range(0, len(tiles), 4)]
    bar = (centred([[1.0]]), "effect, of the word's largest")
    return _mosaic([[Tile(image, "picture"), *lines[0]], *lines[1:]], [bar], ax, size=1.9, down=0.3)


def in_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table whose slot is a place of the picture, with its `row` and `column`."""
    found = rows["slot"].str.extract(r"^image\[(\d{1,3}),(\d{1,3})\]$")
    there = found[0].notna()
    return rows[there].assign(row=found[0][there].astype(int), column=found[1][there].astype(int))


def _word(token: str) -> str:
    """A token without what its tokenizer marks the beginning or the inside of a word with."""
    return drawable(token.removeprefix("▁").removeprefix("Ġ").replace("\n", "⏎") or "·", 9)


def _mosaic(
    lines: Sequence[Sequence[Tile]], bars: Sequence[Bar], ax: Axes | None, *, size: float, down: float
) -> Axes:
    """Tiles in rows, and at their right colour bars that share the height; a unit is an inch."""
    right, step = 0.1 + max(map(len, lines)) * (size + 0.1), size + down
    high = len(lines) * step - down
    (axes,) = grid(ax, 1, 1, (right + BAR, high + 0.5), Margins(0, 0, 0, 0))
    axes.set_axis_off()
    for row, line in enumerate(lines):
        for column, tile in enumerate(line):
            _draw_tile(axes, tile, (0.1 + column * (size + 0.1), 0.1 + high - size - row * step), size)
    share = high / len(bars)
    for n, (scale, label) in enumerate(bars):
        place = (right + 0.05, 0.1 + high - (n + 0.5) * share)
        draw_bar(axes, axes.transData, scale, label, place, min(share - 0.3 * (len(bars) > 1), 3.6))
    axes.set(xlim=(0, right + BAR), ylim=(0, high + 0.5), aspect="equal")
    return axes


def _draw_tile(axes: Axes, tile: Tile, corner: tuple[float, float], size: float) -> None:
    """A tile of at most `size` inches a side; of the pale picture less is seen under larger cells."""
    picture = tile.picture
    width, height = (size * side / max(picture.size) for side in picture.size)
    left, low = corner[0] + (size - width) / 2, corner[1] + (size - height) / 2
    extent = (left, left + width, low, low + height)
    place = (left + width / 2, low + height + 0.06)
    axes.text(*place, tile.title, ha="center", va="bottom", fontsize=8.5, color=DARK)
    if tile.cells is None or tile.scale is None:
        axes.imshow(picture, extent=extent)
        return
    axes.imshow(picture.convert("L"), extent=extent, cmap="gray", vmin=-128, vmax=300)
    colours = tile.scale.to_rgba(tile.cells)
    strength = np.abs(tile.cells) / tile.scale.get_clim()[1]
    colours[..., 3] = np.where(np.isnan(tile.cells), 0.0, 0.1 + 0.8 * np.clip(strength, 0, 1))
    axes.imshow(colours, extent=extent, interpolation="nearest")
    if tile.words is not None:
        across, down = width / tile.cells.shape[1], height / tile.cells.shape[0]
        halo = [withStroke(linewidth=1.6, foreground="white")]
        for (row, column), word in tile.words.items():
            spot = (left + (column + 0.5) * across, low + height - (row + 0.5) * down)
            # a letter is about 0.6 of its size wide
            size_of = min(8.0, 72 * across / (0.6 * max(len(word), 4)), 60 * down)
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": DARK, "path_effects": halo}
            axes.text(*spot, word, fontsize=size_of, parse_math=False, **style)
    if tile.outline is not None:
        lines = list(_around(tile.outline) * (width, -height) + (left, low + height))
        for colour, thick in (("white", 2.4), (DARK, 1.2)):
            axes.add_collection(LineCollection(lines, colors=colour, linewidths=thick, capstyle="round"))


def _around(cells: Cells) -> Cells:
    """The lines around the cells that are set: `(lines, 2, (x, y))`, as shares of the whole, y downwards."""
    inside = np.pad(np.nan_to_num(cells) > 0, 1)
    rows, columns = cells.shape
    across = np.argwhere(inside[1:, 1:-1] != inside[:-1, 1:-1])  # a line above (row, column)
    down = np.argwhere(inside[1:-1, 1:] != inside[1:-1, :-1])  # a line at the left of (row, column)
    starts, ends = np.vstack([across, down]), np.vstack([np.add(across, (0, 1)), np.add(down, (1, 0))])
    return np.stack([starts, ends], axis=1)[..., ::-1] / (columns, rows)


def _cells(rows: pd.DataFrame, value: str, shape: tuple[int, int]) -> Cells:
    found, at = np.full(shape, np.nan), (rows["row"].to_numpy(int), rows["column"].to_numpy(int))
    if any(each.size and each.max() >= size for each, size in zip(at, shape, strict=True)):
        raise DataError(
            f"patches lie outside of the {shape[0]} × {shape[1]} patches of a picture; check the table"
        )
    found[at] = rows[value].to_numpy(float)
    return found


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
        return opened.convert("RGB")

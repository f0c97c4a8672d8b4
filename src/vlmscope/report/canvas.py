"""What all figures share: panels that are laid out in inches, colour scales and bars, text.

A layout engine of matplotlib draws each figure twice and measures every text; here the sizes are known before
anything is drawn. No pyplot, so nothing keeps a figure alive: a notebook shows it by its axes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.image import BboxImage
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, Transform, TransformedBbox

from vlmscope.errors import DataError

DARK = "#222222"
NOT_PATCHED = "#d4d4d4"
BAR = 1.2
"""What a colour bar takes at the right of its panels, with its numbers and its label, in inches."""


class ShownAxes(Axes):
    """Axes that a notebook shows, with the whole figure that they are in."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        figure_of(self).savefig(buffer, format="png")
        return buffer.getvalue()


class Margins(NamedTuple):
    """What is free around a grid of panels, and between them, in inches."""

    left: float
    bottom: float
    right: float
    top: float
    across: float = 0.0
    down: float = 0.0


def grid(
    ax: Axes | Iterable[Axes] | None, count: int, across: int, size: tuple[float, float], margins: Margins
) -> list[Axes]:
    """`count` axes: those that are given, or of a new figure, `across` in a row, of `size` inches each.

    Raises `DataError` if another number of axes is given.
    """
    if ax is not None:
        given = [ax] if isinstance(ax, Axes) else list(np.ravel(np.asarray(ax, dtype=object)))
        if len(given) != count:
            raise DataError(f"ax holds {len(given)} axes; this figure has {count} panels, one for each")
        return given
    down, across = -(-count // across), min(count, across)
    step = (size[0] + margins.across, size[1] + margins.down)
    width = margins.left + across * step[0] - margins.across + margins.right
    height = margins.top + down * step[1] - margins.down + margins.bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = []
    for n in range(count):
        left = margins.left + n % across * step[0]
        low = height - margins.top - n // across * step[1] - size[1]
        place = (left / width, low / height, size[0] / width, size[1] / height)
        axes.append(figure.add_axes(place, axes_class=ShownAxes))
    return axes


def figure_of(axes: Axes) -> Figure:
    """The whole figure that axes are in."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


# --- colours ---------------------------------------------------------------------------------


def centred(values: Iterable[Any], least: float = 0.0) -> ScalarMappable:
    """A colour scale that is centred at zero and ends at the largest of the values, or at `least`."""
    sizes = [np.abs(np.asarray(each, dtype=float)) for each in values]
    limit = max([least, *(float(size[np.isfinite(size)].max(initial=0.0)) for size in sizes)]) or 1.0
    return ScalarMappable(Normalize(-limit, limit), "RdBu_r")


def add_bar(axes: Sequence[Axes], scale: ScalarMappable, label: str) -> None:
    """The colour bar at the right of these axes."""
    figure = figure_of(axes[0])
    if not all(isinstance(each, ShownAxes) for each in axes):  # of a figure that others have laid out
        figure.colorbar(scale, ax=list(axes), label=label)
        return
    width, height = figure.get_size_inches()
    boxes = [each.get_position() for each in axes]
    low, high = (height * end for end in (min(box.y0 for box in boxes), max(box.y1 for box in boxes)))
    right = width * max(box.x1 for box in boxes) + 0.2
    draw_bar(figure, figure.dpi_scale_trans, scale, label, (right, (low + high) / 2), min(high - low, 3.6))


def draw_bar(
    owner: Axes | Figure,
    inches: Transform,
    scale: ScalarMappable,
    label: str,
    middle: tuple[float, float],
    length: float,
) -> None:
    """An upright colour bar without axes of its own; `middle` is that of its left side."""
    first, last = scale.get_clim()
    box = Bbox.from_bounds(middle[0], middle[1] - length / 2, 0.17, length)
    place = TransformedBbox(box, inches)
    image = BboxImage(place, cmap=scale.cmap, norm=scale.norm, origin="lower")  # type: ignore[arg-type]
    image.set_data(np.linspace(first, last, 256)[:, None])
    owner.add_artist(image)
    style: dict[str, Any] = {"transform": inches, "color": DARK, "va": "center"}
    text = textwrap.fill(label, max(12, int(15 * length)))
    owner.text(box.x1 + 0.6, middle[1], text, rotation=90, ha="center", fontsize=9, **style)
    steps = MaxNLocator(int(2 + 1.8 * length), steps=[1, 2, 5, 10], integer=label == "layer")
    for tick in steps.tick_values(first, last):
        if first <= tick <= last:
            y = box.y0 + length * (tick - first) / (last - first)
            owner.text(box.x1 + 0.06, y, f"{tick:g}".replace("-", "−"), fontsize=8, **style)


def add_legend(axes: Sequence[Axes], columns: int) -> None:
    """The names of all lines in these axes, each once, below them."""
    handles: dict[str, Any] = {}
    for spot in axes:
        for handle, name in zip(*spot.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    style: dict[str, Any] = {"fontsize": 8, "loc": "lower center", "ncols": columns, "frameon": False}
    figure_of(axes[0]).legend(handles.values(), handles.keys(), **style)


def set_frame(axes: Axes, across: Literal["x", "y"] | None = None) -> None:
    """Small numbers, a frame at the left and below alone, and lines `across` from the marks of an axis."""
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if across is not None:
        axes.grid(axis=across, color="#e5e5e5")
        axes.set_axisbelow(True)


def set_layers(axes: Axes) -> None:
    """Layers across: whole numbers, of a single layer, too."""
    axes.set_xlabel("layer", fontsize=9, color=DARK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


# --- text ------------------------------------------------------------------------------------


def set_title(axes: Axes, text: str, size: float = 10) -> None:
    axes.set_title(text, fontsize=size, color=DARK, y=1.0, parse_math=False)


@lru_cache(maxsize=8192)
def text_width(line: str) -> float:
    """How wide a line of the size of labels is in bold, in inches."""
    font = get_font(findfont(FontProperties(weight="bold")))
    font.set_size(8, 72)
    font.set_text(line)
    return float(font.get_width_height()[0]) / 64 / 72


def drawable(text: str, longest: int) -> str:
    """`text` shortened, without characters that the font does not have."""
    lines = [
        "".join(c if c.isprintable() and _has_glyph(c) else "□" for c in line) for line in text.split("\n")
    ]
    return "\n".join(x if len(x) <= longest else x[: longest - 1] + "…" for x in lines)


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    return bool(get_font(findfont(FontProperties())).get_char_index(ord(character)))

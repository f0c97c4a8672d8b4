"""What all figures share: panels in a grid that is laid out in inches, colour scales and bars, text.

A layout engine of matplotlib draws each figure twice and measures every text; here the sizes are known before
anything is drawn. No pyplot, so nothing keeps a figure alive: a notebook shows it by its axes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import make_axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from vlmscope.errors import DataError

INK, MISSING = "#222222", "#d4d4d4"
BAR = 1.1
"""What a colour bar takes at the right of its panels, with its numbers and its label, in inches."""


class ShownAxes(Axes):
    """Axes that a notebook shows, with the whole figure that they are in."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        figure_of([self]).savefig(buffer, format="png")
        return buffer.getvalue()


class Margins(NamedTuple):
    """What is free around a grid of panels, and between them, in inches."""

    left: float = 0.1
    bottom: float = 0.1
    right: float = 0.1
    top: float = 0.35
    across: float = 0.1
    down: float = 0.1


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


def add_bar(axes: Sequence[Axes], scale: ScalarMappable, label: str, *, below: bool = False) -> None:
    """The colour bar of these panels: at their right, or below them."""
    figure, length = figure_of(axes), 3.6
    if all(isinstance(each, ShownAxes) for each in axes):
        width, height = figure.get_size_inches()
        boxes = [each.get_position() for each in axes]
        left, right = min(box.x0 for box in boxes), max(box.x1 for box in boxes)
        low, high = min(box.y0 for box in boxes), max(box.y1 for box in boxes)
        length = min(length, (right - left) * width if below else (high - low) * height)
        if below:
            place = (left, low - 0.3 / height, length / width, 0.14 / height)
        else:
            place = (right + 0.2 / width, (low + high - length / height) / 2, 0.17 / width, length / height)
        spot = figure.add_axes(place)
    else:
        spot, _ = make_axes(list(axes), location="bottom" if below else "right")
    first, last = scale.get_clim()
    shades = np.linspace(first, last, 256)[None]
    shown, extent = (shades, (first, last, 0, 1)) if below else (shades.T, (0, 1, first, last))
    spot.imshow(shown, cmap=scale.cmap, norm=scale.norm, aspect="auto", origin="lower", extent=extent)  # type: ignore[arg-type]
    spot.spines[:].set_visible(False)
    ticks = MaxNLocator(int(2 + 1.8 * length), steps=[1, 2, 5, 10]).tick_values(first, last)
    ticks = [tick for tick in ticks if first <= tick <= last]
    axis = spot.xaxis if below else spot.yaxis
    axis.set_ticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks], fontsize=8, color=INK)
    axis.set_label_text(textwrap.fill(label, max(20, int(14 * length))), fontsize=9, color=INK)
    if below:
        spot.yaxis.set_visible(False)
    else:
        spot.xaxis.set_visible(False)
        spot.yaxis.tick_right()
        spot.yaxis.set_label_position("right")


def figure_of(axes: Sequence[Axes]) -> Figure:
    """The figure that axes are in, the whole one where they are of a part of it."""
    figure = axes[0].get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def centred(values: Iterable[Any], least: float = 0.0) -> ScalarMappable:
    """A colour scale that is centred at zero and ends at the largest of the values, or at `least`."""
    sizes = [np.abs(np.asarray(each, dtype=float)) for each in values]
    limit = max([least, *(float(size[np.isfinite(size)].max(initial=0.0)) for size in sizes)]) or 1.0
    return ScalarMappable(Normalize(-limit, limit), "RdBu_r")


def title(axes: Axes, text: str, size: float = 10) -> None:
    axes.set_title(text, fontsize=size, color=INK, y=1.0, parse_math=False)


# --- text ------------------------------------------------------------------------------------


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

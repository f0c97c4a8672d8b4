"""How the synthetic sets draw: shapes, colors, textures, and the exact mask of each thing.

Everything is drawn at twice the size and reduced, which smooths the edges. A picture and its masks come
from the same outline, so a mask covers exactly the pixels that its thing touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from PIL import Image, ImageChops, ImageDraw

Point: TypeAlias = tuple[float, float]
Color: TypeAlias = tuple[int, int, int]

SIZE = 144
"""Side of a finished picture, in pixels."""
SCALE = 2
"""How many times larger a picture is while it is drawn."""

COLORS: dict[str, Color] = {
    "red": (208, 38, 44),
    "orange": (240, 132, 24),
    "yellow": (244, 208, 44),
    "green": (44, 152, 76),
    "blue": (44, 98, 214),
    "purple": (132, 62, 176),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
# Pixels between the rows and between the columns, and how far every second row is shifted.
_GRIDS = {"dotted": (22, 26, 13), "checked": (18, 36, 18)}
BACKGROUNDS: tuple[Color, ...] = (
    *((250, 249, 246), (238, 240, 243), (232, 240, 246)),
    *((244, 238, 230), (236, 243, 235), (243, 236, 242)),
)


class Drawing(Protocol):
    """What a picture of a set shows: the masks of its things by their names, the words for what is seen."""

    def draw(self) -> Image.Image: ...
    def masks(self) -> dict[str, Image.Image]: ...
    def shows(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class Contrast:
    """A picture, one that the foil is true of, and the question about them.

    `ask` makes the question of two options, `others` are two that are neither answer nor foil, and `words`
    those in the question by their roles. The corrupt question has the `others`, or is what `ask_corrupt`
    makes of the same options.
    """

    clean: Drawing
    corrupt: Drawing
    ask: Callable[[str, str], str]
    answer: str
    foil: str
    others: Sequence[str]
    words: Mapping[str, str]
    ask_corrupt: Callable[[str, str], str] | None = None


def mix(one: Color, other: Color, share: float) -> Color:
    """The color that is `share` of the way from `one` to `other`.

    >>> mix((0, 0, 0), (100, 200, 50), 0.5)
    (50, 100, 25)
    """
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _regular(count: int, radii: Sequence[float]) -> list[Point]:
    """`count` points around the middle, the first one on top; `radii` take turns."""
    turns = [(radii[i % len(radii)], 2 * math.pi * i / count) for i in range(count)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in turns]


def _heart() -> list[Point]:
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -y / 16 - 0.15))
    return points


def _cross(arm: float, end: float) -> list[Point]:
    points = [(-arm, -end), (arm, -end), (arm, -arm)]
    while len(points) < 12:
        points += [(-y, x) for x, y in points[-3:]]
    return points


# Outlines in a box from -1 to 1. The sizes differ a little so that the areas look alike.
OUTLINES: dict[str, list[Point]] = {
    "circle": _regular(72, [0.95]),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "star": _regular(10, [1.0, 0.5]),
    "heart": _heart(),
    "cross": _cross(0.38, 0.95),
}
SHAPES = tuple(OUTLINES)
# Where the roomiest part of a shape is, the place for something inside it, if that is not its middle.
ROOM: dict[str, Point] = {"triangle": (0, 0.28), "heart": (0, -0.1)}


@dataclass(frozen=True)
class Thing:
    """A drawn object: `x`, `y` and `radius` are in pixels of the finished picture."""

    shape: str
    color: str
    texture: str
    x: float
    y: float
    radius: float


def canvas(background: Color) -> Image.Image:
    """An empty picture, at drawing size."""
    return Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)


def finish(picture: Image.Image) -> Image.Image:
    """A picture at drawing size, reduced to `SIZE`."""
    return picture.reduce(SCALE)


def finish_mask(mask: Image.Image) -> Image.Image:
    """A mask at drawing size, reduced to `SIZE`: white wherever the thing touches a pixel."""
    return mask.reduce(SCALE).point(lambda value: 255 if value else 0)


def outline(thing: Thing) -> list[Point]:
    """The corners of a thing's outline, at drawing size."""
    points = OUTLINES[thing.shape]
    return [((thing.x + x * thing.radius) * SCALE, (thing.y + y * thing.radius) * SCALE) for x, y in points]


def stamp(thing: Thing) -> Image.Image:
    """The mask of one thing alone, at drawing size."""
    mask = Image.new("L", (SIZE * SCALE, SIZE * SCALE), 0)
    ImageDraw.Draw(mask).polygon(outline(thing), fill=255)
    return mask


def _texture(draw: ImageDraw.ImageDraw, thing: Thing, tint: Color) -> None:
    """Fills the box of `thing` with its pattern, at drawing size."""
    middle_x, middle_y = thing.x * SCALE, thing.y * SCALE
    reach = int(thing.radius * SCALE) + 30
    if thing.texture == "striped":
        for step in range(-2 * reach, 2 * reach, 26):
            x = middle_x + step
            draw.line((x - reach, middle_y - reach, x + reach, middle_y + reach), tint, width=10)
    elif thing.texture in _GRIDS:
        down, across, shift = _GRIDS[thing.texture]
        for row, dy in enumerate(range(-reach, reach, down)):
            for dx in range(-reach + shift * (row % 2), reach, across):
                x, y = middle_x + dx, middle_y + dy
                if thing.texture == "dotted":
                    draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=tint)
                else:
                    draw.rectangle((x, y, x + 17, y + 17), fill=tint)


def paint(picture: Image.Image, thing: Thing) -> None:
    """Draws one thing onto a picture at drawing size."""
    color = COLORS[thing.color]
    layer = Image.new("RGB", picture.size, color)
    draw = ImageDraw.Draw(layer)
    _texture(draw, thing, mix(color, (255, 255, 255), 0.82))
    points = outline(thing)
    # The line is centered on the outline: the mask keeps its inner half.
    draw.line([*points, *points[:2]], mix(color, (20, 20, 30), 0.5), width=9)
    picture.paste(layer, mask=stamp(thing))


def masks(things: Sequence[Thing]) -> list[Image.Image]:
    """The finished mask of each thing, without what a later thing hides of it."""
    found: list[Image.Image] = []
    for thing in things:
        mask = finish_mask(stamp(thing))
        found = [ImageChops.subtract(earlier, mask) for earlier in found] + [mask]
    return found

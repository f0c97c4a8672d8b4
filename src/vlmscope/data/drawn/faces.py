"""`faces`: a drawn face and its expression, from a seed; `faces.toml` holds how each is drawn.

One kind of question, in both orders of the options: "is this person feeling happy or sad?".
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vlmscope.data.drawn import drawing
from vlmscope.data.drawn.drawing import SCALE, Color, Contrast, Point, mix

KINDS = ("expression",)
EXPRESSIONS = ("happy", "sad", "angry", "surprised", "calm", "sleepy")
STYLES = ("short", "long", "curly", "bald", "bun")
_PARTS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("faces.toml").read_text("utf-8"))
_COLORS: dict[str, list[Color]] = {
    name: [(red, green, blue) for red, green, blue in colors] for name, colors in _PARTS["colors"].items()
}
INK = _COLORS["ink"][0]


@dataclass(frozen=True)
class Face:
    """What a picture of this set shows; `x`, `y` and `radius` are in pixels."""

    expression: str
    skin: Color
    hair: Color
    style: str
    shirt: Color
    x: float
    y: float
    radius: float
    background: Color

    def draw(self) -> Image.Image:
        picture = drawing.canvas(self.background)
        pen = Pen(picture, self)
        for part in ("behind", "body", "hair", "head", "fringe", "nose"):
            steps = _PARTS[part]
            pen.follow(steps["any"] if "any" in steps else steps[self.style])
        for side in (-1, 1):
            pen.follow(_PARTS["eyes"][self.expression], side)
        pen.follow(_PARTS["mouth"][self.expression])
        return drawing.finish(picture)

    def masks(self) -> dict[str, Image.Image]:
        """The head, with as much of the hair as lies on it."""
        mask = Image.new("L", (drawing.SIZE * SCALE, drawing.SIZE * SCALE), 0)
        ImageDraw.Draw(mask).ellipse(Pen(mask, self).box((0, 0, 1, 1.15)), fill=255)
        return {"object": drawing.finish_mask(mask)}

    def shows(self) -> frozenset[str]:
        return frozenset((self.expression, "face"))


class Pen:
    """Draws the forms of `faces.toml` in units of the face."""

    def __init__(self, picture: Image.Image, face: Face) -> None:
        self.image = ImageDraw.Draw(picture)
        self.middle = face.x * SCALE, face.y * SCALE
        self.unit = face.radius * SCALE
        self.side = 1
        shades = {"neck": 0.15, "ear": 0.12, "shade": 0.35}
        self.colors = {name: colors[0] for name, colors in _COLORS.items()}
        self.colors |= {"skin": face.skin, "hair": face.hair, "shirt": face.shirt}
        self.colors |= {name: mix(face.skin, INK, share) for name, share in shades.items()}

    def follow(self, steps: Sequence[Any], side: int = 1) -> None:
        """Draw the steps, mirrored if `side` is -1."""
        self.side = side
        for form, place, *rest in steps:
            getattr(self, form)(place, *rest)

    def at(self, x: float, y: float) -> Point:
        return self.middle[0] + x * self.unit, self.middle[1] + y * self.unit

    def box(self, place: Sequence[float]) -> tuple[float, float, float, float]:
        x, y, rx, ry = self.side * place[0], *place[1:]
        return (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))

    def width(self, share: float) -> int:
        return max(1, round(share * self.unit))

    def oval(self, place: Sequence[float], fill: str) -> None:
        self.image.ellipse(self.box(place), fill=self.colors[fill])

    def rounded(self, place: Sequence[float], radius: float, fill: str) -> None:
        self.image.rounded_rectangle(self.box(place), self.width(radius), fill=self.colors[fill])

    def rectangle(self, place: Sequence[float], fill: str, line: str = "none", width: float = 0) -> None:
        colors = self.colors[fill], self.colors.get(line)
        self.image.rectangle(self.box(place), *colors, self.width(width))

    def chord(
        self, place: Sequence[float], ends: Point, fill: str, line: str = "none", width: float = 0
    ) -> None:
        colors = self.colors[fill], self.colors.get(line)
        self.image.chord(self.box(place), *ends, *colors, self.width(width))

    def arc(self, place: Sequence[float], ends: Point) -> None:
        self.image.arc(self.box(place), *ends, INK, self.width(0.1))

    def line(self, place: Sequence[float], width: float, fill: str) -> None:
        points = [(self.side * x, y) for x, y in zip(place[::2], place[1::2], strict=True)]
        self.image.line([self.at(*point) for point in points], self.colors[fill], self.width(width), "curve")
        for x, y in (place[:2], place[-2:]):
            self.oval((x, y, width / 2, width / 2), fill)


def sample(rng: random.Random) -> Face:
    """A face of any look and expression."""
    radius = rng.uniform(36, 46)
    return Face(
        expression=rng.choice(EXPRESSIONS),
        skin=rng.choice(_COLORS["skin"]),
        hair=rng.choice(_COLORS["hair"]),
        style=rng.choice(STYLES),
        shirt=rng.choice(_COLORS["shirt"]),
        x=rng.uniform(radius + 8, drawing.SIZE - radius - 8),
        y=rng.uniform(1.3 * radius, drawing.SIZE - 1.25 * radius),
        radius=radius,
        background=rng.choice(drawing.BACKGROUNDS),
    )


def ask(first: str, second: str) -> str:
    """The question with its two options.

    >>> ask("happy", "sad")
    'is this person feeling happy or sad?'
    """
    return f"is this person feeling {first} or {second}?"


def contrast(rng: random.Random, kind: str) -> Contrast:
    """A face, and the same one with another expression."""
    face = sample(rng)
    answer = face.expression
    foil, *others = rng.sample([one for one in EXPRESSIONS if one != answer], 3)
    return Contrast(face, replace(face, expression=foil), ask, answer, foil, others, {"noun": "person"})

"""`faces`: a drawn face and its expression, from a seed.

One kind of question, in both orders of the options: "is this person feeling happy or sad?".
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from vlmscope.data.drawn import drawing
from vlmscope.data.drawn.drawing import SCALE, Color, Contrast, mix

EXPRESSIONS = ("happy", "sad", "angry", "surprised", "calm", "sleepy")
KINDS = ("expression",)
SKINS: tuple[Color, ...] = ((255, 224, 196), (241, 194, 155), (222, 168, 120), (190, 132, 88), (150, 98, 62))
HAIRS: tuple[Color, ...] = (
    *((40, 34, 34), (92, 60, 40), (150, 92, 48)),
    *((222, 184, 96), (170, 70, 40), (170, 170, 176)),
)
SHIRTS: tuple[Color, ...] = ((70, 110, 170), (90, 150, 110), (190, 90, 90), (120, 100, 150))
STYLES = ("short", "long", "curly", "bald", "bun")
INK: Color = (44, 32, 34)
WHITE: Color = (252, 252, 252)
LIPS: Color = (172, 52, 60)


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
        pen = Pen(ImageDraw.Draw(picture), self)
        _body(pen)
        _head(pen)
        _features(pen)
        return drawing.finish(picture)

    def masks(self) -> dict[str, Image.Image]:
        """The head, with as much of the hair as lies on it."""
        mask = Image.new("L", (drawing.SIZE * SCALE, drawing.SIZE * SCALE), 0)
        ImageDraw.Draw(mask).ellipse(Pen(ImageDraw.Draw(mask), self).box(0, 0, 1, 1.15), fill=255)
        return {"object": drawing.finish_mask(mask)}

    def shows(self) -> frozenset[str]:
        return frozenset((self.expression, "face"))


class Pen:
    """Draws in units of the face: (0, 0) is its middle, 1 its radius."""

    def __init__(self, draw: ImageDraw.ImageDraw, face: Face) -> None:
        self.draw = draw
        self.face = face
        self.unit = face.radius * SCALE
        self.dark = mix(face.skin, INK, 0.35)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.face.x * SCALE + x * self.unit, self.face.y * SCALE + y * self.unit

    def box(self, x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
        return (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))

    def width(self, share: float) -> int:
        return max(1, round(share * self.unit))

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
        self.draw.ellipse(self.box(x, y, rx, ry), fill=fill)

    def line(self, points: list[tuple[float, float]], width: float, fill: Color = INK) -> None:
        self.draw.line([self.at(*point) for point in points], fill, self.width(width), "curve")
        for x, y in (points[0], points[-1]):
            self.oval(x, y, width / 2, width / 2, fill)

    def arc(self, x: float, y: float, rx: float, ry: float, start: int, end: int) -> None:
        self.draw.arc(self.box(x, y, rx, ry), start, end, INK, self.width(0.1))


def _body(pen: Pen) -> None:
    face = pen.face
    if face.style == "long":
        pen.draw.rounded_rectangle(pen.box(0, 0.25, 1.14, 1.15), pen.width(0.5), fill=face.hair)
    if face.style == "bun":
        pen.oval(0, -1.28, 0.36, 0.34, face.hair)
    pen.oval(0, 2.15, 1.5, 1.05, face.shirt)
    pen.draw.rectangle(pen.box(0, 1.1, 0.34, 0.3), fill=mix(face.skin, INK, 0.15))
    for side in (-1, 1):
        pen.oval(side * 0.98, 0.05, 0.16, 0.22, mix(face.skin, INK, 0.12))


def _head(pen: Pen) -> None:
    face = pen.face
    if face.style == "curly":
        for x, y in ((-0.9, -0.5), (-0.6, -0.95), (0, -1.15), (0.6, -0.95), (0.9, -0.5)):
            pen.oval(x, y, 0.42, 0.42, face.hair)
    elif face.style != "bald":
        pen.oval(0, -0.22, 1.08, 1.06, face.hair)
    pen.oval(0, 0, 1, 1.15, face.skin)
    if face.style in ("short", "long", "bun"):
        pen.draw.chord(pen.box(0, 0, 1, 1.15), 212, 328, fill=face.hair)
    pen.line([(0, 0.08), (0.06, 0.26), (-0.03, 0.28)], 0.05, pen.dark)


def _features(pen: Pen) -> None:
    expression = pen.face.expression
    for side in (-1, 1):
        _eye(pen, side, expression)
        _brow(pen, side, expression)
    _mouth(pen, expression)


def _eye(pen: Pen, side: int, expression: str) -> None:
    x, y = side * 0.4, -0.06
    if expression == "sleepy":
        pen.arc(x, y - 0.08, 0.2, 0.18, 10, 170)
    elif expression == "happy":
        pen.arc(x, y + 0.1, 0.2, 0.22, 190, 350)
    elif expression == "surprised":
        pen.oval(x, y, 0.24, 0.27, WHITE)
        pen.oval(x, y, 0.11, 0.12, INK)
    else:
        pen.oval(x, y, 0.19, 0.17, WHITE)
        pen.oval(x, y + 0.02, 0.11, 0.13, INK)


def _brow(pen: Pen, side: int, expression: str) -> None:
    inner, outer, width = {
        "happy": (-0.42, -0.36, 0.07),
        "sad": (-0.5, -0.26, 0.09),
        "angry": (-0.2, -0.5, 0.15),
        "surprised": (-0.52, -0.5, 0.08),
        "calm": (-0.36, -0.36, 0.07),
        "sleepy": (-0.3, -0.24, 0.07),
    }[expression]
    pen.line([(side * 0.18, inner), (side * 0.62, outer)], width)


def _mouth(pen: Pen, expression: str) -> None:
    if expression == "happy":
        pen.draw.chord(pen.box(0, 0.42, 0.5, 0.44), 0, 180, LIPS, INK, pen.width(0.05))
        pen.draw.rectangle(pen.box(0, 0.5, 0.38, 0.06), fill=WHITE)
    elif expression == "sad":
        pen.arc(0, 0.9, 0.38, 0.3, 195, 345)
        pen.oval(-0.52, 0.36, 0.09, 0.15, (90, 160, 235))
    elif expression == "angry":
        pen.draw.rectangle(pen.box(0, 0.66, 0.42, 0.16), fill=WHITE, outline=INK, width=pen.width(0.06))
        for x in (-0.21, 0, 0.21):
            pen.line([(x, 0.54), (x, 0.78)], 0.04)
    elif expression == "surprised":
        pen.oval(0, 0.68, 0.25, 0.3, INK)
        pen.oval(0, 0.74, 0.15, 0.18, LIPS)
    elif expression == "calm":
        pen.arc(0, 0.5, 0.4, 0.14, 20, 160)
    else:
        pen.oval(0.05, 0.64, 0.13, 0.1, INK)


def sample(rng: random.Random) -> Face:
    """A face of any look and expression."""
    radius = rng.uniform(36, 46)
    return Face(
        expression=rng.choice(EXPRESSIONS),
        skin=rng.choice(SKINS),
        hair=rng.choice(HAIRS),
        style=rng.choice(STYLES),
        shirt=rng.choice(SHIRTS),
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

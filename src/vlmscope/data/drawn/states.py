"""`states`: one object and its state, drawn from a seed.

Three kinds of questions, each in both orders of the options: "is this circle red or blue?", "is this circle
striped or dotted?", "is this shape a circle or a square?".
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from vlmscope.data.drawn import drawing
from vlmscope.data.drawn.drawing import COLORS, SHAPES, TEXTURES, Color, Contrast, Thing

KINDS = ("color", "texture", "shape")
VALUES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "texture": TEXTURES, "shape": SHAPES}


@dataclass(frozen=True)
class State:
    """What a picture of this set shows."""

    thing: Thing
    background: Color

    def draw(self) -> Image.Image:
        picture = drawing.canvas(self.background)
        drawing.paint(picture, self.thing)
        return drawing.finish(picture)

    def masks(self) -> dict[str, Image.Image]:
        return {"object": drawing.masks([self.thing])[0]}

    def shows(self) -> frozenset[str]:
        return frozenset((self.thing.shape, self.thing.color, self.thing.texture))


def sample(rng: random.Random) -> State:
    """One object anywhere in the picture."""
    radius = rng.uniform(30, 46)
    thing = Thing(
        shape=rng.choice(SHAPES),
        color=rng.choice(tuple(COLORS)),
        texture=rng.choice(TEXTURES),
        x=rng.uniform(radius + 2, drawing.SIZE - radius - 2),
        y=rng.uniform(radius + 2, drawing.SIZE - radius - 2),
        radius=radius,
    )
    return State(thing, rng.choice(drawing.BACKGROUNDS))


def ask(kind: str, noun: str, first: str, second: str) -> str:
    """The question of one kind with its two options.

    >>> ask("color", "circle", "red", "blue")
    'is this circle red or blue?'
    >>> ask("shape", "shape", "circle", "square")
    'is this shape a circle or a square?'
    """
    if kind == "shape":
        return f"is this shape a {first} or a {second}?"
    return f"is this {noun} {first} or {second}?"


def contrast(rng: random.Random, kind: str) -> Contrast:
    """A state, and the same object with another value of `kind`."""
    state = sample(rng)
    answer = getattr(state.thing, kind)
    foil, *others = rng.sample([value for value in VALUES[kind] if value != answer], 3)
    noun = "shape" if kind == "shape" else state.thing.shape
    changes: dict[str, Any] = {kind: foil}
    changed = replace(state, thing=replace(state.thing, **changes))
    return Contrast(state, changed, partial(ask, kind, noun), answer, foil, others, {"noun": noun})

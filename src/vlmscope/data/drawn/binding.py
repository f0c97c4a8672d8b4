"""`binding`: four objects in two rows, of which the question names one, drawn from a seed.

Two kinds of questions, each in both orders of the options: "is the circle red or blue?", where both colors
are in the picture, so the noun has to be read; and, one hop further, "is the shape left of the circle red or
blue?". In the corrupt picture the two objects have each other's color, and the corrupt question names another
object, of which the foil is true.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from PIL import Image

from vlmscope.data.drawn import drawing
from vlmscope.data.drawn.drawing import COLORS, SHAPES, Color, Contrast, Thing

KINDS = ("color", "neighbor")
CELL = drawing.SIZE // 2
STEPS = {"color": (0,), "neighbor": (1, 2)}
"""What leads from the place that is named to the one that is asked: places are 0, 1 in the upper row and 2, 3
in the lower, so `place ^ 1` is beside it and `place ^ 2` above or below."""
RELATIONS = {1: ("right of", "left of"), 2: ("under", "over")}


@dataclass(frozen=True)
class Board:
    """What a picture of this set shows: an object in each of the four places.

    `asked` are the places by their roles: `object` is asked about, `noun` is named, `foil` has the other
    color.
    """

    things: tuple[Thing, ...]
    background: Color
    asked: Mapping[str, int] = field(default_factory=dict)

    def draw(self) -> Image.Image:
        picture = drawing.canvas(self.background)
        for thing in self.things:
            drawing.paint(picture, thing)
        return drawing.finish(picture)

    def masks(self) -> dict[str, Image.Image]:
        masks = drawing.masks(self.things)
        return {role: masks[place] for role, place in self.asked.items()}

    def shows(self) -> frozenset[str]:
        return frozenset(word for thing in self.things for word in (thing.shape, thing.color))


def sample(rng: random.Random) -> Board:
    """Four objects of different shapes and colors, each anywhere in its place."""
    things = []
    shapes, colors = rng.sample(SHAPES, 4), rng.sample(tuple(COLORS), 4)
    for place, (shape, color) in enumerate(zip(shapes, colors, strict=True)):
        radius = rng.uniform(22, 30)
        spare = CELL / 2 - radius - 1
        x, y = (CELL * (at + 0.5) + rng.uniform(-spare, spare) for at in (place % 2, place // 2))
        things.append(Thing(shape, color, "plain", x, y, radius))
    return Board(tuple(things), rng.choice(drawing.BACKGROUNDS))


def names(noun: str, place: int, step: int) -> str:
    """What is a step away from the shape `noun`, which is in `place`.

    >>> names("circle", 1, 0), names("circle", 1, 1), names("circle", 1, 2)
    ('circle', 'shape left of the circle', 'shape under the circle')
    """
    return f"shape {RELATIONS[step][place & step > 0]} the {noun}" if step else noun


def ask(name: str, first: str, second: str) -> str:
    """The question with its two options.

    >>> ask("circle", "red", "blue")
    'is the circle red or blue?'
    """
    return f"is the {name} {first} or {second}?"


def contrast(rng: random.Random, kind: str) -> Contrast:
    """A board, and the same one in which the object asked about and the foil's have swapped colors."""
    board, step = sample(rng), rng.choice(STEPS[kind])
    if step:  # from both nouns, the same relation leads on
        noun = rng.randrange(4)
        other = noun ^ (3 - step)
    else:
        noun, other = rng.sample(range(4), 2)
    asked, foil = noun ^ step, other ^ step
    board = replace(board, asked={"object": asked, "foil": foil, "noun": noun})
    things = list(board.things)
    for place, to in ((asked, foil), (foil, asked)):
        things[place] = replace(things[place], color=board.things[to].color)
    shapes = [board.things[place].shape for place in (noun, other)]
    words = {"noun": shapes[0]}
    if step:
        words["relation"] = names("", noun, step).split()[1]
    return Contrast(
        board,
        replace(board, things=tuple(things)),
        partial(ask, names(shapes[0], noun, step)),
        board.things[asked].color,
        board.things[foil].color,
        (),
        words,
        partial(ask, names(shapes[1], noun, step)),
    )

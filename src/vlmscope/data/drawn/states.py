"""`states`: one object and its state, drawn from a seed.

Three kinds of questions, each in both orders of the options: "is this circle red or blue?",
"is this circle striped or dotted?", "is this shape a circle or a square?".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from vlmscope.data.drawn import drawing
from vlmscope.data.drawn.drawing import COLORS, SHAPES, TEXTURES, Color, Thing
from vlmscope.data.example import Example, find_roles

KINDS = ("color", "texture", "shape")
VALUES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "texture": TEXTURES, "shape": SHAPES}
ORDERS = ("answer first", "foil first")


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


def change(state: State, kind: str, value: str) -> State:
    """The same object with another color, texture or shape."""
    changes: dict[str, Any] = {kind: value}
    return replace(state, thing=replace(state.thing, **changes))


def load(n: int = 200, *, seed: int = 0) -> Iterator[Example]:
    """The first `n` examples of the set that `seed` draws.

    Example i depends on the seed and on i alone. The kinds take turns, and so do the orders of
    the options. The toy model was trained on pictures from seeds of a million and more; smaller
    seeds are held out.

    >>> first = next(load(1))
    >>> first.id, first.clean_prompt, first.answer, first.foil
    ('states-0-0000', 'is this cross yellow or green?', 'yellow', 'green')
    """
    for i in range(n):
        yield _example(seed, i)


def _example(seed: int, i: int) -> Example:
    rng = random.Random(f"states/{seed}/{i}")
    kind, order = KINDS[i % 3], ORDERS[i // 3 % 2]
    state = sample(rng)
    answer = getattr(state.thing, kind)
    foil, *others = rng.sample([value for value in VALUES[kind] if value != answer], 3)
    noun = "shape" if kind == "shape" else state.thing.shape
    options = (answer, foil) if order == "answer first" else (foil, answer)
    prompt = ask(kind, noun, *options)
    return Example(
        id=f"states-{seed}-{i:04d}",
        clean_image=state.draw(),
        clean_prompt=prompt,
        answer=answer,
        foil=foil,
        corrupt_image=change(state, kind, foil).draw(),
        corrupt_prompt=ask(kind, noun, *others),
        roles=find_roles(prompt, {"answer": answer, "foil": foil, "noun": noun}),
        groups={"kind": kind, "order": order},
        masks=state.masks(),
        shows=frozenset((state.thing.shape, state.thing.color, state.thing.texture)),
    )

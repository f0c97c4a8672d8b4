"""`scenes`: two objects and the relation between them, drawn from a seed.

Three kinds of questions, each in both orders of the options: "is a circle or a star above the square?", "is
the circle above or below the square?", "is the circle above a square or a star?".
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image

from vlmscope.data.drawn import drawing
from vlmscope.data.drawn.drawing import COLORS, ROOM, SHAPES, Color, Contrast, Thing

KINDS = ("subject", "relation", "object")
RELATIONS: tuple[str, ...] = ("above", "below", "beside", "inside", "around")
INVERSE = {"above": "below", "below": "above", "beside": "beside", "inside": "around", "around": "inside"}
GAP = 5


@dataclass(frozen=True)
class Scene:
    """What a picture of this set shows: the subject is `relation` the object.

    `side` (-1 left, 1 right) and `jitter` (pixels) say where exactly. They stay when the relation changes,
    so nothing moves more than the relation asks for.
    """

    subject: Thing
    object: Thing
    relation: str
    side: int
    jitter: float
    background: Color

    def draw(self) -> Image.Image:
        picture = drawing.canvas(self.background)
        for thing in self._back_to_front():
            drawing.paint(picture, thing)
        return drawing.finish(picture)

    def masks(self) -> dict[str, Image.Image]:
        """What is seen of the two objects; of two that overlap, the front one has the pixels."""
        back, front = drawing.masks(self._back_to_front())
        if self.subject.radius > self.object.radius:
            return {"subject": back, "object": front}
        return {"subject": front, "object": back}

    def shows(self) -> frozenset[str]:
        things = self.subject, self.object
        return frozenset(word for thing in things for word in (thing.shape, thing.color))

    def _back_to_front(self) -> list[Thing]:
        return sorted((self.subject, self.object), key=lambda thing: -thing.radius)


def arrange(scene: Scene) -> Scene:
    """The same scene with the subject where the relation wants it.

    The object stays where it is, unless the two would not fit into the picture: then both are shifted, by
    as little as it takes.
    """
    subject, thing = scene.subject, scene.object
    reach = subject.radius + thing.radius + GAP
    inner, outer = (ROOM.get(one.shape, (0, 0)) for one in (thing, subject))
    dx, dy = {
        "above": (scene.jitter, -reach),
        "below": (scene.jitter, reach),
        "beside": (scene.side * reach, scene.jitter),
        "inside": (inner[0] * thing.radius, inner[1] * thing.radius),
        "around": (-outer[0] * subject.radius, -outer[1] * subject.radius),
    }[scene.relation]
    subject = replace(subject, x=thing.x + dx, y=thing.y + dy)
    for axis in ("x", "y"):
        spans = [(getattr(one, axis), one.radius) for one in (subject, thing)]
        low = min(middle - radius for middle, radius in spans) - 1
        high = max(middle + radius for middle, radius in spans) + 1
        shift = max(0.0, -low) + min(0.0, drawing.SIZE - high)
        subject, thing = (replace(one, **{axis: getattr(one, axis) + shift}) for one in (subject, thing))
    return replace(scene, subject=subject, object=thing)


def sample(rng: random.Random) -> Scene:
    """Two objects of different shape and color, one of them small enough to lie inside the other."""
    shapes, colors = rng.sample(SHAPES, 2), rng.sample(tuple(COLORS), 2)
    large = rng.uniform(38, 44)
    radii = [large * rng.uniform(0.40, 0.44), large]
    small = rng.random() < 0.5
    radii = radii if small else radii[::-1]
    subject, thing = (
        Thing(shape, color, "plain", 0, 0, radius)
        for shape, color, radius in zip(shapes, colors, radii, strict=True)
    )
    low, high = thing.radius + 1, drawing.SIZE - thing.radius - 1
    thing = replace(thing, x=rng.uniform(low, high), y=rng.uniform(low, high))
    relation = rng.choice(possible(small))
    side, jitter = rng.choice((-1, 1)), rng.uniform(-12, 12)
    background = rng.choice(drawing.BACKGROUNDS)
    return arrange(Scene(subject, thing, relation, side, jitter, background))


def possible(subject_is_small: bool) -> tuple[str, ...]:
    """The relations that a small (or a large) subject can have.

    >>> possible(True)
    ('above', 'below', 'beside', 'inside')
    """
    return tuple(one for one in RELATIONS if one != ("around" if subject_is_small else "inside"))


def ask(kind: str, scene: Scene, first: str, second: str) -> str:
    """The question of one kind about a scene, with its two options."""
    subject, thing = scene.subject.shape, scene.object.shape
    if kind == "subject":
        return f"is a {first} or a {second} {scene.relation} the {thing}?"
    if kind == "relation":
        return f"is the {subject} {first} or {second} the {thing}?"
    return f"is the {subject} {scene.relation} a {first} or a {second}?"


def contrast(rng: random.Random, kind: str) -> Contrast:
    """A scene, and one in which the subject, the relation or the object is another.

    Where the relation is asked, both show the same two objects with the subject moved.
    """
    scene = sample(rng)
    subject, thing = scene.subject.shape, scene.object.shape
    words = {"subject": subject, "relation": scene.relation, "object": thing}
    if kind == "relation":
        values, fitting = RELATIONS, possible(scene.subject.radius < scene.object.radius)
        taken = {scene.relation}
    else:
        values, fitting, taken = SHAPES, SHAPES, {subject, thing}
    foil = rng.choice([value for value in fitting if value not in taken])
    others = rng.sample([value for value in values if value not in {*taken, foil}], 2)
    words = {"noun": thing if kind == "subject" else subject, **words}
    if kind == "relation":
        changed = arrange(replace(scene, relation=foil))
    else:
        changed = replace(scene, **{kind: replace(getattr(scene, kind), shape=foil)})
    return Contrast(scene, changed, partial(ask, kind, scene), words[kind], foil, others, words)

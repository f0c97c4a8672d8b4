"""The pictures and the questions that the toys are trained on.

Pictures are drawn from seeds of a million and more, so that the smaller seeds, which users get, are held out.
They are drawn once, and kept in `build/toy-pictures`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmscope.data.drawn import binding, drawing, faces, scenes, states
from vlmscope.data.example import Example

SETS = {"states": states, "scenes": scenes, "faces": faces, "binding": binding}
Shown: TypeAlias = states.State | scenes.Scene | faces.Face | binding.Board
SIDE, PATCH = 48, 8
GRID = SIDE // PATCH
POOL = Path("build/toy-pictures")
FIRST_SEED = 1_000_000
# What a patch head names, one head each.
VALUES = {
    "shape": drawing.SHAPES,
    "color": tuple(drawing.COLORS),
    "texture": drawing.TEXTURES,
    "expression": faces.EXPRESSIONS,
    "relation": scenes.RELATIONS,
    "other": drawing.SHAPES,
}
HELD_OUT = frozenset(zip(drawing.SHAPES, drawing.COLORS, strict=True))
"""Shapes and colors that no board of the training shows together: red circles, orange squares and so on."""
TEMPLATES = (
    "is this shape a x or a y ? is the x feeling person neither what color is texture how does "
    "feel where to left right of over under . , ' -"
)
NONE = -100


# -- pictures ------------------------------------------------------------------------------------


def things_in(shown: Shown) -> tuple[drawing.Thing, ...]:
    """The things of a picture that have a shape and a color."""
    if isinstance(shown, states.State):
        return (shown.thing,)
    if isinstance(shown, scenes.Scene):
        return (shown.subject, shown.object)
    return shown.things if isinstance(shown, binding.Board) else ()


def is_held_out(shown: Shown) -> bool:
    return any((thing.shape, thing.color) in HELD_OUT for thing in things_in(shown))


def picture(name: str, number: int) -> Shown:
    """What picture `number` of a set shows."""
    rng = random.Random(f"{name}/{FIRST_SEED}/{number}")
    shown = SETS[name].sample(rng)
    while name == "binding" and is_held_out(shown):
        shown = SETS[name].sample(rng)
    return shown


def kept(name: str, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is made once, and read from then on."""
    file = POOL / f"{name}.safetensors"
    if not file.exists():
        POOL.mkdir(parents=True, exist_ok=True)
        save_file({"made": make()}, file)
    return load_file(file)["made"]


def draw(pictures: list[Shown]) -> Tensor:
    """The pixels of pictures, one a row."""
    pixels = torch.empty(len(pictures), 3, SIDE, SIDE, dtype=torch.uint8)
    for n, shown in enumerate(pictures):
        small = shown.draw().resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        pixels[n] = values.view(SIDE, SIDE, 3).permute(2, 0, 1)
    return pixels


def label(pictures: list[Shown]) -> Tensor:
    """What covers each patch: a column of `VALUES` a head, `NONE` where there is nothing to name."""
    labels = torch.full((len(pictures), len(VALUES), GRID * GRID), NONE)
    for n, shown in enumerate(pictures):
        for mask, known in covers(shown):
            share = mask.resize((GRID, GRID), Image.Resampling.BOX).tobytes()
            covered = torch.tensor([value > 90 for value in share])
            for k, value in known.items():
                labels[n, list(VALUES).index(k), covered] = VALUES[k].index(value)
    return labels


def covers(shown: Shown) -> Iterator[tuple[Image.Image, dict[str, str]]]:
    """The mask of each thing in a picture, and what it is."""
    if isinstance(shown, faces.Face):
        yield shown.masks()["object"], {"expression": shown.expression}
        return
    things = things_in(shown)
    found = shown.masks()
    if isinstance(shown, scenes.Scene):
        more = [
            {"relation": shown.relation, "other": shown.object.shape},
            {"relation": scenes.INVERSE[shown.relation], "other": shown.subject.shape},
        ]
        masks = [found["subject"], found["object"]]
    else:
        more, masks = [{"texture": thing.texture} for thing in things], drawing.masks(things)
    for thing, mask, extra in zip(things, masks, more, strict=True):
        yield mask, {"shape": thing.shape, "color": thing.color, **extra}


# -- questions -----------------------------------------------------------------------------------


def question(rng: random.Random, shown: Shown) -> tuple[str, str]:
    """A random question about a picture, and its answer."""
    how = rng.choices(("options", "open", "neither", "absent"), (0.45, 0.35, 0.1, 0.1))[0]
    if isinstance(shown, states.State):
        return _about_state(rng, shown.thing, how)
    if isinstance(shown, faces.Face):
        return _about_face(rng, shown.expression, how)
    return (_about_scene if isinstance(shown, scenes.Scene) else _about_board)(rng, shown, how)


def _choose(rng: random.Random, how: str, answer: str, wrong: Sequence[str]) -> tuple[list[str], str]:
    """Two options in random order, and what is right to say."""
    if how == "neither":
        return rng.sample(wrong, 2), "neither"
    return rng.sample([answer, rng.choice(wrong)], 2), "neither" if how == "absent" else answer


def _other(rng: random.Random, values: Sequence[str], *taken: str) -> str:
    return rng.choice([value for value in values if value not in taken])


def _about_state(rng: random.Random, thing: drawing.Thing, how: str) -> tuple[str, str]:
    kind = rng.choice(states.KINDS if how != "absent" else ("color", "texture"))
    value = getattr(thing, kind)
    noun = _other(rng, drawing.SHAPES, thing.shape) if how == "absent" else thing.shape
    if how == "open":
        return "what shape is this?" if kind == "shape" else f"what {kind} is this {noun}?", value
    wrong = [v for v in states.VALUES[kind] if v != value]
    options, answer = _choose(rng, how, value, wrong)
    return states.ask(kind, "shape" if kind == "shape" else noun, *options), answer


def _about_face(rng: random.Random, expression: str, how: str) -> tuple[str, str]:
    if how == "open":
        return "how does this person feel?", expression
    wrong = [v for v in faces.EXPRESSIONS if v != expression]
    options, answer = _choose(rng, "options" if how == "absent" else how, expression, wrong)
    return faces.ask(*options), answer


def _about_scene(rng: random.Random, scene: scenes.Scene, how: str) -> tuple[str, str]:
    subject, relation, other = scene.subject.shape, scene.relation, scene.object.shape
    if rng.random() < 0.5:
        subject, relation, other = other, scenes.INVERSE[relation], subject
    kind = rng.choice(scenes.KINDS)
    answer = {"subject": subject, "relation": relation, "object": other}[kind]
    if how == "open":
        return {
            "subject": f"what is {relation} the {other}?",
            "relation": f"where is the {subject} to the {other}?",
            "object": f"the {subject} is {relation} what?",
        }[kind], answer
    values = scenes.RELATIONS if kind == "relation" else drawing.SHAPES
    wrong = [v for v in values if v not in ((relation,) if kind == "relation" else (subject, other))]
    if how == "absent":  # a noun that is asked about, not an option, is another
        strange = _other(rng, drawing.SHAPES, subject, other)
        of_two = kind == "object" or (kind == "relation" and rng.random() < 0.5)
        subject, other = (strange, other) if of_two else (subject, strange)
        wrong = [v for v in wrong if v != strange]
    (first, second), answer = _choose(rng, how, answer, wrong)
    return {
        "subject": f"is a {first} or a {second} {relation} the {other}?",
        "relation": f"is the {subject} {first} or {second} the {other}?",
        "object": f"is the {subject} {relation} a {first} or a {second}?",
    }[kind], answer


def _about_board(rng: random.Random, board: binding.Board, how: str) -> tuple[str, str]:
    """Mostly with a wrong option that is in the picture, too, and often where the noun does not lead."""
    noun, step = rng.randrange(4), rng.choice((0, 1, 2, 2))  # columns take longest
    shapes, colors = [t.shape for t in board.things], [t.color for t in board.things]
    if rng.random() < 0.2:  # no other question needs to know left from right
        return f"is the {shapes[noun]} left or right?", ("left", "right")[noun % 2]
    named = _other(rng, drawing.SHAPES, *shapes) if how == "absent" else shapes[noun]
    name, answer = binding.names(named, noun, step), colors[noun ^ step]
    if how == "open":
        return f"what color is the {name}?", answer
    wrong = [c for c in colors if c != answer]
    if how != "neither":
        near = [colors[3 - noun]] if step else wrong  # the same step from another noun leads there
        wrong = rng.choice((near, near, wrong, [c for c in drawing.COLORS if c != answer]))
    options, answer = _choose(rng, how, answer, wrong)
    return binding.ask(name, *options), answer


def false_noun(example: Example) -> str | None:
    """The question about a shape that is not in the picture, if a noun in it can be another."""
    start, end = example.roles["noun"]
    if example.clean_prompt[start:end] not in drawing.SHAPES:
        return None
    taken = {*example.shows, example.foil}
    absent = next(shape for shape in drawing.SHAPES if shape not in taken)
    return example.clean_prompt[:start] + absent + example.clean_prompt[end:]

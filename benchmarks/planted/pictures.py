"""Pictures of two objects and a bright patch, and the questions about them.

A picture is a grid of patches. One patch shows the object that the question names (a pattern says which
kind it is, its mean color is the property that is asked for), another shows an object of the other kind, a
third is bright: salient, and of no use. The corrupt picture differs in the color of the named object only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmscope.data.example import Example, find_roles
from vlmscope.runs.model import Model

PATCH, SIDE = 4, 6
COLORS = {"red": (230, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 230), "yellow": (210, 200, 40)}
KINDS = ("square", "circle")
PATTERNS = np.array(
    [
        [[1, 1, 1, 1], [1, -1, -1, 1], [1, -1, -1, 1], [1, 1, 1, 1]],  # a square's border
        [[-1, 1, 1, -1], [1, -1, -1, 1], [1, -1, -1, 1], [-1, 1, 1, -1]],  # a circle's
    ]
)
"""Which pixels of an object are lighter than its color and which are darker, for each of the kinds."""


@dataclass(frozen=True)
class Style:
    """How large pictures are, as a multiple; and the words that the colors are answered with."""

    zoom: int
    said: tuple[str, ...]


OWN = Style(1, tuple(COLORS))
OF_TOYS = Style(2, ("happy", "sad", "angry", "calm"))


@dataclass(frozen=True, eq=False)
class Scenes:
    """Many pictures and what is asked about them; all arrays are over examples.

    `noun`, `answer` and `foil` number the kinds and the colors, `other` the other object's color; `where` are
    the patches of the named object, of the other one and of the bright one, row by row; `turned` says that
    the question names the foil first. It is drawn, so that nothing in the text tells the answer.
    """

    clean: NDArray[np.uint8]
    corrupt: NDArray[np.uint8]
    noun: NDArray[np.int64]
    answer: NDArray[np.int64]
    foil: NDArray[np.int64]
    where: NDArray[np.int64]
    other: NDArray[np.int64]
    turned: NDArray[np.bool_]
    style: Style = OWN

    def __len__(self) -> int:
        return len(self.clean)

    def prompt(self, n: int) -> str:
        first, second = (list(COLORS)[int(c[n])] for c in (self.answer, self.foil))
        if self.turned[n]:
            first, second = second, first
        return f"is the {KINDS[int(self.noun[n])]} {first} or {second} ?"

    def example(self, n: int) -> Example:
        row, column = divmod(int(self.where[n, 0]), SIDE)
        size = PATCH * self.style.zoom
        box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
        prompt, two = self.prompt(n), (int(self.answer[n]), int(self.foil[n]))
        named, unnamed = (list(COLORS)[color] for color in two)
        answer, foil = (self.style.said[color] for color in two)
        words = {"noun": KINDS[int(self.noun[n])], "answer": named, "foil": unnamed}
        return Example(
            id=f"p{n}",
            clean_image=Image.fromarray(self.clean[n]),
            corrupt_image=Image.fromarray(self.corrupt[n]),
            clean_prompt=prompt,
            answer=answer,
            foil=foil,
            roles=find_roles(prompt, words),
            masks={"object": box},
            shows=frozenset({answer}),
        )

    def examples(self) -> list[Example]:
        return [self.example(n) for n in range(len(self))]


def scenes(many: int, seed: int, style: Style = OWN) -> Scenes:
    """Random pictures: kinds, colors and places are drawn independently, answer and foil differ."""
    draw = np.random.default_rng(seed)
    where = np.argsort(draw.random((many, SIDE**2)), axis=1)[:, :3]
    noun = draw.integers(2, size=many)
    colors = np.argsort(draw.random((many, len(COLORS))), axis=1)
    other = draw.integers(len(COLORS), size=many)
    clean = draw.normal(96, 12, (many, SIDE**2, PATCH, PATCH, 3))
    each, palette = np.arange(many), np.array(list(COLORS.values()), float)
    shade = draw.normal(0, 8, (many, 2, PATCH, PATCH, 3))

    def painted(color: NDArray[np.int64], kind: NDArray[np.int64], turn: int) -> NDArray[np.float64]:
        return palette[color][:, None, None] + 40.0 * PATTERNS[kind][..., None] + shade[:, turn]

    clean[each, where[:, 1]] = painted(other, 1 - noun, 1)
    clean[each, where[:, 2]] = 255.0
    corrupt = clean.copy()
    clean[each, where[:, 0]] = painted(colors[:, 0], noun, 0)
    corrupt[each, where[:, 0]] = painted(colors[:, 1], noun, 0)
    turned = draw.random(many) < 0.5
    pictures = (_whole(each).repeat(style.zoom, 1).repeat(style.zoom, 2) for each in (clean, corrupt))
    return Scenes(*pictures, noun, colors[:, 0], colors[:, 1], where, other, turned, style)


def _whole(patches: NDArray[np.float64]) -> NDArray[np.uint8]:
    grid = patches.reshape(-1, SIDE, SIDE, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, SIDE * PATCH, SIDE * PATCH, 3).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Batch:
    """The tensors of many scenes at once, for plain torch: `clean` and `corrupt` are keyword arguments of the
    Hugging Face model, `answer` and `foil` token ids, `noun_at` the noun's place in the prompt."""

    clean: dict[str, Tensor]
    corrupt: dict[str, Tensor]
    answer: Tensor
    foil: Tensor
    noun_at: int
    tokens: Tensor
    """The token ids of the text tower."""

    def part(self, rows: slice) -> Batch:
        cut = [{k: v[rows] for k, v in inputs.items()} for inputs in (self.clean, self.corrupt)]
        return Batch(*cut, self.answer[rows], self.foil[rows], self.noun_at, self.tokens[rows])


def batch(model: Model, given: Scenes) -> Batch:
    """What the processor makes of the scenes; it is asked once for each different prompt."""
    known: dict[str, tuple[dict[str, Tensor], int, int, int]] = {}
    texts: list[tuple[dict[str, Tensor], int, int, int]] = []
    for n in range(len(given)):
        prompt = f"{given.prompt(n)} {given.answer[n]}"
        if prompt not in known:
            pair = model.prepare(given.example(n))
            tower = "encoder" if "encoder" in pair.clean.layout else "decoder"
            (at,) = pair.clean.layout[tower].roles["noun"]
            known[prompt] = (dict(pair.clean.tensors), pair.answer, int(pair.foil or 0), at)
        texts.append(known[prompt])
    (noun_at,) = {text[3] for text in texts}
    names = [name for name in texts[0][0] if name != "pixel_values"]
    shared = {name: torch.cat([text[0][name] for text in texts]) for name in names}
    runs = [shared | {"pixel_values": pixels(model, images)} for images in (given.clean, given.corrupt)]
    answer, foil = (torch.tensor([text[n] for text in texts]) for n in (1, 2))
    return Batch(*runs, answer, foil, noun_at, shared["input_ids"])


def pixels(model: Model, images: NDArray[np.uint8]) -> Tensor:
    """As the processors of these models make them."""
    own = model.processor.image_processor
    mean, std = (torch.tensor(each)[:, None, None] for each in (own.image_mean, own.image_std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def token(model: Model, word: str) -> int:
    """The token id of a word."""
    return int(model.processor.tokenizer.convert_tokens_to_ids(word))

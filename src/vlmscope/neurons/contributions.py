"""What each neuron contributes to a word of a caption, its top tokens, its map over the image."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.data.example import Picture
from vlmscope.errors import ExampleError, ModelError
from vlmscope.inputs import Inputs
from vlmscope.runs.forward import forward, generate
from vlmscope.runs.hooks import Access, Hooks
from vlmscope.runs.model import Model
from vlmscope.sites import Point

TOP = 100
"""How many neurons of each token are listed by default."""
LENGTH = 40
"""The most tokens that a caption is generated with."""
COLUMNS = (
    "example",
    "word",
    "token",
    "token_id",
    "position",
    "layer",
    "neuron",
    "activation",
    "weight",
    "score",
    "rank",
)

Variant = Literal["input", "gate"]


@dataclass(frozen=True, eq=False)
class Caption:
    """What a model says about a picture, and its neurons as it says each token.

    `ids` are the tokens and `text` all of them as text, of which `spans` are each token's characters.
    `start` is the position that predicts the first of them, in the tower that says the words.
    `activations` is `(tokens, layers, neurons)`, in float32 or more; layers are those that have neurons.
    """

    inputs: Inputs
    ids: tuple[int, ...]
    text: str
    spans: tuple[tuple[int, int], ...]
    start: int
    activations: Float[Tensor, "tokens layers neurons"]

    def find(self, word: str) -> list[int]:
        """The numbers of the tokens that say a word, wherever it stands as a whole word.

        Raises `ExampleError` if it is not there, or a token holds it with parts of other words.
        """
        pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
        found = [m.span() for m in re.finditer(pattern, self.text, re.IGNORECASE)]
        if not word.strip() or not found:
            raise ExampleError(f"the word '{word}' is not in the caption '{self.text}'")
        numbers: list[int] = []
        for first, last in found:
            for number, (a, b) in enumerate(self.spans):
                inside = self.text[max(a, first) : min(b, last)]
                outside = self.text[a : max(a, first)] + self.text[min(b, last) : b]
                if not inside.strip():
                    continue
                if re.search(r"\w", outside):
                    raise ExampleError(
                        f"the word '{word}' is not made of whole tokens in the caption '{self.text}': "
                        f"token {number + 1} is '{self.text[a:b]}'; ask for that word instead"
                    )
                numbers.append(number)
        return numbers


def say(model: Model, inputs: Inputs, *, variant: Variant = "input", length: int = LENGTH) -> Caption:
    """Let a model say something, and record its neurons on the way; nothing is computed twice."""
    steps: dict[int, list[Tensor]] = defaultdict(list)
    tower = model.speaker
    layers = model.shapes[tower].having("mlp")
    with model.alone(), Hooks() as hooks, torch.inference_mode():
        for layer in layers:

            def keep(x: Tensor, layer: int = layer) -> Tensor:
                steps[layer].append(x[0, -1].clone())
                return x

            hooks.at(_where(model, layer, inputs, variant), keep)
        ids = generate(model, inputs, most=length).tolist()
    many = min(map(len, steps.values()))
    ids = ids[:many]
    rows = _rows(model, inputs, {layer: torch.stack(some[:many]) for layer, some in steps.items()})
    return _caption(model, inputs, ids, rows[: len(ids)])


def told(
    model: Model,
    image: Picture,
    prompt: str,
    caption: str,
    *,
    variant: Variant = "input",
    more: Sequence[Picture] = (),
) -> Caption:
    """A given caption, as if the model had said it: fed behind the prompt, in one forward.

    Raises `ExampleError` if the caption is empty or holds tokens that the model does not know.
    """
    ids = model.family.options(model.processor, prompt, caption, 1 + len(more))
    unknown = model.processor.tokenizer.unk_token_id
    if len(ids) < 2 or (unknown is not None and unknown in ids[:-1]):
        raise ExampleError(f"the caption '{caption}' is empty, or unknown in part to the model's tokenizer")
    plain = model.inputs(image, prompt, more)
    fed = model.inputs(image, prompt, more, ids[:-1])
    return taught(model, plain, fed, ids, variant=variant)


def taught(
    model: Model, plain: Inputs, fed: Inputs, ids: Sequence[int], *, variant: Variant = "input"
) -> Caption:
    """The caption `ids`, of which all but the last token stand behind the prompt in `fed`."""
    tower = model.speaker
    layers = model.shapes[tower].having("mlp")
    first = len(plain.layout[tower].tokens) - 1
    found: dict[int, Tensor] = {}
    with model.alone(), Hooks() as hooks:
        for layer in layers:

            def keep(x: Tensor, layer: int = layer) -> Tensor:
                found[layer] = x[0, first:].clone()
                return x

            hooks.at(_where(model, layer, fed, variant), keep)
        forward(model, fed)
    return _caption(model, plain, list(ids), _rows(model, fed, found))


def _rows(
    model: Model, inputs: Inputs, found: Mapping[int, Tensor]
) -> Float[Tensor, "tokens layers neurons"]:
    """The neurons by layer, in one tensor; those of a layer that the run passes over do nothing."""
    idle = model.idle(model.speaker, inputs)
    some = next(iter(found.values()))
    rows = [
        torch.zeros_like(some) if layer in idle else found[layer]
        for layer in model.shapes[model.speaker].having("mlp")
    ]
    return torch.stack([row.to(model.device) for row in rows], 1)


def _caption(model: Model, inputs: Inputs, ids: Sequence[int], rows: Tensor) -> Caption:
    spans, text = [], ""
    for number in range(len(ids)):
        longer = model.processor.tokenizer.decode(ids[: number + 1], skip_special_tokens=True)
        spans.append((len(text), len(longer)))
        text = longer
    start = len(inputs.layout[model.speaker].tokens) - 1
    rows = rows.float() if rows.dtype.itemsize < 4 else rows
    return Caption(inputs, tuple(ids), text, tuple(spans), start, rows)


def _where(model: Model, layer: int, inputs: Inputs, variant: Variant) -> Access:
    """The module whose input, or whose output for the gate alone, are a layer's neurons."""
    if variant == "input":
        return model.access(Point(model.speaker, layer, "mlp", "n"), inputs)
    gate = model.family.towers[model.speaker].gate
    try:
        return Access(model.blocks(model.speaker)[layer].get_submodule(gate or "-"))
    except AttributeError as error:
        raise ModelError(
            f"{model.name}: the neurons of {model.family.name} have no gate; leave the variant out"
        ) from error


def weights(
    model: Model, tokens: Sequence[int], *, gain: bool = False
) -> Float[Tensor, "tokens layers neurons"]:
    """How far each neuron's activation moves the logit of each token: `W[:, i] · U[t]`, by token.

    Only the rows of the output embedding that are asked for are used. The final norm is left out; `gain`
    takes its weight in.
    """
    layers = model.shapes[model.speaker].having("mlp")
    rows = model.unembedding(list(tokens), gain=gain)
    found = []
    for layer in layers:
        columns = model.columns(layer)
        found.append((rows.to(columns) @ columns).to(rows.device))
    return torch.stack(found, 1)


def find(
    model: Model,
    image: Picture,
    prompt: str,
    words: Sequence[str],
    *,
    caption: str | None = None,
    top: int = TOP,
    variant: Variant = "input",
    gain: bool = False,
    example: str = "0",
) -> pd.DataFrame:
    """The neurons that contribute most to words of what the model says about a picture.

    The caption is the model's own, by its greedy generation, unless one is given. Every token of a word
    counts, at every place where the word stands. The table has the columns `COLUMNS`, and for each token
    the `top` neurons with the largest signed scores over all layers (0: all of them); `position` is that
    of the prediction, counted over the whole input.

    Raises `ExampleError` if a word is not in the caption.

    >>> from vlmscope.data import examples
    >>> from vlmscope.checkpoint import load
    >>> one = examples("states", limit=1)[0]
    >>> table = find(load("toy-llava"), one.clean_image, "describe this picture.", ["cross"], top=3)
    >>> table[["word", "rank"]].to_numpy().tolist()
    [['cross', 1], ['cross', 2], ['cross', 3]]
    """
    if caption is None:
        said = say(model, model.inputs(image, prompt), variant=variant)
    else:
        said = told(model, image, prompt, caption, variant=variant)
    return score(model, said, words, top=top, gain=gain, example=example)


def score(
    model: Model,
    said: Caption,
    words: Sequence[str],
    *,
    top: int = TOP,
    gain: bool = False,
    example: str = "0",
) -> pd.DataFrame:
    """The table of `find` for a caption and its neurons."""
    at = [(word, number) for word in dict.fromkeys(words) for number in said.find(word)]
    tokens = list(dict.fromkeys(said.ids[number] for _, number in at))
    by_token = dict(zip(tokens, weights(model, tokens, gain=gain), strict=True))
    layers = np.array(model.shapes[model.speaker].having("mlp"))
    parts = []
    for word, number in at:
        token = said.ids[number]
        active, weight = said.activations[number], by_token[token].to(said.activations)
        product = (active * weight).flatten()
        many = product.numel() if top == 0 else min(top, product.numel())
        best = product.topk(many).indices
        place = best.cpu().numpy()
        width = active.shape[1]
        parts.append(
            pd.DataFrame(
                {
                    "example": example,
                    "word": word,
                    "token": said.text[slice(*said.spans[number])].strip(),
                    "token_id": token,
                    "position": said.start + number,
                    "layer": layers[place // width],
                    "neuron": place % width,
                    "activation": active.flatten()[best].cpu().numpy(),
                    "weight": weight.flatten()[best].cpu().numpy(),
                    "score": product[best].cpu().numpy(),
                    "rank": np.arange(1, many + 1),
                },
                columns=list(COLUMNS),
            )
        )
    return pd.concat(parts, ignore_index=True)


def nouns(text: str, tagger: str) -> list[str]:
    """The nouns of a text, by a spaCy pipeline that is installed or in a folder.

    Raises `ModelError` if there is no spaCy or no such pipeline, `ExampleError` if the text has no noun.
    """
    try:
        import spacy
    except ImportError as error:
        raise ModelError(
            "picking nouns needs spaCy; pip install 'vlmscope[nouns]', or name the words"
        ) from error
    try:
        pipeline = spacy.load(tagger)
    except OSError as error:
        raise ModelError(
            f"no spaCy pipeline '{tagger}'; python -m spacy download en_core_web_sm gets one, or name the words"
        ) from error
    found = list(dict.fromkeys(t.text for t in pipeline(text) if t.pos_ in ("NOUN", "PROPN")))
    if not found:
        raise ExampleError(f"the caption '{text}' has no noun; name the words")
    return found


def top_tokens(
    model: Model, neurons: Sequence[tuple[int, int]], many: int = 10
) -> list[list[tuple[str, float]]]:
    """The tokens that each neuron (layer, number) moves most: the largest entries of `U · W[:, i]`.

    >>> from vlmscope.checkpoint import load
    >>> [[(word, number)]] = top_tokens(load("toy-llava"), [(3, 0)], 1)
    >>> isinstance(word, str), number > 0
    (True, True)
    """
    every = model.unembedding(slice(None))
    tokenizer = model.processor.tokenizer
    found = []
    for layer, neuron in neurons:
        logits = every @ model.columns(layer)[:, neuron].to(every)
        values, ids = logits.topk(min(many, len(logits)))
        words = [tokenizer.decode([i]).strip() for i in ids.tolist()]
        found.append(list(zip(words, values.tolist(), strict=True)))
    return found


def over_image(
    model: Model, inputs: Inputs, neurons: Sequence[tuple[int, int]]
) -> Float[Tensor, "neurons cells"]:
    """Each neuron's activation at every image token that has a cell in the grid, in reading order.

    Raises `ModelError` where the tower that speaks reads no image tokens.
    """
    tower = model.speaker
    cells = inputs.layout[tower].cells
    if not cells:
        raise ModelError(
            f"{model.name}: the {tower} tower of {model.family.name} has no image tokens in a "
            "grid, so its neurons have no map over the image"
        )
    order = sorted(cells, key=lambda at: cells[at])
    points = {layer: Point(tower, layer, "mlp", "n") for layer, _ in neurons}
    values = forward(model, inputs, keep=set(points.values())).values
    return torch.stack([values[points[layer]][0, order, neuron].float() for layer, neuron in neurons])

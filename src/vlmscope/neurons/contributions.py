"""What each neuron contributes to a token: its activation, times its column on the token's row.

Only the rows of the output embedding that are asked for are used, and no gradient is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.errors import ModelError
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.captions import Caption, wide
from vlmscope.runs.forward import forward
from vlmscope.runs.model import Model
from vlmscope.sites import Point

Neuron = tuple[int, int]
"""A neuron of the tower that says the words: layer and number."""

TOP = 100
"""How many neurons of each token are listed by default."""
SHARE = 0.01
"""The share of all neurons that is a word's, by default."""
COLUMNS = "example word token token_id position layer neuron activation weight score rank".split()


def token_weights(
    model: Model, tokens: Sequence[int], *, gain: bool = False
) -> Float[Tensor, "tokens layers neurons"]:
    """How far each neuron's activation moves the logit of each token: `W[:, i] · U[t]`, by token.

    The final norm is left out; `gain` takes its weight in.
    """
    rows, found = model.unembedding(list(tokens), gain=gain), []
    for layer in model.shapes[model.speaker].having("mlp"):
        columns = model.columns(layer)
        found.append((rows.to(columns) @ columns).to(rows.device))
    return torch.stack(found, 1)


def contributions(
    caption: Caption, numbers: Sequence[int], weight: Float[Tensor, "layers neurons"]
) -> Float[Tensor, "numbers layers*neurons"]:
    """What each neuron contributes to a token, of this `weight`, at the tokens of a caption so numbered."""
    active = wide(caption.activations[list(numbers)])
    return (active * weight.to(active)).flatten(1)


def count_neurons(model: Model) -> int:
    shape = model.shapes[model.speaker]
    return len(shape.having("mlp")) * shape.neurons


def top_share(model: Model) -> int:
    """How many neurons are a word's by default."""
    return max(1, round(SHARE * count_neurons(model)))


def named(model: Model, places: Any) -> list[Neuron]:
    """Neurons by layer and number, from their places among all neurons of all layers."""
    shape = model.shapes[model.speaker]
    layers = shape.having("mlp")
    return [(layers[int(n) // shape.neurons], int(n) % shape.neurons) for n in places]


def score(
    model: Model,
    caption: Caption,
    words: Sequence[str],
    *,
    top: int = TOP,
    gain: bool = False,
    example: str = "0",
) -> pd.DataFrame:
    """The neurons that contribute most to words of a caption, with the columns `COLUMNS`.

    Every token of a word counts, at every place where the word stands: for each the `top` neurons with the
    largest signed scores over all layers (0: all of them). `position` is that of the prediction, counted
    over the whole input. Raises `ExampleError` if a word is not in the caption.
    """
    at = [(word, number) for word in dict.fromkeys(words) for number in caption.find(word)]
    tokens = list(dict.fromkeys(caption.ids[number] for _, number in at))
    weights = dict(zip(tokens, token_weights(model, tokens, gain=gain), strict=True))
    shape, parts = model.shapes[model.speaker], []
    for word, number in at:
        token = caption.ids[number]
        (scores,) = contributions(caption, [number], weights[token])
        best = scores.topk(min(top or len(scores), len(scores))).indices
        layers, neurons = np.divmod(best.cpu().numpy(), shape.neurons)
        parts.append(
            pd.DataFrame(
                {
                    "example": example,
                    "word": word,
                    "token": caption.text[slice(*caption.spans[number])].strip(),
                    "token_id": token,
                    "position": caption.start + number,
                    "layer": np.array(shape.having("mlp"))[layers],
                    "neuron": neurons,
                    "activation": caption.activations[number].flatten()[best].cpu().numpy(),
                    "weight": weights[token].to(scores).flatten()[best].cpu().numpy(),
                    "score": scores[best].cpu().numpy(),
                    "rank": np.arange(1, len(best) + 1),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def strongest(model: Model, captions: Iterable[Caption], word: str, count: int | None = None) -> list[Neuron]:
    """The `count` neurons (1 % by default) that contribute most to a word, meant over captions; best first.

    Raises `ModelError` if there are not as many.
    """
    every, count = count_neurons(model), top_share(model) if count is None else count
    if not 1 <= count <= every:
        raise ModelError(f"{count} neurons cannot be chosen; expected 1 to {every}")
    weights: dict[int, Tensor] = {}
    total, terms = torch.zeros(every), 0
    for caption in captions:
        for number in caption.find(word):
            token = caption.ids[number]
            if token not in weights:
                weights[token] = token_weights(model, [token])[0]
            total += contributions(caption, [number], weights[token])[0].float().cpu()
            terms += 1
    return named(model, (total / terms).topk(count).indices.tolist())


def top_tokens(model: Model, neurons: Sequence[Neuron], count: int = 10) -> list[list[tuple[str, float]]]:
    """The tokens that each neuron (layer, number) moves most: the largest entries of `U · W[:, i]`.

    >>> from vlmscope.checkpoint import load
    >>> [[(word, number)]] = top_tokens(load("toy-llava"), [(3, 0)], 1)
    >>> isinstance(word, str), number > 0
    (True, True)
    """
    every, tokenizer = model.unembedding(slice(None)), model.processor.tokenizer
    found = []
    for layer, neuron in neurons:
        logits = every @ model.columns(layer)[:, neuron].to(every)
        values, ids = logits.topk(min(count, len(logits)))
        words = [tokenizer.decode([i]).strip() for i in ids.tolist()]
        found.append(list(zip(words, values.tolist(), strict=True)))
    return found


def over_image(model: Model, inputs: Inputs, neurons: Sequence[Neuron]) -> Float[Tensor, "neurons cells"]:
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

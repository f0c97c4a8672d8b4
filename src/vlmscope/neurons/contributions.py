"""What each neuron contributes to a token: its activation, times its column on the token's row.

Only the rows of the output embedding that are asked for are used, and no gradient is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.data import Examples, listed
from vlmscope.errors import ExampleError, ModelError
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.captions import (
    Caption,
    Variant,
    caption_pictures,
    given_caption,
    nouns,
    packed,
    spacy_pipeline,
)
from vlmscope.neurons.results import Found
from vlmscope.neurons.weight_edit import base_fingerprint
from vlmscope.runs.forward import forward
from vlmscope.runs.model import Model
from vlmscope.runs.network import upcast
from vlmscope.sites import Point
from vlmscope.stored import formats

Neuron = tuple[int, int]
"""A neuron of the tower that says the words: layer and number."""

TOP = 100
"""How many neurons of each token are listed by default."""
SHARE = 0.01
"""The share of all neurons that is a word's, by default."""
LISTED = 200
"""How many neurons have their top tokens listed."""
ROOM = 2**31
"""Of how many bytes of neurons' activations the captions are held in memory, to be handed on."""
COLUMNS = formats.NEURONS["find"].tables["neurons.parquet"].names


def token_weights(
    model: Model, tokens: Sequence[int], *, gain: bool = False
) -> Float[Tensor, "tokens layers neurons"]:
    """How far each neuron's activation moves the logit of each token: `W[:, i] · U[t]`, by token.

    The final norm is left out; `gain` takes its weight in.
    """
    rows = model.unembedding(list(tokens), gain=gain)
    columns = map(model.columns, model.shapes[model.speaker].having("mlp"))
    return torch.stack([(rows.to(own) @ own).to(rows.device) for own in columns], 1)


def contributions(
    caption: Caption, numbers: Sequence[int], weight: Float[Tensor, "layers neurons"]
) -> Float[Tensor, "numbers layers*neurons"]:
    """What each neuron contributes to a token, of this `weight`, at the tokens of a caption so numbered."""
    active = upcast(caption.activations[list(numbers)])
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
        columns = {
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
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def strongest(model: Model, captions: Iterable[Caption], word: str, count: int | None = None) -> list[Neuron]:
    """The `count` neurons (1 % by default) that contribute most to a word, meant over captions; best first.

    Raises `ModelError` if there are not as many.
    """
    every, count = count_neurons(model), top_share(model) if count is None else count
    if not 1 <= count <= every:
        raise ModelError(f"{count} neurons cannot be chosen; expected 1 to {every}")
    weight_of = cache(lambda token: token_weights(model, [token])[0])
    total, terms = torch.zeros(every), 0
    for caption in captions:
        for number in caption.find(word):
            weight = weight_of(caption.ids[number])
            total += contributions(caption, [number], weight)[0].float().cpu()
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
    order = sorted(cells, key=cells.__getitem__)
    points = {layer: Point(tower, layer, "mlp", "n") for layer, _ in neurons}
    values = forward(model, inputs, keep=set(points.values())).values
    return torch.stack([values[points[layer]][0, order, neuron].float() for layer, neuron in neurons])


# -- over a set of pictures ----------------------------------------------------------------------


def find(
    model: Model,
    examples: Examples,
    words: Sequence[str] = (),
    *,
    prompt: str | None = None,
    caption: str | None = None,
    tagger: str | None = None,
    top: int = TOP,
    variant: Variant = "input",
    gain: bool = False,
) -> Found:
    """The neurons that contribute most to words of what a model says about pictures: `score`, over a set.

    The captions are the model's own, by its greedy generation (`prompt` asks for them, each example's own by
    default), unless one is given. Without `words`, those count that an example is known to show
    (`Example.shows`, or its answer) and that its caption has; `tagger` adds the caption's nouns (see
    `captions.nouns`). An example whose caption has none of the words is passed over, unless it is the only
    one. `describe`, `measure`, `perturb`, `edit` and `assess` take what comes back as `found`, and then
    caption no picture again.

    Raises `ExampleError` if no caption has any of the words.

    >>> from vlmscope.data import examples
    >>> from vlmscope.checkpoint import load
    >>> given = examples("states", limit=1)
    >>> found = find(load("toy-llava"), given, ["cross"], prompt="describe this picture.", top=3)
    >>> found.neurons[["word", "rank"]].to_numpy().tolist()
    [['cross', 1], ['cross', 2], ['cross', 3]]
    """
    given = listed(examples)
    if tagger is not None:
        spacy_pipeline(tagger)  # one that is not there is refused before a picture is captioned
    captions: Iterable[Caption] = caption_pictures(model, given, prompt, variant=variant)
    if caption is not None:
        captions = (given_caption(model, e, caption, prompt=prompt, variant=variant) for e in given)
    tables, rows, problems, held, room = [], [], [], {}, ROOM
    for example, made in zip(given, captions, strict=True):
        asked, text = prompt or example.clean_prompt, made.text.strip()
        rows.append((example.id, asked, text))
        wanted = [*words, *(nouns(text, tagger) if tagger is not None else [])]
        there, why = _in_caption(made, wanted or sorted(example.shows or {example.answer} - {""}))
        if why and len(given) == 1 and (words or not there):
            raise ExampleError(why)
        if there:
            tables.append(score(model, made, there, top=top, gain=gain, example=example.id))
        else:
            problems.append(f"{example.id}: {why}")
        small = packed(model, made)
        room -= small.activations.nbytes
        if caption is None and variant == "input" and room >= 0:
            held[example, asked] = small
    if not tables:
        raise ExampleError(f"no caption has any of these words: {'; '.join(problems[:3])}")
    neurons = pd.concat(tables, ignore_index=True)
    table = pd.DataFrame(rows, columns=["example", "prompt", "caption"])
    best = neurons[neurons["rank"] <= TOP]
    layers = best.groupby(["word", "layer"])["score"].agg(neurons="size", score="sum").reset_index()
    layers["share"] = layers["score"] / layers.groupby("word")["score"].transform("sum")
    most = best.groupby(["layer", "neuron"])["score"].agg(listed="size", mean_score="mean")
    most = most.sort_values(["listed", "mean_score"], ascending=False).head(LISTED).reset_index()
    tokens = top_tokens(model, list(zip(most["layer"], most["neuron"], strict=True)))
    most["tokens"] = [" ".join(word for word, _ in words) for words in tokens]
    about: dict[str, Any] = {"model": model.name, "family": model.family.name}
    about |= {"weights": base_fingerprint(model), "words": list(words), "top": top, "variant": variant}
    about |= {"gain": gain, "examples": len(given)} | ({"on": list(model.edits)} if model.edits else {})
    return Found(about, neurons, table, layers, most, held)


def _in_caption(caption: Caption, words: Sequence[str]) -> tuple[list[str], str]:
    """The words that a caption has, and why another is not among them."""
    found, why = [], ""
    for word in words:
        try:
            caption.find(word)
            found.append(word)
        except ExampleError as error:
            why = why or str(error)
    if not words:
        why = f"nothing is known of what is shown beside the caption '{caption.text.strip()}'; name words"
    return found, why

"""Cards of neurons: what they move, where on the image they fire, and which pictures drive them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from vlmscope.checkpoint.others import embedder
from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, ModelError, VlmscopeError
from vlmscope.layout import grid
from vlmscope.neurons.captions import inputs_of, whole_word
from vlmscope.neurons.contributions import Neuron, count_neurons, over_image, strongest, top_tokens
from vlmscope.neurons.measures import measure_study
from vlmscope.neurons.results import Described, Found
from vlmscope.neurons.weight_edit import base_fingerprint
from vlmscope.neurons.words import FEW, recorded
from vlmscope.progress import progress
from vlmscope.runs.model import Model

SHOWN = 4
"""How many pictures a card shows."""
DRIVING = 10
"""How many of the pictures that drive a neuron most are listed."""
CARDS = 3
"""How many neurons of each word get a card where none are named."""
MEANS = (1, 10, 100, 1000)
"""Of how many top neurons the mean activation is drawn."""
LEVEL = 0.95
"""The quantile of a map above which a patch is in its mask."""


def describe(
    model: Model,
    examples: Examples,
    words: Sequence[str] = (),
    neurons: Sequence[Neuron] = (),
    *,
    prompt: str | None = None,
    measures: bool = True,
    embedding: str | Path | None = None,
    found: Found | None = None,
    seed: int = 0,
) -> Described:
    """Cards of neurons: of those that are named (layer, number), or the best of each word.

    `found` is what `find` gave for these pictures: they are not captioned again, and its words are the words
    if none are named. The tables are `cards` (layer, neuron, word, top tokens), `maps` (activation over the
    image's patches, of each neuron and of the mean of a word's top 1, 10, 100, 1000, with the mask above its
    95th percentile), `driving` (the pictures that drive a neuron most), `measures` (see `measure`, where
    there are enough pictures) and `left_out` (what was not measured, and why).
    """
    given, shape = listed(examples), model.shapes[model.speaker]
    for layer, number in neurons:
        if layer not in shape.having("mlp") or not 0 <= number < shape.neurons:
            raise ModelError(
                f"{model.name} has no neuron {layer}.{number}; expected a layer from 0 to "
                f"{shape.layers - 1} and a number from 0 to {shape.neurons - 1}"
            )
    words = words or ([] if found is None or neurons else found.words)
    if not words and not neurons:
        raise VlmscopeError("nothing to describe; name words or neurons (layer.number)")
    measures = measures and len(given) >= 4 * FEW
    embed = None if embedding is None else embedder(embedding)
    there = recorded(model, given, prompt, found=found, seed=seed) if words or measures else None
    ranked: dict[str, list[Neuron]] = {}
    for word in words:
        has = (
            [caption for caption in there.captions if whole_word(word).search(caption.text)] if there else []
        )
        if not has:
            raise ExampleError(
                f"no caption of these {len(given)} pictures has the word '{word}'; name another word"
            )
        ranked[word] = strongest(model, has, word, min(max(MEANS), count_neurons(model)))
    rows = [(*neuron, "") for neuron in neurons]
    rows = rows or [(*neuron, word) for word, best in ranked.items() for neuron in best[:CARDS]]
    cards = pd.DataFrame(rows, columns=["layer", "neuron", "word"])
    tokens = top_tokens(model, [(layer, number) for layer, number, _ in rows])
    cards["tokens"] = [" ".join(word for word, _ in top) for top in tokens]
    cards["weights"] = [" ".join(f"{x:.3g}" for _, x in top) for top in tokens]
    maps, driving, shown = _look(model, given, cards, ranked, prompt)
    table = left_out = None
    if there and measures:
        table, _, left_out = measure_study(there, list(words) or None, embed=embed)
    about: dict[str, Any] = {"model": model.name, "weights": base_fingerprint(model)}
    about |= {"words": list(words), "examples": len(given)}
    return Described(about, cards, maps, driving, table, left_out, small_pictures(model, shown))


def _look(
    model: Model,
    examples: Sequence[Example],
    cards: pd.DataFrame,
    ranked: Mapping[str, list[Neuron]],
    prompt: str | None,
) -> tuple[pd.DataFrame, pd.DataFrame, list[Example]]:
    """The maps of neurons and of means over the pictures that drive them most, and which these are."""
    neurons = list(zip(cards["layer"].tolist(), cards["neuron"].tolist(), strict=True))
    groups = {f"L{layer}.N{number}": [(layer, number)] for layer, number in neurons}
    for word, best in ranked.items():
        groups |= {f"{word}: mean of top {k}": best[:k] for k in MEANS if k <= len(best)}
    every = list(dict.fromkeys(neuron for group in groups.values() for neuron in group))
    place = {neuron: number for number, neuron in enumerate(every)}
    maps: list[dict[str, np.ndarray]] = []
    widths = []
    with progress(len(examples), what="pictures") as step:
        for number, example in enumerate(examples, start=1):
            inputs = inputs_of(model, example, prompt)
            active = over_image(model, inputs, every).cpu().numpy()
            maps.append({name: active[[place[n] for n in group]].mean(0) for name, group in groups.items()})
            widths.append(grid(inputs.layout[model.speaker])[1])
            step(0, number)
    order = {name: np.argsort([-own[name].max() for own in maps], kind="stable").tolist() for name in groups}
    parts = []
    for name, numbers in order.items():
        for n in numbers[:SHOWN]:
            values = maps[n][name]
            part = pd.DataFrame({"example": examples[n].id, "neuron": name, "activation": values})
            part["row"], part["column"] = np.divmod(np.arange(len(values)), widths[n])
            parts.append(part.assign(mask=values >= np.quantile(values, LEVEL)))
    driving = [
        (layer, number, rank, examples[n].id, maps[n][f"L{layer}.N{number}"].max())
        for layer, number in neurons
        for rank, n in enumerate(order[f"L{layer}.N{number}"][:DRIVING], start=1)
    ]
    columns = ["example", "neuron", "row", "column", "activation", "mask"]
    shown = [examples[n] for n in sorted({n for numbers in order.values() for n in numbers[:SHOWN]})]
    names = ["layer", "neuron", "rank", "example", "peak"]
    return pd.concat(parts, ignore_index=True)[columns], pd.DataFrame(driving, columns=names), shown


def small_pictures(model: Model, examples: Sequence[Example]) -> dict[str, Image.Image]:
    """Small copies of examples' pictures, as the grid of patches covers them."""
    pictures = {example.id: model.cropped(example.clean_image) for example in examples}
    for picture in pictures.values():
        picture.thumbnail((320, 320))
    return pictures

"""What happens to words without their neurons, or with noise on their columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlmscope.data import Examples
from vlmscope.errors import DataError
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.captions import LENGTH
from vlmscope.neurons.contributions import count_neurons
from vlmscope.neurons.results import Found, Perturbed
from vlmscope.neurons.weight_edit import base_fingerprint, changed
from vlmscope.neurons.words import FEW, PICTURES, Array, Neurons, Study, Word, find_words, study
from vlmscope.progress import progress
from vlmscope.runs.forward import generate
from vlmscope.runs.hooks import Access, Hooks
from vlmscope.runs.model import Model
from vlmscope.stats import bootstrap, rng


@contextmanager
def ablated(model: Model, neurons: Mapping[int, tuple[Sequence[int], Tensor]]) -> Iterator[None]:
    """Within this context neurons of the tower that speaks are set to a value, at every position."""
    with model.alone(), Hooks() as hooks:
        for layer, (numbers, value) in neurons.items():
            hooks.at(Access(model.down(layer), before=True), partial(_set, list(numbers), value))
        yield


def _set(numbers: list[int], value: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    x[..., numbers] = value.to(x)
    return x


@contextmanager
def perturbed(
    model: Model, neurons: Mapping[int, Sequence[int]], sigma: float, seed: int = 0
) -> Iterator[None]:
    """Within this context σ·N(0, I) is added to neurons' columns, as in Pan et al.; undone bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    width = model.shapes[model.speaker].width
    columns = {
        layer: (torch.tensor(list(numbers)), sigma * torch.randn(width, len(numbers), generator=generator))
        for layer, numbers in neurons.items()
    }
    with changed(model, [columns]):
        yield


@contextmanager
def without(study: Study, neurons: Neurons, how: str, number: int = 0) -> Iterator[None]:
    """Within this context neurons are set to `zero` or to their `mean`, or their columns have noise
    (`sigma S`) that is the picture's own."""
    layer_of = neurons // study.width
    places = {study.layers[n]: neurons[layer_of == n] for n in np.unique(layer_of)}
    numbers = {layer: (at % study.width).tolist() for layer, at in places.items()}
    if how.startswith("sigma"):
        seed = int(rng(study.seed, "columns", study.examples[number].id).integers(2**63))
        with perturbed(study.model, numbers, float(how.split()[1]), seed=seed):
            yield
    else:
        value = study.mean if how == "mean" else torch.zeros_like(study.mean)
        with ablated(study.model, {n: (numbers[n], value[torch.tensor(at)]) for n, at in places.items()}):
            yield


def log_probabilities(
    word: Word, fed: Mapping[int, Inputs], neurons: Neurons | None = None, how: str = "zero"
) -> Array:
    """The log-probability of a word where each picture's caption says it, `without` neurons."""
    found = []
    for number, inputs in fed.items():
        with without(word.study, np.array([], int) if neurons is None else neurons, how, number):
            found.append(float(word.study.model.run(inputs).float().log_softmax(-1)[word.token]))
    return np.array(found)


def lost(word: Word, pictures: Iterable[int], neurons: Neurons, how: str) -> list[bool]:
    """Whether each picture's caption, generated anew `without` neurons, lacks the word."""
    found = []
    for number in pictures:
        with without(word.study, neurons, how, number):
            ids = generate(word.study.model, word.study.captions[number].inputs, most=LENGTH)
            found.append(word.token not in ids)
    return found


def perturb(
    model: Model,
    examples: Examples,
    words: Sequence[str],
    *,
    prompt: str | None = None,
    tops: Sequence[int] = (1, 10),
    sigmas: Sequence[float] = (),
    pictures: int = PICTURES,
    found: Found | None = None,
    seed: int = 0,
) -> Perturbed:
    """What happens to words as their top neurons are ablated or their columns perturbed, by how many.

    Neurons are chosen on half of the pictures, and the others measured that show the word and whose caption
    says it (at most `pictures` of them). `found` has captions of the pictures that need not be made again.

    A row of `effects` is a word, `k`, `how` (`zero`, `mean`, or `sigma S`: S·N(0, I) is added to the columns)
    and `set` (`top`, or `random` neurons of the same layers): the mean drop of the log-probability and of the
    probability with its interval (bootstrap, 95 %), and the share of captions, generated anew, that lose the
    word.

    Raises `DataError` if a word cannot be measured.
    """
    every = count_neurons(model)
    if wrong := [k for k in tops if not 1 <= k <= every]:
        raise DataError(f"the top {wrong[0]} of {every} neurons; expected 1 to {every}")
    there = study(model, examples, prompt, pictures=pictures, found=found, seed=seed)
    measurable = find_words(there, words)
    if lacking := set(words) - {word.word for word in measurable}:
        raise DataError(
            f"'{min(lacking, key=words.index)}' cannot be measured: it is not a single token that at least "
            f"{2 * FEW} pictures show and as many do not"
        )
    ways = ["zero", "mean", *(f"sigma {sigma:g}" for sigma in sigmas)]
    rows: list[dict[str, Any]] = []
    with progress(len(measurable) * len(tops) * len(ways), what="perturbations") as step:
        for word in measurable:
            for k in tops:
                rows += _effects(word, k, ways)
                step(0, len(rows) // 2)
    about = {"model": model.name, "weights": base_fingerprint(model), "words": list(words)}
    return Perturbed(about, pd.DataFrame(rows))


def _effects(word: Word, k: int, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What happens to a word without its top k neurons and without as many random ones."""
    study, fed = word.study, {number: word.fed(number) for number in word.said()}
    if not fed:
        raise DataError(f"no caption says '{word.word}' where the picture shows it")
    base = log_probabilities(word, fed)
    top = word.strongest(study.first & word.shown, k)
    sets = {"top": top, "random": study.random(top, word.draw("random", k))}
    for how in ways:
        for name, neurons in sets.items():
            after = log_probabilities(word, fed, neurons, how)
            chance = np.exp(base) - np.exp(after)
            (low,), (high,) = bootstrap(chance[:, None], word.draw("perturb", k, how, name))
            yield {
                "word": word.word,
                "k": k,
                "how": how,
                "set": name,
                "drop_log_p": (base - after).mean(),
                "drop_p": chance.mean(),
                "ci_low": low,
                "ci_high": high,
                "lost": np.mean(lost(word, fed, neurons, how)),
                "n": len(fed),
            }

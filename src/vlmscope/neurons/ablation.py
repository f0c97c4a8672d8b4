"""What happens to words without their neurons, or with noise on their columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from vlmscope.neurons.words import FEW, PICTURES, Neurons, Study, Word, best, find_words, study
from vlmscope.progress import progress
from vlmscope.runs.forward import generate
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.model import Model
from vlmscope.stats import bootstrap, rng


@contextmanager
def ablated(model: Model, neurons: Mapping[int, tuple[Sequence[int], Tensor]]) -> Iterator[None]:
    """Within this context neurons of the tower that speaks are set to a value, at every position."""
    with model.alone(), Hooks() as hooks:
        for layer, (numbers, value) in neurons.items():
            hooks.on_hidden(model.down(layer), partial(_set, list(numbers), value), before=True)
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
    by_layer = {
        study.layers[n]: neurons[neurons // study.width == n] for n in np.unique(neurons // study.width)
    }
    numbers = {layer: (places % study.width).tolist() for layer, places in by_layer.items()}
    if how.startswith("sigma"):
        seed = int(rng(study.seed, "columns", study.examples[number].id).integers(2**63))
        with perturbed(study.model, numbers, float(how.split()[1]), seed=seed):
            yield
    else:
        mean = study.activity.mean if how == "mean" else torch.zeros_like(study.activity.mean)
        values = {n: (numbers[n], mean[torch.tensor(places)]) for n, places in by_layer.items()}
        with ablated(study.model, values):
            yield


def log_probability(model: Model, fed: Inputs, token: int) -> float:
    """The log-probability of a token behind what is fed."""
    return float(model.run(fed).float().log_softmax(-1)[token])


def loses(study: Study, word: Word, number: int) -> bool:
    """Whether a picture's caption, generated as the model now is, is without the word."""
    return word.token not in generate(study.model, study.captions[number].inputs, most=LENGTH)


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
    there = study(model, examples, prompt, top=1, pictures=pictures, found=found, seed=seed)
    measurable = find_words(there, words)
    if lacking := [word for word in words if word not in {one.word for one in measurable}]:
        raise DataError(
            f"'{lacking[0]}' cannot be measured: it is not a single token that at least "
            f"{2 * FEW} pictures show and as many do not"
        )
    ways = ["zero", "mean", *(f"sigma {sigma:g}" for sigma in sigmas)]
    rows: list[dict[str, Any]] = []
    with progress(len(measurable) * len(tops) * len(ways), what="perturbations") as step:
        for word in measurable:
            if not there.saying(word):
                raise DataError(f"no caption says '{word.word}' where the picture shows it")
            for k in tops:
                rows += _effects(there, word, k, ways)
                step(0, len(rows) // 2)
    about = {"model": model.name, "weights": base_fingerprint(model), "words": list(words)}
    return Perturbed(about, pd.DataFrame(rows))


def _effects(study: Study, word: Word, k: int, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What happens to a word without its top k neurons and without as many random ones."""
    numbers = study.saying(word)
    fed = [study.fed(n, word.token) for n in numbers]
    base = np.array([log_probability(study.model, inputs, word.token) for inputs in fed])
    top = best(word.contribution[study.first & word.shown].mean(0), k)
    other = study.random(top, study.draw(word, "random", k))
    for how in ways:
        for name, neurons in (("top", top), ("random", other)):
            after, lost = [], []
            for number, inputs in zip(numbers, fed, strict=True):
                with without(study, neurons, how, number):
                    after.append(log_probability(study.model, inputs, word.token))
                    lost.append(loses(study, word, number))
            chance = np.exp(base) - np.exp(after)
            (low,), (high,) = bootstrap(chance[:, None], study.draw(word, "perturb", k, how, name))
            yield {
                "word": word.word,
                "k": k,
                "how": how,
                "set": name,
                "drop_log_p": (base - np.array(after)).mean(),
                "drop_p": chance.mean(),
                "ci_low": low,
                "ci_high": high,
                "lost": np.mean(lost),
                "n": len(numbers),
            }

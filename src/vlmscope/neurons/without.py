"""Words without their neurons: over a range of neurons, and with those that take over ablated, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.data import Examples
from vlmscope.errors import DataError
from vlmscope.neurons.contributions import count_neurons
from vlmscope.neurons.results import Found, Perturbed
from vlmscope.neurons.weight_edit import base_fingerprint
from vlmscope.neurons.words import PICTURES, Word, recorded
from vlmscope.progress import progress
from vlmscope.runs.model import Model
from vlmscope.stats import interval


def perturb(
    model: Model,
    examples: Examples,
    words: Sequence[str],
    *,
    prompt: str | None = None,
    tops: Sequence[int] = (1, 10),
    sigmas: Sequence[float] = (),
    rounds: int = 2,
    pictures: int = PICTURES,
    found: Found | None = None,
    seed: int = 0,
) -> Perturbed:
    """What happens to words as their top neurons are ablated or their columns perturbed, by how many.

    Neurons are chosen on half of the pictures, and the others measured that show the word and whose caption
    says it (at most `pictures` of them). `found` has captions of the pictures that need not be made again.

    A row of `effects` is a word, `k`, `how` (`zero`, `mean`, or `sigma S`: S·N(0, I) is added to the
    columns), `round` and `set` (`top`, or as many `random` neurons of the same layers): the mean drop of the
    log-probability and of the probability with its 95 % interval, and the share of captions, generated
    anew, that lose the word. In round 1 the top k neurons are ablated; in each later one also the k that
    contribute most to the word while those before are ablated: a model may have backups.

    Raises `DataError` if a word cannot be measured.
    """
    every = count_neurons(model)
    if wrong := [k for k in tops if not 1 <= k <= every]:
        raise DataError(f"the top {wrong[0]} of {every} neurons; expected 1 to {every}")
    there = recorded(model, examples, prompt, pictures=pictures, found=found, seed=seed)
    measurable, why = there.find(words)
    if why:
        raise DataError(f"{next(iter(why.values()))}; leave it out, or give more pictures")
    ways = ["zero", "mean", *(f"sigma {sigma:g}" for sigma in sigmas)]
    rows: list[dict[str, Any]] = []
    every_one = list(product(measurable, tops, ways))
    with progress(len(every_one), what="perturbations") as step:
        for number, (word, k, how) in enumerate(every_one, start=1):
            rows += _effects(word, k, how, rounds)
            step(0, number)
    about = {"model": model.name, "weights": base_fingerprint(model), "words": list(words)}
    return Perturbed(about, pd.DataFrame(rows))


def _effects(word: Word, k: int, how: str, rounds: int) -> Iterator[dict[str, Any]]:
    """What happens to a word without its top k neurons, then without those that took over, too."""
    study, fed = word.study, word.said()
    if not fed:
        raise DataError(f"no caption says '{word.word}' where the picture shows it")
    base, gone = word.log_probabilities(fed), word.strongest(study.first & word.shown, k)
    for number in range(1, 1 + (1 if how.startswith("sigma") else rounds)):
        if number > 1:
            gone = np.concatenate([gone, word.taking_over(gone, how, k)])
        sets = {"top": gone, "random": study.random(gone, word.draw("random", k, number))}
        for name, neurons in sets.items():
            after = word.log_probabilities(fed, neurons, how)
            chance = np.exp(base) - np.exp(after)
            (low,), (high,) = interval(chance[:, None])
            row = {"word": word.word, "k": k, "how": how, "round": number, "set": name}
            row |= {"drop_log_p": (base - after).mean(), "drop_p": chance.mean()}
            row |= {"ci_low": low, "ci_high": high}
            yield row | {"lost": np.mean(word.lost(fed, neurons, how)), "n": len(fed)}

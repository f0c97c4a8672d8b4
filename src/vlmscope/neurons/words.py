"""The neurons of words over a set of pictures: what there is, how neurons fire, and which are a word's.

Neurons are chosen on one half of the pictures, to be measured on the other. They are ranked by their
contribution where the caption says the word (or at most anywhere in the caption where it does not), meant
over the pictures that show the word, and beside that by activation alone, by gradient times activation
(Schwettmann et al. 2023, arXiv 2308.01544) and at random in the same layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import DataError, ModelError
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.captions import (
    LENGTH,
    Caption,
    caption_pictures,
    forced_caption,
    image_range,
    inputs_of,
    packed,
)
from vlmscope.neurons.contributions import contributions, count_neurons, token_weights, top_share
from vlmscope.neurons.results import Found
from vlmscope.neurons.tails import Tails
from vlmscope.neurons.weight_edit import ablated, perturbed
from vlmscope.progress import progress
from vlmscope.runs.forward import forward, generate
from vlmscope.runs.model import Model
from vlmscope.sites import Point
from vlmscope.stats import rng, shuffled

Array = NDArray[np.floating[Any]]
Labels = NDArray[np.bool_]
Neurons = NDArray[np.int64]
"""Neurons by their places among those of all layers."""

FEW = 4
"""A word that fewer pictures of a half show, or do not show, is not measured."""
PICTURES = 16
"""How many pictures of each word the costly measures run on, at most."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """A model and the pictures that it has captioned, in an order that their ids decide.

    Neurons are chosen on the `first` of them; `top` of them are a word's. The costly measures run on no more
    than `pictures` that show it. `highest`, `lowest` and `size` are each neuron's activation over a caption's
    tokens, `(pictures, neurons)`, and `mean` that over all captions.
    """

    model: Model
    examples: Sequence[Example]
    captions: Sequence[Caption]
    prompt: str | None
    top: int
    pictures: int
    seed: int
    shows: Sequence[frozenset[str]]
    first: Labels
    highest: Array
    lowest: Array
    size: Array
    mean: Tensor

    @property
    def layers(self) -> list[int]:
        return self.model.shapes[self.model.speaker].having("mlp")

    @property
    def width(self) -> int:
        """Neurons of a layer."""
        return self.model.shapes[self.model.speaker].neurons

    def contributions(self, token: int, weight: Tensor) -> tuple[Array, Array]:
        """What each neuron contributes to a token in each picture: at most, and where the caption says it."""
        reach = _reach(weight, self.highest, self.lowest)
        found = reach.copy()
        for number, caption in enumerate(self.captions):
            if at := [n for n, other in enumerate(caption.ids) if other == token]:
                found[number] = contributions(caption, at, weight).float().mean(0).numpy()
        return reach, found

    def find(self, words: Sequence[str] | None) -> tuple[list[Word], dict[str, str]]:
        """The words that can be measured, by default of all that pictures show; and why others cannot be.

        Raises `DataError` if there is none.
        """
        model = self.model
        asked = sorted({w for shown in self.shows for w in shown}) if words is None else words
        found, why = [], {}
        for word in dict.fromkeys(asked):
            ids = model.family.options(model.processor, "a", word)[:-1]
            shown = np.array([word.casefold() in labels for labels in self.shows], bool)
            halves = (shown[self.first], shown[~self.first])
            if len(ids) != 1 or ids[0] == model.processor.tokenizer.unk_token_id:
                why[word] = f"'{word}' is {'unknown' if len(ids) == 1 else f'{len(ids)} tokens'}"
            elif min(min(half.sum(), (~half).sum()) for half in halves) < FEW:
                why[word] = (
                    f"'{word}' is shown by {shown.sum()} of {len(shown)} pictures; of each half {FEW} have "
                    "to show it, and as many not"
                )
            else:
                (weight,) = token_weights(model, ids)
                found.append(Word(self, word, ids[0], shown, weight, *self.contributions(ids[0], weight)))
        if not found:
            raise DataError(
                f"no word can be measured: {'; '.join([*why.values()][:5]) or 'nothing is shown'}; "
                f"expected a single token that at least {2 * FEW} pictures show and as many do not"
            )
        return found, why

    @cached_property
    def over_image(self) -> Array | None:
        """Each neuron's highest and lowest activation over the image's tokens, `(2, pictures, neurons)`."""
        found = []
        with progress(len(self.captions), what="pictures") as step:
            for number, caption in enumerate(self.captions, start=1):
                ends = image_range(self.model, caption.inputs)
                if ends is None:
                    return None
                found.append(ends.flatten(1).numpy())
                step(0, number)
        return np.stack(found, 1)

    @cached_property
    def _told(self) -> dict[int, Inputs]:
        return {}

    def told(self, number: int) -> Inputs:
        """A picture with its caption."""
        if number not in self._told:
            behind = self.captions[number].ids[:-1]
            self._told[number] = inputs_of(self.model, self.examples[number], self.prompt, behind)
        return self._told[number]

    @cached_property
    def tails(self) -> Tails:
        """Runs from the first layer with neurons on, for what is asked many times about the same pictures."""
        return Tails(self.model, self.layers[0])

    def random(self, chosen: Neurons, generator: np.random.Generator) -> Neurons:
        """As many other neurons of the same layers (see `random_places`)."""
        return random_places(chosen, self.width, generator)

    @contextmanager
    def without(self, neurons: Neurons, how: str, number: int = 0) -> Iterator[None]:
        """Within this context neurons are set to `zero` or to their `mean`, or their columns have noise
        (`sigma S`) that is the picture's own."""
        layer_of = neurons // self.width
        places = {self.layers[n]: neurons[layer_of == n] for n in np.unique(layer_of)}
        numbers = {layer: (at % self.width).tolist() for layer, at in places.items()}
        if how.startswith("sigma"):
            seed = int(rng(self.seed, "columns", self.examples[number].id).integers(2**63))
            with perturbed(self.model, numbers, float(how.split()[1]), seed=seed):
                yield
        else:
            value = self.mean if how == "mean" else torch.zeros_like(self.mean)
            with ablated(self.model, {n: (numbers[n], value[torch.tensor(at)]) for n, at in places.items()}):
                yield


def random_places(chosen: Neurons, width: int, generator: np.random.Generator) -> Neurons:
    """As many other neurons of the same layers, of `width` neurons each: the null of what is chosen.

    Raises `ModelError` where a layer has not as many others.

    >>> (random_places(np.array([1, 5, 6]), 4, np.random.default_rng(0)) // 4).tolist()
    [0, 1, 1]
    """
    found: list[int] = []
    for layer, count in zip(*np.unique(chosen // width, return_counts=True), strict=True):
        free = np.setdiff1d(np.arange(width) + layer * width, chosen)
        if count > len(free):
            raise ModelError(
                f"{count} neurons of one layer are chosen, and it has no more than {len(free)} others to "
                "compare them with; choose fewer"
            )
        found += generator.choice(free, count, replace=False).tolist()
    return np.array(found, dtype=np.int64)


def _reach(weight: Tensor, highest: Array, lowest: Array) -> Array:
    """How far neurons move a token at most, by their highest and lowest activations."""
    flat = weight.flatten().float().cpu().numpy()
    return np.where(flat >= 0, highest * flat, lowest * flat)


def recorded(
    model: Model,
    examples: Examples,
    prompt: str | None = None,
    *,
    top: int | None = None,
    pictures: int = PICTURES,
    found: Found | None = None,
    seed: int = 0,
) -> Recorded:
    """Caption pictures, and see how each neuron fires."""
    given = listed(examples)
    # A large model's neurons are many: no more than one caption's are held in float32.
    made = [packed(model, caption) for caption in caption_pictures(model, given, prompt, found=found)]
    order = shuffled(seed, [example.id for example in given])
    given, made = [given[n] for n in order], [made[n] for n in order]
    highest, lowest, size = np.zeros((3, len(made), count_neurons(model)), np.float32)
    mean = np.zeros(count_neurons(model))
    for number, caption in enumerate(made):
        active = caption.activations.flatten(1).float()
        highest[number], lowest[number] = active.amax(0).numpy(), active.amin(0).numpy()
        size[number] = active.abs().mean(0).numpy()
        mean += active.mean(0).numpy()
    top = top_share(model) if top is None else top
    shows = [e.shows or frozenset(c.text.casefold().split()) for e, c in zip(given, made, strict=True)]
    first = np.arange(len(given)) < len(given) // 2
    means = torch.tensor(mean / max(1, len(made)), dtype=torch.float32)
    choices = (prompt, top, pictures, seed, shows, first)
    return Recorded(model, given, made, *choices, highest, lowest, size, means)


@dataclass(frozen=True, eq=False)
class Word:
    """A word, its token, which pictures show it, and how far each neuron moves it in each picture.

    `reach` is the most anywhere in the caption: the same for every picture, whatever it shows. `contribution`
    is where the caption says the word, or `reach` where it does not.
    """

    study: Recorded
    word: str
    token: int
    shown: Labels
    weight: Tensor
    reach: Array
    contribution: Array

    @cached_property
    def reaches(self) -> Mapping[str, Array]:
        """`reach` over what is said, and over the image's tokens where there are such."""
        seen = self.study.over_image
        return {"": self.reach} if seen is None else {"": self.reach, ", image": _reach(self.weight, *seen)}

    @cached_property
    def chosen(self) -> Mapping[str, Neurons]:
        """Its neurons by each method, chosen on the first half of the pictures."""
        study, which = self.study, self.study.first & self.shown
        contribution = self.strongest(which)
        return {
            "contribution": contribution,
            "gradient": best(self._gradient(np.flatnonzero(which).tolist()), study.top),
            "activation": best(study.size[which].mean(0), study.top),
            "random": study.random(contribution, self.draw("random")),
        }

    def _gradient(self, which: Sequence[int]) -> Array:
        """Gradient times activation where the word is said, meant over some pictures."""
        model, products = self.study.model, []
        for number in which[: self.study.pictures]:
            if self.token not in self.study.captions[number].ids:
                continue
            points = [Point(model.speaker, layer, "mlp", "n") for layer in self.study.layers]
            run = forward(model, self.fed(number), keep=points, grad=True)
            active = [run.values[point] for point in points]
            gradients = torch.autograd.grad(run.logits[-1, self.token], active)
            parts = [g[0, -1] * x[0, -1] for g, x in zip(gradients, active, strict=True)]
            products.append(torch.cat([part.detach().float().cpu() for part in parts]).numpy())
        return np.mean(products or [np.zeros(count_neurons(model))], axis=0, dtype=np.float64)

    def draw(self, *what: object) -> np.random.Generator:
        return rng(self.study.seed, self.word, *what)

    def fed(self, number: int) -> Inputs:
        """A picture with its caption as far as where it says the word."""
        study, ids = self.study, self.study.captions[number].ids
        return inputs_of(study.model, study.examples[number], study.prompt, ids[: ids.index(self.token)])

    def said(self, half: Labels | None = None) -> dict[int, Inputs]:
        """What is `fed` of some pictures of a half (the second) that show the word and say it."""
        both = np.flatnonzero((~self.study.first if half is None else half) & self.shown).tolist()
        numbers = [n for n in both if self.token in self.study.captions[n].ids][: self.study.pictures]
        return {number: self.fed(number) for number in numbers}

    def strongest(self, pictures: Any, count: int | None = None) -> Neurons:
        """The neurons that contribute most to the word in some pictures, best first."""
        return best(self.contribution[pictures].mean(0), self.study.top if count is None else count)

    def taking_over(self, gone: Neurons, how: str, count: int) -> Neurons:
        """The neurons that contribute most to the word while others are `gone`, on the first half."""
        total = np.zeros(count_neurons(self.study.model))
        for number, fed in self.said(self.study.first).items():
            caption = self.study.captions[number]
            at = caption.ids.index(self.token)
            with self.study.without(gone, how, number):
                again, _ = forced_caption(self.study.model, caption.inputs, fed, caption.ids[: at + 1])
            total += contributions(again, [at], self.weight)[0].float().cpu().numpy()
        total[gone] = -np.inf
        return best(total, count)

    def log_probabilities(
        self, pictures: Iterable[int], neurons: Neurons | None = None, how: str = "zero"
    ) -> Array:
        """The log-probability of a word where each picture's caption says it, `without` neurons."""
        found = self._without(pictures, np.array([], int) if neurons is None else neurons, how)
        return np.array([float(logits[-1].log_softmax(-1)[self.token]) for _, logits in found])

    def lost(self, pictures: Iterable[int], neurons: Neurons, how: str) -> list[bool]:
        """Whether each picture's caption, generated anew `without` neurons, lacks the word."""
        found = []
        for number, logits in self._without(pictures, neurons, how):
            caption = self.study.captions[number]
            if tuple(logits.argmax(-1).tolist()) == caption.ids[: len(logits)]:
                found.append(False)  # word for word as before, as far as to this one
                continue
            with self.study.without(neurons, how, number):
                ids = generate(self.study.model, caption.inputs, most=LENGTH)
                found.append(self.token not in ids)
        return found

    def _without(
        self, pictures: Iterable[int], neurons: Neurons, how: str
    ) -> Iterator[tuple[int, Float[Tensor, "tokens vocabulary"]]]:
        """For each picture the logits that predict its caption as far as to the word, `without` neurons."""
        study, numbers = self.study, list(pictures)
        # Noise is a picture's own.
        for some in [[n] for n in numbers] if how.startswith("sigma") else [numbers]:
            with study.without(neurons, how, *some[:1]), torch.no_grad():
                every = study.tails.logits([(study.told(n), len(study.captions[n].ids)) for n in some])
            for number, logits in zip(some, every, strict=True):
                yield number, logits[: study.captions[number].ids.index(self.token) + 1]

    def by_chance(self, draws: int, measure: str) -> list[tuple[Neurons, Labels]]:
        """The null of a measure: neurons chosen by labels that are shuffled within each half."""
        generator, found = self.draw(measure, "labels"), []
        for _ in range(draws):
            labels = self.shown.copy()
            for half in (self.study.first, ~self.study.first):
                labels[half] = generator.permutation(labels[half])
            found.append((self.strongest(self.study.first & labels), labels))
        return found


def best(values: Array, count: int) -> Neurons:
    """The neurons with the largest values, best first."""
    return np.argsort(-values, kind="stable")[:count]

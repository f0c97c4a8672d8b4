"""Whether neurons are what they seem: measures over a set of pictures, each with a null and an interval.

For a word, neurons are chosen on one half of the pictures and measured on the other. They are ranked by
their contribution where the caption says the word (or at most anywhere in the caption where it does not), meant
over the pictures that show the word, and beside that by activation alone, by gradient times activation
(Schwettmann et al. 2023, arXiv 2308.01544) and at random in the same layers.

A word's token chooses its neurons in part by their weights alone, whatever the pictures show. So the null of
a measure is the same measure with the same token, of neurons chosen on pictures that were labelled at
random; random neurons are given beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from vlmscope.checkpoint import embedder
from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import DataError
from vlmscope.inputs import Edit, Inputs
from vlmscope.neurons.contributions import Caption, say, taught, top_tokens, weights
from vlmscope.neurons.weight_edit import changed
from vlmscope.progress import progress
from vlmscope.runs.forward import editing, forward
from vlmscope.runs.hooks import Access, Hooks
from vlmscope.runs.model import Model
from vlmscope.sites import Point
from vlmscope.stats import bootstrap, rng, shuffled, sign_flip

Array = NDArray[np.floating[Any]]
Embed = Callable[[Sequence[str]], Tensor]
METHODS = ("contribution", "gradient", "activation", "random")
SHARE = 0.01
"""The share of all neurons that is a word's, by default."""
WORDS = 10
"""How many of a neuron's top tokens are looked at."""
FEW = 4
"""A word that fewer pictures of a half show, or do not show, is not measured."""
DRAWS = 199
"""How often labels are shuffled for a null."""
LARGE = 2**20
"""Captions with more activations than this are kept in half precision."""
PATCHED = 16
"""How many pictures of each word the costly measures run on, at most."""
CONTROLS = 49
"""How many tokens of the vocabulary a word's overlap is compared with."""
OTHERS = 3
"""How many sets of random neurons, and of neurons chosen by shuffled labels, are ablated."""


class Measured(NamedTuple):
    """The measures of each word (long form), and the neurons that were chosen for it."""

    measures: pd.DataFrame
    chosen: pd.DataFrame


@dataclass(eq=False)
class _Word:
    """A word, its token, which pictures show it, and how far each neuron moves it in each picture."""

    word: str
    token: int
    shown: NDArray[np.bool_]
    weight: Array
    reach: Array
    """At most anywhere in the caption: the same for every picture, whatever it shows."""
    said: Array
    """Where the caption says the word, or `reach` where it does not."""
    chosen: dict[str, NDArray[np.int64]] = field(default_factory=dict)


def measure(
    model: Model,
    examples: Examples,
    prompt: str | None = None,
    words: Sequence[str] | None = None,
    *,
    top: int | None = None,
    causal: bool = True,
    embedding: str | Path | None = None,
    seed: int = 0,
) -> Measured:
    """The measures of the neurons of each word over a set of pictures.

    `prompt` asks for the caption (each example's own by default). What a picture shows are its labels
    (`Example.shows`), or the words of its caption where it has none; `words` are by default all of these
    that are a single token for the model and shown by some pictures and not by others. `top` is how many
    neurons are chosen for a word (1 % of all). The table has a row a word, method and measure:

    - `sensitivity`: the share of the neurons among whose 10 top tokens the word's is;
    - `similarity`, with a small text model that is named (`embedding`): the mean cosine of the word and these
      tokens;
    - `auc`: how well the best neuron (best on the first half) tells pictures that show the word from
      others, by how far it moves the word's token;
    - `selectivity`: (with − without) / (|with| + |without|) of that, meant over the neurons;
    - `overlap`: the share of a picture's top neurons for the word that are another's, too, for pictures
      that show it; `overlap, others`: that with the neurons of another word in a picture without it;
    - `overlap, shuffled`: with those of the same picture when its patches are shuffled, where they
      are tokens of the language model (cross-attention reads patches in no order, so that a shuffle changes
      nothing, and the queries of a Q-Former have no place in the picture);
    - `drop, zero` and `drop, mean`: by how much the log-probability of the word falls when the neurons are
      set to zero, or to their mean; `p drop, zero`: the probability itself; `lost, zero`: the share of
      captions, generated anew, that lose the word.

    `null` is the same of neurons chosen by shuffled labels (with the same token), `random` of as many random
    neurons of the same layers; `p_value` is against the null, `q_value` after Benjamini and Hochberg over
    the words.

    Raises `DataError` if no word can be measured.
    """
    study = _Study(model, listed(examples), prompt, top, seed)
    return study.run(words, causal, None if embedding is None else embedder(embedding))


def perturb(
    model: Model,
    examples: Examples,
    prompt: str | None,
    words: Sequence[str],
    *,
    tops: Sequence[int] = (1, 10),
    sigmas: Sequence[float] = (),
    seed: int = 0,
) -> pd.DataFrame:
    """What happens to words as their top neurons are ablated or their columns perturbed, by how many.

    Neurons are chosen on half of the pictures, and the others measured that show the word and whose caption
    says it. A row a word, `k`, `how` (`zero`, `mean`, or `sigma S`: S·N(0, I) is added to the columns) and `set`
    (`top`, or `random` neurons of the same layers): the mean drop of the log-probability and of the
    probability with its interval (bootstrap, 95 %), and the share of captions, generated anew, that lose the
    word.

    Raises `DataError` if a word cannot be measured.
    """
    study = _Study(model, listed(examples), prompt, 1, seed)
    return study.perturb(words, tops, sigmas)


class _Study:
    def __init__(
        self, model: Model, examples: Sequence[Example], prompt: str | None, top: int | None, seed: int
    ) -> None:
        self.model, self.prompt, self.seed = model, prompt, seed
        # In the order of their ids, so that no number depends on the one in which they came.
        order = shuffled(seed, [one.id for one in examples])
        self.examples = examples = [examples[n] for n in order]
        self.layers = model.shapes[model.speaker].having("mlp")
        self.width = model.shapes[model.speaker].neurons
        self.many = len(self.layers) * self.width
        self.top = max(1, round(SHARE * self.many)) if top is None else top
        self.said: list[Caption] = []
        self.shows: list[frozenset[str]] = []
        highest: list[Array] = []
        lowest: list[Array] = []
        size: list[Array] = []
        mean = np.zeros(self.many)
        with progress(len(examples), what="captions") as step:
            for number, one in enumerate(examples):
                said = say(model, self._inputs(one))
                own = said.activations.flatten(1).float().cpu()
                highest.append(own.amax(0).numpy())
                lowest.append(own.amin(0).numpy())
                size.append(own.abs().mean(0).numpy())
                mean += own.mean(0).numpy()
                self.shows.append(one.shows or frozenset(said.text.casefold().split()))
                # Of a large model in half the bits: ranks are asked of them, and they are many.
                kept = said.activations.cpu()
                self.said.append(replace(said, activations=kept if kept.numel() < LARGE else kept.half()))
                step(0, number + 1)
        self.highest, self.lowest, self.size = np.stack(highest), np.stack(lowest), np.stack(size)
        self.mean = torch.tensor(mean / max(1, len(examples)), dtype=torch.float32)
        self.first = np.arange(len(examples)) < len(examples) // 2

    def _rng(self, one: _Word, *what: object) -> np.random.Generator:
        """The generator of one draw for a word."""
        return rng(self.seed, one.word, *what)

    def _inputs(self, one: Example, said: Sequence[int] = ()) -> Inputs:
        return self.model.inputs(one.clean_image, self.prompt or one.clean_prompt, one.more_images, said)

    def run(self, words: Sequence[str] | None, causal: bool, embed: Embed | None = None) -> Measured:
        found = self._words(words)
        rows: list[dict[str, Any]] = []
        with progress(len(found), what="words") as step:
            for number, one in enumerate(found):
                self._choose(one)
                rows += self._sensitivity(one)
                rows += self._similarity(one, embed) if embed else []
                rows += self._specificity(one)
                rows += self._overlaps(one, [other for other in found if other is not one])
                rows += self._shuffled(one)
                rows += self._causal(one) if causal else []
                step(0, number + 1)
        table = pd.DataFrame(rows)
        q = table.groupby(["method", "measure"])["p_value"].transform(_control)
        chosen = [
            {
                "word": one.word,
                "method": method,
                "rank": rank,
                "layer": self.layers[int(n) // self.width],
                "neuron": int(n) % self.width,
            }
            for one in found
            for method, some in one.chosen.items()
            for rank, n in enumerate(some, start=1)
        ]
        return Measured(table.assign(q_value=q), pd.DataFrame(chosen))

    # -- words and their neurons -----------------------------------------------------------------

    def _words(self, words: Sequence[str] | None) -> list[_Word]:
        asked = sorted({w for some in self.shows for w in some}) if words is None else list(words)
        found, why = [], []
        for word in asked:
            ids = self.model.family.options(self.model.processor, "a", word)[:-1]
            if len(ids) != 1 or ids[0] == self.model.processor.tokenizer.unk_token_id:
                why.append(f"'{word}' is {len(ids)} tokens, or unknown")
                continue
            shown = np.array([word in some for some in self.shows])
            counts = [
                (shown == is_in)[self.first == half].sum()
                for is_in in (True, False)
                for half in (True, False)
            ]
            if min(counts) < FEW:
                why.append(f"'{word}' is shown by {shown.sum()} of {len(shown)} pictures")
                continue
            weight = weights(self.model, ids)[0].flatten().float().cpu().numpy()
            reach = np.where(weight >= 0, self.highest * weight, self.lowest * weight)
            found.append(_Word(word, ids[0], shown, weight, reach, self._said(ids[0], weight, reach)))
        if not found:
            raise DataError(
                f"no word can be measured: {'; '.join(why[:5]) or 'nothing is shown'}; "
                f"a word is a single token that at least {2 * FEW} pictures show and as many do not"
            )
        return found

    def _said(self, token: int, weight: Array, reach: Array) -> Array:
        """The contributions where each caption says a token; `reach` where it does not."""
        found = reach.copy()
        for number, said in enumerate(self.said):
            at = [n for n, own in enumerate(said.ids) if own == token]
            if at:
                active = said.activations[at].flatten(1).float().cpu().numpy()
                found[number] = (active * weight).mean(0)
        return found

    def _best(self, values: Array) -> NDArray[np.int64]:
        return np.argsort(-values, kind="stable")[: self.top]

    def _choose(self, one: _Word) -> None:
        """The neurons of a word by each method, on the first half of the pictures."""
        which = self.first & one.shown
        one.chosen["contribution"] = self._best(one.said[which].mean(0))
        one.chosen["gradient"] = self._best(self._gradient(one, np.flatnonzero(which)))
        one.chosen["activation"] = self._best(self.size[which].mean(0))
        one.chosen["random"] = self._random(one.chosen["contribution"], self._rng(one, "random"))

    def _gradient(self, one: _Word, which: NDArray[np.int64]) -> Array:
        """Gradient times activation where the word is said, meant over some pictures."""
        total, count = np.zeros(self.many), 0
        for number in which[:PATCHED]:
            said = self.said[number]
            if one.token not in said.ids:
                continue
            fed = self._inputs(self.examples[number], said.ids[: said.ids.index(one.token)])
            points = [Point(self.model.speaker, layer, "mlp", "n") for layer in self.layers]
            run = forward(self.model, fed, keep=points, grad=True)
            kept = [run.values[point] for point in points]
            parts = torch.autograd.grad(run.logits[-1, one.token], kept)
            rows = [
                (g[0, -1] * a[0, -1]).detach().float().cpu().numpy() for g, a in zip(parts, kept, strict=True)
            ]
            total, count = total + np.concatenate(rows), count + 1
        return total / max(1, count)

    def _random(self, chosen: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
        """As many other neurons of the same layers."""
        found: list[int] = []
        for layer, many in zip(*np.unique(chosen // self.width, return_counts=True), strict=True):
            free = np.setdiff1d(np.arange(self.width) + layer * self.width, chosen)
            found += draw.choice(free, min(many, len(free)), replace=False).tolist()
        return np.array(found, dtype=np.int64)

    def _by_chance(self, one: _Word, draw: np.random.Generator) -> NDArray[np.bool_]:
        """Labels shuffled over the pictures of each half."""
        labels = one.shown.copy()
        for half in (True, False):
            labels[self.first == half] = draw.permutation(labels[self.first == half])
        return labels

    def _chosen_by_chance(
        self, one: _Word, draws: int, measure: str
    ) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        draw = self._rng(one, measure, "labels")
        labels = [self._by_chance(one, draw) for _ in range(draws)]
        return [(self._best(one.said[self.first & some].mean(0)), some) for some in labels]

    # -- the measures ----------------------------------------------------------------------------

    def _row(
        self,
        one: _Word,
        method: str,
        measure: str,
        value: float,
        *,
        low: float = np.nan,
        high: float = np.nan,
        null: float = np.nan,
        random: float = np.nan,
        p: float = np.nan,
        n: int = 0,
    ) -> dict[str, Any]:
        return {
            "word": one.word,
            "method": method,
            "measure": measure,
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "null": null,
            "random": random,
            "p_value": p,
            "n": n,
        }

    def _sensitivity(self, one: _Word) -> list[dict[str, Any]]:
        nulls = [some for some, _ in self._chosen_by_chance(one, DRAWS, "sensitivity")]
        which, draw = np.flatnonzero(self.first & one.shown), self._rng(one, "sensitivity")
        again = [self._best(one.said[draw.choice(which, len(which))].mean(0)) for _ in range(DRAWS)]
        names = self._named(one, np.unique(np.concatenate([*one.chosen.values(), *nulls, *again])))
        share = lambda some: float(np.mean([names[int(n)] for n in some]))  # noqa: E731
        null = np.array([share(some) for some in nulls])
        low, high = np.quantile([share(some) for some in again], [0.025, 0.975])
        rows = []
        for method, some in one.chosen.items():
            value = share(some)
            row = self._row(
                one, method, "sensitivity", value, random=share(one.chosen["random"]), n=len(some)
            )
            if method == "contribution":
                p = (1 + (null >= value - 1e-12).sum()) / (1 + len(null))
                row |= {"ci_low": low, "ci_high": high, "null": null.mean(), "p_value": p}
            rows.append(row)
        return rows

    def _similarity(self, one: _Word, embed: Embed) -> list[dict[str, Any]]:
        """The mean cosine of a word and the top tokens of its neurons, by a text model."""
        (own,), rows = embed([one.word]), []
        found: dict[str, NDArray[np.float64]] = {}
        for method, some in one.chosen.items():
            places = [(self.layers[int(n) // self.width], int(n) % self.width) for n in some]
            tokens = [[w or "?" for w, _ in top] for top in top_tokens(self.model, places, WORDS)]
            found[method] = np.array([float((embed(top) @ own).mean()) for top in tokens], float)
        for method, values in found.items():
            low, high = self._interval(one, method, "similarity", values)
            rows.append(
                self._row(
                    one,
                    method,
                    "similarity",
                    float(values.mean()),
                    low=low,
                    high=high,
                    random=float(found["random"].mean()),
                    n=len(values),
                )
            )
        return rows

    def _interval(self, one: _Word, method: str, measure: str, values: Array) -> tuple[float, float]:
        own = np.asarray(values, np.float64)[:, None]
        ((low,), (high,)) = bootstrap(own, self._rng(one, measure, method))
        return float(low), float(high)

    def _named(self, one: _Word, some: NDArray[np.int64]) -> dict[int, bool]:
        """Whether the word's token is among the top tokens of each neuron; a few neurons at a time."""
        every = self.model.unembedding(slice(None))
        found: dict[int, bool] = {}
        for place in np.unique(some // self.width):
            columns = self.model.columns(self.layers[int(place)])
            own = some[some // self.width == place]
            for start in range(0, len(own), 256):
                part = own[start : start + 256]
                at = torch.tensor(part % self.width, device=columns.device)
                logits = every.to(columns) @ columns[:, at]
                ahead = (logits > logits[one.token]).sum(0)
                found |= {int(n): bool(a < WORDS) for n, a in zip(part, ahead, strict=True)}
        return found

    def _specificity(self, one: _Word) -> list[dict[str, Any]]:
        held = ~self.first
        shown, rows = one.shown[held], []
        for method, some in one.chosen.items():
            place, values = self._telling(one, some, one.shown), one.reach[np.ix_(held, some)]
            found = {"auc": (_auc, one.reach[held, place]), "selectivity": (_index, values)}
            for measure, (function, own) in found.items():
                value = function(own, shown)
                low, high = _again(function, own, shown, self._rng(one, measure, method))
                row = self._row(one, method, measure, value, low=low, high=high, n=int(held.sum()))
                if method == "contribution":
                    row |= self._against(one, some, measure, value)
                rows.append(row)
        return rows

    def _against(self, one: _Word, some: NDArray[np.int64], measure: str, value: float) -> dict[str, float]:
        """A measure's two nulls: neurons chosen by shuffled labels, and random neurons."""
        held = ~self.first

        def scored(neurons: NDArray[np.int64], labels: NDArray[np.bool_]) -> float:
            if measure == "auc":
                return _auc(one.reach[held, self._telling(one, neurons, labels)], labels[held])
            return _index(one.reach[np.ix_(held, neurons)], labels[held])

        null = np.array([scored(*drawn) for drawn in self._chosen_by_chance(one, DRAWS, measure)])
        draw = self._rng(one, measure, "neurons")
        drawn = np.array([scored(self._random(some, draw), one.shown) for _ in range(DRAWS)])
        # What random neurons tell as well is not theirs: the less likely of both nulls counts.
        p = max((1 + (x >= value - 1e-12).sum()) / (1 + len(x)) for x in (null, drawn))
        return {"null": null.mean(), "random": drawn.mean(), "p_value": p}

    def _telling(self, one: _Word, some: NDArray[np.int64], labels: NDArray[np.bool_]) -> int:
        """The neuron that has the best AUC on the first half of the pictures."""
        first = self.first
        return int(some[np.argmax([_auc(one.reach[first, n], labels[first]) for n in some])])

    def _overlaps(self, one: _Word, others: Sequence[_Word]) -> list[dict[str, Any]]:
        """How many top neurons pictures share: of the same word, and with another word's elsewhere."""
        held = ~self.first
        which = np.concatenate(
            [np.flatnonzero(held & (one.shown == is_in))[: 2 * PATCHED] for is_in in (True, False)]
        )
        tops = self._tops(one.said[which])
        shared, labels = _shared(tops), one.shown[which]
        value = _within(shared, labels)
        draw = self._rng(one, "overlap", "labels")
        null = np.array([_within(shared, draw.permutation(labels)) for _ in range(DRAWS)])
        own, draw = np.flatnonzero(labels), self._rng(one, "overlap")
        drawn = [
            _within(shared[np.ix_(at, at)], None, at)
            for at in (draw.choice(own, len(own)) for _ in range(DRAWS))
        ]
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        # Pictures that are alike share neurons for any token: what counts is how much more for this one.
        excess = value - _within(shared, np.ones(len(labels), bool))
        other_tokens = []
        for token, weight in self._tokens():
            reach = np.where(weight >= 0, self.highest * weight, self.lowest * weight)
            there = _shared(self._tops(self._said(token, weight, reach)[which]))
            other_tokens.append(_within(there, labels) - _within(there, np.ones(len(labels), bool)))
        p = max(
            (1 + (null >= value - 1e-12).sum()) / (1 + len(null)),
            (1 + (np.array(other_tokens) >= excess - 1e-12).sum()) / (1 + len(other_tokens)),
        )
        rows = [
            self._row(
                one,
                "contribution",
                "overlap",
                value,
                low=low,
                high=high,
                null=null.mean(),
                random=self.top / self.many,
                p=p,
                n=len(own),
            )
        ]
        across = [
            np.mean(
                [
                    len(tops[i] & set(self._tops(other.said[which[j]][None])[0])) / self.top
                    for j in np.flatnonzero(~labels & other.shown[which])[:PATCHED]
                ]
            )
            for i in own
            for other in others
            if (~labels & other.shown[which]).any()
        ]
        if across:
            rows.append(
                self._row(
                    one,
                    "contribution",
                    "overlap, others",
                    float(np.mean(across)),
                    random=self.top / self.many,
                    n=len(own),
                )
            )
        return rows

    def _tops(self, reach: Array) -> list[set[int]]:
        """The top neurons of each picture."""
        if self.top >= self.many:
            return [set(range(self.many)) for _ in reach]
        return [set(np.argpartition(-row, self.top)[: self.top].tolist()) for row in reach]

    def _tokens(self) -> Iterator[tuple[int, Array]]:
        """Some tokens drawn from the vocabulary, and their weights."""
        vocabulary = len(self.model.unembedding(slice(None)))
        draw = rng(self.seed, "tokens")
        drawn = draw.choice(vocabulary, min(CONTROLS, vocabulary), replace=False)
        for token in drawn.tolist():
            yield token, weights(self.model, [token])[0].flatten().float().cpu().numpy()

    def _spoken(self, one: _Word) -> list[int]:
        """Some pictures of the second half that show the word, and whose caption says it."""
        both = ~self.first & one.shown
        return [int(n) for n in np.flatnonzero(both) if one.token in self.said[n].ids][:PATCHED]

    def _shuffled(self, one: _Word) -> list[dict[str, Any]]:
        """Top neurons at the word when the image's patches are shuffled."""
        site = replace(self.model.image_site, position="image")
        if site.kind == "output":
            return []  # what is read in no order: cross-attention gives the same, whatever the order
        shared = []
        for number in self._spoken(one):
            said, example = self.said[number], self.examples[number]
            at = said.ids.index(one.token)
            fed = self._inputs(example, said.ids[:at])
            if not fed.layout[site.tower].cells:
                continue  # these tokens have no place in the picture that could be another's
            values = next(iter(self.model.capture(fed, [site]).values()))
            draw = self._rng(one, "overlap, shuffled", "patches", example.id)
            mixed = Edit(site, "set", values[torch.tensor(draw.permutation(len(values)))])
            with editing(self.model, fed, [mixed]):
                again = taught(self.model, said.inputs, fed, said.ids[: at + 1])
            weight = torch.tensor(one.weight)
            tops = [
                set(self._best((x[at].flatten().float().cpu() * weight).numpy()).tolist())
                for x in (said.activations, again.activations)
            ]
            shared.append(len(tops[0] & tops[1]) / self.top)
        if len(shared) < 2:
            return []
        low, high = self._interval(one, "contribution", "overlap, shuffled", np.array(shared))
        return [
            self._row(
                one,
                "contribution",
                "overlap, shuffled",
                float(np.mean(shared)),
                low=low,
                high=high,
                null=self.top / self.many,
                n=len(shared),
            )
        ]

    # -- what happens without the neurons --------------------------------------------------------

    def _causal(self, one: _Word) -> list[dict[str, Any]]:
        numbers = self._spoken(one)
        if len(numbers) < 2:
            return []
        sets: dict[str, list[NDArray[np.int64]]] = {m: [s] for m, s in one.chosen.items() if m != "random"}
        draw = self._rng(one, "drop", "neurons")
        sets["random"] = [self._random(one.chosen["contribution"], draw) for _ in range(OTHERS)]
        sets["null"] = [some for some, _ in self._chosen_by_chance(one, OTHERS, "drop")]
        base = np.array([self._sure(one, n) for n in numbers])
        rows: list[dict[str, Any]] = []
        for how in ("zero", "mean"):
            after = {
                name: np.mean([[self._sure(one, n, some, how) for n in numbers] for some in group], axis=0)
                for name, group in sets.items()
            }
            drops = {name: base - values for name, values in after.items()}
            chance = {name: np.exp(base) - np.exp(values) for name, values in after.items()}
            apart = (drops["contribution"] - drops["null"])[:, None]
            p = sign_flip(apart, self._rng(one, f"drop, {how}", "signs"))[0]
            for measure, table in ((f"drop, {how}", drops), (f"p drop, {how}", chance)):
                for method in METHODS:
                    low, high = self._interval(one, method, measure, table[method])
                    row = self._row(
                        one,
                        method,
                        measure,
                        float(table[method].mean()),
                        low=low,
                        high=high,
                        random=float(table["random"].mean()),
                        n=len(numbers),
                    )
                    if method == "contribution":
                        row |= {
                            "null": float(table["null"].mean()),
                            "p_value": p if table is drops else np.nan,
                        }
                    rows.append(row)
        for method in ("contribution", "random"):
            lost = []
            for n in numbers:
                with ablated(self.model, self._by_layer(sets[method][0])):
                    lost.append(one.token not in say(self.model, self.said[n].inputs).ids)
            low, high = self._interval(one, method, "lost, zero", np.array(lost, float))
            rows.append(
                self._row(one, method, "lost, zero", float(np.mean(lost)), low=low, high=high, n=len(lost))
            )
        return rows

    def perturb(self, words: Sequence[str], tops: Sequence[int], sigmas: Sequence[float]) -> pd.DataFrame:
        """The table of `perturb`."""
        found = self._words(words)
        if lacking := [word for word in words if word not in {one.word for one in found}]:
            raise DataError(
                f"'{lacking[0]}' cannot be measured: it is not a single token that at least "
                f"{2 * FEW} pictures show and as many do not"
            )
        ways = ["zero", "mean", *(f"sigma {s:g}" for s in sigmas)]
        rows, done = [], 0
        with progress(len(found) * len(tops) * len(ways), what="perturbations") as step:
            for one in found:
                numbers = self._spoken(one)
                if not numbers:
                    raise DataError(f"no caption says '{one.word}' where the picture shows it")
                base = np.array([self._sure(one, n) for n in numbers])
                order = one.said[self.first & one.shown].mean(0)
                for k in tops:
                    if not 1 <= k <= self.many:
                        raise DataError(f"the top {k} of {self.many} neurons; expected 1 to {self.many}")
                    self.top = k
                    top = self._best(order)
                    other = self._random(top, self._rng(one, "random", k))
                    for how in ways:
                        for name, some in (("top", top), ("random", other)):
                            draw = self._rng(one, "perturb", k, how, name)
                            row = self._perturbed(one, numbers, base, some, how, draw)
                            rows.append({"word": one.word, "k": k, "how": how, "set": name, **row})
                        done += 1
                        step(0, done)
        return pd.DataFrame(rows)

    def _perturbed(
        self,
        one: _Word,
        numbers: Sequence[int],
        base: Array,
        some: NDArray[np.int64],
        how: str,
        draw: np.random.Generator,
    ) -> dict[str, Any]:
        after, lost = [], []
        for n in numbers:
            with self._without(some, how, n):
                after.append(self._sure(one, n))
                lost.append(one.token not in say(self.model, self.said[n].inputs).ids)
        drop, chance = base - np.array(after), np.exp(base) - np.exp(after)
        (low,), (high,) = bootstrap(chance[:, None], draw)
        return {
            "drop_log_p": drop.mean(),
            "drop_p": chance.mean(),
            "ci_low": low,
            "ci_high": high,
            "lost": np.mean(lost),
            "n": len(numbers),
        }

    @contextmanager
    def _without(self, some: NDArray[np.int64], how: str, number: int) -> Iterator[None]:
        own = self._by_layer(some, how)
        if how.startswith("sigma"):
            columns = {layer: neurons for layer, (neurons, _) in own.items()}
            seed = int(rng(self.seed, "columns", self.examples[number].id).integers(2**63))
            with perturbed(self.model, columns, float(how.split()[1]), seed=seed):
                yield
        else:
            with ablated(self.model, own):
                yield

    def _by_layer(self, some: NDArray[np.int64], how: str = "zero") -> dict[int, tuple[list[int], Tensor]]:
        found: dict[int, tuple[list[int], Tensor]] = {}
        for place in np.unique(some // self.width):
            own = some[some // self.width == place]
            value = self.mean[torch.tensor(own)] if how == "mean" else torch.zeros(len(own))
            found[self.layers[int(place)]] = ((own % self.width).tolist(), value)
        return found

    def _sure(
        self, one: _Word, number: int, without: NDArray[np.int64] | None = None, how: str = "zero"
    ) -> float:
        """The log-probability of the word where the caption says it, with some neurons ablated."""
        said = self.said[number]
        fed = self._inputs(self.examples[number], said.ids[: said.ids.index(one.token)])
        some = {} if without is None else self._by_layer(without, how)
        with ablated(self.model, some):
            logits = self.model.run(fed)
        return float(logits.float().log_softmax(-1)[one.token])


@contextmanager
def ablated(model: Model, neurons: Mapping[int, tuple[Sequence[int], Tensor]]) -> Iterator[None]:
    """Within this context neurons of the tower that speaks are set to a value, at every position."""
    with model.alone(), Hooks() as hooks:
        for layer, (some, value) in neurons.items():

            def change(x: Tensor, some: Sequence[int] = some, value: Tensor = value) -> Tensor:
                x = x.clone()
                x[..., list(some)] = value.to(x)
                return x

            hooks.at(Access(model.down(layer), before=True), change)
        yield


@contextmanager
def perturbed(
    model: Model, neurons: Mapping[int, Sequence[int]], sigma: float, seed: int = 0
) -> Iterator[None]:
    """Within this context σ·N(0, I) is added to neurons' columns, as in Pan et al.; undone bit for bit."""
    drawn = torch.Generator().manual_seed(seed)
    width = model.shapes[model.speaker].width
    columns = {
        layer: (torch.tensor(list(some)), sigma * torch.randn(width, len(some), generator=drawn))
        for layer, some in neurons.items()
    }
    with changed(model, [columns]):
        yield


def _auc(values: Array, labels: NDArray[np.bool_]) -> float:
    """The probability that a picture that shows the word has more of it than one that does not."""
    many = labels.sum()
    ranks = stats.rankdata(values)[labels].sum()
    return float((ranks - many * (many + 1) / 2) / (many * (len(labels) - many)))


def _index(values: Array, labels: NDArray[np.bool_]) -> float:
    with_, without = values[labels].mean(0), values[~labels].mean(0)
    return float(np.mean((with_ - without) / np.clip(np.abs(with_) + np.abs(without), 1e-12, None)))


def _again(
    function: Callable[[Array, NDArray[np.bool_]], float],
    values: Array,
    labels: NDArray[np.bool_],
    draw: np.random.Generator,
) -> tuple[float, float]:
    """The interval of a function of pictures and their labels, pictures drawn anew."""
    found = []
    for _ in range(DRAWS):
        at = draw.integers(len(values), size=len(values))
        if 0 < labels[at].sum() < len(at):
            found.append(function(values[at], labels[at]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _shared(tops: Sequence[set[int]]) -> Array:
    """The share of their top neurons that each two pictures have in common."""
    return np.array([[len(a & b) / len(a) for b in tops] for a in tops])


def _within(shared: Array, labels: NDArray[np.bool_] | None, same: NDArray[np.int64] | None = None) -> float:
    """The mean over pairs of different pictures, of those with the label."""
    if labels is not None:
        shared = shared[np.ix_(labels, labels)]
    pairs = ~np.eye(len(shared), dtype=bool)
    if same is not None:
        pairs = same[:, None] != same[None]
    return float(shared[pairs].mean()) if pairs.any() else np.nan


def _control(p: pd.Series[float]) -> pd.Series[float]:
    """q-values after Benjamini and Hochberg, of those that have a p-value."""
    known = p.notna()
    q = pd.Series(np.nan, index=p.index)
    if known.any():
        q[known] = stats.false_discovery_control(p[known].to_numpy(dtype=float))
    return q

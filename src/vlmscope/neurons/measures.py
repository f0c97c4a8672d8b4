"""Whether neurons are what they seem: measures over a set of pictures, each with a null and an interval.

A word's token chooses its neurons in part by their weights alone, whatever the pictures show. So the null of
a measure is the same measure with the same token, of neurons chosen on pictures that were labelled at
random; random neurons are given beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from vlmscope.checkpoint import embedder
from vlmscope.data import Examples
from vlmscope.models.inputs import Edit
from vlmscope.neurons.ablation import log_probability, loses, without
from vlmscope.neurons.captions import forced_caption
from vlmscope.neurons.contributions import contributions, count_neurons, named, token_weights, top_tokens
from vlmscope.neurons.results import Found
from vlmscope.neurons.words import (
    METHODS,
    PICTURES,
    Array,
    Labels,
    Neurons,
    Study,
    Word,
    best,
    choose,
    contributions_to,
    find_words,
    study,
)
from vlmscope.progress import progress
from vlmscope.runs.forward import editing
from vlmscope.runs.model import Model
from vlmscope.stats import bootstrap, rng, sign_flip

Embed = Callable[[Sequence[str]], Tensor]
Rows = Iterator[dict[str, Any]]
COLUMNS = "word method measure value ci_low ci_high null random p_value n".split()
WORDS = 10
"""How many of a neuron's top tokens are looked at."""
DRAWS = 199
"""How often labels are shuffled for a null."""
CONTROLS = 49
"""How many tokens of the vocabulary a word's overlap is compared with."""
OTHERS = 3
"""How many sets of random neurons, and of neurons chosen by shuffled labels, are ablated."""


class Measured(NamedTuple):
    """The measures of each word (long form), and the neurons that were chosen for it."""

    measures: pd.DataFrame
    chosen: pd.DataFrame


def measure(
    model: Model,
    examples: Examples,
    words: Sequence[str] | None = None,
    *,
    prompt: str | None = None,
    top: int | None = None,
    causal: bool = True,
    embedding: str | Path | None = None,
    pictures: int = PICTURES,
    found: Found | None = None,
    seed: int = 0,
) -> Measured:
    """The measures of the neurons of each word over a set of pictures.

    `prompt` asks for the captions (each example's own by default), unless `found` has them. What a picture
    shows are its labels (`Example.shows`), or the words of its caption where it has none; `words` are by
    default all of these that are a single token for the model and shown by some pictures and not by others.
    `top` is how many neurons are chosen for a word (1 % of all), and the costly measures run on at most
    `pictures` that show it. The table has a row a word, method and measure:

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
    there = study(model, examples, prompt, top=top, pictures=pictures, found=found, seed=seed)
    return measure_study(there, words, causal=causal, embedding=embedding)


def measure_study(
    there: Study, words: Sequence[str] | None, *, causal: bool = True, embedding: str | Path | None = None
) -> Measured:
    """The measures of `measure`, over pictures that are captioned."""
    embed = None if embedding is None else embedder(embedding)
    every = find_words(there, words)
    rows: list[dict[str, Any]] = []
    chosen: list[tuple[Any, ...]] = []
    with progress(len(every), what="words") as step:
        for number, unchosen in enumerate(every):
            word = choose(there, unchosen)
            rows += sensitivity(there, word)
            rows += similarity(there, word, embed) if embed else []
            rows += specificity(there, word)
            rows += overlaps(there, word, [other for other in every if other is not unchosen])
            rows += shuffled_patches(there, word)
            rows += drops(there, word) if causal else []
            for method, neurons in word.chosen.items():
                ranked = enumerate(named(there.model, neurons), start=1)
                chosen += [(word.word, method, rank, *neuron) for rank, neuron in ranked]
            step(0, number + 1)
    table = pd.DataFrame(rows, columns=COLUMNS)
    q = table.groupby(["method", "measure"])["p_value"].transform(_benjamini_hochberg)
    names = ["word", "method", "rank", "layer", "neuron"]
    return Measured(table.assign(q_value=q), pd.DataFrame(chosen, columns=names))


def _row(word: Word, method: str, measure: str, value: float, n: int, **more: float) -> dict[str, Any]:
    return {"word": word.word, "method": method, "measure": measure, "value": value, "n": n, **more}


def _with_interval(study: Study, word: Word, method: str, measure: str, values: Any) -> dict[str, Any]:
    """The mean of some values with its interval."""
    values = np.asarray(values, np.float64)
    (low,), (high,) = bootstrap(values[:, None], study.draw(word, measure, method))
    return _row(word, method, measure, float(np.mean(values)), len(values), ci_low=low, ci_high=high)


def _p_value(null: Any, value: float) -> float:
    """The share of a null that is as large as a value, which is one of them."""
    return float((1 + (np.asarray(null) >= value - 1e-12).sum()) / (1 + len(null)))


# -- by weights: top tokens -----------------------------------------------------------------------


def sensitivity(study: Study, word: Word) -> Rows:
    """The share of the neurons that have the word's token among their top tokens."""
    nulls = [neurons for neurons, _ in study.by_chance(word, DRAWS, "sensitivity")]
    which, generator = np.flatnonzero(study.first & word.shown), study.draw(word, "sensitivity")
    again = [study.strongest(word, generator.choice(which, len(which))) for _ in range(DRAWS)]
    has = _have_token(study, word, np.unique(np.concatenate([*word.chosen.values(), *nulls, *again])))
    random = float(has[word.chosen["random"]].mean())
    null = np.array([has[neurons].mean() for neurons in nulls])
    low, high = np.quantile([has[neurons].mean() for neurons in again], [0.025, 0.975])
    for method, neurons in word.chosen.items():
        row = _row(word, method, "sensitivity", float(has[neurons].mean()), len(neurons), random=random)
        if method == "contribution":
            p = _p_value(null, row["value"])
            row |= {"ci_low": low, "ci_high": high, "null": null.mean(), "p_value": p}
        yield row


def _have_token(study: Study, word: Word, neurons: Neurons) -> Labels:
    """Of all neurons, which of these have the word's token among their top tokens; a few at a time."""
    every, found = study.model.unembedding(slice(None)), np.zeros(count_neurons(study.model), bool)
    for place in np.unique(neurons // study.width):
        columns = study.model.columns(study.layers[place])
        there = neurons[neurons // study.width == place]
        for start in range(0, len(there), 256):
            part = there[start : start + 256]
            logits = every.to(columns) @ columns[:, torch.tensor(part % study.width, device=columns.device)]
            found[part] = ((logits > logits[word.token]).sum(0) < WORDS).cpu().numpy()
    return found


def similarity(study: Study, word: Word, embed: Embed) -> Rows:
    """The mean cosine of a word and the top tokens of its neurons, by a text model."""
    (meaning,) = embed([word.word])
    rows = []
    for method, neurons in word.chosen.items():
        tokens = top_tokens(study.model, named(study.model, neurons), WORDS)
        cosines = [float((embed([w or "?" for w, _ in top]) @ meaning).mean()) for top in tokens]
        rows.append(_with_interval(study, word, method, "similarity", cosines))
    (random,) = (row["value"] for row in rows if row["method"] == "random")
    return ({**row, "random": random} for row in rows)


# -- by activations: which pictures ---------------------------------------------------------------


def specificity(study: Study, word: Word) -> Rows:
    """Whether neurons tell pictures that show the word from others: AUC and selectivity."""
    held, functions = ~study.first, {"auc": _auc_of_best, "selectivity": _selectivity_of}
    for method, neurons in word.chosen.items():
        for measure, function in functions.items():
            score, values = function(study, word, neurons, word.shown)
            value = score(values, word.shown[held])
            low, high = _redrawn(score, values, word.shown[held], study.draw(word, measure, method))
            row = _row(word, method, measure, value, int(held.sum()), ci_low=low, ci_high=high)
            if method == "contribution":
                row |= _nulls(study, word, neurons, measure, function, value)
            yield row


Score = Callable[[Array, Labels], float]


def _auc_of_best(study: Study, word: Word, neurons: Neurons, labels: Labels) -> tuple[Score, Array]:
    """The neuron with the best AUC on the first half of the pictures, on the second."""
    first = study.first
    place = neurons[np.argmax([auc(word.reach[first, n], labels[first]) for n in neurons])]
    return auc, word.reach[~first, place]


def _selectivity_of(study: Study, word: Word, neurons: Neurons, labels: Labels) -> tuple[Score, Array]:
    return selectivity, word.reach[np.ix_(~study.first, neurons)]


def _nulls(
    study: Study, word: Word, neurons: Neurons, measure: str, function: Callable[..., Any], value: float
) -> dict[str, float]:
    """A measure's two nulls: neurons chosen by shuffled labels, and random neurons."""

    def scored(neurons: Neurons, labels: Labels) -> float:
        score, values = function(study, word, neurons, labels)
        return float(score(values, labels[~study.first]))

    null = np.array([scored(*drawn) for drawn in study.by_chance(word, DRAWS, measure)])
    generator = study.draw(word, measure, "neurons")
    random = np.array([scored(study.random(neurons, generator), word.shown) for _ in range(DRAWS)])
    # What random neurons tell as well is not theirs: the less likely of both nulls counts.
    p = max(_p_value(null, value), _p_value(random, value))
    return {"null": null.mean(), "random": random.mean(), "p_value": p}


def auc(values: Array, labels: Labels) -> float:
    """The probability that a picture that shows the word has more of it than one that does not.

    >>> auc(np.array([3.0, 2.0, 1.0, 2.0]), np.array([True, True, False, False]))
    0.875
    """
    count = labels.sum()
    ranks = stats.rankdata(values)[labels].sum()
    return float((ranks - count * (count + 1) / 2) / (count * (len(labels) - count)))


def selectivity(values: Array, labels: Labels) -> float:
    """(with − without) / (|with| + |without|), meant over neurons."""
    with_, without_ = values[labels].mean(0), values[~labels].mean(0)
    return float(np.mean((with_ - without_) / np.clip(np.abs(with_) + np.abs(without_), 1e-12, None)))


def _redrawn(
    score: Score, values: Array, labels: Labels, generator: np.random.Generator
) -> tuple[float, float]:
    """The interval of a function of pictures and their labels, pictures drawn anew."""
    found = []
    for _ in range(DRAWS):
        at = generator.integers(len(values), size=len(values))
        if 0 < labels[at].sum() < len(at):
            found.append(score(values[at], labels[at]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


# -- by contributions: which neurons pictures share ----------------------------------------------


def overlaps(study: Study, word: Word, others: Sequence[Word]) -> Rows:
    """How many top neurons pictures share: of the same word, and with another word's elsewhere."""
    held, most = ~study.first, 2 * study.pictures
    which = np.concatenate([np.flatnonzero(held & (word.shown == is_in))[:most] for is_in in (True, False)])
    tops, labels = _tops(study, word.contribution[which]), word.shown[which]
    shared = shared_neurons(tops)
    value, there = mean_of_pairs(shared, labels), np.flatnonzero(labels)
    generator = study.draw(word, "overlap", "labels")
    null = [mean_of_pairs(shared, generator.permutation(labels)) for _ in range(DRAWS)]
    generator = study.draw(word, "overlap")
    again = [generator.choice(there, len(there)) for _ in range(DRAWS)]
    low, high = np.nanquantile(
        [mean_of_pairs(shared[np.ix_(at, at)], pictures=at) for at in again], [0.025, 0.975]
    )
    # Pictures that are alike share neurons for any token: what counts is how much more for this one.
    excess = value - mean_of_pairs(shared)
    controls = [_excess(study, token, weight, which, labels) for token, weight in _control_tokens(study)]
    chance = study.top / count_neurons(study.model)
    yield _row(
        word,
        "contribution",
        "overlap",
        value,
        len(there),
        ci_low=low,
        ci_high=high,
        null=float(np.mean(null)),
        random=chance,
        p_value=max(_p_value(null, value), _p_value(controls, excess)),
    )
    elsewhere = []
    for other in others:
        places = which[~labels & other.shown[which]][: study.pictures]
        elsewhere.append(_tops(study, other.contribution[places]))
    across = [
        np.mean([len(tops[i] & theirs) / study.top for theirs in group])
        for i in there
        for group in elsewhere
        if group
    ]
    if across:
        value = float(np.mean(across))
        yield _row(word, "contribution", "overlap, others", value, len(there), random=chance)


def _excess(study: Study, token: int, weight: Tensor, which: Neurons, labels: Labels) -> float:
    """How many more top neurons pictures with labels share than all of them do, for a token."""
    _, contribution = contributions_to(study, token, weight)
    shared = shared_neurons(_tops(study, contribution[which]))
    return mean_of_pairs(shared, labels) - mean_of_pairs(shared)


def _tops(study: Study, reach: Array) -> list[set[int]]:
    """The top neurons of each picture."""
    if study.top >= reach.shape[1]:
        return [set(range(reach.shape[1])) for _ in reach]
    return [set(np.argpartition(-row, study.top)[: study.top].tolist()) for row in reach]


def _control_tokens(study: Study) -> Iterator[tuple[int, Tensor]]:
    """Some tokens drawn from the vocabulary, and their weights."""
    vocabulary = len(study.model.unembedding(slice(None)))
    drawn = rng(study.seed, "tokens").choice(vocabulary, min(CONTROLS, vocabulary), replace=False)
    for token in drawn.tolist():
        yield token, token_weights(study.model, [token])[0]


def shared_neurons(tops: Sequence[set[int]]) -> Array:
    """The share of their top neurons that each two pictures have in common.

    >>> shared_neurons([{1, 2}, {2, 3}]).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    return np.array([[len(a & b) / len(a) for b in tops] for a in tops])


def mean_of_pairs(shared: Array, labels: Labels | None = None, *, pictures: Neurons | None = None) -> float:
    """The mean over pairs of different pictures, of those with the label; `pictures` says which they are."""
    if labels is not None:
        shared = shared[np.ix_(labels, labels)]
    there = np.arange(len(shared)) if pictures is None else pictures
    pairs = there[:, None] != there[None]
    return float(shared[pairs].mean()) if pairs.any() else np.nan


def shuffled_patches(study: Study, word: Word) -> Rows:
    """Top neurons at the word when the image's patches are shuffled."""
    model, shared = study.model, []
    site = replace(model.image_site, position="image")
    # In cross-attention what is read has no order: it gives the same, whatever the order.
    for number in study.saying(word) if site.kind != "output" else []:
        caption, example = study.captions[number], study.examples[number]
        at, fed = caption.ids.index(word.token), study.fed(number, word.token)
        if not fed.layout[site.tower].cells:
            continue  # these tokens have no place in the picture that could be another's
        values = next(iter(model.capture(fed, [site]).values()))
        order = study.draw(word, "overlap, shuffled", "patches", example.id).permutation(len(values))
        with editing(model, fed, [Edit(site, "set", values[torch.tensor(order)])]):
            again, _ = forced_caption(model, caption.inputs, fed, caption.ids[: at + 1])
        before, after = (
            set(best(contributions(x, [at], word.weight)[0].float().cpu().numpy(), study.top).tolist())
            for x in (caption, again)
        )
        shared.append(len(before & after) / study.top)
    if len(shared) >= 2:
        row = _with_interval(study, word, "contribution", "overlap, shuffled", shared)
        yield {**row, "null": study.top / count_neurons(model)}


# -- by intervention: what happens without the neurons ---------------------------------------------


def drops(study: Study, word: Word) -> Rows:
    """By how much the word's probability falls without its neurons, and whether the caption loses it."""
    numbers, model = study.saying(word), study.model
    if len(numbers) < 2:
        return
    fed = [study.fed(n, word.token) for n in numbers]
    base = np.array([log_probability(model, inputs, word.token) for inputs in fed])

    def ablated_by(neurons: Neurons, how: str) -> list[float]:
        with without(study, neurons, how):
            return [log_probability(model, inputs, word.token) for inputs in fed]

    sets = {method: [neurons] for method, neurons in word.chosen.items()}
    generator = study.draw(word, "drop", "neurons")
    sets["random"] = [study.random(word.chosen["contribution"], generator) for _ in range(OTHERS)]
    sets["null"] = [neurons for neurons, _ in study.by_chance(word, OTHERS, "drop")]
    for how in ("zero", "mean"):
        after = {
            name: np.mean([ablated_by(neurons, how) for neurons in group], axis=0)
            for name, group in sets.items()
        }
        fell = {name: base - values for name, values in after.items()}
        chance = {name: np.exp(base) - np.exp(values) for name, values in after.items()}
        apart = (fell["contribution"] - fell["null"])[:, None]
        p = float(sign_flip(apart, study.draw(word, f"drop, {how}", "signs"))[0])
        yield from _drop_rows(study, word, f"drop, {how}", fell, p)
        yield from _drop_rows(study, word, f"p drop, {how}", chance, np.nan)
    for method in ("contribution", "random"):
        with without(study, sets[method][0], "zero"):
            lost = [loses(study, word, n) for n in numbers]
        yield _with_interval(study, word, method, "lost, zero", lost)


def _drop_rows(study: Study, word: Word, measure: str, drops: dict[str, Array], p: float) -> Rows:
    for method in METHODS:
        row = _with_interval(study, word, method, measure, drops[method])
        row["random"] = float(drops["random"].mean())
        if method == "contribution":
            row |= {"null": float(drops["null"].mean()), "p_value": p}
        yield row


def _benjamini_hochberg(p: pd.Series[float]) -> pd.Series[float]:
    """q-values of those that have a p-value."""
    known, q = p.notna(), pd.Series(np.nan, index=p.index)
    if known.any():
        q[known] = stats.false_discovery_control(p[known].to_numpy(dtype=float))
    return q

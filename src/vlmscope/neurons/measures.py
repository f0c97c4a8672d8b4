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
from vlmscope.errors import DataError
from vlmscope.models.inputs import Edit
from vlmscope.neurons.captions import forced_caption
from vlmscope.neurons.contributions import contributions, count_neurons, named, token_weights, top_tokens
from vlmscope.neurons.results import Found, Perturbed
from vlmscope.neurons.weight_edit import base_fingerprint
from vlmscope.neurons.words import FEW, PICTURES, Array, Labels, Neurons, Study, Word, best, find_words, study
from vlmscope.progress import progress
from vlmscope.runs.forward import editing
from vlmscope.runs.model import Model
from vlmscope.stats import interval, p_values, q_values, rng, share_interval

Embed = Callable[[Sequence[str]], Tensor]
Rows = Iterator[dict[str, Any]]
COLUMNS = "word method measure value ci_low ci_high null random p_value n".split()
ENDS = (0.025, 0.975)
"""The quantiles that an interval goes from and to."""
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
    default all of these that can be measured. `top` neurons are chosen for a word (1 % of all); the costly
    measures run on at most `pictures` that show it. The table has a row a word, method and measure:

    - `sensitivity`: the share of the neurons among whose 10 top tokens the word's is;
    - `similarity`, with a small text model that is named (`embedding`): the mean cosine of the word and these
      tokens;
    - `auc`: how well the best neuron (best on the first half) tells pictures that show the word from
      others, by how far it moves the word's token;
    - `selectivity`: (with − without) / (|with| + |without|) of that, meant over the neurons;
    - `overlap`: the share of a picture's top neurons for the word that are another's, too, for pictures
      that show it; `overlap, others`: that with the neurons of another word in a picture without it;
    - `overlap, shuffled`: with those of the same picture when its patches are shuffled, where these are
      tokens of the language model (cross-attention reads them in no order; a Q-Former's queries are none);
    - `drop, zero` and `drop, mean`, unless `causal` is false: by how much the log-probability of the word
      falls when the neurons are set to zero, or to their mean; `p drop, zero`: the probability itself;
      `lost, zero`: the share of captions, generated anew, that lose the word.

    `null` is the same of neurons chosen by shuffled labels, `random` of random ones of the same layers;
    `p_value` is against the null, `q_value` after Benjamini and Hochberg over the words.

    Raises `DataError` if no word can be measured: each has to be a single token for the model, and shown by
    some pictures and not by others.
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
        for number, word in enumerate(every, start=1):
            for measured in (
                sensitivity(word),
                similarity(word, embed) if embed else (),
                specificity(word),
                overlaps(word, [other for other in every if other is not word]),
                shuffled_patches(word),
                drops(word) if causal else (),
            ):
                rows += ({"word": word.word, **row} for row in measured)
            for method, neurons in word.chosen.items():
                ranked = enumerate(named(there.model, neurons), start=1)
                chosen += [(word.word, method, rank, *neuron) for rank, neuron in ranked]
            step(0, number)
    table = pd.DataFrame(rows, columns=COLUMNS)
    q = table.groupby(["method", "measure"])["p_value"].transform(q_values)
    names = ["word", "method", "rank", "layer", "neuron"]
    return Measured(table.assign(q_value=q), pd.DataFrame(chosen, columns=names))


def _mean(word: Word, method: str, measure: str, values: Any, **more: float) -> dict[str, Any]:
    """The row of the mean of some values, with its interval."""
    values = np.asarray(values)
    low, high = share_interval(values) if values.dtype == bool else interval(values[:, None])[:, 0]
    row = {"method": method, "measure": measure, "value": float(np.mean(values)), "n": len(values)}
    return row | {"ci_low": low, "ci_high": high, **more}


def _p_value(null: Any, value: float) -> float:
    """The share of a null that is as large as a value, which is one of them."""
    return float((1 + (np.asarray(null) >= value - 1e-12).sum()) / (1 + len(null)))


# -- by weights: top tokens -----------------------------------------------------------------------


def sensitivity(word: Word) -> Rows:
    """The share of the neurons that have the word's token among their top tokens."""
    nulls = [neurons for neurons, _ in word.by_chance(DRAWS, "sensitivity")]
    which, generator = np.flatnonzero(word.study.first & word.shown), word.draw("sensitivity")
    again = [word.strongest(generator.choice(which, len(which))) for _ in range(DRAWS)]
    has = _have_token(word, np.unique(np.concatenate([*word.chosen.values(), *nulls, *again])))
    random, null = float(has[word.chosen["random"]].mean()), has[np.array(nulls)].mean(1)
    low, high = np.quantile(has[np.array(again)].mean(1), ENDS)
    for method, neurons in word.chosen.items():
        value = float(has[neurons].mean())
        row = {"method": method, "measure": "sensitivity", "value": value, "n": len(neurons)}
        row["random"] = random
        if method == "contribution":
            row |= {"ci_low": low, "ci_high": high, "null": null.mean(), "p_value": _p_value(null, value)}
        yield row


def _have_token(word: Word, neurons: Neurons) -> Labels:
    """Of all neurons, which of these have the word's token among their top tokens; a few at a time."""
    study, model = word.study, word.study.model
    every, found = model.unembedding(slice(None)), np.zeros(count_neurons(model), bool)
    for place in np.unique(neurons // study.width):
        columns = model.columns(study.layers[place])
        there = neurons[neurons // study.width == place]
        for start in range(0, len(there), 256):
            part = there[start : start + 256]
            logits = every.to(columns) @ columns[:, torch.tensor(part % study.width, device=columns.device)]
            found[part] = ((logits > logits[word.token]).sum(0) < WORDS).cpu().numpy()
    return found


def similarity(word: Word, embed: Embed) -> Rows:
    """The mean cosine of a word and the top tokens of its neurons, by a text model."""
    (meaning,) = embed([word.word])
    cosines = {}
    for method, neurons in word.chosen.items():
        tokens = top_tokens(word.study.model, named(word.study.model, neurons), WORDS)
        cosines[method] = [float((embed([w or "?" for w, _ in top]) @ meaning).mean()) for top in tokens]
    for method, values in cosines.items():
        yield _mean(word, method, "similarity", values, random=float(np.mean(cosines["random"])))


# -- by activations: which pictures ---------------------------------------------------------------


def specificity(word: Word) -> Rows:
    """Whether neurons tell pictures that show the word from others: AUC and selectivity."""
    held = ~word.study.first
    for method, neurons in word.chosen.items():
        for measure, (reach_of, score) in SPECIFIC.items():
            values, labels = reach_of(word, neurons, word.shown), word.shown[held]
            value = score(values, labels)
            low, high = _redrawn(score, values, labels, word.draw(measure, method))
            row = {"method": method, "measure": measure, "value": value, "n": int(held.sum())}
            row |= {"ci_low": low, "ci_high": high}
            if method == "contribution":
                drawn = word.by_chance(DRAWS, measure)
                null = [score(reach_of(word, *pair), pair[1][held]) for pair in drawn]
                generator = word.draw(measure, "neurons")
                others = (word.study.random(neurons, generator) for _ in range(DRAWS))
                random = [score(reach_of(word, other, word.shown), labels) for other in others]
                # What random neurons tell as well is not theirs: the less likely of both nulls counts.
                p = max(_p_value(null, value), _p_value(random, value))
                row |= {"null": np.mean(null), "random": np.mean(random), "p_value": p}
            yield row


def _reach_of_best(word: Word, neurons: Neurons, labels: Labels) -> Array:
    """On the second half of the pictures, of the neuron with the best AUC on the first."""
    first = word.study.first
    place = neurons[np.argmax([auc(word.reach[first, n], labels[first]) for n in neurons])]
    return word.reach[~first, place]


def _reach(word: Word, neurons: Neurons, labels: Labels) -> Array:
    return word.reach[np.ix_(~word.study.first, neurons)]


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


SPECIFIC = {"auc": (_reach_of_best, auc), "selectivity": (_reach, selectivity)}


def _redrawn(
    score: Callable[[Array, Labels], float], values: Array, labels: Labels, generator: np.random.Generator
) -> Array:
    """The interval of a function of pictures and their labels, pictures drawn anew."""
    drawn = (generator.integers(len(values), size=len(values)) for _ in range(DRAWS))
    found = [score(values[at], labels[at]) for at in drawn if 0 < labels[at].sum() < len(at)]
    return np.quantile(found, ENDS)


# -- by contributions: which neurons pictures share ----------------------------------------------


def overlaps(word: Word, others: Sequence[Word]) -> Rows:
    """How many top neurons pictures share: of the same word, and with another word's elsewhere."""
    study, held = word.study, ~word.study.first
    both = [np.flatnonzero(held & (word.shown == shown))[: 2 * study.pictures] for shown in (True, False)]
    which = np.concatenate(both)
    tops, labels = _tops(study, word.contribution[which]), word.shown[which]
    shared, there = shared_neurons(tops), np.flatnonzero(labels)
    value, chance = mean_of_pairs(shared, labels), study.top / count_neurons(study.model)
    generator = word.draw("overlap", "labels")
    null = [mean_of_pairs(shared, generator.permutation(labels)) for _ in range(DRAWS)]
    generator = word.draw("overlap")
    again = [mean_of_pairs(shared, generator.choice(there, len(there))) for _ in range(DRAWS)]
    low, high = np.nanquantile(again, ENDS)
    # Pictures that are alike share neurons for any token: what counts is how much more for this one.
    excess = value - mean_of_pairs(shared)
    p = max(_p_value(null, value), _p_value(list(_control_excess(study, which, labels)), excess))
    row = {"method": "contribution", "n": len(there), "random": chance}
    own = {"value": value, "ci_low": low, "ci_high": high, "null": np.mean(null), "p_value": p}
    yield row | {"measure": "overlap"} | own
    elsewhere = [which[~labels & other.shown[which]][: study.pictures] for other in others]
    groups = [_tops(study, w.contribution[at]) for w, at in zip(others, elsewhere, strict=True) if len(at)]
    shares = [[[len(tops[i] & theirs) / study.top for theirs in group] for group in groups] for i in there]
    across = [np.mean(group) for groups in shares for group in groups]
    if across:
        yield row | {"measure": "overlap, others", "value": float(np.mean(across))}


def _control_excess(study: Study, which: Neurons, labels: Labels) -> Iterator[float]:
    """How many more top neurons pictures with labels share than all do, for tokens of the vocabulary."""
    vocabulary = len(study.model.unembedding(slice(None)))
    drawn = rng(study.seed, "tokens").choice(vocabulary, min(CONTROLS, vocabulary), replace=False)
    for token in drawn.tolist():
        _, contribution = study.contributions(token, token_weights(study.model, [token])[0])
        shared = shared_neurons(_tops(study, contribution[which]))
        yield mean_of_pairs(shared, labels) - mean_of_pairs(shared)


def _tops(study: Study, contribution: Array) -> list[set[int]]:
    """The top neurons of each picture."""
    return [set(np.argpartition(-row, study.top - 1)[: study.top].tolist()) for row in contribution]


def shared_neurons(tops: Sequence[set[int]]) -> Array:
    """The share of their top neurons that each two pictures have in common.

    >>> shared_neurons([{1, 2}, {2, 3}]).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    return np.array([[len(a & b) / len(a) for b in tops] for a in tops])


def mean_of_pairs(shared: Array, which: Labels | Neurons | slice = slice(None)) -> float:
    """The mean over pairs of different pictures, of those at some places or with a label."""
    there = np.arange(len(shared))[which]
    pairs = shared[np.ix_(there, there)][there[:, None] != there]
    return float(pairs.mean()) if len(pairs) else np.nan


def shuffled_patches(word: Word) -> Rows:
    """Top neurons at the word when the image's patches are shuffled."""
    study, model, shared = word.study, word.study.model, []
    site = replace(model.image_site, position="image")
    # In cross-attention what is read has no order: it gives the same, whatever the order.
    for number, fed in word.said().items() if site.kind != "output" else ():
        caption = study.captions[number]
        if not fed.layout[site.tower].cells:
            continue  # these tokens have no place in the picture that could be another's
        at, (values,) = caption.ids.index(word.token), model.capture(fed, [site]).values()
        draw = word.draw("overlap, shuffled", "patches", study.examples[number].id)
        order = torch.tensor(draw.permutation(len(values)))
        with editing(model, fed, [Edit(site, "set", values[order])]):
            again, _ = forced_caption(model, caption.inputs, fed, caption.ids[: at + 1])
        before, after = (
            set(best(contributions(x, [at], word.weight)[0].float().cpu().numpy(), study.top).tolist())
            for x in (caption, again)
        )
        shared.append(len(before & after) / study.top)
    if len(shared) >= 2:
        chance = study.top / count_neurons(model)
        yield _mean(word, "contribution", "overlap, shuffled", shared, null=chance)


# -- by intervention: what happens without the neurons ---------------------------------------------


def drops(word: Word) -> Rows:
    """By how much the word's probability falls without its neurons, and whether the caption loses it."""
    fed = word.said()
    if len(fed) < 2:
        return
    sets = {method: [neurons] for method, neurons in word.chosen.items()}
    generator = word.draw("drop", "neurons")
    sets["random"] = [word.study.random(word.chosen["contribution"], generator) for _ in range(OTHERS)]
    sets["null"] = [neurons for neurons, _ in word.by_chance(OTHERS, "drop")]
    base = word.log_probabilities(fed)
    for how in ("zero", "mean"):
        after = {
            name: np.mean([word.log_probabilities(fed, neurons, how) for neurons in group], axis=0)
            for name, group in sets.items()
        }
        for measure, scale in ((f"drop, {how}", np.asarray), (f"p drop, {how}", np.exp)):
            fell = {name: scale(base) - scale(values) for name, values in after.items()}
            own = {"null": float(fell["null"].mean())}
            if scale is not np.exp:
                apart = (fell["contribution"] - fell["null"])[:, None]
                own["p_value"] = float(p_values(apart)[0])
            for method in word.chosen:
                row = _mean(word, method, measure, fell[method], random=float(fell["random"].mean()))
                yield row | (own if method == "contribution" else {})
    for method in ("contribution", "random"):
        yield _mean(word, method, "lost, zero", word.lost(fed, sets[method][0], "zero"))


# -- over a range of neurons -----------------------------------------------------------------------


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
    probability with its 95 % interval, and the share of captions, generated anew, that lose the
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
    study, fed = word.study, word.said()
    if not fed:
        raise DataError(f"no caption says '{word.word}' where the picture shows it")
    base = word.log_probabilities(fed)
    top = word.strongest(study.first & word.shown, k)
    sets = {"top": top, "random": study.random(top, word.draw("random", k))}
    for how in ways:
        for name, neurons in sets.items():
            after = word.log_probabilities(fed, neurons, how)
            chance = np.exp(base) - np.exp(after)
            (low,), (high,) = interval(chance[:, None])
            row = {"word": word.word, "k": k, "how": how, "set": name, "drop_log_p": (base - after).mean()}
            row |= {"drop_p": chance.mean(), "ci_low": low, "ci_high": high}
            yield row | {"lost": np.mean(word.lost(fed, neurons, how)), "n": len(fed)}

"""Whether neurons are what they seem: measures over a set of pictures, each with a null and an interval.

The null of a measure is what as many random neurons of the same layers reach, with the true labels, chosen
and measured in the same way: the best of ten random neurons tells pictures apart, too. Where weights alone
decide (`sensitivity`), or pictures share neurons whatever they show (`overlap`), labels are shuffled instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import special
from torch import Tensor

from vlmscope.checkpoint.others import embedder
from vlmscope.data import Examples
from vlmscope.models.inputs import Edit
from vlmscope.neurons.captions import forced_caption
from vlmscope.neurons.contributions import contributions, count_neurons, named, token_weights, top_tokens
from vlmscope.neurons.results import Found
from vlmscope.neurons.words import PICTURES, Array, Labels, Neurons, Recorded, Word, best, recorded
from vlmscope.progress import progress
from vlmscope.runs.forward import editing
from vlmscope.runs.model import Model
from vlmscope.stats import interval, p_values, q_values, ranks, rng, share_interval
from vlmscope.stored import formats

Embed = Callable[[Sequence[str]], Tensor]
Rows = Iterator[dict[str, Any]]
*COLUMNS, _ = formats.NEURONS["describe"].tables["measures.csv"].names
ENDS = (0.025, 0.975)
"""The quantiles that an interval goes from and to."""
WORDS = 10
"""How many of a neuron's top tokens are looked at."""
DRAWS = 199
"""How often neurons are drawn, or labels shuffled, for a null."""
FEWEST = 2
"""Of fewer captions that say a word no drop is measured."""
CONTROLS = 49
"""How many tokens of the vocabulary a word's overlap is compared with."""
OTHERS = 3
"""How many sets of random neurons are ablated."""


class Measured(NamedTuple):
    """The measures of each word (long form), the neurons that were chosen for it, and what was not measured
    (`word`, `measure`, `why`; a word that was not measured at all has an empty `measure`)."""

    measures: pd.DataFrame
    chosen: pd.DataFrame
    left_out: pd.DataFrame


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
      others, by how far it moves the word's token anywhere in what is said; `auc, image`: at the image's
      tokens alone, where the tower that speaks reads such. A neuron may do the first and not the second: it
      says, and does not see;
    - `selectivity`: (with − without) / (|with| + |without|) of that, meant over the neurons;
    - `overlap`: the share of a picture's top neurons for the word that are another's, too, for pictures
      that show it; `overlap, others`: that with the neurons of another word in a picture without it;
    - `overlap, shuffled`: with those of the same picture when its patches are shuffled, where these are
      tokens of the language model (cross-attention reads them in no order; a Q-Former's queries are none);
    - `drop, zero` and `drop, mean`, unless `causal` is false: by how much the log-probability of the word
      falls when the neurons are set to zero, or to their mean; `p drop, zero`: the probability itself;
      `lost, zero`: the share of captions, generated anew, that lose the word. Only where captions lose it do
      these neurons carry it.

    `null` is the mean, and `null_95` the 95th percentile, of as many random neurons of the same layers, with
    the true labels (of `sensitivity` and `overlap`: of shuffled ones; of drops and losses: of `OTHERS` sets);
    `p_value` is against the null, `q_value` after Benjamini and Hochberg over the words. What could not be
    measured is in `left_out`, with the reason.

    Raises `DataError` if no word can be measured: each has to be a single token for the model, and shown by
    some pictures and not by others.
    """
    embed = None if embedding is None else embedder(embedding)
    there = recorded(model, examples, prompt, top=top, pictures=pictures, found=found, seed=seed)
    return measure_study(there, words, causal=causal, embed=embed)


def measure_study(
    there: Recorded, words: Sequence[str] | None, *, causal: bool = True, embed: Embed | None = None
) -> Measured:
    """The measures of `measure`, over pictures that are captioned."""
    every, why = there.find(words)
    rows: list[dict[str, Any]] = []
    chosen: list[tuple[Any, ...]] = []
    left_out = [(word, "", reason) for word, reason in why.items()]
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
            if causal and (count := len(word.said())) < FEWEST:
                held = (~there.first & word.shown).sum()
                reason = f"{count} captions say it, of the {held} held-out pictures that show it"
                left_out.append((word.word, "drop", f"{reason}; {FEWEST} are needed"))
            for method, neurons in word.chosen.items():
                ranked = enumerate(named(there.model, neurons), start=1)
                chosen += [(word.word, method, rank, *neuron) for rank, neuron in ranked]
            step(0, number)
    table = pd.DataFrame(rows, columns=COLUMNS)
    q = table.groupby(["method", "measure"])["p_value"].transform(q_values)
    names = ["word", "method", "rank", "layer", "neuron"]
    reasons = pd.DataFrame(left_out, columns=["word", "measure", "why"])
    return Measured(table.assign(q_value=q), pd.DataFrame(chosen, columns=names), reasons)


def _mean(method: str, measure: str, values: Any, **more: float) -> dict[str, Any]:
    """The row of the mean of some values, with its interval."""
    values = np.asarray(values)
    low, high = share_interval(values) if values.dtype == bool else interval(values[:, None])[:, 0]
    row = {"method": method, "measure": measure, "value": float(np.mean(values)), "n": len(values)}
    return row | {"ci_low": low, "ci_high": high, **more}


def _p_value(null: Any, value: float) -> float:
    """The share of a null that is as large as a value, which is one of them."""
    return float((1 + (np.asarray(null) >= value - 1e-12).sum()) / (1 + len(null)))


def _against(null: Any, value: float) -> dict[str, float]:
    """What a row says of its null."""
    high = float(np.quantile(null, 0.95))
    return {"null": float(np.mean(null)), "null_95": high, "p_value": _p_value(null, value)}


# -- by weights: top tokens -----------------------------------------------------------------------


def sensitivity(word: Word) -> Rows:
    """The share of the neurons that have the word's token among their top tokens."""
    nulls = [neurons for neurons, _ in word.by_chance(DRAWS, "sensitivity")]
    which, generator = np.flatnonzero(word.study.first & word.shown), word.draw("sensitivity")
    again = [word.strongest(generator.choice(which, len(which))) for _ in range(DRAWS)]
    has = _have_token(word, np.unique(np.concatenate([*word.chosen.values(), *nulls, *again])))
    low, high = np.quantile(has[np.array(again)].mean(1), ENDS)
    for method, neurons in word.chosen.items():
        value = float(has[neurons].mean())
        row = {"method": method, "measure": "sensitivity", "value": value, "n": len(neurons)}
        if method == "contribution":
            row |= {"ci_low": low, "ci_high": high, **_against(has[np.array(nulls)].mean(1), value)}
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
        yield _mean(method, "similarity", values, null=float(np.mean(cosines["random"])))


# -- by activations: which pictures ---------------------------------------------------------------


def specificity(word: Word) -> Rows:
    """Whether neurons tell pictures that show the word from others: AUC and selectivity."""
    first, held = word.study.first, ~word.study.first
    labels = word.shown[held]

    def best_of(reach: Array, before: Array, neurons: Neurons) -> Array:
        return reach[held, neurons[np.argmax(before[neurons])]]

    def all_of(reach: Array, neurons: Neurons) -> Array:
        return reach[np.ix_(held, neurons)]

    taken: dict[str, tuple[Callable[[Neurons], Array], Callable[[Array, Labels], Any]]] = {
        f"auc{where}": (partial(best_of, reach, auc(reach[first], word.shown[first])), auc)
        for where, reach in word.reaches.items()
    }
    taken["selectivity"] = partial(all_of, word.reach), selectivity
    for method, neurons in word.chosen.items():
        for measure, (values_of, score) in taken.items():
            values = values_of(neurons)
            value = float(score(values, labels))
            low, high = _redrawn(score, values, labels, word.draw(measure, method))
            row = {"method": method, "measure": measure, "value": value, "n": int(held.sum())}
            row |= {"ci_low": low, "ci_high": high}
            if method == "contribution":
                generator = word.draw(measure, "neurons")
                others = (word.study.random(neurons, generator) for _ in range(DRAWS))
                row |= _against([score(values_of(other), labels) for other in others], value)
            yield row


def auc(values: Array, labels: Labels) -> Array:
    """The probability that a picture that shows the word has more of it than one that does not.

    `values` are `(pictures,)` or `(pictures, neurons)`; so is what comes back, without the pictures.

    >>> float(auc(np.array([3.0, 2.0, 1.0, 2.0]), np.array([True, True, False, False])))
    0.875
    """
    count = labels.sum()
    sums = ranks(values)[labels].sum(0)
    return np.asarray((sums - count * (count + 1) / 2) / (count * (len(labels) - count)))


def selectivity(values: Array, labels: Labels) -> float:
    """(with − without) / (|with| + |without|), meant over neurons."""
    with_, without_ = values[labels].mean(0), values[~labels].mean(0)
    return float(np.mean((with_ - without_) / np.clip(np.abs(with_) + np.abs(without_), 1e-12, None)))


def _redrawn(
    score: Callable[[Array, Labels], Any], values: Array, labels: Labels, generator: np.random.Generator
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
    value = mean_of_pairs(shared, labels)
    generator = word.draw("overlap", "labels")
    null = [mean_of_pairs(shared, generator.permutation(labels)) for _ in range(DRAWS)]
    generator = word.draw("overlap")
    again = [mean_of_pairs(shared, generator.choice(there, len(there))) for _ in range(DRAWS)]
    low, high = np.nanquantile(again, ENDS)
    # Pictures that are alike share neurons for any token: what counts is how much more for this one.
    excess = value - mean_of_pairs(shared)
    p = max(_p_value(null, value), _p_value(list(_control_excess(study, which, labels)), excess))
    row = {"method": "contribution", "n": len(there)}
    own = {"value": value, "ci_low": low, "ci_high": high, **_against(null, value), "p_value": p}
    yield row | {"measure": "overlap"} | own
    elsewhere = [which[~labels & other.shown[which]][: study.pictures] for other in others]
    groups = [_tops(study, w.contribution[at]) for w, at in zip(others, elsewhere, strict=True) if len(at)]
    shares = [[[len(tops[i] & theirs) / study.top for theirs in group] for group in groups] for i in there]
    across = [np.mean(group) for groups in shares for group in groups]
    if across:
        yield row | {"measure": "overlap, others", "value": float(np.mean(across))}


def _control_excess(study: Recorded, which: Neurons, labels: Labels) -> Iterator[float]:
    """How many more top neurons pictures with labels share than all do, for tokens of the vocabulary."""
    vocabulary = len(study.model.unembedding(slice(None)))
    drawn = rng(study.seed, "tokens").choice(vocabulary, min(CONTROLS, vocabulary), replace=False)
    for token in drawn.tolist():
        _, contribution = study.contributions(token, token_weights(study.model, [token])[0])
        shared = shared_neurons(_tops(study, contribution[which]))
        yield mean_of_pairs(shared, labels) - mean_of_pairs(shared)


def _tops(study: Recorded, contribution: Array) -> list[set[int]]:
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
        yield _mean("contribution", "overlap, shuffled", shared, null=chance)


# -- by intervention: what happens without the neurons ---------------------------------------------


def drops(word: Word) -> Rows:
    """By how much the word's probability falls without its neurons, and how many captions lose it."""
    fed = word.said()
    if len(fed) < FEWEST:
        return
    sets = {method: [neurons] for method, neurons in word.chosen.items()}
    generator = word.draw("drop", "neurons")
    sets["random"] = [word.study.random(word.chosen["contribution"], generator) for _ in range(OTHERS)]
    base = word.log_probabilities(fed)
    for how in ("zero", "mean"):
        after = {
            name: np.array([word.log_probabilities(fed, neurons, how) for neurons in group])
            for name, group in sets.items()
        }
        for measure, scale in ((f"drop, {how}", np.asarray), (f"p drop, {how}", np.exp)):
            fell = {name: (scale(base) - scale(values)).mean(0) for name, values in after.items()}
            apart = (fell["contribution"] - fell["random"])[:, None]
            own = {"null": float(fell["random"].mean()), "p_value": float(p_values(apart)[0])}
            for method in word.chosen:
                yield _mean(method, measure, fell[method], **(own if method == "contribution" else {}))
    lost = np.array(word.lost(fed, word.chosen["contribution"], "zero"))
    others = np.array([word.lost(fed, neurons, "zero") for neurons in sets["random"]])
    own = {"null": float(others.mean()), "p_value": more_often(lost, np.asarray(others.any(0)))}
    yield _mean("contribution", "lost, zero", lost, **own)
    yield _mean("random", "lost, zero", others[0])


def more_often(one: Labels, other: Labels) -> float:
    """The p-value that one thing is no more often so than another, on the same pictures (McNemar, exact).

    >>> more_often(np.ones(5, bool), np.zeros(5, bool)), more_often(np.zeros(5, bool), np.zeros(5, bool))
    (0.03125, 1.0)
    """
    only, apart = int((one & ~other).sum()), int((one != other).sum())
    return float(special.bdtrc(only - 1, apart, 0.5)) if apart else 1.0

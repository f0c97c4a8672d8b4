"""How good an edit is, by free generation on other pictures, beside an edit of random columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.neurons.captions import imageless, inputs_of, known, spoken, whole_word
from vlmscope.neurons.cards import SHOWN, small_pictures
from vlmscope.neurons.hallucination import hallucination, questions, says_yes, yes_or_no
from vlmscope.neurons.results import Assessed, Found
from vlmscope.neurons.turns import QUESTION, is_there, options, took
from vlmscope.neurons.weight_edit import WeightEdit, edited
from vlmscope.runs.model import Model
from vlmscope.stats import interval, share_interval
from vlmscope.stored import formats

Asked = list[tuple[Example, str | None]]
"""Pictures and what is asked about them, if not each example's own prompt."""
Values = dict[str, Any]
BLIND = 16
"""How many prompts are asked without a picture, at most."""
CAPTIONS = "captions"
VERDICTS = {
    "word": "an edit of the word, not of the concept: asked whether it is there, the model says as before",
    "concept": "an edit of the concept: asked whether it is there, the model answers otherwise, too",
    "in part": "an edit of the word, and in part of the concept: asked whether it is there, the model says "
    "otherwise of some pictures, or of one of the two",
    "unknown": "of the word or of the concept is not known: the model was not asked whether it is there, or "
    "did not answer rightly before",
}
"""What an edit is called, by what `is_of` says."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """Which captions had the word, which are of the first prompt, and what was said before."""

    source: str
    target: str | None
    has: np.ndarray
    first: np.ndarray
    before: Mapping[str, Sequence[str]]


def assess(
    model: Model,
    edits: Sequence[WeightEdit],
    examples: Examples,
    source: str,
    target: str | None,
    *,
    prompts: Sequence[str | None] = (None,),
    null: Sequence[WeightEdit] = (),
    question: str = QUESTION,
    falsely: bool = False,
    found: Found | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What edits do to what is said about pictures that they were not made on: measures, and the captions.

    The captions have the columns `example, prompt, before, after, has, took, same`: whether the caption
    had the word (`falsely`: of a picture that does not show it), whether it now has the other one instead,
    and whether it is what it was; `found` may have those before. Measures are a `value` with its 95 %
    interval over pictures, what it was `before`, and what it is under `null`, the edits of as many random
    columns (`random`):

    - `generality` (the first prompt) and `generality, other wording`: of the captions that had the word,
      those that took the new one; `only the word`: of these, those in which nothing else has changed;
    - `locality` and `locality, other wording`: of the other captions, those unchanged;
    - `says SOURCE`, `says TARGET`: of all captions of the first prompt;
    - `there is SOURCE`, `there is TARGET`: of the pictures whose caption had the word, those of which the
      `question` whether it is there is answered with yes (of the new word: where the caption had not both);
      `locality, yes or no`: of the others' answers, those unchanged;
    - `which of the two`: of the examples whose own question has the word as its answer, asked with both words
      as the options in both orders, those answered with the new one; `locality, own question`: of the other
      examples' own questions, answers unchanged;
    - `blind prompts changed`: of what is said to these prompts (at most `BLIND`) without a picture, where the
      model takes such;
    - `repetition` and `length`: of the captions, words that repeat the one before, and words relative to
      before (fluency).
    """
    given = listed(examples)
    captions: Asked = [(example, prompt) for prompt in prompts for example in given]
    words = [prompt or example.clean_prompt for example, prompt in captions]
    before = _answers(model, captions, "captions before", found)
    has = np.array([bool(whole_word(source).search(text)) for text in before], bool)
    if falsely:
        has &= np.array([bool(e.shows) and source.casefold() not in e.shows for e, _ in captions], bool)
    both = has & np.array([bool(whole_word(target or source).search(text)) for text in before], bool)
    sets = has[: len(given)], (has & ~both if target else has)[: len(given)]
    others = _questions(given, *sets, source, target, prompts[0], question)
    every = [*words, *(text or e.clean_prompt for asked in others.values() for e, text in asked)]
    blind = [fed for text in list(dict.fromkeys(every)) if (fed := imageless(model, text))][:BLIND]
    first = np.isin(words, words[: len(given)])
    said = {CAPTIONS: before, **_say(model, others, blind)}
    asked = _Asked(source, target, has, first, said)

    def say(what: str, made: Sequence[WeightEdit]) -> dict[str, Sequence[str]]:
        with edited(model, *made):
            return {CAPTIONS: _answers(model, captions, what), **_say(model, others, blind)}

    after = say("captions after", edits)
    random = _values(asked, say("captions, random columns", null)) if null else Values()
    table = pd.DataFrame({"example": [e.id for e, _ in captions], "prompt": words, "before": before})
    table = table.assign(after=after[CAPTIONS], has=has)
    took_it = [took(text, source, target) for text in after[CAPTIONS]]
    table = table.assign(took=has & np.array(took_it, bool), same=table["before"] == table["after"])
    return _measures(_values(asked, after), _values(asked, said), random), table


def _measures(values: Values, before: Values, random: Values) -> pd.DataFrame:
    """A row a measure, beside what it was before the edit and what it is under an edit of random columns."""
    rows = []
    for name, scores in values.items():
        each = np.sort(np.asarray(scores))  # so that the examples' order does not matter
        if len(each):
            low, high = share_interval(each) if each.dtype == bool else interval(each[:, None])[:, 0]
            others = [np.mean(x[name]) if len(x.get(name, ())) else np.nan for x in (before, random)]
            rows.append((name, each.mean(), low, high, len(each), *others))
    return pd.DataFrame(rows, columns=formats.NEURONS["edit"].tables["measures.csv"].names)


def _questions(
    given: Sequence[Example],
    has: np.ndarray,
    has_alone: np.ndarray,
    source: str,
    target: str | None,
    prompt: str | None,
    question: str,
) -> dict[str, Asked]:
    """What is asked beside captions, by the measure that it is for."""
    words = [word for word in (source, target) if word is not None]
    of = {source: has, target: has_alone}
    found: dict[str, Asked] = {
        f"there is {word}": [(given[n], is_there(word, question)) for n in np.flatnonzero(of[word]).tolist()]
        for word in words
    }
    found["locality, yes or no"] = [
        (given[n], is_there(word, question)) for n in np.flatnonzero(~has).tolist() for word in words
    ]
    if target is not None:
        found["which of the two"] = [(e, text) for e in given for text in options(e, source, target)]
    mine = {source.casefold(), (target or source).casefold()}
    if prompt is not None:
        found["locality, own question"] = [
            (e, None) for e in given if not mine & {e.answer.casefold(), e.foil.casefold()}
        ]
    return found


def _say(model: Model, others: Mapping[str, Asked], blind: Sequence[Any]) -> dict[str, Sequence[str]]:
    """What the model says at present to all but the captions."""
    every = [one for group in others.values() for one in group]
    answers = iter(_answers(model, every, "questions"))
    said: dict[str, Sequence[str]] = {name: [next(answers) for _ in x] for name, x in others.items()}
    return said | {"blind prompts changed": [model.answer(fed) for fed in blind]}


def _values(asked: _Asked, after: Mapping[str, Sequence[str]]) -> Values:
    """The scores of every measure: what is said `after`, against what was said before."""
    source, target, has, first = asked.source, asked.target, asked.has, asked.first
    before, now = asked.before[CAPTIONS], np.array(after[CAPTIONS], object)
    old, new = whole_word(source), whole_word(target or source)
    taken = np.array([took(text, source, target) for text in now], bool)
    same = np.array([a == b for a, b in zip(before, now, strict=True)], bool)
    only = np.array([old.sub(target or "", a) == b for a, b in zip(before, now, strict=True)], bool)
    values: Values = {
        "generality": taken[has & first],
        "generality, other wording": taken[has & ~first],
        "only the word": only[has & taken] if target else [],
        "locality": same[~has & first],
        "locality, other wording": same[~has & ~first],
        f"says {source}": [bool(old.search(text)) for text in now[first]],
        **({f"says {target}": [bool(new.search(text)) for text in now[first]]} if target else {}),
    }
    for name, texts in after.items():
        changed = [a != b for a, b in zip(asked.before[name], texts, strict=True)]
        if name.startswith("there is "):
            values[name] = [says_yes(text) for text in texts]
        elif name == "which of the two":
            values[name] = [took(text, source, target) for text in texts]
        elif name.startswith("locality"):
            values[name] = [not one for one in changed]
        elif name != CAPTIONS:
            values[name] = changed
    lengths = [len(b.split()) / max(1, len(a.split())) for a, b in zip(before, now, strict=True)]
    return values | {"repetition": [_repeated(text) for text in now], "length": lengths}


def is_of(measures: pd.DataFrame, source: str, target: str | None) -> str:
    """Whether an edit is one of the `concept`, of the `word` alone, or `in part`; else `unknown`.

    Of the concept, if questions whether the one and the other is there are answered otherwise, too: of the
    shift that there could be, by half at least; of the word, if by less than a quarter. Unknown where the
    model, before the edit, did not say of most pictures that the one is there and the other not.

    >>> names = ["there is red", "there is blue"]
    >>> table = pd.DataFrame({"measure": names, "before": [1.0, 0.0], "value": [0.9, 0.0]})
    >>> is_of(table, "red", "blue"), is_of(table.assign(value=[0.1, 1.0]), "red", "blue")
    ('word', 'concept')
    """
    rows = measures.set_index("measure")
    names = [f"there is {word}" for word in (source, target) if word is not None]
    if not all(name in rows.index for name in names):
        return "unknown"
    was, now = (rows.loc[names, column].to_numpy().copy() for column in ("before", "value"))
    for share in (was, now):
        share[1:] = 1 - share[1:]  # now the share of answers that it leads away from
    if was.min() < 0.5:
        return "unknown"
    shift = (was - now) / was
    return "concept" if shift.min() >= 0.5 else "word" if shift.max() < 0.25 else "in part"


def _answers(model: Model, asked: Asked, what: str, found: Found | None = None) -> list[str]:
    """What the model says, by free generation where it is not known."""
    return [
        model.answer(inputs_of(model, example, prompt)) if caption is None else spoken(model, caption)
        for (example, prompt), caption in zip(asked, known(model, asked, found, what=what), strict=True)
    ]


def _repeated(text: str) -> float:
    words = text.split()
    return sum(a == b for a, b in pairwise(words)) / max(1, len(words) - 1)


def objects(
    model: Model,
    edits: Sequence[WeightEdit],
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    prompt: str | None = None,
    null: Sequence[WeightEdit] = (),
    asked: Sequence[Example] = (),
) -> pd.DataFrame:
    """Objects that are named and not there (`hallucination`), before and after edits, and with `asked`
    answers to whether an object is there (`yes_or_no`): a row a measure, with the columns `before`, `after`
    and, under the edits of random columns (`null`), `random`."""

    def counted() -> dict[str, float]:
        captions = _answers(model, [(example, prompt) for example in examples], "captions")
        found = hallucination(captions, [example.shows for example in examples], names)
        if asked:
            answers = _answers(model, [(example, None) for example in asked], "questions")
            scores = yes_or_no(answers, [example.answer == "yes" for example in asked])
            found |= {f"yes or no: {name}": value for name, value in scores.items()}
        return found

    before = counted()
    with edited(model, *edits):
        after = counted()
    random = dict.fromkeys(before, np.nan)
    if null:
        with edited(model, *null):
            random = counted()
    columns = {"before": before, "after": after, "random": random}
    return pd.DataFrame({"measure": list(before), **{name: x.values() for name, x in columns.items()}})


def describe_edit(
    model: Model,
    made: WeightEdit,
    examples: Examples,
    *,
    null: WeightEdit | None = None,
    prompts: Sequence[str | None] = (None,),
    question: str = QUESTION,
    names: Sequence[str] | None = None,
    found: Found | None = None,
    seed: int = 0,
) -> Assessed:
    """An edit's card: what it changes, and what that does to pictures that it was not made on.

    `measures` and `captions` are those of `assess`, beside the edit of random columns, if given (`null`);
    `about` says whether it `is of` the word or the concept (see `is_of`). `columns` has each changed column's
    length before, and that of the change. `objects` is the table of `objects`, over `names` or, by default,
    all that the examples are known to show; where nothing is known there is none.
    """
    given = listed(examples)
    source, target = made.about.get("from", ""), made.about.get("to") or None
    nulls = [] if null is None else [null]
    falsely = made.about.get("where") == "falsely"
    more: dict[str, Any] = {"prompts": prompts, "question": question, "falsely": falsely, "found": found}
    measures, captions = assess(model, [made], given, source, target, null=nulls, **more)
    counts, names = None, sorted({x for e in given for x in e.shows}) if names is None else names
    if names:
        asked = questions(given, names, question, seed=seed)
        counts = objects(model, [made], given, names, prompt=prompts[0], null=nulls, asked=asked)
    parts = []
    for layer, (neurons, delta) in sorted(made.columns.items()):
        length = model.columns(layer)[:, neurons.to(model.device)].norm(dim=0).cpu()
        part = {"layer": layer, "neuron": neurons, "length": length, "change": delta.norm(dim=0)}
        parts.append(pd.DataFrame(part).astype({"length": float, "change": float}))
    pictured = set(captions.groupby("has").head(SHOWN)["example"])
    about: dict[str, Any] = {"model": model.name, "weights": made.model, **made.about, "digest": made.digest}
    about |= {"on": list(made.on), "neurons": len(made.neurons), "size": made.size}
    kind = is_of(measures, source, target)
    about |= {"is_of": kind, "verdict": VERDICTS[kind]}
    pictures = small_pictures(model, [example for example in given if example.id in pictured])
    return Assessed(about, measures, captions, pd.concat(parts, ignore_index=True), counts, pictures)

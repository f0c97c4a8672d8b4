"""How good an edit is, by free captions of pictures that it was not made on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import ExampleError
from vlmscope.neurons.captions import inputs_of, known, whole_word
from vlmscope.neurons.cards import SHOWN, small_pictures
from vlmscope.neurons.hallucination import hallucination, questions, yes_or_no
from vlmscope.neurons.results import Assessed, Found
from vlmscope.neurons.weight_edit import WeightEdit, edited
from vlmscope.runs.forward import SPEECH
from vlmscope.runs.model import Model
from vlmscope.stats import bootstrap, rng

Asked = Sequence[tuple[Example, str | None]]
"""Pictures and what is asked about them, if not each example's own prompt."""
ALONE = 64
"""How many prompts are asked without a picture, at most."""


def assess(
    model: Model,
    edits: Sequence[WeightEdit],
    examples: Examples,
    source: str,
    target: str | None,
    *,
    prompts: Sequence[str | None] = (None,),
    found: Found | None = None,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What edits do to free captions of pictures that they were not made on: measures, and the captions.

    The captions have the columns `example, prompt, before, after, has, took, same`: whether the caption
    had the word, whether it now has the other one instead, and whether it is what it was; `found` may have
    those before. Measures have an interval over pictures (bootstrap, 95 %):

    - `generality` (the first prompt) and `generality, other wording`: of the captions that had the word,
      those that took the new one;
    - `only the word`: those in which nothing else has changed;
    - `locality` and `locality, other wording`: of the other captions, those unchanged; `locality, no image`:
      of what is said to the same prompts without a picture, where the model takes such;
    - `repetition` and `length`: of the edited captions, words that repeat the one before, and words
      relative to before (fluency).
    """
    given = listed(examples)
    asked = [(example, prompt) for prompt in prompts for example in given]
    alone = list(dict.fromkeys(prompt or example.clean_prompt for example, prompt in asked))[:ALONE]
    before = _answers(model, asked, "captions before", found)
    alone_before = [_without_picture(model, prompt) for prompt in alone]
    with edited(model, *edits):
        after = _answers(model, asked, "captions after")
        alone_after = [_without_picture(model, prompt) for prompt in alone]
    table = pd.DataFrame(
        {
            "example": [example.id for example, _ in asked],
            "prompt": [prompt or example.clean_prompt for example, prompt in asked],
            "before": before,
            "after": after,
        }
    )
    old, new = whole_word(source), whole_word(target or "")
    table["has"] = [bool(old.search(text)) for text in before]
    took = [not old.search(text) and (target is None or bool(new.search(text))) for text in after]
    table["took"] = table["has"] & np.array(took, bool)
    table["same"] = table["before"] == table["after"]
    first = table["prompt"].isin([prompts[0] or example.clean_prompt for example in given])
    pairs = list(zip(before, after, strict=True))
    only = np.array([old.sub(target or "", text) == now for text, now in pairs], bool)
    has = table["has"]
    values: dict[str, Any] = {
        "generality": table.loc[has & first, "took"],
        "generality, other wording": table.loc[has & ~first, "took"],
        "only the word": only[has & table["took"]] if target else [],
        "locality": table.loc[~has & first, "same"],
        "locality, other wording": table.loc[~has & ~first, "same"],
        "locality, no image": [
            text == now
            for text, now in zip(alone_before, alone_after, strict=True)
            if text is not None and not old.search(text)
        ],
        "repetition": [_repeated(text) for text in after],
        "length": [len(now.split()) / max(1, len(text.split())) for text, now in pairs],
    }
    return _with_intervals(values, seed), table


def _with_intervals(values: Mapping[str, Any], seed: int) -> pd.DataFrame:
    """The mean of each measure and its interval, where there is anything to take the mean of."""
    rows = []
    for name, scores in values.items():
        ordered = np.sort(np.asarray(scores, dtype=float))  # so that the examples' order does not matter
        if len(ordered):
            (low,), (high,) = bootstrap(ordered[:, None], rng(seed, name))
            rows.append((name, ordered.mean(), low, high, len(ordered)))
    return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"])


def _answers(model: Model, asked: Asked, what: str, found: Found | None = None) -> list[str]:
    """What the model says, by free generation where it is not known."""
    answers = []
    for (example, prompt), caption in zip(asked, known(model, asked, found, what=what), strict=True):
        if caption is None:
            answers.append(model.answer(inputs_of(model, example, prompt)))
        else:
            tokens = caption.ids[:SPEECH]
            answers.append(model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return answers


def _without_picture(model: Model, prompt: str) -> str | None:
    """What the model says to a prompt alone; None where it takes no prompt without a picture."""
    try:
        return model.answer(model.inputs(None, prompt))
    except ExampleError:
        return None


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
    asked: Sequence[Example] = (),
) -> pd.DataFrame:
    """Objects that are named and not there (`hallucination`), before and after edits, and with `asked`
    answers to whether an object is there (`yes_or_no`): a row a measure, with the columns `before` and
    `after`."""
    before = _count_objects(model, examples, names, prompt, asked)
    with edited(model, *edits):
        after = _count_objects(model, examples, names, prompt, asked)
    columns = {"measure": list(before), "before": list(before.values()), "after": list(after.values())}
    return pd.DataFrame(columns)


def _count_objects(
    model: Model,
    examples: Sequence[Example],
    names: Sequence[str],
    prompt: str | None,
    asked: Sequence[Example],
) -> dict[str, float]:
    captions = _answers(model, [(example, prompt) for example in examples], "captions")
    found = hallucination(captions, [example.shows for example in examples], names)
    if asked:
        answers = _answers(model, [(example, None) for example in asked], "questions")
        scores = yes_or_no(answers, [example.answer == "yes" for example in asked])
        found |= {f"yes or no: {name}": value for name, value in scores.items()}
    return found


def describe_edit(
    model: Model,
    made: WeightEdit,
    examples: Examples,
    *,
    prompts: Sequence[str | None] = (None,),
    names: Sequence[str] = (),
    found: Found | None = None,
    seed: int = 0,
) -> Assessed:
    """An edit's card: what it changes, and what that does to pictures that it was not made on.

    `measures` and `captions` are those of `assess`; `columns` has each changed column's length before, and
    that of the change; with `names` of objects that examples say they show, `objects` is the table of
    `objects`.
    """
    given = listed(examples)
    source, target = made.about.get("from", ""), made.about.get("to") or None
    measures, captions = assess(model, [made], given, source, target, prompts=prompts, found=found, seed=seed)
    counts = None
    if names:
        asked = questions(given, names, seed=seed)
        counts = objects(model, [made], given, names, prompt=prompts[0], asked=asked)
    columns = [
        (layer, int(n), float(length), float(change))
        for layer, (neurons, delta) in sorted(made.columns.items())
        for n, length, change in zip(
            neurons,
            model.columns(layer)[:, neurons.to(model.device)].norm(dim=0),
            delta.norm(dim=0),
            strict=True,
        )
    ]
    shown = [captions[is_one]["example"].head(SHOWN) for is_one in (captions["has"], ~captions["has"])]
    pictured = {*shown[0], *shown[1]}
    about = {
        "model": model.name,
        "weights": made.model,
        **made.about,
        "digest": made.digest,
        "on": list(made.on),
        "neurons": len(made.neurons),
        "size": made.size,
    }
    return Assessed(
        about,
        measures,
        captions,
        pd.DataFrame(columns, columns=["layer", "neuron", "length", "change"]),
        counts,
        small_pictures(model, [example for example in given if example.id in pictured]),
    )

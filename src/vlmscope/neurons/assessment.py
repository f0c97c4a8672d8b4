"""How good an edit is, by free captions of pictures that it was not made on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.neurons.captions import imageless, inputs_of, known, whole_word
from vlmscope.neurons.cards import SHOWN, small_pictures
from vlmscope.neurons.hallucination import hallucination, questions, yes_or_no
from vlmscope.neurons.results import Assessed, Found
from vlmscope.neurons.weight_edit import WeightEdit, edited
from vlmscope.runs.forward import SPEECH
from vlmscope.runs.model import Model
from vlmscope.stats import interval, share_interval

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
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What edits do to free captions of pictures that they were not made on: measures, and the captions.

    The captions have the columns `example, prompt, before, after, has, took, same`: whether the caption
    had the word, whether it now has the other one instead, and whether it is what it was; `found` may have
    those before. Measures have a 95 % interval over pictures:

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
    words = [prompt or example.clean_prompt for example, prompt in asked]
    blind = [fed for text in list(dict.fromkeys(words))[:ALONE] if (fed := imageless(model, text))]
    before, blind_before = _answers(model, asked, "captions before", found), list(map(model.answer, blind))
    with edited(model, *edits):
        after, blind_after = _answers(model, asked, "captions after"), list(map(model.answer, blind))
    ids = [example.id for example, _ in asked]
    table = pd.DataFrame({"example": ids, "prompt": words, "before": before, "after": after})
    old, new = whole_word(source), whole_word(target or "")
    has = np.array([bool(old.search(text)) for text in before], bool)
    took = [not old.search(text) and (target is None or bool(new.search(text))) for text in after]
    table = table.assign(has=has, took=has & np.array(took, bool), same=table["before"] == table["after"])
    first = np.isin(words, words[: len(given)])
    pairs, blind_pairs = list(zip(before, after, strict=True)), zip(blind_before, blind_after, strict=True)
    only = np.array([old.sub(target or "", text) == now for text, now in pairs], bool)
    values: dict[str, Any] = {
        "generality": table["took"][has & first],
        "generality, other wording": table["took"][has & ~first],
        "only the word": only[table["took"]] if target else [],
        "locality": table["same"][~has & first],
        "locality, other wording": table["same"][~has & ~first],
        "locality, no image": [text == now for text, now in blind_pairs if not old.search(text)],
        "repetition": [_repeated(text) for text in after],
        "length": [len(now.split()) / max(1, len(text.split())) for text, now in pairs],
    }
    rows = []
    for name, scores in values.items():
        each = np.sort(np.asarray(scores))  # so that the examples' order does not matter
        if len(each):
            low, high = share_interval(each) if each.dtype == bool else interval(each[:, None])[:, 0]
            rows.append((name, each.mean(), low, high, len(each)))
    return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n"]), table


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
    return pd.DataFrame({"measure": list(before), "before": before.values(), "after": after.values()})


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
    measures, captions = assess(model, [made], given, source, target, prompts=prompts, found=found)
    counts = None
    if names:
        asked = questions(given, names, seed=seed)
        counts = objects(model, [made], given, names, prompt=prompts[0], asked=asked)
    parts = []
    for layer, (neurons, delta) in sorted(made.columns.items()):
        length = model.columns(layer)[:, neurons.to(model.device)].norm(dim=0).cpu()
        part = {"layer": layer, "neuron": neurons, "length": length, "change": delta.norm(dim=0)}
        parts.append(pd.DataFrame(part).astype({"length": float, "change": float}))
    pictured = set(captions.groupby("has").head(SHOWN)["example"])
    about: dict[str, Any] = {"model": model.name, "weights": made.model, **made.about, "digest": made.digest}
    about |= {"on": list(made.on), "neurons": len(made.neurons), "size": made.size}
    pictures = small_pictures(model, [example for example in given if example.id in pictured])
    return Assessed(about, measures, captions, pd.concat(parts, ignore_index=True), counts, pictures)

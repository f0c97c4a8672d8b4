"""Objects that a model names and a picture does not show: counted (CHAIR) and asked for (POPE)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import pandas as pd

from vlmscope.data.example import Example
from vlmscope.neurons.captions import whole_word
from vlmscope.neurons.turns import QUESTION, is_there
from vlmscope.stats import rng


def hallucination(
    captions: Sequence[str], shown: Sequence[frozenset[str]], objects: Iterable[str]
) -> dict[str, float]:
    """Objects that captions name and pictures do not show, as CHAIR counts them.

    `chair_i` is the share of the objects named that are not there, `chair_s` the share of captions that
    name any such, `precision` is 1 − `chair_i`, and `recall` the share of the objects shown that are named
    (Rohrbach et al. 2018, arXiv 1809.02156). An object counts once a caption.

    >>> found = hallucination(["a cat and a dog"], [frozenset({"cat", "owl"})], ["cat", "dog", "owl"])
    >>> found["chair_i"], found["chair_s"], found["recall"]
    (0.5, 1.0, 0.5)
    """
    names = {name.casefold() for name in objects}
    named = [_named(text, names) for text in captions]
    true = [names & there for there in shown]
    wrong = [a - b for a, b in zip(named, true, strict=True)]
    right = sum(len(a & b) for a, b in zip(named, true, strict=True))
    count, there = sum(map(len, named)), sum(map(len, true))
    chair = sum(map(len, wrong)) / count if count else 0.0
    return {
        "chair_i": chair,
        "chair_s": sum(map(bool, wrong)) / max(1, len(captions)),
        "precision": 1 - chair,
        "recall": right / there if there else 0.0,
    }


def falsely_named(
    captions: Sequence[str], shown: Sequence[frozenset[str]], objects: Iterable[str]
) -> pd.DataFrame:
    """How often captions name each object: of pictures that show it, and of others; most often falsely first.

    >>> cats = [frozenset({"cat"})] * 3
    >>> falsely_named(["a cat", "a dog", "a dog"], cats, ["cat", "dog"]).to_numpy().tolist()
    [['dog', 0, 2], ['cat', 1, 0]]
    """
    rows = []
    for name in dict.fromkeys(name.casefold() for name in objects):
        is_named = [name in _named(text, {name}) for text in captions]
        rightly = sum(named and name in there for named, there in zip(is_named, shown, strict=True))
        rows.append((name, rightly, sum(is_named) - rightly))
    table = pd.DataFrame(rows, columns=["object", "rightly", "falsely"])
    return table.sort_values("falsely", ascending=False, kind="stable", ignore_index=True)


def _named(text: str, names: Iterable[str]) -> set[str]:
    return {o for o in names if whole_word(o).search(text) or whole_word(f"{o}s").search(text)}


def says_yes(answer: str) -> bool:
    """
    >>> says_yes("Yes, there is."), says_yes("yesterday")
    (True, False)
    """
    return re.match(r"\W*yes\b", answer, re.IGNORECASE) is not None


def yes_or_no(answers: Sequence[str], truth: Sequence[bool]) -> dict[str, float]:
    """Answers to whether an object is there, as POPE scores them (Li et al. 2023, arXiv 2305.10355).

    Yes is the class that counts: `accuracy`, `precision`, `recall`, `f1`, and `yes`, the share of yes.

    >>> yes_or_no(["yes", "Yes, there is.", "no"], [True, False, False])["precision"]
    0.5
    """
    yes = list(map(says_yes, answers))
    both = sum(a and b for a, b in zip(yes, truth, strict=True))
    precision, recall = both / max(1, sum(yes)), both / max(1, sum(truth))
    return {
        "accuracy": sum(a == b for a, b in zip(yes, truth, strict=True)) / max(1, len(yes)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-12, precision + recall),
        "yes": sum(yes) / max(1, len(yes)),
    }


def questions(
    examples: Sequence[Example],
    objects: Sequence[str],
    template: str = QUESTION,
    *,
    absent: Literal["random", "popular", "adversarial"] = "random",
    seed: int = 0,
) -> list[Example]:
    """A question for an object that each picture shows, and one for an object that it does not.

    The absent one is drawn at random, or is the most shown elsewhere (`popular`), or the one that is most
    often shown beside what the picture shows (`adversarial`), as POPE draws them.

    >>> one = Example("1", "a.png", "?", "a", "b", shows=frozenset({"circle"}))
    >>> [(q.clean_prompt, q.answer) for q in questions([one], ["circle", "square"])]
    [('does this picture show a circle?', 'yes'), ('does this picture show a square?', 'no')]
    """
    objects = list(dict.fromkeys(name.casefold() for name in objects))
    shown = [example.shows & {*objects} for example in examples]
    common = Counter(name for there in shown for name in there)
    beside = Counter((name, other) for there in shown for name in there for other in there - {name})
    found = []
    for example, there in zip(examples, shown, strict=True):
        missing = [name for name in objects if name not in there]
        if not there or not missing:
            continue
        draw = rng(seed, "questions", example.id)
        named, drawn = str(draw.choice(sorted(there))), str(draw.choice(missing))
        if absent == "popular":
            drawn = max(missing, key=common.__getitem__)
        elif absent == "adversarial":
            together = {name: sum(beside[other, name] for other in there) for name in missing}
            drawn = max(missing, key=together.__getitem__)
        for name, answer, foil in ((named, "yes", "no"), (drawn, "no", "yes")):
            asked, id_ = is_there(name, template), f"{example.id}-{name}"
            found.append(Example(id_, example.clean_image, asked, answer, foil, shows=example.shows))
    return found

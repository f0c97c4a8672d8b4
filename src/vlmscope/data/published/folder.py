"""Your own images, in a folder for each label: "is this a cat or a dog?".

`ROOT/{label}/*.jpg`, two labels or more, of any words. The corrupt image is one of another label. A file
`prompt.txt` in the root may hold another question with `{x}` and `{y}` where the options stand; "a {x}"
becomes "an {x}" by sound, and loses its article before a plural. The result is meant to be written as a
CSV, which can then be edited.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmscope import files
from vlmscope.data.example import Example
from vlmscope.data.published.layout import folders_in, images_in, looks_like
from vlmscope.data.published.sampling import Source, label_examples
from vlmscope.data.questions import in_order
from vlmscope.data.questions.english import article
from vlmscope.data.questions.synonyms import near
from vlmscope.errors import DataError, shown

LONGEST = 1_000
"""Characters of a question."""
QUESTION = "is this a {x} or a {y}?"


def load(source: Source) -> list[Example]:
    """The examples of the label folders; what was left out is counted in `source`."""
    root, question = source.root, read_question(source.root)
    images = {folder.name.replace("_", " ").strip(): images_in(folder) for folder in folders_in(root)}
    labels = {label: files for label, files in images.items() if files}
    good = [label for label in sorted(labels) if any(map(source.is_readable, labels[label]))]
    if len(good) < 2:
        other = looks_like(root)
        hint = f"; it looks like {other}: ask for {other}" if other else ""
        raise DataError(
            f"{root}: {len(good)} folders with images that can be read"
            f"{f' ({shown(good[0])})' if good else ''}; expected two labels or more, such as "
            f"{root.name}/cat/1.jpg and {root.name}/dog/1.jpg{hint}"
        )
    return ask_labels(source, labels, question, "label")


def read_question(root: Path) -> str:
    """The question in `prompt.txt`, or the one there is without it."""
    path = root / "prompt.txt"
    if not os.path.lexists(path):
        return QUESTION
    try:
        text = " ".join(files.read(path, "a question").decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read ({error}); expected UTF-8 text") from error
    if len(text) > LONGEST or not text.isprintable():
        raise DataError(
            f"{path}: {len(text):,} characters; expected a question of at most {LONGEST:,}, in letters that "
            "can be printed"
        )
    if text.count("{x}") != 1 or text.count("{y}") != 1:
        raise DataError(
            f"{path}: {shown(text)} must hold {{x}} and {{y}} once each, where the options stand; "
            f"for example {QUESTION!r}"
        )
    return text


def fill(question: str, first: str, second: str) -> str:
    """The question with its two options, each with the article it needs.

    >>> fill(QUESTION, "owl", "cat"), fill("is it {x} or {y}?", "open", "shut")
    ('is this an owl or a cat?', 'is it open or shut?')
    """
    options = {"x": first, "y": second}

    def put(found: re.Match[str]) -> str:
        word = options[found["slot"]]
        before = article(word) if found["article"] else ""
        return f"{before} {word}".strip()

    return re.sub(r"(?P<article>\ban? )?\{(?P<slot>[xy])\}", put, question)


def ask_labels(
    source: Source, labels: Mapping[str, Sequence[Path]], question: str, kind: str
) -> list[Example]:
    """Examples that ask which of two labels an image has; the answers are balanced over labels."""

    def rivals(label: str, path: Path) -> list[str]:
        others = [one for one in sorted(labels) if one != label and not near(one, label)]
        return source.shuffled(others, source.seed, label, path.name)

    def ask(label: str, foil: str, order: str) -> dict[str, Any]:
        prompt = fill(question, *in_order(order, label, foil))
        groups = {"kind": kind, "order": order, "label": label}
        return {"clean_prompt": prompt, "answer": label, "foil": foil, "groups": groups}

    groups = {label: [label] for label in sorted(labels)}
    return label_examples(source, source.name, labels, groups, rivals, ask, "another label")

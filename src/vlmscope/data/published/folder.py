"""Your own images, in a folder for each label: "is this a cat or a dog?".

`ROOT/{label}/*.jpg`, two labels or more, of any words. The corrupt image is one of another label.
A file `prompt.txt` in the root may hold another question with `{x}` and `{y}` where the options
stand; "a {x}" becomes "an {x}" by sound, and loses its article before a plural. The result is
meant to be written as a CSV, which can then be edited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlmscope.data.example import Example
from vlmscope.data.published.layout import Pictures, count, folders_in, images_in, looks_like
from vlmscope.data.published.sampling import Decks, balanced, example, in_order, shuffled
from vlmscope.data.questions.english import article
from vlmscope.data.questions.synonyms import near
from vlmscope.errors import DataError

NAME = "folder"
SIZE = 500
TEMPLATE = "is this a {x} or a {y}?"
NO_FOIL = "no image of another label is left"


def load(root: Path, limit: int | None, seed: int, dropped: dict[str, int]) -> list[Example]:
    """The examples of the label folders in `root`; what was left out is counted in `dropped`."""
    template = read_template(root)
    labels = {folder.name.replace("_", " ").strip(): images_in(folder) for folder in folders_in(root)}
    labels = {label: files for label, files in labels.items() if files}
    pictures = Pictures(dropped)
    good = [label for label in sorted(labels) if any(map(pictures.readable, labels[label]))]
    if len(good) < 2:
        other = looks_like(root)
        hint = f"; it looks like {other}: ask for {other}" if other else ""
        raise DataError(
            f"{root}: {len(good)} folders with images that can be read"
            f"{f' ({good[0]!r})' if good else ''}; expected two labels or more, such as "
            f"{root.name}/cat/1.jpg and {root.name}/dog/1.jpg{hint}"
        )

    def ask(first: str, second: str) -> str:
        return fill(template, first, second)

    return pair_labels(NAME, labels, ask, pictures, limit=limit, seed=seed, dropped=dropped, kind="label")


def read_template(root: Path) -> str:
    """The question in `prompt.txt`, or the one there is without it."""
    path = root / "prompt.txt"
    if not path.is_file():
        return TEMPLATE
    try:
        text = " ".join(path.read_text("utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected UTF-8 text") from error
    if text.count("{x}") != 1 or text.count("{y}") != 1:
        raise DataError(
            f"{path}: {text!r} must hold {{x}} and {{y}} once each, where the options stand; "
            f"for example {TEMPLATE!r}"
        )
    return text


def fill(template: str, first: str, second: str) -> str:
    """The question with its two options, each with the article it needs.

    >>> fill(TEMPLATE, "owl", "cat"), fill("is it {x} or {y}?", "open", "shut")
    ('is this an owl or a cat?', 'is it open or shut?')
    """
    options = {"x": first, "y": second}

    def put(found: re.Match[str]) -> str:
        word = options[found["slot"]]
        before = article(word) if found["article"] else ""
        return f"{before} {word}".strip()

    return re.sub(r"(?P<article>\ban? )?\{(?P<slot>[xy])\}", put, template)


def pair_labels(
    name: str,
    labels: Mapping[str, Sequence[Path]],
    ask: Callable[[str, str], str],
    pictures: Pictures,
    *,
    limit: int | None,
    seed: int,
    dropped: dict[str, int],
    kind: str,
) -> list[Example]:
    """Examples that ask which of two labels an image has; the answers are balanced over labels.

    An image is the clean one at most once, and no pair of images comes twice.
    """
    decks = Decks(labels, pictures, name, "foils", seed)
    items = {
        label: shuffled(((label, path) for path in files), name, label, seed)
        for label, files in sorted(labels.items())
    }

    def make(item: tuple[str, Path]) -> tuple[Path, Path, str] | None:
        label, path = item
        if not pictures.readable(path):
            return None
        others = [one for one in sorted(labels) if one != label and not near(one, label)]
        found = decks.partner(path, shuffled(others, name, seed, label, path.name))
        if found is None:
            count(dropped, NO_FOIL)
            return None
        return path, found[1], found[0]

    examples: list[Example] = []
    for one in balanced(items, make, size=SIZE, limit=limit, dropped=dropped):
        clean, corrupt, foil = one.made
        examples.append(
            example(
                f"{name}-{one.group.replace(' ', '-')}-{clean.stem}-{foil.replace(' ', '-')}",
                (clean, corrupt),
                ask(*in_order(one.order, one.group, foil)),
                (one.group, foil),
                groups={"kind": kind, "order": one.order, "label": one.group},
            )
        )
    return examples

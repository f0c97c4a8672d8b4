"""CLEVR: yes/no questions about where things stand, "Is the large red cube left of the ...?".

As published with the BLIP tracing paper (Palit et al., arXiv 2308.14179): a CSV file with
`Image_IDs` and, in one cell, `Questions_Answers`, a Python list of questions and answers (1 is
yes). The images are CLEVR's: `images/val/CLEVR_val_000145.png`, `val/`, `images/` or the root.

The corrupt image is one whose own questions hold the same text with the other answer; where there
is none the example has no corrupt image. The corrupt prompt swaps the two objects, which keeps
all words and turns the answer around; where that would not align, "left" and "right" are swapped.
"""

from __future__ import annotations

import ast
import random
import re
from dataclasses import dataclass
from pathlib import Path

from vlmscope.data.example import Example
from vlmscope.data.published.layout import Pictures, by_stem, count, header_of, not_here, read_table
from vlmscope.data.published.sampling import Drawn, balanced, example, shuffled
from vlmscope.data.questions.replacement import aligned
from vlmscope.errors import DataError

NAME = "clevr"
SIZE = 500
COLUMNS = ("Image_IDs", "Questions_Answers")
PLACES = ("images/val", "val", "images", "")
ANSWERS = {1: "yes", 0: "no"}
OTHER = {"yes": "no", "no": "yes"}
# In turns, so that kinds and answers differ by at most one wherever a limit cuts.
CELLS = (
    *(("left", "yes"), ("right", "no"), ("behind", "yes"), ("front", "no")),
    *(("left", "no"), ("right", "yes"), ("behind", "no"), ("front", "yes")),
)

BAD_CELL = "a cell that is no list of questions and answers"
OTHER_QUESTION = "a question of another form than 'Is the ... left of the ...?'"
CLASH = "the image has the same question twice, or its reverse with the same answer"
MISSING = "the image is not there"
PAIRED = "every image with the other answer is already its pair, or cannot be read"

_QUESTION = re.compile(
    r"Is the (?P<object>[^?]+?) (?P<relation>right of|left of|behind|in front of) "
    r"the (?P<other>[^?]+)\?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """One question about one image."""

    image: str
    number: int
    question: str
    relation: str
    answer: str


def load(root: Path, limit: int | None, seed: int, dropped: dict[str, int]) -> list[Example]:
    """The examples of the tables in `root`; why questions were dropped is counted in `dropped`."""
    rows = read_rows(root, dropped)
    files = by_stem(root / place for place in PLACES)
    kept = [row for row in rows if row.image in files]
    if rows and not kept:
        raise DataError(
            f"{root}: none of the images of the table; expected CLEVR's, such as "
            f"images/val/{rows[0].image}.png; unpack CLEVR_v1.0 there"
        )
    count(dropped, MISSING, len(rows) - len(kept))
    answered: dict[tuple[str, str], list[str]] = {}
    for row in kept:
        answered.setdefault((row.question, row.answer), []).append(row.image)
    items = {
        f"{relation}, {answer}": _with_pairs_first(
            [row for row in kept if (row.relation, row.answer) == (relation, answer)], answered, seed
        )
        for relation, answer in CELLS
    }
    pictures = Pictures(dropped)
    used: set[tuple[str, frozenset[str]]] = set()

    def make(row: Row) -> tuple[Row, str | None] | None:
        if not pictures.readable(files[row.image]):
            return None
        others = list(answered.get((row.question, OTHER[row.answer]), []))
        random.Random(f"{NAME}/{seed}/{row.image}/{row.question}").shuffle(others)
        for other in others:
            key = (row.question, frozenset((row.image, other)))
            if key not in used and pictures.readable(files[other]):
                used.add(key)
                return row, other
        if others:
            count(dropped, PAIRED)
            return None
        return row, None

    drawn = balanced(items, make, size=SIZE // 2, limit=limit, dropped=dropped)
    return [_example(one, files) for one in drawn]


def read_rows(root: Path, dropped: dict[str, int]) -> list[Row]:
    """The questions of the tables, in their order."""
    tables = [
        path
        for path in sorted(root.glob("*.csv"))
        if "clevr" in path.name.lower() or COLUMNS[1] in header_of(path)
    ]
    if not tables:
        raise not_here(NAME, root, "file named clevr*.csv")
    rows: list[Row] = []
    for path in tables:
        for cells in read_table(path, COLUMNS):
            asked = parse_cell(cells["Questions_Answers"])
            if asked is None:
                count(dropped, BAD_CELL)
                continue
            rows += _rows(cells["Image_IDs"], asked, dropped)
    return rows


def parse_cell(cell: str) -> list[tuple[str, str]] | None:
    """The questions and answers in a cell, which holds a Python literal; None if it does not.

    >>> parse_cell("[{'question': 'Is the cube behind the ball?', 'answer': 1}]")
    [('Is the cube behind the ball?', 'yes')]
    >>> parse_cell("print(1)")
    """
    try:
        value = ast.literal_eval(cell)
        return [(" ".join(str(one["question"]).split()), ANSWERS[one["answer"]]) for one in value]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return None


def swap_objects(question: str) -> str | None:
    """The same question about the other object, whose answer is the other one.

    >>> swap_objects("Is the red cube left of the small ball?")
    'Is the small ball left of the red cube?'
    """
    found = _QUESTION.fullmatch(question)
    if not found:
        return None
    return f"{question[:7]}{found['other']} {found['relation']} the {found['object']}?"


def turn_around(question: str) -> str | None:
    """The question that is word for word aligned and has the other answer, if there is one.

    >>> turn_around("Is the cube left of the small ball?")
    'Is the cube right of the small ball?'
    """
    swapped = swap_objects(question)
    found = _QUESTION.fullmatch(question)
    if swapped is None or found is None:
        return None
    if len(found["object"].split()) == len(found["other"].split()) and aligned(question, swapped):
        return swapped
    turned = {"left of": "right of", "right of": "left of"}.get(found["relation"].lower())
    if turned is None:
        return None
    start, end = found.span("relation")
    return question[:start] + turned + question[end:]


def _rows(image: str, asked: list[tuple[str, str]], dropped: dict[str, int]) -> list[Row]:
    """The questions about one image that hold together."""
    image = Path(image).stem
    answers: dict[str, set[str]] = {}
    for question, answer in asked:
        answers.setdefault(question, set()).add(answer)
    rows: list[Row] = []
    for number, (question, answer) in enumerate(asked):
        found = _QUESTION.fullmatch(question)
        if not found or found["object"] == found["other"]:
            count(dropped, OTHER_QUESTION)
            continue
        again = question in (one for one, _ in asked[:number])
        if (
            again
            or answers[question] != {answer}
            or answer in answers.get(swap_objects(question) or "", set())
        ):
            count(dropped, CLASH)
            continue
        relation = found["relation"].lower().removeprefix("in ").removesuffix(" of")
        rows.append(Row(image, number, question, relation, answer))
    return rows


def _with_pairs_first(rows: list[Row], answered: dict[tuple[str, str], list[str]], seed: int) -> list[Row]:
    """The rows in the order of their drawing, those with an image pair before the others."""
    mixed = shuffled(rows, NAME, seed)
    return sorted(mixed, key=lambda row: (row.question, OTHER[row.answer]) not in answered)


def _example(drawn: Drawn[tuple[Row, str | None]], files: dict[str, Path]) -> Example:
    row, other = drawn.made
    found = _QUESTION.fullmatch(row.question)
    assert found  # rows that do not match were dropped when they were read
    return example(
        f"clevr-{row.image.rpartition('_')[2]}-{row.number}",
        (files[row.image], files[other] if other else None),
        row.question,
        (row.answer, OTHER[row.answer]),
        groups={"kind": row.relation},
        words={"object": found["object"], "other": found["other"], "relation": found["relation"]},
        corrupt_prompt=turn_around(row.question),
    )

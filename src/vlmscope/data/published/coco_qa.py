"""COCO-QA: open questions about COCO photographs, "what is the color of the dog?".

As published with the BLIP tracing paper (Palit et al., arXiv 2308.14179): a CSV file a kind, with
`train_image_id_count, question_count, answer_count` (the suffix may be another, or none), whose
name says the kind: color, count (or number), location. The photographs are COCO's: `train2017`,
in the root, in `images/` or as it is. The corrupt image has another answer to the same question.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from vlmscope.data.example import Example
from vlmscope.data.published.layout import Pictures, by_stem, check_columns, count, not_here, read_table
from vlmscope.data.published.sampling import Drawn, balanced, example, shuffled
from vlmscope.data.questions.synonyms import near
from vlmscope.errors import DataError

NAME = "coco-qa"
SIZE = 500
KINDS = {"color": "color", "colour": "color", "count": "count", "number": "count", "location": "location"}
COLUMNS = ("train_image_id", "question", "answer")
PLACES = ("train2017", "images/train2017", "train2014", "images/train2014", "images", "")

EMPTY = "a row with an empty cell"
AGAIN = "the same image and question as an earlier row"
MISSING = "the image is not there"
ALONE = "no image that is there has another answer to the question"
NO_FOIL = "every image with another answer is already its pair, or cannot be read"
# Words that end a question and name nothing in the image.
_EMPTY_WORDS = frozenset(
    """a an the of in on at to by with is are was were be being and or his her its their this
    that there what who where how many color colors colour picture photo image""".split()
)


@dataclass(frozen=True)
class Row:
    """A row of a table: an image, a question about it and the answer."""

    kind: str
    image: int
    question: str
    answer: str


def load(root: Path, limit: int | None, seed: int, dropped: dict[str, int]) -> list[Example]:
    """The examples of the tables in `root`; why rows were dropped is counted in `dropped`."""
    rows = read_rows(root, dropped)
    files = find_images(root)
    kept = [row for row in rows if row.image in files]
    if rows and not kept:
        raise DataError(
            f"{root}: none of the {len(rows)} images of the tables; expected COCO's, such as "
            f"train2017/{rows[0].image:012d}.jpg; unpack train2017 there"
        )
    count(dropped, MISSING, len(rows) - len(kept))
    by_question: dict[tuple[str, str], list[Row]] = {}
    for row in kept:
        by_question.setdefault((row.kind, row.question), []).append(row)
    paired = [row for row in kept if _others(row, by_question)]
    count(dropped, ALONE, len(kept) - len(paired))
    items = {
        kind: shuffled((row for row in paired if row.kind == kind), NAME, kind, seed)
        for kind in dict.fromkeys(KINDS.values())
    }
    pictures = Pictures(dropped)
    used: set[frozenset[int]] = set()

    def make(row: Row) -> tuple[Row, Row] | None:
        if not pictures.readable(files[row.image]):
            return None
        others = _others(row, by_question)
        random.Random(f"{NAME}/{seed}/{row.image}/{row.question}").shuffle(others)
        for other in others:
            pair = frozenset((row.image, other.image))
            if pair not in used and pictures.readable(files[other.image]):
                used.add(pair)
                return row, other
        count(dropped, NO_FOIL)
        return None

    drawn = balanced(items, make, size=SIZE, limit=limit, dropped=dropped)
    return [_example(one, files) for one in drawn]


def read_rows(root: Path, dropped: dict[str, int]) -> list[Row]:
    """The rows of all tables, each image and question once."""
    tables = {
        path: kind
        for path in sorted(root.glob("*.csv"))
        if (kind := next((k for part, k in KINDS.items() if part in path.name.lower()), None))
        and path.name != "download-failures.csv"
    }
    if not tables:
        raise not_here(NAME, root, "file named *color*.csv, *count*.csv or *location*.csv")
    rows: list[Row] = []
    seen: set[tuple[int, str]] = set()
    for path, kind in tables.items():
        for cells in read_table(path, ()):
            row = _row(path, kind, cells)
            if row is None:
                count(dropped, EMPTY)
            elif (row.image, row.question) in seen:
                count(dropped, AGAIN)
            else:
                seen.add((row.image, row.question))
                rows.append(row)
    return rows


def find_images(root: Path) -> dict[int, Path]:
    """The COCO images in the places where they are unpacked, by their numbers."""
    found: dict[int, Path] = {}
    for stem, path in by_stem(root / place for place in PLACES).items():
        if number := re.fullmatch(r"(?:COCO_(?:train|val)20\d\d_)?(\d{1,12})", stem):
            found.setdefault(int(number[1]), path)
    return found


def noun_of(question: str) -> str:
    """What a question is about.

    >>> noun_of("what is the color of the dog"), noun_of("how many zebras are in the field")
    ('dog', 'zebras')
    >>> noun_of("where is the cat sleeping"), noun_of("what is decorated with flowers")
    ('cat', 'flowers')
    """
    words = re.sub(r"[?.,]", " ", question).split()
    counted = re.match(r"how many ([\w-]+)", question)
    placed = re.match(r"where (?:is|are) (?:the|a|an)? ?([\w-]+)", question)
    if found := counted or placed:
        return found[1]
    return next((word for word in reversed(words) if word.lower() not in _EMPTY_WORDS), "")


def _row(path: Path, kind: str, cells: dict[str, str]) -> Row | None:
    names = {re.sub(r"(?<=id|on|er)_[a-z]+$", "", name): name for name in cells}
    check_columns(path, list(names), COLUMNS)
    image, question, answer = (cells[names[name]] for name in COLUMNS)
    number = re.fullmatch(r"(\d{1,12})(?:\.0)?", image)
    question = " ".join(question.rstrip("? ").split())
    if not (number and question and answer):
        return None
    return Row(kind, int(number[1]), question, answer)


def _others(row: Row, by_question: dict[tuple[str, str], list[Row]]) -> list[Row]:
    """The rows of other images with the same question and a clearly different answer."""
    return [
        other
        for other in by_question[row.kind, row.question]
        if other.image != row.image
        and other.answer.casefold() != row.answer.casefold()
        and not near(other.answer, row.answer)
    ]


def _example(drawn: Drawn[tuple[Row, Row]], files: dict[int, Path]) -> Example:
    row, other = drawn.made
    return example(
        f"coco-{row.kind}-{row.image}-{noun_of(row.question).replace(' ', '-')}-{other.image}",
        (files[row.image], files[other.image]),
        f"{row.question}?",
        (row.answer, other.answer),
        groups={"kind": row.kind},
        words={"noun": noun_of(row.question)},
    )

"""COCO-QA: open questions about COCO photographs, "what is the color of the dog?".

As published with the BLIP tracing paper (Palit et al., arXiv 2308.14179): a CSV file a kind, with
`train_image_id_count, question_count, answer_count` (the suffix may be another, or none), whose name says
the kind: color, count (or number), location. The photographs are COCO's: `train2017`, in the root, in
`images/` or as it is. The corrupt image has another answer to the same question.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlmscope.data.example import Example, find_roles
from vlmscope.data.published.layout import by_stem
from vlmscope.data.published.sampling import Source
from vlmscope.data.questions.synonyms import near
from vlmscope.data.table import read_table

KINDS = {"color": "color", "colour": "color", "count": "count", "number": "count", "location": "location"}
COLUMNS = ("train_image_id", "question", "answer")
PLACES = ("train2017", "images/train2017", "train2014", "images/train2014", "images", "")

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


def load(source: Source) -> list[Example]:
    """The examples of the tables; why rows were dropped is counted in `source`."""
    rows, files = read_rows(source), find_images(source.root)
    kept: list[Row] = source.with_images(
        rows, files, "COCO's, such as train2017/{:012d}.jpg; unpack train2017 there"
    )
    by_question: dict[tuple[str, str], list[Row]] = {}
    for row in kept:
        by_question.setdefault((row.kind, row.question), []).append(row)
    # The rows of other images with the same question and a clearly different answer.
    others = {
        row: [
            other
            for other in by_question[row.kind, row.question]
            if other.image != row.image and not near(other.answer, row.answer)
        ]
        for row in kept
    }
    paired = [row for row in kept if others[row]]
    source.drop("no image that is there has another answer to the question", len(kept) - len(paired))

    def make(row: Row) -> Example | None:
        image, prompt, noun = files[row.image], f"{row.question}?", noun_of(row.question)
        if not source.is_readable(image):
            return None
        mixed = source.shuffled(others[row], source.seed, row.image, row.question)
        by_path = {files[other.image]: other for other in mixed}
        partner = source.partner(image, by_path)
        if partner is None:
            source.drop("every image with another answer is already its pair, or cannot be read")
            return None
        return Example(
            id=f"coco-{row.kind}-{row.image}-{noun.replace(' ', '-')}-{by_path[partner].image}",
            clean_image=image,
            clean_prompt=prompt,
            answer=row.answer,
            foil=by_path[partner].answer,
            corrupt_image=partner,
            roles=find_roles(prompt, {"noun": noun}),
            groups={"kind": row.kind},
        )

    items = {
        kind: source.shuffled((row for row in paired if row.kind == kind), kind, source.seed)
        for kind in dict.fromkeys(KINDS.values())
    }
    return [example for _, _, example in source.balanced(items, make)]


def read_rows(source: Source) -> list[Row]:
    """The rows of all tables, each image and question once."""
    tables = {
        path: kind
        for path in sorted(source.root.glob("*.csv"))
        if (kind := next((k for part, k in KINDS.items() if part in path.name.lower()), None))
    }
    if not tables:
        raise source.not_here("file named *color*.csv, *count*.csv or *location*.csv")
    rows: dict[tuple[int, str], Row] = {}
    for path, kind in tables.items():
        for cells in read_table(path, COLUMNS, without_kind):
            number = re.fullmatch(r"(\d{1,12})(?:\.0)?", cells["train_image_id"])
            question = " ".join(cells["question"].rstrip("? ").split())
            if not (number and question and cells["answer"]):
                source.drop("a row with an empty cell")
            elif (int(number[1]), question) in rows:
                source.drop("the same image and question as an earlier row")
            else:
                image = int(number[1])
                rows[image, question] = Row(kind, image, question, cells["answer"])
    return list(rows.values())


def without_kind(column: str) -> str:
    """The name of a column without the suffix of its kind.

    >>> without_kind("train_image_id_count"), without_kind("answer")
    ('train_image_id', 'answer')
    """
    return re.sub(r"(?<=id|on|er)_[a-z]+$", "", column.strip())


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

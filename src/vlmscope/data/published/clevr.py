"""CLEVR: yes/no questions about where things stand, "Is the large red cube left of the ...?".

As published with the BLIP tracing paper (Palit et al., arXiv 2308.14179): a CSV file with `Image_IDs` and,
in one cell, `Questions_Answers`, a Python list of questions and answers (1 is yes). The images are CLEVR's:
`images/val/CLEVR_val_000145.png`, `val/`, `images/` or the root.

The corrupt image is one whose own questions hold the same text with the other answer; where there is none
the example has no corrupt image. The corrupt prompt swaps the two objects, which keeps all words and turns
the answer around; where that would not align, "left" and "right" are swapped.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from vlmscope.data.example import Example, find_roles
from vlmscope.data.published.layout import by_stem, header_of
from vlmscope.data.published.sampling import SIZE, Source
from vlmscope.data.questions.replacement import aligned
from vlmscope.data.table import read_table

COLUMNS = ("Image_IDs", "Questions_Answers")
PLACES = ("images/val", "val", "images", "")
ANSWERS = {1: "yes", 0: "no"}
OTHER = {"yes": "no", "no": "yes"}
# In turns, so that kinds and answers differ by at most one wherever a limit cuts.
CELLS = (
    *(("left", "yes"), ("right", "no"), ("behind", "yes"), ("front", "no")),
    *(("left", "no"), ("right", "yes"), ("behind", "no"), ("front", "yes")),
)


_QUESTION = re.compile(
    r"^(?P<is>Is the )(?P<object>[^?]+?) (?P<relation>right of|left of|behind|in front of) "
    r"the (?P<other>[^?]+)\?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """One question about one image, number `number` of it."""

    image: str
    number: int
    question: str
    answer: str

    @property
    def words(self) -> dict[str, str]:
        """The two things and their relation; empty for a question of another form.

        >>> Row("", 0, "Is the cube in front of the ball?", "yes").words
        {'object': 'cube', 'other': 'ball', 'relation': 'in front of'}
        """
        found = _QUESTION.fullmatch(self.question)
        return {name: found[name] for name in ("object", "other", "relation")} if found else {}

    @property
    def kind(self) -> str:
        return self.words["relation"].lower().removeprefix("in ").removesuffix(" of")


def load(source: Source) -> list[Example]:
    """The examples of the tables; why questions were dropped is counted in `source`."""
    rows = read_rows(source)
    files = by_stem(source.root / place for place in PLACES)
    kept: list[Row] = source.with_images(
        rows, files, "CLEVR's, such as images/val/{}.png; unpack CLEVR_v1.0 there"
    )
    answered: dict[tuple[str, str], list[Path]] = {}
    for row in kept:
        answered.setdefault((row.question, row.answer), []).append(files[row.image])

    def others(row: Row) -> list[Path]:
        return answered.get((row.question, OTHER[row.answer]), [])

    def make(row: Row) -> Example | None:
        if not source.is_readable(files[row.image]):
            return None
        mixed = source.shuffled(others(row), source.seed, row.image, row.question)
        partner = source.partner(files[row.image], mixed, row.question)
        if mixed and partner is None:
            source.drop("every image with the other answer is already its pair, or cannot be read")
            return None
        return Example(
            id=f"clevr-{row.image.rpartition('_')[2]}-{row.number}",
            clean_image=files[row.image],
            clean_prompt=row.question,
            answer=row.answer,
            foil=OTHER[row.answer],
            corrupt_image=partner,
            corrupt_prompt=turn_around(row.question),
            roles=find_roles(row.question, row.words),
            groups={"kind": row.kind},
        )

    cells: dict[tuple[str, str], list[Row]] = {cell: [] for cell in CELLS}
    for row in kept:
        cells[row.kind, row.answer].append(row)
    # Those with an image pair come before the others.
    items = {
        ", ".join(cell): sorted(source.shuffled(members, source.seed), key=lambda row: not others(row))
        for cell, members in cells.items()
    }
    return [example for _, _, example in source.balanced(items, make, SIZE // 2)]


def read_rows(source: Source) -> list[Row]:
    """The questions of the tables that hold together, in their order."""
    tables = [
        path
        for path in sorted(source.root.glob("*.csv"))
        if "clevr" in path.name.lower() or COLUMNS[1] in header_of(path)
    ]
    if not tables:
        raise source.not_here("file named clevr*.csv")
    rows: list[Row] = []
    for cells in (cells for path in tables for cells in read_table(path, COLUMNS)):
        asked = parse_cell(cells["Questions_Answers"])
        if asked is None:
            source.drop("a cell that is no list of questions and answers")
            continue
        for number, (question, answer) in enumerate(asked):
            row = Row(Path(cells["Image_IDs"]).stem, number, question, answer)
            if row.words.get("object") == row.words.get("other"):
                source.drop("a question of another form than 'Is the ... left of the ...?'")
            elif (
                question in (earlier for earlier, _ in asked[:number])
                or (question, OTHER[answer]) in asked
                or (swap_objects(question), answer) in asked
            ):
                source.drop("the image has the same question twice, or its reverse with the same answer")
            else:
                rows.append(row)
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


def swap_objects(question: str) -> str:
    """The same question about the other object, whose answer is the other one.

    >>> swap_objects("Is the red cube left of the small ball?")
    'Is the small ball left of the red cube?'
    """
    return _QUESTION.sub(r"\g<is>\g<other> \g<relation> the \g<object>?", question)


def turn_around(question: str) -> str | None:
    """The question that is word for word aligned and has the other answer, if there is one.

    >>> turn_around("Is the cube left of the small ball?")
    'Is the cube right of the small ball?'
    """
    found, swapped = _QUESTION.fullmatch(question), swap_objects(question)
    if found is None:
        return None
    if len(found["object"].split()) == len(found["other"].split()) and aligned(question, swapped):
        return swapped
    turned = {"left of": "right of", "right of": "left of"}.get(found["relation"].lower())
    start, end = found.span("relation")
    return question[:start] + turned + question[end:] if turned else None

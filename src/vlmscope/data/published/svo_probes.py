"""SVO-Probes: two photographs that differ in the subject, the verb or the object.

As distributed: `svo_probes.csv` with a triplet, an address and a number for both images of a row.
The images lie in `images/NUMBER.jpg` (or another suffix). Questions are made from the triplets, as
in NOTICE (Golovanevsky et al., arXiv 2406.16320): "is a man or a woman riding a horse?", "is the
man riding or feeding the horse?", "is the man riding a horse or a bike?".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmscope.data.example import Example, find_roles
from vlmscope.data.published.layout import by_stem
from vlmscope.data.published.sampling import SIZE, Drawn, Fetch, Source
from vlmscope.data.questions import in_order
from vlmscope.data.questions.english import (
    PREPOSITIONS,
    definite,
    indefinite,
    ing,
    is_located,
    is_plural,
    is_somebody,
    lemma,
    preposition,
)
from vlmscope.data.questions.synonyms import near
from vlmscope.data.table import read_table
from vlmscope.errors import DataError

TABLE = "svo_probes.csv"
KINDS = {"subject": "subj_neg", "verb": "verb_neg", "object": "obj_neg"}
COLUMNS = (
    *("id", "sentence", "pos_triplet", "neg_triplet", "pos_url", "neg_url", "pos_image_id", "neg_image_id"),
    *KINDS.values(),
)

FLAGS = "not exactly one of subj_neg, verb_neg and obj_neg is true"
PARTS = "a triplet lacks a part"
DIFFERS = "the triplets do not differ in the flagged word alone"
NEAR = "the two words are near-synonyms"
MULTI = "a verb of several words"
NO_ING = "a verb without an -ing form that asks what is going on"
NUMBER = "one subject is singular and the other plural"
JOINED = "the two options need different prepositions"
PEOPLE = "a verb of place with a person as its object"
TWICE = "a word would stand in the question twice"
SAME = "the same id or image pair as an earlier row"
MISSING = "an image is not there"
FAILED = "an image could not be downloaded"
UNFETCHED = "left over: enough others were downloaded"


@dataclass(frozen=True)
class Row:
    """A row that makes a question; `answer` and `foil` as they stand in it."""

    name: str
    kind: str
    triplet: tuple[str, str, str]
    other: str
    images: tuple[str, str]
    urls: tuple[str, str]

    def missing(self, files: Mapping[str, Path]) -> dict[str, str]:
        """The images that are not among the files, by their addresses."""
        both = zip(self.urls, self.images, strict=True)
        return {url: image for url, image in both if image not in files}


class Unfit(Exception):  # noqa: N818 (no error: the row is dropped and counted)
    """Why a row makes no question."""


def ask(kind: str, triplet: tuple[str, str, str], options: tuple[str, str]) -> str:
    """The question with its two options in their order; words are those of the triplets.

    >>> ask("subject", ("man", "ride", "horse"), ("man", "woman"))
    'is a man or a woman riding a horse?'
    >>> ask("verb", ("girl", "lie", "grass"), ("lie", "sit"))
    'is the girl lying or sitting on the grass?'
    >>> ask("object", ("people", "eat", "rice"), ("rice", "apple"))
    'are the people eating rice or an apple?'
    """
    subject, verb, thing = triplet
    action, joint = _verb(verb, thing)
    be = "are" if is_plural(options[0] if kind == "subject" else subject) else "is"
    first, second = options
    if kind == "subject":
        who = f"{indefinite(first)} or {indefinite(second)}"
        said = [be, who, action, joint, indefinite(thing, located=_is_place(verb, joint))]
    elif kind == "verb":
        both = f"{_verb(first, thing)[0]} or {_verb(second, thing)[0]}"
        said = [be, definite(subject), both, joint, definite(thing)]
    else:
        place = _is_place(verb, joint)
        what = f"{indefinite(first, located=place)} or {indefinite(second, located=place)}"
        said = [be, definite(subject), action, joint, what]
    return " ".join(filter(None, said)) + "?"


def load(source: Source) -> list[Example]:
    """The examples of the release; why rows were dropped is counted in `source`.

    With `source.fetch`, images that are missing are downloaded first; without it, rows without
    images are dropped.
    """
    table = source.root / TABLE
    if not table.is_file():
        raise source.not_here(f"file {TABLE}")
    rows = read_rows(source, read_table(table, COLUMNS))
    decks = {
        kind: source.shuffled((row for row in rows if row.kind == kind), kind, source.seed) for kind in KINDS
    }
    folder = source.root / "images"
    if source.fetch:
        _fetch_wanted(source, source.fetch, decks, folder)
    files = by_stem([folder])
    for kind, deck in decks.items():
        decks[kind] = [row for row in deck if all(image in files for image in row.images)]
        source.drop(UNFETCHED if source.fetch else MISSING, len(deck) - len(decks[kind]))
    if rows and not any(decks.values()):
        way = "none could be downloaded; see download-failures.csv" if source.fetch else "pass --download"
        raise DataError(
            f"{folder}: no image of any row of {TABLE} that makes a question; expected "
            f"{rows[0].images[0]}.jpg and the like; {way}"
        )

    def make(row: Row) -> Row | None:
        return row if all(source.is_readable(files[image]) for image in row.images) else None

    return [_example(one, files) for one in source.balanced(decks, make, SIZE)]


def read_rows(source: Source, table: Iterable[Mapping[str, str]]) -> list[Row]:
    """The rows of the table that make a question, in their order."""
    rows: list[Row] = []
    known: set[object] = set()
    for cells in table:
        try:
            row = _row(cells)
        except Unfit as why:
            source.drop(str(why))
            continue
        keys = {row.name, frozenset(row.images)}
        if keys & known:
            source.drop(SAME)
            continue
        known |= keys
        rows.append(row)
    return rows


def _row(cells: Mapping[str, str]) -> Row:
    flagged = [kind for kind, flag in KINDS.items() if _is_true(cells[flag])]
    if len(flagged) != 1:
        raise Unfit(FLAGS)
    [kind] = flagged
    one, other = _triplet(cells["pos_triplet"]), _triplet(cells["neg_triplet"])
    place = list(KINDS).index(kind)
    if [i for i in range(3) if one[i] != other[i]] != [place]:
        raise Unfit(DIFFERS)
    _check_question(kind, one, other, place)
    return Row(
        name=f"svo-{_whole(cells['id'])}-{kind}",
        kind=kind,
        triplet=one,
        other=other[place],
        images=(_whole(cells["pos_image_id"]), _whole(cells["neg_image_id"])),
        urls=(cells["pos_url"], cells["neg_url"]),
    )


def _check_question(kind: str, one: tuple[str, str, str], other: tuple[str, str, str], place: int) -> None:
    """Refuse two triplets of which no question that reads well can be made."""
    if near(lemma(one[1]), lemma(other[1])) if kind == "verb" else near(one[place], other[place]):
        raise Unfit(NEAR)
    (_, joint), (_, other_joint) = _verb(one[1], one[2]), _verb(other[1], other[2])
    if joint != other_joint:
        raise Unfit(JOINED)
    for subject, verb, thing in (one, other):
        if subject == thing or (kind == "subject" and thing in (one[0], other[0])):
            raise Unfit(TWICE)
        if kind == "object" and subject in (one[2], other[2]):
            raise Unfit(TWICE)
        if joint in ("on", "in") and is_somebody(thing) and is_located(verb):
            raise Unfit(PEOPLE)
    if kind == "subject" and is_plural(one[0]) != is_plural(other[0]):
        raise Unfit(NUMBER)


def _triplet(cell: str) -> tuple[str, str, str]:
    parts = [" ".join(part.lower().replace("_", " ").split()) for part in cell.split(",")]
    if len(parts) != 3 or not all(parts):
        raise Unfit(PARTS)
    return parts[0], parts[1], parts[2]


def _verb(verb: str, thing: str) -> tuple[str, str]:
    """The -ing form of a verb, and the preposition before its object."""
    words = verb.split()
    if len(words) > 2 or (len(words) == 2 and words[1] not in PREPOSITIONS):
        raise Unfit(MULTI)
    if words[0] == "lay" and preposition("lie", thing) and thing not in ("egg", "eggs", "brick"):
        words[0] = "lie"  # captions say "laying on the bed"
    action = ing(words[0])
    if action is None:
        raise Unfit(NO_ING)
    return action, words[1] if len(words) == 2 else preposition(words[0], thing)


def _is_place(verb: str, joint: str) -> bool:
    return bool(joint) and (is_located(verb.split()[0]) or joint in ("in", "on", "into", "at", "for"))


def _is_true(cell: str) -> bool:
    return cell.strip().casefold() in ("true", "1", "1.0", "yes", "t")


def _whole(cell: str) -> str:
    """A number as pandas may have written it, without its point."""
    return cell.removesuffix(".0")


def _fetch_wanted(source: Source, fetch: Fetch, decks: dict[str, list[Row]], folder: Path) -> None:
    """Download the images of the rows that would be drawn; a row that fails makes way for more.

    Rows that are not wanted stay in `decks`, behind, and count as rows without images.
    """
    while kinds := [kind for kind, deck in decks.items() if deck]:
        most = SIZE if source.limit is None else -(-source.limit // len(kinds))
        quota = min(most, *(len(decks[kind]) for kind in kinds))
        files = by_stem([folder])
        wanted = [row for kind in kinds for row in decks[kind][:quota]]
        jobs = {url: folder / f"{image}.jpg" for row in wanted for url, image in row.missing(files).items()}
        failed = fetch(jobs).keys() & jobs if jobs else set()
        if not failed:
            return
        for kind in kinds:
            kept = [row for row in decks[kind] if not failed & row.missing(files).keys()]
            source.drop(FAILED, len(decks[kind]) - len(kept))
            decks[kind] = kept


def _example(drawn: Drawn[Row], files: Mapping[str, Path]) -> Example:
    row = drawn.made
    answer, foil = row.triplet[list(KINDS).index(row.kind)], row.other
    prompt = ask(row.kind, row.triplet, in_order(drawn.order, answer, foil))
    if row.kind == "verb":
        answer, foil = (_verb(word, row.triplet[2])[0] for word in (answer, foil))
    words = dict(zip(KINDS, row.triplet, strict=True))
    words["verb"] = _verb(row.triplet[1], row.triplet[2])[0]
    return Example(
        id=row.name,
        clean_image=files[row.images[0]],
        clean_prompt=prompt,
        answer=answer,
        foil=foil,
        corrupt_image=files[row.images[1]],
        roles=find_roles(prompt, words),
        groups={"kind": row.kind, "order": drawn.order},
    )

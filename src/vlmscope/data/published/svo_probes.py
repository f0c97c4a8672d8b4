"""SVO-Probes: two photographs that differ in the subject, the verb or the object.

As distributed: `svo_probes.csv` with a triplet, an address and a number for both images of a row. The
images lie in `images/NUMBER.jpg` (or another suffix). Questions are made from the triplets, as in NOTICE
(Golovanevsky et al., arXiv 2406.16320): "is a man or a woman riding a horse?", "is the man riding or
feeding the horse?", "is the man riding a horse or a bike?".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vlmscope.data.example import Example, find_roles
from vlmscope.data.published.layout import by_stem
from vlmscope.data.published.sampling import SIZE, Fetch, Source
from vlmscope.data.questions import english, in_order
from vlmscope.data.questions.synonyms import near
from vlmscope.data.table import read_table
from vlmscope.errors import DataError

Triplet: TypeAlias = tuple[str, str, str]

TABLE = "svo_probes.csv"
KINDS = {"subject": "subj_neg", "verb": "verb_neg", "object": "obj_neg"}
COLUMNS = (
    *("id", "sentence", "pos_triplet", "neg_triplet", "pos_url", "neg_url", "pos_image_id", "neg_image_id"),
    *KINDS.values(),
)

_PLACES = {kind: place for place, kind in enumerate(KINDS)}
_TRUE = ("true", "1", "1.0", "yes", "t")


@dataclass(frozen=True)
class Row:
    """A row that makes a question: what its two images show, which differs in the word of `kind`."""

    name: str
    kind: str
    triplets: tuple[Triplet, Triplet]
    images: tuple[str, str]
    urls: tuple[str, str]

    def missing(self, files: Mapping[str, Path]) -> dict[str, str]:
        """The images that are not among the files, by their addresses."""
        both = zip(self.urls, self.images, strict=True)
        return {url: image for url, image in both if image not in files}


class Unfit(Exception):  # noqa: N818 (no error: the row is dropped and counted)
    """Why a row makes no question."""


def ask(kind: str, triplet: Triplet, options: tuple[str, str]) -> str:
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
    place = bool(joint) and (
        english.is_located(verb.split()[0]) or joint in ("in", "on", "into", "at", "for")
    )
    first, second = options
    if kind == "subject":
        who = f"{english.indefinite(first)} or {english.indefinite(second)}"
        words = f"{who} {action} {joint} {english.indefinite(thing, located=place)}"
    elif kind == "verb":
        both = f"{_verb(first, thing)[0]} or {_verb(second, thing)[0]}"
        words = f"{english.definite(subject)} {both} {joint} {english.definite(thing)}"
    else:
        what = f"{english.indefinite(first, located=place)} or {english.indefinite(second, located=place)}"
        words = f"{english.definite(subject)} {action} {joint} {what}"
    be = "are" if english.is_plural(first if kind == "subject" else subject) else "is"
    return " ".join(f"{be} {words}".split()) + "?"


def load(source: Source) -> list[Example]:
    """The examples of the release; why rows were dropped is counted in `source`.

    With `source.fetch`, images that are missing are downloaded first; without it, rows without images are
    dropped.
    """
    table = source.root / TABLE
    if not os.path.lexists(table):
        raise source.not_here(f"file {TABLE}")
    rows = read_rows(source, read_table(table, COLUMNS))
    decks = {
        kind: source.shuffled((row for row in rows if row.kind == kind), kind, source.seed) for kind in KINDS
    }
    folder = source.root / "images"
    if source.fetch:
        if folder.is_symlink():
            raise DataError(f"{folder}: a link, through which nothing is downloaded; make it a folder")
        _fetch_wanted(source, source.fetch, decks, folder)
    files = by_stem([folder])
    for kind, deck in decks.items():
        decks[kind] = [row for row in deck if not row.missing(files)]
        why = "left over: enough others were downloaded" if source.fetch else "an image is not there"
        source.drop(why, len(deck) - len(decks[kind]))
    if rows and not any(decks.values()):
        way = "none could be downloaded; see download-failures.csv" if source.fetch else "pass --download"
        raise DataError(
            f"{folder}: no image of any row of {TABLE} that makes a question; expected "
            f"{rows[0].images[0]}.jpg and the like; {way}"
        )

    def make(row: Row) -> Row | None:
        return row if all(source.is_readable(files[image]) for image in row.images) else None

    return [_example(row, order, files) for _, order, row in source.balanced(decks, make, SIZE)]


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
            source.drop("the same id or image pair as an earlier row")
            continue
        known |= keys
        rows.append(row)
    return rows


def _row(cells: Mapping[str, str]) -> Row:
    flagged = [kind for kind, flag in KINDS.items() if cells[flag].casefold() in _TRUE]
    if len(flagged) != 1:
        raise Unfit("not exactly one of subj_neg, verb_neg and obj_neg is true")
    [kind] = flagged
    one, other = _triplet(cells["pos_triplet"]), _triplet(cells["neg_triplet"])
    _check_question(kind, one, other)
    # Pandas may have written a number with a point.
    name, *images = (cells[c].removesuffix(".0") for c in ("id", "pos_image_id", "neg_image_id"))
    urls = cells["pos_url"], cells["neg_url"]
    return Row(f"svo-{name}-{kind}", kind, (one, other), (images[0], images[1]), urls)


def _check_question(kind: str, one: Triplet, other: Triplet) -> None:
    """Refuse two triplets of which no question that reads well can be made."""
    if [name for name, a, b in zip(KINDS, one, other, strict=True) if a != b] != [kind]:
        raise Unfit("the triplets do not differ in the flagged word alone")
    word, foil = (triplet[_PLACES[kind]] for triplet in (one, other))
    if near(english.lemma(word), english.lemma(foil)) if kind == "verb" else near(word, foil):
        raise Unfit("the two words are near-synonyms")
    (_, joint), (_, other_joint) = _verb(one[1], one[2]), _verb(other[1], other[2])
    if joint != other_joint:
        raise Unfit("the two options need different prepositions")
    for subject, verb, thing in (one, other):
        if subject == thing or (kind == "subject" and thing in (one[0], other[0])):
            raise Unfit("a word would stand in the question twice")
        if kind == "object" and subject in (one[2], other[2]):
            raise Unfit("a word would stand in the question twice")
        if joint in ("on", "in") and thing.split()[-1] in english.PEOPLE and english.is_located(verb):
            raise Unfit("a verb of place with a person as its object")
    if kind == "subject" and english.is_plural(one[0]) != english.is_plural(other[0]):
        raise Unfit("one subject is singular and the other plural")


def _triplet(cell: str) -> Triplet:
    parts = [" ".join(part.lower().replace("_", " ").split()) for part in cell.split(",")]
    if len(parts) != 3 or not all(parts):
        raise Unfit("a triplet lacks a part")
    return parts[0], parts[1], parts[2]


def _verb(verb: str, thing: str) -> tuple[str, str]:
    """The -ing form of a verb, and the preposition before its object."""
    words = verb.split()
    if len(words) > 2 or (len(words) == 2 and words[1] not in english.PREPOSITIONS):
        raise Unfit("a verb of several words")
    if words[0] == "lay" and english.preposition("lie", thing) and thing not in ("egg", "eggs", "brick"):
        words[0] = "lie"  # captions say "laying on the bed"
    action = english.ing(words[0])
    if action is None:
        raise Unfit("a verb without an -ing form that asks what is going on")
    return action, words[1] if len(words) == 2 else english.preposition(words[0], thing)


def _fetch_wanted(source: Source, fetch: Fetch, decks: dict[str, list[Row]], folder: Path) -> None:
    """Download the images of the rows that would be drawn; a row that fails makes way for more.

    Rows that are not wanted stay in `decks`, behind, and count as rows without images.
    """
    while kinds := [kind for kind, deck in decks.items() if deck]:
        most = SIZE if source.limit is None else -(-source.limit // len(kinds))
        quota = min(most, *(len(decks[kind]) for kind in kinds))
        files = by_stem([folder])
        wanted = [row for kind in kinds for row in decks[kind][:quota]]
        jobs = {url: image for row in wanted for url, image in row.missing(files).items()}
        failed = fetch(jobs, folder).keys() & jobs if jobs else set()
        if not failed:
            return
        for kind in kinds:
            kept = [row for row in decks[kind] if not failed & row.missing(files).keys()]
            source.drop("an image could not be downloaded", len(decks[kind]) - len(kept))
            decks[kind] = kept


def _example(row: Row, order: str, files: Mapping[str, Path]) -> Example:
    answer, foil = (triplet[_PLACES[row.kind]] for triplet in row.triplets)
    prompt = ask(row.kind, row.triplets[0], in_order(order, answer, foil))
    subject, verb, thing = row.triplets[0]
    if row.kind == "verb":
        answer, foil = _verb(answer, thing)[0], _verb(foil, thing)[0]
    words = {"subject": subject, "verb": _verb(verb, thing)[0], "object": thing}
    return Example(
        id=row.name,
        clean_image=files[row.images[0]],
        clean_prompt=prompt,
        answer=answer,
        foil=foil,
        corrupt_image=files[row.images[1]],
        roles=find_roles(prompt, words),
        groups={"kind": row.kind, "order": order},
    )

"""What a person has: two images, two prompts, an answer and a foil. `Example` imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from vlmscope import files
from vlmscope.errors import DataError, ExampleError, shown

Picture: TypeAlias = Path | Image.Image
Span: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[float, float, float, float]

LONGEST_TEXT = 100_000
"""Characters of a prompt, an answer or a name."""
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, eq=False)
class Example:
    """One contrast: what was asked, what is true of the clean image, and what of the corrupt one.

    `roles` maps a role's name to the character spans `(start, end)` of its words, in `clean_prompt` (by
    token alignment the same words hold it in `corrupt_prompt`). Those that are not given are looked up:
    `answer`, `foil` and each of `groups`, where its words stand in the prompt (`find_roles`).
    `dataclasses.replace` with another prompt looks these up anew. `masks` maps an object's name to a black
    and white picture of the size of `clean_image`, white where the object is, or to the box around it:
    left, top, right, bottom in pixels of `clean_image`. `more_images` are further pictures that the prompt
    is about, behind the first and the same in both runs, for models that take several. `shows` are words
    for what is known to be in `clean_image`, in small letters: labels, which no run reads.
    """

    id: str
    clean_image: Picture
    clean_prompt: str
    answer: str
    foil: str
    corrupt_image: Picture | None = None
    corrupt_prompt: str | None = None
    roles: Mapping[str, Span] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, Picture | Box] = field(default_factory=dict)
    more_images: tuple[Picture, ...] = ()
    shows: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        prompt, known = self.clean_prompt, self.roles
        given, of = (known.given, known.of) if isinstance(known, _Roles) else (dict(known), None)
        for name, (start, end) in given.items():
            if not 0 <= start < end <= len(prompt):
                problem = f"the prompt has {len(prompt)} characters"
            elif of is not None and of[start:end] != prompt[start:end]:
                was, now = shown(of[start:end]), shown(prompt[start:end])
                problem = f"there {now} has taken the place of {was}"
            else:
                continue
            raise ExampleError(
                f"example {shown(self.id)}: the role {shown(name)} is characters {start} to {end} of "
                f"clean_prompt, and {problem}; give the roles of this prompt"
            )
        words = {**self.groups, "answer": self.answer, "foil": self.foil}
        found = find_roles(prompt, words)
        # A token of two roles is called by the first of them, so the options come first.
        order = dict.fromkeys(("answer", "foil", *known, *self.groups))
        roles = {name: (found | given)[name] for name in order if name in found | given}
        own = {name: span for name, span in given.items() if found.get(name) != span}
        object.__setattr__(self, "roles", _Roles(roles, own, prompt))


class _Roles(dict[str, Span]):
    """All roles of an example, which remember those that no lookup finds, and the prompt they are `of`."""

    def __init__(self, roles: Any, given: Mapping[str, Span] | None = None, of: str | None = None) -> None:
        super().__init__(roles)
        self.given, self.of = dict(self if given is None else given), of


def check_text(what: str, text: str) -> None:
    """Refuse a text that nobody has written: control characters, halves of characters, books.

    Raises `ExampleError`, which begins with `what`.
    """
    if odd := _NO_TEXT.search(text):
        raise ExampleError(
            f"{what} {shown(text)} has the control character {odd[0]!a} at {odd.start()}; take it out"
        )
    if len(text) > LONGEST_TEXT:
        raise ExampleError(
            f"{what} {shown(text)} has {len(text):,} characters; expected at most {LONGEST_TEXT:,}"
        )


def find_roles(prompt: str, words: Mapping[str, str]) -> dict[str, Span]:
    """Character spans of `words` in `prompt`, for the words that stand there as whole words.

    The first occurrence counts; upper and lower case are the same.

    >>> find_roles("Is this circle red or blue?", {"answer": "red", "noun": "circle", "x": "cat"})
    {'answer': (15, 18), 'noun': (8, 14)}
    """
    spans = {}
    for role, word in words.items():
        found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
        if word and found:
            spans[role] = found.span()
    return spans


def fingerprint(examples: Iterable[Example]) -> str:
    """The SHA-256, as 64 hex digits, of all that a run reads from the examples, in their order.

    Ids, prompts, answers, foils, roles, and the content of images and masks (not where they lie); groups
    only label the results and are left out. A file that is missing counts as such.

    >>> example = Example("0", Image.new("RGB", (1, 1)), "Red or blue?", "red", "blue")
    >>> fingerprint([example])[:8]
    '471d3f40'
    >>> fingerprint([example]) == fingerprint([example, example])
    False
    """
    total = hashlib.sha256()
    known: dict[Path, str] = {}
    for example in examples:
        boxes: dict[str, Box] = {}
        pictures: dict[str, Picture | None] = {"clean": example.clean_image, "corrupt": example.corrupt_image}
        for name, mask in sorted(example.masks.items()):
            if isinstance(mask, tuple):
                boxes[name] = mask
            else:
                pictures[f"mask {name}"] = mask
        record = {
            "id": example.id,
            "prompts": [example.clean_prompt, example.corrupt_prompt],
            "answers": [example.answer, example.foil],
            "roles": {name: list(span) for name, span in sorted(example.roles.items())},
            "pictures": {name: _content(picture, known) for name, picture in pictures.items()},
        }
        more = [_content(picture, known) for picture in example.more_images]
        record |= {name: value for name, value in (("boxes", boxes), ("more", more)) if value}
        total.update(json.dumps(record).encode() + b"\n")
    return total.hexdigest()


def _content(picture: Picture | None, known: dict[Path, str]) -> str | None:
    """The hash of a picture's file or pixels; `known` keeps what one call has read already."""
    if picture is None:
        return None
    if isinstance(picture, Image.Image):
        try:
            pixels = picture.tobytes()
        except Exception:  # a file that was opened in part and cannot be read to its end
            return "missing"
        about = [picture.mode, *picture.size, picture.getpalette()]
        return hashlib.sha256(json.dumps(about).encode() + pixels).hexdigest()
    path = Path(picture)
    if path not in known:
        try:
            known[path] = hashlib.sha256(files.read(path, "a picture")).hexdigest()
        except DataError:
            known[path] = "missing"
    return known[path]

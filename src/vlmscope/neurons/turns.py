"""What is asked about a picture to see whether it is a word that a model has learned to say, or a concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlmscope.data.example import Example
from vlmscope.data.questions.english import article
from vlmscope.errors import VlmscopeError, shown
from vlmscope.neurons.captions import whole_word

QUESTION = "does this picture show {}?"
"""How it is asked whether something is there."""


class Turn(NamedTuple):
    """What is asked about a picture, and which word of what is said is to become which (None: any other)."""

    prompt: str | None
    old: str
    new: str | None


def took(text: str, old: str, new: str | None) -> bool:
    """Whether a text has the new word, and the old one no longer.

    >>> took("a blue circle", "red", "blue"), took("a red circle", "red", "blue"), took("a ring", "red", None)
    (True, False, True)
    """
    return not whole_word(old).search(text) and (new is None or bool(whole_word(new).search(text)))


def is_there(name: str, question: str = QUESTION) -> str:
    """The question whether something is there.

    Raises `VlmscopeError` where the question has no place for it.

    >>> is_there("circle"), is_there("hour glass", "is there {}?"), is_there("people", "is there {}?")
    ('does this picture show a circle?', 'is there an hour glass?', 'is there people?')
    """
    before, place, after = question.partition("{}")
    if not place or "{}" in after:
        raise VlmscopeError(f"the question {shown(question)} needs one {{}}, where the object stands")
    return f"{before}{f'{article(name)} {name}'.strip()}{after}"


def options(example: Example, source: str, target: str) -> list[str]:
    """An example's own question where `source` is its answer, with `target` as the other option; both orders.

    >>> one = Example("1", "a.png", "is it red or green?", "red", "green")
    >>> options(one, "red", "blue"), options(one, "green", "blue")
    (['is it red or blue?', 'is it blue or red?'], [])
    """
    asked, foil = example.clean_prompt, whole_word(example.foil or "-")
    if example.answer.casefold() != source.casefold() or not foil.search(asked):
        return []
    old = whole_word(source)
    turned = foil.sub("{}", asked, count=1)
    if not old.search(turned):
        return []
    return [turned.replace("{}", target), old.sub(target, turned, count=1).replace("{}", source)]


def of_concept(
    example: Example, source: str, target: str | None, wordings: Sequence[str | None], question: str
) -> list[Turn]:
    """All that is said otherwise about a picture that shows `source` where `target` is seen instead.

    Asked for a caption in other wordings; whether the one and the other is there; and which of the two it is.

    >>> one = Example("1", "a.png", "is it red or green?", "red", "green")
    >>> for turn in of_concept(one, "red", "blue", ["what is it?"], "is there {}?"):
    ...     print(*turn)
    what is it? red blue
    is there a red? yes no
    is there a blue? no yes
    is it red or blue? red blue
    is it blue or red? red blue
    """
    turns = [Turn(wording, source, target) for wording in wordings]
    turns.append(Turn(is_there(source, question), "yes", "no"))
    if target is not None:
        turns.append(Turn(is_there(target, question), "no", "yes"))
        turns += [Turn(asked, source, target) for asked in options(example, source, target)]
    return turns

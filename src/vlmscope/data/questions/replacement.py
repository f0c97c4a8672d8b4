"""Symmetric token replacement: the same question about other words, token for token aligned.

As in NOTICE (Golovanevsky et al., arXiv 2406.16320), where the image stays and both options in the prompt
become other words of the same role. There nothing checks that the tokens align; here a replacement has the
same number of words, and each word the same number of tokens.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import TypeAlias

from vlmscope.data.example import Example, Span
from vlmscope.data.questions.synonyms import near

KEPT = "corrupt prompts kept as they were"
DRAWN = "corrupt prompts drawn"
NONE = "without a corrupt prompt: no word fits"

Pieces: TypeAlias = Callable[[str], int]
"""The number of tokens of a word."""
Pool: TypeAlias = tuple[str, str]
"""Words may stand for each other that are of a kind and role; answers and foils are one role."""

_WORD = re.compile(r"[\w'’-]+|[^\w\s]")


@dataclass(frozen=True, order=True)
class Word:
    """A word (or several) as it stands in a prompt, and what has to stay around it.

    `article` is what stands before it (`a`, `an`, `the` or nothing), `verb` the prompt's first word, for
    its number, and `after` the word behind the options, such as a preposition.
    """

    text: str
    article: str
    verb: str
    after: str


def replace_words(
    examples: Iterable[Example], *, pieces: Pieces | None = None, seed: int = 0
) -> tuple[list[Example], dict[str, int]]:
    """The examples with a corrupt prompt each that aligns, and how they came by it.

    A corrupt prompt that differs from the clean one and aligns with it is kept. Otherwise the words of the
    roles `answer` and `foil` (where neither stands in the prompt, of `noun`, else of `object`) become words
    that other examples of the same `kind` have in those roles. `pieces` counts the tokens of a word;
    without it, every word counts as one. What is drawn for an example depends on the seed, its id and the
    words there are, not on the order of the list.

    >>> one = Example("1", "a.png", "is it red or blue?", "red", "blue")
    >>> other = Example("2", "a.png", "is it old or new?", "old", "new")
    >>> examples, counts = replace_words([one, other])
    >>> sorted(examples[0].corrupt_prompt[:-1].split()), counts
    (['is', 'it', 'new', 'old', 'or'], {'corrupt prompts drawn': 2})
    """
    examples = list(examples)
    found: dict[Pool, set[Word]] = {}
    for example in examples:
        for pool, _, word in _slots(example):
            found.setdefault(pool, set()).add(word)
    pools = {pool: sorted(words) for pool, words in found.items()}
    counts = Counter({KEPT: 0, DRAWN: 0, NONE: 0})
    done: list[Example] = []
    for example in examples:
        clean, corrupt = example.clean_prompt, example.corrupt_prompt
        if corrupt is not None and corrupt != clean and aligned(clean, corrupt, pieces):
            counts[KEPT] += 1
            done.append(example)
        else:
            prompt = _draw(example, pools, pieces, seed)
            counts[NONE if prompt is None else DRAWN] += 1
            done.append(replace(example, corrupt_prompt=prompt))
    return done, {why: number for why, number in counts.items() if number}


def aligned(clean: str, corrupt: str, pieces: Pieces | None = None) -> bool:
    """Whether two prompts agree word for word in their numbers of tokens.

    >>> aligned("is it red or blue?", "is it old or new?"), aligned("red?", "dark red?")
    (True, False)
    >>> aligned("is it red?", "is it azure?", lambda word: 1 + (len(word) > 4))
    False
    """
    ours, theirs = _WORD.findall(clean), _WORD.findall(corrupt)
    if len(ours) != len(theirs):
        return False
    for one, other in zip(ours, theirs, strict=True):
        marks = not (one[0].isalnum() and other[0].isalnum())
        if one != other and (marks or (pieces and pieces(one) != pieces(other))):
            return False
    return True


def _slots(example: Example) -> list[tuple[Pool, Span, Word]]:
    """The words that are replaced: their pool, their place, and what they are there."""
    roles = [role for role in ("answer", "foil") if role in example.roles]
    roles = roles or [role for role in ("noun", "object") if role in example.roles][:1]
    slots = []
    for role in roles:
        start, end = example.roles[role]
        before = example.clean_prompt[:start].lower().split() or [""]
        behind = example.clean_prompt[max(example.roles[role][1] for role in roles) :]
        after = re.search(r"[\w'-]+", behind)
        word = Word(
            text=example.clean_prompt[start:end],
            article=before[-1] if before[-1] in ("a", "an", "the") else "",
            verb=before[0] if before[0] in ("is", "are") else "",
            after=after[0].lower() if after else "",
        )
        pool = example.groups.get("kind", ""), "option" if role in ("answer", "foil") else role
        slots.append((pool, (start, end), word))
    return slots


def _draw(example: Example, pools: dict[Pool, list[Word]], pieces: Pieces | None, seed: int) -> str | None:
    """The prompt with other words in its slots, if there are any that fit."""
    slots = _slots(example)
    if not slots:
        return None
    rng = random.Random(f"replacement/{seed}/{example.id}")
    choices: list[list[str]] = []
    for pool, _, needed in slots:
        words = [word for word in pools[pool] if _may_stand(word, needed, example, pieces)]
        # What also fits the preposition behind reads better, so it comes first.
        good = list(dict.fromkeys(word.text for word in words if word.after == needed.after))
        rest = [text for text in dict.fromkeys(word.text for word in words) if text not in good]
        rng.shuffle(good)
        rng.shuffle(rest)
        choices.append(good + rest)
    chosen = next((texts for texts in product(*choices) if not _any_close(texts)), None)
    if chosen is None:
        return None
    prompt = example.clean_prompt
    for (start, end), text in sorted(zip((span for _, span, _ in slots), chosen, strict=True), reverse=True):
        prompt = prompt[:start] + text + prompt[end:]
    return prompt


def _may_stand(word: Word, needed: Word, example: Example, pieces: Pieces | None) -> bool:
    """Whether a word can stand where another one does, in this example."""
    if (word.article, word.verb) != (needed.article, needed.verb):
        return False
    taken, new = (set(_WORD.findall(text.lower())) for text in (example.clean_prompt, word.text))
    if taken & new or any(_any_close((word.text, x)) for x in (example.answer, example.foil, needed.text)):
        return False
    return aligned(needed.text, word.text, pieces)


def _any_close(texts: Sequence[str]) -> bool:
    """Whether two of the words are the same or near-synonyms."""
    return any(near(one, other) for one, other in combinations(texts, 2))

"""Symmetric token replacement: the same question about other words, token for token aligned.

As in NOTICE (Golovanevsky et al., arXiv 2406.16320), where the image stays and both options in the
prompt become other words of the same role. There nothing checks that the tokens align; here a
replacement has the same number of words, and each word the same number of tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vlmscope.data.example import Example, Span
from vlmscope.data.questions.synonyms import near

KEPT = "corrupt prompts kept as they were"
DRAWN = "corrupt prompts drawn"
NONE = "without a corrupt prompt: no word fits"

Pieces = Callable[[str], int]

_OPTIONS = ("answer", "foil")
_WORD = re.compile(r"[\w'’-]+|[^\w\s]")


@dataclass(frozen=True)
class Word:
    """A word (or several) as it stands in a prompt, and what has to stay around it.

    `article` is what stands before it (`a`, `an`, `the` or nothing), `verb` the prompt's first
    word, for its number, and `after` the word behind the options, such as a preposition.
    """

    text: str
    article: str
    verb: str
    after: str


def replace_words(
    examples: Iterable[Example], *, pieces: Pieces | None = None, seed: int = 0
) -> tuple[list[Example], dict[str, int]]:
    """The examples with a corrupt prompt each that aligns, and how they came by it.

    A corrupt prompt that differs from the clean one and aligns with it is kept. Otherwise the
    words of the roles `answer` and `foil` (where neither stands in the prompt, of `noun`, else of
    `object`) become words that other examples of the same `kind` have in those roles. `pieces`
    counts the tokens of a word; without it, every word counts as one. What is drawn for an
    example depends on the seed, its id and the words there are, not on the order of the list.

    >>> def made(answer, foil):
    ...     prompt = f"is it {answer} or {foil}?"
    ...     roles = find_roles(prompt, {"answer": answer, "foil": foil})
    ...     return Example(answer, "a.png", prompt, answer, foil, roles=roles)
    >>> from vlmscope.data.example import find_roles
    >>> examples, counts = replace_words([made("red", "blue"), made("old", "new")])
    >>> sorted(examples[0].corrupt_prompt[:-1].split()), counts
    (['is', 'it', 'new', 'old', 'or'], {'corrupt prompts drawn': 2})
    """
    examples = list(examples)
    pools = _pools(examples)
    counts = dict.fromkeys((KEPT, DRAWN, NONE), 0)
    done: list[Example] = []
    for one in examples:
        if _fits(one, pieces):
            counts[KEPT] += 1
            done.append(one)
            continue
        prompt = _draw(one, pools, pieces, seed)
        counts[NONE if prompt is None else DRAWN] += 1
        done.append(replace(one, corrupt_prompt=prompt))
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


def _fits(one: Example, pieces: Pieces | None) -> bool:
    corrupt = one.corrupt_prompt
    return corrupt is not None and corrupt != one.clean_prompt and aligned(one.clean_prompt, corrupt, pieces)


def _slots(one: Example) -> list[tuple[str, Span]]:
    """The roles whose words are replaced, with their places."""
    options = [(role, one.roles[role]) for role in _OPTIONS if role in one.roles]
    if options:
        return options
    return [(role, one.roles[role]) for role in ("noun", "object") if role in one.roles][:1]


def _pool(one: Example, role: str) -> tuple[str, str]:
    """Which words may stand for each other: answers and foils of a kind are one pool."""
    return one.groups.get("kind", ""), "option" if role in _OPTIONS else role


def _pools(examples: Sequence[Example]) -> dict[tuple[str, str], list[Word]]:
    found: dict[tuple[str, str], set[Word]] = {}
    for one in examples:
        slots = _slots(one)
        for role, span in slots:
            found.setdefault(_pool(one, role), set()).add(_word(one.clean_prompt, span, slots))
    key = lambda word: (word.text, word.article, word.verb, word.after)  # noqa: E731
    return {pool: sorted(words, key=key) for pool, words in found.items()}


def _word(prompt: str, span: Span, slots: Sequence[tuple[str, Span]]) -> Word:
    before = prompt[: span[0]].split()
    behind = re.findall(r"[\w'-]+", prompt[max(end for _, (_, end) in slots) :])
    article = before[-1].lower() if before and before[-1].lower() in ("a", "an", "the") else ""
    verb = before[0].lower() if before and before[0].lower() in ("is", "are") else ""
    after = behind[0].lower() if behind else ""
    return Word(prompt[slice(*span)], article, verb, after)


def _draw(
    one: Example, pools: dict[tuple[str, str], list[Word]], pieces: Pieces | None, seed: int
) -> str | None:
    """The prompt with other words in its slots, if there are any that fit."""
    slots = _slots(one)
    if not slots:
        return None
    rng = random.Random(f"replacement/{seed}/{one.id}")
    choices: list[list[str]] = []
    for role, span in slots:
        needed = _word(one.clean_prompt, span, slots)
        words = [word for word in pools[_pool(one, role)] if _may_stand(word, needed, one, pieces)]
        # What also fits the preposition behind reads better, so it comes first.
        good = list(dict.fromkeys(word.text for word in words if word.after == needed.after))
        rest = [text for text in dict.fromkeys(word.text for word in words) if text not in good]
        rng.shuffle(good)
        rng.shuffle(rest)
        choices.append(good + rest)
    chosen = next(_combinations(choices), None)
    if chosen is None:
        return None
    prompt = one.clean_prompt
    for (_, (start, end)), text in sorted(zip(slots, chosen, strict=True), reverse=True, key=_start):
        prompt = prompt[:start] + text + prompt[end:]
    return prompt


def _start(slot: tuple[tuple[str, Span], str]) -> int:
    return slot[0][1][0]


def _combinations(choices: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """One word a slot, all of them different and no near-synonyms of each other."""
    if not choices:
        yield []
        return
    for text in choices[0]:
        for rest in _combinations(choices[1:]):
            if not any(_close(text, other) for other in rest):
                yield [text, *rest]


def _may_stand(word: Word, needed: Word, one: Example, pieces: Pieces | None) -> bool:
    """Whether a word can stand where another one does, in this example."""
    if (word.article, word.verb) != (needed.article, needed.verb):
        return False
    taken = {text.lower() for text in _WORD.findall(one.clean_prompt)}
    if taken & {text.lower() for text in _WORD.findall(word.text)}:
        return False
    if any(_close(word.text, text) for text in (one.answer, one.foil, needed.text)):
        return False
    return aligned(needed.text, word.text, pieces)


def _close(one: str, other: str) -> bool:
    return one.casefold() == other.casefold() or near(one, other)

"""Words that are too close to stand against each other: a picture of the one shows the other.

`synonyms.txt` is curated by hand for the words of the published data sets, a set a line. Two words are
near-synonyms if one set holds both; a set also holds what is only a kind of another (a kid is a child, a
girl may be called a kid), because then both answers may be true of one picture.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

SETS = [line.split() for line in Path(__file__).with_name("synonyms.txt").read_text("utf-8").splitlines()]

_SETS_OF: dict[str, set[int]] = defaultdict(set)
for _number, _words in enumerate(SETS):
    for _word in _words:
        _SETS_OF[_word].add(_number)


def near(one: str, other: str) -> bool:
    """Whether two words say nearly the same, upper and lower case aside.

    A plural in -s, an -ing form and the word itself are told apart by the callers' grammar; here
    a word also meets its own plural in -s.

    >>> near("man", "guy"), near("Kids", "child"), near("man", "horse")
    (True, True, False)
    """
    ones, others = _forms(one.casefold()), _forms(other.casefold())
    if ones & others:
        return True
    return any(_SETS_OF.get(a, set()) & _SETS_OF.get(b, set()) for a in ones for b in others)


def _forms(word: str) -> set[str]:
    """The word, and what it may be the plural or the -ing form of."""
    forms = {word}
    if word.endswith("s") and len(word) > 3 and not word.endswith("ss"):
        forms.add(word[:-1])
        if word.endswith("es"):
            forms.add(word[:-2])
    if word.endswith("ing") and len(word) > 4:
        stem = word[:-3]
        forms |= {stem, stem + "e"}
        if stem[-1] == stem[-2]:
            forms.add(stem[:-1])
        if stem.endswith("y"):
            forms.add(stem[:-1] + "ie")
    return forms

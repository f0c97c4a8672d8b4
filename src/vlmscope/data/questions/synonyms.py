"""Words that are too close to stand against each other: a picture of the one shows the other.

`synonyms.txt` is curated by hand for the words of the published data sets, a set a line. Two words are
near-synonyms if one set holds both; a set also holds what is only a kind of another (a kid is a child, a
girl may be called a kid), because then both answers may be true of one picture.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from pathlib import Path

SETS = [line.split() for line in Path(__file__).with_name("synonyms.txt").read_text("utf-8").splitlines()]

_SETS_OF: dict[str, set[int]] = defaultdict(set)
for _number, _words in enumerate(SETS):
    for _word in _words:
        _SETS_OF[_word].add(_number)


def near(one: str, other: str) -> bool:
    """Whether two words say nearly the same, upper and lower case aside.

    A word also meets its own plural in -s and its -ing form.

    >>> near("man", "guy"), near("Kids", "child"), near("man", "horse")
    (True, True, False)
    """
    return not _meanings(one.casefold()).isdisjoint(_meanings(other.casefold()))


@lru_cache(maxsize=4096)
def _meanings(word: str) -> frozenset[str | int]:
    """The word, what it may be the plural or the -ing form of, and the sets that hold any of these."""
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
    return frozenset(forms).union(*(_SETS_OF.get(form, ()) for form in forms))

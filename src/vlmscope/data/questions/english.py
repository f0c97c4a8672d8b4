"""The little English that questions from word triplets need: articles, plurals, -ing, prepositions.

Forms of words come from lemminflect; `english.toml` holds what no rule tells: words without a plural,
places, and which preposition joins a verb to its object.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from vlmscope.data.words import read_words

_WORDS = read_words(Path(__file__).with_name("english.toml"))
_NOUNS, _PLACES, _VERBS = _WORDS["nouns"], _WORDS["places"], _WORDS["verbs"]
_JOINED = {verb: preposition for preposition, verbs in _WORDS["joined"].items() for verb in verbs}
_NO_ARTICLE = _NOUNS["mass"] | _NOUNS["games"]
PEOPLE = _NOUNS["people"]
PREPOSITIONS = _WORDS["prepositions"]["all"]


@lru_cache(maxsize=4096)
def article(noun: str) -> str:
    """`a` or `an` by the sound with which a noun begins, or nothing for a plural, a mass noun or a game.

    >>> [article(noun) for noun in ("horse", "hour", "umbrella", "university", "SUV", "people", "grass")]
    ['a', 'an', 'an', 'a', 'an', '', '']
    """
    if is_plural(noun) or _last(noun) in _NO_ARTICLE:
        return ""
    if re.match(r"[AEFHILMNORSX](?![a-z])|[AEFHILMNORSX][A-Z]", noun):
        return "an"
    low = noun.lower()
    if re.match(r"hou?r(?!s[et])|hono|heir|honest", low) and not low.startswith("hor"):
        return "an"
    if re.match(r"uni(?!n|m)|us[aeiu]|eu|ew|one(?!i)|once|ut[ei]|ufo|ub[ie]|ukulele", low):
        return "a"
    return "an" if low[:1] in set("aeiou") else "a"


def _last(noun: str) -> str:
    """The last of its words, which a token of a model need not have."""
    return noun.lower().strip().rpartition(" ")[2]


@lru_cache(maxsize=4096)
def is_plural(noun: str) -> bool:
    """Whether a noun, or the last word of several, is a plural.

    >>> [is_plural(noun) for noun in ("women", "tall trees", "bus", "glasses", "sheep")]
    [True, True, False, True, False]
    """
    word = _last(noun)
    if word in _NOUNS["plural"]:
        return True
    if word in _NO_ARTICLE | _NOUNS["singular"] or word.endswith("ss"):
        return False
    import lemminflect

    return any(
        lemma != word and word in lemminflect.getInflection(lemma, "NNS")
        for lemma in lemminflect.getLemma(word, "NOUN")
    )


@lru_cache(maxsize=4096)
def lemma(verb: str) -> str:
    """The plain form of a verb in any form.

    >>> lemma("sitting"), lemma("feed"), lemma("stood")
    ('sit', 'feed', 'stand')
    """
    import lemminflect

    lemmas = lemminflect.getLemma(verb, "VERB")
    return verb if verb in lemmas or not lemmas else str(lemmas[0])


@lru_cache(maxsize=4096)
def ing(verb: str) -> str | None:
    """The -ing form of a verb; None where it has none that asks what is going on.

    >>> ing("visit"), ing("lie"), ing("rode"), ing("contain")
    ('visiting', 'lying', 'riding', None)
    """
    import lemminflect

    plain = lemma(verb)
    if plain in _VERBS["states"] or not plain.isalpha():
        return None
    forms = lemminflect.getInflection(plain, "VBG")
    return str(forms[0]) if forms else None


def indefinite(noun: str, *, located: bool = False) -> str:
    """A noun as it is first spoken of; a place where something happens is a known one.

    >>> indefinite("horse"), indefinite("grass"), indefinite("grass", located=True)
    ('a horse', 'grass', 'the grass')
    """
    place = located and noun in _PLACES["any"] | _NOUNS["mass"] | {"camera"}
    if place or noun in _NOUNS["known"]:
        return f"the {noun}"
    return f"{article(noun)} {noun}".strip()


def definite(noun: str) -> str:
    """A noun that is there to be seen.

    >>> definite("horse"), definite("tennis")
    ('the horse', 'tennis')
    """
    return noun if noun.split()[-1] in _NOUNS["games"] else f"the {noun}"


def is_located(verb: str) -> bool:
    """Whether what follows a verb says where.

    >>> is_located("sitting"), is_located("ride")
    (True, False)
    """
    return lemma(verb) in _VERBS["located"] | {"swim", "surf", "sail", "dive"}


def preposition(verb: str, noun: str) -> str:
    """What joins a verb to its object: a preposition, or nothing.

    >>> preposition("sit", "bench"), preposition("lie", "water"), preposition("ride", "horse")
    ('on', 'in', '')
    >>> preposition("play", "tennis"), preposition("play", "ball"), preposition("look", "sea")
    ('', 'with', 'at')
    """
    plain, thing = lemma(verb), noun.split()[-1]
    where, place = _where(plain, thing), thing in _PLACES["any"]
    if plain == "play":
        played = thing in _NOUNS["games"] | _NOUNS["instruments"] | {"game", "games", "music", "song"}
        return "" if played else where if place else "with"
    if plain == "jump" and (place or thing in _PLACES["jumped_into"]):
        return "on" if where == "on" else "into" if thing != "air" else "in"
    if plain == "walk" and thing in _NOUNS["animals"]:
        return ""
    if plain == "surf":
        return "" if thing in ("wave", "waves") else where
    if plain == "pose" and thing in ("camera", "picture", "photo", "portrait"):
        return "for"
    if plain in ("talk", "speak") and thing in ("phone", "cellphone", "telephone", "mobile"):
        return "on"
    if plain == "work" and thing in _NOUNS["machines"]:
        return "at"
    if plain == "fly":
        return "in" if thing in ("sky", "air") else "over" if place else ""
    if plain in ("drive", "ride", "work", "eat", "drink", "train", "practice"):
        return where if place and not (plain == "eat" and thing == "grass") else ""
    if plain in _JOINED:
        return _JOINED[plain]
    return where if plain in _VERBS["located"] else ""


def _where(verb: str, thing: str) -> str:
    if thing in _PLACES["at"] and verb in ("sit", "stand", "wait", "kneel"):
        return "at"
    if thing in ("tree", "trees", "umbrella", "bridge"):
        return "under"
    if thing in ("airport", "zoo", "beach", "playground") and verb == "work":
        return "at"
    return "in" if thing in _PLACES["in"] else "on"

"""The little English that questions from word triplets need: articles, plurals, -ing, prepositions.

Forms of words come from lemminflect; the tables hold what no rule tells: words without a plural,
places, and which preposition joins a verb to its object.
"""

from __future__ import annotations

import re
from functools import lru_cache

PREPOSITIONS = frozenset(
    """about above across against along around at behind below beneath beside by down for from in
    inside into near of off on onto out outside over past through to toward towards under up upon
    with""".split()
)

_PLURAL = frozenset(
    """people police cattle men women children pants jeans shorts trousers scissors glasses
    sunglasses goggles clothes binoculars stairs woods groceries headphones fireworks folks
    pajamas tights leggings overalls""".split()
)
_SINGULAR_IN_S = frozenset("bus gas lens canvas news tennis gymnastics dress glass grass".split())
_MASS = frozenset(
    """air beer bread butter cash cheese chocolate clay clothing coffee corn cotton dirt
    dust equipment fabric fire fog food fruit fur furniture garbage gold grass gravel hair hay ice
    ink jewelry juice lava light luggage lumber makeup meat metal milk mist money mud music oil
    paint paper pasta plastic popcorn rain rice salt sand seafood seaweed smoke
    snow soap soil soup spaghetti steam steel string sugar sunlight tape tea traffic trash water
    wheat wine wood wool yoga""".split()
)
_GAMES = frozenset(
    """baseball basketball badminton bowling chess cricket football frisbee golf gymnastics
    hockey lacrosse poker polo rugby soccer softball tennis volleyball""".split()
)
_INSTRUMENTS = frozenset(
    """accordion banjo cello clarinet drum drums fiddle flute guitar harp horn instrument
    instruments keyboard organ piano saxophone trombone trumpet tuba ukulele violin""".split()
)

# Where somebody is, by what it is; everything else is stood, sat or lain on.
_IN = frozenset(
    """air alley bathroom bathtub bedroom boat building bush bushes cage canoe car city class
    classroom countryside crib crowd desert field fog forest garage garden gym hall hallway home hospital
    house jungle kayak kitchen lake library line mall market meadow mirror mud museum nature nest
    office park pool pond puddle rain restaurant river room school sea shade shop sky snow stadium
    store stream studio sun sunlight supermarket swamp theater town tub tunnel valley village water
    wheelchair wind window woods yard zoo""".split()
)
_AT = frozenset("bar buffet cafe computer counter desk door entrance piano table window".split())
_PLACES = frozenset(
    """air airport alley beach city coast countryside crowd desert field floor forest garden grass
    ground gym hall highway hill hillside jungle kitchen lake lawn library mall market meadow
    mountain mountains museum nature ocean park path pavement pier playground pond pool rain river
    road room runway sand sea seashore shade shore sidewalk sky snow stadium stage street sun
    swamp theater track trail valley village water waterfront waves wind woods yard zoo""".split()
)

_LOCATED = frozenset(
    """sit stand lie walk run kneel sleep rest crouch squat jog stroll wander march dance camp
    pose gather graze live wait meditate relax nap land skate skateboard wade perform wrestle
    float bounce crawl hike fall appear stay slide""".split()
)
_JOINED = {
    "aim": "at",
    "bark": "at",
    "belong": "to",
    "care": "for",
    "chat": "with",
    "climb": "",
    "compete": "with",
    "dive": "into",
    "fight": "with",
    "flirt": "with",
    "gaze": "at",
    "glance": "at",
    "go": "to",
    "hang": "from",
    "jump": "over",
    "laugh": "at",
    "lean": "against",
    "leap": "over",
    "listen": "to",
    "look": "at",
    "point": "at",
    "smile": "at",
    "speak": "to",
    "stare": "at",
    "swim": "in",
    "sail": "on",
    "talk": "to",
    "travel": "by",
    "wave": "at",
    "yell": "at",
    "shout": "at",
    "scream": "at",
}
_PEOPLE = frozenset(
    """adult adults artist athlete athletes audience baby babies bride boy boys child children
    couple crowd dancer daughter doctor family farmer father friend friends girl girls groom group
    guy kid kids lady man men mother musician officer parent people person player players police
    singer soldier soldiers son student students teacher team toddler wife woman women worker
    workers husband""".split()
)
_ANIMALS = frozenset("animal animals cat cow cows dog dogs goat horse horses pet puppy".split())
_MACHINES = frozenset("computer desk keyboard laptop machine piano screen table".split())
_OVER_NOTHING = frozenset("air water pool sea ocean lake river bed trampoline snow".split())
_STATES = frozenset(
    """be have contain own belong need want know seem consist feature involve include become like
    prefer love lack""".split()
)


@lru_cache(maxsize=4096)
def article(noun: str) -> str:
    """`a`, `an`, or nothing for a plural, a mass noun or a game.

    >>> [article(noun) for noun in ("horse", "hour", "university", "people", "grass")]
    ['a', 'an', 'a', '', '']
    """
    return "" if is_plural(noun) or is_mass(noun) else a_or_an(noun)


def a_or_an(word: str) -> str:
    """The indefinite article by the sound with which a word begins.

    >>> [a_or_an(word) for word in ("apple", "umbrella", "uniform", "one-eyed", "hour", "SUV")]
    ['an', 'an', 'a', 'a', 'an', 'an']
    """
    if re.match(r"[AEFHILMNORSX](?![a-z])|[AEFHILMNORSX][A-Z]", word):
        return "an"
    low = word.lower()
    if re.match(r"hou?r(?!s[et])|hono|heir|honest", low) and not low.startswith("hor"):
        return "an"
    if re.match(r"uni(?!n|m)|us[aeiu]|eu|ew|one(?!i)|once|ut[ei]|ufo|ub[ie]|ukulele", low):
        return "a"
    return "an" if low[:1] in set("aeiou") else "a"


@lru_cache(maxsize=4096)
def is_plural(noun: str) -> bool:
    """Whether a noun, or the last word of several, is a plural.

    >>> [is_plural(noun) for noun in ("women", "tall trees", "bus", "glasses", "sheep")]
    [True, True, False, True, False]
    """
    word = noun.lower().split()[-1]
    if word in _PLURAL:
        return True
    if word in _MASS or word in _GAMES or word in _SINGULAR_IN_S or word.endswith("ss"):
        return False
    import lemminflect  # type: ignore[import-untyped]

    return any(
        lemma != word and word in lemminflect.getInflection(lemma, "NNS")
        for lemma in lemminflect.getLemma(word, "NOUN")
    )


def is_mass(noun: str) -> bool:
    """Whether a noun takes no indefinite article though it is no plural.

    >>> is_mass("green grass"), is_mass("tennis"), is_mass("horse")
    (True, True, False)
    """
    word = noun.lower().split()[-1]
    return word in _MASS or word in _GAMES


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
    if plain in _STATES or not plain.isalpha():
        return None
    forms = lemminflect.getInflection(plain, "VBG")
    return str(forms[0]) if forms else None


def indefinite(noun: str, *, located: bool = False) -> str:
    """A noun as it is first spoken of; a place where something happens is a known one.

    >>> indefinite("horse"), indefinite("grass"), indefinite("grass", located=True)
    ('a horse', 'grass', 'the grass')
    """
    if is_known(noun) or (located and (noun in _PLACES or noun in _MASS or noun == "camera")):
        return f"the {noun}"
    return f"{article(noun)} {noun}".strip()


def definite(noun: str) -> str:
    """A noun that is there to be seen.

    >>> definite("horse"), definite("tennis")
    ('the horse', 'tennis')
    """
    return noun if noun.split()[-1] in _GAMES else f"the {noun}"


def is_known(noun: str) -> bool:
    """Whether there is only one of it, as of the sky."""
    return noun in ("sky", "sun", "moon", "ground", "sea", "ocean", "air", "wind", "countryside")


def is_located(verb: str) -> bool:
    """Whether what follows a verb says where.

    >>> is_located("sitting"), is_located("ride")
    (True, False)
    """
    return lemma(verb) in _LOCATED or lemma(verb) in ("swim", "surf", "sail", "dive")


def preposition(verb: str, noun: str) -> str:
    """What joins a verb to its object: a preposition, or nothing.

    >>> preposition("sit", "bench"), preposition("lie", "water"), preposition("ride", "horse")
    ('on', 'in', '')
    >>> preposition("play", "tennis"), preposition("play", "ball"), preposition("look", "sea")
    ('', 'with', 'at')
    """
    plain, thing = lemma(verb), noun.split()[-1]
    where = _where(plain, thing)
    if plain == "play":
        if thing in _GAMES | _INSTRUMENTS | {"game", "games", "music", "song"}:
            return ""
        return where if thing in _PLACES else "with"
    if plain == "jump" and (thing in _OVER_NOTHING or thing in _PLACES):
        return "on" if where == "on" else "into" if thing != "air" else "in"
    if plain == "walk" and thing in _ANIMALS:
        return ""
    if plain == "surf":
        return "" if thing in ("wave", "waves") else where
    if plain == "pose" and thing in ("camera", "picture", "photo", "portrait"):
        return "for"
    if plain in ("talk", "speak") and thing in ("phone", "cellphone", "telephone", "mobile"):
        return "on"
    if plain == "work" and thing in _MACHINES:
        return "at"
    if plain == "fly":
        return "in" if thing in ("sky", "air") else "over" if thing in _PLACES else ""
    if plain in ("drive", "ride", "work", "eat", "drink", "train", "practice"):
        return where if thing in _PLACES and not (plain == "eat" and thing == "grass") else ""
    if plain in _JOINED:
        return _JOINED[plain]
    return where if plain in _LOCATED else ""


def _where(verb: str, thing: str) -> str:
    if thing in _AT and verb in ("sit", "stand", "wait", "kneel"):
        return "at"
    if thing in ("tree", "trees", "umbrella", "bridge"):
        return "under"
    if thing in ("airport", "zoo", "beach", "playground") and verb == "work":
        return "at"
    return "in" if thing in _IN else "on"


def is_somebody(noun: str) -> bool:
    """Whether a noun names somebody, whom one does not stand on or in.

    >>> is_somebody("woman"), is_somebody("bench")
    (True, False)
    """
    return noun.split()[-1] in _PEOPLE

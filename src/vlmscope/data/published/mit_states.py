"""MIT-States: one noun in two states, "is this apple ripe or unripe?".

As distributed: a folder "{adjective} {noun}" for each pair, in the root or in `images/`; folders
whose adjective is literally "adj" show the noun in no state and are left out. The corrupt image
shows the same noun with another adjective of the same kind, as in NOTICE (Golovanevsky et al.,
arXiv 2406.16320). That paper has 21 adjectives of color, 23 of shape and 14 of texture and does
not list them: which ones are here is our choice, out of the 115, in the same numbers. `color` is
any look that is neither form nor surface.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmscope.data.example import Example
from vlmscope.data.published.layout import ADJECTIVES, Pictures, count, folders_in, images_in, not_here
from vlmscope.data.published.sampling import Decks, Drawn, balanced, example, in_order, shuffled
from vlmscope.data.questions.synonyms import near
from vlmscope.errors import DataError

NAME = "mit-states"
SIZE = 500
KINDS: dict[str, tuple[str, ...]] = {
    "color": tuple(
        """bright browned burnt caramelized clean clear cloudy dark dirty dull foggy mossy muddy
        murky painted ripe rusty sunny unpainted unripe verdant""".split()
    ),
    "shape": tuple(
        """bent broken coiled crushed curved cut dented diced folded huge inflated large narrow
        short sliced small straight tall thick thin tiny wide winding""".split()
    ),
    "texture": tuple(
        """brushed chipped cracked crumpled engraved frayed peeled rough ruffled scratched smooth
        weathered worn wrinkled""".split()
    ),
}

NO_STATE = "a folder whose adjective is 'adj', that is none"
NO_KIND = "a folder whose adjective is of none of the three kinds"
EMPTY = "a folder without images"
ALONE = "a folder whose noun has no other state of the kind to stand against"
NO_FOIL = "no image of another state of the noun is left"


@dataclass(frozen=True)
class Found:
    """An image, and what its folder says it shows."""

    path: Path
    kind: str
    adjective: str
    noun: str


def load(root: Path, limit: int | None, seed: int, dropped: dict[str, int]) -> list[Example]:
    """The examples of the release in `root`; what was left out is counted in `dropped`."""
    states = read_states(root, dropped)
    pictures = Pictures(dropped)
    decks = Decks(
        {f"{adjective} {noun}": files for (adjective, noun), files in states.items()},
        pictures,
        *(NAME, "foils", seed),
    )
    partners = _partners(list(states))
    count(dropped, ALONE, sum(1 for others in partners.values() if not others))
    items: dict[str, list[Found]] = {kind: [] for kind in KINDS}
    for (adjective, noun), others in sorted(partners.items()):
        kind = kind_of(adjective)
        if others and kind:
            items[kind] += [Found(p, kind, adjective, noun) for p in states[adjective, noun]]

    def make(found: Found) -> tuple[Found, Path, str] | None:
        if not pictures.readable(found.path):
            return None
        others = sorted(partners[found.adjective, found.noun])
        key = (NAME, seed, found.adjective, found.noun, found.path.name)
        folders = [f"{foil} {found.noun}" for foil in shuffled(others, *key)]
        partner = decks.partner(found.path, folders)
        if partner is None:
            count(dropped, NO_FOIL)
            return None
        return found, partner[1], partner[0].split()[0]

    decked = {kind: shuffled(some, NAME, kind, seed) for kind, some in items.items()}
    drawn = balanced(decked, make, size=SIZE, limit=limit, dropped=dropped)
    return [_example(one) for one in drawn]


def read_states(root: Path, dropped: dict[str, int]) -> dict[tuple[str, str], list[Path]]:
    """The images of each (adjective, noun) whose adjective is of one of the kinds."""
    folders = [*folders_in(root), *folders_in(root / "images")]
    named = [folder for folder in folders if _names_a_state(folder.name)]
    if not named:
        raise not_here(NAME, root, "folders named 'adjective noun', such as 'ripe apple'")
    found: dict[tuple[str, str], list[Path]] = {}
    empty: list[Path] = []
    for folder in named:
        adjective, noun = folder.name.lower().split(maxsplit=1)
        if adjective == "adj":
            count(dropped, NO_STATE)
        elif kind_of(adjective) is None:
            count(dropped, NO_KIND)
        elif images := images_in(folder):
            found.setdefault((adjective, noun), []).extend(images)
        else:
            empty.append(folder)
    if empty and not found:
        raise DataError(
            f"{root}: {len(empty)} folders such as {empty[0].name!r} and no image in them; "
            f"expected {empty[0].name}/*.jpg; unpack {NAME} again"
        )
    count(dropped, EMPTY, len(empty))
    return found


def kind_of(adjective: str) -> str | None:
    """The kind of an adjective, if it is of one.

    >>> kind_of("ripe"), kind_of("tall"), kind_of("smooth"), kind_of("young")
    ('color', 'shape', 'texture', None)
    """
    return next((kind for kind, words in KINDS.items() if adjective in words), None)


def ask(noun: str, first: str, second: str) -> str:
    """The question with its two options.

    >>> ask("garden hose", "coiled", "straight")
    'is this garden hose coiled or straight?'
    """
    return f"is this {noun} {first} or {second}?"


def _names_a_state(name: str) -> bool:
    words = name.lower().split()
    return len(words) > 1 and (words[0] == "adj" or words[0] in ADJECTIVES)


def _partners(states: list[tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    """The adjectives that can stand against each one: same noun and kind, no near-synonyms."""
    by_noun: dict[str, list[str]] = {}
    for adjective, noun in states:
        by_noun.setdefault(noun, []).append(adjective)
    return {
        (adjective, noun): [
            other
            for other in by_noun[noun]
            if other != adjective and kind_of(other) == kind_of(adjective) and not near(other, adjective)
        ]
        for adjective, noun in states
    }


def _example(drawn: Drawn[tuple[Found, Path, str]]) -> Example:
    found, path, foil = drawn.made
    prompt = ask(found.noun, *in_order(drawn.order, found.adjective, foil))
    stem = f"{found.adjective}-{found.noun.replace(' ', '-')}-{found.path.stem}"
    return example(
        f"mit-{stem}-{foil}",
        (found.path, path),
        prompt,
        (found.adjective, foil),
        groups={"kind": found.kind, "order": drawn.order, "noun": found.noun},
    )

"""MIT-States: one noun in two states, "is this apple ripe or unripe?".

As distributed: a folder "{adjective} {noun}" for each pair, in the root or in `images/`; folders whose
adjective is literally "adj" show the noun in no state and are left out. The corrupt image shows the same
noun with another adjective of the same kind, as in NOTICE (Golovanevsky et al., arXiv 2406.16320). That
paper has 21 adjectives of color, 23 of shape and 14 of texture and does not list them: which ones are here
(`folders.toml`) is our choice, out of the 115, in the same numbers. `color` is any look that is neither
form nor surface.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmscope.data.example import Example
from vlmscope.data.published.layout import STATES, folders_in, images_in
from vlmscope.data.published.sampling import Source, label_examples
from vlmscope.data.questions import in_order
from vlmscope.data.questions.synonyms import near
from vlmscope.errors import DataError

KINDS = ("color", "shape", "texture")


def load(source: Source) -> list[Example]:
    """The examples of the release; what was left out is counted in `source`."""
    states = read_states(source)
    partners = _partners(states)
    alone = list(partners.values()).count([])
    source.drop("a folder whose noun has no other state of the kind to stand against", alone)
    groups: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for state in sorted(partners):
        if partners[state]:
            groups[STATES[state.split()[0]]].append(state)

    def rivals(state: str, path: Path) -> list[str]:
        return source.shuffled(partners[state], source.seed, *state.split(maxsplit=1), path.name)

    def ask(state: str, rival: str, order: str) -> dict[str, Any]:
        adjective, noun = state.split(maxsplit=1)
        foil = rival.split()[0]
        first, second = in_order(order, adjective, foil)
        groups = {"kind": STATES[adjective], "order": order, "noun": noun}
        prompt = f"is this {noun} {first} or {second}?"
        return {"clean_prompt": prompt, "answer": adjective, "foil": foil, "groups": groups}

    return label_examples(source, "mit", states, groups, rivals, ask, "another state of the noun")


def read_states(source: Source) -> dict[str, list[Path]]:
    """The images of each "adjective noun" whose adjective is of one of the kinds."""
    root = source.root
    named = [
        folder
        for folder in (*folders_in(root), *folders_in(root / "images"))
        if len(folder.name.split()) > 1 and folder.name.lower().split()[0] in {"adj", *STATES}
    ]
    if not named:
        raise source.not_here("folders named 'adjective noun', such as 'ripe apple'")
    found: dict[str, list[Path]] = {}
    empty: list[Path] = []
    for folder in named:
        adjective, noun = folder.name.lower().split(maxsplit=1)
        if adjective == "adj":
            source.drop("a folder whose adjective is 'adj', that is none")
        elif STATES[adjective] not in KINDS:
            source.drop("a folder whose adjective is of none of the three kinds")
        elif images := images_in(folder):
            found.setdefault(f"{adjective} {noun}", []).extend(images)
        else:
            empty.append(folder)
    if empty and not found:
        raise DataError(
            f"{root}: {len(empty)} folders such as {empty[0].name!r} and no image in them; "
            f"expected {empty[0].name}/*.jpg; unpack {source.name} again"
        )
    source.drop("a folder without images", len(empty))
    return found


def _partners(states: Iterable[str]) -> dict[str, list[str]]:
    """The states that can stand against each one: same noun and kind, no near-synonyms."""
    adjectives: dict[tuple[str, str], list[str]] = {}
    for state in sorted(states):
        adjective, noun = state.split(maxsplit=1)
        adjectives.setdefault((noun, STATES[adjective]), []).append(adjective)
    return {
        f"{adjective} {noun}": [
            f"{other} {noun}" for other in alike if other != adjective and not near(other, adjective)
        ]
        for (noun, _), alike in adjectives.items()
        for adjective in alike
    }

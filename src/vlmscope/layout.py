"""What stands at each position of a tower in one run, and what positions are called over examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """What stands at each position of one tower in one run.

    `text` are the positions of text tokens, `roles` maps a role to its positions, `cells` maps an
    image position to its grid cell `(row, column)`. `image` are all positions of the image, where some
    have no cell in the grid (further views of it, ends of lines). `sequences` says over how many
    sequences of a batch the positions are spread, laid end to end (several pictures). `readout` is the
    position whose prediction is scored (the first of them, where a whole answer is), in the tower that
    predicts; `fed` says how many tokens of the answer stand at the end (what both options begin with, or all
    of a whole answer but its last), and `behind` how many tokens before
    those are no longer the prompt's own (the end of a chat template, a separator).
    """

    tokens: tuple[str, ...]
    text: tuple[int, ...] = ()
    roles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cells: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    image: tuple[int, ...] = ()
    sequences: int = 1
    readout: int | None = None
    fed: int = 0
    behind: int = 0


def grid(layout: Layout) -> tuple[int, int]:
    """Rows and columns of the patches of the image in a tower; (0, 0) without an image."""
    cells = layout.cells.values()
    return max((r + 1 for r, _ in cells), default=0), max((c + 1 for _, c in cells), default=0)


def slots(layout: Layout) -> tuple[str, ...]:
    """What each position is called over examples whose prompts differ: no two of one example the same.

    - `readout`: the position whose prediction is scored.
    - `noun`, `answer` …: a role's token; `noun[0]`, `noun[1]` where the role has several.
    - `0`, `1` …: text before the first role, counted from the left (where there is no role, all of the
      prompt).
    - `noun+1`, `noun+2` …: text behind a role and before the next.
    - `-1`, `-2` …: text behind the last role and what a template writes behind the prompt, counted from the
      right.
    - `fed[0]` …: the tokens of the answer that are fed.
    - `image[3,7]`: a place of the picture (row, column); `image.12`: the 13th of the image's tokens, where
      it has no such place.

    Where there is no text (a vision tower), what has no place in the picture is called by its position.

    >>> slots(Layout(("is", "red", "or", "blue", "?"), (0, 1, 2, 3, 4), {"answer": (1,), "foil": (3,)}))
    ('0', 'answer', 'answer+1', 'foil', '-1')
    """
    many = len(layout.tokens)
    end = many - layout.fed
    names: dict[int, str] = {} if layout.readout is None else {layout.readout: "readout"}
    for n, position in enumerate(range(end, many)):
        names.setdefault(position, f"fed[{n}]")
    anchors: dict[int, str] = {}
    for role, at in layout.roles.items():
        for n, position in enumerate(at):
            anchors.setdefault(position, role)
            names.setdefault(position, role if len(at) == 1 else f"{role}[{n}]")
    for position, (row, column) in layout.cells.items():
        names.setdefault(position, f"image[{row},{column}]")
    if not layout.text:
        return tuple(names.get(position, str(position)) for position in range(many))
    for n, position in enumerate(layout.image):
        names.setdefault(position, f"image.{n}")
    text = [position for position in range(end) if position in anchors or position in layout.text]
    first, last = min(anchors, default=many), max(anchors, default=many)
    role, steps = "", 0
    for n, position in enumerate(text):
        if position in anchors:
            role, steps = anchors[position], 0
            continue
        steps += 1
        if position > last or n >= len(text) - layout.behind:
            name = str(n - len(text))
        else:
            name = str(n) if position < first else f"{role}+{steps}"
        names.setdefault(position, name)
    return tuple(names.get(position, f"at {position}") for position in range(many))

"""What stands at each position of a tower in one run, and what positions are called over examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from vlmscope.errors import SiteError, nearest, shown

NAMES = ("all", "last", "readout", "text", "question", "before", "image", "sinks")
"""The names of positions that are no roles."""
_CELL = re.compile(r"image\[(\d+),(\d+)\]")
_OBJECT = re.compile(r"image\[(-?)([A-Za-z_]\w*)(?:\+(\d+))?\]")


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
    those are no longer the prompt's own (the end of a chat template, a separator). `question` are the tokens
    of the prompt as a person wrote it. `objects` maps the name of a mask to the positions of the image that
    it covers, `sinks` gives those that draw attention whatever they show; both are found when they are asked
    for.
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
    question: tuple[int, ...] = ()
    objects: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    sinks: Callable[[], tuple[int, ...]] | None = field(default=None, repr=False, compare=False)


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


def said(layout: Layout, many: int) -> Layout:
    """The layout with so many words behind it that the model has said: text, the last of which is read out.

    >>> said(Layout(("is", "it"), (0, 1), readout=1), 2).readout
    3
    """
    now = len(layout.tokens) + many
    words = tuple(range(len(layout.tokens), now))
    tokens = (*layout.tokens, *("" for _ in words))
    return replace(layout, tokens=tokens, text=(*layout.text, *words), readout=now - 1)


def named(layout: Layout, name: str, tower: str) -> tuple[int, ...]:
    """The positions of one name, one cell, one object or one number (from the end, if negative).

    Raises `SiteError` if there are none, with what there is in the tower.

    >>> named(Layout(("[CLS]", "red", "?"), (0, 1, 2), {"answer": (1,)}), "answer", "encoder")
    (1,)
    """
    many = len(layout.tokens)
    if name.lstrip("-").isdigit():
        if not -many <= int(name) < many:
            raise SiteError(
                f"no position {name}; the {tower} tower has positions 0 to {many - 1} here; name one of these"
            )
        return (int(name) % many,)
    if name == "readout" and layout.readout is None:
        raise SiteError(
            f"nothing is read out in the {tower} tower; expected readout in the last tower, which predicts "
            "the answer"
        )
    lacking = f"no position {shown(name)} in the {tower} tower"
    if match := _CELL.fullmatch(name):
        wanted = (int(match[1]), int(match[2]))
        found = tuple(i for i, at in layout.cells.items() if at == wanted)
        rows, columns = grid(layout)
        way = f"the image here has {rows} rows and {columns} columns of patches; name one of these"
    elif match := _OBJECT.fullmatch(name):
        found = _object(layout, match[2], int(match[3] or 0), bool(match[1]), lacking)
        way = "its object covers all of the image" if match[1] else "its object covers no patch"
    elif name == "sinks":
        found = layout.sinks() if layout.sinks else ()
        way = "no token of the image draws attention by the size of its state there; leave it out"
    else:
        image = layout.image or tuple(layout.cells)
        reserved = {
            "all": tuple(range(many)),
            "last": (many - 1,),
            "readout": () if layout.readout is None else (layout.readout,),
            "text": layout.text,
            "question": layout.question,
            "before": tuple(n for n in layout.text if image and n < min(image)),
            "image": image,
        }
        known = {**reserved, **layout.roles, **reserved}  # a role of that name does not take its place
        found = known.get(name, ())
        there = [name for name, at in known.items() if at and name not in ("all", "last")]
        way = "name one of the positions with a name here: " + ", ".join(["all", "last", *there])
    if not found:
        raise SiteError(f"{lacking}; {way}")
    return found


def _object(layout: Layout, name: str, margin: int, outside: bool, lacking: str) -> tuple[int, ...]:
    """The cells of an object and of a margin of so many cells around it, or all others of the image."""
    if not layout.cells:
        raise SiteError(f"{lacking}; its image has no grid of patches; name image")
    if name not in layout.objects:
        there = ", ".join(layout.objects) or "none"
        raise SiteError(
            f"{lacking}: the example has no mask or box of that name (there: {there}); give one, as "
            f"mask_path or box in a CSV file{nearest(name, layout.objects)}"
        )
    own = [layout.cells[n] for n in layout.objects[name]]
    rows, columns = grid(layout)
    near = {
        (row + down, column + right)
        for row, column in own
        for down in range(-min(margin, rows), min(margin, rows) + 1)
        for right in range(-min(margin, columns), min(margin, columns) + 1)
    }
    return tuple(n for n, at in layout.cells.items() if (at in near) != outside)

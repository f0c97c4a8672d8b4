"""The site language: one small way to write any place in a model.

    tower.layer.kind[.unit]@position

`encoder.*.cross.h*@answer` is every cross-attention head of the question encoder at the answer's
token. An expression is parsed once into a frozen `Site`, which prints back as it was written.

========  =========================================================================================
tower     `vision`, `qformer`, `encoder`, `decoder`: what the model has
layer     `5`, a range `3-7` (each layer on its own), `*`; `5/3`: a window of three layers around
          layer 5, together as one patch (at the ends of the tower it is cut off), `*/3`: each of them
kind      `resid` (a block's output), `resid_pre` (its input), `attn`, `cross`, `mlp` (what the
          sublayer adds to the residual stream, before it is added), `output` (what the tower hands
          on, after its final norm or projection; only the last layer has it, where there is one),
          `deepstack` (what Qwen3-VL adds to the image's tokens behind a block)
unit      `.h3`: a head's value output, before the output projection (kinds `attn`, `cross`);
          `.n512`: a neuron's activation, the input of the down projection (kind `mlp`);
          `.h*`, `.n*`: each of them
position  each on its own: `5`, `-1`, `last`, a range `2-6`, `*`; together, as one patch: `all`,
          `text`, `image`, a role (`answer`, `noun`, …; one token as a rule); one grid cell:
          `image[3,7]` (row, column); `text*`, `image*`, `answer*`: each token of those on its own;
          `readout`: the position whose prediction is scored, in the tower that predicts
========  =========================================================================================
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

from vlmscope.errors import SiteError

TOWERS = ("vision", "qformer", "encoder", "decoder")
KINDS = ("resid_pre", "attn", "cross", "mlp", "resid", "deepstack", "output")
UNITS = {"h": ("head", ("attn", "cross")), "n": ("neuron", ("mlp",))}

Range: TypeAlias = tuple[int, int]


class Point(NamedTuple):
    """Where a tensor can be read or written: one layer's activation, at all positions and units.

    `part` is `h` for the heads' outputs, `n` for the neurons' activations, empty for a kind itself.
    """

    tower: str
    layer: int
    kind: str
    part: str


@dataclass(frozen=True)
class Shape:
    """What one tower of a model has: the sites that exist in it.

    `lacks` names, by kind, the layers that do not have it. `width` is that of the residual stream,
    `widths` names what is of another.
    """

    layers: int
    kinds: tuple[str, ...]
    heads: Mapping[str, int]
    neurons: int
    width: int
    lacks: Mapping[str, frozenset[int]] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)

    def having(self, kind: str) -> list[int]:
        """The layers that have a kind."""
        lacks = self.lacks.get(kind, ()) if kind in self.kinds else range(self.layers)
        return [n for n in range(self.layers) if n not in lacks]


@dataclass(frozen=True)
class Layout:
    """What stands at each position of one tower in one run.

    `text` are the positions of text tokens, `roles` maps a role to its positions, `cells` maps an
    image position to its grid cell `(row, column)`. `image` are all positions of the image, where some
    have no cell in the grid (further views of it, ends of lines). `sequences` says over how many
    sequences of a batch the positions are spread, laid end to end (several pictures). `readout` is the
    position whose prediction is scored, in the tower that predicts; `fed` says how many tokens of the
    answer stand at the end, because both options begin with them, and `behind` how many tokens before
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


@dataclass(frozen=True)
class Site:
    """A place in a model, or a pattern of places (`*` and ranges).

    >>> site = Site.parse("encoder.*.cross.h*@answer")
    >>> site.tower, site.kind, site.position
    ('encoder', 'cross', 'answer')
    >>> str(site)
    'encoder.*.cross.h*@answer'
    """

    tower: str
    layer: str
    kind: str
    unit: str | None
    position: str

    @classmethod
    def parse(cls, text: str) -> Site:
        """Parse one expression; raises `SiteError` that names the part that is wrong."""
        return _parse(text)

    def __str__(self) -> str:
        unit = f".{self.unit}" if self.unit else ""
        return f"{self.tower}.{self.layer}.{self.kind}{unit}@{self.position}"

    @property
    def point(self) -> Point:
        """The activation this site lies in; raises `SiteError` for a window or a pattern of layers."""
        if self.window > 1:
            raise SiteError(f"bad site '{self}': a window of layers; expected one layer here")
        return Point(self.tower, self.center, self.kind, self.unit[0] if self.unit else "")

    @property
    def center(self) -> int:
        """The layer, or the middle one of a window; raises `SiteError` for a pattern of layers."""
        return self._number(self.layer.partition("/")[0], "layers")

    @property
    def window(self) -> int:
        """How many layers are patched together; 1 for a single layer."""
        return int(self.layer.partition("/")[2] or 1)

    @property
    def index(self) -> int | None:
        """The number of the head or neuron, or None for the kind itself; `SiteError` for a pattern."""
        return self._number(self.unit[1:], "units") if self.unit else None

    def _number(self, part: str, what: str) -> int:
        if not part.isdigit():
            raise SiteError(
                f"bad site '{self}': '{part}' is a pattern of {what}; expected one here (expand gives "
                "each of them)"
            )
        return int(part)

    @property
    def role(self) -> str | None:
        """The role that the position names, if it names one."""
        name = self.position.removesuffix("*")
        return name if re.fullmatch(r"[a-z_]\w*", name) and name not in _NAMES else None


_NAMES = ("all", "last", "text", "image", "readout")
_NUMBER = re.compile(r"\d+")
_RANGE = re.compile(r"(\d+)-(\d+)")
_CELL = re.compile(r"image\[(\d+),(\d+)\]")


def _wrong(text: str, part: str, at: int, why: str) -> SiteError:
    return SiteError(f"bad site '{text}': '{part}' (character {at + 1}) {why}")


def _one_of(part: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    near = difflib.get_close_matches(part, allowed, n=1)
    return (f"; did you mean '{near[0]}'?" if near else "") + f" (allowed: {', '.join(allowed)})"


def _parse(text: str) -> Site:
    text = text.strip()
    place, at, position = text.partition("@")
    parts = place.split(".")
    if not at or not position:
        raise SiteError(
            f"bad site '{text}': no position; expected tower.layer.kind[.unit]@position, "
            "such as encoder.*.cross.h*@answer"
        )
    if not 3 <= len(parts) <= 4:
        raise SiteError(
            f"bad site '{text}': '{place}' has {len(parts)} parts; "
            "expected tower.layer.kind or tower.layer.kind.unit before the @"
        )
    starts = [sum(len(p) + 1 for p in parts[:i]) for i in range(len(parts))]
    tower, layer, kind = parts[:3]
    unit = parts[3] if len(parts) == 4 else None
    if tower not in TOWERS:
        raise _wrong(text, tower, starts[0], f"is not a tower{_one_of(tower, TOWERS)}")
    if not re.fullmatch(r"(\*|\d+|\d+-\d+)(/\d*[13579])?", layer):
        raise _wrong(text, layer, starts[1], "is not a layer; expected 5, 3-7 or *, or 5/3 (an odd window)")
    if kind not in KINDS:
        raise _wrong(text, kind, starts[2], f"is not a kind{_one_of(kind, KINDS)}")
    if unit is not None:
        _check_unit(text, unit, kind, starts[3])
    _check_position(text, position, len(place) + 1)
    return Site(tower, layer, kind, unit, position)


def _check_unit(text: str, unit: str, kind: str, at: int) -> None:
    if not re.fullmatch(r"[hn](\*|\d+)", unit):
        raise _wrong(text, unit, at, "is not a unit; expected h3, h*, n512 or n*")
    name, kinds = UNITS[unit[0]]
    if kind not in kinds:
        raise _wrong(text, unit, at, f"is a {name}; only {' and '.join(kinds)} have {name}s")


def _check_position(text: str, position: str, at: int) -> None:
    pattern = r"\*|-?\d+|\d+-\d+|image\[\d+,\d+\]|[A-Za-z_]\w*\*?"
    if not re.fullmatch(pattern, position):
        raise _wrong(
            text,
            position,
            at,
            "is not a position; expected 5, -1, 2-6, last, readout, *, all, text, image, image[3,7] or a role",
        )


def expand(sites: Iterable[Site], shapes: Mapping[str, Shape]) -> list[Site]:
    """All sites that the patterns name in a model of these towers: one layer and unit each.

    Positions stay as written (they depend on the example: see `place`). A `*` layer passes over
    layers that lack the kind; a site that exists nowhere raises `SiteError`.

    >>> shapes = {"vision": Shape(2, ("resid", "attn"), {"attn": 2}, 8, 4)}
    >>> [str(s) for s in expand([Site.parse("vision.*.attn.h*@all")], shapes)][:2]
    ['vision.0.attn.h0@all', 'vision.0.attn.h1@all']
    """
    found: dict[Site, None] = {}
    for site in sites:
        found.update(dict.fromkeys(_expand(site, shapes)))
    return list(found)


def _expand(site: Site, shapes: Mapping[str, Shape]) -> list[Site]:
    text = str(site)
    if site.tower not in shapes:
        raise SiteError(
            f"bad site '{text}': this model has no '{site.tower}' tower{_one_of(site.tower, shapes)}"
        )
    shape = shapes[site.tower]
    if site.kind not in shape.kinds:
        raise SiteError(
            f"bad site '{text}': the {site.tower} tower of this model has no "
            f"'{site.kind}'{_one_of(site.kind, shape.kinds)}"
        )
    numbers, _, window = site.layer.partition("/")
    layers = _numbers(text, "layer", numbers, shape.layers)
    window = f"/{window}" if window not in ("", "1") else ""
    there = shape.having(site.kind)
    if numbers != "*" and "-" not in numbers and layers[0] not in there:
        raise SiteError(
            f"bad site '{text}': layer {numbers} of the {site.tower} tower has no "
            f"'{site.kind}'; these have: {', '.join(map(str, there))}"
        )
    layers = [n for n in layers if n in there]
    if site.kind == "output":
        if window:
            raise SiteError(f"bad site '{text}': there is one 'output', so no window of layers")
        if numbers != "*" and layers != [shape.layers - 1]:
            raise SiteError(f"bad site '{text}': only the last layer, {shape.layers - 1}, has 'output'")
        layers = [shape.layers - 1]
    if site.unit is None:
        return [replace(site, layer=f"{n}{window}") for n in layers]
    many = shape.heads[site.kind] if site.unit[0] == "h" else shape.neurons
    name = UNITS[site.unit[0]][0]
    units = _numbers(text, name, site.unit[1:], many)
    return [replace(site, layer=f"{n}{window}", unit=f"{site.unit[0]}{u}") for n in layers for u in units]


def members(site: Site, shapes: Mapping[str, Shape]) -> list[Site]:
    """The sites of one layer each that an expanded site patches together, lowest layer first.

    >>> shapes = {"vision": Shape(4, ("resid",), {}, 8, 4)}
    >>> [str(s) for s in members(Site.parse("vision.3/3.resid@all"), shapes)]
    ['vision.2.resid@all', 'vision.3.resid@all']
    """
    reach, depth = site.window // 2, shapes[site.tower].layers
    layers = range(max(0, site.center - reach), min(depth, site.center + reach + 1))
    there = shapes[site.tower].having(site.kind)
    return [replace(site, layer=str(n)) for n in layers if n in there]


def _numbers(text: str, what: str, part: str, many: int) -> list[int]:
    if part == "*":
        return list(range(many))
    first, last = (int(p) for p in (part.split("-") if "-" in part else (part, part)))
    if first > last or last >= many:
        raise SiteError(f"bad site '{text}': no {what} {part}; this tower has {what}s 0 to {many - 1}")
    return list(range(first, last + 1))


def place(site: Site, layout: Layout) -> list[tuple[Site, tuple[int, ...]]]:
    """The patches a site names at the positions of one example: `(site, positions)` each.

    A pattern of positions (`*`, `2-6`, `text*`) becomes one site a position, written with its
    index; a name that stands for several tokens stays one patch of several positions.

    >>> layout = Layout(("[CLS]", "red", "?"), text=(0, 1, 2), roles={"answer": (1,)})
    >>> [(str(s), p) for s, p in place(Site.parse("encoder.0.resid@1-2"), layout)]
    [('encoder.0.resid@1', (1,)), ('encoder.0.resid@2', (2,))]
    """
    name, many = site.position, len(layout.tokens)
    if name == "*":
        return _each(site, range(many))
    if _RANGE.fullmatch(name):
        return _each(site, _numbers(str(site), "position", name, many))
    if name.endswith("*"):
        return _each(site, _named(site, name[:-1], layout))
    if name.lstrip("-").isdigit():
        index = int(name)
        if not -many <= index < many:
            raise SiteError(
                f"bad site '{site}': no position {name}; the {site.tower} tower has "
                f"positions 0 to {many - 1} here"
            )
        return [(site, (index % many,))]
    return [(site, _named(site, name, layout))]


def _each(site: Site, positions: Iterable[int]) -> list[tuple[Site, tuple[int, ...]]]:
    return [(replace(site, position=str(i)), (i,)) for i in positions]


def _named(site: Site, name: str, layout: Layout) -> tuple[int, ...]:
    if name == "all":
        return tuple(range(len(layout.tokens)))
    if name == "last":
        return (len(layout.tokens) - 1,)
    if name == "readout":
        if layout.readout is None:
            raise SiteError(
                f"bad site '{site}': nothing is read out in the {site.tower} tower; expected "
                "readout in the last tower, which predicts the answer"
            )
        return (layout.readout,)
    cell = _CELL.fullmatch(name)
    if cell:
        wanted = (int(cell[1]), int(cell[2]))
        found = tuple(i for i, at in layout.cells.items() if at == wanted)
        rows, columns = grid(layout)
        size = f"the image here has {rows} rows and {columns} columns of patches"
    else:
        known = {"text": layout.text, "image": layout.image or tuple(layout.cells), **layout.roles}
        found = known.get(name, ())
        size = "positions with a name here: " + ", ".join(n for n, at in known.items() if at)
    if not found:
        raise SiteError(f"bad site '{site}': no position '{name}' in the {site.tower} tower; {size}")
    return found


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
    - `fed[0]` …: the beginning of the answer, where both options share it.
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

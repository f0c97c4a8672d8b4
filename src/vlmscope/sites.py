"""The site language: one small way to write any place in a model.

    tower.layer.kind[.unit]@position[<source]

`encoder.*.cross.h*@answer` is every cross-attention head of the question encoder at the answer's
token. An expression is parsed once into a `Pattern`, which prints back as it was written; `expand`
makes `Site`s of it, and `place` gives these the positions that they have in one example.

========  =========================================================================================
tower     `vision`, `qformer`, `encoder`, `decoder`: what the model has
layer     `5`, a range `3-7` (each layer on its own), `*`; `5/3`: a window of three layers around
          layer 5, together as one patch (at the ends of the tower it is cut off), `*/3`: each of them
kind      `resid` (a block's output), `resid_pre` (its input), `resid_mid` (between attention and
          MLP), `attn`, `cross`, `mlp` (what the sublayer adds to the residual stream, before it is
          added), `output` (what the tower hands on, after its final norm or projection; only the last
          layer has it, where there is one), `deepstack` (what Qwen3-VL adds to the image's tokens
          behind a block)
unit      `.h3`: a head's value output, before the output projection (kinds `attn`, `cross`); `.q3`,
          `.p3`: its query, its attention pattern (a row of probabilities a position); `.k1`, `.v1`: a
          key, a value (of `attn` alone; they count key-value heads); `.n512`: a neuron's activation, the
          input of the down projection (kind `mlp`); `.h*`: each of them; `.h[3,7]`: these, as one patch
position  each on its own: `5`, `-1`, `last`, a range `2-6`, `*`; together, as one patch: `all`,
          `text`, `image`, a role (`answer`, `noun`, …; one token as a rule); one grid cell:
          `image[3,7]` (row, column); `text*`, `image*`, `answer*`: each token of those on its own;
          `readout`: the position whose prediction is scored, in the tower that predicts; `question`:
          the prompt as it was written; `before`: the text before the image; `image[object]`: the patches
          that a mask or box of the example covers, `image[object+2]`: and two around it,
          `image[-object]`: all others; `sinks`: tokens of the image that draw attention whatever they show
source    `last<image`: an edge of attention, what the positions before `<` read from those after it (in
          `cross` positions of the tower that is read)
========  =========================================================================================

`A + B` is several sites as one patch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from vlmscope.errors import SiteError, line, nearest, shown
from vlmscope.layout import NAMES, Layout, named

TOWERS = ("vision", "qformer", "encoder", "decoder")
KINDS = ("resid_pre", "attn", "cross", "resid_mid", "mlp", "resid", "deepstack", "output")
ATTENTION = ("attn", "cross")
UNITS = {
    "h": ("head", ATTENTION),
    "q": ("query", ATTENTION),
    "k": ("key", ("attn",)),  # those of cross-attention stand at the positions of what it reads
    "v": ("value", ("attn",)),
    "p": ("attention pattern", ATTENTION),
    "n": ("neuron", ("mlp",)),
}


LONGEST = 100_000
"""Characters of the longest expression that is read."""


class Point(NamedTuple):
    """Where a tensor can be read or written: one layer's activation, at all positions and units.

    `part` is the letter of the units, empty for a kind itself.
    """

    tower: str
    layer: int
    kind: str
    part: str = ""


@dataclass(frozen=True)
class Shape:
    """What one tower of a model has: the sites that exist in it.

    `lacks` names, by kind, the layers that do not have it, `width` is that of the residual stream, `widths`
    that of kinds which differ, `groups` are key-value heads, where they are fewer than heads, `reads` is the
    tower that `cross` attends to.
    """

    layers: int
    kinds: tuple[str, ...]
    heads: Mapping[str, int]
    neurons: int
    width: int
    lacks: Mapping[str, frozenset[int]] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    groups: int | None = None
    reads: str | None = None

    def having(self, kind: str) -> list[int]:
        """The layers that have a kind."""
        lacks = self.lacks.get(kind, ()) if kind in self.kinds else range(self.layers)
        return [n for n in range(self.layers) if n not in lacks]

    def units(self, kind: str, part: str) -> int | None:
        """How many heads, queries, neurons … lie side by side at a kind; None for a kind itself."""
        if part in ("k", "v") and self.groups:
            return self.groups
        return {"": None, "n": self.neurons}.get(part, self.heads.get(kind))


@dataclass(frozen=True)
class Pattern:
    """What a person writes: one expression, which may name many places; `also` are those behind a `+`.

    >>> pattern = Pattern.parse("encoder.*.cross.h[0,3]@answer")
    >>> pattern.tower, pattern.kind, pattern.part, pattern.position
    ('encoder', 'cross', 'h', 'answer')
    >>> str(pattern)
    'encoder.*.cross.h[0,3]@answer'
    """

    tower: str
    layers: str
    kind: str
    part: str
    units: str
    position: str
    source: str = ""
    also: tuple[Pattern, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse one expression; raises `SiteError` that names the part that is wrong."""
        if not isinstance(text, str):
            raise SiteError(
                f"bad site {shown(text)}; expected an expression such as 'encoder.0.resid@answer'"
            )
        if len(text) > LONGEST:
            raise SiteError(
                f"bad site {shown(text)}: has {len(text):,} characters; expected at most {LONGEST:,}, write "
                "several sites instead"
            )
        first, *more = (_parse(part, text.strip()) for part in re.split(r"\s+\+\s+", text.strip()))
        return replace(first, also=tuple(more))

    def __str__(self) -> str:
        return _written(self, self.layers, self.units)

    @property
    def roles(self) -> list[str]:
        """The roles that its positions name."""
        names = [name.removesuffix("*") for name in (self.position, self.source)]
        found = [name for name in names if re.fullmatch(r"[A-Za-z_]\w*", name) and name not in NAMES]
        return found + [role for one in self.also for role in one.roles]


@dataclass(frozen=True)
class Site:
    """One patch: one or more layers of a kind, its units (all where there are none), its positions.

    `layer` is the layer, or the middle one of a window of `layers`; `position` is how the positions
    were written, `positions` their numbers in one example (none before `place`); `source` and `sources` say
    the same of what is read over an edge, in the tower `reads`. `also` are further places of the same patch
    (`A + B`).
    """

    tower: str
    layer: int
    kind: str
    part: str = ""
    units: tuple[int, ...] = ()
    position: str = "all"
    positions: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    window: int = 1
    source: str = ""
    sources: tuple[int, ...] = ()
    reads: str = ""
    also: tuple[Site, ...] = ()

    def __str__(self) -> str:
        layers = f"{self.layer}/{self.window}" if self.window > 1 else str(self.layer)
        return _written(self, layers, (self.unit or "")[1:])

    @property
    def unit(self) -> str | None:
        """The units as they are written, such as `h3`; None for the kind itself."""
        units = self.units[0] if len(self.units) == 1 else list(self.units)
        return f"{self.part}{units}".replace(" ", "") if self.part else None

    @property
    def point(self) -> Point:
        """The activation that this site lies in, at its (middle) layer."""
        return Point(self.tower, self.layer, self.kind, self.part)

    @property
    def parts(self) -> tuple[Site, ...]:
        """The sites of one layer each that are patched together, itself where it is one."""
        own: tuple[Site, ...] = (self,)
        if self.window > 1 or self.also:
            alone = replace(self, layers=(), window=1, also=())
            own = tuple(replace(alone, layer=n) for n in self.layers or (self.layer,))
        return own + tuple(part for site in self.also for part in site.parts)


def _written(one: Any, layers: str, units: str) -> str:
    """A pattern or a site, with its layers and units as they are written."""
    unit = f".{one.part}{units}" if one.part else ""
    edge = f"<{one.source}" if one.source else ""
    text = f"{one.tower}.{layers}.{one.kind}{unit}@{one.position}{edge}"
    return " + ".join([text, *map(str, one.also)])


_N = "[0-9]{1,9}"
_LAYERS = re.compile(rf"(\*|{_N}|{_N}-{_N})(/[0-9]{{0,8}}[13579])?")
_UNIT = re.compile(rf"[hqkvpn](\*|{_N}|\[{_N}(,{_N})*\])")
_RANGE = re.compile(rf"({_N})-({_N})")
_POSITION = re.compile(rf"\*|-?{_N}|{_N}-{_N}|image\[({_N},{_N}|-?[A-Za-z_]\w*(\+{_N})?)\]|[A-Za-z_]\w*\*?")


def _allowed(part: str, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    return f"{nearest(part, allowed)} (allowed: {', '.join(allowed)})"


def _parse(text: str, whole: str) -> Pattern:
    """One place of the expression `whole`."""

    def wrong(part: str, at: int, why: str) -> SiteError:
        return SiteError(f"bad site {shown(whole)}: {shown(part)} (character {begin + at + 1}) {why}")

    begin = whole.index(text)
    place, _, position = text.partition("@")
    parts = place.split(".")
    if not position:
        raise SiteError(
            f"bad site {shown(whole)}: no position; expected tower.layer.kind[.unit]@position, "
            "such as encoder.*.cross.h*@answer"
        )
    if not 3 <= len(parts) <= 4:
        raise SiteError(
            f"bad site {shown(whole)}: {shown(place)} has {len(parts)} parts; "
            "expected tower.layer.kind or tower.layer.kind.unit before the @"
        )
    starts = [sum(len(p) + 1 for p in parts[:i]) for i in range(len(parts))]
    tower, layers, kind, *unit = parts
    if tower not in TOWERS:
        raise wrong(tower, starts[0], f"is not a tower{_allowed(tower, TOWERS)}")
    if not _LAYERS.fullmatch(layers):
        raise wrong(layers, starts[1], "is not a layer; expected 5, 3-7 or *, or 5/3 (an odd window)")
    if kind not in KINDS:
        raise wrong(kind, starts[2], f"is not a kind{_allowed(kind, KINDS)}")
    for each in unit:
        if not _UNIT.fullmatch(each):
            raise wrong(each, starts[3], "is not a unit; expected h3, h*, h[3,7], q3, k3, v3, p3, n512 or n*")
        name, kinds = UNITS[each[0]]
        if kind not in kinds:
            raise wrong(each, starts[3], f"is a {name}; only {' and '.join(kinds)} have {name}s")
    position, edge, source = position.partition("<")
    at = len(place) + 1
    for each, start in ((position, at), (source, at + len(position) + 1))[: 2 if edge else 1]:
        if not _POSITION.fullmatch(each):
            names = f"5, -1, 2-6, *, {', '.join(NAMES)}, image[3,7], image[object], a role"
            raise wrong(each, start, f"is not a position; expected {names}")
    part, units = (unit[0][0], unit[0][1:]) if unit else ("", "")
    if edge and (kind not in ATTENTION or part not in ("", "h")):
        raise SiteError(
            f"bad site {shown(whole)}: an edge is of attn or cross, all of it or a head (h3); leave '<' out"
        )
    return Pattern(tower, layers, kind, part, units, position, source)


Sites = str | Pattern | Site | Iterable[str | Pattern | Site]


def parse(sites: Sites) -> list[Pattern]:
    """Patterns from expressions, patterns or sites: one, or several.

    >>> [str(pattern) for pattern in parse(["vision.*.resid@all"])]
    ['vision.*.resid@all']
    """
    several = [sites] if isinstance(sites, (str, Pattern, Site)) or not isinstance(sites, Iterable) else sites
    return [
        site if isinstance(site, Pattern) else Pattern.parse(str(site) if isinstance(site, Site) else site)
        for site in several
    ]


def expand(patterns: Iterable[Pattern], shapes: Mapping[str, Shape]) -> list[Site]:
    """All sites that the patterns name in a model of these towers, still without numbers of positions.

    A `*` layer passes over layers that lack the kind; a site that exists nowhere raises `SiteError`.

    >>> shapes = {"vision": Shape(2, ("resid", "attn"), {"attn": 2}, 8, 4)}
    >>> [str(s) for s in expand([Pattern.parse("vision.*.attn.h*@all")], shapes)][:2]
    ['vision.0.attn.h0@all', 'vision.0.attn.h1@all']
    """
    found: dict[Site, None] = {}
    for pattern in patterns:
        first, *more = (_expand(one, shapes) for one in (pattern, *pattern.also))
        if more and any(len(some) != 1 for some in (first, *more)):
            raise SiteError(
                f"bad site {shown(pattern)}: with a + each part is one layer and one unit (or a set); write "
                "several sites instead"
            )
        also = tuple(site for (site,) in more)
        found.update(dict.fromkeys(replace(site, also=also) if also else site for site in first))
    return list(found)


def _expand(pattern: Pattern, shapes: Mapping[str, Shape]) -> list[Site]:
    """The sites of one place; what stands behind a `+` is left out."""

    def bad(why: str) -> SiteError:
        return SiteError(f"bad site {shown(replace(pattern, also=()))}: {why}")

    tower, kind = pattern.tower, pattern.kind
    if tower not in shapes:
        raise bad(f"this model has no '{tower}' tower{_allowed(tower, shapes)}")
    shape = shapes[tower]
    if kind not in shape.kinds:
        raise bad(f"the {tower} tower of this model has no '{kind}'{_allowed(kind, shape.kinds)}")
    numbers, _, width = pattern.layers.partition("/")
    window = int(width or 1)
    if pattern.source and window > shape.layers:
        raise bad(
            f"a window of {window} layers, and the {tower} tower has {shape.layers}; take a smaller one"
        )
    there = shape.having(kind)
    layers = _numbers(pattern, "layer", numbers, shape.layers)
    if numbers.isdigit() and layers[0] not in there:
        these = ", ".join(map(str, there))
        raise bad(f"layer {numbers} of the {tower} tower has no '{kind}'; these have: {these}")
    layers = [n for n in layers if n in there]
    if not layers:
        raise bad(f"no layer {numbers} has '{kind}'; name one of {', '.join(map(str, there))}")
    if kind == "output":
        last = shape.layers - 1
        if window > 1:
            raise bad("there is one 'output', so no window of layers")
        if numbers != "*" and layers != [last]:
            raise bad(f"only the last layer, {last}, has 'output'")
        layers = [last]
    units: list[tuple[int, ...]] = [()]
    if pattern.part:
        many, name = shape.units(kind, pattern.part) or 0, UNITS[pattern.part][0]
        each = _numbers(pattern, name, pattern.units.strip("[]"), many)
        units = [tuple(sorted(set(each)))] if pattern.units.startswith("[") else [(n,) for n in each]
    around = {n: tuple(m for m in there if abs(m - n) <= window // 2) if window > 1 else () for n in layers}
    site = Site(tower, 0, kind, pattern.part, (), pattern.position, window=window)
    if pattern.source:
        reads = (kind == "cross" and shape.reads) or tower
        site = replace(site, source=pattern.source, reads=reads)
    return [replace(site, layer=n, layers=around[n], units=unit) for n in layers for unit in units]


def _numbers(pattern: Pattern, what: str, part: str, many: int) -> list[int]:
    if part == "*":
        return list(range(many))
    if "," in part:
        return [n for number in part.split(",") for n in _numbers(pattern, what, number, many)]
    first, last = (int(p) for p in (part.split("-") if "-" in part else (part, part)))
    if first > last or last >= many:
        there = f"this tower has {what}s 0 to {many - 1}; name one of these"
        raise SiteError(f"bad site {shown(pattern)}: no {what} {line(part, 60)}; {there}")
    return list(range(first, last + 1))


def points_of(sites: Iterable[Site]) -> set[Point]:
    """The activations that sites lie in, those of a window or a sum each."""
    return {part.point for site in sites for part in site.parts}


def place(site: Site, layout: Mapping[str, Layout]) -> list[Site]:
    """The patches that a site names in one example: with the numbers of its positions.

    A pattern of positions (`*`, `2-6`, `text*`) becomes one site a position, written with its
    index; a name that stands for several tokens stays one patch of several positions.

    >>> text = Layout(("[CLS]", "red", "?"), text=(0, 1, 2), roles={"answer": (1,)})
    >>> [(str(s), s.positions) for s in place(Site("encoder", 0, "resid", position="1-2"), {"encoder": text})]
    [('encoder.0.resid@1', (1,)), ('encoder.0.resid@2', (2,))]
    """
    for tower in (site.tower, site.reads or site.tower):
        if tower not in layout:
            raise SiteError(
                f"bad site {shown(site)}: the {tower} tower has no part in a run without a picture; "
                f"expected {' or '.join(layout)}"
            )
    if site.also:
        each = [place(part, layout) for part in (replace(site, also=()), *site.also)]
        if any(len(some) > 1 for some in each):
            raise SiteError(
                f"bad site {shown(site)}: with a + each part is one position, or a name for several; "
                "write several sites instead"
            )
        (first,), *more = each
        return [replace(first, also=tuple(part for (part,) in more))]
    targets = _places(site, site.position, layout, site.tower)
    if not site.source:
        return [replace(site, position=name, positions=at) for name, at in targets]
    reads = site.reads or site.tower
    sources = _places(site, site.source, layout, reads, f"its {site.kind} reads the {reads} tower, and ")
    cells = layout[reads].cells
    if site.source == "image*":  # a patch is called by its place, which is the same in all examples
        sources = [("image[{},{}]".format(*cells[n]) if n in cells else name, (n,)) for name, (n,) in sources]
    return [
        replace(site, position=name, positions=at, source=source, sources=those)
        for name, at in targets
        for source, those in sources
    ]


def _places(
    site: Site, name: str, layout: Mapping[str, Layout], tower: str, meets: str = ""
) -> list[tuple[str, tuple[int, ...]]]:
    """What a position of a tower names: how it is written and its numbers."""
    each: Iterable[int]
    there = layout[tower]
    try:
        if name == "*":
            each = range(len(there.tokens))
        elif _RANGE.fullmatch(name):
            first, last = map(int, name.split("-"))
            if first > last or last >= len(there.tokens):
                many = len(there.tokens)
                raise SiteError(
                    f"no position {name}; this tower has positions 0 to {many - 1}; name one of these"
                )
            each = range(first, last + 1)
        elif name.endswith("*"):
            each = named(there, name[:-1], tower)
        else:
            return [(name, named(there, name, tower))]
    except SiteError as error:
        raise SiteError(f"bad site {shown(site)}: {meets}{error}") from None
    return [(str(i), (i,)) for i in each]

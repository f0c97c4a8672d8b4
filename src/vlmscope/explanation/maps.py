"""What each cell of a picture does to each word of an answer: exactly, and by what is used in its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vlmscope.explanation.said import At, Said, features
from vlmscope.layout import Layout, grid
from vlmscope.models.inputs import Pair
from vlmscope.patching import engine
from vlmscope.patching.scores import ROUNDING, Chunks, Score
from vlmscope.runs.forward import forward
from vlmscope.runs.model import Model
from vlmscope.runs.network import upcast
from vlmscope.sites import Site, expand, parse

Array = NDArray[np.float64]
Direction = Literal["noise", "denoise"]
LEFT = 0.05
"""The share of a word's effects that may stay in groups of cells."""


class Unit(NamedTuple):
    """Cells of the grid that are examined together: the first row and column, and how many of each."""

    row: int
    column: int
    rows: int
    columns: int

    @property
    def is_cell(self) -> bool:
        return self.rows == self.columns == 1

    def split(self) -> list[Unit]:
        """Its quarters, or halves where it is one cell wide or high."""
        down, across = _halves(self.row, self.rows), _halves(self.column, self.columns)
        return [Unit(r, c, h, w) for r, h in down for c, w in across]


def _halves(first: int, size: int) -> list[tuple[int, int]]:
    half = -(-size // 2)
    return [(first, half), (first + half, size - half)][: 1 if half == size else 2]


def start(rows: int, columns: int, patches: int) -> list[Unit]:
    """All cells, if there are no more than so many; else groups of them, a quarter as many at most.

    >>> start(2, 2, 4)[0], len(start(24, 24, 64)), start(24, 24, 64)[1]
    (Unit(row=0, column=0, rows=1, columns=1), 9, Unit(row=0, column=8, rows=8, columns=8))
    """
    size, most = 1, patches if rows * columns <= patches else max(1, patches // 4)
    while -(-rows // size) * -(-columns // size) > most:
        size *= 2
    return [
        Unit(r, c, min(size, rows - r), min(size, columns - c))
        for r in range(0, rows, size)
        for c in range(0, columns, size)
    ]


def sizes_of(units: Sequence[Unit], effects: Array, rounding: float, hints: Array) -> Array:
    """How large the effects in each unit are; what rounding does counts for nothing.

    A cell's is its effect's size. In a group effects of both signs may cancel: its is what the gradient
    expects of its cells one by one, `hints`, where that is more.
    """
    sizes = np.where(np.abs(effects) > rounding, np.abs(effects), 0.0)
    groups = np.array([not unit.is_cell for unit in units], bool)[:, None]
    return np.where(groups & (hints > rounding), np.maximum(sizes, hints), sizes)


def shares_of(sizes: Array) -> Array:
    """Each unit's share of what all units do to a word."""
    return np.asarray(sizes / np.maximum(sizes.sum(0), np.finfo(float).tiny))


def chosen(units: Sequence[Unit], shares: Array, patches: int) -> list[int]:
    """Which groups to split next: those among the strongest that make up all but `LEFT` of some word's
    effects, the strongest first, as far as so many patches go."""
    order = np.argsort(-shares, axis=0, kind="stable")
    ranked = np.take_along_axis(shares, order, 0)
    matter = np.zeros(shares.shape, bool)
    np.put_along_axis(matter, order, np.cumsum(ranked, 0) - ranked < 1 - LEFT, 0)
    worth, found = shares.max(1), list[int]()
    for n in np.argsort(-worth, kind="stable").tolist():
        cost = len(units[n].split())
        if matter[n].any() and worth[n] > 0 and not units[n].is_cell and cost <= patches:
            found.append(n)
            patches -= cost
    return found


def positions(layout: Layout, units: Iterable[Unit]) -> list[tuple[int, ...]]:
    """The positions of the cells of each unit."""
    at = {cell: position for position, cell in layout.cells.items()}
    each = (
        ((r, c) for r in range(u.row, u.row + u.rows) for c in range(u.column, u.column + u.columns))
        for u in units
    )
    return [tuple(sorted(at[cell] for cell in cells if cell in at)) for cells in each]


def layout_of(said: Said) -> Layout:
    """Where the cells of the picture are that are replaced."""
    return said.pair.clean.layout[features(said.model, said.at)[0].tower]


def replaced(model: Model, places: tuple[int, ...], at: At = "features") -> Site:
    """The features of the picture (or what enters the vision tower of it) at some positions, as one patch."""
    first, *more = (replace(site, position="image", positions=places) for site in features(model, at))
    return replace(first, also=tuple(more))


def of_words(said: Said, tokens: Array) -> Array:
    """Sums over each word's tokens, of values by scored token, which are the last axis."""
    each = [tokens[..., [n - said.first for n in word.tokens]].sum(-1) for word in said.words]
    return np.stack(each, -1)


def lost(base: Score, chunks: Chunks, count: int) -> Array:
    """How much each patch takes from the log-probability of each token, in nats: `(patches, tokens)`."""
    before = base.tokens.cpu().numpy()
    found = np.zeros((count, len(before)))
    for numbers, scores in chunks:
        found[numbers] = before - scores.tokens.cpu().numpy()
    return found


class Exact(NamedTuple):
    """The effects of units, and their shares of all that is done to the word, by size, `(units, words)`; the
    effects of a region; how many patches that took; each word's log-probability in the run, and in one on the
    other picture; what rounding does to it."""

    units: list[Unit]
    effects: Array
    shares: Array
    region: Array | None
    patches: int
    logprob: Array
    without: Array
    rounding: float

    @property
    def left(self) -> Array:
        """The share of each word's effects that is in groups of cells, as far as is known."""
        groups = [not unit.is_cell for unit in self.units]
        return np.asarray(self.shares[groups].sum(0))


def exact(
    said: Said, direction: Direction, patches: int, region: tuple[int, ...] = (), hints: Array | None = None
) -> Exact:
    """Replace the features (or pixels) of each unit by those of the other picture (noise), or put them into
    the run on that (denoise), coarse to fine: groups that matter are split until cells make up all but `LEFT`
    of each word's effects, or there are no more patches to make. `hints`, `(positions, words)`, is how large
    effects are expected to be, so that what cancels in a group is not taken for nothing.

    Where the picture has no grid, only the two runs are made.
    """
    model, layout = said.model, layout_of(said)
    units = start(*grid(layout), patches) if layout.cells else []
    sites = [replaced(model, places, said.at) for places in positions(layout, units)]
    patched = engine.patch(
        model, said.pair, sites or [model.image_site], direction, metric="logprob", images=said.images
    )
    assert patched.more is not None
    base, sign = (patched.clean, 1) if direction == "noise" else (patched.corrupt, -1)

    def effects(chunks: Chunks, count: int) -> Array:
        return sign * of_words(said, lost(base, chunks, count))

    clean, other = (of_words(said, run.tokens.cpu().numpy()) for run in (patched.clean, patched.corrupt))
    rounding = ROUNDING[model.precision] * patched.size
    runs = (clean, other, rounding)
    if not units:
        none = np.zeros((0, len(said.words)))
        return Exact([], none, none, None, 0, *runs)

    def shares() -> Array:
        expected = np.zeros(found.shape) if hints is None else summed(hints, positions(layout, units))
        return shares_of(sizes_of(units, found, rounding, expected))

    found, used = effects(patched.chunks, len(sites)), len(sites)
    while split := chosen(units, shares(), patches - used):
        new = [part for n in split for part in units[n].split()]
        used += len(new)
        parts = [replaced(model, places, said.at) for places in positions(layout, new)]
        added = effects(patched.more(parts), len(new))
        units = [unit for n, unit in enumerate(units) if n not in split] + new
        found = np.concatenate([np.delete(found, split, 0), added])
    order = sorted(range(len(units)), key=units.__getitem__)
    units, found = [units[n] for n in order], found[order]
    there = effects(patched.more([replaced(model, region, said.at)]), 1)[0] if region else None
    return Exact(units, found, shares(), there, used, *runs)


def estimate(said: Said, direction: Direction) -> Array:
    """The gradient's estimate of the effect of each position, `(positions, words)`: what its features are
    more than the other picture's, times the gradient of the word's log-probability in the patched run."""
    pair, points = said.pair, [site.point for site in features(said.model, said.at)]
    base, source = (pair.clean, pair.corrupt) if direction == "noise" else (pair.corrupt, pair.clean)
    other = forward(said.model, source, keep=points).values
    run = forward(said.model, base, keep=points, positions=len(pair.answers), grad=True)
    sign = 1 if direction == "noise" else -1
    answers = torch.tensor(pair.answers, device=run.logits.device)[:, None]
    logprob = upcast(run.logits).log_softmax(-1).gather(1, answers)[:, 0]
    found = []
    for word in said.words:
        own = logprob[[n - said.first for n in word.tokens]].sum()
        slopes = torch.autograd.grad(own, [run.values[point] for point in points], retain_graph=True)
        each = np.zeros(len(other[points[0]][0]))
        for point, slope in zip(points, slopes, strict=True):
            more = sign * (run.values[point].detach().double() - other[point].double())
            each += (more * slope.double())[0].sum(-1).cpu().numpy()
        found.append(each)
    return np.stack(found, -1)


def summed(each: Array, places: Sequence[tuple[int, ...]]) -> Array:
    """Sums of what each position has, `(positions, words)`, over some places."""
    return np.array([each[list(at)].sum(0) for at in places])


# -- attention ---------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """How words read the picture: the tower and kind of attention whose edges lead there.

    In the tower that says the words `targets` are the positions that predict a word's tokens; elsewhere all
    of the text, the same for each word. `image` are all positions of the picture.
    """

    tower: str
    kind: str
    image: tuple[int, ...]
    targets: tuple[int, ...] | None

    @property
    def edge(self) -> str:
        target = "readout" if self.targets is None else "text"
        return f"{self.tower}.*.{self.kind}@{target}<image"

    def sites(self, model: Model, text: str, targets: tuple[int, ...]) -> list[Site]:
        """All sites that are written so between tower and position, from these targets to the picture."""
        layers, _, unit = text.partition(".")
        unit = f".{unit}" if unit else ""
        named = f"{self.tower}.{layers}.{self.kind}{unit}@last<image"
        return [
            replace(site, positions=targets, sources=self.image)
            for site in expand(parse(named), model.shapes)
        ]

    def cut(self, model: Model, targets: tuple[int, ...], sources: tuple[int, ...]) -> Site:
        """The edges from targets to some positions of the picture in all layers, as one site."""
        layers = tuple(model.shapes[self.tower].having(self.kind))
        site = Site(self.tower, layers[0], self.kind, position="last", positions=targets, layers=layers)
        reads = model.attended(self.tower, self.kind)
        return replace(site, window=2 * len(layers) + 1, source="image", sources=sources, reads=reads)


def reading(said: Said) -> Reading:
    """By cross-attention, where some of the text does so read what `image_site` names, else by attention to
    the image's tokens."""
    model, layout, there = said.model, said.pair.clean.layout, said.model.image_site
    crossed = (
        t for t in model.text_towers if there.kind == "output" and model.shapes[t].reads == there.tower
    )
    tower = next(crossed, None)
    kind = "attn" if tower is None else "cross"
    tower = tower or model.text_towers[0]
    read = layout[model.attended(tower, kind)]
    every = tuple(range(len(read.tokens))) if kind == "cross" else read.image or tuple(read.cells)
    return Reading(tower, kind, every, None if tower == model.speaker else layout[tower].text)


class Cut(NamedTuple):
    """What words lose without edges to the picture: to each unit in all layers, to a region, to all of it in
    windows of layers and in single heads; each `(sites, words)`."""

    units: Array
    region: Array
    windows: Array
    heads: Array


def knocked_out(
    said: Said, read: Reading, units: Sequence[Unit], region: tuple[int, ...], window: int
) -> Cut:
    """Cut what predicts a word from parts of the picture: rows of one pass a word."""
    model = said.model
    places = positions(said.pair.clean.layout[model.image_site.tower], units) + [region] * bool(region)

    def effects(pair: Pair, targets: tuple[int, ...]) -> tuple[Array, list[int]]:
        groups = [
            [read.cut(model, targets, at) for at in places],
            read.sites(model, f"*/{window}", targets),
            read.sites(model, "*.h*", targets),
        ]
        sites = [site for group in groups for site in group]
        patched = engine.patch(
            model, pair, sites, "noise", values="block", metric="logprob", images=said.images
        )
        return lost(patched.clean, patched.chunks, len(sites)), [len(group) for group in groups]

    if read.targets is not None:
        pair = Pair(said.pair.clean, said.pair.clean, said.pair.answer, None, (), said.pair.answers)
        tokens, sizes = effects(pair, read.targets)
        found = of_words(said, tokens)
    else:
        columns = []
        for number, word in enumerate(said.words):
            targets = tuple(said.caption.start + n for n in word.tokens)
            tokens, sizes = effects(said.word(number), targets)
            columns.append(tokens.sum(-1))
        found = np.stack(columns, 1)
    windows, heads = sizes[0], sizes[0] + sizes[1]
    return Cut(found[: len(units)], found[len(units) : windows], found[windows:heads], found[heads:])


def attention(said: Said, read: Reading, units: Sequence[Unit]) -> tuple[Array, Array]:
    """The share of its attention that what predicts a word pays to each unit, a mean over heads and layers,
    `(units, words)`; sinks are left out, and what they get is the second array, by word."""
    model, layout = said.model, said.pair.clean.layout
    targets = read.targets
    if targets is None:
        targets = tuple(
            said.caption.start + n for n in range(said.first, said.first + len(said.pair.answers))
        )
    paid = (
        model.attention(said.pair.clean, read.tower, read.kind, targets).double().mean((0, 1)).cpu().numpy()
    )
    sinks = layout[model.speaker].sinks if read.tower == model.speaker and read.kind == "attn" else None
    away = list(sinks()) if sinks else []
    gone = paid[:, away].sum(-1)
    paid[:, away] = 0.0
    rows = positions(layout[model.image_site.tower], units)
    each = np.stack([paid[:, list(at)].sum(-1) for at in rows]) if rows else np.zeros((0, len(paid)))
    if read.targets is not None:  # the same for each word
        each, gone = (np.repeat(x.mean(-1, keepdims=True), len(said.pair.answers), -1) for x in (each, gone))
    lengths = np.array([len(word.tokens) for word in said.words])
    return of_words(said, each) / lengths, of_words(said, gone) / lengths

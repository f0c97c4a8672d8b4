"""What heads read, token by token, and by which part of it they move the answer.

A head writes the sum over what it attends to of the attention paid times the value read. So what it brings
from the clean run splits: the attention of the clean run with the values of the corrupt one, or the values
alone, or both from some tokens alone. Each is one patch of the head's output in the corrupt run, by the
engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vlmscope.layout import Layout
from vlmscope.models.inputs import Edit, Pair
from vlmscope.patching import engine
from vlmscope.patching.scores import Baselines
from vlmscope.runs.forward import forward
from vlmscope.sites import KINDS, Point, Site
from vlmscope.studies.heads.asked import Array, AskedHeads, Key

GROUPS = ("image", "options", "others")
"""What is attended to: the image, the words of the answer and the foil, all other words."""
TOLERANCE = 0.02
"""How far, as a share of the largest, a head's output may be from its attention times the values it read:
what is farther has other parts, and is not split."""

OPTIONS = ("answer", "foil")
Kept = Mapping[Point, Tensor]
"""What a run left at points."""


class Part(NamedTuple):
    """What the head of a number would write in the corrupt run by a part of what it reads: `(at, width)`."""

    name: str
    head: int
    value: Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """What heads read in one example, by measure: a number a head, null where it is not measured.

    `nulls` has what attention that is spread evenly would pay. `raised` are the tokens that rise and fall
    most where the head reads the answer's word instead of the foil's, −1 where it can read neither.
    """

    scores: dict[str, Array]
    nulls: dict[str, Array]
    raised: NDArray[np.intp]

    def of(self, heads: Sequence[int]) -> Reading:
        """That of some of the heads, by their numbers."""
        rows = list(heads)
        scores, nulls = ({k: v[rows] for k, v in each.items()} for each in (self.scores, self.nulls))
        return Reading(scores, nulls, self.raised[rows])


def groups(layout: Layout) -> dict[str, NDArray[np.bool_]]:
    """Which positions are of which of `GROUPS`; all of a tower without text (its class token, too) are the
    image's.

    >>> layout = Layout(("is", "red", "?"), text=(0, 1, 2), roles={"answer": (1,)})
    >>> {name: there.tolist() for name, there in groups(layout).items()}["options"]
    [False, True, False]
    """
    found = {name: np.zeros(len(layout.tokens), bool) for name in GROUPS}
    found["image"][[*layout.cells, *layout.image] if layout.text else slice(None)] = True
    found["options"][[at for role in OPTIONS for at in layout.roles.get(role, ())]] = True
    found["options"] &= ~found["image"]
    found["others"] = ~found["image"] & ~found["options"]
    return found


def inner_points(asked: AskedHeads) -> set[Point]:
    """What a run has to keep for `read`: queries, keys and values of the heads' layers."""
    return {Point(s.tower, s.layer, s.kind, part) for s in asked.heads for part in ("q", "k", "v")}


def read(
    asked: AskedHeads,
    pairs: Sequence[Pair],
    placed: Sequence[Site],
    paid: Mapping[Key, Tensor],
    clean: Kept | None,
    effect: Array | None,
) -> Reading:
    """What each head reads in one example, and what parts of it do: means over pairs that share the clean
    run.

    `paid` is the attention of the clean run, `(layers, heads, at, keys)` a kind; `clean` what that run left
    at `inner_points` and at the heads' outputs, None where heads are not to be split; `effect` what the heads
    do when they are patched whole.
    """
    found = _Reader(asked, pairs[0], placed)
    for key, maps in paid.items():
        found.attention(key, maps)
    if effect is None or clean is None:
        return found.reading
    draws = [_Reader(asked, pair, placed) for pair in pairs]
    for draw in draws:
        draw.split(paid, clean, effect)
    parts = draws[0].reading.scores
    means = {name: np.mean([draw.reading.scores[name] for draw in draws], axis=0) for name in parts}
    return replace(found.reading, scores=found.reading.scores | means, raised=draws[0].reading.raised)


class _Reader:
    """Fills a `Reading`."""

    def __init__(self, asked: AskedHeads, pair: Pair, placed: Sequence[Site]) -> None:
        self.asked, self.pair, self.placed = asked, pair, placed
        self.reading = Reading({}, {}, np.full((len(placed), 2), -1))

    def put(self, name: str, heads: Sequence[int], values: ArrayLike, null: bool = False) -> None:
        into = self.reading.nulls if null else self.reading.scores
        into.setdefault(name, np.full(len(self.placed), np.nan))[list(heads)] = values

    def layout(self, key: Key) -> Layout:
        return self.pair.clean.layout[self.asked.model.attended(*key)]

    def own(self, key: Key, maps: Tensor) -> Tensor:
        """The attention of the heads that are asked about: `(heads, at, keys)`."""
        return (
            torch.stack([maps[self.asked.place(self.placed[n])] for n in self.asked.numbers(key)])
            .double()
            .cpu()
        )

    def attention(self, key: Key, maps: Tensor) -> None:
        """How much is on the image, the options, the other words, and on the first token of a text."""
        numbers, layout = self.asked.numbers(key), self.layout(key)
        own, visible = self.own(key, maps).mean(1).numpy(), (maps.amax((0, 1, 2)) > 0).cpu().numpy()
        there = {f"on_{name}": which for name, which in groups(layout).items()}
        if layout.text:
            there["on_first"] = np.arange(len(layout.tokens)) == 0
        for name, which in there.items():
            self.put(name, numbers, own[:, which].sum(1))
            self.put(name, numbers, (which & visible).sum() / visible.sum(), null=True)

    # -- patches of parts --------------------------------------------------------------------

    def split(self, paid: Mapping[Key, Tensor], clean: Kept, effect: Array) -> None:
        model, inside = self.asked.model, inner_points(self.asked)
        speaker, shape = model.speaker, model.shapes[model.speaker]
        later = {Point(speaker, n, k) for k in ("attn", "cross", "mlp") for n in shape.having(k)}
        heads = {point._replace(part="h") for point in inside}
        base = forward(model, self.pair.corrupt, self.pair.edits, keep=inside | heads | later).values
        parts = [part for key, maps in paid.items() for part in self._parts(key, maps, clean, base, effect)]
        if parts:
            self._patch(parts)
        self._direct({p: clean[p] for p in heads} | {p: base[p] for p in later})

    def _parts(self, key: Key, maps: Tensor, clean: Kept, base: Kept, effect: Array) -> Iterator[Part]:
        """What the heads of a kind would write by each part of what they read."""
        asked, pair, numbers = self.asked, self.pair, self.asked.numbers(key)
        sites, at = [self.placed[n] for n in numbers], list(self.placed[numbers[0]].positions)
        layout, own = self.layout(key), self.own(key, maps)
        values, values_corrupt = (self._values(key, sites, run) for run in (clean, base))
        if values.shape[1] != own.shape[2] or values.shape != values_corrupt.shape:
            return  # a kernel that pads what it reads
        written = torch.stack([self._unit(site, clean[site.point][0, at]) for site in sites])
        if (own @ values - written).abs().max() > TOLERANCE * written.abs().max():
            return
        corrupt = self.own(key, asked.model.attention(pair.corrupt, *key, at, pair.edits))
        parts = {"by_attention": own @ values_corrupt, "by_values": corrupt @ values}
        for name, part in (("by_queries", "q"), ("by_keys", "k")):
            edits = self._inside(key, part, at, clean, base)
            parts[name] = self.own(key, asked.model.attention(pair.corrupt, *key, at, edits)) @ values_corrupt
        for name, which in groups(layout).items():
            there = torch.from_numpy(which)
            if there.all():
                self.put(f"from_{name}", numbers, effect[numbers])
            elif there.any():
                parts[f"from_{name}"] = (own * there) @ values + (corrupt * ~there) @ values_corrupt
        options = [list(layout.roles.get(role, ())) for role in OPTIONS]
        if all(options):
            if asked.corruption == "image":
                answer, foil = ((own - corrupt)[..., where].sum(-1).mean(1) for where in options)
                self.put("switch", numbers, (answer - foil).numpy() / 2)
            if pair.foil is not None:
                both = [(values + values_corrupt)[:, where].mean(1, keepdim=True) / 2 for where in options]
                parts |= dict(zip(OPTIONS, both, strict=True))
        for name, found in parts.items():
            yield from (Part(name, *each) for each in zip(numbers, found, strict=True))

    def _patch(self, parts: Sequence[Part]) -> None:
        """Patch all parts, each alone, into the corrupt run."""
        kept: list[Tensor] = []

        def keep(logits: Tensor, base: Baselines) -> Tensor:
            kept.append(logits.float().cpu())
            return logits[:, 0]

        # What made the run corrupt is in its inputs, or else the clean run is needed to make it.
        pair = self.pair if self.pair.edits else replace(self.pair, clean=self.pair.corrupt)
        sites, values = [self.placed[part.head] for part in parts], [part.value for part in parts]
        patched = engine.patch(self.asked.model, pair, sites, values=values, metric=keep)
        same = kept[-1][0]  # the metric is given the runs without a patch, too
        kept.clear()
        raised: dict[tuple[str, int], Tensor] = {}
        for rows, scores in patched.chunks:
            logits = kept.pop() if kept else same.expand(len(rows), -1)
            for part, change, row in zip(
                [parts[n] for n in rows], scores.ld - patched.corrupt.ld, logits, strict=True
            ):
                if part.name in OPTIONS:
                    raised[part.name, part.head] = row
                else:
                    self.put(part.name, [part.head], float(change))
        for head in {head for _, head in raised}:
            more = raised[OPTIONS[0], head] - raised[OPTIONS[1], head]
            self.reading.raised[head] = int(more.argmax()), int(more.argmin())

    def _unit(self, site: Site, x: Tensor) -> Tensor:
        """A head's part of what heads write side by side."""
        heads = self.asked.model.shapes[site.tower].heads[site.kind]
        return x.unflatten(-1, (heads, -1))[:, site.units[0]].double().cpu()

    def _values(self, key: Key, sites: Sequence[Site], run: Kept) -> Tensor:
        """What each head reads at each key: `(heads, keys, width)`; some share it."""
        shape = self.asked.model.shapes[key[0]]
        many = shape.units(key[1], "v") or 1
        share = shape.heads[key[1]] // many
        each = [run[site.point._replace(part="v")][0].unflatten(-1, (many, -1)) for site in sites]
        rows = [x[:, site.units[0] // share] for x, site in zip(each, sites, strict=True)]
        return torch.stack(rows).double().cpu()

    def _inside(self, key: Key, part: str, at: Sequence[int], clean: Kept, base: Kept) -> list[Edit]:
        """Edits that give a kind's queries or keys the clean run's values, and hold what the heads write, so
        that each layer is patched alone."""
        shape = self.asked.model.shapes[key[0]]
        edits = list(self.pair.edits)
        for layer in sorted({site.layer for site in self.placed if (site.tower, site.kind) == key}):
            point = Point(*key[:1], layer, key[1], part)
            where = list(at) if part == "q" else range(clean[point].shape[1])
            for here, source, positions in (
                (point, clean, where),
                (point._replace(part="h"), base, range(base[point._replace(part="h")].shape[1])),
            ):
                units = tuple(range(shape.units(key[1], here.part) or 1))
                site = Site(*here, units, positions=tuple(positions))
                edits.append(Edit(site, "set", source[here][0, list(positions)]))
        return edits

    def _direct(self, values: Kept) -> None:
        """What heads do at the read-out position when all that comes behind them there stays as it was;
        nothing goes from other places to the logits directly."""
        model, layout = self.asked.model, self.pair.clean.layout
        speaker, readout = model.speaker, layout[model.speaker].readout
        self.put("direct", range(len(self.placed)), 0.0)
        if readout is None:
            return
        points = sorted((p for p in values if not p.part), key=lambda p: (p.layer, KINDS.index(p.kind)))

        def behind(site: Site) -> tuple[Site, ...]:
            own = (site.layer, KINDS.index(site.kind))
            after = [p for p in points if (p.layer, KINDS.index(p.kind)) > own]
            return tuple(Site(*p, position="readout", positions=(readout,)) for p in after)

        numbers = [n for n, s in enumerate(self.placed) if s.tower == speaker and readout in s.positions]
        if not numbers:
            return
        sites = [replace(self.placed[n], also=behind(self.placed[n])) for n in numbers]
        patched = engine.patch(model, self.pair, sites, values=values)
        for rows, scores in patched.chunks:
            self.put("direct", [numbers[row] for row in rows], (scores.ld - patched.corrupt.ld).cpu().numpy())

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
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vlmscope.layout import Layout
from vlmscope.models.inputs import Edit, Pair
from vlmscope.patching import engine
from vlmscope.patching.scores import Baselines, logit_difference
from vlmscope.patching.trace import Images, given, trace
from vlmscope.runs.forward import paying
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


class Sum(NamedTuple):
    """What the heads of a kind write in a run: the sum of what they pay times what they read."""

    paid: Float[Tensor, "heads at keys"]
    values: Float[Tensor, "heads keys width"]


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
    `ld_corrupt` is LD of the corrupt run, if heads were split there.
    """

    scores: dict[str, Array]
    nulls: dict[str, Array]
    raised: NDArray[np.intp]
    ld_corrupt: float | None = None

    def of(self, heads: Sequence[int]) -> Reading:
        """That of some of the heads, by their numbers."""
        rows = list(heads)
        scores, nulls = ({k: v[rows] for k, v in each.items()} for each in (self.scores, self.nulls))
        return replace(self, scores=scores, nulls=nulls, raised=self.raised[rows])


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
    draws, images = [_Reader(asked, pair, placed) for pair in pairs], Images()
    ld = float(np.mean([draw.split(paid, clean, effect, images) for draw in draws]))
    parts = draws[0].reading.scores
    means = {name: np.mean([draw.reading.scores[name] for draw in draws], axis=0) for name in parts}
    scores = found.reading.scores | means
    return replace(found.reading, scores=scores, raised=draws[0].reading.raised, ld_corrupt=ld)


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

    def at(self, key: Key) -> list[int]:
        """Where the heads of a kind are asked about."""
        return list(self.placed[self.asked.numbers(key)[0]].positions)

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

    def split(self, paid: Mapping[Key, Tensor], clean: Kept, effect: Array, images: Images) -> float:
        """Fill in what parts of what heads read do; gives LD of the corrupt run."""
        model, pair, inside = self.asked.model, self.pair, inner_points(self.asked)
        speaker, shape = model.speaker, model.shapes[model.speaker]
        later = {Point(speaker, n, k) for k in ("attn", "cross", "mlp") for n in shape.having(k)}
        heads = {point._replace(part="h") for point in inside}
        at = {key: self.at(key) for key in paid}
        with paying(model, pair.corrupt, at) as corrupt:
            run = trace(model, pair.corrupt, pair.edits, inside | heads | later, images, 1)
        base = run.values
        sums = {key: (self._sum(key, paid, clean), self._sum(key, corrupt, base)) for key in paid}
        whole = [key for key, both in sums.items() if self._is_whole(key, *both, clean)]
        inner: dict[str, Mapping[Key, Tensor]] = {}
        for name, part in (("by_queries", "q"), ("by_keys", "k")) if whole else ():
            # Of all kinds at once: no layer changes what another one reads.
            edits = [edit for key in whole for edit in self._inside(key, part, clean, base)]
            with paying(model, pair.corrupt, {key: at[key] for key in whole}) as inner[name]:
                trace(model, pair.corrupt, [*pair.edits, *edits], (), images, 1)
        parts: list[Part] = []
        for key in whole:
            mixed = {name: self.own(key, maps[key]) for name, maps in inner.items()}
            parts += self._parts(key, *sums[key], mixed, effect)
        self._patch(parts, base, {p: clean[p] for p in heads} | {p: base[p] for p in later}, images)
        return logit_difference(run.logits[-1], pair)

    def _sum(self, key: Key, paid: Mapping[Key, Tensor], run: Kept) -> Sum:
        sites = [self.placed[n] for n in self.asked.numbers(key)]
        return Sum(self.own(key, paid[key]), self._values(key, sites, run))

    def _is_whole(self, key: Key, clean: Sum, base: Sum, run: Kept) -> bool:
        """Whether what the heads of a kind write is what they pay times what they read."""
        own, values = clean
        if values.shape[1] != own.shape[2] or values.shape != base.values.shape:
            return False  # a kernel that pads what it reads
        sites = [self.placed[n] for n in self.asked.numbers(key)]
        written = torch.stack([self._unit(site, run[site.point][0, self.at(key)]) for site in sites])
        return bool((own @ values - written).abs().max() <= TOLERANCE * written.abs().max())

    def _parts(
        self, key: Key, clean: Sum, base: Sum, mixed: Mapping[str, Tensor], effect: Array
    ) -> Iterator[Part]:
        """What the heads of a kind would write by each part of what they read; `mixed` is what they pay with
        the clean run's queries or keys alone."""
        asked, pair, numbers, layout = self.asked, self.pair, self.asked.numbers(key), self.layout(key)
        (own, values), (corrupt, values_corrupt) = clean, base
        parts = {"by_attention": own @ values_corrupt, "by_values": corrupt @ values}
        parts |= {name: maps @ values_corrupt for name, maps in mixed.items()}
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

    def _patch(self, parts: Sequence[Part], base: Kept, values: Kept, images: Images) -> None:
        """Patch all parts, each alone, into the corrupt run, and the heads with all that comes behind them as
        it is in `values`."""
        kept: list[Tensor] = []

        def keep(logits: Tensor, base: Baselines) -> Tensor:
            kept.append(logits.float().cpu())
            return logits[:, 0]

        # What made the run corrupt is in its inputs, or else the clean run is needed to make it.
        pair = self.pair if self.pair.edits else replace(self.pair, clean=self.pair.corrupt)
        sites, direct = [self.placed[part.head] for part in parts], self._direct(values)
        more, origins = given(self.asked.model, base, sites, [part.value for part in parts])
        source = {p: torch.cat([x, more[p]], 1) if p in more else x for p, x in values.items()}
        shifted = [
            replace(one, positions=tuple(n + values[one.point].shape[1] for n in one.positions))
            for (one,) in origins
        ]
        patched = engine.patch(
            self.asked.model,
            pair,
            [*sites, *direct.values()],
            sources=[*shifted, *direct.values()],
            values=source,
            metric=keep,
            images=images,
        )
        same = kept[-1][0]  # the metric is given the runs without a patch, too
        kept.clear()
        what = [*parts, *(Part("direct", number, same) for number in direct)]
        raised: dict[tuple[str, int], Tensor] = {}
        for rows, scores in patched.chunks:
            logits = kept.pop() if kept else same.expand(len(rows), -1)
            for part, change, row in zip(
                [what[n] for n in rows], scores.ld - patched.corrupt.ld, logits, strict=True
            ):
                if part.name in OPTIONS:
                    raised[part.name, part.head] = row
                else:
                    self.put(part.name, [part.head], float(change))
        for head in {head for _, head in raised}:
            gap = raised[OPTIONS[0], head] - raised[OPTIONS[1], head]
            self.reading.raised[head] = int(gap.argmax()), int(gap.argmin())

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

    def _inside(self, key: Key, part: str, clean: Kept, base: Kept) -> Iterator[Edit]:
        """Edits that give a kind's queries or keys the clean run's values, and hold what the heads write, so
        that each layer is patched alone."""
        shape = self.asked.model.shapes[key[0]]
        for layer in sorted({site.layer for site in self.placed if (site.tower, site.kind) == key}):
            point = Point(*key[:1], layer, key[1], part)
            where = self.at(key) if part == "q" else range(clean[point].shape[1])
            for here, source, positions in (
                (point, clean, where),
                (point._replace(part="h"), base, range(base[point._replace(part="h")].shape[1])),
            ):
                units = tuple(range(shape.units(key[1], here.part) or 1))
                site = Site(*here, units, positions=tuple(positions))
                yield Edit(site, "set", source[here][0, list(positions)])

    def _direct(self, values: Kept) -> dict[int, Site]:
        """The heads that can act at the read-out position themselves, by their numbers, each with all that
        comes behind it there; nothing goes from other places to the logits directly."""
        model, layout = self.asked.model, self.pair.clean.layout
        speaker, readout = model.speaker, layout[model.speaker].readout
        self.put("direct", range(len(self.placed)), 0.0)
        points = sorted((p for p in values if not p.part), key=lambda p: (p.layer, KINDS.index(p.kind)))
        found = {}
        for number, site in enumerate(self.placed):
            if readout is not None and site.tower == speaker and readout in site.positions:
                own = (site.layer, KINDS.index(site.kind))
                after = [p for p in points if (p.layer, KINDS.index(p.kind)) > own]
                also = tuple(Site(*p, position="readout", positions=(readout,)) for p in after)
                found[number] = replace(site, also=also)
        return found

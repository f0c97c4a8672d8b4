"""What heads read, token by token, and by which part of it they move the answer.

A head writes the sum over what it attends to of the attention paid times the value read. So what it brings from
the clean run splits: the attention of the clean run with the values of the corrupt one, or the values alone, or
both from some tokens alone. Each is one patch of the head's output in the corrupt run, by the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmscope.layout import Layout
from vlmscope.models.inputs import Edit, Pair
from vlmscope.patching import engine
from vlmscope.patching.scores import Baselines
from vlmscope.runs.forward import forward
from vlmscope.sites import KINDS, Point, Site
from vlmscope.studies.heads.study import Array, Key, Study

GROUPS = ("image", "options", "others")
"""What is attended to: the image, the words of the answer and the foil, all other words."""
TOLERANCE = 0.02
"""How far, as a share of the largest, a head's output may be from its attention times the values it read: what
is farther has other parts, and is not split."""

Values = Mapping[Point, Tensor]


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
    found["options"][[at for role in ("answer", "foil") for at in layout.roles.get(role, ())]] = True
    found["options"] &= ~found["image"]
    found["others"] = ~found["image"] & ~found["options"]
    return found


def inner_points(study: Study) -> set[Point]:
    """What a run has to keep for `read`: queries, keys and values of the heads' layers."""
    return {Point(s.tower, s.layer, s.kind, part) for s in study.heads for part in ("q", "k", "v")}


def read(
    study: Study,
    pair: Pair,
    placed: Sequence[Site],
    paid: Mapping[Key, Tensor],
    clean: Values | None,
    effect: Array | None,
) -> Reading:
    """What each head reads in one example, and what parts of it do.

    `paid` is the attention of the clean run, `(layers, heads, at, keys)` a kind; `clean` what that run left at
    `inner_points` and at the heads' outputs, None where heads are not to be split; `effect` what the heads do
    when they are patched whole.
    """
    found = _Reader(study, pair, placed)
    for key, maps in paid.items():
        found.attention(key, maps)
    if effect is not None and clean is not None:
        found.split(paid, clean, effect)
    return found.reading


@dataclass(frozen=True, eq=False)
class _Reader:
    study: Study
    pair: Pair
    placed: Sequence[Site]
    reading: Reading = field(init=False)

    def __post_init__(self) -> None:
        none = np.full((len(self.placed), 2), -1)
        object.__setattr__(self, "reading", Reading({}, {}, none))

    def put(self, name: str, heads: Sequence[int], values: object, null: bool = False) -> None:
        into = self.reading.nulls if null else self.reading.scores
        into.setdefault(name, np.full(len(self.placed), np.nan))[list(heads)] = values

    def layout(self, key: Key) -> Layout:
        return self.pair.clean.layout[self.study.model.attended(*key)]

    def own(self, key: Key, maps: Tensor) -> Tensor:
        """The attention of the heads that are asked about: `(heads, at, keys)`."""
        return torch.stack(
            [maps[self.study.place(self.placed[n])] for n in self.study.numbers(key)]
        ).double().cpu()

    def attention(self, key: Key, maps: Tensor) -> None:
        """How much is on the image, the options, the other words, and on the first token of a text."""
        numbers, layout = self.study.numbers(key), self.layout(key)
        own, visible = self.own(key, maps).mean(1).numpy(), (maps.amax((0, 1, 2)) > 0).cpu().numpy()
        there = {f"on_{name}": which for name, which in groups(layout).items()}
        if layout.text:
            there["on_first"] = np.arange(len(layout.tokens)) == 0
        for name, which in there.items():
            self.put(name, numbers, own[:, which].sum(1))
            self.put(name, numbers, (which & visible).sum() / visible.sum(), null=True)

    # -- patches of parts --------------------------------------------------------------------

    def split(self, paid: Mapping[Key, Tensor], clean: Values, effect: Array) -> None:
        study, pair = self.study, self.pair
        model, inside = study.model, inner_points(study)
        speaker, shape = model.speaker, model.shapes[model.speaker]
        later = {Point(speaker, n, k) for k in ("attn", "cross", "mlp") for n in shape.having(k)}
        heads = {point._replace(part="h") for point in inside}
        base = forward(model, pair.corrupt, pair.edits, keep=inside | heads | later).values
        values: dict[str, dict[Site, Tensor]] = {}
        options: dict[str, dict[Site, Tensor]] = {}
        for key, maps in paid.items():
            self._parts(key, maps, clean, base, effect, values, options)
        for name, given in values.items():
            self.put(name, self._numbers(given), self._change(given))
        if options:
            answer, foil = (self._logits(options[role]) for role in ("answer", "foil"))
            more = answer - foil
            self.reading.raised[self._numbers(options["answer"])] = np.stack(
                [more.argmax(1).numpy(), more.argmin(1).numpy()], 1
            )
        self._direct({p: clean[p] for p in heads} | {p: base[p] for p in later})

    def _numbers(self, given: Mapping[Site, Tensor]) -> list[int]:
        return [n for n, site in enumerate(self.placed) if site in given]

    def _parts(
        self,
        key: Key,
        maps: Tensor,
        clean: Values,
        base: Values,
        effect: Array,
        values: dict[str, dict[Site, Tensor]],
        options: dict[str, dict[Site, Tensor]],
    ) -> None:
        """What the heads of a kind would write by each part of what they read."""
        study, pair, numbers = self.study, self.pair, self.study.numbers(key)
        sites, at = [self.placed[n] for n in numbers], list(self.placed[numbers[0]].positions)
        layout, own = self.layout(key), self.own(key, maps)
        read, read_corrupt = (self._values(key, sites, run) for run in (clean, base))
        if read.shape[1] != own.shape[2] or read.shape != read_corrupt.shape:
            return  # a kernel that pads what it reads
        written = torch.stack([self._unit(site, clean[site.point][0, at]) for site in sites])
        if (own @ read - written).abs().max() > TOLERANCE * written.abs().max():
            return
        corrupt = self.own(key, study.model.attention(pair.corrupt, *key, at, pair.edits))
        roles = layout.roles
        if study.corruption == "image" and {"answer", "foil"} <= set(roles):
            turned = own - corrupt
            of = [turned[..., list(roles[role])].sum(-1).mean(1).numpy() for role in ("answer", "foil")]
            self.put("switch", numbers, (of[0] - of[1]) / 2)
        parts = {"by_attention": own @ read_corrupt, "by_values": corrupt @ read}
        for part in ("q", "k"):
            moved = self.own(key, study.model.attention(pair.corrupt, *key, at, self._inside(key, part, at, clean, base)))
            parts["by_queries" if part == "q" else "by_keys"] = moved @ read_corrupt
        for name, which in groups(layout).items():
            there = torch.from_numpy(which)
            if there.all():
                self.put(f"from_{name}", numbers, effect[numbers])
            elif there.any():
                parts[f"from_{name}"] = (own * there) @ read + (corrupt * ~there) @ read_corrupt
        for name, found in parts.items():
            values.setdefault(name, {}).update(zip(sites, found, strict=True))
        if {"answer", "foil"} <= set(roles) and pair.foil is not None:
            for role in ("answer", "foil"):
                state = (read + read_corrupt)[:, list(roles[role])].mean(1, keepdim=True) / 2
                options.setdefault(role, {}).update(zip(sites, state, strict=True))

    def _unit(self, site: Site, x: Tensor) -> Tensor:
        """A head's part of what heads write side by side."""
        heads = self.study.model.shapes[site.tower].heads[site.kind]
        return x.unflatten(-1, (heads, -1))[:, site.units[0]].double().cpu()

    def _values(self, key: Key, sites: Sequence[Site], run: Values) -> Tensor:
        """What each head reads at each key: `(heads, keys, width)`; some share it."""
        shape = self.study.model.shapes[key[0]]
        many = shape.units(key[1], "v") or 1
        share = shape.heads[key[1]] // many
        each = [run[site.point._replace(part="v")][0].unflatten(-1, (many, -1)) for site in sites]
        rows = [x[:, site.units[0] // share] for x, site in zip(each, sites, strict=True)]
        return torch.stack(rows).double().cpu()

    def _inside(self, key: Key, part: str, at: Sequence[int], clean: Values, base: Values) -> list[Edit]:
        """Edits that give a kind's queries or keys the clean run's values, and hold what the heads write, so
        that each layer is patched alone."""
        shape = self.study.model.shapes[key[0]]
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

    def _change(self, given: Mapping[Site, Tensor]) -> Array:
        """The change of the corrupt run's LD by each of these patches."""
        numbers = self._numbers(given)
        patched = engine.patch(self.study.model, self._alone, [self.placed[n] for n in numbers], values=given)
        found = np.zeros(len(numbers))
        for rows, scores in patched.chunks:
            found[rows] = (scores.ld - patched.corrupt.ld).cpu().numpy()
        return found

    def _logits(self, given: Mapping[Site, Tensor]) -> Tensor:
        """The corrupt run's logits with each of these patches: `(heads, vocabulary)`."""
        kept: list[Tensor] = []

        def keep(logits: Tensor, base: Baselines) -> Tensor:
            kept.append(logits.float().cpu())
            return logits[:, 0]

        sites = [self.placed[n] for n in self._numbers(given)]
        patched = engine.patch(self.study.model, self._alone, sites, values=given, metric=keep)
        found = kept.pop().repeat(len(sites), 1)  # of the run without a patch, which the metric is given, too
        kept.clear()
        for rows, _ in patched.chunks:
            if kept:
                found[rows] = kept.pop()
        return found

    @property
    def _alone(self) -> Pair:
        """The corrupt run alone, where what made it corrupt is in its inputs."""
        return self.pair if self.pair.edits else replace(self.pair, clean=self.pair.corrupt)

    def _direct(self, values: Values) -> None:
        """What heads do at the read-out position when all that comes behind them there stays as it was;
        nothing goes from other places to the logits directly."""
        model, layout = self.study.model, self.pair.clean.layout
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

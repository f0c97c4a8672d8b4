"""The answers of `reference`, fast: nothing is computed that a patch cannot change.

The clean and the corrupt input are run once each. Then the blocks of Hugging Face's model are
called again with many rows at once, one row a patch. A row begins as a copy of the base run and
joins at the layer of its own site, where a hook writes the source run's values into it; the layers
below are not recomputed. Rows that read the same image share its cross-attention keys and values,
which are computed once a layer. A patch that copies what is already there, or that the read-out
position cannot see, needs no row.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmscope import suffix
from vlmscope.inputs import Change, Edit, Inputs, Pair
from vlmscope.metrics import Patched, Score, largest, score
from vlmscope.model import Access, Model, handles, hooks
from vlmscope.sites import KINDS, Point, Site

BUDGET = 128 * 2**20
"""Bytes that the intermediate results of one batch of rows may take, if there is room."""

SUBLAYERS = ("attn", "cross", "mlp")
OUTER = ("output", "deepstack")
"""Kinds of no block's inside or end."""


@dataclass(frozen=True, eq=False)
class Row:
    """One patch: its number in the sweep, what it sets, and the stage of its tower it joins at.

    `sites` are of one layer each, in the order in which the model computes them; a window of layers has
    several. Stage L is the entrance of block L; the stage behind the last block is its output. `shift`
    says how far behind the positions of the run the source's values for this row are (see `Sweep._given`).
    """

    number: int
    sites: tuple[Site, ...]
    tower: int
    stage: int
    shift: int = 0

    @property
    def begin(self) -> int:
        """The first position that it changes."""
        return min(position for site in self.sites for position in site.positions)

    @property
    def is_outer(self) -> bool:
        return self.sites[0].kind in OUTER

    @property
    def is_simple(self) -> bool:
        """Whether blocks can be called with it: what is added between blocks is no block's."""
        one_tower = {site.tower for site in self.sites} == {self.sites[0].tower}
        kinds = {site.kind for site in self.sites}
        return one_tower and "deepstack" not in kinds and ("output" not in kinds or len(kinds) == 1)


@dataclass(frozen=True, eq=False)
class Cell:
    """One write: a row and position of a batch gets the source's value for the position `source` of a
    run, which lies `shift` behind it."""

    row: int
    position: int
    site: Site
    source: int
    shift: int = 0


@dataclass(eq=False)
class Trace:
    """What one run left: logits, activations at points, and how each block was called."""

    logits: Tensor
    values: dict[Point, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Each tower's output, before edits of it."""
    ends: dict[str, Tensor] = field(default_factory=dict)
    """What the last block of each tower gave."""
    calls: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """How each block was called; behind the last one the final norm, where the model adds to what
    blocks give."""
    given: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """What each block gave, where the model adds to it."""
    memory: dict[str, suffix.Memory] = field(default_factory=dict)
    """What the attention of causal decoders kept."""


def patch(
    model: Model,
    pair: Pair,
    sites: Sequence[Site],
    direction: str = "denoise",
    *,
    seen: dict[int, Tensor] | None = None,
) -> Patched:
    """Patch every site; the same answers as `reference.patch`, in the order they are ready.

    `seen` keeps the vision tower's outputs from one call to the next, for pairs that share an
    image.
    """
    sweep = Sweep(model, pair, sites, direction, {} if seen is None else seen)
    return Patched(sweep.baselines[0], sweep.baselines[1], sweep.size, sweep.chunks())


def ablate(
    model: Model,
    inputs: Inputs,
    answer: int,
    foil: int,
    sites: Sequence[Site],
    values: Mapping[Site, Tensor],
    *,
    seen: dict[int, Tensor] | None = None,
) -> Patched:
    """Set each site, one at a time, to its value; the scores of `inputs` with that edit.

    A value broadcasts to `(positions, width of the site)`. The same as
    `model.run(inputs, [Edit(site, "set", value)])` for each, also where sites share places; sites of
    the towers' inside, without windows of layers.
    """
    pair = Pair(inputs, inputs, answer, foil)
    sweep = Sweep(model, pair, sites, "noise", {} if seen is None else seen, values)
    return Patched(sweep.baselines[0], sweep.baselines[1], sweep.size, sweep.chunks())


class Sweep:
    """All patches of one pair."""

    def __init__(
        self,
        model: Model,
        pair: Pair,
        sites: Sequence[Site],
        direction: str,
        seen: dict[int, Tensor],
        values: Mapping[Site, Tensor] | None = None,
    ) -> None:
        _keep_freed_memory()
        self.model, self.pair = model, pair
        self.towers = list(model.family.towers)
        points = {part.point for site in sites for part in site.parts}
        for point in list(points):
            if point.kind in SUBLAYERS:
                around = _around(point.tower, point.layer)
                has_heads = point.layer in model.shapes[point.tower].having("attn")
                points.update(around if has_heads else around[1:])
        runs = [(pair.clean, ()), (pair.corrupt, pair.edits)]
        runs = runs[:1] if values is not None else runs
        self.kept = {tower: model.family.cache() for tower in self.towers}
        traces = []
        self.shifts = [0] * len(sites)
        for number, (inputs, edits) in enumerate(runs):
            is_base = number == (direction == "denoise" and len(runs) == 2)
            with ExitStack() as stack:
                stack.enter_context(model.alone())
                stack.enter_context(self._keeping() if is_base else nullcontext())
                memory = {
                    tower: suffix.Memory()
                    for tower in self.towers
                    if is_base and self._flow(tower) == "suffix"
                }
                for tower, one in memory.items():
                    stack.enter_context(suffix.remembering(model, tower, one))
                traces.append(self._trace(inputs, edits, points, seen))
                traces[-1].memory = memory
        if values is not None:
            traces.append(self._given(traces[0], sites, values))
            runs *= 2
        self.baselines = [score(t.logits, pair.answer, pair.foil) for t in traces]
        self.size = largest(*(t.logits for t in traces))
        forward = direction == "denoise"
        self.source = traces[0] if forward else traces[1]
        self.base = traces[1] if forward else traces[0]
        self.inputs, edits = runs[1] if forward else runs[0]
        self.edits = model.changes(self.inputs, edits)
        self.unchanged = self.baselines[1] if forward else self.baselines[0]
        self.starts = {t: suffix.starts(m) for t, m in self.base.memory.items()}
        self.rows, self.idle = self._plan(sites)

    def _flow(self, tower: str) -> str:
        return self.model.flow(tower, self.pair.clean)

    def _given(self, trace: Trace, sites: Sequence[Site], values: Mapping[Site, Tensor]) -> Trace:
        """A run that has the given values at the sites; elsewhere nobody asks.

        Sites that share a place have values of their own there: each point's positions come as often, end
        to end, as is needed, and `shifts` says how far behind the first a site's are.
        """
        found: dict[Point, list[Tensor]] = defaultdict(list)
        taken: dict[Point, list[set[tuple[int | None, int]]]] = defaultdict(list)
        for number, site in enumerate(sites):
            point = site.point
            places = {(unit, position) for position in site.positions for unit in site.units or (None,)}
            turn = next((n for n, some in enumerate(taken[point]) if not some & places), None)
            if turn is None:
                turn = len(found[point])
                found[point].append(trace.values[point])
                taken[point].append(set())
            taken[point][turn] |= places
            found[point][turn] = self.model.edited(found[point][turn], site, "set", values[site])
            self.shifts[number] = turn * trace.values[point].shape[1]
        return Trace(trace.logits, {point: torch.cat(some, 1) for point, some in found.items()})

    # -- the two plain runs ----------------------------------------------------------------------

    @torch.inference_mode()
    def _trace(
        self, inputs: Inputs, edits: Sequence[Edit], points: set[Point], seen: dict[int, Tensor]
    ) -> Trace:
        """One plain run. An image that was seen is not encoded again, unless it is looked into."""
        model, first = self.model, self.towers[0]
        inside = any(p.tower == first and p.kind != "output" for p in points)
        key = id(inputs.tensors[self.model.family.pixels])
        whole = self.model.family.towers[first].output and self._flow(first) != "plain"
        known = None if inside or not whole else seen.get(key)
        trace = Trace(torch.empty(0), {})
        with self._recording(trace), model.editing(inputs, edits), self._ends(trace):
            if known is None:
                trace.logits, trace.values = model.record(inputs, points)
                if whole:
                    seen[key] = trace.outputs[first]
                return trace
            trace.outputs[first] = known
            output = self._edited_output(known, first, model.changes(inputs, edits))
            for point in points:
                if point.tower == first:
                    trace.values[point] = output
            with hooks() as hook:
                for point in points:
                    if point.tower != first:
                        found = lambda x, p=point: trace.values.update({p: x.clone()}) or x  # noqa: E731
                        hook(*model.module(point, inputs), found)
                trace.logits = model.family.finish(model.hf, inputs, first, output)[0]
        return trace

    @contextmanager
    def _recording(self, trace: Trace) -> Iterator[None]:
        """Record every block's call and every tower's output, before any edits of them."""

        def called(m: Any, args: Any, kwargs: Any, key: tuple[str, int]) -> None:
            trace.calls[key] = (args, kwargs)

        with handles() as held:
            for tower, table in self.model.family.towers.items():
                blocks = list(self.model.blocks(tower))
                if table.deepstack:  # the model may add to what the last block gives, too
                    blocks.append(self.model.hf.get_submodule(self.model.family.norm or ""))
                for layer, block in enumerate(blocks):
                    seen = partial(called, key=(tower, layer))
                    held(block.register_forward_pre_hook(seen, with_kwargs=True))
                    if table.deepstack and layer < self._depth(tower):

                        def given(m: Any, args: Any, out: Any, key: Any = (tower, layer)) -> None:
                            trace.given[key] = out if isinstance(out, Tensor) else out[0]

                        held(block.register_forward_hook(given))
                if table.output and self._flow(tower) != "plain":

                    def left(m: Any, args: Any, out: Any, tower: str = tower) -> None:
                        trace.outputs[tower] = out.last_hidden_state

                    module = self.model.hf.get_submodule(table.output)
                    held(module.register_forward_hook(left))
            yield

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Keep the keys and values of all that is attended to across towers."""
        with handles() as held:
            for tower, table in self.model.family.towers.items():
                for block in self.model.blocks(tower) if table.fold else ():

                    def keep(m: Any, args: Any, kwargs: Any, tower: str = tower) -> Any:
                        return args, {**kwargs, "past_key_values": self.kept[tower]}

                    module = block.get_submodule(table.fold or "")
                    held(module.register_forward_pre_hook(keep, with_kwargs=True))
            yield

    @contextmanager
    def _ends(self, trace: Trace) -> Iterator[None]:
        """Record what the last block of every tower gives, after edits of it."""
        with hooks() as hook:
            for tower in self.towers:
                keep = lambda x, tower=tower: trace.ends.update({tower: x}) or x  # noqa: E731
                hook(*Access(self.model.blocks(tower)[-1]), keep)
            yield

    def _edited_output(self, output: Tensor, tower: str, changes: Sequence[Change]) -> Tensor:
        """A tower's output with the run's own edits of it (its module is not called for rows)."""
        for change in changes:
            if change.site.tower == tower and change.site.kind == "output":
                output = self.model.edited(output, *change)
        return output

    # -- which patches need a row ----------------------------------------------------------------

    def _plan(self, sites: Sequence[Site]) -> tuple[list[Row], list[int]]:
        points = {part.point for site in sites for part in site.parts}
        changed = {point: self._changed(point).cpu().numpy() for point in points}

        def changes(part: Site, shift: int) -> bool:
            there = changed[part.point][[shift + position for position in part.positions]]
            return bool((there[:, list(part.units)] if part.units else there).any())

        rows, idle = [], []
        for number, site in enumerate(sites):
            # What comes before the first change writes what is there already; after it, a value
            # that both runs share still undoes what the change has done to it.
            shift = self.shifts[number]
            reaching = [part for part in self._in_order(site) if self._reaches(part)]
            first = next((n for n, part in enumerate(reaching) if changes(part, shift)), len(reaching))
            live = tuple(reaching[first:])
            if live:
                tower = self.towers.index(live[0].tower)
                rows.append(Row(number, live, tower, self._stage(live), shift))
            else:
                idle.append(number)
        return sorted(rows, key=lambda row: (row.tower, row.is_outer, row.stage)), idle

    def _in_order(self, site: Site) -> tuple[Site, ...]:
        """The parts of a patch in the order in which the model computes them."""
        parts = site.parts
        if len(parts) == 1:
            return parts
        return tuple(sorted(parts, key=lambda p: (self.towers.index(p.tower), p.layer, KINDS.index(p.kind))))

    def _stage(self, live: Sequence[Site]) -> int:
        """Where a row joins: behind its first block, unless that has to be redone as a whole."""
        site = live[0]
        if site.kind in OUTER:
            return self._depth(site.tower) + 1
        together = len(live) > 1 and live[1].layer == site.layer and live[1].tower == site.tower
        if site.kind == "resid_pre" or (site.kind in SUBLAYERS and (together or self._whole(site.tower))):
            return site.layer
        return site.layer + 1

    def _whole(self, tower: str) -> bool:
        """Whether the run's own edits are within a tower's blocks, where they count all positions."""
        within = (*SUBLAYERS, "resid")
        return any(e.site.tower == tower and e.site.kind in within for e in self.edits)

    def _changed(self, point: Point) -> Bool[Tensor, "pos *units"]:
        """Where the two runs differ at a point."""
        base, source = self.base.values[point][0], self.source.values[point][0]
        differ = (source.unflatten(0, (-1, len(base))) != base).flatten(0, 1)
        many = self.model.units(point)
        return (differ if many is None else differ.unflatten(-1, (many, -1))).any(-1)

    def _reaches(self, site: Site) -> bool:
        """Whether the read-out position can see the patch: in the last block only its own."""
        last = site.tower == self.towers[-1] and site.layer == self._depth(site.tower) - 1
        own = len(self.inputs.layout[site.tower].tokens) - 1
        return not last or site.kind == "resid_pre" or own in site.positions

    def _own(self) -> list[Edit]:
        """The edits of the run that is patched."""
        return [Edit(*change) for change in self.edits]

    def _depth(self, tower: str) -> int:
        return self.model.shapes[tower].layers

    # -- rows ------------------------------------------------------------------------------------

    def chunks(self) -> Iterator[tuple[list[int], Score]]:
        """The scores of all patches, a batch of rows at a time."""
        if self.idle:
            many = len(self.idle)
            yield self.idle, Score(*(v.expand(many).clone() for v in self.unchanged))
        for (number, _), group in groupby(self.rows, key=lambda row: (row.tower, row.is_outer)):
            tower, rows = self.towers[number], list(group)
            room = self._room(tower)
            while rows:
                many = self._fit(tower, rows, room)
                try:
                    result = self._chunk(tower, rows[:many])
                except (MemoryError, RuntimeError) as error:
                    if not _out_of_memory(error) or many == 1:
                        raise
                    room //= 2
                    continue
                yield [row.number for row in rows[:many]], result
                rows = rows[many:]

    def _room(self, tower: str) -> int:
        """How many positions, over all rows, fit the budget with what is computed from here on."""
        model, floats = self.model, 0
        for name in self.towers[self.towers.index(tower) :]:
            shape, many = model.shapes[name], len(self.inputs.layout[name].tokens)
            read = len(self.inputs.layout[self.towers[0]].tokens)
            heads = max(shape.heads.values())
            attention = 3 * heads * max(many, read if "cross" in shape.kinds else 0)
            floats = max(floats, 2 * shape.neurons + 6 * shape.width + attention)
        size = torch.finfo(model.dtype).bits // 8
        return max(1, min(BUDGET, model.free_memory() // 4) // (floats * size))

    def _is_plain(self, tower: str, row: Row) -> bool:
        """Whether a patch is a forward of its own: what is added between blocks is no block's."""
        return self._flow(tower) == "plain" or not row.is_simple

    def _fit(self, tower: str, rows: list[Row], room: int) -> int:
        """How many of the next rows to take: batches of about equal size, at least one row each."""
        if self._is_plain(tower, rows[0]):
            return 1
        lengths = self._lengths(tower, rows)
        batches = max(1, -(-sum(lengths) // room))
        share, many = sum(lengths) / batches, 0
        while many < len(rows) and (not many or sum(lengths[: many + 1]) <= share * 1.001):
            many += 1
        return many

    def _lengths(self, tower: str, rows: list[Row]) -> list[int]:
        """How many positions of its tower, or of the longest behind it, each row carries."""
        after = self.towers[self.towers.index(tower) :]
        whole = max(len(self.inputs.layout[name].tokens) for name in after)
        if tower not in self.starts:
            return [whole] * len(rows)
        return [whole - self.starts[tower][row.begin] for row in rows]

    @torch.inference_mode()
    def _chunk(self, tower: str, rows: list[Row]) -> Score:
        """Take rows of one tower, in the order of their stages, to their scores."""
        with self.model.alone():
            return self._scores(tower, rows)

    def _scores(self, tower: str, rows: list[Row]) -> Score:
        model, family = self.model, self.model.family
        if self._is_plain(tower, rows[0]):
            return self._plain(rows[0])
        if self._flow(tower) == "suffix":
            output = family.leave(model.hf, tower, self._suffixes(tower, rows))
            logits = family.finish(model.hf, self.inputs, tower, output)
            return score(logits, self.pair.answer, self.pair.foil)
        if rows[0].sites[0].kind == "output":
            output = self._edited_output(self.base.outputs[tower], tower, self.edits)
            output = self._join(output[:0], output, rows, rows[0].stage)
        else:
            output = family.leave(model.hf, tower, self._through(tower, rows))
            output = self._edited_output(output, tower, self.edits)
        with model.editing(self.inputs, self._own()):
            logits = family.finish(model.hf, self.inputs, tower, output)
        return score(logits, self.pair.answer, self.pair.foil)

    def _through(self, tower: str, rows: list[Row]) -> Float[Tensor, "rows pos width"]:
        """From each row's stage through the last block of its tower."""
        depth, hidden = self._depth(tower), self.base.ends[tower][:0]
        with self._folding(tower):
            for layer in range(rows[0].stage, depth):
                hidden = self._join(hidden, self._entrance(tower, layer), rows, layer)
                hidden = self._block(tower, layer, hidden, rows)
        return self._join(hidden, self.base.ends[tower], rows, depth)

    def _plain(self, row: Row) -> Score:
        """One forward with the patch, where a tower's blocks do not take rows."""
        edits = self._own()
        for site in row.sites:
            there = replace(site, positions=tuple(position + row.shift for position in site.positions))
            edits.append(Edit(site, "set", self.model.read(self.source.values[site.point], there)))
        logits = self.model.run(self.inputs, edits)
        return score(logits[None], self.pair.answer, self.pair.foil)

    def _suffixes(self, tower: str, rows: list[Row]) -> Float[Tensor, "rows 1 width"]:
        """What the last position of each row is behind the last block; rows are only suffixes."""
        starts = self.starts[tower]
        begins = [starts[row.begin] for row in rows]
        ragged = suffix.Rows(self.model, tower, self.base.memory[tower], begins)
        depth, hidden = self._depth(tower), self.base.ends[tower][:, :0]
        with ragged.attending():
            for stage in range(rows[0].stage, depth + 1):
                base = self.base.ends[tower] if stage == depth else self._entrance(tower, stage)
                new = [(i, row) for i, row in enumerate(rows) if row.stage == stage]
                if new:
                    parts = [hidden.to(base.device), *(base[:, begins[i] :] for i, _ in new)]
                    hidden = torch.cat(parts, 1)
                    self._patch_joined(tower, ragged, hidden, new)
                    ragged.take(new[-1][0] + 1)
                if stage < depth:
                    hidden = self._ragged_block(tower, stage, hidden, rows, ragged)
        return hidden[0, ragged.last(), None]

    def _patch_joined(
        self, tower: str, ragged: suffix.Rows, hidden: Tensor, new: list[tuple[int, Row]]
    ) -> None:
        """Write the first patch of rows that join, behind the block that it is in."""
        cells = [
            Cell(0, ragged.place(i, p), row.sites[0], p, row.shift)
            for i, row in new
            for p in row.sites[0].positions
        ]
        behind = [c for c in cells if c.site.kind == "resid"]
        self._write(hidden, behind)
        if behind:
            places = [c.position for c in behind]
            at = torch.tensor([c.source for c in behind], device=hidden.device)
            layer = behind[0].site.layer
            hidden[:, places] = self._added(tower, layer, hidden[:, places], at)
        within = [c for c in cells if c.site.kind in SUBLAYERS and c.site.layer < new[0][1].stage]
        if not within:
            return
        layer = within[0].site.layer
        at = torch.tensor([c.source for c in within], device=hidden.device)
        heads, entrance = _around(tower, layer)
        inside = [replace(c, position=n) for n, c in enumerate(within)]
        with hooks() as hook, suffix.alone(self.model, tower):
            if heads in self.base.values:
                own = self.base.values[heads].to(at.device)[:, at]
                hook(*self.model.module(heads, self.inputs), lambda x: own.clone())
            before = self.base.values[entrance].to(at.device)[:, at]
            out = self._call_at(tower, layer, before, inside, at)
        hidden[0, [c.position for c in within]] = self._added(tower, layer, out, at)[0]

    def _ragged_block(
        self, tower: str, layer: int, hidden: Tensor, rows: list[Row], ragged: suffix.Rows
    ) -> Tensor:
        """One block over all rows that have joined, with the run's own edits and the patches in it."""
        joined = [(i, row) for i, row in enumerate(rows) if row.stage <= layer]
        cells = [
            Cell(0, ragged.place(i, p), site, p, row.shift)
            for i, row in joined
            for site in row.sites
            if site.layer == layer
            for p in site.positions
        ]
        with hooks() as hook:
            for edit in self.edits:
                # What is added between blocks is in the base run, which the rows take it from.
                own = edit.site.tower == tower and edit.site.kind != "deepstack"
                if own and edit.site.layer == layer:
                    self._edit_ragged(hook, edit, joined, ragged)
            hidden = self._call_at(tower, layer, hidden, cells, ragged.tokens)
        return self._added(tower, layer, hidden, ragged.tokens)

    def _added(self, tower: str, layer: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """With what the model adds behind this block, before whatever is next, at these positions."""
        if (tower, layer) not in self.base.given:
            return hidden
        added = self._entrance(tower, layer + 1) - self.base.given[tower, layer]
        return hidden + added[:, tokens.to(added.device)]

    def _edit_ragged(
        self, hook: Any, edit: Change, joined: list[tuple[int, Row]], ragged: suffix.Rows
    ) -> None:
        """One of the run's own edits, at the places that its positions have in each row."""
        site = edit.site
        found = [
            (ragged.place(i, p), n)
            for i, _ in joined
            for n, p in enumerate(site.positions)
            if p >= ragged.begins[i]
        ]
        if found:
            places, numbers = zip(*found, strict=True)
            value = edit.value
            if isinstance(value, Tensor) and value.ndim > 1 and len(value) > 1:
                value = value[list(numbers)]
            there = replace(site, positions=places)
            change = partial(self.model.edited, site=there, op=edit.op, value=value)
            hook(*self.model.module(site.point, self.inputs), change)

    def _call_at(self, tower: str, layer: int, hidden: Tensor, cells: list[Cell], tokens: Tensor) -> Tensor:
        """Call a block on a sequence of the base run's positions, and patch cells on the way."""
        _, kwargs = self.base.calls[tower, layer]
        kwargs = suffix.at_positions(kwargs, tokens)
        kwargs.pop("hidden_states", None)
        by_point = defaultdict(list)
        for cell in cells:
            by_point[cell.site.point].append(cell)
        with hooks() as hook:
            for point, some in by_point.items():
                hook(*self.model.module(point, self.inputs), lambda x, some=some: self._write(x, some))
            out = self.model.blocks(tower)[layer](hidden, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def _entrance(self, tower: str, layer: int) -> Tensor:
        """What block `layer` got in the base run, before edits of it."""
        args, kwargs = self.base.calls[tower, layer]
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    def _join(self, hidden: Tensor, base: Tensor, rows: list[Row], stage: int) -> Tensor:
        """Add the rows of this stage: copies of the base run, patched where that can be done here."""
        new = [row for row in rows if row.stage == stage]
        if not new:
            return hidden
        joined = base.expand(len(new), -1, -1).clone()
        cells = [
            Cell(i, p, row.sites[0], p, row.shift)
            for i, row in enumerate(new)
            for p in row.sites[0].positions
        ]
        self._write(joined, [c for c in cells if c.site.kind in ("resid", "output")])
        within = [c for c in cells if c.site.kind in SUBLAYERS and c.site.layer < stage]
        if within:
            self._behind(joined, within)
        return torch.cat([hidden, joined]) if len(hidden) else joined

    def _behind(self, joined: Tensor, cells: list[Cell]) -> None:
        """Write what patches inside a block change behind it, at their own positions.

        Within a block positions meet in self-attention alone, which these patches leave as it is:
        so each patched position passes its block by itself, with the base run's self-attention
        written over its own, and the patch after that.
        """
        tower, layer = cells[0].site.tower, cells[0].site.layer
        at = torch.tensor([c.source for c in cells], device=joined.device)
        heads, entrance = _around(tower, layer)
        own = self.base.values[heads].to(at.device)[0, at, None]
        alone = [replace(c, row=n, position=0) for n, c in enumerate(cells)]
        with hooks() as hook:
            hook(*self.model.module(heads, self.inputs), lambda x: own)
            hidden = self.base.values[entrance].to(at.device)[0, at, None]
            out = self._call(tower, layer, hidden, alone, attention_mask=None)
        joined[torch.tensor([c.row for c in cells], device=joined.device), at] = out[:, 0]

    def _block(self, tower: str, layer: int, hidden: Tensor, rows: list[Row]) -> Tensor:
        """One block over all rows that have joined, with the patches that are made in it."""
        cells = [
            Cell(i, p, site, p, row.shift)
            for i, row in enumerate(rows)
            for site in row.sites
            if row.stage <= layer == site.layer
            for p in site.positions
        ]
        with self.model.editing(self.inputs, self._own()):
            return self._call(tower, layer, hidden, cells)

    def _call(self, tower: str, layer: int, hidden: Tensor, cells: list[Cell], **changes: object) -> Tensor:
        """Call a block as the base run called it, with other rows, and patch cells on the way."""
        args, kwargs = self.base.calls[tower, layer]
        changes = {"past_key_values": None, **changes}
        kwargs = {name: changes.get(name, value) for name, value in kwargs.items()}
        by_point = defaultdict(list)
        for cell in cells:
            by_point[cell.site.point].append(cell)
        with hooks() as hook:
            for point, some in by_point.items():
                write = lambda x, some=some: self._write(x, some, hidden.shape)  # noqa: E731
                hook(*self.model.module(point, self.inputs), write)
            out = self.model.blocks(tower)[layer](hidden, *args[1:], **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def _write(self, x: Tensor, cells: list[Cell], shape: torch.Size | None = None) -> Tensor:
        """Write the source run's values into cells of one point's activation, in place.

        `shape` gives the rows and positions where they have been laid end to end.
        """
        if not cells:
            return x
        point = cells[0].site.point
        many = self.model.units(point) or 1
        view = (x if shape is None else x.view(*shape[:2], -1)).unflatten(-1, (many, -1))
        numbers = [
            (c.row, c.position, c.source + c.shift, unit) for c in cells for unit in c.site.units or (0,)
        ]
        row, position, source, unit = torch.tensor(numbers, device=x.device).T
        values = self.source.values[point][0].unflatten(-1, (many, -1))
        view[row, position, unit] = values[source, unit]
        return x

    @contextmanager
    def _folding(self, tower: str) -> Iterator[None]:
        """Lay rows that attend to the same image end to end, and keep its keys and values.

        Cross-attention looks at each query position alone, so this changes no result; it saves
        copying the keys and values for every row. The run's own edits inside cross-attention count
        positions of a row, so with such edits rows stay apart.
        """
        path = self.model.family.towers[tower].fold
        if path is None or any(e.site.kind == "cross" and e.site.tower == tower for e in self.edits):
            yield
            return
        rows: list[torch.Size] = []

        def lay(m: Any, args: Any, kwargs: Any) -> Any:
            (hidden,) = args
            mask = kwargs.get("attention_mask")
            rows.append(hidden.shape)
            return (hidden.reshape(1, -1, hidden.shape[-1]),), {
                **kwargs,
                "attention_mask": None if mask is None else mask[:, :, :1],
                "past_key_values": self.kept[tower],
            }

        def part(m: Any, args: Any, out: Any) -> Any:
            return (out[0].view(rows.pop()), *out[1:])

        with handles() as held:
            for block in self.model.blocks(tower):
                module = block.get_submodule(path)
                held(module.register_forward_pre_hook(lay, with_kwargs=True))
                held(module.register_forward_hook(part))
            yield


def _around(tower: str, layer: int) -> tuple[Point, Point]:
    """What a position needs to pass a block alone: its heads' outputs, and the block's input."""
    return Point(tower, layer, "attn", "h"), Point(tower, layer, "resid_pre", "")


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "alloc" in str(error).lower() and "memory" in str(error).lower()
    )


@cache
def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next batch of rows instead of returning it.

    Otherwise the system hands out and clears the same pages for every batch, which costs some
    seven percent of a sweep on a CPU. Elsewhere this does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**30)

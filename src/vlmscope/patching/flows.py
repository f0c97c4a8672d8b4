"""How many patched runs are computed at once: what a flow is, rows of whole runs, one plain run a patch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.models.inputs import Change, Cut, Edit, Inputs
from vlmscope.patching.trace import Trace, edited_output
from vlmscope.runs.access import cut, edges_of, hook, unpadded
from vlmscope.runs.edges import Edges
from vlmscope.runs.forward import editing, forward, read
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import SUBLAYERS, Network
from vlmscope.sites import Point, Site

INSIDE = (*SUBLAYERS, "resid_mid")
"""Kinds that are within a block."""


@dataclass(frozen=True, eq=False)
class Row:
    """One patch: its number in the sweep, what it sets, and the stage of its tower it joins at.

    `sites` are of one layer each, in the order in which the model computes them, `origins` says for each
    where its values stand in the source. Stage L is the entrance of block L; the stage behind the last block
    is its output, the next one the tower's.
    """

    number: int
    sites: tuple[Site, ...]
    origins: tuple[Site, ...]
    stage: int


@dataclass(frozen=True, eq=False)
class Cell:
    """One write: a row and position of a batch, which is the position `at` of a run, gets the source's value
    for the position `taken` of `origin`."""

    row: int
    position: int
    site: Site
    at: int
    origin: Site
    taken: int


@dataclass(frozen=True, eq=False)
class Job:
    """What patches are made in: the base run, its own edits, and the activations that are copied into it.

    `memory` is what flows keep of the base run, by tower; `positions` are so many last ones whose logits are
    scored. `cut` is what is done to the sites where these are edges.
    """

    network: Network
    inputs: Inputs
    changes: Sequence[Change]
    base: Trace
    source: Mapping[Point, Tensor]
    memory: Mapping[str, Any]
    positions: int
    cut: Cut | None = None

    @property
    def edits(self) -> list[Edit]:
        """The edits of the base run."""
        return [Edit(*change) for change in self.changes]

    def depth(self, tower: str) -> int:
        return self.network.shapes[tower].layers

    def longest(self, tower: str) -> int:
        """The positions of the longest of a tower and those behind it."""
        towers = list(self.network.family.towers)
        return max(len(self.inputs.layout[name].tokens) for name in towers[towers.index(tower) :])


class Flow(ExitStack):
    """Some rows of one tower on their way to their logits: copies of the base run, patched.

    Used as a context. `join` and `block` are called stage by stage from that of the first row on, `leave` at
    the end. Rows stand side by side in a batch (`along` 0), or end to end in one sequence (1); `begins` are
    their first positions.
    """

    along: ClassVar[int]

    def __init__(self, job: Job, tower: str, rows: Sequence[Row]) -> None:
        super().__init__()
        self.job, self.tower, self.rows = job, tower, rows
        self.begins = [0] * len(rows)
        self.hidden = torch.empty(0)

    @classmethod
    def cost(cls, job: Job, tower: str, row: Row) -> int:
        """How many positions of its tower, or of the longest behind it, a row carries."""
        return job.longest(tower)

    def join(self, stage: int) -> None:
        """Add the rows of this stage, patched where that can be done here."""
        new = [(i, row) for i, row in enumerate(self.rows) if row.stage == stage]
        if not new:
            return
        base, depth = self.job.base, self.job.depth(self.tower)
        if stage > depth:
            entrance = edited_output(self.job.network, base.outputs[self.tower], self.tower, self.job.changes)
        elif stage == depth:
            entrance = base.values[Point(self.tower, depth - 1, "resid")]
        else:
            entrance = base.entrance(self.tower, stage)
        parts = [self.hidden.to(entrance), *(entrance[:, self.begins[i] :] for i, _ in new)]
        self.hidden = torch.cat(parts, self.along)
        cells = self.cells((i, row, 0) for i, row in new)
        if behind := [c for c in cells if c.site.kind in ("resid", "output")]:
            self.write(self.hidden, behind, self.hidden.shape)
            rows, positions, at = _places(behind)
            self.hidden[rows, positions] = self.added(stage - 1, self.hidden[rows, positions][None], at)[0]
        if within := [c for c in cells if c.site.kind in INSIDE and c.site.layer < stage]:
            self._alone(stage - 1, within)

    def _alone(self, layer: int, cells: Sequence[Cell]) -> None:
        """Write what patches inside a block change behind it, at their own positions.

        Within a block positions meet in self-attention alone, which these patches leave as it is:
        so each patched position passes its block by itself, with the base run's self-attention
        written over its own, and the patch after that.
        """
        values = self.job.base.values
        heads, entrance = around(self.tower, layer)
        rows, positions, at = _places(cells)
        there = [(0, n) if self.along else (n, 0) for n in range(len(cells))]
        alone = [replace(c, row=i, position=p) for c, (i, p) in zip(cells, there, strict=True)]
        single = {
            point: values[point].to(self.hidden.device)[0, at].unsqueeze(1 - self.along)
            for point in (entrance, heads)
            if point in values
        }
        with Hooks() as hooks:
            if heads in single:
                hook(hooks, self.job.network, heads, self.job.inputs, lambda x: single[heads])
            out = self.call(layer, single[entrance], alone, at)
        self.hidden[rows, positions] = out.flatten(0, 1)

    def block(self, layer: int) -> None:
        """All rows that have joined pass a block, and are patched in it."""
        joined = [(i, row) for i, row in enumerate(self.rows) if row.stage <= layer]
        sites = [
            (i, row, n)
            for i, row in joined
            for n, site in enumerate(row.sites)
            if (site.tower, site.layer) == (self.tower, layer)
        ]
        edges = [(i, row.sites[n]) for i, row, n in sites if row.sites[n].source]
        cells = self.cells(sites)
        with Hooks() as hooks:
            self.edit(hooks, layer, joined)
            self.cut(hooks, layer, edges)
            self.hidden = self.call(layer, self.hidden, cells)

    def call(
        self, layer: int, hidden: Tensor, cells: Sequence[Cell], at: Sequence[int] | None = None
    ) -> Tensor:
        """Call a block as the base run called it, with other rows (or positions `at`, each alone), and patch
        cells on the way."""
        args, kwargs = self.job.base.calls[self.tower, layer]
        kwargs = {k: v for k, v in self.arguments(kwargs, at).items() if k != "hidden_states"}
        by_point = defaultdict(list)
        for cell in cells:
            by_point[cell.site.point].append(cell)
        with Hooks() as hooks:
            for point, some in by_point.items():
                change = partial(self.write, cells=some, shape=hidden.shape)
                hook(hooks, self.job.network, point, self.job.inputs, change)
            out = self.job.network.blocks(self.tower)[layer](hidden, *args[1:], **kwargs)
        return self.added(layer, out if isinstance(out, Tensor) else out[0], at)

    def cells(self, sites: Iterable[tuple[int, Row, int]]) -> list[Cell]:
        """The writes of some rows' sites, by the sites' numbers in the row; an edge has none."""
        return [
            Cell(*self.place(i, at), row.sites[n], at, row.origins[n], taken)
            for i, row, n in sites
            if not row.sites[n].source
            for at, taken in zip(row.sites[n].positions, row.origins[n].positions, strict=True)
        ]

    def write(self, x: Tensor, cells: Sequence[Cell], shape: torch.Size) -> Tensor:
        """Write the source's values into cells of one point's activation, in place; `shape` gives rows and
        positions, which may have been laid end to end."""
        units = self.job.network.units(cells[0].site.point) or 1
        there = x.view(*shape[:2], -1).unflatten(-1, (units, -1))
        for (point, *_), same in groupby(cells, _copied):
            some = list(same)
            values = self.job.source[point][0].unflatten(-1, (self.job.network.units(point) or 1, -1))
            row, position, taken = torch.tensor(
                [(c.row, c.position, c.taken) for c in some], device=x.device
            ).T
            each = some if len(some[0].site.units) < 2 else some[:1]
            unit = torch.tensor([c.site.units or (0,) for c in each], device=x.device)
            other = torch.tensor([c.origin.units or (0,) for c in each], device=x.device)
            there[row[:, None], position[:, None], unit] = values[taken[:, None], other].to(x)
        return x

    # -- what differs ----------------------------------------------------------------------------

    def place(self, row: int, position: int) -> tuple[int, int]:
        """Where a row's position is in `hidden`."""
        return row, position

    def arguments(self, kwargs: Mapping[str, Any], at: Sequence[int] | None) -> Mapping[str, Any]:
        """What a block is called with, where it is called with all rows, or with positions by themselves."""
        raise NotImplementedError

    def edit(self, hooks: Hooks, layer: int, joined: Sequence[tuple[int, Row]]) -> None:
        """Make the base run's own edits in a block."""
        raise NotImplementedError

    def cut(self, hooks: Hooks, layer: int, sites: Sequence[tuple[int, Site]]) -> None:
        """Cut the edges that rows lose in a block."""
        for kind in dict.fromkeys(site.kind for _, site in sites):
            some = [(i, site) for i, site in sites if site.kind == kind]
            cut(hooks, self.job.network, self.tower, layer, kind, partial(self.edges, some))

    def edges(self, sites: Sequence[tuple[int, Site]], queries: int, keys: int) -> list[Edges]:
        """The edges of some rows' sites in a call of attention with so many queries and keys."""
        raise NotImplementedError

    def added(self, layer: int, hidden: Tensor, at: Sequence[int] | None) -> Tensor:
        """With what the model adds behind a block, before whatever is next."""
        return hidden

    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        """From behind the last block through all that follows, to the logits."""
        raise NotImplementedError


def around(tower: str, layer: int) -> tuple[Point, Point]:
    """What a position needs to pass a block alone: its heads' outputs, and the block's input."""
    return Point(tower, layer, "attn", "h"), Point(tower, layer, "resid_pre")


def _copied(cell: Cell) -> tuple[Point, tuple[int, ...], tuple[int, ...]]:
    """Which cells, one behind the other, are written at once: those of single units, or of the same set."""
    sets = [units if len(units) > 1 else () for units in (cell.site.units, cell.origin.units)]
    return cell.origin.point, sets[0], sets[1]


def _places(cells: Sequence[Cell]) -> tuple[list[int], list[int], list[int]]:
    """The rows, the positions in the batch, and the positions in a run."""
    return [c.row for c in cells], [c.position for c in cells], [c.at for c in cells]


class Plain(Flow):
    """One plain forward a patch, where a tower's blocks cannot be called with rows."""

    along = 0

    @classmethod
    def cost(cls, job: Job, tower: str, row: Row) -> int:
        return 2**40  # more than there is room for: one at a time

    def join(self, stage: int) -> None:
        """The patch is made as the model computes."""

    def block(self, layer: int) -> None:
        """The model calls its blocks itself."""

    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        job, (row,) = self.job, self.rows
        edits = job.edits
        for site, origin in zip(row.sites, row.origins, strict=True):
            if job.cut:
                edits.append(Edit(site, job.cut))
            else:
                edits.append(Edit(site, "set", read(job.network, job.source[origin.point], origin)))
        return forward(job.network, job.inputs, edits, positions=job.positions).logits[None]


class Rows(Flow):
    """Rows of whole runs, side by side. Those that read the same image share its cross-attention keys and
    values, which are computed once a layer. A row may be patched in towers behind its first one, too."""

    along = 0

    def __enter__(self) -> Rows:
        self.enter_context(_folding(self.job, self.tower))
        return self

    def arguments(self, kwargs: Mapping[str, Any], at: Sequence[int] | None) -> Mapping[str, Any]:
        lacking = ("past_key_values",) if at is None else ("past_key_values", "attention_mask")
        return {name: None if name in lacking else value for name, value in kwargs.items()}

    def edit(self, hooks: Hooks, layer: int, joined: Sequence[tuple[int, Row]]) -> None:
        hooks.enter_context(editing(self.job.network, self.job.inputs, self.job.edits))

    def edges(self, sites: Sequence[tuple[int, Site]], queries: int, keys: int) -> list[Edges]:
        """Rows have keys of their own, or share those of the image."""
        job, found = self.job, []
        for i, site in sites:
            one = edges_of(job.network, job.inputs, site, str(job.cut))
            there = len(unpadded(job.inputs.layout[site.reads or site.tower]))
            behind = i * there if keys > there else 0
            targets = [i * self.hidden.shape[1] + n for n in one.targets]
            found.append(one._replace(targets=targets, sources=[n + behind for n in one.sources]))
        return found

    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        job, family, tower = self.job, self.job.network.family, self.tower
        if len(self.hidden):
            hidden = family.leave(job.network.hf, tower, self.hidden)
            self.hidden = edited_output(job.network, hidden, tower, job.changes)
        self.join(job.depth(tower) + 1)
        self.close()
        with editing(job.network, job.inputs, job.edits), Hooks() as hooks:
            self.behind(hooks)
            return family.finish(job.network.hf, job.inputs, tower, self.hidden, job.positions)

    def behind(self, hooks: Hooks) -> None:
        """Patch the rows in the towers behind theirs, which are called with all of them."""
        by_point = defaultdict(list)
        every = ((i, row, n) for i, row in enumerate(self.rows) for n in range(len(row.sites)))
        for cell in self.cells(one for one in every if one[1].sites[one[2]].tower != self.tower):
            by_point[cell.site.point].append(cell)
        for point, some in by_point.items():
            hook(hooks, self.job.network, point, self.job.inputs, partial(self.written, some))

    def written(self, cells: Sequence[Cell], x: Tensor) -> Tensor:
        """A copy of one point's activation, with the source's values in cells."""
        x = x.clone(memory_format=torch.contiguous_format)
        return self.write(x, cells, x.shape)


@contextmanager
def keeping(network: Network, kept: dict[str, Any]) -> Iterator[None]:
    """Keep the keys and values of all that is attended to across towers, as the base run computes them."""

    def give(cache: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": cache}

    with Hooks() as hooks:
        for tower, table in network.family.towers.items():
            if table.fold is not None:
                kept[tower] = network.family.cache()
                for block in network.blocks(tower):
                    hooks.on_call(block.get_submodule(table.fold), partial(give, kept[tower]))
        yield


@contextmanager
def _folding(job: Job, tower: str) -> Iterator[None]:
    """Lay rows that attend to the same image end to end, and take its keys and values from the base run.

    Cross-attention looks at each query position alone, so this changes no result; it saves
    copying the keys and values for every row. The base run's own edits inside cross-attention count
    positions of a row, so with such edits rows stay apart.
    """
    path = job.network.family.towers[tower].fold
    apart = any(change.site.kind == "cross" and change.site.tower == tower for change in job.changes)
    rows: list[torch.Size] = []

    def lay(args: Any, kwargs: dict[str, Any]) -> Any:
        (hidden,), mask = args, kwargs.get("attention_mask")
        rows.append(hidden.shape)
        mask = None if mask is None else mask[:, :, :1]
        kwargs = {**kwargs, "attention_mask": mask, "past_key_values": job.memory[tower]}
        return (hidden.reshape(1, -1, hidden.shape[-1]),), kwargs

    with Hooks() as hooks:
        for block in [] if path is None or apart else job.network.blocks(tower):
            module = block.get_submodule(path or "")
            hooks.on_call(module, lay)
            hooks.on_output(module, lambda out: (out[0].view(rows.pop()), *out[1:]))
        yield

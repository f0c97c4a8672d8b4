"""Exact edges: one reader reads another run's value of one writer, and all behind it runs freely.

All edges that are asked for are rows of batches, as patches of the engine are: a row is the base run from the
reader's block on, in which that reader alone reads something else. Nothing below it is computed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmscope.models.inputs import CUTS, Pair
from vlmscope.patching.backward import Runs
from vlmscope.patching.edge_circuits import Written, keep, written
from vlmscope.patching.engine import batches, remember
from vlmscope.patching.flows import Cell, Flow, Job, Row, Rows
from vlmscope.patching.graph import Graph
from vlmscope.patching.scores import Metric, score
from vlmscope.patching.suffix import Suffix
from vlmscope.patching.trace import Images, trace
from vlmscope.runs.forward import editing, forward
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import Network, upcast
from vlmscope.runs.readers import Anew, Reads, read_anew, watch
from vlmscope.sites import Point, Site

AT_ONCE = 256
"""Edges into the logits that are computed at a time."""


def exact(
    network: Network,
    pair: Pair,
    edges: Iterable[tuple[str, str]],
    direction: str = "denoise",
    *,
    metric: str | Metric = "ld",
    tower: str | None = None,
    by_rows: bool = True,
) -> NDArray[np.float64]:
    """What each edge changes of the metric of the run that is patched, where it carries the other run's value
    of its writer: as rows of batches, or (not `by_rows`) by one plain forward an edge, which defines it.

    Raises `VlmscopeError` for an edge that there is not, `ModelError` for a tower without edges.

    >>> from vlmscope.checkpoint import load
    >>> from vlmscope.data import examples
    >>> model = load("toy-llava")
    >>> pair = model.prepare(examples("states", limit=1)[0])
    >>> found = exact(model, pair, [("image", "decoder.0.attn.v0"), ("decoder.3.mlp", "logits")])
    >>> found.shape
    (2,)
    """
    runs, graph = Runs(network, pair, direction, metric), Graph(network, pair.clean, tower)
    base, source = (written(graph, run, runs.count) for run in (runs.base, runs.source))
    return moved(runs, graph, base, source, edges, by_rows=by_rows)


@dataclass(frozen=True, eq=False)
class EdgeRow(Row):
    """A row in which a reader, of so many in its sublayer, reads this much more than the stream."""

    reads: Reads
    unit: int
    more: Tensor


class _EdgeFlow(Flow):
    """Rows of edges: what a reader reads is changed as its block computes."""

    rows: Sequence[EdgeRow]

    def cells(self, sites: Iterable[tuple[int, Row, int]]) -> list[Cell]:
        """No activation is copied."""
        return []

    def join(self, stage: int) -> None:
        super().join(stage)
        for i, row in enumerate(self.rows):
            if row.stage == stage == self.job.depth(self.tower):  # what leaves the tower
                self.hidden[self.where(i)] += self.more(row, i).to(self.hidden)

    def edit(self, hooks: Hooks, layer: int, joined: Sequence[tuple[int, Row]]) -> None:
        super().edit(hooks, layer, joined)
        own = defaultdict(list)
        for i, row in enumerate(self.rows):
            if row.stage == layer:
                own[row.reads].append((i, row))
        for reads, some in own.items():
            read_anew(hooks, self.job.network, self.job.inputs, reads, partial(self.changed, some))

    def changed(self, some: Sequence[tuple[int, EdgeRow]], x: Tensor) -> Iterable[Anew]:
        for i, row in some:
            there = x[self.where(i)]
            yield Anew(row.unit, self.where(i), (upcast(there) + self.more(row, i).to(x.device)).to(x))

    def more(self, row: EdgeRow, number: int) -> Tensor:
        return row.more[self.begins[number] :]

    def where(self, row: int) -> tuple[Any, ...]:
        """All of a row in `hidden`."""
        raise NotImplementedError


class EdgeRows(_EdgeFlow, Rows):
    def where(self, row: int) -> tuple[Any, ...]:
        return (row,)


class EdgeSuffix(_EdgeFlow, Suffix):
    def where(self, row: int) -> tuple[Any, ...]:
        return 0, slice(self.offsets[row], self.offsets[row + 1])


FLOWS: dict[str, type[_EdgeFlow]] = {"rows": EdgeRows, "suffix": EdgeSuffix}


@torch.inference_mode()
def moved(
    runs: Runs,
    graph: Graph,
    base: Written,
    source: Written,
    edges: Iterable[tuple[str, str]],
    *,
    by_rows: bool = True,
) -> NDArray[np.float64]:
    """The same, of what two runs wrote."""
    network, (inputs, edits) = runs.network, runs.base
    flow = FLOWS.get(network.flow(graph.tower, inputs))
    changes = network.changes(inputs, edits)
    if not by_rows or any(callable(change.op) or change.op in CUTS for change in changes):
        flow = None
    places = graph.places(edges)
    found, value = np.zeros(len(places[0])), runs.value(base.logits, base.logits, source.logits)

    def take(numbers: Sequence[int], logits: Tensor) -> None:
        ends = runs.baselines(base.logits, source.logits)
        found[list(numbers)] = (score(logits, ends, runs.metric).value - value).cpu().numpy()

    rows, ends, single = list[EdgeRow](), list[EdgeRow](), list[EdgeRow]()
    for row in _rows(graph, base, source, *places):
        if by_rows and row.reads.kind == "end" and graph.tower == network.speaker:
            ends.append(row)
        else:
            (single if flow is None or row.reads.is_across else rows).append(row)
    if rows or ends:
        job, end = _job(runs, graph)
        for start in range(0, len(ends), AT_ONCE):
            some = ends[start : start + AT_ONCE]
            more = torch.stack([row.more[-runs.count :] for row in some])
            take([row.number for row in some], _finished(job, graph.tower, end, more))
        if rows and flow is not None:
            rows.sort(key=lambda row: row.stage)
            for numbers, logits in batches(flow, job, graph.tower, rows):
                take(numbers, logits)
    for row in single:
        take([row.number], _plain(runs, row)[None])
    return found


def _rows(
    graph: Graph, base: Written, source: Written, writers: Sequence[int], readers: Sequence[int]
) -> Iterator[EdgeRow]:
    """What each edge changes of what its reader reads, where it changes anything."""
    apart = source.stream - base.stream
    for number, (writer, reader) in enumerate(zip(writers, readers, strict=True)):
        group = next(one for one in graph.groups if 0 <= reader - one.first < len(one.names))
        reads = group.reads
        if reads.is_across:
            assert source.across is not None and base.across is not None
            more = source.across - base.across
        else:
            more = apart[writer - graph.apart]
        if more.any():
            at = () if reads.is_across else tuple(more.any(-1).nonzero()[:, 0].tolist())
            site = Site(graph.tower, reads.layer, "attn", positions=at)
            stage = reads.layer + (reads.kind == "end")
            yield EdgeRow(number, (site,), (), stage, reads, reader - group.first, more)


def _job(runs: Runs, graph: Graph) -> tuple[Job, Tensor]:
    """What rows are made in, and what stands at the end of the tower."""
    network, (inputs, edits), tower = runs.network, runs.base, graph.tower
    layers = network.shapes[tower].layers
    points = {Point(tower, layers - 1, "resid")}
    if network.family.towers[tower].deepstack:
        points |= {Point(tower, n, "resid") for n in range(layers)}
    memory, ends = dict[str, Any](), list[Tensor]()
    with ExitStack() as stack, Hooks() as hooks:
        remember(network, runs.pair, memory, stack)
        watch(hooks, network, inputs, graph.groups[-1].reads, partial(keep, ends))
        base = trace(network, inputs, edits, points, Images(), runs.count)
    return Job(network, inputs, network.changes(inputs, edits), base, {}, memory, runs.count), ends[0]


def _finished(job: Job, tower: str, end: Tensor, more: Tensor) -> Tensor:
    """The logits where this much more stands at the end of the tower that says the words."""
    family, there = job.network.family, end[:, -more.shape[1] :]
    hidden = (upcast(there) + more.to(there.device)).to(there)
    with job.network.alone(), editing(job.network, job.inputs, job.edits):
        output = family.leave(job.network.hf, tower, hidden)
        return family.finish(job.network.hf, job.inputs, tower, output, job.positions)


def _plain(runs: Runs, row: EdgeRow) -> Tensor:
    """The logits of a plain forward in which one reader reads this much more."""
    network, (inputs, edits) = runs.network, runs.base

    def change(x: Tensor) -> Iterable[Anew]:
        yield Anew(row.unit, slice(None), (upcast(x) + row.more.reshape(x.shape).to(x.device)).to(x))

    with network.alone(), Hooks() as hooks:
        read_anew(hooks, network, inputs, row.reads, change)
        return forward(network, inputs, edits, positions=runs.count).logits

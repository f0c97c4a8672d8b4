"""Runs in which only some edges of a graph carry what the run itself computes; all others, another run's.

A reader gets Σ z_u over the writers u that the circuit connects it with, as they are in this very run, and
Σ z_u of the other run over all others (Hanna et al. 2024, arXiv 2403.17806; MIB, arXiv 2504.13151). So all
edges are the run itself, none the other run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmscope.errors import choice
from vlmscope.models.inputs import Pair, Runnable
from vlmscope.patching.graph import Graph, Writes
from vlmscope.patching.scores import Metric, Score, score, unpatched
from vlmscope.runs.access import hook
from vlmscope.runs.forward import Run, editing, forward, keep_value
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import Network, upcast
from vlmscope.runs.readers import Anew, read_anew, watch
from vlmscope.sites import Point


class Written(NamedTuple):
    """What all writers of a graph wrote in a run."""

    logits: Tensor
    stream: Float[Tensor, "writers pos width"]
    across: Tensor | None


def written(graph: Graph, run: Runnable, count: int) -> Written:
    """One plain run, to its last so many logits; what cross-attention reads is apart, and counts as none
    here."""
    (inputs, edits), across = run, list[Tensor]()
    with graph.network.alone(), Hooks() as hooks:
        if graph.across:
            watch(hooks, graph.network, inputs, graph.reads_across, partial(keep, across))
        found = forward(graph.network, inputs, edits, graph.points, count)
    return written_of(graph, found, across[0] if across else None)


@torch.no_grad()
def written_of(graph: Graph, run: Run, across: Tensor | None) -> Written:
    """What was written in a run that has kept the graph's points."""
    stream = [graph.values(some, run.values) for some in graph.written if not graph.has_across(some)]
    device = graph.network.device
    return Written(run.logits.detach(), torch.cat([x.to(device) for x in stream]), across)


def keep(found: list[Tensor], x: Tensor) -> Tensor:
    """Keep what stands at a place."""
    found[:] = [x]
    return x


def circuits(
    network: Network,
    pair: Pair,
    some: Iterable[Collection[tuple[str, str]]],
    *,
    run: str = "clean",
    tower: str | None = None,
    metric: str | Metric = "ld",
) -> Iterator[Score]:
    """The scores of one run a set of edges: `run` (clean, or corrupt) with these alone, the other run on all
    others. The edges are those of `Graph(network, pair.clean, tower)`.

    Raises `VlmscopeError` for an edge that there is not, `ModelError` for a tower without edges.

    >>> from vlmscope.checkpoint import load
    >>> from vlmscope.data import examples
    >>> model = load("toy-llava")
    >>> pair = model.prepare(examples("states", limit=1)[0])
    >>> edges = Graph(model, pair.clean).edges
    >>> some = [edge for edge in edges if edge.source != "image"]
    >>> whole, blind, none = (float(one.ld) for one in circuits(model, pair, [edges, some, []]))
    >>> whole > 0 > blind, abs(blind - whole) > abs(blind - none)
    (True, True)
    """
    choice(run, "run", ("clean", "corrupt"))
    graph, count = Graph(network, pair.clean, tower), len(pair.answers)
    clean, corrupt = (written(graph, one, count) for one in pair.runs)
    base, _, _, _ = unpatched(clean.logits, corrupt.logits, pair, metric)
    own, other = (pair.runs[0], corrupt) if run == "clean" else (pair.runs[1], clean)
    for edges in some:
        inside = torch.zeros(len(graph.writers), len(graph.readers), dtype=torch.bool)
        inside[graph.places(edges)] = True
        logits = _run(graph, own, count, other, inside)
        yield Score(*(x[0] for x in score(logits[None], base, metric)))


def _run(
    graph: Graph, run: Runnable, count: int, other: Written, inside: Bool[Tensor, "writers readers"]
) -> Tensor:
    network, (inputs, edits) = graph.network, run
    apart = torch.zeros_like(other.stream)  # this run less the other, writer by writer, as they are computed
    with network.alone(), editing(network, inputs, edits), Hooks() as hooks:
        values: dict[Point, Tensor] = {}
        for some in graph.written:
            if graph.has_across(some):
                continue
            first = some.first - graph.apart
            rows = slice(first, first + len(some.names))

            def note(x: Tensor, some: Writes = some, rows: slice = rows) -> Tensor:
                values[some.point._replace(part="")] = x
                apart[rows] = graph.values(some, values).to(apart.device) - other.stream[rows]
                return x

            if some.point.part:
                hook(hooks, network, some.point, inputs, partial(keep_value, values, some.point, True))
            hook(hooks, network, some.point._replace(part=""), inputs, note)
        for group in graph.groups:
            sees = slice(group.sees.start, group.sees.stop)
            outside = ~inside[sees, group.first : group.first + len(group.names)]
            if not outside.any():
                continue
            if group.reads.is_across:
                change = partial(_across, outside, other)
            else:
                change = partial(_stream, outside, apart[sees.start - graph.apart : sees.stop - graph.apart])
            read_anew(hooks, network, inputs, group.reads, change)
        return forward(network, inputs, positions=count).logits


def _stream(
    outside: Bool[Tensor, "writers readers"], apart: Float[Tensor, "writers pos width"], x: Tensor
) -> Iterator[Anew]:
    """The stream without what other edges than the circuit's would have to carry of the other run."""
    units = outside.any(0).nonzero()[:, 0].tolist()
    lacking = torch.einsum("un,upd->npd", outside[:, units].to(apart), apart)
    for unit, less in zip(units, lacking, strict=True):
        yield Anew(unit, slice(None), (upcast(x) - less.to(x.device)).to(x))


def _across(outside: Bool[Tensor, "writers readers"], other: Written, x: Tensor) -> Iterator[Anew]:
    """What the other run's cross-attention reads, for the heads that the circuit does not connect with it."""
    assert other.across is not None
    for unit in outside[0].nonzero()[:, 0].tolist():
        yield Anew(unit, slice(None), other.across.reshape(x.shape).to(x))

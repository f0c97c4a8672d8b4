"""What edges do: all of them from one gradient, or some exactly.

- `eap`, edge attribution patching (Syed et al. 2023, arXiv 2310.10348): the score of an edge u → v is
  Σ_t (z_u,source(t) − z_u,base(t)) · ∂m/∂x_v(t), where z_u is what u wrote, and x_v what v reads before its
  norm: the gradient that flows through v alone, at the base run, the one that is patched. Summed over all
  readers it is attribution patching of u, over all writers what attribution patching gives for x_v.
- `eap-ig` (Hanna et al. 2024, arXiv 2403.17806): that gradient's mean over `steps` points of the line
  from the base run's inputs to the source's, image features and text embeddings at the same fraction. The
  points are the middles of as many equal pieces: neither end is among them.
- `exact`: v reads its own input with z_u of the base run replaced by that of the source, the norm applied
  anew. No other reader sees this; what comes behind v runs freely. (Path patching is another thing: it holds
  what else is on the way.) `eap` is what it tends to where the step is small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vlmscope.models.inputs import Edit, Pair
from vlmscope.patching.backward import Runs, check_gradient, frozen
from vlmscope.patching.edge_circuits import Written, written, written_of
from vlmscope.patching.gradients import STEPS, is_before, lines_of
from vlmscope.patching.graph import Graph, Group
from vlmscope.patching.scores import Metric, Score, unpatched
from vlmscope.runs.forward import forward, read
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import Network, upcast
from vlmscope.runs.readers import norm_of, projection, watch
from vlmscope.sites import Point

Array = NDArray[np.float64]
Method = Literal["eap", "eap-ig", "exact"]
METHODS = get_args(Method)
CHUNK = 2**27
"""Bytes that what writers wrote at some positions may take at a time."""


class Edged(NamedTuple):
    """The scores of both runs, and a number for each edge of the graph, in the order of `Graph.edges`."""

    clean: Score
    corrupt: Score
    graph: Graph
    scores: Array


def score_edges(
    network: Network,
    pair: Pair,
    direction: str = "denoise",
    *,
    method: Literal["eap", "eap-ig"] = "eap",
    metric: str | Metric = "ld",
    steps: int = STEPS,
    tower: str | None = None,
) -> Edged:
    """How much every edge of a tower would change the metric of the run that is patched, by gradients.

    Raises `VlmscopeError` for a metric without a gradient, `ModelError` for a tower without edges.

    >>> from vlmscope.checkpoint import load
    >>> from vlmscope.data import examples
    >>> model = load("toy-llava")
    >>> found = score_edges(model, model.prepare(examples("states", limit=1)[0]))
    >>> len(found.scores) == len(found.graph.edges), found.graph.edges[0]
    (True, Edge(source='embed', target='decoder.0.attn.q0'))
    """
    runs, graph = Runs(network, pair, direction, metric), Graph(network, pair.clean, tower)
    source, base = written(graph, runs.source, runs.count), None
    whole, points = np.zeros((len(graph.writers), len(graph.readers))), [list[Edit]()]
    if method == "eap-ig":  # else the run whose gradients are taken is the base run itself
        base, points = written(graph, runs.base, runs.count), list(_along(runs, graph, steps))
    for edits in points:
        found, base = through_readers(runs, graph, base, source, edits)
        whole += found / len(points)
    assert base is not None
    _, clean, corrupt, _ = unpatched(*runs.both(base.logits, source.logits), pair, metric)
    return Edged(clean, corrupt, graph, whole[graph.places(graph.edges)])


def _along(runs: Runs, graph: Graph, steps: int) -> Iterator[list[Edit]]:
    """The inputs of a tower, and of those behind it, at points of the line between the two runs."""
    network, inputs = runs.network, runs.base[0]
    behind, before = (network.placed(line, inputs) for line in lines_of(network))
    line = before if is_before(network, Point(graph.tower, 0, "resid_pre")) else behind
    points = {site.point for site in line}
    here, there = (forward(network, *run, points, runs.count).values for run in (runs.base, runs.source))
    for number in range(steps):
        share = (number + 0.5) / steps
        between = {point: here[point] + share * (there[point] - here[point]) for point in points}
        yield [Edit(site, "set", read(network, between[site.point], site)) for site in line]


class _Reader(NamedTuple):
    """What some readers read before their norm, and the gradient where it can be taken: of what the
    projection gives, or of what they read itself."""

    stream: Tensor
    gradient: Tensor


def through_readers(
    runs: Runs, graph: Graph, base: Written | None, source: Written, edits: Sequence[Edit]
) -> tuple[Array, Written]:
    """The scores from the gradients of one run, of each reader what flows through it alone; and the base run,
    which without `base` is this very one."""
    readers, base = _gradients(runs, graph, base, source.logits, edits)
    found = np.zeros((len(graph.writers), len(graph.readers)))
    apart = source.stream - base.stream
    size = max(1, CHUNK // (apart[:, 0].nbytes + 1))
    for group, reader in zip(graph.groups, readers, strict=True):
        if reader is None:
            continue
        rows, columns = (
            slice(group.sees.start, group.sees.stop),
            slice(group.first, group.first + len(group.names)),
        )
        if group.reads.is_across:
            assert source.across is not None and base.across is not None
            moved = upcast(source.across - base.across).flatten(0, -2)[None]
        else:
            moved = apart[rows.start - graph.apart : rows.stop - graph.apart]
        for start in range(0, moved.shape[1], size):
            at = slice(start, start + size)
            back = upcast(_back(graph, group, reader, at)).to(moved.device)
            found[rows, columns] += (moved[:, at].flatten(1) @ back.flatten(1).T).double().cpu().numpy()
    return found, base


def _gradients(
    runs: Runs, graph: Graph, base: Written | None, source: Tensor, edits: Sequence[Edit]
) -> tuple[list[_Reader | None], Written]:
    network, (inputs, own) = runs.network, runs.base
    streams: list[list[Tensor]] = [[] for _ in graph.groups]
    tensors: list[list[Tensor]] = [[] for _ in graph.groups]

    def keep(found: list[Tensor], x: Tensor) -> Tensor:
        found[:] = [x.detach()]
        return x

    def part(found: list[Tensor], x: Tensor) -> Tensor:
        # another tensor of the same numbers: what flows back to it comes through this reader alone
        found[:] = [x.view_as(x) if x.requires_grad else x.detach().clone().requires_grad_()]
        return found[0]

    with network.alone(), frozen(network), Hooks() as hooks:
        for group, stream, tensor in zip(graph.groups, streams, tensors, strict=True):
            reads = group.reads
            watch(hooks, network, inputs, reads, partial(keep, stream))
            if not reads.part:
                watch(hooks, network, inputs, reads, partial(part, tensor))
            else:
                flat = not reads.is_across and network.flow(reads.tower, inputs) == "plain"
                hooks.on_hidden(projection(network, reads).module, partial(part, tensor), flat=flat)
        kept = graph.points if base is None else ()
        run = forward(network, inputs, [*own, *edits], kept, runs.count, grad=True)
    if base is None:
        seen = zip(graph.groups, streams, strict=True)
        base = written_of(graph, run, next((x[0] for group, x in seen if group.reads.is_across), None))
    value = runs.value(run.logits, base.logits, source)
    check_gradient(value)
    each = [tensor[0] for tensor in tensors]
    gradients = torch.autograd.grad(value, each, allow_unused=True)
    pairs = zip(streams, gradients, strict=True)
    found: list[_Reader | None] = [
        None if gradient is None else _Reader(stream[0], gradient) for stream, gradient in pairs
    ]
    return found, base


def _back(graph: Graph, group: Group, reader: _Reader, at: slice) -> Float[Tensor, "readers pos width"]:
    """The gradients of what each reader reads, at some positions."""
    reads, network = group.reads, graph.network
    gradient = reader.gradient.flatten(0, -2)[at]
    if not reads.part:
        return gradient[None]
    found = projection(network, reads)
    weight = network.matrix(found.module)[found.whole].to(gradient)
    many = (found.heads, -1)
    each = torch.einsum(
        "phw,hwd->hpd", gradient[:, found.whole].unflatten(-1, many), weight.unflatten(0, many)
    )
    if reads.is_across:
        return each
    norm = norm_of(network, reads)
    assert norm is not None
    with network.alone(), torch.enable_grad():
        stream = reader.stream.flatten(0, -2)[at].expand_as(each).clone().requires_grad_()
        return torch.autograd.grad(norm.forward(stream), stream, each)[0]

"""A tower as a graph: what writes to its residual stream, what reads it, and what each has written in a run.

Blocks that read the stream through a norm and add to it make it a sum of writers: what enters the first
block, each head behind its output projection, each MLP, what is added between blocks (DeepStack). Where a
norm or a factor stands behind a sublayer, a writer is what is added, by the run's own norm. Readers are the
query, key and value of each head (keys and values of a group of queries once), each MLP, and the end. An edge
is a writer and a reader behind it. What cross-attention attends to is a writer of its own, which only its
keys and values read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.errors import ModelError, VlmscopeError, shown
from vlmscope.models.inputs import Inputs
from vlmscope.runs.network import SUBLAYERS, Network, has, upcast
from vlmscope.runs.readers import Reads, norm_of, projection
from vlmscope.sites import Point


class Edge(NamedTuple):
    """From a writer (`embed`, `image`, `decoder.2.attn.h1`, `decoder.2.mlp`) to a reader
    (`decoder.5.attn.q3`, `decoder.5.mlp`, `logits`)."""

    source: str
    target: str


class Writes(NamedTuple):
    """Some writers: the heads of a sublayer, a sublayer, or what enters the tower; `first` is the number of
    the first of them."""

    point: Point
    names: tuple[str, ...]
    first: int


class Group(NamedTuple):
    """Readers that read alike, and the numbers of the writers that they see; `first` is the number of the
    first of them."""

    reads: Reads
    names: tuple[str, ...]
    first: int
    sees: range


class Graph:
    """The writers and readers of a tower in one run, by default of the one that says the words.

    Raises `ModelError` for a tower in which the stream is no sum of writers, or that has several ends.

    >>> from vlmscope.checkpoint import load
    >>> from vlmscope.data import examples
    >>> model = load("toy-llava")
    >>> graph = Graph(model, model.prepare(examples("states", limit=1)[0]).clean)
    >>> graph.writers[:3], graph.readers[-1], Edge("image", "decoder.1.mlp") in graph.edges
    (['embed', 'image', 'decoder.0.attn.h0'], 'logits', True)
    """

    def __init__(self, network: Network, inputs: Inputs, tower: str | None = None) -> None:
        self.network, self.inputs, self.tower = network, inputs, tower or network.speaker
        check_tower(network, self.tower)
        shape, idle = network.shapes[self.tower], network.idle(self.tower, inputs)
        self.across = (
            shape.reads if "cross" in shape.kinds and len(idle) < len(shape.having("cross")) else None
        )
        self.apart = 1 if self.across else 0
        """How many of the first writers are not on the stream."""
        self.groups: list[Group] = []
        self.written: list[Writes] = []
        start = 0
        if self.across:
            name = "image" if self.across == next(iter(network.shapes)) else self.across
            start = self._write(Point(self.across, 0, "output"), name)
        entrance = [name for name, at in self.entrances.items() if at]
        count = self._write(Point(self.tower, 0, "resid_pre"), *entrance)
        for layer in (n for n in range(shape.layers) if n not in idle):
            for kind in SUBLAYERS:
                if layer not in shape.having(kind):
                    continue
                for part in "qkv" if kind != "mlp" else [""]:
                    self._read(Reads(self.tower, layer, kind, part), range(start, count))
                count = self._write(*self._units(layer, kind))
            if layer in shape.having("deepstack"):
                point = Point(self.tower, layer, "deepstack")
                count = self._write(point, f"{self.tower}.{layer}.deepstack")
        self._read(Reads(self.tower, shape.layers - 1, "end"), range(start, count))
        self.writers = [name for some in self.written for name in some.names]
        self.readers = [name for some in self.groups for name in some.names]

    def _write(self, point: Point, *names: str) -> int:
        first = sum(len(some.names) for some in self.written)
        self.written.append(Writes(point, names, first))
        return first + len(names)

    def _units(self, layer: int, kind: str) -> tuple[Any, ...]:
        name = f"{self.tower}.{layer}.{kind}"
        if kind == "mlp":
            return Point(self.tower, layer, kind), name
        many = self.network.shapes[self.tower].heads[kind]
        return Point(self.tower, layer, kind, "h"), *(f"{name}.h{n}" for n in range(many))

    def _read(self, reads: Reads, sees: range) -> None:
        first = sum(len(some.names) for some in self.groups)
        name = f"{reads.tower}.{reads.layer}.{reads.kind}"
        if reads.kind == "end":
            names = ["logits" if reads.tower == self.network.speaker else "projector"]
        elif not reads.part:
            names = [name]
        else:
            names = [f"{name}.{reads.part}{n}" for n in range(projection(self.network, reads).heads)]
        self.groups.append(Group(reads, tuple(names), first, range(1) if reads.is_across else sees))

    @cached_property
    def entrances(self) -> dict[str, list[int]]:
        """The positions of what enters the first block, by writer."""
        layout = self.inputs.layout[self.tower]
        is_shown = layout.text and not self.across
        image = {*layout.image, *layout.cells} if is_shown else set[int]()
        return {"embed": [n for n in range(len(layout.tokens)) if n not in image], "image": sorted(image)}

    @cached_property
    def edges(self) -> list[Edge]:
        """All edges, by reader."""
        return [Edge(self.writers[n], name) for some in self.groups for name in some.names for n in some.sees]

    def places(self, edges: Any) -> tuple[list[int], list[int]]:
        """The numbers of edges' writers and readers; raises `VlmscopeError` for one that there is not."""
        found: tuple[list[int], list[int]] = ([], [])
        for edge in edges:
            try:
                writer, (reader, sees) = self._writer[edge[0]], self._reader[edge[1]]
                is_there = writer in sees
            except (KeyError, IndexError, TypeError):
                is_there = False
            if not is_there:
                raise VlmscopeError(
                    f"no edge {shown(edge)} in the {self.tower} tower of {self.network.name}; expected a "
                    f"writer and a reader behind it, such as {tuple(self.edges[-1])}"
                )
            found[0].append(writer)
            found[1].append(reader)
        return found

    @cached_property
    def _writer(self) -> dict[str, int]:
        return {name: n for n, name in enumerate(self.writers)}

    @cached_property
    def _reader(self) -> dict[str, tuple[int, range]]:
        """The number of each reader, and what it sees."""
        each = ((name, group.sees) for group in self.groups for name in group.names)
        return {name: (n, sees) for n, (name, sees) in enumerate(each)}

    @cached_property
    def points(self) -> set[Point]:
        """What a run has to keep to know what was written: heads and what became of them."""
        own = [some.point for some in self.written if some.point.tower == self.tower]
        return {*own, *(point._replace(part="") for point in own)}

    @property
    def reads_across(self) -> Reads:
        """Where what cross-attention attends to can be looked at."""
        return next(some.reads for some in self.groups if some.reads.is_across)

    def has_across(self, some: Writes) -> bool:
        """Whether these are what cross-attention attends to, which are not on the stream."""
        return self.across is not None and some.first == 0

    def values(self, some: Writes, values: Mapping[Point, Tensor]) -> Float[Tensor, "writers pos width"]:
        """What writers on the stream wrote, in float32 at least; of heads the shares in
        what was added."""
        network, point = self.network, some.point
        added = upcast(values[point._replace(part="")])
        if point.kind == "resid_pre":
            found = added.new_zeros(len(some.names), len(self.inputs.layout[self.tower].tokens), 1)
            for one, name in zip(found, some.names, strict=True):
                one[self.entrances[name]] = 1.0
            return added * found
        if point.part != "h":
            return added
        block = network.blocks(self.tower)[point.layer]
        module: Any = block.get_submodule(getattr(network.family.towers[self.tower], point.kind))
        active = upcast(values[point][0])
        weight = network.matrix(module).to(active)
        heads = torch.einsum(
            "phw,dhw->hpd",
            active.unflatten(-1, (len(some.names), -1)),
            weight.unflatten(-1, (len(some.names), -1)),
        )
        if not _has_more(network, self.tower, point):
            return heads
        whole = heads.sum(0) if module.bias is None else heads.sum(0) + module.bias.to(heads)
        return heads * torch.where(whole == 0, 0.0, added[0] / whole)


def _has_more(network: Network, tower: str, point: Point) -> bool:
    """Whether anything but the output projection stands between heads and the stream."""
    table, block = network.family.towers[tower], network.blocks(tower)[point.layer]
    factor = table.factor.get(point.kind)
    is_normed = point.kind in table.behind and all(has(block, norm) for norm in table.behind.values())
    return is_normed or (factor is not None and factor(block) is not None)


def check_tower(network: Network, tower: str) -> None:
    """Raises `ModelError` for a tower that is no graph of edges, `VlmscopeError` where there is none."""
    if tower not in network.shapes:
        raise VlmscopeError(
            f"{network.name} has no tower {shown(tower)}; expected one of {', '.join(network.shapes)}"
        )
    table, name = network.family.towers[tower], f"the {tower} tower of {network.name}"
    nodes = "take its heads and MLPs as nodes (vlmscope sweep, attribute)"
    blocks = network.blocks(tower)
    if table.normed or not all(getattr(block, "do_layer_norm_before", True) for block in blocks):
        raise ModelError(
            f"{name}: its blocks normalise the residual stream itself (post-norm), which so is no sum of "
            f"writers and has no edges across them; {nodes}"
        )
    if tower != network.speaker and tower != next(iter(network.shapes)):
        raise ModelError(
            f"{name}: edges are of the vision tower or of the {network.speaker}; name one of these"
        )
    if table.joined is not None and table.joined(network.hf.config):
        raise ModelError(
            f"{name}: what leaves it is made of several of its blocks, so that it has no one end; {nodes}"
        )
    if tower == network.speaker and network.family.norm is None:
        raise ModelError(f"{name}: more than a norm stands between its last block and the logits; {nodes}")
    for n in range(len(blocks)):
        for kind in SUBLAYERS:
            if n in network.shapes[tower].having(kind):
                reads = Reads(tower, n, kind, "" if kind == "mlp" else "q")
                norm_of(network, reads)
                if reads.part:
                    for part in "qkv":
                        projection(network, reads._replace(part=part))

"""What circuits are made of: heads, neurons and sublayers (nodes), or edges between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.data.example import Example
from vlmscope.errors import ExampleError
from vlmscope.models.inputs import Pair
from vlmscope.patching import engine
from vlmscope.patching.edge_circuits import circuits as run_edges
from vlmscope.patching.graph import Edge, Graph
from vlmscope.patching.nodes import Circuit, run_circuits
from vlmscope.patching.scores import Score
from vlmscope.patching.trace import Images
from vlmscope.sites import ATTENTION, TOWERS, Pattern, Shape, Site, expand
from vlmscope.studies.edge_tables import ENDS
from vlmscope.studies.task import Task

KINDS = (*ATTENTION, "mlp")
"""What adds to the stream, and so can be in a circuit."""
Place = tuple[str, int, str, str]
"""Tower, layer, kind and unit."""
Found = tuple[Score, Score, Float[Tensor, "circuits 3"]]
"""The scores of the clean and the corrupt run, and of each circuit P(answer), LD and the metric."""


@dataclass(frozen=True)
class Nodes:
    """Heads, neurons and sublayers, each at all its positions, and the expressions that name them."""

    expressions: list[str]
    sites: list[Site]

    @cached_property
    def names(self) -> list[str]:
        return [name_of(site) for site in self.sites]

    @property
    def alike(self) -> Sequence[Hashable]:
        """What each part has in common with those that a random circuit may have in its place."""
        return [site.point for site in self.sites]

    @property
    def nouns(self) -> list[str]:
        whole = {"mlp": "MLP"}
        units = {"h": "head", "n": "neuron"}
        return [units.get(site.part) or whole.get(site.kind, "attention block") for site in self.sites]

    @property
    def places(self) -> list[Place]:
        return [(site.tower, site.layer, site.kind, site.unit or "") for site in self.sites]

    @property
    def groups(self) -> dict[str, frozenset[int]]:
        """The parts of each tower, or of each kind in the only one; none where these are all parts."""
        several = len({site.tower for site in self.sites}) > 1
        groups = defaultdict[str, set[int]](set)
        for number, site in enumerate(self.sites):
            groups[site.tower if several else f"{site.tower}.{site.kind}"].add(number)
        return {name: frozenset(some) for name, some in groups.items()} if len(groups) > 1 else {}

    def pruned(self, circuit: frozenset[int]) -> frozenset[int]:
        """All of it: in a stream each node has a way to the logits."""
        return circuit

    def run(
        self,
        task: Task,
        example: Example,
        pair: Pair,
        circuits: Sequence[Circuit],
        images: Images,
        way: ModuleType = engine,
    ) -> Found:
        """The runs of circuits of one pair, by the engine, or by plain forwards."""
        values = task.values(example, pair, self.sites)
        return run_circuits(
            task.model, pair, self.sites, circuits, values=values, metric=task.metric, images=images, way=way
        )


@dataclass(frozen=True)
class Edges:
    """All edges of a tower, by the name of the part that they are, those into one reader together, from the
    bottom up. A part is one edge, or (in a file of MIB's) all that enters the tower, to one reader."""

    tower: str
    shape: Shape
    each: Mapping[str, tuple[Edge, ...]]

    @property
    def expressions(self) -> list[str]:
        return []

    @cached_property
    def names(self) -> list[str]:
        return list(self.each)

    @property
    def alike(self) -> Sequence[Hashable]:
        """The layers of what writes and of what reads: between two layers there are always several."""
        return [tuple(map(_layer, some[0])) for some in self._parts]

    @property
    def nouns(self) -> list[str]:
        return ["edge"] * len(self.each)

    @property
    def places(self) -> list[Place]:
        """Those of what reads; the end reads what the last block gives."""
        found: list[Place] = []
        for some in self._parts:
            if some[0].target in ENDS:
                found.append((self.tower, self.shape.layers - 1, "resid", ""))
                continue
            tower, layer, kind, *unit = some[0].target.split(".")
            found.append((tower, int(layer), kind, unit[0] if unit else ""))
        return found

    @property
    def groups(self) -> dict[str, frozenset[int]]:
        """None: all edges of a tower are a way."""
        return {}

    def pruned(self, circuit: frozenset[int]) -> frozenset[int]:
        """Without the edges that are on no way from what enters the tower to its end: these carry what they
        carry outside of a circuit, too, so that nothing changes. A circuit without any way stays as it is."""
        reached = {one.source for some in self._parts for one in some if _enters(one.source)}
        kept: list[int] = []
        for number in sorted(circuit):
            if any(one.source in reached for one in self._parts[number]):
                kept.append(number)
                reached |= self._nodes(self._parts[number][0].target)
        wanted: set[str] = set()
        found: set[int] = set()
        for number in reversed(kept):
            target = self._parts[number][0].target
            if target in ENDS or self._nodes(target) & wanted:
                found.add(number)
                wanted |= {one.source for one in self._parts[number]}
        return frozenset(found) or circuit

    def run(
        self, task: Task, example: Example, pair: Pair, circuits: Sequence[Circuit], images: Images
    ) -> Found:
        """The runs of circuits of one pair, one plain forward each."""
        graph = Graph(task.model, pair.clean, self.tower)
        if odd := sorted(self._every ^ set(graph.edges)):
            raise ExampleError(
                f"has other edges than those that have scores: {tuple(odd[0])} is only among one of these"
            )
        plain = engine.patch(task.model, pair, [], "noise", metric=task.metric, images=images)
        sets = [[edge for number in circuit for edge in self._parts[number]] for circuit in circuits]
        found = list(run_edges(task.model, pair, sets, tower=self.tower, metric=task.metric))
        scores = torch.stack([torch.stack([one.p, one.ld, one.value]) for one in found])
        return plain.clean, plain.corrupt, scores.double().cpu()

    @cached_property
    def _parts(self) -> list[tuple[Edge, ...]]:
        return list(self.each.values())

    @cached_property
    def _every(self) -> set[Edge]:
        return {one for some in self._parts for one in some}

    def _nodes(self, reader: str) -> set[str]:
        """What writes what a reader makes of it: heads, those that share keys or values together, or an
        MLP."""
        place, _, unit = reader.rpartition(".")
        if not unit[1:].isdigit():
            return {reader}
        kind, part, number = place.rpartition(".")[2], unit[0], int(unit[1:])
        many = self.shape.heads[kind] // (self.shape.units(kind, part) or 1)
        return {f"{place}.h{n}" for n in range(number * many, (number + 1) * many)}


Parts = Nodes | Edges


def named(source: str, target: str) -> str:
    """What an edge is called as a part.

    >>> named("image", "decoder.0.attn.v1")
    'image->decoder.0.attn.v1'
    """
    return f"{source}->{target}"


def _layer(end: str) -> str:
    """The layer of a writer or reader; none of what enters the tower, or is its end.

    >>> _layer("decoder.3.attn.v1"), _layer("logits")
    ('3', '')
    """
    return end.split(".")[1] if "." in end else ""


def _enters(writer: str) -> bool:
    """Whether this is written by no head or MLP of the tower."""
    return "." not in writer or writer.endswith(".deepstack")


def name_of(site: Site) -> str:
    """What a node is called.

    >>> name_of(Site("decoder", 3, "attn", "h", (1,)))
    'decoder.3.attn.h1'
    """
    return str(site).partition("@")[0]


def parts_of(names: Iterable[str], shapes: Mapping[str, Shape]) -> Nodes:
    """The nodes of these names, in the order of the model."""
    units = defaultdict[tuple[str, int, str, str], list[int]](list)
    for name in names:
        tower, at, kind, *unit = name.split(".")
        letter, number = (unit[0][0], int(unit[0][1:])) if unit else ("", 0)
        units[tower, int(at), kind, letter].append(number)
    written: list[str] = []
    for (tower, layer, kind, letter), numbers in sorted(
        units.items(), key=lambda one: (TOWERS.index(one[0][0]), one[0][1], KINDS.index(one[0][2]))
    ):
        place = f"{tower}.{layer}.{kind}"
        if not letter:
            written.append(f"{place}@all")
        elif len(numbers) == shapes[tower].units(kind, letter):
            written.append(f"{place}.{letter}*@all")
        else:
            written += [f"{place}.{letter}{each}@all" for each in sorted(numbers)]
    return Nodes(written, expand([Pattern.parse(text) for text in written], shapes))

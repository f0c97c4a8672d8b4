"""A run of which gradients are taken, and what becomes of them, one layer after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vlmscope.errors import ModelError, VlmscopeError
from vlmscope.models.dtypes import QUANTIZED
from vlmscope.models.inputs import Edit, Pair
from vlmscope.patching.scores import Baselines, Metric, score
from vlmscope.runs.forward import forward
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site

Array = NDArray[np.floating[Any]]
Take = Callable[[Point, Tensor], Mapping[Point, Array]]
"""From a point and the gradient there to sums over places, of this point or others."""


def check_network(network: Network) -> None:
    """Raises `ModelError` for a model through which no gradients go."""
    if network.precision == QUANTIZED and network.device.type == "cpu":
        raise ModelError(
            f"{network.name}: no gradients go through weights of 4 bits on a CPU; take a GPU, or another "
            "precision (--dtype)"
        )


def check_gradient(metric: Tensor) -> None:
    """Raises `VlmscopeError` for a metric that has none."""
    if not metric.requires_grad:
        raise VlmscopeError(
            "the metric has no gradient: it is no function of the logits that torch can take back; take "
            "ld, p, logprob or kl"
        )


class Index:
    """Where each site's number is among sums over positions, `(places, units)`, of each point."""

    def __init__(self, network: Network, sites: Sequence[Site]) -> None:
        self.network, self.sites = network, sites
        self.places: dict[Point, dict[tuple[int, ...], int]] = defaultdict(dict)
        for site in sites:
            self.places[site.point].setdefault(site.positions, len(self.places[site.point]))

    @cached_property
    def _arrays(self) -> dict[Point, Any]:
        """The number of a site, its place and a unit, for each unit; made where sites are asked for."""
        cells: dict[Point, list[tuple[int, int, int]]] = defaultdict(list)
        for number, site in enumerate(self.sites):
            place = self.places[site.point][site.positions]
            units = site.units or range(self.network.units(site.point) or 1)
            cells[site.point] += [(number, place, unit) for unit in units]
        return {point: np.array(some).T for point, some in cells.items()}

    @property
    def points(self) -> list[Point]:
        return list(self.places)

    def reduce(self, point: Point, each: Float[Tensor, "1 pos width"]) -> Array:
        """The sums of an activation's numbers over the positions of every place, by unit."""
        units = self.network.units(point)
        whole = each[0].unflatten(-1, (units or 1, -1)).sum(-1)
        at = [n for positions in self.places[point] for n in positions]
        of = [n for positions, n in self.places[point].items() for _ in positions]
        sums = whole.new_zeros(len(self.places[point]), whole.shape[1])
        sums.index_add_(0, torch.tensor(of, device=each.device), whole[at])
        return sums.cpu().numpy()

    def product(self, point: Point, delta: Tensor, gradient: Tensor) -> Array:
        """Σ delta · gradient over the places of a point; what both runs share counts nothing."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        delta = delta.to(gradient.device, wide)
        return self.reduce(point, torch.where(delta == 0, 0.0, delta * gradient.to(wide)))

    def scores(self, sums: Mapping[Point, Array]) -> Array:
        """A number a site: the sum over its units. What no gradient reaches counts nothing."""
        found = np.zeros(len(self.sites))
        for point, (numbers, places, units) in self._arrays.items():
            if point in sums:
                np.add.at(found, numbers, sums[point][places, units])
        return found


class Runs:
    """The two runs of a pair, as the one that is patched and the one that values come from."""

    def __init__(self, network: Network, pair: Pair, direction: str, metric: str | Metric) -> None:
        check_network(network)
        self.network, self.pair, self.metric, self.count = network, pair, metric, len(pair.answers)
        self.is_clean = direction == "noise"
        self.base, self.source = pair.runs if self.is_clean else pair.runs[::-1]

    def both(self, base: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """What the clean run gave, and the corrupt one."""
        return (base, source) if self.is_clean else (source, base)

    def value(self, logits: Tensor, base: Tensor, source: Tensor) -> Tensor:
        """The metric of some logits, in a graph, where the two runs gave these."""
        return score(logits[None], self.baselines(base, source), self.metric).value[0]

    def baselines(self, base: Tensor, source: Tensor) -> Baselines:
        """What metrics compare with, where the two runs gave these logits."""
        return Baselines(*self.both(base, source), self.pair.answers, self.pair.foil)


class Backward:
    """A run, with edits beside its own, of which gradients are taken as far as these edits: once, or several
    times. They are looked at where `points` are; at those of `also`, too, they can be left out."""

    def __init__(
        self,
        runs: Runs,
        index: Index,
        points: Sequence[Point],
        edits: Sequence[Edit],
        also: Sequence[Point] = (),
    ) -> None:
        inputs, own = runs.base
        ends = [edit.site.point for edit in edits if isinstance(edit.site, Site)]
        keep = {*points, *ends, *also}
        with runs.network.alone(), frozen(runs.network):
            run = forward(runs.network, inputs, [*own, *edits], keep, runs.count, grad=True)
        self.index, self.points, self.values, self.logits = index, points, run.values, run.logits
        self._ends = [run.values[point] for point in ends]

    @classmethod
    def at_base(
        cls, runs: Runs, index: Index, points: Sequence[Point], source: Tensor, also: Sequence[Point] = ()
    ) -> Backward:
        """The base run, begun with the gradient of its metric."""
        network, inputs = runs.network, runs.base[0]
        ends = [network.places(site, inputs)[0] for site in _ends(network, index.points)]
        zero = torch.zeros(1, dtype=network.dtype, device=network.device, requires_grad=True)
        run = cls(runs, index, points, [Edit(site, "add", zero) for site in ends], also)
        if not run.start(runs.value(run.logits, run.logits.detach(), source)):
            raise VlmscopeError(
                "the metric has no gradient at the run that is patched (it is constant around it); take ld, "
                "logprob or p, or another direction"
            )
        return run

    def start(self, metric: Tensor) -> bool:
        """Begin with the metric's own gradient; false where it is zero.

        Raises `VlmscopeError` for a metric that has none.
        """
        check_gradient(metric)
        (self._first,) = torch.autograd.grad(metric, self.logits)
        return bool(self._first.any())

    def moved(self, point: Point, source: Tensor, gradient: Tensor) -> dict[Point, Array]:
        """What a step to the source's values does, by the gradient."""
        return {point: self.index.product(point, source - self.values[point].detach(), gradient)}

    def sums(self, take: Take, *, again: bool = False, without: Sequence[Point] = ()) -> dict[Point, Array]:
        """What `take` makes of the gradients, one after the other; with `again` more can be taken."""
        found: dict[Point, Array] = {}

        def look(gradient: Tensor, point: Point) -> None:
            found.update(take(point, gradient))

        # What nothing that moves leads to (words before a question meets the picture) has no gradient at all.
        gone = [value for value in (self.values[point] for point in without) if value.requires_grad]
        held = [value.register_hook(torch.zeros_like) for value in gone]
        held += [self.values[point].register_hook(partial(look, point=point)) for point in self.points]
        try:
            torch.autograd.grad(self.logits, self._ends, self._first, retain_graph=again, allow_unused=True)
        finally:
            for handle in held:
                handle.remove()
        return found


@contextmanager
def frozen(network: Network) -> Iterator[None]:
    """Nothing is kept for gradients of weights, nor anything before the first edit that asks for its own."""
    weights = [weight for weight in network.hf.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _ends(network: Network, points: Sequence[Point]) -> list[Site]:
    """How far back gradients go: to where the first block of each tower that is asked about begins, and to
    what comes into it from elsewhere. What a layer reads of another tower may depend on nothing of these (its
    keys and values do not, nor do its heads while their attention is held), so that is an end itself."""
    first: dict[str, int] = {}
    for point in points:
        first[point.tower] = min(point.layer, first.get(point.tower, point.layer))
    added = [point for point in points if point.kind == "deepstack"]
    return [
        *(Site(tower, layer, "resid_pre") for tower, layer in first.items()),
        *(Site(*point[:3], position="image") for point in added),
        *(Site(*point, tuple(range(network.units(point) or 0))) for point in points if point.kind == "cross"),
    ]

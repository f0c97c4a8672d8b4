"""What patches would do, estimated from gradients: all sites at once, from one backward pass.

`atp`, attribution patching (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745): a site's score is
Σ (x_source − x_base) · ∂m/∂x over its positions and units, at the base run, the one that is patched. It is
what `engine.patch` tends to where the step is small, and no more than that.

Gradients pass one layer at a time: each is reduced to scores when it is there, and let go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vlmscope.errors import SiteError, VlmscopeError, shown
from vlmscope.models.inputs import Edit, Inputs, Pair
from vlmscope.patching.scores import Baselines, Metric, Score, score, unpatched
from vlmscope.runs.forward import forward
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site, Sites

Method = Literal["atp"]
METHODS = get_args(Method)

Array = NDArray[np.float64]
Deltas = Callable[[Point], Tensor]
"""From a point to what a patch of all of it would add: source less base."""


class Estimated(NamedTuple):
    """The scores of both runs, and what each patch is estimated to change of the metric, a number a site."""

    clean: Score
    corrupt: Score
    scores: Array


def estimate(
    network: Network,
    pair: Pair,
    sites: Sites,
    direction: str = "denoise",
    *,
    method: Method = "atp",
    metric: str | Metric = "ld",
) -> Estimated:
    """How much each patch of `engine.patch` would change the metric of the run that is patched.

    Raises `VlmscopeError` for a metric without a gradient there.
    """
    placed, count = network.placed(sites, pair.clean), len(pair.answers)
    index = Index(network, placed)
    runs: list[tuple[Inputs, Sequence[Edit]]] = [(pair.clean, ()), (pair.corrupt, pair.edits)]
    base, source = runs if direction == "noise" else runs[::-1]
    there = forward(network, *source, index.points, count)

    def both(own: Tensor) -> tuple[Tensor, Tensor]:
        return (own, there.logits) if direction == "noise" else (there.logits, own)

    def value(own: Tensor) -> Tensor:
        base = Baselines(*both(own.detach()), pair.answers, pair.foil)
        return score(own[None], base, metric).value[0]

    run = Backward(network, index, *base, value, count)
    found = index.scores(run.sums(lambda point: there.values[point] - run.values[point].detach()))
    _, clean, corrupt, _ = unpatched(*both(run.logits.detach()), pair, metric)
    return Estimated(clean, corrupt, found)


def check_place(site: Site) -> None:
    """Raises `SiteError` for what a gradient says nothing about."""
    if site.source:
        raise SiteError(
            f"bad site {shown(site)}: an edge of attention is no activation; knock it out, or take the "
            "method direct"
        )
    if site.window > 1 or site.also:
        raise SiteError(
            f"bad site {shown(site)}: patched together, a later layer undoes what an earlier one does to it, "
            "so their gradients do not add up; name them one by one"
        )


class Index:
    """Where each site's number is among sums over positions, `(places, units)`, of each point."""

    def __init__(self, network: Network, sites: Sequence[Site]) -> None:
        self.network, self.many = network, len(sites)
        self.places: dict[Point, dict[tuple[int, ...], int]] = defaultdict(dict)
        self._cells: dict[Point, list[tuple[int, int, int]]] = defaultdict(list)
        for number, site in enumerate(sites):
            check_place(site)
            places = self.places[site.point]
            place = places.setdefault(site.positions, len(places))
            units = site.units or range(network.units(site.point) or 1)
            self._cells[site.point] += [(number, place, unit) for unit in units]
        self._arrays = {point: np.array(cells).T for point, cells in self._cells.items()}

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
        return sums.double().cpu().numpy()

    def scores(self, sums: Mapping[Point, Array]) -> Array:
        """A number a site: the sum over its units. What no gradient reaches counts nothing."""
        found = np.zeros(self.many)
        for point, (numbers, places, units) in self._arrays.items():
            if point in sums:
                np.add.at(found, numbers, sums[point][places, units])
        return found


class Backward:
    """A run of which gradients are taken, once or several times.

    `value` makes the metric of the logits at the last `count` positions.
    """

    def __init__(
        self,
        network: Network,
        index: Index,
        inputs: Inputs,
        edits: Sequence[Edit],
        value: Callable[[Tensor], Tensor],
        count: int,
    ) -> None:
        self.index = index
        ends = _ends(index.points)
        run = forward(network, inputs, edits, {*index.points, *ends}, count, grad=True)
        self.values = run.values
        self._ends = [run.values[point] for point in ends]
        metric = value(run.logits)
        (first,) = torch.autograd.grad(metric, run.logits) if metric.requires_grad else (None,)
        if first is None or not first.any():
            raise VlmscopeError(
                "the metric has no gradient at the run that is patched (it is constant around it); take ld, "
                "logprob or p, or another direction"
            )
        self.logits, self._first = run.logits, first

    def sums(self, deltas: Deltas, again: bool = False) -> dict[Point, Array]:
        """Σ delta · gradient over the places of each point; with `again` more can be taken."""
        found: dict[Point, Array] = {}
        held = []
        for point in self.index.points:
            take = partial(self._take, found, point, deltas)
            held.append(self.values[point].register_hook(take))
        try:
            torch.autograd.grad(self.logits, self._ends, self._first, retain_graph=again, allow_unused=True)
        finally:
            for handle in held:
                handle.remove()
        return found

    def _take(self, found: dict[Point, Array], point: Point, deltas: Deltas, gradient: Tensor) -> None:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        delta = deltas(point).to(gradient.device, wide)
        product = torch.where(delta == 0, 0.0, delta * gradient.to(wide))
        found[point] = self.index.reduce(point, product)


def _ends(points: Sequence[Point]) -> list[Point]:
    """How far back gradients go: to where the first block of each tower that is asked about begins, and to
    what comes into it from elsewhere."""
    first: dict[str, int] = {}
    for point in points:
        first[point.tower] = min(point.layer, first.get(point.tower, point.layer))
    added = [point for point in points if point.kind == "deepstack"]
    return [*(Point(tower, layer, "resid_pre") for tower, layer in first.items()), *added]

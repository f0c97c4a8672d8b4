"""Where what is written comes from: another place, or instead of the other run nothing, a mean over a set,
another example's run.

Positions of two examples correspond by their slots (`layout.slots`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from vlmscope.errors import ExampleError, SiteError, shown
from vlmscope.layout import slots
from vlmscope.models.inputs import Inputs
from vlmscope.runs.forward import forward, read
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site

Source = Literal["clean", "zero", "mean", "resample"]
"""`clean`: the other run of the pair. The others ablate: zeros, the mean over the examples' clean runs at
the same slot, or the clean run of another example."""


def crossed(
    network: Network, sites: Sequence[Site], sources: Sequence[Site], inputs: Inputs
) -> list[tuple[Site, Site]]:
    """Every source with every site, as placed in one run: back-patching, and cross-site patching in general.

    Where both are patterns of positions (`image*`) the first goes with the first and so on; where one source
    is a single patch it goes with all. Raises `SiteError` where numbers of positions, units or layers differ.

    >>> from vlmscope.checkpoint import load
    >>> from vlmscope.data import examples
    >>> model = load("toy-llava")
    >>> inputs = model.prepare(examples("states", limit=1)[0]).clean
    >>> first, second = (Site("decoder", layer, "resid", position="image") for layer in (0, 3))
    >>> [(str(site), str(source)) for site, source in crossed(model, [first], [second], inputs)]
    [('decoder.0.resid@image', 'decoder.3.resid@image')]
    """
    places = {site: network.places(site, inputs) for site in dict.fromkeys([*sites, *sources])}
    found: list[tuple[Site, Site]] = []
    for site in sites:
        for source in sources:
            there, here = places[site], places[source]
            if len(here) not in (1, len(there)):
                raise SiteError(
                    f"{shown(source)} names {len(here)} patches here and {shown(site)} {len(there)}; "
                    "expected as many, or one that goes into all"
                )
            found += zip(there, here * len(there) if len(here) == 1 else here, strict=True)
    for site, source in found:
        for part, origin in zip(site.parts, origins_of(site, source), strict=True):
            numbers = [(len(one.positions), len(one.units)) for one in (part, origin)]
            if numbers[0] != numbers[1]:
                named = [
                    f"{p} position{'s' * (p != 1)}" + f" of {u} unit{'s' * (u != 1)}" * bool(u)
                    for p, u in numbers
                ]
                raise SiteError(
                    f"{shown(origin)} has {named[1]}, {shown(part)} has {named[0]}; expected as many in both"
                )
    return found


def origins_of(site: Site, source: Site) -> tuple[Site, ...]:
    """Where each part of a patch has its value from; one source goes into all layers of a window."""
    parts, found = site.parts, source.parts
    if len(found) not in (1, len(parts)):
        raise SiteError(
            f"{shown(source)} has {len(found)} parts here and {shown(site)} {len(parts)}; expected as "
            "many, or one that goes into all"
        )
    return found * len(parts) if len(found) == 1 else found


def check_widths(network: Network, pairs: Iterable[tuple[Site, Site]], inputs: Inputs) -> None:
    """Raises `SiteError` for a place whose values have another width than those that go there."""
    each = {
        (part.point, origin.point): (part, origin)
        for site, source in pairs
        for part, origin in zip(site.parts, origins_of(site, source), strict=True)
    }
    values = forward(network, inputs, keep={point for both in each for point in both}).values
    for part, origin in each.values():
        here, there = (read(network, values[one.point], one).shape[1] for one in (part, origin))
        if here != there:
            raise SiteError(
                f"what stands at {shown(origin)} is {there} wide, at {shown(part)} {here}; expected as wide: "
                "name a source of the same kind or tower"
            )


def zeros(network: Network, inputs: Inputs, points: Collection[Point]) -> dict[Point, Tensor]:
    """Zeros in the shape of what a run gives."""
    values = forward(network, inputs, keep=points).values
    return {point: torch.zeros_like(value) for point, value in values.items()}


class Means:
    """The mean activation at each point and slot, over the clean runs of some examples.

    >>> from vlmscope.checkpoint import load
    >>> from vlmscope.data import examples
    >>> model = load("toy-llava")
    >>> inputs = [model.prepare(example).clean for example in examples("states", limit=2)]
    >>> point = Point("decoder", 1, "mlp")
    >>> means = Means(model, [point])
    >>> for one in inputs:
    ...     means.add(one)
    >>> means.values(inputs[0])[point].shape == (1, len(inputs[0].layout["decoder"].tokens), 96)
    True
    """

    def __init__(self, network: Network, points: Collection[Point]) -> None:
        self.network, self.points = network, list(points)
        self.sums: dict[Point, dict[str, tuple[Tensor, int]]] = {point: {} for point in points}

    def add(self, inputs: Inputs) -> None:
        """Count one run in."""
        for point, value in forward(self.network, inputs, keep=self.points).values.items():
            sums = self.sums[point]
            for slot, row in zip(slots(inputs.layout[point.tower]), value[0].double().cpu(), strict=True):
                total, count = sums.get(slot, (torch.zeros_like(row), 0))
                sums[slot] = total + row, count + 1

    def values(self, inputs: Inputs) -> dict[Point, Tensor]:
        """The means where a run's tokens stand; raises `ExampleError` for a slot that no run had."""
        found = {}
        for point in self.points:
            names = slots(inputs.layout[point.tower])
            lacking = next((name for name in names if name not in self.sums[point]), None)
            if lacking is not None:
                raise ExampleError(f"no example gives a mean at '{lacking}' of the {point.tower} tower")
            rows = [total / count for total, count in (self.sums[point][name] for name in names)]
            found[point] = torch.stack(rows)[None].to(self.network.device, self.network.dtype)
        return found


def resampled(
    network: Network, inputs: Inputs, others: Iterable[Inputs], points: Collection[Point]
) -> dict[Point, Tensor]:
    """The activations of the first of some other runs that has a token wherever this one has.

    Raises `ExampleError` if none has.
    """
    names = {tower: slots(layout) for tower, layout in inputs.layout.items()}
    for other in others:
        there = {tower: slots(layout) for tower, layout in other.layout.items()}
        # in all towers, so that whose activations they are does not depend on the points
        if all(set(names[tower]) <= set(there.get(tower, ())) for tower in names):
            values = forward(network, other, keep=points).values
            at = {tower: [there[tower].index(name) for name in names[tower]] for tower in names}
            return {point: value[:, at[point.tower]] for point, value in values.items()}
    raise ExampleError("no other example has a token at every slot of this one, so none can be resampled")

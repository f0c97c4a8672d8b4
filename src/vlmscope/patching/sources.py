"""What is written instead of the other run's activations: nothing, a mean over a set, another example's.

Positions of two examples correspond by their slots (`layout.slots`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from vlmscope.errors import ExampleError, VlmscopeError
from vlmscope.layout import slots
from vlmscope.models.inputs import Inputs
from vlmscope.runs.forward import forward
from vlmscope.runs.network import Network
from vlmscope.sites import Point

Source = Literal["clean", "zero", "mean", "resample"]
"""`clean`: the other run of the pair. The others ablate: zeros, the mean over the examples' clean runs at
the same slot, or the clean run of another example."""


def check_source(source: str) -> None:
    """Raises `VlmscopeError` for a source that there is not."""
    if source not in get_args(Source):
        raise VlmscopeError(f"unknown patch '{source}'; expected one of {', '.join(get_args(Source))}")


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

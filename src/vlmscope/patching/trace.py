"""The plain runs that patches stand on: what they left at places, and how every block was called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vlmscope.models.inputs import Change, Edit, Inputs
from vlmscope.runs.access import hook
from vlmscope.runs.forward import edited, editing, forward, keep_value
from vlmscope.runs.hooks import Hooks, hidden_of
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site


@dataclass(eq=False)
class Trace:
    """What one run left: logits, activations at points, each tower's output before edits of it, and how each
    block was called (and the final norm, where the model adds to what the last block gives)."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    values: dict[Point, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[tuple[str, int], tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def entrance(self, tower: str, layer: int) -> Tensor:
        """What a block got, before edits of it."""
        return hidden_of(*self.calls[tower, layer])


Images = WeakTensorKeyDictionary
"""The outputs of a vision tower by picture, for pairs that share one: it is encoded once."""


@torch.inference_mode()
def trace(
    network: Network,
    inputs: Inputs,
    edits: Sequence[Edit],
    points: Collection[Point],
    images: Images,
    positions: int,
) -> Trace:
    """One plain run. A picture that is known is not encoded again, unless its tower is looked into or edited
    (or has no `output` to go on from, as LLaVA's)."""
    first, family = next(iter(network.family.towers)), network.family
    changes = network.changes(inputs, edits)
    is_edited = any(_inside(change.site.point, first) for change in changes)
    whole = family.towers[first].output and network.flow(first, inputs) != "plain" and not is_edited
    pixels = inputs.tensors[family.pixels]
    known = None if any(_inside(p, first) for p in points) or not whole else images.get(pixels)
    found = Trace()
    with network.alone(), _recording(network, inputs, found):
        if known is None:
            found.logits, found.values = forward(network, inputs, edits, points, positions)
            if whole:
                images.setdefault(pixels, found.outputs[first])
            return found
        found.outputs[first] = known
        output = edited_output(network, known, first, changes)
        with editing(network, inputs, edits), Hooks() as hooks:
            for point in points:
                if point.tower == first:
                    found.values[point] = output
                else:
                    hook(hooks, network, point, inputs, partial(keep_value, found.values, point, False))
            found.logits = family.finish(network.hf, inputs, first, output, positions)[0]
    return found


def _inside(point: Point, tower: str) -> bool:
    return point.tower == tower and point.kind != "output"


@contextmanager
def _recording(network: Network, inputs: Inputs, found: Trace) -> Iterator[None]:
    """Record every block's call and every tower's output, before any edits of them."""
    with Hooks() as hooks:
        for tower, table in network.family.towers.items():
            blocks = list(network.blocks(tower))
            if table.deepstack:  # the model may add to what the last block gives, too
                blocks.append(network.module(network.family.norm or ""))
            for layer, block in enumerate(blocks):
                hooks.on_call(block, partial(_keep_call, found.calls, (tower, layer)))
            if table.output and tower in inputs.layout and network.flow(tower, inputs) != "plain":
                hooks.on_output(network.module(table.output), partial(_keep_output, found.outputs, tower))
        yield


def _keep_call(calls: dict[Any, Any], key: tuple[str, int], *call: Any) -> None:
    calls[key] = call


def _keep_output(outputs: dict[str, Tensor], tower: str, out: Any) -> None:
    outputs[tower] = out.last_hidden_state


def edited_output(network: Network, output: Tensor, tower: str, changes: Sequence[Change]) -> Tensor:
    """A tower's output with a run's own edits of it (its module is not called for rows)."""
    for change in changes:
        if change.site.tower == tower and change.site.kind == "output":
            output = edited(output, *change, units=None)
    return output


def given(
    network: Network, base: Mapping[Point, Tensor], sites: Sequence[Site], values: Sequence[Tensor]
) -> tuple[dict[Point, Tensor], list[tuple[Site, ...]]]:
    """What is written at each site, end to end by point, and where each site's value stands there."""
    found: dict[Point, list[Tensor]] = defaultdict(list)
    ends: dict[Point, int] = defaultdict(int)
    origins: list[tuple[Site, ...]] = []
    for site, value in zip(sites, values, strict=True):
        point, many = site.point, len(site.positions)
        alone = replace(site, positions=tuple(range(many)))
        there = base[point][:, list(site.positions)]
        found[point].append(edited(there, alone, "set", value, network.units(point)))
        origins.append((replace(site, positions=tuple(range(ends[point], ends[point] + many))),))
        ends[point] += many
    return {point: torch.cat(parts, 1) for point, parts in found.items()}, origins

"""Where a place is in a model: by a family's table, how a point is read and written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from vlmscope.errors import ModelError
from vlmscope.models.inputs import Inputs
from vlmscope.models.towers import Tower
from vlmscope.runs.hooks import Access, eager
from vlmscope.runs.network import Network
from vlmscope.runs.shapes import has
from vlmscope.runs.views import Between, Deepstack, Gain, Gaps, Paid, Third, View
from vlmscope.sites import Point

BLOCK = ("resid_pre", "resid")
INNER = ("q", "k", "v", "p")
"""Units that are within attention."""


def access(network: Network, point: Point, inputs: Inputs) -> Access:
    """How a point is read and written, for hooks."""
    table = network.family.towers[point.tower]
    flat = network.flow(point.tower, inputs) == "plain"
    place = f"{point.tower}.{point.layer}.{point.kind}"
    if point.kind == "output":
        view: View | None = Gaps.of(inputs.layout[point.tower])
        return Access(network.module(table.output or ""), False, flat, view)
    if point.kind == "deepstack":
        layout = inputs.layout[point.tower]
        view = Deepstack(place, point.layer, layout.image, len(layout.tokens))
        return Access(network.module(table.blocks.rpartition(".")[0]), True, flat, view)
    block = network.blocks(point.tower)[point.layer]
    if point.kind in BLOCK:
        return Access(block, point.kind == "resid_pre", flat)
    if point.kind == "resid_mid":
        return _between(network, point, table, block, inputs)
    if point.part in INNER:
        return _inner(network, point, table, block, flat)
    if point.part:
        return Access(block.get_submodule(getattr(table, point.kind) or ""), True, flat)
    module = block.get_submodule(_adds(table, block, point.kind))
    factor = table.factor[point.kind](block) if point.kind in table.factor else None
    return Access(module, False, flat, None if factor is None else Gain(place, block, factor))


def _adds(table: Tower, block: nn.Module, kind: str) -> str:
    """The path of the module that gives what a sublayer adds: its last, or the norm behind it."""
    if all(has(block, path) for path in table.behind.values()):
        return table.behind.get(kind) or getattr(table, kind) or ""
    return getattr(table, kind) or ""


def _between(network: Network, point: Point, table: Tower, block: nn.Module, inputs: Inputs) -> Access:
    """Between attention and MLP: what blocks that normalise the stream itself read there, or a sum."""
    if table.normed:
        path = next(path for path in table.middle if has(block, path))
        return Access(block.get_submodule(path), False, network.flow(point.tower, inputs) == "plain")
    kinds = [kind for kind in ("attn", "cross") if (path := getattr(table, kind)) and has(block, path)]
    *earlier, last = (access(network, point._replace(kind=kind), inputs) for kind in kinds)
    return replace(last, view=Between(block, earlier, last.view))


def _inner(network: Network, point: Point, table: Tower, block: nn.Module, flat: bool) -> Access:
    """A head's query, key, value or attention pattern."""
    path = table.attention.get(point.kind)
    module: Any = None if path is None else block.get_submodule(path)
    if module is not None and eager(module) is not None:
        return Access(module, inner=point.part)
    names = {"q": ("query", "q"), "k": ("key", "k"), "v": ("value", "v"), "p": ("dropout",)}[point.part]
    found = next((x for name in names if isinstance(x := getattr(module, name, None), nn.Module)), None)
    if found is not None:
        return Access(found, False, flat, Paid() if point.part == "p" else None)
    if isinstance(getattr(module, "qkv", None), nn.Module) and point.part != "p":
        return Access(module.qkv, False, flat, Third("qkv".index(point.part)))
    raise ModelError(
        f"{network.name}: the models of {network.family.name} do not show the {point.part} of their "
        f"{point.tower} {point.kind} heads; name the heads' outputs (h)"
    )

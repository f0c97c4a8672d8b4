"""How a place is read and written: by a family's table, which module handles it, and how it stands there.

Where nothing is changed the module's own tensor stays, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmscope.errors import ModelError, SiteError
from vlmscope.layout import Layout
from vlmscope.models.inputs import Inputs
from vlmscope.runs import edges
from vlmscope.runs.edges import Cuts, Edges
from vlmscope.runs.hooks import Function, Hooks, eager, hidden_of, inner, through
from vlmscope.runs.network import Network, has
from vlmscope.sites import Point, Site

INNER = ("q", "k", "v", "p")
"""Units that are within attention."""


def hook(hooks: Hooks, network: Network, point: Point, inputs: Inputs, function: Function) -> None:
    """From now on `function` gets the activation at a point, `(rows, pos, width)` (where a batch is laid end
    to end `(1, all positions, width)`), and gives a new one, or the same."""
    table = network.family.towers[point.tower]
    layout, flat = inputs.layout[point.tower], network.flow(point.tower, inputs) == "plain"
    place = f"{point.tower}.{point.layer}.{point.kind}"
    if point.kind == "output":
        if len(there := unpadded(layout)) < len(layout.tokens):
            function = partial(_padded, function, there, len(layout.tokens))
        hooks.on_hidden(network.module(table.output or ""), function, flat=flat)
        return
    if point.kind == "deepstack":
        add = partial(_deepstack, function, place, point.layer, layout)
        hooks.on_call(network.module(table.blocks.rpartition(".")[0]), add)
        return
    block = network.blocks(point.tower)[point.layer]
    if point.kind in ("resid_pre", "resid"):
        hooks.on_hidden(block, function, before=point.kind == "resid_pre", flat=flat)
    elif point.kind == "resid_mid" and table.normed:
        path = next(path for path in table.middle if has(block, path))
        hooks.on_hidden(block.get_submodule(path), function, flat=flat)
    elif point.kind == "resid_mid":
        _between(hooks, network, point, inputs, block, function)
    elif point.part in INNER:
        _within(hooks, network, point, block, function, flat)
    elif point.part:
        hooks.on_hidden(block.get_submodule(getattr(table, point.kind)), function, before=True, flat=flat)
    else:
        path = getattr(table, point.kind)
        if all(has(block, norm) for norm in table.behind.values()):
            path = table.behind.get(point.kind, path)
        factor = table.factor[point.kind](block) if point.kind in table.factor else None
        if factor is not None:
            call: dict[str, Any] = {}  # the factor may differ by position
            hooks.on_call(block, lambda args, kwargs: call.update(kwargs))
            function = partial(_multiplied, function, place, factor, call)
        hooks.on_hidden(block.get_submodule(path), function, flat=flat)


def _multiplied(
    function: Function,
    place: str,
    factor: Callable[[Mapping[str, Any]], Any],
    call: Mapping[str, Any],
    x: Tensor,
) -> Tensor:
    """A sublayer's output times what its block multiplies it by before it is added."""
    times = factor(call)
    value = function(x * times)  # which may write into what it gets
    same = value == x * times
    lost = ~same & ~value.isnan() & (times == 0)
    if lost.any():
        at = ", ".join(map(str, lost.any(-1).any(0).nonzero()[:5, 0].tolist()))
        raise SiteError(
            f"{place}: the model multiplies this by 0 before it adds it (position {at}), so nothing "
            "but 0 can be written there; name other positions or layers"
        )
    new = value / (times + (times == 0))
    return torch.where(same, through(x, new), new)


def _between(
    hooks: Hooks, network: Network, point: Point, inputs: Inputs, block: nn.Module, function: Function
) -> None:
    """Between attention and MLP: the block's input and what was added to it, written through the last of
    these."""
    added: list[Tensor] = []

    def enter(args: Any, kwargs: Mapping[str, Any]) -> None:
        added[:] = [hidden_of(args, kwargs)]

    def add(x: Tensor) -> Tensor:
        added.append(x)
        return x

    def change(x: Tensor) -> Tensor:
        before: Any = sum(part.reshape(x.shape) for part in added)
        value = function(before + x)
        new = value - before
        return torch.where(value == before + x, through(x, new), new)

    hooks.on_call(block, enter)
    having = network.shapes[point.tower].having
    *earlier, last = (kind for kind in ("attn", "cross") if point.layer in having(kind))
    for kind in earlier:
        hook(hooks, network, point._replace(kind=kind), inputs, add)
    hook(hooks, network, point._replace(kind=last), inputs, change)


def unpadded(layout: Layout) -> list[int]:
    """The positions that are no padding: what fills up the tiles of Mllama is cut away behind the tower."""
    return [n for n, token in enumerate(layout.tokens) if not token.endswith("[PAD]")]


def _padded(function: Function, there: Sequence[int], size: int, x: Tensor) -> Tensor:
    """What stands at some positions alone, with zeros at all others."""
    value = x.new_zeros(x.shape[0], size, x.shape[-1])
    value[:, there] = x
    return function(value)[:, there]


def _deepstack(function: Function, place: str, layer: int, layout: Layout, args: Any, kwargs: Any) -> Any:
    """What a model adds to the image's tokens behind a block: the language model is given all that is added,
    in the layers' order."""
    there = list(layout.image)

    def change(x: Tensor) -> Tensor:
        value = function(x)
        elsewhere = value.clone()
        elsewhere[:, there] = 0
        if (elsewhere.nan_to_num() != 0).any():
            raise SiteError(
                f"{place}: the model adds it to the image's tokens alone, so nothing can be written "
                "elsewhere; name the position image"
            )
        return value

    name = "deepstack_visual_embeds"
    if kwargs.get(name) is None:  # no picture, or a step of a generation that sees only the last word
        return None
    added = list(kwargs[name])
    added[layer] = _padded(change, there, len(layout.tokens), added[layer][None])[0]
    return args, {**kwargs, name: added}


def _within(
    hooks: Hooks, network: Network, point: Point, block: nn.Module, function: Function, flat: bool
) -> None:
    """A head's query, key, value or attention pattern: by transformers' attention interface, or where BLIP's
    own modules have it."""
    path, part = network.family.towers[point.tower].attention.get(point.kind), point.part
    module: Any = None if path is None else block.get_submodule(path)
    if module is not None and eager(module) is not None:
        hooks.enter_context(inner(module, part, function))
        return
    names = {"q": ("query", "q"), "k": ("key", "k"), "v": ("value", "v"), "p": ("dropout",)}[part]
    found = next((x for name in names if isinstance(x := getattr(module, name, None), nn.Module)), None)
    if found is not None:
        hooks.on_hidden(found, partial(_paid, function) if part == "p" else function, flat=flat)
    elif isinstance(getattr(module, "qkv", None), nn.Module) and part != "p":
        hooks.on_hidden(module.qkv, partial(_third, function, "qkv".index(part)), flat=flat)
    else:
        raise ModelError(
            f"{network.name}: the models of {network.family.name} do not show the {part} of their "
            f"{point.tower} {point.kind} heads; name the heads' outputs (h)"
        )


def cut(hooks: Hooks, network: Network, tower: str, layer: int, kind: str, cuts: Cuts) -> None:
    """From now on the edges that `cuts` names are cut in each call of a block's attention; raises
    `ModelError` where a family does not show what it pays."""
    path = network.family.towers[tower].attention.get(kind)
    module: Any = None if path is None else network.blocks(tower)[layer].get_submodule(path)
    if module is not None and eager(module) is not None:
        hooks.enter_context(inner(module, "cut", cuts))
    elif isinstance(dropout := getattr(module, "dropout", None), nn.Module):
        hooks.on_output(dropout, lambda paid: edges.cut(paid, cuts))
    else:
        raise ModelError(
            f"{network.name}: the models of {network.family.name} do not show what the {kind} heads of their "
            f"{tower} tower pay attention to, so no edge can be cut there; scale the heads (h) instead"
        )


def edges_of(network: Network, inputs: Inputs, site: Site, op: str, shift: int = 0) -> Edges:
    """The edges of a site (one layer) in the attention that it is in; the targets stand `shift` further."""
    sources: Sequence[int] = site.sources
    if site.kind == "cross":  # what fills up tiles is not attended to
        there = {position: n for n, position in enumerate(unpadded(inputs.layout[site.reads]))}
        sources = [there[n] for n in sources if n in there]
    return Edges([n + shift for n in site.positions], sources, site.units, op)


def _third(function: Function, number: int, x: Tensor) -> Tensor:
    """Queries, keys or values, where one module gives all three side by side."""
    parts = list(x.chunk(3, -1))
    parts[number] = function(parts[number])
    return torch.cat(parts, -1)


def _paid(function: Function, x: Tensor) -> Tensor:
    """Attention patterns `(rows, heads, pos, keys)` as `(rows, pos, heads x keys)`."""
    return function(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)

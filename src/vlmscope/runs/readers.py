"""What reads the residual stream of a tower, and how a single reader is made to read something else.

A reader is the query, key or value of one head, an MLP, or the end of the tower. All of a sublayer read the
stream through the same norm, before which nothing is changed for the others here: the input of one head's
query becomes that head's rows of the projection, of the norm of other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from vlmscope.errors import ModelError
from vlmscope.models.inputs import Inputs
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import Network, has
from vlmscope.sites import Point

NAMES = {"q": ("q_proj", "query", "q"), "k": ("k_proj", "key", "k"), "v": ("v_proj", "value", "v")}
"""What families call the projections of attention."""
FUSED = ("qkv", "qkv_proj")
"""What they call one that gives all three side by side."""


class Anew(NamedTuple):
    """What one reader reads: its number in the sublayer, where, `(rows, pos)` of what is computed, and what
    stands there for it instead of the stream."""

    unit: int
    where: Any
    stream: Float[Tensor, "*rows pos width"]


Change = Callable[[Float[Tensor, "rows pos width"]], Iterable[Anew]]
"""From what stands before the norm to what some readers of it read instead."""


class Projection(NamedTuple):
    """The rows of a linear module that give one part of attention, for so many heads."""

    module: Any
    start: int
    width: int
    heads: int

    def rows(self, unit: int) -> slice:
        return slice(self.start + unit * self.width, self.start + (unit + 1) * self.width)

    @property
    def whole(self) -> slice:
        return slice(self.start, self.start + self.heads * self.width)


class Reads(NamedTuple):
    """Where some readers read: a sublayer (`attn`, `cross`, `mlp`) of a tower, or its `end`; of attention the
    part (q, k, v) of all its heads."""

    tower: str
    layer: int
    kind: str
    part: str = ""

    @property
    def is_across(self) -> bool:
        """Whether this is read of another tower, as it is: keys and values of cross-attention."""
        return self.kind == "cross" and self.part in ("k", "v")


def norm_of(network: Network, reads: Reads) -> nn.Module | None:
    """The norm that a sublayer reads the stream through; None at the end of a tower that has none there.

    Raises `ModelError` where the family's table does not say.
    """
    if reads.kind == "end":
        return network.module(network.family.norm or "") if reads.tower == network.speaker else None
    block = network.blocks(reads.tower)[reads.layer]
    paths = network.family.towers[reads.tower].norms.get(reads.kind, ())
    path = next((path for path in paths if has(block, path)), None)
    if path is None:
        raise ModelError(
            f"{network.name}: the table of {network.family.name} does not say through which norm the "
            f"{reads.kind} of its {reads.tower} tower reads, so there are no edges; take its heads and MLPs "
            "as nodes (vlmscope sweep, attribute)"
        )
    return block.get_submodule(path)


def projection(network: Network, reads: Reads) -> Projection:
    """The linear module behind the norm, and which of its rows."""
    table, block = network.family.towers[reads.tower], network.blocks(reads.tower)[reads.layer]
    path = table.attention.get(reads.kind) or getattr(table, reads.kind).rpartition(".")[0]
    attention = block.get_submodule(path)
    many = {part: network.units(Point(reads.tower, reads.layer, reads.kind, part)) or 1 for part in "qkv"}
    for name in NAMES[reads.part]:
        module: Any = getattr(attention, name, None)
        if hasattr(module, "weight"):
            return Projection(module, 0, module.out_features // many[reads.part], many[reads.part])
    for name in FUSED:
        module = getattr(attention, name, None)
        if hasattr(module, "weight"):
            width = module.out_features // sum(many.values())
            before = {"q": 0, "k": many["q"], "v": many["q"] + many["k"]}[reads.part]
            return Projection(module, before * width, width, many[reads.part])
    raise ModelError(
        f"{network.name}: the {reads.kind} of the {reads.tower} tower of {network.family.name} has no one "
        f"linear module for its {reads.part}, so there are no edges into it; take its heads as nodes"
    )


def watch(hooks: Hooks, network: Network, inputs: Inputs, reads: Reads, function: Any) -> None:
    """From now on `function` gets what stands before the norm of a sublayer (at a tower's end without one,
    the last block's output), or what keys and values of cross-attention read: `(rows, pos, width)`; it gives
    a tensor in its place, or the same."""
    flat = network.flow(reads.tower, inputs) == "plain"
    if reads.is_across:
        hooks.on_hidden(projection(network, reads).module, function, before=True)
        return
    norm = norm_of(network, reads)
    module = network.blocks(reads.tower)[-1] if norm is None else norm
    hooks.on_hidden(module, function, before=norm is not None, flat=flat)


def read_anew(hooks: Hooks, network: Network, inputs: Inputs, reads: Reads, change: Change) -> None:
    """From now on the readers that `change` names read what it gives; all others read the stream."""
    if not reads.part:
        watch(hooks, network, inputs, reads, partial(_replaced, change))
        return
    there, found = list[Tensor](), projection(network, reads)
    norm = None if reads.is_across else norm_of(network, reads)
    weight, bias = network.matrix(found.module), getattr(found.module, "bias", None)

    def enter(x: Tensor) -> Tensor:
        there[:] = [x]
        return x

    def leave(out: Tensor) -> Tensor:
        some = list(change(there.pop()))
        out = out.clone() if some else out
        for unit, where, stream in some:
            rows = found.rows(unit)
            # not by a call of the module, which would be seen by hooks
            normed = stream if norm is None else norm.forward(stream)
            own = None if bias is None else bias[rows]
            out[where][..., rows] = linear(normed, weight[rows].to(normed), own)
        return out

    watch(hooks, network, inputs, reads, enter)
    flat = not reads.is_across and network.flow(reads.tower, inputs) == "plain"
    hooks.on_hidden(found.module, leave, flat=flat)


def _replaced(change: Change, x: Tensor) -> Tensor:
    some = list(change(x))
    x = x.clone() if some else x
    for _, where, stream in some:
        x[where] = stream
    return x

"""What stands at a place, where that is not what a module handles: read out of its tensor and written back.

Where nothing is changed the module's own tensor stays, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmscope.errors import SiteError
from vlmscope.layout import Layout

if TYPE_CHECKING:
    from vlmscope.runs.hooks import Access, Hooks

Function = Callable[[Tensor], Tensor]
"""From hidden states `(rows, pos, width)` to what takes their place."""


class View:
    """Reads what stands at a place out of a module's tensor, and writes it back."""

    def watch(self, hooks: Hooks) -> None:
        """Hook whatever else it needs to know."""

    def read(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        """The module's tensor with a new value at the place; where that is the old one, bit for bit as it
        was."""
        raise NotImplementedError


class Gain(View):
    """A sublayer's output times what its block multiplies it by before it is added."""

    def __init__(self, place: str, block: nn.Module, factor: Callable[[Mapping[str, Any]], Any]) -> None:
        self.place, self.block, self.factor = place, block, factor
        self.call: Mapping[str, Any] = {}

    def watch(self, hooks: Hooks) -> None:
        """Remember what the block is called with: the factor may differ by position."""
        hooks.on_call(self.block, self._called)

    def _called(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.call = kwargs

    def read(self, x: Tensor) -> Tensor:
        return x * self.factor(self.call)

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        factor = self.factor(self.call)
        same = value == x * factor
        lost = ~same & ~value.isnan() & (factor == 0)
        if lost.any():
            at = ", ".join(map(str, lost.any(-1).any(0).nonzero()[:5, 0].tolist()))
            raise SiteError(
                f"{self.place}: the model multiplies this by 0 before it adds it (position {at}), so nothing "
                "but 0 can be written there; name other positions or layers"
            )
        return torch.where(same, x, value / factor)


class Between(View):
    """The residual stream between two sublayers: the block's input, and what was added to it before.

    The module is that of the last sublayer before the place; `earlier` are those of the others, in order.
    """

    def __init__(self, block: nn.Module, earlier: Sequence[Access], last: View | None) -> None:
        self.block, self.earlier, self.last = block, earlier, last
        self.added: list[Tensor] = []

    def watch(self, hooks: Hooks) -> None:
        if self.last is not None:
            self.last.watch(hooks)
        hooks.on_call(self.block, self._called)
        for access in self.earlier:
            hooks.at(access, self._add)

    def _called(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.added = [args[0] if args else kwargs["hidden_states"]]

    def _add(self, x: Tensor) -> Tensor:
        self.added.append(x)
        return x

    def _before(self, x: Tensor) -> Tensor:
        first, *more = self.added
        total = first.reshape(x.shape)
        for part in more:
            total = total + part.reshape(x.shape)
        return total

    def read(self, x: Tensor) -> Tensor:
        return self._before(x) + (x if self.last is None else self.last.read(x))

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        before = self._before(x)
        sublayer = x if self.last is None else self.last.read(x)
        new = torch.where(value == before + sublayer, sublayer, value - before)
        return new if self.last is None else self.last.write(x, new)


class Gaps(View):
    """What leaves a tower, with room (zeros) for the padding that is cut away before."""

    def __init__(self, there: Sequence[int], size: int) -> None:
        self.there, self.size = list(there), size

    @classmethod
    def of(cls, layout: Layout) -> Gaps | None:
        there = unpadded(layout)
        return cls(there, len(layout.tokens)) if len(there) < len(layout.tokens) else None

    def read(self, x: Tensor) -> Tensor:
        value = x.new_zeros(x.shape[0], self.size, x.shape[-1])
        value[:, self.there] = x
        return value

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        return value[:, self.there]


def unpadded(layout: Layout) -> list[int]:
    """The positions that are no padding: what fills up the tiles of Mllama is cut away behind the tower."""
    return [n for n, token in enumerate(layout.tokens) if not token.endswith("[PAD]")]


class Deepstack(Gaps):
    """What a model adds to the image's tokens behind a block, with zeros at all others."""

    def __init__(self, place: str, layer: int, image: Sequence[int], size: int) -> None:
        super().__init__(image, size)
        self.place, self.layer = place, layer

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        elsewhere = value.clone()
        elsewhere[:, self.there] = 0
        if (elsewhere.nan_to_num() != 0).any():
            raise SiteError(
                f"{self.place}: the model adds it to the image's tokens alone, so nothing can be written "
                "elsewhere; name the position image"
            )
        return super().write(x, value)

    def given(self, kwargs: Mapping[str, Any], change: Function) -> dict[str, Any]:
        """The arguments of the language model, of which one is all that is added, in the layers' order."""
        name = "deepstack_visual_embeds"
        added = kwargs.get(name)
        if added is None:  # no picture, or a step of a generation that sees only the last word
            return dict(kwargs)
        there = list(added)
        there[self.layer] = change(there[self.layer])
        return {**kwargs, name: there}


class Third(View):
    """Queries, keys or values, where one module gives all three side by side."""

    def __init__(self, number: int) -> None:
        self.number = number

    def read(self, x: Tensor) -> Tensor:
        return x.chunk(3, -1)[self.number]

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        parts = list(x.chunk(3, -1))
        parts[self.number] = value
        return torch.cat(parts, -1)


class Paid(View):
    """Attention patterns `(rows, heads, pos, keys)` as `(rows, pos, heads x keys)`."""

    def read(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def write(self, x: Tensor, value: Tensor) -> Tensor:
        return value.unflatten(2, (x.shape[1], -1)).transpose(1, 2)

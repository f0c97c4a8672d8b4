"""Runs from the first layer on that changes: all that stands before it is the same for any change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.models.inputs import Inputs
from vlmscope.runs.forward import forward
from vlmscope.runs.hooks import Hooks, hidden_of
from vlmscope.runs.model import Model

Deltas = dict[int, tuple[Tensor, Tensor]]
"""By layer, neurons and what is added to the column of each: what a solver changes in place."""
Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
"""By layer, what a block is called with beside the hidden states."""


ROWS = 16
"""How many runs are rows of one batch, at most."""
ROOM = 2**31
"""Of how many bytes of plain runs is kept how they go on; others are whole forwards each time."""


@dataclass(eq=False)
class Tails:
    """Runs of a model from the block `first` on, which each run enters as its plain run did.

    Those whose blocks are called in the same way (as many positions, one mask, nothing else to read) are rows
    of one batch. Where blocks cannot be called by themselves, a run is a whole forward (see `Family`).
    """

    model: Model
    first: int
    room: int = ROOM
    _entrances: dict[Inputs, Tensor] = field(default_factory=dict)
    _calls: dict[Inputs, Calls] = field(default_factory=dict)
    _ways: list[Calls] = field(default_factory=list)

    def logits(
        self, runs: Sequence[tuple[Inputs, int]], deltas: Deltas | None = None
    ) -> list[Float[Tensor, "positions vocabulary"]]:
        """The logits of the last so many positions of each run, with `deltas` added to the columns of neurons
        from the first block on, and whatever else is changed there at present."""
        found, batches = dict[int, Tensor](), list[tuple[Calls, list[int]]]()
        for number, (inputs, _) in enumerate(runs):
            calls = self._called(inputs)
            some = next((numbers for way, numbers in batches if way is calls), None)
            if some is None:
                batches.append((calls, [number]))
            else:
                some.append(number)
        with self.model.alone(), adding(self.model, deltas or {}):
            for _, numbers in batches:
                for start in range(0, len(numbers), ROWS):
                    some = numbers[start : start + ROWS]
                    rows = self._rows([runs[n][0] for n in some], max(runs[n][1] for n in some))
                    found |= {n: row[-runs[n][1] :].float() for n, row in zip(some, rows, strict=True)}
        return [found[n] for n in range(len(runs))]

    def _rows(self, runs: Sequence[Inputs], count: int) -> Tensor:
        """The logits of the last positions of runs whose blocks are called in the same way."""
        model, tower, calls = self.model, self.model.speaker, self._calls[runs[0]]
        if not calls:
            whole = forward(model, runs[0], positions=count, grad=torch.is_grad_enabled())
            return whole.logits[None]
        hidden = torch.cat([self._entrances[inputs] for inputs in runs])
        for layer, (args, kwargs) in calls.items():
            out = model.blocks(tower)[layer](hidden, *args, **kwargs)
            hidden = out if isinstance(out, Tensor) else out[0]
        return model.family.finish(
            model.hf, runs[0], tower, model.family.leave(model.hf, tower, hidden), count
        )

    def _called(self, inputs: Inputs) -> Calls:
        """How the blocks of a run are called from the first on; nothing where they cannot be, or where there
        is no room."""
        model, tower, calls = self.model, self.model.speaker, Calls()
        if inputs in self._calls:
            return self._calls[inputs]
        is_apart = model.flow(tower, inputs) == "plain" or model.family.towers[tower].deepstack is not None
        if not is_apart and self.room > 0:
            with model.alone(), Hooks() as hooks:
                for layer in range(self.first, model.shapes[tower].layers):
                    keep = partial(self._keep, inputs, calls, layer)
                    hooks.on_call(model.blocks(tower)[layer], keep)
                forward(model, inputs, grad=True)  # what is kept takes part in graphs
            known = next((way for way in self._ways if _same(way, calls)), None)
            new = [*_tensors(self._entrances.get(inputs)), *_tensors(() if known else calls)]
            self.room -= sum(x.nbytes for x in {*new})
            self._ways += [calls] if calls and not known else []
            calls = known or calls
        self._calls[inputs] = calls
        return calls

    def _keep(self, inputs: Inputs, calls: Calls, layer: int, args: Any, kwargs: dict[str, Any]) -> None:
        if not calls:
            self._entrances[inputs] = hidden_of(args, kwargs).detach()
        more = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls[layer] = (args[1:], {**more, **dict.fromkeys({"past_key_values"} & more.keys())})


@contextmanager
def adding(model: Model, deltas: Deltas) -> Iterator[None]:
    """Within this context something is added to the columns of neurons, as parts of a graph."""
    active: dict[int, Tensor] = {}

    def enter(layer: int, at: Tensor, x: Tensor) -> Tensor:
        active[layer] = x[..., at.to(x.device)]
        return x

    def leave(layer: int, delta: Tensor, x: Tensor) -> Tensor:
        return x + active[layer] @ delta.T.to(x)

    with Hooks() as hooks:
        for layer, (at, delta) in deltas.items():
            hooks.on_hidden(model.down(layer), partial(enter, layer, at), before=True)
            hooks.on_hidden(model.down(layer), partial(leave, layer, delta))
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    """All that are in an argument of a block."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are the same, with all that is in them."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)

"""Other coefficients in the backward pass: relevance instead of gradients (RelP, arXiv 2508.21258).

The rules, which leave every value as it is:

- a norm is linear: what it divides by is held;
- attention mixes values: what is paid is held;
- f(x) is x times f(x)/x, and that factor is held;
- of a product of two, a gate and what it lets through, each gets half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from vlmscope.errors import ModelError
from vlmscope.models.inputs import Inputs
from vlmscope.runs.access import hook
from vlmscope.runs.hooks import Hooks, through
from vlmscope.runs.network import Network
from vlmscope.runs.norms import scaling
from vlmscope.sites import Point

ACTIVATIONS = tuple({each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()})
"""The classes of what transformers puts between two linear modules."""


@contextmanager
def relevance(network: Network, inputs: Inputs, towers: Sequence[str]) -> Iterator[None]:
    """Within this context the gradients of runs of these inputs follow the rules, in these towers.

    Raises `ModelError` for a tower that does not show what its heads pay attention to.
    """
    with network.alone(), Hooks() as hooks:
        last: list[Tensor] = []
        for module in network.hf.modules():
            if isinstance(module, ACTIVATIONS):
                _watch(hooks, module, partial(_factor, last))
            elif type(module).__name__.endswith("Norm"):
                _watch(hooks, module, partial(_linear, module))
        for tower in towers:
            shape = network.shapes[tower]
            for n in shape.having("mlp"):
                hook(hooks, network, Point(tower, n, "mlp", "n"), inputs, partial(_halved, last))
            for kind in shape.heads:
                for n in shape.having(kind):
                    _hold(hooks, network, Point(tower, n, kind), inputs)
        yield


def _hold(hooks: Hooks, network: Network, point: Point, inputs: Inputs) -> None:
    for part in "qk":
        try:
            hook(hooks, network, point._replace(part=part), inputs, torch.detach)
        except ModelError as error:
            raise ModelError(
                f"{network.name}: the models of {network.family.name} do not show what their {point.tower} "
                f"{point.kind} heads compare, so relp cannot hold what they pay attention to; take atp"
            ) from error


def _watch(hooks: Hooks, module: nn.Module, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`rule(x, out)` gives what stands for a module's output, of what it gets and gives."""
    got: list[Tensor] = []

    def enter(args: Any, kwargs: dict[str, Any]) -> None:
        got.append(args[0] if args else next(iter(kwargs.values())))

    hooks.on_call(module, enter)
    hooks.on_output(module, lambda out: rule(got.pop(), out))


def _factor(last: list[Tensor], x: Tensor, out: Tensor) -> Tensor:
    factor = torch.where(x == 0, 0.0, out / x).detach()
    last[:] = [through(out, x * factor)]
    return last[0]


def _halved(last: list[Tensor], x: Tensor) -> Tensor:
    """The neurons: half of their gradient, where they are what an activation gave times something else."""
    if not last:
        raise ModelError("relp needs activations that are modules, which this model's MLPs lack; take atp")
    active = last.pop()
    is_gated = active.numel() != x.numel() or not torch.equal(active.reshape(x.shape), x)
    return through(x, x / 2) if is_gated else x


def _linear(norm: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """A norm with what it divides by held: read off its own outputs."""
    gain, bias, is_centred = scaling(norm.forward, x[(0,) * (x.ndim - 1)])
    around = x - x.mean(-1, keepdim=True) if is_centred else x
    scaled = gain * around
    with torch.no_grad():
        size = (scaled * scaled).sum(-1, keepdim=True)
        scale = ((out - bias) * scaled).sum(-1, keepdim=True) / size.where(size > 0, 1.0)
    return through(out, scaled * scale)

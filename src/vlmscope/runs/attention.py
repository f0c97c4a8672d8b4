"""Attention patterns of whole towers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.errors import SiteError
from vlmscope.models.inputs import Inputs
from vlmscope.runs.access import unpadded
from vlmscope.runs.forward import forward
from vlmscope.runs.hooks import Hooks, Plain, attending, eager, patterns
from vlmscope.runs.network import Network
from vlmscope.sites import Pattern, expand, place


@torch.inference_mode()
def attention(
    network: Network, inputs: Inputs, tower: str, kind: str, at: Sequence[int] | str
) -> Float[Tensor, "layers heads at keys"]:
    """What every head of a tower's `attn` or `cross` pays attention to, from the positions `at`.

    `at` are numbers, or a position of the site language such as `last`. Keys are the positions of
    `attended(tower, kind)`. Only these rows are kept, in float32. They are what transformers' own eager
    attention pays, whichever attention the model runs with.

    Raises `SiteError` for a position or a tower that there is not, `ModelError` where the model does
    not tell what is paid, or where its kernel reads its mask in a form of its own.
    """
    at = _numbers(network, inputs, tower, kind, at)
    modules = network.attention_modules(tower, kind)
    rows: list[Tensor] = []

    def pay(plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        rows.append(patterns(plain, module, q, k, v, mask, at, **kw).float())
        return plain(module, q, k, v, mask, **kw)

    with network.alone():
        if eager(modules[0]) is None:  # their second output is what they paid
            with Hooks() as hooks:
                for module in modules:
                    hooks.on_output(module, lambda out: rows.append(out[1][0][:, list(at)].float()))
                forward(network, inputs)
        else:
            with attending(modules, pay):
                forward(network, inputs)
    paid = torch.stack([row.to(network.device) for row in rows])
    layout = inputs.layout[network.attended(tower, kind)]
    if paid.shape[-1] == len(layout.tokens):
        return paid
    every = paid.new_zeros(*paid.shape[:-1], len(layout.tokens))
    every[..., unpadded(layout)] = paid
    return every


def _numbers(
    network: Network, inputs: Inputs, tower: str, kind: str, at: Sequence[int] | str
) -> Sequence[int]:
    """Positions as numbers, each of which is there, as what they attend to has to be."""
    whole = expand([Pattern.parse(f"{tower}.*.{kind}@all")], network.shapes)[0]
    place(replace(whole, tower=network.attended(tower, kind)), inputs.layout)
    if isinstance(at, str):
        named = replace(whole, position=Pattern.parse(f"{tower}.*.{kind}@{at}").position)
        return [n for site in place(named, inputs.layout) for n in site.positions]
    length = len(inputs.layout[tower].tokens)
    for n in at:
        if not isinstance(n, Integral) or not -length <= n < length:
            raise SiteError(
                f"no position {n!r} in the {tower} tower; expected whole numbers from 0 to {length - 1}, "
                "or a name such as 'last'"
            )
    return [int(n) % length for n in at]

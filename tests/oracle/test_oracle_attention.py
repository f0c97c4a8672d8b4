"""Attention maps are Hugging Face's own: what eager attention pays, in a copy of the same model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anatomy
import pytest
import torch
from cases import SECOND, Case
from test_oracle_prompts import example
from torch import Tensor, nn

from vlmscope.errors import ModelError


@contextmanager
def payments() -> Iterator[dict[nn.Module, list[Tensor]]]:
    """What every attention module pays, by a hook on the eager function of its modeling file."""
    paid: dict[nn.Module, list[Tensor]] = {}
    plain: list[tuple[Any, Any]] = []

    def hooked_on(function: Any) -> Any:
        def pay(module: nn.Module, *args: Any, **named: Any) -> Any:
            out = function(module, *args, **named)
            paid.setdefault(module, []).append(out[1])
            return out

        return pay

    for name, file in list(sys.modules.items()):
        if name.startswith("transformers.models.") and "eager_attention_forward" in vars(file):
            plain.append((file, file.eager_attention_forward))
            file.eager_attention_forward = hooked_on(file.eager_attention_forward)
    try:
        yield paid
    finally:
        for file, function in plain:
            file.eager_attention_forward = function


def weights(case: Case, tensors: dict[str, Tensor], tower: str, kind: str) -> list[Tensor]:
    """For each layer that has the kind: heads × positions × positions attended to.

    Several sequences of a batch (pictures, tiles, windows) lie end to end and do not see each other.
    """
    part = anatomy.towers(case, case.eager)[tower]
    modules = [
        block.get_submodule(one.pays[kind])
        for block, one in zip(part.blocks, part.kinds, strict=True)
        if kind in one.pays and anatomy.has(block, one.pays[kind])
    ]
    second: dict[nn.Module, list[Tensor]] = {}
    with payments() as paid, anatomy.hooked() as keep:
        for module in modules:  # BLIP has no such function: its attention gives what it paid
            keep(
                module.register_forward_hook(
                    lambda m, args, out: isinstance(out, tuple) and second.setdefault(m, []).append(out[-1])
                )
            )
        anatomy.forward(case, tensors, case.eager)
    found = []
    for module in modules:
        chunks = paid.get(module) or second[module]
        found.append(_end_to_end([one for chunk in chunks for one in chunk]))
    return found


def _end_to_end(chunks: list[Tensor]) -> Tensor:
    heads = chunks[0].shape[0]
    return torch.stack([torch.block_diag(*(one[n] for one in chunks)) for n in range(heads)])


KINDS = ("attn", "cross")


@pytest.mark.parametrize("many", ["one picture", "two pictures"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tower", ["vision", "qformer", "encoder", "decoder"])
def test_maps_are_what_eager_attention_pays(case, tower, kind, many):
    if many == "two pictures" and not case.several:
        pytest.skip("takes one picture")
    model = case.model
    if tower not in model.shapes or kind not in model.shapes[tower].kinds:
        pytest.skip(f"no {kind} in a {tower}")
    more = (SECOND,) if many == "two pictures" else ()
    inputs = model.prepare(example(more_images=more)).clean
    at = list(range(len(inputs.layout[tower].tokens)))
    try:
        got = model.attention(inputs, tower, kind, at)
    except ModelError as error:
        if "do not tell" not in str(error):
            raise
        pytest.skip(str(error))
    full = weights(case, anatomy.double(case, inputs), tower, kind)[: len(got)]
    assert len(got) == len(full), f"{len(got)} layers"
    if tower == "qformer":  # the queries come first; words behind them have no names
        full = [one[:, : got.shape[2], : got.shape[3]] for one in full]
    keys = len(inputs.layout[model.attended(tower, kind)].tokens)
    assert got.shape[-1] == keys, f"{got.shape[-1]} keys for {keys} positions"
    if case.name == "mllama" and kind == "cross":
        full = [_padded(one, keys) for one in full]
    for layer, (one, want) in enumerate(zip(got, full, strict=True)):
        # Eager attention rounds scores of some 30 to float32 before its softmax.
        anatomy.close(one.double(), want, f"layer {layer}", 1e-5)


def _padded(paid: Tensor, keys: int, patches: int = 5) -> Tensor:
    """Mllama's tiles have five patches here, which its vision tower fills up to eight with nothing."""
    whole = paid.new_zeros(*paid.shape[:-1], keys)
    whole[..., [n for n in range(keys) if n % 8 < patches]] = paid
    return whole

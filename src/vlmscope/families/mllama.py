"""Mllama (Llama 3.2 Vision): a tiled vision tower that cross-attention layers of the decoder read.

Some layers of the decoder have cross-attention in the place of self-attention. A prompt has a single
image token; the picture is seen through cross-attention alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import MllamaForConditionalGeneration

from vlmscope.families import Tower, causal
from vlmscope.sites import Layout

VISION = Tower(
    blocks="model.vision_model.transformer.layers",
    config="vision_config",
    attn="self_attn.o_proj",
    mlp="mlp.fc2",
    heads="attention_heads",
    weights={"attn": "self_attn"},
)


def vision_layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Each tile's patches in rows behind its class token, padded to a multiple of eight."""
    vision = hf.config.vision_config
    side = vision.image_size // vision.patch_size
    many = side * side + 1
    names = ["[CLS]", *(f"{r},{c}" for r in range(side) for c in range(side))]
    names += ["[PAD]"] * (-many % 8)
    tiles = tensors["pixel_values"].shape[1] * tensors["pixel_values"].shape[2]
    tokens = [f"{tile}:{name}" for tile in range(tiles) for name in names]
    return Layout(tuple(tokens), image=tuple(n for n, t in enumerate(tokens) if "[" not in t))


MLLAMA = causal.family(
    "Mllama",
    MllamaForConditionalGeneration,
    vision=VISION,
    decoder=replace(causal.llama(), cross="cross_attn.o_proj", reads="vision"),
    cells=causal.no_cells,
    layout=vision_layout,
)

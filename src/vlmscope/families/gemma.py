"""Gemma 3 and PaliGemma: SigLIP's vision tower and a Gemma decoder.

Gemma 3 lets image tokens see each other both ways, PaliGemma all of image and prompt; the engine
reads both off the model's own attention masks (`suffix.starts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Gemma3ForConditionalGeneration, PaliGemmaForConditionalGeneration

from vlmscope.families import Tower, causal
from vlmscope.sites import Layout

SIGLIP = Tower(
    blocks="model.vision_tower.encoder.layers",
    config="vision_config",
    attn="self_attn.out_proj",
    mlp="mlp.fc2",
    attention={"attn": "self_attn"},
)


def vision_layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Patches in rows, without a class token."""
    size = hf.config.vision_config.patch_size
    rows, columns = (n // size for n in tensors["pixel_values"].shape[-2:])
    cells = {r * columns + c: (r, c) for r in range(rows) for c in range(columns)}
    return Layout(tuple(f"{r},{c}" for r, c in cells.values()), cells=cells)


GEMMA3 = causal.family(
    "Gemma 3",
    Gemma3ForConditionalGeneration,
    vision=SIGLIP,
    decoder=causal.llama(),
    cells=causal.square,
    layout=vision_layout,
)
PALIGEMMA = causal.family(
    "PaliGemma",
    PaliGemmaForConditionalGeneration,
    vision=SIGLIP,
    decoder=causal.llama(),
    cells=causal.square,
    layout=vision_layout,
    kind=1,
    capped=True,
)

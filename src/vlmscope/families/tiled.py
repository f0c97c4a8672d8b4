"""LLaVA-OneVision, Idefics3, SmolVLM and InternVL: pictures split into tiles, beside the whole picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import (
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)

from vlmscope.families import Tower, causal, llava
from vlmscope.families.gemma import SIGLIP


def _patch(config: Any) -> int:
    size = config.vision_config.patch_size
    return int(size if isinstance(size, int) else size[0])


def _merged(hf: Any, processor: Any) -> int:
    """Patches a side of one picture, after neighbouring ones have been merged."""
    vision = hf.config.vision_config
    return int(vision.image_size // vision.patch_size // hf.config.scale_factor)


def _shuffled(hf: Any, processor: Any) -> int:
    return int(processor.image_seq_length**0.5)


def tiles_or_nothing(
    hf: Any, processor: Any, tensors: Mapping[str, Tensor], images: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """As LLaVA-NeXT; no cells where the tiles were shrunk to fit."""
    cells = llava.tiled(hf, processor, tensors, images)
    side = hf.config.vision_config.image_size // hf.config.vision_config.patch_size
    rows = max((row for row, _ in cells.values()), default=0) + 1
    columns = max((column for _, column in cells.values()), default=0) + 1
    whole = side * side + (rows * (columns + 1) if tensors["pixel_values"].shape[1] > 1 else 1)
    return cells if whole == len(images) else {}


ONEVISION = causal.family(
    "LLaVA-OneVision",
    LlavaOnevisionForConditionalGeneration,
    vision=replace(SIGLIP, depth=llava.used),
    decoder=causal.llama(),
    cells=tiles_or_nothing,
    layout=causal.tiles(_patch),
)
IDEFICS3 = causal.family(
    "Idefics3",
    Idefics3ForConditionalGeneration,
    vision=replace(SIGLIP, blocks="model.vision_model.encoder.layers"),
    decoder=causal.llama("model.text_model.layers"),
    cells=causal.last_square(_merged),
    layout=causal.tiles(_patch),
    norm="model.text_model.norm",
)
SMOLVLM = causal.family(
    "SmolVLM",
    SmolVLMForConditionalGeneration,
    vision=replace(SIGLIP, blocks="model.vision_model.encoder.layers"),
    decoder=causal.llama("model.text_model.layers"),
    cells=causal.last_square(_merged),
    layout=causal.tiles(_patch),
    norm="model.text_model.norm",
)
INTERNVL = causal.family(
    "InternVL",
    InternVLForConditionalGeneration,
    vision=Tower(
        blocks="model.vision_tower.encoder.layer",
        config="vision_config",
        attn="attention.projection_layer",
        mlp="mlp.fc2",
        weights={"attn": "attention"},
        depth=llava.used,
    ),
    decoder=causal.llama(),
    cells=causal.last_square(_shuffled),
    layout=causal.tiles(_patch, class_token=True),
)

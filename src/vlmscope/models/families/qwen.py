"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: grids of any size, four patches merged to a token, 3-D positions.

Positions come from `mm_token_type_ids`, which the processor makes and `encode` passes on. Qwen3-VL adds
features of earlier vision blocks to the image tokens between the first decoder blocks (DeepStack), so
there `resid` of a layer is not `resid_pre` of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from vlmscope.layout import Layout
from vlmscope.models.families import causal
from vlmscope.models.towers import Tower

VISION = Tower(
    blocks="model.visual.blocks",
    config="vision_config",
    attn="attn.proj",
    mlp="mlp.fc2",
    heads="num_heads",
    norms={"attn": ("norm1",), "mlp": ("norm2",)},
)


def vision_layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Patches in the order of the tower, four that are merged after each other."""
    many = len(tensors["pixel_values"])
    return Layout(tuple(map(str, range(many))), image=tuple(range(many)))


def cells(
    hf: Any, processor: Any, image: Image.Image, tensors: Mapping[str, Tensor], images: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Rows and columns of merged patches."""
    columns = int(tensors["image_grid_thw"][0, 2]) // hf.config.vision_config.spatial_merge_size
    return {at: divmod(n, columns) for n, at in enumerate(images)}


def deepstack(config: Any) -> int:
    """Behind how many blocks of the decoder features of the vision tower's blocks are added."""
    added = len(config.vision_config.deepstack_visual_indexes)
    return min(added, int(config.text_config.num_hidden_layers))


def _family(name: str, model: Any, vision: Tower, decoder: Tower) -> Any:
    return causal.family(name, model, vision=vision, decoder=decoder, cells=cells, layout=vision_layout)


QWEN2 = _family("Qwen2-VL", Qwen2VLForConditionalGeneration, VISION, causal.llama())
QWEN2_5 = _family(
    "Qwen2.5-VL", Qwen2_5_VLForConditionalGeneration, replace(VISION, mlp="mlp.down_proj"), causal.llama()
)
QWEN3 = _family(
    "Qwen3-VL",
    Qwen3VLForConditionalGeneration,
    replace(VISION, mlp="mlp.linear_fc2", joined=lambda config: bool(deepstack(config))),
    replace(causal.llama(), deepstack=deepstack),
)

FAMILIES = (QWEN2, QWEN2_5, QWEN3)

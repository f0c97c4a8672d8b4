"""LLaVA-OneVision, Idefics3, SmolVLM and InternVL: pictures split into tiles, beside the whole picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import (
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlmscope.models.families import causal, llava
from vlmscope.models.towers import CLIP, Tower


def _patch(config: Any) -> int:
    size = config.vision_config.patch_size
    return int(size if isinstance(size, int) else size[0])


def _merged(hf: Any, processor: Any) -> int:
    """Patches a side of one picture, after neighbouring ones have been merged."""
    vision = hf.config.vision_config
    return int(vision.image_size // vision.patch_size // hf.config.scale_factor)


def _shuffled(hf: Any, processor: Any) -> int:
    return int(processor.image_seq_length**0.5)


def _split(processor: Any, image: Image.Image) -> tuple[int, int]:
    """Rows and columns of the tiles that Idefics3's and SmolVLM's processors split a picture into."""
    made = processor.image_processor([[image]], return_row_col_info=True)
    return int(made["rows"][0][0]), int(made["cols"][0][0])


def _cropped(processor: Any, image: Image.Image) -> tuple[int, int]:
    """Rows and columns of the tiles that InternVL's processor cuts a picture into."""
    images = processor.image_processor
    tile = (images.size["height"], images.size["width"])
    columns, rows = get_optimal_tiled_canvas(
        (image.height, image.width), tile, images.min_patches, images.max_patches
    )
    return rows, columns


def _tiles(hf: Any, tensors: Mapping[str, Tensor]) -> int:
    """Only a picture that is alone is cut into tiles."""
    many = len(tensors["pixel_values"])
    return many if many > 1 else causal.every_tile(hf, tensors)


def tiles_or_nothing(
    hf: Any, processor: Any, image: Image.Image, tensors: Mapping[str, Tensor], images: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """As LLaVA-NeXT; no cells where the tiles were shrunk to fit."""
    cells = llava.tiled(hf, processor, image, tensors, images)
    side = hf.config.vision_config.image_size // hf.config.vision_config.patch_size
    rows = max((row for row, _ in cells.values()), default=0) + 1
    columns = max((column for _, column in cells.values()), default=0) + 1
    whole = side * side + (rows * (columns + 1) if tensors["pixel_values"].shape[1] > 1 else 1)
    return cells if whole == len(images) else {}


ONEVISION = causal.family(
    "LLaVA-OneVision",
    LlavaOnevisionForConditionalGeneration,
    vision=replace(CLIP, depth=llava.used),
    decoder=causal.llama(),
    cells=tiles_or_nothing,
    layout=causal.tiles(_patch, count=_tiles),
)
IDEFICS3, SMOLVLM = (
    causal.family(
        name,
        architecture,
        vision=replace(CLIP, blocks="model.vision_model.encoder.layers"),
        decoder=causal.llama("model.text_model.layers"),
        cells=causal.put_back(_merged, _split),
        layout=causal.tiles(_patch),
        norm="model.text_model.norm",
    )
    for name, architecture in (
        ("Idefics3", Idefics3ForConditionalGeneration),
        ("SmolVLM", SmolVLMForConditionalGeneration),
    )
)
INTERNVL = causal.family(
    "InternVL",
    InternVLForConditionalGeneration,
    vision=Tower(
        blocks="model.vision_tower.encoder.layer",
        config="vision_config",
        attn="attention.projection_layer",
        mlp="mlp.fc2",
        factor={
            "attn": lambda block: lambda call: block.lambda_1,
            "mlp": lambda block: lambda call: block.lambda_2,
        },
        attention={"attn": "attention"},
        norms={"attn": ("layernorm_before",), "mlp": ("layernorm_after",)},
        depth=llava.used,
    ),
    decoder=causal.llama(),
    cells=causal.put_back(_shuffled, _cropped),
    layout=causal.tiles(_patch, class_token=lambda hf: True),
)

FAMILIES = (ONEVISION, SMOLVLM, IDEFICS3, INTERNVL)

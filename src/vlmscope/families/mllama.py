"""Mllama (Llama 3.2 Vision): a tiled vision tower that cross-attention layers of the decoder read.

Some layers of the decoder have cross-attention in the place of self-attention. A prompt has a single
image token; the picture is seen through cross-attention alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.image_processing_pil_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from vlmscope.example import Box
from vlmscope.families import Tower, causal
from vlmscope.sites import Layout

VISION = Tower(
    blocks="model.vision_model.transformer.layers",
    config="vision_config",
    attn="self_attn.o_proj",
    mlp="mlp.fc2",
    heads="attention_heads",
    attention={"attn": "self_attn"},
)


def vision_layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Each tile's patches in rows behind its class token, padded to a multiple of eight."""
    vision = hf.config.vision_config
    side = vision.image_size // vision.patch_size
    many = side * side + 1
    names = ["[CLS]", *(f"{r},{c}" for r in range(side) for c in range(side))]
    names += ["[PAD]"] * (-many % 8)
    tiles = tensors["pixel_values"].shape[1] * tensors["pixel_values"].shape[2]
    rows, columns = vision.supported_aspect_ratios[int(tensors["aspect_ratio_ids"][0, 0]) - 1]
    tokens = [f"{tile}:{name}" for tile in range(tiles) for name in names]
    image = tuple(n for n, token in enumerate(tokens) if "[" not in token)
    cells = {}
    for tile in range(rows * columns):  # the tiles of the (first) picture put back together
        for n in range(side * side):
            row, column = tile // columns * side + n // side, tile % columns * side + n % side
            at = tile * len(names) + 1 + n
            cells[at], tokens[at] = (row, column), f"{row},{column}"
    return Layout(tuple(tokens), cells=cells, image=image)


def view(processor: Any, image: Image.Image) -> Box:
    """A picture is scaled to fit its tiles and filled up at the right and at the bottom."""
    images = processor.image_processor
    tile = images.size["height"]
    height, width = get_optimal_tiled_canvas(
        image.height, image.width, images.max_image_tiles, tile
    )
    down, across = get_image_size_fit_to_canvas(image.height, image.width, height, width, tile)
    return 0.0, 0.0, width * image.width / across, height * image.height / down


DECODER = replace(
    causal.llama(),
    cross="cross_attn.o_proj",
    reads="vision",
    attention={"attn": "self_attn", "cross": "cross_attn"},
)

MLLAMA = replace(
    causal.family(
        "Mllama",
        MllamaForConditionalGeneration,
        vision=VISION,
        decoder=DECODER,
        cells=causal.no_cells,
        layout=vision_layout,
        write=partial(causal.written, between=""),
    ),
    view=view,
)

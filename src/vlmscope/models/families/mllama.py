"""Mllama (Llama 3.2 Vision): a tiled vision tower that cross-attention layers of the decoder read.

Some layers of the decoder have cross-attention in the place of self-attention. A prompt has a single
image token; the picture is seen through cross-attention alone. What it reads is the vision tower's
`output`: some of the tower's blocks and the global layers behind it, side by side, projected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

from vlmscope.data.example import Box
from vlmscope.layout import Layout
from vlmscope.models.families import causal, chat
from vlmscope.models.towers import Tower

VISION = Tower(
    blocks="model.vision_model.transformer.layers",
    config="vision_config",
    attn="self_attn.o_proj",
    mlp="mlp.fc2",
    heads="attention_heads",
    output="model.multi_modal_projector",
    joined=lambda config: True,
    attention={"attn": "self_attn"},
)


def vision_layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Each tile's patches in rows behind its class token, padded to a multiple of eight.

    The image is in the tiles that the pictures have; tiles that fill up the tensor are not of it.
    """
    vision = hf.config.vision_config
    side = vision.image_size // vision.patch_size
    many = side * side + 1
    names = ["[CLS]", *(f"{r},{c}" for r in range(side) for c in range(side))]
    names += ["[PAD]"] * (-many % 8)
    tiles = tensors["pixel_values"].shape[1] * tensors["pixel_values"].shape[2]
    rows, columns = vision.supported_aspect_ratios[int(tensors["aspect_ratio_ids"][0, 0]) - 1]
    tokens = [f"{tile}:{name}" for tile in range(tiles) for name in names]
    full = tensors["aspect_ratio_mask"].flatten().bool().repeat_interleave(len(names)).tolist()
    image = tuple(n for n, token in enumerate(tokens) if full[n] and "[" not in token)
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
    height, width = get_optimal_tiled_canvas(image.height, image.width, images.max_image_tiles, tile)
    down, across = get_image_size_fit_to_canvas(image.height, image.width, height, width, tile)
    return 0.0, 0.0, width * image.width / across, height * image.height / down


def _cross_gate(block: Any) -> Callable[[Mapping[str, Any]], Tensor] | None:
    return lambda call: block.cross_attn_attn_gate.tanh()


def _mlp_gate(block: Any) -> Callable[[Mapping[str, Any]], Tensor] | None:
    """In layers with cross-attention, the MLP adds nothing to tokens that see no picture."""
    if not hasattr(block, "cross_attn_mlp_gate"):
        return None

    def factor(call: Mapping[str, Any]) -> Tensor:
        gate: Tensor = block.cross_attn_mlp_gate.tanh()
        sees = call["full_text_row_masked_out_mask"]
        return gate if sees is None else gate * sees[:, 0]

    return factor


DECODER = replace(
    causal.llama(),
    cross="cross_attn.o_proj",
    factor={"cross": _cross_gate, "mlp": _mlp_gate},
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
        write=partial(chat.written, between=""),
    ),
    view=view,
    image="vision",
)

FAMILIES = (MLLAMA,)

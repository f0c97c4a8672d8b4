"""LLaVA 1.5 and LLaVA-NeXT: CLIP's vision tower (or SigLIP's), a projector, and a causal decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from vlmscope.data.example import Box
from vlmscope.errors import ExampleError, ModelError
from vlmscope.layout import Layout
from vlmscope.models.families import causal
from vlmscope.models.inputs import Inputs
from vlmscope.models.towers import CLIP, patches


def used(config: Any) -> int:
    """How many blocks of the vision tower the image features come from."""
    layers = config.vision_feature_layer
    some = [layers] if isinstance(layers, int) else list(layers)
    many = config.vision_config.num_hidden_layers + 1  # hidden states: the embeddings come first
    if not all(-many <= n < many for n in some) or not any(n % many for n in some):
        raise ModelError(
            f"its image features are of the hidden states {some} of a vision tower of {many - 1} blocks "
            "(vision_feature_layer in its config); expected at least one of a block, and none beyond"
        )
    return max(n % many for n in some)


def several(config: Any) -> bool:
    """Whether the image features are those of several blocks side by side."""
    layers = config.vision_feature_layer
    return not isinstance(layers, int) and len(layers) > 1


def class_token(hf: Any) -> bool:
    """CLIP's vision tower has a class token, SigLIP's has none."""
    return hasattr(hf.model.vision_tower.embeddings, "class_embedding")


def vision_layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Patches in rows, behind the class token if there is one."""
    return patches(tensors["pixel_values"], hf.config.vision_config.patch_size, class_token(hf))


def leave(
    hf: LlavaForConditionalGeneration, tower: str, hidden: Float[Tensor, "rows pos width"]
) -> Float[Tensor, "rows pos width"]:
    """Features are taken from within the vision tower; the decoder ends with a norm."""
    return hidden if tower == "vision" else hf.model.language_model.norm(hidden)


def finish(
    hf: LlavaForConditionalGeneration,
    inputs: Inputs,
    tower: str,
    output: Float[Tensor, "rows pos width"],
    keep: int,
) -> Float[Tensor, "rows keep vocabulary"]:
    """What `LlavaForConditionalGeneration.forward` does after a tower, for many rows at once."""
    if tower == "decoder":
        return hf.lm_head(output[:, -keep:])
    if hf.config.vision_feature_select_strategy == "default":
        output = output[:, 1:]
    features = hf.model.multi_modal_projector(output)
    ids = inputs.tensors["input_ids"].expand(len(output), -1)
    embedded = hf.get_input_embeddings()(ids)
    where = (ids == hf.config.image_token_id)[..., None].expand_as(embedded)
    embedded = embedded.masked_scatter(where, features.to(embedded))
    mask = inputs.tensors["attention_mask"].expand(len(output), -1)
    hidden = hf.model.language_model(
        inputs_embeds=embedded, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return hf.lm_head(hidden[:, -keep:])


def tiles(hf: Any, tensors: Mapping[str, Tensor]) -> int:
    """How many tiles the vision tower sees: the model leaves out again what fills up a batch."""
    config = hf.config
    return sum(
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in tensors["image_sizes"]
    )


def tiled(
    hf: Any, processor: Any, image: Image.Image, tensors: Mapping[str, Tensor], images: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """The grid of the tiles put back together, without padding; each line ends with a newline token.

    The whole picture, which comes first, has no cells, unless there are no tiles.
    """
    vision = hf.config.vision_config
    side = vision.image_size // vision.patch_size
    size = tensors["image_sizes"][0]
    shape = get_anyres_image_grid_shape(size, hf.config.image_grid_pinpoints, vision.image_size)
    if tensors["pixel_values"].shape[1] == 1:
        return {at: divmod(n, side) for n, at in enumerate(images[: side * side])}
    rows, columns = unpad_image(torch.zeros(1, shape[0] * side, shape[1] * side), size).shape[1:]
    if not rows * columns:
        raise ExampleError(
            f"an image of {image.width} x {image.height} pixels is so narrow that none of its patches is "
            "left in the tiles; crop it"
        )
    behind = images[side * side :]
    return {at: divmod(n, columns + 1) for n, at in enumerate(behind) if n % (columns + 1) < columns}


def view(processor: Any, image: Image.Image) -> Box:
    """CLIP's processor scales the shorter side and cuts out the middle; LLaVA's own may first pad the
    picture to a square, and then what it shows is larger than the picture; SigLIP's shows all of it."""
    images = processor.image_processor
    width, height = (max(image.size),) * 2 if getattr(images, "do_pad", False) else image.size
    across, down = width, height
    if getattr(images, "do_center_crop", False) and "shortest_edge" in images.size:
        scale = images.size["shortest_edge"] / min(width, height)
        across, down = images.crop_size["width"] / scale, images.crop_size["height"] / scale
    left, top = (image.width - across) / 2, (image.height - down) / 2
    return left, top, left + across, top + down


VISION = replace(CLIP, depth=used, joined=several)
LLAVA = replace(
    causal.family(
        "LLaVA",
        LlavaForConditionalGeneration,
        vision=VISION,
        decoder=causal.llama(),
        cells=causal.square,
        layout=vision_layout,
    ),
    towers={"vision": VISION, "decoder": causal.llama()},  # patches in the vision tower are rows, too
    leave=leave,
    finish=finish,
    view=view,
)

NEXT = causal.family(
    "LLaVA-NeXT",
    LlavaNextForConditionalGeneration,
    vision=VISION,
    decoder=causal.llama(),
    cells=tiled,
    layout=causal.tiles(lambda config: config.vision_config.patch_size, class_token=class_token, count=tiles),
)

FAMILIES = (LLAVA, NEXT)

"""The families whose processors also read videos, which transformers makes only beside torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chat_templates as templates
import published_tokenizers as tokenizers
import transformers
from cases import PINPOINTS, Case, Chat, shaken, words
from families import siglip
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SIZES = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
}
PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
QWEN2 = {**PATCHES, "depth": 2, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}
QWEN2_5 = {
    **PATCHES,
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 33,
    "out_hidden_size": 16,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN3 = {
    **PATCHES,
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 33,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}


def videos(name: str) -> Any:
    if "3" in name:
        return transformers.Qwen3VLVideoProcessor()
    return transformers.Qwen2VLVideoProcessor(**SIZES)


def qwen(
    name: str,
    config: Any,
    model: Any,
    processor: Any,
    vision: dict[str, Any],
    template: str,
    sections: list[int],
    **language: Any,
) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        made = tokenizers.qwen2(*VISION)
        ids = {one: made.convert_tokens_to_ids(one) for one in VISION}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        interleaved = {"mrope_interleaved": True} if "3" in name else {}
        own = config(
            text_config=words(made, rope_parameters=rope | interleaved) | language,
            vision_config=vision,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
        images = transformers.Qwen2VLImageProcessor(**SIZES)
        reader = processor(images, made, videos(name), chat_template=template)
        return Chat(name, shaken(model(own), seed), reader, image=ids["<|image_pad|>"])

    return make


def onevision(seed: int) -> Case:
    made = tokenizers.qwen2("<image>", "<video>")
    image, video = made.convert_tokens_to_ids(["<image>", "<video>"])
    config = LlavaOnevisionConfig(
        text_config=words(made, model_type="qwen2"),
        vision_config=siglip() | {"model_type": "siglip_vision_model"},
        image_token_index=image,
        image_token_id=image,
        video_token_index=video,
        video_token_id=video,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = transformers.LlavaOnevisionImageProcessor(
        size={"height": 12, "width": 12}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaOnevisionProcessor(
        images,
        made,
        transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        chat_template=templates.ONEVISION,
    )
    hf = shaken(LlavaOnevisionForConditionalGeneration(config), seed)
    return Chat("llava-onevision", hf, processor, image=image)


TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
AROUND = ["<fake_token_around_image>", "<global-img>", *TILES]
EDGES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def tiled_config(config: Any, made: Any) -> Any:
    return config(
        text_config=words(made, model_type="llama"),
        vision_config=siglip(16),
        scale_factor=2,
        image_token_id=made.convert_tokens_to_ids("<image>"),
        pad_token_id=made.pad_token_id,
    )


def idefics3(seed: int) -> Case:
    made = tokenizers.llama3("<image>", "<end_of_utterance>", *AROUND)
    hf = shaken(Idefics3ForConditionalGeneration(tiled_config(Idefics3Config, made)), seed)
    processor = Idefics3Processor(
        transformers.Idefics3ImageProcessor(**EDGES), made, image_seq_len=4, chat_template=templates.IDEFICS3
    )
    return Chat("idefics3", hf, processor, image=made.convert_tokens_to_ids("<image>"))


def smolvlm(seed: int) -> Case:
    made = tokenizers.smol("<image>", "<end_of_utterance>", *AROUND)
    hf = shaken(SmolVLMForConditionalGeneration(tiled_config(SmolVLMConfig, made)), seed)
    processor = SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**EDGES),
        made,
        transformers.SmolVLMVideoProcessor(**EDGES),
        image_seq_len=4,
        chat_template=templates.SMOLVLM,
    )
    return Chat("smolvlm", hf, processor, image=made.convert_tokens_to_ids("<image>"))


def internvl(seed: int) -> Case:
    made = tokenizers.qwen2(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    image = made.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = InternVLConfig(
        text_config=words(made, model_type="qwen2"),
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 17,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=image,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    images = transformers.GotOcr2ImageProcessor(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = InternVLProcessor(
        images,
        made,
        transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=templates.INTERNVL,
    )
    hf = shaken(InternVLForConditionalGeneration(config), seed)
    return Chat("internvl", hf, processor, image=image)


MAKERS: dict[str, Callable[[int], Case]] = {
    "qwen2-vl": qwen(
        "qwen2-vl",
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLProcessor,
        QWEN2,
        templates.QWEN_VL,
        [1, 1, 0],
        head_dim=4,
    ),
    "qwen2.5-vl": qwen(
        "qwen2.5-vl",
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        QWEN2_5,
        templates.QWEN_VL,
        [1, 1, 0],
        head_dim=4,
    ),
    "qwen3-vl": qwen(
        "qwen3-vl",
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        QWEN3,
        templates.QWEN3_VL,
        [1, 1, 1],
    ),
    "llava-onevision": onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
}

"""Families whose processors also read videos: transformers makes them only where torchvision is."""

from __future__ import annotations

from families import CHAT, loud, siglip, text
from models import words_tokenizer
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

from vlmscope.runs.model import Model


def qwen_tokenizer():
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    return words_tokenizer(*names.values(), **names)


QWEN = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
PIXELS = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}


def qwen2_images(size: int = 4):
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    options = {"patch_size": size, "merge_size": 2, "temporal_patch_size": 2, "size": PIXELS}
    return Qwen2VLImageProcessor(**options), Qwen2VLVideoProcessor(**options)


def qwen_text(tokenizer, **more):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1], **more}
    return text(len(tokenizer), rope_parameters=rope)


IDS = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7}


def qwen2_vl() -> Model:
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "mlp_ratio": 2,
    }
    rope = qwen_text(tokenizer) | {"head_dim": 4}
    rope["rope_parameters"]["mrope_section"] = [1, 1, 0]
    config = Qwen2VLConfig(text_config=rope, vision_config=vision, **IDS)
    images, videos = qwen2_images()
    processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template=QWEN)
    return Model(loud(Qwen2VLForConditionalGeneration(config)), processor, "tiny Qwen2-VL")


def qwen2_5_vl() -> Model:
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 33,
        "out_hidden_size": 16,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    rope = qwen_text(tokenizer) | {"head_dim": 4}
    rope["rope_parameters"]["mrope_section"] = [1, 1, 0]
    config = Qwen2_5_VLConfig(text_config=rope, vision_config=vision, **IDS)
    images, videos = qwen2_images()
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=QWEN)
    return Model(loud(Qwen2_5_VLForConditionalGeneration(config)), processor, "tiny Qwen2.5-VL")


def qwen3_vl(layers: int = 3) -> Model:
    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 33,
        "out_hidden_size": 16,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = qwen_text(tokenizer, mrope_interleaved=True) | {"num_hidden_layers": layers}
    config = Qwen3VLConfig(text_config=rope, vision_config=vision, **IDS)
    from transformers import Qwen3VLVideoProcessor

    images, _ = qwen2_images()
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=QWEN)
    return Model(loud(Qwen3VLForConditionalGeneration(config)), processor, "tiny Qwen3-VL")


def llava_onevision() -> Model:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor

    tokenizer = words_tokenizer("<image>", "<video>")
    pinpoints = [[12, 24], [24, 12], [24, 24]]
    config = LlavaOnevisionConfig(
        text_config=text(len(tokenizer), model_type="llama"),
        vision_config=siglip() | {"model_type": "siglip_vision_model"},
        image_token_index=4,
        image_token_id=4,
        video_token_index=5,
        video_token_id=5,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = LlavaOnevisionImageProcessor(size={"height": 12, "width": 12}, image_grid_pinpoints=pinpoints)
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return Model(loud(LlavaOnevisionForConditionalGeneration(config)), processor, "tiny LLaVA-OneVision")


IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def idefics_tokenizer():
    tiles = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
    names = IDEFICS | {"global_image_token": "<global-img>"}
    return words_tokenizer(
        "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles, **names
    )


def idefics3() -> Model:
    from transformers import Idefics3ImageProcessor

    tokenizer = idefics_tokenizer()
    config = Idefics3Config(
        text_config=text(len(tokenizer), model_type="llama"),
        vision_config=siglip(16) | {"num_attention_heads": 2},
        scale_factor=2,
        image_token_id=4,
        pad_token_id=0,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=CHAT.replace("IMAGE", "<image>")
    )
    return Model(loud(Idefics3ForConditionalGeneration(config)), processor, "tiny Idefics3")


def smolvlm() -> Model:
    from transformers import SmolVLMImageProcessor, SmolVLMVideoProcessor

    tokenizer = idefics_tokenizer()
    config = SmolVLMConfig(
        text_config=text(len(tokenizer), model_type="llama"),
        vision_config=siglip(16) | {"num_attention_heads": 2},
        scale_factor=2,
        image_token_id=4,
        pad_token_id=0,
    )
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes),
        tokenizer,
        SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return Model(loud(SmolVLMForConditionalGeneration(config)), processor, "tiny SmolVLM")


def internvl() -> Model:
    from transformers import GotOcr2ImageProcessor, InternVLVideoProcessor

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = words_tokenizer("<IMG_CONTEXT>", "<img>", "</img>", "<video>", **names)
    config = InternVLConfig(
        text_config=text(len(tokenizer), model_type="llama"),
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 17,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=4,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    images = GotOcr2ImageProcessor(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>"),
    )
    return Model(loud(InternVLForConditionalGeneration(config)), processor, "tiny InternVL")


FAMILIES = {
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "llava-onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
}

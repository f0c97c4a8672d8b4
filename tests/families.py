"""Small random models of every family, with processors as their checkpoints have them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from models import blip, blip_processor, words_tokenizer
from mplug_owl2 import MPLUGOwl2Config, MPLUGOwl2LlamaForCausalLM
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlmscope.runs.model import Model

CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE\n"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPREAD = {"initializer_range": 0.4}


def text(vocabulary: int, **more: object) -> dict[str, object]:
    """A decoder of three layers whose queries share keys."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 33,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
        **SPREAD,
        **more,
    }


def siglip(size: int = 12, patch: int = 4) -> dict[str, object]:
    return {
        "hidden_size": 8,
        "intermediate_size": 17,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
        "vision_use_head": False,
    }


def loud(hf: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights so large that every part of the model counts."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.5)
            elif name.endswith("gate") or "newline" in name:
                weight.fill_(0.7)
    return hf.double().eval()


def gemma3() -> Model:
    tokenizer = words_tokenizer(
        "<image_soft_token>",
        "<start_of_image>",
        "<end_of_image>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    config = Gemma3Config(
        text_config=text(
            len(tokenizer),
            sliding_window=8,
            query_pre_attn_scalar=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=siglip(16),
        mm_tokens_per_image=4,
        image_token_id=4,
        image_token_index=4,
        boi_token_index=5,
        eoi_token_index=6,
    )
    hf = loud(Gemma3ForConditionalGeneration(config))
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = Gemma3Processor(
        images, tokenizer, image_seq_length=4, chat_template=CHAT.replace("IMAGE", "<start_of_image>")
    )
    return Model(hf, processor, "tiny Gemma 3")


def paligemma(**language: object) -> Model:
    tokenizer = words_tokenizer("<image>")
    config = PaliGemmaConfig(
        text_config=text(len(tokenizer), **{"model_type": "gemma", **language}),
        vision_config=siglip(),
        image_token_index=4,
        image_token_id=4,
        projection_dim=16,
        num_image_tokens=9,
    )
    hf = loud(PaliGemmaForConditionalGeneration(config))
    images = SiglipImageProcessorPil(size={"height": 12, "width": 12})
    images.image_seq_length = 9
    return Model(hf, PaliGemmaProcessor(images, tokenizer), "tiny PaliGemma")


def paligemma2() -> Model:
    """Scores and logits are bounded, every other layer sees a window, norms stand behind sublayers."""
    return paligemma(
        model_type="gemma2",
        attn_logit_softcapping=3.0,
        final_logit_softcapping=20.0,
        query_pre_attn_scalar=7,
        sliding_window=5,
    )


def clip(size: int = 12) -> dict[str, object]:
    return {
        "hidden_size": 8,
        "intermediate_size": 17,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": 4,
        "projection_dim": 8,
        "model_type": "clip_vision_model",
    }


def llava_next() -> Model:
    tokenizer = words_tokenizer("<image>")
    pinpoints = [[12, 24], [24, 12], [24, 24]]
    config = LlavaNextConfig(
        text_config=text(len(tokenizer), model_type="llama"),
        vision_config=clip(),
        image_token_index=4,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return Model(loud(LlavaNextForConditionalGeneration(config)), processor, "tiny LLaVA-NeXT")


def granite_vision() -> Model:
    """LLaVA-NeXT with SigLIP's vision tower, of which several blocks are read, and a Granite decoder."""
    tokenizer = words_tokenizer("<image>")
    pinpoints = [[12, 24], [24, 12], [24, 24]]
    config = LlavaNextConfig(
        text_config=text(
            len(tokenizer),
            model_type="granite",
            residual_multiplier=0.3,
            embedding_multiplier=1.5,
            attention_multiplier=0.5,
        ),
        vision_config=siglip() | {"model_type": "siglip_vision_model", "num_hidden_layers": 3},
        image_token_index=4,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=[-4, -2, 1],
        vision_feature_select_strategy="full",
    )
    images = LlavaNextImageProcessorPil(
        size={"height": 12, "width": 12},
        crop_size={"height": 12, "width": 12},
        do_center_crop=False,
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=0,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return Model(loud(LlavaNextForConditionalGeneration(config)), processor, "tiny granite-vision")


def llava_siglip(layers: int | list[int] = -1) -> Model:
    """LLaVA 1.5's class with SigLIP's vision tower and a Qwen 2 decoder, as llava-interleave."""
    tokenizer = words_tokenizer("<image>")
    config = LlavaConfig(
        text_config=text(len(tokenizer), model_type="qwen2"),
        vision_config=siglip() | {"model_type": "siglip_vision_model"},
        image_token_index=4,
        vision_feature_layer=layers,
        vision_feature_select_strategy="full",
    )
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": 12, "width": 12}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=0,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return Model(loud(LlavaForConditionalGeneration(config)), processor, "tiny llava-interleave")


def mllama() -> Model:
    tokenizer = words_tokenizer("<|image|>", "<|python_tag|>")
    config = MllamaConfig(
        text_config=text(
            len(tokenizer),
            head_dim=4,
            num_hidden_layers=4,
            cross_attention_layers=[1, 3],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 17,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "vision_output_dim": 24,
            "intermediate_layers_indices": [0, 1],
            "max_num_tiles": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        image_token_index=4,
    )
    images = MllamaImageProcessorPil(size={"height": 8, "width": 8}, max_image_tiles=4)
    processor = MllamaProcessor(images, tokenizer, chat_template=CHAT.replace("IMAGE", "<|image|>"))
    return Model(loud(MllamaForConditionalGeneration(config)), processor, "tiny Mllama")


def blip2_parts(language: dict[str, object]) -> dict[str, object]:
    return {
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 17,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 12,
            "patch_size": 4,
        },
        "qformer_config": {
            "hidden_size": 12,
            "intermediate_size": 25,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "encoder_hidden_size": 8,
            "cross_attention_frequency": 2,
            "vocab_size": 107,
        },
        "text_config": language,
        "num_query_tokens": 5,
        "image_token_index": 4,
        "image_token_id": 4,
        "image_text_hidden_size": 8,
    }


def opt(vocabulary: int) -> dict[str, object]:
    return {
        "model_type": "opt",
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "ffn_dim": 33,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }


def t5(vocabulary: int) -> dict[str, object]:
    return {
        "model_type": "t5",
        "vocab_size": vocabulary,
        "d_model": 16,
        "d_kv": 5,
        "d_ff": 33,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
    }


def blip2(language=opt) -> Model:
    tokenizer = words_tokenizer("<image>")
    config = Blip2Config(**blip2_parts(language(len(tokenizer))))
    images = BlipImageProcessorPil(size={"height": 12, "width": 12})
    processor = Blip2Processor(images, tokenizer, num_query_tokens=5)
    return Model(loud(Blip2ForConditionalGeneration(config)), processor, "tiny BLIP-2")


def instructblip(language=lambda vocabulary: text(vocabulary, model_type="llama")) -> Model:
    tokenizer = words_tokenizer("<image>")
    config = InstructBlipConfig(**blip2_parts(language(len(tokenizer))))
    images = BlipImageProcessorPil(size={"height": 12, "width": 12})
    processor = InstructBlipProcessor(
        images, tokenizer, qformer_tokenizer=blip_processor().tokenizer, num_query_tokens=5
    )
    return Model(loud(InstructBlipForConditionalGeneration(config)), processor, "tiny InstructBLIP")


def blip_captioning() -> Model:
    config = blip(layers=3).hf.config
    config.text_config.max_position_embeddings = 64
    hf = loud(BlipForConditionalGeneration(config))
    return Model(hf, blip_processor(), "tiny BLIP captioning")


def mplug_owl2(*, class_token: bool = True) -> Model:
    """Of a class that is written in the tests; the processor is two objects side by side."""
    tokenizer = words_tokenizer()
    both = {"hidden_size": 8, "intermediate_size": 17, "num_hidden_layers": 2, "num_attention_heads": 2}
    language = {**text(len(tokenizer)), "num_key_value_heads": 4, "head_dim": 4}
    config = MPLUGOwl2Config(
        **language,
        visual_config={
            "visual_model": {**both, "image_size": 12, "patch_size": 4, "use_cls_token": class_token},
            "visual_abstractor": {**both, "num_learnable_queries": 5, "encoder_hidden_size": 8},
        },
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    hf = loud(MPLUGOwl2LlamaForCausalLM(config))
    return Model(hf, SimpleNamespace(tokenizer=tokenizer, image_processor=images), "tiny mPLUG-Owl2")


FAMILIES = {
    "blip-captioning": blip_captioning,
    "blip2-opt": blip2,
    "blip2-t5": lambda: blip2(t5),
    "instructblip-vicuna": instructblip,
    "instructblip-t5": lambda: instructblip(t5),
    "gemma3": gemma3,
    "paligemma": paligemma,
    "paligemma2": paligemma2,
    "llava-next": llava_next,
    "llava-siglip": llava_siglip,
    "llava-siglip-layers": lambda: llava_siglip([0, 2]),
    "granite-vision": granite_vision,
    "mllama": mllama,
    "mplug-owl2": mplug_owl2,
}

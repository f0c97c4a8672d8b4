"""Small random models of published classes, with processors and configs in the published form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import chat_templates as templates
import published_tokenizers as tokenizers
from cases import PINPOINTS, Captioning, Case, Chat, EncoderDecoder, PaliGemma, Single, numbers, shaken, words
from families import blip2_parts, clip, opt, siglip, t5, text
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipProcessor,
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


def blip_config(tokenizer: Any, layers: int = 3) -> BlipConfig:
    both = {"hidden_size": 8, "intermediate_size": 17, "num_attention_heads": 2}
    return BlipConfig(
        text_config={
            **both,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": layers,
            "max_position_embeddings": 96,
            "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**both, "num_hidden_layers": 2, "image_size": 12, "patch_size": 4},
    )


def blip_processor() -> BlipProcessor:
    return BlipProcessor(BlipImageProcessorPil(size={"height": 12, "width": 12}), tokenizers.bert())


def blip_vqa(seed: int) -> Case:
    processor = blip_processor()
    hf = shaken(BlipForQuestionAnswering(blip_config(processor.tokenizer)), seed)
    start = hf.config.text_config.bos_token_id
    return EncoderDecoder("blip-vqa", hf, processor, start=start)


def blip_captioning(seed: int) -> Case:
    processor = blip_processor()
    hf = shaken(BlipForConditionalGeneration(blip_config(processor.tokenizer)), seed)
    return Captioning("blip-captioning", hf, processor, start=hf.config.text_config.bos_token_id)


def llava(seed: int) -> Case:
    tokenizer = tokenizers.llama("<image>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=clip(),
        text_config=words(tokenizer, model_type="llama"),
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=templates.LLAVA,
    )
    hf = shaken(LlavaForConditionalGeneration(config), seed)
    return Chat("llava", hf, processor, image=image)


def llava_next(name: str, tokenizer: Any, template: str, language: Mapping[str, Any]):
    def make(seed: int) -> Case:
        made = tokenizer()
        image = made.convert_tokens_to_ids("<image>")
        config = LlavaNextConfig(
            text_config=words(made, **language),
            vision_config=clip(),
            image_token_index=image,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, image_grid_pinpoints=PINPOINTS
        )
        processor = LlavaNextProcessor(
            images,
            made,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
        hf = shaken(LlavaNextForConditionalGeneration(config), seed)
        return Chat(name, hf, processor, image=image)

    return make


GRANITE = {
    "model_type": "granite",
    "head_dim": 4,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 1.7,
    "logits_scaling": 1.3,
}


def gemma3(seed: int) -> Case:
    tokenizer = tokenizers.gemma(
        "<start_of_turn>",
        "<end_of_turn>",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    image = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    config = Gemma3Config(
        text_config=words(
            tokenizer,
            sliding_window=8,
            query_pre_attn_scalar=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=siglip(16),
        mm_tokens_per_image=4,
        image_token_id=image,
        image_token_index=image,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer,
        image_seq_length=4,
        chat_template=templates.GEMMA3,
    )
    return Chat("gemma3", shaken(Gemma3ForConditionalGeneration(config), seed), processor, image=image)


def paligemma(name: str, language: Mapping[str, Any]) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        images = SiglipImageProcessorPil(size={"height": 12, "width": 12})
        images.image_seq_length = 9
        processor = PaliGemmaProcessor(images, tokenizers.gemma("<image>"))
        image = processor.image_token_id
        config = PaliGemmaConfig(
            text_config=words(processor.tokenizer, **language),
            vision_config=siglip(),
            image_token_index=image,
            image_token_id=image,
            projection_dim=16,
            num_image_tokens=9,
        )
        hf = shaken(PaliGemmaForConditionalGeneration(config), seed)
        return PaliGemma(name, hf, processor, image=image)

    return make


GEMMA2 = {
    "model_type": "gemma2",
    "query_pre_attn_scalar": 6,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]


def mllama(seed: int) -> Case:
    tokenizer = tokenizers.llama3("<|image|>", "<|python_tag|>")
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    config = MllamaConfig(
        text_config=words(
            tokenizer,
            num_hidden_layers=4,
            cross_attention_layers=[1, 3],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
        | {"head_dim": 4},
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
            "supported_aspect_ratios": RATIOS,
        },
        image_token_index=image,
    )
    processor = MllamaProcessor(
        MllamaImageProcessorPil(size={"height": 8, "width": 8}, max_image_tiles=4),
        tokenizer,
        chat_template=templates.LLAMA3,
    )
    hf = shaken(MllamaForConditionalGeneration(config), seed)
    return Chat("mllama", hf, processor, image=image)


def blip2(name: str, tokenizer: Any, language: Any, kind: Any = Single) -> Callable[[int], Case]:
    def make(seed: int) -> Case:
        made = tokenizer("<image>")
        image = made.convert_tokens_to_ids("<image>")
        parts = blip2_parts({**language(len(made)), **numbers(made), "max_position_embeddings": 96})
        parts |= {"image_token_index": image, "image_token_id": image}
        images = BlipImageProcessorPil(size={"height": 12, "width": 12})
        made.image_token = tokenizers.AddedToken("<image>", normalized=False, special=True)
        if name.startswith("blip2"):
            hf = Blip2ForConditionalGeneration(Blip2Config(**parts))
            processor = Blip2Processor(images, made, num_query_tokens=5)
        else:
            reader = tokenizers.bert()
            parts["qformer_config"]["vocab_size"] = len(reader)
            hf = InstructBlipForConditionalGeneration(InstructBlipConfig(**parts))
            processor = InstructBlipProcessor(images, made, qformer_tokenizer=reader, num_query_tokens=5)
        return kind(name, shaken(hf, seed), processor, image=image)

    return make


def vicuna(many: int) -> dict[str, Any]:
    return text(many, model_type="llama")


MAKERS: dict[str, Callable[[int], Case]] = {
    "blip-vqa": blip_vqa,
    "blip-captioning": blip_captioning,
    "llava": llava,
    "llava-next-vicuna": llava_next(
        "llava-next-vicuna", lambda: tokenizers.llama("<image>"), templates.VICUNA, {"model_type": "llama"}
    ),
    "llava-next-mistral": llava_next(
        "llava-next-mistral",
        lambda: tokenizers.llama("<image>", legacy=False),
        templates.MISTRAL,
        {"model_type": "mistral", "sliding_window": None},
    ),
    "llava-next-granite": llava_next(
        "llava-next-granite",
        lambda: tokenizers.smol("<image>", "<end_of_utterance>"),
        templates.GRANITE,
        GRANITE,
    ),
    "blip2-opt": blip2("blip2-opt", tokenizers.opt, opt),
    "blip2-t5": blip2("blip2-t5", tokenizers.t5, t5, EncoderDecoder),
    "instructblip-vicuna": blip2("instructblip-vicuna", tokenizers.llama, vicuna),
    "instructblip-t5": blip2("instructblip-t5", tokenizers.t5, t5, EncoderDecoder),
    "gemma3": gemma3,
    "paligemma": paligemma("paligemma", {"model_type": "gemma"}),
    "paligemma2": paligemma("paligemma2", GEMMA2),
    "mllama": mllama,
}

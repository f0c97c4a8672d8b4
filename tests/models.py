"""Small random models of the real classes, made in memory."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmscope.data.example import Example, find_roles
from vlmscope.runs.model import Model
from vlmscope.studies.run_folder import Run
from vlmscope.studies.sweep import into_folder, swept
from vlmscope.studies.workers.worker import Alone

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] is this a an the circle square star red blue green "
    "yellow dark or ? . person feeling happy sad what color un ##happy ##ly"
).split()


def blip_processor(size: int = 12) -> BlipProcessor:
    vocab = {word: i for i, word in enumerate(WORDS)}
    images = BlipImageProcessorPil(size={"height": size, "width": size})
    return BlipProcessor(images, BertTokenizer(vocab=vocab))


def blip(
    *,
    layers: int = 2,
    heads: int = 2,
    width: int = 8,
    vision_heads: int = 2,
    vision_layers: int = 2,
    size: int = 12,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Model:
    """A BLIP-VQA with random weights, large enough to make every head count."""
    torch.manual_seed(seed)
    config = BlipConfig(
        text_config={
            "vocab_size": len(WORDS),
            "hidden_size": width,
            "intermediate_size": 2 * width + 1,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 24,
            "bos_token_id": WORDS.index("[DEC]"),
            "sep_token_id": WORDS.index("[SEP]"),
            "eos_token_id": WORDS.index("[SEP]"),
            "pad_token_id": 0,
            "initializer_range": 0.5,
        },
        vision_config={
            "hidden_size": width,  # the answer decoder wants the two to be equal
            "intermediate_size": 2 * width + 1,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "image_size": size,
            "patch_size": 4,
            "initializer_range": 0.5,
        },
        initializer_range=0.5,
    )
    hf = BlipForQuestionAnswering(config).to(dtype)
    return Model(hf, blip_processor(size), "tiny-blip")


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def words_tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """Whole words, with the special tokens that a family wants, some as attributes by name."""
    own = ["<pad>", "<unk>", "<s>", "</s>", *special]
    words = [w for w in WORDS if not w.startswith(("[", "##"))] + ["user", "assistant", ":", "ly", "happily"]
    vocab = {token: n for n, token in enumerate(dict.fromkeys([*own, *words]))}
    made = Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named or list(special),
        padding_side="left",
    )


def llava(
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    size: int = 12,
    feature_layer: int = -2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Model:
    """A LLaVA 1.5 with random weights; queries share keys, the last vision block is not used."""
    torch.manual_seed(seed)
    tokenizer = words_tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=17,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=size,
        patch_size=4,
        projection_dim=8,
        initializer_range=0.5,
        initializer_factor=25.0,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width + 1,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
    )
    hf = LlavaForConditionalGeneration(config).to(dtype)
    side = {"height": size, "width": size}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return Model(hf, processor, "tiny-llava")


def picture(seed: int, size: int = 12) -> Image.Image:
    noise = random.Random(seed)
    return Image.frombytes("RGB", (size, size), noise.randbytes(3 * size * size))


def example(prompt: str = "is this circle red or blue ?", **changes: object) -> Example:
    words = {"answer": "red", "foil": "blue", "noun": "circle"}
    fields = {
        "id": "one",
        "clean_image": picture(1),
        "corrupt_image": picture(2),
        "clean_prompt": prompt,
        "corrupt_prompt": prompt.replace("red", "green").replace("blue", "yellow"),
        "answer": "red",
        "foil": "blue",
        "roles": find_roles(prompt, words),
        **changes,
    }
    return Example(**fields)


def alone(model: Model, examples: Sequence[Example]) -> Alone:
    """This process, as the commands use it."""
    return Alone(SimpleNamespace(load=lambda: model, examples=lambda: examples))


def sweep_to(out: str | os.PathLike[str], *given: Any, **options: Any) -> Run:
    """A sweep into a run folder, with all that a command can ask for."""
    return into_folder(swept(*given, **options), out)

"""Small random models of the real classes, made in memory."""

from __future__ import annotations

import random

import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from vlmscope.example import Example, find_roles
from vlmscope.model import Model

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

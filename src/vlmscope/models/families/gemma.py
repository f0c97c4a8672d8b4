"""Gemma 3 and PaliGemma: SigLIP's vision tower and a Gemma decoder.

Gemma 3 lets image tokens see each other both ways, PaliGemma all of image and prompt; the engine
reads both off the model's own attention masks (`suffix.starts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import Gemma3ForConditionalGeneration, PaliGemmaForConditionalGeneration

from vlmscope.layout import Layout
from vlmscope.models.families import causal, chat
from vlmscope.models.towers import CLIP, patches


def vision_layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Patches in rows, without a class token."""
    return patches(tensors["pixel_values"], hf.config.vision_config.patch_size, class_token=False)


def written(processor: Any, prompt: str, images: int = 1) -> tuple[str, int]:
    """PaliGemma's placeholders and the prompt; its processor writes the start token between them."""
    return chat.written(processor, prompt, images, between="")


def tokenized(processor: Any, text: str) -> chat.Tokens:
    """With the start token behind the placeholders and the line break at the end."""
    mark, begin = str(processor.image_token), str(processor.tokenizer.bos_token)
    cut = text.rfind(mark) + len(mark) if mark in text else 0
    found = chat.tokenized(processor, f"{text[:cut]}{begin}{text[cut:]}\n")
    longer = len(begin)
    return [
        (token, (a, b) if b <= cut else (max(a - longer, cut), max(b - longer, cut)))
        for token, (a, b) in found
    ]


def options(processor: Any, prompt: str, answer: str, images: int = 1) -> list[int]:
    """The tokens that PaliGemma's processor makes of `suffix=answer`: tokenised by themselves."""
    tokenizer = processor.tokenizer
    return list(tokenizer(f"{answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"])


GEMMA3 = causal.family(
    "Gemma 3",
    Gemma3ForConditionalGeneration,
    vision=CLIP,
    decoder=causal.llama(),
    cells=causal.square,
    layout=vision_layout,
)
PALIGEMMA = replace(
    causal.family(
        "PaliGemma",
        PaliGemmaForConditionalGeneration,
        vision=CLIP,
        decoder=causal.llama(),
        cells=causal.square,
        layout=vision_layout,
        kind=1,
        capped=True,
        write=written,
        tokens=tokenized,
    ),
    options=options,
)

FAMILIES = (GEMMA3, PALIGEMMA)

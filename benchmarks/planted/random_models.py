"""Small random models of the real classes: BLIP-VQA (form C) and LLaVA 1.5 (form D)."""

from __future__ import annotations

import tokenizers
import torch
from pictures import COLORS, KINDS, PATCH, SIDE
from tokenizers import Tokenizer
from torch import nn
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

from vlmscope.runs.model import Model

WIDTH, HEADS, NEURONS = 64, 8, 128
LAYERS = {"C": 3, "D": 4}
"""Of the question encoder and of the answer decoder of form C; of the decoder of form D."""
WORDS = [
    "is",
    "the",
    *KINDS,
    *COLORS,
    "or",
    "?",
    "this",
    "a",
    "person",
    "what",
    "star",
    "dark",
    "happy",
    "sad",
]
PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def random_model(form: str, noise: float, seed: int) -> Model:
    """A model whose every matrix is random, `noise` times as large as keeps the size of what it is given."""
    torch.manual_seed(seed)
    model = _blip() if form == "C" else _llava()
    with torch.no_grad():
        for module in model.hf.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=noise * module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, nn.Conv2d):  # patches: these are seen well in all models
                module.weight.normal_(std=module.weight[0].numel() ** -0.5 * 2)
        for name, weight in model.hf.named_parameters():
            if "projector" in name and weight.ndim > 1:  # as large as the words beside which they stand
                weight.normal_(std=2 * WIDTH**-0.5)
            if "position_embedding" in name or "class_embedding" in name:
                weight.normal_(std=0.5)
        head = model.hf.text_decoder.cls.predictions.decoder if form == "C" else model.hf.lm_head
        head.weight.copy_(torch.randn(head.weight.shape) * WIDTH**-0.5)
    model.hf.eval()
    return model


def _blip() -> Model:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    side = SIDE * PATCH
    config = BlipConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": WIDTH,
            "intermediate_size": NEURONS,
            "num_hidden_layers": LAYERS["C"],
            "num_attention_heads": HEADS,
            "max_position_embeddings": 24,
            "bos_token_id": words.index("[DEC]"),
            "sep_token_id": words.index("[SEP]"),
            "eos_token_id": words.index("[SEP]"),
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": NEURONS,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": side,
            "patch_size": PATCH,
        },
    )
    hf = BlipForQuestionAnswering(config)
    images = BlipImageProcessorPil(size={"height": side, "width": side}, **PLAIN)
    vocab = {word: n for n, word in enumerate(words)}
    return Model(hf, BlipProcessor(images, BertTokenizer(vocab=vocab)), "planted-C")


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def _llava() -> Model:
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", *WORDS, "assistant"]
    vocab = {word: n for n, word in enumerate(words)}
    made = Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
        padding_side="left",
    )
    side = SIDE * PATCH
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS["D"],
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    hf = LlavaForConditionalGeneration(config)
    size = {"height": side, "width": side}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, **PLAIN),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return Model(hf, processor, "planted-D")

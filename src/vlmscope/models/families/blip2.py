"""BLIP-2 and InstructBLIP: a vision tower, a Q-Former that reads it, and a language model.

The language model is a causal decoder (OPT, Vicuna) or an encoder and a decoder (T5); which of them decides
the table. The Q-Former's positions are its queries: only these have cross-attention and an MLP of
their own. Its output is projected to the language model's width; OPT adds positions to that before its
first block. Its blocks are post-norm, as BLIP's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration, PreTrainedModel

from vlmscope.data.example import Span
from vlmscope.errors import ExampleError
from vlmscope.layout import Layout
from vlmscope.models.families import causal, chat
from vlmscope.models.inputs import Inputs
from vlmscope.models.towers import CLIP, Family, Tower, one_picture, patches

VISION = replace(CLIP, blocks="vision_model.encoder.layers", attn="self_attn.projection", flow="plain")
QFORMER = Tower(
    blocks="qformer.encoder.layer",
    config="qformer_config",
    attn="attention.output.dense",
    cross="crossattention.output.dense",
    mlp="output_query.dense",
    normed=True,
    middle=("crossattention.output", "attention.output"),
    reads="vision",
    output="language_projection",
    flow="plain",
    attention={"attn": "attention.attention", "cross": "crossattention.attention"},
)
ASKED = replace(QFORMER, attention={"cross": "crossattention.attention"})
"""InstructBLIP's: its queries also look at the prompt, which has no positions in this tower, so what its
self-attention pays is not all shown."""
OPT = Tower(
    blocks="language_model.model.decoder.layers",
    config="text_config",
    attn="self_attn.out_proj",
    mlp="fc2",
    flow="suffix",
    attention={"attn": "self_attn"},
    norms={"attn": ("self_attn_layer_norm",), "mlp": ("final_layer_norm",)},
)
T5_ENCODER = Tower(
    blocks="language_model.encoder.block",
    config="text_config",
    attn="layer.0.SelfAttention.o",
    mlp="layer.1.DenseReluDense.wo",
    gate="layer.1.DenseReluDense.act",
    heads="num_heads",
    flow="plain",
    attention={"attn": "layer.0.SelfAttention"},
    norms={"attn": ("layer.0.layer_norm",), "mlp": ("layer.1.layer_norm",)},
)
T5_DECODER = replace(
    T5_ENCODER,
    blocks="language_model.decoder.block",
    cross="layer.1.EncDecAttention.o",
    mlp="layer.2.DenseReluDense.wo",
    gate="layer.2.DenseReluDense.act",
    reads="encoder",
    attention={"attn": "layer.0.SelfAttention", "cross": "layer.1.EncDecAttention"},
    norms={"attn": ("layer.0.layer_norm",), "cross": ("layer.1.layer_norm",), "mlp": ("layer.2.layer_norm",)},
)


def written(processor: Any, prompt: str, images: int = 1) -> tuple[str, int]:
    """The processor itself puts the image's tokens before the prompt."""
    one_picture(images)
    mark = str(processor.image_token)
    if mark in prompt:
        raise ExampleError(f"this model's prompts have no placeholder; leave '{mark}' out")
    return prompt, 0


def vision_layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Patches in rows, behind the class token."""
    return patches(tensors["pixel_values"], hf.config.vision_config.patch_size, class_token=True)


def _queries(hf: Any) -> Layout:
    return Layout(tuple(f"query {n}" for n in range(hf.config.num_query_tokens)))


def encode(*arguments: Any, **keywords: Any) -> Inputs:
    """As for other decoders, and the queries."""
    inputs = causal.encode(*arguments, **keywords)
    hf = arguments[2]
    towers = {"vision": inputs.layout["vision"], "qformer": _queries(hf), "decoder": inputs.layout["decoder"]}
    return replace(inputs, layout=towers)


def encode_t5(
    hf: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    prompt: str,
    roles: Mapping[str, Span],
    prefix: Sequence[int],
) -> Inputs:
    """The encoder reads image and prompt; the decoder begins with its start token."""
    inputs = causal.encode(
        causal.no_cells, vision_layout, hf, processor, pictures, prompt, roles, [], write=written
    )
    start = [hf.config.text_config.decoder_start_token_id, *prefix]
    decoder = Layout(tuple(processor.tokenizer.convert_ids_to_tokens(start)), tuple(range(len(start))))
    return Inputs(
        {**inputs.tensors, "decoder_input_ids": torch.tensor([start])},
        {
            "vision": inputs.layout["vision"],
            "qformer": _queries(hf),
            "encoder": inputs.layout["decoder"],
            "decoder": decoder,
        },
    )


def options_t5(processor: Any, prompt: str, answer: str, images: int = 1) -> list[int]:
    """The decoder starts anew, so the prompt does not matter."""
    tokenizer = processor.tokenizer
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def generate_t5(hf: Any, inputs: Inputs, **options: object) -> Int[Tensor, "pos"]:
    """What the model says, by its own greedy generation, without the start token."""
    tensors = {k: v for k, v in inputs.tensors.items() if k != "decoder_input_ids"}
    return hf.generate(**tensors, do_sample=False, num_beams=1, **options)[0, 1:]


def leave_t5(hf: Any, tower: str, hidden: Float[Tensor, "rows pos width"]) -> Float[Tensor, "rows pos width"]:
    """The decoder ends with a norm."""
    return hf.language_model.decoder.final_layer_norm(hidden)


def finish_t5(
    hf: Any, inputs: Inputs, tower: str, output: Float[Tensor, "rows pos width"], keep: int
) -> Float[Tensor, "rows keep vocabulary"]:
    """What T5 does behind its decoder: those that share the embedding scale what it reads."""
    output, model = output[:, -keep:], hf.language_model
    return model.lm_head(output * model.model_dim**-0.5 if model.config.scale_decoder_outputs else output)


def _decoder_only(
    name: str,
    model: type[PreTrainedModel],
    variant: str,
    decoder: Tower,
    norm: str,
    qformer: Tower = QFORMER,
    image: str | None = None,
) -> Family:
    base = causal.family(
        name,
        model,
        vision=VISION,
        decoder=decoder,
        cells=causal.no_cells,
        layout=vision_layout,
        norm=norm,
        head="language_model.lm_head",
    )
    return replace(
        base,
        variant=variant,
        image=image,
        towers={"vision": VISION, "qformer": qformer, "decoder": decoder},
        encode=partial(encode, causal.no_cells, vision_layout, write=written),
        options=partial(chat.options, write=written),
    )


def _t5(name: str, model: type[PreTrainedModel], qformer: Tower = QFORMER) -> Family:
    base = _decoder_only(name, model, "t5", OPT, "")
    return replace(
        base,
        towers={"vision": VISION, "qformer": qformer, "encoder": T5_ENCODER, "decoder": T5_DECODER},
        head="language_model.lm_head",
        norm="language_model.decoder.final_layer_norm",
        leave=leave_t5,
        finish=finish_t5,
        encode=encode_t5,
        generate=generate_t5,
        options=options_t5,
        keywords={"use_cache": False},
    )


LLAMA = causal.llama("language_model.model.layers")
FAMILIES = (
    _decoder_only(
        "BLIP-2",
        Blip2ForConditionalGeneration,
        "opt",
        OPT,
        "language_model.model.decoder.final_layer_norm",
        image="qformer",
    ),
    _t5("BLIP-2", Blip2ForConditionalGeneration),
    _decoder_only(
        "InstructBLIP",
        InstructBlipForConditionalGeneration,
        "llama",
        LLAMA,
        "language_model.model.norm",
        ASKED,
    ),
    _t5("InstructBLIP", InstructBlipForConditionalGeneration, ASKED),
)

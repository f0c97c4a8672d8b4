"""BLIP: a vision tower, a question encoder and an answer decoder.

The question encoder reads the image by cross-attention, the answer decoder reads the encoder's
output by cross-attention. Text blocks are post-norm: what `attn`, `cross` and `mlp` add to the
residual stream is the output of their dense layer, before the sum is normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import (
    BatchEncoding,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipProcessor,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)

from vlmscope.data.example import Span
from vlmscope.errors import ExampleError
from vlmscope.layout import Layout
from vlmscope.models.inputs import Inputs
from vlmscope.models.towers import CLIP, Family, Tower, one_picture, patches, sides


def _vision_layout(hf: PreTrainedModel, pixels: Tensor) -> Layout:
    return patches(pixels, hf.config.vision_config.patch_size, class_token=True)


def _text_layout(encoding: BatchEncoding, roles: Mapping[str, Span]) -> Layout:
    """Tokens of the prompt, and each role's tokens: those that overlap its characters."""
    tokens = encoding.tokens()
    spans = encoding["offset_mapping"]
    found = {
        role: tuple(i for i, (a, b) in enumerate(spans) if a < end and b > start)
        for role, (start, end) in roles.items()
    }
    everywhere = tuple(range(len(tokens)))
    own = {role: at for role, at in found.items() if at}
    return Layout(tuple(tokens), everywhere, own, behind=1)  # [SEP]


def _check_length(hf: PreTrainedModel, length: int, what: str = "the prompt") -> None:
    longest = hf.config.text_config.max_position_embeddings
    if length > longest:
        raise ExampleError(f"{what} has {length} tokens, the model takes at most {longest}; shorten it")


def encode(
    hf: BlipForQuestionAnswering,
    processor: BlipProcessor,
    images: Sequence[Image.Image],
    prompt: str,
    roles: Mapping[str, Span],
    prefix: Sequence[int],
) -> Inputs:
    """The tensors of one run, as `BlipProcessor` makes them; the decoder gets its start token."""
    one_picture(len(images))
    pixels = processor.image_processor(images=images[0], return_tensors="pt")["pixel_values"]
    encoding = processor.tokenizer(prompt, return_offsets_mapping=True)
    ids = torch.tensor([encoding["input_ids"]])
    _check_length(hf, ids.shape[1])
    start = [hf.decoder_start_token_id, *prefix]
    _check_length(hf, len(start), "what answer and foil share, or the answer,")
    return Inputs(
        {
            "pixel_values": pixels,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": torch.tensor([start]),
        },
        {
            "vision": _vision_layout(hf, pixels),
            "encoder": _text_layout(encoding, roles),
            "decoder": Layout(
                tuple(processor.tokenizer.convert_ids_to_tokens(start)), tuple(range(len(start)))
            ),
        },
    )


def blank(hf: BlipForQuestionAnswering) -> Inputs:
    """A picture of one patch and a prompt of two tokens."""
    pixels = torch.zeros(1, 3, *sides(hf.config.vision_config.patch_size))
    ids = torch.zeros(1, 2, dtype=torch.long)
    tensors = {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :1],
    }
    text = Layout(("", ""), (0, 1))
    layout = {"vision": _vision_layout(hf, pixels), "encoder": text, "decoder": Layout(("",), (0,))}
    return Inputs(tensors, layout)


def leave(
    hf: PreTrainedModel, tower: str, hidden: Float[Tensor, "rows pos width"]
) -> Float[Tensor, "rows pos width"]:
    """The vision tower ends with a norm, the text towers with their last block."""
    return hf.vision_model.post_layernorm(hidden) if tower == "vision" else hidden


def finish(
    hf: BlipForQuestionAnswering,
    inputs: Inputs,
    tower: str,
    output: Float[Tensor, "rows pos width"],
    keep: int,
) -> Float[Tensor, "rows keep vocabulary"]:
    """What `BlipForQuestionAnswering.forward` does after a tower, for many rows at once."""
    rows = output.shape[0]
    tensors = inputs.tensors
    mask = tensors["attention_mask"].expand(rows, -1)
    if tower == "vision":
        output = hf.text_encoder(
            input_ids=tensors["input_ids"].expand(rows, -1),
            attention_mask=mask,
            encoder_hidden_states=output,
            encoder_attention_mask=torch.ones(output.shape[:2], dtype=torch.long),
        ).last_hidden_state
    if tower == "decoder":
        return hf.text_decoder.cls(output[:, -keep:])
    return hf.text_decoder(
        input_ids=tensors["decoder_input_ids"].expand(rows, -1),
        encoder_hidden_states=output,
        encoder_attention_mask=mask,
        logits_to_keep=keep,
        use_cache=False,
    ).logits[:, -keep:]


def generate(hf: BlipForQuestionAnswering, inputs: Inputs, **options: object) -> Int[Tensor, "pos"]:
    """The answer's token ids, by the model's own greedy generation, without the start token."""
    tensors = {k: v for k, v in inputs.tensors.items() if k != "decoder_input_ids"}
    return hf.generate(**tensors, do_sample=False, num_beams=1, **options)[0, 1:]


def options(processor: BlipProcessor, prompt: str, answer: str, images: int = 1) -> list[int]:
    """The answer decoder starts anew, so the prompt does not matter."""
    tokenizer = processor.tokenizer
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]


def cache() -> EncoderDecoderCache:
    """Keeps the image's keys and values over calls of a `crossattention` module."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _text(path: str, reads: str) -> Tower:
    return Tower(
        blocks=path,
        config="text_config",
        attn="attention.output.dense",
        cross="crossattention.output.dense",
        mlp="output.dense",
        normed=True,
        middle=("crossattention.output",),
        fold="crossattention",
        attention={"attn": "attention.self", "cross": "crossattention.self"},
        reads=reads,
    )


VQA = Family(
    name="BLIP-VQA",
    architecture="BlipForQuestionAnswering",
    model=BlipForQuestionAnswering,
    processor=BlipProcessor,
    towers={
        "vision": replace(
            CLIP, blocks="vision_model.encoder.layers", attn="self_attn.projection", output="vision_model"
        ),
        "encoder": _text("text_encoder.encoder.layer", reads="vision"),
        "decoder": _text("text_decoder.bert.encoder.layer", reads="encoder"),
    },
    logits="text_decoder",
    encode=encode,
    blank=blank,
    leave=leave,
    finish=finish,
    generate=generate,
    cache=cache,
    options=options,
    head="text_decoder.cls.predictions.decoder",
    image="vision",
)


# -- captions ------------------------------------------------------------------------------------


def encode_caption(
    hf: BlipForConditionalGeneration,
    processor: BlipProcessor,
    images: Sequence[Image.Image],
    prompt: str,
    roles: Mapping[str, Span],
    prefix: Sequence[int],
) -> Inputs:
    """The decoder reads the prompt, which the caption goes on, behind its own start token."""
    one_picture(len(images))
    pixels = processor.image_processor(images=images[0], return_tensors="pt")["pixel_values"]
    encoding = processor.tokenizer(prompt, return_offsets_mapping=True)
    whole = _text_layout(encoding, roles)
    ids = [hf.config.text_config.bos_token_id, *encoding["input_ids"][1:-1], *prefix]
    _check_length(hf, len(ids))
    tokens = tuple(processor.tokenizer.convert_ids_to_tokens(ids))
    tensors = {
        "pixel_values": pixels,
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    decoder = Layout(tokens, tuple(range(len(ids))), whole.roles)
    return Inputs(tensors, {"vision": _vision_layout(hf, pixels), "decoder": decoder})


def blank_caption(hf: BlipForConditionalGeneration) -> Inputs:
    """A picture of one patch and a prompt of two tokens."""
    pixels = torch.zeros(1, 3, *sides(hf.config.vision_config.patch_size))
    ids = torch.zeros(1, 2, dtype=torch.long)
    tensors = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Inputs(tensors, {"vision": _vision_layout(hf, pixels), "decoder": Layout(("", ""), (0, 1))})


def finish_caption(
    hf: BlipForConditionalGeneration,
    inputs: Inputs,
    tower: str,
    output: Float[Tensor, "rows pos width"],
    keep: int,
) -> Float[Tensor, "rows keep vocabulary"]:
    """What `BlipForConditionalGeneration.forward` does after a tower, for many rows at once."""
    if tower == "decoder":
        return hf.text_decoder.cls(output[:, -keep:])
    rows = output.shape[0]
    return hf.text_decoder(
        input_ids=inputs.tensors["input_ids"].expand(rows, -1),
        attention_mask=inputs.tensors["attention_mask"].expand(rows, -1),
        encoder_hidden_states=output,
        logits_to_keep=keep,
        use_cache=False,
    ).logits[:, -keep:]


def generate_caption(
    hf: BlipForConditionalGeneration, inputs: Inputs, **options: object
) -> Int[Tensor, "pos"]:
    """What follows the prompt, by the model's own greedy generation, which drops the last token."""
    tensors = {
        name: torch.cat([inputs.tensors[name], inputs.tensors[name][:, -1:]], 1)
        for name in ("input_ids", "attention_mask")
    }
    found = hf.generate(
        pixel_values=inputs.tensors["pixel_values"], **tensors, do_sample=False, num_beams=1, **options
    )
    return found[0, inputs.tensors["input_ids"].shape[1] :]


CAPTION = replace(
    VQA,
    name="BLIP captioning",
    architecture="BlipForConditionalGeneration",
    model=BlipForConditionalGeneration,
    towers={
        "vision": VQA.towers["vision"],
        "decoder": _text("text_decoder.bert.encoder.layer", reads="vision"),
    },
    encode=encode_caption,
    blank=blank_caption,
    finish=finish_caption,
    generate=generate_caption,
)

FAMILIES = (VQA, CAPTION)

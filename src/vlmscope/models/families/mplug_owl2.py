"""mPLUG-Owl2 (arXiv 2311.04257): a vision tower, an abstractor, and LLaMA with modules per modality.

transformers has no code for it, so `vlmscope.load` refuses its checkpoints. Load one with the code
published with it (github.com/X-PLUG/mPLUG-Owl, folder mPLUG-Owl2, which asks for transformers 4.31 and so
has to be ported to the one installed here) and use `vlmscope.Model(hf, processor)`. The processor is any
object with a `tokenizer` that gives offsets (LLaMA's) and an `image_processor` (CLIP's); the published code
loads the two by themselves. `Model.answer` uses the model's `generate`, all else its forward alone.

What is written here follows these files of that folder: `modeling_mplug_owl2.py` (`<|image|>` is one token,
-200, in whose place the model puts what the abstractor says; pictures go by `images`), `mm_utils.py` (each
side of it is tokenised on its own; pictures are squeezed to squares), `conversation.py` (the prompt),
`modeling_llama2.py` and `visual_encoder.py` (the modules). Norms, keys and values of the decoder are a
`MultiwayNetwork`, one module for text and one for the image; what sites name is shared by both.

The abstractor is the tower `qformer`. Its queries attend to each other and to the image in one softmax,
which is called `cross` here as in its modules. A block of it adds to its normed input, so `resid_pre` is not
the residual stream that its sublayers add to. Attention goes through no interface of transformers, so it
is not offered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlmscope.data.example import Span
from vlmscope.errors import ExampleError
from vlmscope.layout import Layout
from vlmscope.models.families import causal, chat
from vlmscope.models.inputs import Inputs
from vlmscope.models.towers import Family, Tower, behind, one_picture, patches

MARK = "<|image|>"
IMAGE = -200
"""The placeholder in a prompt, and its token, which is in no vocabulary."""


def written(processor: Any, prompt: str, images: int = 1) -> tuple[str, int]:
    """The prompt in the published template, and where it begins; as it is if it holds `<|image|>`."""
    one_picture(images)
    if prompt.count(MARK) > 1:
        raise ExampleError(
            f"the prompt has {prompt.count(MARK)} placeholders '{MARK}' and there is one image; leave one"
        )
    if MARK in prompt:
        return prompt, 0
    before = f"USER: {MARK}"
    return f"{before}{prompt} ASSISTANT:", len(before)


def _tokens(tokenizer: Any, text: str) -> list[tuple[int, Span]]:
    """Token ids and the characters that each stands for; only the first side keeps its start token."""
    found: list[tuple[int, Span]] = []
    begin = 0
    for side in text.split(MARK):
        if begin:
            found.append((IMAGE, (begin - len(MARK), begin)))
        if side:
            encoding = tokenizer(side, return_offsets_mapping=True)
            spans = [(begin + a, begin + b) for a, b in encoding["offset_mapping"]]
            own = list(zip(encoding["input_ids"], spans, strict=True))
            again = bool(found) and found[0][0] == own[0][0] == tokenizer.bos_token_id
            found += own[1:] if again else own
        begin += len(side) + len(MARK)
    return found


def encode(
    hf: Any,
    processor: Any,
    images: Sequence[Image.Image],
    prompt: str,
    roles: Mapping[str, Span],
    prefix: Sequence[int],
) -> Inputs:
    """The tensors of one run; the decoder has more positions than tokens, where the image is."""
    text, start = written(processor, prompt, len(images))
    tokens = _tokens(processor.tokenizer, text)
    after = behind([span for _, span in tokens], start + len(prompt))
    tokens += [(token, (len(text), len(text))) for token in prefix]
    ids = torch.tensor([[token for token, _ in tokens]])
    pixels = _pixels(hf, processor, images[0])
    queries = tuple(f"query {n}" for n in range(hf.model.visual_abstractor.query_embeds.shape[1]))
    names: list[str] = []
    shown: tuple[int, ...] = ()
    found = defaultdict(list)
    for token, (a, b) in tokens:
        if token == IMAGE:
            shown = tuple(range(len(names), len(names) + len(queries) + 1))
            names += [*queries, "vit_eos"]
            continue
        for role, (first, last) in roles.items():
            if a < start + last and b > start + first:
                found[role].append(len(names))
        names.append(processor.tokenizer.convert_ids_to_tokens(token))
    decoder = Layout(
        tuple(names),
        tuple(n for n in range(len(names)) if n not in shown),
        {role: tuple(at) for role, at in found.items()},
        image=shown,
        behind=after,
    )
    return Inputs(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "images": pixels},
        {"vision": _patches(hf, pixels), "qformer": Layout(queries), "decoder": decoder},
    )


def _pixels(hf: Any, processor: Any, image: Image.Image) -> Tensor:
    """Squeezed to a square, which loses nothing to the image processor's crop; in the model's type."""
    side = max(image.size)
    pixels = processor.image_processor(image.resize((side, side)), return_tensors="pt")
    return torch.as_tensor(pixels["pixel_values"], dtype=hf.dtype)


def _patches(hf: Any, pixels: Tensor) -> Layout:
    embeddings = hf.model.vision_model.embeddings
    return patches(pixels, embeddings.patch_size, embeddings.cls_token is not None)


def leave(hf: Any, tower: str, hidden: Float[Tensor, "rows pos width"]) -> Float[Tensor, "rows pos width"]:
    """The decoder ends with a norm, the same for text and image."""
    return hf.model.norm(hidden)


def finish(
    hf: Any, inputs: Inputs, tower: str, output: Float[Tensor, "rows pos width"], keep: int
) -> Float[Tensor, "rows keep vocabulary"]:
    return hf.lm_head(output[:, -keep:])


MPLUG_OWL2 = Family(
    name="mPLUG-Owl2",
    architecture="MPLUGOwl2LlamaForCausalLM",
    model=None,
    processor=None,
    towers={
        "vision": Tower(
            blocks="model.vision_model.encoder.layers",
            config="visual_config.visual_model",
            attn="self_attn.dense",
            mlp="mlp.fc2",
            flow="plain",
        ),
        "qformer": Tower(
            blocks="model.visual_abstractor.encoder.layers",
            config="visual_config.visual_abstractor",
            attn=None,
            cross="crossattention.output.out_proj",
            mlp="crossattention.output.mlp.w2",
            normed=True,
            reads="vision",
            flow="plain",
        ),
        "decoder": Tower(
            blocks="model.layers",
            config="",
            attn="self_attn.o_proj",
            mlp="mlp.down_proj",
            gate="mlp.act_fn",
            flow="plain",
        ),
    },
    logits="",
    encode=encode,
    blank=None,
    leave=leave,
    finish=finish,
    generate=causal.generate,
    cache=lambda: None,
    options=partial(chat.options, write=written),
    keywords={"use_cache": False},
    pixels="images",
    norm="model.norm",
)

FAMILIES = (MPLUG_OWL2,)

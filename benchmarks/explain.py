"""How fast exact maps of the picture are on LLaVA-1.5's layout, and all of `explain`, against full forwards.

    python benchmarks/explain.py [--threads 2] [--real] [--image photo.jpg] [--out FILE.json]

The model of `benchmarks/llava.py`: 576 image tokens, 16 decoder layers of width 1024, float32 on a CPU; with
`--real`, on a GPU, LLaVA-1.5-7B's own shape in bfloat16. Two pictures that differ in an object of 25 cells,
and a vision tower whose attention is weak, so that features are mostly of their own cell:

- the exact effect of each of the 576 cells on one word, the engine's two runs included, against one full
  forward of Hugging Face's model a cell, on a sample of them, half of it before and half after;
- the same from coarse to fine, and how much of the effects' mass (the sum of their sizes over all cells) is
  in the cells that it has examined one by one;
- `explain` of a photograph (of noise, if none is given): answer, maps, layers, heads, neurons, page.

The answers are compared as they are timed. The last line is JSON.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
import torch
from llava import BEFORE, IMAGE, build, main, pair_of, sync
from PIL import Image
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmscope.explanation import explain, maps
from vlmscope.explanation.said import Word
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.patching import engine
from vlmscope.patching.trace import Images
from vlmscope.runs.model import Model

SIDE, PATCH = 24, 14
OBJECT = (9, 6, 5, 5)
"""The first row and column of the object, and how many of each."""
PATCHES, SAMPLE, TOKENS, WEAK = 96, 4, 8, 0.2


def processor() -> LlavaProcessor:
    """LLaVA 1.5's own, but that its words are numbers."""
    vocabulary = {name: n for n, name in enumerate(("<unk>", "<s>", "</s>", "<pad>"))}
    vocabulary |= {f"w{n}": n for n in range(4, 31_999)} | {"<image>": 31_999}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=["<image>"], **special)
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LlavaProcessor(
        images,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


@torch.no_grad()
def scene_of(model: Model) -> Any:
    """What `maps.exact` reads: a picture, another that lacks the object, and the word that the model says."""
    clean = pair_of(model).clean
    pixels = clean.tensors["pixel_values"].clone()
    row, column, rows, columns = (PATCH * n for n in OBJECT)
    other = torch.randn(1, 3, rows, columns, generator=torch.Generator().manual_seed(2))
    pixels[..., row : row + rows, column : column + columns] = other.to(pixels)
    corrupt = Inputs({**clean.tensors, "pixel_values": pixels}, clean.layout)
    token = int(model.run(clean).argmax())
    pair = Pair(clean, corrupt, token, None)
    word = Word("", (0, 0), (0,))
    return SimpleNamespace(model=model, pair=pair, words=[word], first=0, at="features", images=Images())


@torch.inference_mode()
def features(model: Model, inputs: Inputs) -> torch.Tensor:
    """What the decoder reads of the picture, by a plain hook."""
    seen: list[torch.Tensor] = []
    layer = model.hf.model.language_model.layers[0]
    held = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0][0, BEFORE : BEFORE + IMAGE].clone()))
    model.hf(**inputs.tensors, use_cache=False, logits_to_keep=1)
    held.remove()
    return seen[0]


@torch.inference_mode()
def timed(model: Model, pair: Pair, other: torch.Tensor, cells: Sequence[int]) -> tuple[float, list[float]]:
    """The median of the seconds of one full forward a cell, and the word's log-probability in each."""
    seconds, found = [], []
    layer = model.hf.model.language_model.layers[0]
    for cell in cells:

        def put(module: Any, args: Any, at: int = cell) -> None:
            args[0][0, BEFORE + at] = other[at]

        sync(model)
        start = time.perf_counter()
        held = layer.register_forward_pre_hook(put)
        logits = model.hf(**pair.clean.tensors, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        held.remove()
        found.append(float(logits.log_softmax(-1)[pair.answer]))
        sync(model)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def every_cell(model: Model, said: Any) -> tuple[float, Any, float]:
    """The seconds for all cells, their effects, and the word's log-probability."""
    units = [maps.Unit(n // SIDE, n % SIDE, 1, 1) for n in range(IMAGE)]
    places = maps.positions(said.pair.clean.layout["decoder"], units)
    sync(model)
    start = time.perf_counter()
    sites = [maps.replaced(model, at) for at in places]
    patched = engine.patch(model, said.pair, sites, "noise", metric="logprob")
    found = maps.lost(patched.clean, patched.chunks, IMAGE)[:, 0]
    sync(model)
    return time.perf_counter() - start, found, float(patched.clean.tokens[0])


def measure(real: bool, image: Path | None) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bare = build(real, device)
    with torch.no_grad():
        for block in bare.blocks("vision"):
            block.self_attn.out_proj.weight *= WEAK  # type: ignore[operator, union-attr]
    model = Model(bare.hf, processor(), bare.name)
    result = exact_maps(model, scene_of(model), 0.1 if real else 2e-4)
    picture = Image.effect_noise((640, 480), 80).convert("RGB") if image is None else Image.open(image)
    start = time.perf_counter()
    found = explain(model, picture, "USER: <image> w10 w20 w30 ASSISTANT:", length=TOKENS)
    page = found.page()
    seconds = time.perf_counter() - start
    assert len(found.words) and found.cells["exact"].notna().all() and not found.about["lacking"]
    return {
        "benchmark": "explain",
        "model": f"{model.name}, random weights, {str(model.dtype).removeprefix('torch.')}",
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "torch": torch.__version__,
        **result,
        "explain_words": len(found.words),
        "explain_patches": found.about["patches"],
        "explain_seconds": seconds,
        "explain_page_megabytes": len(page.encode()) / 1e6,
    }


def exact_maps(model: Model, said: Any, tolerance: float) -> dict[str, Any]:
    other = features(model, said.pair.corrupt)
    row, column, rows, columns = OBJECT
    inside = [(row + r) * SIDE + column + c for r in range(rows) for c in range(columns)]
    sample = random.Random(0).sample(inside, SAMPLE // 2) + random.Random(0).sample(range(IMAGE), SAMPLE // 2)
    timed(model, said.pair, other, sample[:1])  # warms up
    before, one = timed(model, said.pair, other, sample[::2])
    seconds, effects, base = every_cell(model, said)
    start = time.perf_counter()
    some = maps.exact(said, "noise", PATCHES, hints=np.abs(maps.estimate(said, "noise")))
    sync(model)
    coarse = time.perf_counter() - start
    after, two = timed(model, said.pair, other, sample[1::2])
    by_cell = dict(zip(sample[::2] + sample[1::2], one + two, strict=True))
    error = max(abs(base - effects[n] - logprob) for n, logprob in by_cell.items())
    alone = {
        u.row * SIDE + u.column: e[0] for u, e in zip(some.units, some.effects, strict=True) if u.is_cell
    }
    error = max(error, *(abs(effects[n] - effect) for n, effect in alone.items()))
    assert error < tolerance, f"answers differ by {error}"
    sizes, full = np.abs(effects), (before + after) / 2
    assert sizes.max() > 100 * error, "the cells change the word"
    return {
        "cells": IMAGE,
        "forward_seconds": full,
        "exact_seconds": seconds,
        "times_plain": IMAGE * full / seconds,
        "coarse_seconds": coarse,
        "coarse_times_plain": IMAGE * full / coarse,
        "coarse_patches": some.patches,
        "coarse_cells_alone": len(alone),
        "mass_found": float(sizes[list(alone)].sum() / sizes.sum()),
        "mass_in_the_object": float(sizes[inside].sum() / sizes.sum()),
        "largest_difference": error,
        "largest_effect": float(sizes.max()),
    }


if __name__ == "__main__":
    main(measure, __doc__, with_image=True)

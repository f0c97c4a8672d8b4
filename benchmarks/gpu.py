"""What is to be measured on a GPU, in one call of under ten minutes.

    python benchmarks/gpu.py [--minutes 9] [--out benchmarks/results/NAME.json]
    python benchmarks/gpu.py --tiny

The shapes of LLaVA-1.5-7B and Qwen2.5-VL-7B with random weights in bfloat16, one pair of pictures each. Timed
are all heads at the last token, `resid` at the 19 tokens behind the image, and the heads of one layer of the
vision tower at all its positions, by

- the engine, with several sizes of batches (`BUDGETS`: what a batch may take beyond the weights);
- the *published* algorithm: three full forwards a site (clean, corrupt, patched);
- *plain*: one full forward a site with a hook, clean activations kept; on a sample, with which the engine's
  answers are compared;
- nnsight, where it is installed (heads of LLaVA).

`share_of_rate` is what the engine's multiplications, counted by torch, take of the rate that a large product
of matrices has on this card; `peak_gb` is torch's own count, the weights apart. What there was no time for
is in `left_out`. `--tiny` runs the same on small models in float32, on a CPU too: it says that this file
works, and nothing about speed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llava import Full, sweep, sync, timed
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vlmscope.layout import Layout
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.patching import engine
from vlmscope.runs.model import Model

BEFORE, AFTER = 5, 19
SAMPLE = 4
BUDGETS = {"128 MB": 2**27, "512 MB": 2**29, "2 GB": 2**31}
IMAGE_TOKEN, START, END = 4, 6, 7
"""Ids of tokens, in these models."""
OTHERS = 10
"""Below this no id of a word is."""


class Shape(NamedTuple):
    """Of a decoder and its vision tower: width, MLP, layers, heads; of the picture its patches a side."""

    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int]
    vocabulary: int
    side: int


LLAVA = Shape((4096, 11008, 32, 32), (1024, 4096, 24, 16), 32_064, 24)
QWEN = Shape((3584, 18944, 28, 28), (1280, 3420, 32, 16), 152_064, 32)
TINY = Shape((64, 96, 4, 4), (32, 48, 4, 2), 100, 4)


def llava(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Model, Pair]:
    vision = CLIPVisionConfig(image_size=14 * shape.side, patch_size=14, **_sizes(shape.vision))
    text = LlamaConfig(vocab_size=shape.vocabulary, max_position_embeddings=4096, **_sizes(shape.text))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    with torch.device(device):
        model = Model(LlavaForConditionalGeneration(config).to(dtype).eval(), None, "LLaVA-1.5-7B's shape")
    side = 14 * shape.side
    made = [{"pixel_values": torch.randn(1, 3, side, side, generator=_seeded(n))} for n in range(2)]
    return model, _pair(model, made, shape.side**2, shape.side**2 + 1, ())


def qwen(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Model, Pair]:
    width, mlp, layers, heads = shape.vision
    vision = {
        "hidden_size": width,
        "intermediate_size": mlp,
        "depth": layers,
        "num_heads": heads,
        "out_hidden_size": shape.text[0],
        "fullatt_block_indexes": list(range(layers // 4 - 1, layers, layers // 4)),
    }
    half = shape.text[0] // shape.text[3] // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * (half * 3 // 8)]}
    rope["mrope_section"] += [half * 3 // 8] * 2
    text = {
        "vocab_size": shape.vocabulary,
        "num_key_value_heads": max(1, shape.text[3] // 7),
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        **_sizes(shape.text),
    }
    ids = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": START, "vision_end_token_id": END}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, video_token_id=END + 1, **ids)
    with torch.device(device):
        hf = Qwen2_5_VLForConditionalGeneration(config).to(dtype).eval()
    grid = torch.tensor([[1, shape.side, shape.side]])
    patches = shape.side**2
    made = [
        {"pixel_values": torch.randn(patches, 2 * 3 * 14 * 14, generator=_seeded(n)), "image_grid_thw": grid}
        for n in range(2)
    ]
    model = Model(hf, None, "Qwen2.5-VL-7B's shape")
    return model, _pair(model, made, patches // 4, patches, (START, END))


def _sizes(sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, sizes, strict=True))


def _seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _pair(
    model: Model, pictures: list[dict[str, Any]], many: int, patches: int, ends: tuple[int, ...]
) -> Pair:
    """The same words about two pictures of `many` tokens, which `ends` stand around."""
    most = model.hf.config.get_text_config().vocab_size
    words = torch.randint(OTHERS, most, (BEFORE + AFTER,), generator=_seeded(2)).tolist()
    ids = [*words[:BEFORE], *ends[:1], *[IMAGE_TOKEN] * many, *ends[1:], *words[BEFORE:]]
    first = BEFORE + len(ends[:1])
    images = tuple(range(first, first + many))
    side = round(many**0.5)
    text = tuple(n for n in range(len(ids)) if n not in images)
    decoder = Layout(("",) * len(ids), text, {}, {at: divmod(n, side) for n, at in enumerate(images)}, images)
    runs = []
    for pixels in pictures:
        row = torch.tensor([ids])
        tensors = {"input_ids": row, "attention_mask": torch.ones_like(row), **pixels}
        if ends:
            tensors["mm_token_type_ids"] = (row == IMAGE_TOKEN).int()
        tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
        on = {name: value.to(model.device) for name, value in tensors.items()}
        runs.append(Inputs(on, {"vision": Layout(("",) * patches), "decoder": decoder}))
    return Pair(runs[0], runs[1], OTHERS, OTHERS + 1)


@contextmanager
def budget(size: int) -> Iterator[None]:
    before, engine.BUDGET = engine.BUDGET, size
    try:
        yield
    finally:
        engine.BUDGET = before


def rate(dtype: torch.dtype, device: str, size: int) -> float:
    """Operations a second of a product of two large matrices."""
    one = torch.randn(size, size, dtype=dtype, device=device)
    seconds = []
    for _ in range(8):
        start = _now(device)
        one @ one
        seconds.append(_now(device) - start)
    return 2 * size**3 / min(seconds)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def one_sweep(model: Model, pair: Pair, expression: str, card: float, tolerance: float) -> dict[str, Any]:
    """One set of sites: the engine at each size of a batch, beside plain forwards."""
    placed, device = model.placed(expression, pair.clean), model.device.type
    chosen = random.Random(0).sample(range(len(placed)), min(SAMPLE, len(placed)))
    sample = [placed[n] for n in chosen]
    plain, published = Full(model, pair, keep=True), Full(model, pair, keep=False)
    timed(model, plain, sample)  # keeps the clean activations, and warms up
    plainly, expected = timed(model, plain, sample)
    publicly, also = timed(model, published, sample)
    with FlopCounterMode(display=False) as counted:
        sweep(model, pair, placed)
    found: dict[str, Any] = {"sites": len(placed), "plain_seconds_a_site": plainly}
    found |= {"published_seconds_a_site": publicly, "operations": counted.get_total_flops(), "engine": {}}
    for name, size in BUDGETS.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with budget(size):
            runs = [sweep(model, pair, placed) for _ in range(3)]
        seconds = statistics.median(one for one, _ in runs)
        error = max(
            abs(runs[-1][1][n] - right)
            for n, slow, other in zip(chosen, expected, also, strict=True)
            for right in (slow, other)
        )
        assert error < tolerance, f"{model.name}, {expression}: answers differ by {error}"
        found["engine"][name] = {
            "seconds": seconds,
            "times_plain": plainly * len(placed) / seconds,
            "times_published": publicly * len(placed) / seconds,
            "largest_difference": error,
            "share_of_rate": found["operations"] / seconds / card,
        }
        if device == "cuda":
            weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
            peak = torch.cuda.max_memory_allocated() - weights
            found["engine"][name]["peak_gb"] = peak / 2**30
    found["spread_of_answers"] = statistics.pstdev(runs[-1][1])
    return found


def with_nnsight(model: Model, pair: Pair) -> float | None:
    """Seconds a head by nnsight; None where it is not installed."""
    try:
        from peers import with_nnsight as patcher

        shape = model.shapes["decoder"]
        patch = patcher(model.hf, pair, shape.width // shape.heads["attn"])
    except ImportError:
        return None
    seconds = []
    for layer in range(3):
        sync(model)
        start = time.perf_counter()
        patch(layer, 0)
        sync(model)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@torch.inference_mode()
def measure(tiny: bool, minutes: float) -> dict[str, Any]:
    until, device = time.monotonic() + 60 * minutes, "cuda" if torch.cuda.is_available() else "cpu"
    dtype, tolerance = (torch.float32, 1e-4) if tiny else (torch.bfloat16, 0.1)
    card, left_out = rate(dtype, device, 512 if tiny else 8192), []
    models: dict[str, Callable[[], tuple[Model, Pair]]] = {
        "llava-1.5-7b": lambda: llava(TINY if tiny else LLAVA, dtype, device),
        "qwen2.5-vl-7b": lambda: qwen(TINY if tiny else QWEN, dtype, device),
    }
    results: dict[str, Any] = {}
    for name, make in models.items():
        model, pair = make()
        last, layer = len(pair.clean.layout["decoder"].tokens), model.shapes["vision"].layers // 2
        sweeps = {
            "heads": "decoder.*.attn.h*@last",
            "resid": f"decoder.*.resid@{last - AFTER}-{last - 1}",
            "vision": f"vision.{layer}.attn.h*@all",
        }
        for what, expression in sweeps.items():
            if time.monotonic() > until:
                left_out.append(f"{name}, {what}")
                continue
            results.setdefault(name, {})[what] = one_sweep(model, pair, expression, card, tolerance)
            print(name, what, json.dumps(results[name][what]), flush=True)
        if name.startswith("llava") and time.monotonic() < until:
            results[name]["nnsight_seconds_a_head"] = with_nnsight(model, pair)
        del model, pair
    return {
        "benchmark": "gpu",
        "tiny": tiny,
        "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "operations_a_second": card,
        "left_out": left_out,
        **results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small models, to try this file")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing after so many")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny tries this file without one")
    text = json.dumps(measure(given.tiny, given.minutes))
    if given.out:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

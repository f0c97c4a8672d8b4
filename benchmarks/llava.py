"""How fast the decoder engine is on LLaVA-1.5's layout, against full forwards.

    python benchmarks/llava.py [--threads 2] [--real] [--out benchmarks/results/NAME.json]

5 text tokens, 576 image tokens, 19 text tokens; random weights; 16 decoder layers of width 1024 (16 heads,
MLP 2816, vocabulary 32,000) in float32 on a CPU, or with `--real`, on a GPU, LLaVA-1.5-7B's own shape in
bfloat16. One pair of pictures. In one run on one machine, the answers compared as they are timed:

- *published*: three full forwards a site (clean, corrupt, patched), as the NOTICE code does it;
- *plain*: one full forward a site, clean activations kept;
- the engine, on all heads at the last token and on `resid` at the 19 tokens behind the image.

The slow sides are timed on a sample of sites, half of it before and half after each sweep. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blip import Memory
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmscope.cli.machine import keep_freed_memory
from vlmscope.layout import Layout
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.patching import engine
from vlmscope.runs.model import Model
from vlmscope.sites import Site

BEFORE, IMAGE, AFTER = 5, 576, 19
SWEEPS = {"heads": "decoder.*.attn.h*@last", "resid": "decoder.*.resid@581-599"}
SAMPLE, ROUNDS = 4, 3


def build(real: bool, device: str) -> Model:
    torch.manual_seed(0)
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    clip = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **(clip if real else small))
    size = (4096, 11008, 32, 32) if real else (1024, 2816, 16, 16)
    text = LlamaConfig(
        vocab_size=32_000,
        hidden_size=size[0],
        intermediate_size=size[1],
        num_hidden_layers=size[2],
        num_attention_heads=size[3],
        max_position_embeddings=2048,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31_999)
    dtype = torch.bfloat16 if real else torch.float32
    with torch.device(device):
        hf = LlavaForConditionalGeneration(config).to(dtype)
    return Model(hf, None, "LLaVA-1.5-7B's shape" if real else "LLaVA-1.5's layout")


def pair_of(model: Model) -> Pair:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30_000, (1, BEFORE + IMAGE + AFTER), generator=generator)
    ids[0, BEFORE : BEFORE + IMAGE] = 31_999
    images = tuple(range(BEFORE, BEFORE + IMAGE))
    cells = {at: divmod(n, 24) for n, at in enumerate(images)}
    text = tuple(n for n in range(ids.shape[1]) if n not in cells)
    decoder = Layout(("",) * ids.shape[1], text, {}, cells, images)
    vision = Layout(("",) * (IMAGE + 1))
    runs = []
    for _ in range(2):
        pixels = torch.randn(1, 3, 336, 336, generator=generator)
        tensors = {
            "pixel_values": pixels.to(model.dtype),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        tensors = {k: v.to(model.device) for k, v in tensors.items()}
        runs.append(Inputs(tensors, {"vision": vision, "decoder": decoder}))
    return Pair(runs[0], runs[1], 100, 200)


def sync(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


PLACES = {
    "LlavaForConditionalGeneration": {
        "decoder": ("model.language_model.layers", "self_attn.o_proj"),
        "vision": ("model.vision_tower.encoder.layers", "self_attn.out_proj"),
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "decoder": ("model.language_model.layers", "self_attn.o_proj"),
        "vision": ("model.visual.blocks", "attn.proj"),
    },
}
"""Where the blocks of a tower are, and in a block what stands behind its heads."""


class Full:
    """Full forwards with a plain hook, as anyone would write it."""

    def __init__(self, model: Model, pair: Pair, keep: bool) -> None:
        self.model, self.pair, self.keep = model, pair, keep
        self.kept: dict[Site, Tensor] = {}

    def forward(self, inputs: Inputs) -> Tensor:
        return self.model.hf(**inputs.tensors, use_cache=False).logits[0, -1]

    def hooked(self, site: Site, function: Callable[[Tensor], None], inputs: Inputs) -> Tensor:
        blocks, output = PLACES[type(self.model.hf).__name__][site.tower]
        block = self.model.hf.get_submodule(f"{blocks}.{site.layer}")
        if site.kind == "resid":
            handle = block.register_forward_hook(lambda m, a, out: function(out))
        else:
            handle = block.get_submodule(output).register_forward_pre_hook(lambda m, a: function(a[0]))
        try:
            return self.forward(inputs)
        finally:
            handle.remove()

    def site(self, site: Site) -> float:
        shape = self.model.shapes[site.tower]
        width = shape.width // shape.heads["attn"]
        columns = slice(width * site.units[0], width * (site.units[0] + 1)) if site.units else slice(None)
        if site not in self.kept or not self.keep:
            self.hooked(
                site,
                lambda x: self.kept.update({site: x[..., list(site.positions), columns].clone()}),
                self.pair.clean,
            )
            if not self.keep:
                self.forward(self.pair.corrupt)

        def put(x: Tensor) -> None:
            x[..., list(site.positions), columns] = self.kept[site]

        logits = self.hooked(site, put, self.pair.corrupt).float()
        return float(logits[self.pair.answer] - logits[self.pair.foil])


def timed(model: Model, one: Full, sites: list[Any]) -> tuple[float, list[float]]:
    seconds, found = [], []
    for site in sites:
        sync(model)
        start = time.perf_counter()
        found.append(one.site(site))
        sync(model)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def sweep(model: Model, pair: Pair, sites: list[Any]) -> tuple[float, list[float]]:
    sync(model)
    start = time.perf_counter()
    found = [0.0] * len(sites)
    for numbers, scores in engine.patch(model, pair, sites).chunks:
        for number, ld in zip(numbers, scores.ld.tolist(), strict=True):
            found[number] = ld
    sync(model)
    return time.perf_counter() - start, found


@torch.inference_mode()
def measure(real: bool) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(real, device)
    pair = pair_of(model)
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    tolerance = 0.1 if real else 2e-4
    results: dict[str, Any] = {}
    for name, expression in SWEEPS.items():
        placed = model.placed(expression, pair.clean)
        sample = random.Random(0).sample(range(len(placed)), SAMPLE)
        chosen = [placed[n] for n in sample]
        plain = Full(model, pair, keep=True)
        timed(model, plain, chosen)  # keeps the clean activations, and warms up
        sweep(model, pair, placed)
        published, rounds, error, spread = Full(model, pair, keep=False), [], 0.0, 0.0
        with Memory() as memory:
            for _ in range(ROUNDS):
                before, one = timed(model, published, chosen[: SAMPLE // 2])
                plainly, expected = timed(model, plain, chosen)
                seconds, found = sweep(model, pair, placed)
                after, two = timed(model, published, chosen[SAMPLE // 2 :])
                rounds.append(((before + after) / 2 / seconds, plainly / seconds, seconds))
                for n, slow, also in zip(sample, expected, one + two, strict=True):
                    error = max(error, abs(found[n] - slow), abs(found[n] - also))
                assert error < tolerance, f"{name}: answers differ by {error}"
                spread = statistics.pstdev(found)
        many = len(placed)
        results[name] = {
            "sites": many,
            "seconds": statistics.median(r[2] for r in rounds),
            "published_seconds_a_site": (before + after) / 2,
            "plain_seconds_a_site": plainly,
            "times_published": many * statistics.median(r[0] for r in rounds),
            "times_plain": many * statistics.median(r[1] for r in rounds),
            "largest_difference": error,
            "spread_of_answers": spread,
            "memory_beyond_model_gb": (memory.most - weights) / 2**30,
        }
        print(name, json.dumps(results[name]), flush=True)
    return {
        "benchmark": "llava",
        "model": f"{model.name}, random weights, {str(model.dtype).removeprefix('torch.')}",
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "torch": torch.__version__,
        **results,
    }


def main(measure: Callable[..., dict[str, Any]], about: str | None, with_image: bool = False) -> None:
    """The command line of a benchmark on this layout; the last line is what it measured, as JSON."""
    keep_freed_memory()  # as a command does
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--real", action="store_true", help="LLaVA-1.5-7B's shape, for a GPU")
    if with_image:
        parser.add_argument("--image", type=Path, help="a photograph")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = [arguments.image] if with_image else []
    result = json.dumps(measure(arguments.real, *given))
    if arguments.out:
        arguments.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main(measure, __doc__)

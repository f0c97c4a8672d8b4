"""How fast knock-outs of attention are on LLaVA-1.5's layout, against one full forward each.

    python benchmarks/knockout.py [--threads 2] [--real] [--out benchmarks/results/NAME.json]

The model and the input of `benchmarks/llava.py`: 5 text tokens, 576 image tokens, 19 text tokens. All
windows of 9 layers, six sets of sources each, read at the last token: rows of one pass, its plain run
included. On the other side one full forward of Hugging Face's model a knock-out, on a sample of them, half
of it before and half after each pass, with hooks that hand the blocks of the window another mask; the
answers are compared as they are timed. The last line is JSON.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from llava import build, main, pair_of, sync

from vlmscope.models.inputs import Inputs, Pair
from vlmscope.patching import engine
from vlmscope.runs.model import Model

WINDOW = 9
SOURCES = ("image", "text", "before", "noun", "answer", "image[12,12]")
SAMPLE, ROUNDS = 4, 3


def question_of(model: Model) -> Pair:
    """One picture, with words of the question that have roles."""
    pair = pair_of(model)
    layout = dict(pair.clean.layout)
    roles = {"noun": (585, 586), "answer": (588,), "foil": (590, 591)}
    layout["decoder"] = replace(layout["decoder"], roles=roles)
    inputs = Inputs(pair.clean.tensors, layout)
    return Pair(inputs, inputs, pair.answer, pair.foil)


def forward(model: Model, inputs: Inputs, layers: Sequence[int] = (), sources: Sequence[int] = ()) -> Any:
    """One full forward whose blocks in the window get a causal mask without the sources at the last token."""
    many = inputs.tensors["input_ids"].shape[1]
    mask = torch.ones(many, many, dtype=torch.bool, device=model.device).tril()[None, None]
    mask[..., -1, list(sources)] = False

    def hand(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    blocks = model.hf.model.language_model.layers
    held = [blocks[n].self_attn.register_forward_pre_hook(hand, with_kwargs=True) for n in layers]
    try:
        return model.hf(**inputs.tensors, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    finally:
        for handle in held:
            handle.remove()


def timed(model: Model, pair: Pair, sites: Sequence[Any]) -> tuple[float, list[float]]:
    """The median of the seconds of one forward each, and LD."""
    seconds, found = [], []
    for site in sites:
        sync(model)
        start = time.perf_counter()
        logits = forward(model, pair.clean, site.layers, site.sources)
        found.append(float(logits[pair.answer] - logits[pair.foil]))
        sync(model)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def knocked_out(model: Model, pair: Pair, sites: Sequence[Any]) -> tuple[float, list[float]]:
    sync(model)
    start, found = time.perf_counter(), [0.0] * len(sites)
    for numbers, scores in engine.patch(model, pair, sites, "noise", values="block").chunks:
        for number, ld in zip(numbers, scores.ld.tolist(), strict=True):
            found[number] = ld
    sync(model)
    return time.perf_counter() - start, found


@torch.inference_mode()
def measure(real: bool) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(real, device)
    pair = question_of(model)
    sites = model.placed([f"decoder.*/{WINDOW}.attn@last<{source}" for source in SOURCES], pair.clean)
    sample = random.Random(0).sample(range(len(sites)), SAMPLE)
    chosen, tolerance = [sites[n] for n in sample], 0.1 if real else 2e-4
    logits = forward(model, pair.clean)
    unchanged = float(logits[pair.answer] - logits[pair.foil])
    knocked_out(model, pair, sites)  # warms up
    rounds, error, found = [], 0.0, [0.0]
    for _ in range(ROUNDS):
        before, one = timed(model, pair, chosen[: SAMPLE // 2])
        seconds, found = knocked_out(model, pair, sites)
        after, two = timed(model, pair, chosen[SAMPLE // 2 :])
        rounds.append(((before + after) / 2, seconds))
        error = max(error, *(abs(found[n] - ld) for n, ld in zip(sample, one + two, strict=True)))
    assert error < tolerance, f"answers differ by {error}"
    changed = [abs(ld - unchanged) for ld in found]
    assert max(changed) > 100 * error, "the knock-outs change the answer"
    share = statistics.median(seconds / len(sites) / full for full, seconds in rounds)
    return {
        "benchmark": "knockout",
        "model": f"{model.name}, random weights, {str(model.dtype).removeprefix('torch.')}",
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "torch": torch.__version__,
        "knockouts": len(sites),
        "seconds": statistics.median(seconds for _, seconds in rounds),
        "forward_seconds": statistics.median(full for full, _ in rounds),
        "forwards_a_knockout": share,
        "times_plain": 1 / share,
        "largest_difference": error,
        "largest_change": max(changed),
    }


if __name__ == "__main__":
    main(measure, __doc__)

"""How long attribution of all neurons and heads at all positions takes on LLaVA-1.5's layout.

    python benchmarks/attribute.py [--threads 2] [--real] [--out benchmarks/results/NAME.json]

The model and the pair of `benchmarks/llava.py`: 600 positions, 16 decoder layers of width 1024 with 2,816
neurons each; with `--real`, on a GPU, LLaVA-1.5-7B's own shape in bfloat16. Timed are attribution patching of
every neuron and every head at every position (two forwards and a backward), against plain forwards before and
after, and then exact patches, by the engine, of the 500 with the largest |score| of all neurons at all
positions: with their rank correlation, and some held against one plain forward each. The last line is JSON.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from blip import Memory
from llava import build, main, pair_of, sync
from scipy.stats import spearmanr

from vlmscope.models.inputs import Pair
from vlmscope.patching import engine, reference
from vlmscope.patching.gradients import everywhere
from vlmscope.runs.model import Model
from vlmscope.sites import Point, Site

TOP, ROUNDS, SAMPLE = 500, 3, 4


def timed(model: Model, work: Callable[[], Any]) -> tuple[float, Any]:
    sync(model)
    start = time.perf_counter()
    found = work()
    sync(model)
    return time.perf_counter() - start, found


def patched(model: Model, pair: Pair, sites: list[Site], way: Any = engine) -> np.ndarray[Any, Any]:
    """What patches change of LD."""
    found, run = np.zeros(len(sites)), way.patch(model, pair, sites)
    for numbers, scores in run.chunks:
        found[numbers] = (scores.ld - run.corrupt.ld).cpu().numpy()
    return found


def measure(real: bool) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(real, device)
    pair, shape = pair_of(model), model.shapes["decoder"]
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    points = [
        Point("decoder", n, *what) for n in range(shape.layers) for what in (("mlp", "n"), ("attn", "h"))
    ]
    rounds = []
    everywhere(model, pair, points)  # warms up
    with Memory() as memory:
        for _ in range(ROUNDS):
            before, _ = timed(model, lambda: model.run(pair.clean))
            seconds, scores = timed(model, lambda: everywhere(model, pair, points))
            after, _ = timed(model, lambda: model.run(pair.clean))
            rounds.append(((before + after) / 2, seconds))
    share = statistics.median(seconds / full for full, seconds in rounds)
    layers = [scores[Point("decoder", n, "mlp", "n")] for n in range(shape.layers)]
    whole = np.stack(layers)  # layers, positions, neurons
    best = np.argpartition(-np.abs(whole).ravel(), TOP)[:TOP]
    places = np.stack(np.unravel_index(best, whole.shape), 1).tolist()
    sites = [Site("decoder", n, "mlp", "n", (unit,), str(at), (at,)) for n, at, unit in places]
    estimates = whole.ravel()[best]
    exact_s, exact = timed(model, lambda: patched(model, pair, sites))
    chosen = random.Random(0).sample(range(TOP), SAMPLE)
    plain_s, plain = timed(model, lambda: patched(model, pair, [sites[n] for n in chosen], reference))
    apart = float(np.abs(plain - exact[chosen]).max())
    assert apart < (0.1 if real else 2e-4), f"answers differ by {apart}"
    return {
        "benchmark": "attribute",
        "model": f"{model.name}, random weights, {str(model.dtype).removeprefix('torch.')}",
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "torch": torch.__version__,
        "neurons": whole.shape[0] * whole.shape[2],
        "scores": sum(table.size for table in scores.values()),
        "seconds": statistics.median(seconds for _, seconds in rounds),
        "forward_seconds": statistics.median(full for full, _ in rounds),
        "forwards": share,
        "times_one_forward_a_site": sum(table.size for table in scores.values()) / share,
        "memory_beyond_model_gb": (memory.most - weights) / 2**30,
        "patches": TOP,
        "patches_at_the_last_position": sum(at == whole.shape[1] - 1 for _, at, _ in places),
        "patches_seconds": exact_s,
        "patches_in_plain_forwards": exact_s / statistics.median(full for full, _ in rounds),
        "times_plain_patches": plain_s / SAMPLE / (exact_s / TOP),
        "rank_correlation": float(spearmanr(estimates, exact).statistic),
        "correlation": float(np.corrcoef(estimates, exact)[0, 1]),
        "largest_difference": apart,
    }


if __name__ == "__main__":
    main(measure, __doc__)

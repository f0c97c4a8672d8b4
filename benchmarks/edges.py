"""How long all edges take on LLaVA-1.5's layout.

    python benchmarks/edges.py [--threads 2] [--real] [--out benchmarks/results/NAME.json]

The model and the pair of `benchmarks/llava.py`: 600 positions, 16 decoder layers of width 1024; with
`--real`, on a GPU, LLaVA-1.5-7B's own shape in bfloat16. Timed are edge attribution patching of every edge of
the decoder (two forwards, a backward, and a product of all that is written with all that is read), against
plain forwards before and after; and then exact patches of all edges into one value in the middle, as rows of
batches: with their rank correlation to the scores, and some held against one plain forward each. The last
line is JSON.
"""

from __future__ import annotations

import platform
import random
import statistics
from typing import Any

import numpy as np
import torch
from attribute import timed
from blip import Memory
from llava import build, main, pair_of
from scipy.stats import spearmanr

from vlmscope.patching.edge_patches import exact
from vlmscope.patching.edges import score_edges

ROUNDS, SAMPLE, MOST = 3, 4, 8
"""`MOST`: the forwards that all edges may take."""


def measure(real: bool) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(real, device)
    pair, shape = pair_of(model), model.shapes["decoder"]
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    rounds = []
    with Memory() as memory:
        found = score_edges(model, pair)  # warms up
        for _ in range(ROUNDS):
            before, _ = timed(model, lambda: model.run(pair.clean))
            seconds, found = timed(model, lambda: score_edges(model, pair))
            after, _ = timed(model, lambda: model.run(pair.clean))
            rounds.append(((before + after) / 2, seconds))
    share = statistics.median(seconds / full for full, seconds in rounds)
    reader = f"decoder.{shape.layers // 2}.attn.v0"
    numbers = [n for n, edge in enumerate(found.graph.edges) if edge.target == reader]
    into = [found.graph.edges[n] for n in numbers]
    exact_s, patched = timed(model, lambda: exact(model, pair, into))
    chosen = random.Random(0).sample(range(len(into)), SAMPLE)
    plain_s, plain = timed(model, lambda: exact(model, pair, [into[n] for n in chosen], by_rows=False))
    apart = float(np.abs(plain - patched[chosen]).max())
    assert apart < (0.1 if real else 2e-4), f"answers differ by {apart}"
    return {
        "benchmark": "edges",
        "model": f"{model.name}, random weights, {str(model.dtype).removeprefix('torch.')}",
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "torch": torch.__version__,
        "edges": len(found.scores),
        "writers": len(found.graph.writers),
        "readers": len(found.graph.readers),
        "seconds": statistics.median(seconds for _, seconds in rounds),
        "forward_seconds": statistics.median(full for full, _ in rounds),
        "forwards": share,
        "forwards_allowed": MOST,
        "memory_beyond_model_gb": (memory.most - weights) / 2**30,
        "exact_edges": len(into),
        "exact_into": reader,
        "exact_seconds": exact_s,
        "exact_in_plain_forwards": exact_s / statistics.median(full for full, _ in rounds),
        "times_plain_edges": plain_s / SAMPLE / (exact_s / len(into)),
        "rank_correlation": float(spearmanr(found.scores[numbers], patched).statistic),
        "largest_difference": apart,
    }


if __name__ == "__main__":
    main(measure, __doc__)

"""How long the logit lens of all image tokens at all layers takes on LLaVA-1.5's layout, against forwards.

    python benchmarks/lens.py [--threads 2] [--real] [--out benchmarks/results/NAME.json]

The model and the inputs of `benchmarks/llava.py`: 576 image tokens, 16 decoder layers of width 1024, 32,000
words, float32 on a CPU; with `--real`, on a GPU, LLaVA-1.5-7B's own shape in bfloat16. Timed are each token's
top 5 words with their probabilities at every layer, the top 5 words alone (`--only-top`, the screen that it
makes of the head included), and the direct effect of every head, MLP and patch. Some states, and the sum of
the effects, are compared with plain transformers, and all words and logits of the two ways with each other.
The last line is JSON.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from llava import BEFORE, IMAGE, build, main, pair_of, sync

from vlmscope.models.inputs import Pair
from vlmscope.patching.direct import direct
from vlmscope.runs.forward import forward
from vlmscope.runs.lens import Screen, best_words, words
from vlmscope.runs.model import Model
from vlmscope.sites import Point, Site

TOP, ROUNDS, SAMPLE = 5, 3, 8


def lens(model: Model, pair: Pair, say: Callable[..., Any]) -> dict[int, Any]:
    """By layer, what the image's tokens say; the run that gives the states included."""
    points = [Point("decoder", n, "resid") for n in range(model.shapes["decoder"].layers)]
    values = forward(model, pair.clean, keep=points).values
    image = slice(BEFORE, BEFORE + IMAGE)
    return {point.layer: say(model, pair.clean, values[point][0, image], TOP) for point in points}


def top_words(model: Model, pair: Pair) -> dict[int, Any]:
    return lens(model, pair, partial(best_words, screen=Screen.of(model)))


def effects(model: Model, pair: Pair) -> tuple[float, float]:
    """All heads split over all that they read, and all MLPs: their sum with the biases, and LD."""
    layers, at = range(model.shapes["decoder"].layers), len(pair.clean.layout["decoder"].tokens)
    here = {"position": "readout", "positions": (at - 1,)}
    edges = [Site("decoder", n, "attn", **here, source="*") for n in layers]
    others = [Site("decoder", 0, "resid_pre", **here), *(Site("decoder", n, "mlp", **here) for n in layers)]
    run = direct(model, pair.clean, pair.answer, pair.foil, [*edges, *others])
    shares = [run.effect(edge, [n]) for edge in edges for n in range(at)]
    return sum(shares) + sum(map(run.effect, others)) + run.bias, run.value


def agree(all_words: dict[int, Any], top: dict[int, Any]) -> float:
    """The largest difference of the logits of the best words by the two ways; the words are the same but for
    those whose logits are."""
    worst = 0.0
    for one, other in zip(all_words.values(), top.values(), strict=True):
        apart = (one.tops - other.tops).abs()
        worst = max(worst, float(apart.max()))
        near = (one.tops[:, 1:] - one.tops[:, :-1]).abs().amin(-1) < 1e-4
        near |= (one.best.sort(-1).values == other.best.sort(-1).values).all(-1)
        assert near.all(), "the best words are others"
    return worst


def check(model: Model, pair: Pair, found: dict[int, Any]) -> float:
    """The largest difference of probabilities from plain transformers, of some tokens at every layer."""
    hidden = model.hf(**pair.clean.tensors, use_cache=False, output_hidden_states=True).hidden_states
    norm, head = model.hf.model.language_model.norm, model.hf.lm_head
    at, worst = torch.linspace(0, IMAGE - 1, SAMPLE).long(), 0.0
    for layer, said in found.items():
        state = hidden[layer + 1][0, BEFORE + at]
        # the last one is behind the norm already
        logits = head(state if layer + 1 == len(found) else norm(state)).float()
        tops, best = logits.softmax(-1).topk(TOP)
        own = (said.tops[at] - said.total[at, None]).exp()
        worst = max(worst, float((own - tops).abs().max()), float((best != said.best[at]).float().mean()))
    return worst


def timed(model: Model, work: Callable[[], Any]) -> tuple[float, Any]:
    sync(model)
    start = time.perf_counter()
    found = work()
    sync(model)
    return time.perf_counter() - start, found


@torch.inference_mode()
def measure(real: bool) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(real, device)
    pair = pair_of(model)
    rounds, worst, apart, differ = [], 0.0, 0.0, 0.0
    for number in range(ROUNDS + 1):  # the first warms up
        before, _ = timed(model, lambda: model.run(pair.clean))
        seconds, found = timed(model, lambda: lens(model, pair, words))
        top_s, top = timed(model, lambda: top_words(model, pair))
        split, (total, ld) = timed(model, lambda: effects(model, pair))
        after, _ = timed(model, lambda: model.run(pair.clean))
        if number:
            rounds.append(((before + after) / 2, seconds, top_s, split))
        differ = max(differ, agree(found, top))
        worst, apart = max(worst, check(model, pair, found)), max(apart, abs(total - ld))
    assert worst < (0.2 if real else 1e-5), f"what states say differs by {worst}"
    assert apart < (0.1 if real else 1e-4), f"the effects sum to LD but for {apart}"
    assert differ < (0.2 if real else 1e-4), f"the logits of the top words differ by {differ}"
    forward_s, lens_s, top_s, split_s = map(statistics.median, zip(*rounds, strict=True))
    shape, vocabulary = model.shapes["decoder"], model.hf.lm_head.out_features
    block = sum(p.numel() for p in model.blocks("decoder")[0].parameters())
    return {
        "benchmark": "lens",
        "model": f"{model.name}, random weights, {str(model.dtype).removeprefix('torch.')}",
        "machine": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "torch": torch.__version__,
        "states": IMAGE * shape.layers,
        "forward_seconds": forward_s,
        "lens_seconds": lens_s,
        "lens_in_forwards_with_its_run": lens_s / forward_s,
        "lens_in_forwards": lens_s / forward_s - 1,
        "top_words_seconds": top_s,
        "top_words_in_forwards_with_their_run": top_s / forward_s,
        "top_words_in_forwards": top_s / forward_s - 1,
        "top_words_differ_by": differ,
        "multiplications_of_the_head_by_those_of_a_block": vocabulary * shape.width / block,
        "effects_seconds": split_s,
        "effects_in_forwards": split_s / forward_s,
        "largest_difference_of_probabilities": worst,
        "effects_sum_to_ld_but_for": apart,
    }


if __name__ == "__main__":
    main(measure, __doc__)

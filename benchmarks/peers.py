"""The same patches by nnsight and TransformerLens, as their documentation does patching.

    python -m venv peers && peers/bin/pip install torch==2.13.0 transformer-lens==4.3.0 nnsight==0.8.1 .
    HF_HUB_OFFLINE=1 peers/bin/python benchmarks/peers.py [--out benchmarks/results/NAME.json]

All 256 heads at the last token on LLaVA-1.5's layout (see `llava.py`), in an environment of its own. The
peers keep the clean activations and run one patched forward a site; a few sites are timed, and their
answers compared with the engine's, which does all. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llava import SWEEPS, build, pair_of, sweep

SAMPLE = (3, 70, 140, 250)
"""Which of the 256 heads the peers do."""

Patcher = Callable[[int, int], torch.Tensor]


def with_nnsight(hf: Any, pair: Any, width: int) -> Patcher:
    from nnsight import NNsight

    model = NNsight(hf)
    layers = model.model.language_model.layers
    kept = {}
    for layer in range(len(hf.model.language_model.layers)):
        with model.trace(**pair.clean.tensors):
            kept[layer] = layers[layer].self_attn.o_proj.input.save()

    def patch(layer: int, head: int) -> torch.Tensor:
        columns = slice(width * head, width * (head + 1))
        with model.trace(**pair.corrupt.tensors):
            layers[layer].self_attn.o_proj.input[:, -1, columns] = kept[layer][:, -1, columns]
            logits = model.lm_head.output[0, -1].save()
        return logits  # noqa: RET504 (a trace cannot be left by return)

    return patch


def with_transformer_lens(hf: Any, pair: Any, width: int) -> Patcher:
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    hf.config.architectures = [type(hf).__name__]
    bridge = TransformerBridge.boot_transformers("llava-hf/llava-1.5-7b-hf", hf_model=hf, tokenizer=tokenizer)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(bridge.cfg.n_layers)]

    def inputs(run: Any) -> tuple[Any, dict[str, Any]]:
        tensors = dict(run.tensors)
        return tensors.pop("input_ids"), {"pixel_values": tensors["pixel_values"]}

    ids, more = inputs(pair.clean)
    _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in names, **more)
    other, others = inputs(pair.corrupt)

    def patch(layer: int, head: int) -> torch.Tensor:
        def write(z: torch.Tensor, hook: Any) -> torch.Tensor:
            clean = cache[names[layer]]
            if z.ndim == 3:
                z[:, -1, width * head : width * (head + 1)] = clean[:, -1, width * head : width * (head + 1)]
            else:
                z[:, -1, head] = clean[:, -1, head]
            return z

        return bridge.run_with_hooks(other, fwd_hooks=[(names[layer], write)], **others)[0, -1]

    return patch


@torch.inference_mode()
def measure() -> dict[str, Any]:
    model = build(False, "cpu")
    pair = pair_of(model)
    sites = model.placed(SWEEPS["heads"], pair.clean)
    width = model.shapes["decoder"].width // model.shapes["decoder"].heads["attn"]
    sweep(model, pair, sites)
    results: dict[str, Any] = {}
    for name, peer in (("nnsight", with_nnsight), ("transformer-lens", with_transformer_lens)):
        hf = copy.deepcopy(model.hf)
        patch = peer(hf, pair, width)
        patch(0, 0)
        seconds, error = [], 0.0
        ours, found = sweep(model, pair, sites)
        for number in SAMPLE:
            site = sites[number]
            start = time.perf_counter()
            logits = patch(site.layer, site.units[0])
            seconds.append(time.perf_counter() - start)
            error = max(error, abs(float(logits[pair.answer] - logits[pair.foil]) - found[number]))
        again, _ = sweep(model, pair, sites)
        mine = (ours + again) / 2
        assert error < 2e-4, f"{name}: answers differ by {error}"
        results[name] = {
            "version": version(name),
            "seconds_a_site": statistics.median(seconds),
            "engine_seconds_for_all": mine,
            "times": statistics.median(seconds) * len(sites) / mine,
            "largest_difference": error,
        }
        print(name, json.dumps(results[name]), flush=True)
    return {
        "benchmark": "peers",
        "model": f"{model.name}, random weights, float32; {len(sites)} heads at the last token",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = json.dumps(measure())
    if arguments.out:
        arguments.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()

"""Neurons: what finding them costs, whether they carry their words, and how well edits take.

    python benchmarks/neurons.py [--part cost|concepts|edits] [--threads 2] [--out FILE.json]

- *cost*: on LLaVA-1.5's layout (as `benchmarks/llava.py`, random weights, float32) one generation of 20
  tokens alone, with the neurons of all its words found on the way, and gradient × activation of the same
  words beside it. The scores are compared with a plain hook and the weights.
- *concepts*: `neurons.measure` on toy-llava over 210 held-out pictures of each of the drawn sets: for each
  shape, color, texture and expression the drop of its probability without 1 % of the neurons and without as
  many random ones, the AUC of its best neuron, and the overlap between pictures.
- *edits*: ten pairs of words on toy-llava, 3 % of the columns each, by free generation on pictures that the
  edits were made on and on others; undone bit for bit; then all ten one after the other.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from blip import Memory
from llava import build, pair_of

from vlmscope import neurons
from vlmscope.checkpoint import load
from vlmscope.data import TOY_SETS, examples
from vlmscope.data.example import Example
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.captions import generate_caption
from vlmscope.runs.model import Model

ASK, OTHERWISE = "describe this picture.", "what does this picture show?"
LENGTH, ROUNDS = 20, 3
PAIRS = (
    ("red", "blue"),
    ("circle", "square"),
    ("star", "heart"),
    ("happy", "sad"),
    ("striped", "dotted"),
    ("green", "purple"),
    ("square", "star"),
    ("angry", "calm"),
    ("yellow", "orange"),
    ("heart", "circle"),
)


# -- cost ----------------------------------------------------------------------------------------


def gradients(model: Model, inputs: Inputs, ids: tuple[int, ...], layers: int) -> None:
    """Gradient × activation of every token that was said, one backward each, as published tools do it."""
    fed = {**inputs.tensors}
    more = torch.tensor([list(ids[:-1])])
    fed["input_ids"] = torch.cat([fed["input_ids"], more], 1)
    fed["attention_mask"] = torch.ones_like(fed["input_ids"])
    seen: list[torch.Tensor] = []
    held = [
        model.down(n).register_forward_pre_hook(lambda m, args: seen.append(args[0])) for n in range(layers)
    ]
    logits = model.hf(**fed, use_cache=False).logits[0, -len(ids) :]
    for n, token in enumerate(ids):
        torch.autograd.grad(logits[n, token], seen, retain_graph=n + 1 < len(ids))
    for one in held:
        one.remove()


def cost() -> dict[str, Any]:
    model = build(False, "cpu")
    words = lambda ids, **_: " ".join(f"w{n}" for n in ids)  # noqa: E731
    model.processor = SimpleNamespace(tokenizer=SimpleNamespace(decode=words, unk_token_id=None))
    inputs, layers = pair_of(model).clean, model.shapes["decoder"].layers
    model.hf.generation_config.eos_token_id = None
    plain: list[float] = []
    found: list[float] = []
    before = Memory.now()
    with Memory() as memory:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            ids = model.family.generate(model.hf, inputs, max_new_tokens=LENGTH)
            plain.append(time.perf_counter() - start)
            start = time.perf_counter()
            said = generate_caption(model, inputs, length=LENGTH)
            table = neurons.score(model, said, [f"w{n}" for n in dict.fromkeys(said.ids)], top=100)
            found.append(time.perf_counter() - start)
            assert said.ids == tuple(ids.tolist())
    start = time.perf_counter()
    gradients(model, inputs, said.ids, layers)
    slow = time.perf_counter() - start
    # An independent calculation: a plain hook, the column and the row.
    worst = 0.0
    more = torch.tensor([list(said.ids[:-1])])
    tokens = torch.cat([inputs.tensors["input_ids"], more], 1)
    fed = {**inputs.tensors, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    seen: dict[int, torch.Tensor] = {}
    held = [
        model.down(n).register_forward_pre_hook(lambda m, args, n=n: seen.update({n: args[0][0]}))
        for n in range(layers)
    ]
    with torch.no_grad():
        model.hf(**fed, use_cache=False)
    for one in held:
        one.remove()
    for row in table.sample(200, random_state=0).itertuples():
        weight = model.down(row.layer).weight[:, row.neuron] @ model.hf.lm_head.weight[row.token_id]
        wanted = float((seen[row.layer][row.position, row.neuron] * weight).detach())
        worst = max(worst, abs(wanted - row.score) / float(table["score"].abs().max()))
    return {
        "generation_s": statistics.median(plain),
        "with_neurons_s": statistics.median(found),
        "more": statistics.median(f / p for f, p in zip(found, plain, strict=True)) - 1,
        "gradient_x_activation_s": slow,
        "gradient_more": slow / statistics.median(plain),
        "memory_beyond_model_gib": (memory.most - before) / 2**30,
        "largest_difference": worst,
    }


# -- concepts ------------------------------------------------------------------------------------


def held_out(limit: int, seed: int) -> list[Example]:
    found = [e for name in TOY_SETS for e in examples(name, limit=limit, seed=seed)]
    random.Random(seed).shuffle(found)
    return found


def concept() -> dict[str, Any]:
    model = load("toy-llava", device="cpu")
    start = time.perf_counter()
    found = neurons.measure(model, held_out(210, 31), prompt=ASK, pictures=64)
    table = found.measures[found.measures["method"] == "contribution"]
    table = table.set_index(["measure", "word"])
    words: dict[str, dict[str, float]] = {}
    for word in sorted(set(found.measures["word"]) - {"plain", "face"}):
        drop, auc, own = (table.loc[(name, word)] for name in ("p drop, zero", "auc", "overlap"))
        other = table.loc[("overlap, others", word), "value"]
        words[word] = {
            "drop": drop["value"],
            "low": drop["ci_low"],
            "high": drop["ci_high"],
            "random": drop["random"],
            "auc": auc["value"],
            "auc_null": auc["null"],
            "overlap": own["value"],
            "overlap_others": other,
        }
    return {
        "pictures": 630,
        "seconds": time.perf_counter() - start,
        "words": words,
        # Random neurons change next to nothing, in either direction.
        "at_least_five_times_random": int(sum(w["drop"] >= 5 * abs(w["random"]) for w in words.values())),
        "of_words": len(words),
        "lowest_auc": min(w["auc"] for w in words.values()),
        "auc_nulls": [min(w["auc_null"] for w in words.values()), max(w["auc_null"] for w in words.values())],
        "fewest_times_others": min(w["overlap"] / w["overlap_others"] for w in words.values()),
    }


# -- edits ---------------------------------------------------------------------------------------


def edits() -> dict[str, Any]:
    model = load("toy-llava", device="cpu")
    made_on, others = held_out(200, 0), held_out(100, 77)
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    many = int(0.03 * 4 * model.shapes["decoder"].neurons)
    rows, done = [], []
    for source, target in PAIRS:
        start = time.perf_counter()
        edit = neurons.edit(model, made_on, source, target, prompt=ASK, neurons=many)
        seconds = time.perf_counter() - start
        own = neurons.assess(model, [edit], made_on[:150], source, target, prompts=[ASK])[0]
        new = neurons.assess(model, [edit], others, source, target, prompts=[ASK, OTHERWISE])[0]
        own, new = (x.set_index("measure")["value"] for x in (own, new))
        undone = all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
        rows.append(
            {
                "from": source,
                "to": target,
                "columns": len(edit.neurons),
                "seconds": seconds,
                "size": edit.size,
                "reliability": own["generality"],
                "generality": new["generality"],
                "other_wording": new["generality, other wording"],
                "only_the_word": new["only the word"],
                "locality": new["locality"],
                "locality_other_wording": new["locality, other wording"],
                "undone": undone,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    first = None
    for number, (source, target) in enumerate(PAIRS):
        with neurons.edited(model, *done):
            done.append(neurons.edit(model, made_on, source, target, prompt=ASK, neurons=many))
        if number == 0:
            first = others
    source, target = PAIRS[0]
    after = neurons.assess(model, done, first or [], source, target, prompts=[ASK])[0]
    kept = after.set_index("measure")["value"]["generality"]
    mean = lambda name: statistics.mean(row[name] for row in rows)  # noqa: E731
    return {
        "pairs": rows,
        "mean": {name: mean(name) for name in ("reliability", "generality", "other_wording", "locality")},
        "least": {name: min(row[name] for row in rows) for name in ("reliability", "generality", "locality")},
        "first_after_ten": kept,
        "undone": all(row["undone"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=["cost", "concepts", "edits"], action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = {"cost": cost, "concepts": concept, "edits": edits}
    result: dict[str, Any] = {
        "benchmark": "neurons",
        "machine": f"{platform.machine()}, {arguments.threads} threads, CPU",
        "torch": torch.__version__,
    }
    if arguments.out and arguments.out.exists():
        result |= {k: v for k, v in json.loads(arguments.out.read_text()).items() if k in run}
    for part in arguments.part or list(run):
        result[part] = run[part]()
        print(
            f"{part}: {json.dumps({k: v for k, v in result[part].items() if k not in ('words', 'pairs')})}",
            flush=True,
        )
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

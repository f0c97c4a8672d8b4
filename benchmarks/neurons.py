"""Neurons: what finding them costs, what happens to words without them, and how well edits take.

    python benchmarks/neurons.py [--part cost] [--part edits] ... [--pictures 210] [--pairs 0 1 ...]
        [--threads 2] [--out FILE.json]

- *cost*: on LLaVA-1.5's layout (as `benchmarks/llava.py`, random weights, float32) one generation of 20
  tokens alone, with the neurons of all its words found on the way, and gradient × activation of the same
  words beside it. The scores are compared with a plain hook and the weights.
- *concepts*: `neurons.measure` on toy-llava over `--pictures` held-out pictures of each drawn set: for
  each word the AUC of its best neuron over what is said and over the image's tokens, beside that of as many
  random neurons with the true labels; the drop of its probability without 1 % of the neurons and how many
  captions lose it, without random ones, and without those that take over, too.
- *edits*: pairs of words on toy-llava with the fewest columns that hold and with 3 % of the columns, beside
  the same edits of random columns, by free generation on pictures that the edits were not made on; undone bit
  for bit. What `--out` has of other pairs stays.
- *concept edit*: the same for an edit of the concept of the second pair.
- *stack*: each pair's edit made on those before it; whether the first still holds.
- *hallucination*: pictures whose objects are half hidden, the object that is named falsely most often, its
  word suppressed there: CHAIR and POPE before and after, and what else has changed.
- *unsaid*: words that are not to be said, as sensitive ones are not, suppressed on pictures that show what
  they name: how often they still are, beside the same edits of random columns, and what else has changed.

The last line is JSON; `markdown` makes the tables of docs/neurons.md of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from blip import Memory
from llava import build, pair_of

from vlmscope import neurons
from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.data.example import Example
from vlmscope.models.inputs import Inputs
from vlmscope.neurons.captions import generate_caption, whole_word
from vlmscope.neurons.contributions import count_neurons, strongest
from vlmscope.runs.model import Model

SIZES = ("fewest", "3 %")
COUNTED = (
    "AUC beats its null",
    "AUC, image",
    "sensitivity",
    "some caption lost",
    "in three rounds",
    "carried",
)
ASK, OTHERWISE = "describe this picture.", "what does this picture show?"
LENGTH, ROUNDS = 20, 3
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
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


def cost(pictures: int, pairs: Sequence[int]) -> dict[str, Any]:
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


def captioned(model: Model, given: list[Example], *prompts: str) -> neurons.Found:
    """What is said about pictures, asked for in several ways, to be handed on."""
    each = [neurons.find(model, given, prompt=prompt) for prompt in prompts]
    held = {asked: caption for one in each for asked, caption in one.held.items()}
    return replace(each[0], captions=pd.concat([one.captions for one in each]), held=held)


# -- concepts ------------------------------------------------------------------------------------


def held_out(limit: int, seed: int) -> list[Example]:
    found = [e for name in ("states", "scenes", "faces") for e in examples(name, limit=limit, seed=seed)]
    random.Random(seed).shuffle(found)
    return found


def concept(pictures: int, pairs: Sequence[int]) -> dict[str, Any]:
    model = load("toy-llava", device="cpu")
    start = time.perf_counter()
    given = held_out(pictures, 31)
    found = neurons.find(model, given, prompt=ASK)
    measured = neurons.measure(model, given, prompt=ASK, pictures=64, found=found)
    table = measured.measures[measured.measures["method"] == "contribution"]
    table = table.set_index(["measure", "word"])
    names = sorted(set(measured.measures["word"]) - {"plain", "face"})
    with_drop = [word for word in names if ("lost, zero", word) in table.index]
    rounds = neurons.perturb(model, given, with_drop, prompt=ASK, tops=(10,), rounds=3, found=found).effects
    rounds = rounds[rounds["how"] == "zero"].set_index(["word", "round", "set"])
    words: dict[str, dict[str, Any]] = {}
    for word in names:
        row: dict[str, Any] = {}
        for name in ("auc", "auc, image", "sensitivity", "p drop, zero", "lost, zero"):
            if (name, word) in table.index:
                columns = ["value", "ci_low", "ci_high", "null", "null_95", "p_value", "q_value", "n"]
                row[name] = table.loc[(name, word), columns].astype(float).to_dict()
        for number in (1, 2, 3) if word in with_drop else ():
            own, other = (rounds.loc[(word, number, one)] for one in ("top", "random"))
            row[f"round {number}"] = {"drop_p": float(own["drop_p"]), "lost": float(own["lost"])}
            row[f"round {number}"] |= {"random": float(other["lost"]), "n": int(own["n"])}
        words[word] = row
    lost = {word: words[word]["lost, zero"] for word in with_drop}
    beside = ("auc", "auc, image", "sensitivity")
    against = {name: [words[word][name] for word in names] for name in beside}
    return {
        "pictures": len(given),
        "seconds": time.perf_counter() - start,
        "words": words,
        "of_words": len(names),
        "not_measured": measured.left_out.to_dict("records"),
        "some_caption_loses_it": sum(one["value"] > 0 for one in lost.values()),
        "carried": sorted(word for word, one in lost.items() if one["q_value"] <= 0.05),
        "lose_it_without_those_that_take_over": sum(words[word]["round 3"]["lost"] > 0 for word in with_drop),
        "drop_below_0.02": sum(words[word]["p drop, zero"]["value"] < 0.02 for word in with_drop),
        **{
            f"{name}: {what}": [min(one[what] for one in rows), max(one[what] for one in rows)]
            for name, rows in against.items()
            for what in ("value", "null", "null_95")
        },
        **{
            f"{name}: beats its null": sum(one["q_value"] <= 0.05 for one in rows)
            for name, rows in against.items()
        },
    }


# -- edits ---------------------------------------------------------------------------------------


class Edits:
    """Pictures that edits of toy-llava are made on, others that they are measured on, and what is said."""

    def __init__(self, pictures: int) -> None:
        self.model = load("toy-llava", device="cpu")
        self.made_on, self.others = held_out(pictures, 0), held_out(pictures // 2, 77)
        self.found = captioned(self.model, self.made_on, ASK)
        self.said = captioned(self.model, self.others, ASK, OTHERWISE)
        self.many = int(0.03 * count_neurons(self.model))

    def edit(self, source: str, target: str | None, columns: Any = None, **more: Any) -> neurons.WeightEdit:
        more = {"prompt": ASK, "found": self.found, "neurons": columns, **more}
        return neurons.edit(self.model, self.made_on, source, target, **more)

    def measured(self, edit: neurons.WeightEdit, **more: Any) -> dict[str, Any]:
        """The card of an edit, beside one of random columns that was made with `more`."""
        source, target = edit.about["from"], edit.about["to"] or None
        null = self.edit(source, target, neurons.random_columns(self.model, edit), **more)
        asked: dict[str, Any] = {"prompts": [ASK, OTHERWISE], "names": (), "found": self.said}
        card = neurons.describe_edit(self.model, edit, self.others, null=null, **asked)
        table = card.measures.set_index("measure")[["value", "before", "random", "n"]]
        row = {"columns": len(edit.neurons), "size": edit.size, "is_of": card.about["is_of"]}
        return row | {"tried": edit.about.get("tried"), "measures": table.to_dict("index")}


def edits(pictures: int, pairs: Sequence[int]) -> dict[str, Any]:
    there, rows = Edits(pictures), {}
    before = {name: value.clone() for name, value in there.model.hf.state_dict().items()}
    for source, target in (PAIRS[n] for n in pairs):
        start = time.perf_counter()
        edit = there.edit(source, target, there.many)
        seconds = time.perf_counter() - start
        says = [one for one in there.found.held.values() if whole_word(source).search(one.text)]
        wide = there.edit(source, target, strongest(there.model, says, source, there.many))
        row = {"from": source, "to": target, "seconds": seconds}
        row |= {"fewest": there.measured(edit), "3 %": there.measured(wide)}
        after = there.model.hf.state_dict()
        row["undone"] = all(torch.equal(value, before[name]) for name, value in after.items())
        rows[f"{source} → {target}"] = row
        print(json.dumps(row), flush=True)
    return rows


def concept_edit(pictures: int, pairs: Sequence[int]) -> dict[str, Any]:
    there, (source, target) = Edits(pictures), PAIRS[1]
    more: dict[str, Any] = {"concept": True, "wordings": [OTHERWISE]}
    whole = there.edit(source, target, there.many, **more)
    return {"from": source, "to": target, **there.measured(whole, **more)}


def stack(pictures: int, pairs: Sequence[int]) -> dict[str, Any]:
    there, made = Edits(pictures), list[neurons.WeightEdit]()
    for n in pairs:
        with neurons.edited(there.model, *made):
            made.append(there.edit(*PAIRS[n]))
    source, target = PAIRS[pairs[0]]
    asked: dict[str, Any] = {"prompts": [ASK], "found": there.said}
    alone, every = (
        neurons.assess(there.model, some, there.others, source, target, **asked)[0].set_index("measure")
        for some in (made[:1], made)
    )
    row = {"edits": len(made), "columns": sum(len(one.neurons) for one in made)}
    both = {"alone": float(alone.loc["generality", "value"]), "n": int(alone.loc["generality", "n"])}
    return row | both | {"after all": float(every.loc["generality", "value"])}


# -- hallucination -------------------------------------------------------------------------------


INSTEAD = (None, "shape")


def half_hidden(one: Example) -> Example:
    """The lower half of each object painted over with the ground."""
    picture = one.clean_image.copy()
    for mask in one.masks.values():
        left, top, right, bottom = mask.getbbox()
        picture.paste(picture.getpixel((0, 0)), (left, (top + bottom) // 2, right, bottom))
    return replace(one, id=f"{one.id}-hidden", clean_image=picture)


def falsely(pictures: int, pairs: Sequence[int]) -> dict[str, Any]:
    model = load("toy-llava", device="cpu")
    seen = examples("states", limit=pictures, seed=3)
    mixed = [x for n, one in enumerate(seen) for x in ([half_hidden(one)] if n % 2 else [one])]
    half = len(mixed) // 2
    found, before = captioned(model, mixed[:half], ASK), captioned(model, mixed[half:], ASK)
    said = found.captions["caption"].tolist()
    table = neurons.falsely_named(said, [one.shows for one in mixed[:half]], SHAPES)
    word, result = table["object"][0], {"pictures": len(mixed), "named": table.to_dict("records")}
    for target in INSTEAD:
        more: dict[str, Any] = {"prompt": ASK, "falsely": True, "found": found}
        edit = neurons.edit(model, mixed[:half], word, target, **more)
        null = neurons.edit(
            model, mixed[:half], word, target, neurons=neurons.random_columns(model, edit), **more
        )
        asked: dict[str, Any] = {"prompts": [ASK], "names": SHAPES, "found": before}
        card = neurons.describe_edit(model, edit, mixed[half:], null=null, **asked)
        result[f"{word} to {target or 'anything else'}"] = {
            "columns": len(edit.neurons),
            "tried": edit.about["tried"],
            "measures": card.measures.set_index("measure")[["value", "before", "random", "n"]].to_dict(
                "index"
            ),
            "objects": card.objects.set_index("measure").to_dict("index"),
        }
    return result


# -- words that are not to be said ---------------------------------------------------------------

UNSAID = ("heart", "purple", "angry")


def unsaid(pictures: int, pairs: Sequence[int]) -> dict[str, Any]:
    there, rows = Edits(pictures), {}
    for word in UNSAID:
        rows[word] = there.measured(there.edit(word, None))
        print(json.dumps({word: rows[word]}), flush=True)
    return rows


# -- tables --------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> list[str]:
    """The tables of `docs/neurons.md`."""
    words = ["| word | AUC | random | AUC, image | random | P falls by | captions lost | in three rounds |"]
    words.append("|---" * 8 + "|")
    for word, one in result["concepts"]["words"].items():
        cells = [word]
        for name in ("auc", "auc, image"):
            cells += [f"{one[name]['value']:.2f}", f"{one[name]['null']:.2f} ({one[name]['null_95']:.2f})"]
        drop, lost = one["p drop, zero"], one["lost, zero"]
        rounds = [f"{one[f'round {n}']['lost']:.2f} ({one[f'round {n}']['random']:.2f})" for n in (1, 2, 3)]
        cells += [f"{drop['value']:.2f}", f"{lost['value']:.2f} of {lost['n']:.0f}", ", ".join(rounds)]
        words.append(f"| {' | '.join(cells)} |")

    found = result["concepts"]
    beaten = (found[f"{name}: beats its null"] for name in ("auc", "auc, image", "sensitivity"))
    lost = found["some_caption_loses_it"], found["lose_it_without_those_that_take_over"]
    counts = (*beaten, *lost, len(found["carried"]))
    beside = ", ".join(f"{name} {n}" for name, n in zip(COUNTED, counts, strict=True))

    pairs = [
        "| edit | columns | generality | locality | yes or no | blind prompts changed | there is | it is of |"
    ]
    pairs.append("|---" * 8 + "|")
    rows = {name: one for name, one in result["edits"].items() if isinstance(one, dict)}
    every = [(name, one, one[size]) for name, one in rows.items() for size in SIZES]
    whole = result["concept edit"]
    every.append((f"{whole['from']} → {whole['to']}, concept", whole, whole))
    for name, one, made in every:
        measures = made["measures"]
        there = (measures[f"there is {one[end]}"] for end in ("from", "to"))
        kinds = ("generality", "locality", "locality, yes or no", "blind prompts changed")
        cells = [name, str(made["columns"]), *(_beside(measures[m]) for m in kinds)]
        cells.append("; ".join(f"{x['before']:.2f} to {x['value']:.2f}" for x in there))
        pairs.append(f"| {' | '.join([*cells, made['is_of']])} |")

    false = ["| edit | columns | named falsely, and no longer | locality | CHAIR | POPE, accuracy |"]
    false.append("|---" * 6 + "|")
    for name, made in result["hallucination"].items():
        if " to " in name:
            cells = [
                name,
                str(made["columns"]),
                *(_beside(made["measures"][m]) for m in ("generality", "locality")),
            ]
            for m in ("chair_i", "yes or no: accuracy"):
                one = made["objects"][m]
                cells.append(f"{one['before']:.2f} to {one['after']:.2f} ({one['random']:.2f})")
            false.append(f"| {' | '.join(cells)} |")

    gone = [
        "| word | columns | said | after | gone, other wording | locality | blind prompts changed | length |"
    ]
    gone.append("|---" * 8 + "|")
    for word, made in result["unsaid"].items():
        if isinstance(made, dict):
            measures, says = made["measures"], made["measures"][f"says {word}"]
            cells = [word, str(made["columns"]), f"{says['before']:.2f}"]
            cells.append(f"{says['value']:.2f} ({says['random']:.2f}) of {says['n']}")
            for m in ("generality, other wording", "locality", "blind prompts changed"):
                cells.append(_beside(measures[m]))
            gone.append(f"| {' | '.join(cells)} | {measures['length']['value']:.2f} |")
    tables = ["\n".join(lines) for lines in (words, pairs, false, gone)]
    return [*tables, f"Of {found['of_words']} words: {beside}."]


def _beside(one: dict[str, float]) -> str:
    """A measure, and that of random columns."""
    return f"{one['value']:.2f} ({one['random']:.2f}) of {one['n']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    run = {"cost": cost, "concepts": concept, "edits": edits, "concept edit": concept_edit, "stack": stack}
    run |= {"hallucination": falsely, "unsaid": unsaid}
    parser.add_argument("--part", choices=list(run), action="append")
    parser.add_argument("--pictures", type=int, default=210, help="of each set")
    parser.add_argument("--pairs", type=int, nargs="+", default=range(len(PAIRS)), help="which, from 0 on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "benchmark": "neurons",
        "machine": f"{platform.machine()}, CPU",
        "torch": torch.__version__,
    }
    if arguments.out and arguments.out.exists():
        result |= {k: v for k, v in json.loads(arguments.out.read_text()).items() if k in run}
    for part in arguments.part or list(run):
        found = run[part](arguments.pictures, arguments.pairs) | {"threads": arguments.threads}
        result[part] = {**result.get(part, {}), **found} if part == "edits" else found
        short = {k: v for k, v in result[part].items() if k not in ("words", "measures")}
        print(f"{part}: {json.dumps(short)}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

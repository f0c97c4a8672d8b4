"""Do maps of a word point at what it is about? On the toys and held-out pictures, where that is known.

    python benchmarks/pointing.py [--examples 100] [--only TOY] [--out benchmarks/results/NAME.json]
    python benchmarks/pointing.py --words 200 [--only TOY] --out benchmarks/results/NAME.json

A toy answers a question about a drawn picture (`states`: one object; `scenes`: two objects), of a seed that
it was not trained with, and `vlmscope.explain` maps the answer. Of the exact map in both directions, the
gradient's estimate, knock-outs and attention this says

- how often the strongest cell lies on the answer's object: the mask covers half of it (`half`), or some of
  it (`some`), or on the other object that the question names (`other`); beside it on masks of other examples
  (`null`), and where no map can know: the same question about the picture with its cells shuffled
  (`shuffled`), and the toy with random weights (`random`);
- how fast P(answer) falls when cells are blurred in the map's order (`deletion`: lower is better), and how
  fast it comes when they are put into the blurred picture (`insertion`: higher is better), as the area below
  the curve, beside that of a random order.

Features are replaced where the language model reads them, as `explain` does. With `--words` only answers
that are a color or a shape are asked for, of so many pictures of each toy and set, and only the exact map is
made; beside it the map of *pixels*, as with `explain --at pixels`: the cell is blurred where it enters the
vision tower, or put into the blurred picture, and all of the model run anew. Here `binding` is asked about,
too: four objects, of which the question names the one whose color is the answer, so that the answer depends
on no other. What it depends on is measured: how often it changes when the answer's object is taken out of the
picture (its pixels get the mean color of all others; `without`), and when another object is that the question
or its options are about (`without other`). `named` is how often the strongest cell is on any of these.
That goes into the result that is there (`words`). The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import stats

import vlmscope
from vlmscope.data import fills
from vlmscope.data.masks import covered, object_of
from vlmscope.explanation import maps
from vlmscope.explanation.said import say

GRID, SIDE = (6, 6), 96
ENTERS = {"toy-llava": "decoder.0.resid_pre@{}", "toy-blip": "vision.2.output@{}"}
"""Where the language part takes over the picture."""
MAPS = {"exact": "noise", "exact, denoise": "denoise", "gradient": "noise", "knockout": "noise"}
MAPS |= {"attention": "noise"}
STEPS = (0, 1, 2, 3, 4, 6, 9, 12, 18, 27, 36)
WORDS = {"states": ("color", "shape"), "scenes": ("subject", "object"), "binding": ("color",)}
"""Kinds of questions whose answer is a color or a shape."""
OTHERS = 10
"""Of how many other examples the masks are a map's null."""


def share(true: Sequence[float]) -> dict[str, float]:
    """A share with its 95 % interval (Wilson)."""
    found = stats.binomtest(int(sum(true)), len(true)).proportion_ci(method="wilson")
    return {"share": round(float(np.mean(true)), 3), "low": round(found.low, 3), "high": round(found.high, 3)}


def masks_of(example: Any) -> tuple[Any, Any, Any]:
    """The cells of which the answer's object covers half, those of which it covers some, and those of which
    another named object does."""
    name = object_of(example)
    some = {}
    for each in example.masks:
        fine = covered(example, each, (SIDE, SIDE))  # a pixel each
        rows, columns = (side // cells for side, cells in zip(fine.shape, GRID, strict=True))
        some[each] = fine.reshape(GRID[0], rows, GRID[1], columns).any((1, 3))
    # what is named and what is asked about may be one object
    others = [mask for mask in some.values() if not np.array_equal(mask, some[name])]
    return covered(example, name, GRID), some[name], np.any([np.zeros(GRID, bool), *others], 0)


def maps_of(model: Any, image: Any, prompt: str) -> tuple[str, dict[str, Any]]:
    """What a model answers, and the maps of its first word."""
    found: dict[str, Any] = {}
    for name, direction in MAPS.items():
        method = name.split(",")[0]
        if direction not in found:
            found[direction] = vlmscope.explain(model, image, prompt, direction=direction)
        cells = found[direction].cells
        first = cells[cells["word"] == 0].sort_values(["row", "column"])
        found[name] = first[method].to_numpy(float).reshape(GRID)
    answer = found["noise"].about["answer"]
    return answer, {name: found[name] for name in MAPS}


def shuffled(image: Image.Image, rng: random.Random) -> Image.Image:
    """A picture with its cells in another order."""
    width, height = image.width // GRID[1], image.height // GRID[0]
    places = [(c * width, r * height) for r in range(GRID[0]) for c in range(GRID[1])]
    made = image.copy()
    for (left, top), to in zip(places, rng.sample(places, len(places)), strict=True):
        made.paste(image.crop((left, top, left + width, top + height)), to)
    return made


def untrained(name: str, example: Any) -> Any:
    """A toy's model with random weights of the same size, of the first seed with which it says a word."""
    for seed in itertools.count():
        model = vlmscope.load(name)
        torch.manual_seed(seed)
        for weight in model.hf.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=float(weight.detach().std()))
        try:
            say(model, example.clean_image, "blur", example.clean_prompt, [], 8)
        except vlmscope.VlmscopeError:
            continue
        break
    return model


def curves(model: Any, example: Any, orders: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The areas below the curves of deletion and insertion for each order of cells."""
    image = example.clean_image
    blurred = image.filter(ImageFilter.GaussianBlur(max(image.size) / 8))
    where = ENTERS[model.name]
    runs, features = [], []
    for shown in (image, blurred):
        one = vlmscope.Example(
            example.id, shown, example.clean_prompt, example.answer, example.foil, roles=example.roles
        )
        pair = model.prepare(one)
        runs.append(pair)
        (kept,) = model.capture(pair.clean, where.format("image")).values()
        features.append(kept[-GRID[0] * GRID[1] :])
    found = {}
    for name, order in orders.items():
        areas = []
        for base, source in ((0, 1), (1, 0)):
            pair, values = runs[base], []
            for count in STEPS:
                edits = [
                    vlmscope.Edit(
                        where.format(f"image[{n // GRID[1]},{n % GRID[1]}]"), "set", features[source][n]
                    )
                    for n in order[:count]
                ]
                values.append(float(model.run(pair.clean, edits).softmax(-1)[pair.answer]))
            areas.append(float(np.trapezoid(values, STEPS) / STEPS[-1]))
        found[name] = (areas[0], areas[1])
    return found


def measure(name: str, data: str, count: int) -> dict[str, Any]:
    model = vlmscope.load(name)
    examples = [one for one in vlmscope.examples(data, limit=2 * count, seed=5) if object_of(one)]
    examples = [one for one in examples if model.answer(model.prepare(one).clean) == one.answer][:count]
    random_model = untrained(name, examples[0])
    masks = [masks_of(one) for one in examples]
    hits: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    areas: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for n, (one, (half, some, other)) in enumerate(zip(examples, masks, strict=True)):
        rng = random.Random(one.id)
        others = rng.sample([m for k, (_, m, _) in enumerate(masks) if k != n], min(OTHERS, len(masks) - 1))
        answer, maps = maps_of(model, one.clean_image, one.clean_prompt)
        assert answer == one.answer
        for key, values in maps.items():
            best = np.unravel_index(np.nanargmax(values), GRID)
            hits[key]["half"].append(float(half[best]))
            hits[key]["some"].append(float(some[best]))
            hits[key]["other"].append(float(other[best]))
            hits[key]["null"].append(float(np.mean([mask[best] for mask in others])))
        for kind, asked, image in (
            ("shuffled", model, shuffled(one.clean_image, rng)),
            ("random", random_model, one.clean_image),
        ):
            try:
                _, there = maps_of(asked, image, one.clean_prompt)
            except vlmscope.VlmscopeError:  # it says no word
                continue
            for key, values in there.items():
                if np.isfinite(values).any():
                    best = np.unravel_index(np.nanargmax(values), GRID)
                    hits[key][kind].append(float(some[best]))
                    hits[key][f"{kind}, other"].append(float(other[best]))
        orders = {key: np.argsort(-values.ravel(), kind="stable") for key, values in maps.items()}
        orders["random order"] = np.array(rng.sample(range(values.size), values.size))
        for key, pair in curves(model, one, orders).items():
            areas[key].append(pair)
    result: dict[str, Any] = {"n": len(examples)}
    for key, kinds in hits.items():
        result[key] = {
            kind: share(x) if kind != "null" else round(float(np.mean(x)), 3) for kind, x in kinds.items()
        }
    for key, pairs in areas.items():
        deletion, insertion = np.mean(pairs, 0)
        result.setdefault(key, {}).update(
            deletion=round(float(deletion), 3), insertion=round(float(insertion), 3)
        )
    result["chance"] = round(float(np.mean([some for _, some, _ in masks])), 3)
    return result


def words(name: str, data: str, count: int) -> dict[str, Any]:
    """Where the strongest cell is of exact maps of answers that are a color or a shape."""
    model = vlmscope.load(name)
    rows = []
    for one in vlmscope.examples(data, limit=4 * count, seed=5):
        if len(rows) == count:
            break
        if one.groups["kind"] not in WORDS[data] or object_of(one) is None:
            continue
        said = say(model, one.clean_image, "blur", one.clean_prompt, [], 8)
        if said.words[0].text != one.answer:
            continue
        _, some, other = masks_of(one)
        row = {"kind": one.groups["kind"], **without(model, one)}
        for direction in ("noise", "denoise"):
            for at in WAYS:
                exact = maps.exact(replace(said, at=at), direction, GRID[0] * GRID[1])
                values = exact.effects[:, 0].reshape(GRID)
                best = np.unravel_index(values.argmax(), GRID)
                key = f"{at}, {direction}"
                row |= {key: some[best], f"{key}, other": other[best], f"{key}, named": (some | other)[best]}
        rows.append(row)
    result = {}
    for kind in (*WORDS[data], "all"):
        own = [row for row in rows if kind in ("all", row["kind"])]
        names = dict.fromkeys(key for row in own for key in row if key != "kind")
        held = {key: [float(row[key]) for row in own if key in row] for key in names}
        result[kind] = {key: {**share(hits), "n": len(hits)} for key, hits in held.items()}
    return result


def without(model: Any, example: Any) -> dict[str, bool]:
    """Whether a model answers otherwise when an object is taken out of the picture: the answer's, another."""
    picture, where = fills.region(example)
    regions = {"without": where}
    for name in example.masks:
        _, there = fills.region(example, name)
        if not (there & where).any():
            regions["without other"] = regions.get("without other", np.zeros_like(there)) | there
    found = {}
    for key, region in regions.items():
        changed = fills.fill(picture, region, "mean")
        found[key] = model.answer(model.inputs(changed, example.clean_prompt)) != example.answer
    return found


def markdown(result: dict[str, Any]) -> list[str]:
    """The tables of `docs/explain.md`."""
    kinds = [name for name in result if ", " in name]
    first, second = ([["map", *kinds]] for _ in range(2))
    for key in MAPS:
        some = [result[kind][key] for kind in kinds]
        first.append([key, *(" · ".join(_share(one, x) for x in NULLS) for one in some)])
    for key in (*MAPS, "random order"):
        some = [result[kind][key] for kind in kinds]
        second.append([key, *(f"{one['deletion']:.2f} · {one['insertion']:.2f}" for one in some)])
    ways = [(at, direction) for at in WAYS for direction in DIRECTIONS]
    third = [["the word is a …", *(f"{at}: {DIRECTIONS[direction]}" for at, direction in ways)]]
    fourth = [["the word is a …", "without its object", "without another", *third[0][3:]]]
    for kind, words in result["words"].items():
        for word, found in words.items():
            row = f"{kind}: {word}"
            cells = [found[f"{at}, {direction}"] for at, direction in ways]
            shown = [f"{x['share']:.0%} [{x['low']:.0%}, {x['high']:.0%}] of {x['n']}" for x in cells]
            third.append([row, *shown])
            keys = ["without", "without other", *(f"pixels, {direction}, named" for direction in DIRECTIONS)]
            if "without other" in found:
                fourth.append([row, *(f"{found[key]['share']:.0%}" for key in keys)])
    return [_table(rows) for rows in (first, second, third, fourth)]


WAYS, DIRECTIONS = ("features", "pixels"), {"noise": "needs", "denoise": "is enough"}

NULLS = ("some", "null", "shuffled", "random")


def _share(one: dict[str, Any], kind: str) -> str:
    """A share, of which those of maps have an interval, too; of models that said no word there is none."""
    found = one.get(kind)
    if found is None:
        return "–"
    return f"{found['share'] if isinstance(found, dict) else found:.0%}"


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=100, help="of each toy and set")
    parser.add_argument("--words", type=int, help="only colors and shapes, of so many pictures")
    parser.add_argument("--only", default="", help="a toy, or 'toy-blip, scenes'; other figures stay")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sets = [(name, data) for name in ENTERS for data in (WORDS if given.words else ("states", "scenes"))]
    sets = [(name, data) for name, data in sets if f"{name}, {data}".startswith(given.only)]
    result: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "seed": 5}
    if given.words or given.only:
        result = json.loads(given.out.read_text("utf-8"))
    if given.words:
        result.setdefault("words", {})
        for name, data in sets:
            one = result["words"][f"{name}, {data}"] = words(name, data, given.words)
            print(f"{name}, {data}: {json.dumps(one)}", flush=True)
    else:
        for name, data in sets:
            one = result[f"{name}, {data}"] = measure(name, data, given.examples)
            for key in (*MAPS, "random order"):
                print(f"{name}, {data}, {one['n']} pictures: {key}: {json.dumps(one[key])}", flush=True)
    if "words" in result:
        print(*markdown(result), sep="\n\n")
    text = json.dumps(result)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

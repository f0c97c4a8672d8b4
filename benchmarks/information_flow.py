"""Two published experiments on how a picture reaches the answer, on the toys and held-out pictures.

    python benchmarks/information_flow.py [--examples 200] [--out benchmarks/results/NAME.json]

- *where information comes in* (Zhang et al. 2024, arXiv 2411.18620): attention from the last position or
  the question's words to the picture or to the question is cut in windows of layers;
- *where the object is* (Neo et al. 2024, arXiv 2410.07149): image tokens of the answer's object, with and
  without the patches around it, or as many others drawn at random, are replaced by the mean token, or what
  reads the picture no longer reads them; how well each token says the answer, by layer.

An answer is flipped when LD, which was above 0, is below it. Shares have 95 % intervals (Wilson). The
pictures are of a seed that the toys were not trained with. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy import stats

import vlmscope
from vlmscope.data.masks import object_of

EDGES = ("last<image", "last<question", "question<image")
READS = {"toy-llava": "decoder.{}.attn@last<{}", "toy-blip": "encoder.{}.cross@text<{}"}
"""By which edges a toy's words read the picture; in toy-llava those of the last position."""
LAYERS = {"toy-llava": 4, "toy-blip": 3}
ENTERS = {"toy-llava": "decoder.0.resid_pre@{}", "toy-blip": "vision.2.output@{}"}
"""Where the language part takes over the picture."""
PLACES = ("image", "image[{}]", "image[{}+1]", "image[-{}]", "image[-{}+1]")


def share(true: pd.Series) -> dict[str, Any]:
    """A share with its 95 % interval."""
    found = stats.binomtest(int(true.sum()), len(true)).proportion_ci(method="wilson")
    return {"share": round(float(true.mean()), 3), "low": round(found.low, 3), "high": round(found.high, 3)}


def moved(rows: pd.DataFrame) -> dict[str, Any]:
    """How many answers a patch flips, of those that were right, and how much of P(answer) it takes."""
    right = rows[rows["ld"] > 0]
    flipped = share(right["ld"] + right["ld_change"] < 0)
    return {"flipped": flipped, "p_change": round(float(right["p_change"].mean()), 3), "n": len(right)}


def flows(model: Any, examples: Sequence[Any]) -> list[dict[str, Any]]:
    """What P(answer) loses when an edge is cut, by window and layer."""
    sites = [f"decoder.*/{window}.attn@{edge}" for window in (1, 3) for edge in EDGES]
    table = vlmscope.flow_table(vlmscope.knockout(model, examples, sites))
    columns = ["edge", "window", "layer", "mean", "low", "high", "n"]
    return json.loads(table[columns].round(3).to_json(orient="records"))  # null for no interval


def cells_of(model: Any, example: Any) -> tuple[list[str], list[str]]:
    """The places of the picture that an object with its margin covers, and all others."""
    tower = "decoder" if model.name == "toy-llava" else "vision"
    layout = model.prepare(example).clean.layout[tower]
    own = {layout.cells[n] for n in layout.objects[object_of(example)]}
    near = {(r + i, c + j) for r, c in own for i in (-1, 0, 1) for j in (-1, 0, 1)}
    every = sorted(layout.cells.values())
    names = [f"image[{r},{c}]" for r, c in every if (r, c) in near]
    return names, [f"image[{r},{c}]" for r, c in every if (r, c) not in near]


def objects(model: Any, examples: Sequence[Any]) -> dict[str, Any]:
    """Object, surroundings and others: their tokens replaced by the mean, or no longer read."""
    image = ENTERS[model.name].format("image")
    captured = [model.capture(model.prepare(one).clean, image) for one in examples]
    mean = torch.cat([tokens for one in captured for tokens in one.values()]).mean(0)
    rows = []
    for one in examples:
        pair, (near, far) = model.prepare(one), cells_of(model, one)
        clean = model.run(pair.clean)
        others = random.Random(one.id).sample(far, min(len(near), len(far)))
        for place in (*PLACES, "as many others"):
            cells = others if place == "as many others" else [place.format(object_of(one))]
            edits = [vlmscope.Edit(ENTERS[model.name].format(cell), "set", mean) for cell in cells]
            replaced = model.run(pair.clean, edits)
            about = {"place": place.format("object"), "ld": ld(clean, pair)}
            change = {"ld_change": ld(replaced, pair) - ld(clean, pair)}
            p = [float(logits.softmax(-1)[pair.answer]) for logits in (clean, replaced)]
            rows.append({**about, "way": "mean token", **change, "p_change": p[1] - p[0]})
            edges = [READS[model.name].format(n, cell) for n in range(LAYERS[model.name]) for cell in cells]
            (cut,) = vlmscope.knockout(model, [one], " + ".join(edges), check=0).to_dict("records")
            rows.append({**about, "way": "not read", **{k: cut[k] for k in ("ld_change", "p_change")}})
    table = pd.DataFrame(rows)
    keys = table["place"] + ": " + table["way"]
    return {str(key): moved(some) for key, some in table.groupby(keys, sort=False)}


def ld(logits: torch.Tensor, pair: Any) -> float:
    return float(logits[pair.answer] - logits[pair.foil])


def said(model: Any, examples: Sequence[Any]) -> list[dict[str, Any]]:
    """How well tokens of the object and others say the answer: of its null's words, how many it beats."""
    words = vlmscope.lens(model, examples, ["decoder.*.resid@image*"]).words
    words = words[words["what"] == "answer"]
    near = {one.id: set(cells_of(model, one)[0]) for one in examples}
    inside = [slot in near[one] for one, slot in zip(words["example"], words["slot"], strict=True)]
    table = words.assign(object=inside).groupby(["layer", "object"])[["beaten", "p"]].mean()
    return json.loads(table.round(3).reset_index().to_json(orient="records"))


def markdown(result: dict[str, Any]) -> list[str]:
    """The tables of `docs/information-flow.md`."""
    kinds = [name for name in result if ", " in name]
    flow = pd.DataFrame(result["toy-llava, states"]["flows"])
    flow = flow[flow["window"] == 1]
    layers = sorted(flow["layer"].unique())
    first = [["edge", *(f"layer {n}" for n in layers)]]
    for edge in EDGES:
        rows = flow[flow["edge"] == edge].set_index("layer")
        first.append([edge.replace("<", " ← "), *map(_interval, rows.loc[layers].to_dict("records"))])
    second = [["image tokens", *kinds]]
    for place in result[kinds[0]]["objects"]:
        cells = [result[kind]["objects"][place]["flipped"] for kind in kinds]
        second.append([place, *(f"{x['share']:.1%} [{x['low']:.1%}, {x['high']:.1%}]" for x in cells)])
    return [_table(first), _table(second)]


def _interval(row: dict[str, Any]) -> str:
    if pd.isna(row["low"]):
        return f"{row['mean']:+.3f}"
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "seed": 5}
    for name in READS:
        model = vlmscope.load(name)
        for data in ("states", "scenes"):
            examples = [
                one for one in vlmscope.examples(data, limit=given.examples, seed=5) if object_of(one)
            ]
            found: dict[str, Any] = {"objects": objects(model, examples)}
            if name == "toy-llava":
                found |= {"flows": flows(model, examples), "said": said(model, examples[:40])}
            result[f"{name}, {data}"] = found
            for place, one in found["objects"].items():
                flipped = one["flipped"]
                print(
                    f"{name}, {data}: {place}: {flipped['share']:.1%} [{flipped['low']:.1%}, "
                    f"{flipped['high']:.1%}] of {one['n']} flipped, P {one['p_change']:+.3f}",
                    flush=True,
                )
    print(*markdown(result), sep="\n\n")
    text = json.dumps(result)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Two published experiments on how a picture reaches the answer, on the toys and held-out pictures.

    python benchmarks/information_flow.py [--examples 100] [--out benchmarks/results/NAME.json]

- *where information comes in* (Zhang et al. 2024, arXiv 2411.18620): attention from the last position or
  the question's words to the picture, its parts or the question is cut in windows of layers;
- *where the object is* (Neo et al. 2024, arXiv 2410.07149): image tokens of the answer's object, with and
  without the patches around it, as many drawn at random, or as many of the largest integrated gradient, are
  replaced by the mean token; what reads the picture no longer reads some of them, in some layers; how well
  each token says the answer, by layer.

An answer is flipped when LD, which was above 0, is below it; only examples that are right count. Shares have
95 % intervals (Wilson), means those of `vlmscope.stats.interval`. The pictures are of a seed that the toys
were not trained with. Every row that a number is made of goes beside the JSON (`NAME-rows.parquet`), and
`benchmarks/flow_figures.py` draws the figures of `docs/information-flow.md`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy import stats

import vlmscope
from vlmscope.data.masks import object_of
from vlmscope.runs.forward import forward
from vlmscope.sites import Point
from vlmscope.studies.tables import means

TOYS, SETS = ("toy-llava", "toy-blip"), ("states", "scenes")
READS = {"toy-llava": "decoder.{}.attn@last<{}", "toy-blip": "encoder.{}.cross@text<{}"}
"""By which edges a toy's words read the picture; in toy-llava those of the last position."""
LAYERS = {"toy-llava": 4, "toy-blip": 3}
ENTERS = {"toy-llava": "decoder.0.resid_pre@{}", "toy-blip": "vision.2.output@{}"}
"""Where the language part takes over the picture."""
TO_LAST = ("last<image", "last<question", "last<last", "question<image")
FLOWS = {
    "toy-llava": (*TO_LAST, "last<{o}", "last<{x}", "question<{o}", "question<{x}"),
    "toy-blip": ("question<image", "question<{o}", "question<{x}"),
}
"""Edges that are cut in windows; `o` is the object with the patches around it, `x` all other patches."""
WINDOWS = {"toy-llava": (1, 3), "toy-blip": (1,)}
RANGES = {
    "toy-llava": {"0-1": (0, 1), "1-2": (1, 2), "2-3": (2, 3), "all": (0, 1, 2, 3)},
    "toy-blip": {"0": (0,), "1": (1,), "2": (2,), "all": (0, 1, 2)},
}
"""Layers in which the picture is not read."""
PLACES = ("image", "object", "object+1", "object+2", "-object", "-object+1", "as many others")
SOME = ("image", "object+1", "-object+1")
"""Those that are also cut in some layers only."""
PICKED = ("at random", "by gradient")
STEPS = 8
"""Points of an integrated gradient."""
FEW = 40
"""Pictures of a set of which image tokens are read, and whose mean token is taken."""
COLUMNS = "model data part what how layers window example tokens before after".split()

# --- rows ------------------------------------------------------------------------------------


def flow_rows(model: Any, one: Any) -> Iterator[dict[str, Any]]:
    """P(answer) before and after an edge is cut in a window of layers."""
    own = {"o": f"image[{object_of(one)}+1]", "x": f"image[-{object_of(one)}+1]"}
    names = {"o": "object+1", "x": "-object+1"}
    form = "decoder.{}.attn@{}" if model.name == "toy-llava" else "encoder.{}.cross@{}"
    about, sites = [], []
    for window in WINDOWS[model.name]:
        for edge in FLOWS[model.name]:
            for layer in range(LAYERS[model.name]):
                at = edge.format(**own)
                if model.name == "toy-blip":  # what its question reads with
                    at = at.replace("question", "text")
                sites.append(form.format(f"{layer}/{window}" if window > 1 else layer, at))
                about.append({"what": edge.format(**names), "layers": str(layer), "window": window})
    for said, row in zip(about, vlmscope.knockout(model, [one], sites, check=0).itertuples(), strict=True):
        yield {"part": "flow", **said, "before": row.p_patched - row.p_change, "after": row.p_patched}


def cells_of(model: Any, one: Any) -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
    """The position of each cell of the picture, and the object's own cells."""
    layout = model.prepare(one).clean.layout["decoder" if model.name == "toy-llava" else "vision"]
    own = {layout.cells[n] for n in layout.objects[object_of(one)]}
    return dict(sorted((cell, n) for n, cell in layout.cells.items())), own


def places_of(model: Any, one: Any) -> dict[str, list[str]]:
    """The cells of the picture that each place stands for."""
    every, own = cells_of(model, one)
    near = [
        [(r, c) for r, c in every if any(max(abs(r - i), abs(c - j)) <= margin for i, j in own)]
        for margin in range(3)
    ]
    far = [cell for cell in every if cell not in near[1]]
    others = random.Random(one.id).sample(far, min(len(near[1]), len(far)))
    places = dict(zip(PLACES[1:4], near, strict=True))
    places |= {f"-{name}": [cell for cell in every if cell not in places[name]] for name in PLACES[1:3]}
    places |= {"image": list(every), "as many others": others}
    return {name: [f"image[{r},{c}]" for r, c in places[name]] for name in PLACES}


def gradients(model: Any, one: Any, mean: torch.Tensor) -> list[float]:
    """The size of the answer's integrated gradient at each cell, from the mean token to its own."""
    pair, (positions, _) = model.prepare(one), cells_of(model, one)
    at, where = list(positions.values()), ENTERS[model.name]
    tower, layer, kind = where.partition("@")[0].split(".")
    point = Point(tower, int(layer), kind)
    own = forward(model, pair.clean, keep=[point]).values[point][0, at]
    total = torch.zeros_like(own)
    for step in range(STEPS):
        tokens = mean + (step + 0.5) / STEPS * (own - mean)
        edit = vlmscope.Edit(where.format("image"), "set", tokens)
        run = forward(model, pair.clean, [edit], keep=[point], grad=True)
        (slope,) = torch.autograd.grad(run.logits[-1, pair.answer], run.values[point])
        total += slope[0, at] / STEPS
    return (total * (own - mean)).sum(-1).abs().tolist()


def object_rows(model: Any, one: Any, mean: torch.Tensor) -> Iterator[dict[str, Any]]:
    """LD before and after tokens of a place are replaced by the mean token, or not read in some layers."""
    pair, places = model.prepare(one), places_of(model, one)
    before, every = ld(model.run(pair.clean), pair), places["image"]
    slopes = gradients(model, one, mean)
    steepest = [cell for _, cell in sorted(zip(slopes, every, strict=True), reverse=True)]
    drawn = random.Random(one.id).sample(every, len(every))
    names = named(one) | {"as many others": places["as many others"]}
    picked = {
        f"{place}: as many {how}": order[: len(places[place])]
        for place in PLACES[1:4]
        for how, order in zip(PICKED, (drawn, steepest), strict=True)
    }
    for place, parts in (names | picked).items():
        edits = [vlmscope.Edit(ENTERS[model.name].format(part), "set", mean) for part in parts]
        tokens = len(places.get(place, parts))
        row = {"part": "object", "what": place, "how": "mean token", "layers": "all", "tokens": tokens}
        yield {**row, "before": before, "after": ld(model.run(pair.clean, edits), pair)}
    about, sites = [], []
    for layers, numbers in RANGES[model.name].items():
        for place in PLACES if layers == "all" else SOME:
            about.append({"what": place, "how": "not read", "layers": layers, "tokens": len(places[place])})
            edges = [READS[model.name].format(n, part) for n in numbers for part in names[place]]
            sites.append(" + ".join(edges))
    cut = vlmscope.knockout(model, [one], sites, check=0)
    for said, row in zip(about, cut.itertuples(), strict=True):
        yield {"part": "object", **said, "before": before, "after": before + row.ld_change}


def named(one: Any) -> dict[str, list[str]]:
    """The places as the language of sites has them, but for those that are drawn."""
    inner = {place: place.replace("object", object_of(one)) for place in PLACES[1:6]}
    return {"image": ["image"]} | {place: [f"image[{name}]"] for place, name in inner.items()}


def ld(logits: torch.Tensor, pair: Any) -> float:
    return float(logits[pair.answer] - logits[pair.foil])


def said_rows(model: Any, examples: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """How well tokens of the object (with those around it) and others say the answer: of its null's words,
    the share that it beats, a mean over the tokens of an example."""
    words = vlmscope.lens(model, examples, ["decoder.*.resid@image*"]).words
    words = words[words["what"] == "answer"]
    near = {one.id: set(places_of(model, one)["object+1"]) for one in examples}
    inside = [slot in near[one] for one, slot in zip(words["example"], words["slot"], strict=True)]
    table = words.assign(what=["object+1" if each else "-object+1" for each in inside])
    for (what, layer, one), rows in table.groupby(["what", "layer", "example"]):
        row = {"part": "said", "what": what, "layers": str(layer), "tokens": len(rows), "example": one}
        yield {**row, "after": rows["beaten"].mean()}


def mean_token(model: Any, examples: Sequence[Any]) -> torch.Tensor:
    image = ENTERS[model.name].format("image")
    captured = [model.capture(model.prepare(one).clean, image) for one in examples]
    return torch.cat([tokens for one in captured for tokens in one.values()]).mean(0)


def examples_of(data: str, count: int) -> list[Any]:
    return [one for one in vlmscope.examples(data, limit=count, seed=5) if object_of(one)]


def measured(name: str, data: str, count: int) -> pd.DataFrame:
    """All rows of a toy and a set."""
    model, examples = vlmscope.load(name), examples_of(data, count)
    mean = mean_token(model, examples_of(data, FEW))
    rows = [row for one in examples for row in rows_of(model, one, mean)]
    if name == "toy-llava":
        rows += said_rows(model, examples[:FEW])
    return table_of(name, data, rows)


def rows_of(model: Any, one: Any, mean: torch.Tensor) -> list[dict[str, Any]]:
    return [{**row, "example": one.id} for row in (*flow_rows(model, one), *object_rows(model, one, mean))]


def table_of(name: str, data: str, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=COLUMNS).assign(model=name, data=data)
    digits = {column: table[column].map("{:.4g}".format).astype(float) for column in ("before", "after")}
    return table.assign(
        **digits, window=table["window"].astype("Int8"), tokens=table["tokens"].astype("Int8")
    )


# --- numbers ---------------------------------------------------------------------------------


def numbers(rows: pd.DataFrame) -> dict[str, Any]:
    """What tables and figures show, by toy and set."""
    result = {}
    for (name, data), some in rows.groupby(["model", "data"], sort=False):
        found = {"flows": flows(some), "objects": objects(some)}
        if (some["part"] == "said").any():
            found["said"] = said(some)
        result[f"{name}, {data}"] = found
    return result


def right(rows: pd.DataFrame) -> set[str]:
    """The examples that are answered rightly."""
    return set(rows.loc[(rows["part"] == "object") & (rows["before"] > 0), "example"])


def flows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The relative change of P(answer), (p' − p)/p, by edge, window and layer."""
    own = rows[(rows["part"] == "flow") & rows["example"].isin(right(rows))]
    own = own.assign(change=own["after"] / own["before"] - 1, layer=own["layers"].astype(int))
    table = means(own, ["what", "window", "layer"], "change", intervals=True)
    return records(table[["what", "window", "layer", "mean", "low", "high", "n"]])


def objects(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The share of right answers that are flipped, by place, layers and what is done to it."""
    own = rows[(rows["part"] == "object") & rows["example"].isin(right(rows))]
    found = []
    for (what, how, layers), some in own.groupby(["what", "how", "layers"], sort=False):
        flipped = int((some["after"] < 0).sum())
        ends = stats.binomtest(flipped, len(some)).proportion_ci(method="wilson")
        row = {"what": what, "how": how, "layers": layers, "tokens": some["tokens"].mean()}
        row |= {"share": flipped / len(some), "low": ends.low, "high": ends.high, "n": len(some)}
        found.append(row)
    return records(pd.DataFrame(found))


def said(rows: pd.DataFrame) -> list[dict[str, Any]]:
    own = rows[rows["part"] == "said"]
    table = means(own.assign(layer=own["layers"].astype(int)), ["what", "layer"], "after", intervals=True)
    return records(table[["what", "layer", "mean", "low", "high", "n"]])


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.round(3).to_json(orient="records"))  # null for no interval


# --- tables ----------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> list[str]:
    """The tables of `docs/information-flow.md`."""
    kinds = [name for name in result if ", " in name]
    flow = pd.DataFrame(result["toy-llava, states"]["flows"])
    flow = flow[flow["window"] == 1]
    layers = sorted(flow["layer"].unique())
    first = [["edge", *(f"layer {n}" for n in layers)]]
    for edge in TO_LAST:
        rows = flow[flow["what"] == edge].set_index("layer")
        first.append([edge.replace("<", " ← "), *map(_interval, rows.loc[layers].to_dict("records"))])
    second = [["image tokens", *kinds]]
    tables = [pd.DataFrame(result[kind]["objects"]) for kind in kinds]
    wanted = [(place, how) for place in PLACES for how in ("mean token", "not read")]
    wanted += [(f"object+1: as many {how}", "mean token") for how in PICKED]
    for place, how in wanted:
        named = place if place == "image" or ":" in place or "others" in place else f"image[{place}]"
        cells = [_row(table, what=place, how=how, layers="all") for table in tables]
        shown = [f"{x['share']:.1%} [{x['low']:.1%}, {x['high']:.1%}]" for x in cells]
        second.append([f"{named}: {how}", *shown])
    return [_table(first), _table(second)]


def _row(table: pd.DataFrame, **values: Any) -> dict[str, Any]:
    own = table
    for name, value in values.items():
        own = own[own[name] == value]
    (row,) = own.to_dict("records")
    return row


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
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    parts = []
    for name in TOYS:
        for data in SETS:
            parts.append(measured(name, data, given.examples))
            for row in objects(parts[-1]):
                line = "{what}: {how}, layers {layers}: {share:.1%} [{low:.1%}, {high:.1%}] of {n} flipped"
                print(f"{name}, {data}: {line.format(**row)}", flush=True)
    rows = pd.concat(parts, ignore_index=True)
    about = {"machine": platform.machine(), "torch": torch.__version__, "seed": 5}
    result = about | numbers(rows)
    print(*markdown(result), sep="\n\n")
    text = json.dumps(result)
    if given.out:
        rows.to_parquet(given.out.with_name(f"{given.out.stem}-rows.parquet"), compression="zstd")
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Pairs that are made against those that are true: is the answer taken away, and are the heads the same?

    python benchmarks/inpainting.py --out benchmarks/results/inpainting-cpu.json

The drawn sets know the true counterfactual, the picture with the foil in it. Of examples answered rightly,
`taken` is the share that a fill makes answered otherwise, and `half` the share whose LD it at least halves;
`blank` is the share that is answered otherwise where all of the picture is its mean color: what is not is
guessed by the question alone, and no fill can take that away.
`rho` is Spearman's correlation, over the heads, of their mean effects on LD (denoising) on the pairs that are
kept with those on true pairs of the same examples; `halves` is that of the true pairs of two halves of these
examples, which says how far half as many agree with themselves. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats

import vlmscope
from vlmscope.data import BUILT_IN, fills
from vlmscope.data.images import open_image
from vlmscope.patching.scores import agrees
from vlmscope.studies.inpainting import inpaint

SITES = {
    "toy-blip": [f"encoder.*.{kind}.h*@answer" for kind in ("attn", "cross")]
    + [f"decoder.*.{kind}.h*@readout" for kind in ("attn", "cross")],
    "toy-llava": ["decoder.*.attn.h*@readout", "decoder.*.attn.h*@answer"],
}
SETS, FILLS = BUILT_IN, ("mean", "blur", "shuffle")


def share(hits: Any) -> dict[str, Any]:
    """A share with its 95 % interval (Wilson)."""
    found = stats.binomtest(int(np.sum(hits)), len(hits)).proportion_ci(method="wilson")
    return {
        "n": len(hits),
        "share": round(float(np.mean(hits)), 3),
        "low": round(found.low, 3),
        "high": round(found.high, 3),
    }


def effects(model: Any, examples: Any) -> Any:
    """The effect of each head on LD in each example, in logits: `(site, example)`."""
    table = vlmscope.sweep(model, examples, SITES[model.name], "image", check=0)
    return table.pivot_table(index="site", columns="example", values="logit_diff")


def correlation(one: Any, other: Any) -> float:
    """Of the means over examples."""
    return round(float(stats.spearmanr(one.mean(axis=1), other.mean(axis=1)[one.index]).statistic), 3)


def filled(example: Any, how: Any, seed: int) -> Any:
    """The pair, whatever a model says of it."""
    picture, where = fills.region(example)
    return replace(example, corrupt_image=fills.fill(picture, where, how, seed))


def blank(model: Any, examples: Any) -> dict[str, Any]:
    """How many of the examples that are answered rightly are answered otherwise without any picture."""
    taken = []
    for one in examples:
        picture = open_image(one.clean_image)
        if agrees(model.answer(model.inputs(picture, one.clean_prompt)), one.answer):
            nothing = picture.resize((1, 1), Image.Resampling.BOX).resize(picture.size)
            taken.append(not agrees(model.answer(model.inputs(nothing, one.clean_prompt)), one.answer))
    return share(taken)


def measure(model: Any, data: str, many: int) -> dict[str, Any]:
    examples = vlmscope.examples(data, limit=many, seed=3)
    true = effects(model, examples)
    result: dict[str, Any] = {"blank": blank(model, examples)}
    for how in FILLS:
        made = inpaint(model, examples, fill=how)
        tried = made.tried[made.tried["after"].notna()]
        seeds = dict(zip(tried["example"], tried["seed"], strict=True))
        base = vlmscope.baselines(
            model, [filled(one, how, seeds[one.id]) for one in examples if one.id in seeds]
        )
        fallen = base["ld_corrupt"] <= base["ld_clean"] / 2
        kept = [one.id for one in made.examples]
        result[how] = {
            "taken": share(tried["kept"].to_numpy(bool)),
            "half": share(fallen.to_numpy(bool)),
            "rho": correlation(effects(model, made.examples), true[kept]),
            "halves": correlation(true[kept[::2]], true[kept[1::2]]),
            "heads": len(true),
        }
        print(model.name, data, how, json.dumps(result[how]), flush=True)
    return result


def markdown(result: dict[str, Any]) -> list[str]:
    """The table of `docs/data.md`."""
    lines = [
        "| model, set | fill | answer taken away | by a blank picture | LD halved | rank correlation "
        "| of halves |",
        "|---" * 7 + "|",
    ]
    for kind in (name for name in result if name.endswith(SETS)):
        for how in FILLS:
            one = result[kind][how]
            shares = [
                f"{x['share']:.0%} ({x['low']:.0%} to {x['high']:.0%})"
                for x in (one["taken"], result[kind]["blank"], one["half"])
            ]
            lines.append(
                f"| {kind} | {how} | {' | '.join(shares)} | {one['rho']:.2f} | {one['halves']:.2f} |"
            )
    return ["\n".join(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=60, help="of each toy and set")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "seed": 3}
    result["examples"] = given.examples
    for name in SITES:
        model = vlmscope.load(name)
        for data in SETS:
            result[f"{name}, {data}"] = measure(model, data, given.examples)
    for name in SITES:
        for how in FILLS:
            some = [result[f"{name}, {data}"][how]["taken"] for data in SETS]
            hits, n = sum(round(one["share"] * one["n"]) for one in some), sum(one["n"] for one in some)
            result[f"{name}, {how}"] = share([1] * hits + [0] * (n - hits))
            print(name, how, json.dumps(result[f"{name}, {how}"]))
    print(*markdown(result), sep="\n")
    text = json.dumps(result)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

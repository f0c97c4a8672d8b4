"""How well vlmscope finds circuits that were planted in random models of the real classes.

    python benchmarks/planted/run.py [--quick] [--seeds 20] [--out benchmarks/results/planted-cpu.json]
    python benchmarks/planted/run.py --submission FILE.csv --form C --effect 0.1 --seed 0

The models are made from their recipes each time (`planting`); nothing is stored. In the grid of cells each
head's effect is computed by plain torch on many examples at once (`plain`), which is what
`vlmscope.sweep` gives, and `tool` holds the two against each other on models of each form. What is
documented in docs/benchmark.md goes for all figures. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pictures import COLORS, Scenes, batch, scenes
from plain import Part, Runs
from planting import APART, DECOYS, TRUE, Planted, Recipe, heads_of, plant
from random_models import HEADS, LAYERS, NEURONS
from scores import auroc, chosen, confusion, macro_f1, ranking, summary

import vlmscope
from vlmscope import neurons
from vlmscope.stats import interval
from vlmscope.studies import circuits, heads
from vlmscope.studies.sweep import sweep_to

FORMS = (("C", "head"), ("D", "head"), ("D", "neurons"))
EFFECTS = (0.01, 0.03, 0.1, 0.3, 1.0)
KNOBS: tuple[dict[str, Any], ...] = (
    {"noise": 0.25},
    {"noise": 1.0},
    {"sharpness": 1.0},
    {"sharpness": 16.0},
    {"copies": 2},
    {"copies": 4},
    {"polysemantic": True},
)
"""Each at an effect of 10 %, all else as in `Recipe`."""
EXAMPLES = 64
"""On how many examples a ranking is made."""
SHOWN = 24
"""On how many the slower measures are."""
POPULATION = 10_000
"""From how many examples the true effects come that intervals should cover."""
SAMPLES = 40
FRESH = 500_000
"""Seeds of the examples that are measured, apart from those that parts are fitted on."""


def sites_of(form: str) -> list[str]:
    if form == "D":
        return ["decoder.*.attn.h*@last"]
    return ["encoder.*.attn.h*@noun", "encoder.*.cross.h*@noun", "decoder.*.cross.h*@readout"]


def name_of(recipe: Recipe) -> str:
    return recipe.form if recipe.form == "C" else f"{recipe.form}-{recipe.say}"


@dataclass(frozen=True, eq=False)
class Measured:
    """Of one model: LD's change by each head (examples × heads), and the mean gap."""

    effects: dict[Part, np.ndarray]
    gap: float

    def mean(self) -> dict[Part, float]:
        return {part: float(found.mean()) for part, found in self.effects.items()}


def measure(made: Planted, given: Scenes, parts: list[Part]) -> Measured:
    runs = Runs(made.model.hf, batch(made.model, given), parts, HEADS)
    return Measured({part: runs.patched([part]).double().numpy() for part in parts}, runs.gap)


def assessed(found: Measured) -> pd.DataFrame:
    """What `circuits` says of these effects, a row a head: the heads of each tower and kind together."""
    groups: dict[str, list[Part]] = {}
    for part in found.effects:
        tower, _, kind, _ = part.split(".")
        groups.setdefault(f"{tower}.{kind}", []).append(part)
    tables, ids = [], [f"p{n}" for n in range(len(next(iter(found.effects.values()))))]
    for parts in groups.values():
        scores = np.stack([found.effects[part] for part in parts], 1)
        table = circuits.assess(scores, ids, least=circuits.SHARE * abs(found.gap))
        tables.append(table.assign(part=parts))
    return pd.concat(tables, ignore_index=True)


def peaks(made: Planted, given: Scenes) -> dict[Part, float]:
    """The largest attention weight of each head where it is read, meant over some examples."""
    total: dict[Part, float] = {}
    for example in given.examples()[:8]:
        inputs = made.model.prepare(example).clean
        for site in sites_of(made.recipe.form):
            tower, _, kind, rest = site.split(".")
            at = rest.split("@")[1]
            paid = made.model.attention(inputs, tower, kind, "last" if at == "readout" else at)
            for layer, rows in enumerate(paid[:, :, 0].amax(-1)):
                for head, most in enumerate(rows.tolist()):
                    part = f"{tower}.{layer}.{kind}.h{head}"
                    total[part] = total.get(part, 0.0) + most / 8
    return total


def one(recipe: Recipe) -> dict[str, Any]:
    """All figures of one model."""
    made, given = plant(recipe), scenes(EXAMPLES, FRESH + recipe.seed)
    found = measure(made, given, heads_of(recipe.form))
    result: dict[str, Any] = {"gap": found.gap, "r2": made.fit.get("r2")}
    mean = found.mean()
    result["heads"] = ranking(mean, made.roles)
    result["attention"] = ranking(peaks(made, given), made.roles)
    table = assessed(found)
    for rule in ("important", "confirmed", "important_published"):
        result[rule] = chosen(set(table.loc[table[rule], "part"]), made.roles, heads_of(recipe.form))
        picked = table[table[rule]]
    picked = table[table["important"]]
    result["roles"] = {
        role: float(np.mean([mean[p] / found.gap for p in made.having(role) if p in mean]))
        for role in (*TRUE, *APART, *DECOYS)
        if any(p in mean for p in made.having(role))
    }
    rest = [abs(mean[p]) / found.gap for p in mean if p not in made.roles]
    result["random_heads"] = {"mean": float(np.mean(rest)), "most": float(np.max(rest)), "picked": len(picked)}
    if recipe.say == "neurons":
        result["neurons"] = of_neurons(made, given)
    return result


def neuron_scores(made: Planted, given: Scenes) -> dict[str, dict[str, np.ndarray]]:
    """For each color, every neuron's mean contribution to it (`neurons.find`) and mean activation."""
    every = [example for example in given.examples()[:48]]
    found: dict[str, dict[str, np.ndarray]] = {}
    for color in COLORS:
        own = [example for example in every if example.answer == color]
        if not own:
            continue
        table = neurons.find(made.model, own, [color], caption=color, top=0).neurons
        table = table.assign(activation=table["activation"].abs())
        mean = table.groupby(["layer", "neuron"])[["score", "activation"]].mean().sort_index()
        found[color] = {name: mean[name].to_numpy() for name in mean}
    return found


def of_neurons(made: Planted, given: Scenes) -> dict[str, float]:
    """AUROC and average precision over all neurons, of those planted for each color; the mean over colors."""
    rows = []
    for color, found in neuron_scores(made, given).items():
        true = np.zeros(LAYERS["D"] * NEURONS, bool)
        true[[layer * NEURONS + n for layer, n in made.words[color]]] = True
        # The neurons of the other colors are neither: they matter, but for another word.
        others = [layer * NEURONS + n for c, some in made.words.items() if c != color for layer, n in some]
        kept = np.setdiff1d(np.arange(len(true)), others)
        score, active = found["score"][kept], found["activation"][kept]
        ap = ranking(
            {str(n): max(0.0, float(v)) for n, v in enumerate(score)},
            {str(n): "neuron" for n in np.flatnonzero(true[kept])},
        )["ap"]
        rows.append((auroc(score, true[kept]), ap, auroc(active, true[kept]), true[kept].mean()))
    return dict(zip(("auroc", "ap", "auroc_activation", "ap_random"), map(float, np.mean(rows, 0)), strict=True))


# -- what the package itself does, on some models of each form ---------------------------------------


def tool(recipe: Recipe) -> dict[str, Any]:
    """A sweep into a run folder, its circuits and the labels of its heads; and how far plain torch differs."""
    made, given = plant(recipe), scenes(SHOWN, FRESH + recipe.seed)
    sites, examples, parts = sites_of(recipe.form), given.examples(), heads_of(recipe.form)
    found = measure(made, given, parts)
    with tempfile.TemporaryDirectory() as folder:
        run = sweep_to(Path(folder) / "run", made.model, examples, sites)
        rows = run.effects()
        table = circuits.heads_of(run)
    rows = rows.assign(part=rows["site"].str.split("@").str[0])
    mean = rows.groupby("part")["logit_diff"].mean().to_dict()
    apart = max(abs(mean[part] - effect) for part, effect in found.mean().items())
    names = table["tower"] + "." + table["layer"].astype(str) + "." + table["kind"] + ".h" + table["head"].astype(str)
    ours = assessed(found).set_index("part")["important"]
    same = (ours[names.tolist()].to_numpy() == table["important"].to_numpy()).mean()
    looking = [site for site in sites if ".cross" in site and "encoder" in site] or sites
    labels = heads.functions(made.model, examples, looking, effects=rows).functions
    named = dict(zip(labels["site"].str.split("@").str[0], labels["label"], strict=True))
    return {
        "recipe": asdict(recipe),
        "sweep_against_plain": apart / abs(found.gap) if recipe.planted else apart,
        "same_important": float(same),
        "heads": ranking(mean, made.roles) if recipe.planted else None,
        "labels": {part: [made.roles.get(part, "random"), label] for part, label in named.items()},
        "confusion": confusion(named, made.roles),
        "named": float(np.mean([label not in ("none", "unclear") for label in named.values()])),
        "important": float(table["important"].mean()),
    }


def coverage(recipe: Recipe, population: int) -> dict[str, Any]:
    """How often the 95 % interval of a head's mean effect covers its mean over very many examples."""
    made, parts, drawn = plant(recipe), heads_of(recipe.form), []
    for start in range(0, population, 500):
        found = measure(made, scenes(min(500, population - start), 2 * FRESH + recipe.seed * population + start), parts)
        drawn.append(np.stack([found.effects[part] for part in parts], 1))
    every = np.concatenate(drawn)
    truth, live = every.mean(0), every.std(0) > 1e-7
    rng, hits = np.random.default_rng(recipe.seed), []
    for n in range(SAMPLES):
        some = rng.choice(len(every), EXAMPLES, replace=False)
        low, high = interval(every[some], [f"s{n}-{m}" for m in range(EXAMPLES)])
        hits.append((low <= truth) & (truth <= high))
    covered = np.mean(hits, 0)
    is_true = np.array([made.roles.get(part) in TRUE for part in parts])
    return {
        "recipe": asdict(recipe),
        "examples": len(every),
        "samples": SAMPLES,
        "of": EXAMPLES,
        "covered": float(covered[live].mean()),
        "covered_true_parts": float(covered[live & is_true].mean()),
        "least": float(covered[live].min()),
        "heads": int(live.sum()),
    }


# -- the whole set -----------------------------------------------------------------------------------


def cells(quick: bool) -> Iterator[tuple[str, Recipe]]:
    for form, say in FORMS:
        base = Recipe(form, 0, say=say)
        for effect in (0.01, 0.1) if quick else EFFECTS:
            yield f"{name_of(base)} effect {effect:g}", replace(base, effect=effect)
    for knob in () if quick else KNOBS:
        for form, say in FORMS:
            if say == "neurons" or "polysemantic" not in knob:
                [(word, value)] = knob.items()
                base = replace(Recipe(form, 0, say=say), **knob)
                yield f"{name_of(base)} {word} {value:g}" if value is not True else f"{name_of(base)} {word}", base


def gathered(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the models of a cell, with their lower limits."""
    result: dict[str, Any] = {}
    for name in ("heads", "attention", "neurons"):
        if name in rows[0]:
            keys = rows[0][name]
            result[name] = {key: summary([row[name][key] for row in rows]) for key in keys}
    for rule in ("important", "confirmed", "important_published"):
        picked, false = (sum(row[rule][key] for row in rows) for key in ("picked", "false"))
        recall = summary([row[rule]["recall"] for row in rows])
        result[rule] = {"false_share": false / max(1, picked), "recall": recall, "picked": picked / len(rows)}
    for name in ("roles", "random_heads"):
        keys = rows[0][name]
        result[name] = {key: float(np.mean([row[name][key] for row in rows])) for key in keys}
    result["gap"] = float(np.mean([row["gap"] for row in rows]))
    return result


def submission(path: Path, recipe: Recipe) -> dict[str, float]:
    """Score a ranking that somebody else made: a CSV file with the columns `part` and `score`."""
    made = plant(recipe)
    table = pd.read_csv(path)
    every = heads_of(recipe.form)
    given = dict(zip(table["part"], table["score"].astype(float), strict=True))
    if unknown := sorted(set(given) - set(every)):
        sys.exit(f"{path}: unknown part '{unknown[0]}'; expected heads such as {every[0]}")
    least = min(map(abs, given.values()), default=0.0)
    return ranking({part: given.get(part, min(0.0, least)) for part in every}, made.roles)


def whole(quick: bool, seeds: int, more: int, out: Path | None, until: float) -> dict[str, Any]:
    result: dict[str, Any] = {
        "benchmark": "planted",
        "machine": f"{platform.machine()}, 1 thread, CPU",
        "torch": torch.__version__,
        "vlmscope": vlmscope.__version__,
        "asked": {"seeds": seeds, "seeds_of_knobs": more, "quick": quick},
        "examples": {"ranking": EXAMPLES, "labels": SHOWN},
        "tool": [],
        "random": [],
        "coverage": [],
        "cells": {},
    }
    start = time.monotonic()

    def keep() -> None:
        result["seconds"] = time.monotonic() - start
        if out:
            out.write_text(json.dumps(result, indent=1) + "\n")

    for form, say in FORMS:
        for seed in range(1 if quick else 3):
            for planted in (True, False):
                recipe = Recipe(form, seed, effect=0.3, say=say, planted=planted)
                if planted or say == "head":
                    result["tool" if planted else "random"].append(tool(recipe))
        keep()
        print(f"{form}-{say}: tool, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    for form in "CD":
        for seed in range(1 if quick else 2):
            result["coverage"].append(coverage(Recipe(form, seed), 1000 if quick else POPULATION if form == "D" else 2000))
            keep()
    rows: dict[str, list[dict[str, Any]]] = {}
    # Seed by seed, so that a run that is stopped has as many models of each cell.
    for seed in range(max(seeds, more)):
        for name, recipe in cells(quick):
            if seed < (seeds if "effect" in name else more) and time.monotonic() - start < until:
                rows.setdefault(name, []).append(one(replace(recipe, seed=seed)))
        result["cells"] = {name: gathered(some) for name, some in rows.items()}
        keep()
        print(f"seed {seed}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    both = [tuple(pair) for row in result["tool"] for pair in row["confusion"]]
    mean, each = macro_f1(both)
    result["labels"] = {"macro_f1": mean, "f1": each, "heads": len(both)}
    result["naming_rate_on_random"] = float(np.mean([row["named"] for row in result["random"]]))
    result["important_on_random"] = float(np.mean([row["important"] for row in result["random"]]))
    keep()
    return result


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    for name, cell in result["cells"].items():
        found = [f"{name:24}"]
        for kind in ("heads", "attention", "neurons"):
            if kind in cell:
                own = cell[kind]["auroc"]
                found.append(f"{kind} {own['mean']:.3f} (≥{own['lower95']:.3f}) AP {cell[kind]['ap']['mean']:.2f}")
        rules = [f"{cell[r]['false_share']:.2f}/{cell[r]['recall']['mean']:.2f}" for r in ("important", "confirmed", "important_published")]
        yield "  ".join([*found, f"false/recall {' '.join(rules)}", f"n {cell['heads']['auroc']['models']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cells of each form, two models each")
    parser.add_argument("--seeds", type=int, default=20, help="models a cell")
    parser.add_argument("--knob-seeds", type=int, help="models a cell of the knobs (as --seeds)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no model after so many")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file, as it comes")
    parser.add_argument("--submission", type=Path, help="score a CSV file (part, score) instead")
    parser.add_argument("--form", choices=("C", "D"), default="C")
    parser.add_argument("--effect", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.submission:
        recipe = Recipe(arguments.form, arguments.seed, effect=arguments.effect)
        print(json.dumps(submission(arguments.submission, recipe)))
        return
    seeds = 2 if arguments.quick else arguments.seeds
    more = seeds if arguments.knob_seeds is None else arguments.knob_seeds
    result = whole(arguments.quick, seeds, more, arguments.out, 60 * arguments.minutes)
    print("\n".join(lines(result)), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""How well vlmscope finds circuits that were planted in random models of the real classes.

    python benchmarks/planted/run.py [--quick] [--seeds 20] [--out benchmarks/results/planted-cpu.json]
    python benchmarks/planted/run.py --submission FILE.csv --form C --effect 0.1 --seed 0
    python benchmarks/planted/run.py --truth FOLDER --form D --say options

The models are made from their recipes each time (`planting`, `training`); nothing is stored. In the grid of
cells each head's effect is computed by plain torch on many examples at once (`plain`), which is what
`vlmscope.sweep` gives, and `tool` holds the two against each other on models of each form. What is
documented in docs/benchmark.md goes for all figures. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import (
    EXAMPLES,
    FRESH,
    POPULATION,
    RULES,
    SHOWN,
    SPOKEN,
    at_effects,
    at_sharpness,
    coverage,
    one,
    peaks,
    submission,
    tool,
)
from mechanisms import MEASURED, RANKED, of_circuits, of_edges
from mechanisms import null as null_of
from pictures import scenes
from planting import Recipe, plant, scale
from scores import macro_f1, share, summary
from tables import tables
from training import assess, train
from truth import save

import vlmscope

FORMS = (("C", "head"), ("C", "options"), ("D", "head"), ("D", "neurons"), ("D", "options"))
SHARPNESS = (1.0, 4.0, 16.0)
EFFECTS = (0.01, 0.03, 0.1, 0.3, 1.0)
KNOBS: tuple[dict[str, Any], ...] = (
    {"noise": 1.0},
    {"noise": 2.0},
    {"noise": 1.0, "effect": 0.01},
    {"sharpness": 1.0},
    {"sharpness": 16.0},
    {"copies": 2},
    {"copies": 4},
    {"polysemantic": True},
)
"""Each at an effect of 10 % if none is named, all else as in `Recipe`."""
OF_EDGES = (0.01, 0.1, 1.0)
"""Effects at which edges are ranked, in form D."""
CIRCUITS = (
    *((form, say, "nodes") for form, say in FORMS),
    *(("D", say, "edges") for say in ("head", "neurons", "options")),
)
RANDOM = (("C", "nodes"), ("D", "nodes"), ("D", "edges"))


def name_of(recipe: Recipe) -> str:
    return f"{recipe.form}-{'toy' if recipe.toy else recipe.say}"


def effect_cells(quick: bool) -> Iterator[tuple[Recipe, dict[str, float]]]:
    """Recipes, each with its cells: their names and effects."""
    bases = [Recipe(form, 0, say=say) for form, say in FORMS] + [Recipe(form, 0, toy=True) for form in "CD"]
    for base in bases:
        yield base, {f"{name_of(base)} effect {e:g}": e for e in ((0.01, 0.1) if quick else EFFECTS)}


def knob_cells(quick: bool) -> Iterator[tuple[Recipe, dict[str, float]]]:
    for knob in KNOBS[:1] if quick else KNOBS:
        for form, say in FORMS:
            if say == "neurons" or "polysemantic" not in knob:
                base = replace(Recipe(form, 0, say=say), **knob)
                words = " ".join(f"{word} {value:g}" for word, value in knob.items())
                yield base, {f"{name_of(base)} {words}": base.effect}


def gathered(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the models of a cell, with their lower limits."""
    result: dict[str, Any] = {}
    for name in ("heads", "attention", "neurons"):
        if name in rows[0]:
            keys = rows[0][name]
            result[name] = {key: summary([row[name][key] for row in rows]) for key in keys}
    for rule in RULES:
        picked, false = (sum(row[rule][key] for row in rows) for key in ("picked", "false"))
        recall = summary([row[rule]["recall"] for row in rows])
        result[rule] = {"false_share": false / max(1, picked), "recall": recall, "picked": picked / len(rows)}
    for name in ("roles", "random_heads"):
        keys = rows[0][name]
        result[name] = {key: float(np.mean([row[name][key] for row in rows])) for key in keys}
    result["gap"] = float(np.mean([row["gap"] for row in rows]))
    return result


Keep = Callable[[str, Any], None]


def run_cells(part: str, quick: bool, seeds: int, until: float, keep: Keep) -> None:
    """Seed by seed, so that a run that is stopped has about as many models of each cell."""
    rows: dict[str, list[dict[str, Any]]] = {}
    failed: list[str] = []
    for seed in range(seeds):
        for recipe, named in (effect_cells if part == "effects" else knob_cells)(quick):
            if time.monotonic() > until:
                break
            try:
                found = list(at_effects(replace(recipe, seed=seed), list(named.values())))
            except RuntimeError as error:  # so much noise that nothing could be planted
                failed.append(str(error))
                continue
            for name, row in zip(named, found, strict=True):
                rows.setdefault(name, []).append(row)
        keep(part, {name: gathered(some) for name, some in rows.items()} | {"not_planted": failed})
        print(f"{part}: seed {seed}", file=sys.stderr, flush=True)


def run_tool(quick: bool, seeds: int, until: float, keep: Keep) -> None:
    planted, plain, turned = [], [], []
    among = SHARPNESS[::2] if quick else SHARPNESS
    for seed in range(seeds):
        recipes = [Recipe(form, seed, effect=0.3, say=say) for form, say in FORMS]
        heads = [recipe for recipe in recipes if recipe.say == "head"]
        works = [lambda r=recipe: planted.append(tool(r)) for recipe in recipes]
        works += [lambda r=recipe: plain.append(tool(replace(r, planted=False))) for recipe in heads]
        works += [lambda r=recipe: turned.append(at_sharpness(r, among)) for recipe in heads]
        for work in works:
            if time.monotonic() < until:
                work()
        pairs = [pair for row in planted for pair in row["confusion"]]
        mean, each = macro_f1(pairs)
        models = summary([macro_f1(row["confusion"])[0] for row in planted])
        result = {
            "labels": {"macro_f1": mean, "f1": each, "heads": len(pairs), "each_model": models},
            "decoys_named": share([yes for row in planted for yes in row["decoys_named"]]),
            "named_on_random": share([yes for row in plain for yes in row["named"]]),
            "important_on_random": float(np.mean([row["important"] for row in plain])) if plain else None,
            "changed_by_sharpness": share([len(set(some)) > 1 for row in turned for some in row.values()]),
        }
        keep("tool", result | {"planted": planted, "random": plain, "sharpness": turned})
        print(f"tool: seed {seed}", file=sys.stderr, flush=True)


def run_trained(seeds: int, until: float, keep: Keep) -> None:
    """Models in which a circuit was trained. One that is not accepted is counted, and not scored."""
    rows: dict[str, list[dict[str, Any]]] = {}
    made: list[dict[str, Any]] = []
    for seed in range(seeds):
        for form in "CD":
            if time.monotonic() > until:
                break
            model = train(form, seed)
            found = assess(model)
            made.append({"form": form, "seed": seed, "accepted": found.accepted} | found._asdict())
            if found.accepted:
                given = scenes(EXAMPLES, FRESH + seed)
                row = one(model, given, peaks(model, given))
                rows.setdefault(f"{form}-trained", []).append(row)
            keep("trained", {name: gathered(some) for name, some in rows.items()} | {"models": made})
            print(f"trained: {form}, seed {seed}, {found}", file=sys.stderr, flush=True)


def run_edges(quick: bool, seeds: int, until: float, keep: Keep) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for say in ("head",) if quick else ("head", "neurons", "options"):
            made = plant(Recipe("D", seed, effect=OF_EDGES[0], say=say))
            for effect in OF_EDGES[1:2] if quick else OF_EDGES:
                if time.monotonic() < until:
                    rows.setdefault(f"D-{say} effect {effect:g}", []).append(of_edges(scale(made, effect)))
        keep("edges", summarized(rows))
        print(f"edges: seed {seed}", file=sys.stderr, flush=True)


def run_circuits(quick: bool, seeds: int, until: float, keep: Keep) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    nulls: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for form, say, kind in CIRCUITS[-1:] if quick else CIRCUITS:
            if time.monotonic() < until:
                made = plant(Recipe(form, seed, effect=0.3, say=say))
                rows.setdefault(f"{form}-{say} {kind}", []).append(of_circuits(made, kind))
        for form, kind in RANDOM[-1:] if quick else RANDOM:
            if time.monotonic() < until:
                nulls.setdefault(f"{form} {kind}", []).append(
                    null_of(plant(Recipe(form, seed, planted=False)), kind)
                )
        passes = {
            name: {key: share([row[key] for row in some]) for key in ("passes", "unasked")}
            for name, some in nulls.items()
        }
        keep("circuits", summarized(rows) | {"random": passes})
        print(f"circuits: seed {seed}", file=sys.stderr, flush=True)


def summarized(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the models of each cell, method and figure, with their lower limits."""
    return {
        cell: {
            method: {figure: summary([row[method][figure] for row in some]) for figure in own}
            for method, own in some[0].items()
        }
        for cell, some in rows.items()
    }


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    if "tool" in result:
        own = result["tool"]
        names = ("decoys_named", "named_on_random", "changed_by_sharpness")
        told = [f"{name} {own[name]['share']:.3f}" for name in names]
        yield "  ".join([f"labels: macro-F1 {own['labels']['macro_f1']:.3f}", *told])
    cells = [item for part in ("effects", "knobs", "trained") for item in result.get(part, {}).items()]
    for name, cell in cells:
        if name in ("not_planted", "models"):
            continue
        found = [f"{name:32}"]
        for kind in ("heads", "attention", "neurons"):
            if kind in cell:
                own = cell[kind]["auroc"]
                found.append(
                    f"{kind} {own['mean']:.3f} (≥{own['lower95']:.3f}) AP {cell[kind]['ap']['mean']:.2f}"
                )
        rules = [cell[rule] for rule in RULES]
        words = [f"{rule['false_share']:.2f}/{rule['recall']['mean']:.2f}" for rule in rules]
        yield "  ".join([*found, f"false/recall {' '.join(words)}", f"n {cell['heads']['auroc']['models']}"])
    for part, figure in (("edges", "auroc"), ("circuits", "cpr_of_oracle")):
        for name, cell in result.get(part, {}).items():
            if name != "random":
                found = [f"{method} {own[figure]['mean']:.3f}" for method, own in cell.items()]
                yield "  ".join([f"{name:32}", f"{figure}:", *found])


PARTS = ("tool", "coverage", "effects", "knobs", "trained", "edges", "circuits")
SEEDS = {"edges": 3, "circuits": 3}
"""Models a cell where nobody says how many, else 20: these take a minute each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cells, two models each, one of `tool`")
    parser.add_argument("--part", choices=PARTS, action="append", help="by default all, one after the other")
    parser.add_argument("--seeds", type=int, help="models a cell, by default 20, of edges and circuits 3")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no model after so many")
    parser.add_argument(
        "--out", type=Path, help="also write the JSON to this file, as it comes; parts that it has stay"
    )
    parser.add_argument("--tables", type=Path, help="print the tables of such a file instead")
    parser.add_argument("--submission", type=Path, help="score a CSV file (part, score) instead")
    parser.add_argument("--truth", type=Path, help="write parts.csv and edges.csv to this folder")
    parser.add_argument("--say", choices=("head", "neurons", "options"), default="head")
    parser.add_argument("--form", choices=("C", "D"), default="C")
    parser.add_argument("--effect", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.tables:
        print("\n".join(tables(json.loads(arguments.tables.read_text()))))
        return
    recipe = Recipe(arguments.form, arguments.seed, effect=arguments.effect, say=arguments.say)
    if arguments.truth:
        save(plant(recipe), arguments.truth)
    if arguments.submission:
        print(json.dumps(submission(arguments.submission, recipe)))
    if arguments.truth or arguments.submission:
        return
    result: dict[str, Any] = {
        "benchmark": "planted",
        "machine": f"{platform.machine()}, 1 thread, CPU",
        "torch": torch.__version__,
        "vlmscope": vlmscope.__version__,
        "examples": {
            "ranking": EXAMPLES,
            "labels": SHOWN,
            "neurons": SPOKEN,
            "edges": RANKED,
            "circuits": MEASURED,
        },
        "seconds": {},
    }
    out, quick = arguments.out, arguments.quick
    if out and out.exists():
        before = json.loads(out.read_text())
        result |= {part: before[part] for part in PARTS if part in before}
        result["seconds"] = before["seconds"]
    start = time.monotonic()
    until = start + 60 * arguments.minutes

    def keep(part: str, found: Any) -> None:
        result[part] = found
        result["seconds"][part] = round(time.monotonic() - start)
        if out:
            out.write_text(json.dumps(result, indent=1) + "\n")

    for part in arguments.part or PARTS:
        start, seeds = time.monotonic(), arguments.seeds or SEEDS.get(part, 20)
        if part == "tool":
            run_tool(quick, 1 if quick else seeds, until, keep)
        elif part == "coverage":
            keep(part, [coverage(Recipe(form, 0), 500 if quick else POPULATION[form]) for form in "CD"])
        elif part == "trained":
            run_trained(1 if quick else seeds, until, keep)
        elif part in ("edges", "circuits"):
            (run_edges if part == "edges" else run_circuits)(quick, 1 if quick else seeds, until, keep)
        else:
            run_cells(part, quick, 2 if quick else seeds, until, keep)
    print("\n".join(lines(result)), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

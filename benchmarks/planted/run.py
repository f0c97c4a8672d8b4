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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from rows import Rows, summarized
from scores import macro_f1, share, summary
from tables import NOT_CELLS, tables
from training import until_accepted
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
        if "small" in rows[0][rule]:
            result[rule]["small_share"] = sum(row[rule]["small"] for row in rows) / max(1, picked)
    for name in ("roles", "random_heads"):
        keys = rows[0][name]
        result[name] = {key: float(np.mean([row[name][key] for row in rows])) for key in keys}
    result["gap"] = float(np.mean([row["gap"] for row in rows]))
    return result


Keep = Callable[[str, Any], None]


def cells_of(recipe: Recipe, named: Mapping[str, float]) -> dict[str, Any]:
    """Each cell's row; or why there is none."""
    try:
        return dict(zip(named, at_effects(recipe, list(named.values())), strict=True))
    except RuntimeError as error:  # so much noise that nothing could be planted
        return {"not_planted": str(error)}


def run_cells(part: str, quick: bool, seeds: int, rows: Rows, keep: Keep) -> None:
    """Seed by seed, so that a run that is stopped has about as many models of each cell."""
    every: dict[str, list[dict[str, Any]]] = {}
    failed: list[str] = []
    for seed in range(seeds):
        for recipe, named in (effect_cells if part == "effects" else knob_cells)(quick):
            found = rows.of(f"{seed} {list(named)}", partial(cells_of, replace(recipe, seed=seed), named))
            for name, row in (found or {}).items():
                if name == "not_planted":
                    failed.append(row)
                else:
                    every.setdefault(name, []).append(row)
        keep(part, {name: gathered(some) for name, some in every.items()} | {"not_planted": failed})
        print(f"{part}: seed {seed}", file=sys.stderr, flush=True)


def run_tool(quick: bool, seeds: int, rows: Rows, keep: Keep) -> None:
    planted, plain, turned = [], [], []
    among = SHARPNESS[::2] if quick else SHARPNESS
    for seed in range(seeds):
        recipes = [Recipe(form, seed, effect=0.3, say=say) for form, say in FORMS]
        heads = [recipe for recipe in recipes if recipe.say == "head"]
        planted += [rows.of(f"{seed} {name_of(recipe)}", partial(tool, recipe)) for recipe in recipes]
        for recipe in heads:
            nothing = replace(recipe, planted=False)
            plain.append(rows.of(f"{seed} {recipe.form} random", partial(tool, nothing)))
        for recipe in heads:
            key = f"{seed} {recipe.form} sharpness {among}"
            turned.append(rows.of(key, partial(at_sharpness, recipe, among)))
        planted, plain, turned = ([row for row in some if row] for some in (planted, plain, turned))
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


def trained(form: str, seed: int) -> dict[str, Any]:
    """A model in which a circuit was trained. One that is not accepted is counted, and not scored."""
    model, found, starts = until_accepted(form, seed)
    told = {"form": form, "seed": seed, "starts": starts, "accepted": found.accepted} | found._asdict()
    if not found.accepted:
        return {"model": told}
    given = scenes(EXAMPLES, FRESH + seed)
    row = one(model, given, peaks(model, given))
    return {"model": told, "row": row} | ({"edges": of_edges(model, trained=True)} if form == "D" else {})


def run_trained(seeds: int, rows: Rows, keep: Keep) -> None:
    every: dict[str, list[dict[str, Any]]] = {}
    edges: dict[str, list[dict[str, Any]]] = {}
    made: list[dict[str, Any]] = []
    for seed in range(seeds):
        for form in "CD":
            if found := rows.of(f"{seed} {form}", partial(trained, form, seed)):
                made.append(found["model"])
                if "row" in found:
                    every.setdefault(f"{form}-trained", []).append(found["row"])
                if "edges" in found:
                    edges.setdefault(f"{form}-trained", []).append(found["edges"])
                cells = {name: gathered(some) for name, some in every.items()}
                keep("trained", cells | {"models": made, "edges": summarized(edges)})
                print(f"trained: {form}, seed {seed}, {found['model']}", file=sys.stderr, flush=True)


def edges_at(recipe: Recipe, effects: Sequence[float]) -> list[dict[str, Any]]:
    made = plant(replace(recipe, effect=OF_EDGES[0]))
    return [of_edges(scale(made, effect)) for effect in effects]


def run_edges(quick: bool, seeds: int, rows: Rows, keep: Keep) -> None:
    every: dict[str, list[dict[str, Any]]] = {}
    effects = OF_EDGES[1:2] if quick else OF_EDGES
    for seed in range(seeds):
        for say in ("head",) if quick else ("head", "neurons", "options"):
            found = rows.of(f"{seed} {say} {effects}", partial(edges_at, Recipe("D", seed, say=say), effects))
            for effect, row in zip(effects, found or (), strict=False):
                every.setdefault(f"D-{say} effect {effect:g}", []).append(row)
        keep("edges", summarized(every))
        print(f"edges: seed {seed}", file=sys.stderr, flush=True)


def run_circuits(quick: bool, seeds: int, rows: Rows, keep: Keep) -> None:
    every: dict[str, list[dict[str, Any]]] = {}
    nulls: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for form, say, kind in CIRCUITS[-1:] if quick else CIRCUITS:
            recipe = Recipe(form, seed, effect=0.3, say=say)
            if row := rows.of(
                f"{seed} {form}-{say} {kind}", lambda r=recipe, k=kind: of_circuits(plant(r), k)
            ):
                every.setdefault(f"{form}-{say} {kind}", []).append(row)
        for form, kind in RANDOM[-1:] if quick else RANDOM:
            if row := null_row(form, kind, seed, rows):
                nulls.setdefault(f"{form} {kind}", []).append(row)
        passes = {name: passing(some) for name, some in nulls.items()}
        keep("circuits", summarized(every) | {"random": passes})
        print(f"circuits: seed {seed}", file=sys.stderr, flush=True)


def null_row(form: str, kind: str, seed: int, rows: Rows) -> Any:
    """A model in which nothing is planted, and a circuit of it."""
    recipe = Recipe(form, seed, planted=False)
    return rows.of(f"{seed} {form} random {kind}", lambda: null_of(plant(recipe), kind))


def passing(found: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of such circuits pass, and how many would if nobody asked whether the model knows the task."""
    return {key: share([row[key] for row in found]) for key in ("passes", "unasked")}


def run_nulls(seeds: int, rows: Rows, keep: Keep) -> None:
    """Circuits of edges of random models, alone."""
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        if row := null_row("D", "edges", seed, rows):
            found.append(row)
        keep("nulls", {"D edges": passing(found) | {"models": found}})
        print(f"nulls: seed {seed}", file=sys.stderr, flush=True)


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    if "tool" in result:
        own = result["tool"]
        names = ("decoys_named", "named_on_random", "changed_by_sharpness")
        told = [f"{name} {own[name]['share']:.3f}" for name in names]
        yield "  ".join([f"labels: macro-F1 {own['labels']['macro_f1']:.3f}", *told])
    cells = [item for part in ("effects", "knobs", "trained") for item in result.get(part, {}).items()]
    for name, cell in cells:
        if name in NOT_CELLS:
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
    trained_edges = result.get("trained", {}).get("edges", {})
    for given, figure in (
        (result.get("edges", {}) | trained_edges, "auroc"),
        (result.get("circuits", {}), "cpr_of_oracle"),
    ):
        for name, cell in given.items():
            if name != "random":
                found = [f"{method} {own[figure]['mean']:.3f}" for method, own in cell.items()]
                yield "  ".join([f"{name:32}", f"{figure}:", *found])
    for name, own in result.get("nulls", {}).items():
        yield f"{name + ' of random models':32}  pass: {own['passes']['share']:.3f} of {own['passes']['of']}"


PARTS = ("tool", "coverage", "effects", "knobs", "trained", "edges", "circuits", "nulls")
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
    parser.add_argument(
        "--rows", type=Path, help="keep each model's figures in this folder, and go on from those that it has"
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
        result["seconds"][part] = round(time.monotonic() - start + rows.seconds)
        if out:
            out.write_text(json.dumps(result, indent=1) + "\n")

    for part in arguments.part or PARTS:
        start, seeds = time.monotonic(), 1 if quick else arguments.seeds or SEEDS.get(part, 20)
        if arguments.rows:
            arguments.rows.mkdir(parents=True, exist_ok=True)
        rows = Rows(arguments.rows / f"{part}.jsonl" if arguments.rows else None, until)
        if part == "coverage":
            keep(part, [coverage(Recipe(form, 0), 500 if quick else POPULATION) for form in "CD"])
        elif part == "tool":
            run_tool(quick, seeds, rows, keep)
        elif part == "trained":
            run_trained(seeds, rows, keep)
        elif part == "edges":
            run_edges(quick, seeds, rows, keep)
        elif part == "circuits":
            run_circuits(quick, seeds, rows, keep)
        elif part == "nulls":
            run_nulls(seeds, rows, keep)
        else:
            run_cells(part, quick, 2 if quick else seeds, rows, keep)
    print("\n".join(lines(result)), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

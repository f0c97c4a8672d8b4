"""What is measured on one planted model: rankings, rules, neurons, labels and intervals."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pictures import COLORS, Scenes, batch, scenes
from plain import Part, Runs, heads_of
from planting import APART, DECOYS, TRUE, Planted, Recipe, plant, scale
from random_models import LAYERS, NEURONS
from scores import auroc, chosen, confusion, ranking

from vlmscope import neurons
from vlmscope.stats import interval
from vlmscope.studies import circuits, heads
from vlmscope.studies.sweep import into_folder, swept

RULES = ("important", "confirmed", "important_published")
EXAMPLES = 64
"""On how many examples a ranking is made."""
SHOWN = 24
"""On how many the slower measures are."""
OTHERS = 12
"""How many heads in which nothing is planted are labelled, of each model."""
SPOKEN = 40
"""On how many neurons are."""
POPULATION = 10_000
"""From how many examples the true effects come that intervals should cover."""
SAMPLES = 400
DOUBTED = 512
"""On how many other examples the effects are measured of picked heads that nobody planted."""
FRESH = 500_000
"""Seeds of the examples that are measured, apart from those that parts are fitted on."""


def sites_of(form: str) -> list[str]:
    if form == "D":
        return ["decoder.*.attn.h*@last"]
    return ["encoder.*.attn.h*@noun", "encoder.*.cross.h*@noun", "decoder.*.cross.h*@readout"]


@dataclass(frozen=True, eq=False)
class Measured:
    """Of one model: LD's change by each head (examples × heads), and the mean gap."""

    effects: dict[Part, np.ndarray]
    gap: float

    def mean(self) -> dict[Part, float]:
        return {part: float(found.mean()) for part, found in self.effects.items()}


def measure(made: Planted, given: Scenes, parts: list[Part]) -> Measured:
    return measured(Runs(made.model.hf, batch(made.model, given), parts), parts)


def measured(runs: Runs, parts: list[Part]) -> Measured:
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


def one(
    made: Planted, given: Scenes, attention: dict[Part, float], runs: Runs | None = None
) -> dict[str, Any]:
    """All figures of one model; `runs` are those of the examples, if they were made."""
    recipe, every = made.recipe, heads_of(made.model.hf)
    found = measured(runs, every) if runs else measure(made, given, every)
    mean, table = found.mean(), assessed(found)
    rest = [abs(mean[p] / found.gap) for p in mean if p not in made.roles]
    result: dict[str, Any] = {
        "gap": found.gap,
        "heads": ranking(mean, made.roles),
        "attention": ranking(attention, made.roles),
        "roles": {
            role: float(np.mean([mean[p] / found.gap for p in made.having(role)]))
            for role in (*TRUE, *APART, *DECOYS)
            if any(p in mean for p in made.having(role))
        },
        "random_heads": {"mean": float(np.mean(rest)), "most": float(np.max(rest))},
    }
    picked = {rule: set(table.loc[table[rule], "part"]) for rule in RULES}
    small = without_effect(made, set().union(*(picked[rule] for rule in RULES[:2])))
    for rule in RULES:
        result[rule] = chosen(picked[rule], made.roles, every)
        if rule in RULES[:2]:
            result[rule]["small"] = len(picked[rule] & small)
    if recipe.say == "neurons":
        result["neurons"] = of_neurons(made, given)
    return result


def without_effect(made: Planted, picked: set[Part]) -> set[Part]:
    """Which of these heads nobody planted and do not move LD by more than the share of the gap that
    `important` asks for, in the mean over many other examples. The rest have a real effect: of a trained
    model's own, or because they read what is planted."""
    parts = sorted(part for part in picked if made.roles.get(part) not in (*TRUE, *APART))
    if not parts:
        return set()
    given = scenes(DOUBTED, 2 * FRESH + made.recipe.seed * DOUBTED, made.recipe.style)
    found = measure(made, given, parts)
    return {p for p, effect in found.mean().items() if abs(effect) <= circuits.SHARE * abs(found.gap)}


def at_effects(recipe: Recipe, effects: Sequence[float]) -> Iterator[dict[str, Any]]:
    """One circuit at several shares of the gap. Nothing that pays attention changes between them."""
    made = plant(replace(recipe, effect=effects[0]))
    given = scenes(EXAMPLES, FRESH + recipe.seed, recipe.style)
    attention = peaks(made, given)
    runs = Runs(made.model.hf, batch(made.model, given), heads_of(made.model.hf))
    for effect in effects:
        scaled = scale(made, effect)
        runs.again()
        yield one(scaled, given, attention, runs)


def neuron_scores(made: Planted, given: Scenes) -> dict[str, dict[str, np.ndarray]]:
    """For each color, every neuron's mean contribution to it (`neurons.find`) and mean activation."""
    every = given.examples()[:SPOKEN]
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
    return dict(
        zip(("auroc", "ap", "auroc_activation", "ap_random"), map(float, np.mean(rows, 0)), strict=True)
    )


# -- what the package itself does, on some models of each form ---------------------------------------


def tool(recipe: Recipe) -> dict[str, Any]:
    """A sweep into a run folder, its circuits and the labels of its heads; and how far plain torch is."""
    made, given = plant(recipe), scenes(SHOWN, FRESH + recipe.seed, recipe.style)
    sites, examples, parts = sites_of(recipe.form), given.examples(), heads_of(made.model.hf)
    found = measure(made, given, parts)
    with tempfile.TemporaryDirectory() as folder:
        run = into_folder(swept(made.model, examples, sites), Path(folder) / "run")
        rows = run.effects()
        table = circuits.heads_of(run)
    rows = rows.assign(part=rows["site"].str.split("@").str[0])
    mean = rows.groupby("part")["logit_diff"].mean().to_dict()
    apart = max(abs(mean[part] - effect) for part, effect in found.mean().items())
    names = (
        table["tower"]
        + "."
        + table["layer"].astype(str)
        + "."
        + table["kind"]
        + ".h"
        + table["head"].astype(str)
    )
    ours = assessed(found).set_index("part")["important"]
    same = (ours[names.tolist()].to_numpy() == table["important"].to_numpy()).mean()
    named = labels_of(made, given, shown(made))
    return {
        "recipe": asdict(recipe),
        "sweep_against_plain": apart / abs(found.gap) if recipe.planted else apart,
        "same_important": float(same),
        "heads": ranking(mean, made.roles) if recipe.planted else None,
        **labelled(made, named),
        "important": float(table["important"].mean()),
    }


def shown(made: Planted) -> list[Part]:
    """The heads that are labelled: all planted ones, and some others."""
    every = heads_of(made.model.hf)
    others = [part for part in every if part not in made.roles]
    drawn = random.Random(made.recipe.seed).sample(others, OTHERS)
    return [part for part in every if part in made.roles or part in drawn]


def labels_of(made: Planted, given: Scenes, parts: Sequence[Part] = ()) -> dict[Part, str]:
    """What vlmscope calls each head, or these."""
    every = sites_of(made.recipe.form)
    at = {site.split(".")[0] + site.split(".")[2]: site.split("@")[1] for site in every}
    some = [f"{part}@{at[part.split('.')[0] + part.split('.')[2]]}" for part in parts]
    found = heads.functions(made.model, given.examples(), some or every).functions
    return dict(zip(found["site"].str.split("@").str[0], found["label"], strict=True))


def labelled(made: Planted, labels: dict[Part, str]) -> dict[str, Any]:
    """The labels beside the truth, and which of all heads and of the decoys have a function."""

    def named(parts: Sequence[Part]) -> list[bool]:
        return [labels[part] not in ("none", "unclear") for part in parts]

    return {
        "labels": {part: [made.roles.get(part, "random"), label] for part, label in labels.items()},
        "confusion": confusion(labels, made.roles),
        "named": named(list(labels)),
        # A sink is one: that it is called so is right.
        "decoys_named": named([p for p in made.having(*DECOYS) if made.roles[p] != "sink"]),
    }


def at_sharpness(recipe: Recipe, among: Sequence[float]) -> dict[str, list[str]]:
    """The labels of readers, suppressors and decoys of one circuit, by how sharply the former look."""
    found: dict[str, list[str]] = {}
    for sharpness in among:
        made = plant(replace(recipe, sharpness=sharpness))
        parts = made.having("reader", "suppressor", *DECOYS)
        for part, label in labels_of(made, scenes(SHOWN, FRESH + recipe.seed), parts).items():
            found.setdefault(part, []).append(label)
    return found


def coverage(recipe: Recipe, population: int) -> dict[str, Any]:
    """How often the 95 % interval of a head's mean effect covers its mean over very many examples."""
    made, drawn = plant(recipe), []
    parts = heads_of(made.model.hf)
    for start in range(0, population, 500):
        found = measure(
            made, scenes(min(500, population - start), 2 * FRESH + recipe.seed * population + start), parts
        )
        drawn.append(np.stack([found.effects[part] for part in parts], 1))
    every = np.concatenate(drawn)
    truth, live = every.mean(0), every.std(0) > 1e-7
    rng, hits = np.random.default_rng(recipe.seed), []
    for _ in range(SAMPLES):
        some = rng.choice(len(every), EXAMPLES)
        low, high = interval(every[some])
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


def submission(path: Path, recipe: Recipe) -> dict[str, float]:
    """Score a ranking that somebody else made: a CSV file with the columns `part` and `score`."""
    made = plant(recipe)
    table = pd.read_csv(path)
    every = heads_of(made.model.hf)
    given = dict(zip(table["part"], table["score"].astype(float), strict=True))
    if unknown := sorted(set(given) - set(every)):
        sys.exit(f"{path}: unknown part '{unknown[0]}'; expected heads such as {every[0]}")
    return ranking({part: given.get(part, 0.0) for part in every}, made.roles)

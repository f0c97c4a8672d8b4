"""Edges and circuits of planted models: rankings against the truth, and what circuits of the best carry.

Edges are those of form D (`truth.edge_roles`); the text towers of form C are post-norm and have none. A
circuit of nodes is of heads, in form D of MLPs, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measures import FRESH
from pictures import scenes
from planting import DECOYS, TRUE, Planted
from scores import ranking
from truth import Edge, edge_roles, trained_edge_roles

import vlmscope
from vlmscope.models.inputs import Pair
from vlmscope.patching.edge_circuits import circuits as circuits_of_edges
from vlmscope.patching.nodes import run_circuits
from vlmscope.runs import corrupt
from vlmscope.sites import expand, parse
from vlmscope.studies.faithfulness.curve import FRACTIONS, area, sizes

METHODS = ("eap", "eap-ig", "exact")
"""Of edges; of nodes they are `atp` and `patches`."""
RANKED = {"eap": 16, "eap-ig": 8, "exact": 2, "atp": 16, "patches": 16}
"""On how many examples each method ranks; each exact edge is a patch of its own."""
MEASURED = 12
"""On how many others circuits are run."""
NULL = 24
"""Examples of a random model: half rank, half are measured."""
NODES = {
    "C": ["encoder.*.attn.h*@all", "encoder.*.cross.h*@all", "decoder.*.cross.h*@all"],
    "D": ["decoder.*.attn.h*@all", "decoder.*.mlp@all"],
}
CARRIERS = ("carrier", "fetcher", "matcher")
SHARES = {"carrier": 1.0, "reader": 0.9, "mover": 0.8, "selector": 0.8, "copier": 0.8, "neuron": 0.8}
SHARES |= {"fetcher": 0.7, "matcher": 0.7, "suppressor": -0.5}
"""How the oracle scores what is planted: what carries the gap before what takes back; all else is 0."""


def edge_scores(made: Planted, method: str) -> dict[Edge, float]:
    """Mean scores, as `vlmscope.edges` gives them."""
    given = scenes(RANKED[method], FRESH + made.recipe.seed, made.recipe.style).examples()
    table = vlmscope.edges(made.model, given, "image", method=method)  # type: ignore[arg-type]
    return dict(zip(zip(table["source"], table["target"], strict=True), table["score"], strict=True))


def of_edges(made: Planted, trained: bool = False) -> dict[str, Any]:
    """Of each method how well it ranks edges, and how many of a decoy are among its first."""
    found: dict[str, Any] = {}
    for method in METHODS:
        given = edge_scores(made, method)
        roles = trained_edge_roles(made, given) if trained else edge_roles(made)
        found[method] = ranking(given, roles) | {"decoys_first": decoys_first(given, roles)}
    return found


def decoys_first(given: Mapping[Any, float], roles: Mapping[Any, str]) -> float:
    """The share of decoys among as many parts of the largest |score| as were planted to carry the gap."""
    many = sum(role in (*TRUE, *CARRIERS) and part in given for part, role in roles.items())
    first = sorted(given, key=lambda part: -abs(given[part]))[:many]
    return sum(roles.get(part) in DECOYS for part in first) / max(1, many)


def oracle(parts: Sequence[Any], roles: Mapping[Any, str], seed: int) -> dict[Any, float]:
    """The truth as scores; parts that were not planted stand behind, in any order."""
    noise = np.random.default_rng(seed).random(len(parts)) * 1e-6
    pairs = zip(parts, noise.tolist(), strict=True)
    return {part: SHARES.get(roles.get(part, ""), 0.0) + little for part, little in pairs}


def pairs_of(made: Planted) -> list[Pair]:
    """The runs on which circuits are measured: of other examples than those that rank."""
    given = scenes(MEASURED, 3 * FRESH + made.recipe.seed, made.recipe.style).examples()
    return [corrupt.pairs(made.model, one, "image")[0] for one in given]


def carried(made: Planted, kind: str, given: Sequence[Mapping[Any, float]]) -> list[dict[str, float]]:
    """CPR and CMD of rankings of the same parts, `nodes` or `edges`."""
    parts, curves = list(given[0]), []
    for scores in given:
        values = np.array([scores[part] for part in parts])
        orders = {"cpr": np.argsort(-values, kind="stable"), "cmd": np.argsort(-abs(values), kind="stable")}
        curves.append(
            {
                name: [order[:n].tolist() for n in sizes(FRACTIONS, len(parts))]
                for name, order in orders.items()
            }
        )
    sets = [[], list(range(len(parts)))] + [one for each in curves for some in each.values() for one in some]
    unique = list(dict.fromkeys(tuple(sorted(one)) for one in sets))
    means = np.mean([_lds(made, kind, pair, parts, unique) for pair in pairs_of(made)], 0)
    m = {frozenset(one): value for one, value in zip(unique, means.tolist(), strict=True)}
    none, gap = m[frozenset()], m[frozenset(range(len(parts)))] - m[frozenset()]
    found = []
    for each in curves:
        f = {
            name: np.array([(m[frozenset(one)] - none) / gap for one in some]) for name, some in each.items()
        }
        areas = {"cpr": area(FRACTIONS, f["cpr"]), "cmd": area(FRACTIONS, np.abs(1 - f["cmd"]))}
        found.append({name: float(value) for name, value in areas.items()})
    return found


def _lds(
    made: Planted, kind: str, pair: Pair, parts: Sequence[Any], sets: Sequence[Sequence[int]]
) -> list[float]:
    if kind == "edges":
        some = [[parts[n] for n in one] for one in sets]
        return [float(score.ld) for score in circuits_of_edges(made.model, pair, some)]
    sites = expand(parse([f"{part}@all" for part in parts]), made.model.shapes)
    _, _, found = run_circuits(made.model, pair, sites, sets)
    return found[:, 1].tolist()


def of_circuits(made: Planted, kind: str) -> dict[str, Any]:
    """CPR and CMD of each method's ranking beside those of the oracle's order."""
    if kind == "edges":
        rankings = {method: edge_scores(made, method) for method in METHODS}
    else:
        rankings = {method: node_scores(made, method) for method in ("atp", "patches")}
    return beside_oracle(made, kind, rankings)


def beside_oracle(made: Planted, kind: str, rankings: Mapping[str, Mapping[Any, float]]) -> dict[str, Any]:
    """The same of any rankings of the same parts."""
    roles = edge_roles(made) if kind == "edges" else node_roles(made)
    parts = list(next(iter(rankings.values())))
    rankings = {**rankings, "oracle": oracle(parts, roles, made.recipe.seed)}
    areas = carried(made, kind, list(rankings.values()))
    found = {}
    for (method, given), one in zip(rankings.items(), areas, strict=True):
        best = areas[-1]
        apart = {"cpr_of_oracle": one["cpr"] / best["cpr"], "cmd_below_oracle": best["cmd"] - one["cmd"]}
        found[method] = one | apart | {"decoys_first": decoys_first(given, roles)}
    return found


def node_scores(made: Planted, method: str) -> dict[str, float]:
    """Mean scores of heads (and MLPs) at all positions: by gradients, or by patches."""
    sites = NODES[made.recipe.form]
    given = scenes(RANKED[method], FRESH + made.recipe.seed, made.recipe.style).examples()
    if method == "atp":
        table, value = vlmscope.attribute(made.model, given, sites, "image", method="atp"), "score"
    else:
        table, value = vlmscope.sweep(made.model, given, sites, "image", check=0), "ld_change"
    parts = table["site"].str.partition("@")[0]
    return table[value].groupby(parts, sort=False).mean().to_dict()


def node_roles(made: Planted) -> dict[str, str]:
    """Of heads, and of MLPs the role of the neurons in them."""
    roles = {part: role for part, role in made.roles.items() if ".mlp." not in part}
    return roles | {part.rpartition(".")[0]: role for part, role in made.roles.items() if ".mlp." in part}


def null(made: Planted, kind: str) -> dict[str, Any]:
    """Of a model in which nothing is planted: whether the circuit that `faithfulness` reports passes, and
    whether it would if nobody asked if the model knows the task."""
    given = scenes(NULL, FRESH + made.recipe.seed).examples()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores"
        if kind == "edges":
            vlmscope.edges(made.model, given, "image", out=out)
        else:
            vlmscope.attribute(made.model, given, NODES[made.recipe.form], "image", method="atp", out=out)
        found = vlmscope.faithfulness(made.model, given, out, "image", fractions=(0.05, 0.2, 1.0))
    own = found.summary["circuit"]
    low, mean, p = own["low"], own["random"], own["p_value"]
    unasked = low is not None and mean is not None and p is not None and p <= 0.05 and low > mean
    return {"passes": own["passes"], "unasked": bool(unasked), "f": own["f"], "random": mean}

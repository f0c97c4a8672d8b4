"""Edges and circuits of the planted benchmark: the truth is what exact patches find, and is found."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from vlmscope.patching.edge_patches import exact

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "planted"))
mechanisms, pictures, planting, scores, tables, truth = map(
    import_module, ("mechanisms", "pictures", "planting", "scores", "tables", "truth")
)
Recipe, plant = planting.Recipe, planting.plant
EFFECT = 0.3


@pytest.fixture(scope="module")
def planted():
    return plant(Recipe("D", 0, effect=EFFECT, noise=0.3))


@pytest.fixture(scope="module")
def roles(planted):
    return truth.edge_roles(planted)


def test_the_truth_is_what_exact_patches_find(planted, roles, monkeypatch):
    """Each planted edge moves LD by its share of the gap, an edge of a decoy by nothing."""
    monkeypatch.setattr(mechanisms, "MEASURED", 3)
    edges = [edge for edge, role in roles.items() if role in (*planting.TRUE, "carrier", *planting.DECOYS)]
    pairs = mechanisms.pairs_of(planted)
    shares = np.mean([exact(planted.model, pair, edges) for pair in pairs], 0) / planting.GAP
    found = dict(zip(edges, shares.tolist(), strict=True))
    [reader], [mover] = planted.having("reader"), planted.having("mover")
    ways = [(reader, mover.replace(".h", ".v")), ("image", reader.replace(".h", ".v")), (mover, "logits")]
    for edge in ways:
        assert roles[edge] in ("reader", "mover") and found[edge] > 0.5 * EFFECT, (edge, found[edge])
    for edge, share in found.items():
        if roles[edge] in planting.DECOYS:
            assert abs(share) < 0.02, (edge, share)
        elif roles[edge] == "suppressor":
            assert share < -0.1 * EFFECT, (edge, share)
        else:
            assert share > 0.5 * EFFECT, (edge, share)


def test_planted_edges_are_first_and_carry_the_gap(planted, roles, monkeypatch):
    monkeypatch.setattr(mechanisms, "RANKED", {"eap": 4})
    monkeypatch.setattr(mechanisms, "MEASURED", 1)
    given = mechanisms.edge_scores(planted, "eap")
    assert set(roles) - set(given) == set()
    found = scores.ranking(given, roles)
    assert found["auroc"] > 0.99 and mechanisms.decoys_first(given, roles) == 0
    wrong = dict(zip(given, np.roll(list(given.values()), 7), strict=True))
    assert scores.ranking(wrong, roles)["auroc"] < 0.9
    best, oracle = mechanisms.carried(planted, "edges", [given, mechanisms.oracle(list(given), roles, 0)])
    assert best["cpr"] > 0.9 * oracle["cpr"] and best["cmd"] < oracle["cmd"] + 0.05


def test_edges_of_a_trained_circuit(planted):
    """Two are true, the reader's own way; what the causal model says nothing of is left out."""
    made = replace(planted, roles={"decoder.0.attn.h1": "locator", "decoder.2.attn.h5": "reader"})
    true = [("image", "decoder.2.attn.v5"), ("decoder.2.attn.h5", "logits")]
    left_out = [
        ("image", "decoder.2.attn.k5"),
        ("decoder.0.attn.h1", "decoder.2.attn.q5"),
        ("embed", "logits"),
    ]
    left_out += [("decoder.2.mlp", "logits"), ("image", "decoder.3.mlp"), ("image", "decoder.1.attn.v0")]
    false = [("decoder.3.attn.h1", "logits"), ("image", "decoder.2.attn.v4")]
    found = truth.trained_edge_roles(made, [*true, *left_out, *false])
    assert found == dict.fromkeys(true, "reader") | dict.fromkeys(left_out, "locator")
    given = dict.fromkeys(left_out, 9.0) | dict.fromkeys(true, 2.0) | dict.fromkeys(false, 1.0)
    assert scores.ranking(given, found)["auroc"] == 1


def test_nodes_have_their_roles(planted):
    roles = {"decoder.1.attn.h6": "reader", "decoder.3.mlp.n5": "neuron", "decoder.3.mlp.n7": "neuron"}
    made = replace(planted, roles=roles)
    found = mechanisms.node_roles(made)
    assert found == {"decoder.1.attn.h6": "reader", "decoder.3.mlp": "neuron"}
    assert truth.edge_roles(made)["decoder.3.mlp", "logits"] == "neuron"
    assert mechanisms.decoys_first({"a": 3.0, "b": -2.0, "c": 1.0}, {"a": "blind", "b": "reader"}) == 1.0
    assert mechanisms.decoys_first({"a": 1.0, "b": -2.0, "c": 1.0}, {"a": "blind", "b": "reader"}) == 0.0


def test_tables_of_edges_and_circuits():
    def one(mean):
        return {"mean": mean, "lower95": mean, "least": mean, "models": 3}

    edges = {"eap": {"auroc": one(0.97), "ap": one(0.5), "ap_random": one(0.01), "decoys_first": one(0.0)}}
    ways = ("cpr", "cpr_of_oracle", "cmd", "cmd_below_oracle", "decoys_first")
    circuit = {name: one(value) for name, value in zip(ways, (1.1, 0.95, 0.1, -0.01, 0.2), strict=True)}
    null = {"passes": {"share": 0.0, "most": 0.7, "of": 3}, "unasked": {"share": 0.0, "most": 0.7, "of": 3}}
    result = {
        "edges": {"D-head effect 0.1": edges},
        "circuits": {"D-head edges": {"eap": circuit, "oracle": circuit}, "random": {"D edges": null}},
    }
    lines = list(tables.tables(json.loads(json.dumps(result))))
    assert lines[2:6] == [
        "| edges, AUROC, effects ≥ 10 %, eap | ≥ .95 | 0.970 (0.970) | 3 models a cell |",
        "| CPR over the oracle's, edges | ≥ .90 | 0.950 (0.950) | 3 models a cell |",
        "| CMD below the oracle's, edges | ≥ −.05 | -0.010 (-0.010) | 3 models a cell |",
        "| decoys among the first | 0 | .20 | 3 rankings |",
    ]
    assert lines[6] == "| circuits that pass in random models, D edges | 0 | 0 (≤ .70) | 3 models |"
    assert "| D-head 0.1 | 0.970 (0.970) | 0.500 | 0 | 3 |" in lines

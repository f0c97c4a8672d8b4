"""Edges: identities of EAP, exact edges and circuits, on every family with pre-norm blocks."""

from __future__ import annotations

import pytest
from models import example
from test_families import MADE, made

from vlmscope.patching.circuit import circuits
from vlmscope.patching.graph import Graph
from vlmscope.runs import corrupt

POST = ("blip-vqa", "blip-captioning", "mplug-owl2")
"""Without edges between the words: post-norm, or of a table that names no norms."""
EDGED = [name for name in MADE if name not in POST]


def pair_of(model, corruption="image"):
    return corrupt.pairs(model, example(), corrupt.parse(corruption))[0]


@pytest.mark.parametrize("name", EDGED)
def test_circuits_of_all_and_no_edges_are_the_runs(name, in_float64):
    model = made(name)
    pair = pair_of(model)
    graph = Graph(model, pair.clean)
    clean, corrupted = (
        float(model.run(x)[pair.answer] - model.run(x)[pair.foil]) for x in (pair.clean, pair.corrupt)
    )
    for run, ends in (("clean", (clean, corrupted)), ("corrupt", (corrupted, clean))):
        found = [float(score.ld) for score in circuits(model, pair, [graph.edges, []], run=run)]
        assert found == pytest.approx(ends, rel=1e-9, abs=1e-9)
    assert abs(clean - corrupted) > 1e-3

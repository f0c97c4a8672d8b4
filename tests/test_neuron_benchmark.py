"""The parts of `benchmarks/neurons.py` at a tiny size: fewer pictures, words, draws and steps."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.neurons import assessment, edits, measures, solvers
from vlmscope.neurons.captions import whole_word

FOLDER = Path(__file__).parents[1] / "benchmarks"


def half_red(limit, seed):
    given = list(examples("states", limit=8 * limit, seed=seed))
    red = [one for one in given if "red" in one.shows][: limit // 2]
    others = [one for one in given if "red" not in one.shows][: limit - len(red)]
    return [one for both in zip(red, others, strict=True) for one in both]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    found = importlib.import_module("neurons")
    monkeypatch.setattr(found, "held_out", half_red)
    monkeypatch.setattr(found, "PAIRS", (("red", "blue"), ("red", "green"), ("blue", "green")))
    monkeypatch.setattr(found, "UNSAID", ("red",))
    monkeypatch.setattr(found, "INSTEAD", (None,))
    monkeypatch.setattr(solvers, "STEPS", 30)
    monkeypatch.setattr(solvers, "LEAST", 30)
    monkeypatch.setattr(solvers, "BATCH", (4, 2))
    monkeypatch.setattr(edits, "_counts", lambda most: [1])
    monkeypatch.setattr(measures, "DRAWS", 19)
    monkeypatch.setattr(measures, "CONTROLS", 2)
    monkeypatch.setattr(assessment, "BLIND", 2)
    monkeypatch.setattr(edits, "BLIND", 2)
    return found


@pytest.fixture
def few_steps(monkeypatch):
    """Where it does not matter whether the edit takes."""
    monkeypatch.setattr(solvers, "STEPS", 3)


def test_concepts(benchmark):
    found = benchmark.concept(20, [])
    assert found["of_words"] == len(found["words"]) > 0
    aucs = [one["auc"] for one in found["words"].values()]
    assert {one["n"] for one in aucs} == {10}, "half of the pictures"
    assert np.mean([one["null"] for one in aucs]) > 0.6, "the best of random neurons tells words apart, too"
    assert np.mean([one["null"] for one in aucs]) < np.mean([one["value"] for one in aucs])
    lost = {word: one["lost, zero"]["value"] for word, one in found["words"].items() if "lost, zero" in one}
    assert found["some_caption_loses_it"] == sum(value > 0 for value in lost.values())
    assert set(found["carried"]) <= {word for word, value in lost.items() if value > 0}
    for word in lost:
        rounds = [found["words"][word][f"round {number}"] for number in (1, 2, 3)]
        assert rounds[0]["drop_p"] < rounds[2]["drop_p"], "those that take over are gone, too"
        assert all(0 <= one["lost"] <= 1 for one in rounds)


def test_edits(benchmark):
    (pair,) = benchmark.edits(4, [0]).values()
    assert pair["undone"]
    assert (pair["fewest"]["columns"], pair["3 %"]["columns"]) == (1, 30)
    for size in benchmark.SIZES:
        rows = pair[size]["measures"]
        assert (rows["generality"]["value"], rows["generality"]["before"]) == (1, 0)
        assert rows["says red"]["value"] < rows["says red"]["before"]
        assert all(0 <= rows[name]["random"] <= 1 for name in ("generality", "locality"))
    assert pair["fewest"]["measures"]["generality"]["random"] == 0, "one column at random changes no word"


@pytest.mark.slow
def test_one_edit_on_another(benchmark):
    found = benchmark.stack(4, [0, 2])
    assert (found["edits"], found["columns"]) == (2, 2)
    assert (found["alone"], found["after all"]) == (1, 0), "red is called blue, and then green"


@pytest.mark.slow
def test_an_edit_of_a_concept(benchmark, few_steps):
    found = benchmark.concept_edit(4, [])
    assert (found["from"], found["to"], found["columns"]) == ("red", "green", 1)
    assert found["measures"]["there is red"]["before"] > 0
    assert {"which of the two", "locality, yes or no"} <= set(found["measures"])


def test_objects_that_are_named_falsely(benchmark, few_steps):
    found = benchmark.falsely(16, [])
    model, seen = load("toy-llava", device="cpu"), examples("states", limit=16, seed=3)
    mixed = [benchmark.half_hidden(one) if n % 2 else one for n, one in enumerate(seen)]
    said = [model.answer(model.inputs(one.clean_image, benchmark.ASK)) for one in mixed]
    named = [{s for s in benchmark.SHAPES if whole_word(s).search(text)} for text in said]
    wrong = [shapes - one.shows for shapes, one in zip(named, mixed, strict=True)]
    assert found["named"][0]["falsely"] == max(sum(s in one for one in wrong[:8]) for s in benchmark.SHAPES)
    word = found["named"][0]["object"]
    chair = found[f"{word} to anything else"]["objects"]["chair_i"]
    assert chair["before"] == pytest.approx(sum(map(len, wrong[8:])) / sum(map(len, named[8:])))
    assert set(chair) == {"before", "after", "random"}


def test_half_of_an_object_is_hidden(benchmark):
    one = examples("states", limit=1)[0]
    before, after = np.array(one.clean_image), np.array(benchmark.half_hidden(one).clean_image)
    changed = np.flatnonzero((before != after).any((1, 2)))
    _, top, _, bottom = next(iter(one.masks.values())).getbbox()
    assert (top + bottom) // 2 <= changed.min() and changed.max() < bottom


def test_words_that_are_not_to_be_said(benchmark):
    rows = benchmark.unsaid(4, [])["red"]["measures"]
    assert rows["says red"]["before"] > 0 and rows["says red"]["value"] == 0
    assert rows["says red"]["random"] == rows["says red"]["before"]

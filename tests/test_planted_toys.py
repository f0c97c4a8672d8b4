"""The same circuit in the trained toys: it carries what it should, beside all that they learned."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "planted"))
pictures, plain, planting = map(import_module, ("pictures", "plain", "planting"))
EFFECT = 0.3


@pytest.mark.parametrize("form", "CD")
def test_a_circuit_in_a_trained_toy(form):
    made = planting.plant(planting.Recipe(form, 0, effect=EFFECT, toy=True))
    given = pictures.scenes(64, 99, made.recipe.style)
    every = plain.heads_of(made.model.hf)
    runs = plain.Runs(made.model.hf, pictures.batch(made.model, given), every)
    assert made.fit["r2"] > 0.9 and runs.gap == pytest.approx(planting.GAP, rel=0.25)
    assert runs.share(made.having("mover")) == pytest.approx(EFFECT, rel=0.25)
    assert runs.share(made.having("reader")) > EFFECT
    assert runs.share(made.having("suppressor")) < -0.1 * EFFECT
    assert max(abs(runs.share([part])) for part in made.having("blind", "salient")) < 0.01
    learned = [abs(runs.share([part])) for part in every if part not in made.roles]
    assert 0.002 < max(learned) < 0.1, "what it learned moves these words, but little"


def test_pictures_are_what_the_processor_sees():
    made = planting.Recipe("C", 0, toy=True)
    model, given = planting.load("toy-blip"), pictures.scenes(4, 5, made.style)
    batch = pictures.batch(model, given)
    for n, example in enumerate(given.examples()):
        pair = model.prepare(example)
        for tensors, inputs in ((batch.clean, pair.clean), (batch.corrupt, pair.corrupt)):
            own = tensors["pixel_values"][n]
            assert (own - inputs.tensors["pixel_values"][0]).abs().max() < 1e-5
        assert example.answer == made.style.said[given.answer[n]] and example.roles

"""Circuits that are trained: an exchange is a patch, and the causal model answers what it should."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from vlmscope import Edit

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "planted"))
pictures, planting, training, random_models = map(
    import_module, ("pictures", "planting", "training", "random_models")
)


@pytest.fixture(params="CD")
def made(request):
    model = random_models.random_model(request.param, 1.0, 0)
    roles = training.circuit(request.param, 0)
    return planting.Planted(model, planting.Recipe(request.param, 0), roles, {})


def test_an_exchange_is_a_patch_of_that_head(made):
    """Held against vlmscope's own edit of the same site, with the value of the other example's run."""
    given = pictures.scenes(4, 3)
    base, exchange, order = training.drawn(made, given), training.Exchange(made), torch.tensor([2, 3, 0, 1])
    with torch.no_grad():
        ran = exchange.clean(base)
        for part, role in made.roles.items():
            found = exchange.run(base, ran, order, [part])
            runs = [made.model.prepare(one).clean for one in given.examples()]
            at = "noun" if part.startswith("encoder") else "last"
            site = f"{part}@{at}"
            value = made.model.capture(runs[int(order[0])], [site])[site]
            wanted = made.model.run(runs[0], [Edit(site, "set", value)])
            torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4, msg=role)
            assert (found[0] - ran.logits[0]).abs().max() > 1e-4, "it does something"


def test_what_the_causal_model_answers():
    made = planting.Planted(random_models.random_model("C", 1.0, 0), planting.Recipe("C", 0), {}, {})
    given = pictures.scenes(64, 5)
    base = training.drawn(made, given)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(training.wanted("reader", base, order), torch.from_numpy(given.answer)[order])
    found = training.wanted("locator", base, order).tolist()
    for n, other in enumerate(order.tolist()):
        is_same = given.noun[n] == given.noun[other]
        assert found[n] == (given.answer[n] if is_same else given.other[n])


def test_the_other_color_is_the_other_objects():
    given = pictures.scenes(8, 5)
    for n in range(8):
        row, column = divmod(int(given.where[n, 1]), pictures.SIDE)
        size = pictures.PATCH
        seen = given.clean[n, row * size : row * size + size, column * size : column * size + size]
        near = [abs(seen.mean((0, 1)) - color).sum() for color in pictures.COLORS.values()]
        assert near.index(min(near)) == given.other[n]


def test_twins_share_a_picture_and_differ_in_the_noun(made):
    """The second question is the first with the other noun; what was made of the picture is used twice."""
    given, rows = pictures.scenes(8, 5), torch.tensor([6, 1, 3])
    nouns, colors = (
        torch.tensor([pictures.token(made.model, word) for word in words])
        for words in (pictures.KINDS, pictures.COLORS)
    )
    twins = training.drawn(made, given).twins(rows, nouns, colors)
    with torch.no_grad():
        found = training.Exchange(made).clean(twins).logits
    noun, color, other = (each[rows] for each in (given.noun, given.answer, given.other))
    for turn, pair in enumerate(((noun, color, other), (1 - noun, other, color))):
        assert [told[turn::2].tolist() for told in (twins.noun, twins.color, twins.other)] == [
            each.tolist() for each in pair
        ]
        asked = replace(given, noun=given.noun ^ turn)
        for row, n in enumerate(rows.tolist()):
            wanted = made.model.run(made.model.prepare(asked.example(n)).clean)
            torch.testing.assert_close(found[2 * row + turn], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "roles"), [("C", {"reader", "mover"}), ("D", {"locator", "reader"})])
def test_a_few_steps_learn_and_an_untrained_model_is_not_accepted(form, roles):
    made = training.train(form, 0, steps=3)
    found = training.assess(made, 64)
    assert not found.accepted and set(found.agree) == roles


@pytest.mark.parametrize(
    ("given", "starts"),
    [([(0.98, 0.0), (1.0, 0.02), (0.99, 0.01)], 3), ([(1.0, 0.0)], 1), ([(0.5, 0.0)] * 3, 3)],
)
def test_what_is_not_accepted_is_begun_anew(monkeypatch, given, starts):
    """From other weights, for the same circuit; three times at most."""
    train, begun = training.train, []

    def one_step(form, seed, start):
        begun.append(train(form, seed, start, steps=1))
        return begun[-1]

    left = [training.Accepted(1.0, {"reader": agree}, leak, 1.0) for agree, leak in given]
    last = left[-1]
    monkeypatch.setattr(training, "train", one_step)
    monkeypatch.setattr(training, "assess", lambda made: left.pop(0))
    assert training.until_accepted("D", 0) == (begun[-1], last, starts)
    assert len({one.model.hf.lm_head.weight.sum().item() for one in begun}) == starts == len(begun)
    assert all(one.roles == begun[0].roles for one in begun)


@pytest.mark.slow
@pytest.mark.parametrize("form", "CD")
def test_a_circuit_can_be_trained(form):
    found = training.assess(training.train(form, 0))
    assert found.accepted, found

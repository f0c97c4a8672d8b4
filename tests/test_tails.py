"""Runs that go on from a layer give what whole runs give, with whatever is changed from there on."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from families import FAMILIES
from models import blip, example, llava, picture

from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.neurons import words
from vlmscope.neurons.captions import LENGTH, inputs_of
from vlmscope.neurons.contributions import token_weights
from vlmscope.neurons.solvers import no_deltas
from vlmscope.neurons.tails import ROOM, Tails, adding
from vlmscope.neurons.words import Word, recorded
from vlmscope.patching.backward import frozen
from vlmscope.runs.forward import forward, generate

if os.environ.get("VLMSCOPE_TORCHVISION"):  # see test_video_families.py
    from video_families import FAMILIES as MADE
else:
    MADE = {"llava": llava, "blip": blip, **FAMILIES}
APART = {"blip2-t5", "instructblip-t5", "mplug-owl2", "qwen3-vl"}
"""Blocks that are not called by themselves (see `Family`), or behind which something is added (DeepStack)."""


def runs(model, pictures=2):
    given = [example(clean_image=picture(n), id=str(n)) for n in range(pictures)]
    ids = model.family.options(model.processor, given[0].clean_prompt, "red circle")
    return [(inputs_of(model, one, None, ids[:-1]), len(ids)) for one in given]


def some_deltas(model, layer):
    """Of two layers; parts of a graph."""
    torch.manual_seed(0)
    found = no_deltas(model, [(layer, 1), (layer, 4), (model.shapes[model.speaker].layers - 1, 2)])
    for _, delta in found.values():
        delta.copy_(torch.randn_like(delta)).requires_grad_(True)
    return found


@pytest.mark.parametrize("name", MADE)
def test_runs_go_on_from_a_layer(name):
    model = MADE[name]()
    given, deltas = runs(model), some_deltas(model, 1)
    tails, parameters = Tails(model, 1), [delta for _, delta in deltas.values()]
    with frozen(model):
        for _ in range(2):  # recorded, and gone on with
            found = tails.logits(given, deltas)
        gradients = torch.autograd.grad(sum(x.log_softmax(-1)[:, 3].sum() for x in found), parameters)
        assert len(tails._entrances) == (0 if name in APART else 2)
        with model.alone(), adding(model, deltas):
            wanted = [forward(model, one, positions=n, grad=True).logits.float() for one, n in given]
        whole = torch.autograd.grad(sum(x.log_softmax(-1)[:, 3].sum() for x in wanted), parameters)
        plain = [forward(model, one, positions=n).logits.float() for one, n in given]
    for one, other, before in zip(found, wanted, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one - before).abs().max() > 1e-2
    torch.testing.assert_close(gradients, whole, rtol=1e-3, atol=1e-4)


def test_runs_for_which_there_is_no_room_are_whole():
    model = llava()
    given, deltas = runs(model), some_deltas(model, 1)
    small, large = Tails(model, 1, room=1), Tails(model, 1)
    found = small.logits(given, deltas)
    assert len(small._entrances) == 1 and len(large._ways) == 0
    for one, other in zip(found, large.logits(given, deltas), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(large._ways) == 1, "both are rows of one batch"
    assert 0 < large.room < ROOM


def test_runs_that_are_called_otherwise_are_no_rows_of_one_batch():
    """Another number of positions; another picture that cross-attention reads."""
    model = llava()
    (one, count), _ = runs(model)
    short = model.inputs(picture(0), "what is this ?")
    tails = Tails(model, 0)
    found = tails.logits([(one, count), (short, 1)])
    assert len(tails._ways) == 2
    torch.testing.assert_close(found[1][-1], model.run(short).float(), rtol=1e-4, atol=1e-4)
    tails = Tails(FAMILIES["mllama"](), 0)
    tails.logits(runs(tails.model))
    assert len(tails._ways) == 2


def test_words_without_neurons(monkeypatch):
    """Batches of captions give what plain runs give; what is said as before is not generated anew."""
    model = load("toy-llava", device="cpu")
    there = recorded(model, examples("states", limit=8), "describe this picture.")
    said = [caption.ids for caption in there.captions]
    token = max((ids[1] for ids in said), key=lambda token: sum(token in ids for ids in said))
    numbers = [n for n, ids in enumerate(said) if token in ids]
    weight = token_weights(model, [token])[0]
    word = Word(there, "it", token, np.ones(8, bool), weight, *there.contributions(token, weight))
    made = []
    monkeypatch.setattr(words, "generate", lambda *given, **more: made.append(1) or generate(*given, **more))
    for count, how in ((1, "zero"), (400, "zero"), (400, "sigma 3")):
        gone = word.strongest(slice(None), count)
        chance, lost = [], []
        for n in numbers:
            with there.without(gone, how, n):
                chance.append(float(model.run(word.fed(n)).log_softmax(-1)[token]))
                ids = generate(model, there.captions[n].inputs, most=LENGTH)
            lost.append(token not in ids)
        made.clear()
        assert word.lost(numbers, gone, how) == lost
        assert sum(lost) <= len(made) <= len(numbers) and bool(made) == (count > 1)
        np.testing.assert_allclose(word.log_probabilities(numbers, gone, how), chance, rtol=1e-4, atol=1e-4)

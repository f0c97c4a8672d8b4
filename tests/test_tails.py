"""Runs that go on from a layer give what whole runs give, with whatever is changed from there on."""

from __future__ import annotations

import os

import pytest
import torch
from families import FAMILIES
from models import blip, example, llava, picture

from vlmscope.neurons.captions import inputs_of
from vlmscope.neurons.solvers import no_deltas
from vlmscope.neurons.tails import Tails, adding
from vlmscope.patching.backward import frozen
from vlmscope.runs.forward import forward

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

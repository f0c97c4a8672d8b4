"""Estimates of patches from gradients: the limits of the engine's patches, and plain hooks with autograd."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from models import blip, example, llava
from test_families import MADE, made

from vlmscope.errors import ModelError, SiteError, VlmscopeError
from vlmscope.patching import engine
from vlmscope.patching.gradients import estimate
from vlmscope.runs import corrupt
from vlmscope.runs.forward import forward
from vlmscope.sites import Pattern, expand, place, points_of

STEP = 1e-5


@pytest.fixture
def in_float64(monkeypatch):
    """Norms and softmaxes of transformers compute in float32 in any model: no differences can be taken."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def pair_of(model, corruption="image"):
    return corrupt.pairs(model, example(), corrupt.parse(corruption))[0]


def expressions(model, inputs):
    """Every kind of site in every tower, with units of every sort that the model shows."""
    for tower, shape in model.shapes.items():
        for kind in shape.kinds:
            yield from (f"{tower}.*.{kind}@*", f"{tower}.*.{kind}@all")
        yield from (f"{tower}.*.mlp.n*@*", f"{tower}.*.mlp.n[1,3]@all")
        for kind in shape.heads:
            for unit in "hqkvp" if kind == "attn" else "hqp":
                layer = shape.having(kind)[-1]
                try:
                    model.capture(inputs, f"{tower}.{layer}.{kind}.{unit}0@all")
                except ModelError:
                    continue
                yield f"{tower}.*.{kind}.{unit}*@*"


def drawn(model, pair, each, kinds=None):
    """Some sites of every kind, or of some kinds alone: patches of many are dear."""
    draw, found = random.Random(0), []
    texts = list(expressions(model, pair.clean))
    for text in texts if kinds is None else draw.sample(texts, kinds):
        sites = [p for s in expand([Pattern.parse(text)], model.shapes) for p in place(s, pair.clean.layout)]
        found += draw.sample(sites, min(each, len(sites)))
    return found


def patched(model, pair, sites, direction, **more):
    found = np.full(len(sites), np.nan)
    for numbers, scores in engine.patch(model, pair, sites, direction, **more).chunks:
        found[numbers] = scores.value.numpy()
    return found


def limits(model, pair, sites, direction="denoise", metric="ld"):
    """(m(x + εΔ) − m(x − εΔ)) / 2ε, by the engine."""
    points, count = points_of(sites), len(pair.answers)
    runs = [(pair.clean, ()), (pair.corrupt, pair.edits)]
    base, source = (
        forward(model, *run, points, count).values for run in (runs[::-1] if direction == "denoise" else runs)
    )
    moved = []
    for step in (STEP, -STEP):
        values = {point: base[point] + step * (source[point] - base[point]) for point in points}
        moved.append(patched(model, pair, sites, direction, values=values, metric=metric))
    return (moved[0] - moved[1]) / 2 / STEP


def same(found, wanted):
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7 * np.abs(wanted).max())


def compare(name, each, kinds=None):
    model = made(name)
    pair = pair_of(model)
    sites = drawn(model, pair, each, kinds)
    same(estimate(model, pair, sites).scores, limits(model, pair, sites))


@pytest.mark.parametrize("name", MADE)
def test_estimates_are_the_limits_of_patches(name, in_float64):
    compare(name, 1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_estimates_of_many_sites_are_the_limits_of_patches(name, in_float64):
    compare(name, 100)


@pytest.mark.parametrize("corruption", ["text", "noise"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("make", [blip, llava])
def test_both_directions_and_all_corruptions(make, direction, corruption, in_float64):
    model = make()
    pair = pair_of(model, corruption)
    sites = drawn(model, pair, 1, 10)
    same(estimate(model, pair, sites, direction).scores, limits(model, pair, sites, direction))


def squared(logits, base):
    return (logits[:, base.answers[-1]] - logits[:, 3]) ** 2


@pytest.mark.parametrize("metric", ["p", "logprob", "kl", squared])
def test_metrics(metric, in_float64):
    model = llava()
    pair = pair_of(model)
    sites = drawn(model, pair, 1, 10)
    same(estimate(model, pair, sites, metric=metric).scores, limits(model, pair, sites, metric=metric))


def test_a_whole_answer(in_float64):
    model = llava()
    (pair,) = corrupt.pairs(model, example(answer="red blue circle"), "image", whole=True)
    sites = drawn(model, pair, 1)
    found = estimate(model, pair, sites, metric="logprob").scores
    same(found, limits(model, pair, sites, metric="logprob"))


def plain(model, inputs, modules, before):
    """Logits in a graph and what some modules give, or get, by plain hooks."""
    kept, logits = {}, []

    def keep(name, x):
        kept[name] = x

    held = [
        module.register_forward_pre_hook(lambda m, args, n=n: keep(n, args[0]))
        if before[n]
        else module.register_forward_hook(
            lambda m, args, out, n=n: keep(n, out[0] if isinstance(out, tuple) else out)
        )
        for n, module in modules.items()
    ]
    head = model.hf.text_decoder if hasattr(model.hf, "text_decoder") else model.hf
    held.append(head.register_forward_hook(lambda m, args, out: logits.append(out.logits[0, -1])))
    with torch.enable_grad():
        model.hf(**inputs.tensors)
    for handle in held:
        handle.remove()
    return logits[-1], kept


@pytest.mark.parametrize("name", ["llava", "blip-vqa", "blip2-t5", "gemma3"])
def test_by_plain_hooks_and_autograd(name):
    """Heads, neurons, sublayers, blocks: without any code of ours but the paths of the modules."""
    model = made(name)
    pair = pair_of(model)
    modules, before = {}, {}
    for tower, table in model.family.towers.items():
        for layer, block in enumerate(model.blocks(tower)):
            for kind, path in (("resid", ""), ("attn.h1", table.attn), ("mlp.n3", table.mlp)):
                text = f"{tower}.{layer}.{kind}"
                modules[text], before[text] = block.get_submodule(path), path != ""
            if "cross" in model.shapes[tower].kinds and layer in model.shapes[tower].having("cross"):
                text = f"{tower}.{layer}.cross.h0"
                modules[text], before[text] = block.get_submodule(table.cross), True
    logits, base = plain(model, pair.corrupt, modules, before)
    _, source = plain(model, pair.clean, modules, before)
    metric = logits[pair.answer] - logits[pair.foil]
    gradients = torch.autograd.grad(metric, list(base.values()), allow_unused=True)
    wanted = []
    for (text, x), gradient in zip(base.items(), gradients, strict=True):
        product = (source[text] - x).detach() * gradient
        tower, _, kind, *unit = text.split(".")
        product = product.reshape(-1, product.shape[-1])
        if unit:
            many = model.shapes[tower].units(kind, unit[0][0])
            product = product.unflatten(-1, (many, -1))[:, int(unit[0][1:])]
        wanted += [float(product.sum()), float(product[0].sum())]
    placed = model.placed([f"{text}@{at}" for text in base for at in ("all", "0")], pair.clean)
    found = estimate(model, pair, placed).scores
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert np.abs(wanted).max() > 1e-2


def test_what_a_gradient_says_nothing_about():
    model = llava()
    pair = pair_of(model)
    for site in ("decoder.1/3.resid@last", "decoder.0.mlp@last + decoder.1.mlp@last"):
        with pytest.raises(SiteError, match="patched together, a later layer undoes"):
            estimate(model, pair, site)
    for metric in (
        lambda logits, base: (logits.argmax(-1) == base.answers[0]).double(),
        lambda logits, base: 0.0 * logits.sum(-1),
    ):
        with pytest.raises(VlmscopeError, match="the metric has no gradient"):
            estimate(model, pair, "decoder.*.mlp@last", metric=metric)


def test_gradients_pass_layer_by_layer(monkeypatch):
    """Not more than one layer's is alive at a time, beside what autograd itself holds."""
    from vlmscope.patching import gradients

    model, alive = llava(), []
    take = gradients.Backward._take

    def watched(run, found, point, deltas, gradient):
        alive.append((point.layer, len(found)))
        take(run, found, point, deltas, gradient)
        assert all(isinstance(value, np.ndarray) for value in found.values())

    monkeypatch.setattr(gradients.Backward, "_take", watched)
    estimate(model, pair_of(model), "decoder.*.mlp.n*@all")
    assert [layer for layer, _ in alive] == [2, 1, 0]

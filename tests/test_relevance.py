"""The rules of RelP, against transformers' own modules with their code replaced by the rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import blip, llava
from test_families import made
from test_gradients import pair_of, plain
from torch import nn
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama

from vlmscope.errors import ModelError
from vlmscope.patching.gradients import estimate
from vlmscope.runs.forward import forward
from vlmscope.runs.relevance import relevance

ACTIVATIONS = ("SiLUActivation", "SiLU", "QuickGELUActivation", "GELUActivation")


def rms(norm, x):
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).detach()


def layer_norm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    sigma = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    return norm.weight * centred / sigma + norm.bias


def gated(mlp, x):
    product = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return mlp.down_proj(product / 2 + product.detach() / 2)


def attention(module, q, k, v, mask, scaling=None, **_):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    paid = (scores if mask is None else scores + mask[..., : k.shape[2]]).softmax(-1).detach()
    return (paid @ v).transpose(1, 2).contiguous(), paid


def activation(function):
    def ruled(module, x):
        return x * (function(module, x) / x).detach()

    return ruled


def test_the_rules_by_hand(monkeypatch, in_float64):
    model = llava()
    pair, modules, before = pair_of(model), {}, {}
    for tower, table in model.family.towers.items():
        for layer, block in enumerate(model.blocks(tower)):
            for text, path in (("attn.h1", table.attn), ("mlp.n3", table.mlp), ("resid", "")):
                modules[f"{tower}.{layer}.{text}"] = block.get_submodule(path)
                before[f"{tower}.{layer}.{text}"] = path != ""
    found = estimate(model, pair, [f"{text}@all" for text in modules], method="relp").scores
    usual = estimate(model, pair, [f"{text}@all" for text in modules]).scores
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", rms)
    monkeypatch.setattr(nn.LayerNorm, "forward", layer_norm)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", gated)
    for module in {type(m) for m in model.hf.modules() if type(m).__name__ in ACTIVATIONS}:
        monkeypatch.setattr(module, "forward", activation(module.forward))
    model.hf.set_attn_implementation("eager")
    for file in (modeling_llama, modeling_clip):
        monkeypatch.setattr(file, "eager_attention_forward", attention)
    logits, base = plain(model, pair.corrupt, modules, before)
    _, source = plain(model, pair.clean, modules, before)
    gradients = torch.autograd.grad(logits[pair.answer] - logits[pair.foil], list(base.values()))
    wanted = []
    for (text, x), gradient in zip(base.items(), gradients, strict=True):
        product = ((source[text] - x).detach() * gradient)[0]
        tower, _, kind, *unit = text.split(".")
        if unit:
            many = model.shapes[tower].units(kind, unit[0][0])
            product = product.unflatten(-1, (many, -1))[:, int(unit[0][1:])]
        wanted.append(float(product.sum()))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert np.abs(found - usual).max() > 0.1 * np.abs(usual).max()


@pytest.mark.parametrize("name", ["llava", "blip-vqa", "blip2-t5", "gemma3", "mllama"])
def test_the_rules_change_no_value(name):
    model = made(name)
    inputs = pair_of(model).clean
    with relevance(model, inputs, list(model.shapes)):
        logits = forward(model, inputs, grad=True).logits
    assert torch.equal(logits, forward(model, inputs, grad=True).logits)
    torch.testing.assert_close(logits.detach(), forward(model, inputs).logits, rtol=1e-12, atol=1e-12)


def test_models_that_do_not_show_what_they_compare():
    model = made("mplug-owl2")
    with pytest.raises(ModelError, match="so relp cannot hold what they pay attention to; take atp"):
        estimate(model, pair_of(model), "decoder.*.mlp@last", method="relp")


@pytest.mark.parametrize("method", ["relp", "atp"])
@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_heads_that_read_another_tower(tower, method, in_float64):
    """With their attention held, those of the first layer depend on nothing of their own tower. The output
    projection is linear, so that a layer's heads sum to the layer."""
    model = blip()
    pair = pair_of(model)
    for layer in range(model.shapes[tower].layers):
        heads = [f"{tower}.{layer}.cross.h{n}@all" for n in range(model.shapes[tower].units("cross", "h"))]
        [whole, *each] = estimate(model, pair, [f"{tower}.{layer}.cross@all", *heads], method=method).scores
        assert abs(whole) > 1e-6 and sum(each) == pytest.approx(whole, rel=1e-9)

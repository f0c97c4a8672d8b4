"""Direct effects: by hand in every family that has them, their sums, their table, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import blip, example, llava
from test_families import MADE, made

from vlmscope.errors import ModelError, SiteError
from vlmscope.patching.direct import check_place, direct
from vlmscope.sites import Pattern, expand, place

HAVE = [name for name in MADE if not name.startswith("blip-")]
TELL = [name for name in HAVE if not name.endswith("t5") and name != "mplug-owl2"]
"""Whose attention tells what it reads of each position."""


def pair_of(model):
    return model.prepare(replace(example(), corrupt_prompt=None, corrupt_image=None))


def sites_of(model, text, layout):
    return [one for site in expand([Pattern.parse(text)], model.shapes) for one in place(site, layout)]


def tensor(out):
    return out[0] if isinstance(out, tuple) else out


class ByHand:
    """One plain forward, watched by plain hooks: what each sublayer adds, the stream, heads and neurons."""

    def __init__(self, model, pair):
        self.model, self.pair = model, pair
        family = model.family
        table, self.blocks = family.towers["decoder"], model.blocks("decoder")
        self.norm, self.head = (model.hf.get_submodule(path) for path in (family.norm, family.head))
        self.added, self.inputs, logits, held = {}, {}, [], []
        for n, block in enumerate(self.blocks):
            for kind in ("attn", "cross", "mlp"):
                path = getattr(table, kind)
                if path is None or not hasattr(block, path.split(".")[0]) or not self.has(block, path):
                    continue
                module = block.get_submodule(path)
                held.append(module.register_forward_hook(self.note(n, kind)))
            held.append(
                block.register_forward_hook(lambda m, a, out: setattr(self, "stream", tensor(out)[0, -1]))
            )
            if n == 0:
                held.append(block.register_forward_pre_hook(self.embedding, with_kwargs=True))
        held.append(model.hf.register_forward_hook(lambda m, a, out: logits.append(out.logits[0, -1])))
        with torch.no_grad():
            model.hf(**pair.clean.tensors)
        for handle in held:
            handle.remove()
        self.ld = float(logits[0][pair.answer] - logits[0][pair.foil])

    @staticmethod
    def has(block, path):
        try:
            return block.get_submodule(path) is not None
        except AttributeError:
            return False

    def embedding(self, module, args, kwargs):
        self.embedded = (args[0] if args else kwargs["hidden_states"])[0, -1]

    def note(self, layer, kind):
        def hook(module, args, out):
            self.inputs[layer, kind] = args[0].flatten(0, -2)[-1]
            self.added[layer, kind] = (module, out.flatten(0, -2)[-1])

        return hook

    def behind(self, layer, kind):
        """The function that stands between a sublayer's last linear layer and the stream, at its own σ."""
        block, name = self.blocks[layer], self.model.name
        out = self.added[layer, kind][1]
        if "Gemma 3" in name or (name == "tiny PaliGemma" and hasattr(block, "post_feedforward_layernorm")):
            norm = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[kind]
            return self.frozen(getattr(block, norm), out)
        if "granite" in name:
            return lambda u: 0.3 * u
        if "Mllama" in name and hasattr(block, "cross_attn"):
            gate = {"cross": "cross_attn_attn_gate", "mlp": "cross_attn_mlp_gate"}[kind]
            return lambda u: getattr(block, gate).tanh() * u
        return lambda u: u

    @staticmethod
    def frozen(norm, x):
        """A norm without its bias, by its formula, with the statistics of x."""
        name = type(norm).__name__
        if isinstance(norm, torch.nn.LayerNorm):
            sigma = (x.var(unbiased=False) + norm.eps).sqrt()
            return lambda u: norm.weight * (u - u.mean()) / sigma
        gain = 1 + norm.weight if "Gemma" in name else norm.weight
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        sigma = (x.pow(2).mean() + eps).sqrt()
        return lambda u: gain * u / sigma

    def read(self, u):
        """(γ ⊙ u/σ) · (U[answer] − U[foil]); PaliGemma 2 bounds its logits, T5 may scale what is read."""
        weights = []
        normed = self.norm(self.stream[None, None])[0, 0]
        logits = self.head(normed)
        for token in (self.pair.answer, self.pair.foil):
            factor = 1.0
            cap = getattr(self.model.hf.config.get_text_config(), "final_logit_softcapping", None)
            if cap is not None and "PaliGemma" in self.model.name:
                factor = float(cap * torch.tanh(logits[token] / cap) / logits[token])
            if getattr(self.model.hf.config.get_text_config(), "model_type", "") == "t5":
                factor = 16**-0.5
            weights.append(factor * self.head.weight[token])
        return float(self.frozen(self.norm, self.stream)(u) @ (weights[0] - weights[1]))


def close(found, wanted, what=""):
    assert found == pytest.approx(wanted, rel=3e-6, abs=3e-6), what


@pytest.mark.parametrize("name", HAVE)
def test_writers_sum_to_the_logit_difference(name):
    model = made(name)
    pair = pair_of(model)
    layout, shape = pair.clean.layout, model.shapes["decoder"]
    texts = ["decoder.0.resid_pre@readout", "decoder.*.mlp.n*@readout"]
    texts += [f"decoder.*.{kind}.h*@readout" for kind in shape.heads]
    sites = [site for text in texts for site in sites_of(model, text, layout)]
    run = direct(model, pair.clean, pair.answer, pair.foil, sites)
    logits = model.run(pair.clean)
    assert run.value == float(logits[pair.answer] - logits[pair.foil])
    assert run.total() == pytest.approx(run.value, rel=1e-10, abs=1e-10)
    biases = {(site.layer, site.kind) for site in sites if site.part}
    found = sum(map(run.effect, sites)) + run.bias + sum(run.back(key)[1] for key in biases)
    assert found == pytest.approx(run.value, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", HAVE)
@torch.no_grad()
def test_each_writer_by_hand(name):
    """Heads, neurons and sublayers from plain hooks and the norms' formulas."""
    model = made(name)
    pair = pair_of(model)
    hand, layout = ByHand(model, pair), pair.clean.layout
    shape = model.shapes["decoder"]
    texts = ["decoder.0.resid_pre@readout", "decoder.*.mlp.n*@readout", "decoder.*.mlp@readout"]
    texts += [f"decoder.*.{kind}{unit}@readout" for kind in shape.heads for unit in ("", ".h*")]
    sites = [site for text in texts for site in sites_of(model, text, layout)]
    run = direct(model, pair.clean, pair.answer, pair.foil, sites)
    seen = 0.0
    for site in sites:
        if site.kind == "resid_pre":
            wanted = hand.read(hand.embedded)
        else:
            key = site.layer, site.kind
            module, out = hand.added[key]
            written = out if module.bias is None or not site.part else out - module.bias
            if site.part:
                wide = len(hand.inputs[key]) // model.units(site.point)
                at = slice(site.units[0] * wide, (site.units[0] + 1) * wide)
                written = module.weight[:, at] @ hand.inputs[key][at]
            wanted = hand.read(hand.behind(*key)(written))
        close(run.effect(site), wanted, str(site))
        seen = max(seen, abs(wanted))
    assert seen > 0.01, "it counts"
    assert run.value == pytest.approx(hand.ld, rel=1e-9)


@pytest.mark.parametrize("name", TELL)
def test_heads_split_over_what_they_read(name):
    """Their shares sum to the head; what is not seen, behind a window or a mask, brings nothing."""
    model = made(name)
    pair = pair_of(model)
    layout, shape = pair.clean.layout, model.shapes["decoder"]
    for kind in shape.heads:
        heads = sites_of(model, f"decoder.*.{kind}.h*@readout", layout)
        edges = [replace(site, source="*") for site in heads]
        run = direct(model, pair.clean, pair.answer, pair.foil, [*heads, *edges])
        every = range(len(layout[model.attended("decoder", kind)].tokens))
        for head, edge in zip(heads, edges, strict=True):
            shares = [run.effect(edge, [n]) for n in every]
            assert sum(shares) == pytest.approx(run.effect(head), rel=1e-9, abs=1e-9), str(head)
        whole = replace(edges[0], part="", units=())
        of_layer = [site for site in heads if site.layer == whole.layer]
        assert run.effect(whole, every) == pytest.approx(sum(map(run.effect, of_layer)), rel=1e-9, abs=1e-9)


@torch.no_grad()
def test_shares_by_hand():
    """p · W_O v, with transformers' own eager attention and the values of a plain hook."""
    model = llava()
    pair = pair_of(model)
    hand = ByHand(model, pair)
    values = {}
    held = [
        block.self_attn.v_proj.register_forward_hook(lambda m, a, out, n=n: values.update({n: out[0]}))
        for n, block in enumerate(hand.blocks)
    ]
    model.hf.set_attn_implementation("eager")
    paid = model.hf(**pair.clean.tensors, output_attentions=True).attentions
    model.hf.set_attn_implementation("sdpa")
    for handle in held:
        handle.remove()
    layout = pair.clean.layout
    sites = [replace(s, source="*") for s in sites_of(model, "decoder.*.attn.h*@readout", layout)]
    run = direct(model, pair.clean, pair.answer, pair.foil, sites)
    for site in sites:
        head, width = site.units[0], 4
        group = slice(head // 2 * width, (head // 2 + 1) * width)
        weight = hand.blocks[site.layer].self_attn.o_proj.weight[:, head * width : (head + 1) * width]
        for n in range(len(layout["decoder"].tokens)):
            written = weight @ (paid[site.layer][0, head, -1, n] * values[site.layer][n, group])
            close(run.effect(site, [n]), hand.read(written), f"{site} {n}")


def test_one_token_and_sums_of_sites():
    """Without a foil the answer's logit; a window or a sum is the sum of its parts."""
    model = llava()
    pair = pair_of(model)
    run = direct(model, pair.clean, pair.answer, None)
    assert run.value == pytest.approx(float(model.run(pair.clean)[pair.answer]))
    assert run.total() == pytest.approx(run.value, rel=1e-10)
    (window,) = sites_of(model, "decoder.1/3.mlp@readout", pair.clean.layout)
    parts = sites_of(model, "decoder.*.mlp@readout", pair.clean.layout)
    assert run.effect(window) == pytest.approx(sum(map(run.effect, parts)))
    both = sites_of(model, "decoder.0.mlp@readout + decoder.1.attn@readout", pair.clean.layout)[0]
    (attn,) = sites_of(model, "decoder.1.attn@readout", pair.clean.layout)
    assert run.effect(both) == pytest.approx(run.effect(parts[0]) + run.effect(attn))


@pytest.mark.parametrize("name", ["blip-vqa", "blip-captioning"])
def test_families_without_direct_effects(name):
    model = blip() if name == "blip-vqa" else made(name)
    site = expand([Pattern.parse("decoder.0.mlp@readout")], model.shapes)[0]
    with pytest.raises(ModelError, match="no sum of what its parts write.*a GELU and a norm.*sweep instead"):
        check_place(model, site)


@pytest.mark.parametrize(
    "text",
    [
        "decoder.1.resid@readout",
        "decoder.1.resid_pre@readout",
        "decoder.1.attn.q0@readout",
        "vision.0.mlp@all",
    ],
)
def test_what_writes_nothing(text):
    model = llava()
    site = expand([Pattern.parse(text)], model.shapes)[0]
    with pytest.raises(SiteError, match="does not write to the stream of the decoder; expected attn, cross"):
        check_place(model, site)

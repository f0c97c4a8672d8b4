"""Edges of attention that are cut: against attention functions that are written here, in every family."""

from __future__ import annotations

import math
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from families import FAMILIES
from models import blip, example, llava
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmscope.models.inputs import Edit
from vlmscope.patching import engine, reference
from vlmscope.runs.forward import forward, generate
from vlmscope.sites import Point

if os.environ.get("VLMSCOPE_TORCHVISION"):  # see test_video_families.py
    from video_families import FAMILIES as MADE
else:
    MADE = {"llava": llava, "blip-vqa": blip, **FAMILIES}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@cache
def made(name):
    return MADE[name]()


def paths(model, tower, kind):
    """The attention modules, block by block, found by their names and not by the family's table."""
    names = {
        "attn": ("self_attn", "attention.self", "attention.attention", "attention", "layer.0.SelfAttention"),
        "cross": ("cross_attn", "crossattention.self", "crossattention.attention", "layer.1.EncDecAttention"),
    }
    found = []
    for block in model.blocks(tower):
        modules = dict(block.named_modules())
        found.append(next((modules[n] for n in names[kind] if n in modules), None))
    return found


class Cut:
    """Attention as it is in textbooks, with the scores of some edges −∞, or some of its weights 0."""

    def __init__(self, module, targets, sources, heads, how):
        self.module, self.targets, self.sources, self.heads, self.how = module, targets, sources, heads, how
        self.paid = None


def textbook(cuts, single=False):
    def attend(
        module,
        q,
        k,
        v,
        attention_mask=None,
        scaling=None,
        is_causal=None,
        position_bias=None,
        softcap=None,
        sliding_window=None,
        **kw,
    ):
        mask = attention_mask
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if position_bias is not None:
            scores = scores + position_bias
        if mask is None:
            causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
            if causal and q.shape[2] > 1 and not single:
                scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=q.dtype).triu(1)
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask
        return finish(cuts, module, scores, v, torch.float32 if single else q.dtype)

    return attend


def finish(cuts, module, scores, v, dtype):
    """Positions count through all tiles, which do not see each other."""
    _, heads, queries, keys = scores.shape
    gone = {
        "block": torch.zeros(scores.shape, dtype=torch.bool),
        "zero": torch.zeros(scores.shape, dtype=torch.bool),
    }
    mine = [cut for cut in cuts if cut.module is module]
    for cut in mine:
        for target in cut.targets:
            for source in cut.sources:
                if target // queries == source // keys:
                    where = gone[cut.how][target // queries]
                    where[list(cut.heads or range(heads)), target % queries, source % keys] = True
    scores = scores.masked_fill(gone["block"], -torch.inf)
    paid = scores.softmax(-1, dtype=dtype).to(v.dtype).nan_to_num().masked_fill(gone["zero"], 0)
    for cut in mine:
        cut.paid = paid
    return (paid @ v).transpose(1, 2), paid


def blips(cuts):
    """BLIP's text modules pay attention by themselves."""

    def attend(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        **kw,
    ):
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            f(x).unflatten(-1, heads).transpose(1, 2)
            for f, x in ((self.query, hidden_states), (self.key, read), (self.value, read))
        )
        scores = q @ k.mT / math.sqrt(heads[1])
        scores = scores if mask is None else scores + mask
        out, paid = finish(cuts, self, scores, v, v.dtype)
        return out.flatten(2), paid

    return attend


def blips_eyes(cuts):
    def attend(self, hidden_states, **kw):
        many = self.num_heads
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, many, -1)).permute(2, 0, 3, 1, 4)
        out, paid = finish(cuts, self, q @ k.mT * self.scale, v, v.dtype)
        return self.projection(out.flatten(2)), paid

    return attend


@contextmanager
def by_hand(model, cuts):
    """The model with attention functions of this file in the place of its own."""
    held = []
    for cut in cuts:
        name = type(cut.module).__name__
        own = {"BlipTextSelfAttention": blips, "BlipAttention": blips_eyes}.get(name)
        if own is not None:
            cut.module.forward = own(cuts).__get__(cut.module)
            held.append(cut.module)
    homes = {sys.modules[type(m).__module__] for m in model.hf.modules()}
    eagers = {
        home: home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")
    }
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = textbook(cuts)
        for home in eagers:
            home.eager_attention_forward = textbook(cuts, single=True)
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        for home, function in eagers.items():
            home.eager_attention_forward = function
        for module in held:
            del module.forward


def logits_of(model, inputs):
    found = []
    top = model.hf.get_submodule(model.family.logits)
    held = top.register_forward_hook(lambda m, a, out: found.append(out.logits))
    with torch.inference_mode():
        model.hf(**inputs.tensors, **model.family.keywords)
    held.remove()
    return found[0][0, -1]


def numbers(model, inputs, tower, kind):
    """Some positions of a tower and of what it reads: targets, sources."""
    layout = inputs.layout
    many = len(layout[tower].tokens)
    reads = model.attended(tower, kind)
    there = list(range(len(layout[reads].tokens)))
    some = [*there[1 : len(there) // 2 + 1], there[-2]] if len(there) > 1 else [0]
    return [many - 1, many // 2], some


def keys_of(reads, kind, positions):
    """Where positions stand among the keys of a call: what fills up tiles is no key of cross-attention."""
    padded = [n for n, token in enumerate(reads.tokens) if kind == "cross" and token.endswith("[PAD]")]
    return [n - sum(p < n for p in padded) for n in positions if n not in padded]


def cases(model, inputs):
    for tower, shape in model.shapes.items():
        for kind in shape.heads:
            if kind in model.family.towers[tower].attention:
                yield tower, kind, shape.having(kind)


def site_of(tower, layer, kind, unit, target, source):
    return f"{tower}.{layer}.{kind}{unit}@{target}<{source}"


@pytest.mark.parametrize("name", sorted(MADE))
@pytest.mark.parametrize("how", ["block", "zero"])
def test_cut_edges_are_those_of_attention_by_hand(name, how):
    """One head in one layer, and all heads in all layers; in every tower that shows its attention."""
    model = made(name)
    inputs = model.prepare(example()).clean
    plain = model.run(inputs)
    ran = 0
    for tower, kind, layers in cases(model, inputs):
        modules = paths(model, tower, kind)
        targets, sources = numbers(model, inputs, tower, kind)
        reads = inputs.layout[model.attended(tower, kind)]
        padded = [n for n, token in enumerate(reads.tokens) if token.endswith("[PAD]")]
        keys = (
            [n - sum(p < n for p in padded) for n in sources if n not in padded]
            if kind == "cross"
            else sources
        )
        for some, heads in (((layers[0],), (1,)), (tuple(layers), ())):
            edits = [
                Edit(site_of(tower, n, kind, ".h1" if heads else "", t, s), how)
                for n in some
                for t in targets
                for s in sources
            ]
            cuts = [Cut(modules[n], targets, keys, heads, how) for n in some]
            found = model.run(inputs, edits)
            with by_hand(model, cuts):
                wanted = logits_of(model, inputs)
            assert all(cut.paid is not None for cut in cuts)
            torch.testing.assert_close(found, wanted, **CLOSE, msg=lambda m, t=tower, k=kind: f"{t} {k}: {m}")
            ran += not torch.equal(found, plain)
    assert ran or not list(cases(model, inputs)), "it counts somewhere"


@pytest.mark.parametrize("name", sorted(MADE))
def test_what_is_paid_under_a_cut(name):
    """Blocked weights are 0 and rows add up to 1; with `zero` the others stay; other rows and layers stay bit
    for bit."""
    model = made(name)
    inputs = model.prepare(example()).clean
    for tower, kind, layers in cases(model, inputs):
        layer = layers[0]
        (target, _), sources = numbers(model, inputs, tower, kind)
        point = Point(tower, layer, kind, "p")
        heads = model.shapes[tower].heads[kind]
        if inputs.layout[model.attended(tower, kind)].sequences > 1:
            continue
        before = forward(model, inputs, keep=[point]).values[point][0].unflatten(-1, (heads, -1))
        keys = keys_of(inputs.layout[model.attended(tower, kind)], kind, sources)
        for how in ("block", "zero"):
            edits = [Edit(site_of(tower, layer, kind, "", target, s), how) for s in sources]
            after = forward(model, inputs, edits, [point]).values[point][0].unflatten(-1, (heads, -1))
            assert (after[target][:, keys] == 0).all()
            others = [n for n in range(len(before)) if n != target]
            assert torch.equal(after[others], before[others])
            rest = [n for n in range(before.shape[-1]) if n not in keys]
            if how == "zero":
                assert torch.equal(after[target][:, rest], before[target][:, rest])
            else:
                left = before[target][:, rest].sum(-1) > 0
                total = after[target].sum(-1)[left]
                rounds = total.dtype == torch.float32 or name == "paligemma2"  # its softmax is in float32
                torch.testing.assert_close(
                    total, torch.ones_like(total), rtol=0, atol=1e-7 if rounds else 1e-12
                )


@pytest.mark.parametrize("name", sorted(MADE))
def test_an_edge_that_is_not_there_changes_no_bit(name):
    """What a causal position does not see anyway, or what is beyond its window."""
    model = made(name)
    inputs = model.prepare(example(answer="un happy", foil="un sad")).clean  # one token of it is fed
    if "attn" not in model.family.towers["decoder"].attention:
        return
    plain = forward(model, inputs, positions=None).logits
    last = len(inputs.layout["decoder"].tokens) - 1
    sites = [f"decoder.*.attn@{last - 1}<{last}"] + ["decoder.0.attn@last<0"] * (name == "gemma3")
    for site in sites:
        for how in ("block", "zero"):
            assert torch.equal(forward(model, inputs, [Edit(site, how)], positions=None).logits, plain), site
    seen = forward(model, inputs, [Edit(f"decoder.*.attn@{last}<{last - 1}", "block")], positions=None).logits
    assert not torch.equal(seen, plain)


def edits_of(model, inputs):
    """Edges and activations at positions that words have, in all towers; cross-attention is of one head."""
    found = [Edit("decoder.1.mlp@all", "scale", 0.5), Edit("decoder.0.resid@text", "add", 0.1)]
    for tower, kind, layers in cases(model, inputs):
        reads = inputs.layout[model.attended(tower, kind)]
        source = "image" if reads.image or reads.cells else "0"
        site = f"{tower}.{layers[-1]}-{layers[-1]}.{kind}{'.h0' if kind == 'cross' else ''}"
        if tower != "vision":
            found.append(Edit(f"{site}@*<{source}", "block" if kind == "attn" else "zero"))
            found.append(Edit(f"{tower}.{layers[0]}.{kind}@all<{len(reads.tokens) // 2}", "block"))
    return found


@pytest.mark.parametrize("name", sorted(MADE))
def test_edits_hold_for_every_word_that_is_said(name):
    """With the cache: what runs over all that was said, with the same edits, find likeliest, word by word."""
    model = made(name)
    one = example()
    plain = model.inputs(one.clean_image, one.clean_prompt)
    edits = edits_of(model, plain)
    start = len(plain.layout["decoder"].tokens) - 1
    last = "decoder.0.attn@last"

    def turned(x):
        return x.flip(-1)

    heard = []
    held = model.hf.get_submodule(model.family.head).register_forward_hook(
        lambda m, args, out: heard.append(out.reshape(-1, out.shape[-1])[-1])
    )
    said = []
    for _ in range(4):
        inputs = model.inputs(one.clean_image, one.clean_prompt, (), said)
        each = [Edit(f"decoder.0.attn@{start + n}", turned) for n in range(len(said) + 1)]
        said.append(int(model.run(inputs, [*edits, *each]).argmax()))
        special = {model.processor.tokenizer.eos_token_id, getattr(model.hf.config, "image_token_id", -1)}
        if said[-1] in special:
            break
    wanted, heard[:] = list(heard), []
    found = generate(model, plain, [*edits, Edit(last, turned)], most=len(said)).tolist()
    held.remove()
    assert found[: len(said)] == said
    assert len(heard) >= len(wanted) and (len(wanted) > 1 or said[0] in special)
    # Eager attention, which Gemma 2's scores need, rounds to float32 in its softmax.
    close = {"rtol": 1e-5, "atol": 1e-5} if name == "paligemma2" else CLOSE
    for mine, other in zip(heard, wanted, strict=False):
        torch.testing.assert_close(mine, other, **close)
    assert not torch.allclose(wanted[0], model.run(plain), atol=1e-3), "the edits count"


def knocked_out(model, inputs):
    """Windows, heads, several targets and sources, sums, in every tower that shows its attention."""
    for tower, kind, layers in cases(model, inputs):
        _, sources = numbers(model, inputs, tower, kind)
        source, layer = sources[0], layers[-1]
        reads = inputs.layout[model.attended(tower, kind)]
        named = "image" if reads.image or reads.cells else "all"
        window = f"*/{min(3, 2 * ((model.shapes[tower].layers + 1) // 2) - 1)}"
        yield f"{tower}.{window}.{kind}@last<{named}"
        yield (
            f"{tower}.*.{kind}.h1@0-2<{source}"
            if len(inputs.layout[tower].tokens) > 2
            else f"{tower}.*.{kind}.h[0,1]@all<0"
        )
        yield f"{tower}.{layer}.{kind}@all<{named} + {tower}.{layers[0]}.{kind}.h0@last<{source}"
        if tower == "encoder":
            yield f"encoder.*.{kind}@answer<{'noun' if reads.roles else 'image*'}"


@pytest.mark.parametrize("how", ["block", "zero"])
@pytest.mark.parametrize("name", sorted(MADE))
def test_rows_of_one_pass_are_single_forwards(name, how):
    model = made(name)
    pair = model.prepare(
        replace(example(answer="un happy", foil="un sad"), corrupt_image=None, corrupt_prompt=None)
    )
    changed = 0.0
    for text in knocked_out(model, pair.clean):
        sites, tables = model.placed(text, pair.clean), []
        some = sites[:: max(1, len(sites) // 4)]
        for one in (engine, reference):
            table = torch.full((2, len(some)), torch.nan, dtype=torch.float64)
            for rows, scores in one.patch(model, pair, some, "noise", values=how).chunks:
                table[0, rows], table[1, rows] = scores.p, scores.ld
            tables.append(table)
        close = {"rtol": 1e-5, "atol": 1e-5} if name == "paligemma2" else {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(*tables, **close, msg=lambda m, t=text: f"{t}: {m}")
        unchanged = engine.patch(model, pair, [], "noise", values=how).clean.ld
        changed = max(changed, float((tables[1][1] - unchanged).abs().max()))
    assert changed > 1e-3 or name == "mplug-owl2", "the knock-outs change the answer"

"""`attn`, `cross` and `mlp` are what is really added to the residual stream, by plain hooks."""

from __future__ import annotations

import anatomy
import pytest
import torch
from cases import SECOND, Case
from test_oracle_prompts import example

import vlmscope

KINDS = ("attn", "cross", "mlp")


@pytest.fixture(params=["one picture", "two pictures"])
def inputs(case, request):
    if request.param == "one picture":
        return case.model.prepare(example()).clean
    if not case.several:
        pytest.skip("takes one picture")
    return case.model.prepare(example(more_images=(SECOND,))).clean


def present(case: Case, tower: str, layer: int) -> list[str]:
    """The kinds that a block has, by transformers' modules."""
    part = anatomy.towers(case, case.hf)[tower]
    added = part.kinds[layer].added
    return [name for name in KINDS if name in added and anatomy.has(part.blocks[layer], added[name].path)]


def test_sites_are_what_is_added(case, inputs):
    """Every kind of every block of every tower, at all positions that its tower's layout names."""
    tensors = anatomy.double(case, inputs)
    wrong = []
    for tower, shape in case.model.shapes.items():
        want = {
            f"{tower}.{layer}.{kind}@all": value
            for layer, seen in enumerate(anatomy.watch(case, tensors, tower)[: shape.layers])
            for kind, value in seen.added.items()
        }
        for site, got in case.model.capture(inputs, want).items():
            value = want[site]
            try:  # a Q-Former's cross-attention and MLP of its queries, which come first
                anatomy.close(got[: len(value)], value[: len(got)], site)
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, f"{len(wrong)} sites: {'; '.join(wrong[:3])}"


def test_sublayers_add_up_to_the_block(case, inputs):
    """resid_pre + attn (+ cross) + mlp = resid, wherever norms stand before the sublayers."""
    wrong = []
    for tower, shape in case.model.shapes.items():
        if not anatomy.towers(case, case.hf)[tower].prenorm:
            continue
        sites = {layer: parts(case, tower, layer) for layer in range(shape.layers)}
        found = case.model.capture(inputs, [one for some in sites.values() for one in some])
        for layer, (*terms, whole) in sites.items():
            total = torch.stack([found[one] for one in terms]).sum(0)
            try:
                anatomy.close(total, found[whole], f"{tower}.{layer}")
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, f"{len(wrong)} blocks: {'; '.join(wrong[:3])}"


def parts(case: Case, tower: str, layer: int) -> list[str]:
    """What a block's output is the sum of, and that output."""
    kinds = ["resid_pre", *present(case, tower, layer), "resid"]
    return [f"{tower}.{layer}.{kind}@all" for kind in kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_adding_to_a_sublayer_adds_to_the_stream(case, kind):
    """`add 1` to what a sublayer adds: it adds one more in every feature, and the sum still holds."""
    inputs = case.model.prepare(example()).clean
    wrong, some = [], False
    for tower, shape in case.model.shapes.items():
        if not anatomy.towers(case, case.hf)[tower].prenorm:
            continue
        for layer in range(shape.layers):
            if kind not in present(case, tower, layer):
                continue
            some = True
            site = f"{tower}.{layer}.{kind}@all"
            plain = case.model.capture(inputs, [site])[site]
            if not plain.any(-1).all():  # Mllama multiplies the words before its picture by 0
                with pytest.raises(vlmscope.VlmscopeError, match="multiplies this by 0"):
                    case.model.run(inputs, [vlmscope.Edit(site, "add", 1.0)])
                site, plain = f"{tower}.{layer}.{kind}@last", plain[-1:]
            edit = vlmscope.Edit(vlmscope.Pattern.parse(site), "add", 1.0)
            terms, whole = parts(case, tower, layer)[:-1], f"{tower}.{layer}.resid@all"
            found = case.model.capture(inputs, [site, *terms, whole], [edit])
            try:
                anatomy.close(found[site], plain + 1.0, site)
                total = torch.stack([found[one] for one in terms]).sum(0)
                anatomy.close(total, found[whole], f"sum with {site}")
            except AssertionError as error:
                wrong.append(str(error))
    if not some:
        pytest.skip(f"no {kind} behind a norm")
    assert not wrong, f"{len(wrong)} sites: {'; '.join(wrong[:3])}"


def test_blocks_read_and_give_what_hooks_see(case, inputs):
    """`resid_pre` and `resid` of every block; between blocks a model may add something (DeepStack)."""
    tensors = anatomy.double(case, inputs)
    for tower, shape in case.model.shapes.items():
        want = {
            f"{tower}.{layer}.{kind}@all": value
            for layer, seen in enumerate(anatomy.watch(case, tensors, tower)[: shape.layers])
            for kind, value in (("resid_pre", seen.before), ("resid", seen.after))
        }
        for site, got in case.model.capture(inputs, want).items():
            many = len(got) if tower == "qformer" else len(want[site])
            anatomy.close(got, want[site][:many], site)


def test_deepstack_adds_between_blocks(case, inputs):
    """Qwen3-VL adds features of the picture behind its first blocks, and only where the picture is."""
    if case.name != "qwen3-vl":
        pytest.skip("adds nothing between blocks")
    ids = inputs.tensors["input_ids"][0]
    for layer in range(2):
        sites = [f"decoder.{layer}.resid@all", f"decoder.{layer + 1}.resid_pre@all"]
        got = case.model.capture(inputs, sites)
        moved = (got[sites[1]] - got[sites[0]]).abs().sum(-1) > 0
        assert moved.tolist() == (ids == case.image).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_a_sublayer_scales_what_it_adds(case, kind):
    """Half of `attn` is half of what attention adds: the logits are those of a plain hook that halves it."""
    inputs = case.model.prepare(example()).clean
    tensors = anatomy.double(case, inputs)
    wrong, some = [], False
    for tower, shape in case.model.shapes.items():
        for layer in range(shape.layers):
            if kind not in present(case, tower, layer):
                continue
            some = True
            edit = vlmscope.Edit(vlmscope.Pattern.parse(f"{tower}.{layer}.{kind}@all"), "scale", 0.5)
            # InstructBLIP's Q-Former reads words behind its queries, and these alone have names.
            rows = len(inputs.layout[tower].tokens) if tower == "qformer" else None
            want = anatomy.halved(case, tensors, tower, layer, kind, rows)
            try:
                anatomy.close(case.model.run(inputs, [edit]), want, str(edit.site))
            except AssertionError as error:
                wrong.append(str(error))
    if not some:
        pytest.skip(f"no {kind}")
    assert not wrong, f"{len(wrong)} sites: {'; '.join(wrong[:3])}"

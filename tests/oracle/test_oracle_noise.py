"""Noise is in what the language model reads of the image: in all of it, and in nothing else.

`reads` finds that with plain hooks: the embeddings that enter the first block at the image's positions,
the states that cross-attention reads (BLIP, Mllama), and what is added to the image's positions between
blocks (DeepStack of Qwen3-VL).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import anatomy
import pytest
import torch
from cases import PROMPT, SECOND, Case
from test_oracle_prompts import example
from torch import Tensor

import vlmscope
from vlmscope.runs import corrupt


@dataclass
class Read:
    """What the language model reads: of the image, a tensor a place, and of the prompt's text."""

    image: list[Tensor]
    text: Tensor


def reads(case: Case, inputs: vlmscope.Inputs, edits: tuple[vlmscope.Edit, ...]) -> Read:
    parts = anatomy.towers(case, case.hf)
    blocks = parts.get("encoder", parts["decoder"]).blocks
    entered: list[Tensor] = []  # the input of every block, as its first module reads it
    given: list[Tensor] = []  # the output of every block
    cross: list[Tensor] = []  # what cross-attention's keys are made of
    places: list[Tensor] = []  # what OPT adds to its embeddings for their places
    with anatomy.hooked() as keep:
        for block in blocks:
            # Behind the block's own hooks, so that an edit of the block's input is seen as well.
            keep(before(block.get_submodule(first_module(case)), entered))
            keep(after(block, given))
            if case.name.startswith("blip-"):
                keep(before(block.crossattention.get_submodule("self.key"), cross))
            elif hasattr(block, "cross_attn"):
                keep(before(block.cross_attn.k_proj, cross))
        if case.name == "blip2-opt":
            keep(after(case.hf.language_model.model.decoder.embed_positions, places))
        case.model.run(inputs, edits)
    enter = entered[0] - places[0] if places else entered[0]
    if case.name.startswith("blip-"):
        return Read(cross, enter)
    image = inputs.tensors["input_ids"][0] == case.image
    if case.name == "mllama":
        return Read(cross, enter[~image])
    stacked = [(entered[n + 1] - given[n])[image] for n in range(2)]
    return Read([enter[image], *(stacked if case.name == "qwen3-vl" else ())], enter[~image])


def before(module: torch.nn.Module, found: list[Tensor]) -> Any:
    return module.register_forward_pre_hook(
        lambda m, args, named: found.append(anatomy.first(args, named)[0]), with_kwargs=True
    )


def after(module: torch.nn.Module, found: list[Tensor]) -> Any:
    return module.register_forward_hook(lambda m, args, out: found.append(anatomy.tensor(out)[0]))


def first_module(case: Case) -> str:
    """The module of a block that reads its input."""
    if case.name.startswith("blip-"):
        return "attention.self.query"
    if case.name.endswith("t5"):
        return "layer.0.layer_norm"
    return "self_attn_layer_norm" if case.name == "blip2-opt" else "input_layernorm"


@pytest.fixture(params=["one picture", "two pictures"])
def asked(case, request):
    if request.param == "one picture":
        return example(corrupt_image=None)
    if not case.several:
        pytest.skip("takes one picture")
    return example(corrupt_image=None, more_images=(SECOND,))


def both(case: Case, asked: vlmscope.Example, noise: vlmscope.Noise) -> list[tuple[Read, Read]]:
    """The clean reading beside each draw's."""
    pairs = corrupt.pairs(case.model, asked, noise, 0)
    clean = reads(case, pairs[0].clean, ())
    return [(clean, reads(case, pair.corrupt, pair.edits)) for pair in pairs]


def test_a_factor_scales_all_that_is_read_of_the_image(case, asked):
    """Half of every feature at every place of the image (DeepStack apart); the text as it was."""
    [(clean, noisy)] = both(case, asked, vlmscope.Noise("factor", scale=0.5))
    many = len(clean.image) if case.name != "qwen3-vl" else 1
    assert clean.image[0].abs().max() > 0.1
    for place, (was, now) in enumerate(zip(clean.image[:many], noisy.image[:many], strict=True)):
        share = torch.isclose(now, 0.5 * was, rtol=1e-9, atol=1e-12).double().mean().item()
        assert share == 1.0, f"place {place}: {share:.1%} of the features are halved"
    anatomy.close(noisy.text, clean.text, "text", 0.0)


def test_a_factor_scales_what_deepstack_adds(case, asked):
    """Qwen3-VL's language model reads the picture between its first blocks, too."""
    if case.name != "qwen3-vl":
        pytest.skip("adds nothing between blocks")
    [(clean, noisy)] = both(case, asked, vlmscope.Noise("factor", scale=0.5))
    for was, now in zip(clean.image[1:], noisy.image[1:], strict=True):
        anatomy.close(now, 0.5 * was, "between blocks", 1e-9)


def test_multiplied_noise_is_in_every_feature(case, asked):
    """x·ε, ε ~ N(1, 5²), another ε for every feature, and the same draw for every run of it."""
    for clean, noisy in both(case, asked, vlmscope.Noise("multiply", draws=2)):
        was, now = clean.image[0], noisy.image[0]
        ratio = (now / was)[was.abs() > 1e-6]
        assert (ratio != 1.0).all(), f"{(ratio == 1.0).double().mean():.1%} of the features are clean"
        assert ratio.unique().numel() > 0.99 * ratio.numel()
        # ε itself, so its spread is 5 whatever the features are.
        assert abs(ratio.std().item() - 5.0) < 15 / ratio.numel() ** 0.5, ratio.std().item()
        assert abs(ratio.mean().item() - 1.0) < 20 / ratio.numel() ** 0.5, ratio.mean().item()
        anatomy.close(noisy.text, clean.text, "text", 0.0)


def test_added_noise_has_the_spread_of_what_is_read(case, asked):
    """x + ε, ε ~ N(0, (3σ)²), σ the standard deviation of what the language model reads of the image."""
    for clean, noisy in both(case, asked, vlmscope.Noise("add", draws=2)):
        was, now = clean.image[0], noisy.image[0]
        drawn = (now - was) / (3 * was.std())
        assert (drawn != 0).all(), f"{(drawn == 0).double().mean():.1%} of the features are clean"
        assert abs(drawn.std().item() - 1.0) < 3.5 / drawn.numel() ** 0.5, drawn.std().item()
        assert abs(drawn.mean().item()) < 4 / drawn.numel() ** 0.5, drawn.mean().item()
        anatomy.close(noisy.text, clean.text, "text", 0.0)


def test_draws_differ_and_come_again(case, asked):
    noise = vlmscope.Noise("multiply", draws=2)
    (_, one), (_, other) = both(case, asked, noise)
    assert (one.image[0] != other.image[0]).any()
    again, _ = both(case, asked, noise)
    anatomy.close(again[1].image[0], one.image[0], "the same draw", 0.0)


@pytest.mark.parametrize("form", ["factor", "multiply", "add"])
def test_noise_at_the_text_leaves_the_image(case, asked, form):
    """Every token of the prompt's words is changed, and nothing of what is read of the image."""
    noise = vlmscope.Noise(form, at="text", scale=0.5 if form == "factor" else None, draws=1)
    [(clean, noisy)] = both(case, asked, noise)
    tolerance = 1e-12 if case.name == "blip2-opt" else 0.0  # places are added and taken off again
    anatomy.close(noisy.image[0], clean.image[0], "image", tolerance)
    words = len(case.processor.tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    changed = (noisy.text != clean.text).all(-1).sum().item()
    assert changed >= words, f"{changed} of {words} words are changed in every feature"


def test_noise_at_the_text_leaves_what_is_fed_of_the_answer(case, asked):
    """What both options begin with is no part of the prompt; a decoder reads it behind that."""
    noise = vlmscope.Noise("multiply", at="text", draws=1)
    counts = []
    for answer, foil in (("red", "blue"), ("dark red", "dark blue")):
        [(clean, noisy)] = both(case, replace(asked, answer=answer, foil=foil), noise)
        changed = (noisy.text != clean.text).any(-1)
        counts.append(int(changed.sum()))
    assert counts[0] == counts[1] > 0

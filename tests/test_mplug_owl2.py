"""mPLUG-Owl2, whose class transformers does not have: its tokens, its pictures, and what is refused.

That its runs, generation and patches are exact is in test_families.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import mplug_owl2
from models import example, picture
from mplug_owl2 import IMAGE_TOKEN_INDEX

from vlmscope import describe
from vlmscope.checkpoint import load, tokenizer
from vlmscope.errors import ExampleError, ModelError
from vlmscope.models.inputs import Edit
from vlmscope.patching import engine, reference
from vlmscope.sites import Pattern, expand, place

QUERIES = ("query 0", "query 1", "query 2", "query 3", "query 4", "vit_eos")


def test_the_image_stands_where_its_token_is():
    model = mplug_owl2()
    inputs = model.prepare(example()).clean
    ids, layout = inputs.tensors["input_ids"][0].tolist(), inputs.layout["decoder"]
    at = ids.index(IMAGE_TOKEN_INDEX)
    assert layout.image == tuple(range(at, at + 6)) and not layout.cells
    assert [layout.tokens[n] for n in layout.image] == list(QUERIES)
    assert layout.tokens.count("<s>") == 1, "the words behind the image have no start of their own"
    ways, hidden = [], model.capture(inputs, ["decoder.0.resid_pre@all"])
    layer = model.hf.model.layers[0]
    with pytest.MonkeyPatch.context() as patch:
        honest = layer.forward
        patch.setattr(
            layer,
            "forward",
            lambda h, modality_indicators, **k: (
                ways.append(modality_indicators) or honest(h, modality_indicators, **k)
            ),
        )
        model.run(inputs)
    assert tuple(ways[0][0].nonzero()[:, 0].tolist()) == layout.image, "the model's own view"
    assert hidden["decoder.0.resid_pre@all"].shape[0] == len(layout.tokens)
    words = model.hf.model.embed_tokens.weight[ids[-1]]
    assert torch.equal(hidden["decoder.0.resid_pre@all"][-1], words)


def test_the_prompt():
    """The published template; a prompt that holds the placeholder is used as it is."""
    model = mplug_owl2()
    written = model.prepare(example(corrupt_prompt=None)).clean
    own = "USER: <|image|>is this circle red or blue ? ASSISTANT:"
    same = model.prepare(example(own, corrupt_prompt=None)).clean
    assert torch.equal(written.tensors["input_ids"], same.tensors["input_ids"])
    assert written.layout["decoder"].roles == same.layout["decoder"].roles
    behind = model.inputs(picture(1), "is this circle red or blue ? <|image|>")
    assert behind.layout["decoder"].tokens[-6:] == QUERIES
    first = model.inputs(picture(1), "<|image|> red or blue ?")
    assert first.layout["decoder"].tokens[:8] == (*QUERIES, "<s>", "red"), "as published"
    with pytest.raises(ExampleError, match=r"2 placeholders '<\|image\|>'"):
        model.prepare(example("<|image|> <|image|> red or blue ?"))


def test_a_picture_is_squeezed_to_a_square():
    model = mplug_owl2()
    wide = picture(1, 24).resize((24, 12))
    pixels = model.inputs(wide, "red ?").tensors["images"]
    square = model.inputs(wide.resize((24, 24)), "red ?").tensors["images"]
    assert torch.equal(pixels, square) and pixels.dtype == torch.float64


@pytest.mark.parametrize("class_token", [True, False])
def test_towers(class_token):
    model = mplug_owl2(class_token=class_token)
    model.verify()
    assert model.shapes["qformer"].kinds == ("resid_pre", "cross", "mlp", "resid")
    assert model.shapes["qformer"].having("attn") == []
    assert {t: s.heads for t, s in model.shapes.items()} == {
        "vision": {"attn": 2},
        "qformer": {"cross": 2},
        "decoder": {"attn": 4},
    }
    layout = model.layouts()["vision"]
    assert ("[CLS]" in layout.tokens) == class_token and len(layout.cells) == 9
    assert "one forward a patch" in describe.model(model)


@torch.inference_mode()
@pytest.mark.parametrize("tower", ["vision", "qformer", "decoder"])
def test_sublayers_add_up_to_blocks(tower):
    """The paths name what is added to the residual stream; the abstractor's is normed first."""
    model = mplug_owl2()
    kinds = [kind for kind in model.shapes[tower].kinds if kind != "resid_mid"]
    inputs = model.prepare(example()).clean
    found = model.capture(inputs, [f"{tower}.1.{kind}@all" for kind in kinds])
    before, *added, after = (found[f"{tower}.1.{kind}@all"] for kind in kinds)
    if tower == "qformer":
        before = model.blocks(tower)[1].crossattention.norm1(before)
    torch.testing.assert_close(before + sum(added), after, rtol=1e-12, atol=1e-12)


def test_answers_of_several_tokens():
    model = mplug_owl2()
    pair = model.prepare(example(answer="un happy", foil="un sad", corrupt_prompt=None))
    assert pair.clean.layout["decoder"].tokens[-1] == "un"
    assert "un" not in [pair.clean.layout["decoder"].tokens[n] for n in pair.clean.layout["decoder"].image]
    sites = [
        found
        for text in ("decoder.1.resid@text*", "qformer.*.cross.h1@all", "vision.1.mlp@*")
        for one in expand([Pattern.parse(text)], model.shapes)
        for found in place(one, pair.clean.layout)
    ]
    tables = []
    for one in (engine, reference):
        table = torch.zeros(len(sites), dtype=torch.float64)
        for numbers, scores in one.patch(model, pair, sites).chunks:
            table[numbers] = scores.ld
        tables.append(table)
    torch.testing.assert_close(*tables, rtol=1e-9, atol=1e-12)
    assert len(tables[0].unique()) > 4, "patches count"


def test_generation_under_edits():
    """Token by token as plain forwards give it, with and without keys that are kept."""
    model = mplug_owl2()
    inputs = model.prepare(example()).clean
    for edits in (
        [],
        [Edit(Pattern.parse("vision.0.resid@all"), "scale", 0.0)],
        [Edit(Pattern.parse("decoder.1.attn@image"), "scale", -2.0)],
    ):
        ids = inputs.tensors["input_ids"]
        for _ in range(20):
            longer = {**inputs.tensors, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            ids = torch.cat([ids, model.run(replace(inputs, tensors=longer), edits).argmax()[None, None]], 1)
            if ids[0, -1] == model.processor.tokenizer.eos_token_id:
                break
        said = ids[0, inputs.tensors["input_ids"].shape[1] :]
        text = model.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert model.answer(inputs, edits) == text


def test_its_checkpoints_are_not_loaded(tmp_path):
    """Also not where there are weights as pickle only, as in the published ones."""
    mplug_owl2().hf.config.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    name = '"architectures": ["MPLUGOwl2LlamaForCausalLM"], "model_type"'
    (tmp_path / "config.json").write_text(config.replace('"model_type"', name, 1))
    (tmp_path / "pytorch_model.bin").touch()
    for read in (load, tokenizer):
        with pytest.raises(
            ModelError,
            match=r"is a MPLUGOwl2LlamaForCausalLM, for which transformers has no code; load it with "
            r"the code .*vlmscope\.Model\(hf, processor\)",
        ):
            read(tmp_path)

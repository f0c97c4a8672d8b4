"""The model: preparing, running with edits, capturing, verifying."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import blip2, blip_captioning
from models import WORDS, blip, example, picture

from vlmscope.errors import ExampleError, ModelError, SiteError, VlmscopeError
from vlmscope.models.families import blip as table
from vlmscope.models.inputs import Edit
from vlmscope.neurons.captions import generate_caption
from vlmscope.runs.forward import room
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern


def test_a_run_without_edits_is_plain_hugging_face_bit_for_bit():
    for dtype in (torch.float32, torch.float64):
        model = blip(dtype=dtype)
        hf, one = model.hf, example()
        inputs = model.processor(images=one.clean_image, text=one.clean_prompt, return_tensors="pt")
        with torch.inference_mode():
            image = hf.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
            asked = hf.text_encoder(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                encoder_hidden_states=image,
                encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
            ).last_hidden_state
            logits = hf.text_decoder(
                input_ids=torch.tensor([[WORDS.index("[DEC]")]]),
                encoder_hidden_states=asked,
                encoder_attention_mask=inputs["attention_mask"],
            ).logits[0, -1]
        assert torch.equal(model.run(model.prepare(one).clean), logits)


def test_the_logits_are_those_of_generate():
    model = blip()
    inputs = model.prepare(example()).clean
    asked = {k: v for k, v in inputs.tensors.items() if k != "decoder_input_ids"}
    made = model.hf.generate(**asked, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    scores = made.scores[0][0]  # generate works on the scores in float32
    assert torch.equal(model.run(inputs).float(), scores)


def test_positions_of_roles_and_patches():
    layout = model_layout()
    assert layout["encoder"].tokens[4:7] == ("red", "or", "blue")
    assert layout["encoder"].roles == {"answer": (4,), "foil": (6,), "noun": (3,)}
    assert layout["vision"].cells[1] == (0, 0) and layout["vision"].cells[9] == (2, 2)
    assert layout["decoder"].tokens == ("[DEC]",)


def model_layout():
    return blip().prepare(example()).clean.layout


def test_capture_gives_what_hooks_see():
    model = blip()
    inputs = model.prepare(example()).clean
    seen = {}
    dense = model.hf.text_encoder.encoder.layer[1].crossattention.output.dense
    dense.register_forward_hook(lambda m, args, out: seen.update(heads=args[0], added=out))
    sites = ["encoder.1.cross.h1@answer", "encoder.1.cross@4", "encoder.1.mlp.n3@*"]
    found = model.capture(inputs, sites)
    assert torch.equal(found["encoder.1.cross.h1@answer"], seen["heads"][0, [4], 4:])
    assert torch.equal(found["encoder.1.cross@4"], seen["added"][0, [4]])
    assert found["encoder.1.mlp.n3@0"].shape == (1, 1)


def test_what_the_sublayers_add_makes_the_residual_stream():
    """Post-norm blocks: each sum is normalised. Vision blocks add to the stream as it is."""
    model = blip()
    inputs = model.prepare(example()).clean
    sites = [f"vision.1.{kind}@all" for kind in ("resid_pre", "attn", "mlp", "resid")]
    before, attn, mlp, after = model.capture(inputs, sites).values()
    torch.testing.assert_close(before + attn + mlp, after, rtol=1e-12, atol=1e-12)
    text = model.capture(inputs, ["encoder.0.resid@all", "encoder.1.resid_pre@all"])
    assert torch.equal(*text.values())


@pytest.mark.parametrize("op", ["set", "add", "scale"])
def test_edits_do_what_they_say(op):
    model = blip()
    inputs = model.prepare(example()).clean
    site = Pattern.parse("encoder.0.attn.h1@2")
    (before,) = model.capture(inputs, [site]).values()
    (after,) = model.capture(inputs, [site], [Edit(site, op, 3.0)]).values()
    expected = {"set": torch.full_like(before, 3.0), "add": before + 3, "scale": before * 3}[op]
    assert torch.equal(after, expected)
    others = model.capture(inputs, ["encoder.0.attn.h0@2"], [Edit(site, op, 3.0)])
    assert torch.equal(
        others["encoder.0.attn.h0@2"], model.capture(inputs, ["encoder.0.attn.h0@2"])["encoder.0.attn.h0@2"]
    )


def test_edits_leave_the_model_as_it_was():
    model = blip()
    inputs = model.prepare(example()).clean
    before = model.run(inputs)
    edit = Edit(Pattern.parse("encoder.0.resid@all"), "set", 0.0)
    assert not torch.equal(model.run(inputs, [edit]), before)
    with pytest.raises(VlmscopeError, match=r"'encoder.0.resid@all' has the shape \(3, 3\); .*\(9, 8\)"):
        model.run(inputs, [Edit(edit.site, "set", torch.zeros(3, 3))])
    with pytest.raises(VlmscopeError, match=r"shape \(2, 9, 8\)"):
        model.run(inputs, [Edit(edit.site, "scale", torch.zeros(2, 9, 8))])
    assert torch.equal(model.run(inputs), before)


def test_edits_that_make_no_sense_are_refused():
    model = blip()
    inputs = model.prepare(example()).clean
    with pytest.raises(Exception, match="'mul'"):  # the tests' type checker speaks first
        Edit(Pattern.parse("encoder.0.resid@all"), "mul", 0.0)
    with pytest.raises(SiteError, match="names 2"):
        model.run(inputs, [Edit(Pattern.parse("encoder.*.resid@all"), "set", 0.0)])


def test_an_edit_takes_an_expression():
    model = blip()
    inputs = model.prepare(example()).clean
    edit = Edit("encoder.0.attn.h1@2", "scale", 0.0)
    assert edit.site == Pattern.parse("encoder.0.attn.h1@2")
    assert torch.equal(model.run(inputs, [edit]), model.run(inputs, [replace(edit, value=0.0)]))
    with pytest.raises(SiteError, match="no position"):
        Edit("encoder.0.attn", "scale", 0.0)


def test_wrong_types_are_one_line():
    """In a process of its own, without the tests' type checker, as a user meets them."""
    script = """
import vlmscope
for arguments in ((3, "set", 0.0), ("encoder.0.resid@all", "set", [1.0]), ("encoder.0.resid@all", "mul", 0)):
    try:
        vlmscope.Edit(*arguments)
    except vlmscope.VlmscopeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "the site of an edit is '3' (int); expected a Site, or an expression such as 'decoder.2.attn.h1@all'",
        "the value of an edit is '[1.0]' (list); expected a number or a tensor",
        "unknown operation 'mul' of an edit; expected set, add, scale, block, zero, or a function of the "
        "activation",
    ], done.stderr


def test_errors_of_the_forward_are_not_all_the_processors(monkeypatch):
    model = blip()
    inputs = model.prepare(example()).clean

    def fail(*args, **keywords):
        raise ValueError(fail.why)

    monkeypatch.setattr(model.hf.text_encoder, "forward", fail)
    fail.why = "something else"
    with pytest.raises(ValueError, match="something else"):
        model.run(inputs)
    for fail.why in (
        "Image features and image tokens do not match, tokens: 3, features: 4",
        "Input image size (3*3) doesn't match model (4*4).",
    ):
        with pytest.raises(ModelError, match="refuses what its processor made of the example"):
            model.run(inputs)


@pytest.mark.parametrize("make", [blip_captioning, blip2], ids=["BLIP", "OPT"])
def test_no_more_is_said_than_there_are_positions(make):
    """Up to the longest prompt, which leaves room for one token; a longer one is refused by itself."""
    model = make()
    longest = model.hf.config.get_text_config().max_position_embeddings
    alone = len(model.inputs(picture(1), "").layout["decoder"].tokens)
    for many in (longest - 40, longest - 19, longest - 18, longest - 1, longest):
        inputs = model.inputs(picture(1), " ".join(["red"] * (many - alone)))
        assert len(inputs.layout["decoder"].tokens) == many
        left = longest - many + 1
        assert room(model, inputs, 20) == min(20, left) >= 1
        model.answer(inputs)
        assert len(generate_caption(model, inputs).ids) <= left
    with pytest.raises(ExampleError, match=f"{longest + 1} tokens, the model takes at most {longest}"):
        model.inputs(picture(1), " ".join(["red"] * (longest + 1 - alone)))


def test_an_answer_under_an_edit():
    model = blip()
    inputs = model.prepare(example()).clean
    assert isinstance(model.answer(inputs), str)
    plain = model.hf.generate(
        **{k: v for k, v in inputs.tensors.items() if k != "decoder_input_ids"}, max_new_tokens=20
    )
    assert model.answer(inputs) == model.processor.decode(plain[0, 1:], skip_special_tokens=True).strip()
    same = [Edit(Pattern.parse("decoder.0.resid@0"), "scale", 1.0)]
    assert model.answer(inputs, same) == model.answer(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "  "}, "answer '' is empty"),
        ({"foil": "zebra"}, "foil 'zebra' is unknown to the model's tokenizer"),
        ({"foil": "RED"}, "'red' and foil 'RED' are the same tokens"),
        ({"corrupt_prompt": "is this circle green ?"}, "7 words, the corrupt one 5"),
        (
            {"corrupt_prompt": "is this circle unhappy or yellow ?"},
            r"word 4 is 'red' \(1 tokens\) in the clean one, 'unhappy' \(2 tokens\)",
        ),
        ({"clean_prompt": "red " * 30, "corrupt_prompt": None, "roles": {}}, "32 tokens.*at most 24"),
    ],
)
def test_an_example_that_cannot_be_run_says_why(changes, message):
    with pytest.raises(ExampleError, match=message):
        blip().prepare(replace(example(), **changes))


def test_answers_of_several_tokens_are_scored_where_they_differ():
    model = blip()
    pair = model.prepare(example(answer="unhappy", foil="unly"))
    assert pair.clean.tensors["decoder_input_ids"].tolist() == [[WORDS.index("[DEC]"), WORDS.index("un")]]
    assert (WORDS[pair.answer], WORDS[pair.foil]) == ("##happy", "##ly")
    pair = model.prepare(example(answer="red", foil="red circle"))
    assert (WORDS[pair.answer], WORDS[pair.foil]) == ("[SEP]", "circle")


def test_verify_accepts_what_fits_and_names_what_does_not(monkeypatch):
    model = blip()
    model.verify()
    tower = replace(table.VQA.towers["encoder"], cross="crossattention.gone")
    family = replace(table.VQA, towers={**table.VQA.towers, "encoder": tower})
    monkeypatch.setattr("vlmscope.models.families.families", lambda *_: (family,))
    with pytest.raises(ModelError, match=r"BLIP-VQA does not fit.*transformers 5.*'crossattention.gone'"):
        Model(model.hf, model.processor)


def test_verify_notices_a_site_that_is_not_connected(monkeypatch):
    model = blip()
    layer = model.hf.text_decoder.bert.encoder.layer[1]
    honest = layer.forward
    monkeypatch.setattr(layer, "forward", lambda h, *a, **k: honest(h.nan_to_num(), *a, **k).nan_to_num())
    with pytest.raises(ModelError, match="an edit at .* does not reach the logits"):
        model.verify()


def test_a_picture_of_any_size_becomes_the_model_s():
    model = blip()
    pair = model.prepare(example(clean_image=picture(1, 40)))
    assert pair.clean.tensors["pixel_values"].shape == (1, 3, 12, 12)


def test_attention_is_the_models_own():
    """Rows sum to one, over the positions of the tower that is attended to."""
    model = blip(layers=3, heads=2)
    inputs = model.prepare(example()).clean
    for tower, kind, keys in (
        ("vision", "attn", "vision"),
        ("encoder", "attn", "encoder"),
        ("encoder", "cross", "vision"),
        ("decoder", "cross", "encoder"),
    ):
        assert model.attended(tower, kind) == keys
        rows = model.attention(inputs, tower, kind, [0])
        shape = model.shapes[tower]
        many = len(inputs.layout[keys].tokens)
        assert rows.shape == (shape.layers, shape.heads[kind], 1, many)
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    by_hand = model.hf(**inputs.tensors, output_attentions=True)
    whole = model.attention(inputs, "vision", "attn", range(10))
    torch.testing.assert_close(whole, torch.cat(by_hand.attentions).float())


def test_attention_from_a_named_position():
    model = blip(layers=3, heads=2)
    inputs = model.prepare(example()).clean
    for name, at in (("last", [8]), ("answer", [4]), ("-1", [8]), ("2-3", [2, 3]), ("all", range(9))):
        wanted = model.attention(inputs, "encoder", "cross", at)
        assert torch.equal(model.attention(inputs, "encoder", "cross", name), wanted)
    assert torch.equal(*(model.attention(inputs, "encoder", "attn", [n]) for n in (-1, 8)))
    for at, why in (
        ("middle", "no position 'middle' in the encoder tower"),
        ([9], "no position 9 in the encoder tower; expected whole numbers from 0 to 8, or a name"),
    ):
        with pytest.raises(SiteError, match=why):
            model.attention(inputs, "encoder", "attn", at)
    with pytest.raises(SiteError, match="this model has no 'qformer' tower"):
        model.attention(inputs, "qformer", "attn", [0])


def test_experts_are_no_neurons():
    from models import llava
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3MoeConfig

    small = llava()
    text = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        head_dim=8,
    )
    config = LlavaConfig(vision_config=small.hf.config.vision_config, text_config=text, image_token_index=4)
    with pytest.raises(
        ModelError, match="decoder tower are made of experts, which cannot be split into neurons"
    ):
        Model(LlavaForConditionalGeneration(config), small.processor)


def test_free_memory_is_asked_of_each_device_that_a_model_is_spread_over(monkeypatch):
    model = blip()
    free = {"cpu": 7, "cuda:0": 5, "cuda:1": 3}
    monkeypatch.setattr("vlmscope.runs.network.free_memory", lambda device: free[str(device)])
    assert model.free_memory() == 7
    model.hf.hf_device_map = {"vision": "cuda:0", "text": "cuda:1", "head": "disk"}
    assert model.free_memory() == 3

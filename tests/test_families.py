"""Every family: exact against plain Hugging Face, and the engine against the reference."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch
from families import FAMILIES, llava_siglip, paligemma
from models import blip, example, llava, picture

from vlmscope import describe
from vlmscope.checkpoint import load
from vlmscope.errors import ExampleError, ModelError, SiteError
from vlmscope.layout import grid
from vlmscope.models.inputs import Edit
from vlmscope.neurons import edit as edit_neurons
from vlmscope.neurons.captions import forced_caption, generate_caption, given_caption, whole_word
from vlmscope.neurons.contributions import COLUMNS, score
from vlmscope.patching import engine, reference, suffix
from vlmscope.runs import corrupt
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern, expand, place

TEXT = ("resid", "resid_pre", "attn", "mlp", "attn.h*")
if os.environ.get("VLMSCOPE_TORCHVISION"):  # see test_video_families.py
    from video_families import FAMILIES as MADE
else:
    MADE = {"llava": llava, "blip-vqa": blip, **FAMILIES}


@cache
def made(name: str) -> Model:
    return {**FAMILIES, **MADE}[name]()


def reader(model: Model) -> str:
    """The tower that reads the prompt."""
    return "encoder" if "encoder" in model.shapes else "decoder"


def expressions(model: Model) -> list[str]:
    """Every kind of site in every tower, at single positions and at several together."""
    found = []
    for tower, shape in model.shapes.items():
        found += [f"{tower}.*.{kind}@{at}" for kind in shape.kinds for at in ("*", "all")]
        found += [f"{tower}.*.{kind}.h*@*" for kind in shape.heads]
        found += [f"{tower}.*.mlp.n3@*", f"{tower}.*/3.{next(iter(shape.heads))}@*", f"{tower}.*/3.resid@*"]
    for first, second in combinations(model.shapes, 2):
        found.append(f"{first}.0.{next(iter(model.shapes[first].heads))}@all + {second}.0.mlp@all")
    tower = reader(model)
    found.append(f"{tower}.*.resid@answer")
    if model.prepare(example()).clean.layout[tower].image:
        found.append(f"{tower}.*.resid@image")
    return found


# BLIP-VQA's own forward gives no logits: tests/test_model.py has what stands for them.
@pytest.mark.parametrize("name", sorted(set(MADE) - {"blip-vqa"}))
def test_a_run_is_hugging_faces(name):
    """The logits of a plain forward and of generation's first step; the table fits the model."""
    model = made(name)
    model.verify()
    inputs = model.prepare(example()).clean
    plain = model.hf(**inputs.tensors).logits[0, -1]
    torch.testing.assert_close(model.run(inputs), plain, rtol=1e-12, atol=1e-12)
    said = model.answer(inputs)
    first = model.processor.tokenizer.decode([int(plain.argmax())], skip_special_tokens=True)
    assert said.startswith(first.strip()), "generation begins with the likeliest token"


@pytest.mark.parametrize(
    ("corruption", "direction"), [("image", "denoise"), ("text", "noise"), ("noise", "denoise")]
)
@pytest.mark.parametrize("name", MADE)
def test_engine_equals_reference(name, corruption, direction):
    model = made(name)
    compare(model, corrupt.pairs(model, example(), corrupt.parse(corruption))[0], direction)


def compare(model, pair, direction, some=None):
    """Two sites of each expression, all in one call: the two base runs are most of what a patch costs."""
    draw, drawn, results = random.Random(0), [], []
    for text in some or expressions(model):
        found = place_all(model, pair, text)
        drawn += draw.sample(found, min(2, len(found)))
    sites = list(dict.fromkeys(drawn))
    for one in (engine, reference):
        table = torch.full((2, len(sites)), torch.nan, dtype=torch.float64)
        for numbers, scores in one.patch(model, pair, sites, direction).chunks:
            table[0, numbers], table[1, numbers] = scores.p, scores.ld
        results.append(table)
    for number, site in enumerate(sites):
        both = [table[:, number] for table in results]
        torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11, msg=lambda m, s=site: f"{s}: {m}")


NOT_ADDED = {
    ("blip-vqa", "encoder"),
    ("blip-vqa", "decoder"),
    ("blip-captioning", "decoder"),
    *(
        (name, "qformer")
        for name in ("blip2-opt", "blip2-t5", "instructblip-vicuna", "instructblip-t5", "mplug-owl2")
    ),
}
"""Towers whose blocks normalise the residual stream itself: what is added is not the difference."""


LONG = ("llava", "llava-next", "gemma3", "paligemma", "instructblip-vicuna")
"""Of which the rows of a decoder can be long."""


@pytest.mark.parametrize("name", [name for name in LONG if name in {**FAMILIES, **MADE}])
def test_long_rows_pay_attention_by_the_fused_kernel(name, monkeypatch):
    """With windows, prefixes, attention both ways among image tokens, and keys that queries share."""
    model, calls = made(name), []
    kernel = suffix.scaled_dot_product_attention
    monkeypatch.setattr(suffix, "LONG", 1)
    monkeypatch.setattr(
        suffix, "scaled_dot_product_attention", lambda *a, **kw: calls.append(1) or kernel(*a, **kw)
    )
    pair = corrupt.pairs(model, example(), corrupt.parse("image"))[0]
    compare(model, pair, "noise", ["decoder.*.resid@*", "decoder.0.resid_pre@image", "decoder.*.attn.h*@*"])
    assert calls


@pytest.mark.parametrize("name", MADE)
def test_sublayers_add_up_to_blocks(name):
    """Also where a norm, a gate or a number stands between a sublayer and the residual stream, also when
    it is edited; heads and neurons are what the output projection gets."""
    adds_up(made(name), {t for t in made(name).shapes if (name, t) not in NOT_ADDED})


def test_norms_behind_sublayers():
    """PaliGemma 2's decoder has them, PaliGemma's has the MLP's by the name of attention's before it."""
    for language, behind in (("gemma", False), ("gemma2", True)):
        model = paligemma(model_type=language)
        assert hasattr(model.blocks("decoder")[0], "post_feedforward_layernorm") == behind
        adds_up(model, model.shapes)


def adds_up(model, towers):
    inputs = model.prepare(example()).clean
    for tower in towers:
        kinds = [k for k in model.shapes[tower].kinds if k not in ("deepstack", "output", "resid_mid")]
        edited = [
            Edit(Pattern.parse(f"{tower}.{model.shapes[tower].having(kind)[-1]}.{kind}@all"), "scale", -0.5)
            for kind in kinds[1:-1]
        ]
        plain = model.capture(inputs, [f"{tower}.*.{kind}@all" for kind in kinds])
        for found in (plain, model.capture(inputs, list(plain), edited)):
            for layer in range(model.shapes[tower].layers):
                before, *added, after = (
                    found[f"{tower}.{layer}.{kind}@all"]
                    for kind in kinds
                    if f"{tower}.{layer}.{kind}@all" in found
                )
                torch.testing.assert_close(before + sum(added), after, rtol=1e-11, atol=1e-11)
        for edit in edited[:1]:
            was = plain[str(edit.site)]
            now = model.capture(inputs, [edit.site], [edit])[str(edit.site)]
            torch.testing.assert_close(now, -0.5 * was, rtol=1e-12, atol=1e-12)
            assert was.abs().max() > 1e-3


def test_a_table_that_does_not_know_of_norms_behind_sublayers():
    model = FAMILIES["gemma3"]()
    decoder = replace(model.family.towers["decoder"], behind={})
    model.family = replace(model.family, towers={**model.family.towers, "decoder": decoder})
    with pytest.raises(ModelError, match="attn, mlp do not add up to what block 2 of decoder does"):
        model.verify()


def test_towers_of_which_several_blocks_are_read():
    """Their patches are one forward each: the last block alone does not say what leaves the tower."""
    flows, depths = {}, {}
    for layers in (-1, [1], [0, 1], [-1, -2]):
        model = llava_siglip(layers)
        flows[str(layers)] = model.flow("vision", model.prepare(example()).clean)
        depths[str(layers)] = model.shapes["vision"].layers
    assert list(flows.values()) == ["rows", "rows", "plain", "plain"]
    assert list(depths.values()) == [2, 1, 1, 2]
    told = describe.model(llava_siglip([0, 2])).split("patches (exact in every case)")[1]
    assert "vision   one forward a patch" in told
    for layers in (0, 3, [1, -4]):
        with pytest.raises(ModelError, match="hidden states .* of a vision tower of 2 blocks"):
            llava_siglip(layers)


def test_what_siglip_sees():
    """All of a picture, in patches without a class token, each a token of the language model's."""
    model = llava_siglip()
    assert model.view(picture(1).resize((40, 20))) == (0, 0, 40, 20)
    layout = model.inputs(picture(1), "red or blue ?").layout
    assert layout["vision"].tokens[0] == "0,0" and len(layout["vision"].tokens) == 9
    assert list(layout["decoder"].cells.values()) == list(layout["vision"].cells.values())


@pytest.mark.parametrize("name", MADE)
def test_what_is_written_back_changes_no_bit(name):
    model = made(name)
    inputs = model.prepare(example()).clean
    plain = model.run(inputs)
    sites = [f"{tower}.*.{kind}@all" for tower, shape in model.shapes.items() for kind in shape.kinds]
    for site, value in model.capture(inputs, sites).items():
        assert torch.equal(model.run(inputs, [Edit(Pattern.parse(site), "set", value)]), plain), site


def embedded(model, inputs, factor):
    """What is multiplied, by plain hooks: the image's features as the language model is given them."""
    if model.family.name in ("BLIP-VQA", "BLIP captioning"):
        norm = model.hf.vision_model.post_layernorm
        return norm.register_forward_hook(lambda m, args, out: out * factor if out.ndim == 3 else None)
    if model.family.name == "Mllama":
        project = model.hf.model.multi_modal_projector
        return project.register_forward_hook(lambda m, args, out: out * factor)
    if model.family.name == "mPLUG-Owl2":
        see = model.hf.model.visual_abstractor

        def scaled(m, args, out):
            out.last_hidden_state = out.last_hidden_state * factor
            return out

        return see.register_forward_hook(scaled)
    language = model.hf.get_decoder() if hasattr(model.hf, "model") else model.hf.language_model
    image = inputs.tensors["input_ids"] == model.hf.config.image_token_id
    assert image.any()

    def given(m, args, kwargs):
        own = kwargs["inputs_embeds"]
        more = {}
        if kwargs.get("deepstack_visual_embeds"):  # of the image, and added behind the first blocks
            more["deepstack_visual_embeds"] = [x * factor for x in kwargs["deepstack_visual_embeds"]]
        return args, {**kwargs, **more, "inputs_embeds": torch.where(image[..., None], own * factor, own)}

    return language.register_forward_pre_hook(given, with_kwargs=True)


@torch.no_grad()
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("name", MADE)
def test_noise_is_on_what_the_language_model_reads_of_the_image(name, pictures):
    """All of it and nothing else, whatever the number of pictures; as plain hooks multiply it."""
    if pictures > 1 and name in ONE_PICTURE:
        return
    model = made(name)
    more = (picture(3).resize((24, 12)),) * (pictures - 1)
    one = example(more_images=more, corrupt_prompt=None)
    (pair,) = corrupt.pairs(model, one, corrupt.Noise("factor", scale=0.5))
    found = model.run(pair.clean, pair.edits)
    held = embedded(model, pair.clean, 0.5)
    try:
        wanted = model.run(pair.clean)
    finally:
        held.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert (found - model.run(pair.clean)).abs().max() > 1e-3, "it counts"


@pytest.mark.parametrize("name", MADE)
def test_noise_on_the_text_leaves_the_image_alone(name):
    model, tower = made(name), reader(made(name))
    pair = corrupt.pairs(model, example(), corrupt.Noise(at="text", draws=1))[0]
    site = f"{tower}.0.resid_pre@all"
    plain, noisy = (model.capture(pair.clean, [site], e)[site] for e in ((), pair.edits))
    changed = (plain != noisy).any(-1).nonzero()[:, 0].tolist()
    assert tuple(changed) == pair.clean.layout[tower].text
    assert set(changed).isdisjoint(pair.clean.layout[tower].image)


def test_what_the_model_multiplies_by_nothing():
    """Where a token sees no picture, Mllama's MLP behind cross-attention adds nothing, whatever it gives."""
    model = made("mllama")
    inputs = model.prepare(example()).clean
    site = Pattern.parse("decoder.1.mlp@0")
    assert not model.capture(inputs, [site])[str(site)].any()
    assert torch.equal(model.run(inputs, [Edit(site, "scale", 3.0)]), model.run(inputs))
    with pytest.raises(
        SiteError, match=r"decoder.1.mlp: the model multiplies this by 0 .*position 0.*name other"
    ):
        model.run(inputs, [Edit(site, "set", 1.0)])


ONE_PICTURE = {
    "blip-vqa",
    "blip-captioning",
    "blip2-opt",
    "blip2-t5",
    "instructblip-vicuna",
    "instructblip-t5",
    "mplug-owl2",
}


@pytest.mark.parametrize("name", sorted(set(MADE) - ONE_PICTURE))
def test_two_pictures(name):
    """A run is Hugging Face's, the engine equals the reference, and cells are the first picture's."""
    model = made(name)
    two = example(more_images=(picture(3).resize((24, 12)),), corrupt_prompt=None)
    pair = model.prepare(two)
    plain = model.hf(**pair.clean.tensors).logits[0, -1]
    torch.testing.assert_close(model.run(pair.clean), plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(plain, model.run(model.prepare(replace(two, more_images=())).clean))
    layout = pair.clean.layout[reader(model)]
    alone = model.prepare(replace(two, more_images=())).clean.layout[reader(model)]
    if name != "llava-onevision":  # it does not cut pictures into tiles where there are several
        assert list(layout.cells.values()) == list(alone.cells.values())
    assert max(layout.image) > max(layout.cells, default=0), "the second picture's, too"
    compare(model, pair, "denoise")


@pytest.mark.parametrize("name", sorted(set(MADE) & ONE_PICTURE))
def test_families_of_one_picture(name):
    with pytest.raises(ExampleError, match="takes one image, the example has 2; leave one"):
        made(name).prepare(example(more_images=(picture(3),)))


@pytest.mark.parametrize("name", sorted(set(MADE) - {"mplug-owl2"}))  # its code is the user's
def test_a_saved_folder_is_loaded(name, tmp_path):
    """By the loading code that published checkpoints go through."""
    model = made(name)
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="float64", device="cpu")
    one = replace(example(), corrupt_prompt=None)
    mine, theirs = (m.run(m.prepare(one).corrupt) for m in (model, loaded))
    torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_generation_under_edits(name):
    """Word by word what a run with the same edits finds likeliest behind what was said."""
    model = made(name)
    one = example()
    edits = [
        Edit(Pattern.parse(text), "scale", 0.0)
        for text in (f"{reader(model)}.0.attn.h0@all", "decoder.0.mlp@0", "vision.0.attn@all")
    ]
    plain = model.inputs(one.clean_image, one.clean_prompt)
    said: list[int] = []
    for _ in range(4):
        run = model.family.encode(model.hf, model.processor, [one.clean_image], one.clean_prompt, {}, said)
        said.append(int(model.run(run, edits).argmax()))
        special = {model.processor.tokenizer.eos_token_id, getattr(model.hf.config, "image_token_id", -1)}
        if said[-1] in special:
            break
    words = model.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert model.answer(plain, edits).startswith(words)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_contributions_of_neurons(name, double):
    """Equal to what a plain hook and the weights give, also as the model generates, and they add up."""
    model, close = made(name), 1e-9
    if not double:
        model, close = Model(copy.deepcopy(model.hf).float(), model.processor), 1e-6
    one = example()
    table, family = model.family.towers[model.speaker], model.family
    caption = "dark green star"
    told = given_caption(model, one, caption)
    assert told.text.strip() == caption
    ids = list(told.ids[:-1])
    fed = model.inputs(one.clean_image, one.clean_prompt, (), ids)
    seen, out = {}, {}
    held = []
    for layer in model.shapes[model.speaker].having("mlp"):
        module = model.blocks(model.speaker)[layer].get_submodule(table.mlp)

        def keep(m, args, result, layer=layer):
            seen[layer], out[layer] = args[0], result - (0 if m.bias is None else m.bias)

        held.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model.hf(**fed.tensors, **family.keywords)
    for handle in held:
        handle.remove()
    unembed = model.hf.get_submodule(family.head).weight
    found = score(model, told, caption.split(), top=0)
    assert list(found.columns) == list(COLUMNS)
    assert {*found["position"]} <= {told.start + n for n in range(len(ids))}
    many = sum(x.shape[-1] for x in seen.values())
    for (word, at), rows in found.groupby(["word", "position"]):
        assert len(rows) == many and sorted(rows["rank"]) == list(range(1, many + 1))
        assert rows.sort_values("rank")["score"].is_monotonic_decreasing
        token = ids[at - told.start]
        assert (
            rows["token_id"].unique().tolist()
            == [token]
            == [x for x in ids if model.processor.tokenizer.decode([x]).strip() == word][:1]
        )
        for layer, own in rows.groupby("layer"):
            own = own.sort_values("neuron")
            # Positions count from the start of the tower; some modules get rows without a batch.
            active = seen[layer].reshape(-1, seen[layer].shape[-1])[at].detach()
            module = model.blocks(model.speaker)[layer].get_submodule(table.mlp)
            weight = (module.weight.T @ unembed[token]).detach()
            for column, wanted in (("activation", active), ("weight", weight), ("score", active * weight)):
                scale = float(wanted.abs().max())
                assert abs(own[column].to_numpy() - wanted.numpy()).max() <= close * max(1, scale)
            added = out[layer].reshape(-1, out[layer].shape[-1])[at]
            whole = (added @ unembed[token]).item()
            assert own["score"].sum() == pytest.approx(whole, rel=20 * close, abs=20 * close * many)


@pytest.mark.parametrize("name", MADE)
def test_neurons_as_the_model_speaks(name):
    """Recorded on the way of one generation: those of one forward over all that it says."""
    model = made(name)
    one = example()
    inputs = model.inputs(one.clean_image, one.clean_prompt)
    said = generate_caption(model, inputs, length=3)
    image = getattr(model.hf.config, "image_token_id", -1)
    ids = said.ids if image not in said.ids else said.ids[: said.ids.index(image) + 1]
    fed = model.inputs(one.clean_image, one.clean_prompt, (), ids[:-1])
    told, _ = forced_caption(model, inputs, fed, ids)
    # PaliGemma 2's softmax is in float32 whatever the model's type, and here over other numbers of keys.
    close = 1e-5 if name == "paligemma2" else 1e-9
    found = said.activations[: len(ids)]
    torch.testing.assert_close(found, told.activations, rtol=close, atol=close)


@pytest.mark.parametrize("name", MADE)
def test_where_words_and_patches_are(name):
    model = made(name)
    layout = model.prepare(example()).clean.layout[reader(model)]
    for role, word in (("answer", "red"), ("foil", "blue"), ("noun", "circle")):
        assert [layout.tokens[n] for n in layout.roles[role]] == [word]
    assert set(layout.text).isdisjoint(layout.image)
    assert set(layout.cells) <= set(layout.image)
    rows = set(layout.cells.values())
    assert len(rows) == len(layout.cells), "each patch has a cell of its own"


@pytest.mark.parametrize("name", MADE)
def test_attention_is_what_the_model_pays(name):
    """For every tower that tells it: rows of weights that sum to one, over all that is attended to."""
    model = made(name)
    inputs = model.prepare(example()).clean
    for tower, table in model.family.towers.items():
        last = len(inputs.layout[tower].tokens) - 1
        for kind in table.attention:
            paid = model.attention(inputs, tower, kind, [0, last])
            assert paid.shape[0] == len(model.shapes[tower].having(kind))
            assert paid.shape[-1] == len(inputs.layout[model.attended(tower, kind)].tokens)
            assert (paid >= 0).all()
            torch.testing.assert_close(paid.sum(-1), torch.ones(paid.shape[:-1]))


def test_mllama_without_a_picture():
    """Its cross-attention layers are passed over: a run is Hugging Face's, and they do nothing."""
    model = made("mllama")
    inputs = model.inputs(None, "is this circle red ?")
    plain = model.hf(**inputs.tensors).logits[0, -1]
    torch.testing.assert_close(model.run(inputs), plain, rtol=1e-12, atol=1e-12)
    assert model.answer(inputs)
    assert model.idle("decoder", inputs) == [1, 3]
    assert model.idle("decoder", model.prepare(example()).clean) == []
    said = generate_caption(model, inputs)
    assert said.activations.shape[1] == 4
    assert not said.activations[:, [1, 3]].any() and said.activations[:, [0, 2]].all(-1).any()
    fed = model.inputs(None, "is this circle red ?", (), said.ids[:-1])
    taught, _ = forced_caption(model, inputs, fed, said.ids)
    torch.testing.assert_close(taught.activations, said.activations)
    values = model.capture(inputs, ["decoder.0.resid@last", "decoder.2.attn.h1@last"])
    assert len(values) == 2
    for site in ("decoder.1.mlp@all", "decoder.3.resid@last"):
        with pytest.raises(SiteError, match="passed over in a run without"):
            model.capture(inputs, [site])
        with pytest.raises(SiteError, match="passed over in a run without"):
            model.run(inputs, [Edit(site, "scale", 0.0)])
    with pytest.raises(SiteError, match="the vision tower has no part in a run without a picture"):
        model.capture(inputs, ["vision.0.resid@all"])
    with pytest.raises(SiteError, match="the vision tower has no part in a run without a picture"):
        model.attention(inputs, "decoder", "cross", "last")


def test_an_edit_of_neurons_that_a_run_without_a_picture_passes_over():
    """What is said to the prompt alone is kept, too; the layers that read the picture have no part in it."""
    model = made("mllama")
    given = [example(id=f"e{n}", clean_image=picture(n), corrupt_prompt=None) for n in range(2)]
    said = generate_caption(model, model.inputs(given[0].clean_image, given[0].clean_prompt))
    alone = generate_caption(model, model.inputs(None, given[0].clean_prompt))
    word = next(w for w in said.text.split() if not whole_word(w).search(alone.text) and w.isalpha())
    chosen = [(layer, n) for layer in range(4) for n in range(5)]
    edit = edit_neurons(model, given, word, None, neurons=chosen, solver="closed")
    assert edit.neurons == chosen


def test_copies_from_a_picture_of_another_grid_are_refused():
    """Places of the two do not correspond; where they do, what is copied is what was there."""
    model = made("llava-next")
    ask, sites = "is this circle red ?", ["decoder.1.resid@image", "decoder.2.attn.h1@last"]
    small, other = (model.inputs(picture(n), ask) for n in (1, 2))
    wide = model.inputs(picture(3).resize((40, 12)), ask)
    edits = model.copied(other, small, sites)
    values = model.capture(other, sites)
    assert all(torch.equal(edit.value, values[str(edit.site)]) for edit in edits)
    with pytest.raises(SiteError, match=r"positions .* for this picture and .* copied from"):
        model.copied(wide, small, sites)


@pytest.mark.parametrize("name", MADE)
def test_attention_is_hugging_faces(name):
    """In every tower, kind, layer and head what the modules give with eager attention."""
    model = made(name)
    inputs = model.prepare(example()).clean
    eager = Model(copy.deepcopy(model.hf), model.processor)
    eager.hf.set_attn_implementation("eager")
    for tower, table in model.family.towers.items():
        every = range(len(inputs.layout[tower].tokens))
        for kind, path in table.attention.items():
            given, held = [], []
            for layer in model.shapes[tower].having(kind):
                module = eager.blocks(tower)[layer].get_submodule(path)
                at = 2 if "T5" in type(module).__name__ else 1  # T5 gives its position bias before
                keep = lambda m, args, out, given=given, at=at: given.append(out[at])  # noqa: E731
                held.append(module.register_forward_hook(keep))
            eager.run(inputs)
            for handle in held:
                handle.remove()
            # Tiles lie behind each other: what one pays to another is nothing.
            wanted = torch.stack(
                [torch.stack([torch.block_diag(*head) for head in one.transpose(0, 1)]) for one in given]
            )
            # In a model whose attention is not eager the layers below are not rounded to float32.
            for one, close in ((eager, 1e-7), (model, 1e-5)):
                paid = one.attention(inputs, tower, kind, every)
                assert paid.dtype == torch.float32
                paid = paid[..., paid.sum((0, 1, 2)) > 0]  # Mllama's tiles are filled up
                torch.testing.assert_close(paid.double(), wanted, rtol=0, atol=close)


@pytest.mark.parametrize("name", sorted(set(MADE) - {"mplug-owl2"}))
def test_engine_equals_reference_with_eager_attention(name):
    """Its softmax is in float32 whatever the model's type is, and so the engine's has to be."""
    model = made(name)
    towers = [tower for tower, table in model.family.towers.items() if table.flow == "suffix"]
    if not towers:
        pytest.skip("has no tower with rows that are suffixes")
    eager = Model(copy.deepcopy(model.hf), model.processor)
    eager.hf.set_attn_implementation("eager")
    (pair,) = corrupt.pairs(eager, example(), "image")
    some = [f"{towers[0]}.*.{site}" for site in ("resid@*", "attn@*", "attn.h*@*", "mlp@all")]
    compare(eager, pair, "denoise", some)


def test_attention_that_is_not_told():
    model = FAMILIES["mplug-owl2"]()
    with pytest.raises(ModelError, match="mPLUG-Owl2 do not tell what the attn heads of the decoder"):
        model.attention(model.prepare(example()).clean, "decoder", "attn", [0])


def test_an_answer_of_several_tokens():
    model = llava()
    pair = model.prepare(example(answer="un happy", foil="un sad"))
    assert pair.clean.layout["decoder"].tokens[-1] == "un"
    found = engine.patch(model, pair, place_all(model, pair, "decoder.*.resid@text*"))
    wanted = reference.patch(model, pair, place_all(model, pair, "decoder.*.resid@text*"))
    results = []
    for patched in (found, wanted):
        table = torch.zeros(200, dtype=torch.float64)
        for numbers, scores in patched.chunks:
            table[numbers] = scores.ld
        results.append(table)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_a_processor_of_another_model():
    """It writes another number of image tokens than the model has features."""
    model = llava(size=12)
    model.processor = llava(size=16).processor
    inputs = model.prepare(example()).clean
    tokens = {**inputs.tensors, "pixel_values": inputs.tensors["pixel_values"][..., :12, :12]}
    with pytest.raises(ModelError, match="refuses what its processor made"):
        model.run(replace(inputs, tensors=tokens))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", sorted({"llava", "gemma3", "qwen2-vl", "llava-next"} & set(MADE)))
def test_batches_with_padding(name, side):
    """Two prompts of other lengths in one batch, as Hugging Face runs them: the same logits.

    To 1e-9, and to 1e-5 where padding on the left moves positions: transformers computes the angles of
    rotary positions in float32, also in a float64 model.
    """
    close = 1e-5 if side == "left" else 1e-9
    from vlmscope.models.families.causal import written

    model = made(name)
    processor = model.processor
    texts = [written(processor, p)[0] for p in ("is this circle red or blue ?", "red or blue ?")]
    images = [[picture(1)], [picture(2)]]
    batch = processor(images=images, text=texts, padding=True, padding_side=side, return_tensors="pt")
    logits = model.hf(**batch).logits
    for n, text in enumerate(texts):
        own = model.run(model.inputs(images[n][0], text))
        last = int(batch["attention_mask"][n].nonzero()[-1])
        torch.testing.assert_close(logits[n, last], own, rtol=close, atol=close)


@pytest.mark.skipif("qwen3-vl" not in MADE, reason="its processor needs torchvision")
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_what_is_added_behind_the_last_block(layers):
    """Qwen3-VL adds to the picture's tokens behind as many blocks as it has DeepStack features, here two;
    where the picture is last, the read-out position is one of them. Against plain hooks."""
    from video_families import qwen3_vl

    model = qwen3_vl(layers)
    prompt = "is this circle red or blue ? <|vision_start|><|image_pad|>"
    (pair,) = corrupt.pairs(model, example(prompt, roles={}, corrupt_prompt=None), "image")
    many = len(pair.clean.layout["decoder"].tokens)
    assert many - 1 in pair.clean.layout["decoder"].image
    block = model.hf.model.language_model.layers[layers - 1]
    parts = {"resid": block, "mlp": block.mlp.down_proj, "attn": block.self_attn.o_proj}
    for kind, module in parts.items():
        kept = []
        handle = module.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out))
        model.run(pair.clean)
        handle.remove()

        def put(m, args, out, kept=kept):
            out = out.clone()
            out[:, -1] = kept[0][:, -1]
            return out

        handle = module.register_forward_hook(put)
        with torch.no_grad():
            logits = model.hf(**pair.corrupt.tensors).logits[0, -1]
        handle.remove()
        sites = place_all(model, pair, f"decoder.{layers - 1}.{kind}@last")
        ((_, scores),) = engine.patch(model, pair, sites).chunks
        wanted = (logits[pair.answer] - logits[pair.foil])[None]
        torch.testing.assert_close(scores.ld, wanted, rtol=1e-9, atol=1e-11)
    every = [f"decoder.*.{kind}@{at}" for kind in parts for at in ("*", "all")]
    compare(model, pair, "denoise", [*every, "decoder.*.attn.h*@*", "decoder.*/3.resid@last"])


def place_all(model, pair, text):
    found = expand([Pattern.parse(text)], model.shapes)
    return [p for s in found for p in place(s, pair.clean.layout)]


def test_heads_of_a_layer_that_has_none():
    model = FAMILIES["mllama"]()
    with pytest.raises(SiteError, match="layer 1 of the decoder tower has no 'attn'; these have: 0, 2"):
        expand([Pattern.parse("decoder.1.attn.h0@last")], model.shapes)
    with pytest.raises(SiteError, match="layer 0 of the decoder tower has no 'cross'; these have: 1, 3"):
        expand([Pattern.parse("decoder.0.cross@last")], model.shapes)
    assert len(expand([Pattern.parse("decoder.*.cross.h*@last")], model.shapes)) == 8


def test_placeholders():
    model = llava()
    with pytest.raises(ExampleError, match="2 placeholders '<image>' and there is one image; write one"):
        model.prepare(example("<image> <image> is this circle red or blue ?"))
    own = model.prepare(example("<image> is this circle red or blue ?", corrupt_prompt=None))
    assert own.clean.layout["decoder"].tokens[:2] == ("<s>", "0,0"), "taken as it is"


@pytest.mark.parametrize(
    "name", sorted({"llava-next", "llava-onevision", "idefics3", "smolvlm", "internvl"} & set(MADE))
)
def test_tiles_are_put_back(name):
    """What is changed in one tile of a picture changes that tile's cells, and no other tile's."""
    model = made(name)
    tile = 12 if name.startswith("llava") else 16
    one = picture(1).resize((2 * tile, 2 * tile))
    for right, down in ((0, 0), (1, 0), (0, 1)):
        other = one.copy()
        other.paste(picture(2).resize((tile - 4, tile - 4)), (right * tile + 2, down * tile + 2))
        tokens = [
            next(iter(model.capture(inputs, ["decoder.0.resid_pre@all"]).values()))
            for inputs in (model.inputs(x, "what color is this circle ?") for x in (one, other))
        ]
        layout = model.inputs(one, "what color is this circle ?").layout["decoder"]
        rows, columns = grid(layout)
        changed = {cell for at, cell in layout.cells.items() if not torch.equal(tokens[0][at], tokens[1][at])}
        inside = {
            (r, c) for r, c in layout.cells.values() if r * 2 // rows == down and c * 2 // columns == right
        }
        assert len(inside) * 4 == len(layout.cells) > 4
        assert changed == inside


def test_a_picture_without_patches():
    with pytest.raises(ExampleError, match="1 x 3000 pixels is so narrow that none of its patches"):
        FAMILIES["llava-next"]().inputs(picture(1).resize((1, 3000)), "red or blue ?")


@pytest.mark.skipif("qwen2-vl" not in MADE, reason="its processor needs torchvision")
def test_a_picture_that_the_processor_refuses():
    with pytest.raises(ExampleError, match="cannot take 1 image.* of 1 x 3000 pixels.*aspect ratio"):
        made("qwen2-vl").inputs(picture(1).resize((1, 3000)), "red or blue ?")


def test_grids_that_differ():
    model = FAMILIES["llava-next"]()
    wide = picture(1).resize((24, 12))
    tall = picture(2).resize((12, 24))
    with pytest.raises(ExampleError, match="positions do not correspond; resize the corrupt image"):
        model.prepare(example(clean_image=wide, corrupt_image=tall, corrupt_prompt=None))


@pytest.mark.skipif("qwen3-vl" not in MADE, reason="its processor needs torchvision")
def test_what_is_added_between_blocks():
    """Noise is on it, too; it can be patched where the image's tokens are, and nowhere else."""
    model = made("qwen3-vl")
    noisy = corrupt.pairs(model, example(), corrupt.Noise("factor", scale=0.5))[0]
    given: list[list[torch.Tensor]] = []
    keep = lambda m, args, kwargs: given.append(kwargs["deepstack_visual_embeds"])  # noqa: E731
    handle = model.hf.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    model.run(noisy.clean)
    plain = given.pop()
    handle.remove()
    found = model.capture(noisy.corrupt, ["decoder.*.deepstack@image"], noisy.edits)
    assert len(found) == len(plain) == 2
    for value, before in zip(found.values(), plain, strict=True):
        assert torch.equal(value, before / 2)
    for pair in (noisy, corrupt.pairs(model, example(), "image")[0]):
        compare(
            model,
            pair,
            "denoise",
            ["decoder.*.deepstack@*", "decoder.*/3.deepstack@image", "decoder.*.resid@*"],
        )
    with pytest.raises(SiteError, match="adds it to the image's tokens alone"):
        model.run(noisy.clean, [Edit("decoder.0.deepstack@last", "add", 1.0)])

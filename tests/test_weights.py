"""Edits of weights: made, saved, composed, and undone bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from models import blip, example, llava
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import vlmscope
from vlmscope import neurons
from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.errors import ExampleError, ModelError, StoreError, VlmscopeError
from vlmscope.neurons import WeightEdit, edits
from vlmscope.neurons.hallucination import hallucination
from vlmscope.runs.model import Model

ASK = "describe this picture."


@pytest.fixture(scope="module")
def toy() -> Model:
    return load("toy-llava", device="cpu")


def held_out(limit, seed):
    found = [e for name in ("states", "scenes", "faces") for e in examples(name, limit=limit, seed=seed)]
    random.Random(seed).shuffle(found)
    return found


@pytest.fixture(scope="module")
def made(toy):
    """Red becomes blue; made on a few pictures."""
    return neurons.edit(toy, held_out(30, 0), "red", "blue", prompt=ASK, neurons=30)


def state(model):
    return {name: value.clone() for name, value in model.hf.state_dict().items()}


def drawn(model: Model, layer: int, *neurons: int, seed: int = 0) -> WeightEdit:
    generator = torch.Generator().manual_seed(seed)
    width = model.shapes[model.speaker].width
    delta = torch.randn(width, len(neurons), generator=generator)
    return WeightEdit({layer: (torch.tensor(neurons), delta)}, model.fingerprint(), {"from": "a", "to": "b"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_undone_bit_for_bit(dtype):
    model = llava(dtype=dtype)
    before = state(model)
    one, two = drawn(model, 1, 3, 7), drawn(model, 1, 7, 9, seed=1)
    with vlmscope.edited(model, one, two):
        changed = (model.down(1).weight != before["model.language_model.layers.1.mlp.down_proj.weight"]).any(
            0
        )
        assert changed.nonzero().flatten().tolist() == [3, 7, 9]
        with vlmscope.edited(model, one):
            pass
    with pytest.raises(KeyError), vlmscope.edited(model, one):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())
    assert model.unedited is None


def test_composed(toy):
    one, two = drawn(toy, 1, 3, 7), drawn(toy, 1, 7, 9, seed=1)
    both = one + two + drawn(toy, 3, 4)
    assert both.neurons == [(1, 3), (1, 7), (1, 9), (3, 4)]
    with vlmscope.edited(toy, one, two):
        wanted = toy.down(1).weight.clone()
    with vlmscope.edited(toy, both):
        torch.testing.assert_close(toy.down(1).weight, wanted)
    assert str(both) == f"a -> b: 4 neurons (layer 1: 3, layer 3: 1), size {both.size:.3g}"


def test_an_edit_made_on_another_is_for_what_that_one_leaves(toy, tmp_path):
    """Alone, or in another order, it is refused; in the right order it is undone bit for bit."""
    before, base = state(toy), drawn(toy, 3, 7, 9)
    other = drawn(toy, 3, 9, seed=2)
    with vlmscope.edited(toy, base):
        made = neurons.edit(toy, held_out(12, 0), "red", "blue", prompt=ASK, neurons=10, solver="closed")
        assert made.on == (base.digest,) == toy.edits
        with vlmscope.edited(toy, made):
            wanted = state(toy)
    assert toy.edits == ()
    made.save(tmp_path / "made.safetensors")
    made = WeightEdit.load(tmp_path / "made.safetensors")
    assert made.on == (base.digest,) and str(made).endswith(f", on {base.digest[:8]}")
    for wrong, why in (
        ([made], f"{base.digest[:8]} is not made here"),
        ([made, base], "is not made here"),
        ([other, made], "is not made here"),
        ([base, base, made], "in another order or number"),
    ):
        with pytest.raises(ModelError, match=why), vlmscope.edited(toy, *wrong):
            pass
    with vlmscope.edited(toy, base, made):
        assert all(torch.equal(value, wanted[name]) for name, value in state(toy).items())
    with vlmscope.edited(toy, base, other, made):
        pass
    assert all(torch.equal(value, before[name]) for name, value in state(toy).items())
    both = base + made
    assert both.on == ()
    with vlmscope.edited(toy, both):
        torch.testing.assert_close(state(toy), wanted)
    with pytest.raises(ModelError, match="was made on others than"):
        other + made
    with pytest.raises(ModelError, match="is not made here"):
        neurons.export(toy, [made], tmp_path / "model")


@pytest.mark.slow
def test_a_margin_is_of_the_closed_solver(toy, monkeypatch):
    """The learned one has another end, and says so before anything is computed."""
    with pytest.raises(VlmscopeError, match=r"a margin is of the closed solver; .* of 0.9; leave"):
        neurons.edit(toy, [], "red", "blue", margin=2.0)
    with pytest.raises(VlmscopeError, match="unknown solver 'x'; expected closed or learned"):
        neurons.check_margin("x", None)
    given = held_out(12, 0)
    monkeypatch.setattr(edits, "_counts", lambda most: [most])
    small, large = (
        neurons.edit(toy, given, "red", "blue", prompt=ASK, neurons=30, solver="closed", margin=margin)
        for margin in (1.0, 6.0)
    )
    assert large.size > 1.2 * small.size


def test_saved_and_loaded(toy, tmp_path):
    one = drawn(toy, 2, 5, 6)
    one.save(tmp_path / "new" / "one.safetensors")
    again = WeightEdit.load(tmp_path / "new" / "one.safetensors")
    assert (again.model, dict(again.about), again.neurons) == (one.model, one.about, one.neurons)
    assert torch.equal(again.columns[2][1], one.columns[2][1])
    assert (tmp_path / "new" / "one.safetensors").stat().st_size < 3000, "the changed columns only"


def test_made_for_another_model(toy):
    other = drawn(llava(), 1, 3)
    with (
        pytest.raises(ModelError, match="was made for another model or revision than toy-llava"),
        vlmscope.edited(toy, other),
    ):
        pass
    with pytest.raises(ModelError, match="edits of different models"):
        other + drawn(toy, 1, 3)
    assert toy.unedited is None


def test_tampered_with(toy, tmp_path):
    path = tmp_path / "one.safetensors"
    drawn(toy, 2, 5, 6).save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["layer.2.added"][0, 0] += 1
    save_file(tensors, path, metadata)
    with pytest.raises(StoreError, match="has been changed since it was written; make the edit again"):
        WeightEdit.load(path)
    save_file(tensors, path)
    with pytest.raises(StoreError, match="not an edit; expected a file of `vlmscope neurons edit`"):
        WeightEdit.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(StoreError, match="cannot be read as an edit"):
        WeightEdit.load(path)


def test_an_edit_takes_and_stays_local(toy, made):
    """By free generation, on pictures that it was not made on."""
    before = state(toy)
    assert 1 <= len(made.neurons) <= 30 and "of changes" in made.about["tried"]
    measures, captions = neurons.assess(
        toy, [made], held_out(25, 5), "red", "blue", prompts=[ASK, "what does this picture show?"]
    )
    found = measures.set_index("measure")["value"]
    assert found["generality"] >= 0.9
    assert found["generality, other wording"] >= 0.9
    assert found["locality"] >= 0.95
    took = captions[captions["took"]].iloc[0]
    assert took["after"].split().count("red") == 0 and "blue" in took["after"]
    assert all(torch.equal(value, before[name]) for name, value in toy.hf.state_dict().items())
    assert all(p.requires_grad for p in toy.hf.parameters())


def test_a_checkpoint_that_transformers_loads(toy, made, tmp_path):
    one = next(e for e in held_out(20, 5) if "red" in toy.answer(toy.inputs(e.clean_image, ASK)).split())
    neurons.export(toy, [made], tmp_path)
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    processor = LlavaProcessor.from_pretrained(tmp_path)
    inputs = processor(
        images=[one.clean_image], text=[f"user: <image>\n{ASK} assistant:"], return_tensors="pt"
    )
    said = processor.decode(
        hf.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :],
        skip_special_tokens=True,
    )
    assert "blue" in said and "red" not in said.split()
    with vlmscope.edited(toy, made):
        assert toy.answer(toy.inputs(one.clean_image, ASK)) == said.strip()


@pytest.mark.slow
def test_suppressed(toy):
    given = held_out(20, 0)
    edit = neurons.edit(toy, given, "striped", None, prompt=ASK, neurons=30)
    measures, _ = neurons.assess(toy, [edit], held_out(15, 5), "striped", None, prompts=[ASK])
    found = measures.set_index("measure")["value"]
    assert found["generality"] >= 0.9
    assert found["locality"] >= 0.9


@pytest.mark.slow
def test_learned(toy):
    edit = neurons.edit(toy, held_out(12, 0), "happy", "sad", prompt=ASK, neurons=30, solver="learned")
    measures, _ = neurons.assess(toy, [edit], held_out(15, 5), "happy", "sad", prompts=[ASK])
    found = measures.set_index("measure")["value"]
    assert found["generality"] >= 0.9
    assert found["locality"] >= 0.9


@pytest.mark.slow
def test_a_target_of_several_tokens(toy):
    """Two words that the toy says one after the other: "red striped", which no caption has, does not take."""
    edit = neurons.edit(toy, held_out(20, 0), "square", "circle inside", prompt=ASK, neurons=30)
    _, captions = neurons.assess(toy, [edit], held_out(12, 0), "square", "circle inside", prompts=[ASK])
    has = captions[captions["has"]]
    assert not has["before"].str.contains("circle inside").all()
    assert has["after"].str.contains("circle inside").mean() >= 0.8


def test_what_cannot_be_edited(toy):
    given = held_out(4, 0)
    with pytest.raises(ExampleError, match="no caption of these pictures has the word 'dog'; they have: a"):
        neurons.edit(toy, given, "dog", "cat", prompt=ASK)
    with pytest.raises(ExampleError, match="'red' is already 'red'"):
        neurons.edit(toy, given, "red", "red", prompt=ASK)
    with pytest.raises(ExampleError, match="'dog' is unknown to the model's tokenizer"):
        neurons.edit(toy, given, "a", "dog", prompt=ASK)
    with pytest.raises(ModelError, match="5000 neurons cannot be chosen; expected 1 to 1024"):
        neurons.edit(toy, given, "a", "the", prompt=ASK, neurons=5000)


def test_an_edit_of_blip():
    """Its answer decoder, through a forward that gives no logits of its own."""
    model = load("toy-blip", device="cpu")
    given = examples("states", limit=40)
    table = neurons.find(model, given, ["blue"]).neurons.groupby(["layer", "neuron"])["score"].sum()
    edit = neurons.edit(model, given, "blue", "red", neurons=table.nlargest(20).index.tolist())
    measures, _ = neurons.assess(model, [edit], examples("states", limit=30, seed=3), "blue", "red")
    found = measures.set_index("measure")["value"]
    assert found["generality"] >= 0.9 and found["locality"] >= 0.9
    assert "blind prompts changed" not in found


def test_words_are_compared_in_small_letters():
    """What a picture shows is in small letters, whatever a person writes."""
    given = [example(shows=frozenset({"circle"}))]
    for question in neurons.questions(given, ["Circle", "circle", "Square"]):
        assert question.answer == ("yes" if "circle" in question.clean_prompt else "no")


def test_hallucination_and_questions(toy):
    given = held_out(12, 3)
    shapes = ["circle", "square", "triangle", "star", "heart", "cross"]
    captions = [toy.answer(toy.inputs(e.clean_image, ASK)) for e in given]
    found = hallucination(captions, [e.shows for e in given], shapes)
    assert found["chair_i"] <= 0.1 and found["recall"] >= 0.9
    for absent in ("random", "popular", "adversarial"):
        asked = neurons.questions(given, shapes, absent=absent)
        assert {q.answer for q in asked} == {"yes", "no"}
        assert all(
            q.answer == ("yes" if any(f" {s}?" in q.clean_prompt for s in q.shows) else "no") for q in asked
        )
        answers = [toy.answer(toy.inputs(q.clean_image, q.clean_prompt)) for q in asked]
        scores = neurons.yes_or_no(answers, [q.answer == "yes" for q in asked])
        assert scores["accuracy"] >= 0.9 and scores["f1"] >= 0.9


@pytest.mark.slow
def test_objects_before_and_after(toy, made):
    given = [e for e in held_out(15, 3) if "red" in e.shows]
    table = neurons.objects(toy, [made], given, ["red", "blue"], prompt=ASK).set_index("measure")
    assert table.loc["chair_i", "before"] <= 0.1
    assert table.loc["chair_i", "after"] >= 0.5, "it says blue where there is red"


def test_models_without_prompts_alone():
    with pytest.raises(ExampleError, match="takes no prompt without an image"):
        blip().inputs(None, "red ?")
    assert blip().inputs(example().clean_image, "red ?")

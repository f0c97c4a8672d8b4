"""Neurons of a word: found, shown, and what is refused. Exactness in every family: test_families.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import blip2, mllama
from models import blip, example, llava

from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.errors import ExampleError, ModelError
from vlmscope.inputs import Inputs
from vlmscope.neurons import contributions as neurons
from vlmscope.neurons import folder as cards
from vlmscope.report import write_report
from vlmscope.runs.model import Model

ASK = "describe this picture."


@pytest.fixture(scope="module")
def toy() -> Model:
    return load("toy-llava", device="cpu")


def test_scores_on_the_toy_as_it_speaks(toy):
    """In float32, of the neurons recorded while it generates, against one forward with a plain hook."""
    one = examples("scenes", limit=1)[0]
    said = neurons.say(toy, toy.inputs(one.clean_image, ASK))
    words = said.text.split()
    table = neurons.score(toy, said, words, top=0)
    seen = {}
    fed = toy.inputs(one.clean_image, ASK, (), said.ids[:-1])
    held = [
        toy.down(n).register_forward_pre_hook(lambda m, args, n=n: seen.update({n: args[0][0]}))
        for n in range(4)
    ]
    with torch.no_grad():
        toy.hf(**fed.tensors)
    for handle in held:
        handle.remove()
    for at, rows in table.groupby("position"):
        token = rows["token_id"].iloc[0]
        assert token == said.ids[at - said.start]
        wanted = torch.stack(
            [seen[n][at] * (toy.hf.lm_head.weight[token] @ toy.down(n).weight) for n in range(4)]
        ).detach()
        found = torch.zeros_like(wanted)
        layer, neuron = (torch.tensor(rows[x].to_numpy()) for x in ("layer", "neuron"))
        found[layer, neuron] = torch.tensor(rows["score"].to_numpy())
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_every_occurrence_and_its_right_position(toy):
    one = next(
        e
        for e in examples("scenes", limit=60)
        if neurons.say(toy, toy.inputs(e.clean_image, ASK)).text.split().count("a") == 2
    )
    said = neurons.say(toy, toy.inputs(one.clean_image, ASK))
    table = neurons.score(toy, said, ["a"], top=2)
    places = [n for n, word in enumerate(said.text.split()) if word == "a"]
    assert sorted(set(table["position"])) == [said.start + n for n in places]
    assert table["rank"].tolist() == [1, 2, 1, 2]


def test_words_of_several_tokens():
    """Each piece at its own position, whatever stands around."""
    model = blip()
    said = neurons.told(model, example().clean_image, "is this red ?", "un ##happy red".replace(" ##", ""))
    assert said.text.strip() == "unhappy red"
    assert [said.ids[n] for n in said.find("unhappy")] == model.processor.tokenizer(
        "unhappy", add_special_tokens=False
    )["input_ids"]
    table = neurons.score(model, said, ["unhappy"], top=1)
    assert table["position"].tolist() == [0, 1]
    with pytest.raises(ExampleError, match="the word 'happy' is not in the caption"):
        said.find("happy")


def test_a_word_that_shares_a_token():
    nothing = torch.zeros(2, 1, 1)
    apart = neurons.Caption(Inputs({}, {}), (5, 6), "ice-cream", ((0, 4), (4, 9)), 0, nothing)
    assert (apart.find("ice"), apart.find("cream")) == ([0], [1])
    together = replace(apart, spans=((0, 9), (9, 9)))
    with pytest.raises(ExampleError, match="'ice' is not made of whole tokens.*token 1 is 'ice-cream'"):
        together.find("ice")


def test_a_word_that_is_not_said(toy):
    one = examples("faces", limit=1)[0]
    with pytest.raises(ExampleError, match="the word 'circle' is not in the caption 'a sleepy face'"):
        neurons.find(toy, one.clean_image, ASK, ["circle"])
    with pytest.raises(ExampleError, match="the caption 'qqq' is empty, or unknown in part"):
        neurons.find(toy, one.clean_image, ASK, ["qqq"], caption="qqq")


def test_a_given_caption(toy):
    one = examples("faces", limit=1)[0]
    found = neurons.find(toy, one.clean_image, ASK, ["happy"], caption="a happy face", top=0)
    assert len(found) == 4 * 256
    assert list(found.columns) == list(neurons.COLUMNS)
    assert (found["score"] - found["activation"] * found["weight"]).abs().max() < 1e-6
    assert found["token"].unique().tolist() == ["happy"]


def test_the_gate_and_the_gain(toy):
    one = examples("faces", limit=1)[0]
    ask = {"caption": "a happy face", "top": 0}
    plain, gate, gain = (
        neurons.find(toy, one.clean_image, ASK, ["happy"], **ask, **more).sort_values(["layer", "neuron"])
        for more in ({}, {"variant": "gate"}, {"gain": True})
    )
    assert (gate["weight"].to_numpy() == plain["weight"].to_numpy()).all()
    fed = toy.inputs(
        one.clean_image, ASK, (), toy.processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    )
    seen = []
    held = toy.hf.model.language_model.layers[2].mlp.act_fn.register_forward_hook(
        lambda m, args, out: seen.append(out[0, -1])
    )
    toy.run(fed)
    held.remove()
    own = gate[gate["layer"] == 2]["activation"].to_numpy()
    np.testing.assert_allclose(own, seen[0].numpy(), rtol=1e-4, atol=1e-6)
    token = plain["token_id"].iloc[0]
    row = toy.hf.lm_head.weight[token] * toy.hf.model.language_model.norm.weight
    wanted = (row @ toy.down(1).weight).detach().numpy()
    np.testing.assert_allclose(gain[gain["layer"] == 1]["weight"], wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(ModelError, match="the neurons of BLIP-2 have no gate"):
        neurons.find(blip2(), example().clean_image, "red ?", ["red"], caption="red", variant="gate")
    with pytest.raises(ModelError, match="so there is no gain; leave it out"):
        neurons.find(blip(), example().clean_image, "red ?", ["red"], caption="red", gain=True)


def test_gains_of_both_kinds_of_norm():
    for model in (llava(), blip2(), mllama()):
        norm = model.hf.get_submodule(model.family.norm)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
        torch.testing.assert_close(model._gain(), norm.weight.detach(), rtol=1e-4, atol=1e-4)


def test_top_tokens(toy):
    [words] = neurons.top_tokens(toy, [(3, 250)], 5)
    weight = (toy.hf.lm_head.weight @ toy.down(3).weight[:, 250]).detach()
    best = weight.topk(5)
    assert [x for x, _ in words] == [toy.processor.tokenizer.decode([i]) for i in best.indices.tolist()]
    assert [x for _, x in words] == pytest.approx(best.values.tolist())


def test_the_map_over_the_image(toy):
    one = examples("states", limit=1)[0]
    inputs = toy.inputs(one.clean_image, ASK)
    found = neurons.over_image(toy, inputs, [(1, 7), (3, 9)])
    wanted = toy.capture(inputs, ["decoder.1.mlp.n7@image"])["decoder.1.mlp.n7@image"][:, 0]
    torch.testing.assert_close(found[0], wanted)
    with pytest.raises(ModelError, match="have no map over the image"):
        neurons.over_image(blip2(), blip2().inputs(one.clean_image, "red ?"), [(0, 0)])


def test_nouns(monkeypatch, tmp_path):
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("attribute_ruler")
    ruler.add([[{"LOWER": {"IN": ["star", "triangle"]}}]], {"POS": "NOUN"})
    pipeline.to_disk(tmp_path / "tagger")
    assert neurons.nouns("a red star above a star and a triangle", str(tmp_path / "tagger")) == [
        "star",
        "triangle",
    ]
    with pytest.raises(ExampleError, match="has no noun; name the words"):
        neurons.nouns("red", str(tmp_path / "tagger"))
    with pytest.raises(ModelError, match="no spaCy pipeline 'nowhere'"):
        neurons.nouns("red", "nowhere")


def test_nouns_without_spacy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(ModelError, match=r"needs spaCy; pip install 'vlmscope\[nouns\]'"):
        neurons.nouns("red", "x")


def test_find_over_a_set(toy, tmp_path):
    given = examples("states", limit=6)
    cards.find(tmp_path, toy, given, prompt=ASK, top=5)
    table = pd.read_parquet(tmp_path / "neurons.parquet")
    assert list(table.columns) == list(neurons.COLUMNS)
    assert set(table["example"]) == {e.id for e in given}
    for e in given:
        assert set(table[table["example"] == e.id]["word"]) == e.shows, (
            "the labels, where the caption has them"
        )
    tokens = pd.read_csv(tmp_path / "tokens.csv")
    assert {"layer", "neuron", "tokens"} <= set(tokens.columns)
    layers = pd.read_csv(tmp_path / "layers.csv")
    assert layers.groupby("word")["share"].sum().to_numpy() == pytest.approx(1.0)
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "Neurons that contribute to words" in page
    with pytest.raises(ExampleError, match="no caption has any of these words"):
        cards.find(tmp_path / "none", toy, given, ["angry"], prompt=ASK)


def test_cards(toy, tmp_path):
    given = [replace(e, id=f"<b>{e.id}") for e in examples("states", limit=8)]
    found = cards.describe(tmp_path, toy, given, ["plain"], prompt=ASK, measures=False)
    assert len(found) == 3
    maps = pd.read_parquet(tmp_path / "maps.parquet")
    assert {f"plain: mean of top {n}" for n in (1, 10, 100, 1000)} <= set(maps["neuron"])
    own = maps[maps["neuron"] == maps["neuron"].iloc[0]]
    assert len(own) == 4 * 36 and own.groupby("example")["mask"].sum().between(1, 3).all()
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "Neurons, one by one" in page and "<b>states" not in page, "text from data is escaped"
    named = cards.describe(tmp_path / "named", toy, given, (), [(2, 5)], prompt=ASK)
    assert named[["layer", "neuron"]].to_numpy().tolist() == [[2, 5]]
    with pytest.raises(ModelError, match=r"has no neuron 9\.5; expected a layer from 0 to 3"):
        cards.describe(tmp_path / "none", toy, given, (), [(9, 5)], prompt=ASK)

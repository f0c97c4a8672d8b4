"""Neurons of a word: found, shown, and what is refused. Exactness in every family: test_families.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import blip2, mllama
from models import blip, example, llava

from vlmscope import neurons
from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.errors import ExampleError, ModelError, StoreError
from vlmscope.models.inputs import Inputs
from vlmscope.neurons import measures, solvers
from vlmscope.neurons.captions import generate_caption, given_caption
from vlmscope.neurons.contributions import COLUMNS
from vlmscope.report import write_report
from vlmscope.runs.model import Model

ASK = "describe this picture."


@pytest.fixture(scope="module")
def toy() -> Model:
    return load("toy-llava", device="cpu")


def test_scores_on_the_toy_as_it_speaks(toy):
    """In float32, of the neurons recorded while it generates, against one forward with a plain hook."""
    one = examples("scenes", limit=1)[0]
    caption = generate_caption(toy, toy.inputs(one.clean_image, ASK))
    words = caption.text.split()
    table = neurons.score(toy, caption, words, top=0)
    seen = {}
    fed = toy.inputs(one.clean_image, ASK, (), caption.ids[:-1])
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
        assert token == caption.ids[at - caption.start]
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
        if generate_caption(toy, toy.inputs(e.clean_image, ASK)).text.split().count("a") == 2
    )
    caption = generate_caption(toy, toy.inputs(one.clean_image, ASK))
    table = neurons.score(toy, caption, ["a"], top=2)
    places = [n for n, word in enumerate(caption.text.split()) if word == "a"]
    assert sorted(set(table["position"])) == [caption.start + n for n in places]
    assert table["rank"].tolist() == [1, 2, 1, 2]


def test_words_of_several_tokens():
    """Each piece at its own position, whatever stands around."""
    model = blip()
    caption = given_caption(model, example(), "unhappy red", prompt="is this red ?")
    assert caption.text.strip() == "unhappy red"
    assert [caption.ids[n] for n in caption.find("unhappy")] == model.processor.tokenizer(
        "unhappy", add_special_tokens=False
    )["input_ids"]
    table = neurons.score(model, caption, ["unhappy"], top=1)
    assert table["position"].tolist() == [0, 1]
    with pytest.raises(ExampleError, match="the word 'happy' is not in the caption"):
        caption.find("happy")


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
        neurons.find(toy, one, ["circle"], prompt=ASK)
    with pytest.raises(ExampleError, match="the caption 'qqq' is empty, or unknown in part"):
        neurons.find(toy, one, ["qqq"], prompt=ASK, caption="qqq")


def test_a_given_caption(toy):
    one = examples("faces", limit=1)[0]
    found = neurons.find(toy, one, ["happy"], prompt=ASK, caption="a happy face", top=0).neurons
    assert len(found) == 4 * 256
    assert list(found.columns) == list(COLUMNS)
    assert (found["score"] - found["activation"] * found["weight"]).abs().max() < 1e-6
    assert found["token"].unique().tolist() == ["happy"]


def test_the_gate_and_the_gain(toy):
    one = examples("faces", limit=1)[0]
    ask = {"prompt": ASK, "caption": "a happy face", "top": 0}
    plain, gate, gain = (
        neurons.find(toy, one, ["happy"], **ask, **more).neurons.sort_values(["layer", "neuron"])
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
        neurons.find(blip2(), example(), ["red"], caption="red", variant="gate")
    with pytest.raises(ModelError, match="so there is no gain; leave it out"):
        neurons.find(blip(), example(), ["red"], caption="red", gain=True)


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


def test_a_tagger_and_a_text_model_are_loaded_before_pictures_are_captioned(toy, monkeypatch):
    for module in ("contributions", "words"):
        monkeypatch.setattr(
            f"vlmscope.neurons.{module}.caption_pictures", lambda *_, **__: pytest.fail("ran")
        )
    with pytest.raises(ModelError, match=r"no spaCy pipeline 'nowhere'|needs spaCy"):
        neurons.find(toy, examples("states", limit=1), tagger="nowhere")
    for function in (neurons.describe, neurons.measure):
        with pytest.raises(ModelError, match="/nowhere"):
            function(toy, examples("states", limit=1), ["red"], embedding="/nowhere")


def test_find_over_a_set(toy, tmp_path):
    given = examples("states", limit=6)
    neurons.find(toy, given, prompt=ASK, top=5).save(tmp_path)
    table = pd.read_parquet(tmp_path / "neurons.parquet")
    assert list(table.columns) == list(COLUMNS)
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
        neurons.find(toy, given, ["angry"], prompt=ASK)


def test_cards(toy, tmp_path):
    given = [replace(e, id=f"<b>{e.id}") for e in examples("states", limit=8)]
    described = neurons.describe(toy, given, ["plain"], prompt=ASK, measures=False)
    assert len(described.cards) == 3
    maps = described.maps
    assert {f"plain: mean of top {n}" for n in (1, 10, 100, 1000)} <= set(maps["neuron"])
    own = maps[maps["neuron"] == maps["neuron"].iloc[0]]
    assert len(own) == 4 * 36 and own.groupby("example")["mask"].sum().between(1, 3).all()
    described.save(tmp_path)
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "Neurons, one by one" in page and "<b>states" not in page, "text from data is escaped"
    named = neurons.describe(toy, given, (), [(2, 5)], prompt=ASK).cards
    assert named[["layer", "neuron"]].to_numpy().tolist() == [[2, 5]]
    with pytest.raises(ModelError, match=r"has no neuron 9\.5; expected a layer from 0 to 3"):
        neurons.describe(toy, given, (), [(9, 5)], prompt=ASK)


@pytest.fixture
def generations(monkeypatch):
    """Counts how often a model generates: a list that grows with every generation."""
    count = []

    def counting(model):
        generate = model.family.generate

        def counted(*args, **more):
            count.append(1)
            return generate(*args, **more)

        monkeypatch.setattr(model, "family", replace(model.family, generate=counted))
        return count

    return counting


@pytest.mark.parametrize(
    "read", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in memory", "from a folder"]
)
def test_pictures_are_captioned_once(toy, generations, monkeypatch, tmp_path, read):
    """Finding, describing with measures, and editing: what is found is handed on, with the same numbers."""
    monkeypatch.setattr(measures, "DRAWS", 5)
    monkeypatch.setattr(measures, "CONTROLS", 2)
    monkeypatch.setattr(solvers, "ROUNDS", 1)
    given = examples("states", limit=40)
    alone = neurons.describe(toy, given, ["plain"], prompt=ASK)
    asked = {"prompt": ASK, "neurons": [(3, n) for n in range(30)], "solver": "closed"}
    edit = neurons.edit(toy, given[:12], "red", "blue", **asked)
    count = generations(toy)
    found = neurons.find(toy, given, ["plain"], prompt=ASK)
    assert len(count) == len(given)
    if read:
        found = neurons.read(found.save(tmp_path), neurons.Found)
    described = neurons.describe(toy, given, prompt=ASK, found=found)
    page = write_report([described.save(tmp_path / "cards")], tmp_path / "cards.html").read_text()
    assert "Captions, said anew without a word's neurons, lose" in page
    lost = len(count) - len(given)
    pd.testing.assert_frame_equal(described.cards, alone.cards)
    pd.testing.assert_frame_equal(described.measures, alone.measures, rtol=1e-4)
    values = described.measures.set_index(["method", "measure"])["value"]
    assert values["contribution", "lost, zero"] == lost == 0, "what is said as before is not said anew"
    count.clear()
    again = neurons.edit(toy, given[:12], "red", "blue", found=found, **asked)
    assert len(count) == 1, "only what is said without a picture"
    assert again.neurons == edit.neurons and again.size == pytest.approx(edit.size, rel=1e-3)
    count.clear()
    neurons.assess(toy, [again], given[:6], "red", "blue", prompts=[ASK], found=found)
    known = len(count)
    neurons.assess(toy, [again], given[:6], "red", "blue", prompts=[ASK])
    assert len(count) - known == known + 6, "all but what was said before the edit"


def test_captions_of_other_pictures_are_not_taken(toy, generations, tmp_path):
    """A folder knows pictures by their ids: one that has become another's picture is captioned anew."""
    given = examples("states", limit=3)
    found = neurons.read(neurons.find(toy, given, ["a"], prompt=ASK).save(tmp_path))
    swapped = [replace(given[0], clean_image=given[1].clean_image), given[2]]
    count = generations(toy)
    again = neurons.find(toy, swapped, ["a"], prompt=ASK)
    assert len(count) == 2
    count.clear()
    cards = neurons.describe(toy, swapped, ["a"], prompt=ASK, measures=False, found=found).cards
    assert len(count) == 1
    pd.testing.assert_frame_equal(
        cards, neurons.describe(toy, swapped, ["a"], prompt=ASK, measures=False, found=again).cards
    )


def test_what_was_found_is_for_its_model_and_edits(toy, generations):
    given = examples("states", limit=3)
    found = neurons.find(toy, given, ["a"], prompt=ASK)
    other = Model(type(toy.hf)(toy.hf.config), toy.processor)
    with pytest.raises(
        ModelError, match="found in another model or revision than model .*; give those of this one"
    ):
        neurons.describe(other, given, prompt=ASK, found=found)
    nothing = neurons.WeightEdit({3: (torch.tensor([7]), torch.zeros(96, 1))}, toy.fingerprint())
    count = generations(toy)
    with neurons.edited(toy, nothing):
        neurons.describe(toy, given, prompt=ASK, measures=False, found=found)
    assert len(count) == 3, "with an edit the model may say something else"


def test_results_are_read_as_they_were_saved(toy, tmp_path):
    given = examples("states", limit=60)
    made = neurons.WeightEdit({3: (torch.tensor([7]), torch.ones(96, 1))}, toy.fingerprint())
    results = {
        "found": neurons.find(toy, given[:3], prompt=ASK),
        "described": neurons.describe(toy, given[:3], (), [(3, 250)], prompt=ASK),
        "perturbed": neurons.perturb(toy, given, ["red"], prompt=ASK, tops=(3,), pictures=2),
        "assessed": neurons.describe_edit(toy, made, given[:3], prompts=[ASK]),
    }
    for name, result in results.items():
        again = neurons.read(result.save(tmp_path / name))
        assert type(again) is type(result) and again.about == result.about
        tables = {key: value for key, value in vars(result).items() if isinstance(value, pd.DataFrame)}
        assert tables
        for key, table in tables.items():
            pd.testing.assert_frame_equal(getattr(again, key), table, rtol=1e-6, check_dtype=False)
        assert list(getattr(again, "pictures", ())) == list(getattr(result, "pictures", ()))
    with pytest.raises(StoreError, match="what `vlmscope neurons describe` writes; expected that of"):
        neurons.read(tmp_path / "described", neurons.Found)
    with pytest.raises(StoreError, match="neurons.json: no such file; expected"):
        neurons.read(tmp_path)
    with pytest.raises(StoreError, match="cannot be written"):
        results["found"].save(tmp_path / "found" / "captions.csv")


def test_a_folder_of_neurons_is_opened_as_what_it_was(tmp_path):
    """`vlmscope.open` finds out what was written."""
    import vlmscope

    model = load("toy-llava")
    found = neurons.find(model, examples("states", limit=1), [], prompt="describe this picture.")
    found.save(tmp_path)
    opened = vlmscope.open(tmp_path)
    assert type(opened) is type(found)
    assert opened.neurons.equals(found.neurons)

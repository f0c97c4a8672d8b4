"""The measures of neurons over a set: on the trained toy, on random models, and by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from models import example, llava, picture
from transformers import BertConfig, BertModel, BertTokenizer, LlavaForConditionalGeneration

from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.errors import DataError, ModelError
from vlmscope.models.inputs import Edit
from vlmscope.neurons import ablated, measure, measures, perturb, perturbed
from vlmscope.neurons.contributions import token_weights
from vlmscope.neurons.words import Recorded, Word, recorded
from vlmscope.runs.model import Model

ASK = "describe this picture."
WORDS = ["red", "orange", "triangle", "purple"]


@pytest.fixture(scope="module")
def toy() -> Model:
    return load("toy-llava", device="cpu")


def held_out(limit, seed):
    found = [e for name in ("states", "scenes", "faces") for e in examples(name, limit=limit, seed=seed)]
    random.Random(seed).shuffle(found)
    return found


@pytest.fixture(scope="module")
def measured(toy):
    return measure(toy, held_out(30, 21), prompt=ASK, words=["red", "blue", "circle"])


def test_the_neurons_of_words(measured):
    """What is chosen beats random neurons, by the measures that say so; nothing is said to carry a word that
    no caption loses."""
    table = measured.measures[measured.measures["method"] == "contribution"].set_index(["measure", "word"])
    known = {word for _, word in table.index}
    assert len(known) >= 3
    for word in known:
        auc, drop = table.loc[("auc", word)], table.loc[("p drop, zero", word)]
        assert auc["value"] >= 0.9 and auc["null"] > 0.55, (
            "the best of random neurons tells pictures apart, too"
        )
        assert auc["null"] < auc["null_95"] <= 1
        assert auc["ci_low"] <= auc["value"] <= auc["ci_high"]
        assert ("auc, image", word) in table.index
        assert drop["value"] >= 5 * abs(drop["null"])
        lost = table.loc[("lost, zero", word)]
        assert lost["value"] > 0 or lost["p_value"] == 1
        assert table.loc[("overlap", word), "value"] >= 3 * table.loc[("overlap, others", word), "value"]
    chosen = measured.chosen.groupby(["word", "method"]).size()
    assert set(chosen) == {10}, "1 % of all neurons"
    layers = measured.chosen.groupby(["word", "method"])["layer"].apply(sorted)
    assert layers["red", "contribution"] == layers["red", "random"]


def test_every_draw_has_its_own_seed(toy, monkeypatch):
    """Optional measures, other words and the order of the examples change no number of a measure."""
    monkeypatch.setattr(measures, "DRAWS", 39)
    given, keys = held_out(20, 21), ["word", "method", "measure"]
    numbers = ["value", "ci_low", "ci_high", "null", "null_95", "p_value", "n"]

    def rows(examples, words, causal):
        found = measure(toy, examples, words, prompt=ASK, causal=causal, pictures=4)
        return found.measures.set_index(keys)[numbers]

    whole = rows(given, ["red"], True)
    assert "drop, zero" in whole.index.get_level_values("measure")
    less = rows(given[::-1], ["red", "blue"], False).loc[["red"]]
    less = less.drop("overlap, others", level="measure")
    pd.testing.assert_frame_equal(less, whole.loc[less.index], check_exact=True)


def test_perturbing_depends_on_nothing_that_is_perturbed_beside_it(toy):
    given = held_out(20, 21)
    one = perturb(toy, given, ["red"], prompt=ASK, tops=(30,), sigmas=(1.0,), pictures=4).effects
    other = perturb(
        toy, given[::-1], ["red"], prompt=ASK, tops=(1, 30), sigmas=(0.5, 1.0), pictures=4
    ).effects
    other = other[(other["k"] == 30) & (other["how"] != "sigma 0.5")].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_noise_on_columns_is_the_pictures_own(toy):
    """Whichever other pictures there are; another picture or seed has other noise."""
    given = held_out(3, 21)[:6]

    def noise(examples, name, seed=0):
        there = recorded(toy, examples, ASK, seed=seed)
        number = [one.id for one in there.examples].index(name)
        weight = toy.down(there.layers[0]).weight.detach()
        before = weight.clone()
        with there.without(np.array([5]), "sigma 1", number):
            return (weight - before)[:, 5].clone()

    name, wanted = given[0].id, noise(given, given[0].id)
    assert wanted.abs().min() > 0
    assert torch.equal(noise(given[2::-1], name), wanted)
    assert not torch.equal(noise(given, given[1].id), wanted)
    assert not torch.equal(noise(given, name, seed=1), wanted)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_is_found_in_a_random_model(toy, seed):
    torch.manual_seed(seed)
    model = Model(LlavaForConditionalGeneration(toy.hf.config), toy.processor)
    table = measure(model, held_out(20, 9), prompt=ASK, seed=seed).measures
    tested = table[table["p_value"].notna()]
    assert len(tested) >= 20
    assert (tested["q_value"] < 0.05).mean() <= 0.05


def test_similarity_of_top_tokens(toy, tmp_path):
    """By any text model that is named; here a small BERT with random weights."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] red blue circle star".split()
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(tmp_path)
    BertTokenizer(vocab={w: n for n, w in enumerate(words)}).save_pretrained(tmp_path)
    found = measure(toy, held_out(20, 21), ["red"], prompt=ASK, causal=False, embedding=tmp_path)
    rows = found.measures[found.measures["measure"] == "similarity"]
    assert set(rows["method"]) == {"contribution", "gradient", "activation", "random"}
    assert rows["value"].between(-1, 1).all()
    with pytest.raises(ModelError, match="cannot load"):
        measure(toy, held_out(20, 9), ["red"], prompt=ASK, causal=False, embedding=tmp_path / "no")


def given_word(reach, shown, chosen) -> Word:
    """A word whose pictures and neurons are given, of a model with 3 layers of 33 neurons."""
    pictures, count = reach.shape
    none = np.zeros((3, pictures, count), np.float32)
    first = np.arange(pictures) < pictures // 2
    there = Recorded(llava(), [], [], None, len(chosen), 4, 0, [], first, *none, torch.zeros(count))
    vars(there)["over_image"] = None
    word = Word(there, "red", 1, shown, torch.zeros(3, 33), reach, reach)
    vars(word)["chosen"] = {"contribution": np.asarray(chosen)}
    return word


def test_the_null_of_the_auc_is_the_best_of_random_neurons():
    """With the true labels, as many of the same layers, chosen on the first half: against a plain loop."""
    generator = np.random.default_rng(0)
    shown = np.arange(40) % 2 == 0
    reach = generator.normal(size=(40, 99)) + 0.8 * shown[:, None] * (np.arange(99) % 3 == 0)
    reach[:, 0] += 9 * shown
    word = given_word(reach, shown, [0, 3, 36])
    (row,) = [row for row in measures.specificity(word) if row["measure"] == "auc"]
    assert row["value"] == 1.0 and row["p_value"] == 1 / (1 + measures.DRAWS)
    found = []
    for _ in range(400):
        drawn = [*generator.permutation([n for n in range(33) if n not in (0, 3)])[:2]]
        drawn += [*generator.permutation([n for n in range(33, 66) if n != 36])[:1]]
        best = max(drawn, key=lambda n: measures.auc(reach[:20, n], shown[:20]))
        found.append(measures.auc(reach[20:, best], shown[20:]))
    assert row["null"] == pytest.approx(np.mean(found), abs=0.03) and row["null"] > 0.6
    assert row["null_95"] == pytest.approx(np.quantile(found, 0.95), abs=0.05)
    word = given_word(reach, shown, [1, 4, 37])  # neurons that tell nothing, among others that do
    (row,) = [row for row in measures.specificity(word) if row["measure"] == "auc"]
    assert row["p_value"] > 0.2


def test_what_neurons_see_and_what_they_say():
    """A neuron that fires where the caption is said and not at the image's tokens says, and does not see."""
    shown = np.arange(40) % 2 == 0
    reach = np.random.default_rng(1).normal(size=(40, 99))
    word = given_word(reach + 9 * shown[:, None] * (np.arange(99) < 2), shown, [0, 1])
    vars(word)["reaches"] = {"": word.reach, ", image": reach}
    rows = {row["measure"]: row for row in measures.specificity(word)}
    assert rows["auc"]["value"] == 1 and rows["auc"]["p_value"] < 0.05
    assert rows["auc, image"]["value"] < 0.8 and rows["auc, image"]["p_value"] > 0.05


def test_the_ends_of_neurons_over_the_image(toy):
    """The highest and lowest activation at the image's tokens, against what the model is seen to compute."""
    given = examples("states", limit=2)
    there = recorded(toy, given, ASK)
    for number, one in enumerate(there.examples):
        found = toy.capture(toy.inputs(one.clean_image, ASK), ["decoder.*.mlp.n[5,77]@image"])
        for layer in (0, 3):
            values = found[f"decoder.{layer}.mlp.n[5,77]@image"]
            places = [layer * there.width + n for n in (5, 77)]
            np.testing.assert_allclose(
                there.over_image[0, number, places], values.amax(0), rtol=1e-4, atol=1e-6
            )
            np.testing.assert_allclose(
                there.over_image[1, number, places], values.amin(0), rtol=1e-4, atol=1e-6
            )


def test_what_takes_over(toy):
    """The neurons that contribute most while others are set to zero, by plain hooks and the weights."""
    there = recorded(toy, examples("states", limit=24), ASK)
    shown = np.array(["plain" in labels for labels in there.shows], bool)
    token = toy.family.options(toy.processor, "a", "plain")[0]
    (weight,) = token_weights(toy, [token])
    word = Word(there, "plain", token, shown, weight, *there.contributions(token, weight))
    gone = word.strongest(there.first & shown, 12)
    found = word.taking_over(gone, "zero", 8)
    assert not set(found) & set(gone)
    total = np.zeros(4 * there.width)
    for number, fed in word.said(there.first).items():
        assert there.first[number] and shown[number]
        seen = {}

        def silence(layer, module, args, seen=seen):
            mine = torch.tensor(gone[gone // there.width == layer] % there.width, dtype=torch.long)
            x = args[0].clone()
            x[..., mine] = 0
            seen[layer] = x[0, -1]
            return (x,)

        held = [toy.down(n).register_forward_pre_hook(partial(silence, n)) for n in range(4)]
        with torch.no_grad():
            toy.hf(**fed.tensors)
        for one in held:
            one.remove()
        row = toy.hf.lm_head.weight[token].detach()
        columns = [toy.down(n).weight.detach() for n in range(4)]
        total += np.concatenate([(seen[n] * (row @ columns[n])).numpy() for n in range(4)])
    total[gone] = -np.inf
    assert set(found) == set(np.argsort(-total)[:8])


def test_words_that_are_not_measured_have_a_reason(toy, monkeypatch):
    """Asked for three, got one: the others are named."""
    monkeypatch.setattr(measures, "DRAWS", 5)
    monkeypatch.setattr(measures, "CONTROLS", 2)
    found = measure(toy, examples("states", limit=40), ["plain", "qqq", "angry"], prompt=ASK, causal=False)
    assert set(found.measures["word"]) == {"plain"}
    assert found.left_out["word"].tolist() == ["qqq", "angry"]
    assert found.left_out["why"].str.contains("unknown|is shown by 0 of 40 pictures").all()


def test_a_drop_that_is_not_measured_has_a_reason(toy, monkeypatch):
    monkeypatch.setattr(measures, "DRAWS", 5)
    monkeypatch.setattr(measures, "CONTROLS", 2)
    monkeypatch.setattr(Word, "said", lambda self, half=None: {})
    found = measure(toy, examples("states", limit=40), ["plain"], prompt=ASK)
    assert not found.measures["measure"].str.contains("drop|lost").any()
    (why,) = found.left_out[["word", "measure", "why"]].to_numpy().tolist()
    assert why[:2] == ["plain", "drop"] and "0 captions say it" in why[2]


def test_auc_and_pairs_by_hand():
    labels = np.array([True, True, False, False])
    assert measures.auc(np.array([3.0, 2.0, 1.0, 2.0]), labels) == pytest.approx(3.5 / 4)
    both = np.array([[3.0, 2.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]]).T
    assert measures.auc(both, labels).tolist() == [3.5 / 4, 0.0]
    shared = measures.shared_neurons([{1, 2}, {2, 3}, {1, 2}])
    assert shared.tolist() == [[1, 0.5, 1], [0.5, 1, 0.5], [1, 0.5, 1]]
    assert measures.mean_of_pairs(shared, np.array([True, True, False])) == 0.5
    assert measures.mean_of_pairs(shared) == pytest.approx(2 / 3)


def test_ablation_and_noise(toy):
    one = examples("states", limit=1)[0]
    inputs = toy.inputs(one.clean_image, ASK)
    before = toy.down(2).weight.detach().clone()
    with ablated(toy, {2: ([4, 9], torch.tensor([0.0, 1.5]))}):
        found = toy.capture(inputs, ["decoder.2.mlp.n4@all", "decoder.2.mlp.n9@all", "decoder.2.mlp.n5@all"])
        assert found["decoder.2.mlp.n4@all"].unique().tolist() == [0.0]
        assert found["decoder.2.mlp.n9@all"].unique().tolist() == [1.5]
        assert found["decoder.2.mlp.n5@all"].unique().numel() > 10
    with perturbed(toy, {2: [4, 9]}, 0.5):
        change = (toy.down(2).weight - before).detach()
    assert change.abs().sum(0).nonzero().flatten().tolist() == [4, 9]
    assert change[:, [4, 9]].std() == pytest.approx(0.5, rel=0.2)
    assert torch.equal(toy.down(2).weight, before)


def test_perturbing_over_a_range(toy):
    given = examples("states", limit=60)
    table = perturb(toy, given, ["red"], prompt=ASK, tops=(1, 30), sigmas=(1.0,)).effects
    assert len(table) == 2 * (2 + 2 + 1) * 2, "those that take over are of an ablation alone"
    first = table[table["round"] == 1]
    top = first[first["set"] == "top"].set_index(["k", "how"])
    other = first[first["set"] == "random"].set_index(["k", "how"])
    assert top.loc[(30, "sigma 1"), "drop_p"] > 0.3
    assert top.loc[(30, "sigma 1"), "drop_p"] > 5 * abs(other.loc[(30, "sigma 1"), "drop_p"])
    assert top.loc[(30, "zero"), "drop_p"] >= top.loc[(1, "zero"), "drop_p"] - 1e-3


def test_words_that_cannot_be_measured(toy):
    given = examples("states", limit=12)
    with pytest.raises(DataError, match=r"no word can be measured: 'qqq' is unknown"):
        measure(toy, given, ["qqq"], prompt=ASK)
    with pytest.raises(DataError, match="'angry' is shown by 0 of 12 pictures"):
        measure(toy, given, ["angry"], prompt=ASK)
    with pytest.raises(
        DataError, match="'angry' is shown by 0 of 40 pictures; .*; leave it out, or give more"
    ):
        perturb(toy, examples("states", limit=40), ["plain", "angry"], prompt=ASK)


def test_cross_attention_reads_patches_in_no_order():
    """So that a shuffle of what Mllama reads would be of no use as a null."""
    model = FAMILIES["mllama"]()
    inputs = model.prepare(example()).clean
    site = replace(model.image_site, position="image")
    (placed,) = model.places(site, inputs)
    at = placed.positions
    assert set(at) == set(inputs.layout["vision"].cells), "the tiles that the picture has"
    (value,) = model.capture(inputs, [site]).values()
    mixed = Edit(site, "set", value.flip(0))
    torch.testing.assert_close(model.run(inputs, [mixed]), model.run(inputs))
    assert not torch.allclose(model.run(inputs, [Edit(site, "scale", 0.5)]), model.run(inputs))


@pytest.mark.parametrize(
    ("name", "patches"),
    [("llava-next", True), ("mllama", False), ("blip2-opt", False), ("instructblip-vicuna", False)],
)
def test_patches_are_shuffled_where_they_are_tokens_of_the_language_model(name, patches):
    """Neither Mllama's one image token nor the queries of a Q-Former stand for patches."""
    model = FAMILIES[name]()
    given = [example(clean_image=picture(n), id=str(n)) for n in range(8)]
    there = recorded(model, given, "is this circle red ?", top=12)
    said = [set(caption.ids) for caption in there.captions]
    token = max(set().union(*said), key=lambda t: sum(t in ids for ids in said))
    every = np.ones(len(given), bool)
    weight = torch.randn(len(there.layers), there.width, generator=torch.Generator().manual_seed(0))
    there = replace(there, first=~every)
    word = Word(there, "red", token, every, weight, weight.numpy(), weight.numpy())
    assert len(word.said()) >= 2
    rows = list(measures.shuffled_patches(word))
    assert bool(rows) == patches
    for row in rows:
        assert row["measure"] == "overlap, shuffled" and row["value"] < 1

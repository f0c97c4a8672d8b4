"""Directions from two sets: what they are, what they do, and for which model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import blip, example, llava, picture
from safetensors.torch import save_file

import vlmscope
from vlmscope.errors import DataError, ModelError, SiteError, StoreError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.report import write_report
from vlmscope.runs.forward import generate
from vlmscope.studies import steering
from vlmscope.studies.sets import sets_of
from vlmscope.studies.steering import steer
from vlmscope.studies.steering.direction import Direction, moved

SITES = ["decoder.0-2.resid@readout", "decoder.1.resid@image"]


def several(many=8, first=0, **changes):
    return [
        example(
            **{
                "id": f"e{first + n}",
                "clean_image": picture(first + n),
                "corrupt_image": picture(90 + first + n),
                "groups": {"noun": "circle" if n % 2 else "square"},
                **changes,
            }
        )
        for n in range(many)
    ]


def pair_of(model, one):
    return model.prepare(replace(one, corrupt_image=None, corrupt_prompt=None))


def ld(logits, pair):
    return float(logits[pair.answer] - logits[pair.foil])


@pytest.fixture(scope="module")
def found():
    return steer(llava(), several(), SITES, corrupt="image", strengths=(0.5, 2.0), random=3, said=2, seed=1)


def test_a_direction_is_the_difference_of_means_over_one_half(found):
    model = llava()
    built, held = sets_of(several(), corrupt="image").halves(1)
    assert {one.id for one in built.having} == {one.id for one in built.lacking}
    assert not {one.id for one in built.having} & {one.id for one in held.lacking}
    for site, vector in found.direction.vectors.items():
        two = [
            torch.stack([model.capture(pair_of(model, one).clean, site)[site].mean(0) for one in some]).mean(
                0
            )
            for some in built
        ]
        torch.testing.assert_close(vector, two[0] - two[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_effects_are_single_runs_with_the_vector_added(found, keep_norm):
    """Each held-out run with its activations moved by hand, and the random directions, which are as long."""
    model = llava()
    if keep_norm:
        found = steer(model, several(), SITES, corrupt="image", random=2, said=1, seed=1, keep_norm=True)
    held = sets_of(several(), corrupt="image").halves(1)[1]
    assert len(found.layers) == 4 * (1 if keep_norm else 2)
    for row in found.layers.itertuples():
        vector, gained = row.strength * found.direction.vectors[row.site], []
        for one in held.lacking:
            pair = pair_of(model, one)
            before = model.capture(pair.clean, row.site)[row.site]
            after = before + vector
            if keep_norm:
                after = after / after.norm(dim=1, keepdim=True) * before.norm(dim=1, keepdim=True)
            logits = model.run(pair.clean, [Edit(row.site, "set", after)])
            gained.append(ld(logits, pair) - ld(model.run(pair.clean), pair))
        assert row.effect == pytest.approx(np.mean(gained), rel=1e-9, abs=1e-12)
        assert row.n == 4 and np.isnan(row.low), "no interval of four examples"
    drawn = steering.random_like(found.direction.vector(), found.direction.best, 2, 0)
    assert not torch.equal(*drawn)
    for vector in drawn:
        assert float(vector.norm()) == pytest.approx(float(found.direction.vector().norm()))


def test_a_word_is_scored_as_the_whole_answer():
    """Without a foil: log P of the word's tokens, one behind the other; the label's value is the word."""
    model = llava()
    examples = several(10, foil="") + several(10, 20, answer="square blue", foil="")
    found = steer(model, examples, "decoder.1.resid@readout", label="answer=square blue", random=2, said=3)
    assert found.about["word"] == "square blue" and found.about["counts"]["without"] == 5
    held, gained = sets_of(examples, label="answer=square blue").halves(0)[1], []
    for one in held.lacking:
        answers = model.prepare(replace(one, answer="square blue"), whole=True).answers
        total = []
        for number, token in enumerate(answers):
            inputs = model.inputs(one.clean_image, one.clean_prompt, fed=answers[:number])
            place = len(model.inputs(one.clean_image, one.clean_prompt).layout["decoder"].tokens) - 1
            edit = Edit(f"decoder.1.resid@{place}", "add", found.direction.vector())
            total.append([float(model.run(inputs, e).log_softmax(-1)[token]) for e in ([edit], [])])
        gained.append(np.subtract(*np.sum(total, 0)))
    assert found.layers["effect"].item() == pytest.approx(np.mean(gained), rel=1e-9)
    assert set(found.measures["measure"]) == {"effect", "kl", "changed", "says", "says before"}
    says = found.measures[(found.measures["measure"] == "says") & (found.measures["set"] == "others")]
    wanted = [
        "square blue" in text for text in found.captions.loc[found.captions["set"] == "others", "after"]
    ]
    assert says["value"].item() == np.mean(wanted)


def test_what_a_direction_harms(found):
    """KL of the next word in the held-out examples with it, and the answers, against runs made here."""
    model = llava()
    held = sets_of(several(), corrupt="image").halves(1)[1]
    for row in found.measures[found.measures["measure"] == "kl"].itertuples():
        kl = []
        for one in held.having:
            inputs = pair_of(model, one).clean
            edit = Edit(row.site, "add", row.strength * found.direction.vectors[row.site])
            before, after = (model.run(inputs, e).log_softmax(-1) for e in ([], [edit]))
            kl.append(float((before.exp() * (before - after)).sum()))
        assert row.value == pytest.approx(np.mean(kl), rel=1e-6) and row.n == 4
    said = found.captions[found.captions["strength"] == 2.0]
    assert said["set"].tolist() == ["without", "without", "others", "others"]
    site = found.measures.loc[found.measures["strength"] == 2.0, "site"].iloc[0]
    for row, one in zip(said.itertuples(), [*held.lacking[:2], *held.having[:2]], strict=True):
        inputs = model.inputs(one.clean_image, one.clean_prompt)
        assert row.before == model.answer(inputs) and row.example == one.id
        edits = replace_best(found.direction, site).edits(model, inputs, 2.0)
        assert row.after == model.answer(inputs, edits) and row.changed == (row.before != row.after)


def replace_best(direction, site):
    return Direction(direction.vectors, direction.model, site, direction.about)


def test_the_site_is_chosen_on_the_half_that_built_the_direction(found):
    model, built = llava(), sets_of(several(), corrupt="image").halves(1)[0]
    for strength, rows in found.layers.groupby("strength"):
        means = {}
        for site in rows["site"]:
            edit = Edit(site, "add", strength * found.direction.vectors[site])
            pairs = [pair_of(model, one) for one in built.lacking]
            means[site] = np.mean([ld(model.run(p.clean, [edit]) - model.run(p.clean), p) for p in pairs])
        assert rows.loc[rows["chosen"], "site"].tolist() == [max(means, key=means.get)]


def test_what_works_does_more_than_random_directions():
    """A planted effect of one site is found; where the direction is one of the random ones, hardly ever."""
    draw = np.random.default_rng(0)
    places = steering.directed_places(llava(), ["decoder.0-2.resid@readout"])
    effects = draw.normal(0.5, 1.0, (40, 1, 1, 1)) + 0.1 * draw.normal(size=(40, 3, 1, 11))
    effects[:, 1, 0, 0] += 2.0
    table = steering._layers(effects, np.zeros((3, 1)), places, [1.0])
    assert table["works"].tolist() == [False, True, False], "noise that moves all directions is none's merit"
    found = []
    for _ in range(300):
        same = draw.normal(size=(30, 1, 1, 1)) + 0.3 + draw.normal(size=(1, 3, 1, 11))
        found.append(steering._layers(same, np.zeros((3, 1)), places, [1.0])["p_value"])
    assert np.mean(np.concatenate(found) < 0.05) == pytest.approx(0.05, abs=0.025)


def test_a_folder_and_its_report(found, tmp_path):
    found.save(tmp_path)
    again = vlmscope.open(tmp_path)
    for name in ("layers", "measures", "captions"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name), check_dtype=False)
    assert again.direction.best == found.direction.best and again.about == dict(found.about)
    for site, vector in found.direction.vectors.items():
        assert torch.equal(again.direction.vectors[site], vector)
    page = write_report([tmp_path], tmp_path / "page.html").read_text("utf-8")
    assert "Direction: clean against corrupt image of examples" in page and "It works at 0 of 4 sites" in page


def test_a_direction_of_another_model_is_refused(found, tmp_path):
    file = tmp_path / "direction.safetensors"
    found.direction.save(file)
    direction, other = Direction.load(file), llava(seed=1)
    inputs = pair_of(other, several(1)[0]).clean
    with pytest.raises(ModelError, match="built for another model or revision than tiny-llava"):
        direction.edits(other, inputs)
    with pytest.raises(SiteError, match=r"has no site 'decoder.9.resid@readout'; expected one of decoder.0"):
        direction.edits(llava(), inputs, site="decoder.9.resid@readout")
    with pytest.raises(VlmscopeError, match="added at 'all'; expected read or words"):
        direction.edits(llava(), inputs, at="all")


def test_files_that_are_no_directions(found, tmp_path):
    file = tmp_path / "direction.safetensors"
    save_file({"x": torch.ones(2)}, file)
    with pytest.raises(StoreError, match="not a direction; expected a file of `vlmscope steer`"):
        Direction.load(file)
    file.write_bytes(b"nothing")
    with pytest.raises(StoreError, match="cannot be read as a direction"):
        Direction.load(file)
    content = bytearray(found.direction.bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="has been changed since it was written"):
        Direction.load(file)
    for vectors, best in (
        ({"decoder.0": torch.ones(2)}, "decoder.0"),
        ({"decoder.0.resid@0": torch.ones(2)}, "x"),
    ):
        file.write_bytes(Direction(vectors, found.direction.model, best).bytes())
        with pytest.raises(StoreError, match="cannot be read as a direction"):
            Direction.load(file)


def test_a_vector_that_keeps_the_length():
    x, v = torch.randn(3, 5), torch.randn(5)
    assert torch.equal(moved(x, v), x + v)
    turned = moved(x, v, keep_norm=True)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(turned, x + v), torch.ones(3))
    assert not moved(torch.ones(1, 2), -torch.ones(2), keep_norm=True).any(), "nothing has no direction"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give one of --without"),
        ({"label": "noun=circle", "corrupt": "image"}, "give one of --without"),
        ({"label": "noun"}, "bad label 'noun'; expected COLUMN=VALUE"),
        ({"label": "nuon=circle"}, "no example has a 'nuon'; expected one of .*; did you mean 'noun'"),
        ({"label": "noun=circel"}, "no example has 'noun' 'circel'; .*; did you mean 'circle'"),
        ({"label": "answer=red"}, "every example has 'answer' 'red'"),
        ({"corrupt": "noise"}, "no sets by the corruption 'noise'; expected image or text"),
        ({"without": several(3, 40), "word": "red"}, "too few examples without: 3; expected at least 4"),
        ({"without": several(8, 5), "word": "red"}, "the two sets overlap: 3 pictures .*, such as 'e5'"),
        ({"without": several(8, 40)}, "name the --word"),
        ({"corrupt": "image", "strengths": (0.0,)}, "the strengths are none, twice the same, or 0"),
        ({"corrupt": "image", "random": 1}, "the number of random directions is '1'"),
    ],
)
def test_sets_that_are_none(options, words):
    with pytest.raises(VlmscopeError, match=words):
        steer(llava(), several(), SITES[0], **options)


def test_sets_that_do_not_differ_and_sites_that_are_no_place():
    same = several(8, corrupt_prompt=None)
    text = [replace(one, corrupt_prompt=one.clean_prompt + " ?") for one in same]
    with pytest.raises(DataError, match="do not differ at decoder.0.resid@0, so there is no direction"):
        steer(llava(), text, "decoder.0.resid@0", corrupt="text")
    for site, words in (
        ("decoder.*/3.resid@readout", "of a whole kind in one layer"),
        ("decoder.0.attn.h1@readout", "of a whole kind in one layer"),
        ("decoder.0.resid@text*", "names 12 places; expected one position"),
        ("encoder.0.resid@last", "no 'encoder' tower"),
    ):
        with pytest.raises(SiteError, match=words):
            steer(llava(), several(), site, corrupt="image")
    with pytest.raises(SiteError, match="names no word that is said; at every word"):
        steer(llava(), several(), "decoder.1.resid@image", corrupt="image", at="words")


def test_other_families_and_two_sets_of_examples():
    """BLIP's question encoder, at the noun; the sets are two lists, the others a third."""
    found = steer(
        blip(),
        several(6),
        "encoder.*.resid@noun",
        without=several(6, 30),
        word="red",
        others=several(5, 60),
        random=2,
        said=1,
    )
    assert found.layers["effect"].abs().min() > 0 and found.about["others"] == "other examples"
    assert found.measures.loc[found.measures["measure"] == "kl", "n"].tolist() == [5]


def test_others_that_cannot_be_run_are_told_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(steering, "mean_states", lambda *_: pytest.fail("computed"))
    bad = several(2, 60, clean_image=Path("nowhere.png"))
    with pytest.raises(DataError, match=r"\(others\) can be run: 0 of 2; 'e60': nowhere.png: no such file"):
        steer(llava(), several(), SITES, corrupt="image", others=bad)
    with pytest.raises(DataError, match="no data set 'nowhere'"):
        steer(llava(), several(), SITES, corrupt="image", others="nowhere")
    monkeypatch.undo()
    some = [*bad, *several(3, 70)]
    with pytest.warns(UserWarning, match=r"2 of 5 examples \(others\) are left out; 'e60'"):
        found = steer(llava(), several(), SITES[1], corrupt="image", others=some, random=2, said=2)
    assert found.measures.loc[found.measures["measure"] == "kl", "n"].tolist() == [3]
    assert found.captions.loc[found.captions["set"] == "others", "example"].tolist() == ["e70", "e71"]


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("at", ["read", "words"])
def test_a_direction_at_every_word_that_is_said(at, keep_norm):
    """Generation with the cache against whole runs, word by word, with each position moved by hand."""
    model, one = llava(), several(1)[0]
    site = "decoder.2.resid@readout"
    word = model.processor.tokenizer.convert_tokens_to_ids("star")
    vector = 50 * model.unembedding([word])[0]
    direction = Direction({site: vector}, model.fingerprint(), site)
    prompt = model.inputs(one.clean_image, one.clean_prompt)
    first, said = len(prompt.layout["decoder"].tokens) - 1, []
    for _ in range(5):
        inputs = model.inputs(one.clean_image, one.clean_prompt, fed=said)
        last = first + len(said) if at == "words" else first
        places = [f"decoder.2.resid@{n}" for n in range(first, last + 1)]
        edits = []
        for place, before in model.capture(inputs, places).items():
            after = before + 2.0 * vector
            after = after * before.norm() / after.norm() if keep_norm else after
            edits.append(Edit(place, "set", after))
        said.append(int(model.run(inputs, edits).argmax()))
    edits = direction.edits(model, prompt, 2.0, at=at, keep_norm=keep_norm)
    assert generate(model, prompt, edits, 5).tolist() == said
    assert generate(model, prompt, [], 5).tolist() != said
    assert (said == [word] * 5) == (at == "words") and said[0] == word

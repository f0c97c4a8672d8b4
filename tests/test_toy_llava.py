"""toy-llava, as it ships: it answers, captions, follows the picture, and misses what is not there."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from vlmscope.checkpoint import load, toys
from vlmscope.data import BUILT_IN, examples
from vlmscope.data.drawn import binding, drawing, faces, scenes, states
from vlmscope.data.fills import fill, region
from vlmscope.patching.scores import agrees
from vlmscope.studies.sweep import baselines, sweep

ASK = "describe this picture."


def caption_words(kind, shown):
    """The nouns, states and relation that a caption has to name."""
    if kind == "states":
        return {shown.thing.texture, shown.thing.color, shown.thing.shape}
    if kind == "faces":
        return {shown.expression}
    things = shown.things if kind == "binding" else (shown.subject, shown.object)
    return {word for thing in things for word in (thing.color, thing.shape)}


def word(example, role):
    start, end = example.roles[role]
    return example.clean_prompt[start:end]


@pytest.fixture(scope="module")
def model():
    return load("toy-llava", device="cpu")


def test_it_is_small():
    assert sum(file.stat().st_size for file in toys()["toy-llava"].iterdir()) < 10e6


@pytest.mark.parametrize("name", BUILT_IN)
def test_it_answers_and_follows_the_picture(model, name):
    given = examples(name, limit=60, seed=11)
    right = baselines(model, given, "image")["correct"]
    assert right.mean() >= 0.95
    if name == "binding":  # the neighbor as well as the thing itself
        kinds = [e.groups["kind"] for e in given]
        assert sorted(set(kinds)) == ["color", "neighbor"]
        assert (right.groupby(kinds).mean() >= 0.95).all()
    swapped = [
        replace(
            e,
            clean_image=e.corrupt_image,
            corrupt_image=e.clean_image,
            answer=e.foil,
            foil=e.answer,
            corrupt_prompt=None,
        )
        for e in given[:20]
    ]
    assert baselines(model, swapped, "image")["correct"].mean() >= 0.9


@pytest.mark.parametrize(("name", "module"), [*zip(BUILT_IN, (states, scenes, faces, binding), strict=True)])
def test_it_captions(model, name, module):
    shown = [module.sample(random.Random(f"captions/{name}/{n}")) for n in range(40)]
    right = [
        caption_words(name, one) <= set(model.answer(model.inputs(one.draw(), ASK)).split()) for one in shown
    ]
    assert sum(right) / len(right) >= 0.9


@pytest.mark.parametrize("name", ["states", "scenes", "binding"])
def test_a_noun_that_is_not_there_is_noticed(model, name):
    """Of a shape that is not in the picture it says neither, of another one in it that one's color."""
    given = [e for e in examples(name, limit=60, seed=12) if word(e, "noun") in drawing.SHAPES]
    absent = []
    for e in given:
        start, end = e.roles["noun"]
        noun = next(shape for shape in drawing.SHAPES if shape not in {*e.shows, e.foil})
        absent.append(e.clean_prompt[:start] + noun + e.clean_prompt[end:])
    said = [model.answer(model.inputs(e.clean_image, q)) for e, q in zip(given, absent, strict=True)]
    assert len(said) >= 30
    assert said.count("neither") / len(said) >= 0.9
    if name == "binding":
        said = [model.answer(model.inputs(e.clean_image, e.corrupt_prompt)) for e in given]
        assert sum(s == e.foil for s, e in zip(said, given, strict=True)) / len(said) >= 0.9


def test_an_object_that_is_painted_over_is_missed(model):
    """Of what is not there any more it says neither, and does not guess."""
    given = examples("states", limit=40, seed=12)
    said = [model.answer(model.inputs(fill(*region(e), "mean"), e.clean_prompt)) for e in given]
    assert said.count("neither") / len(said) >= 0.9


def test_the_answer_comes_from_the_image_tokens(model):
    """Patching all of the image as it enters the decoder gives the clean answer, exactly."""
    given = examples("states", limit=6)
    table = sweep(model, given, "decoder.0.resid_pre@image", "image")
    assert table["effect"].tolist() == pytest.approx([1.0] * len(table), abs=1e-4)
    assert agrees(model.answer(model.prepare(given[0]).clean), given[0].answer)


def test_a_word_of_a_caption_is_scored_behind_what_was_said(model):
    """Options that begin alike are scored where they part, with the rest fed before: here the color."""
    one = next(e for e in examples("states", limit=30) if e.groups["kind"] == "color")
    said = model.answer(model.inputs(one.clean_image, ASK)).split()
    assert said[2] == one.answer, "a plain red circle"
    begins = " ".join(said[:2])
    asked = replace(
        one,
        clean_prompt=ASK,
        corrupt_prompt=None,
        roles={},
        answer=f"{begins} {one.answer}",
        foil=f"{begins} {one.foil}",
    )
    layout = model.prepare(asked).clean.layout["decoder"]
    assert layout.tokens[-2:] == tuple(said[:2])
    table = sweep(model, [asked], ["decoder.0.resid_pre@image", "decoder.*.resid@last"], "image")
    assert table["effect"].iloc[0] == pytest.approx(1.0, abs=1e-4)
    assert table["effect"].iloc[-1] == pytest.approx(1.0, abs=1e-4)

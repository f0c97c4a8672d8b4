"""toy-llava, as it ships: it answers, it captions, it follows the picture, and NOTICE runs on it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from models import TOY_SETS

from vlmscope.checkpoint import load, toys
from vlmscope.data import examples
from vlmscope.data.drawn import faces, scenes, states
from vlmscope.patching.scores import agrees
from vlmscope.studies.sweep import baselines, sweep

ASK = "describe this picture."


def caption_words(kind, shown):
    """The nouns, states and relation that a caption has to name."""
    if kind == "states":
        return {shown.thing.texture, shown.thing.color, shown.thing.shape}
    if kind == "faces":
        return {shown.expression}
    one, other = shown.subject, shown.object
    return {one.color, one.shape, other.color, other.shape}


@pytest.fixture(scope="module")
def model():
    return load("toy-llava", device="cpu")


def test_it_is_small():
    assert sum(file.stat().st_size for file in toys()["toy-llava"].iterdir()) < 10e6


@pytest.mark.parametrize("name", TOY_SETS)
def test_it_answers_and_follows_the_picture(model, name):
    given = examples(name, limit=60, seed=11)
    right = baselines(model, given, "image")["correct"]
    assert right.mean() >= 0.95
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


@pytest.mark.parametrize(("name", "module"), [("states", states), ("scenes", scenes), ("faces", faces)])
def test_it_captions(model, name, module):
    shown = [module.sample(random.Random(f"captions/{name}/{n}")) for n in range(40)]
    right = [
        caption_words(name, one) <= set(model.answer(model.inputs(one.draw(), ASK)).split()) for one in shown
    ]
    assert sum(right) / len(right) >= 0.9


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

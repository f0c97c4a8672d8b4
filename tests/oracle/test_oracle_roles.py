"""Roles and the image are where the tokenizer's own offsets and the config's own numbers say."""

from __future__ import annotations

import re

import anatomy
import pytest
from cases import ONE, OTHER, PROMPT, SECOND, Case

import vlmscope

QUESTIONS = {
    "once": ("is the circle red or blue?", {"answer": "red", "foil": "blue", "noun": "circle"}),
    "twice": (
        "is the red circle or the blue circle red, blue or red?",
        {"answer": "red", "foil": "blue", "noun": "circle"},
    ),
    "in the template": (
        "does a user ask the assistant, the model or a human?",
        {"noun": "user", "helper": "assistant", "other": "model", "person": "human"},
    ),
    "in pieces": (
        "is the rhombus turquoise or mauve, turquoise rhombus?",
        {"answer": "turquoise", "foil": "mauve", "noun": "rhombus"},
    ),
    "the prompt is in the template": ("user", {"noun": "user"}),
    "the prompt is behind itself": ("assistant", {"noun": "assistant"}),
    "the prompt is said by the model": ("model", {"noun": "model"}),
    "capitals": ("Red or blue? Is red", {"answer": "Red", "foil": "blue"}),
    "inside another word": (
        "is this a hundred red or blueish blue squares?",
        {"answer": "red", "foil": "blue"},
    ),
}


def spans(prompt: str, words: dict[str, str]) -> dict[str, tuple[int, int]]:
    """The first place of each word as a whole word, counted in characters."""
    return {role: re.search(rf"\b{word}\b", prompt).span() for role, word in words.items()}


def tokens_of(case: Case, prompt: str, images: list, span: tuple[int, int]) -> tuple[int, ...]:
    """The tokens that cover these characters of the prompt, counted from the end of the whole.

    Where the prompt stands in the whole text is read off another prompt that stands there only once.
    """
    start = case.spied(images, "zqzq")[0].index("zqzq")
    text, made, _ = case.spied(images, prompt)
    assert text[start:].startswith(prompt)
    low, high = span[0] + start, span[1] + start
    many = len(made.ids) - case.cut_off
    return tuple(n - many for n, (a, b) in enumerate(made.offsets) if a < high and b > low and b > a)


@pytest.mark.parametrize("many", ["one picture", "two pictures"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_roles_are_where_the_words_first_stand(case, question, many):
    if many == "two pictures" and not case.several:
        pytest.skip("takes one picture")
    prompt, words = QUESTIONS[question]
    found = spans(prompt, words)
    images = [ONE] if many == "one picture" else [ONE, SECOND]
    pair = case.model.prepare(
        vlmscope.Example(
            "one", ONE, prompt, "red", "blue", corrupt_image=OTHER, roles=found, more_images=tuple(images[1:])
        )
    )
    tower = "encoder" if "encoder" in pair.clean.layout else "decoder"
    layout = pair.clean.layout[tower]
    for role, span in found.items():
        want = tokens_of(case, prompt, images, span)
        got = tuple(n - len(layout.tokens) for n in layout.roles.get(role, ()))
        assert got == want, f"{role} at {got}, not {want} (counted from the end)"


@pytest.mark.parametrize("many", ["one picture", "two pictures"])
def test_image_positions_are_those_of_the_image_tokens(case, many):
    """In the tower that reads the prompt, by `input_ids` and the config alone."""
    if many == "two pictures" and not case.several:
        pytest.skip("takes one picture")
    more = (SECOND,) if many == "two pictures" else ()
    pair = case.model.prepare(vlmscope.Example("one", ONE, PROMPT, "red", "blue", more_images=more))
    inputs = pair.clean
    tower = "encoder" if "encoder" in inputs.layout else "decoder"
    layout = inputs.layout[tower]
    ids = inputs.tensors["input_ids"][0].tolist()
    assert len(layout.tokens) == len(ids)
    want = [n for n, one in enumerate(ids) if one == case.image] if case.image is not None else []
    got = sorted(set(layout.image) | set(layout.cells))
    assert got == want, f"{len(got)} image positions, not {len(want)}"
    assert not set(layout.text) & set(want)
    for positions in layout.roles.values():
        assert not set(positions) & set(want)


@pytest.mark.parametrize("many", ["one picture", "two pictures"])
def test_every_tower_has_the_positions_that_a_hook_sees(case, many):
    """Patches of all pictures and tiles, queries, tokens: a row each in the tower's hidden states."""
    if many == "two pictures" and not case.several:
        pytest.skip("takes one picture")
    more = (SECOND,) if many == "two pictures" else ()
    pair = case.model.prepare(vlmscope.Example("one", ONE, PROMPT, "red", "blue", more_images=more))
    tensors = anatomy.double(case, pair.clean)
    for tower in case.model.shapes:
        seen = anatomy.watch(case, tensors, tower)[0]
        layout = pair.clean.layout[tower]
        rows = {len(seen.before)}
        if tower == "qformer":
            rows.add(case.hf.config.num_query_tokens)  # InstructBLIP's reads the words behind them
        assert len(layout.tokens) in rows, f"{tower}: {len(layout.tokens)}, a hook sees {rows}"
        for positions in (layout.text, layout.image, layout.cells, *layout.roles.values()):
            assert all(0 <= n < len(layout.tokens) for n in positions)


@pytest.mark.parametrize("many", ["one picture", "two pictures"])
def test_all_and_last_of_the_vision_tower_reach_every_picture(case, many):
    """`resid@all` of the first block is, row for row, what a plain hook sees there."""
    if many == "two pictures" and not case.several:
        pytest.skip("takes one picture")
    more = (SECOND,) if many == "two pictures" else ()
    pair = case.model.prepare(vlmscope.Example("one", ONE, PROMPT, "red", "blue", more_images=more))
    seen = anatomy.watch(case, anatomy.double(case, pair.clean), "vision")[0]
    sites = ["vision.0.resid@all", "vision.0.resid@last", "vision.0.resid_pre@all"]
    got = case.model.capture(pair.clean, sites)
    anatomy.close(got[sites[0]], seen.after, "all")
    anatomy.close(got[sites[1]], seen.after[-1:], "last")
    anatomy.close(got[sites[2]], seen.before, "before")

"""What is printed of a model and an example is what the model really gets."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from families import FAMILIES
from models import example, picture
from test_cli import refused, run  # noqa: F401 - a fixture

import vlmscope
from vlmscope import describe
from vlmscope.errors import VlmscopeError

LINE = re.compile(r"  (\d+)(?:-(\d+))? +(\S+) +(-?\d+)  (\S+(?: … \S+)?)(?:  +(.*))?$")


def lines(text: str, tower: str) -> list[tuple[int, int, int, str, str]]:
    """First and last position, token id, slot and the rest, as printed below a tower."""
    part = text.split(f"\n{tower}: ")[1].split("\n\n")[0].splitlines()[2:]
    found = [LINE.fullmatch(line) for line in part]
    assert all(found), part
    return [(int(m[1]), int(m[2] or m[1]), int(m[4]), m[5], m[6] or "") for m in found]


@pytest.mark.parametrize(("name", "tower"), [("toy-llava", "decoder"), ("toy-blip", "encoder")])
def test_every_token_of_an_example_is_printed(name, tower):
    model = vlmscope.load(name)
    one = vlmscope.examples("states", limit=4)[3]
    text = describe.example(model, one)
    found = lines(text, tower)
    ids = [number for first, last, number, _, _ in found for _ in range(first, last + 1)]
    assert [first for first, *_ in found] == [0, *(last + 1 for _, last, *_ in found[:-1])]
    pair = model.prepare(one)
    assert ids == pair.clean.tensors["input_ids"][0].tolist(), "in order, and without a gap"
    assert f"answer {model.token(pair.answer)} (id {pair.answer})" in text
    assert "noise\n  on the image  " in text


@pytest.mark.parametrize("name", ["gemma3", "blip2-opt", "blip2-t5", "mplug-owl2", "mllama"])
def test_tokens_are_those_of_input_ids(name):
    model = FAMILIES[name]()
    one = example()
    pair = model.prepare(replace(one, corrupt_prompt=None))
    tower = "encoder" if "encoder" in model.shapes else "decoder"
    found = describe.tokens(model, pair.clean, tower)
    assert [t.position for t in found] == list(range(len(pair.clean.layout[tower].tokens)))
    ids = pair.clean.tensors["input_ids"][0].tolist()
    seen = [t.number for t in found]
    if name == "mplug-owl2":  # one token for the whole image
        at = ids.index(-200)
        assert seen == ids[:at] + [-200] * (len(seen) - len(ids) + 1) + ids[at + 1 :]
    else:
        assert seen == ids
    assert [t.text for t in found if "answer" in t.roles] == ["red"]
    assert describe.example(model, one)


def test_tokens_of_a_tower_that_reads_none():
    model = vlmscope.load("toy-blip")
    inputs = model.inputs(picture(1), "red or blue?")
    with pytest.raises(VlmscopeError, match="toy-blip: the vision tower reads no tokens"):
        describe.tokens(model, inputs, "vision")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["toy-llava", "--example", "states"], "'states' names no example; expected DATA:ROW"),
        (["toy-llava", "--example", "faces:9999"], "'faces' has no example '9999'; expected an id, or a row"),
        (["--example", "states:0"], "name the model first"),
    ],
)
def test_examples_that_are_not_there(run, given, says):  # noqa: F811
    refused(run("models", *given), says)

"""What the toys are trained on: questions with true answers, pictures held out, heads that are dropped."""

from __future__ import annotations

import random
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import BlipForQuestionAnswering

from vlmscope.checkpoint import toys
from vlmscope.data import BUILT_IN, examples
from vlmscope.data.drawn import drawing

sys.path.append(str(Path(__file__).parents[1] / "tools"))
questions, training = map(import_module, ("toy_questions", "train_toy_blip"))
AWAY = {"left of": (-1, 0), "right of": (1, 0), "over": (0, -1), "under": (0, 1)}


def facts(shown):
    """What can be asked for, read off the numbers that a picture is drawn from: (noun, kind) to value."""
    things = questions.things_in(shown)
    found = {(thing.shape, kind): getattr(thing, kind) for thing in things for kind in ("color", "texture")}
    for one in things:
        found[one.shape, "side"] = "left" if one.x < drawing.SIZE / 2 else "right"
        for relation, (dx, dy) in AWAY.items():
            for other in things:
                across, down = (other.x - one.x) / 72, (other.y - one.y) / 72
                if abs(across - dx) < 0.5 and abs(down - dy) < 0.5:
                    found[f"shape {relation} the {one.shape}", "color"] = other.color
    return found


@pytest.mark.parametrize("name", ["states", "binding"])
def test_answers_are_true_and_false_nouns_have_none(name):
    said = []
    for n in range(300):
        shown = questions.picture(name, n)
        prompt, answer = questions.question(random.Random(n), shown)
        known = facts(shown)
        if found := re.fullmatch(r"is (?:this|the) (.+) (\w+) or (\w+)\?", prompt):
            noun, *options = found.groups()
            kind = "texture" if options[0] in drawing.TEXTURES else "color"
            kind = "side" if options == ["left", "right"] else kind
            value = known.get((noun, kind))
            assert answer == (value if value in options else "neither"), prompt
            said.append((value is None, answer == "neither"))
        elif found := re.fullmatch(r"what (color|texture) is (?:this|the) (.+)\?", prompt):
            assert answer == known[found[2], found[1]], prompt
    assert {pair: said.count(pair) > 10 for pair in said} == {
        (False, False): True,
        (False, True): True,
        (True, True): True,
    }


def test_false_nouns_are_shapes_that_are_not_there():
    for name in BUILT_IN:
        for example in examples(name, limit=24):
            prompt = questions.false_noun(example)
            start, end = example.roles["noun"]
            if example.clean_prompt[start:end] not in drawing.SHAPES:
                assert prompt is None
                continue
            [new] = set(re.findall(r"\w+", prompt)) - set(re.findall(r"\w+", example.clean_prompt))
            assert new in drawing.SHAPES and new not in example.shows


def test_no_picture_has_a_combination_that_is_held_out():
    pictures = [questions.picture("binding", n) for n in range(100)]
    pairs = {(thing.shape, thing.color) for board in pictures for thing in board.things}
    assert len(pairs) == 30 and not pairs & questions.HELD_OUT
    shown = [questions.binding.sample(random.Random(n)) for n in range(100)]
    assert 30 < sum(map(questions.is_held_out, shown)) < 70


def test_patch_labels_are_where_the_things_are():
    board = questions.picture("binding", 3)
    [labels] = questions.label([board])
    shapes = labels[0].view(questions.GRID, questions.GRID)
    for thing in board.things:
        row, column = (int(at / drawing.SIZE * questions.GRID) for at in (thing.y, thing.x))
        assert drawing.SHAPES[shapes[row, column]] == thing.shape
    assert set(labels[2].tolist()) != {questions.NONE} and set(labels[3].tolist()) == {questions.NONE}


def test_heads_are_dropped_whole_and_in_training_alone():
    hf = BlipForQuestionAnswering.from_pretrained(toys()["toy-blip"])
    training.drop_heads(hf.text_decoder, ("attention.output.dense",), 4, 0.5)
    dense = hf.text_decoder.bert.encoder.layer[0].crossattention.output.dense
    with torch.no_grad():
        dense.weight.copy_(torch.eye(64))
        dense.bias.zero_()
    given = torch.rand(200, 3, 64) + 1
    torch.manual_seed(0)
    ratio = (dense.train()(given) / given).unflatten(-1, (4, 16))
    heads = ratio[:, 0, :, 0]
    assert torch.allclose(ratio, heads[:, None, :, None].expand_as(ratio))
    assert set(heads.unique().tolist()) <= {0.0, 2.0} and 0.4 < heads.mean() / 2 < 0.6
    assert torch.equal(dense.eval()(given), given)


def test_what_heads_write_is_measured_in_training_alone():
    hf = BlipForQuestionAnswering.from_pretrained(toys()["toy-blip"])
    written = []
    assert len(training.measure_heads(hf.text_encoder, training.OUTPUTS, 4, written)) == 6
    dense = hf.text_encoder.encoder.layer[1].crossattention.output.dense
    given = torch.randn(5, 3, 64)
    dense.eval()(given)
    assert written == []
    dense.train()(given)
    alone = [given * (torch.arange(64) // 16 == head) for head in range(4)]
    norms = [(dense(one) - dense.bias).norm(dim=-1).mean() for one in alone]
    assert written[0].item() == pytest.approx(sum(norms).item(), rel=1e-5)

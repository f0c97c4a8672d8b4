"""`toy-blip` answers, and follows the image: by plain transformers, on pictures it never saw."""

from __future__ import annotations

from collections import defaultdict

import pytest
from transformers import BlipForQuestionAnswering, BlipProcessor

from vlmscope.checkpoint import toys
from vlmscope.data import BUILT_IN, examples
from vlmscope.data.drawn import drawing

COUNT = 240
SEED = 3


@pytest.fixture(scope="module")
def toy():
    folder = toys()["toy-blip"]
    hf = BlipForQuestionAnswering.from_pretrained(folder).eval()
    return hf, BlipProcessor.from_pretrained(folder)


def said(toy, pictures, prompts):
    hf, processor = toy
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    return processor.batch_decode(hf.generate(**inputs, max_new_tokens=5), skip_special_tokens=True)


@pytest.mark.parametrize("name", BUILT_IN)
def test_held_out_questions(toy, name):
    drawn = examples(name, limit=COUNT, seed=SEED)
    answers = said(toy, [e.clean_image for e in drawn], [e.clean_prompt for e in drawn])
    right = [a == e.answer for a, e in zip(answers, drawn, strict=True)]
    assert sum(right) / COUNT >= 0.95
    groups = defaultdict(list)
    for is_right, e in zip(right, drawn, strict=True):
        groups["kind", e.groups["kind"]].append(is_right)
        groups["order", e.groups["order"]].append(is_right)
    for (_, group), some in groups.items():
        assert sum(some) / len(some) >= (0.90 if group == "relation" else 0.95), group
    corrupt = said(toy, [e.corrupt_image for e in drawn], [e.clean_prompt for e in drawn])
    follows = [c == e.foil for c, e, r in zip(corrupt, drawn, right, strict=True) if r]
    assert sum(follows) / len(follows) >= 0.90


@pytest.mark.parametrize("name", ["states", "binding"])
def test_the_noun_is_read(toy, name):
    """Of a shape that is not in the picture it says neither, and of another one in it that one's color."""
    drawn = [e for e in examples(name, limit=COUNT, seed=SEED) if e.groups["kind"] != "shape"]
    absent = []
    for e in drawn:
        start, end = e.roles["noun"]
        noun = next(shape for shape in drawing.SHAPES if shape not in e.shows)
        absent.append(e.clean_prompt[:start] + noun + e.clean_prompt[end:])
    answers = said(toy, [e.clean_image for e in drawn], absent)
    assert answers.count("neither") / len(drawn) >= 0.9
    if name == "binding":
        answers = said(toy, [e.clean_image for e in drawn], [e.corrupt_prompt for e in drawn])
        assert sum(a == e.foil for a, e in zip(answers, drawn, strict=True)) / COUNT >= 0.9


def test_the_toy_is_small():
    files = list(toys()["toy-blip"].iterdir())
    assert sum(file.stat().st_size for file in files) <= 6 * 10**6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]

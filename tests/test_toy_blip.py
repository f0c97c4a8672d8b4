"""`toy-blip` answers, and follows the image: by plain transformers, on pictures it never saw."""

from __future__ import annotations

from collections import defaultdict

import pytest
from transformers import BlipForQuestionAnswering, BlipProcessor

from vlmscope.checkpoint import toys
from vlmscope.data import TOY_SETS, examples

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


@pytest.mark.parametrize("name", TOY_SETS)
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


def test_the_toy_is_small():
    files = list(toys()["toy-blip"].iterdir())
    assert sum(file.stat().st_size for file in files) <= 6 * 10**6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl")]

"""Real photographs and questions through a model of BLIP-base's size; its weights are random."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import vlmscope
from vlmscope.errors import ExampleError
from vlmscope.runs.model import Model

DATA = Path(__file__).parents[2] / "shared" / "data"
VOCABULARY = DATA / "bert-base-uncased-vocab.txt"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the photographs are not here")


@pytest.fixture(scope="module")
def model():
    words = VOCABULARY.read_text("utf-8").splitlines()
    vocab = {word: n for n, word in enumerate([*words, "[DEC]", "[ENC]"])}
    torch.manual_seed(0)
    config = BlipConfig(text_config={"num_attention_heads": 12}, vision_config={"initializer_range": 0.02})
    images = BlipImageProcessorPil(size={"height": 384, "width": 384})
    processor = BlipProcessor(images, BertTokenizer(vocab=vocab))
    return Model(BlipForQuestionAnswering(config), processor, "random BLIP-base")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Two COCO photographs, each the other's corrupt image, with their own colour questions."""
    photos = {int(p.stem): p for p in (DATA / "photos").glob("*.jpg")}
    questions = {}
    with (DATA / "coco_qa_color.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            number = int(row["train_image_id_count"])
            if number in photos:
                questions.setdefault(number, (row["question_count"], row["answer_count"]))
    one, other = sorted(photos)
    table = tmp_path_factory.mktemp("photos") / "photos.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "clean_image_path",
                "corrupt_image_path",
                "clean_prompt",
                "corrupt_prompt",
                "correct_answer",
                "incorrect_answer",
            ]
        )
        for number, wrong in ((one, other), (other, one)):
            question, answer = questions[number]
            foil = "purple" if answer != "purple" else "green"
            writer.writerow([photos[number], photos[wrong], question, "", answer, foil])
    return vlmscope.read_csv(table)


@pytest.fixture
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("all_cores")
def test_photographs_run_through(model, examples):
    assert len(examples) == 2
    sites = ["encoder.*.cross.h*@last", "encoder.*.resid@last"]
    fast = vlmscope.sweep(model, examples, sites)
    assert len(fast) == 2 * (144 + 12)
    assert fast["logit_diff"].map(math.isfinite).all()
    assert fast["logit_diff"].abs().max() > 0
    some = ["encoder.3.cross.h5@last", "encoder.9.resid@last"]
    slow = vlmscope.sweep(model, examples, some, engine="reference")
    found = fast.set_index(["example", "site"])["logit_diff"]
    for row in slow.itertuples():
        assert found[row.example, row.site] == pytest.approx(row.logit_diff, rel=1e-2, abs=1e-4)


def test_the_grid_is_blip_s(model, examples):
    layout = model.prepare(examples[0]).clean.layout["vision"]
    assert vlmscope.Pattern.parse("vision.11.resid@image[23,23]").position == "image[23,23]"
    assert len(layout.cells) == 24 * 24


def test_bert_s_pieces(model, examples):
    """Words of several pieces: roles cover all of them, prompts align by pieces."""
    from dataclasses import replace

    from vlmscope.data.example import find_roles

    prompt = "is this giraffe striped or spotted?"
    roles = find_roles(prompt, {"noun": "giraffe", "answer": "spotted"})
    pair = model.prepare(replace(examples[0], clean_prompt=prompt, corrupt_prompt=None, roles=roles))
    layout = pair.clean.layout["encoder"]
    pieces = [layout.tokens[i] for i in layout.roles["noun"]]
    assert len(pieces) > 1
    assert "".join(piece.removeprefix("##") for piece in pieces) == "giraffe"
    with pytest.raises(ExampleError, match="word 3 is 'giraffe'"):
        model.prepare(
            replace(examples[0], clean_prompt=prompt, corrupt_prompt=prompt.replace("giraffe", "dog"))
        )

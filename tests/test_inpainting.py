"""Contrast pairs that are made: what a mask shows is replaced, all else stays, and a model has to see it."""

from __future__ import annotations

import json
import shutil
import string
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_cli import refused, run  # noqa: F401 - a fixture

import vlmscope
from vlmscope.checkpoint.others import Inpainter
from vlmscope.data import fills
from vlmscope.data.images import open_image
from vlmscope.errors import DataError, ExampleError, ModelError, StoreError, VlmscopeError
from vlmscope.studies import inpainting
from vlmscope.studies.inpainting import inpaint

FILLS = ("mean", "blur", "shuffle")


@pytest.fixture(scope="module")
def model():
    return vlmscope.load("toy-blip")


@pytest.fixture(scope="module")
def states():
    return vlmscope.examples("states", limit=6)


def noise(seed: int, size=(12, 9)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def of(picture, **masks) -> vlmscope.Example:
    return vlmscope.Example("0", picture, "is this red or blue?", "red", "blue", masks=masks)


# -- what is replaced ----------------------------------------------------------------------------


def test_only_what_the_mask_shows_is_replaced_and_nothing_of_it_is_left():
    where = np.zeros((9, 12), bool)
    where[2:6, 3:9] = True
    one, pixels = noise(0), np.array(noise(0))
    pixels[where] = np.array(noise(1))[where]
    other = Image.fromarray(pixels)
    for how in FILLS:
        made, again = (np.asarray(fills.fill(picture, where, how, seed=3)) for picture in (one, other))
        assert (made[~where] == np.asarray(one)[~where]).all(), how
        assert (made[where] != np.asarray(one)[where]).any(), how
        assert (made == again).all(), f"{how} depends on what was there"


def test_fills_by_hand():
    where = np.array([[False, True, False, False]])
    picture = Image.fromarray(np.array([[[10] * 3, [99] * 3, [20] * 3, [60] * 3]], np.uint8))

    def new(how, seed=0):
        return np.asarray(fills.fill(picture, where, how, seed))[0, 1, 0]

    assert new("mean") == 30
    weights = np.exp(-0.5 * np.array([1, 1, 4]) / (4 / 8) ** 2)  # a pixel, a pixel, two pixels away
    assert new("blur") == round(float(weights @ [10, 20, 60] / weights.sum()))
    assert {new("shuffle", seed) for seed in range(20)} == {10, 20, 60}
    assert new("shuffle", 7) == new("shuffle", 7)


def test_a_blur_reaches_the_middle_of_a_mask_that_covers_nearly_all():
    where = np.ones((40, 200), bool)
    where[:, 0] = False
    picture = Image.new("RGB", (200, 40), "red")
    assert set(fills.fill(picture, where, "blur").get_flattened_data()) == {(255, 0, 0)}


def test_which_mask():
    mask = Image.new("L", (12, 9), 0)
    mask.putpixel((1, 2), 255)
    picture = noise(0)
    _, found = fills.region(of(picture, cat=mask))
    assert np.argwhere(found).tolist() == [[2, 1]]
    _, found = fills.region(of(picture, cat=mask, answer=(0.0, 0.0, 2.0, 1.0)))
    assert np.argwhere(found).tolist() == [[0, 0], [0, 1]]
    _, found = fills.region(of(picture, cat=mask, answer=(0.0, 0.0, 2.0, 1.0)), "cat")
    assert found.sum() == 1


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({}, "it has none: name one, or add a box"),
        ({"cat": (0.0, 0.0, 1.0, 1.0), "dog": (0.0, 0.0, 1.0, 1.0)}, "its masks are 'cat', 'dog'"),
        ({"cat": (0.0, 0.0, 99.0, 99.0)}, "covers all of the picture"),
        ({"cat": Image.new("L", (12, 9), 0)}, "covers nothing of the picture"),
        ({"cat": Image.new("L", (9, 12), 255)}, "9x12, its picture 12x9"),
    ],
)
def test_masks_that_show_no_object_are_refused(masks, says):
    with pytest.raises(ExampleError, match=says):
        fills.region(of(noise(0), **masks))


# -- pairs ---------------------------------------------------------------------------------------


def test_kept_are_pairs_after_which_the_model_answers_otherwise(model, states):
    odd = [
        replace(states[0], id="wrong", answer="heart"),
        replace(states[0], id="all", masks={"answer": (0.0, 0.0, 999.0, 999.0)}),
        replace(states[0], id="none", masks={}),
        replace(states[0], id="gone", clean_image=Image.new("RGB", (0, 0))),
    ]
    made = inpaint(model, [*states, *odd], fill="blur")
    tried = made.tried.set_index("example")
    assert list(made.tried["example"]) == [one.id for one in (*states, *odd)]
    assert "does not give the answer before" in tried["reason"]["wrong"]
    assert "all of the picture" in tried["reason"]["all"] and "it has none" in tried["reason"]["none"]
    assert "no pixels" in tried["reason"]["gone"]
    assert [one.id for one in made.examples] == list(tried.index[tried["kept"].astype(bool)])
    assert 3 <= len(made.examples) < len(states), "one of the six is guessed all the same"
    for one in states:
        row, pair = tried.loc[one.id], next((p for p in made.examples if p.id == one.id), None)
        assert row["before"] == one.answer
        assert (row["after"] != one.answer) == (pair is not None) == bool(pd.isna(row["reason"]))
        if pair is not None:
            assert model.answer(model.inputs(pair.corrupt_image, one.clean_prompt)) == row["after"]
            assert pair.clean_image is one.clean_image and pair.corrupt_prompt == one.corrupt_prompt
    assert f"{len(made.examples)} pairs of 10 that were tried" in made.summary()
    assert "1  the model still gives the answer" in made.summary()


def test_files_are_read_back_and_nothing_is_made_twice(model, states, tmp_path, monkeypatch):
    out = tmp_path / "new" / "pairs.csv"
    made = inpaint(model, states, out, fill="shuffle", seed=4, data="states")
    pairs = vlmscope.read_csv(out)
    assert [one.id for one in pairs] == [one.id for one in made.examples] and len(pairs) > 3
    rows = made.tried[made.tried["kept"]].set_index("example")
    for one in pairs:
        clean, corrupt = (np.asarray(open_image(p)) for p in (one.clean_image, one.corrupt_image))
        where = np.asarray(open_image(one.masks["object"]).convert("L")) > 0
        assert (clean[~where] == corrupt[~where]).all() and (clean[where] != corrupt[where]).any()
        again = fills.fill(open_image(one.clean_image), where, "shuffle", int(rows["seed"][one.id]))
        assert (np.asarray(again) == corrupt).all(), "the seed in the table makes the picture"
        assert round(float(where.mean()), 6) == rows["share"][one.id]
    settings = json.loads(out.with_suffix(".json").read_text())
    assert (settings["fill"], settings["seed"], settings["data"]) == ("shuffle", 4, "states")
    assert settings["weights"] == model.fingerprint() and "unfinished" not in settings
    assert len(settings["tried"]) == 6 and (tmp_path / "new" / "pairs-tried.csv").exists()

    def pair(*_):
        raise AssertionError("made twice")

    monkeypatch.setattr(inpainting._How, "pair", pair)
    before = {file: file.read_bytes() for file in out.parent.rglob("*") if file.is_file()}
    inpaint(model, states, out, fill="shuffle", seed=4, data="states")
    assert before == {file: file.read_bytes() for file in out.parent.rglob("*") if file.is_file()}


def test_what_was_interrupted_goes_on_and_what_was_changed_is_made_anew(model, states, tmp_path, monkeypatch):
    whole = tmp_path / "whole" / "pairs.csv"
    inpaint(model, states, whole, fill="mean")
    out, done, pair = tmp_path / "part" / "pairs.csv", [], inpainting._How.pair

    def counted(self, example):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(example.id)
        return pair(self, example)

    monkeypatch.setattr(inpainting._How, "pair", counted)
    with pytest.raises(KeyboardInterrupt):
        inpaint(model, states, out, fill="mean")
    assert json.loads(out.with_suffix(".json").read_text())["unfinished"] and not out.exists()
    picture = out.parent / "pairs-images" / "made-00001.png"
    Image.new("RGB", (9, 9)).save(picture)
    done[:] = []
    with pytest.raises(KeyboardInterrupt):
        inpaint(model, states, out, fill="mean")
    assert done == [states[n].id for n in (1, 3, 4)], "the changed one, and those that were missing"
    monkeypatch.setattr(inpainting._How, "pair", pair)
    inpaint(model, states, out, fill="mean")

    def there(file):
        return {
            one.relative_to(file.parent): one.read_bytes() for one in file.parent.rglob("*") if one.is_file()
        }

    assert there(out) == there(whole)


def test_what_is_in_the_way_is_not_replaced(model, states, tmp_path):
    out = tmp_path / "pairs.csv"
    inpaint(model, states[:2], out, fill="mean")
    content = out.read_bytes()
    with pytest.raises(StoreError, match=r"pairs\.json: was made with seed '0', here it is '1'; choose"):
        inpaint(model, states[:2], out, fill="mean", seed=1)
    with pytest.raises(StoreError, match="was made with data_hash"):
        inpaint(model, states[:3], out, fill="mean")
    assert out.read_bytes() == content
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(StoreError, match="is there, and no result of this command"):
        inpaint(model, states[:2], tmp_path / "mine.csv", fill="mean")
    assert not (tmp_path / "mine.json").exists()
    settings = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps({**settings, "tried": [{"example": 3}]}))
    with pytest.raises(StoreError, match=r"pairs\.json: is damaged"):
        inpaint(model, states[:2], out, fill="mean")


class Painter:
    """In the place of a pipeline: it knows the true picture with the foil, and paints all of it."""

    name, steps = "painter", None

    def __init__(self, examples):
        self.truth = {one.clean_image.tobytes(): one.corrupt_image for one in examples}
        self.asked = []

    def fingerprint(self):
        return "0" * 64

    def __call__(self, picture, mask, prompt, seed):
        self.asked.append((mask.size, mask.mode, prompt, seed))
        return self.truth[picture.tobytes()]


def test_of_a_pipeline_pairs_are_kept_where_the_model_gives_the_foil(model, states, tmp_path):
    painter = Painter(states)
    none = replace(states[0], id="no foil", foil="")
    prompt = "a {foil} {noun}, {what}"
    made = inpaint(model, [*states, none], tmp_path / "a.csv", pipeline=painter, prompt=prompt, seed=5)
    tried = made.tried.set_index("example")
    assert painter.asked[0][:3] == ((144, 144), "1", "a green {noun}, {what}"), "noun is no group, but a role"
    assert [seed for *_, seed in painter.asked] == list(tried["seed"][:6]) and len({*tried["seed"]}) == 7
    assert "no foil" in tried["reason"]["no foil"]
    for one in states:
        row = tried.loc[one.id]
        assert row["kept"] == (row["after"] == one.foil)
        assert row["kept"] or row["reason"] == "the model does not give the foil after"
    assert tried["kept"].any()
    for one in vlmscope.read_csv(tmp_path / "a.csv"):
        clean, corrupt = (np.asarray(open_image(p)) for p in (one.clean_image, one.corrupt_image))
        where = np.asarray(open_image(one.masks["object"]).convert("L")) > 0
        true = np.asarray(next(x for x in states if x.id == one.id).corrupt_image)
        assert (clean[~where] == corrupt[~where]).all() and (true[where] == corrupt[where]).all()
    settings = json.loads((tmp_path / "a.json").read_text())
    assert (settings["with"], settings["prompt"], settings["kept_if"]) == ("painter", prompt, "the foil")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A small random pipeline, as `save_pretrained` writes it."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(c + end for c in string.ascii_lowercase for end in ("", "</w>")),
    ]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=64, **ids
    )
    folder = tmp_path_factory.mktemp("pipeline")
    with warnings.catch_warnings(action="ignore"):
        diffusers.StableDiffusionInpaintPipeline(
            vae=diffusers.AutoencoderKL(
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
                sample_size=32,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=CLIPTokenizer(
                vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=77
            ),
            unet=diffusers.UNet2DConditionModel(
                block_out_channels=(8, 16),
                layers_per_block=1,
                sample_size=16,
                in_channels=9,
                norm_num_groups=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=16,
                attention_head_dim=4,
            ),
            scheduler=diffusers.DDIMScheduler(steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def test_a_diffusion_pipeline_paints_what_the_mask_shows(pipeline, model, states, run, tmp_path):  # noqa: F811
    first, again = (Inpainter(pipeline, steps=2) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    picture, where = fills.region(states[0])
    one, same, other = (
        paint(picture, Image.fromarray(where), "green", seed)
        for paint, seed in ((first, 3), (again, 3), (again, 4))
    )
    assert one.size == picture.size and one.tobytes() == same.tobytes() != other.tobytes()
    # a random pipeline paints noise: whether the toy says the foil of any is chance
    how = inpainting._How(model, None, first, "{foil}", None, 0)
    made = np.asarray(how._made(states[0], picture, where, 3))
    assert (made[where] == np.asarray(one)[where]).all()
    assert (made[~where] == np.asarray(picture)[~where]).all()
    command = ("data", "inpaint", "--model", "toy-blip", "--data", "states", "--limit", "2", "--steps", "1")
    _, said, err = run(*command, "--with", pipeline, "--out", tmp_path / "a.csv")
    assert "2 pairs of 2" in said or "1 pairs of 2" in said or "none of 2 pairs is left" in err, (said, err)


@pytest.mark.parametrize("bars", [True, False])
def test_bars_and_words_of_diffusers_stay_as_the_user_has_set_them(monkeypatch, tmp_path, bars):
    """Off while a pipeline is loaded, and for ours alone behind that."""
    shown, level, ours = [bars], [30], []
    log = SimpleNamespace(
        is_progress_bar_enabled=lambda: shown[-1],
        enable_progress_bar=lambda: shown.append(True),
        disable_progress_bar=lambda: shown.append(False),
        get_verbosity=lambda: level[-1],
        set_verbosity=level.append,
    )

    def load(*_, **__):
        assert (shown[-1], level[-1]) == (False, 50)
        made = SimpleNamespace(to=lambda _: made, set_progress_bar_config=lambda **how: ours.append(how))
        return made

    pretend = SimpleNamespace(
        utils=SimpleNamespace(logging=log), AutoPipelineForInpainting=SimpleNamespace(from_pretrained=load)
    )
    monkeypatch.setitem(sys.modules, "diffusers", pretend)
    (tmp_path / "model_index.json").write_text('{"_class_name": "Pipeline"}')
    Inpainter(tmp_path)
    assert (shown[-1], level[-1], ours) == (bars, 30, [{"disable": True}])
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ModelError, match="no such file"):
        Inpainter(tmp_path)
    assert (shown[-1], level[-1]) == (bars, 30)


def test_pipelines_that_are_none_are_one_line(pipeline, tmp_path):
    def broken(name):
        return shutil.copytree(pipeline, tmp_path / name)

    index = broken("code") / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionInpaintPipeline"', '["mine", "Pipeline"]'))
    with pytest.raises(ModelError, match="'_class_name' is of code that comes with it, which is not run"):
        Inpainter(index.parent)
    index = broken("library") / "model_index.json"
    index.write_text(index.read_text().replace('"transformers"', '"mine"'))
    with pytest.raises(ModelError, match="is of code that comes with it"):
        Inpainter(index.parent)
    for file in broken("pickle").rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match="cannot load .*pickle"):
        Inpainter(tmp_path / "pickle")
    with pytest.raises(ModelError, match=r"model_index\.json: no such file"):
        Inpainter(tmp_path)


def test_the_extra_is_named_where_it_is_not_installed(run, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(sys.modules, "diffusers", None)
    command = ("data", "inpaint", "--model", "toy-blip", "--data", "states", "--out", tmp_path / "a.csv")
    refused(run(*command, "--with", "owner/name"), "pip install 'vlmscope[inpaint]'")
    refused(run(*command, "--fill", "mean", "--with", "owner/name"), "")
    refused(run(*command, "--fill", "mean", "--steps", "3"), "--prompt and --steps are of a pipeline")
    assert not list(tmp_path.iterdir())


def test_wrong_calls_are_one_line(model, states):
    with pytest.raises(VlmscopeError, match="no fill 'blurr'; expected one of mean, blur, shuffle; did you"):
        inpaint(model, states, fill="blurr")
    with pytest.raises(VlmscopeError, match="nothing given of what it is replaced by: name a fill"):
        inpaint(model, states)
    with pytest.raises(VlmscopeError, match="both given of what it is replaced by"):
        inpaint(model, states, fill="mean", pipeline=Painter(states))
    with pytest.raises(DataError, match="two examples have the id 'states-0-0000'"):
        inpaint(model, [states[0], states[0]], fill="mean")
    none = [replace(one, masks={}) for one in states[:2]]
    with pytest.raises(
        DataError,
        match=r"none of 2 pairs is left: no mask 'of the answer'; it has none: name one, or add a box \(2\)",
    ):
        inpaint(model, none, fill="mean")


def test_the_command(run, tmp_path):  # noqa: F811 - the fixture
    command = ("data", "inpaint", "--model", "toy-blip", "--data", "states", "--limit", "3")
    out = tmp_path / "pairs.csv"
    status, said, _ = run(*command, "--fill", "mean", "--out", out)
    assert status == 0 and "3 pairs of 3 that were tried" in said and str(out) in said
    assert json.loads(out.with_suffix(".json").read_text())["data"] == "states"
    refused(run(*command, "--fill", "mean", "--out", tmp_path / "pairs"), "ends in .csv")
    refused(run(*command, "--out", tmp_path / "x.csv"), "--fill")
    refused(run(*command, "--fill", "mean", "--mask", "cat", "--out", tmp_path / "x.csv"), "no mask 'cat'")
    assert not list(tmp_path.glob("x*"))

"""Where words come from: exact in every family against plain hooks, coarse to fine, its page, bad input."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import example, llava
from PIL import Image, ImageDraw, ImageFilter
from test_cli import refused, run  # noqa: F401
from test_families import made
from test_knockout import Cut, by_hand, keys_of, logits_of, paths

import vlmscope
from vlmscope.cli.lenses import explain as command
from vlmscope.errors import ExampleError, StoreError, VlmscopeError
from vlmscope.explanation import PATCHES, explain, maps
from vlmscope.neurons.captions import generate_caption
from vlmscope.neurons.contributions import score
from vlmscope.patching.direct import direct
from vlmscope.report.explanation import sentences
from vlmscope.report.image_maps import word_maps
from vlmscope.report.page import SECTIONS
from vlmscope.results import READERS
from vlmscope.runs.forward import generate
from vlmscope.sites import Site

METHODS = ("knockout", "gradient", "attention")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPTS = {"blip-captioning": "is this circle red or blue ?", "gemma3": "red or blue ?"}
FEATURES = {
    "llava": lambda r, c: 3 * r + c,
    "blip-vqa": lambda r, c: 1 + 3 * r + c,
    "blip-captioning": lambda r, c: 1 + 3 * r + c,
    "llava-next": lambda r, c: 9 + 5 * r + c,  # behind the whole picture; each line has an end
    "gemma3": lambda r, c: 2 * r + c,
    "paligemma2": lambda r, c: 3 * r + c,
    "mllama": lambda r, c: 5 * (2 * (r // 2) + c // 2) + 1 + 2 * (r % 2) + c % 2,  # tiles with a class token
}
"""Which feature of the picture is of a cell."""
SAME = {"rtol": 1e-9, "atol": 1e-9}


def prompt_of(name):
    return PROMPTS.get(name, "this is a")


@cache
def found_in(name):
    return explain(made(name), example().clean_image, prompt_of(name), length=3)


def blurred(picture):
    return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 8))


def hooked(model, inputs, change=None):
    """A plain forward of Hugging Face's model: the logits at all positions, and what is read of the picture,
    `(features, width)`, which `change` may give anew."""
    hf, seen, logits = model.hf, [], []

    def changed(x):
        seen.append(x.reshape(-1, x.shape[-1]).clone())
        return x if change is None else change(seen[-1].clone()).reshape(x.shape)

    def given(m, args, kwargs):
        own = kwargs["inputs_embeds"].clone()
        own[0, image] = changed(own[0, image])
        return args, {**kwargs, "inputs_embeds": own}

    if hasattr(hf, "vision_model"):
        held = [
            hf.vision_model.post_layernorm.register_forward_hook(
                lambda m, a, out: changed(out) if out.ndim == 3 else None
            )
        ]
    elif model.family.name == "Mllama":
        held = [hf.model.multi_modal_projector.register_forward_hook(lambda m, a, out: changed(out))]
    else:
        image = inputs.tensors["input_ids"][0] == hf.config.image_token_id
        held = [hf.get_decoder().register_forward_pre_hook(given, with_kwargs=True)]
    top = getattr(hf, "text_decoder", hf)
    held.append(top.register_forward_hook(lambda m, a, out: logits.append(out.logits)))
    try:
        with torch.no_grad():
            hf(**inputs.tensors)
    finally:
        for handle in held:
            handle.remove()
    return logits[-1][0], seen[0]


class Told:
    """An answer by hand: its tokens, and those of each word."""

    def __init__(self, name, picture=None, found=None):
        self.model, self.found = made(name), found_in(name) if found is None else found
        self.picture = picture or example().clean_image
        self.ids = generate(self.model, self.model.inputs(self.picture, prompt_of(name)), most=3).tolist()
        decode = self.model.processor.tokenizer.decode
        spoken = [
            n for n, i in enumerate(self.ids) if re.search(r"\w", decode([i], skip_special_tokens=True))
        ]
        self.words = []
        for text, many in self.found.words[["text", "tokens"]].to_numpy():
            self.words.append([spoken.pop(0) for _ in range(many)])
            said = decode([self.ids[n] for n in self.words[-1]], skip_special_tokens=True)
            assert re.findall(r"\w+", said)[0] == text
        self.name = name

    def inputs(self, picture, behind=-1):
        return self.model.inputs(picture, prompt_of(self.name), (), self.ids[:behind])

    def logprob(self, logits):
        """Of each word."""
        many = len(self.ids)
        each = logits[-many:].log_softmax(-1)[range(many), self.ids]
        return np.array([float(each[numbers].sum()) for numbers in self.words])


# --- the maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
def test_exact_maps(name):
    """One plain forward a cell, its feature replaced by a hook."""
    told = Told(name)
    inputs = told.inputs(told.picture)
    plain, own = hooked(told.model, inputs)
    other_logits, other = hooked(told.model, told.inputs(blurred(told.picture)))
    base = told.logprob(plain)
    np.testing.assert_allclose(told.found.words["logprob"], base, **SAME)
    np.testing.assert_allclose(told.found.words["without"], told.logprob(other_logits), **SAME)
    rows, columns = told.found.about["grid"]
    cells = told.found.cells
    assert len(cells) == rows * columns * len(base) and told.found.about["alone"] == rows * columns
    assert (own != other).any(-1).sum() >= rows * columns and cells["exact"].abs().max() > 1e-3
    for (row, column), each in cells.groupby(["row", "column"]):
        at = FEATURES[name](row, column)

        def put(x, at=at):
            x[at] = other[at]
            return x

        lost = base - told.logprob(hooked(told.model, inputs, put)[0])
        np.testing.assert_allclose(each["exact"], lost, **SAME, err_msg=f"{row}, {column}")


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("llava", "noise"),
        ("llava", "denoise"),
        ("blip-vqa", "noise"),
        ("paligemma2", "noise"),
        ("blip2-opt", "noise"),
    ],
)
def test_maps_of_pixels(name, direction):
    """One plain forward a cell, with its pixels in the place of the other picture's."""
    own = explain(
        made(name), example().clean_image, prompt_of(name), at="pixels", direction=direction, length=3
    )
    told = Told(name, found=own)
    clean, other = told.inputs(told.picture), told.inputs(blurred(told.picture))
    base, source = (clean, other) if direction == "noise" else (other, clean)
    size = told.model.hf.config.vision_config.patch_size
    rows, columns = own.about["grid"]
    assert own.cells["exact"].abs().max() > 1e-3 and own.about["alone"] == rows * columns
    assert len(own.cells) == rows * columns * len(own.words)
    top = getattr(told.model.hf, "text_decoder", told.model.hf)

    def logprob(pixels):
        logits = []
        held = top.register_forward_hook(lambda m, a, out: logits.append(out.logits))
        with torch.no_grad():
            told.model.hf(**{**base.tensors, "pixel_values": pixels})
        held.remove()
        return told.logprob(logits[-1][0])

    before = logprob(base.tensors["pixel_values"])
    for (row, column), each in own.cells.groupby(["row", "column"]):
        pixels = base.tensors["pixel_values"].clone()
        at = (..., slice(row * size, row * size + size), slice(column * size, column * size + size))
        pixels[at] = source.tensors["pixel_values"][at]
        lost = (before - logprob(pixels)) * (1 if direction == "noise" else -1)
        np.testing.assert_allclose(each["exact"], lost, **SAME, err_msg=f"{row}, {column}")
    assert own.cells["gradient"].notna().all()
    assert own.cells["knockout"].notna().all() == (name != "blip2-opt")
    assert bool(own.about["lacking"]) == (name in ("blip2-opt", "blip-vqa"))


@pytest.mark.parametrize("name", ["llava", "blip-vqa"])
def test_what_is_enough(name):
    """The features of a cell in the run on the picture of the mean color; and of a region, all its cells."""
    picture = example().clean_image.resize((24, 24))
    mean = Image.new(
        "RGB", picture.size, tuple(np.asarray(picture).reshape(-1, 3).mean(0).round().astype(int))
    )
    options = {"reference": "mean", "direction": "denoise", "region": (0, 0, 16.5, 9), "length": 3}
    found = explain(made(name), picture, prompt_of(name), **options)
    told = Told(name, picture, found)
    _, own = hooked(told.model, told.inputs(picture))
    plain, _ = hooked(told.model, told.inputs(mean))

    def gained(cells):
        def put(x):
            for cell in cells:
                x[FEATURES[name](*cell)] = own[FEATURES[name](*cell)]
            return x

        return told.logprob(hooked(told.model, told.inputs(mean), put)[0]) - told.logprob(plain)

    for cell in ((0, 0), (2, 1)):
        each = found.cells[(found.cells["row"] == cell[0]) & (found.cells["column"] == cell[1])]
        np.testing.assert_allclose(each["exact"], gained([cell]), **SAME)
    np.testing.assert_allclose(found.words["region"], gained([(0, 0), (0, 1)]), **SAME)


@pytest.mark.parametrize("name", ["llava", "blip-vqa", "blip-captioning", "gemma3", "mllama"])
def test_knock_outs(name):
    """Cells in all layers, all of the picture in a layer and in a head, by attention of the tests' own."""
    told = Told(name)
    number = next(n for n, some in enumerate(told.words) if len(some) == 1)
    (at,) = told.words[number]
    inputs = told.inputs(told.picture, at)
    tower, kind = told.found.about["edge"].split("@")[0].split(".*.")
    modules, reads = paths(told.model, tower, kind), inputs.layout[told.model.attended(tower, kind)]
    many = len(inputs.layout[tower].tokens)
    targets = [many - 1] if tower == "decoder" else list(range(many))
    every = list(range(len(reads.tokens))) if kind == "cross" else reads.image
    layers = told.model.shapes[tower].having(kind)

    def lost(some, sources, heads=()):
        keys = keys_of(reads, kind, sources)
        logprob = []
        for positions in ([], keys):
            with by_hand(told.model, [Cut(modules[n], targets, positions, heads, "block") for n in some]):
                logprob.append(logits_of(told.model, inputs).log_softmax(-1)[told.ids[at]])
        return float(logprob[0] - logprob[1])

    def own(table):
        return table[table["word"] == number]

    cells = own(told.found.cells).set_index(["row", "column"])["knockout"]
    for cell in ((0, 0), (1, 1)):
        position = next(n for n, there in reads.cells.items() if there == cell)
        np.testing.assert_allclose(cells[cell], lost(layers, [position]), **SAME)
    assert cells.abs().max() > 1e-4 and told.found.about["window"] == 1
    row = own(told.found.layers).iloc[-1]
    np.testing.assert_allclose(row["knockout"], lost([row["layer"]], every), **SAME)
    row = own(told.found.heads).iloc[1]
    np.testing.assert_allclose(row["knockout"], lost([row["layer"]], every, (row["head"],)), **SAME)


@pytest.mark.parametrize(("name", "small", "close"), [("llava", 1e-3, 2e-3), ("blip-captioning", 1e-5, 1e-7)])
def test_the_gradients_estimate(name, small, close):
    """What a small part of the difference does, so many times over; LLaMA's norms round to float32."""
    told = Told(name)
    inputs = told.inputs(told.picture)
    _, other = hooked(told.model, told.inputs(blurred(told.picture)))

    def with_part(at, part):
        def put(x):
            x[at] += part * (other[at] - x[at])
            return x

        return told.logprob(hooked(told.model, inputs, put)[0])

    for cell in ((0, 1), (2, 2)):
        at, cells = FEATURES[name](*cell), told.found.cells
        lost = (with_part(at, -small) - with_part(at, small)) / (2 * small)
        each = cells[(cells["row"] == cell[0]) & (cells["column"] == cell[1])]
        np.testing.assert_allclose(each["gradient"], lost, rtol=close, atol=close)
        assert np.abs(lost).max() > 0.03


def test_attention_without_sinks(monkeypatch):
    """A mean over layers and heads of what is paid; with a lower threshold some cells are sinks."""
    told = Told("llava")
    modules = paths(told.model, "decoder", "attn")
    cuts = [Cut(module, [], [], (), "block") for module in modules]
    inputs = told.inputs(told.picture)
    with by_hand(told.model, cuts):
        logits_of(told.model, inputs)
    paid = torch.stack([cut.paid[0] for cut in cuts]).mean((0, 1))[-len(told.ids) :].numpy()
    image = list(inputs.layout["decoder"].image)

    def own(found, n):
        return found.cells.loc[found.cells["word"] == n, "attention"].to_numpy()

    for n, (number,) in enumerate(told.words):
        np.testing.assert_allclose(own(told.found, n), paid[number][image], rtol=1e-5)
    assert (told.found.words["sinks"] == 0).all()
    monkeypatch.setattr("vlmscope.runs.sinks.TAU", 1.6)
    with_sinks = explain(told.model, told.picture, prompt_of("llava"), length=3)
    for n, (number,) in enumerate(told.words):
        away = own(with_sinks, n) == 0
        assert 0 < away.sum() < 9
        np.testing.assert_allclose(own(with_sinks, n)[~away], paid[number][image][~away], rtol=1e-5)
        np.testing.assert_allclose(with_sinks.words["sinks"][n], paid[number][image][away].sum(), rtol=1e-5)


def test_what_heads_write_and_neurons():
    """As in a run that ends with the word's prediction; neurons as `neurons find` has them."""
    told = Told("llava")
    heads, layers = told.found.heads, 3
    for n, (number,) in enumerate(told.words):
        inputs = told.inputs(told.picture, number)
        sites = [Site("decoder", k, "attn", "h", (3,), "last", source="image") for k in range(layers)]
        one = direct(told.model, inputs, told.ids[number], None, sites)
        image = inputs.layout["decoder"].image
        rows = heads[(heads["word"] == n) & (heads["head"] == 3)]
        np.testing.assert_allclose(rows["direct"], [one.effect(s, image) for s in sites], **SAME)
    caption = generate_caption(told.model, told.model.inputs(told.picture, "this is a"), length=3)
    wanted = score(told.model, caption, [told.found.words["text"][0]], top=10)
    wanted = wanted[wanted["position"] == wanted["position"].min()]
    own = told.found.neurons[told.found.neurons["word"] == 0]
    assert own["neuron"].tolist() == wanted["neuron"].tolist()
    np.testing.assert_allclose(own["score"], wanted["score"], rtol=1e-6)


def test_rank_correlations():
    found = found_in("llava")
    for word, cells in found.cells.groupby("word"):
        for name in METHODS:
            ranks = cells[["exact", name]].rank().to_numpy()
            wanted = np.corrcoef(ranks.T)[0, 1]
            assert found.words[f"spearman_{name}"][word] == pytest.approx(wanted)
    # With one cell there is nothing to rank.
    flat = explain(llava(size=4), Image.new("RGB", (4, 4)), "this is a", length=2)
    assert flat.words["spearman_gradient"].isna().all()


# --- coarse to fine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (24, 24), (1, 7), (13, 5)])
def test_units_are_a_partition(rows, columns):
    units = maps.start(rows, columns, 12)
    while any(not unit.is_cell for unit in units):
        taken = np.zeros((rows, columns), int)
        for unit in units:
            taken[unit.row : unit.row + unit.rows, unit.column : unit.column + unit.columns] += 1
        assert (taken == 1).all()
        units = [part for unit in units for part in (unit.split() if not unit.is_cell else [unit])]
    assert len(units) == rows * columns


def test_groups_that_matter_are_split():
    """The smallest set that makes up all but 5 % of each word's effects, the strongest first; what cancels in
    a group is as much as its cells are expected to do."""
    units = [maps.Unit(0, 0, 2, 2), maps.Unit(0, 2, 2, 2), maps.Unit(2, 0, 2, 2), maps.Unit(2, 2, 1, 1)]
    effects = np.array([[10.0, 0.0], [-9.0, 0.01], [0.4, 3.0], [100.0, 0.0]])

    def split(effects, patches, rounding=0.0, hints=0.0):
        sizes = maps.sizes_of(units, effects, rounding, np.full(effects.shape, hints))
        return maps.chosen(units, maps.shares_of(sizes), patches)

    assert split(effects, 100) == [2, 0, 1]
    assert split(effects, 8) == [2, 0] and split(effects, 3) == []
    assert split(effects, 100, rounding=5.0) == [0, 1], "the second word has nothing but rounding"
    assert split(effects[:, :1] * [[1], [1], [1], [100]], 100) == []
    assert split(np.zeros((4, 1)), 100) == []
    assert split(effects[:, :1] * [[1], [1], [1], [0]], 100) == [0, 1]
    assert split(effects[:, :1] * [[1], [1], [1], [0]], 100, hints=9.5) == [0, 1, 2]
    assert split(np.array([[0.0], [0.0], [0.0], [9.0]]), 100, hints=4.0) == [0, 1, 2], "cells are known"


@pytest.fixture(scope="module")
def toy():
    return vlmscope.load("toy-llava", dtype="float64", device="cpu")


def scene():
    """A red star on white ground, in the lower right corner."""
    picture = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(picture).ellipse((52, 52, 90, 90), "red")
    return picture


@pytest.fixture(scope="module")
def whole(toy):
    return explain(toy, scene(), "describe this picture.", reference="mean", direction="denoise")


def test_coarse_to_fine_finds_the_same_cells(toy, whole):
    asked = (toy, scene(), "describe this picture.")
    some = explain(*asked, reference="mean", direction="denoise", patches=28)
    assert some.about["answer"] == whole.about["answer"] and whole.about["patches"] == 36
    assert some.about["patches"] <= 28 and some.about["alone"] < 36
    alone = some.cells[(some.cells["rows"] == 1) & (some.cells["columns"] == 1)]
    both = alone.merge(whole.cells, on=["word", "row", "column"], suffixes=("", "_whole"))
    assert len(both) == some.about["alone"] * len(some.words)
    np.testing.assert_allclose(both["exact"], both["exact_whole"], rtol=1e-9, atol=1e-12)
    sizes = some.cells["rows"] * some.cells["columns"]
    assert (sizes.groupby(some.cells["word"]).sum() == 36).all()
    word = whole.words["word"][whole.words["text"] == "red"].item()
    best = [
        t[t["word"] == word].nlargest(1, "exact")[["row", "column"]].to_numpy().tolist()
        for t in (alone, whole.cells)
    ]
    assert best[0] == best[1] and min(best[0][0]) >= 3, "and it is where the object is"
    own = some.cells[some.cells["word"] == word]
    inside = (own["rows"] * own["columns"] > 1).to_numpy()
    known = whole.cells[whole.cells["word"] == word].set_index(["row", "column"])["gradient"].abs()
    sizes = [
        max(abs(u.exact), known.loc[u.row : u.row + u.rows - 1, u.column : u.column + u.columns - 1].sum())
        if u.rows * u.columns > 1
        else abs(u.exact)
        for u in own.itertuples()
    ]
    left = np.array(sizes)[inside].sum() / sum(sizes)
    assert some.words["left"][word] == pytest.approx(left) and whole.words["left"].eq(0).all()
    text = some.page()
    assert f"{some.about['alone']} of 36 cells were examined one by one" in text
    assert f"{left:.1%} of the effects" in " ".join(text.split())


# --- the page -------------------------------------------------------------------------------------------


def data_of(page):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )


def test_what_the_page_shows_is_what_the_tables_hold(whole):
    page = whole.page()
    data, words = data_of(page), whole.words
    assert data["words"] == words["text"].tolist() and data["grid"] == [6, 6]
    for name in ("exact", *METHODS):
        for n in words["word"]:
            own = whole.cells[whole.cells["word"] == n]
            np.testing.assert_allclose(data["maps"][name][n], own[name], rtol=6e-4)
            assert data["units"] == own[["row", "column", "rows", "columns"]].to_numpy().tolist()
    assert len(page) < 3e6 and "http" not in page.replace("http-equiv", "")
    text = re.sub(r"\s+", " ", page)
    for row in words.itertuples():
        assert f"“{row.text}” is said with P = " in text
        for name in METHODS:
            rank = getattr(row, f"spearman_{name}")
            assert f"<b>{rank:.2f}</b>".replace("-", "−") in text
    sections = re.findall(r'<section data-word="\d">.*?</section>', page, re.DOTALL)
    for n, section in enumerate(sections):
        numbers = re.findall(r'<td class="n">([^<]*)</td>', section)
        layers, heads, neurons = (t[t["word"] == n] for t in (whole.layers, whole.heads, whole.neurons))
        heads = heads.loc[heads["knockout"].abs().sort_values(ascending=False, kind="stable").index[:8]]
        shown = [
            *layers["knockout"],
            *heads[["knockout", "direct"]].to_numpy().ravel(),
            *neurons["score"][:8],
        ]
        assert numbers == [f"{value:.3g}" for value in shown]
    assert len(sections) == len(words)


PAYLOAD = "</script><img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"


def dom(page: Path, word: str = "") -> str:
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    address = f"{page.as_uri()}{word}"
    return subprocess.run(
        [*command, profile, "--dump-dom", address], capture_output=True, timeout=120
    ).stdout.decode()


def test_the_page_in_a_browser(whole, tmp_path):
    """A word is shown whose number the address has; nothing that data says becomes markup."""
    page = tmp_path / "page.html"
    texts = whole.words.assign(text=[PAYLOAD, *whole.words["text"][1:]])
    about = {
        **whole.about,
        "model": PAYLOAD,
        "prompt": PAYLOAD,
        "answer": f"{whole.about['answer']} {PAYLOAD}",
    }
    poisoned = type(whole)(
        about,
        texts,
        whole.cells,
        whole.layers,
        whole.heads,
        whole.neurons.assign(tokens=PAYLOAD),
        whole.picture,
    )
    page.write_text(poisoned.page(), "utf-8")
    assert page.read_text("utf-8").count("<script") == 2 and "<img src=x" not in page.read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.read_text("utf-8"))
    assert (
        policy
        and "unsafe" not in policy[1]
        and "default-src &#39;none&#39;" in policy[1].replace("'", "&#39;")
    )
    if BROWSER is None:
        pytest.skip("no Chromium")
    shown = dom(page, "#word-2")
    assert "<title>Where each word comes from</title>" in shown and shown.count("<script") == 2
    assert (
        re.findall(r'data-word="\d" aria-pressed="(\w+)"', shown)
        == ["false", "false", "true", "false"][: len(texts)]
    )
    assert re.search(r'<section data-word="2">', shown) and re.search(r'<section data-word="1" hidden', shown)
    own = whole.cells.loc[whole.cells["word"] == 2, "exact"].abs().max()
    high = re.search(r'id="high">([^<]*)<', shown)
    assert high and float(high[1].replace("−", "-")) == pytest.approx(own, rel=6e-3), (
        "the script has run, under the policy"
    )


def test_it_is_saved_and_read(whole, tmp_path):
    whole.save(tmp_path / "found")
    again = vlmscope.open(tmp_path / "found")
    for name, table in whole.tables.items():
        pd.testing.assert_frame_equal(getattr(again, name), table, check_dtype=False)
    assert again.about == dict(whole.about) and again.picture.size == (96, 96)
    assert (tmp_path / "found" / "explain.html").read_text("utf-8") == again.page() == whole.page()
    (tmp_path / "found" / "words.csv").write_text("word\n0\n")
    with pytest.raises(StoreError, match="words.csv: is damaged"):
        vlmscope.open(tmp_path / "found")


def test_a_report_of_it(whole, tmp_path):
    whole.save(tmp_path / "found")
    page = vlmscope.write_report(tmp_path / "found", tmp_path / "report.html").read_text("utf-8")
    (beside,) = (tmp_path / "report-figures").glob("*.csv")
    pd.testing.assert_frame_equal(pd.read_csv(beside), whole.cells, check_dtype=False)
    for _, word in whole.words.iterrows():
        own = whole.cells[whole.cells["word"] == word["word"]]
        for sentence in sentences(whole.about, word, own):
            assert sentence in page
    best = whole.cells.loc[whole.cells["exact"].abs().idxmax()]
    text = " ".join(page.split())
    assert f"of the cell at row {best['row']:.0f}, column {best['column']:.0f}." in text
    assert "has the maps of each word" in text and "network" not in page


def test_a_report_of_a_picture_without_a_grid(tmp_path):
    explain(made("blip2-opt"), example().clean_image, "this is a", length=3).save(tmp_path / "found")
    page = vlmscope.write_report([tmp_path / "found"], tmp_path / "report.html").read_text("utf-8")
    assert "There is no map: BLIP-2 reads the picture as 5 features" in page and "<figure>" not in page


def test_groups_of_cells_are_drawn_whole():
    rows = [(0, 0, 0, 2, 2, 1.0), (0, 0, 2, 1, 1, -2.0), (0, 1, 2, 1, 1, 0.5), (0, 2, 0, 1, 3, 0.0)]
    cells = pd.DataFrame(rows, columns=["word", "row", "column", "rows", "columns", "exact"])
    drawn = word_maps(cells, Image.new("RGB", (9, 9)), (3, 3), {0: "a word"})
    over = np.asarray(drawn.get_images()[-1].get_array())
    strength = np.array([[0.5, 0.5, 1], [0.5, 0.5, 0.25], [0, 0, 0]])
    np.testing.assert_allclose(over[..., 3], 0.1 + 0.8 * strength)
    assert (over[0, 0, 0] > over[0, 0, 2]) and (over[0, 2, 2] > over[0, 2, 0]), "red, and blue"
    pale = word_maps(cells, Image.new("RGB", (9, 9)), (3, 3), {0: "a word"}, 8.0).get_images()[-1]
    np.testing.assert_allclose(np.asarray(pale.get_array())[..., 3], 0.1 + 0.2 * strength)


def test_all_folders_have_a_report():
    told = {f"{what}.json" for what in SECTIONS} | {"run.json", "notice.toml"}
    assert set(READERS) == told


# --- what is asked, what is refused ---------------------------------------------------------------------


def test_a_picture_without_a_grid():
    found = explain(made("blip2-opt"), example().clean_image, "this is a", length=3)
    assert found.cells.empty and len(found.layers) and found.heads["direct"].notna().all()
    (why,) = found.about["lacking"]
    assert why == "there is no map: BLIP-2 reads the picture as 5 features that have no place in it"
    assert why[1:] in found.page() and "canvas data-map" not in found.page()
    with pytest.raises(ExampleError, match="that have no place in it, so that no region can be asked about"):
        explain(made("blip2-opt"), example().clean_image, "this is a", region=(0, 0, 4, 4), length=3)
    silent = explain(made("mplug-owl2"), example().clean_image, "what color is the star ?", length=3)
    assert silent.layers.empty and silent.heads.empty and len(silent.neurons)
    assert any("do not show what the attn heads" in why for why in silent.about["lacking"]) and silent.page()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"words": ["zebra"]}, "the word 'zebra' was not said; name one of 'user"),
        ({"region": (0, 0, 13, 5)}, "the region 0,0,13,5 is not within the picture of 12 x 12 pixels"),
        ({"region": (5, 5, 5, 9)}, "the region 5,5,5,9 is not within the picture"),
        ({"region": (0, 0, 5)}, "the region has 3 numbers; expected left, top, right, bottom"),
        ({"region": (0, 0, "x", 5)}, "an edge of the region is 'x'; expected a number"),
        ({"region": (0, 0, float("nan"), 5)}, "an edge of the region is 'nan'"),
        ({"reference": "noise"}, "unknown reference 'noise'; expected blur or mean"),
        ({"at": "edges"}, "unknown place of cells 'edges'; expected features or pixels"),
        ({"direction": "up"}, "unknown direction 'up'; expected noise or denoise"),
        ({"patches": 0}, "the number of patches is '0'; expected a whole number"),
        ({"length": 0}, "the number of tokens is '0'"),
    ],
)
def test_wrong_questions(options, words):
    with pytest.raises(VlmscopeError, match=re.escape(words)):
        explain(made("llava"), example().clean_image, "this is a", **{"length": 3, **options})


def test_words_are_chosen():
    every = found_in("llava")
    last = every.words["text"].iloc[-1]
    found = explain(made("llava"), example().clean_image, "this is a", [last.upper()], length=3)
    assert set(found.words["text"]) == {last}
    own = every.words[every.words["text"] == last]
    np.testing.assert_allclose(found.words["logprob"], own["logprob"], rtol=1e-9)
    wanted = every.cells[every.cells["word"].isin(own["word"])]
    np.testing.assert_allclose(found.cells["exact"], wanted["exact"], **SAME)
    np.testing.assert_allclose(found.cells["knockout"], wanted["knockout"], **SAME)
    with pytest.raises(ExampleError, match="has no word to explain; ask something else"):
        explain(made("paligemma2"), example().clean_image, "what color is the star ?", length=3)


def test_the_command(run, tmp_path):  # noqa: F811
    assert inspect.signature(command).parameters["patches"].default == PATCHES
    scene().save(tmp_path / "a.png")
    asked = [
        "explain",
        "--model",
        "toy-llava",
        "--image",
        tmp_path / "a.png",
        "--prompt",
        "describe this picture.",
    ]
    out = tmp_path / "new" / "page.html"
    status, text, err = run(*asked, "--word", "red", "--region", "48,48,96,96", "--patches", 24, "--out", out)
    assert status == 0, err
    assert "“red” is said with P = " in text and "of the region: " in text and "cells one by one" in text
    assert "Where does each word come from?" in out.read_text("utf-8")
    assert run(*asked, "--word", "red", "--out", out)[0] == 0, "its own page is replaced"
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    refused(run(*asked, "--out", mine), "is there, and no page of vlmscope explain")
    refused(run(*asked, "--word", "zebra", "--out", out), "the word 'zebra' was not said; name one of 'a")
    refused(run(*asked, "--region", "0,0,900,9", "--out", out), "is not within the picture of 96 x 96 pixels")
    refused(run(*asked, "--region", "0,0,9", "--out", out), "the region has 3 numbers")
    # Before the model is looked at:
    asked[2] = "nothing"
    refused(run(*asked, "--out", tmp_path / "page.txt"), "expected a file that ends in .html")
    refused(run(*asked, "--out", tmp_path / "a.png" / "page.html"), "cannot be written")
    asked[4] = tmp_path / "none.png"
    refused(run(*asked, "--out", out), "none.png: no such file")
    asked[4] = mine
    refused(run(*asked, "--out", out), "mine.html: not an image")


@pytest.mark.parametrize(
    ("without", "reference", "said"),
    [
        (-1e-4, "blur", "is in the picture blurred, too, or not in the picture at all (--reference mean"),
        (-1e-4, "mean", "is in the picture in its mean color alone, too, or not in the picture at all."),
        (0.0, "blur", "What the picture blurred lacks speaks against it."),
    ],
)
def test_a_word_that_no_cell_and_no_picture_takes_away(without, reference, said):
    """A yellow cross is yellow when it is blurred: that says nothing of where the word comes from."""
    word = pd.Series({"text": "yellow", "logprob": -1e-4 if without else -0.5, "without": without})
    cells = pd.DataFrame([{"exact": 0.0, "row": 0, "column": 0, "rows": 1, "columns": 1}])
    about = {"direction": "noise", "reference": reference, "rounding": 1e-4}
    assert said in [*sentences(about, word, cells)][-1]

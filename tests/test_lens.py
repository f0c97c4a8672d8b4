"""The logit lens: exact in every family against a plain hook, its null, its folder, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from models import blip, example, llava
from test_families import FAMILIES, MADE, made

import vlmscope
from vlmscope.errors import DataError, ExampleError, SiteError, StoreError, VlmscopeError
from vlmscope.report import write_report
from vlmscope.runs import lens as reading
from vlmscope.studies.lens import LENS, WORDS, Vocabulary, lens


def tensor(out):
    return out[0] if isinstance(out, tuple) else out


def hooked(model, inputs, last=None):
    """By plain hooks: every block's output, and the logits at all positions; `last(x)` may give another
    output of the last block."""
    blocks, seen, logits = model.blocks("decoder"), {}, []
    held = [
        block.register_forward_hook(lambda m, args, out, n=n: seen.update({n: tensor(out).clone()}))
        for n, block in enumerate(blocks)
    ]
    if last is not None:
        held.append(
            blocks[-1].register_forward_hook(
                lambda m, args, out: (last(out[0]), *out[1:]) if isinstance(out, tuple) else last(out)
            )
        )
    if hasattr(model.hf, "text_decoder"):  # BLIP-VQA gives no logits
        held.append(model.hf.text_decoder.register_forward_hook(lambda m, a, out: logits.append(out.logits)))
    else:
        held.append(model.hf.register_forward_hook(lambda m, a, out: logits.append(out.logits)))
    try:
        with torch.no_grad():
            model.hf(**inputs.tensors)
    finally:
        for handle in held:
            handle.remove()
    return seen, logits[-1][0]


@pytest.mark.parametrize("name", MADE)
def test_what_states_say(name):
    """As the model says it where its last block gives that state; the last layer says what the model says."""
    model, one = made(name), replace(example(), corrupt_prompt=None)
    found = lens(model, one, "decoder.*.resid@*", ["green"], top=3)
    inputs = model.prepare(replace(one, corrupt_image=None)).clean
    seen, plain = hooked(model, inputs)
    layers, many = model.shapes["decoder"].layers, len(inputs.layout["decoder"].tokens)
    assert len(found.lens) == 3 * layers * many
    for layer in range(layers):
        _, wanted = hooked(model, inputs, lambda x, n=layer: seen[n])
        rows = found.lens[found.lens["layer"] == layer]
        tops = wanted.topk(3)
        ids = torch.tensor(rows["token_id"].to_numpy()).view(many, 3)
        torch.testing.assert_close(ids, tops.indices)
        for column, values in (("logit", tops.values), ("p", wanted.softmax(-1).topk(3).values)):
            own = torch.tensor(rows[column].to_numpy()).view(many, 3)
            torch.testing.assert_close(own, values, rtol=1e-9, atol=1e-11)
        for word, rows in found.words[found.words["layer"] == layer].groupby("word"):
            token = rows["token_id"].iloc[0]
            logits = torch.tensor(rows["logit"].to_numpy())
            torch.testing.assert_close(logits, wanted[:, token], rtol=1e-9, atol=1e-11, msg=str(word))
            ranks = 1 + (wanted > wanted[:, token, None]).sum(-1)
            assert rows["rank"].tolist() == ranks.tolist()
    last = found.lens[(found.lens["layer"] == layers - 1) & (found.lens["slot"] == "readout")]
    own = model.run(inputs).topk(3)
    assert last["token_id"].tolist() == own.indices.tolist()
    np.testing.assert_allclose(last["logit"], own.values.numpy(), rtol=1e-12)
    if layers > 1 and not model.family.name.startswith("BLIP"):
        assert not torch.allclose(hooked(model, inputs, lambda x: seen[0])[1][-1], plain[-1]), "it counts"


def test_a_normed_state_is_not_normed_twice():
    """What transformers calls its last hidden state is behind the final norm."""
    model = llava()
    inputs = model.prepare(replace(example(), corrupt_prompt=None)).clean
    found = lens(model, example(), "decoder.2.resid@readout", top=1).lens
    with torch.no_grad():
        hidden = model.hf(**inputs.tensors, output_hidden_states=True).hidden_states[-1]
        logits = model.hf.lm_head(hidden)[0, -1]
    assert found["logit"].item() == pytest.approx(float(logits.max()), rel=1e-12)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid"])
def test_states_within_blocks(kind):
    model = llava()
    inputs = model.prepare(replace(example(), corrupt_prompt=None)).clean
    site = f"decoder.1.{kind}@readout"
    state = model.capture(inputs, site)[site]
    with torch.no_grad():
        wanted = model.hf.lm_head(model.hf.model.language_model.norm(state)).max()
    assert lens(model, example(), site, top=1).lens["logit"].item() == pytest.approx(float(wanted), rel=1e-12)


def test_blocks_of_the_vocabulary_and_of_states_change_nothing(monkeypatch):
    model = llava()
    whole = lens(model, example(), "decoder.*.resid@*", top=4)
    monkeypatch.setattr(reading, "ROOM", 1)
    parts = lens(model, example(), "decoder.*.resid@*", top=4)
    pd.testing.assert_frame_equal(whole.lens, parts.lens, rtol=1e-12)
    pd.testing.assert_frame_equal(whole.words, parts.words, rtol=1e-12)


# --- the words that are asked about, and their null -----------------------------------------------------


def test_the_words_of_an_example():
    """Answer, foil and roles by themselves, given ones behind; each token once."""
    found = lens(llava(), example(), "decoder.2.resid@readout", ["star", "red"]).words
    asked = list(zip(found["word"], found["what"], strict=True))
    assert asked == [("red", "answer"), ("blue", "foil"), ("circle", "noun"), ("star", "given")]
    alone = replace(example(), answer="", foil="", roles={}, corrupt_prompt=None)
    assert lens(llava(), alone, "decoder.2.resid@readout").words.empty
    assert list(lens(llava(), alone, "decoder.2.resid@readout", "star").words["what"]) == ["given"]


def test_others_are_of_the_same_type_and_near():
    model = llava()
    vocabulary = Vocabulary(model)
    token = vocabulary.tokens.index("red")
    others = vocabulary.others(token, [vocabulary.tokens.index("blue")], 4)
    assert [vocabulary.tokens[n] for n in others] == ["star", "square", "green", "circle"]
    every = {vocabulary.tokens[n] for n in vocabulary.others(token, [])}
    assert not every & {"<s>", "<image>", "?", ".", ":", "red"} and {"circle", "happily"} <= every


def test_the_null_of_a_word_by_hand():
    model = llava()
    row = lens(model, example(), "decoder.2.resid@readout").words.set_index("word").loc["red"]
    logits = model.run(model.prepare(replace(example(), corrupt_prompt=None)).clean)
    vocabulary = Vocabulary(model)
    asked = [vocabulary.tokens.index(word) for word in ("red", "blue", "circle")]
    others = vocabulary.others(asked[0], asked)
    assert row["nulls"] == len(others)
    assert row["beaten"] == pytest.approx(float((logits[others] < logits[asked[0]]).double().mean()))
    assert row["null_p"] == pytest.approx(float(logits.softmax(-1)[others].median()), rel=1e-9)


@pytest.fixture(scope="module")
def toy():
    return vlmscope.load("toy-llava", device="cpu")


def test_words_that_nothing_is_known_of_beat_half_of_their_null(toy):
    """A random direction says no word: over many of them, each word beats half of its others."""
    vocabulary = Vocabulary(toy)
    inputs = toy.prepare(vlmscope.examples("states", limit=1)[0]).clean
    states = torch.randn(4000, 96, generator=torch.Generator().manual_seed(0))
    shares = []
    for token in (n for n, kind in enumerate(vocabulary._types) if kind):
        others = vocabulary.others(token, [])
        said = reading.words(toy, inputs, states[:, : toy.shapes["decoder"].width], 1, [token, *others])
        shares.append(float((said.logits[:, 1:] < said.logits[:, :1]).double().mean()))
    assert len(shares) > 30 and np.abs(np.subtract(shares, 0.5)).max() < 0.05


def test_the_answer_comes_up_at_the_read_out_position(toy):
    """The toy knows its task: behind the last block the answer beats its null."""
    found = lens(toy, vlmscope.examples("states", limit=12), "decoder.*.resid@readout").words
    answer = found[found["what"] == "answer"].groupby("layer")[["beaten", "p"]].mean()
    assert answer["beaten"].iloc[-1] > 0.95 and answer["p"].iloc[-1] > 0.8
    assert answer["p"].iloc[0] < 0.5


# --- the top words alone --------------------------------------------------------------------------------


def wide(name):
    """A model with so many words that a screen leaves most of them out."""
    model = {"llava": llava, **FAMILIES}[name]()
    torch.manual_seed(3)
    new = torch.nn.Linear(model.shapes["decoder"].width, 3000, bias=False, dtype=torch.float64)
    model.hf.set_submodule(model.family.head, new.eval())
    return model


def screened(model, states, top=5):
    """What states say by the screen, whatever this processor is good at, and by all words."""
    inputs = model.prepare(replace(example(), corrupt_prompt=None)).clean
    screen = reading.Screen.made(model.module(model.family.head))
    return reading.best_words(model, inputs, states, top, screen), reading.words(model, inputs, states, top)


def some_states(model, many=40):
    return torch.randn(many, model.shapes["decoder"].width, dtype=torch.float64) * 3


# soft caps, a scale before the head, a gate, and nothing at all
@pytest.mark.parametrize("name", ["llava", *sorted({"gemma3", "paligemma2", "blip2-t5", "mllama"} & {*MADE})])
def test_the_screen_finds_the_same_words(name, monkeypatch):
    model = wide(name)
    looked = []
    best = reading.Screen.best
    monkeypatch.setattr(reading.Screen, "best", lambda *given: looked.append(best(*given)) or looked[-1])
    found, wanted = screened(model, some_states(model))
    assert found.best.tolist() == wanted.best.tolist()
    torch.testing.assert_close(found.tops, wanted.tops, rtol=1e-12, atol=1e-12)
    assert found.total.isnan().all() and found.logits.shape == (40, 0)
    ((logits, _, sure),) = looked
    assert sure.all() and 5 <= logits.isfinite().sum(-1).double().mean() < 20, "others are left out"
    assert not model.module(model.family.head)._forward_hooks


@pytest.mark.parametrize("loses", ["head", "state"])
def test_rounding_does_not_hide_the_best(loses):
    """The best word's product is rounded down, those of 40 others up: the limits have to let it in."""
    down, up = 1 + 2**-8 - 2**-20, 1 + 2**-8 + 2**-20  # to 1, and to 1 + 2**-7
    state, best, other = torch.ones(3, 66, dtype=torch.float64)
    if loses == "head":
        best[:64], other[:64], other[65] = down, up, 0.875
        best[64] = other[64] = -64
    else:
        state[:32], state[32:64] = down, up
        best[32:64] = other[:32] = 0
        best[64] = other[64] = -32
        best[65], other[65] = 0, -0.0625
    assert state @ best > (state @ other)
    head = torch.nn.Linear(66, 3000, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(-best.abs())
        head.weight[7], head.weight[10:50] = best, other
    half = torch.nn.functional.linear(state.bfloat16(), head.weight.bfloat16())
    assert half.argmax() != 7
    with torch.no_grad():
        ((logits,), (ids,), (sure,)) = reading.Screen.made(head).best(state[None], 3)
    assert sure and ids[logits.argmax()] == 7
    assert float(logits.max()) == pytest.approx(float(state @ best))


def test_what_the_screen_cannot_tell_apart_is_looked_at_in_full(monkeypatch):
    """More words than it keeps have nearly one logit; and a state that is no number says so."""
    model = wide("llava")
    head = model.module("lm_head")
    with torch.no_grad():
        head.weight[:200] = head.weight[0] * (1 + torch.randperm(200)[:, None] * 1e-7)
    states = some_states(model, 4)
    states[0] = head.weight[0] * 50
    states[1, 0] = torch.inf
    found, wanted = screened(model, states, 3)
    assert found.best[[0, 2, 3]].tolist() == wanted.best[[0, 2, 3]].tolist()
    assert found.best[0].max() < 200 and found.tops[1].tolist() != found.tops[1].tolist()
    monkeypatch.setattr(reading, "words", lambda *given: pytest.fail("a guess is no proof"))
    with pytest.raises(pytest.fail.Exception, match="no proof"):
        screened(model, states[:1], 3)


@pytest.mark.parametrize("fast", [True, False])
def test_only_the_top_words(fast, tmp_path, monkeypatch):
    """The same table but for the probabilities, where the processor is fast in bfloat16 and where not."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    model, sites = llava(), ["decoder.*.resid@image*", "decoder.*.resid@readout"]
    whole, top = lens(model, example(), sites), lens(model, example(), sites, only_top=True)
    pd.testing.assert_frame_equal(top.lens.drop(columns="p"), whole.lens.drop(columns="p"), rtol=1e-12)
    assert top.lens["p"].isna().all() and top.words.empty and not whole.words.empty
    top.save(tmp_path / "top")
    pd.testing.assert_frame_equal(vlmscope.open(tmp_path / "top").lens, top.lens, check_dtype=False)
    page = write_report([tmp_path / "top"], tmp_path / "page.html").read_text()
    assert "The largest is that of" in page and "nan" not in page
    with pytest.raises(
        VlmscopeError, match="the rank of 'star' needs all words, only the top ones.*leave one out"
    ):
        lens(model, example(), sites, "star", only_top=True)


# --- its folder -----------------------------------------------------------------------------------------


def test_a_lens_is_saved_and_read(toy, tmp_path):
    found = lens(toy, vlmscope.examples("states", limit=2), "decoder.*.resid@image*", top=2)
    assert list(found.lens.columns) == LENS and list(found.words.columns) == WORDS
    found.save(tmp_path / "lens")
    again = vlmscope.open(tmp_path / "lens")
    pd.testing.assert_frame_equal(again.lens, found.lens, check_dtype=False)
    pd.testing.assert_frame_equal(again.words, found.words, check_dtype=False)
    assert again.about == dict(found.about) and list(again.pictures) == list(found.pictures)
    found.save(tmp_path / "lens")  # its own is replaced
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lens.parquet").write_text("mine")
    with pytest.raises(StoreError, match="lens.parquet: is there, and no result of this command"):
        found.claim(tmp_path / "other")


def test_the_report_of_a_lens(toy, tmp_path):
    """The words on the picture, and those that were asked about; without any, as of one picture, too."""
    one = vlmscope.examples("states", limit=1)[0]
    for name, answer in (("with", one.answer), ("without", "")):
        asked = replace(one, answer=answer, foil=answer and one.foil, roles={}, groups={})
        lens(toy, asked, ["decoder.*.resid@image*", "decoder.*.resid@readout"]).save(tmp_path / name)
        page = write_report([tmp_path / name], tmp_path / f"{name}.html").read_text()
        assert "What states say" in page and "The read-out position of the first example" in page
        drawn = {path.name for path in (tmp_path / f"{name}-figures").iterdir()}
        assert ("part0-asked.png" in drawn) == bool(answer)
        plate = pd.read_csv(tmp_path / f"{name}-figures" / "part0-words-0.csv")
        assert len(plate[plate["rank"] == 1]) == 4 * 36 and "The likeliest is" in page


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("vision.*.resid@image*", "BLIP-VQA has no way from its vision tower to words but through others"),
        ("encoder.*.resid@answer", "no way from its encoder tower to words.*such as decoder"),
        ("decoder.*.mlp@readout", "no state that could be read as a word; expected decoder, and a state of"),
        ("decoder.0.attn.h1@readout", "no state that could be read as a word"),
        ("decoder.*/3.resid@readout", "a lens reads one layer at a time"),
        ("decoder.0.resid@readout + decoder.1.resid@readout", "a lens reads one layer at a time"),
        ("decoder.7.resid@readout", "no layer 7"),
        ("decoder.0.resid@noun", "no position 'noun' in the decoder tower"),
    ],
)
def test_places_without_a_way_to_words(site, words):
    with pytest.raises(SiteError, match=words):
        lens(blip(), example(), site)


def test_wrong_words_and_numbers():
    model, site = llava(), "decoder.*.resid@readout"
    for top in (0, 1.5, 1001):
        with pytest.raises(VlmscopeError, match="the number of words is .*; expected a whole number"):
            lens(model, example(), site, top=top)
    with pytest.raises(ExampleError, match="the word 'zebra' is unknown to the model's tokenizer"):
        lens(model, example(), site, ["zebra"])
    with pytest.raises(DataError, match="none of 2 examples could be run: the word 'zebra'"):
        lens(model, [example(), example(id="two")], site, ["zebra"])
    with pytest.raises(DataError, match="no examples"):
        lens(model, [], site)
    broken = example(id="two", answer="zebra")
    with pytest.warns(UserWarning, match="1 of 2 examples were left out: the answer 'zebra'"):
        assert set(lens(model, [example(), broken], site).lens["example"]) == {"one"}

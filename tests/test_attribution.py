"""The table of `attribute`: sums, words, noise, folders that go on, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from models import blip, example, llava

import vlmscope
from vlmscope.errors import DataError, ExampleError, ModelError, SiteError, StoreError, VlmscopeError
from vlmscope.patching.gradients import estimate
from vlmscope.report import write_report
from vlmscope.report.figures import scores_and_effects
from vlmscope.runs import corrupt as corruptions
from vlmscope.studies import attribution
from vlmscope.studies.agreement import lines
from vlmscope.studies.attribution import attribute
from vlmscope.studies.run_folder import ATTRIBUTIONS

WRITERS = ["decoder.0.resid_pre@readout", "decoder.*.attn.h*@readout", "decoder.*.mlp@readout"]
EDGES = "decoder.*.attn.h*@readout<*"


def others(count):
    return [replace(example(), id=str(n)) for n in range(count)]


@pytest.mark.parametrize("corrupt", [None, "image", "text", "noise"])
def test_writers_and_biases_sum_to_the_logit_difference(corrupt):
    """Or to its change; OPT has biases behind its heads, and a final norm with one."""
    model = FAMILIES["blip2-opt"]()
    table = attribute(model, example(), WRITERS, corrupt)
    pairs = corruptions.pairs(model, example(), corruptions.parse(corrupt or "image"))
    wanted = 0.0
    for pair in pairs:
        for inputs, edits, sign in ((pair.clean, (), 1), (pair.corrupt, pair.edits, -1 if corrupt else 0)):
            logits = model.run(inputs, edits)
            wanted += sign * float(logits[pair.answer] - logits[pair.foil]) / len(pairs)
    assert table["score"].sum() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    biases = table[table["unit"] == "b"].set_index("site")["score"]
    assert set(biases.index) >= {"decoder.2.output.b@readout"}
    assert table.attrs["check"]["rows"] == 1 and table.attrs["check"]["largest"] < 1e-10
    assert table["exact"].isna().all()


def test_biases_behind_heads_are_rows_where_there_are_any():
    opt = FAMILIES["blip2-opt"]()
    for name, weight in opt.hf.language_model.named_parameters():
        if name.endswith(("out_proj.bias", "decoder.final_layer_norm.bias")):
            with torch.no_grad():
                weight.copy_(torch.linspace(-1, 1, len(weight)))
    table = attribute(opt, example(), WRITERS)
    assert (table.loc[table["unit"] == "b", "score"].abs() > 1e-3).all()
    biases = [f"decoder.{n}.attn.b@readout" for n in range(3)] + ["decoder.2.output.b@readout"]
    assert table.loc[table["unit"] == "b", "site"].tolist() == biases
    pair = opt.prepare(replace(example(), corrupt_prompt=None))
    logits = opt.run(pair.clean)
    assert table["score"].sum() == pytest.approx(float(logits[pair.answer] - logits[pair.foil]), rel=1e-9)


def test_a_word_in_the_place_of_the_logit_difference():
    model = llava()
    table = attribute(model, example(), WRITERS, word="green")
    pair = model.prepare(replace(example(), corrupt_prompt=None))
    token = model.processor.tokenizer.convert_tokens_to_ids("green")
    assert table["score"].sum() == pytest.approx(float(model.run(pair.clean)[token]), rel=1e-9)


def test_what_heads_read_has_the_place_that_is_read():
    """Over all sources a head's shares are the head; each row says which token of the prompt, or patch."""
    model = llava()
    table = attribute(model, example(), ["decoder.*.attn.h*@readout", EDGES, "decoder.2.attn@readout<image"])
    assert list(table.columns) == ATTRIBUTIONS.names
    edges = table[table["site"].str.contains("h") & table["site"].str.contains("<")]
    assert edges["site"].iloc[1] == "decoder.0.attn.h0@readout<1"
    layout = model.prepare(replace(example(), corrupt_prompt=None)).clean.layout["decoder"]
    some = edges[edges["site"].str.startswith("decoder.0.attn.h0")]
    assert some["token"].tolist() == list(layout.tokens)
    assert set(some["role"].dropna()) == {"answer", "foil", "noun"}
    assert some.loc[some["role"] == "answer", "slot"].tolist() == ["answer"]
    heads = table[(table["slot"] == "readout") & ~table["site"].str.contains("<") & (table["unit"] != "b")]
    sums = edges.groupby(["layer", "unit"])["score"].sum()
    for row in heads.itertuples():
        assert sums[row.layer, row.unit] == pytest.approx(row.score, rel=1e-9, abs=1e-9)
    (image,) = table[table["site"] == "decoder.2.attn@readout<image"]["score"]
    patches = edges[(edges["layer"] == 2) & edges["token"].str.contains(",")]
    assert image == pytest.approx(patches["score"].sum(), rel=1e-9)


def test_a_folder_goes_on_and_grows(tmp_path, monkeypatch):
    """As a sweep's: a stopped run, more examples and more sites; biases are there once."""
    model, given = FAMILIES["blip2-opt"](), others(3)
    whole = attribute(model, given, [*WRITERS, EDGES])
    done = 0
    work = attribution.written

    def stopped(*arguments):
        nonlocal done
        done += 1
        if done > 1:
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(attribution, "written", stopped)
    with pytest.raises(KeyboardInterrupt):
        attribute(model, given[:2], WRITERS, out=tmp_path / "run")
    monkeypatch.setattr(attribution, "written", work)
    assert len(vlmscope.open(tmp_path / "run").baselines()) == 1
    attribute(model, given[:2], WRITERS, out=tmp_path / "run")
    table = attribute(model, given, [*WRITERS, EDGES], out=tmp_path / "run")
    keys = ["example", "site"]
    both = (one.sort_values(keys, ignore_index=True) for one in (table, whole))
    pd.testing.assert_frame_equal(*both)
    run = vlmscope.open(tmp_path / "run")
    assert run.finished and run.patches() == len(whole) and run.check == whole.attrs["check"]
    assert "writers and biases sum to the model's own" in run.check_line()
    with pytest.raises(StoreError, match="holds another run: word is null there"):
        attribute(model, given, WRITERS, word="green", out=tmp_path / "run")
    with pytest.raises(StoreError, match="a run that holds attributions, no effects"):
        run.effects()


def test_the_report_of_a_run(tmp_path):
    toy, states = vlmscope.load("toy-llava", device="cpu"), vlmscope.examples("states", limit=2)
    sites = [*WRITERS, "decoder.*.attn.h*@readout<image*"]
    table = attribute(toy, states, sites, "image", out=tmp_path / "run", data="states")
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "Direct effects: states, image corrupted" in page
    assert "in the clean run less what it gives in the corrupt one" in page
    assert (tmp_path / "report-figures" / "run0-decoder-heads.png").exists()
    patches = pd.read_csv(tmp_path / "report-figures" / "run0-decoder-attn-image.csv")
    patches = patches.astype({"layer": "int32"})
    edges = table[table["site"].str.contains("<") & (table["example"] == states[0].id)]
    wanted = edges.groupby(["layer", "token"])["score"].sum()
    found = patches.set_index(["layer", "token"])["score"]
    pd.testing.assert_series_equal(found.sort_index(), wanted.sort_index(), rtol=1e-6)
    heads = vlmscope.head_table(table, value="score")
    row = table[(table["unit"] == "h2") & (table["layer"] == 1) & ~table["site"].str.contains("<")]
    assert heads.loc[1, 2] == pytest.approx(row["score"].mean())


def test_the_report_of_estimates(tmp_path):
    model, sites = llava(), [*SITES, "decoder.*.resid@image*"]
    table = attribute(model, others(2), sites, "image", method="atp", verify=4, out=tmp_path / "run")
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    for line in lines(table.attrs["agreement"]):
        assert line in page
    assert "Attribution patching: examples, image corrupted" in page
    rows = pd.read_csv(tmp_path / "report-figures" / "run0-exact.csv")
    known = table[table["exact"].notna()]
    np.testing.assert_allclose(rows[["score", "exact"]], known[["score", "exact"]], rtol=1e-12)
    found = table.attrs["agreement"]
    axes = scores_and_effects(known, found)
    assert [spot.get_title().split("\n")[0] for spot in axes] == list(found)
    for spot, kind in zip(axes, found, strict=True):
        assert spot.get_title().endswith(f"rank correlation {found[kind]['spearman']:.2f}")
        assert len(spot.collections[0].get_offsets()) == found[kind]["verified"]


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("decoder.*.mlp@*", "position 0 does not reach the logits directly.*expected readout"),
        ("decoder.*.resid@readout", "does not write to the stream of the decoder"),
        ("vision.*.attn.h*@all", "does not write to the stream of the decoder"),
        ("decoder.0.attn@readout<zebra", "no position 'zebra'"),
        ("decoder.0.attn@readout<image + decoder.1.attn@readout<image", "an edge in a sum"),
        ("decoder.9.mlp@readout", "no layer 9"),
    ],
)
def test_what_is_no_writer(site, words):
    with pytest.raises(SiteError, match=words):
        attribute(llava(), example(), site)


def test_what_cannot_be_attributed():
    model = llava()
    with pytest.raises(ModelError, match="BLIP-VQA are no sum of what its parts write"):
        attribute(blip(), example(), "decoder.*.mlp@readout")
    with pytest.raises(ModelError, match="do not tell what the attn heads"):
        attribute(FAMILIES["mplug-owl2"](), example(), "decoder.*.attn.h*@readout<*")
    with pytest.raises(VlmscopeError, match="unknown method 'eap'; expected direct, atp"):
        attribute(model, example(), WRITERS, method="eap")
    with pytest.raises(ExampleError, match="the word 'zebra' is unknown to the model's tokenizer"):
        attribute(model, example(), WRITERS, word="zebra")
    with pytest.raises(DataError, match="there are no examples"):
        attribute(model, [], WRITERS)
    with pytest.raises(VlmscopeError, match="the model is 'toy-llava'; expected a Model"):
        attribute("toy-llava", example(), WRITERS)
    alone = replace(example(), foil="", corrupt_prompt=None)
    with pytest.raises(DataError, match="the foil '' is empty"):
        attribute(model, alone, WRITERS)
    assert issubclass(ExampleError, DataError)


SITES = ["decoder.*.attn.h*@*", "decoder.*.resid@*", "vision.*.mlp.n*@all"]


def test_estimates_and_what_was_verified():
    """Of each kind the best and as many random ones; exact is what a patch of the site changes."""
    model = llava()
    for direction in ("denoise", "noise"):
        table = attribute(
            model, example(), SITES, "image", method="atp", direction=direction, verify=5, metric="p"
        )
        assert list(table.columns) == ATTRIBUTIONS.names
        swept = vlmscope.sweep(model, example(), SITES, "image", direction=direction, metric="p")
        assert table["site"].tolist() == swept["site"].tolist()
        known = table["exact"].notna()
        np.testing.assert_allclose(
            table.loc[known, "exact"], swept.loc[known, "p_change"], rtol=1e-9, atol=1e-15
        )
        for _, rows in table.groupby(["tower", "kind"]):
            best = rows["score"].abs().nlargest(5).index
            assert rows.loc[best, "exact"].notna().all() and rows["exact"].notna().sum() == 10
        assert table.attrs["check"]["rows"] == 5 and table.attrs["check"]["largest"] < 1e-12
        found = table.attrs["agreement"]
        assert set(found) == {"decoder.attn.h", "decoder.resid", "vision.mlp.n"}
        assert [found[kind]["sites"] for kind in found] == table.groupby(["tower", "kind"]).size().tolist()


def test_noise_is_averaged_over_its_draws():
    model, corruption = llava(), vlmscope.Noise(draws=3)
    table = attribute(model, example(), SITES[0], corruption, method="atp", verify=10)
    swept = vlmscope.sweep(model, example(), SITES[0], corruption)
    known = table["exact"].notna()
    np.testing.assert_allclose(
        table.loc[known, "exact"], swept.loc[known, "ld_change"], rtol=1e-9, atol=1e-12
    )
    pairs = corruptions.pairs(model, example(), corruption)
    each = [estimate(model, pair, SITES[0]).scores for pair in pairs]
    np.testing.assert_allclose(table["score"], np.mean(each, 0), rtol=1e-12)


def test_a_folder_of_estimates_goes_on(tmp_path, monkeypatch):
    """As a sweep's; more examples are added, but no sites to what is verified."""
    model, given, more = llava(), others(3), {"method": "atp", "verify": 3}
    whole = attribute(model, given, SITES, "image", **more)
    work, done = attribution.estimated, []

    def stopped(*arguments):
        done.append(1)
        if len(done) > 1:
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(attribution, "estimated", stopped)
    with pytest.raises(KeyboardInterrupt):
        attribute(model, given[:2], SITES, "image", **more, out=tmp_path)
    monkeypatch.setattr(attribution, "estimated", work)
    assert not (tmp_path / "agreement.json").exists()
    attribute(model, given[:2], SITES, "image", **more, out=tmp_path)
    table = attribute(model, given, SITES, "image", **more, out=tmp_path)
    pd.testing.assert_frame_equal(table, whole)
    run = vlmscope.open(tmp_path)
    assert json.loads((tmp_path / "agreement.json").read_text()) == whole.attrs["agreement"]
    assert run.check == whole.attrs["check"] and "random rows recomputed" in run.check_line()
    with pytest.raises(StoreError, match="holds another run: verify is 3 there, 4 here"):
        attribute(model, given, SITES, "image", method="atp", verify=4, out=tmp_path)
    with pytest.raises(StoreError, match="holds another run: ranked is"):
        attribute(model, given, [*SITES, "decoder.*.mlp@*"], "image", **more, out=tmp_path)


def test_what_cannot_be_estimated():
    model, site = llava(), "decoder.*.mlp@last"
    for options, words in (
        ({"corrupt": None}, "atp estimates what a patch does, which takes two runs"),
        ({"word": "green"}, "a word is accounted for by the method direct alone"),
        ({"metric": "kl", "direction": "noise"}, "from the clean run, around which it has no gradient"),
        ({"metric": "f1"}, "unknown metric 'f1'"),
        ({"verify": -1}, "the number of sites to verify is '-1'"),
        ({"steps": 3}, "atp has no steps, only ig has"),
        ({"method": "ig", "steps": 0}, "the number of steps is '0'"),
        ({"method": "direct", "verify": 3}, "the method direct is exact and of the logits"),
    ):
        with pytest.raises(VlmscopeError, match=words):
            attribute(model, example(), site, **{"corrupt": "image", "method": "atp", **options})
    for site, words in (
        ("decoder.*/3.mlp@last", "patched together, a later layer undoes"),
        ("decoder.*.attn@last<image", "an edge of attention is not patched but knocked out"),
    ):
        with pytest.raises(SiteError, match=words):
            attribute(model, example(), site, "image", method="atp")
    with pytest.raises(DataError, match=r"or score the whole answer \(metric logprob\)"):
        attribute(model, replace(example(), foil=""), "decoder.*.mlp@last", "image", method="atp")


def test_half_precision_takes_its_gradients_in_it():
    one, site = vlmscope.examples("states", limit=1), "decoder.*.attn.h*@readout"
    tables = [
        attribute(vlmscope.load("toy-llava", dtype=dtype), one, site, "image", method="atp", verify=16)
        for dtype in ("float32", "bfloat16")
    ]
    assert np.corrcoef(*(table["score"] for table in tables))[0, 1] > 0.99
    assert tables[1]["exact"].notna().all() and tables[1].attrs["agreement"]["decoder.attn.h"]["sites"] == 16

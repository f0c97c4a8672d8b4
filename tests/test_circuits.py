"""Important heads: against scipy, against chance, on data with and without an effect."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from models import blip, example, picture, sweep_to
from scipy import stats

import vlmscope
from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.data.example import find_roles
from vlmscope.errors import StoreError, VlmscopeError
from vlmscope.studies import circuits
from vlmscope.studies.run_folder import read_run
from vlmscope.studies.tables import cells_of

SITES = ["encoder.*.cross.h*@answer", "encoder.*.attn.h*@answer", "decoder.*.cross.h*@last"]


def several(count: int):
    return [
        replace(example(), id=f"e{n}", clean_image=picture(2 * n), corrupt_image=picture(2 * n + 1))
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    model, examples = blip(layers=3, heads=4, width=16), several(24)
    for corrupt in ("image", "text"):
        sweep_to(folder / corrupt, model, examples, SITES, corrupt, data="ours")
    return [folder / "image", folder / "text"]


# --- the statistics --------------------------------------------------------------------------


def test_p_values_can_survive_the_correction_over_many_heads():
    scores = np.random.default_rng(0).normal(size=(60, 1024))
    scores[:, 7] += 3.0
    table = circuits.assess(scores, [str(n) for n in range(60)])
    assert table["important"][7] and table["important"].sum() <= 2


def test_the_published_rule():
    """mean |x| over examples, then mean + 2 SD over heads: signs do not matter to it."""
    scores = np.ones((30, 20)) * 0.1
    scores[:, 3] = np.tile([5.0, -5.0], 15)
    table = circuits.assess(scores, [str(n) for n in range(30)])
    assert np.flatnonzero(table["important_published"]).tolist() == [3]
    assert not table["important"][3], "its mean is zero"
    assert table["mean"][3] == 0 and table["mean_abs"][3] == 5.0


def test_small_effects_are_not_important_however_significant():
    scores = np.random.default_rng(0).normal([0.01, 0.011, 1.0], 1e-4, size=(40, 3))
    ids = [str(n) for n in range(40)]
    assert circuits.assess(scores, ids)["important"].all()
    assert circuits.assess(scores, ids, least=0.0105)["important"].tolist() == [False, True, True]
    assert not circuits.assess(scores, ids, least=1.1)["important"].any()


def test_halves_depend_on_ids_not_on_their_order():
    ids = [f"e{n}" for n in range(40)]
    order = np.random.default_rng(1).permutation(40)
    half = circuits.first_half(ids, 0)
    assert half.sum() == 20
    assert (circuits.first_half([ids[n] for n in order], 0) == half[order]).all()
    assert (circuits.first_half(ids, 1) != half).any()


def test_confirmed_means_found_again_in_most_halves():
    """Not what a few examples make, and nothing where halves are too small to test."""
    ids = [f"e{n}" for n in range(80)]
    scores = stats.zscore(np.random.default_rng(0).normal(size=(80, 3)))
    scores += [1.0, 0.33, 0.0]
    table = circuits.assess(scores, ids)
    assert table["important"].tolist() == [True, True, False]
    assert table["confirmed"].tolist() == [True, False, False]
    assert circuits.assess(scores[:20], ids[:20])["confirmed"].notna().all()
    assert circuits.assess(scores[:19], ids[:19])["confirmed"].isna().all()


def test_what_is_held_out_did_not_choose():
    """Each fifth of the examples counts where the others find the head: of a head that one fifth alone
    makes important, none of that fifth does."""
    ids = [f"e{n}" for n in range(50)]
    parts = np.array_split(circuits.shuffled(0, ids, "parts"), circuits.PARTS)
    scores = stats.zscore(np.random.default_rng(0).normal(size=(50, 3))) * 0.1 + [1.0, 0.0, 0.0]
    scores[parts[0], 1] += 1.0
    table = circuits.assess(scores, ids)
    assert table["important"].tolist() == [True, True, False]
    assert table["mean_held_out"][0] == pytest.approx(scores[:, 0].mean())
    others = np.concatenate(parts[1:])
    assert table["mean_held_out"][1] == pytest.approx(scores[others, 1].mean())
    assert np.isnan(table["mean_held_out"][2])


def test_numbers_in_common_by_counting():
    """Against all ways to draw three subsets of six things."""
    sizes = (3, 2, 4)
    counts = np.zeros(4)
    for sets in itertools.product(*(itertools.combinations(range(6), n) for n in sizes)):
        counts[len(set.intersection(*map(set, sets)))] += 1
    assert circuits.in_common(6, sizes) == pytest.approx(counts / counts.sum())


@pytest.mark.slow
def test_no_head_is_reported_where_there_is_no_effect():
    """200 repetitions on a random-weights model of toy-blip's shape; which option is the answer is
    a coin flip, so no head has an effect. At most 5 %, within the binomial interval, report one."""
    import torch
    from transformers import BlipForQuestionAnswering

    from vlmscope.patching import engine
    from vlmscope.runs.model import Model
    from vlmscope.sites import Pattern, expand, place

    toy = load("toy-blip")
    torch.manual_seed(0)
    config = copy.deepcopy(toy.hf.config)
    for part in (config, config.text_config, config.vision_config):
        part.initializer_range = 0.3  # so that no head's effect drowns in rounding
    model = Model(BlipForQuestionAnswering(config), toy.processor, "random")
    wanted = [Pattern.parse("encoder.*.cross.h*@answer"), Pattern.parse("decoder.*.cross.h*@last")]
    rows = []
    for one in several(80):
        one = replace(
            one,
            clean_image=one.clean_image.resize((48, 48)),
            corrupt_image=one.corrupt_image.resize((48, 48)),
            corrupt_prompt=None,
        )
        pair = model.prepare(one)
        sites = [p for s in expand(wanted, model.shapes) for p in place(s, pair.clean.layout)]
        patched = engine.patch(model, pair, sites)
        row = np.zeros(len(sites))
        for numbers, scores in patched.chunks:
            row[numbers] = scores.ld.numpy() - patched.corrupt.ld.item()
        rows.append(row)
    scores = np.stack(rows)
    assert scores.shape == (80, 24) and np.abs(scores).mean(0).min() > 1e-3
    ids = [str(n) for n in range(80)]
    reported = uncorrected = 0
    for seed in range(200):
        coin = np.random.default_rng(seed).choice([-1.0, 1.0], size=(80, 1))
        table = circuits.assess(scores * coin, ids, seed)
        reported += bool((table["q_value"] <= circuits.LEVEL).any())
        uncorrected += bool((table["p_value"] <= circuits.LEVEL).any())
    assert reported <= stats.binom.ppf(0.975, 200, 0.05)
    assert uncorrected > stats.binom.ppf(0.975, 200, 0.05), "without correction the test would fail"


# --- tables ----------------------------------------------------------------------------------


def test_the_table_of_heads(runs):
    heads = circuits.find(runs).heads
    assert list(heads.columns) == circuits.HEADS
    assert len(heads) == 2 * 3 * 12
    assert set(heads["run"]) == {"image", "text"} and set(heads["data"]) == {"ours"}
    assert heads.groupby(["tower", "kind"])["position"].first().to_dict() == {
        ("decoder", "cross"): "readout",
        ("encoder", "attn"): "answer",
        ("encoder", "cross"): "answer",
    }
    effects = read_run(runs[0]).effects()
    rows = effects[effects["site"] == "encoder.1.cross.h2@answer"]["logit_diff"]
    (row,) = heads.query(
        "run == 'image' and tower == 'encoder' and kind == 'cross' and layer == 1 and head == 2"
    ).to_dict("records")
    assert (row["n"], row["mean"]) == (24, pytest.approx(rows.mean()))
    assert row["mean_abs"] == pytest.approx(rows.abs().mean())
    assert row["ci_low"] < row["mean"] < row["ci_high"]


def test_heads_at_every_token_are_read_at_the_answer_and_the_last(runs, tmp_path):
    model = blip(layers=3, heads=4, width=16)
    sites = ["encoder.*.cross.h*@*", "encoder.*/3.cross.h*@*", "decoder.*.cross.h*@*"]
    sweep_to(tmp_path / "image", model, several(24), sites, "image", data="ours")
    wanted = circuits.find([runs[0]]).heads.query("kind == 'cross'").reset_index(drop=True)
    found = circuits.find([tmp_path / "image"]).heads
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-6)
    noun = circuits.find([tmp_path / "image"], position="noun").heads
    assert set(noun["position"]) == {"noun"} and set(noun["tower"]) == {"encoder"}


def test_prompts_of_several_lengths_all_count(tmp_path):
    """On toy-llava the read-out position is that of every example, and the numbers are the figures'."""
    model = load("toy-llava", device="cpu")
    given = examples("states", limit=12)
    run = sweep_to(tmp_path / "r", model, given, "decoder.*.attn.h*@text*", "image")
    found = circuits.heads_of(run)
    assert set(found["n"]) == {12} and set(found["position"]) == {"readout"}
    means = found.set_index(["layer", "head"])["mean"]
    assert means.idxmax() == (2, 1) and means[2, 1] == pytest.approx(5.91, abs=0.01)
    assert means[3, 2] == pytest.approx(4.45, abs=0.01)
    cells = cells_of(run.effects(), slot="readout", intervals=True).merge(found, on=["layer", "head"])
    assert cells["mean_x"].tolist() == pytest.approx(cells["mean_y"].tolist())
    assert cells["low"].tolist() == pytest.approx(cells["ci_low"].tolist())
    assert cells["high"].tolist() == pytest.approx(cells["ci_high"].tolist())
    last = circuits.heads_of(run, position="last")
    pd.testing.assert_frame_equal(last, found)


def test_examples_without_that_slot_are_left_out_aloud(tmp_path):
    """A word of two tokens has no token of its own."""
    words = {"answer": "unhappy", "foil": "blue", "noun": "circle"}
    prompt = "is this circle unhappy or blue ?"
    long = [
        replace(
            one,
            id=f"long{n}",
            clean_prompt=prompt,
            corrupt_prompt=None,
            answer="unhappy",
            roles=find_roles(prompt, words),
        )
        for n, one in enumerate(several(2))
    ]
    sites = ["encoder.*.cross.h*@text*"]
    run = sweep_to(tmp_path / "r", blip(), [*several(12), *long], sites, "image")
    with pytest.warns(UserWarning, match="2 examples have no encoder.cross heads at 'answer'"):
        found = circuits.heads_of(run)
    assert set(found["n"]) == {12}


def test_everything_is_written(runs, tmp_path):
    found = circuits.find(runs)
    found.save(tmp_path / "c")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "c" / "heads.parquet"), found.heads)
    assert len(pd.read_csv(tmp_path / "c" / "heads.csv")) == len(found.heads)
    assert len(pd.read_csv(tmp_path / "c" / "universal.csv")) == 36
    overlap = pd.read_csv(tmp_path / "c" / "overlap.csv")
    assert len(overlap) == 3 and overlap["p_value"].isna().all(), "both runs are of the same examples"
    again = vlmscope.open(tmp_path / "c")
    assert again.about == found.about and again.about["model"] == found.about["model"]
    for name in ("heads", "universal", "overlap"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name), check_dtype=False)


def test_the_important_heads_can_be_swept_again(runs, tmp_path):
    found = circuits.find(runs)
    found.save(tmp_path / "c")
    heads = found.heads.head(3)
    sites = circuits.expressions(heads)
    run = sweep_to(tmp_path / "again", blip(layers=3, heads=4, width=16), several(24), sites, data="ours")
    again = circuits.heads_of(run)
    assert again["mean"].tolist() == pytest.approx(heads["mean"].tolist(), rel=1e-6)


def test_universal_heads_are_important_everywhere():
    base = dict.fromkeys(circuits.HEADS)
    base |= {"tower": "encoder", "kind": "cross", "position": "answer", "layer": 0, "mean_abs": 1.0}
    rows = [
        base
        | {
            "run": run,
            "head": head,
            "mean": mean,
            "important": important,
            "important_published": head == 1,
            "confirmed": False,
        }
        for run, head, mean, important in (
            ("a", 0, 1.0, True),
            ("b", 0, 2.0, True),
            ("a", 1, 1.0, True),
            ("b", 1, -1.0, True),
            ("a", 2, 1.0, True),
            ("b", 2, 1.0, False),
        )
    ]
    table = circuits.universal(pd.DataFrame(rows)).set_index("head")
    assert table["universal"].to_dict() == {0: True, 1: False, 2: False}
    assert table["universal_published"].to_dict() == {0: False, 1: True, 2: False}
    assert table.loc[0, "weakest"] == 1.0 and table.loc[2, "important_in"] == 1
    overlap = circuits.overlap(pd.DataFrame(rows)).iloc[0]
    assert (overlap["both"], overlap["expected"]) == (2, 2.0)
    assert np.isnan(overlap["p_value"]), "no exchange of these heads changes anything"


def test_runs_that_do_not_go_together(runs, tmp_path):
    other = sweep_to(tmp_path / "o", blip(layers=3, heads=4, width=16, seed=1), several(10), SITES)
    with pytest.raises(VlmscopeError, match="runs of different models .* --across-models"):
        circuits.find([runs[0], other.path])
    assert len(circuits.find([runs[0], other.path], across_models=True).heads) == 72
    small = sweep_to(tmp_path / "s", blip(layers=2, heads=2), several(10), SITES)
    with pytest.raises(VlmscopeError, match="do not have the same layers and heads"):
        circuits.find([runs[0], small.path], across_models=True)
    with pytest.raises(VlmscopeError, match="given twice"):
        circuits.find([runs[0], runs[0]])
    back = sweep_to(tmp_path / "n", blip(), several(2), SITES, direction="noise")
    with pytest.raises(VlmscopeError, match="--direction denoise"):
        circuits.find([back.path])


def test_runs_without_heads_there(runs, tmp_path):
    whole = sweep_to(tmp_path / "w", blip(), several(2), "encoder.*.resid@*")
    with pytest.raises(StoreError, match="no heads were patched at the answer's token"):
        circuits.find([whole.path])
    with pytest.raises(StoreError, match="no heads were patched at 'verb'"):
        circuits.find([runs[0]], position="verb")
    with pytest.raises(StoreError, match="no such folder"):
        circuits.find([tmp_path / "gone"])
    few = sweep_to(tmp_path / "f", blip(), several(3), SITES)
    with pytest.warns(UserWarning, match="can hardly show anything"):
        circuits.find([few.path])

"""Causal tracing: its shares by plain runs, its averages by hand, what it leaves out."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from models import alone, blip, example, picture

import vlmscope
from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.errors import DataError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.report.tracing import tracing_tables
from vlmscope.runs import corrupt
from vlmscope.runs.corrupt import Noise
from vlmscope.sites import Pattern
from vlmscope.studies import tracing
from vlmscope.studies.run_folder import read_run

NOISE = Noise("multiply", "image", 5.0, draws=3)


@pytest.fixture(autouse=True)
def all_examples_count(monkeypatch):
    """A random model's gaps are small; what is left out has its own test."""
    monkeypatch.setattr(tracing, "MIN_P", -1.0)
    monkeypatch.setattr(tracing, "MIN_LD", -1e9)


def several():
    prompts = ["is this circle red or blue ?", "is this dark circle red or blue ?"]
    return [replace(example(prompts[n % 2]), id=f"e{n}", clean_image=picture(n)) for n in range(4)]


@pytest.fixture
def traced(tmp_path):
    model = blip(layers=4)
    found = vlmscope.trace(model, several(), tmp_path / "t", noise=NOISE, kinds=("resid", "cross"))
    return model, found.table, tmp_path / "t"


def test_a_share_by_plain_runs(traced):
    """One cell: restored in a window of three layers at the answer, over examples and repeats."""
    model, table, _ = traced
    shares = torch.zeros(3, 4, dtype=torch.float64)
    for repeat in range(3):
        for n, one in enumerate(several()):
            (pair,) = corrupt.pairs(model, one, replace(NOISE, draws=1), seed=tracing._seed_of(0, repeat))
            edits = [
                Edit(site, "set", model.capture(pair.clean, [site])[str(site)])
                for site in (Pattern.parse(f"encoder.{layer}.cross@answer") for layer in (1, 2, 3))
            ]
            runs = (
                model.run(pair.clean),
                model.run(pair.corrupt, pair.edits),
                model.run(pair.corrupt, [*pair.edits, *edits]),
            )
            clean, floor, restored = (run.softmax(-1)[pair.answer] for run in runs)
            shares[repeat, n] = (restored - floor) / (clean - floor)
    row = table.query(
        "tower == 'encoder' and kind == 'cross' and window == 3 and layer == 2 and at == 'answer'"
    ).iloc[0]
    each = shares.mean(1)
    assert row["restored"] == pytest.approx(float(each.mean()), rel=1e-9)
    assert row["spread"] == pytest.approx(float(each.std()), rel=1e-9)
    assert (row["n"], row["repeats"]) == (4, 3)


def test_shards_put_together_repeat_by_repeat_are_the_whole(traced, tmp_path):
    model, table, whole = traced
    fill = alone(model, several()).fill
    options = {"noise": NOISE, "kinds": ("resid", "cross")}
    for which in (1, 2):
        found = tracing.trace_by(fill, tmp_path / str(which), shard=(which, 2), **options)
        assert found.about["examples"] == 2
    for name in ("00", "01", "02"):
        shards = [tmp_path / str(which) / "repeats" / name for which in (1, 2)]
        vlmscope.merge(shards, tmp_path / "merged" / "repeats" / name)
    before = {file: file.read_bytes() for file in (tmp_path / "merged").rglob("part-*")}
    again = vlmscope.trace(model, several(), tmp_path / "merged", **options)
    pd.testing.assert_frame_equal(again.table, table, check_exact=True)
    assert again.about == tracing.read(whole).about
    assert before == {file: file.read_bytes() for file in (tmp_path / "merged").rglob("part-*")}


def test_each_repeat_is_a_run_and_has_its_own_noise(traced):
    _, _, folder = traced
    runs = [read_run(path) for path in sorted((folder / "repeats").iterdir())]
    assert len(runs) == 3 and all(run.finished for run in runs)
    floors = [run.baselines()["p_corrupt"][0] for run in runs]
    assert len(set(floors)) == 3


def test_it_goes_on_where_it_stopped(traced, monkeypatch):
    model, table, folder = traced
    monkeypatch.setattr(model, "run", None)
    monkeypatch.setattr("vlmscope.patching.engine.patch", None)
    again = vlmscope.trace(model, several(), folder, noise=NOISE, kinds=("resid", "cross"))
    pd.testing.assert_frame_equal(again.table, table)
    found = vlmscope.open(folder)
    pd.testing.assert_frame_equal(found.table, table)
    assert found.about == again.about


def test_by_length(traced):
    model, by_slot, folder = traced
    table = vlmscope.trace(model, several(), folder, noise=NOISE, kinds=("resid", "cross"), by="length").table
    encoder = table[table["tower"] == "encoder"]
    assert sorted(encoder["length"].unique()) == [9, 10]
    labels = encoder.query("length == 9").drop_duplicates("at").sort_values("order")["at"]
    assert labels.tolist() == [
        "0 [CLS]",
        "1 is",
        "2 this",
        "3 circle",
        "4 red",
        "5 or",
        "6 blue",
        "7 ?",
        "8 [SEP]",
    ]
    keys = "kind == 'resid' and window == 1 and layer == 1 and tower == 'encoder'"
    nine, ten = (
        encoder.query(f"{keys} and length == {n} and at == '{a} red'")["restored"].item()
        for n, a in ((9, 4), (10, 5))
    )
    both = by_slot.query(f"{keys} and at == 'answer'")["restored"].item()
    assert both == pytest.approx((nine + ten) / 2)


def test_every_cell_is_a_group_by(traced):
    """Over the rows of all repeats: within an example first, then over examples."""
    _, table, folder = traced
    parts = []
    for path in sorted((folder / "repeats").iterdir()):
        run = read_run(path)
        base = run.baselines().set_index("example")
        gap = (base["p_clean"] - base["p_corrupt"]).to_dict()
        rows = run.effects()
        rows["share"] = [p / gap[name] for p, name in zip(rows["p_restored"], rows["example"], strict=True)]
        rows["window"] = [int(site.split(".")[1].partition("/")[2] or 1) for site in rows["site"]]
        parts.append(rows.assign(repeat=path.name))
    rows = pd.concat(parts)
    keys = ["tower", "kind", "window", "layer", "slot"]
    each = rows.groupby([*keys, "example"])["share"].mean()
    wanted = each.groupby(level=keys).agg(["mean", "count"])
    by_repeat = rows.groupby([*keys, "repeat", "example"])["share"].mean()
    spread = by_repeat.groupby(level=[*keys, "repeat"]).mean().groupby(level=keys).std()
    assert len(table) == len(wanted)
    for row in table.itertuples():
        key = (row.tower, row.kind, row.window, row.layer, row.at)
        assert (row.restored, row.n) == (pytest.approx(wanted.loc[key, "mean"]), wanted.loc[key, "count"])
        assert row.spread == pytest.approx(spread[key], abs=1e-12)
        # So few examples have no interval.
        assert math.isnan(row.low) and math.isnan(row.high)


def test_all_comes_back_at_the_read_out_position(tmp_path):
    """On toy-llava, whose template has two colons, and by either way of averaging the same."""
    model = load("toy-llava", device="cpu")
    given = examples("states", limit=6)
    of = {
        by: vlmscope.trace(
            model, given, tmp_path / "t", noise=replace(NOISE, draws=2), windows=(1,), kinds=("resid",), by=by
        ).table
        for by in ("slot", "length")
    }
    last = of["slot"].query("layer == 3 and at == 'readout'").iloc[0]
    assert last["restored"] == pytest.approx(1.0, abs=1e-6) and last["token"] == ":"
    first = of["slot"].query("at == '2'")
    assert set(first["token"]) == {":"} and (first["restored"] == 0.0).all()
    for layer in range(4):
        one = of["slot"].query(f"layer == {layer} and at == 'readout'").iloc[0]
        all_lengths = of["length"].query(f"layer == {layer}")
        ends = all_lengths[all_lengths["order"] == all_lengths["length"] - 1]
        mean = (ends["restored"] * ends["n"]).sum() / ends["n"].sum()
        assert ends["n"].sum() == one["n"] and mean == pytest.approx(one["restored"])


def test_what_is_left_out_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "MIN_P", 0.0)
    model = blip(seed=4)
    table = vlmscope.trace(model, several(), tmp_path / "t", noise=NOISE, kinds=("resid",)).table
    about = json.loads((tmp_path / "t" / "tracing.json").read_text())
    falls = [
        (lambda b: int((b["p_clean"] <= b["p_corrupt"]).sum()))(read_run(p).baselines())
        for p in sorted((tmp_path / "t" / "repeats").iterdir())
    ]
    assert about["left_out_of_each_repeat"] == falls and 0 < sum(falls) < 12
    assert table["n"].max() < 4
    monkeypatch.setattr(tracing, "MIN_P", 2.0)
    with pytest.raises(DataError, match="the noise hardly changes"):
        vlmscope.trace(model, several(), tmp_path / "t", noise=NOISE, kinds=("resid",))


def test_the_tables_of_the_figures(traced):
    _, table, _ = traced
    found = tracing_tables(table[(table["tower"] == "encoder") & (table["window"] == 1)])
    assert list(found) == ["resid", "cross"]
    assert found["resid"].shape[0] == 4
    assert list(found["resid"].columns) == [
        "0",
        "1",
        "2",
        "3",
        "noun",
        "answer",
        "answer+1",
        "foil",
        "-2",
        "-1",
    ]
    assert found["resid"].attrs["roles"] == ["noun", "answer", "foil"]
    assert found["resid"].attrs["labels"]["-1"] == "-1 [SEP]"
    assert found["resid"].attrs["n"]["3"] == 2 and found["resid"].attrs["n"]["-1"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "word"}, "expected slot or length"),
        ({"windows": (2,)}, "has no middle"),
        ({"kinds": ("output",)}, "no kind 'output' to trace"),
    ],
)
def test_what_cannot_be_traced(tmp_path, options, message):
    with pytest.raises(VlmscopeError, match=message):
        vlmscope.trace(blip(), several(), tmp_path / "t", noise=NOISE, **options)


def test_no_repeat_is_one_of_another_seed():
    seeds = [tracing._seed_of(seed, repeat) for seed in range(20) for repeat in range(20)]
    assert len(set(seeds)) == 400

"""How much circuits carry: numbers by hand, halves, folders that go on, MIB's files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from families import FAMILIES
from models import blip, example, llava, picture
from planted import planted, planted_examples

import vlmscope
from vlmscope.errors import DataError, ModelError, StoreError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.runs.forward import capture
from vlmscope.sites import expand, parse
from vlmscope.stats import rng
from vlmscope.studies import faithfulness as room
from vlmscope.studies.faithfulness import mib
from vlmscope.studies.faithfulness.curve import FRACTIONS, Shares, area, random_like
from vlmscope.studies.faithfulness.parts import name_of, parts_of
from vlmscope.studies.faithfulness.scores import Scores, by_part, split
from vlmscope.studies.run_folder import read_run

HEADS = ["decoder.*.attn.h*@all", "decoder.*.mlp@all"]
LAST = "decoder.2.attn.h*@all"


def others(count, first=0):
    """Examples with pictures of their own."""
    return [
        replace(example(), id=str(n), clean_image=picture(2 * n), corrupt_image=picture(2 * n + 1))
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def model():
    return llava()


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory):
    """Attributions of eight examples."""
    folder = tmp_path_factory.mktemp("scores") / "atp"
    vlmscope.attribute(model, others(8), HEADS, "image", method="atp", out=folder)
    return folder


@pytest.fixture(scope="module")
def whole(model, scored):
    return vlmscope.faithfulness(model, others(8), scored, "image", draws=2)


# --- numbers ---------------------------------------------------------------------------------


def test_shares_by_hand():
    values = pd.DataFrame({"none": [0.0, 1.0, 0.0], "some": [1.0, 4.0, 3.0]})
    whole = pd.Series([2.0, 5.0, 10.0])
    assert Shares(values, whole).of("some") == pytest.approx((1 + 3 + 3) / (2 + 4 + 10))
    assert Shares(values, whole, "median").of("some") == pytest.approx(0.5)  # of 1/2, 3/4, 3/10


def test_areas_are_those_of_mib():
    assert area(FRACTIONS, np.ones(10)) == 0.999  # CPR of f = 1
    assert area(FRACTIONS, np.abs(1 - np.ones(10))) == 0  # and its CMD
    assert area([0.5, 1.0], np.array([0.5, 1.0])) == pytest.approx(0.375)


@pytest.mark.parametrize("ratio", ["means", "median"])
def test_intervals_hold_what_they_say(ratio):
    """Of 20 examples each time, about 19 of 20 intervals have the true share, 0.6, in them."""
    draw, held = np.random.default_rng(0), 0
    times = 200 if ratio == "means" else 15
    for number in range(times):
        gaps = pd.Series(draw.normal(4, 1, 20))
        carried = 0.6 * gaps + draw.normal(0, 0.5, 20)
        shares = Shares(pd.DataFrame({"none": 0.0 * gaps, "some": carried}), gaps, ratio, number)
        value, low, high = shares.with_ends("some")
        assert low < value < high
        held += low <= 0.6 <= high
    assert 0.86 <= held / times <= 1


def test_no_interval_without_a_sure_gap_or_with_few_examples():
    gaps = pd.Series([3.0, -3.0] * 10)
    shares = Shares(pd.DataFrame({"none": 0.0 * gaps, "some": gaps / 2 + 0.1}), gaps + 0.2)
    assert not shares.sure and np.isnan(shares.with_ends("some")[1:]).all()
    few = Shares(pd.DataFrame({"none": [0.0] * 9, "some": [1.0] * 9}), pd.Series([2.0] * 9))
    assert few.of("some") == 0.5 and np.isnan(few.with_ends("some")[1:]).all() and not few.sure


def test_random_circuits_keep_layers_and_kinds(model):
    parts = expand(parse([*HEADS, "decoder.0.mlp.n*@all"]), model.shapes)
    alike = [part.point for part in parts]
    circuit = [n for n in range(len(parts)) if n % 3 == 0]
    seen = set()
    for number in range(20):
        drawn = random_like(circuit, alike, rng(0, number))
        for count in (drawn, circuit):
            seen.add(tuple(sorted((parts[n].layer, parts[n].kind, parts[n].part) for n in count)))
        assert len(drawn) == len(circuit)
    assert len(seen) == 1
    drawn = np.array([[n in random_like(circuit, alike, rng(1, k)) for n in range(4)] for k in range(400)])
    assert np.allclose(drawn.mean(0), 0.5, atol=0.1)  # of the first layer's four heads two are kept


# --- which examples --------------------------------------------------------------------------


def scores_of(examples, data="states"):
    digests = {one.id: room.scores.fingerprint([one]) for one in examples}
    table = pd.DataFrame({"decoder.0.attn.h0": range(len(examples))}, index=list(digests), dtype=float)
    return Scores("effects", table, digests, data)


def test_halves_never_share_an_example():
    given = others(8)
    for seed in range(5):
        parted = split(scores_of(given), given, "states", seed, 20)
        measured = {one.id for one in parted.measured}
        assert len(parted.rows) == 4 and measured.isdisjoint(parted.rows) and len(measured) == 4
        assert {one.id for one in parted.choosing} == set(parted.rows)
    turned = split(scores_of(given), given[::-1], "states", 0, 2)
    assert turned.measured[::-1] == split(scores_of(given), given, "states", 0, 2).measured
    assert len(turned.choosing) == 2


def test_examples_without_scores_are_measured_where_there_are_enough():
    first, fresh = others(8), others(10, first=8)
    parted = split(scores_of(first), [*first, *fresh], "states", 0, 20)
    assert parted.measured == fresh and len(parted.rows) == 8 and parted.choosing == first
    parted = split(scores_of(first), [*first, *fresh[:9]], "states", 0, 20)
    assert len(parted.rows) == 4 and len(parted.measured) == 13 and parted.held_out


def test_too_few_examples_and_other_data():
    given = others(6)
    with pytest.raises(DataError, match="too few examples for halves: 3 with scores, 3 without; expected"):
        split(scores_of(given[:3]), given, "states", 0, 20)
    with pytest.raises(
        StoreError, match="of other data: of 'states', and none of their examples is in 'mine'"
    ):
        split(scores_of(given), others(20, first=6), "mine", 0, 20)
    unknown = Scores("importances", pd.DataFrame({"decoder.0.mlp": [1.0]}, index=["all"]))
    parted = split(unknown, given, "states", 0, 20)
    assert not parted.held_out and len(parted.measured) == len(parted.choosing) == 3


# --- the whole -------------------------------------------------------------------------------


def by_hand(model, given, parts, circuit):
    """The mean LD of the clean run, where all parts but these have their values of the corrupt run."""
    found = []
    for one in given:
        pair = model.prepare(replace(one, corrupt_prompt=None))
        sites = [part for n, part in enumerate(parts) if n not in circuit]
        values = capture(model, pair.corrupt, sites)
        logits = model.run(pair.clean, [Edit(site, "set", values[str(site)]) for site in sites])
        found.append(float(logits[pair.answer] - logits[pair.foil]))
    return float(np.mean(found))


def test_shares_of_held_out_examples(model, scored, whole):
    """The first half's mean scores rank, and f is that of the other half: 1 with all parts, 0 with none."""
    found = whole
    parted = split(scores_of(others(8), "examples"), others(8), "examples", 0, 20)
    parts = parts_of(
        [
            *(f"decoder.{n}.attn.h{h}" for n in range(3) for h in range(4)),
            *(f"decoder.{n}.mlp" for n in range(3)),
        ],
        model.shapes,
    ).sites
    table = vlmscope.open(scored).attributions()
    rows = table[table["example"].isin(parted.rows)]
    means = rows.groupby(rows["site"].str.partition("@")[0])["score"].mean()
    means = means[[name_of(part) for part in parts]]
    full, none = (by_hand(model, parted.measured, parts, some) for some in (range(15), []))
    for ranking, sizes in (("signed", means), ("absolute", means.abs())):
        own = found.table[found.table["ranking"] == ranking].set_index("fraction")
        assert own["f"][1.0] == pytest.approx(1, abs=1e-9) and (own["f"][own["kept"] == 0] == 0).all()
        order = np.argsort(-sizes.to_numpy(), kind="stable")
        for fraction in (0.1, 0.5):
            kept = order[: int(fraction * 15)]
            wanted = (by_hand(model, parted.measured, parts, kept) - none) / (full - none)
            assert own["f"][fraction] == pytest.approx(wanted, rel=1e-9)
    own = found.summary["circuit"]
    chosen = [n for n, part in enumerate(parts) if name_of(part) in set(found.circuit["part"])]
    assert own["kept"] == len(chosen) and own["draws"] == 2
    f = (by_hand(model, parted.measured, parts, chosen) - none) / (full - none)
    rest = [n for n in range(15) if n not in chosen]
    without = (by_hand(model, parted.measured, parts, rest) - none) / (full - none)
    assert own["f"] == pytest.approx(f, rel=1e-9) and own["without"] == pytest.approx(without, rel=1e-9)
    first = found.circuit.iloc[0]
    less = [n for n in chosen if name_of(parts[n]) != first["part"]]
    drop = f - (by_hand(model, parted.measured, parts, less) - none) / (full - none)
    assert first["drop"] == pytest.approx(drop, rel=1e-9)
    heads, mlps = found.summary["groups"]
    assert heads["group"] == "decoder.attn" and heads["kinds"] == {"head": 12} and mlps["kinds"] == {"MLP": 3}
    these = [n for n in range(15) if parts[n].kind == "mlp"]
    for name, circuit in (("alone", these), ("f", {*these, *chosen})):
        wanted = (by_hand(model, parted.measured, parts, circuit) - none) / (full - none)
        assert mlps[name] == pytest.approx(wanted, rel=1e-9)
    assert mlps["more"] == pytest.approx(mlps["f"] - f, rel=1e-9) and mlps["more_low"] is None
    assert found.summary["check"]["rows"] == 3 and found.summary["check"]["largest"] < 1e-9
    assert found.summary["ranked_on"] == found.summary["measured"] == 4


def test_a_folder_goes_on_and_is_read_back(model, scored, whole, tmp_path, monkeypatch):
    given = others(8)
    run, done = room.measure._runs, 0

    def stopped(task, *arguments, **more):
        nonlocal done
        done += "chosen" in task.circuits  # and not of those that choose a size
        if done == 3:
            raise KeyboardInterrupt
        return run(task, *arguments, **more)

    monkeypatch.setattr(room.measure, "_runs", stopped)
    with pytest.raises(KeyboardInterrupt):
        vlmscope.faithfulness(model, given, scored, "image", draws=2, out=tmp_path / "run")
    assert len(vlmscope.open(tmp_path / "run").measured()["example"].unique()) == 2
    done = 10  # which is more than 3
    found = vlmscope.faithfulness(model, given, scored, "image", draws=2, out=tmp_path / "run")
    assert done == 10 + 2 + 3  # and 3 are recomputed
    back = vlmscope.open(tmp_path / "run")
    for name in ("table", "circuit"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(whole, name))
        pd.testing.assert_frame_equal(getattr(back, name), getattr(whole, name), check_dtype=False)
    assert back.summary == found.summary == whole.summary and back.importances == whole.importances
    (tmp_path / "run" / "circuit.csv").write_text("part,score\n")
    with pytest.raises(StoreError, match=r"circuit.csv: is damaged .* write that folder anew"):
        vlmscope.open(tmp_path / "run")
    with pytest.raises(StoreError, match="holds another run"):
        vlmscope.faithfulness(model, given, scored, "image", draws=2, outside="zero", out=tmp_path / "run")
    with pytest.raises(StoreError, match="holds circuits that were measured, no scores"):
        vlmscope.faithfulness(model, given, tmp_path / "run", "image")
    with pytest.raises(StoreError, match="a run that holds measured, no effects"):
        vlmscope.read_run(tmp_path / "run").effects()


def test_what_the_scores_have_heard_is_not_asked_again(model, scored, whole, monkeypatch):
    """Of the same precision: that of another is another model's answer."""
    asked = []

    def answer(inputs, edits=()):
        asked.append(inputs)
        return "unheard"

    monkeypatch.setattr(model, "answer", answer)
    again = vlmscope.faithfulness(model, others(8), scored, "image", draws=2)
    assert not asked
    pd.testing.assert_frame_equal(again.table, whole.table)
    vlmscope.faithfulness(model, others(19), scored, "image", draws=2)
    assert len(asked) == 11, "the eight choose, and the others are measured"
    run = read_run(scored)
    other = replace(run, spec=run.spec | {"dtype": "float16"})
    monkeypatch.setattr("vlmscope.studies.faithfulness.scores.read_run", lambda path: other)
    vlmscope.faithfulness(model, others(8), scored, "image", draws=2)
    assert len(asked) > 11


def test_words(whole):
    lines = whole.lines()
    assert lines[0].startswith("CPR ") and "CMD" in lines[0]
    assert " of the behaviour on 4 held-out pictures, random circuits of that size " in lines[-1]
    assert lines[-1].endswith("does not seem to know this task, so this says little")
    summary = {
        "cpr": {"value": 0.5, "low": 0.4, "high": 0.6},
        "cmd": {"value": 0.5, "low": None, "high": None},
        "gap": {"value": 3.0, "low": 2.0, "high": 4.0},
        "gap_of_runs": 6.0,
        "outside": "corrupt",
        "parts": 144,
        "signed": True,
        "held_out": True,
        "corrupt": "image",
        "measured": 60,
        "kinds": {"head": 12},
        "groups": [],
        "known": {"severity": "fine", "sentences": []},
        "circuit": {
            "f": 0.874,
            "low": 0.821,
            "high": 0.91,
            "random": 0.04,
            "kept": 12,
            "needed": 9,
            "passes": True,
            "without": -0.001,
            "without_low": None,
            "without_high": None,
        },
    }
    assert [*room.words.lines(summary)] == [
        "CPR 0.50 [0.40, 0.60], CMD 0.50",
        "the 144 parts that have scores carry 50 % of the gap between the two runs: what else carries it has "
        "no score, and computes freely",
        "the circuit needs 9 of its 12 parts: without each of these alone it carries less (an interval each, "
        "not corrected for their number)",
        "without the circuit, the other 132 parts carry 0 %",
        "these 12 heads carry 87 % [82, 91] of the behaviour on 60 held-out pictures, random circuits of "
        "that size 4 %",
    ]
    summary["circuit"]["needed"] = 0
    assert (
        "without any one of its 12 parts the circuit does not surely carry less (an interval each, not "
        "corrected for their number)"
    ) in [*room.words.lines(summary)]


def test_what_a_circuit_lacks_in_words():
    """The group that surely adds most, and what it carries alone; of a circuit within it that is no more."""
    own = {"f": 0.01, "low": -0.02, "high": 0.03}
    much = {"group": "encoder", "kinds": {"head": 24, "MLP": 6}, "f": 0.62, "low": 0.5, "high": 0.7}
    much |= {"more": 0.61, "more_low": 0.5, "alone": 0.04}
    perhaps = much | {"group": "decoder", "f": 0.7, "more_low": -0.1}
    lacking = room.words._lacking
    said = "; what the circuit lacks is in the encoder: with the 24 heads and 6 MLPs there it carries 62 %"
    said += " [50, 70]"
    assert lacking(own, [perhaps, much]) == f"{said}, these alone 4 %"
    assert lacking(own, [much | {"alone": 0.62}]) == said
    within = much | {"group": "decoder.mlp", "kinds": {"MLP": 1}}
    assert "is in decoder.mlp: with the 1 MLP there it" in lacking(own, [within])
    few = {"low": None, "high": None}
    assert "in the decoder: " in lacking(own | few, [perhaps | few, much | few])  # nothing has an interval
    link = "; a circuit carries nothing unless every link from the input to the answer is in it"
    assert lacking(own, [perhaps]) == lacking(own, []) == link
    assert lacking(own | {"f": 0.2, "low": 0.1}, []) == lacking(own | {"f": 0.5}, [much]) == ""


def test_groups_are_towers_or_the_kinds_of_the_only_one():
    parts = parts_of(["encoder.0.cross.h1", "decoder.1.mlp", "decoder.0.attn.h0"], blip().shapes)
    assert parts.groups == {"encoder": {0}, "decoder": {1, 2}}
    parts = parts_of(["decoder.1.mlp", "decoder.0.attn.h0"], blip().shapes)
    assert parts.groups == {"decoder.attn": {0}, "decoder.mlp": {1}}
    assert parts_of(["decoder.0.attn.h0", "decoder.0.attn.h1"], blip().shapes).groups == {}


@pytest.mark.parametrize("outside", ["mean", "zero"])
def test_outside_of_the_circuit_without_another_run(model, scored, outside):
    """No corruption is needed; the mean is over the examples that are measured."""
    given = others(6)
    found = vlmscope.faithfulness(
        model, given, scored, "image", outside=outside, draws=1, fractions=(0.5, 1.0)
    )
    measured = split(scores_of(given, "examples"), given, "examples", 0, 20).measured
    parts = expand(parse(HEADS), model.shapes)
    pairs = [model.prepare(replace(one, corrupt_prompt=None)) for one in measured]
    values = [capture(model, pair.clean, parts) for pair in pairs]
    lds = []
    for pair in pairs:
        edits = [
            Edit(
                part,
                "set",
                sum(v[f"{name_of(part)}@all"] for v in values) / len(values) * (outside == "mean"),
            )
            for part in parts
        ]
        logits = model.run(pair.clean, edits)
        plain = model.run(pair.clean)
        lds.append([float(run[pair.answer] - run[pair.foil]) for run in (plain, logits)])
    whole, none = np.mean(lds, 0)
    assert found.summary["gap"]["value"] == pytest.approx(whole - none, rel=1e-9)


# --- what ranks ------------------------------------------------------------------------------


def test_directions_agree_on_what_upholds_the_behaviour(model, tmp_path):
    """Scores of patches of the clean run are of what is lost: their sign is turned."""
    given = others(4)
    ranks = {}
    for direction in ("denoise", "noise"):
        vlmscope.sweep(model, given, LAST, "image", direction=direction, check=0, out=tmp_path / direction)
        ranks[direction] = room.scores.read(tmp_path / direction, model, "image", "examples").table.mean()
    vlmscope.sweep(model, given, LAST, None, patch="zero", check=0, out=tmp_path / "zero")
    assert room.scores.read(tmp_path / "zero", model, "image", "examples").table.shape == (4, 4)
    effects = vlmscope.open(tmp_path / "noise").effects()
    lost = -effects.groupby("site")["ld_change"].mean()
    wanted = lost.set_axis(lost.index.str.removesuffix("@all"))[ranks["noise"].index]
    pd.testing.assert_series_equal(ranks["noise"], wanted, check_names=False)
    assert np.corrcoef(*(ranks[name] for name in ranks))[0, 1] > 0


def test_parts_of_a_table():
    """A sublayer is its heads where these have scores; all positions at once take precedence over one by
    one, and these over names for some."""
    row = {"example": "a", "tower": "decoder", "layer": 0, "kind": "attn", "unit": None, "position": None}
    rows = [
        row | {"site": "decoder.0.attn@all", "slot": "all", "score": 100.0},
        row | {"site": "decoder.0.attn.h0@all", "unit": "h0", "slot": "all", "score": 1.0},
        row | {"site": "decoder.0.attn.h0@3", "unit": "h0", "slot": "3", "position": 3, "score": 10.0},
        row | {"site": "decoder.0.attn.h1@3", "unit": "h1", "slot": "3", "position": 3, "score": 2.0},
        row | {"site": "decoder.0.attn.h1@4", "unit": "h1", "slot": "4", "position": 4, "score": 3.0},
        row | {"site": "decoder.0.attn.h1@text", "unit": "h1", "slot": "text", "score": 50.0},
        row | {"site": "decoder.0.mlp@all", "kind": "mlp", "slot": "all", "score": 7.0},
        row | {"site": "decoder.0.resid@all", "kind": "resid", "slot": "all", "score": 9.0},
        row | {"site": "decoder.0.attn.q1@all", "unit": "q1", "slot": "all", "score": 9.0},
        row | {"site": "decoder.0.attn.h[0,1]@all", "unit": "h[0,1]", "slot": "all", "score": 9.0},
        row | {"site": "decoder.0/3.mlp@all", "kind": "mlp", "slot": "all", "score": 9.0},
    ]
    found = by_part(pd.DataFrame(rows), None)
    assert found.loc["a"].to_dict() == {
        "decoder.0.attn.h0": 1.0,
        "decoder.0.attn.h1": 5.0,
        "decoder.0.mlp": 7.0,
    }
    with pytest.raises(StoreError, match="of no head, neuron or sublayer"):
        by_part(pd.DataFrame(rows[7:]), "scores")


def test_expressions_name_the_parts(model):
    names = ["decoder.1.mlp.n5", "decoder.1.mlp.n3", "vision.0.attn.h1", "vision.0.attn.h0", "decoder.0.mlp"]
    parts = parts_of(names, model.shapes)
    assert parts.expressions == [
        *("vision.0.attn.h*@all", "decoder.0.mlp@all", "decoder.1.mlp.n3@all", "decoder.1.mlp.n5@all")
    ]
    assert sorted(parts.names) == sorted(names)


def test_a_folder_of_circuits(tmp_path):
    """Its rule finds the heads anew on the half that ranks, and these are the circuit."""
    model, given = planted(), planted_examples(20)
    run, circuits = tmp_path / "runs" / "states-image", tmp_path / "circuits"
    vlmscope.sweep(model, given, "encoder.*.cross.h*@answer", "image", out=run, data="states")
    room.scores.circuits.find([run]).save(circuits)
    found = vlmscope.faithfulness(
        model, given, circuits, "image", draws=5, fractions=(0.25, 1.0), data="states"
    )
    assert set(found.circuit["part"]) == {"encoder.0.cross.h0", "encoder.0.cross.h1"}
    own = found.summary["circuit"]
    assert own["f"] == pytest.approx(1, abs=1e-9) and own["without"] == pytest.approx(0, abs=1e-9)
    assert own["needed"] == 2 or (found.circuit["drop"] != 0).all()
    assert found.summary["scores"] == "circuits" and own["fraction"] is None
    (circuits.parent / "runs").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"its run .* is not there, so there are no scores by example"):
        vlmscope.faithfulness(model, given, circuits, "image", data="states")


# --- files of MIB ----------------------------------------------------------------------------


def importances(file, nodes, edges=None, **cfg):
    cfg = {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16, **cfg}
    file.write_text(json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges or {}}))
    return file


def test_a_file_of_importances_comes_back(model, scored, whole, tmp_path):
    found = whole
    (tmp_path / "mine.json").write_text(found.importances)
    content = json.loads(found.importances)
    assert content["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 16}
    assert (
        list(content["nodes"])[:3] == ["input", "a0.h0", "a0.h1"] and list(content["nodes"])[-1] == "logits"
    )
    scores, circuit, _ = mib.read(tmp_path / "mine.json", model)
    table = room.scores.read(scored, model, "image", "examples").table
    rows = split(scores_of(others(8), "examples"), others(8), "examples", 0, 20).rows
    assert circuit is None and scores == pytest.approx(table.loc[rows].mean().to_dict(), rel=1e-12)
    kept = {name for name, node in content["nodes"].items() if node["in_graph"]} - {"input", "logits"}
    assert len(kept) == len(found.circuit)
    again = vlmscope.faithfulness(
        model, others(8), tmp_path / "mine.json", "image", draws=1, fractions=(0.05, 0.5, 1.0)
    )
    assert again.summary["circuit"]["fraction"] == 0.5  # at least a tenth of the parts
    assert again.summary["ranked_on"] is None and not again.summary["held_out"]
    assert "nothing says on which examples the scores were made: these may be among them" in again.lines()


def test_a_circuit_of_a_file(model, tmp_path):
    """A file without scores says which nodes are kept; nodes without a score compute freely."""
    nodes = {"input": {"in_graph": True}, "a0.h1": {"in_graph": True}, "m2": {"in_graph": False}}
    file = importances(tmp_path / "a.json", nodes)
    named = {"decoder.0.attn.h1": 1.0, "decoder.2.mlp": 0.0}
    assert mib.read(file, model) == (named, {"decoder.0.attn.h1"}, None)
    found = vlmscope.faithfulness(model, others(4), file, "image", draws=1, fractions=(0.5, 1.0))
    assert found.circuit["part"].tolist() == ["decoder.0.attn.h1"] and found.summary["parts"] == 2
    nodes["m2"] |= {"score": float("nan")}
    nodes["a0.h1"] |= {"score": 0.5}
    assert mib.read(importances(tmp_path / "b.json", nodes), model) == (
        {"decoder.0.attn.h1": 0.5},
        None,
        None,
    )


@pytest.mark.parametrize(
    ("name", "node", "more", "said"),
    [
        ("a0.h4", {"in_graph": True}, {}, "'a0.h4' is no node of tiny-llava; expected input, logits"),
        ("m3", {"in_graph": True, "score": 1.0}, {}, "'m3' is no node"),
        ("a0.h0", {"in_graph": True}, {"n_layers": 12}, "model: n_layers is '12' there and 3 in"),
        ("a0.h0", {"in_graph": False}, {}, "no head or MLP has a score or is in the circuit"),
        ("a0.h0", {"score": 1.0}, {}, "no nodes.a0.h0.in_graph"),
    ],
)
def test_bad_files_of_importances(model, tmp_path, name, node, more, said):
    with pytest.raises(StoreError, match=said):
        mib.read(importances(tmp_path / "bad.json", {name: node}, **more), model)
    with pytest.raises(StoreError, match=r"expected a JSON file|no such file|cannot be read"):
        mib.read(tmp_path / "gone.json", model)


def test_parts_that_mib_has_no_name_for(model):
    for name in ("vision.0.attn.h0", "decoder.0.mlp.n1"):
        with pytest.raises(ModelError, match=f"'{name}' has no name in MIB's files"):
            mib.written(model, {name: 1.0})


# --- what is refused -------------------------------------------------------------------------


def test_scores_of_something_else(model, scored, tmp_path):
    given = others(8)
    with pytest.raises(StoreError, match="scores of another model"):
        vlmscope.faithfulness(llava(seed=1), given, scored, "image")
    with pytest.raises(
        StoreError, match="scores of another kind, image corrupted and not text; give --corrupt"
    ):
        vlmscope.faithfulness(model, given, scored, "text")
    with pytest.raises(StoreError, match="of other data"):
        vlmscope.faithfulness(model, others(20, first=30), scored, "image", data="mine")
    with pytest.raises(StoreError, match="not a run folder"):
        vlmscope.faithfulness(model, given, tmp_path, "image")
    with pytest.raises(DataError, match="too few examples for halves: 3 with scores"):
        vlmscope.faithfulness(model, given[:3], scored, "image")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outside": "noise"}, "unknown outside 'noise'; expected corrupt, mean, zero"),
        ({"ratio": "mean"}, "unknown ratio 'mean'; expected means or median"),
        ({"draws": 0}, "the number of random circuits is '0'"),
        ({"fractions": (0.5,)}, "one fraction is no curve"),
        ({"fractions": (0.5, 0.50000001)}, "one fraction is no curve"),
        ({"fractions": (0.5, 2.0)}, "a fraction is '2.0'; expected a number from 0 to 1"),
        ({"corrupt": None}, "without a corruption there is no other run"),
        ({"metric": "loss"}, "unknown metric 'loss'"),
        ({"seed": -1}, "the seed is '-1'"),
    ],
)
def test_options_that_are_none(model, scored, options, said):
    with pytest.raises(VlmscopeError, match=said):
        vlmscope.faithfulness(model, others(8), scored, **options)


# --- where there is no mechanism -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", [blip, llava, FAMILIES["mllama"]])
def test_no_circuit_of_a_random_model_passes(make, tmp_path):
    """Whatever its scores find, there is no behaviour to carry."""
    for seed in range(5):
        model = make(seed=seed) if make in (blip, llava) else make()
        heads = [
            f"{tower}.*.{kind}.h*@all" for tower in model.text_towers for kind in model.shapes[tower].heads
        ]
        folder, given = tmp_path / str(seed), others(24, first=100 * seed)
        vlmscope.attribute(model, given, heads, "image", method="atp", out=folder)
        found = vlmscope.faithfulness(model, given, folder, "image", fractions=(0.2, 1.0))
        assert not found.summary["circuit"]["passes"]

"""How much circuits of edges carry: against plain runs of these circuits, pruned, in MIB's files, refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from families import FAMILIES
from models import blip, llava
from test_faithfulness import importances, others

import vlmscope
from vlmscope.errors import DataError, ModelError, StoreError, VlmscopeError
from vlmscope.patching.edge_circuits import circuits
from vlmscope.patching.graph import Edge, Graph
from vlmscope.runs import corrupt
from vlmscope.stats import rng
from vlmscope.studies.faithfulness import mib
from vlmscope.studies.faithfulness import plan as room
from vlmscope.studies.faithfulness.curve import random_like
from vlmscope.studies.faithfulness.parts import Edges, named
from vlmscope.studies.faithfulness.scores import split

OPTIONS = {"draws": 1, "fractions": (0.1, 1.0)}


@pytest.fixture(scope="module")
def model():
    return llava(layers=2, kv_heads=4)


@pytest.fixture(scope="module")
def scored(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores") / "eap"
    vlmscope.edges(model, others(8), "image", out=folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("circuits") / "out"


@pytest.fixture(scope="module")
def found(model, scored, out):
    return vlmscope.faithfulness(model, others(8), scored, "image", **OPTIONS, out=out)


def plain(model, given, edges):
    """The mean LD of circuits of edges over some examples."""
    pairs = [corrupt.pairs(model, one, "image")[0] for one in given]
    return float(np.mean([float(next(circuits(model, pair, [edges])).ld) for pair in pairs]))


def edge_of(part):
    return Edge(*part.split("->"))


def test_shares_of_held_out_examples(model, scored, found):
    """The first half's mean scores rank the edges, and f is of the other half: 1 with all, 0 with none."""
    held = room.read_scores(scored, model, "image", "examples")
    parted = split(held, others(8), "examples", 0, 20)
    measured = parted.measured
    assert len(measured) == found.summary["measured"] == 4
    means = held.table.loc[parted.rows].mean()[held.edges.names]
    each = [edge_of(name) for name in held.edges.names]
    assert set(each) == set(Graph(model, corrupt.pairs(model, measured[0], "image")[0].clean).edges)
    whole, none = plain(model, measured, each), plain(model, measured, [])
    assert found.summary["gap"]["value"] == pytest.approx(whole - none, rel=1e-9)
    for ranking, sizes in (("signed", means), ("absolute", means.abs())):
        rows = found.table[found.table["ranking"] == ranking].set_index("fraction")
        assert rows.loc[1.0, "f"] == pytest.approx(1, abs=1e-9)
        kept = np.argsort(-sizes.to_numpy(), kind="stable")[: int(0.1 * len(each))]
        wanted = (plain(model, measured, [each[n] for n in kept]) - none) / (whole - none)
        assert rows.loc[0.1, "f"] == pytest.approx(wanted, rel=1e-9)
    own = [edge_of(part) for part in found.circuit["part"]]
    wanted = (plain(model, measured, own) - none) / (whole - none)
    assert found.summary["circuit"]["f"] == pytest.approx(wanted, rel=1e-9)
    rest = [edge for edge in each if edge not in own]
    without = (plain(model, measured, rest) - none) / (whole - none)
    assert found.summary["circuit"]["without"] == pytest.approx(without, rel=1e-9)
    assert found.summary["kinds"] == {"edge": len(own)} and found.summary["scores"] == "edges (eap)"
    assert found.summary["check"]["rows"] == 3 and found.summary["check"]["largest"] < 1e-9


def test_the_chosen_circuit_has_no_edge_that_leads_nowhere(model, scored, found):
    """What is left out of it, of the ranking's first so many, changes nothing."""
    parts = room.read_scores(scored, model, "image", "examples").edges
    many = int(found.summary["circuit"]["fraction"] * len(parts.names))
    assert 0 < len(found.circuit) <= many
    row = found.table.query("ranking == 'signed' and kept == @many").iloc[0]
    assert found.summary["circuit"]["f"] == pytest.approx(row["f"], rel=1e-9)


def test_pruned_by_hand(model):
    names = [
        *(("embed", "decoder.0.attn.q0"), ("image", "decoder.0.attn.v1"), ("embed", "decoder.0.mlp")),
        *(("decoder.0.attn.h1", "decoder.0.mlp"), ("decoder.0.attn.h0", "decoder.1.attn.k2")),
        *(("decoder.0.attn.h3", "logits"), ("decoder.0.mlp", "logits"), ("embed", "logits")),
    ]
    parts = Edges("decoder", model.shapes["decoder"], {named(*edge): (Edge(*edge),) for edge in names})
    # q0 → h0 → k2, whose head nothing reads; h3 has nothing of this run.
    assert parts.pruned(frozenset(range(8))) == {1, 2, 3, 6, 7}
    assert parts.pruned(frozenset([0, 1, 5])) == {0, 1, 5}  # nothing is on a way, so it stays as it is
    shared = Edges("decoder", llava().shapes["decoder"], parts.each)
    names = [("image", "decoder.0.attn.v1"), ("decoder.0.attn.h3", "logits"), ("decoder.0.attn.h1", "logits")]
    shared = Edges("decoder", shared.shape, {named(*edge): (Edge(*edge),) for edge in names})
    assert shared.pruned(frozenset(range(3))) == {0, 1}  # of a value that heads 2 and 3 share


def test_random_circuits_keep_layers(model, scored):
    parts = room.read_scores(scored, model, "image", "examples").edges
    kept = ["image->decoder.1.attn.q0", "image->decoder.1.attn.v3", "decoder.0.mlp->decoder.1.mlp"]
    drawn = [
        random_like({parts.names.index(name) for name in kept}, parts.alike, rng(0, n)) for n in range(30)
    ]
    for some in drawn:
        names = [re.sub(r"\.(attn|mlp)[^-]*", "", parts.names[n]) for n in sorted(some)]
        assert sorted(name.replace("embed", "image") for name in names) == [
            "decoder.0->decoder.1",
            "image->decoder.1",
            "image->decoder.1",
        ]
    assert len({part for some in drawn for part in some}) > 15  # whatever writes and reads there
    assert parts.places[-1] == ("decoder", 1, "resid", "") and parts.places[0][:3] == ("decoder", 0, "attn")


def test_a_folder_goes_on_and_is_drawn(model, scored, found, out, tmp_path):
    again = vlmscope.faithfulness(model, others(8), scored, "image", **OPTIONS, out=out)
    assert again.summary == found.summary
    back = vlmscope.open(out)
    assert back.summary["lines"] == found.lines() and len(back.circuit) == len(found.circuit)
    assert " edges carry " in found.lines()[-1] and "held-out pictures" in found.lines()[-1]
    text = vlmscope.write_report([out], tmp_path / "report.html").read_text("utf-8")
    assert "The edges of the circuit" in text and "image-&gt;decoder" in text


@pytest.mark.parametrize(
    ("make", "tower"), [(FAMILIES["mllama"], None), pytest.param(llava, "vision", marks=pytest.mark.slow)]
)
def test_edges_of_other_towers(make, tower, tmp_path):
    """Where keys and values read another tower, and the vision tower by itself."""
    model, given = make(), others(4)
    vlmscope.edges(model, given, "image", tower=tower, out=tmp_path / "eap")
    found = vlmscope.faithfulness(model, given, tmp_path / "eap", "image", draws=1, fractions=(0.5, 1.0))
    full = found.table.query("ranking == 'signed' and fraction == 1")["f"].iloc[0]
    assert full == pytest.approx(1, abs=1e-9)
    assert found.summary["check"]["largest"] < 1e-9 and found.importances is None


# --- files of MIB ----------------------------------------------------------------------------


def test_a_file_of_importances_comes_back(model, scored, found, tmp_path):
    """What enters is one writer there, and two here: its score is their sum, and both are one part."""
    content = json.loads(found.importances)
    names = [
        *("input->a0.h0<q>", "input->a0.h1<q>", "a0.h3->m0", "a1.h3->m1", "m0->a1.h2<v>", "m1->logits"),
        *("input->logits", "a0.h0->a1.h0<k>"),
    ]
    assert set(names) <= set(content["edges"]) and list(content["edges"])[:2] == names[:2]
    assert content["nodes"]["a0.h0"].keys() == {"in_graph"}
    held = room.read_scores(scored, model, "image", "examples")
    means = held.table.loc[split(held, others(8), "examples", 0, 20).rows].mean()
    sums = means["embed->logits"] + means["image->logits"]
    assert content["edges"]["input->logits"]["score"] == pytest.approx(sums, rel=1e-12)
    kept = {name for name, edge in content["edges"].items() if edge["in_graph"]}
    own = set(found.circuit["part"])
    assert ("m1->logits" in kept) == ("decoder.1.mlp->logits" in own) and kept
    (tmp_path / "mine.json").write_text(found.importances)
    scores, circuit, parts = mib.read(tmp_path / "mine.json", model)
    assert circuit is None and scores["decoder.1.mlp->logits"] == means["decoder.1.mlp->logits"]
    assert parts.each["input->decoder.1.attn.k2"] == (
        Edge("embed", "decoder.1.attn.k2"),
        Edge("image", "decoder.1.attn.k2"),
    )
    given = {"draws": 1, "fractions": (0.5, 1.0)}
    again = vlmscope.faithfulness(model, others(4), tmp_path / "mine.json", "image", **given)
    assert again.summary["parts"] == len(content["edges"]) and not again.summary["held_out"]
    assert again.table["f"].iloc[-1] == pytest.approx(1, abs=1e-9)
    written = json.loads(again.importances)["edges"]
    assert {name: edge["score"] for name, edge in written.items()} == pytest.approx(
        {name: edge["score"] for name, edge in content["edges"].items()}
    )


def edge_file(file, names, **cfg):
    edges = {name: {"in_graph": False, "score": 1.0} for name in names}
    return importances(file, {"input": {"in_graph": True}}, edges, **{"n_layers": 2, **cfg})


def test_bad_files_of_edges(model, tmp_path):
    for name in ("m1->m0", "a0.h0->a0.h1<q>", "input->a0.h0", "input->a0.h4<q>", "logits->input"):
        with pytest.raises(StoreError, match="is no edge of tiny-llava; expected a writer and a reader"):
            mib.read(edge_file(tmp_path / "a.json", ["input->m0", name]), model)
    file = edge_file(tmp_path / "b.json", ["input->m0"])
    content = json.loads(file.read_text())
    content["edges"] |= {"input->m1": {"in_graph": True, "score": float("nan")}}
    file.write_text(json.dumps(content))
    scores = mib.read(file, model).scores
    assert scores["input->decoder.0.mlp"] == 1.0 and scores["input->decoder.1.mlp"] == 0.0
    with pytest.raises(ModelError, match="no names for edges of cross-attention.* that heads share"):
        mib.read(edge_file(tmp_path / "c.json", ["input->m0"], n_layers=3), llava())
    with pytest.raises(ModelError, match="post-norm"):
        mib.read(edge_file(tmp_path / "d.json", ["input->m0"], n_heads=2, d_model=8), blip())


# --- what is refused -------------------------------------------------------------------------


def test_edges_of_something_else(model, scored, tmp_path):
    given = others(8)
    for outside in ("mean", "zero"):
        with pytest.raises(VlmscopeError, match="edges outside of a circuit carry what the other run has"):
            vlmscope.faithfulness(model, given, scored, "image", outside=outside)
    with pytest.raises(StoreError, match="scores of another model"):
        vlmscope.faithfulness(llava(layers=2, kv_heads=4, seed=1), given, scored, "image")
    with pytest.raises(StoreError, match="image corrupted and not text"):
        vlmscope.faithfulness(model, given, scored, "text")
    with pytest.raises(StoreError, match="of other data"):
        vlmscope.faithfulness(model, others(20, first=30), scored, "image", data="mine")
    with pytest.raises(DataError, match="too few examples for halves: 3 with scores"):
        vlmscope.faithfulness(model, given[:3], scored, "image")


def test_edges_that_the_model_does_not_have(model, scored, monkeypatch):
    read = room.read_scores

    def other(*arguments):
        held = read(*arguments)
        each = dict(held.edges.each) | {"embed->decoder.7.mlp": (Edge("embed", "decoder.7.mlp"),)}
        return held._replace(edges=Edges("decoder", held.edges.shape, each))

    monkeypatch.setattr(room, "read_scores", other)
    with pytest.raises(
        DataError, match="none of 4 examples could be run; .* has other edges than those that"
    ):
        vlmscope.faithfulness(model, others(8), scored, "image", **OPTIONS)


@pytest.mark.slow
def test_no_circuit_of_edges_of_a_random_model_passes(tmp_path):
    """Whatever its scores find, there is no behaviour to carry."""
    for seed in range(5):
        model, given = llava(seed=seed), others(24, first=100 * seed)
        vlmscope.edges(model, given, "image", out=tmp_path / str(seed))
        found = vlmscope.faithfulness(model, given, tmp_path / str(seed), "image", fractions=(0.1, 1.0))
        assert not found.summary["circuit"]["passes"]

"""The pipeline's circuits of edges: measured, drawn, opened, gone on with, and left out."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

import vlmscope
from vlmscope import notice
from vlmscope.errors import StoreError
from vlmscope.notice import Spec, pipeline
from vlmscope.patching.edge_circuits import circuits
from vlmscope.patching.graph import Edge
from vlmscope.runs import corrupt

SPEC = Spec(
    "toy-llava",
    ("states",),
    ("image",),
    sites=("decoder.*.attn.h*@readout",),
    limit=8,
    edges=True,
    device="cpu",
)
KEY = ("states", "image")
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 10 can hardly show anything")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("notice") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "EDGES", (0.1, 1.0))
        patch.setattr(pipeline, "DRAWS", 2)
        notice.run(SPEC, folder, lines.append)
    return folder, lines


def test_what_the_circuit_carries_is_what_it_carries_in_a_run(done):
    """Of the examples that did not score the edges, and of those alone."""
    found = vlmscope.open(done[0])
    mechanism, scored = found.mechanisms[KEY], found.edges[KEY]
    own, model = mechanism.summary, vlmscope.load("toy-llava")
    base = vlmscope.studies.run_folder.read_run(done[0] / "mechanism" / "states-image").baselines()
    measured, held = set(base["example"]), 4
    assert len(measured) == held == own["measured"] and own["ranked_on"] == held and own["held_out"]
    rows = scored.edges()
    assert measured < set(rows["example"]) and scored.spec["method"] == "eap-ig"
    means = rows[~rows["example"].isin(measured)].groupby(["source", "target"])["score"].mean()
    edges = [Edge(*part.split("->")) for part in mechanism.circuit["part"]]
    assert mechanism.circuit["score"].tolist() == pytest.approx([means[edge] for edge in edges], rel=1e-9)
    given = [one for one in vlmscope.examples("states", limit=8) if one.id in measured]
    pairs = [corrupt.pairs(model, one, "image")[0] for one in given]
    m = [sum(float(next(circuits(model, pair, [some])).ld) for pair in pairs) for some in ([], edges)]
    whole = base["ld_clean"].sum()
    assert own["circuit"]["f"] == pytest.approx((m[1] - m[0]) / (whole - m[0]), abs=1e-4)


def test_the_page_draws_the_circuit(done):
    folder, lines = done
    page = (folder / "report.html").read_text("utf-8")
    found = vlmscope.open(folder).mechanisms[KEY]
    assert "Circuits of edges: states, image corrupted" in page and "no circuits of edges" not in page
    assert f"states, image: {found.lines()[-1]}" in lines and found.lines()[-1][1:] in page
    [drawn] = (folder / "report-figures").glob("*-graph.csv")
    edges = found.circuit["part"].str.partition("->")[[0, 2]].set_axis(["source", "target"], axis=1)
    wanted = edges.assign(score=found.circuit["score"])
    pd.testing.assert_frame_equal(pd.read_csv(drawn), wanted)
    again = vlmscope.write_report([folder], folder.parent / "again.html").read_text("utf-8")
    assert "Circuits of edges: states, image corrupted" in again


def test_done_again_it_only_reads(done, monkeypatch):
    monkeypatch.setattr(pipeline, "EDGES", (0.1, 1.0))
    monkeypatch.setattr(pipeline, "DRAWS", 2)
    monkeypatch.setattr("vlmscope.studies.edges.score_edges", None)
    monkeypatch.setattr("vlmscope.patching.edge_circuits.circuits", None)
    lines: list[str] = []
    notice.run(SPEC, done[0], lines.append)
    carried = [[one for one in some if " edges carry " in one] for some in (lines, done[1])]
    assert carried[0] == carried[1] != []


def test_without_edges_there_are_none(done, tmp_path):
    without = replace(SPEC, edges=False)
    with pytest.raises(StoreError, match=r"another notice run \(edges differ\)"):
        notice.run(without, done[0])
    lines: list[str] = []
    notice.run(replace(without, limit=2), tmp_path / "out", lines.append)
    assert not any((tmp_path / "out" / name).exists() for name in ("edges", "mechanism"))
    assert " edges" not in "\n".join(lines) and vlmscope.open(tmp_path / "out").mechanisms == {}


def test_too_few_examples_for_halves(done, monkeypatch):
    monkeypatch.setattr(pipeline.Pipeline, "kept", lambda *_: [])
    found = pipeline.Pipeline(SPEC, done[0]).mechanism(*KEY)
    assert found == (None, "states, image: too few examples for halves, so no circuit of edges is measured")

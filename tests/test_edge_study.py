"""The study of edges: its folder, its table, what verifies it, its figure, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from models import blip, example, llava

import vlmscope
from vlmscope.errors import ModelError, StoreError, VlmscopeError
from vlmscope.patching.edge_patches import exact
from vlmscope.patching.edges import score_edges
from vlmscope.report import write_report
from vlmscope.runs import corrupt
from vlmscope.studies import edges as study
from vlmscope.studies.edge_tables import by_reader, over_examples
from vlmscope.studies.edges import edges


def others(count):
    return [example(id=f"e{n}", answer=answer) for n, answer in enumerate(["red", "circle", "or"][:count])]


def test_the_table_holds_means_over_examples():
    model, given = llava(), others(2)
    found = edges(model, given, "image")
    each = [score_edges(model, corrupt.pairs(model, one, "image")[0]) for one in given]
    expected = dict(zip(each[0].graph.edges, np.mean([one.scores for one in each], 0), strict=True))
    assert {(row.source, row.target) for row in found.itertuples()} == set(expected)
    for row in found.itertuples():
        assert row.score == pytest.approx(expected[row.source, row.target], rel=1e-9, abs=1e-12)
    assert found["score"].abs().is_monotonic_decreasing and found["exact"].isna().all()


def test_all_edges_exactly():
    model, one = llava(), others(1)
    found = edges(model, one, "image", method="exact")
    pair = corrupt.pairs(model, one[0], "image")[0]
    some = list(found.iloc[::29][["source", "target"]].itertuples(index=False, name=None))
    np.testing.assert_allclose(found["score"].iloc[::29], exact(model, pair, some, by_rows=False), atol=1e-9)
    pd.testing.assert_series_equal(found["score"], found["exact"], check_names=False)
    assert found.attrs["check"]["rows"] == 5 and found.attrs["check"]["largest"] < 1e-9


def test_a_folder_goes_on(tmp_path, monkeypatch):
    model, given, more = llava(), others(3), {"method": "eap", "verify": 3}
    whole = edges(model, given, "image", **more)
    work, done = study._scored, []

    def stopped(*arguments):
        done.append(1)
        if len(done) > 1:
            raise KeyboardInterrupt
        return work(*arguments)

    monkeypatch.setattr(study, "_scored", stopped)
    with pytest.raises(KeyboardInterrupt):
        edges(model, given[:2], "image", **more, out=tmp_path)
    monkeypatch.setattr(study, "_scored", work)
    assert not (tmp_path / "edges.parquet").exists()
    edges(model, given[:2], "image", **more, out=tmp_path)
    table = edges(model, given, "image", **more, out=tmp_path)
    pd.testing.assert_frame_equal(table, whole)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "edges.parquet"), whole, check_like=True)
    run = vlmscope.open(tmp_path)
    assert run.edges()["example"].unique().tolist() == ["e0", "e1", "e2"]
    assert json.loads((tmp_path / "agreement.json").read_text()) == whole.attrs["agreement"]
    kinds = {"decoder.attn.q", "decoder.attn.k", "decoder.attn.v", "decoder.mlp", "decoder.logits"}
    assert set(whole.attrs["agreement"]) == kinds
    assert all(kind["verified"] == 18 for kind in whole.attrs["agreement"].values())
    assert run.check == whole.attrs["check"] and run.check["largest"] < 1e-9
    with pytest.raises(StoreError, match="holds another run: verify is 3 there, 4 here"):
        edges(model, given, "image", verify=4, out=tmp_path)
    with pytest.raises(StoreError, match="a run that holds edges, no effects"):
        run.effects()
    page = write_report([tmp_path], tmp_path / "report.html")
    text = page.read_text("utf-8")
    assert "Edges of the decoder" in text and "The largest edges" in text and "decoder.attn.v" in text


def test_a_run_that_was_stopped_before_its_table(tmp_path, monkeypatch):
    """It had one already, of fewer examples."""
    model, given = llava(), others(2)
    edges(model, given[:1], "image", verify=2, out=tmp_path)
    write_beside = study.write_beside

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "write_beside", stopped)
    with pytest.raises(KeyboardInterrupt):
        edges(model, given, "image", verify=2, out=tmp_path)
    monkeypatch.setattr(study, "write_beside", write_beside)
    table = edges(model, given, "image", verify=2, out=tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "edges.parquet"), table, check_like=True)


def test_exact_means_are_of_the_same_examples():
    rows = {"source": "image", "target": ["decoder.1.attn.k0"] * 2 + ["logits"] * 2}
    each = pd.DataFrame({**rows, "example": ["a", "b"] * 2, "score": [1.0, 2.0, 3.0, 5.0]})
    found = over_examples(each.assign(exact=[None, 1.0, 2.0, 4.0])).set_index("target")
    assert found.loc["logits", "exact"] == 3.0 and np.isnan(found.loc["decoder.1.attn.k0", "exact"])
    places = by_reader(each)[["tower", "kind", "unit", "layer"]].drop_duplicates().values.tolist()
    assert places[0] == ["decoder", "attn", "k0", 1] and places[1][:2] == ["decoder", "logits"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "path"}, "unknown method 'path'; expected eap, eap-ig, exact"),
        ({"method": "exact", "verify": 3}, "has nothing to verify; leave it out"),
        ({"steps": 3}, "eap has no steps, only eap-ig has"),
        ({"method": "eap-ig", "steps": 0}, "the number of steps"),
        ({"metric": "kl", "direction": "noise"}, "around which it has no gradient"),
        ({"tower": "ear"}, "has no tower 'ear'; expected one of vision, decoder"),
        ({"corrupt": None}, "without a corruption"),
    ],
)
def test_what_is_refused(given, words, tmp_path):
    with pytest.raises(VlmscopeError, match=words):
        edges(llava(), others(1), **{"corrupt": "image", "out": tmp_path / "x", **given})
    assert not (tmp_path / "x").exists()


def test_post_norm_towers_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ModelError, match="post-norm.*has no edges across them; take its heads and MLPs"):
        edges(blip(), others(1), "image", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_part_is_said(tmp_path):
    edges(llava(), others(1), "image", out=tmp_path)
    part = tmp_path / "edges" / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(StoreError, match="this part is damaged"):
        vlmscope.open(tmp_path).edges()

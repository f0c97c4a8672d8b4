"""Peers beside vlmscope on the planted benchmark: what can be held without their packages."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

PLANTED = Path(__file__).parents[1] / "benchmarks" / "planted"
sys.path.append(str(PLANTED))
peers, planting, rows, tables = map(import_module, ("peers", "planting", "rows", "tables"))


def test_what_is_not_installed_is_said_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(SystemExit, match=r"(?s)no transformer_lens: .*transformer-lens==3\.9\.0.*EAP-IG@"):
        peers.peers()


def test_their_names_are_ours():
    head, mlp = SimpleNamespace(name="a2.h5", layer=2, head=5), SimpleNamespace(name="m3", layer=3)
    ends = [SimpleNamespace(name=name, layer=0) for name in ("input", "logits")]
    assert [peers.named(one) for one in (head, mlp, *ends)] == [
        "decoder.2.attn.h5",
        "decoder.3.mlp",
        "image",
        "logits",
    ]
    assert peers.named(head, "k") == "decoder.2.attn.k5"


def test_their_tensors_of_a_gpu_are_made_here():
    with peers.OnCpu():
        assert torch.zeros(3, device="cuda").device.type == "cpu"
        assert torch.zeros(3, dtype=torch.float64).dtype == torch.float64


def test_what_enters_and_the_logits_are_those_of_the_whole_model():
    made = planting.plant(planting.Recipe("D", 0, planted=False))
    given = peers.batch(made.model, peers.scenes(2, 1, made.recipe.style))
    entered, logits = peers.embedded(made.model.hf, given.clean)
    hf = made.model.hf
    is_image = given.tokens == hf.config.image_token_id
    assert is_image.sum(1).tolist() == [36, 36]
    words = hf.get_input_embeddings()(given.tokens)
    assert torch.equal(entered[~is_image], words[~is_image])
    with torch.no_grad():
        again = hf.model.language_model(inputs_embeds=entered).last_hidden_state[:, -1]
    torch.testing.assert_close(hf.lm_head(again), logits)


def test_what_differs_is_said():
    assert peers.apart({"a": 2.0, "b": -4.0}, {"a": 2.0, "b": -3.0}) == 0.25
    assert peers._held("recipe", {"logits": 1e-7}) == {"logits": 1e-7}
    with pytest.raises(RuntimeError, match=r"differ by \{'eap': 0\.25\}"):
        peers._held("recipe", {"logits": 1e-7, "eap": 0.25})


def test_table_of_peers():
    def cell(auroc, more=()):
        figures = {"auroc": auroc, "ap": 0.5, "decoys_first": 0.0, "seconds": 2.0, **dict(more)}
        return {name: {"mean": value} for name, value in figures.items()}

    found = {}
    for say, auroc in (("head", 0.8), ("neurons", 1.0)):
        found[f"D-{say} edges 0.01"] = {"eap": cell(auroc)}
        whole = {"cpr": 0.9, "cmd": 0.1}
        oracle = {name: {"mean": value} for name, value in whole.items()}
        found[f"D-{say} edges 0.3"] = {"eap": cell(1.0, whole.items()), "oracle": oracle}
    lines = list(tables._peer_table(found, "edges"))
    assert lines[1].startswith("| edges | AUROC 0.01 | AP 0.01 | AUROC 0.3 | AP 0.3 | CPR | CMD |")
    assert lines[3] == "| eap | 0.900 | 0.500 | 1.000 | 0.500 | 0.900 | 0.100 | 0.000 | 2.000 |"
    assert lines[4] == "| oracle |  |  |  |  | 0.900 | 0.100 |  |  |"


def test_nulls_of_edges_alone(monkeypatch, tmp_path):
    """A part of its own, which goes on from the models that it has."""
    found = spec_from_file_location("planted_run", PLANTED / "run.py")
    run = module_from_spec(found)
    found.loader.exec_module(run)
    monkeypatch.setattr(run, "plant", lambda recipe: recipe)
    asked, kept = [], {}

    def null(recipe, kind):
        asked.append((recipe.form, recipe.seed, recipe.planted, kind))
        return {"passes": False, "unasked": recipe.seed == 1, "f": 0.5, "random": 0.1}

    monkeypatch.setattr(run, "null_of", null)
    for seeds in (2, 3):
        known = rows.Rows(tmp_path / "nulls.jsonl", float("inf"))
        run.run_nulls(seeds, known, kept.__setitem__)
    assert asked == [("D", seed, False, "edges") for seed in range(3)]
    own = kept["nulls"]["D edges"]
    assert own["passes"]["share"] == 0 and own["unasked"] == own["unasked"] | {"share": 1 / 3, "of": 3}
    assert [one["f"] for one in own["models"]] == [0.5] * 3
    line = next(row for row in tables.mechanism_bars({"nulls": kept["nulls"]}) if "random" in row[0])
    assert line == ("circuits that pass in random models, D edges", "0", "0 (≤ .71)", "3 models")

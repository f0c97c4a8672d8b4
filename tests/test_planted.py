"""The planted benchmark: what it says it has planted is there, by plain torch, and is found."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch

from vlmscope.studies.sweep import sweep

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks" / "planted"))
measures, pictures, plain, planting, scores, tables = map(
    import_module, ("measures", "pictures", "plain", "planting", "scores", "tables")
)
Recipe, heads_of, plant, scenes = planting.Recipe, plain.heads_of, planting.plant, pictures.scenes

FORMS = [("C", "head"), ("D", "neurons")]
EFFECT = 0.3


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def planted(request):
    form, say = request.param
    return plant(Recipe(form, 0, effect=EFFECT, noise=0.3, say=say))


@pytest.fixture(scope="module")
def runs(planted):
    parts = heads_of(planted.model.hf) + planted.having("neuron")
    return plain.Runs(planted.model.hf, pictures.batch(planted.model, scenes(96, 99)), parts)


def test_what_speaks_carries_the_share_that_was_asked_for(planted, runs):
    spoken = planted.having("mover", "neuron")
    assert runs.share(spoken) == pytest.approx(EFFECT, rel=0.2)
    assert -runs.share(spoken, "clean", "corrupt") == pytest.approx(EFFECT, rel=0.2)
    carrier = planted.having("carrier")
    assert runs.share(carrier) == pytest.approx(1 - EFFECT, rel=0.1)
    assert runs.share([*spoken, *carrier]) == pytest.approx(1.0, abs=0.1)


def test_readers_move_the_answer_and_the_suppressor_takes_back(planted, runs):
    readers, suppressor = planted.having("reader"), planted.having("suppressor")
    assert runs.share(readers) > EFFECT and runs.share(readers, "clean", "corrupt") < -EFFECT
    assert runs.share(suppressor) < -0.1 * EFFECT < 0.1 * EFFECT < runs.share(suppressor, "clean", "corrupt")
    assert runs.share([*readers, *suppressor]) == pytest.approx(EFFECT, rel=0.4)


def test_decoys_and_random_heads_move_nothing(planted, runs):
    for part in planted.having(*planting.DECOYS):
        assert abs(runs.share([part])) < 0.01, (part, planted.roles[part])
        assert abs(runs.share([part], "clean", "corrupt")) < 0.01
    [blind] = planted.having("blind")
    assert float(runs.patched([blind]).abs().max()) == 0.0
    rest = [part for part in heads_of(planted.model.hf) if part not in planted.roles]
    assert max(abs(runs.share([part])) for part in rest) < 0.02


def test_the_backup_acts_only_when_the_reader_is_out(planted, runs):
    readers, backup = planted.having("reader"), planted.having("backup")
    alone = runs.share(backup, "clean", None)
    out = runs.share(readers, "clean", None)
    behind = runs.share([*readers, *backup], "clean", None) - out
    assert abs(alone) < 0.1 * EFFECT and behind < -0.3 * EFFECT


def test_heads_look_where_they_were_told(planted):
    given = scenes(12, 7)
    form, rows = planted.recipe.form, {role: [] for role in ("reader", "blind", "salient", "sink")}
    tower, kind, at = ("encoder", "cross", "noun") if form == "C" else ("decoder", "attn", "last")
    for n, example in enumerate(given.examples()):
        inputs = planted.model.prepare(example).clean
        paid = planted.model.attention(inputs, tower, kind, at)[:, :, 0]
        first = min(inputs.layout[planted.model.attended(tower, kind)].cells)
        for role, keys in (("reader", 0), ("blind", 0), ("salient", 2), ("sink", None)):
            [part] = planted.having(role)
            layer, head = int(part.split(".")[1]), int(part.rsplit("h", 1)[1])
            key = 0 if keys is None else first + int(given.where[n, keys])
            rows[role].append(float(paid[layer, head, key]))
    means = {role: sum(some) / len(some) for role, some in rows.items()}
    assert means["reader"] > 0.3 and min(means[r] for r in ("blind", "salient", "sink")) > 0.7, means


def test_a_sweep_gives_what_plain_torch_gives(planted):
    given = scenes(4, 5)
    found = measures.measure(planted, given, heads_of(planted.model.hf)).mean()
    table = sweep(planted.model, given.examples(), measures.sites_of(planted.recipe.form), check=0)
    mean = table.groupby(table["site"].str.split("@").str[0])["logit_diff"].mean()
    assert set(mean.index) == set(found)
    assert max(abs(mean[part] - effect) for part, effect in found.items()) < 1e-4


def test_the_planted_parts_are_ranked_first(planted):
    row = measures.one(planted, scenes(32, 3), dict.fromkeys(heads_of(planted.model.hf), 0.5))
    assert row["heads"]["auroc"] > 0.99 and row["attention"]["auroc"] == 0.5
    if "neurons" in row:
        assert row["neurons"]["auroc"] > 0.95


def test_heads_are_called_what_they_were_planted_to_be(planted):
    every = heads_of(planted.model.hf)
    parts = [part for part in planted.roles if part in every]
    parts += [part for part in every if part not in planted.roles][:4]
    found = measures.labelled(planted, measures.labels_of(planted, scenes(16, 11), parts))
    mean, each = scores.macro_f1(found["confusion"])
    assert mean >= 0.8, (each, found["labels"])
    assert not any(found["decoys_named"])


@pytest.mark.slow
def test_labels_do_not_turn_on_sharpness():
    found = measures.at_sharpness(Recipe("D", 1, effect=EFFECT, noise=0.3), (1.0, 16.0))
    assert all(len(set(labels)) == 1 for labels in found.values()), found
    assert {"detection", "suppression"} <= {labels[0] for labels in found.values()}


def test_no_head_of_a_random_network_is_named():
    for form in "CD":
        made = plant(Recipe(form, 0, planted=False))
        some = heads_of(made.model.hf)[::12]
        found = measures.labelled(made, measures.labels_of(made, scenes(12, 11), some))
        assert not any(found["named"]), found["labels"]


def test_intervals_cover_the_mean_over_many_examples():
    found = measures.coverage(Recipe("D", 0), 200)  # of 32 heads one writes nothing
    assert found["heads"] == 31 and 0.9 <= found["covered"] <= 0.99


def test_the_same_recipe_gives_the_same_model():
    recipe = Recipe("C", 3, effect=0.1)
    first, again = plant(recipe), planting.scale(plant(Recipe("C", 3, effect=1.0)), 0.1)
    assert first.roles == again.roles
    other = again.model.hf.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.model.hf.state_dict().items())


def test_without_a_circuit_there_is_none():
    made = plant(Recipe("C", 0, planted=False))
    assert not made.roles


def test_scores_by_hand():
    assert scores.auroc([3, 2, 1, 0], [True, False, True, False]) == 0.75
    assert scores.auroc([1, 1, 1], [True, False, False]) == 0.5
    assert scores.average_precision([3, 2, 1, 0], [True, False, True, False]) == pytest.approx(
        (1 + 2 / 3) / 2
    )
    found = scores.ranking({"a": -3.0, "b": 1.0, "c": 9.0}, {"a": "reader", "c": "carrier"})
    assert found == {"auroc": 1.0, "ap": 1.0, "ap_random": 0.5}
    labels = {"a": "detection", "b": "detection", "c": "unclear", "d": "none", "e": "relay"}
    roles = {"a": "reader", "b": "blind", "c": "suppressor"}
    pairs = scores.confusion(labels, roles)
    assert pairs == [
        ("reader", "reader"),
        ("blind", "reader"),
        ("suppressor", "random"),
        ("random", "random"),
        ("random", "relay"),
    ]
    mean, each = scores.macro_f1(pairs)
    assert each == pytest.approx({"reader": 2 / 3, "suppressor": 0.0, "blind": 0.0, "random": 0.5})
    assert mean == pytest.approx(7 / 24)


def test_somebody_elses_ranking(tmp_path):
    recipe = Recipe("C", 1)
    made = plant(recipe)
    best = dict.fromkeys(made.having("reader", "suppressor", "mover"), 1.0)
    table = pd.DataFrame({"part": list(best), "score": list(best.values())})
    table.to_csv(tmp_path / "mine.csv", index=False)
    assert measures.submission(tmp_path / "mine.csv", recipe)["auroc"] == 1.0
    pd.DataFrame({"part": ["encoder.9.cross.h0"], "score": [1.0]}).to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(SystemExit, match=r"unknown part 'encoder\.9\.cross\.h0'; expected heads such as"):
        measures.submission(tmp_path / "bad.csv", recipe)


@pytest.mark.parametrize("name", ["planted-cpu.json", "planted-edges-cpu.json"])
def test_the_documentation_has_the_tables_of_the_stored_result(name):
    stored = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    lines = (ROOT / "docs" / "benchmark.md").read_text().splitlines()
    found = [line for line in tables.tables(stored) if line]
    assert len(found) > 40 and not set(found) - set(lines)

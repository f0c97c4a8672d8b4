"""The pipeline: its specification, its folder, going on after kills, its selection."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from families import FAMILIES
from models import blip, example, picture, sweep_to
from pretend_workers import Pretended

import vlmscope
from vlmscope import notice
from vlmscope.checkpoint import load
from vlmscope.errors import DataError, StoreError, VlmscopeError
from vlmscope.notice import Spec, pipeline
from vlmscope.notice.kept import selection
from vlmscope.studies import circuits
from vlmscope.studies.plan import estimate
from vlmscope.studies.run_folder import read_run
from vlmscope.studies.sweep import sweep
from vlmscope.studies.task import task_of

SMALL = Spec("toy-blip", ("states", "faces"), limit=14, function_examples=6, edges=True, device="cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 10 can hardly show anything")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notice") / "out"
    lines: list[str] = []
    notice.run(SMALL, folder, lines.append)
    return folder, lines


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """All that the pipeline computes."""
    found = {"selection": pd.read_csv(folder / "selection.csv")}
    for path in sorted(folder.glob("runs/*")):
        found[path.name] = read_run(path).effects()
        found[f"{path.name} baselines"] = read_run(path).baselines()
    for path in sorted([*folder.glob("circuits/*.csv"), *folder.glob("[hf]*/*/*.csv")]):
        found[str(path.relative_to(folder))] = pd.read_csv(path)
    return found


def test_everything_is_there(done):
    folder, lines = done
    found = tables(folder)
    for name in (
        "states-image",
        "states-text",
        "faces-image",
        "faces-text",
        "selection",
        "circuits/heads.csv",
        "circuits/universal.csv",
        "heads/states/functions.csv",
        "heads/faces/together.csv",
        "faithfulness/states-image/circuit.csv",
    ):
        assert len(found[name]), name
    page = (folder / "report.html").read_text("utf-8")
    for text in (
        "Important and universal heads",
        "What heads do: states",
        "faces, text corrupted",
        "Circuits: faces",
        "no circuits of edges here: the decoder tower of toy-blip: its blocks normalise the residual stream",
    ):
        assert text in page, text
    assert not (folder / "mechanism").exists()
    said = "\n".join(lines)
    for text in (
        "Estimated from one example",
        "Kept for patching",
        "Universal over all 4 runs",
        "No circuits of edges: the decoder tower",
        "of the behaviour on",
    ):
        assert text in said, text


def test_all_of_it_can_be_opened(done):
    folder, _ = done
    found = vlmscope.open(folder)
    assert found.spec == SMALL and set(found.heads) == {"states", "faces"}
    assert set(found.runs) == {(name, c) for name in SMALL.data for c in ("image", "text")}
    assert all(run.check["rows"] == 5 and run.check["largest"] < 1e-3 for run in found.runs.values())
    assert set(found.faithfulness) == set(found.runs)
    wanted = tables(folder)
    pd.testing.assert_frame_equal(found.selection, wanted["selection"])
    heads = pd.read_csv(folder / "circuits" / "heads.csv")
    opened = found.circuits.heads.astype({"confirmed": "object"}).fillna({"confirmed": np.nan})
    pd.testing.assert_frame_equal(opened, heads, check_dtype=False)


def test_heads_take_the_effects_of_the_sweep(done):
    """What patching a head in does is the mean of the run's rows, to the last digit."""
    found = vlmscope.open(done[0])
    rows = found.runs["states", "image"].effects().set_index("example")
    measures = found.heads["states"].measures
    effects = measures[measures["measure"] == "effect"]
    run = found.runs["states", "image"]
    kept, held_out = run.baselines().query("not excluded")["example"].head(6), circuits.held_out(run)
    for row in effects.itertuples():
        here = rows[(rows["unit"] == f"h{row.head}") & (rows["layer"] == row.layer)]
        here = here[
            (here["tower"] == row.tower) & (here["kind"] == row.kind) & (here["slot"] == row.position)
        ]
        held = [name for name in kept if name in held_out[row.site]]  # those that did not choose the head
        assert here.loc[held, "logit_diff"].mean() == pytest.approx(row.value, rel=1e-12)


def test_modules_and_heads_at_every_token(done):
    effects = read_run(done[0] / "runs" / "states-image").effects()
    one = effects[effects["example"] == effects["example"][0]]
    tokens = one.loc[one["tower"] == "encoder", "position"].nunique()
    kinds = one.groupby(["tower", "kind", one["unit"].notna()]).size().to_dict()
    for kind in ("resid", "attn", "cross", "mlp"):
        assert kinds["encoder", kind, False] == 3 * tokens and kinds["decoder", kind, False] == 3
    for kind in ("attn", "cross"):
        assert kinds["encoder", kind, True] == 12 * tokens and kinds["decoder", kind, True] == 12


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_tables(done, tmp_path):
    wanted = tables(done[0])
    spec = tmp_path / "spec.toml"
    SMALL.save(spec)
    command = [sys.executable, "-m", "vlmscope", "notice", "--spec", spec, "--out", tmp_path / "out"]
    draw = random.Random(4)
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(3.0, 8.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert kills, "it was never killed"
    found = tables(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(found[name], table, rtol=0, atol=0, obj=name)


@pytest.mark.filterwarnings("ignore:a worker died")
def test_two_workers_end_with_the_same_tables(done, tmp_path):
    """Of which some die; this process loads no model for itself."""
    draw, died, teams = random.Random(1), [], []

    def dies(moment):
        found = len(died) < 6 and draw.random() < 0.1
        died.extend([moment] * found)
        return found

    def by(given):
        teams.append(Pretended(draw, dies).team(2, given))
        return teams[-1]

    lines: list[str] = []
    notice.run(SMALL, tmp_path / "out", lines.append, by)
    assert len(died) == 6 and "model" not in vars(teams[0].given)
    wanted, found = tables(done[0]), tables(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(found[name], table, rtol=0, atol=0, obj=name)
    assert [line for line in lines if "Estimated" not in line][:-1] == [
        line for line in done[1] if "Estimated" not in line
    ][:-1]


def test_circuits_of_the_whole_folder(done):
    found = notice.circuits.find([done[0]]).heads
    wanted = pd.read_csv(done[0] / "circuits" / "heads.csv")
    assert sorted(found["mean"]) == pytest.approx(sorted(wanted["mean"]))


def test_done_again_it_only_reads(done, tmp_path, monkeypatch):
    folder = shutil.copytree(done[0], tmp_path / "out")
    monkeypatch.setattr(pipeline.heads, "functions", None)
    monkeypatch.setattr("vlmscope.patching.engine.patch", None)
    notice.run(SMALL, folder)


def test_another_specification_is_refused(done):
    with pytest.raises(StoreError, match=r"another notice run \(limit, seed differ\)"):
        notice.run(replace(SMALL, limit=5, seed=3), done[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("selection.csv", "not empty, and not a folder of notice"),
        ("thesis.tex", "not empty, and not a folder of notice"),
        ("own/selection.csv", r"selection\.csv: is there, and no result of this command"),
        ("own/circuits/heads.csv", r"heads\.csv: is there, and no result of this command"),
    ],
)
def test_a_used_folder_is_refused_before_anything_is_computed(tmp_path, monkeypatch, name, message):
    (tmp_path / "out" / "own" / "circuits").mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    folder = tmp_path / "out" / ("own" if name.startswith("own") else "")
    if name.startswith("own"):
        SMALL.save(folder / "notice.toml")
    there = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(pipeline, "load", None)
    with pytest.raises(StoreError, match=message):
        notice.run(SMALL, folder)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == there


# --- selection -------------------------------------------------------------------------------


@pytest.mark.parametrize("corrupt", [("image",), ("text",), ("image", "text")])
def test_data_without_any_pairs_is_refused_before_anything_is_written(tmp_path, corrupt):
    picture(1, 60).save(tmp_path / "1.png")
    cells = "id,clean_image_path,clean_prompt,correct_answer,incorrect_answer\n"
    (tmp_path / "d.csv").write_text(cells + "a,1.png,is it round ?,yes,no\nb,1.png,is it a cat ?,no,yes\n")
    spec = Spec("toy-blip", (str(tmp_path / "d.csv"),), corrupt=corrupt, device="cpu")
    with pytest.raises(
        DataError, match=r"no example of d has what the corruption (image|text).* or corrupt by noise"
    ):
        notice.run(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_right_answers_that_follow_are_kept(tmp_path):
    """Against the model's own generations."""
    model = load("toy-blip")
    from vlmscope.data import examples

    given = examples("states", limit=6)
    wrong = [replace(given[0], id="wrong", answer="purple", roles={})]
    same = [replace(given[1], id="still", corrupt_image=given[1].clean_image)]
    gone = [replace(given[2], id="gone", clean_image=tmp_path / "gone.png")]
    everything = [*given, *wrong, *same, *gone]
    run = sweep_to(tmp_path / "r", model, everything, "decoder.0.cross@last", "image", select=True)
    base = run.baselines().set_index("example")
    kept = [
        e.id
        for e in given
        if model.answer(model.prepare(e).clean) == e.answer
        and model.answer(model.prepare(replace(e, corrupt_prompt=None)).corrupt) == e.foil
    ]
    assert base.index[~base["excluded"]].tolist() == kept
    assert "not 'purple'" in base.loc["wrong", "reason"] and not base.loc["wrong", "correct"]
    assert "with the corrupt image" in base.loc["still", "reason"] and base.loc["still", "correct"]
    assert "no such file" in base.loc["gone", "reason"] and pd.isna(base.loc["gone", "correct"])
    table = selection({("s", "image"): run.baselines()}, {"s": everything}).set_index(["group", "value"])
    row = table.loc[("all", "all")]
    dropped = row[["dropped_wrong", "dropped_not_following", "dropped_not_run"]].tolist()
    assert row["n"] == 9 and row["kept"] == len(kept) and sum(dropped) == 9 - len(kept)
    assert dropped[2] == 1 and ("kind", "color") in table.index


def test_nothing_kept_is_said(tmp_path):
    blip().hf.save_pretrained(tmp_path / "model")
    blip().processor.save_pretrained(tmp_path / "model")
    for n in (1, 2):
        picture(n, 20).save(tmp_path / f"{n}.png")
    file = tmp_path / "data.csv"
    file.write_text(
        "clean_image_path,corrupt_image_path,clean_prompt,correct_answer,incorrect_answer\n"
        "1.png,2.png,is this red or blue ?,red,blue\n"
    )
    spec = Spec(str(tmp_path / "model"), (str(file),), ("image",), dtype="float64")
    with pytest.raises(DataError, match="no example of any set is kept .* select = false"):
        notice.run(spec, tmp_path / "out")


def test_corruptions_that_the_data_cannot_have_are_left_out(tmp_path):
    lines: list[str] = []
    sets = {"one": [replace(example(), corrupt_image=None)]}
    found = list(pipeline._sweeps(Spec("m", ("one.csv",)), sets, lines.append))
    assert found == [("one", "text")] and "no example has a corrupt image" in lines[0]


# --- estimate --------------------------------------------------------------------------------


def test_the_estimate_is_near(done):
    """Twice as many examples take about twice as long and as much room; not a timed test."""
    model = load("toy-blip")
    from vlmscope.data import examples

    given = examples("faces", limit=8)
    one = estimate(task_of(model, given, pipeline.default_sites(model), "image"))
    effects = read_run(done[0] / "runs" / "faces-image").effects()
    assert one.patches == len(effects[effects["example"] == effects["example"][0]])
    size = sum(p.stat().st_size for p in (done[0] / "runs" / "faces-image" / "effects").iterdir())
    assert size * 8 / 14 <= one.bytes <= size * 4
    assert one.seconds > 0


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(StoreError, match=r"may take .* and 0.0 kB are free"):
        notice.run(replace(SMALL, data=("faces",), limit=2), tmp_path / "out")


# --- the specification -----------------------------------------------------------------------


def test_a_specification_comes_back(tmp_path):
    spec = Spec(
        "m",
        ("states", str(tmp_path / "my.csv")),
        ("text",),
        sites=("encoder.0.resid@*",),
        limit=3,
        seed=1,
        select=False,
        position="noun",
        dtype="bfloat16",
    )
    spec.save(tmp_path / "s.toml")
    assert Spec.from_toml(tmp_path / "s.toml") == spec
    changed = Spec.from_toml(tmp_path / "s.toml", limit=9, model=None)
    assert changed == replace(spec, limit=9)


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "s.toml").write_text('model = "m"\ndata = ["my.csv", "faces"]\n')
    assert Spec.from_toml(tmp_path / "s.toml").data == (str(tmp_path / "my.csv"), "faces")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'model = "m"\ndata = ["faces"]\nlimti = 3',
            r"unknown key 'limti'; expected some of .*; did you mean 'limit'\?",
        ),
        ('model = "m"\ndata = ["faces"]\nlimit = "3"', "limit is '3'; expected a whole number"),
        ('model = "m"\ndata = ["faces"]\nlimit = 0', "limit is '0'; expected a whole number"),
        ('model = "m"\ndata = ["faces"]\nselect = 1', "select is '1'; expected true or false"),
        ('model = "m"\ndata = [1]', "data is .*; expected a list of texts"),
        ('model = "m"', "no data; add it, or give --data"),
        ("model = m", "not a TOML file"),
        ('model = "m"\ndata = ["faces"]\ncorrupt = ["blur"]', "unknown corruption 'blur'"),
        ('model = "m"\ndata = ["a/x.csv", "b/x.csv"]', "two data sets are called 'x'"),
    ],
)
def test_a_bad_specification(tmp_path, text, message):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(VlmscopeError, match=message):
        Spec.from_toml(tmp_path / "s.toml")


def test_no_such_specification(tmp_path):
    with pytest.raises(VlmscopeError, match="no such file; expected a TOML file"):
        Spec.from_toml(tmp_path / "gone.toml")


@pytest.mark.parametrize("name", ["blip2-opt", "instructblip-t5"])
def test_default_sites_are_where_text_is(name):
    """A Q-Former's positions are queries, so its sites would leave out every example."""
    model = FAMILIES[name]()
    table = sweep(model, [example()], pipeline.default_sites(model), corrupt="text")
    assert set(table["tower"]) == set(model.text_towers)

"""The loop: tables, run folders, what is left out, going on after a kill."""

from __future__ import annotations

import hashlib
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pandas as pd
import pytest
import torch
from families import blip_captioning
from models import blip, example

import vlmscope
from vlmscope.data.example import find_roles
from vlmscope.errors import DataError, SiteError, StoreError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.patching import engine
from vlmscope.runs.corrupt import Noise
from vlmscope.sites import Pattern
from vlmscope.studies import sweep as sweeping
from vlmscope.studies import task
from vlmscope.studies.run_folder import BASELINES, EFFECTS
from vlmscope.studies.sweep import baselines, sweep

SITES = ["encoder.*.cross.h*@answer", "encoder.*.resid@*"]


def several(count: int = 3):
    return [replace(example(), id=f"e{n}") for n in range(count)]


def test_the_columns_and_their_values_by_plain_runs():
    """Every column of one row, against runs of the model itself."""
    model = blip()
    table = sweep(model, [example()], "encoder.1.cross.h1@answer", "image")
    assert list(table.columns) == EFFECTS.names
    (row,) = table.to_dict("records")
    one = replace(example(), corrupt_prompt=None)
    pair = model.prepare(one)
    site = Pattern.parse("encoder.1.cross.h1@answer")
    (value,) = model.capture(pair.clean, [site]).values()
    runs = {
        "clean": model.run(pair.clean),
        "corrupt": model.run(pair.corrupt),
        "patched": model.run(pair.corrupt, [Edit(site, "set", value)]),
    }
    p = {name: logits.softmax(-1)[pair.answer].item() for name, logits in runs.items()}
    ld = {name: (logits[pair.answer] - logits[pair.foil]).item() for name, logits in runs.items()}
    words = {k: row[k] for k in ("example", "corruption", "site", "tower", "kind", "unit", "token", "role")}
    assert words == {
        "example": "one",
        "corruption": "image",
        "site": "encoder.1.cross.h1@answer",
        "tower": "encoder",
        "kind": "cross",
        "unit": "h1",
        "token": "red",
        "role": "answer",
    }
    assert (row["layer"], row["position"]) == (1, 4)
    assert row["p_patched"] == pytest.approx(p["patched"], rel=1e-12)
    assert row["p_restored"] == pytest.approx(p["patched"] - p["corrupt"], rel=1e-9)
    assert row["logit_diff"] == pytest.approx(ld["patched"] - ld["corrupt"], rel=1e-9)
    assert row["effect"] == pytest.approx(
        (ld["patched"] - ld["corrupt"]) / (ld["clean"] - ld["corrupt"]), rel=1e-9
    )


def test_several_positions_at_once_have_no_position():
    table = sweep(blip(), [example()], ["encoder.0.resid@all", "encoder.0.resid@noun"])
    assert table["position"].isna().tolist() == [True, False]
    assert table["token"].isna().tolist() == [True, False] and table["token"][1] == "circle"


def test_examples_by_name_or_alone(tmp_path):
    """A CSV file, as text or path, and a single example are what a list of them is."""
    model, given = blip(), several(2)
    vlmscope.write_csv(tmp_path / "mine.csv", given)
    read = vlmscope.read_csv(tmp_path / "mine.csv")
    wanted = sweep(model, read, SITES)
    for one in (tmp_path / "mine.csv", str(tmp_path / "mine.csv")):
        pd.testing.assert_frame_equal(sweep(model, one, SITES), wanted)
    pd.testing.assert_frame_equal(sweep(model, given[0], SITES), sweep(model, given[:1], SITES))
    assert len(baselines(model, str(tmp_path / "mine.csv"))) == 2
    (tmp_path / "mine.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"mine.png, line 1: not UTF-8"):
        sweep(model, str(tmp_path / "mine.png"), SITES)
    with pytest.raises(DataError, match="no data set 'mine': not a built-in set"):
        sweep(model, "mine", SITES)
    with pytest.raises(DataError, match=r"example 1 is a str \('b'\); expected an Example"):
        sweep(model, iter([given[0], "b"]), SITES)


def test_prompts_near_the_models_limit_do_not_end_a_sweep():
    """BLIP's captioning decoder has 64 positions; what is too long is left out by itself."""
    model = blip_captioning()
    prompts = {"fits": "is this red", "nearly": "red " * 50, "just": "red " * 63, "over": "red " * 64}
    given = [example(text.strip(), id=name, corrupt_prompt=None, roles={}) for name, text in prompts.items()]
    with pytest.warns(UserWarning, match="1 of 4 examples were left out; 'over': the prompt has 65"):
        table = sweep(model, given, "decoder.2.resid@last")
    assert table["example"].tolist() == ["fits", "nearly", "just"]


def test_what_turns_pictures_into_pixels_is_part_of_a_run(tmp_path, monkeypatch):
    """Another torchvision, or none, is another run."""
    monkeypatch.setattr(task, "version", lambda package: f"{package} 1")
    sweep(blip(), [example()], "encoder.0.resid@last", out=tmp_path / "run")
    versions = vlmscope.read_run(tmp_path / "run").spec["versions"]
    assert versions["torchvision"] == "torchvision 1" and versions["pillow"] == "pillow 1"

    def without(package):
        if package == "torchvision":
            raise PackageNotFoundError(package)
        return f"{package} 1"

    monkeypatch.setattr(task, "version", without)
    with pytest.raises(StoreError, match="versions"):
        sweep(blip(), [example()], "encoder.0.resid@last", out=tmp_path / "run")
    sweep(blip(), [example()], "encoder.0.resid@last", out=tmp_path / "other")
    assert "torchvision" not in vlmscope.read_run(tmp_path / "other").spec["versions"]


def test_effect_is_null_where_nothing_was_corrupted():
    same = example(corrupt_image=example().clean_image)
    table = sweep(blip(), [same], "encoder.0.resid@*")
    assert table["effect"].isna().all() and (table["logit_diff"] == 0).all()


def test_directions_ask_the_same_question_of_the_ends():
    """Noising what does nothing leaves the clean run (1); everything at once, the corrupt (0)."""
    model = blip()
    table = sweep(model, [example()], ["encoder.0.attn@*", "vision.0.resid_pre@all"], direction="noise")
    assert table["effect"].iloc[:-1].tolist() == pytest.approx([1.0] * (len(table) - 1))
    assert table["effect"].iloc[-1] == pytest.approx(0.0, abs=1e-9)


def test_the_two_engines_give_the_same_table():
    model = blip()
    for corrupt in ("image", "text", Noise(draws=3)):
        fast = sweep(model, several(2), SITES, corrupt)
        slow = sweep(model, several(2), SITES, corrupt, engine="reference")
        pd.testing.assert_frame_equal(fast, slow, rtol=1e-9, atol=1e-12)


def test_noise_is_the_same_for_the_same_seed_only():
    model = blip()
    tables = [sweep(model, [example()], SITES, Noise(draws=2), seed=s) for s in (0, 0, 1)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0]["logit_diff"].equals(tables[2]["logit_diff"])
    other = sweep(model, [replace(example(), id="other")], SITES, Noise(draws=2), seed=0)
    assert not tables[0]["logit_diff"].equals(other["logit_diff"])


def test_noise_is_averaged_over_draws():
    model = blip()
    from vlmscope.patching import reference
    from vlmscope.runs import corrupt
    from vlmscope.sites import expand, place

    noise = Noise("add", "text", 2.0, draws=3)
    table = sweep(model, [example()], "encoder.1.resid@2", noise)
    lds = []
    for pair in corrupt.pairs(model, example(), noise):
        sites = [
            p
            for s in expand([Pattern.parse("encoder.1.resid@2")], model.shapes)
            for p in place(s, pair.clean.layout)
        ]
        patched = reference.patch(model, pair, sites)
        ((_, scores),) = patched.chunks
        lds.append(scores.ld.item() - patched.corrupt.ld.item())
    assert table["logit_diff"].item() == pytest.approx(sum(lds) / 3, rel=1e-9)


def test_baselines():
    model = blip()
    table = baselines(model, several(2))
    assert list(table.columns) == BASELINES.names
    pair = model.prepare(replace(example(), corrupt_prompt=None))
    logits = model.run(pair.clean)
    p, ld = logits.softmax(-1)[pair.answer], logits[pair.answer] - logits[pair.foil]
    assert table["p_clean"].tolist() == pytest.approx([p.item()] * 2)
    assert table["ld_clean"].tolist() == pytest.approx([ld.item()] * 2)
    assert table["predicted"].tolist() == [model.answer(pair.clean)] * 2


def test_a_bad_example_is_left_out_and_the_rest_goes_on(tmp_path):
    examples = several(3)
    examples[1] = replace(examples[1], clean_image=tmp_path / "gone.png")
    with pytest.warns(UserWarning, match=r"1 of 3 examples were left out; 'e1': .*gone.png"):
        table = sweep(blip(), examples, SITES, out=tmp_path / "run")
    assert table["example"].unique().tolist() == ["e0", "e2"]
    found = vlmscope.read_run(tmp_path / "run").baselines()
    assert found["excluded"].tolist() == [False, True, False]
    assert "gone.png" in found["reason"][1]


def test_a_role_that_some_examples_lack_leaves_those_out():
    examples = several(2)
    prompt = "is a square red or blue ?"
    roles = find_roles(prompt, {"answer": "red", "foil": "blue"})
    examples[1] = replace(examples[1], clean_prompt=prompt, corrupt_prompt=None, roles=roles)
    with pytest.warns(UserWarning, match="'e1': .*no position 'noun'"):
        table = sweep(blip(), examples, "encoder.0.resid@noun")
    assert table["example"].tolist() == ["e0"]


def test_no_example_at_all_is_an_error(tmp_path):
    examples = [replace(e, corrupt_image=None) for e in several(2)]
    with pytest.raises(DataError, match="none of 2 examples could be run; 'e0': there is no corrupt image"):
        sweep(blip(), examples, SITES)
    for _ in range(2):  # also when it is typed again
        with pytest.raises(DataError, match="none of 2 examples could be run"):
            sweep(blip(), examples, SITES, out=tmp_path / "run")
    with pytest.raises(DataError, match="there are no examples"):
        sweep(blip(), [], SITES)
    same = [example(corrupt_prompt=example().clean_prompt)]
    with pytest.raises(DataError, match="the corrupt prompt is the clean one"):
        sweep(blip(), same, SITES, "text")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sites": "encoder.9.resid@*"}, SiteError, "no layer 9"),
        (
            {"sites": "encoder.0.resid@verb"},
            SiteError,
            "no example has a role 'verb'; the roles .*answer, foil, noun",
        ),
        ({"corrupt": "sound"}, VlmscopeError, "unknown corruption 'sound'; expected image, text or noise"),
        ({"direction": "up"}, VlmscopeError, "unknown direction 'up'"),
        ({"engine": "warp"}, VlmscopeError, "unknown engine 'warp'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(arguments, error, message, tmp_path):
    given = {"sites": SITES, "corrupt": "image", **arguments}
    with pytest.raises(error, match=message):
        sweep(blip(), several(), out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_folder_goes_on_where_it_stopped_and_ends_with_the_same_table(tmp_path, monkeypatch):
    model, whole = blip(), sweep(blip(), several(4), SITES, out=tmp_path / "whole")
    honest, count = engine.patch, []

    def stop(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    monkeypatch.setattr(engine, "patch", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, several(4), SITES, out=tmp_path / "run")
    assert len(vlmscope.read_run(tmp_path / "run").baselines()) == 2
    again = sweep(model, several(4), SITES, out=tmp_path / "run")
    assert len(count) == 5, "two examples before, one interrupted, two after"
    pd.testing.assert_frame_equal(again, whole)


def test_pictures_are_there_when_an_example_is_done(tmp_path, monkeypatch):
    """Stopped as its pictures are kept, an example is run again, so that they are not lost."""
    sweep(blip(), several(), SITES, out=tmp_path / "whole")
    honest = sweeping.add_pictures

    def stop(folder, index, given):
        if index == 1:
            raise KeyboardInterrupt
        honest(folder, index, given)

    monkeypatch.setattr(sweeping, "add_pictures", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(blip(), several(), SITES, out=tmp_path / "run")
    assert len(vlmscope.read_run(tmp_path / "run").baselines()) == 1
    monkeypatch.undo()
    sweep(blip(), several(), SITES, out=tmp_path / "run")
    wanted, found = (sorted((tmp_path / name / "examples").iterdir()) for name in ("whole", "run"))
    assert len(wanted) > 2 and [file.read_bytes() for file in found] == [file.read_bytes() for file in wanted]


def test_another_specification_is_never_mixed_in(tmp_path):
    model = blip()
    sweep(model, several(), SITES, out=tmp_path / "run")
    for changes, what in (({"direction": "noise"}, "direction"), ({"seed": 3}, "seed")):
        with pytest.raises(StoreError, match=what):
            sweep(model, several(), SITES, out=tmp_path / "run", **changes)
    with pytest.raises(StoreError, match="holds other examples: number 0 is not the same"):
        sweep(model, several()[::-1], SITES, out=tmp_path / "run")
    with pytest.raises(StoreError, match="weights"):
        sweep(blip(seed=1), several(), SITES, out=tmp_path / "run")


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*/part-*.parquet")}


def test_running_again_adds_examples_and_sites(tmp_path, monkeypatch):
    """2 examples at A, then 4 at A and B: the table of a fresh run, and nothing is computed twice."""
    model, folder = blip(), tmp_path / "grown"
    first, second = ["encoder.*.resid@answer"], ["encoder.1.cross.h*@*", "encoder.0.resid@answer"]
    sweep(model, several(2), first, out=folder)
    before = digests(folder)
    patched = []
    honest = engine.patch

    def counted(model, pair, sites, *args, **kwargs):
        patched.append(len(sites))
        return honest(model, pair, sites, *args, **kwargs)

    monkeypatch.setattr(engine, "patch", counted)
    grown = sweep(model, several(4), [*first, *second], out=folder)
    whole = sweep(model, several(4), [*first, *second], out=tmp_path / "fresh")
    pd.testing.assert_frame_equal(grown, whole, rtol=1e-9, atol=1e-12)
    runs = [vlmscope.read_run(path) for path in (folder, tmp_path / "fresh")]
    pd.testing.assert_frame_equal(runs[0].baselines(), runs[1].baselines())
    assert runs[0].spec == runs[1].spec and runs[0].finished
    assert before.items() <= digests(folder).items(), "what was there is untouched"
    layers, heads = 2, len(whole) // 4 - 2
    assert patched[:4] == [heads, heads, layers + heads, layers + heads]
    sweep(model, several(3), second, out=folder)
    assert len(patched) == 8, "what is there is read"


def test_an_example_that_lacks_an_added_site_keeps_what_it_has(tmp_path):
    """Those that were left out stay so; the others are said to lack the site."""
    model, given = blip(), several(3)
    given[0] = replace(given[0], corrupt_image=None)
    given[1] = replace(given[1], roles={k: v for k, v in given[1].roles.items() if k != "noun"})
    with pytest.warns(UserWarning, match="1 of 3 examples were left out; 'e0'"):
        sweep(model, given, "encoder.0.resid@answer", out=tmp_path / "run")
    with (
        pytest.warns(UserWarning, match="1 of 3 examples were left out; 'e0'"),
        pytest.warns(UserWarning, match="'e1' has none of the sites that are added: .*'noun'"),
    ):
        table = sweep(model, given, "encoder.0.resid@noun", out=tmp_path / "run")
    assert table[["example", "slot"]].values.tolist() == [["e1", "answer"], ["e2", "answer"], ["e2", "noun"]]
    assert vlmscope.read_run(tmp_path / "run").baselines()["excluded"].tolist() == [True, False, False]


@pytest.mark.parametrize("corrupt", ["image", "text", Noise(draws=2)])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_run_checks_itself(tmp_path, monkeypatch, corrupt, direction):
    """Random rows are recomputed by the reference; an engine that is wrong in one of them is found out."""
    model = blip()
    sites = ["encoder.*.cross.h*@*", "encoder.*/3.resid@noun", "vision.*.mlp@all", "decoder.0.mlp.n1@last"]
    given = {"corrupt": corrupt, "direction": direction}
    table = sweep(model, several(3), sites, **given, out=tmp_path / "run", check=8)
    check = vlmscope.read_run(tmp_path / "run").check
    assert table.attrs["check"] == check and check["rows"] == 8 and check["largest"] < 1e-9
    assert sweep(model, several(3), sites, **given, check=8).attrs["check"] == check
    assert sweep(model, several(3), sites, **given, check=0).attrs["check"] is None
    honest = engine.patch

    def wrong(*args, **kwargs):
        patched = honest(*args, **kwargs)
        chunks = ((n, s._replace(value=s.value + 0.25)) for n, s in patched.chunks)
        return patched._replace(chunks=chunks)

    monkeypatch.setattr(engine, "patch", wrong)
    with pytest.warns(UserWarning, match="3 random rows .* differ by up to 0.25, .* do not trust this run"):
        found = sweep(model, several(3), sites, **given, check=3).attrs["check"]
    assert found == {"rows": 3, "largest": pytest.approx(0.25)}


def test_a_run_that_was_stopped_before_its_check_is_checked_later(tmp_path, monkeypatch):
    model = blip()
    with monkeypatch.context() as patched:
        patched.setattr("vlmscope.patching.reference.patch", None)
        with pytest.raises(TypeError):
            sweep(model, several(2), SITES, out=tmp_path / "run")
    run = vlmscope.read_run(tmp_path / "run")
    assert run.check is None and not run.finished and len(run.effects())
    monkeypatch.setattr("vlmscope.patching.engine.patch", None)
    sweep(model, several(2), SITES, out=tmp_path / "run")
    assert vlmscope.read_run(tmp_path / "run").check["rows"] == 5


def test_the_weights_fingerprint_is_computed_once_and_follows_changes(monkeypatch):
    model = blip()
    first = model.fingerprint()
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.sha256", None)
        assert model.fingerprint() == first
    weight = next(model.hf.parameters())
    with torch.no_grad():
        weight[0] += 1.0
    changed = model.fingerprint()
    assert changed != first
    with torch.no_grad():
        weight[0] -= 1.0
    assert model.fingerprint() != changed


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment(tmp_path):
    """SIGKILL at several moments, then once to the end: the table of an undisturbed run."""
    command = [
        sys.executable,
        "-m",
        "vlmscope",
        "sweep",
        "--model",
        "toy-blip",
        "--data",
        "faces",
        "--limit",
        "40",
        "--corrupt",
        "text",
        "--sites",
        "encoder.*.cross.h*@*",
        "--out",
    ]
    for moment in (0.2, 0.5, 0.9):
        process = subprocess.Popen([*command, str(tmp_path / "run")], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "run")], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    run, whole = (vlmscope.read_run(tmp_path / name) for name in ("run", "whole"))
    assert run.finished and len(run.effects()) == len(whole.effects()) > 0
    pd.testing.assert_frame_equal(run.effects(), whole.effects())
    pd.testing.assert_frame_equal(run.baselines(), whole.baselines())


def test_ctrl_c_says_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "vlmscope",
        "sweep",
        "--model",
        "toy-blip",
        "--data",
        "states",
        "--corrupt",
        "image",
        "--sites",
        "vision.*.attn.h*@*",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    first = tmp_path / "run" / "baselines" / "part-000000.parquet"  # the first example is committed
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said) == (130, "interrupted; run the same command again to go on\n")
    assert len(vlmscope.read_run(tmp_path / "run").baselines()) > 0, "what was done is kept"


def test_patching_matters_where_the_toy_reads_the_image():
    """Corrupting the image: the question's words read it; restoring all of it gives the answer."""
    model = vlmscope.load("toy-blip")
    examples = vlmscope.examples("states", limit=6)
    table = sweep(model, examples, ["encoder.*.cross@all", "encoder.*.attn@0", "vision.2.resid@all"])
    mean = table.groupby(["tower", "kind", "layer"])["effect"].mean()
    assert mean["vision", "resid", 2] == pytest.approx(1.0, abs=1e-3)
    assert max(mean["encoder", "cross"]) > 0.2
    assert math.isfinite(mean.sum())


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_threshold_of_effect(monkeypatch, factor):
    """Just below the gap there are effects, just above it there are none."""
    from vlmscope.patching import scores

    model = blip()
    given = [replace(example(), corrupt_prompt=None)]
    base = baselines(model, given).iloc[0]
    gap = abs(base["ld_clean"] - base["ld_corrupt"])
    pair = model.prepare(given[0])
    size = max(float(model.run(one).abs().max()) for one in (pair.clean, pair.corrupt))
    monkeypatch.setitem(scores.ROUNDING, "float64", factor * gap / size / 10)
    for way in ("fast", "reference"):
        effect = sweep(model, given, "encoder.0.resid@answer", engine=way)["effect"]
        assert effect.isna().all() == (factor > 1)


def test_ablations_without_a_corruption_say_what_changed():
    """What compares with a corrupt run is null; the changes are against the run that was patched."""
    model = blip()
    table = sweep(model, several(3), "encoder.*.mlp@all", None, patch="zero", metric="kl")
    assert table[["p_restored", "logit_diff", "effect"]].isna().all().all()
    assert (table["value"] > 0).all() and table["p_change"].abs().max() > 1e-3
    for number, one in enumerate(several(3)):
        pair = model.prepare(replace(one, corrupt_image=None, corrupt_prompt=None))
        plain, zero = model.run(pair.clean), model.run(pair.clean, [Edit("encoder.0.mlp@all", "set", 0.0)])
        row = table[table["example"] == one.id].iloc[0]
        ld = [float(x[pair.answer] - x[pair.foil]) for x in (plain, zero)]
        assert row["ld_change"] == pytest.approx(ld[1] - ld[0], rel=1e-9), number
    with pytest.raises(VlmscopeError, match="without a corruption .*--corrupt image"):
        sweep(model, several(3), "encoder.*.mlp@all", None)


def test_changes_are_against_the_run_that_was_patched():
    model = blip()
    for direction, edited in (("denoise", "corrupt"), ("noise", "clean")):
        table = sweep(model, several(2), "encoder.*.resid@*", direction=direction, metric="p")
        base = baselines(model, several(2)).set_index("example").loc[table["example"]].reset_index()
        assert table["p_change"].to_numpy() == pytest.approx(
            table["p_patched"] - base[f"p_{edited}"], abs=1e-12
        )
        ld = table["logit_diff"] + base["ld_corrupt"]
        assert table["ld_change"].to_numpy() == pytest.approx(ld - base[f"ld_{edited}"], abs=1e-9)
        gap = base["p_clean"] - base["p_corrupt"]
        assert table["effect"].to_numpy() == pytest.approx(
            (table["value"] - base["p_corrupt"]) / gap, rel=1e-9
        )


def test_a_metric_of_ones_own():
    model = blip()

    def second(logits, base):
        """The foil's log-probability."""
        return logits.log_softmax(-1)[:, base.foil]

    table = sweep(model, several(1), "encoder.0.resid@*", metric=second)
    pair = model.prepare(replace(several(1)[0], corrupt_prompt=None))
    value = model.capture(pair.clean, "encoder.0.resid@1")["encoder.0.resid@1"]
    logits = model.run(pair.corrupt, [Edit("encoder.0.resid@1", "set", value)])
    found = table.set_index("site").loc["encoder.0.resid@1", "value"]
    assert found == pytest.approx(float(logits.log_softmax(-1)[pair.foil]), rel=1e-9)


def test_a_whole_answer_needs_no_foil(tmp_path):
    model = blip()
    given = [replace(one, foil="") for one in several(2)]
    table = sweep(model, given, "encoder.*.resid@noun", metric="logprob", out=tmp_path / "run")
    assert table["ld_change"].isna().all() and (table["value"] < 0).all() and table["effect"].notna().all()
    with pytest.raises(DataError, match=r"the foil '' is empty; give it a word, or score the whole answer"):
        sweep(model, given, "encoder.*.resid@noun")


@pytest.mark.parametrize("patch", ["mean", "resample"])
def test_what_is_of_all_examples_cannot_grow(tmp_path, patch):
    model = blip()
    sweep(model, several(3), "encoder.*.mlp@noun", None, patch=patch, out=tmp_path)
    with pytest.raises(StoreError, match="is of all examples, so none can be added"):
        sweep(model, several(4), "encoder.*.mlp@noun", None, patch=patch, out=tmp_path)
    with pytest.raises(SiteError, match=f"an attention pattern has .* so it has no {patch} over examples"):
        sweep(model, several(3), "encoder.0.attn.p1@noun", None, patch=patch)


def test_an_edge_is_refused_before_anything_runs():
    with pytest.raises(SiteError, match="an edge of attention is not patched but knocked out"):
        sweep(blip(), several(1), ["encoder.0.resid@all", "encoder.1.attn@last<noun"])


def test_a_sum_of_sites_is_a_row_of_its_own():
    """It has no single unit's position or token, and a slot of its own."""
    (row,) = sweep(blip(), several(1), "encoder.0.attn@noun + encoder.1.mlp@last").itertuples()
    assert row.site == "encoder.0.attn@noun + encoder.1.mlp@last"
    assert row.slot == "noun + last" and pd.isna(row.position)

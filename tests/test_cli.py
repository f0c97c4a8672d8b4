"""The command line, as a person types it: what it prints, and how it says what is wrong."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from families import llava_next
from models import blip, picture, sweep_to

import vlmscope
from vlmscope import neurons
from vlmscope.cli import machine
from vlmscope.cli.main import app, main
from vlmscope.cli.options import LOOKS
from vlmscope.errors import StoreError
from vlmscope.neurons import solvers
from vlmscope.notice import Spec
from vlmscope.studies import workers
from vlmscope.studies.run_folder import EFFECTS

SWEEP = ["sweep", "--model", "toy-blip", "--data", "faces", "--limit", "2", "--corrupt", "image"]
SITES = ["--sites", "encoder.*.cross.h*@answer"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line; gives its exit status, standard output and standard error."""

    def go(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["vlmscope", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return go


def refused(result, *words: str) -> None:
    """One line on standard error, a status that is not zero, no traceback."""
    status, _, err = result
    assert status != 0
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err


def table(folder, rows, name="data.csv", columns=None):
    columns = columns or [
        "id",
        "clean_image_path",
        "corrupt_image_path",
        "clean_prompt",
        "corrupt_prompt",
        "correct_answer",
        "incorrect_answer",
    ]
    for n in (1, 2):
        picture(n, 60).save(folder / f"{n}.png")
    file = folder / name
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows(rows)
    return file


GOOD = [
    "a",
    "1.png",
    "2.png",
    "is this circle red or blue?",
    "is this circle green or purple?",
    "red",
    "blue",
]


def test_sweep_writes_the_table_that_python_gives(run, tmp_path):
    status, out, err = run(*SWEEP, *SITES, "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert "2 examples, 100% answered rightly; P(answer)" in out and "mean gap LD(clean)" in out
    assert "warning: fewer than 10 examples can hardly show anything" in out
    assert out.startswith(f"24 patches of 2 examples in {tmp_path / 'run'}\n")
    found = vlmscope.read_run(tmp_path / "run").effects()
    again = vlmscope.sweep(
        vlmscope.load("toy-blip"), vlmscope.examples("faces", limit=2), "encoder.*.cross.h*@answer"
    )
    assert list(found.columns) == EFFECTS.names
    assert found.equals(again)
    spec = json.loads((tmp_path / "run" / "run.json").read_text())["spec"]
    assert spec["data"] == "faces" and spec["corrupt"] == {"kind": "image"}


def test_several_sites_in_either_way_of_writing(run, tmp_path):
    a, b = "encoder.0.resid@last", "encoder.1.resid@last"
    for number, sites in enumerate((["--sites", a, b], ["--sites", a, "--sites", b])):
        status, out, _ = run(*SWEEP, *sites, "--out", tmp_path / str(number))
        assert status == 0 and out.startswith("4 patches")


def test_noise_and_direction_and_engine(run, tmp_path):
    options = ["--corrupt", "noise", "--noise", "add", "--noise-at", "text", "--draws", "2"]
    more = ["--direction", "noise", "--engine", "reference", "--dtype", "float64"]
    status, _, _ = run(*SWEEP[:-2], *options, *more, *SITES, "--out", tmp_path / "run")
    assert status == 0
    spec = vlmscope.read_run(tmp_path / "run").spec
    assert spec["corrupt"] == {"kind": "noise", "form": "add", "at": "text", "scale": 3.0, "draws": 2}
    assert (spec["direction"], spec["engine"], spec["dtype"]) == ("noise", "reference", "float64")
    for words in (["--noise", "add"], ["--noise-at", "text"], ["--noise-scale", "2"], ["--draws", "2"]):
        refused(run(*SWEEP, *SITES, *words, "--out", tmp_path / "x"), "are of noise", "take --corrupt noise")


def test_your_own_images_and_a_report(run, tmp_path):
    data = table(tmp_path, [GOOD, ["b", *GOOD[1:]]])
    arguments = ["sweep", "--model", "toy-blip", "--data", data, "--corrupt", "text", *SITES]
    assert run(*arguments, "--out", tmp_path / "run")[0] == 0
    status, out, _ = run("report", tmp_path / "run", "--out", tmp_path / "report.html")
    assert status == 0 and out.strip() == str(tmp_path / "report.html")
    assert "<html" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "report-figures").glob("*.png"))
    figures = ["--figures", "svg", "pdf"]
    assert run("report", tmp_path / "run", "--out", tmp_path / "r.html", *figures)[0] == 0
    endings = [file.suffix for file in (tmp_path / "r-figures").iterdir()]
    assert endings.count(".png") == endings.count(".svg") == endings.count(".pdf") > 0


def test_a_saved_model_of_your_own(run, tmp_path):
    model = blip()
    model.hf.save_pretrained(tmp_path / "mine")
    model.processor.save_pretrained(tmp_path / "mine")
    data = table(tmp_path, [[*GOOD[:4], "is this circle green or yellow?", *GOOD[5:]]])
    status, out, _ = run(
        "sweep",
        "--model",
        tmp_path / "mine",
        "--data",
        data,
        "--corrupt",
        "text",
        "--sites",
        "encoder.*.resid@*",
        "--out",
        tmp_path / "run",
    )
    assert status == 0 and out.startswith("18 patches of 1 examples")


def test_demo(run, tmp_path):
    status, out, _ = run("demo", "--out", tmp_path / "demo", "--limit", "2")
    assert status == 0
    for name in ("states", "scenes", "faces", "binding"):
        for corrupt in ("image", "text"):
            assert f"{name}, {corrupt} corrupted" in out
    assert (tmp_path / "demo" / "report.html").exists()


def test_models(run):
    status, out, _ = run("models")
    assert status == 0 and "BlipForQuestionAnswering" in out and "toy-blip" in out
    status, out, _ = run("models", "toy-blip")
    assert status == 0
    for word in ("vision", "encoder", "decoder", "heads", "6 x 6 patches", "encoder.*.cross.h*@"):
        assert word in out


def test_help_and_version(run):
    for command in ((), ("demo",), ("sweep",), ("report",), ("models",)):
        status, out, _ = run(*command, "--help")
        assert status == 0 and "Usage: vlmscope" in out
    assert run("--version")[1] == f"vlmscope {vlmscope.__version__}\n"


def test_a_module_can_be_run_and_says_errors_in_one_line():
    command = [sys.executable, "-m", "vlmscope", "models", "./nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no model './nowhere'") and done.stderr.count("\n") == 1


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("encoder.*.crss.h*@answer", ("'crss'", "character 11", "cross")),
        ("encoder.9.resid@*", ("no layer 9", "0 to 2")),
        ("encoder.0.resid@verb", ("no example has a role 'verb'", "answer, foil, noun")),
        ("decoder.0.resid@noun", ("no position 'noun' in the decoder",)),
    ],
)
def test_sites_that_are_not_there(run, tmp_path, site, words):
    refused(run(*SWEEP, "--sites", site, "--out", tmp_path / "run"), *words)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["a", "gone.png", *GOOD[2:]], ("gone.png",)),
        (["a", "text.png", *GOOD[2:]], ("text.png",)),
        (["a", "half.png", *GOOD[2:]], ("half.png",)),
        ([*GOOD[:6], "zebra crossing €"], ("unknown",)),
        ([*GOOD[:6], "red"], ("line 2", "red")),
        ([*GOOD[:5], "", "blue"], ("line 2", "correct_answer")),
        ([*GOOD[:4], "is it green or purple now and then?", *GOOD[5:]], ("do not align",)),
    ],
)
def test_rows_that_cannot_be_run(run, tmp_path, row, words):
    (tmp_path / "text.png").write_text("not a picture")
    data = table(tmp_path, [row])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    corrupt = "text" if "now and then" in row[4] else "image"
    arguments = ["sweep", "--model", "toy-blip", "--data", data, "--corrupt", corrupt, *SITES]
    refused(run(*arguments, "--out", tmp_path / "run"), *words)


def test_one_bad_row_does_not_stop_the_others(run, tmp_path):
    data = table(tmp_path, [GOOD, ["b", "gone.png", *GOOD[2:]], ["c", *GOOD[1:]]])
    arguments = ["sweep", "--model", "toy-blip", "--data", data, "--corrupt", "image", *SITES]
    status, out, err = run(*arguments, "--out", tmp_path / "run")
    assert err.startswith("warning: 1 of 3 examples were left out; 'b': ") and "gone.png" in err
    assert status == 0 and "of 2 examples" in out
    assert vlmscope.read_run(tmp_path / "run").baselines()["excluded"].tolist() == [False, True, False]


def test_tables_that_cannot_be_read(run, tmp_path):
    start = ["sweep", "--model", "toy-blip", "--corrupt", "image", *SITES, "--out", tmp_path / "run"]
    refused(run(*start, "--data", tmp_path / "gone.csv"), "gone.csv")
    refused(run(*start, "--data", "colours"), "no data set 'colours'", "states, scenes, faces, binding")
    short = table(tmp_path, [GOOD[:3]], columns=["id", "clean_image_path", "clean_prompt"])
    refused(run(*start, "--data", short), "correct_answer")
    twice = table(tmp_path, [GOOD, GOOD])
    refused(run(*start, "--data", twice), "'a'", "2", "3")
    odd = tmp_path / "odd.csv"
    odd.write_bytes(twice.read_bytes().replace(b"red", b"r\xe9d"))
    refused(run(*start, "--data", odd), "UTF-8", "line 2")


def test_models_that_cannot_be_loaded(run, tmp_path):
    rest = [*SWEEP[3:], *SITES, "--out", tmp_path / "run"]
    (tmp_path / "empty").mkdir()
    refused(run("sweep", "--model", tmp_path / "empty", *rest), "config.json: no such file")
    refused(run("sweep", "--model", "nobody/nothing", *rest), "nobody/nothing", "network")


def test_a_folder_takes_more_sites_and_refuses_another_run(run, tmp_path):
    assert run(*SWEEP, *SITES, "--out", tmp_path / "run")[0] == 0
    before = vlmscope.read_run(tmp_path / "run").effects()
    refused(run(*SWEEP, *SITES, "--corrupt", "text", "--out", tmp_path / "run"), "corrupt")
    assert vlmscope.read_run(tmp_path / "run").effects().equals(before)
    status, out, _ = run(*SWEEP, "--sites", "encoder.0.resid@*", "--out", tmp_path / "run")
    after = vlmscope.read_run(tmp_path / "run").effects()
    assert status == 0 and out.startswith(f"{len(after)} patches of 2 examples")
    assert set(before["site"]) < set(after["site"])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("mine")
    refused(run(*SWEEP, *SITES, "--out", tmp_path / "own"), "not empty")


def test_reports_that_cannot_be_written(run, tmp_path):
    refused(run("report", tmp_path / "gone", "--out", tmp_path / "r.html"), "no such folder")
    assert run(*SWEEP, *SITES, "--out", tmp_path / "run")[0] == 0
    (tmp_path / "file").write_text("")
    refused(run("report", tmp_path / "run", "--out", tmp_path / "file" / "r.html"), "cannot be written")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk(run, tmp_path, monkeypatch):
    """What is safe on disk stays; the rest is said in one line."""
    from vlmscope import files

    assert run(*SWEEP[:5], "--limit", "1", *SWEEP[7:], *SITES, "--out", tmp_path / "one")[0] == 0
    honest = files.write

    def full(file, content, ends=None):
        if file.suffix == ".parquet":
            with Path("/dev/full").open("wb", buffering=0) as disk, files.storing(file.parent):
                disk.write(content)
        honest(file, content, ends)

    monkeypatch.setattr(files, "write", full)
    refused(run(*SWEEP, *SITES, "--out", tmp_path / "run"), "free some space")
    monkeypatch.setattr(files, "write", honest)
    assert run(*SWEEP, *SITES, "--out", tmp_path / "run")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("words", [["models"], ["--help"], ["--version"]])
def test_a_full_standard_output(words):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vlmscope", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    refused((done.returncode, "", done.stderr), "standard output cannot be written (No space left on device)")


def test_a_standard_output_of_ascii_alone(tmp_path):
    file = table(tmp_path, [["größe \u202e", *GOOD[1:]]])
    words = ["sweep", "--model", "toy-blip", "--data", file, *SITES, "--corrupt", "image"]
    for more in (["--out", tmp_path / "größe"], ["--metric", "größe", "--out", tmp_path / "x"]):
        done = subprocess.run(
            [sys.executable, "-m", "vlmscope", *map(str, [*words, *more])],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
        said = (done.stdout + done.stderr).decode("ascii")
        assert "gr\\xf6\\xdfe" in said and "Traceback" not in said, said
        assert done.returncode == (2 if "--metric" in more else 0)


def test_a_wrong_flag_is_told(run):
    status, _, err = run("sweep", "--modle", "toy-blip")
    assert status == 2 and "--modle" in err and "Traceback" not in err


def test_a_word_without_an_option_is_refused_in_one_line(run, tmp_path):
    end = ["--out", tmp_path / "run", "encoder.0.resid@last"]
    refused(
        run(*SWEEP, *SITES, *end),
        "unexpected 'encoder.0.resid@last'; expected vlmscope sweep [OPTIONS]",
        "only --sites can have several words",
    )
    refused(
        run("models", "toy-blip", "states:0"),
        "unexpected 'states:0'; expected vlmscope models [OPTIONS] [model]",
    )
    assert not (tmp_path / "run").exists()


def test_a_choice_that_does_not_exist_is_told_with_those_that_do(run):
    status, _, err = run("sweep", "--corrupt", "sound")
    assert status == 2 and "'sound'" in err and all(word in err for word in ("image", "text", "noise"))


@pytest.mark.parametrize("width", [80, 120])
def test_help_fits_the_terminal_and_no_summary_is_cut_off(run, monkeypatch, width):
    from typer.main import get_command

    monkeypatch.setenv("COLUMNS", str(width))
    commands = [(), *((name,) for name in get_command(app).commands)]
    commands += [("neurons", name) for name in get_command(app).commands["neurons"].commands]
    for command in commands:
        status, out, _ = run(*command, "--help")
        assert status == 0 and max(map(len, out.splitlines())) <= width, command
        assert "..." not in out.partition("\nCommands:")[2], command


def test_every_look_of_an_option_is_that_of_some_command():
    from typer.main import get_command

    commands = get_command(app).commands
    every = [*commands.values(), *commands["neurons"].commands.values()]
    shown = {(option.name, option.help) for each in every for option in each.params}
    looks = [(table, name, look["help"]) for table, some in LOOKS.items() for name, look in some.items()]
    assert [look for look in looks if look[1:] not in shown] == []


def test_help_is_there_before_torch():
    script = "import sys; from vlmscope.cli.main import app; app(['--help'], standalone_mode=False); "
    script += "sys.exit(str([m for m in ('torch', 'pandas', 'numpy') if m in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Usage:" in done.stdout and not done.stderr.strip(), done.stderr


# -- threads -------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch):
    """What torch is told, where it would have eight threads."""
    import torch

    found: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


@pytest.fixture
def cpus(monkeypatch, tmp_path):
    """A machine of 16 CPUs, on which as many threads run as asked, with a cgroup's quota."""

    def make(running: int, **files: str) -> None:
        monkeypatch.setattr("os.cpu_count", lambda: 16)
        monkeypatch.setattr(machine, "LOAD", tmp_path / "loadavg")
        monkeypatch.setattr(machine, "CGROUP", tmp_path)
        (tmp_path / "cpu").mkdir(exist_ok=True)
        (tmp_path / "loadavg").write_text(f"9.99 9.99 9.99 {running}/321 4711\n")
        for name, text in files.items():
            (tmp_path / name).write_text(text + "\n")

    return make


def test_a_toy_has_one_thread_and_a_large_model_the_idle_cores(threads, cpus, tmp_path):
    cpus(running=13)
    machine.set_up("toy-blip")
    machine.set_up("Salesforce/blip-vqa-base")
    assert threads == [1, 4]
    (tmp_path / "model.safetensors").write_bytes(b"")
    machine.set_up(str(tmp_path))
    cpus(running=1)
    machine.set_up("Salesforce/blip-vqa-base")
    assert threads == [1, 4, 1, 8], "torch's own number, which is no more than the cores"


def test_the_environment_decides_about_threads(threads, cpus, monkeypatch):
    cpus(running=13)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine.set_up("toy-blip")
    assert threads == []


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "300000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
    ],
)
def test_a_container_has_no_more_threads_than_cpus(cpus, files, cores):
    cpus(1, **files)
    assert machine.cores() == cores


def test_a_full_machine_still_gives_one_thread(cpus):
    cpus(running=99)
    assert machine.cores() == 1


# --- notice, tracing, circuits, heads, data --------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    model = vlmscope.load("toy-blip")
    folder = tmp_path_factory.mktemp("swept")
    sites = ["encoder.*.cross.h*@answer", "decoder.*.cross.h*@last"]
    for corrupt in ("image", "text"):
        sweep_to(folder / corrupt, model, vlmscope.examples("faces", limit=14), sites, corrupt)
    return [folder / "image", folder / "text"]


def test_circuits_heads_and_report(run, swept, tmp_path):
    status, out, _ = run("circuits", *swept, "--out", tmp_path / "c")
    assert status == 0 and "important of 48 heads" in out and "important in every run" in out
    sites = (tmp_path / "c" / "sites.txt").read_text().split()
    assert sites and f"$(cat {tmp_path / 'c' / 'sites.txt'})" in out
    again = run(
        "sweep",
        "--model",
        "toy-blip",
        "--data",
        "faces",
        "--limit",
        "1",
        "--corrupt",
        "image",
        "--sites",
        *sites,
        "--out",
        tmp_path / "again",
    )
    assert again[0] == 0 and f"{len(sites)} patches of 1 examples" in again[1]
    status, out, _ = run(
        "heads",
        "--model",
        "toy-blip",
        "--data",
        "faces",
        "--limit",
        "4",
        "--sites",
        *sites[:2],
        "--out",
        tmp_path / "h",
    )
    assert status == 0 and "accuracy with heads knocked out together" in out
    assert (tmp_path / "h" / "report.html").is_file()
    status, out, _ = run("report", tmp_path / "c", tmp_path / "h", *swept, "--out", tmp_path / "r.html")
    assert status == 0 and (tmp_path / "r.html").is_file()


def test_circuits_without_an_important_head_say_so_in_one_line(run, tmp_path):
    few = vlmscope.examples("faces", limit=2)
    sweep_to(tmp_path / "run", vlmscope.load("toy-blip"), few, "encoder.*.cross.h*@answer", "image")
    status, out, _ = run("circuits", tmp_path / "run", "--out", tmp_path / "c")
    assert status == 0
    assert out.strip() == f"0 important of 12 heads; nothing to sweep again; tables in {tmp_path / 'c'}"


def test_circuits_that_cannot_be(run, swept, tmp_path):
    refused(run("circuits", swept[0], swept[0], "--out", tmp_path / "c"), "given twice")
    refused(run("circuits", tmp_path, "--out", tmp_path / "c"), "not a run folder")
    refused(run("circuits", swept[0], "--position", "verb", "--out", tmp_path / "c"), "at 'verb'")


def test_tracing(run, tmp_path):
    base = ["tracing", "--model", "toy-blip", "--data", "states", "--limit", "2", "--repeats", "2"]
    status, out, _ = run(*base, "--kinds", "cross", "--windows", "3", "--out", tmp_path / "t")
    assert status == 0 and "what restores most of P(answer)" in out
    assert "at readout, window of 3" in out and "(2 examples, SD over repeats" in out
    assert "answered rightly; P(answer)" in out and "warning: fewer than 10 examples" in out
    assert (tmp_path / "t" / "report.html").is_file()
    refused(run(*base, "--kinds", "output", "--out", tmp_path / "u"), "no kind 'output' to trace")
    refused(run(*base, "--windows", "4", "--out", tmp_path / "u"), "has no middle")


def test_notice(run, tmp_path):
    status, out, _ = run(
        "notice",
        "--model",
        "toy-blip",
        "--data",
        "faces",
        "states",
        "--limit",
        "14",
        "--corrupt",
        "image",
        "--edges",
        "--out",
        tmp_path / "n",
    )
    assert status == 0 and "faces, image" in out and "Universal over all 2 runs" in out
    assert "No circuits of edges: the decoder tower of toy-blip" in out
    assert out.count("answered rightly; P(answer)") == 2
    spec = tmp_path / "n" / "notice.toml"
    status, out, _ = run("notice", "--spec", spec, "--out", tmp_path / "n")
    assert status == 0 and "0 of 14 examples left" in out and "No circuits of edges" in out
    refused(run("notice", "--spec", spec, "--limit", "3", "--out", tmp_path / "n"), "limit differ")
    refused(run("notice", "--model", "toy-blip", "--out", tmp_path / "m"), "--model and --data")
    spec.write_text(spec.read_text().replace("limit", "limits"))
    refused(run("notice", "--spec", spec, "--out", tmp_path / "m"), "did you mean 'limit'?")


def test_data(run, tmp_path):
    for label in ("cat", "dog", "owl", "cow"):
        (tmp_path / "root" / label).mkdir(parents=True)
        for n in range(4):
            picture(n, 20).save(tmp_path / "root" / label / f"{n}.png")
    (tmp_path / "root" / "cat" / "broken.png").write_bytes(b"not an image")
    status, out, _ = run("data", "folder", "--root", tmp_path / "root", "--out", tmp_path / "f.csv")
    assert status == 0 and "examples" in out and str(tmp_path / "f.csv") in out
    assert len(vlmscope.read_csv(tmp_path / "f.csv")) > 4
    again = run(
        "data",
        "folder",
        "--root",
        tmp_path / "root",
        "--out",
        tmp_path / "g.csv",
        "--model",
        "toy-blip",
        "--limit",
        "4",
    )
    assert again[0] == 0 and len(vlmscope.read_csv(tmp_path / "g.csv")) == 4
    refused(run("data", "coco", "--root", tmp_path, "--out", tmp_path / "x.csv"), "coco-qa")
    gone = tmp_path / "gone"
    refused(run("data", "faces", "--root", gone, "--out", tmp_path / "x.csv"), str(gone))
    (tmp_path / "empty").mkdir()
    for name in ("svo-probes", "mit-states", "faces", "coco-qa", "clevr", "folder"):
        refused(run("data", name, "--root", tmp_path / "empty", "--out", tmp_path / "x.csv"), "empty")


def test_generate_refuses_pictures_of_other_grids(run, tmp_path):
    llava_next().save(tmp_path / "model")
    picture(1).save(tmp_path / "one.png")
    picture(2).resize((40, 12)).save(tmp_path / "wide.png")
    base = [
        "generate",
        "--model",
        tmp_path / "model",
        "--image",
        tmp_path / "one.png",
        "--prompt",
        "is this red ?",
    ]
    status, out, err = run(*base, "--patch", "decoder.1.resid@image", "--other", tmp_path / "one.png")
    assert status == 0, err
    assert "with 1 edit" in out
    refused(
        run(*base, "--patch", "decoder.1.resid@last", "--other", tmp_path / "wide.png"),
        "resize one picture to the other's size",
    )


def test_generate(run, tmp_path):
    (one,) = vlmscope.examples("states", limit=1)
    one.clean_image.save(tmp_path / "a.png")
    one.corrupt_image.save(tmp_path / "b.png")
    base = ["generate", "--model", "toy-llava", "--image", tmp_path / "a.png"]
    base += ["--prompt", "describe this picture."]
    status, plain, _ = run(*base)
    assert status == 0 and f" {one.answer} cross" in plain and plain.count("\n") == 1
    whole = ["--patch", "decoder.0.resid_pre@image", "--other", tmp_path / "b.png"]
    status, out, _ = run(*base, *whole)
    other, without, edited = out.splitlines()
    assert one.foil in other and one.answer in without
    assert edited.split(maxsplit=3)[-1] == other.split(maxsplit=3)[-1], "all of the image is patched"
    status, out, _ = run(*base, "--edit", "decoder.2.mlp@all scale 0")
    assert status == 0 and out.splitlines()[1].startswith("with 1 edit:")
    refused(run(*base, "--edit", "decoder.2.mlp@all twice"), "bad edit", "scale 0")
    refused(run(*base, "--edit", "decoder.9.mlp@all scale 0"), "no layer 9")
    refused(run(*base, "--patch", "decoder.2.mlp@all"), "--other")
    refused(run(*base[:-1], "<image> <image> what ?"), "2 placeholders")


ASK = "describe this picture."


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    file = tmp_path_factory.mktemp("scene") / "scene.png"
    vlmscope.examples("scenes", limit=1)[0].clean_image.save(file)
    return file


def test_neurons_find(run, scene, tmp_path):
    import pandas as pd

    asked = ["neurons", "find", "--model", "toy-llava", "--image", scene, "--prompt", ASK]
    status, _, err = run(*asked, "--word", "star", "triangle", "--top", "0", "--out", tmp_path)
    assert status == 0, err
    assert "orange star" in (tmp_path / "captions.csv").read_text()
    table = pd.read_parquet(tmp_path / "neurons.parquet")
    assert list(table.columns) == [
        "example",
        "word",
        "token",
        "token_id",
        "position",
        "layer",
        "neuron",
        "activation",
        "weight",
        "score",
        "rank",
    ]
    assert table.groupby("word").size().to_dict() == {"star": 1024, "triangle": 1024}
    status, _, _ = run(*asked, "--caption", "a red heart", "--word", "heart", "--out", tmp_path / "told")
    assert status == 0
    refused(
        run(*asked, "--word", "dog", "--out", tmp_path / "no"), "'dog' is not in the caption 'an orange star"
    )
    refused(run(*asked, "--out", tmp_path / "no"), "nothing is known of what is shown", "name words")
    refused(run(*asked[:-2], "--word", "star", "--out", tmp_path / "no"), "--image needs a --prompt")
    refused(
        run(*asked, "--data", "states", "--word", "x", "--out", tmp_path), "both of --image and --data given"
    )


def test_neurons_describe_and_perturb(run, tmp_path):
    given = ["--model", "toy-llava", "--data", "states", "--limit", "6", "--prompt", ASK]
    status, _, err = run(
        "neurons", "describe", *given, "--neuron", "3.250", "--no-measures", "--out", tmp_path
    )
    assert status == 0, err
    assert (tmp_path / "report.html").exists()
    refused(run("neurons", "describe", *given, "--neuron", "250", "--out", tmp_path), "expected LAYER.NUMBER")
    refused(
        run("neurons", "describe", *given, "--out", tmp_path), "nothing to describe; name words or neurons"
    )
    refused(
        run("neurons", "perturb", *given, "--word", "red", "--out", tmp_path),
        "holds 'describe', where perturb is to be written",
    )
    out = tmp_path / "perturbed"
    refused(run("neurons", "perturb", *given, "--word", "red", "--out", out), "no word can be measured")
    assert not out.exists()


BLIP_ON = "--model toy-blip --data states --limit 2 --out"
LLAVA_ON = "--model toy-llava --data states --limit 2 --prompt what? --out"


@pytest.mark.parametrize("there", ["report.html", "report-figures/mine.png", "report-figures"])
@pytest.mark.parametrize(
    ("command", "place"),
    [
        (f"heads --sites encoder.1.cross.h0@answer {BLIP_ON}", ""),
        (f"tracing {BLIP_ON}", ""),
        (f"notice {BLIP_ON}", ""),
        (f"neurons describe --neuron 1.2 --no-measures {LLAVA_ON}", ""),
        (f"neurons edit --from red --to blue {LLAVA_ON}", "edit-card"),
    ],
)
def test_a_report_that_is_not_ours_is_said_before_anything_is_loaded(
    run, tmp_path, monkeypatch, command, place, there
):
    for room in ("checkpoint", "notice.pipeline"):
        monkeypatch.setattr(f"vlmscope.{room}.load", None)
    folder = tmp_path / "out" / place
    mine = folder / there
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    if command.startswith("notice"):
        Spec("toy-blip", ("states",), limit=2).save(folder / "notice.toml")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out" / "edit.safetensors" if place else folder
    refused(run(*command.split(), out), f"{there}: is ", "choose another --out")
    assert sorted(tmp_path.rglob("*")) == before and mine.read_text() == "mine"


def test_neurons_edit_keeps_what_it_has_made(run, tmp_path, monkeypatch):
    """A place that cannot be written is refused before the edit is made; what fails later is not lost."""
    from vlmscope import files

    given = ["neurons", "edit", "--model", "toy-llava", "--data", "states", "--limit", "20", "--prompt", ASK]
    given += ["--from", "red", "--to", "blue", "--neurons", "5", "--solver", "closed"]
    file = tmp_path / "new" / "edit.safetensors"
    save, make = files.write, neurons.edit
    monkeypatch.setattr(neurons, "edit", None)
    (mine := tmp_path / "mine.safetensors").write_text("mine")
    refused(run(*given, "--out", mine / "edit.safetensors"), "cannot be written")
    refused(run(*given, "--out", mine), "cannot be read as an edit")
    assert mine.read_text() == "mine"
    (tmp_path / "new" / "edit-card").mkdir(parents=True)
    (tmp_path / "new" / "edit-card" / "captions.csv").write_text("mine")
    refused(run(*given, "--out", file), "captions.csv: is there, and no result")
    (tmp_path / "new" / "edit-card" / "captions.csv").unlink()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    refused(
        run(*given, "--out", file, "--export", tmp_path / "model"), "config.json: is there, and no result"
    )

    def full(path, *more):
        if tmp_path in path.parents and "kept" not in str(path):
            raise StoreError(f"{path}: the disk is full")
        save(path, *more)

    monkeypatch.setattr(neurons, "edit", make)
    monkeypatch.setattr(files, "write", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    status, _, err = run(*given, "--out", file)
    assert status == 1 and "the edit is kept in" in err and not file.exists()
    [kept] = (tmp_path / "kept").rglob("edit.safetensors")
    assert str(kept) in err and len(neurons.WeightEdit.load(kept).neurons) <= 5


def test_neurons_edit(run, scene, tmp_path, monkeypatch):
    given = ["--model", "toy-llava", "--data", "states", "--limit", "50", "--prompt", ASK]
    file = tmp_path / "edit.safetensors"
    monkeypatch.setattr(solvers, "STEPS", 40)
    status, out, err = run(
        "neurons",
        "edit",
        *given,
        "--from",
        "red",
        "--to",
        "blue",
        "--neurons",
        "2",
        "--out",
        file,
        "--export",
        tmp_path / "model",
    )
    assert status == 0, err
    assert "red -> blue: " in out and "generality" in out and "chair_i" in out and "random" in out
    page = (tmp_path / "edit-card" / "report.html").read_text()
    assert "there is blue" in page and "random</i> columns" in page and "Tried, on pictures" in page
    card = neurons.read(tmp_path / "edit-card", neurons.Assessed)
    assert card.measures["random"].notna().any() and card.objects["random"].notna().all()
    assert card.about["verdict"] in out and card.about["verdict"][1:] in page
    status, out, _ = run("neurons", "edits", file)
    assert status == 0 and "red -> blue" in out
    status, out, err = run("generate", "--model", tmp_path / "model", "--image", scene, "--prompt", ASK)
    assert status == 0, err
    refused(
        run("neurons", "edit", *given, "--from", "red", "--out", file), "neither of --to and --suppress given"
    )
    refused(
        run("neurons", "edit", *given, "--from", "red", "--to", "blue", "--margin", 2, "--out", file),
        "a margin is of the closed solver",
    )
    refused(
        run("neurons", "edit", *given, "--from", "dog", "--to", "cat", "--out", file), "no caption of these"
    )
    refused(
        run(
            "neurons",
            "edit",
            "--model",
            tmp_path / "model",
            *given[2:],
            "--from",
            "green",
            "--to",
            "blue",
            "--on",
            file,
            "--out",
            file,
        ),
        "was made for another model or revision",
    )


def test_what_states_say(run, tmp_path):
    """Of one picture and of a set; the report beside the tables."""
    picture(1, 48).save(tmp_path / "a.png")
    sites = ["--sites", "decoder.*.resid@readout", "decoder.3.resid@image*"]
    asked = ["--model", "toy-llava", "--image", tmp_path / "a.png", "--prompt", "what is this?"]
    status, out, err = run("lens", *asked, *sites, "--top", 2, "--word", "red", "--out", tmp_path / "lens")
    assert (status, err) == (0, "")
    assert "decoder.0.resid@readout: " in out and " 80 rows in " not in out
    found = vlmscope.open(tmp_path / "lens")
    assert set(found.lens["example"]) == {"a.png"} and found.lens["rank"].max() == 2
    assert found.words["word"].unique().tolist() == ["red"]
    assert "What states say" in (tmp_path / "lens" / "report.html").read_text()
    refused(run("lens", *asked[:2], *sites, "--out", tmp_path / "x"), "neither of --image and --data given")
    both = ["--model", "toy-llava", "--data", "states", "--prompt", "what?"]
    refused(run("lens", *both, *sites, "--out", tmp_path / "x"), "--prompt is of one --image")
    vision = ["--sites", "vision.*.resid@all"]
    refused(run("lens", *asked, *vision, "--out", tmp_path / "x"), "no way from its vision tower to words")
    top = ["--only-top", "--word", "red", "--out", tmp_path / "x"]
    refused(run("lens", *asked, *sites, *top), "--only-top is of the top ones; leave one out")
    assert not (tmp_path / "x").exists()
    status, out, err = run("lens", *asked, *sites, "--top", 2, "--only-top", "--out", tmp_path / "top")
    assert (status, err) == (0, "")
    top = vlmscope.open(tmp_path / "top").lens
    assert top["token_id"].tolist() == found.lens["token_id"].tolist() and top["p"].isna().all()


def test_direct_effects(run, tmp_path):
    given = ["--model", "toy-llava", "--data", "states", "--limit", 2]
    sites = ["--sites", "decoder.*.mlp@readout", "decoder.2.attn@readout<image*"]
    status, out, err = run("attribute", *given, *sites, "--corrupt", "image", "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert "82 scores of 2 examples" in out and "sum to the model's own to " in out
    assert (
        "decoder.3.mlp@readout" in out and "Direct effects" in (tmp_path / "run" / "report.html").read_text()
    )
    refused(
        run("attribute", *given, "--sites", "vision.0.mlp@all", "--out", tmp_path / "x"), "does not write"
    )
    blip = ["--model", "toy-blip", *given[2:], *sites[:2], "--out", tmp_path / "x"]
    refused(run("attribute", *blip), "no sum of what its parts write")
    refused(run("attribute", *given, *sites, "--method", "eap", "--out", tmp_path / "x"), "expected direct")
    assert not (tmp_path / "x").exists()


def test_estimates_of_patches(run, tmp_path):
    """The last lines say how far the ranking can be trusted."""
    given = ["--model", "toy-llava", "--data", "states", "--limit", 2, "--corrupt", "image"]
    sites = ["--sites", "decoder.*.attn.h*@readout", "--method", "atp", "--verify", 4]
    status, out, err = run("attribute", *given, *sites, "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert "32 scores of 2 examples" in out and "checked: 5 random rows" in out
    assert re.search(
        r"\ndecoder\.attn\.h: (good|fair|poor). Rank correlation with exact patches 0\.\d\d", out
    )
    assert set(json.loads((tmp_path / "run" / "agreement.json").read_text())) == {"decoder.attn.h"}
    refused(run("attribute", *given[:-2], *sites, "--out", tmp_path / "x"), "takes two runs")
    assert not (tmp_path / "x").exists()


def test_what_is_wrong_with_the_data_is_said_before_workers_load_a_model(run, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def started(**options):
        assert options["workers"] == 2
        yield lambda given: pytest.fail("workers are given what they would load")

    monkeypatch.setattr(workers, "started", started)
    words = [
        "--model",
        "toy-blip",
        "--data",
        tmp_path / "gone.csv",
        "--workers",
        2,
        "--out",
        tmp_path / "run",
    ]
    refused(run("sweep", *words, "--corrupt", "image", "--sites", "encoder.*.resid@answer"), "gone.csv")
    refused(run("tracing", *words), "gone.csv")


def test_circuits_that_are_enough(run, tmp_path):
    """The last line says what the circuit carries; a folder of the command is a report's, too."""
    given = ["--model", "toy-llava", "--data", "states", "--limit", 6, "--corrupt", "image"]
    sites, scores = ["--sites", "decoder.*.attn.h*@all", "--method", "atp"], tmp_path / "scores"
    assert run("attribute", *given, *sites, "--out", scores)[0] == 0
    words = ["faithfulness", *given, "--scores", scores, "--draws", 1]
    status, out, _ = run(*words, "--out", tmp_path / "run")
    assert status == 0
    assert re.search(r"\nCPR 0\.\d\d, CMD 0\.\d\d\n", out)
    last = r"[Tt]hese \d+ heads carry \d+ % of the behaviour on 3 held-out pictures, random circuits of that"
    assert re.match(last, out.splitlines()[-1])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Circuits: states" in page and re.search(last, page)
    assert (tmp_path / "run" / "report-figures" / "part0-curve.png").exists()
    refused(run(*words[:-4], "--scores", tmp_path / "gone", "--out", tmp_path / "x"), "gone")
    refused(run(*words, "--outside", "one", "--out", tmp_path / "x"), "expected corrupt or mean or zero")
    refused(run(*words[:5], "--limit", 3, *words[7:], "--out", tmp_path / "x"), "too few examples for halves")
    assert not (tmp_path / "x").exists()


def test_edges(run, tmp_path):
    given = ["--model", "toy-llava", "--data", "states", "--limit", 2, "--corrupt", "image"]
    status, out, err = run("edges", *given, "--verify", 2, "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert out.startswith("532 edges over 2 examples") and "checked: 5 random rows" in out
    assert re.search(r"\ndecoder\.logits: (good|fair|poor|unknown)\. Rank correlation with exact", out)
    assert (tmp_path / "run" / "edges.parquet").exists()
    plain = [*given[:5], 1, *given[6:]]
    assert "not verified: nothing was patched exactly" in run("edges", *plain, "--out", tmp_path / "y")[1]
    blip = ["--model", "toy-blip", *given[2:], "--out", tmp_path / "x"]
    refused(run("edges", *blip), "normalise the residual stream itself")
    refused(run("edges", *given[:-2], "--out", tmp_path / "x"), "--corrupt")
    assert not (tmp_path / "x").exists()


def test_sweep_from_another_site(run, tmp_path):
    sites = ["--sites", "encoder.0.resid@answer", "--from", "encoder.*.resid@answer"]
    status, out, _ = run(*SWEEP[:-2], *sites, "--out", tmp_path / "run")
    assert status == 0 and out.startswith("6 patches of 2 examples") and "checked: 5 random rows" in out
    effects = vlmscope.open(tmp_path / "run").effects()
    assert sorted({*effects["source_site"]}) == [f"encoder.{n}.resid@answer" for n in range(3)]
    refused(
        run(*SWEEP[:-2], *SITES, "--from", "encoder.1.resid@answer", "--out", tmp_path / "other"),
        "'encoder.1.resid@answer' has 1 position, ",
    )
    assert not (tmp_path / "other").exists()


def test_a_direction_on_the_command_line(run, tmp_path):
    """Built, written, reported, read, added; refused for another model and by what is no direction."""
    data = ["--model", "toy-blip", "--data", "states", "--limit", "8"]
    more = ["--corrupt", "image", "--strength", "1", "2", "--random", "2", "--said", "1"]
    out = tmp_path / "steer"
    status, said, _ = run("steer", *data, "--sites", "encoder.*.resid@last", *more, "--out", out)
    assert status == 0 and "encoder.2.resid@last" in said and "kl  others" in said.replace("   ", " ")
    assert "Direction: clean against corrupt image of states" in (out / "report.html").read_text("utf-8")
    assert vlmscope.open(out).about["strengths"] == [1, 2]
    picture(0, 48).save(tmp_path / "a.png")
    words = ["--image", tmp_path / "a.png", "--prompt", "is this red or blue?"]
    steered = ["--steer", out / "direction.safetensors", "--strength", "3"]
    status, said, _ = run("generate", "--model", "toy-blip", *words, *steered, "--keep-norm")
    assert status == 0 and "with 1 edit:" in said
    refused(run("generate", "--model", "toy-llava", *words, *steered), "built for another model")
    refused(run("generate", "--model", "toy-blip", *words, *steered[2:]), "name one with --steer")
    refused(
        run("generate", "--model", "toy-blip", *words, "--steer", out / "layers.csv"),
        "cannot be read as a direction",
    )
    refused(run("steer", *data, "--sites", "encoder.0.resid@last", "--out", tmp_path / "x"), "--without")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words",
    [
        *(
            f"{command} --data no.csv --sites decoder.0.resid@last"
            for command in ("sweep", "plan", "knockout", "attribute", "lens", "heads", "steer")
        ),
        "edges --corrupt image --data no.csv",
        "tracing --data no.csv",
        "faithfulness --data no.csv --scores a.png",
        "faithfulness --data states --scores no",
        "steer --data states --sites decoder.0.resid@last --without no.csv",
        "steer --data states --sites decoder.0.resid@last --corrupt image --others no.csv",
        "probe --data no.csv --sites decoder.0.resid@last --label kind",
        "lens --image no.png --prompt red --sites decoder.0.resid@last",
        "explain --image no.png --prompt red",
        "data inpaint --data no.csv --fill mean",
        "generate --image no.png --prompt red",
        "generate --image a.png --prompt red --patch decoder.0.resid@last --other no.png",
        "generate --image a.png --prompt red --steer no.safetensors",
        "models toy-blip --example no.csv:0",
        "notice --data states no.csv",
        "notice --spec no.toml",
        "neurons find --image no.png --prompt red",
        "neurons describe --data no.csv",
        "neurons describe --data states --found no",
        "neurons perturb --data no.csv --word red",
        "neurons perturb --data states --word red --found no",
        "neurons edit --data no.csv --from red --to blue",
        "neurons edit --data states --from red --to blue --on no.safetensors",
        "neurons edit --data states --from red --to blue --found no",
    ],
)
def test_a_file_that_is_not_there_is_said_before_a_model_is_loaded(run, tmp_path, monkeypatch, words):
    picture(0, 48).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for module in ("checkpoint", "notice.pipeline"):
        monkeypatch.setattr(f"vlmscope.{module}.load", lambda *_, **__: pytest.fail("loaded"))
    ends = {"explain": ".html", "data": ".csv", "neurons edit": ".safetensors"}
    end = next((end for start, end in ends.items() if words.startswith(start)), "")
    given = [] if "models" in words else ["--model", "toy-blip", "--out", f"out{end}"]
    given = [word for word in given if "generate" not in words or "out" not in word]
    named = next(word.removesuffix(":0") for word in words.split() if word.partition(".")[0] == "no")
    refused(run(*words.split(), *given), f"error: {named}")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_probes_on_the_command_line(run, tmp_path):
    words = ["--model", "toy-blip", "--data", "states", "--limit", "24", "--label", "kind", "--shuffles", "3"]
    out = tmp_path / "probe"
    status, said, _ = run(
        "probe", *words, "--sites", "encoder.1.resid@last", "--corrupt", "image", "--out", out
    )
    assert status == 0 and "encoder.1.resid@last 24" in said
    assert "Probes of kind" in (out / "report.html").read_text("utf-8")
    assert vlmscope.open(out).table["n"].tolist() == [24]
    words[words.index("kind")] = "kond"
    refused(
        run("probe", *words, "--sites", "encoder.1.resid@last", "--out", tmp_path / "x"),
        "no example has a 'kond'; expected one of answer, foil, shows, kind",
    )


def test_shards_from_the_command_line(run, tmp_path, monkeypatch):
    """Run out of order, merged, and the same table as in one go; a shard that is none is refused."""
    monkeypatch.chdir(tmp_path)
    assert run(*SWEEP, *SITES, "--out", "whole")[0] == 0
    for which in (2, 1):
        status, said, _ = run(*SWEEP, *SITES, "--shard", f"{which}/2", "--out", f"s{which}")
        assert status == 0 and "12 patches of 1 examples in s" in said and "folder holds" not in said
    refused(run("merge", "s1", "--out", "merged"), "1 of 2 shards are missing: 2/2")
    status, said, _ = run("merge", "s1", "s2", "--out", "merged")
    assert status == 0 and said.startswith("24 rows of 2 examples, from 2 shards, in merged\nchecked: 10 ")
    tables = [vlmscope.read_run(name).effects() for name in ("whole", "merged")]
    assert tables[0].equals(tables[1])
    for text in ("3/2", "0/2", "1", "1/2/3", "1.0/2", "a/b", "1/99999999"):
        refused(run(*SWEEP, *SITES, "--shard", text, "--out", "x"), f"--shard is '{text}'; expected I/N")
    refused(run(*SWEEP, *SITES, "--shard", "1/3", "--out", "x"), "2 examples do not make 3 shards")
    assert not Path("x").exists()

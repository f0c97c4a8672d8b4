"""What the README shows works as it stands."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "encoder." in capsys.readouterr().out
    assert (tmp_path / "heads.png").exists()
    assert (tmp_path / "states.html").exists()


def test_the_python_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tutorial = (Path(__file__).parent.parent / "docs" / "notice.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", tutorial, re.DOTALL)
    exec(compile(block, "notice.md", "exec"), {})
    assert (tmp_path / "runs" / "faces" / "report.html").exists()


@pytest.mark.slow
def test_the_python_of_the_tutorial_on_neurons_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tutorial = (Path(__file__).parent.parent / "docs" / "neurons.md").read_text("utf-8")
    for block in re.findall(r"```python\n(.*?)```", tutorial, re.DOTALL):
        exec(compile(block, "neurons.md", "exec"), {})
    said = capsys.readouterr().out
    assert "generality" in said and "falsely" in said
    assert (tmp_path / "edited" / "model.safetensors").exists()
    assert (tmp_path / "hidden.csv").exists()


def test_the_python_of_the_page_on_lenses_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "lenses.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "lenses.md", "exec"), {})
    assert "beaten" in capsys.readouterr().out
    assert (tmp_path / "runs" / "words.html").exists()


def test_the_python_of_the_page_on_attribution_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "attribution.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "attribution.md", "exec"), {})
    assert "decoder.mlp.n: good. Rank correlation with exact patches 1.00" in capsys.readouterr().out
    assert (tmp_path / "runs" / "atp.html").exists()


def test_the_python_of_the_page_on_circuits_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "faithfulness.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "faithfulness.md", "exec"), {})
    assert "of the behaviour on 6 held-out pictures, random circuits of that size" in capsys.readouterr().out
    assert (tmp_path / "runs" / "circuits.html").exists()


def test_the_python_of_the_page_on_edges_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "edges.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "edges.md", "exec"), {})
    said = capsys.readouterr().out
    assert "decoder.attn.v: good. Rank" in said
    assert re.search(r"these \d+ edges carry \d+ % of the behaviour on 2 held-out pictures", said)
    assert (tmp_path / "runs" / "edges.html").exists()


def test_the_python_of_the_page_on_words_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "explain.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "explain.md", "exec"), {})
    assert "spearman_attention" in capsys.readouterr().out
    assert (tmp_path / "runs" / "explained" / "explain.html").exists()


def test_the_python_of_the_page_on_steering_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "steering.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "steering.md", "exec"), {})
    assert re.search(r"decoder.1.resid@image +decoder.2.resid@image +-?\d", capsys.readouterr().out)
    assert (tmp_path / "direction" / "direction.safetensors").exists()


def test_the_python_of_the_page_on_data_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text("utf-8")
    hub, made = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(made, "data.md", "exec"), {})
    assert re.match(r"\d+ pairs of 8 that were tried", capsys.readouterr().out)
    assert (tmp_path / "pairs.csv").exists()
    if importlib.util.find_spec("datasets"):
        exec(compile(hub, "data.md", "exec"), {})
        assert capsys.readouterr().out == "1.0\n"


def test_the_python_of_the_page_on_information_flow_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "information-flow.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "information-flow.md", "exec"), {})
    assert "image[object+1] -0." in capsys.readouterr().out
    assert (tmp_path / "flow.html").exists()


@pytest.mark.parametrize(
    ("page", "benchmark"),
    [
        ("information-flow", "information_flow"),
        ("explain", "pointing"),
        ("data", "inpainting"),
        ("neurons", "neurons"),
    ],
)
def test_the_tables_of_a_page_are_those_that_were_measured(page, benchmark, monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(root / "benchmarks")
    page = (root / "docs" / f"{page}.md").read_text("utf-8")
    file = root / "benchmarks" / "results" / f"{benchmark.replace('_', '-')}-cpu.json"
    spec = importlib.util.spec_from_file_location(benchmark, root / "benchmarks" / f"{benchmark}.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = json.loads(file.read_text("utf-8"))
    for table in benchmark.markdown(result):
        assert table in page


def test_the_specification_of_the_tutorial_is_one(tmp_path):
    from vlmscope.notice import Spec

    tutorial = (Path(__file__).parent.parent / "docs" / "notice.md").read_text("utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", tutorial, re.DOTALL)
    block = re.sub(r"^# (\w+ = )", r"\1", block, flags=re.MULTILINE)  # also what is commented out
    (tmp_path / "spec.toml").write_text(block)
    spec = Spec.from_toml(tmp_path / "spec.toml")
    assert (spec.position, spec.select, spec.limit) == ("answer", False, 500)


@pytest.mark.parametrize(
    "command",
    "demo sweep plan merge knockout report models notice tracing circuits heads lens explain attribute edges "
    "data neurons".split(),
)
def test_the_commands_of_the_readme_exist(command):
    from typer.main import get_command

    from vlmscope.cli.main import app

    assert f"vlmscope {command}" in README
    assert command in get_command(app).commands


def test_the_commands_of_the_page_on_clusters_run(tmp_path, monkeypatch, capsys):
    """But for those that need Ray or SLURM; and its Python."""
    from vlmscope.cli.main import app

    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text("utf-8")
    lines = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    plain = [line for line in lines if line.startswith("vlmscope") and "--workers" not in line]
    for line in plain:
        app(shlex.split(line)[1:], standalone_mode=False)
    assert [line.split()[1] for line in plain] == ["plan", "sweep", "sweep", "merge"]
    assert (tmp_path / "jobs.sh").exists()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "cluster.md", "exec"), {})
    said = capsys.readouterr().out
    assert "each of 2 shards: " in said and "72 patches of 6 examples; checked: 10 random rows" in said


def test_the_costs_of_the_page_on_clusters_follow_from_what_was_measured():
    root = Path(__file__).parent.parent
    page = (root / "docs" / "cluster.md").read_text("utf-8")
    base, blip = (
        json.loads((root / "benchmarks" / "results" / f"{name}-cpu.json").read_text("utf-8"))
        for name in ("notice", "blip")
    )
    each, size = base["base"]["estimated_hours"] / 1500, base["base"]["estimated_gb"] / 1500
    one = blip["resid"]["seconds"] / blip["resid"]["sites"]
    notice, patches = 13_000 * each, 12 * 4 * 9 * 3 + 12 * 4 * 2 * 3
    tracing = 100 * 10 * patches * one / 3600
    assert f"({3600 * each:.1f} s for the 3,360 patches" in page and f"({1000 * one:.1f} ms a patch" in page
    assert f"| {notice:.0f} h | {notice / 8:.1f} h | {notice / 64:.1f} h | {13_000 * size:.1f} GB |" in page
    assert f"{patches:,} patches each" in page
    assert f"| {tracing:.1f} h | {tracing / 8:.1f} h | {tracing / 64:.1f} h |" in page

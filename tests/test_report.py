"""The report: one file, escaped, with its figures beside it."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from models import blip, example, picture

from vlmscope import circuits, heads, tracing
from vlmscope.corrupt import Noise
from vlmscope.errors import StoreError
from vlmscope.report import write_report
from vlmscope.study import sweep, sweep_to

SITES = [
    "encoder.*.cross.h*@*",
    "encoder.*.attn.h*@*",
    "encoder.*.resid@*",
    "decoder.*.cross.h*@last",
    "vision.*.resid@image*",
]
HOSTILE = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    model = blip()
    bad = replace(example(), id=HOSTILE, clean_image=folder / "<b>gone</b>.png")
    with pytest.warns(UserWarning, match="left out"):
        sweep(model, [example(), bad], SITES, "image", out=folder / "one", data=HOSTILE)
    sweep(model, [replace(example(), id=HOSTILE)], SITES, "text", out=folder / "two")
    return [folder / "one", folder / "two"]


def test_a_report_holds_all_it_should(runs, tmp_path):
    page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    for text in (
        "is this circle red or blue ?",
        "is this circle green or yellow ?",
        "1 were left out",
        "Layers and tokens",
        "Heads",
        "Image patches",
        "The strongest sites",
        "All runs",
        "tiny-blip",
    ):
        assert text in page, text
    assert page.count('alt="clean image"') == 2
    assert page.count('alt="corrupt image"') == 1


def test_it_is_one_file_that_needs_no_network(runs, tmp_path):
    page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert 'src="data:image/png;base64,' in page


def test_every_figure_is_saved_beside_it(runs, tmp_path):
    page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    saved = {file.name for file in (tmp_path / "report-figures").iterdir()}
    assert len(saved) == 2 * page.count('class="plot"') > 12
    for name in saved:
        assert f'href="report-figures/{name}"' in page


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder of each kind, with hostile names wherever a name comes from data."""
    folder = tmp_path_factory.mktemp("all")
    model = blip(layers=3)
    examples = [
        replace(example(), id=f"{HOSTILE} {n}", clean_image=picture(n), corrupt_image=picture(20 + n),
                masks={"object": (0, 0, 6, 6)})
        for n in range(12)
    ]  # fmt: skip
    sites = ["encoder.*.cross.h*@answer", "decoder.*.cross.h*@last"]
    run = sweep_to(folder / "<b>run", model, examples, sites, "image", data=HOSTILE)
    circuits.write([run.path], folder / "c")
    heads.write(folder / "h", model, examples, sites, data=HOSTILE)
    noise = Noise(draws=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "MIN_P", -1.0)
        patch.setattr(tracing, "MIN_LD", -1e9)
        tracing.trace(
            folder / "t", model, examples[:3], noise=noise, kinds=("cross",), data=HOSTILE
        )
    return [folder / "c", folder / "h", folder / "t", run.path]


def test_circuits_heads_and_tracing_are_reported(everything, tmp_path):
    page = write_report(everything, tmp_path / "report.html").read_text("utf-8")
    for text in (
        "Important and universal heads",
        "What heads do: ",
        "Where they look, and what the patches do",
        "With all of them set to their mean at once",
        "Causal tracing: ",
        "windows of 3",
        "The most that comes back is",
    ):
        assert text in page, text
    assert HOSTILE not in page and "<b>run" not in page and "&lt;script&gt;" in page
    saved = {file.name for file in (tmp_path / "report-figures").iterdir()}
    assert len(saved) == 2 * page.count('class="plot"') > 20
    assert all(f'href="report-figures/{name}"' in page for name in saved)


def test_the_data_beside_a_figure_is_what_it_shows(everything, tmp_path):
    write_report(everything, tmp_path / "report.html")
    table = pd.read_csv(tmp_path / "report-figures" / "part0-encoder-cross.csv")
    heads = pd.read_parquet(everything[0] / "heads.parquet").query("tower == 'encoder'")
    assert table["mean"].tolist() == pytest.approx(heads["mean"].tolist())


def test_a_damaged_folder_is_named(everything, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "circuits.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        write_report([tmp_path / "c"], tmp_path / "r.html")


def test_text_from_data_is_escaped(runs, tmp_path):
    page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "<b>gone</b>" not in page


def test_an_unfinished_run_is_said_to_be_so(runs, tmp_path):
    import shutil

    run = shutil.copytree(runs[1], tmp_path / "run")
    (run / "done.json").unlink()
    assert "(not finished)" in write_report([run], tmp_path / "r.html").read_text("utf-8")


def test_no_runs_and_no_folder(tmp_path):
    with pytest.raises(StoreError, match="no runs to report on"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(StoreError, match="no such folder"):
        write_report([tmp_path / "gone"], tmp_path / "r.html")

"""The report: one file, escaped, with its figures beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import blip, example

from vlmscope.errors import StoreError
from vlmscope.report import write_report
from vlmscope.study import sweep

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
    assert len(saved) == page.count('class="plot"') > 6
    for name in saved:
        assert f'href="report-figures/{name}"' in page


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

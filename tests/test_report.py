"""The report: one file, escaped, with its figures beside it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html import unescape

import pandas as pd
import pytest
from models import blip, example, picture, sweep_to

from vlmscope.checkpoint import load
from vlmscope.data import examples
from vlmscope.errors import DataError, StoreError
from vlmscope.report import write_report
from vlmscope.report.heat_maps import FLOOR
from vlmscope.report.page import MANIFEST
from vlmscope.report.ranking import strongest
from vlmscope.report.words import short_number
from vlmscope.runs.corrupt import Noise
from vlmscope.studies import circuits, heads, tracing
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.sweep import sweep
from vlmscope.studies.tables import head_table

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
    saved = {file.name for file in (tmp_path / "report-figures").iterdir()} - {MANIFEST}
    assert len(saved) == 2 * page.count('class="plot"') > 12
    for name in saved:
        assert f'href="report-figures/{name}"' in page


def test_figures_are_saved_as_svg_and_pdf_too(runs, tmp_path):
    page = write_report(runs[1:], tmp_path / "report.html", formats=["svg", "pdf"]).read_text("utf-8")
    saved = [file for file in (tmp_path / "report-figures").iterdir() if file.name != MANIFEST]
    assert len(saved) == 4 * page.count('class="plot"') > 4
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".csv": b""}
    for file in saved:
        assert f'href="report-figures/{file.name}"' in page
        assert file.read_bytes().startswith(begins[file.suffix])
    with pytest.raises(StoreError, match="cannot be saved as 'bmp'; expected svg, pdf"):
        write_report(runs, tmp_path / "report.html", formats=["bmp"])


def test_the_table_of_a_run_is_read_once(runs, tmp_path, monkeypatch):
    read, effects = [], Run.effects
    monkeypatch.setattr(Run, "effects", lambda run, *which: read.append(run.path) or effects(run, *which))
    assert "All runs" in write_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert read == runs


def test_the_rows_that_were_recomputed_are_said(runs, tmp_path):
    run = shutil.copytree(runs[1], tmp_path / "run")
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"check": {"rows": 5, "largest": 3.1e-7}}))
    said = "5 random rows were recomputed by one plain forward each: largest difference 3e-07."
    page = write_report([run], tmp_path / "r.html").read_text("utf-8")
    assert said in " ".join(page.split())
    about.pop("check", None)
    (run / "run.json").write_text(json.dumps(about))
    assert "recomputed" not in write_report([run], tmp_path / "s.html").read_text("utf-8")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A folder of each kind, with hostile names wherever a name comes from data."""
    folder = tmp_path_factory.mktemp("all")
    model = blip(layers=3)
    examples = [
        replace(
            example(),
            id=f"{HOSTILE} {n}",
            clean_image=picture(n),
            corrupt_image=picture(20 + n),
            masks={"object": (0, 0, 6, 6)},
        )
        for n in range(12)
    ]
    sites = ["encoder.*.cross.h*@answer", "decoder.*.cross.h*@last"]
    run = sweep_to(folder / "<b>run", model, examples, sites, "image", data=HOSTILE)
    circuits.find([run.path]).save(folder / "c")
    heads.write(folder / "h", model, examples, sites, data=HOSTILE)
    noise = Noise(draws=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "MIN_P", -1.0)
        patch.setattr(tracing, "MIN_LD", -1e9)
        tracing.trace(model, examples[:3], folder / "t", noise=noise, kinds=("cross",), data=HOSTILE)
    return [folder / "c", folder / "h", folder / "t", run.path]


def test_heads_have_their_effects_and_evidence(everything, tmp_path):
    """Against the tables: the effect with its interval in the row of its head, and each statement once."""
    found = heads.read(everything[1])
    page = unescape(write_report(everything[1:2], tmp_path / "report.html").read_text("utf-8"))
    rows = {row.site: row for row in found.measures[found.measures["measure"] == "effect"].itertuples()}
    assert len(rows) == len(found.functions) > 4
    for head in found.functions.itertuples():
        (shown,) = re.findall(
            rf"<tr>\s*<td[^>]*><code>{re.escape(head.site)}</code>.*?</tr>", page, re.DOTALL
        )
        effect = rows[head.site]
        before, said = re.findall(r"<td>([^<]*)</td>", shown)[-1], re.findall(r"<li>(.*?)</li>", shown)
        numbers = [float(n) for n in re.findall(r"[+-]\d+\.\d\d", before.replace("\N{MINUS SIGN}", "-"))]
        wanted = [n for n in (effect.value, effect.low, effect.high) if not pd.isna(n)]
        assert numbers == pytest.approx(wanted, abs=0.006) and said == head.evidence.split("; "), shown


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
    saved = {file.name for file in (tmp_path / "report-figures").iterdir()} - {MANIFEST}
    assert len(saved) == 2 * page.count('class="plot"') > 20
    assert all(f'href="report-figures/{name}"' in page for name in saved)


def test_the_data_beside_a_figure_is_what_it_shows(everything, tmp_path):
    write_report(everything, tmp_path / "report.html")
    table = pd.read_csv(tmp_path / "report-figures" / "part0-encoder-cross.csv")
    heads = pd.read_parquet(everything[0] / "heads.parquet").query("tower == 'encoder'")
    assert table["mean"].tolist() == pytest.approx(heads["mean"].tolist())


# --- numbers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Runs of both toys on prompts of several lengths, two of each, with patches that are there twice."""
    folder = tmp_path_factory.mktemp("toys")
    lava, blip_ = load("toy-llava", device="cpu"), load("toy-blip", device="cpu")
    text = [
        "decoder.*.attn.h*@text*",
        "decoder.*.resid@text*",
        "decoder.*.resid@answer",
        "decoder.*.mlp@image",
    ]
    sweep_to(folder / "a", lava, examples("states", limit=12), text, "image", data="states")
    sweep_to(folder / "b", lava, examples("scenes", limit=5), text, "text", data="scenes")
    both = ["encoder.*.cross.h*@text*", "encoder.*.resid@text*", "decoder.*.cross.h*@last"]
    sweep_to(folder / "c", blip_, examples("states", limit=12), both, "image", data="states")
    sweep_to(folder / "d", blip_, examples("states", limit=6), both, "image", data="states")
    return [folder / name for name in "abcd"]


CAPTION = re.compile(
    r"The largest mean change of LD(?: that at least half of the examples hold)? is (\S+)"
    r"(?: \(95 % interval (\S+) to (\S+)\))?, at layer (\d+), (head|slot) (\S+) \((.*?)\)\..*?"
    r"Means over (\d+) examples?(?:, down to (\d+) where)?.*?full colour is ([\d.]+) logits"
)


def captions(page):
    """The stem of each figure's files, and its caption."""
    found = re.findall(r"<figcaption>(.*?) <a href=\"[^\"]*/([^/\"]+)\.png\"", page)
    return {name: unescape(text) for text, name in found}


@pytest.mark.parametrize("which", [[0], [0, 1], [2, 3]])
def test_captions_say_what_their_data_says(toys, tmp_path, which):
    page = write_report([toys[n] for n in which], tmp_path / "r.html").read_text("utf-8")
    base = [read_run(toys[n]).baselines() for n in which]
    gaps = [(one["ld_clean"] - one["ld_corrupt"]).mean() for one in base]
    checked = 0
    for name, caption in captions(page).items():
        data = pd.read_csv(tmp_path / "r-figures" / f"{name}.csv", dtype={"slot": str})
        if not {"panel", "mean"} <= set(data):
            continue
        found = CAPTION.search(caption)
        assert found, caption
        mean, low, high, layer, column, at, panel, many, few, full = found.groups()
        whole = data[data["n"] >= data.groupby("panel")["n"].transform("max") / 2]
        best = whole.loc[whole["mean"].abs().idxmax()]
        assert mean == short_number(best["mean"])
        ends = [None if pd.isna(best[end]) else short_number(best[end]) for end in ("low", "high")]
        assert [low, high] == ends
        assert (int(layer), at) == (best["layer"], str(best[column]))
        assert panel.casefold() == best["panel"].casefold()
        assert int(many) == data["n"].max() and int(few or many) == data["n"].min()
        floor = FLOOR * max(gaps if name.startswith("all") else [gaps[int(name[3])]])
        assert float(full) == pytest.approx(max(floor, data["mean"].abs().max()), rel=0.01)
        checked += 1
    assert checked >= 2 * len(which)


def test_the_data_of_run_figures_is_a_group_by(toys, tmp_path):
    """Each cell of the CSV beside a figure: mean and n over the rows of effects that it names."""
    write_report([toys[0]], tmp_path / "r.html")
    effects = read_run(toys[0]).effects()
    for part, column in (("tokens", "slot"), ("heads", "head")):
        data = pd.read_csv(tmp_path / "r-figures" / f"run0-decoder-{part}.csv", dtype={"slot": str})
        assert len(data)
        for row in data.to_dict("records"):
            here = (effects["kind"] == row["kind"]) & (effects["layer"] == row["layer"])
            here &= effects["slot"] == row["slot"]
            here &= effects["unit"] == f"h{row['head']}" if column == "head" else effects["unit"].isna()
            each = effects[here].groupby("example")["logit_diff"].mean()
            assert (row["mean"], row["n"]) == (pytest.approx(each.mean(), rel=1e-9), len(each))
    assert set(data["slot"]) == {"readout"} and set(data["n"]) == {12}


def test_it_says_which_slot_heads_are_shown_at(toys, tmp_path):
    page = write_report([toys[0], toys[2]], tmp_path / "r.html").read_text("utf-8")
    said = captions(page)
    assert "at the read-out position, where the answer is predicted" in said["run0-decoder-heads"]
    assert "at the answer's token (nothing is read out in this tower)" in said["run1-encoder-heads"]
    assert "@foil" not in said["run1-encoder-heads"]


def test_all_runs_of_any_tower(toys, tmp_path):
    write_report(toys[:2], tmp_path / "r.html")
    saved = {file.name for file in (tmp_path / "r-figures").glob("all-*.csv")}
    assert saved == {"all-decoder-attn.csv", "all-decoder-resid-tokens.csv", "all-decoder-mlp-tokens.csv"}
    data = pd.read_csv(tmp_path / "r-figures" / "all-decoder-attn.csv")
    assert data.groupby("panel")["n"].max().tolist() == [5, 12]


def test_sections_have_names_of_their_own(toys, tmp_path):
    page = write_report([toys[2], toys[3], toys[0]], tmp_path / "r.html").read_text("utf-8")
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert len(set(titles)) == len(titles) == 4
    assert "states, image corrupted (c)" in titles and "states, image corrupted (d)" in titles
    again = write_report([toys[3], toys[3]], tmp_path / "s.html").read_text("utf-8")
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", again)
    assert len(set(titles)) == len(titles) == 3


def test_a_run_that_the_model_does_not_know_is_greyed_out(toys, tmp_path):
    model = load("toy-llava", device="cpu")
    wrong = [replace(e, answer=e.foil, foil=e.answer) for e in examples("states", limit=12)]
    run = sweep_to(tmp_path / "wrong", model, wrong, "decoder.*.attn.h*@last", "image", data="wrong")
    page = write_report([run.path], tmp_path / "r.html").read_text("utf-8")
    assert "0% answered rightly" in page
    assert "The model does not seem to know this task: it answers fewer than half" in page
    assert "greyed out" in page and page.count('<div class="unknown">') == 1
    assert ".unknown figure img.plot { opacity" in page
    fine = write_report([toys[0]], tmp_path / "f.html").read_text("utf-8")
    assert '<div class="unknown">' not in fine and "greyed out" not in fine
    assert "12 examples, 100% answered rightly; P(answer)" in fine


def test_few_examples_are_said(toys, tmp_path):
    page = write_report([toys[1]], tmp_path / "r.html").read_text("utf-8")
    assert "Fewer than 10 examples can hardly show anything." in page
    assert "Means over 5 examples (fewer than 10 can hardly show anything)." in page
    assert "Fewer than 10" not in write_report([toys[0]], tmp_path / "s.html").read_text("utf-8")


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
    run = shutil.copytree(runs[1], tmp_path / "run")
    (run / "done.json").unlink()
    assert "(not finished)" in write_report([run], tmp_path / "r.html").read_text("utf-8")


def test_no_runs_and_no_folder(tmp_path):
    with pytest.raises(StoreError, match="no runs to report on"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(StoreError, match="no such folder"):
        write_report([tmp_path / "gone"], tmp_path / "r.html")


# --- ablations, noise and other metrics --------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Runs in which `logit_diff` is null, or is not what a patch does."""
    folder, model = tmp_path_factory.mktemp("other"), load("toy-blip", device="cpu")
    sites = ["encoder.*.resid@text*", "encoder.*.cross.h*@answer"]
    ways = {
        "logprob": ("image", {"metric": "logprob"}),
        "zero": (None, {"patch": "zero"}),
        "kl": (None, {"patch": "mean", "metric": "kl"}),
        "resample": ("image", {"patch": "resample"}),
        "noise": ("image", {"direction": "noise"}),
    }
    for name, (corrupt, options) in ways.items():
        given = examples("states", limit=3)
        sweep_to(folder / name, model, given, sites, corrupt, check=0, data="states", **options)
    return folder


PATCHING = {
    "logprob": "clean activations into the corrupt run (denoise)",
    "zero": "zero ablation of the clean run",
    "kl": "mean ablation of the clean run",
    "resample": "clean run with activations resampled from other examples",
    "noise": "corrupt activations into the clean run (noise)",
}


@pytest.mark.parametrize("name", PATCHING)
def test_a_run_is_ranked_and_drawn_against_the_run_that_was_patched(other, tmp_path, name):
    page = write_report([other / name], tmp_path / "r.html").read_text("utf-8")
    column, words = ("p_change", "P(answer)") if name == "logprob" else ("ld_change", "LD")
    effects = read_run(other / name).effects()
    by_site = effects.groupby(["layer", "kind", "unit", "slot"], dropna=False)[column].agg(["mean", "size"])
    most = by_site.loc[by_site["size"] >= 2, "mean"].abs().max()
    assert abs(strongest(effects)["mean"].iloc[0]) == pytest.approx(most)
    assert f"<code>{PATCHING[name]}</code>" in page
    assert f"mean change of {words}</th>" in page
    assert all(f"The largest mean change of {words}" in text for text in captions(page).values())
    data = pd.read_csv(tmp_path / "r-figures" / "run0-encoder-tokens.csv", dtype={"slot": str})
    for row in data.head(20).itertuples():
        here = effects[effects["unit"].isna() & (effects["slot"] == row.slot)]
        each = here[here["layer"] == row.layer].groupby("example")[column].mean()
        assert row.mean == pytest.approx(each.mean(), abs=1e-9)
    assert (f"<code>{name};" in page) == (name in ("logprob", "kl"))
    assert "nan" not in re.sub(r'"data:[^"]*"', "", page)


def test_runs_of_other_metrics_are_not_drawn_on_one_scale(other, tmp_path):
    page = write_report([other / name for name in PATCHING], tmp_path / "r.html").read_text("utf-8")
    data = pd.read_csv(tmp_path / "r-figures" / "all-encoder-cross.csv")
    assert data["panel"].nunique() == 4 and not data["panel"].str.contains("logprob").any()
    assert "states, image corrupted, metric logprob" in page
    assert "states, zero ablation of the clean run" in page


def test_sets_and_sums_of_heads_are_no_heads(tmp_path):
    model, pair = load("toy-blip", device="cpu"), "encoder.0.cross.h1@answer + encoder.2.cross.h3@answer"
    sites = ["encoder.1.cross.h[0,2]@answer", pair]
    run = sweep_to(tmp_path / "run", model, examples("states", limit=3), sites, "image", check=0)
    assert set(strongest(run.effects())["site"]) == set(sites)
    with pytest.raises(DataError, match="no patches of heads in single layers"):
        head_table(run.effects())
    page = write_report([run.path], tmp_path / "r.html").read_text("utf-8")
    assert "Sets of heads and sums of sites, such as encoder.1.cross.h[0,2]@answer, are in no figure" in page
    assert pair in page and 'class="plot"' not in page


def test_a_refused_report_leaves_no_folder_and_no_file(runs, tmp_path):
    with pytest.raises(StoreError, match=r"expected a file that ends in \.html"):
        write_report(runs, tmp_path / "r.pdf")
    with pytest.raises(StoreError, match="no such folder"):
        write_report([tmp_path / "none"], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
    write_report(runs, tmp_path / "r.html")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="no such folder"):
        write_report([tmp_path / "none"], tmp_path / "r.html")
    assert sorted(tmp_path.rglob("*")) == before


def test_captions_keep_the_case_of_names(tmp_path):
    model = load("toy-blip", device="cpu")
    run = sweep_to(tmp_path / "run", model, examples("states", limit=2), "encoder.*.mlp@answer", "image")
    page = write_report([run.path], tmp_path / "r.html").read_text("utf-8")
    assert "(MLP)." in page and "mLP" not in page

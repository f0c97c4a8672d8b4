"""The page on information flow: its numbers are those of its rows, and its figures show its numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from scipy import stats

import vlmscope

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def rows():
    return pd.read_parquet(RESULTS / "information-flow-cpu-rows.parquet")


@pytest.fixture(scope="module")
def result():
    return json.loads((RESULTS / "information-flow-cpu.json").read_text("utf-8"))


def test_numbers_are_a_group_by_of_the_rows(rows, result):
    kinds = [name for name in result if ", " in name]
    assert kinds == [f"{name}, {data}" for name in ("toy-llava", "toy-blip") for data in ("states", "scenes")]
    for kind in kinds:
        own = rows[(rows["model"] + ", " + rows["data"]) == kind]
        patched = own[own["part"] == "object"]
        right = patched[patched["before"] > 0].groupby("example").size().index
        shares = patched[patched["example"].isin(right)].groupby(["what", "how", "layers"])
        found = {(x["what"], x["how"], x["layers"]): x for x in result[kind]["objects"]}
        assert len(found) == len(shares) == len(result[kind]["objects"])
        for key, some in shares:
            low, high = stats.binomtest(int((some["after"] < 0).sum()), len(some)).proportion_ci(
                method="wilson"
            )
            numbers = ((some["after"] < 0).mean(), low, high, some["tokens"].mean(), len(some))
            assert [found[key][name] for name in ("share", "low", "high", "tokens", "n")] == pytest.approx(
                numbers, abs=6e-4
            )
        cut = own[(own["part"] == "flow") & own["example"].isin(right)]
        change = ((cut["after"] - cut["before"]) / cut["before"]).groupby(
            [cut["what"], cut["window"], cut["layers"].astype(int)]
        )
        compare(change, result[kind]["flows"], ("what", "window", "layer"))
        said = own[own["part"] == "said"]
        if kind.startswith("toy-llava"):
            each = said["after"].groupby([said["what"], said["layers"].astype(int)])
            compare(each, result[kind]["said"], ("what", "layer"))
        else:
            assert said.empty and "said" not in result[kind]


def compare(groups, found, keys):
    """Means, their intervals and counts, against numbers that were written."""
    written = {tuple(row[key] for key in keys): row for row in found}
    assert len(written) == len(groups) == len(found)
    for key, values in groups:
        row = written[key]
        assert (row["mean"], row["n"]) == (pytest.approx(values.mean(), abs=6e-4), len(values))
        if row["low"] is None:
            assert values.nunique() == 1
        else:
            ends = vlmscope.stats.interval(values.to_numpy()[:, None])[:, 0]
            assert (row["low"], row["high"]) == pytest.approx(ends, abs=6e-4)


def test_rows_are_what_runs_give(rows):
    benchmark = module("information_flow")
    first = benchmark.examples_of("states", benchmark.FEW)
    for name in ("toy-llava", "toy-blip"):
        model = vlmscope.load(name)
        again = benchmark.rows_of(model, first[1], benchmark.mean_token(model, first))
        if name == "toy-llava":
            again += benchmark.said_rows(model, first[1:2])
        again = benchmark.table_of(name, "states", again)
        stored = rows[(rows["model"] == name) & (rows["data"] == "states") & (rows["example"] == first[1].id)]
        keys = ["part", "what", "how", "layers", "window"]
        both = again.merge(stored, on=keys, suffixes=("", "_stored"))
        assert len(both) == len(again) == len(stored)
        for value in ("before", "after", "tokens"):
            found, wanted = (both[one].astype(float).tolist() for one in (value, f"{value}_stored"))
            assert found == pytest.approx(wanted, rel=5e-3, abs=5e-3, nan_ok=True)


def test_figures_show_the_numbers(result):
    figures = module("flow_figures")
    axes = figures.DRAWN["flow"](result)
    assert [spot.get_title() for spot in axes][:2] == [
        "toy-llava, states: one layer",
        "toy-llava, scenes: one layer",
    ]
    for spot, (kind, window) in zip(
        axes, [(f"toy-llava, {d}", w) for w in (1, 3) for d in ("states", "scenes")], strict=True
    ):
        lines = {line.get_label(): line.get_ydata().tolist() for line in spot.get_lines()}
        for edge in ("last<image", "last<question", "last<last", "question<image"):
            table = [x for x in result[kind]["flows"] if (x["what"], x["window"]) == (edge, window)]
            assert lines[edge.replace("<", " ← ")] == [
                x["mean"] for x in sorted(table, key=lambda x: x["layer"])
            ]
    axes = figures.DRAWN["ablated"](result)
    for spot, kind in zip(axes, [name for name in result if ", " in name], strict=True):
        lines = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in spot.get_lines()}
        named = {x["what"]: x for x in result[kind]["objects"] if x["how"] == "mean token"}
        for label, ending in (
            ("the object's, with margins of 0, 1, 2", ""),
            ("as many by gradient", ": as many by gradient"),
            ("as many at random", ": as many at random"),
        ):
            some = [named[f"object{margin}{ending}"] for margin in ("", "+1", "+2")]
            assert [*zip(*lines[label], strict=True)] == [(x["tokens"], x["share"]) for x in some]
    axes = figures.DRAWN["blocked"](result)
    for spot, kind in zip(axes, [name for name in result if ", " in name], strict=True):
        lines = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in spot.get_lines()}
        for label, place in (
            ("image", "image"),
            ("object and around", "object+1"),
            ("all other patches", "-object+1"),
        ):
            some = [x for x in result[kind]["objects"] if (x["what"], x["how"]) == (place, "not read")]
            assert [*zip(*lines[label], strict=True)] == [(x["layers"], x["share"]) for x in some]
    for spot, kind in zip(
        figures.DRAWN["said"](result), ("toy-llava, states", "toy-llava, scenes"), strict=True
    ):
        lines = {line.get_label(): line.get_ydata().tolist() for line in spot.get_lines()}
        for label, place in (("object and around", "object+1"), ("all other patches", "-object+1")):
            assert lines[label] == [x["mean"] for x in result[kind]["said"] if x["what"] == place]


def test_the_figures_are_of_these_numbers(result):
    figures = module("flow_figures")
    page = (ROOT / "docs" / "information-flow.md").read_text("utf-8")
    for name in figures.DRAWN:
        with Image.open(ROOT / "docs" / "figures" / f"{name}.png") as drawn:
            assert drawn.info["Source"] == figures.digest(result), "run benchmarks/flow_figures.py"
        assert f"(figures/{name}.png)" in page

"""What a user may write, with every public name: `test_types.py` has mypy read it, nothing runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import pandas as pd
import torch

import vlmscope


def patch(model: vlmscope.Model, example: vlmscope.Example) -> torch.Tensor:
    pair: vlmscope.Pair = model.prepare(example)
    inputs: vlmscope.Inputs = pair.clean
    name = "encoder.1.cross.h2@answer"
    edit = vlmscope.Edit(name, "set", model.capture(inputs, name)[name])
    assert_type(model.answer(pair.corrupt, [edit]), str)
    return model.run(pair.corrupt, [edit])


def first_heads() -> vlmscope.Pattern:
    pattern = vlmscope.Pattern.parse("encoder.*.cross.h[0,1]@answer")
    assert_type(pattern, vlmscope.Pattern)
    return pattern


def place(site: vlmscope.Site) -> tuple[str, int, tuple[int, ...]]:
    return site.tower, site.layer, site.positions


def study(folder: Path) -> None:
    model = vlmscope.load("toy-blip", dtype="float64", device="cpu")
    assert_type(model, vlmscope.Model)
    examples = vlmscope.examples("states", limit=4)
    assert_type(examples, Sequence[vlmscope.Example])
    noise = vlmscope.Noise("multiply", draws=2)
    table = vlmscope.sweep(model, examples, "encoder.*.cross.h*@answer", corrupt=noise, direction="noise")
    assert_type(vlmscope.baselines(model, examples, corrupt="image"), pd.DataFrame)
    run = vlmscope.read_run(folder / "run")
    assert_type(vlmscope.merge([folder / "1", folder / "2"], folder / "both").baselines(), pd.DataFrame)
    assert_type(run.effects(), pd.DataFrame)
    assert_type(vlmscope.push(folder / "run", "somebody/a-run", private=True), str)
    print(vlmscope.open(folder / "run").effects())
    assert_type(vlmscope.head_table(table, slot="answer"), pd.DataFrame)
    assert_type(vlmscope.token_table(run.effects(), kind="resid"), pd.DataFrame)
    assert_type(vlmscope.compare(table, run.effects(), value="ld_change", paired=False), pd.DataFrame)
    assert_type(vlmscope.write_report([folder / "run"], folder / "report.html"), Path)


def lenses(model: vlmscope.Model, examples: Sequence[vlmscope.Example], folder: Path) -> None:
    cut = vlmscope.knockout(model, examples, "decoder.*/2.attn@last<image*")
    assert_type(vlmscope.flow_table(cut), pd.DataFrame)
    assert_type(vlmscope.attribute(model, examples, "decoder.*.mlp@readout"), pd.DataFrame)
    assert_type(vlmscope.edges(model, examples, "image"), pd.DataFrame)
    assert_type(vlmscope.faithfulness(model, examples, folder / "run").table, pd.DataFrame)
    print(vlmscope.trace(model, examples, folder / "traced", windows=[1, 3]).table)
    print(vlmscope.inpaint(model, examples, folder / "made.csv", fill="blur"))
    print(vlmscope.lens(model, examples, "decoder.*.resid@readout").words)
    assert_type(vlmscope.edges(model, examples, "image"), pd.DataFrame)
    found = vlmscope.explain(model, folder / "a.png", "what is it?", ["red"], region=(0, 0, 9, 9))
    assert_type(found.cells, pd.DataFrame)
    assert_type(found.page(), str)
    found.save(folder / "explained")
    steered = vlmscope.steer(model, examples, "decoder.1.resid@last", corrupt="image")
    assert_type(steered.direction, vlmscope.Direction)
    print(vlmscope.probe(model, examples, "decoder.1.resid@last", label="kind").table)


def own_data(folder: Path) -> None:
    try:
        assert_type(vlmscope.read_csv(folder / "mine.csv"), list[vlmscope.Example])
    except vlmscope.VlmscopeError as error:
        assert_type(error, vlmscope.VlmscopeError)
    one = vlmscope.Example("1", folder / "1.png", "is this red or blue?", "red", "blue")
    vlmscope.write_csv(folder / "mine.csv", [one])


def change(model: vlmscope.Model, file: Path) -> None:
    edit = vlmscope.WeightEdit.load(file)
    assert_type(edit, vlmscope.WeightEdit)
    with vlmscope.edited(model, edit):
        assert_type(model.name, str)


assert_type(vlmscope.__version__, str)

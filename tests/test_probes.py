"""Linear probes: what they find, and the nulls under which they would find nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from models import example, llava, picture
from scipy.optimize import minimize

import vlmscope
from vlmscope.errors import DataError, SiteError
from vlmscope.report import write_report
from vlmscope.studies import probes
from vlmscope.studies.probes import logistic, probe
from vlmscope.studies.sweep import sweep


def several(many=12):
    prompts = ["is this circle red or blue ?", "is this square red or blue ?"]
    return [
        example(
            prompts[n % 2],
            id=f"e{n}",
            clean_image=picture(n),
            corrupt_image=picture(90 + n),
            roles={},
            groups={"noun": ("circle", "square")[n % 2], "half": f"h{n // 4}"},
        )
        for n in range(many)
    ]


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_a_probe_is_a_logistic_regression(ridge):
    """Against another optimizer, several labels at once, one of which all examples have."""
    draw = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(20, 4, generator=draw, dtype=torch.float64)
    y = (torch.rand(3, 20, generator=draw) < 0.5).double()
    y[2] = (x[:, 0] > 0).double()  # which can be told apart without an error
    found = logistic(x, y, ridge)

    def loss(w, labels):
        margin = x.numpy() @ w[:-1] + w[-1]
        return (np.logaddexp(0, margin) - labels * margin).sum() + ridge * (w[:-1] ** 2).sum() / 2

    for labels, mine in zip(y.numpy(), found, strict=True):
        wanted = minimize(loss, np.zeros(5), (labels,), tol=1e-12).x
        assert mine.numpy() == pytest.approx(wanted, abs=1e-4)
    assert logistic(x, torch.ones(1, 20).double(), ridge)[0, :-1].abs().max() < 1e-6


def test_probes_on_planted_features():
    """A feature of the label is found, shuffled labels are not; one of the object's is not held out."""
    draw = np.random.default_rng(0)
    labels, objects = np.arange(60) % 3, np.arange(60) % 6
    folds = draw.permutation(60) % 5
    x = torch.from_numpy(draw.normal(size=(60, 20)))
    shuffled = [draw.permutation(labels) for _ in range(5)]
    assert probes._right(x, [labels, *shuffled], folds, 1.0).mean(1).max() < 0.6
    label, thing = x.clone(), x.clone()
    for n in range(60):
        label[n, labels[n]] += 30
        thing[n, 10 + objects[n]] += 30  # a label follows from its object, one by one
    right = probes._right(label, [labels, *shuffled], folds, 1.0)
    assert right[0].mean() > 0.85 and right[1:].mean(1).max() < 0.6
    assert probes._right(thing, [labels], folds, 1.0).mean() > 0.95
    assert probes._right(thing, [labels], objects, 1.0).mean() < 0.6, "not on objects that were never seen"
    assert probes._right(label, [labels], objects, 1.0).mean() > 0.95


def test_nothing_of_the_tested_examples_is_fitted():
    """What stands in the fold that is tested changes no answer about the other examples of that fold."""
    draw = np.random.default_rng(1)
    x, labels, folds = torch.from_numpy(draw.normal(size=(20, 6))), np.arange(20) % 2, np.arange(20) // 4
    before = probes._right(x, [labels], folds, 1.0)[0]
    x[3] = 100.0
    after = probes._right(x, [labels], folds, 1.0)[0]
    assert (before[:3] == after[:3]).all()


@pytest.mark.parametrize("corrupt", ["image", None])
def test_each_probe_stands_beside_its_patch(corrupt, tmp_path):
    """The noun, which the prompt says, is read off its stream; effects are those of a sweep."""
    model, sites = llava(), ["decoder.0-1.resid_pre@noun", "vision.1.resid@image"]
    found = probe(model, several(), sites, "noun", held_out="half", corrupt=corrupt, shuffles=9)
    table = found.table.set_index("site")
    assert table.loc["decoder.0.resid_pre@noun", "accuracy"] == 1.0
    assert table.loc["decoder.0.resid_pre@noun", "held_out"] == 1.0
    assert table.loc["vision.1.resid@image", "accuracy"] < 1.0, "the picture does not say it"
    assert (table["chance"] == 0.5).all() and (table["shuffled"] < 0.8).all()
    assert table.loc["decoder.0.resid_pre@noun", "p_value"] == pytest.approx(0.1, abs=0.101)
    swept = sweep(model, several(), sites, corrupt, patch="clean" if corrupt else "mean")
    for site, rows in swept.groupby("site"):
        assert table.loc[site, "effect"] == pytest.approx(rows["ld_change"].mean(), rel=1e-9)
    row = table.loc["decoder.1.resid_pre@noun"]
    assert row["effect_low"] < row["effect"] < row["effect_high"]
    found.save(tmp_path)
    again = vlmscope.open(tmp_path)
    pd.testing.assert_frame_equal(again.table, found.table, check_dtype=False)
    assert again.about == dict(found.about)
    page = write_report([tmp_path], tmp_path / "page.html").read_text("utf-8")
    assert "Probes of noun" in page and "circle 6, square 6" in page


def test_one_value_against_all_others():
    found = probe(llava(), several(), "decoder.1.resid@text", "noun=circle", shuffles=2)
    assert found.about["values"] == {"circle": 6, "not circle": 6}
    assert found.table["held_out"].isna().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("decoder.0.resid@text", "shape"), "no example has a 'shape'; expected one of answer, foil, shows"),
        (("decoder.0.resid@text", "answer"), "too few examples: 1 values of 'answer' have 4 .*red: 12"),
        (("decoder.0.resid@text", "shows"), "name one of them, such as shows=dog"),
        (("decoder.0.attn.h0@text", "noun"), "a direction and a probe are of a whole kind in one layer"),
        (("decoder.0.resid@text*", "noun"), "expected one position, or a name for several that are averaged"),
    ],
)
def test_probes_that_are_none(arguments, words):
    with pytest.raises((DataError, SiteError), match=words):
        probe(llava(), several(), *arguments)
    with pytest.raises(DataError, match="all examples have the same 'foil', 'blue'"):
        probe(llava(), several(), "decoder.0.resid@text", "noun", held_out="foil")

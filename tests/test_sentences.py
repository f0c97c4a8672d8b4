"""Sentences of the report, against the rows of tables that they stand for."""

from __future__ import annotations

import html
import re

import pandas as pd
import pytest
import torch
from PIL import Image

from vlmscope.neurons.results import Described
from vlmscope.report import write_report
from vlmscope.report.words import short_number
from vlmscope.stored import formats
from vlmscope.studies.steering import Steered
from vlmscope.studies.steering.direction import Direction

SITES = [f"decoder.{layer}.resid@readout" for layer in range(3)]
COUNTS = dict.fromkeys(("built with", "built without", "with", "without"), 24)


def words_of(result, folder) -> str:
    """What the report says, without its markup."""
    result.save(folder)
    page = write_report(folder, folder.with_suffix(".html")).read_text("utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def described(*lost) -> Described:
    """Cards of one neuron, and for each word the share of captions that lose it, its null and its q."""
    columns = "word value null q_value".split()
    measures = pd.DataFrame(lost, columns=columns).assign(measure="lost, zero", n=10, p_value=0.01)
    rows = dict.fromkeys(("ci_low", "ci_high", "null_95"), 0.0)
    order = "word method measure value ci_low ci_high null null_95 p_value n q_value".split()
    return Described(
        {"model": "toy", "words": [word for word, *_ in lost]},
        pd.DataFrame([[1, 7, "", "red", "0.5"]], columns="layer neuron word tokens weights".split()),
        pd.DataFrame(
            [["e", "L1.N7", n, 0, n, False] for n in range(2)],
            columns="example neuron row column activation mask".split(),
        ).astype({"activation": float}),
        pd.DataFrame([[1, 7, 1, "e", 0.5]], columns="layer neuron rank example peak".split()),
        measures.assign(method="contribution", **rows)[order],
        pd.DataFrame(columns=["word", "measure", "why"]),
        {"e": Image.new("RGB", (8, 8))},
    )


def test_neurons_carry_the_words_that_more_captions_lose_than_without_random_ones(tmp_path):
    """Neither what is not sure (q), nor what fewer captions lose than by chance, however surely."""
    rows = [
        ("red", 0.6, 0.1, 0.05),
        ("blue", 0.6, 0.1, 0.06),
        ("star", 0.1, 0.6, 0.01),
        ("ring", 0.4, 0.0, 0.02),
    ]
    said = words_of(described(*rows), tmp_path / "a")
    assert "lose red in 6 of 10 (without random ones in 10.0%, p = 0.01), blue in 6 of 10" in said
    assert "At a false discovery rate of 5 % neurons carry red, ring." in said
    said = words_of(described(*rows[1:3]), tmp_path / "b")
    assert "That shows of no word that its neurons carry it." in said and "At a false" not in said


def steered(layers) -> Steered:
    """A direction with these rows of (site, strength, effect, chosen)."""
    table = pd.DataFrame(layers, columns=["site", "strength", "effect", "chosen"])
    table = table.assign(tower="decoder", layer=table.index % 3, kind="resid", position="readout", n=24)
    table["low"], table["high"], table["null"] = table["effect"] - 0.25, table["effect"] + 0.5, 0.125
    table = table.assign(null_low=-1.0, null_high=1.0, p_value=0.01, q_value=0.01, works=True)
    order = (
        "site tower layer kind position strength n effect low high null null_low null_high p_value chosen "
        "q_value works"
    )
    measure = {"strength": 1.0, "site": SITES[0], "measure": "kl", "set": "others", "value": 0.5}
    captions = "strength set example prompt before after random changed".split()
    about = {
        "format": formats.STEER.name,
        "model": "toy",
        "weights": "w",
        "sets": "a against b",
        "word": "red",
    }
    about |= {"data": "a", "others": "other examples", "counts": COUNTS, "gap": 1.0, "strengths": [1.0]}
    about |= {"keep_norm": False, "at": "read", "random": 10, "seed": 0}
    return Steered(
        Direction({SITES[0]: torch.ones(2)}, "w", SITES[0], {}),
        table[order.split()],
        pd.DataFrame([measure | {"low": None, "high": None, "null": 0.25, "n": 24}]),
        pd.DataFrame([[1.0, "others", "e", "what?", "red", "red", "red", False]], columns=captions),
        about,
    )


@pytest.mark.parametrize("chosen", [0, 2])
def test_a_direction_is_reported_at_the_site_that_the_other_half_chose(tmp_path, chosen):
    """And not where its effect on the reported half is largest."""
    effects = (2.0, 3.0, 1.0)
    rows = [(SITES[n], 1.0, effects[n], n == chosen) for n in range(3)]
    said = words_of(steered(rows), tmp_path / "a")
    value, low, high = (short_number(effects[chosen] + more) for more in (0, -0.25, 0.5))
    assert (
        f"At {SITES[chosen]}, which was chosen on the examples that built the direction, it changes "
        f"log P(red) by {value} (95 % interval {low} to {high}) with strength 1; random "
        "directions as long by +0.125. Means over 24 examples. None of these examples built the direction."
    ) in said
    strong = [(SITES[n], 4.0, 4 * effects[n], n == 0) for n in range(3)]
    said = words_of(steered([*rows, *strong]), tmp_path / "b")
    assert f"At {SITES[0]}, which was chosen" in said
    assert (
        "by +8.00 (95 % interval +7.75 to +8.50) with strength 4, the best of 2 by these examples; " in said
    )

"""What heads are called, by rules over their measures; parts of effects are plain patches."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import blip, example, llava, picture
from planted import OF_TEXT, planted, planted_examples

from vlmscope.models.inputs import Edit
from vlmscope.patching.scores import logit_difference
from vlmscope.studies import heads
from vlmscope.studies.heads.labels import label

pytestmark = pytest.mark.filterwarnings("ignore:the fewest examples of a head:UserWarning")
GAP = 10.0


def measured(**given):
    """Rows of measures: (value, null, q), with an interval of half the value around it."""
    found = {}
    for name, (value, null, q) in given.items():
        half = abs(value) / 4
        found[name] = SimpleNamespace(
            measure=name, value=value, null=null, q_value=q, low=value - half, high=value + half, n=20
        )
    return found


ACTS = {"effect": (2.0, 0.1, 0.001), "mean": (-1.0, 0.1, 0.001)}
IDLE = {"effect": (0.01, 0.1, 1.0), "mean": (0.01, 0.1, 1.0)}
SEEN = {"on_image": (1.0, 1.0, np.nan), "from_image": (2.0, 1.0, 0.001)}
ON = {"auc": (0.9, 0.5, 0.001)}
READ = {"on_image": (0.0, 0.0, np.nan), "on_others": (0.9, 0.7, 0.001), "from_others": (1.8, 1.0, 0.01)}


@pytest.mark.parametrize(
    ("given", "name", "by"),
    [
        (ACTS | SEEN | ON, "detection", "auc"),
        (ACTS | SEEN | {"auc": (0.4, 0.5, 0.9), "pointing": (1.0, 0.1, 0.001)}, "detection", "pointing"),
        (ACTS | SEEN | {"auc": (0.9, 0.5, 0.03)}, "unclear", ""),  # not at a third of the level
        (ACTS | SEEN | {"auc": (0.55, 0.5, 0.001)}, "unclear", ""),  # surely, but hardly
        (ACTS | ON | {"from_image": (0.5, 1.0, 0.001)}, "unclear", ""),  # it acts by something else
        (
            {"effect": (-2.0, 0.1, 0.001), "mean": (1.0, 0.1, 0.001)}
            | ON
            | {"from_image": (-2.0, -1.0, 0.001)},
            "suppression",
            "auc",
        ),
        (
            {"effect": (-2.0, 0.1, 0.001), "mean": (-1.0, 0.1, 0.001)}
            | ON
            | {"from_image": (-2.0, -1.0, 0.001)},
            "unclear",
            "",
        ),  # with it and without it the answer is rarer
        (ACTS | SEEN | {"mass_foil": (0.9, 0.2, 0.001)}, "suppression", "mass_foil"),  # of the foil
        (ACTS | READ | {"switch": (0.4, 0.0, 0.001)}, "option selector", "switch"),
        (ACTS | READ | {"switch": (0.05, 0.0, 0.001)}, "aggregate reader", "from_others"),
        (ACTS | READ | {"copies": (0.9, 0.1, 0.001)}, "mover", "copies"),
        (ACTS | READ | {"copies": (-0.9, -0.1, 0.001)}, "negative mover", "copies"),
        (ACTS | READ | {"on_others": (0.4, 0.7, 0.001), "direct": (0.1, 0.4, 0.001)}, "relay", "direct"),
        (ACTS | READ | {"on_others": (0.4, 0.7, 0.001), "direct": (1.9, 0.4, 0.001)}, "unclear", ""),
        (ACTS | READ | {"on_others": (0.4, 0.7, 0.001), "direct": (-3.0, 0.4, 0.001)}, "unclear", ""),
        (ACTS | READ | {"switch": (0.4, 0.0, 0.001), "from_image": (1.5, 1.0, 0.12)}, "unclear", ""),
        (
            ACTS | READ | {"switch": (0.4, 0.0, 0.001), "from_image": (0.5, 1.0, 0.01)},
            "option selector",
            "switch",
        ),
        (IDLE | {"outlier_mass": (0.9, 0.2, 0.001)}, "outlier suppression", "outlier_mass"),
        (IDLE | {"outlier_mass": (0.9, 0.9, 0.8)}, "none", "effect"),  # as all heads
        (IDLE | {"on_first": (0.9, 0.1, 0.001)}, "sink", "on_first"),
        (IDLE | ON, "none", "effect"),  # looks, and writes nothing
        (ACTS | {"outlier_mass": (0.9, 0.2, 0.001)}, "unclear", ""),  # an effect excludes outliers
        ({"effect": (2.0, 0.1, 0.2), "mean": (-1.0, 0.1, 0.2)}, "unclear", ""),  # large, not surely
    ],
)
def test_rules(given, name, by):
    found = label(measured(**given), GAP, None)
    assert (found.label, found.measure) == (name, by)
    if by:
        value, null, q = given[by]
        looks = 3 if by.startswith(("auc", "pointing", "mass")) else 1
        assert (found.value, found.null, found.q_value) == pytest.approx(
            (value, null, looks * q), nan_ok=True
        )
        assert f"q {found.q_value:.2g}" in found.evidence


def test_a_model_at_chance_has_no_functions():
    found = label(measured(**ACTS, **SEEN, **ON), GAP, "LD is above 0 in 10 of 20 clean runs")
    assert found.label == "unclear" and found.evidence.startswith("the model does not know the task: LD is")
    turned = [replace(e, answer=e.foil, foil=e.answer) for e in planted_examples(12)]
    for given in (planted_examples(12)[:6] + turned[6:], turned):
        table = heads.functions(planted(), given, "encoder.0.cross.h*@all")
        assert set(table.functions["label"]) == {"unclear"} and "no more than chance" in table.about["doubt"]


def test_heads_that_read_words_are_labelled():
    table = heads.functions(planted(options=True), planted_examples(14), "decoder.0.cross.h*@readout")
    assert dict(zip(table.functions["head"], table.functions["label"], strict=True)) == OF_TEXT
    value = table.measures.pivot_table(index="head", columns="measure", values="value")
    assert value.loc[1, "switch"] > 0.9 and abs(value.loc[2, "switch"]) < 1e-6
    assert value.loc[2, "by_values"] == pytest.approx(value.loc[2, "effect"], rel=1e-5)
    assert value.loc[1, "by_keys"] == pytest.approx(value.loc[1, "by_attention"], rel=1e-5)
    assert value.loc[1, "by_queries"] == pytest.approx(0.0, abs=1e-5)
    assert (value["on_image"] == 0.0).all()


def test_a_head_that_reads_all_words_is_an_aggregate_reader():
    table = heads.functions(planted(), planted_examples(14), "decoder.0.cross.h[0]@readout")
    (row,) = table.functions.to_dict("records")
    assert row["label"] == "aggregate reader" and row["measure"] == "from_others"
    assert (
        row["value"] > row["null"] and row["q_value"] < 0.01 and "from other words alone" in row["evidence"]
    )


def values_of(model, site, examples):
    table = heads.functions(model, examples, site, "image").measures
    return table.set_index("measure")["value"]


def corrupted(model, examples, sites):
    """The mean change of the corrupt run's LD when the sites have the clean run's values (or the corrupt)."""
    found = []
    for one in examples:
        pair = model.prepare(replace(one, corrupt_prompt=None))
        edits = []
        for site, run in sites:
            values = model.capture(pair.clean if run == "clean" else pair.corrupt, [site])
            edits += [Edit(site, "set", value) for value in values.values()]
        run = logit_difference(model.run(pair.corrupt, edits), pair)
        found.append(run - logit_difference(model.run(pair.corrupt), pair))
    return pytest.approx(np.mean(found), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("make", "tower"),
    [(blip, "encoder"), (lambda: llava(kv_heads=4), "decoder")],
    ids=["cross-attention", "one decoder"],
)
def test_parts_of_an_effect_are_patches_of_queries_keys_values_and_patterns(make, tower):
    model = make()
    examples = [example(id=f"e{n}", clean_image=picture(n), corrupt_image=picture(50 + n)) for n in range(2)]
    site = f"{tower}.1.attn.{{}}1@all"
    found = values_of(model, site.format("h"), examples)
    parts = {"by_queries": "q", "by_keys": "k", "by_values": "v", "by_attention": "p", "effect": "h"}
    for name, part in parts.items():
        assert found[name] == corrupted(model, examples, [(site.format(part), "clean")]), name
    assert abs(found["by_values"]) > 1e-6 and abs(found["by_queries"]) > 1e-9


def test_heads_that_share_keys_and_values_are_split_alone():
    """The part of one head of a group: patching what both read, with the other's output held."""
    model = llava(layers=2, kv_heads=2)
    examples = [example(id=f"e{n}", clean_image=picture(n), corrupt_image=picture(50 + n)) for n in range(2)]
    found = values_of(model, "decoder.1.attn.h2@last", examples)
    sites = [("decoder.1.attn.v1@all", "clean"), ("decoder.1.attn.h3@all", "corrupt")]
    assert found["by_values"] == corrupted(model, examples, sites)
    sites[0] = ("decoder.1.attn.k1@all", "clean")
    assert found["by_keys"] == corrupted(model, examples, sites)


@pytest.mark.parametrize(("make", "kind"), [(blip, "cross"), (llava, "attn")])
def test_the_direct_effect_holds_all_that_comes_behind(make, kind):
    model = make()
    examples = [example(id=f"e{n}", clean_image=picture(n), corrupt_image=picture(50 + n)) for n in range(2)]
    found = values_of(model, f"decoder.0.{kind}.h1@readout", examples)
    kinds = [k for k in ("attn", "cross", "mlp") if k in model.shapes["decoder"].kinds]
    behind = [f"decoder.0.{k}@readout" for k in kinds[kinds.index(kind) + 1 :]]
    behind += [f"decoder.{n}.{k}@readout" for n in range(1, model.shapes["decoder"].layers) for k in kinds]
    sites = [(f"decoder.0.{kind}.h1@readout", "clean"), *((site, "corrupt") for site in behind)]
    assert found["direct"] == corrupted(model, examples, sites)
    assert found["direct"] != pytest.approx(found["effect"], rel=1e-3)


def test_what_is_read_is_the_attention_by_the_words():
    model = blip()
    examples = [example(id=f"e{n}", clean_image=picture(n), corrupt_image=picture(50 + n)) for n in range(2)]
    found = values_of(model, "decoder.1.cross.h1@readout", examples)
    paid = []
    for one in examples:
        pair = model.prepare(replace(one, corrupt_prompt=None))
        runs = (pair.clean, pair.corrupt)
        roles = pair.clean.layout["encoder"].roles
        rows = [model.attention(inputs, "decoder", "cross", "last")[1, 1, 0] for inputs in runs]
        answer, foil = (torch.stack(rows)[:, list(roles[role])].sum(1) for role in ("answer", "foil"))
        paid.append([(answer + foil)[0], ((answer - foil)[0] - (answer - foil)[1]) / 2, rows[0][0]])
    options, switch, first = np.mean(np.array(paid, float), axis=0)
    assert found["on_options"] == pytest.approx(options, rel=1e-5)
    assert found["on_others"] == pytest.approx(1 - options, rel=1e-5)
    assert found["switch"] == pytest.approx(switch, rel=1e-4, abs=1e-9)
    assert found["on_first"] == pytest.approx(first, rel=1e-5)


def test_what_is_not_measured_has_no_row():
    examples = [example(id=f"e{n}", clean_image=picture(n)) for n in range(2)]
    table = heads.functions(blip(), examples, "decoder.1.cross.h1@readout", "text").measures
    assert "by_values" in set(table["measure"]) and "switch" not in set(table["measure"])
    table = heads.functions(blip(), examples, "decoder.1.cross.h1@readout", None).measures
    assert not table["measure"].str.match("by_|from_|direct|copies|effect").any()

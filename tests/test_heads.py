"""Planted functions are found, shuffled masks find none, and knock-outs are what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from models import blip, example, llava, picture, sweep_to
from PIL import Image
from planted import TRUTH, planted, planted_examples

import vlmscope
from vlmscope.errors import DataError, ExampleError, SiteError, StoreError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.patching import engine
from vlmscope.runs.corrupt import Noise
from vlmscope.sites import Pattern
from vlmscope.stats import shuffled
from vlmscope.studies import heads
from vlmscope.studies.run_folder import read_run

SITES = "encoder.0.cross.h*@all"
pytestmark = pytest.mark.filterwarnings("ignore:the fewest examples of a head:UserWarning")


@pytest.fixture(scope="module")
def found():
    return heads.functions(planted(), planted_examples(60), SITES)


def test_the_planted_model_answers_what_it_sees():
    model = planted()
    for one in planted_examples(10):
        pair = model.prepare(one)
        for inputs, word in ((pair.clean, one.answer), (pair.corrupt, one.foil)):
            token = int(model.run(inputs).argmax())
            assert model.processor.tokenizer.decode([token]) == word


def test_planted_functions_are_labelled(found):
    labels = dict(zip(found.functions["head"], found.functions["label"], strict=True))
    assert labels == TRUTH, found.functions["evidence"].tolist()


def test_the_numbers_beside_the_labels(found):
    value = found.measures.pivot_table(index="head", columns="measure", values="value")
    assert value.loc[0, "auc"] > 0.95 and value.loc[1, "auc"] > 0.95
    assert value.loc[0, "iou_fixed"] > 0.9
    assert value.loc[2, "outlier_mass"] > 0.9 and value.loc[2, "norm_rank"] > 0.9
    assert value.loc[0, "mean"] < 0 < value.loc[1, "mean"]
    assert value.loc[3, ["zero", "mean", "resample", "effect"]].abs().max() == 0.0
    auc = found.measures.query("head == 0 and measure == 'auc'").iloc[0]
    assert auc["value"] == 1.0 and np.isnan(auc["low"]), "the same in all examples, so there is no interval"
    assert abs(auc["null"] - 0.5) < 0.1
    assert auc["q_value"] < 0.01


def test_shuffled_masks_label_nothing():
    examples = planted_examples(40)
    strange = planted_examples(40, seed=1)
    moved = [replace(e, masks=s.masks) for e, s in zip(examples, strange, strict=True)]
    table = heads.functions(planted(), moved, SITES)
    labels = table.functions.set_index("head")["label"]
    assert not set(labels) & {"detection", "suppression"}
    assert table.measures.query("measure == 'auc'")["q_value"].min() > 0.05


def test_a_box_says_the_same_as_its_mask():
    given = planted_examples(12)
    boxed = [replace(e, masks={"object": tuple(map(float, e.masks["object"].getbbox()))}) for e in given]
    by_mask, by_box = (heads.functions(planted(), some, SITES).measures for some in (given, boxed))
    assert by_box.equals(by_mask)


def test_the_foils_object_counts_too():
    """A head that looks at the foil's object and, knocked out, makes the foil likelier."""
    examples = [replace(e, masks={"foil": e.masks["object"]}) for e in planted_examples(30)]
    table = heads.functions(planted(), examples, SITES)
    labels = table.functions.set_index("head")["label"]
    assert labels[0] == "suppression" and labels[1] == "unclear"


def test_without_masks_only_what_needs_none_is_said():
    examples = [replace(e, masks={}) for e in planted_examples(30)]
    labels = heads.functions(planted(), examples, SITES).functions.set_index("head")["label"]
    assert labels.to_dict() == {0: "unclear", 1: "unclear", 2: "outlier suppression", 3: "none"}


def test_knock_outs_are_plain_runs_with_one_edit():
    """Against `run` with the edit written out, by zero, by the mean and by another example's value."""
    model = blip(layers=2, heads=2)
    examples = [example(id=f"e{n}", clean_image=picture(n), corrupt_image=picture(50 + n)) for n in range(5)]
    site = Pattern.parse("encoder.1.cross.h1@answer")
    table = heads.functions(model, examples, str(site), "image").measures.set_index("measure")["value"]
    pairs = [model.prepare(replace(one, corrupt_prompt=None)) for one in examples]
    outputs = [model.capture(pair.clean, [site])[str(site)] for pair in pairs]

    def ld(pair, inputs, *values):
        logits = model.run(inputs, [Edit(site, "set", value) for value in values])
        return float(logits[pair.answer] - logits[pair.foil])

    def without(values):
        changes = [ld(p, p.clean, value) - ld(p, p.clean) for p, value in zip(pairs, values, strict=True)]
        return pytest.approx(np.mean(changes), rel=1e-9)

    mean = torch.stack(outputs).mean(0)
    assert table["zero"] == without([0.0] * 5)
    assert table["mean"] == without([mean] * 5)
    # Each example is given the output of the one that stands a fixed number of places behind it.
    order = shuffled(0, [one.id for one in examples])
    turned = []
    for step in range(1, 5):
        given = dict(zip(order, order[step:] + order[:step], strict=True))
        turned.append(without([outputs[given[n]] for n in range(5)]))
    assert sum(table["resample"] == change for change in turned) == 1
    patched = [ld(p, p.corrupt, v) - ld(p, p.corrupt) for p, v in zip(pairs, outputs, strict=True)]
    assert table["effect"] == pytest.approx(np.mean(patched), rel=1e-9)


def test_effects_that_a_run_has_are_not_computed_again(tmp_path, monkeypatch):
    """From the run or its table, at the same places: the same numbers, and the engine patches nothing."""
    model = blip(layers=2, heads=2)
    examples = [example(id=f"e{n}", clean_image=picture(n), corrupt_image=picture(50 + n)) for n in range(4)]
    sites = ["encoder.*.cross.h*@answer", "decoder.1.cross.h0@last"]
    swept = ["encoder.*.cross.h*@*", "encoder.*/3.cross.h*@*", "decoder.*.cross.h*@readout"]
    run = sweep_to(tmp_path / "run", model, examples, swept)
    wanted = heads.functions(model, examples, sites)
    patched = []
    honest = engine.patch

    def counted(*args, values=None, **kwargs):
        if values is None:  # no knock-out
            patched.append(args)
        return honest(*args, values=values, **kwargs)

    monkeypatch.setattr(engine, "patch", counted)
    for effects in (run, str(run.path), run.effects()):
        found = heads.functions(model, examples, sites, effects=effects)
        pd.testing.assert_frame_equal(found.measures, wanted.measures, rtol=1e-9, atol=1e-12)
        assert found.functions["gap"].tolist() == pytest.approx(wanted.functions["gap"].tolist())
    assert not patched
    heads.functions(model, [*examples, replace(examples[0], id="new")], sites, effects=run)
    assert len(patched) == 1, "an example that the run does not have is patched"


def test_effects_are_means_over_the_draws_of_noise(tmp_path):
    model, noise = blip(layers=2, heads=2), Noise(draws=3)
    examples = [example(id=f"e{n}", clean_image=picture(n), corrupt_image=None) for n in range(4)]
    rows = sweep_to(tmp_path / "run", model, examples, "encoder.*.cross.h*@answer", noise).effects()
    found = heads.functions(model, examples, "encoder.*.cross.h*@answer", noise).measures
    found = found[found["measure"] == "effect"].set_index("site")["value"]
    assert found.to_dict() == pytest.approx(rows.groupby("site")["logit_diff"].mean().to_dict(), rel=1e-9)
    assert found.abs().min() > 0


def test_effects_of_another_run_are_refused(tmp_path):
    examples = [example(id=f"e{n}", clean_image=picture(n)) for n in range(2)]
    site = "encoder.1.cross.h1@answer"
    run = sweep_to(tmp_path / "run", blip(), examples, site)
    with pytest.raises(VlmscopeError, match=r"not those of these heads \(weights differ\)"):
        heads.functions(blip(seed=1), examples, site, effects=run)
    with pytest.raises(VlmscopeError, match="the corruption 'image' are not those of 'text'"):
        heads.functions(blip(), examples, site, "text", effects=run.effects())
    added = sweep_to(tmp_path / "added", blip(), examples, site, Noise("add"))
    with pytest.raises(VlmscopeError, match=r"not those of these heads \(corrupt differ\)"):
        heads.functions(blip(), examples, site, Noise("multiply"), effects=added)
    back = sweep_to(tmp_path / "back", blip(), examples, site, direction="noise")
    with pytest.raises(VlmscopeError, match=r"\(direction differ\); give a run of this model"):
        heads.functions(blip(), examples, site, effects=back)


def test_heads_knocked_out_together(found):
    table = found.together
    assert table["set"].value_counts().to_dict() == {"none": 1, "these heads": 2}, (
        "there are no other heads to draw"
    )
    assert table.loc[table["set"] == "none", "accuracy"].item() == 1.0
    assert table.loc[table["set"] == "these heads", "accuracy"].max() < 0.8


def test_random_heads_are_of_the_same_layers_or_there_are_none():
    model = blip(layers=3, heads=4)
    examples = [example(id=f"e{n}", clean_image=picture(n)) for n in range(2)]

    def drawn(sites):
        table = heads.functions(model, examples, sites, None).together
        return [text.split() for text in table.loc[table["set"] == "random heads", "heads"]]

    chosen = ["encoder.1.cross.h0@answer", "encoder.1.cross.h2@answer", "decoder.2.cross.h1@last"]
    sets = drawn(chosen)
    assert len(sets) == 10 and len({*map(tuple, sets)}) > 3
    for names in sets:
        assert len(set(names)) == 3 and not set(names) & set(chosen)
        layers = sorted(name.split(".h")[0] for name in names)
        assert layers == ["decoder.2.cross", "encoder.1.cross", "encoder.1.cross"]
    assert not drawn(["encoder.1.cross.h0@answer", *(f"encoder.2.cross.h{n}@answer" for n in range(3))]), (
        "layer 2 has one other head where three are wanted"
    )


def test_heads_are_measured_on_the_examples_that_are_held_out():
    """As if the others had not been given; a head without any is left out, and said."""
    examples = planted_examples(12)
    site, other, chosen_by_all = (f"encoder.0.cross.h{n}@all" for n in range(3))
    ids = [one.id for one in examples]
    held_out = {site: ids[:6], other: ids}
    with pytest.warns(UserWarning, match="1 of 3 heads have fewer than two held-out examples .*h2@all"):
        table = heads.functions(planted(), examples, [site, other, chosen_by_all], held_out=held_out)
    assert dict(zip(table.functions["site"], table.functions["n"], strict=True)) == {site: 6, other: 12}
    numbers = ["measure", "value", "low", "high", "n"]
    for name, some in ((site, examples[:6]), (other, examples)):
        alone = heads.functions(planted(), some, name).measures[numbers]
        mine = table.measures.query("site == @name")[numbers].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, alone, rtol=1e-9)
    (none,) = table.together.query("set == 'none'").to_dict("records")
    assert none["n"] == 12
    with pytest.raises(DataError, match="so what they do is not measured"):
        heads.functions(planted(), examples, site, held_out={})


def test_every_draw_has_its_own_seed():
    """What is measured beside it, and the order of the examples, change no number of a measure."""
    keys, examples = ["site", "measure"], planted_examples(10)
    numbers = ["value", "low", "high", "null", "p_value", "n"]

    def rows(examples, sites=SITES, corrupt="image"):
        table = heads.functions(planted(), examples, sites, corrupt)
        return table.measures.set_index(keys)[numbers], table.together

    whole, known = rows(examples)
    turned, together = rows(examples[::-1])
    pd.testing.assert_frame_equal(turned, whole, check_exact=True)
    pd.testing.assert_frame_equal(together, known, check_exact=True)
    on_masks = whole.index.get_level_values("measure").isin([*heads.ON_MASKS, "outlier_mass"])
    without, _ = rows([replace(e, masks={}) for e in examples])
    without = without.drop("outlier_mass", level="measure")  # which needs to know where the object is
    pd.testing.assert_frame_equal(without, whole[~on_masks], check_exact=True)
    unpatched, _ = rows(examples, corrupt=None)
    effects = whole.index.get_level_values("measure").str.match("effect|by_|from_|direct|switch|copies")
    same = ["value", "low", "high", "n"]  # there is no gap to hold changes against
    pd.testing.assert_frame_equal(unpatched[same], whole.loc[~effects, same], check_exact=True)
    fewer, _ = rows(examples, ["encoder.0.cross.h0@all", "encoder.0.cross.h2@all"])
    # Fewer heads are fewer rows in a batch, which some machines round otherwise; other draws move far more.
    pd.testing.assert_frame_equal(fewer, whole.loc[fewer.index], rtol=1e-5, atol=1e-6)


def test_the_tables_are_written(tmp_path):
    model, examples = planted(), planted_examples(6)
    table = heads.write(tmp_path / "heads", model, examples, SITES, data="planted")
    names = {p.name for p in (tmp_path / "heads").iterdir()}
    assert names == {"functions.csv", "heads.json", "maps.parquet", "measures.csv", "patches", "together.csv"}
    assert len(table.functions) == 4
    found = vlmscope.open(tmp_path / "heads")
    assert found.about == table.about
    for name in ("functions", "measures", "together", "maps"):
        pd.testing.assert_frame_equal(
            getattr(found, name), getattr(table, name), check_dtype=False, rtol=1e-12, atol=1e-300
        )


def test_the_tables_of_another_call_are_neither_replaced_nor_lost(tmp_path, monkeypatch):
    model, examples, folder = planted(), planted_examples(6), tmp_path / "heads"
    heads.write(folder, model, examples[:4], SITES, data="planted")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "measures.csv").write_text("mine")
    there = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(heads, "functions", None)
    for given, more in ((examples[2:], {}), (examples[:4], {"seed": 1}), (examples[:4], {"corrupt": "text"})):
        with pytest.raises(StoreError, match=r"by another call \(.+ differ\); choose another --out"):
            heads.write(folder, model, given, SITES, data="planted", **more)
    with pytest.raises(StoreError, match=r"measures\.csv: is there, and no result of this command"):
        heads.write(tmp_path / "used", model, examples, SITES)
    (tmp_path / "other" / "patches" / "mine").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"patches: not empty, and not a run folder"):
        heads.write(tmp_path / "other", model, examples, SITES)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == there


@pytest.mark.parametrize(
    ("name", "head", "patched"),
    [
        ("mllama", "decoder.1.cross.h0@last", "vision.1.output"),
        ("llava-siglip", "decoder.0.attn.h0@last", "decoder.0.resid_pre"),
        ("blip2-opt", "qformer.0.cross.h0@0", None),  # queries are no patches
    ],
)
def test_patches_are_patched_where_the_language_model_reads_them(tmp_path, name, head, patched):
    given = [
        example(id=f"e{n}", clean_image=picture(n), corrupt_prompt=None, masks={"object": (0, 0, 6, 6)})
        for n in range(3, 5)
    ]
    heads.write(tmp_path / "heads", FAMILIES[name](), given, head)
    if patched is None:
        assert not (tmp_path / "heads" / "patches").exists()
        return
    run = read_run(tmp_path / "heads" / "patches")
    sites = {site.partition("@")[0] for site in run.effects()["site"]}
    assert sites == {patched}


def test_patches_of_the_part_that_the_model_sees():
    """LLaVA 1.5 cuts out the middle of a wide picture: what is left of it is not covered by patches."""
    mask = Image.new("L", (40, 20))
    mask.paste(255, (10, 0, 20, 10))
    wide = example(clean_image=Image.new("RGB", (40, 20)), masks={"object": mask})
    model = llava()
    model.processor.image_processor.size = {"shortest_edge": 12}
    model.processor.image_processor.do_center_crop = True
    view = model.view(wide.clean_image)
    assert view == (10, 0, 30, 20)
    assert heads.covered(wide, "object", (2, 2), view).tolist() == [[True, False], [False, False]]
    assert model.cropped(mask).size == (20, 20)
    left = Image.new("RGB", (40, 20), "blue")
    left.paste("red", (0, 0, 5, 20))  # resizing blurs what is close
    prompt = "is this circle red or blue ?"
    same = [
        model.inputs(x, prompt).tensors["pixel_values"] for x in (left, Image.new("RGB", (40, 20), "blue"))
    ]
    torch.testing.assert_close(*same)
    model.processor.image_processor.do_pad = True  # as LLaVA's own processor: to a square, around it
    assert model.view(wide.clean_image) == (0, -10, 40, 30)


def test_covered_patches():
    mask = Image.new("L", (40, 20))
    mask.paste(255, (0, 0, 20, 12))
    one = example(clean_image=Image.new("RGB", (40, 20)), masks={"object": mask})
    assert heads.covered(one, "object", (2, 4)).tolist() == [
        [True, True, False, False],
        [False, False, False, False],
    ]
    small = example(clean_image=Image.new("RGB", (40, 20)), masks={"object": (0, 0, 2, 2)})
    assert heads.covered(small, "object", (2, 4)).sum() == 1
    with pytest.raises(ExampleError, match="the mask of 'object' is empty"):
        heads.covered(example(masks={"object": Image.new("L", (12, 12))}), "object", (2, 2))
    with pytest.raises(ExampleError, match="the mask of 'object' is 9x9, its picture 12x12"):
        heads.covered(example(masks={"object": Image.new("L", (9, 9), 255)}), "object", (2, 2))


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("encoder.*.resid@answer", "not a head"),
        ("encoder.*.cross.h*@*", "many positions"),
        (["encoder.0.cross.h0@answer", "encoder.0.cross.h1@last"], "one position a kind"),
        ("encoder.0/3.cross.h0@answer", "a window of layers"),
    ],
)
def test_sites_that_are_no_heads(sites, message):
    with pytest.raises(SiteError, match=message):
        heads.functions(planted(), planted_examples(2), sites)


def test_too_few_examples():
    with pytest.raises(DataError, match="takes at least two"):
        heads.functions(planted(), planted_examples(1), SITES)


def test_the_maps_are_the_attention_and_its_difference_to_the_mean_of_all_heads():
    maps = heads.functions(planted(), planted_examples(2), SITES).maps
    assert len(maps) == 2 * 4 * 36
    total = maps.groupby(["example", "site"])["attention"].sum()
    assert (total <= 1 + 1e-9).all() and np.allclose(
        total.xs("encoder.0.cross.h0@all", level=1), 1, atol=0.05
    )
    mean = maps.groupby(["example", "row", "column"])["difference"].mean()
    assert np.allclose(mean, 0, atol=1e-12)

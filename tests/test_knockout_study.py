"""Knock-outs of attention over examples: the command, its table and figure, sets of sources, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES
from models import blip, example, llava
from PIL import Image

import vlmscope
from vlmscope.cli.main import app
from vlmscope.errors import DataError, ModelError, SiteError, VlmscopeError
from vlmscope.layout import Layout, named, said
from vlmscope.models.inputs import Edit, parse_edit
from vlmscope.report import figures
from vlmscope.runs.sinks import sinks
from vlmscope.studies.run_folder import EFFECTS
from vlmscope.studies.tables import flow_table, token_table


@pytest.fixture(scope="module")
def toy():
    return vlmscope.load("toy-llava"), vlmscope.examples("states", limit=2)


def test_a_row_is_the_change_by_a_plain_run_with_the_edit(toy):
    """In every column; what compares with a corrupt run is null."""
    model, examples = toy
    sites = ["decoder.*/3.attn@last<image", "decoder.1.attn.h[0,1]@answer*<noun"]
    table = vlmscope.knockout(model, examples, sites, "zero")
    assert list(table.columns) == EFFECTS.names and len(table) == 2 * (4 + 1)
    assert table.attrs["check"]["rows"] == 5 and table.attrs["check"]["largest"] < 1e-4
    assert table[["p_restored", "logit_diff", "effect"]].isna().all(axis=None)
    for one in examples:
        pair = model.prepare(replace(one, corrupt_image=None, corrupt_prompt=None))
        plain = model.run(pair.clean).double()
        for row in table[table["example"] == one.id].itertuples():
            cut = model.run(pair.clean, [Edit(row.site, "zero")]).double()
            p = [x.softmax(-1)[pair.answer].item() for x in (plain, cut)]
            ld = [(x[pair.answer] - x[pair.foil]).item() for x in (plain, cut)]
            assert row.p_patched == pytest.approx(p[1], abs=1e-5)
            assert row.p_change == pytest.approx(p[1] - p[0], abs=1e-5)
            assert row.ld_change == pytest.approx(ld[1] - ld[0], abs=1e-3)
            assert row.value == pytest.approx(ld[1], abs=1e-3)
    assert table["ld_change"].abs().max() > 1


def test_the_flow_of_information_is_that_of_the_rows(toy):
    model, examples = toy
    table = vlmscope.knockout(model, examples, ["decoder.*.attn@last<image", "decoder.*.attn@last<text"])
    flow = flow_table(table, value="ld_change")
    assert flow["edge"].unique().tolist() == ["last<image", "last<text"]
    for row in flow.itertuples():
        mine = table[table["site"] == f"decoder.{row.layer}.attn@{row.edge}"]["ld_change"]
        assert row.mean == pytest.approx(mine.mean()) and row.n == 2
    axes = figures.flow(table)
    for spot, value in zip(axes, ("p_change", "ld_change"), strict=True):
        lines = {line.get_label(): line for line in spot.get_lines()}
        rows = flow_table(table, value=value).set_index(["edge", "layer"])["mean"]
        for edge in ("last<image", "last<text"):
            assert np.allclose(lines[edge].get_ydata(), rows[edge].sort_index())
    with pytest.raises(DataError, match="has no patches of whole kinds in single layers"):
        token_table(table, value="ld_change")
    with pytest.raises(DataError, match="has no edges of attention; it holds decoder.0.resid@last"):
        flow_table(vlmscope.sweep(model, examples, "decoder.*.resid@last"))


def test_the_command_goes_on_and_reports(toy, tmp_path, capsys):
    given = ["--model", "toy-llava", "--data", "states", "--limit", "2", "--out", str(tmp_path / "run")]
    first = ["--sites", "decoder.*/3.attn@last<image"]
    app(["knockout", *given, *first], standalone_mode=False)
    said = capsys.readouterr().out
    assert (
        "8 knock-outs in 2 examples" in said
        and "last<image is cut in decoder layer 2 attn, window of 3: -" in said
    )
    app(["knockout", *given, *first, "decoder.*.attn@last<answer"], standalone_mode=False)
    run = vlmscope.open(tmp_path / "run")
    assert len(run.effects()) == 16 and run.spec["patch"] == "block" and run.check["largest"] < 1e-4
    page = vlmscope.write_report([tmp_path / "run"], tmp_path / "page.html").read_text("utf-8")
    assert "attention knocked out of the clean run (block)" in page
    assert "Flow of information, self-attention, decoder" in page and "last&lt;answer" in page
    with pytest.raises(VlmscopeError, match="holds another run: patch is"):
        app(["knockout", *given, *first, "--how", "zero"], standalone_mode=False)


def test_generate_cuts_edges_for_all_that_is_said(toy, tmp_path, capsys):
    model, examples = toy
    picture = tmp_path / "a.png"
    examples[0].clean_image.save(picture)
    edit = "decoder.0-3.attn@*<image block"
    words = ["--image", str(picture), "--prompt", "describe this picture.", "--edit", edit]
    app(["generate", "--model", "toy-llava", *words], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    inputs = model.inputs(picture, "describe this picture.")
    assert lines[1].split(":")[1].strip() == model.answer(inputs, [parse_edit(edit)])
    assert lines[0].split(":")[1].strip() != lines[1].split(":")[1].strip()


def test_sets_of_sources():
    """The prompt as it was written, the text before the image, objects with a margin, and all but these."""
    model = llava(size=16)
    mask = Image.new("L", (12, 12))
    mask.paste(255, (0, 0, 3, 3))
    one = example(
        masks={"object": mask, "other": (9.0, 9.0, 12.0, 12.0)}, corrupt_image=None, corrupt_prompt=None
    )
    there = model.prepare(one).clean.layout["decoder"]
    words = [there.tokens[n] for n in named(there, "question", "decoder")]
    assert words == "is this circle red or blue ?".split()
    assert max(named(there, "before", "decoder")) == min(there.image) - 1
    cells = {
        name: {there.cells[n] for n in named(there, name, "decoder")}
        for name in ("image[object]", "image[object+1]", "image[other]", "image[-object+1]", "image[-other]")
    }
    assert cells["image[object]"] == {(0, 0)} and cells["image[other]"] == {(3, 3)}
    assert cells["image[object+1]"] == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert len(cells["image[-object+1]"]) == 12 and not cells["image[-object+1]"] & cells["image[object+1]"]
    assert len(cells["image[-other]"]) == 15
    sites = model.placed("decoder.0.attn@last<image*", model.prepare(one).clean)
    assert str(sites[5]) == "decoder.0.attn@last<image[1,1]" and sites[5].sources == (there.image[5],)
    assert [str(s) for s in model.placed(str(sites[5]), model.prepare(one).clean)] == [str(sites[5])]


def test_the_prompt_as_it_was_written_in_every_family():
    for name, make in {"blip": blip, **FAMILIES}.items():
        layout = make().prepare(example(corrupt_prompt=None)).clean.layout
        there = layout.get("encoder", layout["decoder"])
        assert [there.tokens[n] for n in there.question][-4:] == "red or blue ?".split(), name
        assert not {role for role in there.roles if role.startswith("\0")}


def test_sinks_are_large_where_the_first_token_is():
    """A state in which one feature is large, in a model where that is put in."""
    model = llava(width=1024, heads=4, layers=2)
    inputs = model.inputs(example().clean_image, "is this red ?")
    image = inputs.layout["decoder"].image
    assert sinks(model, inputs) == ()

    def large(x):
        x = x.clone()
        x[[0, image[2]], 7] = 200 * x.square().mean(-1).sqrt()[[0, image[2]]]
        x[image[3], 8] = 200 * x[image[3]].square().mean().sqrt()  # another feature than the first token's
        return x

    norm = model.hf.model.language_model.layers[0]
    held = norm.register_forward_hook(lambda m, a, out: large(out[0])[None])
    try:
        assert named(inputs.layout["decoder"], "sinks", "decoder") == (image[2],)
    finally:
        held.remove()


def test_words_that_are_said():
    layout = said(Layout(("a", "b"), (0, 1), readout=1), 2)
    assert named(layout, "all", "decoder") == named(layout, "text", "decoder") == (0, 1, 2, 3)
    assert named(layout, "last", "decoder") == named(layout, "readout", "decoder") == (3,)


NOT = {
    "decoder.0.attn@last<image[answer]": "no mask or box of that name .there: none.; give one, as mask_path",
    "decoder.*/9.attn@last<image": "a window of 9 layers, and the decoder tower has 3; take a smaller one",
    "decoder.0.attn@last<verb": "no example has a role 'verb'",
    "decoder.0.attn@last<99": "no position 99; the decoder tower has positions 0 to 20 here",
    "decoder.0.attn@last<sinks": "no position 'sinks' in the decoder tower; no token of the image draws",
    "decoder.0.cross@last<image": "the decoder tower of this model has no 'cross'",
    "decoder.0.attn@last": "'decoder.0.attn@last': no edge of attention; expected such as decoder",
    "decoder.0.attn@last<image + decoder.1.mlp@last": "is not patched but knocked out, and not",
    "decoder.0.attn@last<image[-object": "is not a position; expected 5",
}


@pytest.mark.parametrize("site", NOT)
def test_edges_that_are_not_there(site):
    with pytest.raises(SiteError, match=NOT[site]) as caught:
        vlmscope.knockout(llava(), [example()], site)
    assert "\n" not in str(caught.value)


def test_towers_that_do_not_meet():
    """BLIP's question encoder reads the image in cross-attention alone, its answer decoder the encoder."""
    reads = "its attn reads the encoder tower, and no position 'image' in the encoder tower; name one of"
    with pytest.raises(SiteError, match=reads):
        vlmscope.knockout(blip(), [example()], "encoder.*.attn@answer<image")
    with pytest.raises(SiteError, match="its cross reads the encoder tower, and no position 'image'"):
        vlmscope.knockout(blip(), [example()], "decoder.*.cross@last<image")
    with pytest.raises(ModelError, match="mPLUG-Owl2 do not tell what the attn heads of the decoder"):
        vlmscope.knockout(FAMILIES["mplug-owl2"](), [example()], "decoder.*.attn@last<image")


def test_edits_that_are_none():
    with pytest.raises(
        VlmscopeError, match="is an edge of attention; expected the operation block or zero, not 'set'"
    ):
        Edit("decoder.0.attn@last<image", "set", 0.0)
    with pytest.raises(VlmscopeError, match="is an activation, and no edge .* not 'block'"):
        Edit("decoder.0.attn@last", "block")
    with pytest.raises(VlmscopeError, match="has no value; only set, add and scale take one"):
        Edit("decoder.0.attn@last", "set")
    with pytest.raises(VlmscopeError, match="has a value; only set, add and scale take one"):
        Edit("decoder.0.attn@last<image", "zero", 1.0)
    with pytest.raises(
        VlmscopeError, match="expected 'SITE set|add|scale NUMBER'.*or of an edge 'SITE block|zero'"
    ):
        parse_edit("decoder.0.attn@last<image cut")
    with pytest.raises(VlmscopeError, match="unknown knock-out 'mean'; expected block or zero"):
        vlmscope.knockout(llava(), [example()], "decoder.0.attn@last<image", "mean")
    with pytest.raises(SiteError, match="an edge of attention is not patched but knocked out"):
        vlmscope.sweep(llava(), [example()], "decoder.0.attn@last<image")
    with pytest.raises(VlmscopeError, match="unknown patch 'block'"):
        vlmscope.sweep(llava(), [example()], "decoder.0.attn@last", corrupt=None, patch="block")
    model = llava()
    inputs = model.prepare(example()).clean
    with pytest.raises(VlmscopeError, match=r"gave the shape \(1, 3\); expected \(1, 16\)"):
        model.run(inputs, [Edit("decoder.0.attn@last", lambda x: x[:, :3])])


def test_a_function_is_the_edit_that_it_computes():
    model = llava()
    inputs = model.prepare(example()).clean
    site = "decoder.1.attn.h1@image"
    found = model.run(inputs, [Edit(site, lambda x: x - x.mean(0))])
    value = model.capture(inputs, site)[site]
    wanted = model.run(inputs, [Edit(site, "set", value - value.mean(0))])
    assert torch.equal(found, wanted) and not torch.equal(found, model.run(inputs))

"""A value from one place, written at another: back-patching, and any cross-site patch."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pandas as pd
import pytest
import torch
from families import FAMILIES
from models import blip, example, llava, picture, sweep_to

import vlmscope
from vlmscope.errors import DataError, SiteError, StoreError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.patching import engine, reference
from vlmscope.patching.sources import check_widths, crossed
from vlmscope.report import write_report
from vlmscope.runs import corrupt
from vlmscope.runs.model import Model
from vlmscope.sites import expand, parse
from vlmscope.studies import heads
from vlmscope.studies.circuits import head_scores
from vlmscope.studies.run_folder import CROSSED
from vlmscope.studies.sweep import sweep
from vlmscope.studies.tables import token_table

if os.environ.get("VLMSCOPE_TORCHVISION"):  # see test_video_families.py
    from video_families import FAMILIES as MADE
else:
    MADE = {"llava": llava, "blip-vqa": blip, **FAMILIES}


@cache
def made(name: str) -> Model:
    return {**FAMILIES, **MADE}[name]()


def pairs_of(model: Model, inputs, site: str, source: str):
    there, here = (expand(parse(text), model.shapes) for text in (site, source))
    return crossed(model, there, here, inputs)


def expressions(model: Model, inputs) -> list[tuple[str, str]]:
    """A later layer's value at an earlier one, other kinds, other positions, other units, other towers."""
    found = []
    for tower, shape in model.shapes.items():
        last, kind = shape.layers - 1, next(iter(shape.heads))
        low, high = shape.having(kind)[0], shape.having(kind)[-1]
        found += [
            (f"{tower}.0.resid_pre@*", f"{tower}.{last}.resid@*"),
            (f"{tower}.0.resid@all", f"{tower}.{last}.resid@all"),
            (f"{tower}.*.resid@last", f"{tower}.0.resid@0"),
            (f"{tower}.{low}.{kind}@*", f"{tower}.{last}.mlp@-1"),
            (f"{tower}.{low}.{kind}.h0@all", f"{tower}.{high}.{kind}.h1@all"),
            (f"{tower}.{low}.{kind}.h[0,1]@last", f"{tower}.{high}.{kind}.h[0,1]@0"),
            (f"{tower}.0.mlp.n[1,2]@all", f"{tower}.{last}.mlp.n[3,5]@all"),
            (f"{tower}.{last}/3.resid@last", f"{tower}.0.resid@last"),
            (f"{tower}.0.resid@0 + {tower}.{last}.mlp@last", f"{tower}.0.mlp@last + {tower}.{last}.resid@0"),
        ]
        if inputs.layout[tower].image:
            found.append((f"{tower}.0.resid_pre@image", f"{tower}.{last}.resid@image"))
    first, *_, speaker = model.shapes
    if model.shapes[first].width == model.shapes[speaker].width:
        found.append((f"{speaker}.0.resid@last", f"{first}.0.resid@0"))
    return found


@pytest.mark.parametrize("how", ["image", "its own run"])
@pytest.mark.parametrize("name", MADE)
def test_a_crossed_patch_is_capture_and_run(name, how):
    """By the engine and by the reference, from the clean into the corrupt run, or from a run into itself."""
    model = made(name)
    (pair,) = corrupt.pairs(model, example(), "image")
    if how != "image":
        pair = replace(pair, corrupt=pair.clean)
    patches = [
        one for both in expressions(model, pair.clean) for one in some(pairs_of(model, pair.clean, *both))
    ]
    check_widths(model, patches, pair.clean)
    sites, sources = map(list, zip(*patches, strict=True))
    wanted, values = [], model.capture(pair.clean, [part for source in sources for part in source.parts])
    for site, source in patches:
        origins = source.parts if len(source.parts) > 1 else source.parts * len(site.parts)
        edits = [
            Edit(part, "set", values[str(origin)]) for part, origin in zip(site.parts, origins, strict=True)
        ]
        logits = model.run(pair.corrupt, edits)
        wanted.append(float(logits[pair.answer] - logits[pair.foil]))
    plain = model.run(pair.corrupt)
    base = float(plain[pair.answer] - plain[pair.foil])
    assert sum(abs(ld - base) > 1e-6 for ld in wanted) > len(wanted) / 2, "most of them change something"
    for way in (engine, reference):
        found = torch.full((len(sites),), torch.nan, dtype=torch.float64)
        for numbers, scores in way.patch(model, pair, sites, sources=sources).chunks:
            assert found[numbers].isnan().all(), "each patch comes once"
            found[numbers] = scores.ld
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def some(patches):
    """At most three of them, with the first and the last."""
    return [patches[n] for n in sorted({0, len(patches) // 2, len(patches) - 1})]


def several(many: int = 3):
    return [
        example(id=f"e{n}", clean_image=picture(n), corrupt_image=picture(50 + n), corrupt_prompt=None)
        for n in range(many)
    ]


def test_a_sweep_from_another_site(tmp_path):
    """A folder: rows of every source and target, written in two turns, each checked against `run`."""
    model, out = llava(), tmp_path / "run"
    sites, source = ["decoder.0-1.resid_pre@image*", "decoder.0.resid@answer"], "decoder.1-2.resid@image*"
    with pytest.raises(
        SiteError, match="names 9 patches here and 'decoder.0.resid@answer' 1; expected as many"
    ):
        sweep(model, several(), sites, source=source)
    first = sweep(model, several(2), sites[:1], source=source, out=out)
    again = sweep(model, several(3), sites[:1], source=source, out=out)
    assert again.attrs["check"]["rows"] == 5 and again.attrs["check"]["largest"] < 1e-9
    assert len(first) == 2 * 2 * 2 * 9 and len(again) == 3 * 2 * 2 * 9
    assert list(again.columns) == CROSSED.names
    assert set(again["source_site"].str[:15]) == {"decoder.1.resid", "decoder.2.resid"}
    pd.testing.assert_frame_equal(vlmscope.open(out).effects(), again)
    whole = sweep(model, several(3), sites[:1], source=source, engine="reference")
    numbers = ["logit_diff", "p_patched", "effect"]
    pd.testing.assert_frame_equal(again[numbers], whole[numbers], rtol=1e-9, atol=1e-12)
    assert again["site"].tolist() == whole["site"].tolist()
    row = again.iloc[-1]
    pair = corrupt.pairs(model, several()[2], "image")[0]
    value = model.capture(pair.clean, row["source_site"])[row["source_site"]]
    logits = model.run(pair.corrupt, [Edit(row["site"], "set", value)])
    assert float(logits[pair.answer] - logits[pair.foil]) - float(
        (lambda x: x[pair.answer] - x[pair.foil])(model.run(pair.corrupt))
    ) == pytest.approx(row["logit_diff"], rel=1e-9)
    with pytest.raises(StoreError, match="holds another run: from is .* there, absent here"):
        sweep(model, several(3), sites[:1], out=out)


def test_back_patching_within_a_run():
    """Without a corruption, a later layer's stream of the example's own run at an earlier layer."""
    model, examples = llava(), several(1)
    table = sweep(model, examples, "decoder.*.resid_pre@image", None, source="decoder.2.resid@image")
    pair = model.prepare(examples[0])
    value = model.capture(pair.clean, "decoder.2.resid@image").popitem()[1]
    plain = model.run(pair.clean)
    for row in table.itertuples():
        logits = model.run(pair.clean, [Edit(row.site, "set", value)])
        change = (logits - plain)[pair.answer] - (logits - plain)[pair.foil]
        assert float(change) == pytest.approx(row.ld_change, rel=1e-9)
        assert pd.isna(row.effect) and pd.isna(row.logit_diff)
    assert table["ld_change"].abs().min() > 1e-6


@pytest.mark.parametrize("patch", ["mean", "resample"])
def test_ablations_from_another_site(patch):
    model = llava()
    sweeps = [
        sweep(
            model, several(), "decoder.0.resid@*", None, source="decoder.2.mlp@*", patch=patch, engine=engine
        )
        for engine in ("fast", "reference")
    ]
    numbers = ["ld_change", "p_patched"]
    pd.testing.assert_frame_equal(sweeps[0][numbers], sweeps[1][numbers], rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_is_one_line():
    model = llava()
    for site, source, words in (
        ("decoder.0.resid@image", "decoder.1.resid@text", "has 12 positions, .* 9 positions"),
        ("decoder.0.resid@last", "vision.0.resid@5", "is 8 wide, at 'decoder.0.resid@last' 16"),
        ("decoder.0.attn.h0@last", "decoder.1.resid@last", "has 1 position, .* 1 position of 1 unit;"),
        ("decoder.*/3.resid@last", "decoder.*/3.resid@last", "has 3 parts here and .* 2"),
        ("decoder.0.resid@last", "encoder.1.resid@last", "no 'encoder' tower"),
        ("decoder.0.resid@last", "decoder.1.resid@verb", "no example has a role 'verb'"),
    ):
        with pytest.raises(SiteError, match=words):
            sweep(model, several(1), site, None, source=source)
    with pytest.raises(SiteError, match="from 2 expressions; expected one"):
        sweep(model, several(1), "decoder.0.resid@last", None, source=["decoder.0.mlp@0", "decoder.1.mlp@0"])
    with pytest.raises(VlmscopeError, match="a zero is from no other site"):
        sweep(model, several(1), "decoder.0.resid@last", None, source="decoder.0.mlp@last", patch="zero")


def test_several_sources_are_not_averaged():
    table = sweep(llava(), several(2), "decoder.*.resid@answer", source="decoder.0-1.mlp@answer")
    with pytest.raises(DataError, match="values from 2 places, which are not averaged"):
        token_table(table)
    one = table[table["source_site"].str.startswith("decoder.0.mlp@")]
    assert token_table(one, value="ld_change").shape == (3, 1)


def test_the_report_of_a_run_from_another_site(tmp_path):
    """A figure of layers by the layers that values are from; what is strongest says from where."""
    model, out = llava(), tmp_path / "run"
    table = sweep(
        model, several(2), "decoder.*.resid_pre@image", None, source="decoder.*.resid@image", out=out
    )
    assert len(table) == 2 * 9
    page = write_report([out], tmp_path / "page.html").read_text("utf-8")
    assert "Layers and where their values come from" in page
    assert "activations of the run itself from decoder.*.resid@image" in page
    assert "<th>from</th>" in page and "decoder.2.resid@image" in page


def test_a_run_from_another_site_tells_of_no_head(tmp_path):
    run = sweep_to(tmp_path, llava(), several(1), "decoder.0.attn.h*@last", source="decoder.1.attn.h0@last")
    with pytest.raises(StoreError, match="so they tell of no head; give a run without --from"):
        head_scores(run)
    with pytest.raises(VlmscopeError, match=r"not those of these heads \(from differ\)"):
        heads.functions(llava(), several(2), "decoder.0.attn.h1@last", effects=run)

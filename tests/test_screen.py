"""A sweep of what a gradient points to: the sites are the best of all, and what was missed is said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from models import example, llava, picture

import vlmscope
from vlmscope.errors import SiteError, StoreError, VlmscopeError
from vlmscope.studies import screen
from vlmscope.studies.attribution import attribute
from vlmscope.studies.screen import lines, missed, screened
from vlmscope.studies.sweep import into_folder

SITES = [
    "decoder.*.mlp.n*@*",
    "decoder.*.attn.h*@last",
    "decoder.*.attn.h[0,2]@all",
    "decoder.*.resid@answer",
]


def several():
    return [replace(example(), id=str(n), corrupt_image=picture(20 + n)) for n in range(2)]


def screen_to(out, *given, **options):
    return into_folder(screened(*given, **options, out=out), out)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_best_sites_are_swept_exactly(tmp_path, direction):
    model, given = llava(), several()
    run = screen_to(tmp_path, model, given, SITES, "image", top=12, direction=direction)
    scores = attribute(model, given, SITES, "image", method="atp", direction=direction)
    size = scores["score"].abs().groupby(scores["site"]).mean()
    own = run.spec["screen"]
    assert set(own["best"]) == set(size.nlargest(12).index) and own["sites"] == len(size)
    assert len(own["drawn"]) == 12 and not {*own["drawn"]} & {*own["best"]}
    effects = run.effects()
    assert set(effects["site"]) == {*own["best"], *own["drawn"]} and len(effects) == 2 * 24
    whole = vlmscope.sweep(model, given, own["best"], "image", direction=direction)
    mine = effects.set_index(["example", "site"])["ld_change"]
    np.testing.assert_allclose(
        mine.loc[list(zip(whole["example"], whole["site"], strict=True))], whole["ld_change"], rtol=1e-9
    )
    found = missed(run)
    change = effects["ld_change"].abs().groupby(effects["site"]).mean()
    least = change[own["best"]].min()
    assert found["least"] == pytest.approx(least)
    assert found["above"] == (change[own["drawn"]] > least).sum() and found["unseen"] == len(size) - 12
    assert json.loads((tmp_path / "screen.json").read_text()) == found
    assert f"({found['above']} of 12 drawn" in " ".join(r.replace("95 % bound; ", "") for r in lines(found))


def test_a_screen_goes_on_without_ranking_anew(tmp_path, monkeypatch):
    model, given = llava(), several()
    first = screen_to(tmp_path, model, given, SITES[1], top=3)
    monkeypatch.setattr(screen, "_ranked", None)
    again = screen_to(tmp_path, model, given, SITES[1], top=3)
    assert again.spec == first.spec
    monkeypatch.undo()
    for more in ({"top": 4}, {"examples": given[:1]}):
        with pytest.raises(StoreError, match="holds another run: screen"):
            screen_to(tmp_path, model, more.pop("examples", given), SITES[1], **{"top": 3, **more})
    everything = screen_to(tmp_path / "all", model, given, SITES[1], top=100)
    assert missed(everything)["unseen"] == 0 and list(lines(missed(everything)))[-1] == "nothing is left out"


def test_what_cannot_be_screened(tmp_path):
    with pytest.raises(SiteError, match="patched together, a later layer undoes"):
        screen_to(tmp_path, llava(), example(), "decoder.*/3.mlp@last")
    with pytest.raises(VlmscopeError, match="the number of sites to sweep is '0'"):
        screen_to(tmp_path, llava(), example(), "decoder.*.mlp@last", top=0)

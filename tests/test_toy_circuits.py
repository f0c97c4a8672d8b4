"""On toy-blip: heads found on one half are found on the other, and the answer depends on them."""

from __future__ import annotations

import pandas as pd
import pytest
from models import sweep_to
from scipy.stats import spearmanr

from vlmscope.checkpoint import load
from vlmscope.data import BUILT_IN, examples
from vlmscope.studies import circuits, heads

SITES = [
    "encoder.*.attn.h*@answer",
    "encoder.*.cross.h*@answer",
    "decoder.*.attn.h*@last",
    "decoder.*.cross.h*@last",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_important_heads_hold(name, tmp_path):
    model, given = load("toy-blip"), examples(name, limit=200)
    run = sweep_to(tmp_path / "run", model, given, SITES, "image", select=True)
    grids = circuits.head_scores(run)
    wide = pd.concat([w.add_prefix(f"{key}") for key, w in grids.items()], axis=1).abs()
    half = circuits.first_half(list(wide.index))
    assert wide.shape == (run.ran(), 48) and run.ran() > 180
    assert spearmanr(wide[half].mean(), wide[~half].mean())[0] >= 0.9

    found = circuits.heads_of(run)
    important = found[found["important"]]
    assert 3 <= len(important) <= 16 and important["confirmed"].mean() > 0.6
    kept = set(run.baselines().query("not excluded")["example"])
    chosen = [e for e in given if e.id in kept][:60]
    # In some layers all four heads are important: of the strongest two there are as many others to compare.
    strongest = important.sort_values("mean", key=abs, ascending=False)
    strongest = strongest.groupby(["tower", "kind", "layer"]).head(2)
    table = heads.functions(model, chosen, circuits.expressions(strongest)).together
    whole = table.loc[table["set"] == "none", "accuracy"].item()
    drops = whole - table.groupby(["set", "knockout"])["accuracy"].mean()
    assert drops["these heads", "mean"] >= 3 * max(drops["random heads", "mean"], 0.01)

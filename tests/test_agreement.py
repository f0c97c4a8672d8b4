"""How far a ranking can be trusted: numbers worked out by hand, and their words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from vlmscope.stats import share_bound
from vlmscope.studies.agreement import agreement, lines


def table(score, exact, layer=0, kind="attn", unit="h0", example="a"):
    rows = {"tower": "decoder", "kind": kind, "unit": unit, "layer": layer, "example": example}
    return pd.DataFrame({**rows, "score": score, "exact": exact})


def test_by_hand():
    """Of the four not among the best two, two are patched, one of which does more than the second."""
    rows = table([-4.0, 3.0, 2.0, 1.0, 0.5, 0.0], [-5.0, 1.0, 2.0, np.nan, 0.25, np.nan])
    found = agreement(rows, 2)["decoder.attn.h"]
    counts = [found[name] for name in ("sites", "verified", "unseen", "drawn", "above")]
    assert counts == [6, 4, 4, 2, 1]
    assert found["spearman"] == pytest.approx(0.8)  # ranks 1 4 3 2 of the scores, 1 3 4 2 of the effects
    assert found["pearson"] == pytest.approx(np.corrcoef([-4, 3, 2, 0.5], [-5, 1, 2, 0.25])[0, 1])
    assert found["recall"] == {"1": 1.0} and found["spearman_random"] is None
    assert found["bound"] == pytest.approx(share_bound(1, 2)) and found["off"] == {
        "0": pytest.approx(3.25 / 8.25)
    }


def test_correlations_are_within_examples_and_of_patches_that_change_anything():
    one = table([3.0, 2.0, 1.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0, 0.0])
    other = table([30.0, 20.0, 10.0], [1.0, 2.0, 3.0], example="b")
    found = agreement(pd.concat([one, other]), 5)["decoder.attn.h"]
    assert found["spearman"] == pytest.approx(0.0)  # the mean of 1 and -1
    assert found["unseen"] == 0 and found["bound"] == 0.0


def test_scores_without_a_sign():
    rows = table([3.0, 2.0, 1.0], [-3.0, 2.0, -1.0])
    assert agreement(rows, 3, signed=False)["decoder.attn.h"]["spearman"] == pytest.approx(1.0)
    assert agreement(rows, 3)["decoder.attn.h"]["spearman"] == pytest.approx(-0.5)


def test_bounds_are_those_of_clopper_and_pearson():
    """With this share so few would be seen one time in twenty."""
    from scipy.stats import binom

    for yes, of in ((0, 10), (3, 40), (9, 10)):
        assert binom.cdf(yes, of, share_bound(yes, of)) == pytest.approx(0.05)
    assert share_bound(5, 5) == 1.0


def test_words():
    draw = np.random.default_rng(0)
    exact = draw.normal(size=40)
    good = table(exact + 0.01 * draw.normal(size=40), exact, layer=[0, 1] * 20)
    bad = table(draw.normal(size=40), exact, layer=[0, 1] * 20, kind="resid", unit=None)
    first, second, last = lines(agreement(pd.concat([good, bad]), 10))
    assert first.startswith(
        "decoder.attn.h: good. Rank correlation with exact patches 1.00 (1.00 of random ones)"
    )
    assert "of the 10 largest effects that were patched 100% have one of the 10 largest scores" in first
    assert (
        "of the 30 others have an effect larger than the smallest of the best (95 % bound; 0 of 30 drawn)"
        in first
    )
    # The best stand above the others, and within neither is there an order.
    apart = np.r_[np.full(20, 5.0), np.zeros(20)] + draw.normal(size=40)
    lucky = table(apart, np.r_[np.full(20, 5.0), np.zeros(20)] + draw.normal(size=40), kind="mlp", unit=None)
    [only, _] = lines(agreement(lucky, 20))
    assert only.startswith("decoder.mlp: poor. Rank correlation with exact patches 0.")
    assert second.startswith("decoder.resid: poor.") and "in layers 0, 1" in second
    assert last == "do not rank decoder.resid by these scores: patch them exactly"

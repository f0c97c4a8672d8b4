"""Intervals hold, tests reject and rules find as often as they say, on draws whose truth is known.

The whole measurement is `benchmarks/calibration.py`; here are its corners, with fewer draws.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

import vlmscope
from vlmscope import stats
from vlmscope.errors import DataError
from vlmscope.studies import circuits

DRAWS = 2_000
SHAPES = {
    "normal": (0.0, lambda g, size: g.normal(size=size)),
    "uniform": (0.0, lambda g, size: g.uniform(-1, 1, size=size)),
    "t5": (0.0, lambda g, size: g.standard_t(5, size=size)),
    "exponential": (1.0, lambda g, size: g.exponential(size=size)),
    "skewness 5": (0.16, lambda g, size: g.gamma(0.16, size=size)),
}


@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ("normal", 10),
        ("uniform", 10),
        ("t5", 10),
        ("exponential", 20),
        ("skewness 5", 20),
        ("skewness 5", 50),
    ],
)
def test_intervals_hold_the_mean_and_tests_seldom_reject_it(shape, n):
    mean, draw = SHAPES[shape]
    scores = draw(np.random.default_rng(0), (n, DRAWS))
    low, high = stats.interval(scores)
    covers = np.mean((low <= mean) & (mean <= high))
    assert 0.93 <= covers <= 0.98
    rejected = stats.p_values(scores - mean) <= 0.05
    assert np.mean(rejected) == pytest.approx(1 - covers, abs=1e-9), "the test is the interval turned around"


def test_a_percentile_bootstrap_would_not_hold():
    """The intervals that these take the place of: what the last test would find of them."""
    scores = np.random.default_rng(0).gamma(0.16, size=(20, 400))
    drawn = np.random.default_rng(1).multinomial(20, np.full(20, 1 / 20), size=1_000)
    low, high = np.quantile(drawn @ scores / 20, [0.025, 0.975], axis=0)
    assert np.mean((low <= 0.16) & (high >= 0.16)) < 0.9


def test_of_symmetric_scores_the_test_is_students():
    scores = np.random.default_rng(0).normal(0.3, size=(15, 4))
    scores = np.concatenate([scores, 2 * scores.mean(0) - scores])
    assert stats.p_values(scores) == pytest.approx(scipy_stats.ttest_1samp(scores, 0).pvalue, rel=1e-3)
    low, high = stats.interval(scores)
    known = scipy_stats.ttest_1samp(scores, 0).confidence_interval()
    assert low == pytest.approx(known.low, rel=1e-3) and high == pytest.approx(known.high, rel=1e-3)
    other = np.random.default_rng(1).normal(size=(12, 4))
    welch = scipy_stats.ttest_ind(scores, other, equal_var=False).pvalue
    assert (stats.p_values(scores, other) >= welch - 1e-12).all()


def test_differences_of_two_sets_hold():
    generator = np.random.default_rng(0)
    one, other = generator.exponential(size=(20, DRAWS)), generator.exponential(size=(35, DRAWS)) * 2
    low, high = stats.interval(one, other)
    assert 0.93 <= np.mean((low <= -1) & (high >= -1)) <= 0.98
    p = stats.p_values(one, other)
    assert ((p <= 0.05) == ((low >= 0) | (high <= 0))).all()


def test_small_effects_are_within_what_counts():
    """Of means at the margin the test, which has two sides, calls half of 5 % larger."""
    scores = np.random.default_rng(0).normal(0.5, size=(30, DRAWS))
    assert np.mean(stats.p_values(scores, least=0.5) <= 0.05) == pytest.approx(0.025, abs=0.01)
    assert np.mean(stats.p_values(scores, least=0.0) <= 0.05) > 0.7


def test_there_is_no_interval_where_none_would_hold():
    scores = np.random.default_rng(0).normal(size=(stats.FEWEST, 2))
    assert np.isfinite(stats.interval(scores)).all()
    assert np.isnan(stats.interval(scores[1:])).all() and np.isnan(stats.p_values(scores[1:])).all()
    same = np.full((30, 1), 0.1)
    assert np.isnan(stats.interval(same)).all() and np.isnan(stats.p_values(same)).all()


def test_shares_have_the_interval_of_clopper_and_pearson():
    for true in (0.05, 0.5, 0.95):
        given = np.random.default_rng(0).random((2_000, 15)) < true
        ends = np.array([stats.share_interval(one) for one in given])
        assert np.mean((ends[:, 0] <= true) & (true <= ends[:, 1])) >= 0.95


def studies(n: int, count: int):
    """Ten of 144 heads at 0.6 SD; half of the noise is shared by the heads of an example."""
    generator = np.random.default_rng(n)
    truth = np.r_[np.full(10, 0.6), np.zeros(134)]
    for study in range(count):
        noise = generator.normal(size=(n, 144)) + generator.normal(size=(n, 1))
        table = circuits.assess(truth + noise / np.sqrt(2), [f"{study}/{i}" for i in range(n)], least=0.02)
        yield table, truth > 0


def test_important_and_confirmed_heads_are_true_and_found():
    found = []
    for table, true in studies(100, 8):
        rules = table["important"].to_numpy(), table["confirmed"].to_numpy(bool)
        found.append([((said & ~true).sum() / max(1, said.sum()), said[true].mean()) for said in rules])
    (wrong, power), (wrong_again, power_again) = np.mean(found, axis=0)
    assert wrong <= 0.05 and power >= 0.95
    assert wrong_again <= 0.05 and power_again >= 0.8


def test_held_out_means_are_not_inflated():
    """At 40 examples a head is found if it looks larger than it is."""
    sums = np.zeros(4)
    for table, true in studies(40, 15):
        chosen = table[table["important"] & true]
        held = chosen["mean_held_out"].dropna()
        sums += chosen["mean"].sum(), len(chosen), held.sum(), len(held)
    assert sums[0] / sums[1] > 1.08 * 0.6
    assert 0.7 * 0.6 < sums[2] / sums[3] < 1.05 * 0.6


def agreement(generator, rates, runs, groups):
    """Heads important in several runs, by rates that only their layer decides."""
    columns = {n: generator.random(rates.shape) < rates for n in range(groups)}
    table = {f"r{run}": columns[run % groups].ravel() for run in range(runs)}
    index = pd.MultiIndex.from_product([range(len(rates)), range(rates.shape[1])], names=["layer", "head"])
    of = {f"r{run}": run % groups for run in range(runs)}
    return pd.DataFrame(table, index=index), of


@pytest.mark.parametrize(("layers", "heads", "runs", "groups"), [(3, 4, 6, 3), (12, 12, 2, 2)])
def test_heads_of_late_layers_agree_by_chance(layers, heads, runs, groups):
    """Where the layer alone decides, p is rarely at most 5 %; over all layers it is in most."""
    generator, found = np.random.default_rng(0), []
    rates = np.linspace(0.02, 0.9, layers)[:, None].repeat(heads, 1)
    for _ in range(300):
        table, of = agreement(generator, rates, runs, groups)
        _, _, p = circuits._against_chance(table, of)
        whole = table.droplevel("layer").assign(layer=0).set_index("layer", append=True)
        _, _, naive = circuits._against_chance(whole, None)
        found.append((p is not None and p <= 0.05, naive is not None and naive <= 0.05))
    held, naive = np.mean(found, axis=0)
    assert held <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)
    assert naive > 0.5, "with the heads of all layers exchanged the test would fail"


def test_runs_of_the_same_examples_are_no_evidence():
    table, _ = agreement(np.random.default_rng(0), np.full((3, 4), 0.5), 2, 1)
    assert circuits._against_chance(table, {"r0": 0, "r1": 0})[1:] == (None, None)
    nothing = table.assign(r1=False)
    assert circuits._against_chance(nothing, None)[2] is None, "no exchange changes that none are in common"


# --- comparisons -----------------------------------------------------------------------------


def effects(scores: dict[str, float], site: str = "decoder.1.attn.h0@last") -> pd.DataFrame:
    rows = [{"example": name, "logit_diff": value} for name, value in scores.items()]
    return pd.DataFrame(rows).assign(site=site, slot="readout", corruption="image")


def test_runs_are_compared_example_by_example():
    generator = np.random.default_rng(0)
    base = dict(zip(map(str, range(30)), generator.normal(0, 5, size=30), strict=True))
    moved = {name: value - 0.5 + generator.normal(0, 0.1) for name, value in base.items() if name != "0"}
    (row,) = vlmscope.compare(effects(base), effects(moved)).to_dict("records")
    assert (row["site"], row["slot"], row["n"], row["n_other"]) == ("decoder.1.attn.h0", "readout", 29, 29)
    apart = np.array([base[name] - moved[name] for name in moved])
    assert row["difference"] == pytest.approx(apart.mean())
    assert [row["low"], row["high"]] == pytest.approx(stats.interval(apart[:, None])[:, 0].tolist())
    assert row["p_value"] < 1e-6 and row["q_value"] == row["p_value"]
    (two,) = vlmscope.compare(effects(base), effects(moved), paired=False).to_dict("records")
    assert (two["n"], two["n_other"]) == (30, 29) and two["p_value"] > 0.3


def test_what_cannot_be_compared():
    one, other = effects({"a": 1.0, "b": 2.0}), effects({"c": 1.0})
    with pytest.raises(DataError, match="no site of the same examples in common; paired=False"):
        vlmscope.compare(one, other)
    assert np.isnan(vlmscope.compare(one, other, paired=False)["p_value"]).all(), "too few"
    with pytest.raises(DataError, match="no site"):
        vlmscope.compare(one, effects({"a": 1.0}, "decoder.1.attn.h1@last"))
    with pytest.raises(DataError, match="no values 'effect' .* it has logit_diff"):
        vlmscope.compare(one, other, value="effect")
    both = pd.concat([one, one.assign(corruption="text")])
    with pytest.raises(DataError, match="the corruptions image, text"):
        vlmscope.compare(both, other)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_interval_of_a_share_is_that_of_clopper_and_pearson(n):
    """By scipy's own search for the ends, which needs no beta distribution."""
    for yes in range(n + 1):
        found = stats.share_interval([True] * yes + [False] * (n - yes))
        wanted = scipy_stats.binomtest(yes, n).proportion_ci(0.95, method="exact")
        assert found == pytest.approx([wanted.low, wanted.high], abs=1e-9)


def test_ranks_and_rates_are_those_of_scipy():
    """`scipy.stats` takes half a second to import, so that no command does."""
    generator = np.random.default_rng(0)
    for n in (1, 2, 7, 200):
        p = generator.random(n) ** 4
        p[generator.random(n) < 0.2] = p[0]
        assert np.array_equal(stats.q_values(p), scipy_stats.false_discovery_control(p))
        values = generator.integers(0, 5, (n, 3)) / 3
        assert np.array_equal(stats.ranks(values), scipy_stats.rankdata(values, axis=0))
    broken = stats.ranks([[1.0, 2.0], [np.nan, 1.0]])
    assert np.array_equal(broken, [[np.nan, 2.0], [np.nan, 1.0]], equal_nan=True)
    assert stats.q_values([np.nan]).shape == (1,) and stats.q_values([]).shape == (0,)

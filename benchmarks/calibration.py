"""Whether tests reject, intervals cover and rules find as often as they say, on draws whose truth is known.

    python benchmarks/calibration.py [--draws 10000] [--studies 40] [--out benchmarks/results/NAME.json]

`docs/numbers.md` quotes what it prints. `--draws` are columns for each shape of scores and number of
examples; `--studies` are whole studies of 144 heads. The last line is JSON. Two CPU cores: some five minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from vlmscope.neurons.measures import _redrawn, auc
from vlmscope.stats import LEVEL, interval, p_values, q_values, share_interval
from vlmscope.studies import circuits

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]

SHAPES: dict[str, tuple[float, Draw]] = {
    "normal": (0.0, lambda g, size: g.normal(size=size)),
    "uniform": (0.0, lambda g, size: g.uniform(-1, 1, size=size)),
    "t with 5 degrees": (0.0, lambda g, size: g.standard_t(5, size=size)),
    "exponential, skewness 2": (1.0, lambda g, size: g.exponential(size=size)),
    "chi-squared, skewness 2.8": (1.0, lambda g, size: g.chisquare(1, size=size)),
    "lognormal, skewness 3.7": (float(np.exp(0.32)), lambda g, size: g.lognormal(0, 0.8, size=size)),
    "gamma, skewness 5": (0.16, lambda g, size: g.gamma(0.16, size=size)),
    "in one of ten examples": (0.1, lambda g, size: (g.random(size) < 0.1) * g.normal(1, 0.3, size=size)),
}
"""Scores of examples, with their mean."""
HEADS = 144
LEAST = 0.05
"""One hundredth of a gap of five standard deviations of a head's scores over examples."""


def covered(draws: int) -> pd.DataFrame:
    """How often intervals hold the mean, and tests reject it, by the shape of scores and the examples."""
    rows = []
    for name, (mean, draw) in SHAPES.items():
        for n in (10, 20, 50, 100):
            scores = draw(np.random.default_rng(n), (n, draws))
            low, high = interval(scores)
            p = p_values(scores - mean)
            two = interval(scores, scores[::-1][: n // 2 + 5, ::-1])  # of other columns: other examples
            rows.append(
                {
                    "scores": name,
                    "n": n,
                    "covers": float(np.mean((low <= mean) & (mean <= high))),
                    "differences": float(np.mean((two[0] <= 0) & (two[1] >= 0))),
                    "rejects at 5 %": float(np.mean(p <= 0.05)),
                    "rejects at 0.1 %": float(np.mean(p <= 0.001)),
                    "no interval": float(np.isnan(low).mean()),
                }
            )
    return pd.DataFrame(rows)


def shares(draws: int) -> pd.DataFrame:
    """How often the interval of a share of pictures holds it, and that of an AUC."""
    rows = []
    for n in (10, 20, 50):
        for true in (0.05, 0.5, 0.95):
            given = np.random.default_rng(n).random((draws // 10, n)) < true
            ends = [share_interval(one) for one in given]
            rows.append(("share", true, n, float(np.mean([low <= true <= high for low, high in ends]))))
    for with_it, without in ((10, 10), (15, 25), (30, 70)):
        for apart in (0.0, 0.8, 1.8):
            generator, true = np.random.default_rng(with_it), float(norm.cdf(apart / np.sqrt(2)))
            labels, held = np.arange(with_it + without) < with_it, []
            for _ in range(draws // 50):
                values = generator.normal(size=len(labels)) + apart * labels
                low, high = _redrawn(auc, values, labels, generator)
                held.append(low <= true <= high)
            rows.append(("AUC", round(true, 2), len(labels), float(np.mean(held))))
    return pd.DataFrame(rows, columns=["of", "true", "n", "covers"])


def effects(name: str, generator: np.random.Generator) -> Array:
    """The true effects of the heads, in standard deviations of their scores over examples."""
    found = np.zeros(HEADS)
    if name == "ten of 0.6 SD":
        found[:10] = 0.6
    if name == "many, most small":
        found = generator.gamma(0.3, 0.5, size=HEADS) * generator.choice([-1.0, 1.0], size=HEADS)
    return found


def found_heads(studies: int) -> pd.DataFrame:
    """False discovery rate and power of `important` and `confirmed`, and by how much means are inflated."""
    cases = itertools.product(("none", "ten of 0.6 SD", "many, most small"), (0.0, 0.5), (20, 40, 100))
    return pd.DataFrame(
        {"effects": name, "shared noise": shared, "n": n, **_studies(name, shared, n, studies)}
        for name, shared, n in cases
    )


def _studies(name: str, shared: float, n: int, studies: int) -> dict[str, float]:
    """Means over studies, in which a part of the noise is shared by all heads of an example."""
    generator, rows = np.random.default_rng(n), []
    whole: dict[str, list[tuple[float, float]]] = {"mean": [], "mean_held_out": []}
    for study in range(studies):
        truth = effects(name, generator)
        noise = generator.normal(size=(n, HEADS)) * np.sqrt(1 - shared)
        scores = truth + noise + generator.normal(size=(n, 1)) * np.sqrt(shared)
        table = circuits.assess(scores, [f"{study}/{i}" for i in range(n)], least=LEAST)
        is_true, row = np.abs(truth) > LEAST, {}
        for rule in ("important", "confirmed"):
            said = table[rule].to_numpy(bool)
            row[f"{rule}: false"] = (said & ~is_true).sum() / max(1, said.sum())
            row[f"{rule}: power"] = (said & is_true).sum() / is_true.sum() if is_true.any() else np.nan
        rows.append(row)
        for column, pairs in whole.items():
            chosen = (table["important"] & table[column].notna()).to_numpy()
            sign = np.sign(table["mean"].to_numpy()[chosen])
            pairs.append((float((sign * table[column][chosen]).sum()), float((sign * truth[chosen]).sum())))
    found = {key: float(value) for key, value in pd.DataFrame(rows).mean().items()}
    for column, pairs in whole.items():
        said, true = np.sum(pairs, axis=0)
        found[f"{column} / true"] = float(said / true) if name != "none" and true else np.nan
    return found


def false_heads(studies: int) -> pd.DataFrame:
    """In how many studies of heads without any effect one is called important, by the shape of the scores."""
    rows = []
    for name in ("normal", "exponential, skewness 2", "lognormal, skewness 3.7", "gamma, skewness 5"):
        mean, draw = SHAPES[name]
        for n in (10, 20, 40, 100):
            generator, counts = np.random.default_rng(n), []
            for _ in range(5 * studies):
                scores = draw(generator, (n, HEADS)) - mean
                least = LEAST * float(scores.std())
                counts.append(int((q_values(p_values(scores, least=least)) <= LEVEL).sum()))
            shares = (float(np.mean(np.array(counts) > 0)), float(np.mean(counts)))
            rows.append((name, n, *shares))
    return pd.DataFrame(rows, columns=["scores", "n", "studies with a false head", "false heads a study"])


def agreeing(studies: int) -> pd.DataFrame:
    """How often heads that are exchangeable within layers are found to agree over runs (p at most 5 %)."""
    rows = []
    for layers, heads, runs, groups in ((3, 4, 6, 3), (3, 4, 2, 2), (12, 12, 2, 2), (12, 12, 6, 3)):
        generator, p = np.random.default_rng(layers), []
        for _ in range(25 * studies):
            rates = np.sort(generator.beta(0.5, 1.0, size=layers))[:, None].repeat(heads, 1).ravel()
            columns, of = {}, {}
            for run in range(runs):
                group = run % groups
                # Runs of one group find nearly the same heads, as they share their examples.
                seen = next((columns[name] for name in columns if of[name] == group), None)
                drawn = generator.random(layers * heads) < rates
                columns[f"r{run}"] = drawn if seen is None else seen ^ (generator.random(len(seen)) < 0.05)
                of[f"r{run}"] = group
            index = pd.MultiIndex.from_product([range(layers), range(heads)], names=["layer", "head"])
            p.append(circuits._against_chance(pd.DataFrame(columns, index=index), of)[2])
        tested = [value for value in p if value is not None]
        share = float(np.mean([value <= LEVEL for value in tested]))
        rows.append((f"{layers} x {heads}", runs, groups, len(tested) / len(p), share))
    return pd.DataFrame(rows, columns=["heads", "runs", "sets of examples", "tested", "p at most 5 %"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    tables = {
        "intervals and tests of means": covered(args.draws),
        "intervals of shares and of AUC": shares(args.draws),
        "important and confirmed heads": found_heads(args.studies),
        "heads without an effect, by shape": false_heads(args.studies),
        "agreement of runs by chance": agreeing(args.studies),
    }
    result: dict[str, Any] = {
        "benchmark": "calibration",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "draws": args.draws,
        "studies": args.studies,
    }
    for name, table in tables.items():
        print(f"\n{name}\n{table.round(3).to_string(index=False)}")
        result[name] = json.loads(table.round(4).to_json(orient="records"))
    text = json.dumps(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()

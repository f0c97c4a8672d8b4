"""How much of the behaviour circuits carry: f, its curve over sizes, areas, and intervals over examples.

f(C) = (m(C) − m(∅)) / (m(all) − m(∅)), m averaged over the examples first, and CPR and CMD as in MIB
(arXiv 2504.13151).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmscope.stats import FEWEST, LEVEL, rng

Array = NDArray[np.float64]
Ratio = Literal["means", "median"]
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The sizes of MIB, as shares of all parts."""
RESAMPLED = 2000
"""How often the examples are drawn anew for an interval."""
NONE = "none"
"""The name of the circuit that has no part."""


class Shares:
    """f of circuits over some examples, and the same over examples that are drawn anew.

    `values` has the metric of each circuit (its columns; `none` among them) in each example, `whole` that of
    the clean run. `ratio` is `means`, of means over the examples, or `median`, of the examples' ratios.

    >>> values = pd.DataFrame({"none": [0.0, 1.0], "some": [1.0, 4.0]})
    >>> shares = Shares(values, pd.Series([2.0, 5.0]))
    >>> float(shares.of("some")), shares.interval(shares.of("some"), shares.drawn(["some"])[:, 0])
    (0.6666666666666666, (nan, nan))
    """

    def __init__(
        self, values: pd.DataFrame, whole: pd.Series[float], ratio: Ratio = "means", seed: int = 0
    ) -> None:
        self.ratio, self.seed, self.names = ratio, seed, {name: n for n, name in enumerate(values.columns)}
        none = values[NONE].to_numpy(dtype=float)
        self.over = values.to_numpy(dtype=float) - none[:, None]
        self.gaps = whole.to_numpy(dtype=float) - none

    def of(self, name: str) -> float:
        """f of one circuit; NaN where there is no gap to carry."""
        return float(self._ratios(np.ones((1, len(self.gaps))), [name])[0, 0])

    def drawn(self, names: Sequence[str]) -> Array:
        """f of circuits `(draws, circuits)`, of the examples drawn anew."""
        return self._ratios(self._weights, names)

    @cached_property
    def _weights(self) -> Array:
        """How often each example is in each draw."""
        many = len(self.gaps)
        return rng(self.seed, "bootstrap").multinomial(many, [1 / many] * many, RESAMPLED).astype(float)

    @property
    def gap(self) -> tuple[float, float, float]:
        """The mean gap m(all) − m(∅), with its interval."""
        drawn = self._weights @ self.gaps / len(self.gaps)
        return float(self.gaps.mean()), *self.interval(float(self.gaps.mean()), drawn)

    @property
    def sure(self) -> bool:
        """Whether there is surely a gap to carry: few enough of the draws have none, or another sign."""
        drawn = self._weights @ self.gaps * np.sign(self.gaps.mean())
        return len(self.gaps) >= FEWEST and bool((drawn <= 0).mean() <= LEVEL / 2)

    def interval(self, value: float, drawn: Array) -> tuple[float, float]:
        """The 95 % interval by percentiles of what is drawn anew: nulls below 10 examples."""
        if len(self.gaps) < FEWEST or not np.isfinite(value) or not np.isfinite(drawn).all():
            return np.nan, np.nan
        low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
        return float(low), float(high)

    def with_ends(self, name: str) -> tuple[float, float, float]:
        """f of one circuit with its interval, which there is where the gap is sure."""
        value = self.of(name)
        return value, *(self.interval(value, self.drawn([name])[:, 0]) if self.sure else (np.nan, np.nan))

    def _ratios(self, weights: Array, names: Sequence[str]) -> Array:
        over = self.over[:, [self.names[name] for name in names]]
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.ratio == "means":
                found = weights @ over / (weights @ self.gaps)[:, None]
            else:
                at = np.flatnonzero(self.gaps)  # an example without a gap has no ratio
                each = over[at] / self.gaps[at, None]
                rows = (np.repeat(each, row[at].astype(int), axis=0) for row in weights)
                found = np.stack([np.median(row, axis=0) for row in rows])
        return np.where(np.isfinite(found), found, np.nan)


def area(fractions: Sequence[float], f: Array) -> Array:
    """The area below f over the sizes, by trapezoids: MIB's CPR; of |1 − f|, its CMD.

    >>> float(area(FRACTIONS, np.ones((1, 10)))[0])
    0.999
    """
    return np.asarray(np.trapezoid(f, np.asarray(fractions), axis=-1)).round(15)


def sizes(fractions: Sequence[float], many: int) -> list[int]:
    """How many of so many parts each fraction is, rounded down as in MIB."""
    return [int(fraction * many) for fraction in fractions]


def random_like(
    circuit: Collection[int], alike: Sequence[Hashable], draw: np.random.Generator
) -> frozenset[int]:
    """As many parts of each layer and kind as a circuit has there, drawn at random; `alike` says of each
    part what that is.

    >>> drawn = random_like([0, 1, 6], ["layer 0"] * 4 + ["layer 1"] * 4, rng(0))
    >>> sorted(n // 4 for n in drawn)
    [0, 0, 1]
    """
    groups: Mapping[Hashable, list[int]] = defaultdict(list)
    for number, group in enumerate(alike):
        groups[group].append(number)
    kept = (sum(number in circuit for number in some) for some in groups.values())
    return frozenset(
        int(number)
        for some, many in zip(groups.values(), kept, strict=True)
        for number in draw.permutation(some)[:many]
    )

"""What is to be measured, and how the circuits come about: ranked by scores, chosen by some runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from vlmscope.data import Examples, listed
from vlmscope.errors import SEED, ModelError, StoreError, VlmscopeError, choice, number, whole
from vlmscope.patching.scores import Metric
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model, check_model
from vlmscope.stored import formats
from vlmscope.studies.circuits import assess
from vlmscope.studies.faithfulness import mib
from vlmscope.studies.faithfulness.curve import FRACTIONS, Ratio, Shares
from vlmscope.studies.faithfulness.measure import (
    Circuits,
    Measured,
    around,
    measured_of,
    on_curve,
    run_unkept,
    study_of,
    values_of,
)
from vlmscope.studies.faithfulness.parts import Edges, Parts, parts_of
from vlmscope.studies.faithfulness.result import Faithful
from vlmscope.studies.faithfulness.scores import Scores, Split, split
from vlmscope.studies.faithfulness.scores import read as read_scores
from vlmscope.studies.faithfulness.summary import (
    areas,
    kinds_of,
    null,
    parts_table,
    reported,
    table_of,
    with_groups,
)
from vlmscope.studies.faithfulness.words import lines
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import read_run
from vlmscope.studies.sweep import Ran, Study
from vlmscope.studies.task import Shard, Task, task_of

Outside = Literal["corrupt", "mean", "zero"]
ENOUGH = 0.8
"""The smallest circuit that carries this share is the one that is reported."""
UNCHOSEN = 0.1
"""Where no example is at hand to choose by, it is the smallest that has this share of the parts."""
CHOOSING = 20
"""Of so many examples with scores the size is chosen, at most."""
Chosen = tuple[frozenset[int], float | None]
"""The parts of the circuit that is reported, and the fraction that it is of the signed ranking, if it is."""


def plan_of(
    model: Model,
    examples: Examples,
    scores: str | os.PathLike[str],
    corrupt: str | Noise | None,
    *,
    outside: Outside,
    metric: str | Metric,
    ratio: Ratio,
    fractions: Sequence[float] = FRACTIONS,
    draws: int,
    seed: int,
    data: str,
    shard: Shard | None = None,
) -> Plan:
    """What `faithfulness` is asked for, checked against the model and the data before anything runs."""
    choice(outside, "outside", get_args(Outside))
    choice(ratio, "ratio", get_args(Ratio))
    draws, seed = whole(draws, "the number of random circuits", 1, 1000), whole(seed, "the seed", most=SEED)
    fractions = _fractions(fractions)
    if corrupt is None and outside == "corrupt":
        raise VlmscopeError(
            "without a corruption there is no other run; name one (--corrupt image, text or noise), or take "
            "--outside mean or zero"
        )
    check_model(model)
    given, corruption = listed(examples), None if corrupt is None else corruptions.parse(corrupt)
    kind = "noise" if isinstance(corruption, Noise) else corruption or "none"
    ranked = read_scores(scores, model, kind, data)
    parted = split(ranked, given, data, seed, CHOOSING)
    means = ranked.table.loc[parted.rows].mean().dropna()
    parts = ranked.edges or parts_of(means.index, model.shapes)
    if ranked.edges and outside != "corrupt":
        raise VlmscopeError(
            "edges outside of a circuit carry what the other run has; leave --outside out, or name scores of "
            "heads and MLPs, which can be mean or zero"
        )
    options: dict[str, Any] = {
        "direction": "noise",
        "metric": metric,
        "patch": "clean" if outside == "corrupt" else outside,
        "seed": seed,
        "answers": ranked.answers,
    }
    task = task_of(model, parted.measured, parts.expressions, corruption, **options, shard=shard)
    choosing = (
        task_of(model, parted.choosing, parts.expressions, corruption, **options) if parted.choosing else None
    )
    means = means.reindex(parts.names, fill_value=0.0)
    order = _order(means, ranked.signed)
    return Plan(task, choosing, ranked, parted, parts, means, order, fractions, draws, ratio, outside, data)


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and how its circuits come about; the same in each process that makes it."""

    task: Task
    choosing: Task | None
    ranked: Scores
    parted: Split
    parts: Parts
    means: pd.Series[float]
    order: dict[str, list[int]]
    fractions: list[float]
    draws: int
    ratio: Ratio
    outside: Outside
    data: str

    @property
    def digest(self) -> str:
        """What decides which circuits there are."""
        ids = [e.id for e in self.parted.choosing]
        words = [
            list(self.means.index),
            self.order,
            self.fractions,
            self.draws,
            self.parted.rows,
            ids,
            self.ratio,
            [*self.parts.groups],
        ]
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def chosen(self, out: str | os.PathLike[str] | None) -> Chosen:
        """The circuit that is reported: that of a folder that is gone on with, or else it is chosen."""
        numbers = {name: number for number, name in enumerate(self.parts.names)}
        if out is not None:
            with suppress(StoreError):
                own = read_run(out).spec.get("circuits") or {}
                if own.get("digest") == self.digest:
                    return frozenset(numbers[name] for name in own["chosen"]), own["fraction"]
        found: Collection[str] | None = self.ranked.circuit
        if found is None and self.ranked.least is not None:
            found = _important(self.ranked.table.loc[self.parted.rows], self.ranked.least)
        return (frozenset(numbers[name] for name in found), None) if found else self._sized()

    def _sized(self) -> Chosen:
        """The smallest circuit of the signed ranking that carries enough, or else the one that carries
        most."""
        many = len(self.parts.names)
        curve = on_curve({"signed": self.order["signed"]}, self.fractions)
        some = {name: circuit for name, circuit in curve.items() if 0 < len(circuit) < many}
        if not some:
            return frozenset(range(many)), 1.0
        sized, choosing = dict(zip(curve, self.fractions, strict=True)), self.choosing
        if choosing is None:  # none of the examples that rank is at hand
            best = next((one for one in some if sized[one] >= UNCHOSEN), [*some][-1])
        else:
            values, base = run_unkept(measured_of(choosing, self.parts, {"none": frozenset(), **some}))
            sign = -1.0 if choosing.metric == "kl" else 1.0
            shares = Shares(sign * values, sign * base["value_clean"], self.ratio)
            carried = {name: np.nan_to_num(shares.of(name), nan=-np.inf) for name in some}
            most = max(carried, key=carried.__getitem__)
            best = next((name for name, f in carried.items() if f >= ENOUGH), most)
        return self.parts.pruned(some[best]), sized[best]

    @property
    def curve(self) -> Circuits:
        return on_curve(self.order, self.fractions)

    def measured(self, chosen: Chosen) -> Measured:
        circuits = around(chosen[0], self.curve, self.parts, self.draws, self.task.seed)
        return measured_of(self.task, self.parts, circuits)

    def study(self, chosen: Chosen) -> Study:
        names = [self.parts.names[n] for n in sorted(chosen[0])]
        own = {"digest": self.digest, "chosen": names, "fraction": chosen[1]}
        return study_of(self.measured(chosen), self.data, {"circuits": own})

    def found(self, chosen: Chosen, ran: Ran) -> Faithful:
        """What the runs say."""
        circuit, fraction = chosen
        task, model, parts, curve = self.measured(chosen), self.task.model, self.parts, self.curve
        values, base = values_of(task, ran.base, ran.rows)
        sign = -1.0 if task.metric == "kl" else 1.0
        shares = Shares(sign * values, sign * base["value_clean"], self.ratio, task.seed)
        table = table_of(shares, self.order, self.fractions, curve, task.circuits)
        named = self.means.iloc[sorted(circuit)]
        summary = {
            "format": formats.FAITHFULNESS.name,
            "model": model.name,
            "weights": model.fingerprint(),
            "data": self.data,
            "corrupt": task.kind,
            "outside": self.outside,
            "metric": task.metric if isinstance(task.metric, str) else task.metric.__qualname__,
            "ratio": self.ratio,
            **_of_scores(self.ranked, self.parted),
            "parts": len(parts.names),
            **_of_runs(shares, base, sign),
            **areas(shares, self.order, self.fractions, curve),
            "circuit": reported(shares, circuit, fraction, task.circuits, knows(base).severity),
            "kinds": kinds_of(parts, circuit),
            "groups": with_groups(shares, parts),
            "check": ran.check,
            "seed": task.seed,
        }
        summary["lines"] = [*lines(summary)]
        rows = parts_table(shares, named, parts, circuit)
        return Faithful(table, rows, summary, _importances(model, parts, self.means, named))


def _fractions(given: Sequence[float]) -> list[float]:
    # Parts are called by six digits of their fraction.
    fractions = sorted({float(f"{number(one, 'a fraction', 0, 1):g}") for one in given})
    if len(fractions) < 2:
        raise VlmscopeError("one fraction is no curve; expected at least two, such as 0.1 and 1")
    return fractions


def _of_scores(ranked: Scores, parted: Split) -> dict[str, Any]:
    """What ranked the parts, and whether other examples are measured."""
    return {
        "scores": ranked.what,
        "signed": ranked.signed,
        "ranked_on": None if ranked.digests is None else len(parted.rows),
        "held_out": parted.held_out,
    }


def _of_runs(shares: Shares, base: pd.DataFrame, sign: float) -> dict[str, Any]:
    """How many examples are measured, what there is to carry, and whether the model knows the task."""
    return {
        "measured": len(base),
        "gap": dict(zip(("value", "low", "high"), map(null, shares.gap), strict=True)),
        "gap_of_runs": null(float((base["value_clean"] - base["value_corrupt"]).mean() * sign)),
        "known": knows(base)._asdict(),
    }


def _order(means: pd.Series[float], signed: bool) -> dict[str, list[int]]:
    """The parts from the best on, by each ranking; scores without a sign have the same in both."""
    values = means.to_numpy(dtype=float)
    sizes = np.abs(values)
    both = {"signed": values if signed else sizes, "absolute": sizes}
    return {name: np.argsort(-score, kind="stable").tolist() for name, score in both.items()}


def _important(table: pd.DataFrame, least: float) -> list[str]:
    """The heads that `circuits` finds on these examples, each tower and kind by itself."""
    kinds = [".".join(np.array(name.split("."))[[0, 2]]) for name in table.columns]
    found: list[str] = []
    for kind in dict.fromkeys(kinds):
        some = table[[name for name, of in zip(table.columns, kinds, strict=True) if of == kind]]
        scores = some.to_numpy(dtype=float)
        if len(scores) > 1:
            important = assess(scores, list(some.index), least=least)["important"]
            found += [str(name) for name, yes in zip(some.columns, important, strict=True) if yes]
    return found


def _importances(model: Model, parts: Parts, means: pd.Series[float], named: pd.Series[float]) -> str | None:
    scores = {str(name): score for name, score in means.items()}
    with suppress(ModelError):  # a part that MIB has no name for
        return mib.written(model, scores, set(named.index), parts if isinstance(parts, Edges) else None)
    return None

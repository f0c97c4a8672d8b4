"""Is this circuit enough? How much of a behaviour some parts carry when all others are another run's.

Parts are ranked by scores of some examples; circuits of the best are run on others, beside random circuits
of the same sizes from the same layers (MIB, arXiv 2504.13151).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from vlmscope import files, stored
from vlmscope.data import Examples, listed
from vlmscope.errors import SEED, ModelError, StoreError, VlmscopeError, number, shown, whole
from vlmscope.patching.scores import Metric
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.stored import formats
from vlmscope.studies.circuits import assess
from vlmscope.studies.faithfulness import mib
from vlmscope.studies.faithfulness.curve import FRACTIONS, Ratio, Shares
from vlmscope.studies.faithfulness.measure import around, measured_of, on_curve, run_all, run_unkept
from vlmscope.studies.faithfulness.parts import Edges, Parts, parts_of
from vlmscope.studies.faithfulness.scores import Scores, Split, split
from vlmscope.studies.faithfulness.scores import read as read_scores
from vlmscope.studies.faithfulness.summary import areas, null, parts_table, reported, table_of
from vlmscope.studies.faithfulness.words import lines
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import read_run
from vlmscope.studies.task import Task, task_of

FORMAT = "vlmscope-faithfulness-1"
MANIFEST = "summary.json"
NAMES = ("faithfulness.parquet", "circuit.csv", "importances.json")
Outside = Literal["corrupt", "mean", "zero"]
ENOUGH = 0.8
"""The smallest circuit that carries this share is the one that is reported."""
UNCHOSEN = 0.1
"""Where no example is at hand to choose by, it is the smallest that has this share of the parts."""
CHOOSING = 20
"""Of so many examples with scores the size is chosen, at most."""


@dataclass(frozen=True)
class Faithful:
    """How much circuits carry.

    `table` has a row a ranking and size (columns `summary.COLUMNS`), `circuit` a row for each part of the
    circuit that is reported, `summary` what is said of it, `cpr` and `cmd`; `importances` are all scores in
    MIB's format, where that has names for all parts.
    """

    table: pd.DataFrame
    circuit: pd.DataFrame
    summary: dict[str, Any] = field(repr=False)
    importances: str | None = field(default=None, repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `faithfulness.parquet`, `circuit.csv`, `importances.json` and, last, `summary.json`."""
        content: dict[str, Any] = {"faithfulness.parquet": self.table, "circuit.csv": self.circuit}
        content |= {"importances.json": self.importances} if self.importances else {}
        files.save(folder, MANIFEST, self.summary, content)

    @staticmethod
    def claim(folder: str | os.PathLike[str]) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        files.claim(folder, MANIFEST, FORMAT, NAMES)

    def lines(self) -> list[str]:
        """What was found, in words; the last line is of the circuit."""
        return lines(self.summary)


def read(folder: str | os.PathLike[str]) -> Faithful:
    """What `Faithful.save` has written; raises `StoreError` where that is not all there."""
    path = Path(folder)
    about, tables = stored.read(path, formats.FAITHFULNESS)
    file = path / "importances.json"
    text = files.read(file, "a file of importances", StoreError, within=path) if file.exists() else None
    return Faithful(tables["faithfulness"], tables["circuit"], about, None if text is None else text.decode())


def faithfulness(
    model: Model,
    examples: Examples,
    scores: str | os.PathLike[str],
    corrupt: str | Noise | None = "image",
    *,
    outside: Outside = "corrupt",
    metric: str | Metric = "ld",
    ratio: Ratio = "means",
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 20,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    data: str = "examples",
) -> Faithful:
    """How much of the clean run's behaviour the best parts carry, when all others have another run's values.

    `scores` is a run folder of `sweep`, `attribute` or `edges`, a folder of `circuits` (the important heads
    are the circuit, found anew on the examples that rank), or a JSON file of importances as in MIB. Its parts
    are heads, neurons and sublayers, at all positions (scores are summed over positions); what it does not
    score is no part, and computes freely. In the clean run each part outside of a circuit has its activation
    of the corrupt run, or the `mean` over the examples that are measured at the same slot, or `zero`.

    Of a folder of `edges` (and where a file has scores of edges and none of nodes) the parts are edges: what
    reads gets the sum of what its edges in the circuit carry as they are in this very run, and of what all
    others carry in the corrupt run (`patching.edge_circuits`); there is no `mean` and no `zero` of these.

    Of a circuit C, f = (m(C) − m(∅)) / (m(all) − m(∅)), m the mean of `metric` over the examples; with
    `ratio` median, the median of the examples' ratios. A size is a share of all parts. `signed` ranks by the
    score, `absolute` by its size; `cpr` is the area below f of the former, `cmd` that of |1 − f| of the
    latter. `random` is the mean f of up to 5 circuits that have as many parts of each layer and kind, drawn
    at random, `random_low` and `random_high` the least and the most of these. `low`, `high`: 95 % intervals
    over examples (`curve.Shares`), null below 10 examples and where m(all) − m(∅) is not surely there.

    No example both ranks and is measured. Where 10 of the `examples` have no scores, these are measured, and
    all scores rank; else those with scores are halved. What an importance file was made on is not known.

    One circuit is reported: the one that is given, or the smallest of the signed ranking that carries 80 % on
    (up to 20) examples that are not measured, else the one that carries most; without such examples, the one
    with a tenth of the parts. Of edges it is without those that are on no way from what enters to the end,
    which change nothing. `summary["circuit"]` has its f, that of all parts but it (`without`), and `draws`
    random circuits of its size; it `passes` if f is surely more than theirs on average, at most 5 % of theirs
    are as large (`p_value`), and there is a behaviour: the gap is surely there, and the model knows the task
    (`known.knows`). With at most 20 parts, `circuit` says what f loses without each (`drop`); `needed` counts
    those that surely lose something.

    With `out`, what is measured is kept in a run folder as it is computed, and called again it goes on.
    Raises `StoreError` for scores of another model, data or corruption, and for a folder of another run,
    `DataError` where there are too few examples for halves, `ModelError` for edges of a model that has none.

    >>> import tempfile, vlmscope
    >>> model, states = vlmscope.load("toy-blip"), vlmscope.examples("states", limit=12)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     heads = ["encoder.*.cross.h*@all", "decoder.*.cross.h*@all"]
    ...     table = vlmscope.sweep(model, states, heads, "image", out=folder)
    ...     found = faithfulness(model, states, folder, "image", draws=1)
    >>> found.table.query("ranking == 'signed' and kept == 24")["f"].tolist(), found.summary["measured"]
    ([1.0], 6)
    """
    _check_choice("outside", outside, Outside)
    _check_choice("ratio", ratio, Ratio)
    draws, seed = whole(draws, "the number of random circuits", 1, 1000), whole(seed, "the seed", most=SEED)
    fractions = _fractions(fractions)
    if out is not None:
        Faithful.claim(out)
    if corrupt is None and outside == "corrupt":
        raise VlmscopeError(
            "without a corruption there is no other run; name one (--corrupt image, text or noise), or take "
            "--outside mean or zero"
        )
    if not isinstance(model, Model):
        raise VlmscopeError(f"the model is {shown(model)}; expected a Model, as vlmscope.load gives it")
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
    means = means.reindex(parts.names, fill_value=0.0)
    options: dict[str, Any] = {
        "direction": "noise",
        "metric": metric,
        "patch": "clean" if outside == "corrupt" else outside,
        "seed": seed,
    }
    task = task_of(model, parted.measured, parts.expressions, corruption, **options)
    order = _order(means, ranked.signed)
    digest = _digest(means, order, fractions, draws, parted, ratio)
    known = None if out is None else _known(out, digest, parts)
    if known is None:
        choosing = (
            task_of(model, parted.choosing, parts.expressions, corruption, **options)
            if parted.choosing
            else None
        )
        known = _chosen(ranked, parted, parts, order, fractions, choosing, ratio)
    chosen, fraction = known
    curve = on_curve(order, fractions)
    task = measured_of(task, parts, around(chosen, curve, parts, draws, seed))
    own = {"digest": digest, "chosen": [parts.names[n] for n in sorted(chosen)], "fraction": fraction}
    values, base, check = run_all(task, out, data, {"circuits": own})
    sign = -1.0 if metric == "kl" else 1.0
    shares = Shares(sign * values, sign * base["value_clean"], ratio, seed)
    table = table_of(shares, order, fractions, curve, task.circuits)
    named = means.iloc[sorted(chosen)]
    summary = {
        "format": FORMAT,
        "model": model.name,
        "weights": model.fingerprint(),
        "data": data,
        "corrupt": kind,
        "outside": outside,
        "metric": metric if isinstance(metric, str) else metric.__qualname__,
        "ratio": ratio,
        **_of_scores(ranked, parted),
        "parts": len(parts.names),
        **_of_runs(shares, base, sign),
        **areas(shares, order, fractions, curve),
        "circuit": reported(shares, chosen, fraction, task.circuits, knows(base).severity),
        "kinds": dict(Counter(parts.nouns[n] for n in sorted(chosen))),
        "check": check,
        "seed": seed,
    }
    summary["lines"] = lines(summary)
    found = Faithful(
        table, parts_table(shares, named, parts, chosen), summary, _importances(model, parts, means, named)
    )
    if out is not None:
        found.save(out)
    return found


def _check_choice(what: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise VlmscopeError(f"unknown {what} {shown(value)}; expected {', '.join(get_args(choices))}")


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


def _digest(
    means: pd.Series[float],
    order: Mapping[str, Sequence[int]],
    fractions: Sequence[float],
    draws: int,
    parted: Split,
    ratio: str,
) -> str:
    """What decides which circuits there are."""
    words = [list(means.index), order, fractions, draws, parted.rows, [e.id for e in parted.choosing], ratio]
    return hashlib.sha256(repr(words).encode()).hexdigest()


def _known(
    out: str | os.PathLike[str], digest: str, parts: Parts
) -> tuple[frozenset[int], float | None] | None:
    """The chosen circuit of a folder that is gone on with."""
    numbers = {name: number for number, name in enumerate(parts.names)}
    with suppress(StoreError):
        own = read_run(out).spec.get("circuits") or {}
        if own.get("digest") == digest:
            return frozenset(numbers[name] for name in own["chosen"]), own["fraction"]
    return None


def _chosen(
    ranked: Scores,
    parted: Split,
    parts: Parts,
    order: Mapping[str, Sequence[int]],
    fractions: Sequence[float],
    choosing: Task | None,
    ratio: Ratio,
) -> tuple[frozenset[int], float | None]:
    """The circuit that is reported, and the fraction that it is of the signed ranking, if it is one."""
    numbers = {name: number for number, name in enumerate(parts.names)}
    if ranked.circuit is not None:
        return frozenset(numbers[name] for name in ranked.circuit), None
    if ranked.least is not None:
        found = _important(ranked.table.loc[parted.rows], ranked.least)
        if found:
            return frozenset(numbers[name] for name in found), None
    curve = on_curve({"signed": order["signed"]}, fractions)
    some = {name: circuit for name, circuit in curve.items() if 0 < len(circuit) < len(numbers)}
    if not some:
        return frozenset(range(len(numbers))), 1.0
    sized = dict(zip(curve, fractions, strict=True))
    if choosing is None:  # none of the examples that rank is at hand
        name = next((one for one in some if sized[one] >= UNCHOSEN), [*some][-1])
        return parts.pruned(some[name]), sized[name]
    values, base = run_unkept(measured_of(choosing, parts, {"none": frozenset(), **some}))
    sign = -1.0 if choosing.metric == "kl" else 1.0
    shares = Shares(sign * values, sign * base["value_clean"], ratio)
    carried = {name: np.nan_to_num(shares.of(name), nan=-np.inf) for name in some}
    best = next((name for name, f in carried.items() if f >= ENOUGH), max(carried, key=carried.__getitem__))
    return parts.pruned(some[best]), sized[best]


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

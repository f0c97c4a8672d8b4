"""The runs of circuits over examples: which there are, into a run folder or a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.data.example import Example
from vlmscope.models.inputs import Pair
from vlmscope.patching import reference
from vlmscope.patching.trace import Images
from vlmscope.sites import Site
from vlmscope.stats import rng
from vlmscope.studies.faithfulness.curve import NONE, random_like, sizes
from vlmscope.studies.faithfulness.parts import Edges, Nodes, Parts
from vlmscope.studies.known import warn_of_excluded
from vlmscope.studies.recheck import RowsOf, drawn_examples, verdict
from vlmscope.studies.rows import add_scores, answer_of, result_of
from vlmscope.studies.run_folder import MEASURED
from vlmscope.studies.run_writer import Todo
from vlmscope.studies.sweep import Study, in_memory
from vlmscope.studies.task import Result, Task, spec_of

RECOMPUTED = 3
"""Examples in which plain forwards recompute a circuit."""
ON_CURVE = 5
"""Random circuits of each size on the curve, at most."""
SMALL = 20
"""A circuit of so many parts has each of them taken out."""
Circuits = dict[str, frozenset[int]]
"""The parts that circuits keep, by the circuits' names."""


@dataclass(frozen=True)
class Measured(Task):
    """What decides which circuits are run, and what these are made of."""

    parts: Parts = field(default_factory=lambda: Nodes([], []))
    circuits: Circuits = field(default_factory=dict)


def measured_of(task: Task, parts: Parts, circuits: Circuits) -> Measured:
    """A task with circuits; those that keep the same parts are run once."""
    own = {each.name: getattr(task, each.name) for each in fields(Task)}
    return Measured(**own, parts=parts, circuits=circuits)


def on_curve(order: Mapping[str, Sequence[int]], fractions: Sequence[float]) -> Circuits:
    """The first parts of each ranking, a circuit a size."""
    return {
        f"{ranking} {fraction:g}": frozenset(numbers[:many])
        for ranking, numbers in order.items()
        for fraction, many in zip(fractions, sizes(fractions, len(numbers)), strict=True)
    }


def around(chosen: frozenset[int], curve: Circuits, parts: Parts, draws: int, seed: int) -> Circuits:
    """What stands beside circuits: none, all but the chosen one, random ones, it without each part, and with
    all parts of a group, beside these alone."""
    found: Circuits = {NONE: frozenset(), "chosen": chosen, **curve}
    alike = parts.alike
    found["without"] = frozenset(range(len(alike))) - chosen
    for name, circuit in [("chosen", chosen), *curve.items()]:
        if 0 < len(circuit) < len(alike):
            for n in range(draws if name == "chosen" else min(draws, ON_CURVE)):
                drawn = random_like(circuit, alike, rng(seed, "random circuit", sorted(circuit), n))
                found[f"random {n} like {name}"] = drawn
    if 0 < len(chosen) <= SMALL:
        found |= {f"less {number}": chosen - {number} for number in sorted(chosen)}
    for name, group in parts.groups.items():
        found |= {f"with {name}": chosen | group, f"only {name}": group}
    return found


def study_of(task: Measured, data: str, more: Mapping[str, Any]) -> Study:
    """The runs of the circuits; `more` is what else has to be the same where a folder goes on."""
    return Study(task, MEASURED, measured, partial(_check, task), lambda: spec_of(task, data) | dict(more))


def run_unkept(task: Measured) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`values_of` a few circuits, which nothing is kept of."""
    return values_of(task, *in_memory(task, measured, quiet=True))


def values_of(task: Measured, base: pd.DataFrame, rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The metric of each circuit, examples × circuits, and the baselines of these examples."""
    warn_of_excluded(base)
    base = base[~base["excluded"].astype(bool) & base["example"].isin(task.ids)].reset_index(drop=True)
    table = rows.pivot_table("value", "example", "circuit", sort=False).reindex(base["example"])
    columns = {name: table[of] for name, of in _names(task.circuits).items()}
    return pd.DataFrame(columns).reset_index(drop=True), base


def _names(circuits: Circuits) -> dict[str, str]:
    """By which name the row of each circuit goes: the first of those that keep the same parts."""
    first: dict[frozenset[int], str] = {}
    return {name: first.setdefault(circuit, name) for name, circuit in circuits.items()}


def measured(task: Task, job: Todo, sites: Sequence[Site], step: Callable[[int, float], None]) -> Result:
    """The rows of one example: means over its pairs."""
    assert isinstance(task, Measured)
    example = task.examples[job.number]
    pairs = task.pairs(example)
    names = list(dict.fromkeys(_names(task.circuits).values()))
    totals, base = _runs(task, example, pairs, [task.circuits[name] for name in names], step)
    common = {"example": example.id, "corruption": task.kind}
    rows = [
        {**common, "circuit": name, "p": p, "ld": ld, "value": value}
        for name, (p, ld, value) in zip(names, totals.tolist(), strict=True)
    ]
    return result_of(task, job, rows, pairs[0], {**base, **answer_of(task, job, example, pairs[0])})


def _runs(
    task: Measured,
    example: Example,
    pairs: Sequence[Pair],
    circuits: Sequence[frozenset[int]],
    step: Callable[[int, float], None] = lambda many, part: None,
    **options: Any,
) -> tuple[np.ndarray[Any, Any], dict[str, float]]:
    """P(answer), LD and the metric of circuits in one example, and of the runs without patches."""
    images = Images()
    totals, base = np.zeros((len(circuits), 3)), defaultdict[str, float](float)
    for number, pair in enumerate(pairs):
        clean, corrupt, found = task.parts.run(task, example, pair, circuits, images, **options)
        totals += found.numpy() / len(pairs)
        add_scores(base, clean, corrupt, len(pairs))
        step(len(circuits), (number + 1) / len(pairs))
    return totals, dict(base)


def _check(task: Measured, base: pd.DataFrame, rows_of: RowsOf) -> dict[str, Any] | None:
    """One circuit of some examples against plain forwards: the chosen one of nodes, with the edits; of edges
    the one that has none, which is the corrupt run."""
    of_edges, drawn = isinstance(task.parts, Edges), drawn_examples(task, RECOMPUTED, base)
    of = NONE if of_edges else "chosen"
    rows = rows_of(task.ids)
    found = rows[rows["circuit"] == _names(task.circuits)[of]].set_index("example")["value"]
    corrupt, largest = base.set_index("example")["value_corrupt"], 0.0
    for name, example in drawn.items():
        if of_edges:
            again = corrupt[name]
        else:
            again = _runs(task, example, task.pairs(example), [task.circuits[of]], way=reference)[0][0, 2]
        largest = max(largest, abs(float(again) - found[name]))
    said = f"a circuit was recomputed by plain forwards in {len(drawn)} examples and differs"
    return verdict(task, len(drawn), largest, rows["value"], said) if drawn else None

"""Is this circuit enough? How much of a behaviour some parts carry when all others are another run's.

Parts are ranked by scores of some examples; circuits of the best are run on others, beside random circuits
of the same sizes from the same layers (MIB, arXiv 2504.13151).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmscope.data import Examples
from vlmscope.patching.scores import Metric
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.studies.faithfulness.curve import FRACTIONS, Ratio
from vlmscope.studies.faithfulness.plan import Chosen, Outside, Plan, plan_of
from vlmscope.studies.faithfulness.result import Faithful as Faithful
from vlmscope.studies.faithfulness.result import read as read
from vlmscope.studies.run_folder import read_run
from vlmscope.studies.sweep import Study, in_folder, run_study
from vlmscope.studies.workers.orders import Given
from vlmscope.studies.workers.team import Team
from vlmscope.studies.workers.worker import Alone


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
    if out is not None:
        Faithful.claim(out)
    options: dict[str, Any] = {"outside": outside, "metric": metric, "ratio": ratio, "fractions": fractions}
    asked = plan_of(model, examples, scores, corrupt, **options, draws=draws, seed=seed, data=data)
    chosen = asked.chosen(out)
    found = asked.found(chosen, run_study(asked.study(chosen), out))
    if out is not None:
        found.save(out)
    return found


@dataclass(frozen=True)
class Asked:
    """What each process of a team is given: what `faithfulness` is, without `out`, and with a `shard`."""

    given: Given
    options: dict[str, Any]

    def load(self) -> Model:
        return self.model

    def examples(self) -> Plan:
        return self.plan

    @cached_property
    def model(self) -> Model:
        return self.given.load()

    @cached_property
    def plan(self) -> Plan:
        examples = self.given.examples()
        return plan_of(self.model, examples, **self.options)

    def chosen(self, out: Path) -> Chosen:
        return self.plan.chosen(out)

    def found(self, chosen: Chosen, run: Path) -> Faithful:
        return self.plan.found(chosen, in_folder(read_run(run)))


def faithful_by(team: Alone | Team, out: Path) -> Faithful:
    """`faithfulness` into the folder `out`, by processes that are given what is `Asked`: one of them chooses
    the circuit, all run circuits, example by example, and one says what was found."""
    Faithful.claim(out)
    [chosen] = team.each([(Asked.chosen, out)])
    run, _ = team.fill(out, _study, {"chosen": chosen})
    [found] = team.each([(Asked.found, chosen, run.path)])
    found.save(out)
    return found  # type: ignore[no-any-return]


def _study(model: Model, asked: Plan, *, chosen: Chosen) -> Study:
    return asked.study(chosen)

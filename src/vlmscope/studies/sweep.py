"""The one loop: examples × sites, into a table or a run folder; every run checks itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from vlmscope.data import Examples
from vlmscope.errors import ExampleError, whole
from vlmscope.patching import reference
from vlmscope.patching.scores import Metric
from vlmscope.patching.sources import Source
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern, Site, Sites
from vlmscope.stats import rng
from vlmscope.studies.known import warn_of_excluded
from vlmscope.studies.recheck import CHECKED, RowsOf, drawn_examples, verdict
from vlmscope.studies.rows import Work, patch_example, patched, run_jobs
from vlmscope.studies.run_folder import BASELINES, CROSSED, EFFECTS, Run, read_run, typed
from vlmscope.studies.run_writer import Todo, add_pictures, open_run
from vlmscope.studies.task import Shard, Task, all_jobs, description_of, spec_of, task_of

Direction = Literal["denoise", "noise"]
Engine = Literal["fast", "reference"]

SHOWN = 4
"""How many examples a run folder keeps to look at."""


def sweep(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = "image",
    *,
    direction: Direction = "denoise",
    engine: Engine = "fast",
    metric: str | Metric = "ld",
    patch: Source = "clean",
    source: str | Pattern | Site | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    data: str = "examples",
    check: int = CHECKED,
    shard: Shard | None = None,
) -> pd.DataFrame:
    """Patch every site of every example; one row a patch (columns as in `run_folder.EFFECTS`).

    `examples` are a list of them, a single one, or the name of a built-in set or a CSV file. `corrupt`
    is `image`, `text`, `noise` or a `Noise`. `denoise` copies clean activations into the corrupt run,
    `noise` corrupt ones into the clean run; the columns mean the same in both:
    `logit_diff` = LD(patched) − LD(corrupt), so a noising patch that changes nothing has the
    effect 1. Examples that cannot be run are left out with a warning.

    `metric` is what `effect` is of, and what stands in `value`: `ld`; `p`; `logprob`, of the whole answer,
    token by token, for which no foil is needed; `kl` from the clean run's next-token distribution; or a
    function `(logits, baselines) -> values` of `(rows, vocabulary)` logits at the read-out position
    (`patching.scores`). `patch` is what is written: `clean`, the other run's activation, or, into the clean
    run, `zero`, the `mean` over the examples at the same slot, or `resample`, another example's. With these
    `corrupt` may be None.

    `source` is the site that values come from, where it is another than they go to: a later layer's stream
    at an earlier one (back-patching, arXiv 2506.09047), or any place whose shape agrees. Every place that it
    names goes into every one of `sites`, patterns of positions (`image*`) one by one, and the table has a
    column more, `source_site`. Where nothing is corrupted (None), values are from the example's own run.

    `check` random rows are recomputed by `reference`, one plain forward each; `attrs["check"]` says how many
    (`rows`) and the `largest` difference of the metric.

    With `out`, the table is written to a run folder as it is computed; called again with the same
    arguments, it goes on where it stopped, and with more examples or sites these are added. `data` is the
    name of the examples in that folder.

    `shard`, such as (1, 4), runs every fourth example, from the first on: what four processes or machines
    share. `studies.merge.merge` makes one run of their folders, equal to that of a single process.

    Raises `SiteError` for a site that this model or this data does not have, `StoreError` for a
    folder of another run, `DataError` if no example at all can be run, or there are none.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> table = sweep(model, vlmscope.examples("states", limit=1), "encoder.*.cross.h*@answer")
    >>> len(table), table.columns[0], table.attrs["check"]["rows"]
    (12, 'example', 5)
    """
    options: dict[str, Any] = {"direction": direction, "engine": engine, "metric": metric, "patch": patch}
    options |= {"source": source, "seed": seed, "data": data, "check": check, "shard": shard}
    return table_of(swept(model, examples, sites, corrupt, **options), out)


def swept(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = "image",
    *,
    source: str | Pattern | Site | None = None,
    data: str = "examples",
    check: int = CHECKED,
    **options: Any,
) -> Study:
    """What `sweep`, with the same arguments, puts into a folder; raises what it raises.

    With `select`, only examples are patched that the model answers rightly (by its own generation,
    compared by `scores.agrees`) and whose answer follows the corruption: it becomes the foil when
    the image is the foil's, and is no longer the answer when the text or noise is what corrupts.
    The others stay in `baselines` as excluded, with what the model answered.
    """
    return study_of(task_of(model, examples, sites, corrupt, source, **options), data, check)


def baselines(
    model: Model, examples: Examples, corrupt: str | Noise = "image", *, seed: int = 0
) -> pd.DataFrame:
    """How the model does on each example, clean and corrupt (columns as in `run_folder.BASELINES`).

    `predicted` is the model's own generation on the clean input; `correct` compares it with the
    answer, by `scores.agrees`.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> table = baselines(model, vlmscope.examples("states", limit=2))
    >>> table["correct"].tolist()
    [True, True]
    """
    base, _ = in_memory(task_of(model, examples, [], corrupt, seed=seed), patched)
    return typed(base, BASELINES)


class Ran(NamedTuple):
    """What a study has found: a row an example, a row a patch (or what it is about), and what its check says
    of these."""

    base: pd.DataFrame
    rows: pd.DataFrame
    check: dict[str, Any] | None


@dataclass(frozen=True)
class Study:
    """What is to be computed: of which task, the columns of its rows, who computes an example, and what looks
    at all of it: `check` at random rows (it is given the table of examples, and what reads the rows of some).

    For a folder: what makes its specification, and what writes what else is made of the whole table.
    """

    task: Task
    columns: pa.Schema
    work: Work
    check: Callable[[pd.DataFrame, RowsOf], dict[str, Any] | None]
    specify: Callable[[], dict[str, Any]]
    write_beside: Callable[[Run], None] = lambda run: None

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What has to be the same where a folder goes on."""
        return self.specify()

    def finish(self, run: Run) -> dict[str, Any] | None:
        """What comes behind the last example of a folder: what its check finds."""
        self.write_beside(run)
        return self.check(run.baselines(), lambda ids: run.rows(pc.field("example").isin([*ids])))


def study_of(
    task: Task,
    data: str,
    check: int,
    more: Mapping[str, Any] | None = None,
    write_beside: Callable[[Run], None] = lambda run: None,
) -> Study:
    """Patches, of which some random rows are recomputed; `more` is what else has to be the same where a
    folder goes on."""
    columns = EFFECTS if task.source is None else CROSSED
    check = whole(check, "the number of rows to check")
    return Study(
        task,
        columns,
        patched,
        partial(_check, task, check),
        lambda: spec_of(task, data) | dict(more or {}),
        write_beside,
    )


def table_of(study: Study, out: str | os.PathLike[str] | None) -> pd.DataFrame:
    """The rows of a study, by way of a run folder where one is named."""
    base, table, check = run_study(study, out)
    warn_of_excluded(base)
    table.attrs["check"] = check
    return table


def run_study(study: Study, out: str | os.PathLike[str] | None) -> Ran:
    """Compute a study, into a run folder where one is named."""
    if out is not None:
        return in_folder(into_folder(study, out))
    base, rows = in_memory(study.task, study.work)
    table = typed(rows, study.columns)
    return Ran(base, table, study.check(base, lambda ids: table[table["example"].isin(ids)]))


def in_folder(run: Run) -> Ran:
    """What a run folder holds."""
    return Ran(run.baselines(), run.rows(), run.check)


def in_memory(task: Task, work: Work, quiet: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of examples, and that of their rows."""
    results = list(run_jobs(task, all_jobs(task), quiet=quiet, work=work))
    return (
        pd.concat([result.baseline for result in results], ignore_index=True),
        pd.concat([result.rows for result in results], ignore_index=True),
    )


def into_folder(study: Study, out: str | os.PathLike[str]) -> Run:
    """Compute what the folder does not hold yet, and keep what the check finds of it."""
    task = study.task
    with open_run(out, study.spec, description_of(task.model), digests=task.digests) as writer:
        jobs = writer.todo(task.numbers, task.sites)
        for result in run_jobs(task, jobs, len(task.numbers) - len(jobs), work=study.work):
            show(out, task, result.job)  # before the example is committed: it is not run again
            writer.add(result.job.number, result.rows, result.baseline, result.job.sites)
        writer.flush()
        if jobs or not writer.is_checked:
            found = study.finish(read_run(out))
            if found is not None:
                writer.keep_check(found)
        writer.finish()
    return read_run(out)


def show(out: str | os.PathLike[str], task: Task, job: Todo) -> None:
    """Keep what a person wants to see of the first examples: what this corruption uses, as the model sees
    it."""
    number = job.number
    if number >= SHOWN or job.done:
        return
    shown = dict(vars(task.examples[number]))
    for kind, name in (("image", "corrupt_image"), ("text", "corrupt_prompt")):
        if task.corruption != kind:
            shown[name] = None
    with suppress(ExampleError):  # the example is excluded, with this reason
        for name in ("clean_image", "corrupt_image"):
            shown[name] = shown[name] and task.model.cropped(shown[name])
        add_pictures(Path(out), number, shown)


def _check(task: Task, count: int, base: pd.DataFrame, rows_of: RowsOf) -> dict[str, Any] | None:
    """Recompute random rows, spread over kinds and examples, by plain forwards; None if there are none."""
    if count < 1 or task.engine == "reference" or not (drawn := drawn_examples(task, count, base)):
        return None
    draw = rng(task.seed, "check", "rows")
    rows = rows_of(drawn)
    if task.source is None:
        rows = rows.assign(source_site=rows["site"])
    rows = rows[np.isfinite(rows["value"])].drop_duplicates(["example", "site", "source_site"])
    if rows.empty:
        return None
    rows = rows.iloc[draw.permutation(len(rows))]
    kinds = [rows["tower"], rows["kind"], rows["unit"].astype("string").str.get(0).fillna("")]
    turns = pd.DataFrame({"kind": rows.groupby(kinds).cumcount(), "of": rows.groupby("example").cumcount()})
    rows = rows.loc[turns.sort_values(["kind", "of"], kind="stable").index[:count]]
    largest = 0.0
    for (name, source), some in rows.groupby(["example", "source_site"], sort=False):
        example = drawn[str(name)]
        sites, origin = some["site"].tolist(), None if task.source is None else str(source)
        again, _ = patch_example(task, example, task.pairs(example), sites, reference.patch, source=origin)
        apart = np.array([row["value"] for row in again]) - some["value"].to_numpy()
        largest = max(largest, float(np.abs(apart).max()))
    said = f"{len(rows)} random rows were recomputed by plain forwards and differ"
    way_out = ", and compute it anew with --engine reference"
    return verdict(task, len(rows), largest, rows["value"], said, way_out)

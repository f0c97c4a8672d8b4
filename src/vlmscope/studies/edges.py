"""Which part feeds which: the edges of a tower scored over examples, and some patched exactly beside them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from vlmscope import files
from vlmscope.data import Examples
from vlmscope.data.example import Example
from vlmscope.errors import VlmscopeError, choice, whole
from vlmscope.models.inputs import Pair
from vlmscope.patching import engine
from vlmscope.patching.backward import check_network
from vlmscope.patching.edge_patches import exact
from vlmscope.patching.edges import METHODS, Method, score_edges
from vlmscope.patching.gradients import STEPS
from vlmscope.patching.graph import Edge, Graph, check_tower
from vlmscope.patching.scores import Metric, Score
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.sites import Site
from vlmscope.studies.agreement import agreement
from vlmscope.studies.edge_tables import by_reader, over_examples
from vlmscope.studies.gradients import to_verify
from vlmscope.studies.recheck import RowsOf, check_exact
from vlmscope.studies.rows import add_scores, answer_of, result_of
from vlmscope.studies.run_folder import EDGES, Run, parquet_of
from vlmscope.studies.run_writer import Todo
from vlmscope.studies.sweep import Direction, Study, table_of
from vlmscope.studies.task import Result, Shard, Task, spec_of, task_of

Array = NDArray[np.float64]
MOST = 100_000
"""Edges of a kind of reader and example that are verified, at most."""


@dataclass(frozen=True)
class EdgeTask(Task):
    """What decides what is in a table of `edges`."""

    method: Method = "eap"
    verify: int = 0
    steps: int | None = None
    tower: str = ""


def edges(
    model: Model,
    examples: Examples,
    corrupt: str | Noise = "image",
    *,
    method: Method = "eap",
    steps: int | None = None,
    verify: int = 0,
    tower: str | None = None,
    direction: Direction = "denoise",
    metric: str | Metric = "ld",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    data: str = "examples",
    shard: Shard | None = None,
) -> pd.DataFrame:
    """Which part of a tower feeds which, and how much of the metric goes that way: a row an edge, the largest
    |score| first, means over examples.

    `source` writes to the stream: `embed` (the text's embeddings), `image` (its features), a head
    (`decoder.2.attn.h1`), an MLP (`decoder.2.mlp`), what is added between blocks (`decoder.0.deepstack`).
    `target` reads it: the query, key or value of a head (`decoder.5.attn.q3`; keys and values that a group of
    queries shares once), an MLP, `logits`. `score` is what patching the edge is estimated to change of
    `metric` in the run that is patched (`eap`, `eap-ig`, `patching.edges`; with `exact`, what it does), `low`
    and `high` the 95 % interval of its mean over examples. `tower` is the one that says the words, or
    `vision`, whose end is `projector`.

    With `verify`, in each example the so many best edges into each kind of reader, and as many drawn at
    random, are patched exactly: `exact` is the mean of that where it was done in all examples, and
    `attrs["agreement"]` (`agreement.json` in a run folder) says how well the scores agree
    (`studies.agreement`). `attrs["check"]` says how many of these were recomputed by plain forwards, and the
    largest difference.

    `out`, `data` and `shard` are as in `sweep`; the folder has the edges of each example
    (`read_run(out).edges()`), and this table in `edges.parquet`.

    Raises `ModelError` for a tower in which the stream is no sum of writers (post-norm blocks, as BLIP's text
    towers), `VlmscopeError` for a metric without a gradient, `DataError` if no example can be run,
    `StoreError` for a folder of another run.

    >>> import vlmscope
    >>> model, one = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=1)
    >>> table = edges(model, one, "image")
    >>> list(table.columns), bool((table["target"] == "logits").any())
    (['source', 'target', 'score', 'exact', 'low', 'high'], True)
    """
    options: dict[str, Any] = {"method": method, "verify": verify, "steps": steps, "tower": tower}
    options |= {"direction": direction, "metric": metric, "seed": seed, "data": data, "shard": shard}
    each = table_of(edged(model, examples, corrupt, **options), out)
    table = over_examples(each)
    table.attrs["check"] = each.attrs["check"]
    if verify:
        table.attrs["agreement"] = agreement(by_reader(each), verify)
    return table


def edged(
    model: Model,
    examples: Examples,
    corrupt: str | Noise = "image",
    *,
    method: Method = "eap",
    steps: int | None = None,
    verify: int = 0,
    tower: str | None = None,
    data: str = "examples",
    **options: Any,
) -> Study:
    """What `edges`, with the same arguments, puts into a folder."""
    own = {"method": method, "verify": verify, "steps": steps, "tower": tower}
    task = _task_of(model, examples, corrupt, own, options)
    return Study(task, EDGES, _scored, partial(_check, task), partial(_spec_of, task, data), write_beside)


def _task_of(
    model: Model, examples: Examples, corrupt: str | Noise, own: dict[str, Any], options: dict[str, Any]
) -> EdgeTask:
    choice(own["method"], "method", METHODS)
    own["verify"] = whole(own["verify"], "the number of edges to verify", most=MOST)
    if own["method"] == "exact" and own["verify"]:
        raise VlmscopeError("the method exact patches every edge and has nothing to verify; leave it out")
    if own["steps"] is not None and own["method"] != "eap-ig":
        raise VlmscopeError(f"{own['method']} has no steps, only eap-ig has; leave them out")
    if own["method"] == "eap-ig":
        own["steps"] = whole(STEPS if own["steps"] is None else own["steps"], "the number of steps", 1, 1000)
    task = task_of(model, examples, [], corrupt, **options)
    own["tower"] = own["tower"] or model.speaker
    check_tower(model, own["tower"])
    if own["method"] != "exact":
        check_network(model)
        if task.metric == "kl" and task.direction == "noise" and own["method"] == "eap":
            raise VlmscopeError(
                "the metric kl is of the distance from the clean run, around which it has no gradient; take "
                "ld, logprob or p, denoise (--direction), or the method eap-ig"
            )
    return EdgeTask(**{each.name: getattr(task, each.name) for each in fields(Task)}, **own)


def _spec_of(task: EdgeTask, data: str) -> dict[str, Any]:
    """What of a folder has to be the same."""
    of_patches = ("engine", "patch", "select", "sites")
    more = {"method": task.method, "tower": task.tower, "verify": task.verify}
    more |= {"steps": task.steps} if task.steps else {}
    return {name: value for name, value in spec_of(task, data).items() if name not in of_patches} | more


def _scored(task: Task, job: Todo, _: Sequence[Site], step: Callable[[int, float], None]) -> Result:
    """The edges of one example, means over its pairs, and exact patches of some of them."""
    assert isinstance(task, EdgeTask)
    model, example = task.model, task.examples[job.number]
    pairs = task.pairs(example)
    graph = Graph(model, pairs[0].clean, task.tower)
    totals, base = np.zeros(len(graph.edges)), defaultdict[str, float](float)
    for number, pair in enumerate(pairs):
        scores, clean, corrupt = _of_pair(task, pair)
        totals += scores / len(pairs)
        add_scores(base, clean, corrupt, len(pairs))
        step(len(totals), (number + 1) / len(pairs) / (2 if task.verify else 1))
    known: dict[int, float] = dict(enumerate(totals)) if task.method == "exact" else {}
    if task.verify:
        some = to_verify([*map(_kind, graph.edges)], totals, task.verify, task.seed, example.id)
        known = dict(zip(some, _exact(task, pairs, [graph.edges[n] for n in some]), strict=True))
    common = {"example": example.id, "corruption": task.kind}
    rows = [
        {**common, "source": edge.source, "target": edge.target, "score": score, "exact": known.get(number)}
        for number, (edge, score) in enumerate(zip(graph.edges, totals.tolist(), strict=True))
    ]
    return result_of(task, job, rows, pairs[0], {**base, **answer_of(task, job, example, pairs[0])})


def _of_pair(task: EdgeTask, pair: Pair) -> tuple[Array, Score, Score]:
    """The scores of all edges, and those of the two runs."""
    options: dict[str, Any] = {"metric": task.metric, "tower": task.tower}
    if task.method == "exact":
        plain = engine.patch(task.model, pair, [], task.direction, metric=task.metric)
        every = Graph(task.model, pair.clean, task.tower).edges
        scores = exact(task.model, pair, every, task.direction, **options)
        return scores, plain.clean, plain.corrupt
    options |= {"steps": task.steps} if task.steps else {}
    found = score_edges(task.model, pair, task.direction, method=task.method, **options)
    return found.scores, found.clean, found.corrupt


def _kind(edge: Edge) -> tuple[str, str]:
    """The kind of what reads, and its part."""
    _, _, reads, unit = [*edge.target.split("."), "", "", ""][:4]
    return reads, unit[:1]


def _exact(
    task: EdgeTask, pairs: Sequence[Pair], edges: Sequence[tuple[str, str]], *, by_rows: bool = True
) -> Array:
    """What edges change of the metric: means over pairs."""
    options: dict[str, Any] = {"metric": task.metric, "tower": task.tower, "by_rows": by_rows}
    found = [exact(task.model, pair, edges, task.direction, **options) for pair in pairs]
    return np.mean(found, axis=0)


def write_beside(run: Run) -> None:
    """Write what is made of the whole table: means over examples, and how far they can be trusted."""
    each, verify = run.edges(), run.spec["verify"]
    files.write(run.path / "edges.parquet", parquet_of(over_examples(each)))
    if verify:
        files.write_json(run.path / "agreement.json", agreement(by_reader(each), verify))


def _check(task: EdgeTask, base: pd.DataFrame, rows_of: RowsOf) -> dict[str, Any] | None:
    """Recompute some random exact edges by plain forwards; None if there are none."""

    def recompute(example: Example, some: pd.DataFrame) -> Array:
        wanted = list(zip(some["source"], some["target"], strict=True))
        return _exact(task, task.pairs(example), wanted, by_rows=False)

    return check_exact(task, base, rows_of, "edges", recompute)

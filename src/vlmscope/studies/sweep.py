"""The one loop: examples × sites, into a table or a run folder."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from torch import Tensor

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example, fingerprint
from vlmscope.errors import DataError, ExampleError, SiteError, VlmscopeError
from vlmscope.inputs import Inputs, Pair
from vlmscope.layout import Layout, grid, slots
from vlmscope.patching import engine as fast
from vlmscope.patching import reference
from vlmscope.patching.scores import Metric, Patched, agrees, check_metric, effect, least_gap
from vlmscope.patching.sources import Means, Source, check_source, points_of, resampled, zeros
from vlmscope.patching.trace import Images
from vlmscope.progress import progress
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Corruption, Noise
from vlmscope.runs.forward import Sites
from vlmscope.runs.model import Model
from vlmscope.sites import Point, Site, expand, parse, place
from vlmscope.stats import rng
from vlmscope.studies.run_folder import BASELINES, EFFECTS, Run, bytes_of, read_run, typed
from vlmscope.studies.run_writer import Writer, open_run

Direction = Literal["denoise", "noise"]
Engine = Literal["fast", "reference"]

SHOWN = 4
"""How many examples a run folder keeps to look at."""
CHECKED = 5
"""How many random rows of a run the reference recomputes."""
PACKAGES = ("vlmscope", "torch", "transformers", "torchvision", "pillow")
"""Whose versions a run depends on; the last two turn pictures into pixels."""
TRIED = 20
"""How many examples an estimate tries, until two of them are of those that are kept."""


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
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    data: str = "examples",
    check: int = CHECKED,
) -> pd.DataFrame:
    """Patch every site of every example; one row a patch (columns as in `run_folder.EFFECTS`).

    `examples` are a list of them, a single one, or the name of a built-in set or a CSV file. `corrupt`
    is `image`, `text`, `noise` or a `Noise`. `denoise` copies clean activations into the corrupt run,
    `noise` corrupt ones into the clean run; the columns mean the same in both:
    `logit_diff` = LD(patched) − LD(corrupt), so a noising patch that changes nothing has the
    effect 1. Examples that cannot be run are left out with a warning.

    `metric` is what `effect` is of, and what stands in `value`: `ld`; `p`; `logprob`, of the whole answer, token by
    token, for which no foil is needed; `kl` from the clean run's next-token distribution; or a function
    `(logits, baselines) -> values` of `(rows, vocabulary)` logits at the read-out position (`patching.scores`).
    `patch` is what is written: `clean`, the other run's activation, or, into the clean run, `zero`, the `mean` over
    the examples at the same slot, or `resample`, another example's. With these `corrupt` may be None.

    `check` random rows are recomputed by `reference`, one plain forward each; `attrs["check"]` says how many
    (`rows`) and the `largest` difference of the metric.

    With `out`, the table is written to a run folder as it is computed; called again with the same
    arguments, it goes on where it stopped, and with more examples or sites these are added. `data` is the
    name of the examples in that folder.

    Raises `SiteError` for a site that this model or this data does not have, `StoreError` for a
    folder of another run, `DataError` if no example at all can be run, or there are none.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> table = sweep(model, vlmscope.examples("states", limit=1), "encoder.*.cross.h*@answer")
    >>> len(table), table.columns[0], table.attrs["check"]["rows"]
    (12, 'example', 5)
    """
    task = _task(model, examples, sites, corrupt, direction, engine, seed, metric=metric, patch=patch)
    if out is not None:
        run = _into_folder(task, out, data, check)
        warn_of_excluded(run.baselines())
        table, found = run.effects(), run.check
    else:
        results = list(_run(task, _all(task)))
        base = pd.concat([result.baseline for result in results], ignore_index=True)
        warn_of_excluded(base)
        table = typed(pd.concat([result.effects for result in results], ignore_index=True), EFFECTS)
        found = _check(task, check, base, lambda names: table[table["example"].isin(names)])
    table.attrs["check"] = found
    return table


def sweep_to(
    out: str | os.PathLike[str],
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = "image",
    *,
    direction: Direction = "denoise",
    engine: Engine = "fast",
    metric: str | Metric = "ld",
    patch: Source = "clean",
    seed: int = 0,
    data: str = "examples",
    select: bool = False,
    check: int = CHECKED,
) -> Run:
    """`sweep` into a run folder, without holding the table in memory; goes on where it stopped.

    With `select`, only examples are patched that the model answers rightly (by its own generation,
    compared by `scores.agrees`) and whose answer follows the corruption: it becomes the foil when
    the image is the foil's, and is no longer the answer when the text or noise is what corrupts.
    The others stay in `baselines` as excluded, with what the model answered.
    """
    task = _task(model, examples, sites, corrupt, direction, engine, seed, select, metric, patch)
    return _into_folder(task, out, data, check)


class Estimate(NamedTuple):
    """What a sweep will take: seconds of computing, bytes on disk, patches of one example."""

    seconds: float
    bytes: int
    patches: int


def estimate(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise = "image",
    *,
    seed: int = 0,
    select: bool = False,
) -> Estimate:
    """What these examples will take, from running one or two of them (the first one warms up).

    An upper bound where `select` leaves some out, and of the bytes (parts compress better than a
    single example).
    """
    task = _task(model, examples, sites, corrupt, "denoise", "fast", seed, select)
    seconds, size, patches, counted = 0.0, 0, 0, 0
    for job in _all(task)[:TRIED]:
        start = time.perf_counter()
        [result] = _run(task, [job], quiet=True)
        if result.effects.empty:
            continue
        seconds, counted = time.perf_counter() - start, counted + 1
        size, patches = bytes_of(result.effects), len(result.effects)
        if counted == 2 or seconds > 10.0:  # a long one has warmed up by itself
            break
    return Estimate(seconds * len(task.examples), size * len(task.examples), patches)


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
    task = _task(model, examples, [], corrupt, "denoise", "fast", seed)
    tables = [result.baseline for result in _run(task, _all(task))]
    return typed(pd.concat(tables, ignore_index=True), BASELINES)


def warn_of_excluded(baselines: pd.DataFrame) -> None:
    """Warn of examples that were left out; an error if that is all of them."""
    left = baselines[baselines["excluded"].astype(bool)]
    if left.empty:
        return
    name, reason = left["example"].iloc[0], left["reason"].iloc[0]
    if len(left) == len(baselines):
        raise DataError(f"none of {len(left)} examples could be run; '{name}': {reason}")
    text = f"{len(left)} of {len(baselines)} examples were left out; '{name}': {reason}"
    warnings.warn(text, stacklevel=3)


# --- what is to be computed --------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """All that decides what is in the table. `sites` are expressions; see `sweep` and `sweep_to`."""

    model: Model
    examples: list[Example]
    sites: list[str]
    corruption: Corruption | None
    direction: str
    engine: str
    seed: int
    select: bool
    metric: str | Metric
    patch: Source

    @property
    def kind(self) -> str:
        return "noise" if isinstance(self.corruption, Noise) else self.corruption or "none"

    def pairs(self, example: Example) -> list[Pair]:
        """The pairs of runs of an example; one of two equal runs where nothing is corrupted."""
        whole = self.metric == "logprob"
        if self.corruption is None:
            return [self.model.prepare(replace(example, corrupt_image=None, corrupt_prompt=None), whole)]
        return corruptions.pairs(self.model, example, self.corruption, self.seed, whole)

    @cached_property
    def means(self) -> Means:
        """Over all examples that can be run, at the sites of this task."""
        means = Means(self.model, points_of(expand(parse(self.sites), self.model.shapes)))
        for example in self.examples:
            with suppress(ExampleError):
                means.add(self.pairs(example)[0].clean)
        return means

    def values(self, example: Example, pair: Pair, sites: Sequence[Site]) -> Mapping[Point, Tensor] | None:
        """What is written instead of the other run's activations, if anything."""
        points = points_of(sites)
        if self.patch == "clean":
            return None
        if self.patch == "zero":
            return zeros(self.model, pair.clean, points)
        if self.patch == "mean":
            return self.means.values(pair.clean)
        return resampled(self.model, pair.clean, self._others(example), points)

    def _others(self, example: Example) -> Iterator[Inputs]:
        """The clean inputs of the other examples, in an order that the seed and this example decide."""
        others = [other for other in self.examples if other.id != example.id]
        for number in rng(self.seed, "resample", example.id).permutation(len(others)):
            with suppress(ExampleError):
                yield self.pairs(others[number])[0].clean


class _Job(NamedTuple):
    """An example's number, the site expressions at which it is to be patched, and those that are done."""

    number: int
    sites: list[str]
    done: list[str]


class _Result(NamedTuple):
    job: _Job
    effects: pd.DataFrame
    baseline: pd.DataFrame


def _task(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None,
    direction: str,
    engine: str,
    seed: int,
    select: bool = False,
    metric: str | Metric = "ld",
    patch: Source = "clean",
) -> _Task:
    """Checked against the model and the data before anything runs."""
    if direction not in ("denoise", "noise"):
        raise VlmscopeError(f"unknown direction '{direction}'; expected denoise or noise")
    if engine not in ("fast", "reference"):
        raise VlmscopeError(f"unknown engine '{engine}'; expected fast or reference")
    check_metric(metric)
    check_source(patch)
    if corrupt is None and (patch == "clean" or select):
        raise VlmscopeError(
            "without a corruption nothing can be copied or chosen by; patch zero, mean or resample"
        )
    given = listed(examples)
    if not given:
        raise DataError("there are no examples; nothing to run")
    parsed = parse(sites)
    expand(parsed, model.shapes)
    roles = {role: None for example in given for role in example.roles}
    for site in parsed:
        unknown = next((role for role in site.roles if role not in roles), None)
        if unknown is not None:
            raise SiteError(
                f"bad site '{site}': no example has a role '{unknown}'; "
                f"the roles of this data: {', '.join(roles) or 'none'}"
            )
    names = [str(site) for site in parsed]
    corruption = None if corrupt is None else corruptions.parse(corrupt)
    direction = direction if patch == "clean" else "noise"  # what ablates is written into the clean run
    return _Task(model, given, names, corruption, direction, engine, seed, select, metric, patch)


def _all(task: _Task) -> list[_Job]:
    return [_Job(number, task.sites, []) for number in range(len(task.examples))]


def _spec(task: _Task, data: str, digests: Sequence[str]) -> dict[str, Any]:
    corrupt: dict[str, Any] = {"kind": task.kind}
    if isinstance(task.corruption, Noise):
        corrupt |= asdict(task.corruption)
    return {
        "model": task.model.name,
        "weights": task.model.fingerprint(),
        "data": data,
        "data_hash": hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        "n_examples": len(task.examples),
        "sites": task.sites,
        "corrupt": corrupt,
        "direction": task.direction,
        "engine": task.engine,
        "metric": task.metric if isinstance(task.metric, str) else task.metric.__qualname__,
        "patch": task.patch,
        **(
            {"mean_of": hashlib.sha256(" ".join(digests).encode()).hexdigest()}
            if task.patch == "mean"
            else {}
        ),
        "dtype": task.model.precision,
        "device": task.model.device.type,
        "seed": task.seed,
        "select": task.select,
        "versions": {p: found for p in PACKAGES if (found := _version(p))},
    }


def _version(package: str) -> str | None:
    """Which version is installed, if any."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _description(model: Model) -> dict[str, Any]:
    """The model's towers, for the report."""
    layouts = model.layouts()
    towers = {
        tower: {"layers": shape.layers, "heads": max(shape.heads.values()), "grid": grid(layouts[tower])}
        for tower, shape in model.shapes.items()
    }
    return {"towers": towers}


def _into_folder(task: _Task, out: str | os.PathLike[str], data: str, check: int) -> Run:
    """Compute what the folder does not hold yet."""
    digests = [fingerprint([example]) for example in task.examples]
    spec = _spec(task, data, digests)
    with open_run(out, spec, _description(task.model), digests=digests) as writer:
        jobs = []
        for number in range(len(task.examples)):
            missing = writer.missing(number, task.sites)
            if number not in writer.done or missing:
                done = [s for s in writer.sites if s not in writer.missing(number, writer.sites)]
                jobs.append(_Job(number, missing, done))
        for result in _run(task, jobs, len(task.examples) - len(jobs)):
            number = result.job.number
            writer.add(number, result.effects, result.baseline, result.job.sites)
            if number < SHOWN and not result.job.done:
                _show(writer, task, number)
        writer.flush()
        if jobs or writer.check is None:
            run = read_run(out)
            found = _check(
                task, check, run.baselines(), lambda ids: run.effects(pc.field("example").isin(ids))
            )
            if found is not None:
                writer.keep_check(found)
        writer.finish()
    return read_run(out)


def _show(writer: Writer, task: _Task, number: int) -> None:
    """Keep what a person wants to see of an example: what this corruption uses, as the model sees it."""
    shown = vars(task.examples[number]).copy()
    if task.corruption != "image":
        shown["corrupt_image"] = None
    if task.corruption != "text":
        shown["corrupt_prompt"] = None
    with suppress(ExampleError):  # the example is excluded, with this reason
        for name in ("clean_image", "corrupt_image"):
            shown[name] = shown[name] and task.model.seen(shown[name])
        writer.add_pictures(number, shown)


# --- one example -------------------------------------------------------------------------------


def _run(task: _Task, jobs: Sequence[_Job], done: int = 0, quiet: bool = False) -> Iterator[_Result]:
    """What each job gives; an example that cannot be run has no effects.

    Where an example of a folder lacks a site that is added, it keeps what it has, and a warning says so.
    """
    patterns: dict[tuple[str, ...], list[Site]] = {}
    with progress(len(jobs) + done, done, quiet) as step:
        for finished, job in enumerate(jobs, start=done):
            key = (*job.done, "", *job.sites)
            if key not in patterns:
                patterns[key] = _patterns(task, job)

            def share(patches: int, part: float, before: int = finished) -> None:
                step(patches, before + part)

            example = task.examples[job.number]
            try:
                yield _patch_example(task, job, patterns[key], share)
            except (ExampleError, SiteError) as error:
                if job.done:
                    warnings.warn(
                        f"'{example.id}' has none of the sites that are added: {error}", stacklevel=2
                    )
                else:
                    yield _excluded(task, job, reason=str(error))
            step(0, finished + 1)


def _patterns(task: _Task, job: _Job) -> list[Site]:
    """The sites of a job in this model, but for those that other expressions have named."""
    done = expand(parse(job.done), task.model.shapes)
    return expand(parse([*job.done, *job.sites]), task.model.shapes)[len(done) :]


def _patch_example(
    task: _Task, job: _Job, patterns: Sequence[Site], step: Callable[[int, float], None]
) -> _Result:
    example = task.examples[job.number]
    pairs = task.pairs(example)
    answered: dict[str, Any] = {}
    if not job.done:
        predicted = task.model.answer(pairs[0].clean)
        answered = {"predicted": predicted, "correct": agrees(predicted, example.answer)}
        if task.select and (reason := _unfit(task, example, pairs[0], predicted)):
            return _excluded(task, job, reason=reason, **answered)
    layout = pairs[0].clean.layout
    placed = [found for site in patterns for found in place(site, layout)]
    totals = np.zeros((len(placed), 3))
    base: dict[str, float] = defaultdict(float)
    images, count, least = Images(), 0, 0.0
    for pair in pairs:
        patched = _patched(task, example, pair, placed, images)
        least = max(least, least_gap(task.model.precision, patched.size))
        for run, scores in (("clean", patched.clean), ("corrupt", patched.corrupt)):
            for name, score in scores._asdict().items():
                base[f"{name}_{run}"] += score.item() / len(pairs)
        for numbers, scores in patched.chunks:
            totals[numbers] += torch.stack(scores, 1).cpu().numpy() / len(pairs)
            count += len(numbers)
            step(len(numbers), count / len(placed) / len(pairs))
    names = {tower: slots(there) for tower, there in layout.items()}
    rows = []
    for site, gains in zip(placed, _gains(task, totals, base, least), strict=True):
        words = _words(site, layout[site.tower], names[site.tower])
        rows.append({"example": example.id, "corruption": task.kind, **words, **gains})
    foil = pairs[0].foil
    baseline = {
        "example": example.id,
        "corruption": task.kind,
        **{name: value for name, value in base.items() if task.corruption or "corrupt" not in name},
        "answer_token": " ".join(map(task.model.token, pairs[0].answers)),
        "foil_token": None if foil is None else task.model.token(foil),
        **answered,
        "excluded": False,
    }
    return _Result(job, _frame(rows, EFFECTS.names), _frame([] if job.done else [baseline], BASELINES.names))


def _patched(task: _Task, example: Example, pair: Pair, sites: Sequence[Site], images: Images) -> Patched:
    values = task.values(example, pair, sites)
    if task.engine == "reference":
        return reference.patch(task.model, pair, sites, task.direction, values=values, metric=task.metric)
    return fast.patch(
        task.model, pair, sites, task.direction, values=values, metric=task.metric, images=images
    )


def _gains(
    task: _Task, totals: np.ndarray[Any, Any], base: Mapping[str, float], least: float
) -> Iterator[dict[str, float | None]]:
    """What a row says of each patch; `least` is a gap of logits, so other metrics have effects at any gap."""
    edited = "clean" if task.direction == "noise" else "corrupt"
    ends = base["value_clean"], base["value_corrupt"], least if task.metric == "ld" else 0.0
    for p, ld, value in totals.tolist():
        yield {
            "p_patched": p,
            "p_restored": p - base["p_corrupt"] if task.corruption else None,
            "p_change": p - base[f"p_{edited}"],
            "logit_diff": ld - base["ld_corrupt"] if task.corruption else None,
            "ld_change": ld - base[f"ld_{edited}"],
            "value": value,
            "effect": effect(value, *ends) if task.corruption else None,
        }


def _words(site: Site, layout: Layout, names: Sequence[str]) -> dict[str, Any]:
    """What a row says of the place that is patched."""
    position = site.positions[0] if len(site.positions) == 1 and not site.also else None
    role = next((role for role, where in layout.roles.items() if position in where), None)
    named = site.position.removesuffix("*")
    return {
        "site": str(site),
        "tower": site.tower,
        "layer": site.layer,
        "kind": site.kind,
        "unit": site.unit,
        "position": position,
        "token": None if position is None else layout.tokens[position],
        "role": named if named in layout.roles else role,
        "slot": site.position if position is None else names[position],
    }


def _unfit(task: _Task, example: Example, pair: Pair, predicted: str) -> str | None:
    """Why an example is not one to learn from, if so."""
    if not agrees(predicted, example.answer):
        return f"the model answers '{predicted}', not '{example.answer}'"
    then = task.model.answer(pair.corrupt, pair.edits)
    if task.kind == "image" and example.foil and not agrees(then, example.foil):
        return f"with the corrupt image the model answers '{then}', not '{example.foil}'"
    if (task.kind != "image" or not example.foil) and agrees(then, example.answer):
        return f"with the corrupt input ({task.kind}) the model still answers '{then}'"
    return None


def _excluded(task: _Task, job: _Job, **fields: Any) -> _Result:
    example = task.examples[job.number]
    baseline = {"example": example.id, "corruption": task.kind, "excluded": True, **fields}
    return _Result(job, _frame([], EFFECTS.names), _frame([baseline], BASELINES.names))


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))


# --- the check ---------------------------------------------------------------------------------


def _check(
    task: _Task, count: int, base: pd.DataFrame, effects_of: Callable[[list[str]], pd.DataFrame]
) -> dict[str, Any] | None:
    """Recompute some random rows: how many, and the largest difference; None where there is nothing to check.

    Which ones depends on the seed and the table; they are spread over kinds and examples.
    """
    draw = rng(task.seed, "check")
    ran = base.loc[~base["excluded"].astype(bool), "example"]
    known = {example.id: example for example in task.examples}
    ids = [name for name in ran.drop_duplicates(keep=False) if name in known]
    if count < 1 or task.engine == "reference" or not ids:
        return None
    chosen = [ids[n] for n in draw.permutation(len(ids))[:count]]
    rows = effects_of(chosen)
    rows = rows[np.isfinite(rows["value"])]
    if rows.empty:
        return None
    rows = rows.iloc[draw.permutation(len(rows))]
    kinds = [rows["tower"], rows["kind"], rows["unit"].astype("string").str.get(0).fillna("")]
    turns = pd.DataFrame({"kind": rows.groupby(kinds).cumcount(), "of": rows.groupby("example").cumcount()})
    rows = rows.loc[turns.sort_values(["kind", "of"], kind="stable").index[:count]]
    largest = 0.0
    for name, some in rows.groupby("example", sort=False):
        again = _recomputed(task, known[str(name)], some["site"].tolist())
        largest = max(largest, float(np.abs(again - some["value"].to_numpy()).max()))
    return {"rows": len(rows), "largest": largest}


def _recomputed(task: _Task, example: Example, sites: Sequence[str]) -> np.ndarray[Any, Any]:
    """The metric of patches of one example, one plain forward each."""
    pairs = task.pairs(example)
    total = np.zeros(len(sites))
    patterns = expand(parse(sites), task.model.shapes)
    for pair in pairs:
        placed = [found for site in patterns for found in place(site, pair.clean.layout)]
        plain = replace(task, engine="reference")
        for numbers, scores in _patched(plain, example, pair, placed, Images()).chunks:
            total[numbers] += scores.value.cpu().numpy() / len(pairs)
    return total

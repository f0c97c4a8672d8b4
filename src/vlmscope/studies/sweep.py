"""The one loop: examples × sites, into a table or a run folder."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example, fingerprint
from vlmscope.errors import DataError, ExampleError, SiteError, VlmscopeError
from vlmscope.inputs import Pair
from vlmscope.layout import Layout, grid, slots
from vlmscope.patching import engine as fast
from vlmscope.patching import reference
from vlmscope.patching.scores import agrees, effect, least_gap
from vlmscope.patching.trace import Images
from vlmscope.progress import progress
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Corruption, Noise
from vlmscope.runs.forward import Sites
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern, Site, expand, parse, place
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
    corrupt: str | Noise = "image",
    *,
    direction: Direction = "denoise",
    engine: Engine = "fast",
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

    `check` random rows are recomputed by `reference`, one plain forward each; `attrs["check"]` says how many
    (`rows`) and the `largest` difference of `logit_diff`.

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
    task = _task(model, examples, sites, corrupt, direction, engine, seed)
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
    corrupt: str | Noise = "image",
    *,
    direction: Direction = "denoise",
    engine: Engine = "fast",
    seed: int = 0,
    data: str = "examples",
    select: bool = False,
    check: int = CHECKED,
) -> Run:
    """`sweep` into a run folder, without holding the table in memory; goes on where it stopped.

    With `select`, only examples are patched that the model answers rightly (by its own generation,
    compared by `metrics.agrees`) and whose answer follows the corruption: it becomes the foil when
    the image is the foil's, and is no longer the answer when the text or noise is what corrupts.
    The others stay in `baselines` as excluded, with what the model answered.
    """
    task = _task(model, examples, sites, corrupt, direction, engine, seed, select)
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
    answer, by `metrics.agrees`.

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
    corruption: Corruption
    direction: str
    engine: str
    seed: int
    select: bool

    @property
    def kind(self) -> str:
        return "noise" if isinstance(self.corruption, Noise) else self.corruption


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
    corrupt: str | Noise,
    direction: str,
    engine: str,
    seed: int,
    select: bool = False,
) -> _Task:
    """Checked against the model and the data before anything runs."""
    if direction not in ("denoise", "noise"):
        raise VlmscopeError(f"unknown direction '{direction}'; expected denoise or noise")
    if engine not in ("fast", "reference"):
        raise VlmscopeError(f"unknown engine '{engine}'; expected fast or reference")
    given = listed(examples)
    if not given:
        raise DataError("there are no examples; nothing to run")
    parsed = parse(sites)
    expand(parsed, model.shapes)
    roles = {role: None for example in given for role in example.roles}
    for site in parsed:
        if unknown := next((role for role in site.roles if role not in roles), None):
            raise SiteError(
                f"bad site '{site}': no example has a role '{unknown}'; "
                f"the roles of this data: {', '.join(roles) or 'none'}"
            )
    names = [str(site) for site in parsed]
    return _Task(model, given, names, corruptions.parse(corrupt), direction, engine, seed, select)


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
    done = expand(map(Pattern.parse, job.done), task.model.shapes)
    return expand(map(Pattern.parse, [*job.done, *job.sites]), task.model.shapes)[len(done) :]


def _patch_example(
    task: _Task, job: _Job, patterns: Sequence[Site], step: Callable[[int, float], None]
) -> _Result:
    example = task.examples[job.number]
    pairs = corruptions.pairs(task.model, example, task.corruption, task.seed)
    answered: dict[str, Any] = {}
    if not job.done:
        predicted = task.model.answer(pairs[0].clean)
        answered = {"predicted": predicted, "correct": agrees(predicted, example.answer)}
        if task.select and (reason := _unfit(task, example, pairs[0], predicted)):
            return _excluded(task, job, reason=reason, **answered)
    layout = pairs[0].clean.layout
    placed = [found for site in patterns for found in place(site, layout)]
    totals = np.zeros((len(placed), 2))
    base = dict.fromkeys(("p_clean", "p_corrupt", "ld_clean", "ld_corrupt"), 0.0)
    images = Images()
    count, least = 0, 0.0
    for pair in pairs:
        if task.engine == "reference":
            patched = reference.patch(task.model, pair, placed, task.direction)
        else:
            patched = fast.patch(task.model, pair, placed, task.direction, images=images)
        least = max(least, least_gap(task.model.precision, patched.size))
        for name, score in (("clean", patched.clean), ("corrupt", patched.corrupt)):
            base[f"p_{name}"] += score.p.item() / len(pairs)
            base[f"ld_{name}"] += score.ld.item() / len(pairs)
        for numbers, scores in patched.chunks:
            totals[numbers, 0] += scores.p.cpu().numpy() / len(pairs)
            totals[numbers, 1] += scores.ld.cpu().numpy() / len(pairs)
            count += len(numbers)
            step(len(numbers), count / len(placed) / len(pairs))
    names = {tower: slots(one) for tower, one in layout.items()}
    rows = []
    for site, (p, ld) in zip(placed, totals.tolist(), strict=True):
        gains = {
            "p_patched": p,
            "p_restored": p - base["p_corrupt"],
            "logit_diff": ld - base["ld_corrupt"],
            "effect": effect(ld, base["ld_clean"], base["ld_corrupt"], least),
        }
        words = _words(site, layout[site.tower], names[site.tower])
        rows.append({"example": example.id, "corruption": task.kind, **words, **gains})
    baseline = {
        "example": example.id,
        "corruption": task.kind,
        **base,
        "answer_token": task.model.token(pairs[0].answer),
        "foil_token": None if pairs[0].foil is None else task.model.token(pairs[0].foil),
        **answered,
        "excluded": False,
    }
    return _Result(job, _frame(rows, EFFECTS.names), _frame([] if job.done else [baseline], BASELINES.names))


def _words(site: Site, layout: Layout, names: Sequence[str]) -> dict[str, Any]:
    """What a row says of the place that is patched."""
    position = site.positions[0] if len(site.positions) == 1 and not site.also else None
    role = next((role for role, where in layout.roles.items() if position in where), None)
    written = site.position.removesuffix("*")
    return {
        "site": str(site),
        "tower": site.tower,
        "layer": site.layer,
        "kind": site.kind,
        "unit": site.unit,
        "position": position,
        "token": None if position is None else layout.tokens[position],
        "role": written if written in layout.roles else role,
        "slot": site.position if position is None else names[position],
    }


def _unfit(task: _Task, example: Example, pair: Pair, predicted: str) -> str | None:
    """Why an example is not one to learn from, if so."""
    if not agrees(predicted, example.answer):
        return f"the model answers '{predicted}', not '{example.answer}'"
    then = task.model.answer(pair.corrupt, pair.edits)
    if task.kind == "image" and not agrees(then, example.foil):
        return f"with the corrupt image the model answers '{then}', not '{example.foil}'"
    if task.kind != "image" and agrees(then, example.answer):
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
    rows = rows[np.isfinite(rows["logit_diff"])].drop_duplicates(["example", "site"])
    if rows.empty:
        return None
    rows = rows.iloc[draw.permutation(len(rows))]
    kinds = [rows["tower"], rows["kind"], rows["unit"].astype("string").str.get(0).fillna("")]
    turns = pd.DataFrame({"kind": rows.groupby(kinds).cumcount(), "of": rows.groupby("example").cumcount()})
    rows = rows.loc[turns.sort_values(["kind", "of"], kind="stable").index[:count]]
    largest = 0.0
    for name, some in rows.groupby("example", sort=False):
        again = _recomputed(task, known[str(name)], some["site"].tolist())
        largest = max(largest, float(np.abs(again - some["logit_diff"].to_numpy()).max()))
    return {"rows": len(rows), "largest": largest}


def _recomputed(task: _Task, example: Example, sites: Sequence[str]) -> np.ndarray[Any, Any]:
    """`logit_diff` of patches of one example, one plain forward each."""
    pairs = corruptions.pairs(task.model, example, task.corruption, task.seed)
    total = np.zeros(len(sites))
    for pair in pairs:
        patterns = expand(map(Pattern.parse, sites), task.model.shapes)
        placed = [found for site in patterns for found in place(site, pair.clean.layout)]
        patched = reference.patch(task.model, pair, placed, task.direction)
        for numbers, scores in patched.chunks:
            total[numbers] += (scores.ld.cpu() - patched.corrupt.ld.cpu()).numpy() / len(pairs)
    return total

"""What the runs of one example give: a row a patch, and the runs without patches."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, SiteError
from vlmscope.layout import Layout, slots
from vlmscope.models.inputs import Pair
from vlmscope.patching import engine as fast
from vlmscope.patching import reference
from vlmscope.patching.scores import Patched, Score, agrees, effect, least_gap
from vlmscope.patching.trace import Images
from vlmscope.progress import progress
from vlmscope.sites import Site, Sites, expand, parse
from vlmscope.studies.run_folder import BASELINES
from vlmscope.studies.run_writer import Todo
from vlmscope.studies.task import Result, Task

Work = Callable[[Task, Todo, Sequence[Site], Callable[[int, float], None]], Result]
"""`work(task, job, sites, step)`: what an example gives at sites."""


def run_jobs(
    task: Task, jobs: Sequence[Todo], done: int = 0, quiet: bool = False, work: Work | None = None
) -> Iterator[Result]:
    """What each job gives, by default its patches; an example that cannot be run has no rows.

    Where an example of a folder lacks a site that is added, it keeps what it has, and a warning says so.
    """
    unplaced: dict[tuple[str, ...], list[Site]] = {}  # but for sites that other expressions have named
    shapes = task.model.shapes
    with progress(len(jobs) + done, done, quiet) as step:
        for finished, job in enumerate(jobs, start=done):
            key = (*job.done, "", *job.sites)
            if key not in unplaced:
                named = len(expand(parse(job.done), shapes))
                unplaced[key] = expand(parse([*job.done, *job.sites]), shapes)[named:]

            def share(patches: int, part: float, before: int = finished) -> None:
                step(patches, before + part)

            try:
                yield (work or patched)(task, job, unplaced[key], share)
            except (ExampleError, SiteError) as error:
                if job.done:
                    name = task.ids[job.number]
                    warnings.warn(f"'{name}' has none of the sites that are added: {error}", stacklevel=2)
                else:
                    yield _excluded(task, job, reason=str(error))
            step(0, finished + 1)


def patched(task: Task, job: Todo, unplaced: Sequence[Site], step: Callable[[int, float], None]) -> Result:
    """What patching the sites of one example gives."""
    example = task.examples[job.number]
    pairs = task.pairs(example)
    answered = answer_of(task, job, example, pairs[0])
    if answered and task.select and (reason := _unfit(task, example, pairs[0], answered["predicted"])):
        return _excluded(task, job, reason=reason, **answered)
    way = reference.patch if task.engine == "reference" else partial(fast.patch, images=Images())
    rows, base = patch_example(task, example, pairs, unplaced, way, step)
    return result_of(task, job, rows, pairs[0], {**base, **answered})


def answer_of(task: Task, job: Todo, example: Example, pair: Pair) -> dict[str, Any]:
    """What the model answers, unless the folder has it."""
    if job.done:
        return {}
    predicted = task.answers.get(task.digests[job.number])
    if predicted is None:
        predicted = _said(task, example, pair, 0)
    return {"predicted": predicted, "correct": agrees(predicted, example.answer)}


def _said(task: Task, example: Example, pair: Pair, run: int) -> str:
    """The model's own generation in the clean run (0) or the corrupt one (1): behind the prompt alone, not
    behind the tokens of the answer that are fed."""
    model, (inputs, edits) = task.model, pair.runs[run]
    kind = task.corruption if run else None
    if inputs.layout[model.speaker].fed:
        picture = (kind == "image" and example.corrupt_image) or example.clean_image
        prompt = (kind == "text" and example.corrupt_prompt) or example.clean_prompt
        inputs = model.inputs(picture, prompt, example.more_images)
    return model.answer(inputs, edits)


def add_scores(base: dict[str, float], clean: Score, corrupt: Score, pairs: int) -> None:
    """Add what the two runs of one of so many pairs gave to their means."""
    for run, scores in (("clean", clean), ("corrupt", corrupt)):
        for name in ("p", "ld", "value"):
            base[f"{name}_{run}"] += getattr(scores, name).item() / pairs


def result_of(
    task: Task, job: Todo, rows: list[dict[str, Any]], pair: Pair, base: Mapping[str, Any]
) -> Result:
    """The rows of an example, and what the runs without patches gave; those of noise share the tokens of one
    pair."""
    baseline = {
        "example": task.ids[job.number],
        "corruption": task.kind,
        **{name: value for name, value in base.items() if task.corruption or "corrupt" not in name},
        "answer_token": " ".join(map(task.model.token, pair.answers)),
        "foil_token": None if pair.foil is None else task.model.token(pair.foil),
        "excluded": False,
    }
    return Result(
        job, pd.DataFrame(rows), pd.DataFrame([] if job.done else [baseline], columns=BASELINES.names)
    )


def patch_example(
    task: Task,
    example: Example,
    pairs: Sequence[Pair],
    sites: Sites,
    way: Callable[..., Patched],
    step: Callable[[int, float], None] = lambda patches, part: None,
    source: str | None = None,
) -> tuple[list[dict[str, Any]], Mapping[str, float]]:
    """The rows of an example, means over its pairs, and the scores of the runs without patches; `source` is
    one of the task's, where not all are meant."""
    layout = pairs[0].clean.layout
    patches = task.patches(sites, source or task.source, pairs[0].clean)
    placed, sources = [site for site, _ in patches], [source for _, source in patches]
    totals = np.zeros((len(placed), 3))
    base: dict[str, float] = defaultdict(float)
    count, least = 0, 0.0
    for pair in pairs:
        values = task.values(example, pair, sources)
        options = {"sources": sources, "values": values, "metric": task.metric}
        found = way(task.model, pair, placed, task.direction, **options)
        least = max(least, least_gap(task.model.precision, found.size))
        add_scores(base, found.clean, found.corrupt, len(pairs))
        for numbers, scores in found.chunks:
            each = torch.stack([scores.p, scores.ld, scores.value], 1)
            totals[numbers] += each.cpu().numpy() / len(pairs)
            count += len(numbers)
            step(len(numbers), count / len(placed) / len(pairs))
    names = {tower: slots(there) for tower, there in layout.items()}
    rows = []
    for (site, origin), gains in zip(patches, _gains(task, totals, base, least), strict=True):
        words = words_of(site, layout[site.tower], names[site.tower])
        words |= {} if task.source is None else {"source_site": str(origin)}
        rows.append({"example": example.id, "corruption": task.kind, **words, **gains})
    return rows, base


def _gains(
    task: Task, totals: np.ndarray[Any, Any], base: Mapping[str, float], least: float
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


def words_of(site: Site, layout: Layout, names: Sequence[str]) -> dict[str, Any]:
    """What a row says of the place that is patched."""
    position = site.positions[0] if len(site.positions) == 1 and not site.also else None
    role = next((role for role, where in layout.roles.items() if position in where), None)
    named = site.position.removesuffix("*")
    where = dict.fromkeys(part.position for part in site.parts)
    return {
        "site": str(site),
        "tower": site.tower,
        "layer": site.layer,
        "kind": site.kind,
        "unit": site.unit,
        "position": position,
        "token": None if position is None else layout.tokens[position],
        "role": named if named in layout.roles else role,
        "slot": " + ".join(where) if site.also else site.position if position is None else names[position],
    }


def _unfit(task: Task, example: Example, pair: Pair, predicted: str) -> str | None:
    """Why an example is not one to learn from, if so."""
    if not agrees(predicted, example.answer):
        return f"the model answers '{predicted}', not '{example.answer}'"
    then = _said(task, example, pair, 1)
    if task.kind == "image" and example.foil and not agrees(then, example.foil):
        return f"with the corrupt image the model answers '{then}', not '{example.foil}'"
    if (task.kind != "image" or not example.foil) and agrees(then, example.answer):
        return f"with the corrupt input ({task.kind}) the model still answers '{then}'"
    return None


def _excluded(task: Task, job: Todo, **fields: Any) -> Result:
    baseline = {"example": task.ids[job.number], "corruption": task.kind, "excluded": True, **fields}
    return Result(job, pd.DataFrame(), pd.DataFrame([baseline], columns=BASELINES.names))

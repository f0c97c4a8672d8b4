"""Direct effects of examples, as rows of `attribute`: what each writer gives by itself, exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlmscope.errors import SiteError, shown
from vlmscope.layout import slots
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.patching.direct import Direct, direct
from vlmscope.patching.scores import unpatched
from vlmscope.runs.model import Model
from vlmscope.sites import Site, expand, parse, place
from vlmscope.studies.recheck import CHECKED, RowsOf, drawn_examples, verdict
from vlmscope.studies.rows import answer_of, result_of, words_of
from vlmscope.studies.run_writer import Todo
from vlmscope.studies.task import Result, Task


class Writer(NamedTuple):
    """A site, the positions that it reads (of an edge), and what its row says of the place."""

    site: Site
    sources: Sequence[int]
    words: dict[str, Any]


def writers_of(model: Model, sites: Sequence[Site], inputs: Inputs) -> list[Writer]:
    """The rows that sites stand for in one run: one each, of an edge one for each source that it names."""
    tower, layout = model.speaker, inputs.layout
    names, at = {t: slots(there) for t, there in layout.items()}, len(layout[model.speaker].tokens) - 1
    found = []
    for site in sites:
        bare = replace(site, source="", also=tuple(replace(part, source="") for part in site.also))
        for one in model.places(bare, inputs):
            odd = [p for part in one.parts for p in part.positions if p != at]
            if odd:
                raise SiteError(
                    f"bad site {shown(site)}: what is written at position {odd[0]} does not reach the logits "
                    f"directly, which are read at {at}; expected readout"
                )
            if not site.source:
                found.append(Writer(one, (), words_of(one, layout[tower], names[tower])))
                continue
            reads = model.attended(tower, site.kind)
            for read in place(replace(bare, tower=reads, position=site.source), layout):
                edge = replace(one, source=read.position)
                words = words_of(read, layout[reads], names[reads])
                words |= {"site": str(edge), "tower": tower, "unit": edge.unit}
                found.append(Writer(edge, read.positions, words))
    return found


def written(task: Task, job: Todo, sites: Sequence[Site], step: Callable[[int, float], None]) -> Result:
    """The direct effects of one example, means over its pairs."""
    model, example, pairs = task.model, task.examples[job.number], task.pairs(task.examples[job.number])
    writers = writers_of(model, sites, pairs[0].clean)
    before = {(p.layer, p.kind) for s in expand(parse(job.done), model.shapes) for p in s.parts if _inner(p)}
    inner = {(p.layer, p.kind): None for s in sites for p in s.parts if _inner(p)}
    keys = [key for key in inner if key not in before]
    totals, biases, final = np.zeros(len(writers)), np.zeros(len(keys)), 0.0
    base: dict[str, Any] = {}
    for number, pair in enumerate(pairs, start=1):
        clean, corrupt = _both(task, pair, sites)
        for run, sign in ((clean, 1.0), (corrupt, -1.0)):
            if run is not None:
                totals += [sign * run.effect(site, sources) for site, sources, _ in writers]
                biases += [sign * run.back(key)[1] for key in keys]
                final += sign * run.bias
        for name, value in _base(pair, clean, corrupt or clean).items():
            base[name] = base.get(name, 0.0) + value / len(pairs)
        step(len(writers), number / len(pairs))
    rows = [
        {"example": example.id, "corruption": task.kind, **writer.words, "score": score / len(pairs)}
        for writer, score in zip(writers, totals, strict=True)
    ]
    ends = [] if job.done else [((model.shapes[model.speaker].layers - 1, "output"), final)]
    for (layer, kind), score in [*((k, b) for k, b in zip(keys, biases, strict=True) if b), *ends]:
        row = _bias(model, pairs[0].clean, layer, kind)
        rows.append({"example": example.id, "corruption": task.kind, **row, "score": score / len(pairs)})
    rows = [{**row, "exact": None} for row in rows]
    return result_of(task, job, rows, pairs[0], {**base, **answer_of(task, job, example, pairs[0])})


def _inner(part: Site) -> bool:
    """Whether something stands between a part and the stream: it is a head, a neuron, or what is read."""
    return bool(part.part or part.source)


def _both(task: Task, pair: Pair, sites: Sequence[Site] = ()) -> tuple[Direct, Direct | None]:
    """The clean run, and the corrupt one where there is one."""
    scored = pair.answer, pair.foil
    clean = direct(task.model, pair.clean, *scored, sites)
    if task.corruption is None:
        return clean, None
    return clean, direct(task.model, pair.corrupt, *scored, sites, pair.edits)


def _base(pair: Pair, clean: Direct, corrupt: Direct) -> dict[str, float]:
    """The runs' own scores; `value` is what is accounted for."""
    _, *scores, _ = unpatched(clean.logits[None], corrupt.logits[None], pair, "ld")
    both = dict(zip(("clean", "corrupt"), scores, strict=True))
    found = {f"{name}_{run}": float(getattr(s, name)) for run, s in both.items() for name in ("p", "ld")}
    return found | {"value_clean": clean.value, "value_corrupt": corrupt.value}


def _bias(model: Model, inputs: Inputs, layer: int, kind: str) -> dict[str, Any]:
    """What the row of a bias says of its place."""
    there = inputs.layout[model.speaker]
    at = len(there.tokens) - 1
    site = Site(model.speaker, layer, kind, position="readout", positions=(at,))
    name = f"{model.speaker}.{layer}.{kind}.b@readout"
    return words_of(site, there, slots(there)) | {"site": name, "unit": "b"}


def check_sums(task: Task, base: pd.DataFrame, _: RowsOf) -> dict[str, Any] | None:
    """Of some examples, whether all writers and biases sum to what the model itself gives."""
    drawn, largest, size = drawn_examples(task, CHECKED, base), 0.0, 1.0
    for example in drawn.values():
        for run in _both(task, task.pairs(example)[0]):
            if run is not None:
                apart = abs(run.total() - run.value)
                largest, size = max(largest, apart), max(size, float(run.logits.abs().max()))
    said = f"the sums of writers and biases in {len(drawn)} examples miss what the model gives"
    return verdict(task, len(drawn), largest, size, said) if drawn else None

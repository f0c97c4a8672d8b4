"""How much of a logit difference each place accounts for: one loop and one table, whatever the method.

`direct`: what each writer of the stream gives by itself (`patching.direct`), exact.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import SEED, DataError, ExampleError, SiteError, VlmscopeError, shown, whole
from vlmscope.layout import slots
from vlmscope.models.inputs import Inputs, Pair
from vlmscope.patching.direct import Direct, check_place, direct
from vlmscope.patching.scores import ROUNDING, agrees, unpatched
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.runs.prepare import option_of
from vlmscope.sites import Site, Sites, expand, parse, place
from vlmscope.studies.rows import result_of, run_jobs, words_of
from vlmscope.studies.run_folder import ATTRIBUTIONS, typed
from vlmscope.studies.sweep import ALARM, CHECKED, checked, into_folder, warn_of_excluded
from vlmscope.studies.task import Result, Task, Todo, all_jobs, spec_of

Method = Literal["direct"]
METHODS = get_args(Method)


@dataclass(frozen=True)
class Attribution(Task):
    """What decides what is in the table: instead of LD, `word` has its logit accounted for."""

    method: Method = "direct"
    word: str | None = None

    def pairs(self, example: Example) -> list[Pair]:
        found = super().pairs(example)
        if self.word is None:
            return found
        many = 1 + len(example.more_images)
        token = option_of(self.model, example.clean_prompt, "word", self.word, many)[0]
        return [replace(pair, answer=token, foil=None, answers=(token,)) for pair in found]


def attribute(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = None,
    *,
    method: Method = "direct",
    word: str | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    data: str = "examples",
) -> pd.DataFrame:
    """How much of LD = logit(answer) − logit(foil) each site accounts for; a row a site (columns as in
    `run_folder.ATTRIBUTIONS`), `score` in logits. With `word`, the logit of its first token takes LD's place.

    `direct`: what a writer to the stream of the tower that says the words gives by itself, past all that
    comes behind it, in the clean run: `attn`, `cross`, `mlp`, their heads (`attn.h*`) and neurons (`mlp.n*`),
    and `decoder.0.resid_pre`, the embedding, all `@readout`. With `corrupt`, what it gives in the clean run
    less what it gives in the corrupt one. `decoder.*.attn.h*@readout<image*` splits heads over what they
    read: a row a head and patch, whose `position`, `token`, `role` and `slot` are those of what is read.
    The biases have rows of their own (`unit` b): that of the final norm and the head, and those behind the
    heads and neurons that are named. All writers, each once, and these sum to LD (or its change).
    `attrs["check"]` says of how many examples (`rows`) this sum was compared with the model's own, whatever
    the sites, and the `largest` difference.

    `out` and `data` are as in `sweep`. Raises `ModelError` for a family without direct effects, `SiteError`
    for what is no writer, `DataError` if no example can be run, `StoreError` for a folder of another run.

    >>> import vlmscope
    >>> model, one = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=1)
    >>> writers = ["decoder.0.resid_pre@readout", "decoder.*.attn.h*@readout", "decoder.*.mlp@readout"]
    >>> table = attribute(model, one, writers)
    >>> ld = vlmscope.baselines(model, one)["ld_clean"]
    >>> bool(abs(table["score"].sum() - ld.item()) < 1e-4)
    True
    """
    task = _task_of(model, examples, sites, corrupt, method=method, word=word, seed=seed)
    check = partial(_check, task)
    if out is not None:
        both = {"method": method, "word": word}
        of_patches = ("direction", "engine", "metric", "patch", "select")
        spec = {name: value for name, value in spec_of(task, data).items() if name not in of_patches}
        run = into_folder(task, out, spec | both, lambda run: check(run.baselines()), _direct)
        warn_of_excluded(run.baselines())
        table, found = run.attributions(), run.check
    else:
        results = list(run_jobs(task, all_jobs(task), work=_direct))
        base = pd.concat([result.baseline for result in results], ignore_index=True)
        warn_of_excluded(base)
        table = typed(pd.concat([result.rows for result in results], ignore_index=True), ATTRIBUTIONS)
        found = check(base)
    table.attrs["check"] = found
    return table


def _task_of(
    model: Model, examples: Examples, sites: Sites, corrupt: str | Noise | None, **options: Any
) -> Attribution:
    """Checked against the model and the data before anything runs."""
    if not isinstance(model, Model):
        raise VlmscopeError(f"the model is {shown(model)}; expected a Model, as vlmscope.load gives it")
    if options["method"] not in METHODS:
        raise VlmscopeError(f"unknown method {shown(options['method'])}; expected {', '.join(METHODS)}")
    whole(options["seed"], "the seed", most=SEED)
    corruption = None if corrupt is None else corruptions.parse(corrupt)
    task = Attribution(model, listed(examples), [str(site) for site in parse(sites)], corruption, **options)
    if not task.examples:
        raise DataError("there are no examples; nothing to run")
    expanded = expand(parse(task.sites), model.shapes)
    for site in expanded:
        check_place(model, site)
    wrong: SiteError | None = None
    for example in task.examples:
        try:
            _writers(model, expanded, task.pairs(example)[0].clean)
            return task  # another example that lacks them is left out of the run
        except ExampleError:
            continue
        except SiteError as error:
            wrong = wrong or error
    if wrong is not None:
        raise wrong
    return task


class Writer(NamedTuple):
    """A site, the positions that it reads (of an edge), and what its row says of the place."""

    site: Site
    sources: Sequence[int]
    words: dict[str, Any]


def _writers(model: Model, sites: Sequence[Site], inputs: Inputs) -> list[Writer]:
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


def _direct(task: Task, job: Todo, sites: Sequence[Site], step: Callable[[int, float], None]) -> Result:
    """The direct effects of one example, means over its pairs."""
    model, example, pairs = task.model, task.examples[job.number], task.pairs(task.examples[job.number])
    writers = _writers(model, sites, pairs[0].clean)
    before = {(p.layer, p.kind) for s in expand(parse(job.done), model.shapes) for p in s.parts if _inner(p)}
    inner = {(p.layer, p.kind): None for s in sites for p in s.parts if _inner(p)}
    keys = [key for key in inner if key not in before]
    totals, biases, final = np.zeros(len(writers)), np.zeros(len(keys)), 0.0
    base: dict[str, Any] = {}
    for number, pair in enumerate(pairs):
        clean, corrupt = _both(task, pair, sites)
        for run, sign in ((clean, 1.0), (corrupt, -1.0)):
            if run is not None:
                totals += [sign * run.effect(site, sources) for site, sources, _ in writers]
                biases += [sign * run.back(key)[1] for key in keys]
                final += sign * run.bias
        if number == 0 or corrupt is not None:
            for name, value in _base(pair, clean, corrupt or clean).items():
                base[name] = base.get(name, 0.0) + value / len(pairs)
        step(len(writers), (number + 1) / len(pairs))
    answered: dict[str, Any] = {}
    if not job.done:
        predicted = model.answer(pairs[0].clean)
        answered = {"predicted": predicted, "correct": agrees(predicted, example.answer)}
    rows = [
        {"example": example.id, "corruption": task.kind, **writer.words, "score": score / len(pairs)}
        for writer, score in zip(writers, totals, strict=True)
    ]
    ends = [] if job.done else [((model.shapes[model.speaker].layers - 1, "output"), final)]
    for (layer, kind), score in [*((k, b) for k, b in zip(keys, biases, strict=True) if b), *ends]:
        row = _bias(model, pairs[0].clean, layer, kind)
        rows.append({"example": example.id, "corruption": task.kind, **row, "score": score / len(pairs)})
    rows = [{**row, "exact": None} for row in rows]
    return result_of(task, job, rows, pairs[0], {**base, **answered})


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


def _check(task: Attribution, base: pd.DataFrame) -> dict[str, Any] | None:
    """Of some examples, whether all writers and biases sum to what the model itself gives."""
    known, largest, size = {example.id: example for example in task.examples}, 0.0, 1.0
    names = checked(task, CHECKED, base)
    for name in names:
        for run in _both(task, task.pairs(known[name])[0]):
            if run is not None:
                apart = abs(run.total() - run.value)
                largest, size = max(largest, apart), max(size, float(run.logits.abs().max()))
    if largest > ALARM * ROUNDING[task.model.precision] * size:
        warnings.warn(
            f"the writers and biases of {len(names)} examples sum to what the model gives but for "
            f"{largest:.2g}, which is more than rounding: do not trust these scores",
            stacklevel=2,
        )
    return {"rows": len(names), "largest": largest} if names else None

"""What a sweep is to compute: checked against the model and the data before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
from torch import Tensor

from vlmscope.data import Examples, listed
from vlmscope.data.example import Example, fingerprint
from vlmscope.data.lazy import Digests, Lazy, ids_of, readable, roles_of
from vlmscope.errors import (
    SEED,
    DataError,
    ExampleError,
    SiteError,
    VlmscopeError,
    choice,
    nearest,
    shown,
    whole,
)
from vlmscope.layout import grid
from vlmscope.models.inputs import CUTS, Cut, Inputs, Pair
from vlmscope.patching import gradients as estimates
from vlmscope.patching.scores import Metric, check_metric
from vlmscope.patching.sources import Means, Source, check_widths, crossed, resampled, zeros
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Corruption, Noise
from vlmscope.runs.model import Model, check_model
from vlmscope.runs.prepare import option_of
from vlmscope.sites import Pattern, Point, Site, Sites, expand, parse, place, points_of
from vlmscope.stats import rng
from vlmscope.studies.run_writer import Todo

Shard = tuple[int, int]
"""Which of how many shards, counted from 1."""
Method = Literal["direct", estimates.Method]
"""How `attribute` scores sites: `direct`, or an estimate of their patches."""
PACKAGES = ("vlmscope", "torch", "transformers", "torchvision", "pillow")
"""Whose versions a run depends on; the last two turn pictures into pixels."""


@dataclass(frozen=True)
class Task:
    """All that decides what is in the table. `sites` and `source` are expressions; see `sweep`.

    A shard runs every so many of the examples; what is of all of them (means, a screen) stays so. `answers`
    are what another run of the model has heard it answer, by the fingerprints of examples.
    """

    model: Model
    examples: Sequence[Example]
    sites: list[str]
    corruption: Corruption | None
    direction: str = "denoise"
    engine: str = "fast"
    seed: int = 0
    select: bool = False
    metric: str | Metric = "ld"
    patch: Source | Cut = "clean"
    source: str | None = None
    shard: Shard | None = None
    answers: Mapping[str, str] = field(default_factory=dict)

    @property
    def numbers(self) -> range:
        """The numbers of the examples that are run."""
        which, many = self.shard or (1, 1)
        return range(which - 1, len(self.examples), many)

    @cached_property
    def digests(self) -> Sequence[str]:
        """The fingerprint of each example; of lazy ones it is made when it is asked for."""
        if isinstance(self.examples, Lazy):
            return Digests(self.examples)
        return [fingerprint([example]) for example in self.examples]

    @cached_property
    def ids(self) -> list[str]:
        """The id of each example."""
        return ids_of(self.examples)

    def named(self, names: Iterable[str]) -> dict[str, Example]:
        """Some examples, by their ids."""
        wanted = {*names}
        return {name: self.examples[number] for number, name in enumerate(self.ids) if name in wanted}

    @cached_property
    def are_edges(self) -> bool:
        """Whether edges of attention are cut, instead of activations patched."""
        return any(pattern.source for pattern in parse(self.sites))

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
        """Over all examples that can be run, at the sites that values come from."""
        sites = self.sites if self.source is None else self.source
        means = Means(self.model, points_of(expand(parse(sites), self.model.shapes)))
        for example in readable(self.examples):
            with suppress(ExampleError):
                means.add(self.pairs(example)[0].clean)
        return means

    def patches(self, sites: Sites, source: str | None, inputs: Inputs) -> list[tuple[Site, Site]]:
        """The patches of one example at sites, each with the place that its value comes from."""
        if source is None:
            return [(site, site) for site in self.model.placed(sites, inputs)]
        return crossed(self.model, self.model.named(sites), self.model.named(source), inputs)

    def values(
        self, example: Example, pair: Pair, sites: Sequence[Site]
    ) -> Mapping[Point, Tensor] | Cut | None:
        """What is written instead of the other run's activations, if anything, or how edges are cut."""
        if self.are_edges:
            return "zero" if self.patch == "zero" else "block"
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
        others = [number for number, name in enumerate(self.ids) if name != example.id]
        for number in rng(self.seed, "resample", example.id).permutation(len(others)):
            with suppress(ExampleError):
                yield self.pairs(self.examples[others[number]])[0].clean


@dataclass(frozen=True)
class Attribution(Task):
    """What decides what is in a table of `attribute`; instead of LD, `word` has its logit accounted for."""

    method: Method = "direct"
    word: str | None = None
    verify: int = 0
    steps: int | None = None

    def pairs(self, example: Example) -> list[Pair]:
        found = super().pairs(example)
        if self.word is None:
            return found
        many = 1 + len(example.more_images)
        token = option_of(self.model, example.clean_prompt, "word", self.word, many)[0]
        return [replace(pair, answer=token, foil=None, answers=(token,)) for pair in found]


class Result(NamedTuple):
    """Of one example: its rows (effects, or scores) and its row of `baselines`."""

    job: Todo
    rows: pd.DataFrame
    baseline: pd.DataFrame


def task_of(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None,
    source: str | Pattern | Site | None = None,
    **options: Any,
) -> Task:
    """Checked against the model and the data before anything runs; `options` are the other fields."""
    check_model(model)
    corruption = None if corrupt is None else corruptions.parse(corrupt)
    task = Task(model, listed(examples), [str(site) for site in parse(sites)], corruption, **options)
    if source is not None:
        if len(given := parse(source)) != 1:
            raise SiteError(
                f"values come from {len(given)} expressions; expected one, such as decoder.*.resid@5"
            )
        task = replace(task, source=str(given[0]))
    choice(task.direction, "direction", ("denoise", "noise"))
    choice(task.engine, "engine", ("fast", "reference"))
    whole(task.seed, "the seed", most=SEED)
    check_metric(task.metric)
    if not task.are_edges:
        choice(task.patch, "patch", get_args(Source))
    own = corrupt is None and task.patch == "clean"
    if (own and source is None) or (corrupt is None and task.select):
        raise VlmscopeError(
            "without a corruption (--corrupt image, text or noise) nothing can be copied or chosen by; "
            "name one, patch zero, mean or resample (--patch), or copy from another site of the run (--from)"
        )
    if source is not None and task.patch == "zero":
        raise VlmscopeError("a zero is from no other site; leave --from out, or patch clean (--patch)")
    check_examples(task)
    check_sites(model, task.examples, task.sites, task.patch)
    if task.source is not None:
        check_sites(model, task.examples, [task.source], task.patch)
        _check_crossed(task)
    # what ablates is written into the clean run, as what comes from the run itself
    return task if task.patch == "clean" and not own else replace(task, direction="noise")


def check_examples(task: Task) -> None:
    """Raises `DataError` where there is nothing to run, `VlmscopeError` for a shard that is none."""
    if not task.examples:
        raise DataError("there are no examples; nothing to run")
    if task.shard is None:
        return
    if not (isinstance(task.shard, tuple) and len(task.shard) == 2):
        raise VlmscopeError(f"the shard is {shown(task.shard)}; expected two numbers, such as (1, 4)")
    which, many = task.shard
    whole(many, "the number of shards", 1)
    whole(which, "the shard", 1, many)
    if many > len(task.examples):
        raise DataError(
            f"{len(task.examples)} examples do not make {many} shards; take at most {len(task.examples)}"
        )


def _check_crossed(task: Task) -> None:
    """Raises `SiteError` where what a place gives does not fit where it goes, in the first example."""
    for example in readable(task.examples):
        with suppress(ExampleError):
            inputs = task.pairs(example)[0].clean
            check_widths(task.model, task.patches(task.sites, task.source, inputs), inputs)
            return


def check_sites(
    model: Model, examples: Sequence[Example], sites: Sequence[str], patch: Source | Cut = "clean"
) -> None:
    """Raises `SiteError` for sites that this model or these examples do not have, and for edges beside
    activations."""
    parsed = parse(sites)
    expanded = expand(parsed, model.shapes)
    all_parts = [part for one in parsed for part in (one, *one.also)]
    edge = next((part for part in all_parts if part.source), None)
    if edge and not (patch in CUTS and all(part.source for part in all_parts)):
        raise SiteError(
            f"bad site {shown(edge)}: an edge of attention is not patched but knocked out, and not beside "
            "activations; leave it to vlmscope knockout"
        )
    for part in (part for site in expanded for part in site.parts):
        if part.source:
            model.attention_modules(part.tower, part.kind)  # raises an error where it is not told
        if part.part == "p" and patch in ("mean", "resample"):
            raise SiteError(
                f"bad site {shown(part)}: an attention pattern has as many numbers as its example has "
                f"tokens, so it has no {patch} over examples; patch clean or zero"
            )
    roles = roles_of(examples)
    for site in parsed:
        if unknown := [role for role in site.roles if role not in roles]:
            raise SiteError(
                f"bad site {shown(site)}: no example has a role {shown(unknown[0])}; the roles of this data: "
                f"{', '.join(roles) or 'none'}; name one of these{nearest(unknown[0], roles)}"
            )

    def find(example: Example) -> None:
        clean = model.prepare(replace(example, corrupt_image=None, corrupt_prompt=None)).clean
        for one in expanded:
            place(one, clean.layout)

    check_any(examples, find)


def check_any(examples: Sequence[Example], find: Callable[[Example], object]) -> None:
    """Raises the `SiteError` of the first example, where `find` raises one for all that can be run: others
    that lack a place are left out of the run."""
    wrong: SiteError | None = None
    for example in readable(examples):
        try:
            find(example)
            return
        except ExampleError:
            continue
        except SiteError as error:
            wrong = wrong or error
    if wrong is not None:
        raise wrong


def all_jobs(task: Task) -> list[Todo]:
    return [Todo(number, task.sites, []) for number in task.numbers]


def spec_of(task: Task, data: str) -> dict[str, Any]:
    if isinstance(task.examples, Lazy):
        data_hash = task.examples.hash
    else:
        data_hash = hashlib.sha256(" ".join(task.digests).encode()).hexdigest()
    noise = asdict(task.corruption) if isinstance(task.corruption, Noise) else {}
    return {
        "model": task.model.name,
        "weights": task.model.fingerprint(),
        "data": data,
        "data_hash": data_hash,
        "n_examples": len(task.examples),
        "sites": task.sites,
        "corrupt": {"kind": task.kind, **noise},
        "direction": task.direction,
        "engine": task.engine,
        "metric": task.metric if isinstance(task.metric, str) else task.metric.__qualname__,
        "patch": task.patch,
        **({"from": task.source} if task.source is not None else {}),
        **({"shard": "{}/{}".format(*task.shard)} if task.shard else {}),
        # what is written depends on all examples, so that none can be added
        **({"examples_of_the_patch": data_hash} if task.patch in ("mean", "resample") else {}),
        "dtype": task.model.precision,
        "device": task.model.device.type,
        "seed": task.seed,
        "select": task.select,
        "versions": {p: found for p in PACKAGES if (found := _version(p))},
    }


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def description_of(model: Model) -> dict[str, Any]:
    """The model's towers, for the report."""
    layouts = model.layouts()
    towers = {
        tower: {"layers": shape.layers, "heads": max(shape.heads.values()), "grid": grid(layouts[tower])}
        for tower, shape in model.shapes.items()
    }
    return {"towers": towers}

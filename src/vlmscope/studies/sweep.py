"""The one loop: examples × sites, into a table or a run folder."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import pandas as pd

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
from vlmscope.studies.run_folder import BASELINES, EFFECTS, Run, Writer, bytes_of, open_run, read_run, typed

Direction = Literal["denoise", "noise"]
Engine = Literal["fast", "reference"]

SHOWN = 4
"""How many examples a run folder keeps to look at."""
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
) -> pd.DataFrame:
    """Patch every site of every example; one row a patch (columns as in `store.EFFECTS`).

    `examples` are a list of them, a single one, or the name of a built-in set or a CSV file. `corrupt`
    is `image`, `text`, `noise` or a `Noise`. `denoise` copies clean activations into the corrupt run,
    `noise` corrupt ones into the clean run; the columns mean the same in both:
    `logit_diff` = LD(patched) − LD(corrupt), so a noising patch that changes nothing has the
    effect 1. Examples that cannot be run are left out with a warning.

    With `out`, the table is written to a run folder as it is computed; called again with the same
    arguments, it goes on where it stopped. `data` is the name of the examples in that folder.

    Raises `SiteError` for a site that this model or this data does not have, `StoreError` for a
    folder of another run, `DataError` if no example at all can be run, or there are none.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> table = sweep(model, vlmscope.examples("states", limit=1), "encoder.*.cross.h*@answer")
    >>> len(table), table.columns[0]
    (12, 'example')
    """
    if out is not None:
        run = sweep_to(
            out, model, examples, sites, corrupt, direction=direction, engine=engine, seed=seed, data=data
        )
        tell(run.baselines())
        return run.effects()
    task = _Task(model, listed(examples), sites, corrupt, direction, engine, seed)
    _, effects, baselines = zip(*task.run(task.numbers()), strict=True)
    tell(pd.concat(baselines, ignore_index=True))
    return typed(pd.concat(effects, ignore_index=True), EFFECTS)


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
) -> Run:
    """`sweep` into a run folder, without holding the table in memory; goes on where it stopped.

    With `select`, only examples are patched that the model answers rightly (by its own generation,
    compared by `metrics.agrees`) and whose answer follows the corruption: it becomes the foil when
    the image is the foil's, and is no longer the answer when the text or noise is what corrupts.
    The others stay in `baselines` as excluded, with what the model said.
    """
    examples = listed(examples)
    task = _Task(model, examples, sites, corrupt, direction, engine, seed, select)
    with open_run(out, task.spec(data), task.description()) as writer:
        left = [n for n in task.numbers() if n not in writer.done]
        for number, table, baseline in task.run(left, len(writer.done)):
            writer.add(number, table, baseline)
            if number < SHOWN:
                _show(writer, number, examples[number], corrupt, model)
        writer.finish()
    return read_run(out)


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
    examples = listed(examples)
    task = _Task(model, examples, sites, corrupt, "denoise", "fast", seed, select)
    seconds, size, patches, counted = 0.0, 0, 0, 0
    for number in task.numbers()[:TRIED]:
        start = time.perf_counter()
        [(_, effects, _)] = task.run([number], quiet=True)
        if effects.empty:
            continue
        seconds, counted = time.perf_counter() - start, counted + 1
        size, patches = bytes_of(effects), len(effects)
        if counted == 2 or seconds > 10.0:  # a long one has warmed up by itself
            break
    return Estimate(seconds * len(examples), size * len(examples), patches)


def baselines(
    model: Model, examples: Examples, corrupt: str | Noise = "image", *, seed: int = 0
) -> pd.DataFrame:
    """How the model does on each example, clean and corrupt (columns as in `store.BASELINES`).

    `predicted` is the model's own generation on the clean input; `correct` compares it with the
    answer, by `metrics.agrees`.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> table = baselines(model, vlmscope.examples("states", limit=2))
    >>> table["correct"].tolist()
    [True, True]
    """
    task = _Task(model, listed(examples), [], corrupt, "denoise", "fast", seed)
    tables = [baseline for _, _, baseline in task.run(task.numbers())]
    return typed(pd.concat(tables, ignore_index=True), BASELINES)


class _Task:
    """What is to be computed, checked against the model and the data before anything runs."""

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        sites: Sites,
        corrupt: str | Noise,
        direction: str,
        engine: str,
        seed: int,
        select: bool = False,
    ) -> None:
        if direction not in ("denoise", "noise"):
            raise VlmscopeError(f"unknown direction '{direction}'; expected denoise or noise")
        if engine not in ("fast", "reference"):
            raise VlmscopeError(f"unknown engine '{engine}'; expected fast or reference")
        if not examples:
            raise DataError("there are no examples; nothing to run")
        self.sites = parse(sites)
        self.patterns = expand(self.sites, model.shapes)
        _check_roles(self.sites, examples)
        self.model, self.examples, self.seed = model, examples, seed
        self.corruption: Corruption = corruptions.parse(corrupt)
        self.direction, self.engine, self.select = direction, engine, select

    def numbers(self) -> list[int]:
        return list(range(len(self.examples)))

    def spec(self, data: str) -> dict[str, Any]:
        """All that decides what is in the table."""
        corrupt: dict[str, Any] = {"kind": self._kind}
        if isinstance(self.corruption, Noise):
            corrupt |= asdict(self.corruption)
        return {
            "model": self.model.name,
            "weights": self.model.fingerprint(),
            "data": data,
            "data_hash": fingerprint(self.examples),
            "n_examples": len(self.examples),
            "sites": [str(site) for site in self.sites],
            "corrupt": corrupt,
            "direction": self.direction,
            "engine": self.engine,
            "dtype": self.model.precision,
            "device": self.model.device.type,
            "seed": self.seed,
            "select": self.select,
            "versions": {p: found for p in PACKAGES if (found := _version(p))},
        }

    def description(self) -> dict[str, Any]:
        """The model's towers, for the report."""
        layouts = self.model.layouts()
        towers = {
            tower: {"layers": shape.layers, "heads": max(shape.heads.values()), "grid": grid(layouts[tower])}
            for tower, shape in self.model.shapes.items()
        }
        return {"towers": towers}

    def run(
        self, numbers: Sequence[int], done: int = 0, quiet: bool = False
    ) -> Iterator[tuple[int, pd.DataFrame, pd.DataFrame]]:
        """Number, effects and baseline of each example; one that cannot be run has no effects."""
        with progress(len(numbers) + done, done, quiet) as step:
            for finished, number in enumerate(numbers, start=done):
                try:
                    effects, baseline = self._one(
                        self.examples[number],
                        lambda sites, share, before=finished: step(sites, before + share),
                    )
                except (ExampleError, SiteError) as error:
                    effects, baseline = self._excluded(self.examples[number], reason=str(error))
                yield number, effects, baseline
                step(0, finished + 1)

    def _one(self, example: Example, step: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
        pairs = corruptions.pairs(self.model, example, self.corruption, self.seed)
        said = self.model.answer(pairs[0].clean)
        correct = agrees(said, example.answer)
        if self.select and (reason := self._unfit(example, pairs[0], said)):
            return self._excluded(example, predicted=said, correct=correct, reason=reason)
        layout = pairs[0].clean.layout
        placed = [found for site in self.patterns for found in place(site, layout)]
        totals = [[0.0, 0.0] for _ in placed]
        base = dict.fromkeys(("p_clean", "p_corrupt", "ld_clean", "ld_corrupt"), 0.0)
        images = Images()
        count, least = 0, 0.0
        for pair in pairs:
            patched = self._patch(pair, placed, images)
            least = max(least, least_gap(self.model.precision, patched.size))
            for name, score in (("clean", patched.clean), ("corrupt", patched.corrupt)):
                base[f"p_{name}"] += score.p.item() / len(pairs)
                base[f"ld_{name}"] += score.ld.item() / len(pairs)
            for numbers, scores in patched.chunks:
                for n, p, ld in zip(numbers, scores.p.tolist(), scores.ld.tolist(), strict=True):
                    totals[n][0] += p / len(pairs)
                    totals[n][1] += ld / len(pairs)
                count += len(numbers)
                step(len(numbers), count / len(placed) / len(pairs))
        baseline = {
            "example": example.id,
            "corruption": self._kind,
            **base,
            "answer_token": self.model.token(pairs[0].answer),
            "foil_token": None if pairs[0].foil is None else self.model.token(pairs[0].foil),
            "predicted": said,
            "correct": correct,
            "excluded": False,
            "reason": None,
        }
        names = {tower: slots(one) for tower, one in layout.items()}
        rows = [
            self._row(example, site, layout[site.tower], names[site.tower], base, least, *total)
            for site, total in zip(placed, totals, strict=True)
        ]
        return _frame(rows, EFFECTS.names), _frame([baseline], BASELINES.names)

    def _patch(self, pair: Pair, placed: Sequence[Site], images: Images) -> Any:
        if self.engine == "reference":
            return reference.patch(self.model, pair, placed, self.direction)
        return fast.patch(self.model, pair, placed, self.direction, images=images)

    @property
    def _kind(self) -> str:
        return "noise" if isinstance(self.corruption, Noise) else self.corruption

    def _row(
        self,
        example: Example,
        site: Site,
        layout: Layout,
        names: Sequence[str],
        base: dict[str, float],
        least: float,
        p: float,
        ld: float,
    ) -> dict[str, Any]:
        at, role = site.positions, site.position.removesuffix("*")
        one = at[0] if len(at) == 1 and not site.also else None
        at_role = next((role for role, where in layout.roles.items() if one in where), None)
        return {
            "example": example.id,
            "corruption": self._kind,
            "site": str(site),
            "tower": site.tower,
            "layer": site.layer,
            "kind": site.kind,
            "unit": site.unit,
            "position": one,
            "token": None if one is None else layout.tokens[one],
            "role": role if role in layout.roles else at_role,
            "slot": site.position if one is None else names[one],
            "p_patched": p,
            "p_restored": p - base["p_corrupt"],
            "logit_diff": ld - base["ld_corrupt"],
            "effect": effect(ld, base["ld_clean"], base["ld_corrupt"], least),
        }

    def _unfit(self, example: Example, pair: Pair, said: str) -> str | None:
        """Why an example is not one to learn from, if so."""
        if not agrees(said, example.answer):
            return f"the model answers '{said}', not '{example.answer}'"
        then = self.model.answer(pair.corrupt, pair.edits)
        if self._kind == "image" and not agrees(then, example.foil):
            return f"with the corrupt image the model answers '{then}', not '{example.foil}'"
        if self._kind != "image" and agrees(then, example.answer):
            return f"with the corrupt input ({self._kind}) the model still answers '{then}'"
        return None

    def _excluded(self, example: Example, **fields: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
        baseline = {"example": example.id, "corruption": self._kind, "excluded": True, **fields}
        return _frame([], EFFECTS.names), _frame([baseline], BASELINES.names)


def _version(package: str) -> str | None:
    """Which version is installed, if any."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))


def tell(baselines: pd.DataFrame) -> None:
    """Warn of examples that were left out; an error if that is all of them."""
    left = baselines[baselines["excluded"].astype(bool)]
    if left.empty:
        return
    name, reason = left["example"].iloc[0], left["reason"].iloc[0]
    if len(left) == len(baselines):
        raise DataError(f"none of {len(left)} examples could be run; '{name}': {reason}")
    text = f"{len(left)} of {len(baselines)} examples were left out; '{name}': {reason}"
    warnings.warn(text, stacklevel=3)


def _check_roles(sites: Sequence[Pattern], examples: Sequence[Example]) -> None:
    roles = {role: None for example in examples for role in example.roles}
    for site in sites:
        unknown = next((role for role in site.roles if role not in roles), None)
        if unknown:
            raise SiteError(
                f"bad site '{site}': no example has a role '{unknown}'; "
                f"the roles of this data: {', '.join(roles) or 'none'}"
            )


def _show(writer: Writer, number: int, example: Example, corrupt: str | Noise, model: Model) -> None:
    """Keep what a person wants to see of an example: what this corruption uses, as the model sees it."""
    shown = vars(example).copy()
    if corrupt != "image":
        shown["corrupt_image"] = None
    if corrupt != "text":
        shown["corrupt_prompt"] = None
    with suppress(ExampleError):  # the example is excluded, with this reason
        for name in ("clean_image", "corrupt_image"):
            shown[name] = shown[name] and model.seen(shown[name])
        writer.add_pictures(number, shown)

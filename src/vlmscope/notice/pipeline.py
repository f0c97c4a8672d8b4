"""The parts of the pipeline, as a process that has the model does them."""

from __future__ import annotations

import itertools
import re
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope import files
from vlmscope.checkpoint import load, pieces
from vlmscope.data import BUILT_IN, examples
from vlmscope.data.example import Example
from vlmscope.data.hub import HUB
from vlmscope.data.questions.replacement import replace_words
from vlmscope.data.table import read_csv, write_csv
from vlmscope.errors import DataError, ModelError, StoreError, VlmscopeError, nearest, shown
from vlmscope.notice.kept import Sweep, selection
from vlmscope.notice.spec import Spec, name_of
from vlmscope.patching.backward import check_network
from vlmscope.patching.graph import check_tower
from vlmscope.runs.model import Model
from vlmscope.sites import expand, parse
from vlmscope.studies import circuits, heads
from vlmscope.studies.edges import edges
from vlmscope.studies.faithfulness import faithfulness
from vlmscope.studies.faithfulness.scores import HALVES
from vlmscope.studies.plan import estimate, size_of, time_of
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.sweep import Study, swept
from vlmscope.studies.task import check_sites

MODULES = ("resid", "attn", "cross", "mlp")
SIZES, DRAWS = (0.1, 0.5, 1.0), 19
"""Of circuits, as shares of the heads; and random ones beside the one that is reported."""
EDGES, STEPS, OF_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0), 5, 40
"""Of circuits of edges, as shares of these; points of the line that scores them; on how many examples."""


@dataclass
class Pipeline:
    """What the parts of the pipeline are made from; each process that does some of them has its own."""

    spec: Spec
    folder: Path
    is_warm: bool = False
    """Whether this process has run the model."""

    @cached_property
    def model(self) -> Model:
        return load(self.spec.model, dtype=self.spec.dtype, device=self.spec.device)

    def examples(self) -> dict[str, list[Example]]:
        return {name: found for name, (found, _) in self.sets.items()}

    @cached_property
    def sets(self) -> dict[str, tuple[list[Example], dict[str, int]]]:
        """The examples of each set, their pictures on disk, with corrupt prompts that align, and how they
        came by them."""
        spec, sets = self.spec, {}
        for data in spec.data:
            found = read_csv(self._drawn(data)) if data in BUILT_IN else _read(spec, data, spec.limit)
            found, counts = _with_prompts(spec, self.model, found)
            sets[name_of(data)] = list(found), counts
        return sets

    def _drawn(self, data: str) -> Path:
        return self.folder / "data" / f"{data}.csv"

    def check(self) -> None:
        """Check all places, and keep the specification."""
        spec = self.spec
        few = [_read(spec, d, 6 if d in BUILT_IN else spec.limit) for d in spec.data]
        _check_places(spec, few, self.model, sites_of(spec, self.model))
        if not (self.folder / "notice.toml").exists():
            with files.storing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            spec.save(self.folder / "notice.toml")

    def draw(self, data: str) -> None:
        """Keep the examples of a built-in set."""
        file = self._drawn(data)
        if not file.exists():
            write_csv(file, _read(self.spec, data, self.spec.limit))

    def sweeps(self) -> tuple[list[Sweep], list[str]]:
        """The sweeps, and lines to show."""
        spec, lines = self.spec, []
        for name, (found, counts) in self.sets.items():
            if counts:
                words = ", ".join(f"{many} {what}" for what, many in counts.items() if many)
                lines.append(f"{name}: {len(found)} examples; corrupt prompts: {words}")
        return _sweeps(spec, self.examples(), lines.append), lines

    def cost(self, name: str, corrupt: str) -> tuple[str, float, int]:
        """What a sweep will take: a line to show, seconds and bytes."""
        path, all_of_it = self.folder / "runs" / f"{name}-{corrupt}", self.sets[name][0]
        done = len(read_run(path).baselines()) if (path / "run.json").exists() else 0
        left, seconds, size, patches = all_of_it[done:], 0.0, 0, 0
        if left:
            made = swept_of(
                self.model, {name: left}, spec=self.spec, out=self.folder, name=name, corrupt=corrupt
            )
            seconds, size, patches = estimate(made.task, self.is_warm)[:3]
            self.is_warm = True
        many = len(all_of_it)
        what = f"{len(left)} of {many} examples left" if done else f"{many} examples"
        line = (
            f"  {f'{name}, {corrupt}':<24}{what:<28}{patches:>7,} patches each"
            f"{time_of(seconds):>16}{size_of(size):>10}"
        )
        return line, seconds, size

    def estimate(self, costs: Sequence[tuple[str, float, int]]) -> str:
        """What all sweeps will take, before they start; raise `StoreError` if the disk is too small."""
        lines, seconds, sizes = zip(*costs, strict=True)
        size, free = sum(sizes), shutil.disk_usage(self.folder).free
        if size > free:
            raise StoreError(
                f"{self.folder}: the results may take {size_of(size)}, and {size_of(free)} are free; "
                "free some space or choose another --out"
            )
        whole = f"  {'all sweeps, at most, in one process':<68}{time_of(sum(seconds)):>16}{size_of(size):>10}"
        return "\n".join(["Estimated from one example of each:", *lines, whole])

    def selection(self, sweeps: Sequence[Sweep]) -> pd.DataFrame:
        runs = {key: read_run(self.folder / "runs" / "-".join(key)) for key in sweeps}
        return selection({key: run.baselines() for key, run in runs.items()}, self.examples())

    def kept(self, run: Run, name: str) -> list[Example]:
        """The first examples of a set that its sweep has kept."""
        base = run.baselines()
        ids = set(base.loc[~base["excluded"], "example"])
        return [one for one in self.sets[name][0] if one.id in ids][: self.spec.function_examples]

    def functions(self, name: str, corrupt: str) -> tuple[Path | None, str]:
        """What the important heads of a set do, with the effects of its run: the folder, if there are any,
        and lines to show."""
        run, found = (
            read_run(self.folder / "runs" / f"{name}-{corrupt}"),
            circuits.read(self.folder / "circuits"),
        )
        chosen = self.kept(run, name)
        important = found.heads[found.heads["important"] & (found.heads["run"] == run.path.name)]
        everywhere = found.universal[found.universal["universal"]]
        every, ids = circuits.expressions(pd.concat([important, everywhere])), {one.id for one in chosen}
        held_out = circuits.held_out(run, position=self.spec.position, seed=self.spec.seed)
        sites = [site for site in every if len(ids.intersection(held_out.get(site, ()))) > 1]
        if not sites:
            return None, f"{name}: no important heads (or too few examples), so no head functions"
        few = f" of {len(every)}" if len(sites) < len(every) else ""
        said = (
            f"{name}: what {len(sites)}{few} heads do, on {len(chosen)} examples, each on those that did not "
            "choose it"
        )
        out = self.folder / "heads" / name
        table = heads.write(
            out,
            self.model,
            chosen,
            sites,
            corrupt,
            seed=self.spec.seed,
            effects=run,
            held_out={site: held_out[site] for site in sites},
            data=name,
        )
        counts = table.functions["label"].value_counts()
        return out, f"{said}\n  " + ", ".join(f"{many} {label}" for label, many in counts.items())

    def carried(self, name: str, corrupt: str) -> tuple[Path | None, str]:
        """How much the circuit of a run carries, found on one half of its examples, on the other: the folder,
        if there are halves, and a line to show."""
        kept = self.kept(read_run(self.folder / "runs" / f"{name}-{corrupt}"), name)
        if len(kept) < HALVES:
            return None, f"{name}, {corrupt}: too few examples for halves, so no circuit is measured"
        out = self.folder / "faithfulness" / f"{name}-{corrupt}"
        found = faithfulness(
            self.model,
            kept,
            self.folder / "circuits",
            corrupt,
            fractions=SIZES,
            draws=DRAWS,
            seed=self.spec.seed,
            out=out,
            data=name,
        )
        return out, f"{name}, {corrupt}: {found.lines()[-1]}"

    def no_edges(self) -> str | None:
        """Why the model has no circuits of edges, if it has none."""
        try:
            check_tower(self.model, self.model.speaker)
            check_network(self.model)
        except ModelError as error:
            return str(error)
        return None

    def mechanism(self, name: str, corrupt: str) -> tuple[Path | None, str]:
        """As `carried`, of edges: scored by gradients on one half of at most `OF_EDGES` examples."""
        kept = self.kept(read_run(self.folder / "runs" / f"{name}-{corrupt}"), name)[:OF_EDGES]
        if len(kept) < HALVES:
            return None, f"{name}, {corrupt}: too few examples for halves, so no circuit of edges is measured"
        scores, out = (self.folder / what / f"{name}-{corrupt}" for what in ("edges", "mechanism"))
        both: dict[str, Any] = {"seed": self.spec.seed, "data": name}
        edges(self.model, kept, corrupt, method="eap-ig", steps=STEPS, out=scores, **both)
        found = faithfulness(self.model, kept, scores, corrupt, fractions=EDGES, draws=DRAWS, out=out, **both)
        return out, f"{name}, {corrupt}: {found.lines()[-1]}"


def sites_of(spec: Spec, model: Model) -> tuple[str, ...]:
    return spec.sites or default_sites(model)


def swept_of(
    model: Model, sets: Mapping[str, Sequence[Example]], *, spec: Spec, out: Path, name: str, corrupt: str
) -> Study:
    """The sweep of a set with a corruption; what another sweep of it has heard is not asked again."""
    paths = [out / "runs" / f"{name}-{other}" for other in spec.corrupt if other != corrupt]
    runs = [read_run(path) for path in paths if (path / "run.json").exists()]
    answers = ChainMap(*(run.answers(model.fingerprint(), model.precision) for run in runs))
    options: dict[str, Any] = {"seed": spec.seed, "data": name, "select": spec.select, "answers": answers}
    return swept(model, sets[name], sites_of(spec, model), corrupt, **options)


def default_sites(model: Model) -> tuple[str, ...]:
    """Every module and every head of the text towers, at every text token."""
    found = []
    for tower in model.text_towers:
        shape = model.shapes[tower]
        found += [f"{tower}.*.{kind}@text*" for kind in MODULES if kind in shape.kinds]
        found += [f"{tower}.*.{kind}.h*@text*" for kind in shape.heads]
    return tuple(found)


def _check_places(spec: Spec, few: Sequence[Sequence[Example]], model: Model, sites: Sequence[str]) -> None:
    """Refuse sites and a position that are not there in some examples of each set, before anything is
    written."""
    given = list(itertools.chain(*few))
    if not set(spec.data) & set(BUILT_IN):  # of which only a few are looked at here, and all have pairs
        sets = zip(spec.data, few, strict=True)
        paired = {name_of(data): _with_prompts(spec, model, some)[0] for data, some in sets}
        _sweeps(spec, paired, lambda text: None)
    check_sites(model, given, sites)
    if not any(part.part == "h" for site in expand(parse(sites), model.shapes) for part in site.parts):
        raise VlmscopeError("notice: no site is a head; add some, such as 'encoder.*.cross.h*@answer'")
    roles = dict.fromkeys(["readout", "last", *itertools.chain(*(one.roles for one in given))])
    if spec.position is not None and re.split(r"[\[+]", spec.position)[0] not in roles:
        raise VlmscopeError(
            f"notice: no example has a position {shown(spec.position)}; expected one of {', '.join(roles)}"
            f"{nearest(spec.position, roles)}"
        )


def _read(spec: Spec, data: str, limit: int | None) -> Sequence[Example]:
    columns = spec.columns if data.startswith(HUB) else None
    return examples(data, limit=limit, seed=spec.seed, columns=columns)


def _sweeps(spec: Spec, sets: Mapping[str, Sequence[Example]], say: Callable[[str], None]) -> list[Sweep]:
    """Each set with each corruption that it has something for; raises `DataError` if that is none."""
    found = []
    for name, some in sets.items():
        for corrupt in spec.corrupt:
            lacks = {"image": "corrupt_image", "text": "corrupt_prompt"}.get(corrupt)
            if lacks and all(getattr(one, lacks) is None for one in some):
                say(f"{name}: no example has a {lacks.replace('_', ' ')}; that corruption is left out")
            else:
                found.append((name, corrupt))
    if not found:
        what = " and ".join(spec.corrupt)
        raise DataError(
            f"no example of {', '.join(sets)} has what the corruption {what} needs; fill corrupt_image_path "
            "or corrupt_prompt, or corrupt by noise"
        )
    return found


def _with_prompts(
    spec: Spec, model: Model, some: Sequence[Example]
) -> tuple[Sequence[Example], dict[str, int]]:
    """Examples with corrupt prompts that align, where these are asked for, and how they came by them."""
    if "text" not in spec.corrupt:
        return some, {}
    return replace_words(some, pieces=partial(pieces, model.processor.tokenizer), seed=spec.seed)

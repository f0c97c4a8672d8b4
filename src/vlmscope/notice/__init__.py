"""The NOTICE pipeline (arXiv 2406.16320) in one call: from data to what the universal heads do.

    DIR/notice.toml          the whole specification
    DIR/data/NAME.csv        built-in sets, drawn once, so that pictures need no memory
    DIR/runs/NAME-image/     a sweep of all modules and heads (a run folder)
    DIR/selection.csv        how many the model answers rightly, and how many are kept, by group
    DIR/selection.json       that this pipeline made it
    DIR/circuits/            important heads of each run, universal heads over all
    DIR/heads/NAME/          what the important heads do
    DIR/faithfulness/NAME-image/   how much of the behaviour the circuit carries that a run's heads are
    DIR/report.html          all of it to look at

Killed at any moment, the same call goes on where it stopped and ends with the same tables.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from vlmscope import files, stored
from vlmscope.checkpoint import load, pieces
from vlmscope.data import BUILT_IN, SIZE, examples
from vlmscope.data.drawn import draw
from vlmscope.data.example import Example
from vlmscope.data.hub import HUB
from vlmscope.data.questions.replacement import replace_words
from vlmscope.data.table import read_csv, write_csv
from vlmscope.errors import DataError, StoreError, VlmscopeError, nearest, shown
from vlmscope.notice.spec import Spec as Spec
from vlmscope.notice.spec import name_of
from vlmscope.report import claim_report, write_report
from vlmscope.runs.model import Model
from vlmscope.sites import expand, parse
from vlmscope.stored import formats
from vlmscope.studies import circuits, heads
from vlmscope.studies.faithfulness import Faithful, faithfulness
from vlmscope.studies.faithfulness import read as read_faithful
from vlmscope.studies.faithfulness.scores import HALVES
from vlmscope.studies.known import knows
from vlmscope.studies.plan import estimate, size_of, time_of
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.sweep import sweep_to
from vlmscope.studies.task import check_sites, task_of

Say = Callable[[str], None]
Sweep = tuple[str, str]
"""The name of a data set, and a corruption."""

MODULES = ("resid", "attn", "cross", "mlp")
SELECTION = formats.SELECTION.shape["format"]
SIZES, DRAWS = (0.1, 0.5, 1.0), 19
"""Of circuits, as shares of the heads; and random ones beside the one that is reported."""
MANY = 12
"""A group with more values than this (an id, a noun) is no group to report on."""


def run(spec: Spec, out: str | os.PathLike[str], say: Say = lambda text: None) -> Path:
    """Run the pipeline into the folder `out`, and give the report; `say` gets lines to show.

    Raises `StoreError` if the folder holds another specification or the disk is too small for
    what is estimated, and what its parts raise.
    """
    folder = Path(out)
    _check_folder(spec, folder)
    model = load(spec.model, dtype=spec.dtype, device=spec.device)
    sites = spec.sites or default_sites(model)
    _check_places(spec, model, sites)
    if not (folder / "notice.toml").exists():
        with files.storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        spec.save(folder / "notice.toml")
    parts = _Pipeline(spec, folder, model, sites, say)
    sets = {name_of(one): parts.examples(one) for one in spec.data}
    sweeps = _sweeps(spec, sets, say)
    parts.estimate(sets, sweeps)
    runs: dict[Sweep, Run] = {}
    bases: dict[Sweep, pd.DataFrame] = {}
    for name, corrupt in sweeps:
        say(f"{name}, {corrupt} corrupted")
        place, seed = folder / "runs" / f"{name}-{corrupt}", spec.seed
        made = sweep_to(place, model, sets[name], sites, corrupt, seed=seed, data=name, select=spec.select)
        runs[name, corrupt], bases[name, corrupt] = made, made.baselines()
        lines = [*knows(bases[name, corrupt]).lines(), made.check_line()]
        say("\n".join(f"  {line}" for line in lines))
    chosen = selection(bases, sets)
    files.save(folder, "selection.json", {"format": SELECTION}, {"selection.csv": chosen})
    say(_say_selection(chosen))
    useful = [runs[key].path for key, base in bases.items() if not base["excluded"].all()]
    if not useful:
        first = next(iter(bases.values())).iloc[0]
        raise DataError(
            f"no example of any set is kept ('{first['example']}': {first['reason']}); "
            "the model must answer some rightly (or set select = false)"
        )
    found = circuits.find(useful, position=spec.position, seed=spec.seed)
    found.save(folder / "circuits")
    say(_say_heads(found))
    folders = [*useful, folder / "circuits"]
    for name, given in sets.items():
        key = next(((name, c) for c in ("image", "noise", "text") if (name, c) in runs), None)
        if key is not None:
            kept = set(bases[key].loc[~bases[key]["excluded"], "example"])
            studied = [e for e in given if e.id in kept][: spec.function_examples]
            folders += parts.functions(*key, studied, runs[key], found)
    for name, corrupt in runs:
        base = bases[name, corrupt]
        kept = set(base.loc[~base["excluded"], "example"])
        folders += parts.carried(name, corrupt, [one for one in sets[name] if one.id in kept])
    report = write_report(folders, folder / "report.html")
    say(f"The report: {report}")
    return report


@dataclass(frozen=True)
class Notice:
    """What the pipeline has computed: the runs by data set and corruption, the circuits, the heads by set,
    and what the circuit of each run carries."""

    spec: Spec
    runs: dict[Sweep, Run]
    selection: pd.DataFrame
    circuits: circuits.Found
    heads: dict[str, heads.Functions]
    faithfulness: dict[Sweep, Faithful]


def read(folder: str | os.PathLike[str]) -> Notice:
    """What `run` has written; raises `StoreError` where that is not all there yet."""
    path, way_out = Path(folder), "run the same command again"
    chosen = stored.read(path, formats.SELECTION)[1]["selection"]
    spec = Spec.from_toml(path / "notice.toml")
    runs, there = {}, {run.name: run for run in path.glob("runs/*")}
    for name, corrupt in chosen[["data", "corruption"]].drop_duplicates().itertuples(index=False):
        if f"{name}-{corrupt}" not in there:
            raise StoreError(f"{path}: no run {shown(f'{name}-{corrupt}')} in it; {way_out}")
        runs[name, corrupt] = read_run(there[f"{name}-{corrupt}"], path)
    functions = {}
    for of_set in path.glob("heads/*"):
        stored.no_links(of_set, path)
        functions[of_set.name] = heads.read(of_set)
    carried = {}
    for key in runs:
        place = path / "faithfulness" / "-".join(key)
        if place.is_dir():
            stored.no_links(place, path)
            carried[key] = read_faithful(place)
    stored.no_links(path / "circuits", path)
    return Notice(spec, runs, chosen, circuits.read(path / "circuits"), functions, carried)


def default_sites(model: Model) -> tuple[str, ...]:
    """Every module and every head of the text towers, at every text token."""
    found = []
    for tower in model.text_towers:
        shape = model.shapes[tower]
        found += [f"{tower}.*.{kind}@text*" for kind in MODULES if kind in shape.kinds]
        found += [f"{tower}.*.{kind}.h*@text*" for kind in shape.heads]
    return tuple(found)


def _check_folder(spec: Spec, folder: Path) -> None:
    """Refuse the folder of another specification, and one that cannot be written."""
    file = folder / "notice.toml"
    with files.storing(folder):
        own = file.exists() or not folder.is_dir()
        if not own and any(not files.is_temporary(path) for path in folder.iterdir()):
            raise StoreError(
                f"{folder}: not empty, and not a folder of notice (no notice.toml); choose another --out"
            )
    files.claim(folder, "selection.json", SELECTION, ["selection.csv"])
    circuits.Found.claim(folder / "circuits")
    claim_report(folder / "report.html")
    if not file.exists():
        return
    there, here = Spec.from_toml(file), spec._absolute()
    if there != here:
        odd = [k for k, v in asdict(there).items() if v != getattr(here, k)]
        raise StoreError(
            f"{folder}: holds another notice run ({', '.join(odd)} differ); choose another "
            "--out or delete the folder"
        )


def _check_places(spec: Spec, model: Model, sites: Sequence[str]) -> None:
    """Refuse sites and a position that are not there, before anything is written."""
    few = [_read(spec, d, 6 if d in BUILT_IN else spec.limit) for d in spec.data]
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


def _read(spec: Spec, data: str, limit: int | None) -> list[Example]:
    columns = spec.columns if data.startswith(HUB) else None
    return examples(data, limit=limit, seed=spec.seed, columns=columns)


def _sweeps(spec: Spec, sets: Mapping[str, Sequence[Example]], say: Say) -> list[Sweep]:
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


@dataclass(frozen=True)
class _Pipeline:
    """The parts that need the model."""

    spec: Spec
    folder: Path
    model: Model
    sites: Sequence[str]
    say: Say

    def examples(self, data: str) -> list[Example]:
        """The examples of one set, their pictures on disk, with corrupt prompts that align."""
        spec = self.spec
        found: Sequence[Example]
        if data in BUILT_IN:
            file = self.folder / "data" / f"{data}.csv"
            if not file.exists():
                write_csv(file, draw(data, spec.limit or SIZE, seed=spec.seed))
            found = read_csv(file)
        else:
            found = _read(spec, data, spec.limit)
        found, counts = _with_prompts(spec, self.model, found)
        if counts:
            lines = ", ".join(f"{many} {what}" for what, many in counts.items() if many)
            self.say(f"{name_of(data)}: {len(found)} examples; corrupt prompts: {lines}")
        return list(found)

    def estimate(self, sets: Mapping[str, list[Example]], sweeps: Sequence[Sweep]) -> None:
        """Say what the sweeps will take, before they start; raise `StoreError` if the disk is too small."""
        lines, seconds, size, spec = ["Estimated from one example of each:"], 0.0, 0, self.spec
        for name, corrupt in sweeps:
            path = self.folder / "runs" / f"{name}-{corrupt}"
            done = len(read_run(path).baselines()) if (path / "run.json").exists() else 0
            left = sets[name][done:]
            each = (0.0, 0, 0)
            if left:
                task = task_of(self.model, left, self.sites, corrupt, seed=spec.seed, select=spec.select)
                each = estimate(task)[:3]
            took, takes, patches = each
            seconds, size = seconds + took, size + takes
            many = len(sets[name])
            what = f"{len(left)} of {many} examples left" if done else f"{many} examples"
            lines.append(
                f"  {f'{name}, {corrupt}':<24}{what:<28}{patches:>7,} patches each"
                f"{time_of(took):>16}{size_of(takes):>10}"
            )
        self.say(
            "\n".join([*lines, f"  {'all sweeps, at most':<68}{time_of(seconds):>16}{size_of(size):>10}"])
        )
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise StoreError(
                f"{self.folder}: the results may take {size_of(size)}, and {size_of(free)} are free; "
                "free some space or choose another --out"
            )

    def functions(
        self, name: str, corrupt: str, chosen: Sequence[Example], run: Run, found: circuits.Found
    ) -> list[Path]:
        """What the important heads of a set do, with the effects of its run; the folder, if there are any."""
        important = found.heads[found.heads["important"] & (found.heads["run"] == run.path.name)]
        everywhere = found.universal[found.universal["universal"]]
        every, ids = circuits.expressions(pd.concat([important, everywhere])), {one.id for one in chosen}
        held_out = circuits.held_out(run, position=self.spec.position, seed=self.spec.seed)
        sites = [site for site in every if len(ids.intersection(held_out.get(site, ()))) > 1]
        if not sites:
            self.say(f"{name}: no important heads (or too few examples), so no head functions")
            return []
        few = f" of {len(every)}" if len(sites) < len(every) else ""
        self.say(
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
        self.say("  " + ", ".join(f"{many} {label}" for label, many in counts.items()))
        return [out]

    def carried(self, name: str, corrupt: str, kept: Sequence[Example]) -> list[Path]:
        """How much the circuit of a run carries, found on one half of its examples, on the other; the folder,
        if there are halves."""
        kept = kept[: self.spec.function_examples]
        if len(kept) < HALVES:
            self.say(f"{name}, {corrupt}: too few examples for halves, so no circuit is measured")
            return []
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
        self.say(f"{name}, {corrupt}: {found.lines()[-1]}")
        return [out]


def selection(baselines: Mapping[Sweep, pd.DataFrame], sets: Mapping[str, Sequence[Example]]) -> pd.DataFrame:
    """How many examples of each group are answered rightly and how many are kept.

    Columns: `data`, `corruption`, `group`, `value` (`all` for all), `n`, `ran` (could be run at all),
    `correct`, `accuracy` (of those that ran), `kept`, `dropped_wrong`, `dropped_not_following`,
    `dropped_not_run`.
    """
    parts = []
    for (name, corrupt), table in baselines.items():
        base, whole = table.set_index("example"), {"all": "all"}
        groups = pd.DataFrame({e.id: whole | dict(e.groups) | whole for e in sets[name]}).T.reindex(
            base.index
        )
        ran, correct = base["correct"].notna(), base["correct"].fillna(False).astype(bool)
        kept = ~base["excluded"]
        counts = pd.DataFrame({"n": True, "ran": ran, "correct": correct, "kept": kept})
        counts["dropped_wrong"] = ~kept & ran & ~correct
        counts["dropped_not_following"] = ~kept & correct
        counts["dropped_not_run"] = ~ran
        for group in (c for c in groups if groups[c].nunique() <= MANY):
            part = counts.groupby(groups[group].rename("value")).sum().reset_index()
            part.insert(4, "accuracy", part["correct"] / part["ran"])
            parts.append(pd.DataFrame({"data": name, "corruption": corrupt, "group": group, **part}))
    return pd.concat(parts, ignore_index=True)


def _say_selection(table: pd.DataFrame) -> str:
    lines = ["Kept for patching (answered rightly, and the answer follows the corruption):"]
    lines += [
        f"  {f'{r.data}, {r.corruption}':<24}{r.kept:>5} of {r.n:<5} right {r.accuracy:>6.1%}   dropped: "
        f"{r.dropped_wrong} wrong, {r.dropped_not_following} not following, {r.dropped_not_run} not run"
        for r in table[table["group"] == "all"].itertuples()
    ]
    return "\n".join(lines)


def _say_heads(found: circuits.Found) -> str:
    lines = ["Important heads (by their mean over examples that did not choose them; * confirmed by halves):"]
    for run_name, table in found.heads[found.heads["important"]].groupby("run", sort=False):
        table = table.assign(held=table["mean_held_out"].fillna(0.0))
        table = table.sort_values("held", key=abs, ascending=False)
        shown = [
            f"{r.tower}.L{r.layer}.{r.kind}.H{r.head} {r.held:+.2f}{'*' if r.confirmed is True else ''}"
            for r in table.head(6).itertuples()
        ]
        more = f" and {len(table) - 6} more" if len(table) > 6 else ""
        lines.append(f"  {run_name:<24}" + ", ".join(shown) + more)
    everywhere = found.universal[found.universal["universal"]]
    names = [f"{r.tower}.L{r.layer}.{r.kind}.H{r.head}" for r in everywhere.itertuples()]
    lines.append(f"Universal over all {found.heads['run'].nunique()} runs: {', '.join(names) or 'none'}")
    return "\n".join(lines)

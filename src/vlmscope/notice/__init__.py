"""The NOTICE pipeline (arXiv 2406.16320) in one call: from data to what the universal heads do.

    DIR/notice.toml          the whole specification
    DIR/data/NAME.csv        built-in sets, drawn once, so that pictures need no memory
    DIR/runs/NAME-image/     a sweep of all modules and heads (a run folder)
    DIR/selection.csv        how many the model answers rightly, and how many are kept, by group
    DIR/selection.json       that this pipeline made it
    DIR/circuits/            important heads of each run, universal heads over all
    DIR/heads/NAME/          what the important heads do
    DIR/faithfulness/NAME-image/   how much of the behaviour the circuit carries that a run's heads are
    DIR/edges/NAME-image/    which part feeds which: a score an edge (a run folder)
    DIR/mechanism/NAME-image/      how much the best of these edges carry
    DIR/report.html          all of it to look at

Killed at any moment, the same call goes on where it stopped and ends with the same tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope import files
from vlmscope.calls import Calls
from vlmscope.data import BUILT_IN
from vlmscope.errors import DataError, StoreError
from vlmscope.notice.kept import lines_of
from vlmscope.notice.spec import Spec as Spec
from vlmscope.report import claim_report, write_report
from vlmscope.stored import formats
from vlmscope.studies import circuits
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import read_run
from vlmscope.studies.workers import alone
from vlmscope.studies.workers.orders import Given, Named
from vlmscope.studies.workers.team import Team

if TYPE_CHECKING:
    from vlmscope.notice.pipeline import Pipeline
    from vlmscope.runs.model import Model
    from vlmscope.studies.workers.worker import Alone

Say = Callable[[str], None]

ORDER = ("image", "noise", "text")
"""By which corruption of a set it is asked what heads do."""
SWEPT = Named("notice.pipeline:swept_of")


def run(
    spec: Spec,
    out: str | os.PathLike[str],
    say: Say = lambda text: None,
    by: Callable[[Given], Alone | Team] = alone,
) -> Path:
    """Run the pipeline into the folder `out`, and give the report; `say` gets lines to show.

    `by` gives who computes: this process, or others (`studies.workers.started`), of which each loads the
    model, and this one does not.

    Raises `StoreError` if the folder holds another specification or the disk is too small for
    what is estimated, and what its parts raise.
    """
    folder = Path(out)
    _check_folder(spec, folder)
    team = by(_Given(spec, folder))

    def do(calls: Calls) -> Iterator[Any]:
        return team.each((_Given.call, *call) for call in calls)

    list(team.each([(_Given.do, "check")]))
    list(team.each((_Given.do, "draw", data) for data in spec.data if data in BUILT_IN))
    [(sweeps, lines)] = team.each([(_Given.do, "sweeps")])
    for text in lines:
        say(text)
    costs = list(team.each([(_Given.do, "cost", *key) for key in sweeps]))
    [text] = team.each([(_Given.do, "estimate", costs)])
    say(text)
    useful = []
    for name, corrupt in sweeps:
        say(f"{name}, {corrupt} corrupted")
        options = {"spec": spec, "out": folder, "name": name, "corrupt": corrupt}
        made, _ = team.fill(folder / "runs" / f"{name}-{corrupt}", SWEPT, options)
        base = made.baselines()
        say("\n".join(f"  {line}" for line in [*knows(base).lines(), made.check_line()]))
        useful += [] if base["excluded"].all() else [made.path]
    [chosen] = team.each([(_Given.do, "selection", sweeps)])
    form = formats.SELECTION
    form.save(folder, {"format": form.name}, {"selection.csv": chosen})
    say(lines_of(chosen))
    if not useful:
        first = read_run(folder / "runs" / "-".join(sweeps[0])).baselines().iloc[0]
        raise DataError(
            f"no example of any set is kept ('{first['example']}': {first['reason']}); "
            "the model must answer some rightly (or set select = false)"
        )
    found = circuits.find(useful, position=spec.position, seed=spec.seed, do=do)
    [no_edges] = team.each([(_Given.do, "no_edges")]) if spec.edges else [""]  # "": not asked for
    if no_edges:
        found.about["no_edges"] = no_edges
    found.save(folder / "circuits")
    say(_say_heads(found))
    if no_edges:
        say(f"No circuits of edges: {no_edges}")
    folders = [*useful, folder / "circuits"]
    names = dict.fromkeys(name for name, _ in sweeps)
    firsts = [(name, next(c for c in ORDER if (name, c) in sweeps)) for name in names]
    calls = [(_Given.do, "functions", *key) for key in firsts]
    calls += [(_Given.do, "carried", *key) for key in sweeps]
    calls += [(_Given.do, "mechanism", *key) for key in sweeps] if no_edges is None else []
    for place, told in team.each(calls):  # one beside the other
        say(told)
        folders += [] if place is None else [place]
    report = write_report(folders, folder / "report.html", do=do)
    say(f"The report: {report}")
    return report


@dataclass(frozen=True)
class _Given:
    """What each process that computes is given. What the parts are made from is its own, and torch, which the
    one that holds the folder does without."""

    spec: Spec
    folder: Path

    @cached_property
    def pipeline(self) -> Pipeline:
        from vlmscope.notice.pipeline import Pipeline

        return Pipeline(self.spec, self.folder)

    def load(self) -> Model:
        return self.pipeline.model

    def examples(self) -> Any:
        return self.pipeline.examples()

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        return function(*given)

    def do(self, part: str, *some: Any) -> Any:
        return getattr(self.pipeline, part)(*some)


def _check_folder(spec: Spec, folder: Path) -> None:
    """Refuse the folder of another specification, and one that cannot be written."""
    file = folder / "notice.toml"
    with files.storing(folder):
        own = file.exists() or not folder.is_dir()
        if not own and any(not files.is_temporary(path) for path in folder.iterdir()):
            raise StoreError(
                f"{folder}: not empty, and not a folder of notice (no notice.toml); choose another --out"
            )
    formats.SELECTION.claim(folder)
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

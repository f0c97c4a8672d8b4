"""The commands that fill run folders with patches, and what goes before and behind them: plans and merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmscope.cli.options import Corrupt, Direction, Engine, Filled, Given, Metric, Noise, StudyOptions, typed
from vlmscope.errors import VlmscopeError


@dataclass(kw_only=True)
class Patches(StudyOptions):
    """The options of a sweep that say what is patched, and how."""

    sites: list[str]
    corrupt: Corrupt | None = None
    metric: Metric = "ld"
    patch: Literal["clean", "zero", "mean", "resample"] = "clean"
    source: str | None = None
    direction: Direction = "denoise"
    engine: Engine = "fast"
    noise: Noise = "multiply"
    noise_at: Literal["image", "text"] = "image"
    noise_scale: float | None = None
    draws: int = 10
    check: int = 5
    screen: Literal["atp"] | None = None
    top: int | None = None

    def study(self, out: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
        from vlmscope.studies.workers.orders import Named

        noise = (self.noise, self.noise_at, self.noise_scale, self.draws)
        if self.corrupt != "noise" and noise != ("multiply", "image", None, 10):
            raise VlmscopeError(
                "--noise, --noise-at, --noise-scale and --draws are of noise; leave them out, or take "
                "--corrupt noise"
            )
        if self.top is not None and self.screen is None:
            raise VlmscopeError("--top is of a screen; name one (--screen atp), or leave it out")
        how: Any = self.corrupt
        if how == "noise":
            from vlmscope.runs import corrupt as corruptions

            how = corruptions.Noise(*noise)
        options = {"sites": self.sites, "corrupt": how, "direction": self.direction, "metric": self.metric}
        options["check"] = self.check
        if not self.screen:
            options |= {"engine": self.engine, "patch": self.patch, "source": self.source}
            return Named("studies.sweep:swept"), options
        if self.patch != "clean" or self.source is not None or self.engine != "fast" or how is None:
            raise VlmscopeError(
                "--screen ranks patches of the other run's activations: name --corrupt, and leave --patch, "
                "--from and --engine out"
            )
        options |= {"out": out} | ({} if self.top is None else {"top": self.top})
        return Named("studies.screen:screened"), options


def sweep(given: Given, patches: Patches, share: Filled) -> None:
    """Patch every site of every example, into a run folder.

    With --screen only those that a gradient finds, and some others that say what it missed.
    """
    run, asked = share.fill(given, patches)
    from vlmscope.studies.known import knows

    if patches.screen:
        from vlmscope.studies.screen import lines, missed

        print(*lines(missed(run)), sep="\n")
    print(f"{run.patches():,} patches of {run.ran()} examples in {run.path}")
    print(*knows(run.baselines()).lines(), run.check_line(), *more(run, asked), sep="\n")


def plan(given: Given, patches: Patches, out: Path, shards: int = 1, slurm: Path | None = None) -> None:
    """What a sweep will take: time, memory, disk.

    Runs one or two examples, says what all of them will take, in one process or in --shards, and writes a job
    array for SLURM. Nothing is written into --out.
    """
    from vlmscope import files
    from vlmscope.studies import plan as plans
    from vlmscope.studies.run_writer import claim

    claim(out)
    if patches.screen:
        raise VlmscopeError("what a screen finds is not known before; plan its sweep without --screen")
    if slurm is not None:
        files.claim_file(slurm)
    study, options = patches.study(out)
    found = plans.plan(study, given, {**options, "seed": given.seed}, shards)
    print(*found.lines(out), sep="\n")
    script = found.slurm(["vlmscope", "sweep", *typed(given), *typed(patches)], out)
    if slurm is None:
        print(f"\n{script}", end="")
    else:
        files.write(slurm, script.encode())
        print(f"sbatch {slurm}")


def merge(runs: list[Path], /, out: Path, push: str | None = None) -> None:
    """Put the shards of one run together.

    The folder is that of a run without --shard; says which shards or examples are missing.
    """
    from vlmscope.studies import pushed
    from vlmscope.studies.known import warn_of_excluded
    from vlmscope.studies.merge import merge as put_together

    if push is not None:
        pushed.ready(push)
    run = put_together(runs, out)
    warn_of_excluded(run.baselines())
    print(f"{run.patches():,} rows of {run.ran()} examples, from {len(runs)} shards, in {out}")
    print(run.check_line())
    if push is not None:
        print(pushed.push(out, push))


@dataclass(kw_only=True)
class Cuts(StudyOptions):
    """The options of a knock-out."""

    makes = "studies.knockout:knocked_out"
    sites: list[str]
    how: Literal["block", "zero"] = "block"
    metric: Metric = "ld"
    engine: Engine = "fast"
    check: int = 5


def knockout(given: Given, cuts: Cuts, share: Filled) -> None:
    """Cut edges of attention, one at a time, into a run folder.

    What some positions no longer read of others, in windows of layers: the flow of information.
    """
    from vlmscope.studies.known import knows
    from vlmscope.studies.tables import flow_table, is_edge

    run, asked = share.fill(given, cuts)
    print(f"{run.patches():,} knock-outs in {run.ran()} examples in {run.path}")
    effects = run.effects()
    if is_edge(effects).any():  # and not sums of edges alone
        print("P(answer) is changed most where")
        flow = flow_table(effects)
        most = flow["mean"].abs().groupby([flow["tower"], flow["kind"], flow["edge"]], sort=False).idxmax()
        for row in flow.loc[most].head(15).itertuples():
            unit = f" {row.unit}" if row.unit else ""
            window = f", window of {row.window}" if row.window > 1 else ""
            place = f"{row.tower} layer {row.layer} {row.kind}{unit}{window}"
            print(f"  {row.edge} is cut in {place}: {row.mean:+.1%} ({row.n} examples)")
    print(*knows(run.baselines()).lines(), run.check_line(), *more(run, asked), sep="\n")


def more(run: Any, asked: int) -> list[str]:
    """A line, where a folder holds examples of an earlier command that asked for more."""
    held = len(run.baselines())
    return [f"the folder holds {held} examples (this command asked for {asked})"] if held > asked else []

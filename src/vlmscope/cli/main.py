"""The commands, but those about neurons, and the entry point."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmscope.cli import lenses, machine, neurons, steering, sweeps, terminal
from vlmscope.cli.options import Corrupt, Given, Group, Noise, OneModel, OnePicture, Share, Workers, command
from vlmscope.errors import VlmscopeError, shown
from vlmscope.models.dtypes import DType

app = typer.Typer(
    name="vlmscope",
    cls=Group,
    help="Which part of a vision-language model carries the evidence to its answer?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        from vlmscope import __version__

        print(f"vlmscope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Behind an error, print where it came from.")
    ] = False,
) -> None:
    if traceback:
        os.environ[terminal.TRACEBACK] = "1"


@command(app)
def demo(out: Path = Path("vlmscope-demo"), limit: int = 20) -> None:
    """Run `notice` on the toy and the sets that ship with it.

    It uses up to four idle cores.
    """
    toy = OneModel(model="toy-blip", device="cpu")
    several = 1 if os.name == "nt" else min(4, machine.cores())
    if several == 1:
        machine.set_up(toy.model)
    with Workers(workers=several if several > 1 else None).team(toy) as team:
        from vlmscope.data import BUILT_IN
        from vlmscope.notice import Spec, run

        run(Spec(toy.model, BUILT_IN, limit=limit, device=toy.device), out, print, team)


command(app)(sweeps.sweep)
command(app)(sweeps.plan)
command(app)(sweeps.merge)
command(app)(sweeps.knockout)


@dataclass(kw_only=True)
class Changes:
    """What of a specification of `notice` is given on the command line."""

    model: str | None = None
    data: list[str] | None = None
    corrupt: list[str] | None = None
    limit: int | None = None
    seed: int | None = None
    position: str | None = None
    edges: bool = False
    dtype: DType | None = None
    device: str | None = None
    columns: str | None = None


@command(app)
def notice(out: Path, changes: Changes, share: Workers, spec: Path | None = None) -> None:
    """The NOTICE pipeline, from examples to a report.

    Selection, sweeps of all modules and heads, circuits, what the heads do, and a report.
    """
    from vlmscope.notice import Spec, run

    if spec is None and not (changes.model and changes.data):
        raise VlmscopeError("notice needs --model and --data, or --spec FILE with both")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(changes).items()
        if value is not False and value not in (None, [])
    }
    whole = Spec.from_toml(spec, **given) if spec else Spec(**given)
    if share.workers is None and share.ray is None:
        machine.set_up(whole.model)
    say = partial(print, file=sys.stdout)  # that of now: what Ray prints is kept from it
    with share.team(whole) as team:
        run(whole, out, say, team)


@command(app)
def tracing(
    given: Given,
    share: Share,
    windows: list[int] | None = None,
    kinds: list[str] | None = None,
    by: Literal["slot", "length"] = "slot",
    repeats: int = 10,
    noise: Noise = "multiply",
    noise_scale: float | None = None,
) -> None:
    """Causal tracing with noise on the image.

    Clean states are restored layer by layer, token by token.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.report.ranking import most_restored
    from vlmscope.runs import corrupt
    from vlmscope.studies.known import knows
    from vlmscope.studies.run_folder import read_run

    out, shard = share.out, share.numbers
    claim_report(out / "report.html")
    with share.team(given) as team:
        from vlmscope.studies.tracing import WINDOWS, trace_by

        traced = trace_by(
            team(given).fill,
            out,
            noise=corrupt.Noise(noise, "image", noise_scale, repeats),
            windows=windows or WINDOWS,
            kinds=kinds or None,
            by=by,
            seed=given.seed,
            data=given.data,
            shard=shard,
        )
    table = traced.table
    first = read_run(out / "repeats" / "00")
    print(*knows(first.baselines()).lines(), sep="\n")
    print("what restores most of P(answer):")
    for row in most_restored(table).itertuples():
        spread = f", SD over repeats {row.spread:.1%}" if row.repeats > 1 else ""
        print(
            f"  {row.tower} layer {row.layer} {row.kind} at {row.at}, window of {row.window}: "
            f"{row.restored:.1%} ({row.n} examples{spread})"
        )
    print(f"{len(table):,} rows in {out / 'tracing.parquet'}; {write_report([out], out / 'report.html')}")
    for text in sweeps.more(first, traced.about["examples"]):
        print(text)


@command(app)
def circuits(
    runs: list[Path], /, out: Path, position: str | None = None, across_models: bool = False, seed: int = 0
) -> None:
    """Important heads of each run, universal ones over all."""
    from vlmscope.studies.circuits import Found, expressions, find

    Found.claim(out)
    found = find(runs, position=position, across_models=across_models, seed=seed)
    found.save(out)
    columns = "run tower layer kind head position mean ci_low ci_high q_value confirmed".split()
    important = found.heads[found.heads["important"]].sort_values("mean", key=abs, ascending=False)
    count = f"{len(important)} important of {len(found.heads)} heads"
    if important.empty:
        print(f"{count}; nothing to sweep again; tables in {out}")
        return
    print(f"{count}; the strongest:")
    print(terminal.table(important[columns].head(15)))
    everywhere = expressions(found.universal[found.universal["universal"]])
    print(f"important in every run: {' '.join(everywhere) or 'none'}")
    print(f"tables in {out}; `--sites $(cat {out / 'sites.txt'})` sweeps the important heads again")


@command(app)
def heads(given: Given, sites: list[str], out: Path, corrupt: Corrupt = "image") -> None:
    """What heads do.

    Where they look, what they move, and what happens without them.
    """
    from vlmscope.report import claim_report, write_report
    from vlmscope.studies.heads import write

    claim_report(out / "report.html")
    examples = given.examples()
    found = write(out, given.load(), examples, sites, corrupt, seed=given.seed, data=given.data)
    for row in found.functions.itertuples():
        print(f"{row.site}: {row.label}\n  {row.evidence}")
    accuracy = found.together.groupby(["set", "knockout"], sort=False)["accuracy"].mean()
    print("accuracy with heads knocked out together:")
    for (name, how), value in accuracy.items():  # type: ignore[misc]
        print(f"  {name}{f' ({how})' if how else ''}: {value:.1%}")
    print(f"tables in {out}; {write_report([out], out / 'report.html')}")


command(app)(lenses.lens)
command(app)(lenses.attribute)
command(app)(lenses.edges)
command(app)(lenses.faithfulness)
command(app)(lenses.explain)


@command(app)
def data(
    name: str,
    /,
    root: Path,
    out: Path,
    model: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> None:
    """Build a contrast set from a downloaded data set.

    Says how many rows each rule dropped, and why.
    """
    from vlmscope import files
    from vlmscope.data.published import build
    from vlmscope.data.table import write_csv
    from vlmscope.progress import progress

    if out.suffix.lower() != ".csv":
        raise VlmscopeError(f"{out}: the examples are a CSV file; expected a name that ends in .csv")
    if out.exists() and root.resolve() in out.resolve().parents:
        raise VlmscopeError(f"{out}: is a file of the data set; choose another --out")
    files.claim_file(out)
    pieces = None
    if model:
        from vlmscope.checkpoint import tokenizer

        pieces = tokenizer(model)
    with progress(0, quiet=not download, what="images") as step:
        fetched = partial(step, 0)
        built = build(name, root, limit=limit, seed=seed, pieces=pieces, download=download, progress=fetched)
    write_csv(out, built.examples)
    print(f"{built.summary()}\n{out}")


@command(app, "data inpaint")
def inpaint(
    given: Given,
    out: Path,
    fill: Literal["mean", "blur", "shuffle"] | None = None,
    pipeline: str | None = None,
    prompt: str | None = None,
    steps: int | None = None,
    mask: str | None = None,
) -> None:
    """Make the corrupt pictures of a contrast set.

    What the mask or box of each example shows is replaced; kept are pairs after which the model answers
    otherwise. Says how many were tried, and why others were left out.
    """
    from vlmscope.checkpoint.others import Inpainter
    from vlmscope.studies.inpainting import check_out
    from vlmscope.studies.inpainting import inpaint as make

    check_out(out)
    if pipeline is None and (prompt is not None or steps is not None):
        raise VlmscopeError("--prompt and --steps are of a pipeline; name one with --with, or leave them out")
    examples = given.examples()
    made = make(
        given.load(),
        examples,
        out,
        fill=fill,
        pipeline=None if pipeline is None else Inpainter(pipeline, steps=steps, device=given.device),
        prompt=prompt or "{foil}",
        mask=mask,
        seed=given.seed,
        data=given.data,
    )
    print(f"{made.summary()}\n{out}")


@command(app)
def generate(
    given: OnePicture,
    edit: list[str] | None = None,
    patch: list[str] | None = None,
    other: Path | None = None,
    steer: Path | None = None,
    strength: float | None = None,
    at: Literal["read", "words"] = "read",
    keep_norm: bool = False,
) -> None:
    """What a model says, without and with edits.

    Positions count from the start of the prompt; all, *, text and last are also each word that is said.
    """
    from vlmscope.data.images import open_image
    from vlmscope.models.inputs import parse_edit
    from vlmscope.sites import parse
    from vlmscope.studies.steering.direction import Direction

    edits = [parse_edit(text) for text in edit or []]
    sites = parse(patch or [])
    if bool(sites) != (other is not None):
        raise VlmscopeError("--patch copies from another picture; name both --patch and --other")
    if steer is None and (strength is not None or at != "read" or keep_norm):
        raise VlmscopeError("--strength, --at and --keep-norm are of a direction; name one with --steer")
    direction = Direction.load(steer) if steer is not None else None
    picture, second = open_image(given.image), None if other is None else open_image(other)
    model = given.load()
    inputs = model.inputs(picture, given.prompt)
    if direction is not None:
        edits += direction.edits(
            model, inputs, 1.0 if strength is None else strength, at=at, keep_norm=keep_norm
        )
    model.changes(inputs, edits)  # what cannot be made is refused before anything is said
    if second is not None:
        source = model.inputs(second, given.prompt)
        edits += model.copied(source, inputs, sites)
        print(f"the other picture: {model.answer(source)}")
    print(f"without edits:     {model.answer(inputs)}")
    if edits:
        count = f"with {len(edits)} edit{'s' if len(edits) > 1 else ''}:"
        print(f"{count:<19}{model.answer(inputs, edits)}")


@command(app)
def report(runs: list[Path], /, out: Path, figures: list[str] | None = None) -> None:
    """Write one self-contained HTML file."""
    from vlmscope.report import write_report

    print(write_report(runs, out, formats=figures or ()))


@command(app)
def models(model: str | None = None, /, example: str | None = None) -> None:
    """The families, one model's sites, or what it is given.

    With an example, exactly what the model is given for it.
    """
    from vlmscope import describe
    from vlmscope.checkpoint import load

    if model is None:
        if example is not None:
            raise VlmscopeError("--example asks what a model is given; name the model first")
        print(describe.supported())
        return
    row = _row(example) if example is not None else None  # read before the model is loaded
    machine.set_up(model)
    print(describe.example(load(model), row) if row else describe.model(load(model)))


def _row(text: str) -> Any:
    """The example that `DATA:ROW` names, by its id or else its number, counted from 0."""
    from vlmscope.data import examples

    data, _, row = text.rpartition(":")
    if not data or not row:
        raise VlmscopeError(f"{shown(text)} names no example; expected DATA:ROW, such as states:0")
    found = examples(data)
    # The number of one row may be the id of another.
    named = {str(number): one for number, one in enumerate(found)} | {one.id: one for one in found}
    if row in named:
        return named[row]
    raise VlmscopeError(
        f"{shown(data)} has no example {shown(row)}; expected an id, or a row from 0 to {len(found) - 1}"
    )


command(app)(steering.steer)
command(app)(steering.probe)
app.add_typer(neurons.app, name="neurons")


def main() -> None:
    """Run the command line; whatever goes wrong is one line on standard error (`terminal.run`)."""
    sys.exit(terminal.run(app))

"""The commands, but those about neurons, and the entry point."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmscope import __version__
from vlmscope.cli import machine, neurons
from vlmscope.cli import options as shared
from vlmscope.cli.options import Command
from vlmscope.errors import VlmscopeError

app = typer.Typer(
    name="vlmscope",
    help="Which part of a vision-language model carries the evidence to its answer?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vlmscope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("vlmscope-demo"),
    limit: Annotated[int, typer.Option(min=1, help="Examples of each set.")] = 20,
) -> None:
    """Run `notice` on the toy and the sets that ship with it."""
    from vlmscope.data import BUILT_IN
    from vlmscope.notice import Spec, run

    machine.set_up("toy-blip")
    run(Spec("toy-blip", BUILT_IN, limit=limit, device="cpu"), out, print)


@app.command(cls=Command)
def sweep(
    model: shared.Model,
    data: shared.Data,
    corrupt: shared.Corruption,
    sites: shared.Sites,
    out: shared.Resumed,
    direction: Annotated[
        Literal["denoise", "noise"],
        typer.Option(help="denoise: clean into corrupt; noise: corrupt into clean."),
    ] = "denoise",
    engine: Annotated[
        Literal["fast", "reference"], typer.Option(help="fast, or the slow one that defines its answers.")
    ] = "fast",
    dtype: shared.Precision = "float32",
    device: shared.Device = None,
    limit: shared.Limit = None,
    seed: shared.Seed = 0,
    noise: shared.NoiseForm = "multiply",
    noise_at: Annotated[
        Literal["image", "text"],
        typer.Option(help="Noise on what is read of the image, or on the text embeddings."),
    ] = "image",
    noise_scale: shared.NoiseScale = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise to average over.")] = 10,
    check: Annotated[int, typer.Option(min=0, help="Random rows that the slow engine recomputes.")] = 5,
) -> None:
    """Patch every site of every example, into a run folder."""
    from vlmscope.checkpoint import load
    from vlmscope.data import examples
    from vlmscope.runs.corrupt import Noise
    from vlmscope.studies.sweep import sweep_to, warn_of_excluded
    from vlmscope.studies.tables import knows

    run = sweep_to(
        out,
        load(model, dtype=dtype, device=device),
        examples(data, limit=limit, seed=seed),
        sites,
        Noise(noise, noise_at, noise_scale, draws) if corrupt == "noise" else corrupt,
        direction=direction,
        engine=engine,
        seed=seed,
        data=data,
        check=check,
    )
    warn_of_excluded(run.baselines())
    print(f"{run.patches():,} patches of {run.ran()} examples in {out}")
    print(*knows(run.baselines()).lines(), run.check_line(), sep="\n")


@app.command(cls=Command)
def notice(
    out: shared.Resumed,
    spec: Annotated[
        Path | None, typer.Option(help="A TOML file; options given beside it take precedence.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A toy's name, a Hugging Face id, or a folder.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="D...", help="Built-in sets or CSV files.")
    ] = None,
    corrupt: Annotated[
        list[str] | None,
        typer.Option(metavar="image|text|noise...", help="One or several.  [default: image text]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each set.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of drawing and testing.")] = None,
    position: shared.Position = None,
    dtype: Annotated[shared.DType | None, typer.Option(help="Precision.  [default: float32]")] = None,
    device: shared.Device = None,
) -> None:
    """The NOTICE pipeline, from examples to a report.

    Selection, sweeps of all modules and heads, circuits, what the heads do, and a report.
    """
    from vlmscope.notice import Spec, run

    if spec is None and not (model and data):
        raise VlmscopeError("notice needs --model and --data, or --spec FILE with both")
    given: dict[str, Any] = {
        "model": model,
        "data": tuple(data or ()) or None,
        "corrupt": tuple(corrupt or ()) or None,
        "limit": limit,
        "seed": seed,
        "position": position,
        "dtype": dtype,
        "device": device,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    whole = Spec.from_toml(spec, **settings) if spec else Spec(**settings)
    machine.set_up(whole.model)
    run(whole, out, print)


@app.command(cls=Command)
def tracing(
    model: shared.Model,
    data: shared.Data,
    out: shared.Resumed,
    windows: Annotated[
        list[int] | None, typer.Option(metavar="N...", help="Widths of windows of layers.  [default: 1 3 5]")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND...", help="What is restored.  [default: resid attn cross mlp]"),
    ] = None,
    by: Annotated[
        Literal["slot", "length"], typer.Option(help="Average tokens by slot, or by length of question.")
    ] = "slot",
    repeats: Annotated[int, typer.Option(min=1, help="Draws of noise.")] = 10,
    noise: shared.NoiseForm = "multiply",
    noise_scale: shared.NoiseScale = None,
    dtype: shared.Precision = "float32",
    device: shared.Device = None,
    limit: shared.Limit = None,
    seed: shared.Seed = 0,
) -> None:
    """Causal tracing with noise on the image.

    Clean states are restored layer by layer, token by token.
    """
    from vlmscope.checkpoint import load
    from vlmscope.data import examples
    from vlmscope.report import write_report
    from vlmscope.report.ranking import most_restored
    from vlmscope.runs.corrupt import Noise
    from vlmscope.studies.run_folder import read_run
    from vlmscope.studies.tables import knows
    from vlmscope.studies.tracing import KINDS, WINDOWS, trace

    loaded = load(model, dtype=dtype, device=device)
    table = trace(
        out,
        loaded,
        examples(data, limit=limit, seed=seed),
        noise=Noise(noise, "image", noise_scale, repeats),
        windows=windows or WINDOWS,
        kinds=kinds or [k for k in KINDS if any(k in s.kinds for s in loaded.shapes.values())],
        by=by,
        seed=seed,
        data=data,
    ).table
    print(*knows(read_run(out / "repeats" / "00").baselines()).lines(), sep="\n")
    print("what restores most of P(answer):")
    for row in most_restored(table).itertuples():
        spread = f", SD over repeats {row.spread:.1%}" if row.repeats > 1 else ""
        print(
            f"  {row.tower} layer {row.layer} {row.kind} at {row.at}, window of {row.window}: "
            f"{row.restored:.1%} ({row.n} examples{spread})"
        )
    print(f"{len(table):,} rows in {out / 'tracing.parquet'}; {write_report([out], out / 'report.html')}")


@app.command(cls=Command)
def circuits(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, as sweep or notice write them.")],
    out: shared.Folder,
    position: shared.Position = None,
    across_models: Annotated[
        bool, typer.Option("--across-models", help="The runs are of models with the same heads.")
    ] = False,
    seed: shared.Seed = 0,
) -> None:
    """Important heads of each run, universal ones over all."""
    from vlmscope.studies.circuits import expressions, find

    found = find(runs, position=position, across_models=across_models, seed=seed)
    found.save(out)
    columns = "run tower layer kind head position mean ci_low ci_high q_value confirmed".split()
    important = found.heads[found.heads["important"]].sort_values("mean", key=abs, ascending=False)
    print(f"{len(important)} important of {len(found.heads)} heads; the strongest:")
    print(important[columns].head(15).to_string(index=False, float_format="{:.3g}".format))
    everywhere = expressions(found.universal[found.universal["universal"]])
    print(f"important in every run: {' '.join(everywhere) or 'none'}")
    print(f"tables in {out}; `--sites $(cat {out / 'sites.txt'})` sweeps the important heads again")


@app.command(cls=Command)
def heads(
    model: shared.Model,
    data: shared.Data,
    sites: shared.Sites,
    out: shared.Folder,
    corrupt: shared.Corruption = "image",
    dtype: shared.Precision = "float32",
    device: shared.Device = None,
    limit: shared.Limit = None,
    seed: shared.Seed = 0,
) -> None:
    """What heads do.

    Where they look, what they move, and what happens without them.
    """
    from vlmscope.checkpoint import load
    from vlmscope.data import examples
    from vlmscope.report import write_report
    from vlmscope.studies.heads import write

    found = write(
        out,
        load(model, dtype=dtype, device=device),
        examples(data, limit=limit, seed=seed),
        sites,
        corrupt,
        seed=seed,
        data=data,
    )
    for row in found.functions.itertuples():
        print(f"{row.site}: {row.label}\n  {row.evidence}")
    accuracy = found.together.groupby(["set", "knockout"], sort=False)["accuracy"].mean()
    print("accuracy with heads knocked out together:")
    for (name, how), value in accuracy.items():  # type: ignore[misc]
        print(f"  {name}{f' ({how})' if how else ''}: {value:.1%}")
    print(f"tables in {out}; {write_report([out], out / 'report.html')}")


@app.command(cls=Command)
def data(
    name: Annotated[str, typer.Argument(help="svo-probes, mit-states, faces, coco-qa, clevr or folder.")],
    root: Annotated[Path, typer.Option(help="The folder of the unpacked data set.")],
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    model: Annotated[
        str | None,
        typer.Option(help="Whose tokenizer replaced words align with.  [default: one word, one token]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many examples in all.")] = None,
    seed: shared.Seed = 0,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing images (svo-probes).")] = False,
) -> None:
    """Build a contrast set from a downloaded data set.

    Says how many rows each rule dropped, and why.
    """
    from vlmscope.data.published import build
    from vlmscope.data.table import write_csv
    from vlmscope.progress import progress

    pieces = None
    if model:
        from vlmscope.checkpoint import tokenizer

        pieces = tokenizer(model)
    with progress(0, quiet=not download, what="images") as step:
        fetched = partial(step, 0)
        built = build(name, root, limit=limit, seed=seed, pieces=pieces, download=download, progress=fetched)
    write_csv(out, built.examples)
    print(f"{built.summary()}\n{out}")


@app.command(cls=Command)
def generate(
    model: shared.Model,
    image: Annotated[Path, typer.Option(help="The picture.")],
    prompt: Annotated[str, typer.Option(help="What is asked.")],
    edit: Annotated[
        list[str] | None, typer.Option(metavar="EDIT...", help="Each 'SITE set|add|scale NUMBER'.")
    ] = None,
    patch: Annotated[
        list[str] | None, typer.Option(metavar="SITE...", help="Sites to copy from --other.")
    ] = None,
    other: Annotated[Path | None, typer.Option(help="The picture that --patch copies from.")] = None,
    dtype: shared.Precision = "float32",
    device: shared.Device = None,
) -> None:
    """What a model says, without and with edits.

    An edit is made as the model reads the prompt; positions count from its start.
    """
    from vlmscope.checkpoint import load
    from vlmscope.inputs import parse_edit
    from vlmscope.sites import parse

    edits = [parse_edit(text) for text in edit or []]
    sites = parse(patch or [])
    if sites and other is None:
        raise VlmscopeError("--patch copies from another picture; name it with --other")
    loaded = load(model, dtype=dtype, device=device)
    inputs = loaded.inputs(image, prompt)
    if sites and other is not None:
        source = loaded.inputs(other, prompt)
        edits += loaded.copied(source, inputs, sites)
        print(f"the other picture: {loaded.answer(source)}")
    print(f"without edits:     {loaded.answer(inputs)}")
    if edits:
        count = f"with {len(edits)} edit{'s' if len(edits) > 1 else ''}:"
        print(f"{count:<19}{loaded.answer(inputs, edits)}")


@app.command(cls=Command)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of sweep, circuits, heads, tracing or notice.")],
    out: Annotated[Path, typer.Option(help="The HTML file; its figures go beside it.")],
) -> None:
    """Write one self-contained HTML file."""
    from vlmscope.report import write_report

    print(write_report(runs, out))


@app.command(cls=Command)
def models(
    model: Annotated[str | None, typer.Argument(help="A toy's name, a Hugging Face id, or a folder.")] = None,
    example: Annotated[
        str | None,
        typer.Option(
            metavar="DATA:ROW",
            help="Print what the model is given for one example: a set or CSV file, and an id or row.",
        ),
    ] = None,
) -> None:
    """The families, one model's sites, or what it is given.

    With an example, exactly what the model is given for it.
    """
    from vlmscope import describe
    from vlmscope.checkpoint import load

    if example is None:
        print(describe.model(load(model)) if model else describe.supported())
    elif model is None:
        raise VlmscopeError("--example asks what a model is given; name the model first")
    else:
        row = _row(example)  # read before the model is loaded
        print(describe.example(load(model), row))


def _row(text: str) -> Any:
    """The example that `DATA:ROW` names, by its id or else its number, counted from 0."""
    from vlmscope.data import examples

    data, _, row = text.rpartition(":")
    if not data or not row:
        raise VlmscopeError(f"'{text}' names no example; expected DATA:ROW, such as states:0")
    found = examples(data)
    for number, example in enumerate(found):
        if row in (example.id, str(number)):
            return example
    raise VlmscopeError(f"{data} has no example '{row}'; expected an id, or a row from 0 to {len(found) - 1}")


app.add_typer(neurons.app, name="neurons")


def main() -> None:
    """Run the command line; an error that a person can mend is one line and exit status 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
        try:
            app(prog_name="vlmscope")
        except VlmscopeError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)
        except SystemExit as end:
            if end.code == 130:  # what typer makes of Ctrl-C
                print("interrupted; run the same command again to go on", file=sys.stderr)
            raise

"""The command line: flags only. Torch is imported when a command needs it, not for `--help`."""

from __future__ import annotations

import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmscope import __version__
from vlmscope.errors import VlmscopeError

app = typer.Typer(
    name="vlmscope",
    help="Which part of a vision-language model carries the evidence to its answer?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Corrupt(StrEnum):
    image = "image"
    text = "text"
    noise = "noise"


class Form(StrEnum):
    multiply = "multiply"
    add = "add"
    factor = "factor"


class Where(StrEnum):
    image = "image"
    text = "text"


class Direction(StrEnum):
    denoise = "denoise"
    noise = "noise"


class Engine(StrEnum):
    fast = "fast"
    reference = "reference"


class DType(StrEnum):
    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path(
        "vlmscope-demo"
    ),
    limit: Annotated[int, typer.Option(min=1, help="Examples of each set.")] = 20,
) -> None:
    """Trace the toy that ships with the package: three sets, image and text corruption."""
    from vlmscope.demo import run

    run(out, limit)


@app.command()
def sweep(
    model: Annotated[
        str, typer.Option(help="A toy's name, a Hugging Face id, or a folder of save_pretrained.")
    ],
    data: Annotated[str, typer.Option(help="states, scenes, faces, or a CSV file.")],
    corrupt: Annotated[Corrupt, typer.Option(help="What the corrupt run has changed.")],
    sites: Annotated[
        list[str],
        typer.Option(
            metavar="EXPR...", help="Site expressions such as 'encoder.*.cross.h*@answer'."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; an unfinished run goes on.")],
    direction: Annotated[
        Direction, typer.Option(help="denoise: clean into corrupt; noise: corrupt into clean.")
    ] = Direction.denoise,
    engine: Annotated[
        Engine, typer.Option(help="fast, or the slow one that defines its answers.")
    ] = Engine.fast,
    dtype: Annotated[DType, typer.Option(help="Precision of the model.")] = DType.float32,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 …  [default: the GPU if there is one]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many examples.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of built-in sets and of noise.")] = 0,
    noise: Annotated[
        Form, typer.Option(help="With --corrupt noise: x·ε, x+ε, or x·scale.")
    ] = Form.multiply,
    noise_at: Annotated[
        Where, typer.Option(help="Noise on the vision tower's output or the text embeddings.")
    ] = Where.image,
    noise_scale: Annotated[
        float | None, typer.Option(help="Strength of the noise.  [default: 5, 3 or 0.7691]")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of noise to average over.")] = 10,
    more: Annotated[
        list[str] | None, typer.Argument(hidden=True, metavar="EXPR")
    ] = None,  # --sites A B C
) -> None:
    """Patch every site of every example; write the table of effects to a folder."""
    from vlmscope import study
    from vlmscope.corrupt import Noise
    from vlmscope.data import examples
    from vlmscope.model import load

    kind: Any = corrupt.value
    if corrupt is Corrupt.noise:
        kind = Noise(noise.value, noise_at.value, noise_scale, draws)
    given = examples(data, limit=limit, seed=seed)
    table = study.sweep(
        load(model, dtype=dtype.value, device=device),
        given,
        [*sites, *(more or [])],
        kind,
        direction=direction.value,
        engine=engine.value,
        seed=seed,
        out=out,
        data=data,
    )
    print(f"{len(table):,} patches of {table['example'].nunique()} examples in {out}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The HTML file; its figures go beside it.")],
) -> None:
    """Write one self-contained HTML file about one or more runs."""
    from vlmscope.report import write_report

    print(write_report(runs, out))


@app.command()
def models(
    model: Annotated[
        str | None, typer.Argument(help="A toy's name, a Hugging Face id, or a folder.")
    ] = None,
) -> None:
    """List the supported families and toys, or one model's towers, layers, heads and sites."""
    from vlmscope.model import describe, load, supported

    print(describe(load(model)) if model else supported())


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

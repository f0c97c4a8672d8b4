"""Options that several commands share, and the command that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from vlmscope.cli import machine
from vlmscope.errors import VlmscopeError

Corrupt = Literal["image", "text", "noise"]
DType = Literal["float64", "float32", "bfloat16", "float16", "4bit"]

Model = Annotated[str, typer.Option(help="A toy's name, a Hugging Face id, or a folder of save_pretrained.")]
Data = Annotated[str, typer.Option(help="states, scenes, faces, or a CSV file.")]
Sites = Annotated[
    list[str], typer.Option(metavar="EXPR...", help="Site expressions such as 'encoder.*.cross.h*@answer'.")
]
Corruption = Annotated[Corrupt, typer.Option(help="What the corrupt run has changed.")]
NoiseForm = Annotated[Literal["multiply", "add", "factor"], typer.Option(help="Noise: x·ε, x+ε, or x·scale.")]
NoiseScale = Annotated[float | None, typer.Option(help="Strength of the noise.  [default: 5, 3 or 0.7691]")]
Position = Annotated[
    str | None,
    typer.Option(
        help="Where heads are read out: readout, answer, another role.  "
        "[default: readout in a decoder, answer elsewhere]"
    ),
]
Precision = Annotated[DType, typer.Option(help="Precision of the model.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, auto (all GPUs)  [default: the GPU if any]")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn at random.")]
Folder = Annotated[Path, typer.Option(help="The folder for the results.")]
Resumed = Annotated[Path, typer.Option(help="The folder; an unfinished run goes on.")]


class Command(TyperCommand):
    """A command in which `--sites A B` is `--sites A --sites B`, for every option that takes several.

    Words that belong to no option are refused in one line. What it runs finds the machine set up for its
    model.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {flag for option in self.params if _is_several(option) for flag in option.opts}
        ctx.allow_extra_args = True
        stray = super().parse_args(ctx, list(_repeated(args, several)))
        if stray:
            where = f"; only {', '.join(sorted(several))} can have several words" if several else ""
            raise VlmscopeError(
                f"unexpected '{stray[0]}'; every word goes with an option{where} ({ctx.command_path} --help)"
            )
        return stray

    def invoke(self, ctx: Any) -> Any:
        machine.set_up(ctx.params.get("model"))
        return super().invoke(ctx)


def _is_several(option: Any) -> bool:
    return getattr(option, "multiple", False)


def _repeated(args: list[str], several: set[str]) -> Iterator[str]:
    """The words of a command line, with the flag again before each further word of those that take several.

    >>> " ".join(_repeated(["--sites", "A", "B", "--out", "C", "D"], {"--sites"}))
    '--sites A --sites B --out C D'
    """
    flag = None
    filled = True
    for word in args:
        if word.startswith("--"):
            name, given, _ = word.partition("=")
            flag, filled = (name if name in several else None), bool(given)
        elif flag and filled:
            yield flag
        else:
            filled = True
        yield word

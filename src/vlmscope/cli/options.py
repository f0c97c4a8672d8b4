"""How a function becomes a command, and the options that several commands share."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand

from vlmscope.cli import machine
from vlmscope.errors import VlmscopeError

Corrupt = Literal["image", "text", "noise"]
DType = Literal["float64", "float32", "bfloat16", "float16", "4bit"]
Noise = Literal["multiply", "add", "factor"]
LOOKS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("options.toml").read_text("utf-8"))


@dataclass(kw_only=True)
class OneModel:
    """The options of a command with a model."""

    model: str
    dtype: DType = "float32"
    device: str | None = None

    def load(self) -> Any:
        """The model, on a machine that is set up for it."""
        from vlmscope.checkpoint import load

        machine.set_up(self.model)
        return load(self.model, dtype=self.dtype, device=self.device)


@dataclass(kw_only=True)
class Given(OneModel):
    """The options of a command with a model and examples."""

    data: str
    limit: int | None = None
    seed: int = 0

    def examples(self) -> list[Any]:
        from vlmscope.data import examples

        return examples(self.data, limit=self.limit, seed=self.seed)


def command(app: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command: its positional-only parameters are arguments, the others options.

    A parameter that is a dataclass stands for an option for each of its fields.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        parameters = signature(function, eval_str=True).parameters.values()
        looks = LOOKS["all"] | LOOKS.get(function.__name__, {})

        def call(**values: Any) -> None:
            function(*(_value(parameter, values) for parameter in parameters))

        flat = [_typed(option, looks[option.name]) for each in parameters for option in _options(each)]
        flat.sort(key=lambda option: option.default is not Parameter.empty)  # what is required comes first
        call.__signature__ = Signature(flat)  # type: ignore[attr-defined]
        call.__annotations__ = {option.name: option.annotation for option in flat}
        app.command(function.__name__, cls=_Command, help=function.__doc__)(call)
        return function

    return add


def _options(parameter: Parameter) -> list[Parameter]:
    """The parameter itself, or one for each field of its group."""
    if not is_dataclass(parameter.annotation):
        return [parameter]
    types, found = get_type_hints(parameter.annotation), []
    for each in fields(parameter.annotation):
        default = Parameter.empty if each.default is MISSING else each.default
        found.append(
            Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=types[each.name])
        )
    return found


def _value(parameter: Parameter, values: dict[str, Any]) -> Any:
    options = _options(parameter)
    if options == [parameter]:
        return values[parameter.name]
    return parameter.annotation(**{option.name: values[option.name] for option in options})


def _typed(option: Parameter, look: dict[str, Any]) -> Parameter:
    """A parameter as typer wants it, annotated with its looks."""
    kind = typer.Argument if option.kind is Parameter.POSITIONAL_ONLY else typer.Option
    more = {name: value for name, value in look.items() if name != "flags"}
    looks = kind(*look.get("flags", ()), **more)
    return option.replace(kind=Parameter.KEYWORD_ONLY, annotation=Annotated[option.annotation, looks])


class _Command(TyperCommand):
    """A command in which `--sites A B` is `--sites A --sites B`, for every option that takes several.

    Words that belong to no option are refused in one line.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {flag for each in self.params if getattr(each, "multiple", False) for flag in each.opts}
        ctx.allow_extra_args = True
        stray = super().parse_args(ctx, list(repeated(args, several)))
        if stray:
            form = " ".join([ctx.command_path, *self.collect_usage_pieces(ctx)])
            where = f"; only {', '.join(sorted(several))} can have several words" if several else ""
            raise VlmscopeError(f"unexpected '{stray[0]}'; expected {form}{where}")
        return stray


def repeated(args: list[str], several: set[str]) -> Iterator[str]:
    """The words of a command line, with the flag again before each further word of those that take several.

    >>> " ".join(repeated(["--sites", "A", "B", "--out", "C", "D"], {"--sites"}))
    '--sites A --sites B --out C D'
    """
    flag, filled = None, True
    for word in args:
        if word.startswith("--"):
            name, given, _ = word.partition("=")
            flag, filled = (name if name in several else None), bool(given)
        elif flag and filled:
            yield flag
        filled = filled or not word.startswith("--")
        yield word

"""How a function becomes a command, its words become values, and the options that several commands share."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from vlmscope.cli import machine
from vlmscope.errors import LARGEST, MOST, VlmscopeError, nearest, number, shown, whole, written
from vlmscope.models.dtypes import DType

Corrupt = Literal["image", "text", "noise"]
Direction = Literal["denoise", "noise"]
Engine = Literal["fast", "reference"]
Metric = Literal["ld", "p", "logprob", "kl"]
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
class OnePicture(OneModel):
    """The options of a command with a model that is asked about one picture."""

    image: Path
    prompt: str


@dataclass(kw_only=True)
class Given(OneModel):
    """The options of a command with a model and examples."""

    data: str
    limit: int | None = None
    seed: int = 0
    columns: str | None = None

    def examples(self) -> Sequence[Any]:
        from vlmscope.data import examples

        return examples(self.data, limit=self.limit, seed=self.seed, columns=self.columns)

    def others(self, data: str | None) -> Sequence[Any] | None:
        """Those of another option; `columns` are also of these, where they have such names at all."""
        from vlmscope.data import examples

        if data is None:
            return None
        columns = self.columns if data.startswith("hf://") else None
        return examples(data, limit=self.limit, seed=self.seed, columns=columns)


@dataclass(kw_only=True)
class Workers:
    """The options of a command that several processes can do."""

    workers: int | None = None
    ray: str | None = None

    @contextmanager
    def team(self, given: Any) -> Iterator[Callable[[Any], Any]]:
        """Those who do it, with the model and device of `given`: gives a function of what each is given,
        which gives a `Team`, or this process `Alone`. What is imported within is imported while they start,
        and what is wrong with the data is said then, not when they have loaded the model."""
        from vlmscope.studies import workers

        if self.workers is None and self.ray is None:
            yield workers.alone
            return
        threads = machine.threads(given.model, self.workers or 1) if self.ray is None else 1
        set_up = partial(machine.set_up_worker, threads)
        options = {"workers": self.workers, "address": self.ray, "device": given.device}
        with workers.started(**options, set_up=set_up) as team:
            if isinstance(given, Given):
                given.examples()
            yield team


@dataclass(kw_only=True)
class Share(Workers):
    """The options of a command that fills a folder: which, how much of it, and with how many processes."""

    out: Path
    shard: str | None = None

    @property
    def numbers(self) -> tuple[int, int] | None:
        """Which shard of how many."""
        return None if self.shard is None else _shard(self.shard)


@dataclass(kw_only=True)
class StudyOptions:
    """The options that are those of a function of `studies`, which says what a run folder is to hold."""

    makes: ClassVar[str]

    def study(self, out: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function of model, examples and options, for a folder, and these options."""
        from vlmscope.studies.workers.orders import Named

        return Named(self.makes), vars(self)


@dataclass(kw_only=True)
class Filled(Share):
    """The options of a command whose folder is a run, which may then be pushed to the hub."""

    push: str | None = None

    def fill(self, given: Given, asked: StudyOptions) -> tuple[Any, int]:
        """Put a study into the folder: the run, and how many examples it was asked for."""
        from vlmscope.studies import pushed
        from vlmscope.studies.known import warn_of_excluded
        from vlmscope.studies.run_writer import claim

        if self.push is not None:
            if self.shard is not None:
                raise VlmscopeError("--push is of a whole run; leave it to vlmscope merge, or --shard out")
            pushed.ready(self.push)
        claim(self.out)
        common = {"seed": given.seed, "data": given.data, "shard": self.numbers}
        with self.team(given) as team:
            make, options = asked.study(self.out)
            run, many = team(given).fill(self.out, make, {**options, **common})
        if self.push is not None:
            print(pushed.push(self.out, self.push))
        warn_of_excluded(run.baselines())
        return run, many


def _shard(text: str) -> tuple[int, int]:
    numbers = [written(word) for word in text.split("/")]
    if len(numbers) == 2 and all(isinstance(each, int) for each in numbers):
        which, many = int(numbers[0]), int(numbers[1])
        if 1 <= which <= many <= MOST:
            return which, many
    raise VlmscopeError(f"--shard is {shown(text)}; expected I/N, I from 1 to N, such as 1/4")


def _looks(groups: Iterable[Any], name: str = "") -> dict[str, Any]:
    """How options look: those of all commands, of groups, and of the command of this name."""
    names = [kind.__name__ for each in groups if isinstance(each, type) for kind in reversed(each.__mro__)]
    return {option: look for each in ("all", *names, name) for option, look in LOOKS.get(each, {}).items()}


def typed(group: Any) -> list[str]:
    """The words that make a group of options, but for those that have their defaults."""
    looks, words = _looks([type(group)]), list[str]()
    for each in fields(group):
        value = getattr(group, each.name)
        if value == each.default:
            continue
        words += looks[each.name].get("flags", [f"--{each.name.replace('_', '-')}"])[:1]
        words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return words


def command(
    app: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command: its positional-only parameters are arguments, the others options.

    A parameter that is a dataclass stands for an option for each of its fields. The command is called as the
    function is, but for a `name`, which may be two words (`Group`).
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        parameters = signature(function, eval_str=True).parameters.values()
        looks = _looks([each.annotation for each in parameters], function.__name__)

        def call(**values: Any) -> None:
            function(*(_value(parameter, values) for parameter in parameters))

        flat = [_typed(option, looks[option.name]) for each in parameters for option in _options(each)]
        flat.sort(key=lambda option: option.default is not Parameter.empty)  # what is required comes first
        call.__signature__ = Signature(flat)  # type: ignore[attr-defined]
        call.__annotations__ = {option.name: option.annotation for option in flat}
        app.command(name or function.__name__, cls=_Command, help=function.__doc__)(call)
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
    """A parameter as typer wants it, annotated with its looks and with what reads its words."""
    kind, look = option.annotation, dict(look)
    while not (kind in READ or get_origin(kind) is Literal or kind is bool):
        kind = get_args(kind)[0]  # of `kind | None`, of `list[kind]`
    flags, limits = look.pop("flags", []), {name: look.pop(name) for name in LIMITS if name in look}
    argument = option.kind is Parameter.POSITIONAL_ONLY
    name = option.name if argument else (flags or [f"--{option.name.replace('_', '-')}"])[0]
    if kind is not bool:
        choices = get_args(kind)
        look["parser"] = partial(_choice, name, choices) if choices else partial(READ[kind], name, **limits)
        if not argument:
            look.setdefault("metavar", f"<{'|'.join(choices) or kind.__name__.lower()}>")
    looks = (typer.Argument if argument else typer.Option)(*flags, **look)
    return option.replace(kind=Parameter.KEYWORD_ONLY, annotation=Annotated[option.annotation, looks])


def _choice(name: str, choices: tuple[str, ...], value: str) -> str:
    if value in choices:
        return value
    text = f"{name} is {shown(value)}; expected {' or '.join(choices)}{nearest(value, choices)}"
    raise VlmscopeError(text)


def _whole(name: str, value: str | int, min: int = 0, max: int = MOST) -> int:
    return whole(written(value) if isinstance(value, str) else value, name, min, max)


def _number(name: str, value: str | float, min: float = -LARGEST, max: float = LARGEST) -> float:
    return number(written(value) if isinstance(value, str) else value, name, min, max)


def _path(name: str, value: str | Path) -> Path:
    return Path(_text(name, value, file=True))


def _text(name: str, value: object, empty: bool = False, file: bool = False) -> str:
    """A text; that of a `file` may be bytes that are no Unicode, and has a file's length."""
    text = str(value)
    if not (text.strip() or empty):
        raise VlmscopeError(f"{name} is empty; give it a value, or leave it out")
    if "\0" in text or not (file or text.encode(errors="replace").decode() == text):
        raise VlmscopeError(f"{name} is {shown(text)}; expected UTF-8 text without NUL")
    parts = os.fsencode(text).split(b"/") if file else []
    if any(len(part) > 255 for part in parts) or sum(map(len, parts)) > 3000:
        raise VlmscopeError(
            f"{name} is {shown(text)}, longer than the name of a file can be; give a shorter one"
        )
    return text


READ: dict[type, Callable[..., Any]] = {int: _whole, float: _number, str: _text, Path: _path}
"""What makes a value of a word, by the type of a parameter; raises `VlmscopeError`, which names the flag."""
LIMITS = ("min", "max", "empty", "file")
"""What these take from the looks of an option."""


class Group(TyperGroup):
    """Commands, of which some are called by two words, as `data inpaint` is beside `data NAME`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        return super().resolve_command(ctx, [two, *args[2:]] if two in self.commands else args)


class _Command(TyperCommand):
    """A command in which `--sites A B` is `--sites A --sites B`, for every option that takes several.

    Words that belong to no option, options given twice and those without a value are refused in one line.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {
            flag: each
            for each in self.params
            for flag in (*each.opts, *each.secondary_opts)
            if each.param_type_name == "option"
        }
        flags = {name for name, each in options.items() if getattr(each, "is_flag", False)}
        several = {name for name, each in options.items() if each.multiple}  # type: ignore[attr-defined]
        try:
            given = list(repeated(args, several, {*options} - several - flags))
            ctx.allow_extra_args = True
            stray = super().parse_args(ctx, given)
            if stray:
                form = " ".join([ctx.command_path, *self.collect_usage_pieces(ctx)])
                where = f"; only {', '.join(sorted(several))} can have several words" if several else ""
                raise VlmscopeError(f"unexpected {shown(stray[0])}; expected {form}{where}")
        except VlmscopeError as error:
            ctx.fail(str(error))
        return stray


def repeated(args: list[str], several: set[str], single: set[str]) -> Iterator[str]:
    """The words of a command line, with the flag again before each further word of those that take several.

    Raises `VlmscopeError` for a flag of either kind without a value, and for a single one given twice.

    >>> " ".join(repeated(["--sites", "A", "B", "--out", "C", "D"], {"--sites"}, {"--out"}))
    '--sites A --sites B --out C D'
    """
    flag, filled, seen = "", True, set[str]()
    for place, word in enumerate([*args, "--"]):  # what ends the words asks for the last value, too
        if word.startswith("--"):
            if not filled:
                raise VlmscopeError(f"{flag} needs a value ({flag}=VALUE where it begins with --)")
            name, given, _ = word.partition("=")
            if name in seen:
                raise VlmscopeError(f"{name} is given twice; give it once")
            seen |= {name} & single
            flag, filled = name, bool(given) or name not in several | single
        elif flag in several and filled:
            yield flag
        filled = filled or not word.startswith("--")
        if place < len(args):
            yield word

"""The tensors of runs: `Inputs`, `Edit` and `Pair`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from vlmscope.errors import MOST, VlmscopeError, number, shown, written
from vlmscope.layout import Layout
from vlmscope.sites import Pattern, Site

Function = Callable[[Float[Tensor, "pos width"]], Float[Tensor, "pos width"]]
Op = Literal["set", "add", "scale"] | Function
OPS = ("set", "add", "scale")
Value = float | Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of one run (batch 1), as keyword arguments of the Hugging Face model.

    `layout` says, for each tower, what stands at each position.
    """

    tensors: Mapping[str, Tensor]
    layout: Mapping[str, Layout]

    def __repr__(self) -> str:
        towers = ", ".join(f"{tower} {len(there.tokens)}" for tower, there in self.layout.items())
        return f"Inputs({towers} positions)"


@dataclass(frozen=True, eq=False, init=False)
class Edit:
    """Change one activation as it passes: `set` it to `value`, `add` to it, `scale` it, or put a function of
    it in its place.

    `site` names one layer (or a window of them) and at most one set of units; an expression will do. `value`
    is a number or a tensor that broadcasts to `(positions, width)`, where width is that of the kind, of one
    head, or 1 for one neuron; a function gets and gives a tensor of that shape.

    Raises `SiteError` for an expression that is no site, `VlmscopeError` for another operation or value.

    >>> Edit("decoder.2.attn.h1@all", "scale", 0.0)
    Edit('decoder.2.attn.h1@all', 'scale', 0.0)
    """

    site: Pattern | Site
    op: Op
    value: Value = 0.0

    def __init__(self, site: Pattern | Site | str, op: Op, value: float | Tensor | None = None) -> None:
        if not isinstance(site, Pattern | Site | str):
            raise VlmscopeError(
                f"the site of an edit is {_what(site)}; expected a Site, or an expression such "
                "as 'decoder.2.attn.h1@all'"
            )
        if not callable(op) and op not in OPS:
            raise VlmscopeError(
                f"unknown operation {shown(op)} of an edit; expected set, add or scale, or a function"
            )
        if callable(op) and value is not None:
            raise VlmscopeError("an edit by a function takes no value; leave it out")
        value = 0.0 if callable(op) else value
        if not isinstance(value, Real | Tensor):
            raise VlmscopeError(f"the value of an edit is {_what(value)}; expected a number or a tensor")
        object.__setattr__(self, "site", Pattern.parse(site) if isinstance(site, str) else site)
        object.__setattr__(self, "op", op)
        object.__setattr__(self, "value", value)

    def __repr__(self) -> str:
        if callable(self.op):
            return f"Edit('{self.site}', {getattr(self.op, '__qualname__', 'a function')})"
        value = f"{tuple(self.value.shape)} tensor" if isinstance(self.value, Tensor) else self.value
        return f"Edit('{self.site}', '{self.op}', {value})"


class Change(NamedTuple):
    """An edit in one run: of one layer's activation, at numbers of positions."""

    site: Site
    op: Op
    value: Value


def _what(thing: object) -> str:
    return f"{shown(thing, 40)} ({type(thing).__name__})"


def parse_edit(text: str) -> Edit:
    """An edit written as `SITE set|add|scale NUMBER`.

    >>> edit = parse_edit("decoder.2.attn.h1@all scale 0")
    >>> str(edit.site), edit.op, edit.value
    ('decoder.2.attn.h1@all', 'scale', 0.0)
    """
    site, op, value = (*text.rsplit(maxsplit=2), "", "")[:3]
    if op not in OPS:
        raise VlmscopeError(
            f"bad edit {shown(text)}; expected 'SITE set|add|scale NUMBER', such as "
            "'decoder.2.attn.h1@all scale 0'"
        )
    return Edit(site, op, number(written(value), "the value of an edit", -MOST, MOST))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two runs that differ by one corruption, and the tokens that are scored.

    `answer` and `foil` are token ids, scored at the read-out position. `edits` make the corrupt
    run corrupt where its input is the clean one (noise). `answers` are the answer's tokens at the last so
    many positions, where several are scored.
    """

    clean: Inputs
    corrupt: Inputs
    answer: int
    foil: int | None
    edits: tuple[Edit, ...] = ()
    answers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", self.answers or (self.answer,))

    def __repr__(self) -> str:
        corrupt = "the same inputs" if self.corrupt is self.clean else repr(self.corrupt)
        scored = f"answer {self.answers}, foil {self.foil}"
        return f"Pair(clean {self.clean!r}, corrupt {corrupt}, {scored}, {len(self.edits)} edits)"


Logits = Float[Tensor, "vocabulary"]

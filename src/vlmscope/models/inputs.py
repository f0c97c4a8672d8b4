"""The tensors of runs: `Inputs`, `Edit` and `Pair`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

from vlmscope.errors import MOST, VlmscopeError, number, shown, written
from vlmscope.layout import Layout
from vlmscope.sites import Pattern, Site

Cut = Literal["block", "zero"]
"""What is done to an edge of attention: `block`, its weights are 0 and the others of its row add up to 1 (the
score is −∞ before the softmax); `zero`, its weights are 0 and the others stay as they are."""
Function = Callable[[Float[Tensor, "pos width"]], Float[Tensor, "pos width"]]
Op = Literal["set", "add", "scale"] | Cut | Function
OPS = ("set", "add", "scale")
CUTS = get_args(Cut)
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
    it in its place; or cut an edge of attention: `block` or `zero` it.

    `site` names one layer (or a window of them) and at most one set of units; an expression will do. Of an
    edge it may name several: all are cut. `value` is a number or a tensor that broadcasts to
    `(positions, width)`, where width is that of the kind, of one head, or 1 for one neuron; a function gets
    and gives a tensor of that shape.

    Raises `SiteError` for an expression that is no site, `VlmscopeError` for another operation or value.

    >>> Edit("decoder.2.attn.h1@all", "scale", 0.0)
    Edit('decoder.2.attn.h1@all', 'scale', 0.0)
    >>> Edit("decoder.0-2.attn@last<image", "block")
    Edit('decoder.0-2.attn@last<image', 'block')
    """

    site: Pattern | Site
    op: Op
    value: Value

    def __init__(self, site: Pattern | Site | str, op: Op, value: float | Tensor | None = None) -> None:
        if not isinstance(site, Pattern | Site | str):
            raise VlmscopeError(
                f"the site of an edit is {_what(site)}; expected a Site, or an expression such "
                "as 'decoder.2.attn.h1@all'"
            )
        site = Pattern.parse(site) if isinstance(site, str) else site
        if not callable(op) and op not in (*OPS, *CUTS):
            names = ", ".join((*OPS, *CUTS))
            raise VlmscopeError(
                f"unknown operation {shown(op)} of an edit; expected {names}, or a function of the activation"
            )
        for one in (site, *site.also):
            if bool(one.source) != (op in CUTS):
                what = (
                    "an edge of attention" if one.source else "an activation, and no edge such as last<image"
                )
                way = " or ".join(CUTS) if one.source else "set, add or scale (scale 0 for nothing)"
                raise VlmscopeError(f"{shown(one)} is {what}; expected the operation {way}, not {shown(op)}")
        if (op in OPS) != (value is not None):
            given = "no value" if value is None else "a value"
            raise VlmscopeError(f"the edit at {shown(site)} has {given}; only set, add and scale take one")
        if value is not None and not isinstance(value, Real | Tensor):
            raise VlmscopeError(f"the value of an edit is {_what(value)}; expected a number or a tensor")
        object.__setattr__(self, "site", site)
        object.__setattr__(self, "op", op)
        object.__setattr__(self, "value", 0.0 if value is None else value)

    def __repr__(self) -> str:
        if callable(self.op):
            return f"Edit('{self.site}', {getattr(self.op, '__qualname__', 'a function')})"
        value = f"{tuple(self.value.shape)} tensor" if isinstance(self.value, Tensor) else self.value
        return f"Edit('{self.site}', '{self.op}'" + (")" if self.op in CUTS else f", {value})")


class Change(NamedTuple):
    """An edit in one run: of one layer's activation, at numbers of positions, or of edges between them."""

    site: Site
    op: Op
    value: Value


def _what(thing: object) -> str:
    return f"{shown(thing, 40)} ({type(thing).__name__})"


def parse_edit(text: str) -> Edit:
    """An edit written as `SITE set|add|scale NUMBER`, or of an edge as `SITE block|zero`.

    >>> edit = parse_edit("decoder.2.attn.h1@all scale 0")
    >>> str(edit.site), edit.op, edit.value
    ('decoder.2.attn.h1@all', 'scale', 0.0)
    >>> parse_edit("decoder.2.attn@*<image block")
    Edit('decoder.2.attn@*<image', 'block')
    """
    edge, _, cut = text.rstrip().rpartition(" ")
    if cut in CUTS:
        return Edit(edge, cut)  # type: ignore[arg-type]
    site, op, value = (*text.rsplit(maxsplit=2), "", "")[:3]
    if op not in OPS:
        raise VlmscopeError(
            f"bad edit {shown(text)}; expected 'SITE set|add|scale NUMBER', such as "
            "'decoder.2.attn.h1@all scale 0', or of an edge 'SITE block|zero', such as "
            "'decoder.2.attn@last<image block'"
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

    @property
    def runs(self) -> tuple[Runnable, Runnable]:
        """Inputs and edits of the clean run, and of the corrupt one."""
        return (self.clean, ()), (self.corrupt, self.edits)

    def __repr__(self) -> str:
        corrupt = "the same inputs" if self.corrupt is self.clean else repr(self.corrupt)
        scored = f"answer {self.answers}, foil {self.foil}"
        return f"Pair(clean {self.clean!r}, corrupt {corrupt}, {scored}, {len(self.edits)} edits)"


Runnable = tuple[Inputs, Sequence[Edit]]
Logits = Float[Tensor, "vocabulary"]

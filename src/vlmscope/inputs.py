"""The tensors of runs: `Inputs`, `Edit` and `Pair`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from vlmscope.errors import VlmscopeError
from vlmscope.sites import Layout, Site

Op = Literal["set", "add", "scale"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of one run (batch 1), as keyword arguments of the Hugging Face model.

    `layout` says, for each tower, what stands at each position.
    """

    tensors: Mapping[str, Tensor]
    layout: Mapping[str, Layout]


@dataclass(frozen=True, eq=False)
class Edit:
    """Change one activation as it passes: `set` it to `value`, `add` to it or `scale` it.

    `site` names one layer and at most one unit. `value` is a number or a tensor that broadcasts
    to `(positions, width)`, where width is that of the kind, of one head, or 1 for one neuron.
    """

    site: Site
    op: Op
    value: float | Tensor

    def __post_init__(self) -> None:
        if self.op not in ("set", "add", "scale"):
            raise VlmscopeError(
                f"unknown operation '{self.op}' of an edit; expected set, add or scale"
            )


def parse_edit(text: str) -> Edit:
    """An edit written as `SITE set|add|scale NUMBER`.

    >>> edit = parse_edit("decoder.2.attn.h1@all scale 0")
    >>> str(edit.site), edit.op, edit.value
    ('decoder.2.attn.h1@all', 'scale', 0.0)
    """
    parts = text.split()
    try:
        site, op, number = parts
        value = float(number)
    except ValueError:
        raise VlmscopeError(
            f"bad edit '{text}'; expected 'SITE set|add|scale NUMBER', such as "
            "'decoder.2.attn.h1@all scale 0'"
        ) from None
    return Edit(Site.parse(site), op, value)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two runs that differ by one corruption, and the two tokens that are scored.

    `answer` and `foil` are token ids, scored at the read-out position. `edits` make the corrupt
    run corrupt where its input is the clean one (noise).
    """

    clean: Inputs
    corrupt: Inputs
    answer: int
    foil: int
    edits: tuple[Edit, ...] = ()


Logits = Float[Tensor, "vocabulary"]

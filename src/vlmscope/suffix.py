"""Rows of a causal decoder that carry only what a patch can change.

A patch at position t changes nothing before t (or before the first position that can see t, where
attention runs both ways within an image). So a row is the run from there on, and attends to the
keys and values that the base run has kept of everything before: one softmax over both. All rows are
laid end to end as one sequence, because all that a block does besides attention it does to each
position alone; the model's own modules do it, on the rows of all lengths at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmscope.errors import ModelError
from vlmscope.model import Model, Plain

ALONG = {
    "position_embeddings": -2,
    "position_ids": -1,
    "cache_position": -1,
    "cross_attention_mask": -2,
    "full_text_row_masked_out_mask": -2,
}
"""Arguments of a block that have an entry for each position, and along which dimension."""


@dataclass(eq=False)
class Memory:
    """What the base run's attention kept, by layer.

    `open` says which position (row) attends to which (column); `coarse` that the softmax is rounded to
    float32, as eager attention's is in a model of any type.
    """

    keys: list[Float[Tensor, "heads pos width"]] = field(default_factory=list)
    values: list[Float[Tensor, "heads pos width"]] = field(default_factory=list)
    open: list[Bool[Tensor, "pos pos"]] = field(default_factory=list)
    coarse: list[bool] = field(default_factory=list)
    modules: list[Any] = field(default_factory=list)


@contextmanager
def remembering(model: Model, tower: str, memory: Memory) -> Iterator[None]:
    """Keep keys, values and masks of a run; the attention itself is as it always is."""
    known: dict[Any, tuple[Any, Tensor]] = {}  # layers have the same masks

    def keep(plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        out, paid = plain(module, q, k, v, mask, **kw)
        memory.keys.append(k[0].clone())
        memory.values.append(v[0].clone())
        causal = kw.get("is_causal"), getattr(module, "is_causal", None)
        which = (id(mask), causal, kw.get("sliding_window"), k.device)
        if which not in known:
            known[which] = mask, allowed(plain, module, mask, q, k, **kw)
        memory.open.append(known[which][1])
        memory.coarse.append(paid is not None and torch.equal(paid, paid.float().to(paid)))
        memory.modules.append(module)
        return out, paid

    with model.attending(tower, keep):
        yield


def allowed(plain: Plain, module: Any, mask: Any, q: Tensor, k: Tensor, **kw: Any) -> Bool[Tensor, "pos pos"]:
    """Which position (row) may attend to which (column) in a call of attention.

    Raises `ModelError` for a mask that says more than that, or says it in another form.
    """
    many = k.shape[2]
    dense = plain.mask(module, mask, q.shape[2], many, k.device, **kw)
    if dense is None:
        return torch.ones(many, many, dtype=torch.bool, device=k.device)
    seen, only = dense, True
    if dense.dtype != torch.bool:
        seen = dense > torch.finfo(dense.dtype).min / 2
        only = bool((dense.masked_fill(~seen, 0.0) == 0).all())
    if seen.shape[1] != 1 or not only:
        raise ModelError(
            f"the attention '{plain.name}' of {type(module).__name__} has a mask that differs by head or adds to the scores; "
            "expected one that says which position sees which; vlmscope.reference takes any, one forward a patch"
        )
    return seen[0, 0]


def starts(memory: Memory) -> list[int]:
    """For each position, the first that a patch there can change: itself, if all are causal."""
    many = memory.keys[0].shape[1]
    open_ = torch.zeros(many, many, dtype=torch.bool)
    for seen in {id(one): one for one in memory.open}.values():
        open_ |= seen.cpu()
    # The first query that attends to each key; then what is behind the start can be seen in turn.
    order = torch.arange(many)
    first = torch.where(open_, order[:, None], many).amin(0)
    found = []
    for position in range(many):
        start = min(position, int(first[position:].min()))
        while (lower := min(start, int(first[start:].min()))) < start:
            start = lower
        found.append(start)
    return found


class Rows:
    """Some rows of one tower, laid end to end.

    `begins` is each row's first position. The rows that have joined are the first so many, which
    `take` sets; `tokens` are the positions of all their places in the sequence.
    """

    def __init__(self, model: Model, tower: str, memory: Memory, begins: Sequence[int]) -> None:
        self.model, self.tower, self.memory = model, tower, memory
        self.begins = list(begins)
        self.many = memory.keys[0].shape[1]
        self.device = memory.keys[0].device
        lengths = [self.many - begin for begin in self.begins]
        self.offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def take(self, joined: int) -> None:
        """The first `joined` rows are in the sequence."""
        groups = defaultdict(list)
        for row, begin in enumerate(self.begins[:joined]):
            groups[begin].append(self.offsets[row])
        self.groups = [
            (
                begin,
                torch.tensor(first, device=self.device)[:, None]
                + torch.arange(self.many - begin, device=self.device),
            )
            for begin, first in groups.items()
        ]
        self.tokens = torch.cat([torch.arange(begin, self.many) for begin in self.begins[:joined]]).to(
            self.device
        )

    def place(self, row: int, position: int) -> int:
        """Where a row's position is in the sequence."""
        return self.offsets[row] + position - self.begins[row]

    def last(self) -> list[int]:
        """The place of the last position of each row."""
        return [end - 1 for end in self.offsets[1:]]

    def attend(
        self, plain: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        """Each row over the base run's keys before it and over its own: `(1, tokens, heads, width)`."""
        layer = next(n for n, one in enumerate(self.memory.modules) if one is module)
        scale = kw.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = torch.empty_like(q[0])  # heads, tokens, width
        for begin, at in self.groups:
            at = at.to(q.device)
            out[:, at] = self._group(
                q[0][:, at], k[0][:, at], v[0][:, at], layer, begin, scale, kw.get("softcap")
            )
        return out.transpose(0, 1)[None], None

    def _group(
        self,
        q: Float[Tensor, "heads rows own width"],
        k: Float[Tensor, "kv_heads rows own width"],
        v: Float[Tensor, "kv_heads rows own width"],
        layer: int,
        begin: int,
        scale: float,
        cap: float | None,
    ) -> Float[Tensor, "heads rows own width"]:
        """Rows that begin at the same position."""
        heads, rows, own, width = q.shape
        kv = k.shape[0]
        shared_k, shared_v = (x[layer][:, :begin] for x in (self.memory.keys, self.memory.values))
        # Queries of all rows, and of all heads that share keys, in one product with the prefix.
        folded = q.view(kv, -1, width)
        before = (folded @ shared_k.mT).view(heads, rows, own, begin)
        grouped = q.view(kv, heads // kv, rows, own, width)
        within = (grouped @ k[:, None].mT).view(heads, rows, own, own)
        scores = torch.cat([before, within], -1) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~self.memory.open[layer][begin:], -torch.inf)
        if scores.dtype.itemsize < 4 or self.memory.coarse[layer]:
            scores = scores.float()
        paid = scores.softmax(-1).to(q.dtype)
        left, right = paid[..., :begin], paid[..., begin:]
        out = (left.reshape(kv, heads // kv * rows * own, begin) @ shared_v).view(heads, rows, own, width)
        mine = right.reshape(kv, heads // kv, rows, own, own) @ v[:, None]
        return out + mine.view(heads, rows, own, width)

    @contextmanager
    def attending(self) -> Iterator[None]:
        with self.model.attending(self.tower, self.attend):
            yield


@contextmanager
def alone(model: Model, tower: str) -> Iterator[None]:
    """Positions pass a block one by one; what their attention gives is overwritten by a hook."""

    def nothing(plain: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        return q.transpose(1, 2), None

    with model.attending(tower, nothing):
        yield


def at_positions(kwargs: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A block's arguments for a sequence of other positions; nothing is masked or cached."""
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in ("attention_mask", "past_key_values"):
            found[name] = None
        elif name in ALONG:
            found[name] = _select(value, ALONG[name], tokens)
        else:
            found[name] = value
    return found


def _select(value: Any, dimension: int, tokens: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(map(partial(_select, dimension=dimension, tokens=tokens), value))
    if isinstance(value, Tensor) and value.ndim >= -dimension:
        return value.index_select(value.ndim + dimension, tokens.to(value.device))
    return value

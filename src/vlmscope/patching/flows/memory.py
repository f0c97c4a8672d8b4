"""What the attention of a causal decoder kept in the base run, and attention of rows over it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmscope.errors import ModelError
from vlmscope.runs.hooks import Plain
from vlmscope.runs.network import Network


@dataclass(eq=False)
class Memory:
    """What the base run's attention kept, by layer.

    `open` says which position (row) attends to which (column); `coarse` that the softmax is rounded to
    float32, as eager attention's is in a model of any type. `starts` says for each position which is the
    first that a patch there can change: itself, if all are causal.
    """

    keys: list[Float[Tensor, "heads pos width"]] = field(default_factory=list)
    values: list[Float[Tensor, "heads pos width"]] = field(default_factory=list)
    open: list[Bool[Tensor, "pos pos"]] = field(default_factory=list)
    coarse: list[bool] = field(default_factory=list)
    modules: list[Any] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


@contextmanager
def remembering(network: Network, tower: str, memory: Memory) -> Iterator[None]:
    """Keep keys, values and masks of a run; the attention itself is as it always is."""
    known: list[tuple[Any, Any, Tensor]] = []  # layers share their masks

    def keep(plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        out, paid = plain(module, q, k, v, mask, **kw)
        memory.keys.append(k[0].clone())
        memory.values.append(v[0].clone())
        sort = kw.get("is_causal"), getattr(module, "is_causal", None), kw.get("sliding_window"), k.device
        found = next((seen for other, how, seen in known if other is mask and how == sort), None)
        if found is None:
            found = allowed(plain, module, mask, q, k, **kw)
            known.append((mask, sort, found))
        memory.open.append(found)
        memory.coarse.append(paid is not None and torch.equal(paid, paid.float().to(paid)))
        memory.modules.append(module)
        return out, paid

    with network.attending(tower, keep):
        yield
    memory.starts = _starts([seen for _, _, seen in known])


def allowed(plain: Plain, module: Any, mask: Any, q: Tensor, k: Tensor, **kw: Any) -> Bool[Tensor, "pos pos"]:
    """Which position (row) may attend to which (column) in a call of attention.

    Raises `ModelError` for a mask that says more than that, or says it in another form.
    """
    length = k.shape[2]
    dense = plain.mask(module, mask, q.shape[2], length, k.device, **kw)
    if dense is None:
        return torch.ones(length, length, dtype=torch.bool, device=k.device)
    seen, only = dense, True
    if dense.dtype != torch.bool:
        seen = dense > torch.finfo(dense.dtype).min / 2
        only = bool((dense.masked_fill(~seen, 0.0) == 0).all())
    if seen.shape[1] != 1 or not only:
        raise ModelError(
            f"the attention '{plain.name}' of {type(module).__name__} has a mask that differs by head or "
            "adds to the scores; expected one that says which position sees which; the engine 'reference' "
            "takes any, one forward a patch"
        )
    return seen[0, 0]


def _starts(masks: Sequence[Bool[Tensor, "pos pos"]]) -> list[int]:
    """For each position, the first that a patch there can change."""
    length = len(masks[0])
    open_ = torch.zeros(length, length, dtype=torch.bool)
    for seen in masks:
        open_ |= seen.cpu()
    # The first query that attends to each key; then what is behind the start can be seen in turn.
    order = torch.arange(length)
    first = torch.where(open_, order[:, None], length).amin(0)
    found = []
    for position in range(length):
        start = min(position, int(first[position:].min()))
        while (lower := min(start, int(first[start:].min()))) < start:
            start = lower
        found.append(start)
    return found


class Ragged:
    """Rows of different lengths as one sequence, and their attention.

    `begins` is each row's first position. The rows that have joined are the first so many, which
    `take` sets; `tokens` are the positions of all their places in the sequence.
    """

    def __init__(self, memory: Memory, begins: Sequence[int]) -> None:
        self.memory, self.begins = memory, list(begins)
        self.length = memory.keys[0].shape[1]
        self.device = memory.keys[0].device
        lengths = [self.length - begin for begin in self.begins]
        self.offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def take(self, joined: int) -> None:
        """The first `joined` rows are in the sequence."""
        groups = defaultdict(list)
        for row, begin in enumerate(self.begins[:joined]):
            groups[begin].append(self.offsets[row])
        self.groups = []
        for begin, first in groups.items():
            own = torch.arange(self.length - begin, device=self.device)
            self.groups.append((begin, torch.tensor(first, device=self.device)[:, None] + own))
        parts = [torch.arange(begin, self.length) for begin in self.begins[:joined]]
        self.tokens = torch.cat(parts).to(self.device)

    def place(self, row: int, position: int) -> int:
        """Where a row's position is in the sequence."""
        return self.offsets[row] + position - self.begins[row]

    def ends(self, positions: int) -> list[int]:
        """The places of the last so many positions of each row."""
        return [place for end in self.offsets[1:] for place in range(end - positions, end)]

    def attend(
        self, plain: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        """Each row over the base run's keys before it and over its own: `(1, tokens, heads, width)`."""
        layer = next(n for n, known in enumerate(self.memory.modules) if known is module)
        scale = kw.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = torch.empty_like(q[0])  # heads, tokens, width
        for begin, at in self.groups:
            at = at.to(q.device)
            parts = q[0][:, at], k[0][:, at], v[0][:, at]
            out[:, at] = self._group(*parts, layer, begin, scale, kw.get("softcap"))
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
        prefix = left.reshape(kv, heads // kv * rows * own, begin) @ shared_v
        mine = right.reshape(kv, heads // kv, rows, own, own) @ v[:, None]
        return prefix.view(heads, rows, own, width) + mine.view(heads, rows, own, width)

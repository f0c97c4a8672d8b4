"""What the attention of a causal decoder kept in the base run, and attention of rows over it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmscope.errors import ModelError
from vlmscope.runs.hooks import Plain
from vlmscope.runs.network import Network


class Kept(NamedTuple):
    """What one attention module kept: `open` says which position (row) attends to which (column), `coarse`
    that the softmax is rounded to float32, as eager attention's is in a model of any type."""

    keys: Float[Tensor, "heads pos width"]
    values: Float[Tensor, "heads pos width"]
    open: Bool[Tensor, "pos pos"]
    coarse: bool


@dataclass(eq=False)
class Memory:
    """What the base run's attention kept, by module. `starts` says for each position which is the first that
    a patch there can change: itself, if all are causal."""

    kept: dict[Any, Kept] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)


@contextmanager
def remembering(network: Network, tower: str, memory: Memory) -> Iterator[None]:
    """Keep keys, values and masks of a run; the attention itself is as it always is."""
    known: list[tuple[Any, Any, Tensor]] = []  # layers share their masks

    def keep(plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        out, paid = plain(module, q, k, v, mask, **kw)
        sort = kw.get("is_causal"), getattr(module, "is_causal", None), kw.get("sliding_window"), k.device
        found = next((seen for other, how, seen in known if other is mask and how == sort), None)
        if found is None:
            found = allowed(plain, module, mask, q, k, **kw)
            known.append((mask, sort, found))
        coarse = paid is not None and torch.equal(paid, paid.float().to(paid))
        memory.kept[module] = Kept(k[0].clone(), v[0].clone(), found, coarse)
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
    seen = torch.stack([mask.cpu() for mask in masks]).any(0)
    order = torch.arange(len(seen))
    # The first query that attends to a key, or to one behind it; what is behind that can be seen in turn.
    first = torch.where(seen, order[:, None], len(seen)).amin(0).flip(0).cummin(0).values.flip(0)
    starts = order
    while (lower := starts.minimum(first[starts])).ne(starts).any():
        starts = lower
    return starts.tolist()


class Ragged:
    """Rows of different lengths as one sequence, and their attention.

    `begins` is each row's first position, `offsets` where rows are in the sequence. The rows that have joined
    are the first so many, which `take` sets; `tokens` are the positions of all their places in the sequence.
    """

    def __init__(self, memory: Memory, begins: Sequence[int]) -> None:
        self.memory, self.begins = memory, begins
        self.length = len(memory.starts)
        self.device = next(iter(memory.kept.values())).keys.device
        self.offsets = [0, *accumulate(self.length - begin for begin in begins)]
        self.groups: list[tuple[int, Tensor]] = []

    def take(self, joined: int) -> None:
        """The first `joined` rows are in the sequence."""
        groups = defaultdict(list)
        for offset, begin in zip(self.offsets, self.begins[:joined], strict=False):
            groups[begin].append(offset)
        self.groups = []
        for begin, first in groups.items():
            own = torch.arange(self.length - begin, device=self.device)
            self.groups.append((begin, torch.tensor(first, device=self.device)[:, None] + own))
        parts = [torch.arange(begin, self.length) for begin in self.begins[:joined]]
        self.tokens = torch.cat(parts).to(self.device)

    def attend(
        self, plain: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        """Each row over the base run's keys before it and over its own: `(1, tokens, heads, width)`."""
        scale = kw.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = torch.empty_like(q[0])  # heads, tokens, width
        for begin, at in self.groups:
            at = at.to(q.device)
            kept = self.memory.kept[module]
            out[:, at] = _attend(q[0][:, at], k[0][:, at], v[0][:, at], kept, begin, scale, kw.get("softcap"))
        return out.transpose(0, 1)[None], None


def _attend(
    q: Float[Tensor, "heads rows own width"],
    k: Float[Tensor, "kv_heads rows own width"],
    v: Float[Tensor, "kv_heads rows own width"],
    kept: Kept,
    begin: int,
    scale: float,
    cap: float | None,
) -> Float[Tensor, "heads rows own width"]:
    """Rows that begin at the same position."""
    heads, rows, own, width = q.shape
    kv = k.shape[0]
    # Queries of all rows, and of all heads that share keys, in one product with the prefix.
    folded = q.view(kv, -1, width)
    before = (folded @ kept.keys[:, :begin].mT).view(heads, rows, own, begin)
    grouped = q.view(kv, heads // kv, rows, own, width)
    within = (grouped @ k[:, None].mT).view(heads, rows, own, own)
    scores = torch.cat([before, within], -1) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~kept.open[begin:], -torch.inf)
    if scores.dtype.itemsize < 4 or kept.coarse:
        scores = scores.float()
    paid = scores.softmax(-1).to(q.dtype)
    left, right = paid[..., :begin], paid[..., begin:]
    prefix = left.reshape(kv, heads // kv * rows * own, begin) @ kept.values[:, :begin]
    mine = right.reshape(kv, heads // kv, rows, own, own) @ v[:, None]
    return prefix.view(heads, rows, own, width) + mine.view(heads, rows, own, width)

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
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlmscope.errors import ModelError
from vlmscope.patching.flows import Cell, Flow, Job, Row
from vlmscope.runs.access import edges_of, hook
from vlmscope.runs.edges import Edges
from vlmscope.runs.forward import edited
from vlmscope.runs.hooks import Hooks, Plain, seeing
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site

ALONG = {
    "position_embeddings": -2,
    "position_ids": -1,
    "cache_position": -1,
    "cross_attention_mask": -2,
    "full_text_row_masked_out_mask": -2,
}
"""Arguments of a block that have an entry for each position, and along which dimension."""


LONG = 128
"""Rows of so many positions pay attention by the fused kernel, which wants keys of its own for each."""


class Suffix(Flow):
    along = 1

    def __init__(self, job: Job, tower: str, rows: Sequence[Row]) -> None:
        super().__init__(job, tower, rows)
        self.begins = [_begin(job, tower, row) for row in rows]
        self.memory: Memory = job.memory[tower]
        self.length = len(self.memory.starts)
        self.offsets = [0, *accumulate(self.length - begin for begin in self.begins)]
        self.lost: dict[int, list[Edges]] = {}

    def __enter__(self) -> Suffix:
        self.enter_context(self.job.network.attending(self.tower, self._attend))
        return self

    @classmethod
    def cost(cls, job: Job, tower: str, row: Row) -> int:
        return job.longest(tower) - _begin(job, tower, row)

    def join(self, stage: int) -> None:
        super().join(stage)
        if not any(row.stage == stage for row in self.rows):
            return
        begins = [begin for begin, row in zip(self.begins, self.rows, strict=True) if row.stage <= stage]
        groups = defaultdict(list)  # rows that begin at the same position
        for i, begin in enumerate(begins):
            groups[begin].append(i)
        self.groups = [
            (begin, some, torch.stack([torch.arange(self.length - begin) + self.offsets[i] for i in some]))
            for begin, some in groups.items()
        ]
        self.tokens = torch.cat([torch.arange(n, self.length) for n in begins]).to(self.hidden.device)

    def _attend(
        self, plain: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        """Each row over the base run's keys before it and over its own: `(1, tokens, heads, width)`."""
        scale = kw.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, kept = torch.empty_like(q[0]), self.memory.kept[module]  # heads, tokens, width
        for begin, some, at in self.groups:
            at = at.to(q.device)
            own = q[0][:, at], k[0][:, at], v[0][:, at]
            lost = [(n, edge) for n, i in enumerate(some) for edge in self.lost.get(i, ())]
            out[:, at] = _attend(*own, kept, begin, scale, kw.get("softcap"), lost)
        return out.transpose(0, 1)[None], None

    def _alone(self, layer: int, cells: Sequence[Cell]) -> None:
        with self.job.network.attending(self.tower, _nothing):
            super()._alone(layer, cells)

    def cut(self, hooks: Hooks, layer: int, sites: Sequence[tuple[int, Site]]) -> None:
        """Self-attention is our own here, and leaves them out itself."""
        super().cut(hooks, layer, [(i, site) for i, site in sites if site.kind != "attn"])
        self.lost = defaultdict(list)
        for i, site in sites:
            if site.kind == "attn":
                one = edges_of(self.job.network, self.job.inputs, site, str(self.job.cut), -self.begins[i])
                self.lost[i].append(one)

    def edges(self, sites: Sequence[tuple[int, Site]], queries: int, keys: int) -> list[Edges]:
        found = [(i, edges_of(self.job.network, self.job.inputs, s, str(self.job.cut))) for i, s in sites]
        return [one._replace(targets=[self.place(i, n)[1] for n in one.targets]) for i, one in found]

    def place(self, row: int, position: int) -> tuple[int, int]:
        return 0, self.offsets[row] + position - self.begins[row]

    def arguments(self, kwargs: Mapping[str, Any], at: Sequence[int] | None) -> Mapping[str, Any]:
        """Those of the base run's positions; nothing is masked or cached."""
        tokens = self._tokens(at)
        found = {name: _select(value, ALONG.get(name), tokens) for name, value in kwargs.items()}
        return {**found, **dict.fromkeys({"attention_mask", "past_key_values"} & kwargs.keys())}

    def _tokens(self, at: Sequence[int] | None) -> Tensor:
        return self.tokens if at is None else torch.tensor(at, device=self.hidden.device)

    def added(self, layer: int, hidden: Tensor, at: Sequence[int] | None) -> Tensor:
        if not self.job.network.family.towers[self.tower].deepstack:
            return hidden
        given = self.job.base.values[Point(self.tower, layer, "resid")]
        added = self.job.base.entrance(self.tower, layer + 1) - given
        return hidden + added[:, self._tokens(at).to(added.device)]

    def edit(self, hooks: Hooks, layer: int, joined: Sequence[tuple[int, Row]]) -> None:
        """At the places that the positions have in each row; what is added between blocks is in the base run,
        which the rows take it from."""
        for site, op, value in self.job.changes:
            if (site.tower, site.layer) != (self.tower, layer) or site.kind == "deepstack":
                continue
            found = [
                (self.place(i, p)[1], n)
                for i, _ in joined
                for n, p in enumerate(site.positions)
                if p >= self.begins[i]
            ]
            if not found:
                continue
            places, numbers = zip(*found, strict=True)
            if isinstance(value, Tensor) and value.ndim > 1 and len(value) > 1:
                value = value[list(numbers)]
            units, there = self.job.network.units(site.point), replace(site, positions=places)
            change = partial(edited, site=there, op=op, value=value, units=units)
            hook(hooks, self.job.network, site.point, self.job.inputs, change)

    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        job, many, family = self.job, self.job.positions, self.job.network.family
        ends = [place for end in self.offsets[1:] for place in range(end - many, end)]
        hidden = self.hidden[0, ends].unflatten(0, (len(self.rows), many))
        self.close()
        output = family.leave(job.network.hf, self.tower, hidden)
        return family.finish(job.network.hf, job.inputs, self.tower, output, many)


def _begin(job: Job, tower: str, row: Row) -> int:
    """The first position that a row changes, or that is scored."""
    memory: Memory = job.memory[tower]
    first = min(position for site in row.sites for position in site.positions)
    return min(memory.starts[first], len(memory.starts) - job.positions)


def _nothing(plain: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
    """Positions pass a block one by one; what their attention gives is overwritten by a hook."""
    return q.transpose(1, 2), None


def _select(value: Any, dimension: int | None, tokens: Tensor) -> Any:
    if dimension is None:
        return value
    if isinstance(value, tuple):
        return tuple(_select(part, dimension, tokens) for part in value)
    if isinstance(value, Tensor) and value.ndim >= -dimension:
        return value.index_select(value.ndim + dimension, tokens.to(value.device))
    return value


# -- attention over what the base run kept ---------------------------------------------------------


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
def remembering(network: Network, tower: str) -> Iterator[Memory]:
    """Keep keys, values and masks of a run; the attention itself is as it always is."""
    memory = Memory()
    known: list[tuple[Any, Any, Tensor]] = []  # layers share their masks

    def keep(plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        out, paid = plain(module, q, k, v, mask, **kw)
        sort = kw.get("is_causal"), getattr(module, "is_causal", None), kw.get("sliding_window"), k.device
        found = next((seen for other, how, seen in known if other is mask and how == sort), None)
        if found is None:
            found = _allowed(plain, module, mask, q, k, **kw)
            known.append((mask, sort, found))
        coarse = paid is not None and torch.equal(paid, paid.float().to(paid))
        memory.kept[module] = Kept(k[0].clone(), v[0].clone(), found, coarse)
        return out, paid

    with network.attending(tower, keep):
        yield memory
    memory.starts = _starts([seen for _, _, seen in known])


def _allowed(
    plain: Plain, module: Any, mask: Any, q: Tensor, k: Tensor, **kw: Any
) -> Bool[Tensor, "pos pos"]:
    """Which position (row) may attend to which (column) in a call of attention; raises `ModelError` for a
    mask that says more than that."""
    length = k.shape[2]
    dense = plain.mask(module, mask, q.shape[2], length, k.device, **kw)
    if dense is None:
        return torch.ones(length, length, dtype=torch.bool, device=k.device)
    seen = seeing(dense)
    if seen.shape[1] != 1 or (dense.dtype != torch.bool and dense.masked_fill(~seen, 0.0).any()):
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


def _attend(
    q: Float[Tensor, "heads rows own width"],
    k: Float[Tensor, "kv_heads rows own width"],
    v: Float[Tensor, "kv_heads rows own width"],
    kept: Kept,
    begin: int,
    scale: float,
    cap: float | None,
    lost: Sequence[tuple[int, Edges]] = (),
) -> Float[Tensor, "heads rows own width"]:
    """Rows that begin at the same position; `lost` are the edges that some of them, by number, do without."""
    heads, rows, own, width = q.shape
    kv = k.shape[0]
    if own >= LONG and cap is None and not lost and not kept.coarse:
        # Copies of the prefix cost less than scores that are written and read again and again.
        pairs = ((kept.keys, k), (kept.values, v))
        both = [torch.cat([x[:, None, :begin].expand(-1, rows, -1, -1), y], 2) for x, y in pairs]
        queries, keys, values = (x.transpose(0, 1) for x in (q, *both))
        found = scaled_dot_product_attention(
            queries, keys, values, kept.open[begin:], scale=scale, enable_gqa=heads != kv
        )
        return found.transpose(0, 1)
    # Queries of all rows, and of all heads that share keys, in one product with the prefix.
    folded = q.view(kv, -1, width)
    before = (folded @ kept.keys[:, :begin].mT).view(heads, rows, own, begin)
    grouped = q.view(kv, heads // kv, rows, own, width)
    within = (grouped @ k[:, None].mT).view(heads, rows, own, own)
    scores = torch.cat([before, within], -1) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~kept.open[begin:], -torch.inf)
    for place in _places(lost, heads, "block"):
        scores[place] = -torch.inf
    if scores.dtype.itemsize < 4 or kept.coarse:
        scores = scores.float()
    paid = scores.softmax(-1).to(q.dtype)
    if lost:  # what has nothing left reads nothing
        paid = paid.masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
    for place in _places(lost, heads, "zero"):
        paid[place] = 0.0
    left, right = paid[..., :begin], paid[..., begin:]
    prefix = left.reshape(kv, heads // kv * rows * own, begin) @ kept.values[:, :begin]
    mine = right.reshape(kv, heads // kv, rows, own, own) @ v[:, None]
    return prefix.view(heads, rows, own, width) + mine.view(heads, rows, own, width)


def _places(lost: Sequence[tuple[int, Edges]], heads: int, op: str) -> Iterator[tuple[Any, ...]]:
    """Where edges are in `(heads, rows, own, pos)`."""
    for row, edge in lost:
        if edge.op == op:
            some = torch.tensor(list(edge.heads or range(heads)))
            targets, sources = torch.tensor(edge.targets), torch.tensor(edge.sources)
            yield some[:, None, None], row, targets[:, None], sources

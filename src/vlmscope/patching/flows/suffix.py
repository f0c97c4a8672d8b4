"""Rows of a causal decoder that carry only what a patch can change.

A patch at position t changes nothing before t (or before the first position that can see t, where
attention runs both ways within an image). So a row is the run from there on, and attends to the
keys and values that the base run has kept of everything before: one softmax over both. All rows are
laid end to end as one sequence, because all that a block does besides attention it does to each
position alone; the model's own modules do it, on the rows of all lengths at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.patching.flows.flow import Cell, Flow, Job, Row
from vlmscope.patching.flows.memory import Memory, Ragged
from vlmscope.runs.access import hook
from vlmscope.runs.forward import edited
from vlmscope.runs.hooks import Hooks
from vlmscope.sites import Point

ALONG = {
    "position_embeddings": -2,
    "position_ids": -1,
    "cache_position": -1,
    "cross_attention_mask": -2,
    "full_text_row_masked_out_mask": -2,
}
"""Arguments of a block that have an entry for each position, and along which dimension."""


class Suffix(Flow):
    along = 1

    def __init__(self, job: Job, tower: str, rows: Sequence[Row]) -> None:
        super().__init__(job, tower, rows)
        self.begins = [_begin(job, tower, row) for row in rows]
        self.ragged = Ragged(job.memory[tower], self.begins)

    def __enter__(self) -> Flow:
        self.stack.enter_context(self.job.network.attending(self.tower, self.ragged.attend))
        return self

    @classmethod
    def cost(cls, job: Job, tower: str, row: Row) -> int:
        return job.longest(tower) - _begin(job, tower, row)

    def join(self, stage: int) -> None:
        super().join(stage)
        if any(row.stage == stage for row in self.rows):
            self.ragged.take(sum(row.stage <= stage for row in self.rows))

    def _alone(self, layer: int, cells: Sequence[Cell]) -> None:
        with self.job.network.attending(self.tower, _nothing):
            super()._alone(layer, cells)

    def place(self, row: int, position: int) -> tuple[int, int]:
        return 0, self.ragged.offsets[row] + position - self.begins[row]

    def arguments(self, kwargs: Mapping[str, Any], at: Sequence[int] | None) -> Mapping[str, Any]:
        """Those of the base run's positions; nothing is masked or cached."""
        tokens = self._tokens(at)
        found = {name: _select(value, ALONG.get(name), tokens) for name, value in kwargs.items()}
        return {**found, **dict.fromkeys({"attention_mask", "past_key_values"} & kwargs.keys())}

    def _tokens(self, at: Sequence[int] | None) -> Tensor:
        return self.ragged.tokens if at is None else torch.tensor(at, device=self.hidden.device)

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
        ends = [place for end in self.ragged.offsets[1:] for place in range(end - many, end)]
        hidden = self.hidden[0, ends].unflatten(0, (len(self.rows), many))
        self.stack.close()
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

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

from vlmscope.models.inputs import Change
from vlmscope.patching.flows.flow import Cell, Flow, Job, Row, around, longest
from vlmscope.patching.flows.memory import Memory, Ragged
from vlmscope.patching.flows.rows import INSIDE
from vlmscope.runs.access import access
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
    def __init__(self, job: Job, tower: str, rows: Sequence[Row]) -> None:
        super().__init__(job, tower, rows)
        self.hidden = job.base.entrance(tower, 0)[:, :0]
        self.ragged = Ragged(job.memory[tower], [_begin(job, tower, row) for row in rows])

    def __enter__(self) -> Flow:
        self.stack.enter_context(self.job.network.attending(self.tower, self.ragged.attend))
        return self

    @classmethod
    def cost(cls, job: Job, tower: str, row: Row) -> int:
        return longest(job, tower) - _begin(job, tower, row)

    def join(self, stage: int) -> None:
        new = [(i, row) for i, row in enumerate(self.rows) if row.stage == stage]
        if not new:
            return
        last = stage == self.job.depth(self.tower)
        end = Point(self.tower, stage - 1, "resid")
        base = self.job.base.values[end] if last else self.job.base.entrance(self.tower, stage)
        parts = [self.hidden.to(base.device), *(base[:, self.ragged.begins[i] :] for i, _ in new)]
        self.hidden = torch.cat(parts, 1)
        self._patch_joined(new)
        self.ragged.take(new[-1][0] + 1)

    def _patch_joined(self, new: list[tuple[int, Row]]) -> None:
        """Write the first patch of rows that join, behind the block that it is in."""
        job, hidden = self.job, self.hidden
        cells = self._cells([(i, row, row.sites[:1]) for i, row in new])
        behind = [c for c in cells if c.site.kind == "resid"]
        job.write(hidden, behind)
        if behind:
            places = [c.position for c in behind]
            at = torch.tensor([c.source for c in behind], device=hidden.device)
            hidden[:, places] = self._added(behind[0].site.layer, hidden[:, places], at)
        within = [c for c in cells if c.site.kind in INSIDE and c.site.layer < new[0][1].stage]
        if not within:
            return
        layer = within[0].site.layer
        at = torch.tensor([c.source for c in within], device=hidden.device)
        heads, entrance = around(self.tower, layer)
        inside = [replace(c, position=n) for n, c in enumerate(within)]
        with Hooks() as hooks, job.network.attending(self.tower, _nothing):
            if heads in job.base.values:
                own = job.base.values[heads].to(at.device)[:, at]
                hooks.at(access(job.network, heads, job.inputs), lambda x: own.clone())
            before = job.base.values[entrance].to(at.device)[:, at]
            out = self._call(layer, before, inside, at)
        hidden[0, [c.position for c in within]] = self._added(layer, out, at)[0]

    def _cells(self, rows: Sequence[tuple[int, Row, Sequence[Any]]]) -> list[Cell]:
        return [
            Cell(0, self.ragged.place(i, p), site, p, row.shift)
            for i, row, sites in rows
            for site in sites
            for p in site.positions
        ]

    def block(self, layer: int) -> None:
        joined = [(i, row) for i, row in enumerate(self.rows) if row.stage <= layer]
        cells = self._cells([(i, row, [s for s in row.sites if s.layer == layer]) for i, row in joined])
        with Hooks() as hooks:
            for change in self.job.changes:
                # What is added between blocks is in the base run, which the rows take it from.
                own = change.site.tower == self.tower and change.site.kind != "deepstack"
                if own and change.site.layer == layer:
                    self._hook_own(hooks, change, joined)
            hidden = self._call(layer, self.hidden, cells, self.ragged.tokens)
        self.hidden = self._added(layer, hidden, self.ragged.tokens)

    def _added(self, layer: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """With what the model adds behind this block, before whatever is next, at these positions."""
        if not self.job.network.family.towers[self.tower].deepstack:
            return hidden
        given = self.job.base.values[Point(self.tower, layer, "resid")]
        added = self.job.base.entrance(self.tower, layer + 1) - given
        return hidden + added[:, tokens.to(added.device)]

    def _hook_own(self, hooks: Hooks, change: Change, joined: list[tuple[int, Row]]) -> None:
        """One of the run's own edits, at the places that its positions have in each row."""
        site, value, ragged = change.site, change.value, self.ragged
        found = [
            (ragged.place(i, p), n)
            for i, _ in joined
            for n, p in enumerate(site.positions)
            if p >= ragged.begins[i]
        ]
        if not found:
            return
        places, numbers = zip(*found, strict=True)
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) > 1:
            value = value[list(numbers)]
        network = self.job.network
        there = replace(site, positions=places)
        change_here = partial(edited, site=there, op=change.op, value=value, units=network.units(site.point))
        hooks.at(access(network, site.point, self.job.inputs), change_here)

    def _call(self, layer: int, hidden: Tensor, cells: list[Cell], tokens: Tensor) -> Tensor:
        """Call a block on a sequence of the base run's positions, and patch cells on the way."""
        _, kwargs = self.job.base.calls[self.tower, layer]
        kwargs = at_positions(kwargs, tokens)
        kwargs.pop("hidden_states", None)
        with Hooks() as hooks:
            self.job.hook_cells(hooks, cells)
            out = self.job.network.blocks(self.tower)[layer](hidden, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        job, many = self.job, self.job.positions
        ends = self.hidden[0, self.ragged.ends(many)].unflatten(0, (len(self.rows), many))
        self.stack.close()
        output = job.network.family.leave(job.network.hf, self.tower, ends)
        return job.network.family.finish(job.network.hf, job.inputs, self.tower, output, many)


def _begin(job: Job, tower: str, row: Row) -> int:
    """The first position that a row changes, or that is scored."""
    memory: Memory = job.memory[tower]
    first = min(position for site in row.sites for position in site.positions)
    return min(memory.starts[first], len(memory.starts) - job.positions)


def _nothing(plain: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
    """Positions pass a block one by one; what their attention gives is overwritten by a hook."""
    return q.transpose(1, 2), None


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

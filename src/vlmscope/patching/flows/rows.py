"""Rows of whole runs: a row begins as a copy of the base run and joins behind the layer of its own site.

Rows that read the same image share its cross-attention keys and values, which are computed once a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.patching.flows.flow import Cell, Flow, Job, Row, around, longest
from vlmscope.patching.trace import edited_output
from vlmscope.runs.access import access
from vlmscope.runs.forward import editing
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import Network
from vlmscope.runs.shapes import SUBLAYERS
from vlmscope.sites import Point


class Rows(Flow):
    def __init__(self, job: Job, tower: str, rows: Sequence[Row]) -> None:
        super().__init__(job, tower, rows)
        self.hidden = torch.empty(0)

    def __enter__(self) -> Flow:
        self.stack.enter_context(_folding(self.job, self.tower))
        return self

    @classmethod
    def cost(cls, job: Job, tower: str, row: Row) -> int:
        return longest(job, tower)

    def join(self, stage: int) -> None:
        depth = self.job.depth(self.tower)
        if any(row.stage == stage for row in self.rows):
            last = Point(self.tower, depth - 1, "resid")
            base = self.job.base.values[last] if stage == depth else self.job.base.entrance(self.tower, stage)
            self._join(base, stage)

    def _join(self, base: Tensor, stage: int) -> None:
        new = [row for row in self.rows if row.stage == stage]
        joined = base.expand(len(new), -1, -1).clone()
        first = [(i, row.sites[0], row.shift) for i, row in enumerate(new)]
        cells = [Cell(i, p, site, p, shift) for i, site, shift in first for p in site.positions]
        self.job.write(joined, [c for c in cells if c.site.kind in ("resid", "output")])
        within = [c for c in cells if c.site.kind in INSIDE and c.site.layer < stage]
        if within:
            self._behind(joined, within)
        self.hidden = torch.cat([self.hidden, joined]) if len(self.hidden) else joined

    def _behind(self, joined: Tensor, cells: list[Cell]) -> None:
        """Write what patches inside a block change behind it, at their own positions.

        Within a block positions meet in self-attention alone, which these patches leave as it is:
        so each patched position passes its block by itself, with the base run's self-attention
        written over its own, and the patch after that.
        """
        job, layer = self.job, cells[0].site.layer
        at = torch.tensor([c.source for c in cells], device=joined.device)
        heads, entrance = around(self.tower, layer)
        own = job.base.values[heads].to(at.device)[0, at, None]
        alone = [replace(c, row=n, position=0) for n, c in enumerate(cells)]
        with Hooks() as hooks:
            hooks.at(access(job.network, heads, job.inputs), lambda x: own)
            hidden = job.base.values[entrance].to(at.device)[0, at, None]
            out = self._call(layer, hidden, alone, attention_mask=None)
        joined[torch.tensor([c.row for c in cells], device=joined.device), at] = out[:, 0]

    def block(self, layer: int) -> None:
        cells = [
            Cell(i, p, site, p, row.shift)
            for i, row in enumerate(self.rows)
            for site in row.sites
            if row.stage <= layer == site.layer
            for p in site.positions
        ]
        with editing(self.job.network, self.job.inputs, self.job.edits):
            self.hidden = self._call(layer, self.hidden, cells)

    def _call(self, layer: int, hidden: Tensor, cells: list[Cell], **changes: object) -> Tensor:
        """Call a block as the base run called it, with other rows, and patch cells on the way."""
        args, kwargs = self.job.base.calls[self.tower, layer]
        changes = {"past_key_values": None, **changes}
        kwargs = {name: changes.get(name, value) for name, value in kwargs.items()}
        with Hooks() as hooks:
            self.job.hook_cells(hooks, cells, hidden.shape)
            out = self.job.network.blocks(self.tower)[layer](hidden, *args[1:], **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        job, family, tower = self.job, self.job.network.family, self.tower
        if len(self.hidden):
            hidden = family.leave(job.network.hf, tower, self.hidden)
            self.hidden = edited_output(job.network, hidden, tower, job.changes)
        outer = job.depth(tower) + 1
        if self.rows[-1].stage == outer:
            self._join(edited_output(job.network, job.base.outputs[tower], tower, job.changes), outer)
        self.stack.close()
        with editing(job.network, job.inputs, job.edits):
            return family.finish(job.network.hf, job.inputs, tower, self.hidden, job.positions)


INSIDE = (*SUBLAYERS, "resid_mid")
"""Kinds that are within a block."""


@contextmanager
def keeping(network: Network, kept: dict[str, Any]) -> Iterator[None]:
    """Keep the keys and values of all that is attended to across towers, as the base run computes them."""
    with Hooks() as hooks:
        for tower, table in network.family.towers.items():
            if table.fold is None:
                continue
            kept[tower] = network.family.cache()
            for block in network.blocks(tower):
                hooks.on_call(block.get_submodule(table.fold), _Past(kept[tower]))
        yield


class _Past:
    """Gives a module a cache to keep its keys and values in."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": self.cache}


@contextmanager
def _folding(job: Job, tower: str) -> Iterator[None]:
    """Lay rows that attend to the same image end to end, and take its keys and values from the base run.

    Cross-attention looks at each query position alone, so this changes no result; it saves
    copying the keys and values for every row. The base run's own edits inside cross-attention count
    positions of a row, so with such edits rows stay apart.
    """
    path = job.network.family.towers[tower].fold
    apart = any(change.site.kind == "cross" and change.site.tower == tower for change in job.changes)
    if path is None or apart:
        yield
        return
    rows: list[torch.Size] = []

    def lay(args: Any, kwargs: dict[str, Any]) -> Any:
        (hidden,) = args
        mask = kwargs.get("attention_mask")
        rows.append(hidden.shape)
        keywords = {
            "attention_mask": None if mask is None else mask[:, :, :1],
            "past_key_values": job.memory[tower],
        }
        return (hidden.reshape(1, -1, hidden.shape[-1]),), {**kwargs, **keywords}

    def part(out: Any) -> Any:
        return (out[0].view(rows.pop()), *out[1:])

    with Hooks() as hooks:
        for block in job.network.blocks(tower):
            module = block.get_submodule(path)
            hooks.on_call(module, lay)
            hooks.on_output(module, part)
        yield

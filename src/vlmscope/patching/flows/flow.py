"""How many patched runs are computed at once: what a flow is, and how rows are patched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.models.inputs import Change, Edit, Inputs
from vlmscope.patching.trace import Trace
from vlmscope.runs.access import access
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site


@dataclass(frozen=True, eq=False)
class Row:
    """One patch: its number in the sweep, what it sets, and the stage of its tower it joins at.

    `sites` are of one layer each, in the order in which the model computes them; a window of layers has
    several. Stage L is the entrance of block L; the stage behind the last block is its output, the next
    one the tower's. `shift` says how far behind the positions of the run the source's values stand.
    """

    number: int
    sites: tuple[Site, ...]
    stage: int
    shift: int = 0


@dataclass(frozen=True, eq=False)
class Cell:
    """One write: a row and position of a batch gets the source's value for the position `source` of a
    run, which stands `shift` behind it."""

    row: int
    position: int
    site: Site
    source: int
    shift: int = 0


@dataclass(frozen=True, eq=False)
class Job:
    """What patches are made in: the base run, its own edits, and the activations that are copied into it.

    `memory` is what flows keep of the base run, by tower; `positions` are so many last ones whose logits are
    scored.
    """

    network: Network
    inputs: Inputs
    changes: Sequence[Change]
    base: Trace
    source: Mapping[Point, Tensor]
    memory: Mapping[str, Any]
    positions: int

    @property
    def edits(self) -> list[Edit]:
        """The edits of the base run."""
        return [Edit(*change) for change in self.changes]

    def depth(self, tower: str) -> int:
        return self.network.shapes[tower].layers

    def write(self, x: Tensor, cells: Sequence[Cell], shape: torch.Size | None = None) -> Tensor:
        """Write the source's values into cells of one point's activation, in place.

        `shape` gives the rows and positions where they have been laid end to end.
        """
        if not cells:
            return x
        point = cells[0].site.point
        units = self.network.units(point) or 1
        view = (x if shape is None else x.view(*shape[:2], -1)).unflatten(-1, (units, -1))
        numbers = [
            (c.row, c.position, c.source + c.shift, unit) for c in cells for unit in c.site.units or (0,)
        ]
        row, position, source, unit = torch.tensor(numbers, device=x.device).T
        values = self.source[point][0].unflatten(-1, (units, -1))
        view[row, position, unit] = values[source, unit].to(view)
        return x

    def hook_cells(self, hooks: Hooks, cells: Sequence[Cell], shape: torch.Size | None = None) -> None:
        """Write into cells as blocks compute."""
        by_point = defaultdict(list)
        for cell in cells:
            by_point[cell.site.point].append(cell)
        for point, some in by_point.items():
            change = partial(self.write, cells=some, shape=shape)
            hooks.at(access(self.network, point, self.inputs), change)


class Flow(ABC):
    """Some rows of one tower on their way to their logits.

    Used as a context. `join` and `block` are called stage by stage from that of the first row on, `leave` at
    the end; `cost` says how many positions a row carries.
    """

    def __init__(self, job: Job, tower: str, rows: Sequence[Row]) -> None:
        self.job, self.tower, self.rows = job, tower, rows
        self.stack = ExitStack()

    def __enter__(self) -> Flow:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @classmethod
    @abstractmethod
    def cost(cls, job: Job, tower: str, row: Row) -> int:
        """How many positions of its tower, or of the longest behind it, a row carries."""

    @abstractmethod
    def join(self, stage: int) -> None:
        """Add the rows of this stage: copies of the base run, patched where that can be done here."""

    @abstractmethod
    def block(self, layer: int) -> None:
        """All rows that have joined pass a block, and are patched in it."""

    @abstractmethod
    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        """From behind the last block through all that follows, to the logits."""


def around(tower: str, layer: int) -> tuple[Point, Point]:
    """What a position needs to pass a block alone: its heads' outputs, and the block's input."""
    return Point(tower, layer, "attn", "h"), Point(tower, layer, "resid_pre")


def longest(job: Job, tower: str) -> int:
    """The positions of the longest of a tower and those behind it."""
    towers = list(job.network.family.towers)
    return max(len(job.inputs.layout[name].tokens) for name in towers[towers.index(tower) :])

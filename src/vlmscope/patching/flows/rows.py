"""Rows of whole runs, side by side: a row begins as a copy of the base run and joins behind the layer of its
own site.

Rows that read the same image share its cross-attention keys and values, which are computed once a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.patching.flows.flow import Flow, Job, Row
from vlmscope.patching.trace import edited_output
from vlmscope.runs.forward import editing
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import Network


class Rows(Flow):
    along = 0

    def __enter__(self) -> Flow:
        self.stack.enter_context(_folding(self.job, self.tower))
        return self

    def arguments(self, kwargs: Mapping[str, Any], at: Sequence[int] | None) -> Mapping[str, Any]:
        lacking = ("past_key_values",) if at is None else ("past_key_values", "attention_mask")
        return {name: None if name in lacking else value for name, value in kwargs.items()}

    def edit(self, hooks: Hooks, layer: int, joined: Sequence[tuple[int, Row]]) -> None:
        hooks.enter_context(editing(self.job.network, self.job.inputs, self.job.edits))

    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        job, family, tower = self.job, self.job.network.family, self.tower
        if len(self.hidden):
            hidden = family.leave(job.network.hf, tower, self.hidden)
            self.hidden = edited_output(job.network, hidden, tower, job.changes)
        self.join(job.depth(tower) + 1)
        self.stack.close()
        with editing(job.network, job.inputs, job.edits):
            return family.finish(job.network.hf, job.inputs, tower, self.hidden, job.positions)


@contextmanager
def keeping(network: Network, kept: dict[str, Any]) -> Iterator[None]:
    """Keep the keys and values of all that is attended to across towers, as the base run computes them."""

    def give(cache: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": cache}

    with Hooks() as hooks:
        for tower, table in network.family.towers.items():
            if table.fold is not None:
                kept[tower] = network.family.cache()
                for block in network.blocks(tower):
                    hooks.on_call(block.get_submodule(table.fold), partial(give, kept[tower]))
        yield


@contextmanager
def _folding(job: Job, tower: str) -> Iterator[None]:
    """Lay rows that attend to the same image end to end, and take its keys and values from the base run.

    Cross-attention looks at each query position alone, so this changes no result; it saves
    copying the keys and values for every row. The base run's own edits inside cross-attention count
    positions of a row, so with such edits rows stay apart.
    """
    path = job.network.family.towers[tower].fold
    apart = any(change.site.kind == "cross" and change.site.tower == tower for change in job.changes)
    rows: list[torch.Size] = []

    def lay(args: Any, kwargs: dict[str, Any]) -> Any:
        (hidden,), mask = args, kwargs.get("attention_mask")
        rows.append(hidden.shape)
        mask = None if mask is None else mask[:, :, :1]
        kwargs = {**kwargs, "attention_mask": mask, "past_key_values": job.memory[tower]}
        return (hidden.reshape(1, -1, hidden.shape[-1]),), kwargs

    with Hooks() as hooks:
        for block in [] if path is None or apart else job.network.blocks(tower):
            module = block.get_submodule(path or "")
            hooks.on_call(module, lay)
            hooks.on_output(module, lambda out: (out[0].view(rows.pop()), *out[1:]))
        yield

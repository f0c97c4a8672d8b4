"""One plain forward a patch, where a tower's blocks cannot be called with rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.models.inputs import Edit
from vlmscope.patching.flows.flow import Flow, Job, Row
from vlmscope.runs.forward import forward, read


class Plain(Flow):
    @classmethod
    def cost(cls, job: Job, tower: str, row: Row) -> int:
        return 2**40  # more than there is room for: one at a time

    def join(self, stage: int) -> None:
        """The patch is made as the model computes."""

    def block(self, layer: int) -> None:
        """The model calls its blocks itself."""

    def leave(self) -> Float[Tensor, "rows positions vocabulary"]:
        return torch.stack([self._forward(row) for row in self.rows])

    def _forward(self, row: Row) -> Tensor:
        job, edits = self.job, self.job.edits
        for site in row.sites:
            there = replace(site, positions=tuple(position + row.shift for position in site.positions))
            edits.append(Edit(site, "set", read(job.network, job.source[site.point], there)))
        return forward(job.network, job.inputs, edits, positions=job.positions).logits

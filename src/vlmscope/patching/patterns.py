"""What queries and keys do by way of attention patterns (AtP*, Kramár et al. 2024, arXiv 2403.00745)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmscope.errors import ModelError
from vlmscope.models.inputs import Edit, Inputs
from vlmscope.patching.backward import Array, Index, Runs
from vlmscope.runs.forward import forward
from vlmscope.runs.hooks import Plain, doubled, eager
from vlmscope.runs.network import Network
from vlmscope.sites import Point


class Patterns:
    """What queries and keys do by way of attention patterns: for each the patterns that a patch would make,
    times the gradient of what is paid (AtP*'s equations for queries and keys)."""

    def __init__(self, runs: Runs, index: Index, points: Sequence[Point]) -> None:
        self.index, self.asked = index, set(points)
        self.points = [*dict.fromkeys(point._replace(part="p") for point in points)]
        self._base, self._source = (self._calls(runs.network, *run) for run in (runs.base, runs.source))

    def _calls(self, network: Network, inputs: Inputs, edits: Sequence[Edit]) -> dict[Point, tuple[Any, ...]]:
        """How attention is called in a run, at the points of the patterns."""
        found: dict[Point, tuple[Any, ...]] = {}
        with network.alone(), ExitStack() as stack:
            for tower, kind in dict.fromkeys((point.tower, point.kind) for point in self.points):
                modules = network.attention_modules(tower, kind)
                if eager(modules[0]) is None:
                    raise ModelError(
                        f"{network.name}: the models of {network.family.name} do not show how their {tower} "
                        f"{kind} heads compare queries and keys, so atp-star says nothing of these; take atp"
                    )
                layers = dict(zip(modules, network.shapes[tower].having(kind), strict=True))

                def note(
                    plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, of: Any, **kw: Any
                ) -> Any:
                    found[of[module]] = (plain, module, q, k, mask, kw)
                    return plain(module, q, k, v, mask, **kw)

                at = {module: Point(tower, n, kind, "p") for module, n in layers.items()}
                stack.enter_context(network.attending(tower, partial(note, of=at), kind))
            if self.points:
                forward(network, inputs, edits)
        return found

    @torch.no_grad()
    def take(self, point: Point, gradient: Tensor) -> Iterator[tuple[Point, Array]]:
        """The sums at a point's queries and keys, from the gradient of what is paid there."""
        if point not in self.points:
            return
        plain, module, q, k, mask, kw = self._base[point]
        _, _, new_q, new_k, *_ = self._source[point]
        tiles, heads, queries, _ = q.shape
        wide = gradient[0].unflatten(-1, (heads, tiles, -1)).unflatten(0, (tiles, queries))
        pays = torch.stack([wide[n, :, :, n] for n in range(tiles)]).transpose(1, 2)  # tiles, heads, queries
        old, beside = doubled(plain, module, q, k, new_k, mask, **kw)
        whole = old.sum(-1, keepdim=True)
        paid, pays = old / whole, pays.to(old)
        if (at := point._replace(part="q")) in self.asked:
            again, _ = doubled(plain, module, new_q, k, k, mask, **kw)
            changed = ((again / again.sum(-1, keepdim=True) - paid) * pays).sum(-1)
            yield at, self.index.reduce(at, changed.transpose(1, 2).reshape(1, tiles * queries, heads))
        if (at := point._replace(part="k")) in self.asked:
            share = (beside - old) / (whole + beside - old)
            changed = (share * (pays - (paid * pays).sum(-1, keepdim=True))).sum(-2)  # tiles, heads, keys
            grouped = changed.unflatten(1, (k.shape[1], -1)).sum(2)
            yield at, self.index.reduce(at, grouped.transpose(1, 2).reshape(1, -1, k.shape[1]))

"""Edges of attention that are cut: which, in one call of attention, and what is paid without them.

`block` gives −∞ to the scores before the softmax, so that the weights of an edge are 0 and the others of its
row add up to 1; `zero` takes the weights away behind it. A row that has nothing left pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Edges(NamedTuple):
    """Edges of one call of attention: what all `targets` read of all `sources`, by all heads where none are
    named. `op` is `block` or `zero`. Positions count through all tiles of a call, which see only themselves.
    """

    targets: Sequence[int]
    sources: Sequence[int]
    heads: Sequence[int]
    op: str


Cuts = Callable[[int, int], Sequence[Edges]]
"""From the numbers of queries and keys of a call, over all its tiles, to the edges that are cut in it."""


class Gone(NamedTuple):
    """Which weights some queries of a tile lose, by what is done to them."""

    block: Bool[Tensor, "heads at keys"]
    zero: Bool[Tensor, "heads at keys"]


def gone(
    edges: Sequence[Edges], at: Sequence[int], heads: int, keys: int, first: int, device: torch.device
) -> Gone:
    """What the queries `at` lose; `first` is the number of the first of so many keys."""
    row = {position: n for n, position in enumerate(at)}
    found = Gone(*(torch.zeros(heads, len(at), keys, dtype=torch.bool) for _ in Gone._fields))
    for edge in edges:
        rows = torch.tensor([row[n] for n in edge.targets if n in row], dtype=torch.long)
        some = torch.tensor([n - first for n in edge.sources if 0 <= n - first < keys], dtype=torch.long)
        which = torch.tensor(list(edge.heads or range(heads)))
        getattr(found, edge.op)[which[:, None, None], rows[:, None], some] = True
    return Gone(*(x.to(device) for x in found))


def cut(paid: Float[Tensor, "tiles heads pos keys"], cuts: Cuts) -> Float[Tensor, "tiles heads pos keys"]:
    """All that is paid without the edges that are cut, where a module shows it. Rows that lose nothing stay
    as they are, bit for bit."""
    tiles, heads, queries, keys = paid.shape
    edges, found = cuts(tiles * queries, tiles * keys), []
    for n, own in enumerate(paid):
        at = range(n * queries, (n + 1) * queries)
        lost = gone(edges, at, heads, keys, n * keys, paid.device)
        left = own.masked_fill(lost.block, 0.0)
        total = left.sum(-1, keepdim=True)
        scaled = left / total.where(total > 0, 1.0)
        new = scaled.where((left != own).any(-1, keepdim=True), own)
        found.append(new.masked_fill(lost.zero, 0.0))
    return torch.stack(found)

"""Runs in which a set of parts is the circuit, and everything outside of it is another run's.

The base is the clean run: what is in the circuit computes freely, each part outside of it has its value of
the other run (or zero, or a mean), at all positions. A part is a head, a neuron, or all that a sublayer adds.
What is no part at all (norms, embeddings, an MLP where heads alone are parts) computes freely, too. A head
that has the other run's value before its output projection has it behind that, too, which is linear.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope.models.inputs import Pair
from vlmscope.patching import engine
from vlmscope.patching.reference import Values
from vlmscope.patching.scores import Metric, Score
from vlmscope.patching.trace import Images
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site

Circuit = Collection[int]
"""The parts that are kept, by their numbers."""


def run_circuits(
    network: Network,
    pair: Pair,
    parts: Sequence[Site],
    circuits: Sequence[Circuit],
    *,
    values: Values | None = None,
    metric: str | Metric = "ld",
    images: Images | None = None,
    way: ModuleType = engine,
) -> tuple[Score, Score, Float[Tensor, "circuits 3"]]:
    """The scores of the clean and the corrupt run, and of each circuit P(answer), LD and the metric.

    `parts` are sites of one unit, or of none, each; none is within another. `values` are written outside of
    the circuit instead of the corrupt run's activations, by point. Circuits are patches `A + B + …` of the
    clean run, computed by the engine, or by `patching.reference` as one plain forward each.

    >>> from vlmscope.checkpoint import load
    >>> from vlmscope.data import examples
    >>> from vlmscope.sites import expand, parse
    >>> model = load("toy-llava")
    >>> pair = model.prepare(examples("states", limit=1)[0])
    >>> parts = expand(parse(["decoder.*.attn.h*@all", "decoder.*.mlp@all"]), model.shapes)
    >>> clean, corrupt, found = run_circuits(model, pair, parts, [range(len(parts)), []])
    >>> bool(found[0, 1] == clean.ld), bool((found[1, 1] - corrupt.ld).abs() < 1e-3)  # all parts, none
    (True, True)
    """
    placed = network.placed(parts, pair.clean)
    patches = {number: outside(placed, circuit) for number, circuit in enumerate(circuits)}
    made = {number: site for number, site in patches.items() if site is not None}
    options = {"values": values, "metric": metric, **({"images": images} if way is engine else {})}
    found = way.patch(network, pair, list(made.values()), "noise", **options)
    scores = torch.empty(len(circuits), 3, dtype=torch.float64)
    scores[:] = torch.stack([found.clean.p, found.clean.ld, found.clean.value])  # with nothing outside
    for numbers, some in found.chunks:
        rows = [list(made)[number] for number in numbers]
        scores[rows] = torch.stack([some.p, some.ld, some.value], -1).cpu()
    return found.clean, found.corrupt, scores


def outside(parts: Sequence[Site], circuit: Circuit) -> Site | None:
    """All parts that are not kept, as one patch; None where there are none.

    >>> parts = [Site("decoder", 0, "attn", "h", (n,)) for n in range(3)] + [Site("decoder", 1, "mlp")]
    >>> str(outside(parts, [1]))
    'decoder.0.attn.h[0,2]@all + decoder.1.mlp@all'
    """
    together: dict[Point, list[Site]] = defaultdict(list)
    for number, part in enumerate(parts):
        if number not in circuit:
            together[part.point].append(part)
    sites = [
        replace(some[0], units=tuple(sorted(unit for part in some for unit in part.units)))
        for some in together.values()
    ]
    return replace(sites[0], also=tuple(sites[1:])) if sites else None

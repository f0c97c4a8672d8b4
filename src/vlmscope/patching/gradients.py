"""What patches would do, estimated from gradients: all sites at once, from one backward pass or a few.

- `atp`, attribution patching (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745): a site's score is
  Σ (x_source − x_base) · ∂m/∂x over its positions and units, at the base run, the one that is patched. It is
  what `engine.patch` tends to where the step is small, and no more than that.
- `atp-star` (AtP* of the same paper): queries and keys by what the patterns that they make would change, and
  a mean of |score| over backward passes in which one layer's sublayers are left out (GradDrop, its equation
  11), so that effects that cancel are seen. Never negative.
- `relp` (arXiv 2508.21258): `atp` with the rules of `runs.relevance` in the backward pass.
- `ig`, integrated gradients (Sundararajan et al. 2017; as EAP-IG, arXiv 2403.17806): the gradient's mean
  over `steps` points of the line from the base run's inputs to the source's, at one fraction for all. The
  points are the middles of as many equal pieces: neither end is among them. Inputs are the text's
  embeddings and what the language model reads of the image; for sites before that, in the vision tower or a
  Q-Former, what enters the first block of each tower.

Gradients pass one layer at a time: each is reduced to scores when it is there, and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from vlmscope.errors import SiteError, shown
from vlmscope.models.inputs import Edit, Pair
from vlmscope.patching.backward import Array, Backward, Index, Runs
from vlmscope.patching.patterns import Patterns
from vlmscope.patching.scores import Metric, Score, unpatched
from vlmscope.runs.forward import forward, read
from vlmscope.runs.network import SUBLAYERS, Network
from vlmscope.runs.relevance import relevance
from vlmscope.sites import Point, Site, Sites

Method = Literal["atp", "atp-star", "relp", "ig"]
METHODS = get_args(Method)
STEPS = 5
"""Points of the line of `ig`."""


class Estimated(NamedTuple):
    """The scores of both runs, and what each patch is estimated to change of the metric, a number a site."""

    clean: Score
    corrupt: Score
    scores: Array


def estimate(
    network: Network,
    pair: Pair,
    sites: Sites,
    direction: str = "denoise",
    *,
    method: Method = "atp",
    metric: str | Metric = "ld",
    steps: int = STEPS,
) -> Estimated:
    """How much each patch of `engine.patch` would change the metric of the run that is patched.

    `steps` are the points of the line of `ig`. Raises `VlmscopeError` for a metric without a gradient,
    `SiteError` for a patch of several layers at once.
    """
    ways: dict[str, Callable[[Runs, Index], Found]] = {
        "atp": _at_base,
        "atp-star": _star,
        "relp": _relevant,
        "ig": partial(_along, steps=steps),
    }
    index, runs = Index(network, network.placed(sites, pair.clean)), Runs(network, pair, direction, metric)
    found = ways[method](runs, index)
    _, clean, corrupt, _ = unpatched(*runs.both(*found.logits), pair, metric)
    return Estimated(clean, corrupt, found.scores)


def check_place(site: Site, method: Method) -> None:
    """Raises `SiteError` for what a gradient says nothing about."""
    if site.source:
        raise SiteError(
            f"bad site {shown(site)}: an edge of attention is no activation; knock it out, or take the "
            "method direct"
        )
    if site.window > 1 or site.also:
        raise SiteError(
            f"bad site {shown(site)}: patched together, a later layer undoes what an earlier one does to it, "
            "so their gradients do not add up; name them one by one"
        )
    if method == "relp" and site.part in ("q", "k", "p"):
        raise SiteError(
            f"bad site {shown(site)}: relp holds what is paid attention to as it is, so queries, keys and "
            "patterns get nothing; name heads (h) or values (v), or take atp-star"
        )


class Found(NamedTuple):
    """A number a site, and the logits of the base and the source."""

    scores: Array
    logits: tuple[Tensor, Tensor]


def _at_base(runs: Runs, index: Index) -> Found:
    """From the gradient at the base run."""
    sums, logits = _moved(runs, index)
    return Found(index.scores(sums), logits)


def _moved(runs: Runs, index: Index) -> tuple[dict[Point, Array], tuple[Tensor, Tensor]]:
    there = forward(runs.network, *runs.source, index.points, runs.count)
    run = Backward.at_base(runs, index, index.points, there.logits)
    sums = run.sums(lambda point, gradient: run.moved(point, there.values[point], gradient))
    return sums, (run.logits.detach(), there.logits)


def everywhere(
    network: Network,
    pair: Pair,
    points: Iterable[Point],
    direction: str = "denoise",
    metric: str | Metric = "ld",
) -> dict[Point, Array]:
    """`atp` of every unit at every position of some points, `(positions, units)` each (one unit, where the
    point has none): many millions of sites, without naming them one by one.

    >>> from vlmscope.checkpoint import load
    >>> from vlmscope.data import examples
    >>> model = load("toy-llava")
    >>> pair = model.prepare(examples("states", limit=1)[0])
    >>> found = everywhere(model, pair, [Point("decoder", 3, "mlp", "n")])
    >>> [scores.shape[1] for scores in found.values()] == [model.shapes["decoder"].neurons]
    True
    """
    lengths = {point: len(pair.clean.layout[point.tower].tokens) for point in points}
    sites = [Site(*point, (), str(n), (n,)) for point, many in lengths.items() for n in range(many)]
    index = Index(network, sites)
    sums, _ = _moved(Runs(network, pair, direction, metric), index)
    nothing = {p: np.zeros((many, network.units(p) or 1)) for p, many in lengths.items() if p not in sums}
    return sums | nothing


def _relevant(runs: Runs, index: Index) -> Found:
    """The same under the rules of relevance, which hold in the backward pass alone."""
    with relevance(runs.network, runs.base[0], _towers(runs.network, index.points)):
        return _at_base(runs, index)


def _towers(network: Network, points: Iterable[Point]) -> list[str]:
    """The towers from the first of these points on."""
    towers = list(network.family.towers)
    return towers[min(towers.index(point.tower) for point in points) :]


def _star(runs: Runs, index: Index) -> Found:
    """The mean of |score| over backward passes, each without one layer; of a site those of its own tower and
    the ones behind it count."""
    network = runs.network
    inner = [point for point in index.points if point.part in ("q", "k")]
    layers = [
        (tower, n) for tower in _towers(network, index.points) for n in range(network.shapes[tower].layers)
    ]
    sublayers = {
        (tower, n): [Point(tower, n, kind) for kind in SUBLAYERS if n in network.shapes[tower].having(kind)]
        for tower, n in layers
    }
    patterns = Patterns(runs, index, inner)
    outer = [point for point in index.points if point not in inner]
    there = forward(network, *runs.source, outer, runs.count)
    watched = [*dict.fromkeys([*outer, *patterns.points])]
    run = Backward.at_base(
        runs, index, watched, there.logits, [p for some in sublayers.values() for p in some]
    )

    def take(point: Point, gradient: Tensor) -> dict[Point, Array]:
        found = dict(patterns.take(point, gradient))
        if point in there.values:
            found |= run.moved(point, there.values[point], gradient)
        return found

    towers = list(network.family.towers)
    own = np.array([towers.index(site.tower) for site in index.sites])
    total, count = np.zeros(len(own)), np.zeros(len(own))
    for tower, n in layers:
        counts = own <= towers.index(tower)
        total[counts] += np.abs(index.scores(run.sums(take, again=True, without=sublayers[tower, n])))[counts]
        count[counts] += 1
    if (count == 1).any():  # a single layer: there is no other to leave out
        total = np.where(count == 1, np.abs(index.scores(run.sums(take))), total)
    return Found(total / np.maximum(count - 1, 1), (run.logits.detach(), there.logits))


def _along(runs: Runs, index: Index, *, steps: int) -> Found:
    """From the gradient's mean over points of the line between the inputs of the two runs."""
    network, inputs = runs.network, runs.base[0]
    lines = [network.placed(line, inputs) for line in lines_of(network)]
    points = {*index.points, *(site.point for line in lines for site in line)}
    here, there = (forward(network, *run, points, runs.count) for run in (runs.base, runs.source))
    deltas = {point: there.values[point] - here.values[point] for point in points}
    before = [point for point in index.points if is_before(network, point)]
    behind = [point for point in index.points if point not in before]
    sums: dict[Point, Array] = {}

    def take(point: Point, gradient: Tensor) -> dict[Point, Array]:
        return {point: index.product(point, deltas[point], gradient)}

    for line, own in zip(lines, (behind, before), strict=True):
        for number in range(steps if own else 0):
            share = (number + 0.5) / steps
            new = [read(network, here.values[x.point] + share * deltas[x.point], x) for x in line]
            edits = [Edit(x, "set", v.requires_grad_()) for x, v in zip(line, new, strict=True)]
            run = Backward(runs, index, own, edits)
            run.start(runs.value(run.logits, here.logits, there.logits))
            for point, some in run.sums(take).items():
                sums[point] = some / steps + sums.get(point, 0.0)
    return Found(index.scores(sums), (here.logits, there.logits))


def lines_of(network: Network) -> tuple[list[Site], list[Site]]:
    """The inputs of the language model, and those of every tower."""
    text, image = network.text_towers[0], network.family.image
    words = Site(text, 0, "resid_pre")
    first, *added = network.image_sites
    behind = [words, *added, *([] if image is None else [first])]
    own = replace(words, position="text") if image is None else words
    others = [Site(tower, 0, "resid_pre") for tower in network.family.towers if tower != text]
    return behind, [own, *others]


def is_before(network: Network, point: Point) -> bool:
    """Whether a point comes before what the language model reads of the image."""
    towers = list(network.family.towers)
    is_read = point.kind == "output" and point.tower == network.family.image
    return towers.index(point.tower) < towers.index(network.text_towers[0]) and not is_read

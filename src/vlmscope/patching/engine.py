"""The answers of `reference`, fast: no layer below a patch is computed again.

The clean and the corrupt input are run once each. Then the blocks of Hugging Face's model are
called again with many rows at once, one row a patch (see `flows`). The layers below a patch are not
recomputed. A patch that copies what is already there, or that the read-out position cannot see, needs
no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlmscope.errors import RoomError
from vlmscope.models.inputs import CUTS, Pair
from vlmscope.patching.flows import INSIDE, Flow, Job, Plain, Row, Rows, around, keeping
from vlmscope.patching.reference import Values
from vlmscope.patching.scores import Baselines, Chunks, Metric, Patched, Score, score, unpatched
from vlmscope.patching.sources import origins_of
from vlmscope.patching.suffix import Suffix, remembering
from vlmscope.patching.trace import Images, given, trace
from vlmscope.runs.access import INNER
from vlmscope.runs.forward import read
from vlmscope.runs.network import Network
from vlmscope.sites import KINDS, Point, Site, Sites, points_of

BUDGET = 128 * 2**20
"""Bytes that the intermediate results of one batch of rows may take, if there is room."""

FLOWS: dict[str, type[Flow]] = {"rows": Rows, "suffix": Suffix, "plain": Plain}


def patch(
    network: Network,
    pair: Pair,
    sites: Sites,
    direction: str = "denoise",
    *,
    sources: Sequence[Site] | None = None,
    values: Values | None = None,
    metric: str | Metric = "ld",
    images: Images | None = None,
) -> Patched:
    """Patch every site; the same answers as `reference.patch`, in the order they are ready.

    `images` keeps the vision tower's outputs from one call to the next, for pairs that share an image.
    """
    sites, count = network.placed(sites, pair.clean), len(pair.answers)
    origins = [origins_of(*one) for one in zip(sites, sources or sites, strict=True)]
    images = Images() if images is None else images
    plain = pair.runs[: 1 if pair.clean is pair.corrupt and not pair.edits else 2]
    base_at = 0 if direction == "noise" else len(plain) - 1
    cut = values if isinstance(values, str) else None
    points, memory, traces = _points(network, pair, sites, cut is not None), dict[str, Any](), []
    if cut is None:
        points |= {origin.point for some in origins for origin in some}
    for number, (inputs, edits) in enumerate(plain):
        with ExitStack() as stack:
            if number == base_at:
                remember(network, pair, memory, stack)
            traces.append(trace(network, inputs, edits, points, images, count))
    base = traces[base_at]
    found, clean, corrupt, size = unpatched(traces[0].logits, traces[-1].logits, pair, metric)
    source: Mapping[Point, Tensor] = traces[len(traces) - 1 - base_at].values
    if isinstance(values, Mapping):
        source = values
    elif values is not None and not isinstance(values, str):
        source, origins = given(network, base.values, sites, values)
    inputs, edits = plain[base_at]
    job = Job(network, inputs, network.changes(inputs, edits), base, source, memory, count, cut)
    unchanged = clean if direction == "noise" else corrupt

    def more(sites: Sequence[Site]) -> Chunks:
        return _chunks(job, sites, [site.parts for site in sites], found, metric, unchanged)

    chunks = _chunks(job, sites, origins, found, metric, unchanged)
    return Patched(clean, corrupt, size, chunks, more)


def _points(network: Network, pair: Pair, sites: Sequence[Site], are_edges: bool) -> set[Point]:
    """What the plain runs have to keep: the sites (but edges, which nothing is copied to), what positions
    need to pass a block alone, and the ends of the towers that are patched inside."""
    patched = points_of(sites)
    points = set() if are_edges else set(patched)
    for tower, layer, kind, _ in patched:
        shape = network.shapes[tower]
        if network.flow(tower, pair.clean) == "plain":
            continue
        if kind != "output":
            points.add(Point(tower, shape.layers - 1, "resid"))
        if kind in INSIDE and not are_edges:
            heads, entrance = around(tower, layer)
            points.update([heads, entrance] if layer in shape.having("attn") else [entrance])
        if network.family.towers[tower].deepstack:
            points.update(Point(tower, n, "resid") for n in range(shape.layers))
    return points


def remember(network: Network, pair: Pair, memory: dict[str, Any], stack: ExitStack) -> None:
    """Fill what flows keep of the base run, as it is traced."""
    stack.enter_context(network.alone())
    stack.enter_context(keeping(network, memory))
    for tower in network.family.towers:
        if tower in pair.clean.layout and network.flow(tower, pair.clean) == "suffix":
            memory[tower] = stack.enter_context(remembering(network, tower))


# -- which patches need a row --------------------------------------------------------------------


def plan(
    job: Job, sites: Sequence[Site], origins: Sequence[Sequence[Site]]
) -> tuple[list[tuple[int, str, Row]], list[int]]:
    """The rows, each with the number of its tower and its flow, in the order in which they are taken, and the
    numbers of the patches that need none."""
    changed = cache(lambda point: _changed(job, point).cpu().numpy())
    towers = list(job.network.family.towers)

    def changes(part: Site, origin: Site) -> bool:
        here, there = job.base.values[part.point], job.source[origin.point]
        if part != origin or here.shape != there.shape:
            new = read(job.network, there, origin).to(here)
            return not torch.equal(read(job.network, here, part), new)
        differ = changed(part.point)[list(part.positions)]
        return bool((differ[:, list(part.units)] if part.units else differ).any())

    rows: list[tuple[int, str, Row]] = []
    idle = []
    for number, (site, some) in enumerate(zip(sites, origins, strict=True)):
        # What comes before the first change writes what is there already; after it, a value
        # that both runs share still undoes what the change has done to it.
        parts = sorted(
            zip(site.parts, some, strict=True),
            key=lambda one: (towers.index(one[0].tower), one[0].layer, KINDS.index(one[0].kind)),
        )
        if job.cut:
            seeing = (_seeing(job, part) for part, _ in parts)
            parts, first = [(part, part) for part in seeing if part.positions], 0
        reaching = [one for one in parts if _reaches(job, one[0])]
        if not job.cut:
            first = next((n for n, one in enumerate(reaching) if changes(*one)), len(reaching))
        if reaching[first:]:
            live, there = zip(*reaching[first:], strict=True)
            row = Row(number, live, there, _stage(job, live))
            rows.append((towers.index(live[0].tower), _flow(job, live), row))
        else:
            idle.append(number)
    return sorted(rows, key=lambda entry: (*entry[:2], entry[2].stage)), idle


def _flow(job: Job, live: Sequence[Site]) -> str:
    """How a row is computed: what is between blocks, within attention, or in several towers, where the first
    has no rows of whole runs, is in no block's rows."""
    towers, kinds = {site.tower for site in live}, {site.kind for site in live}
    flow = job.network.flow(live[0].tower, job.inputs)
    mixed = len(towers) > 1 and (flow != "rows" or job.cut is not None)
    mixed = mixed or (len(kinds) > 1 and "output" in kinds)
    # Functions and edges of the base run are of all positions, and not of a row's alone.
    mixed = mixed or any(callable(change.op) or change.op in CUTS for change in job.changes)
    if mixed or "deepstack" in kinds or any(site.part in INNER for site in live):
        return "plain"
    return flow


def _stage(job: Job, live: Sequence[Site]) -> int:
    """Where a row joins: behind its first block, unless that has to be redone as a whole."""
    site = live[0]
    if site.kind == "output":
        return job.depth(site.tower) + 1
    within = (*INSIDE, "resid")
    own = any(c.site.tower == site.tower and c.site.kind in within for c in job.changes)
    together = len(live) > 1 and (live[1].tower, live[1].layer) == (site.tower, site.layer)
    if site.source or site.kind == "resid_pre" or (site.kind in INSIDE and (own or together)):
        return site.layer
    return site.layer + 1


def _changed(job: Job, point: Point) -> Bool[Tensor, "pos *units"]:
    """Where the source differs from the base run at a point."""
    base, source = job.base.values[point][0], job.source[point][0]
    differ = source != base
    units = job.network.units(point)
    return (differ if units is None else differ.unflatten(-1, (units, -1))).any(-1)


def _seeing(job: Job, site: Site) -> Site:
    """An edge at those of its positions that see any of its sources, as far as the base run's masks say."""
    memory = job.memory.get(site.tower)
    if memory is None or site.kind != "attn" or job.network.flow(site.tower, job.inputs) != "suffix":
        return site
    path = job.network.family.towers[site.tower].attention[site.kind]
    seen = memory.kept[job.network.blocks(site.tower)[site.layer].get_submodule(path)].open.cpu()
    sees = seen[list(site.positions)][:, list(site.sources)].any(-1).tolist()
    return replace(site, positions=tuple(n for n, one in zip(site.positions, sees, strict=True) if one))


def _reaches(job: Job, site: Site) -> bool:
    """Whether the positions that are scored can see the patch: in the last block only their own."""
    last = site.tower == job.network.speaker and site.layer == job.depth(site.tower) - 1
    if not last or site.kind == "resid_pre" or site.part in ("k", "v"):
        return True
    scored = len(job.inputs.layout[site.tower].tokens) - job.positions
    return any(position >= scored for position in site.positions)


# -- batches of rows -----------------------------------------------------------------------------


def _chunks(
    job: Job,
    sites: Sequence[Site],
    origins: Sequence[Sequence[Site]],
    base: Baselines,
    metric: str | Metric,
    unchanged: Score,
) -> Chunks:
    """The scores of all patches, a batch of rows at a time."""
    planned, idle = plan(job, sites, origins)
    if idle:
        yield idle, Score(*(x.expand(len(idle), *x.shape).clone() for x in unchanged))
    for (number, name), group in groupby(planned, key=lambda entry: entry[:2]):
        flow, tower = FLOWS[name], list(job.network.family.towers)[number]
        for numbers, logits in batches(flow, job, tower, [row for *_, row in group]):
            yield numbers, score(logits, base, metric)


def batches(
    flow: type[Flow], job: Job, tower: str, rows: Sequence[Row]
) -> Iterator[tuple[list[int], Float[Tensor, "rows positions vocabulary"]]]:
    """The numbers and logits of rows that are in the order of their stages, as many at a time as there is
    room for."""
    room, costs = _room(job, tower), [flow.cost(job, tower, row) for row in rows]
    while rows:
        count = _fit(costs, room)
        try:
            logits = run(flow, job, tower, rows[:count])
        except RoomError:
            if count == 1:
                raise
            room //= 2
            continue
        yield [row.number for row in rows[:count]], logits
        rows, costs = rows[count:], costs[count:]


@torch.inference_mode()
def run(flow: type[Flow], job: Job, tower: str, rows: Sequence[Row]) -> Tensor:
    """Take rows of one tower, in the order of their stages, to their logits."""
    depth = job.depth(tower)
    with job.network.alone(), flow(job, tower, rows) as state:
        for stage in range(rows[0].stage, depth + 1):
            state.join(stage)
            if stage < depth:
                state.block(stage)
        return state.leave()


def _room(job: Job, tower: str) -> int:
    """How many positions, over all rows, fit the budget with what is computed from here on."""
    network, layout = job.network, job.inputs.layout
    towers, floats = list(network.family.towers), 0
    for name in towers[towers.index(tower) :]:
        shape = network.shapes[name]
        read = len(layout[towers[0]].tokens) if "cross" in shape.kinds else 0
        attention = 3 * max(shape.heads.values()) * max(len(layout[name].tokens), read)
        floats = max(floats, 2 * shape.neurons + 6 * shape.width + attention)
    return max(1, min(BUDGET, network.free_memory() // 4) // (floats * network.dtype.itemsize))


def _fit(costs: Sequence[int], room: int) -> int:
    """How many of the next rows to take: batches of about equal size, at least one row each."""
    batches = max(1, -(-sum(costs) // room))
    share, count, total = sum(costs) / batches, 0, 0
    while count < len(costs) and (not count or total + costs[count] <= share * 1.001):
        total += costs[count]
        count += 1
    return count

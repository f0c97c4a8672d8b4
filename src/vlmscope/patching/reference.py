"""One site, one plain forward: the slow and obvious answer.

What `engine` gives is defined by this module, and the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from vlmscope.models.inputs import Cut, Edit, Pair
from vlmscope.patching.scores import Metric, Patched, Score, score, unpatched
from vlmscope.patching.sources import origins_of
from vlmscope.runs.forward import forward, read
from vlmscope.runs.network import Network
from vlmscope.sites import Point, Site, Sites, points_of

Values = Mapping[Point, Tensor] | Sequence[Tensor] | Cut
"""What is written instead of another run's activations: a whole activation by point, or a value for each site
(which broadcasts to its positions and width; a site may come several times, with another value each time); or
what is done to the sites where they are edges."""


def patch(
    network: Network,
    pair: Pair,
    sites: Sites,
    direction: str = "denoise",
    *,
    sources: Sequence[Site] | None = None,
    values: Values | None = None,
    metric: str | Metric = "ld",
) -> Patched:
    """Patch every site, one at a time.

    `denoise` copies clean activations into the corrupt run (what is sufficient?), `noise` corrupt
    ones into the clean run (what is necessary?); `values` are written into that run instead, or edges cut
    in it. `sources` are the places, one for each site, that values come from, where these are others than
    they go to.
    """
    sites = network.placed(sites, pair.clean)
    runs, count = pair.runs, len(pair.answers)
    sources = sources or sites
    points = points_of(sources) if values is None else ()
    plain = [forward(network, inputs, edits, points, count) for inputs, edits in runs]
    base, clean, corrupt, size = unpatched(plain[0].logits, plain[1].logits, pair, metric)
    source, (inputs, edits) = (plain[0], runs[1]) if direction == "denoise" else (plain[1], runs[0])
    new = source.values if values is None else values

    def written(number: int) -> list[Edit]:
        if isinstance(new, str):
            return [Edit(sites[number], new)]
        if not isinstance(new, Mapping):
            return [Edit(sites[number], "set", new[number])]
        each = zip(sites[number].parts, origins_of(sites[number], sources[number]), strict=True)
        return [Edit(part, "set", read(network, new[origin.point], origin)) for part, origin in each]

    def chunks() -> Iterator[tuple[list[int], Score]]:
        for number in range(len(sites)):
            patched = forward(network, inputs, [*edits, *written(number)], positions=count)
            yield [number], score(patched.logits[None], base, metric)

    return Patched(clean, corrupt, size, chunks())

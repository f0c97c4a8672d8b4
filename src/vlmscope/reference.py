"""The oracle: one site, one plain forward with one edit. Slow and obvious.

What `engine` gives is defined by this module, and the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmscope.inputs import Edit, Pair
from vlmscope.metrics import Patched, Score, largest, score
from vlmscope.model import Model
from vlmscope.sites import Site, members


def patch(
    model: Model, pair: Pair, sites: Sequence[tuple[Site, tuple[int, ...]]], direction: str = "denoise"
) -> Patched:
    """Patch every site, one at a time.

    `denoise` copies clean activations into the corrupt run (what is sufficient?), `noise` corrupt
    ones into the clean run (what is necessary?).
    """
    runs = [(pair.clean, ()), (pair.corrupt, pair.edits)]
    logits = [model.run(inputs, edits) for inputs, edits in runs]
    scores = [score(one, pair.answer, pair.foil) for one in logits]
    (source, source_edits), (base, base_edits) = runs if direction == "denoise" else runs[::-1]

    parts = [members(site, model.shapes) for site, _ in sites]
    _, found = model.record(source, {one.point for some in parts for one in some}, source_edits)

    def chunks() -> Iterator[tuple[list[int], Score]]:
        for number, (_, at) in enumerate(sites):
            edits = [Edit(one, "set", model.read(found[one.point], one, at)) for one in parts[number]]
            patched = model.run(base, [*base_edits, *edits])
            yield [number], score(patched[None], pair.answer, pair.foil)

    return Patched(scores[0], scores[1], largest(*logits), chunks())

"""The oracle: one site, one plain forward with one edit. Slow and obvious.

What `engine` gives is defined by this module, and the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmscope.inputs import Edit, Pair
from vlmscope.metrics import Patched, Score, score
from vlmscope.model import Model
from vlmscope.sites import Site


def patch(
    model: Model,
    pair: Pair,
    sites: Sequence[tuple[Site, tuple[int, ...]]],
    direction: str = "denoise",
) -> Patched:
    """Patch every site, one at a time.

    `denoise` copies clean activations into the corrupt run (what is sufficient?), `noise` corrupt
    ones into the clean run (what is necessary?).
    """
    runs = [(pair.clean, ()), (pair.corrupt, pair.edits)]
    logits = [score(model.run(inputs, edits), pair.answer, pair.foil) for inputs, edits in runs]
    (source, source_edits), (base, base_edits) = runs if direction == "denoise" else runs[::-1]

    _, found = model.record(source, {site.point for site, _ in sites}, source_edits)

    def chunks() -> Iterator[tuple[list[int], Score]]:
        for number, (site, at) in enumerate(sites):
            edit = Edit(site, "set", model.read(found[site.point], site, at))
            patched = model.run(base, [*base_edits, edit])
            yield [number], score(patched[None], pair.answer, pair.foil)

    return Patched(logits[0], logits[1], chunks())

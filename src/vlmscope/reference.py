"""The oracle: one site, one plain forward with one edit. Slow and obvious.

What `engine` gives is defined by this module, and the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmscope.inputs import Edit, Pair
from vlmscope.metrics import Patched, Score, largest, score
from vlmscope.model import Model
from vlmscope.sites import Site


def patch(model: Model, pair: Pair, sites: Sequence[Site], direction: str = "denoise") -> Patched:
    """Patch every site, one at a time.

    `denoise` copies clean activations into the corrupt run (what is sufficient?), `noise` corrupt
    ones into the clean run (what is necessary?).
    """
    runs = [(pair.clean, ()), (pair.corrupt, pair.edits)]
    logits = [model.run(inputs, edits) for inputs, edits in runs]
    scores = [score(one, pair.answer, pair.foil) for one in logits]
    (source, source_edits), (base, base_edits) = runs if direction == "denoise" else runs[::-1]

    points = {part.point for site in sites for part in site.parts}
    _, found = model.record(source, points, source_edits)

    def chunks() -> Iterator[tuple[list[int], Score]]:
        for number, site in enumerate(sites):
            edits = [Edit(part, "set", model.read(found[part.point], part)) for part in site.parts]
            patched = model.run(base, [*base_edits, *edits])
            yield [number], score(patched[None], pair.answer, pair.foil)

    return Patched(scores[0], scores[1], largest(*logits), chunks())

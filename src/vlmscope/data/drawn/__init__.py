"""The sets that the package draws from a seed: `states`, `scenes`, `faces` and `binding`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib import import_module

from vlmscope.data.drawn.drawing import Contrast
from vlmscope.data.example import Example, find_roles
from vlmscope.data.questions import ORDERS, in_order


def draw(name: str, n: int, *, seed: int = 0) -> Iterator[Example]:
    """The first `n` examples of the set `name` that `seed` draws.

    Example i depends on the seed and on i alone. The kinds of questions take turns, and so do the orders of
    the options. The toy models were trained on pictures from seeds of a million and more; smaller seeds are
    held out.

    >>> first = next(draw("states", 1))
    >>> first.id, first.clean_prompt, first.answer, first.foil
    ('states-0-0000', 'is this cross yellow or green?', 'yellow', 'green')
    >>> [sorted(next(draw(name, 1)).roles) for name in ("scenes", "faces")]
    [['answer', 'foil', 'noun', 'object', 'relation', 'subject'], ['answer', 'foil', 'noun']]
    """
    module = import_module(f"vlmscope.data.drawn.{name}")
    for i in range(n):
        kind = module.KINDS[i % len(module.KINDS)]
        order = ORDERS[i // len(module.KINDS) % 2]
        one: Contrast = module.contrast(random.Random(f"{name}/{seed}/{i}"), kind)
        options = in_order(order, one.answer, one.foil)
        prompt = one.ask(*options)
        yield Example(
            id=f"{name}-{seed}-{i:04d}",
            clean_image=one.clean.draw(),
            clean_prompt=prompt,
            answer=one.answer,
            foil=one.foil,
            corrupt_image=one.corrupt.draw(),
            corrupt_prompt=one.ask_corrupt(*options) if one.ask_corrupt else one.ask(*one.others),
            roles=find_roles(prompt, one.words),
            groups={"kind": kind, "order": order},
            masks=one.clean.masks(),
            shows=one.clean.shows(),
        )

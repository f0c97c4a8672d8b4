"""The sets that the package draws from a seed: `states`, `scenes`, `faces` and `binding`."""

from __future__ import annotations

import random
from importlib import import_module
from typing import Any

from vlmscope.data.drawn.drawing import Contrast
from vlmscope.data.example import Example, find_roles
from vlmscope.data.lazy import Lazy
from vlmscope.data.questions import ORDERS, in_order

WINDOW = 256
"""Examples that are held with their pictures, some 0.15 MB each."""


class Drawn(Lazy):
    """The first `n` examples of the set `name` that `seed` draws, each when it is asked for.

    Example i depends on the seed and on i alone. The kinds of questions take turns, and so do the orders of
    the options. The toy models were trained on pictures from seeds of a million and more; smaller seeds are
    held out.

    >>> [first] = Drawn("states", 1)
    >>> first.id, first.clean_prompt, first.answer, first.foil
    ('states-0-0000', 'is this cross yellow or green?', 'yellow', 'green')
    >>> [sorted(Drawn(name, 1).roles) for name in ("scenes", "faces")]
    [['answer', 'foil', 'noun', 'object', 'relation', 'subject'], ['answer', 'foil', 'noun']]
    """

    def __init__(self, name: str, n: int, seed: int = 0) -> None:
        super().__init__(f"{name}/{seed}/{n}".encode(), WINDOW)
        self.name, self.seed = name, seed
        self.module: Any = import_module(f"vlmscope.data.drawn.{name}")
        self.ids = [f"{name}-{seed}-{number:04d}" for number in range(n)]
        turn = self[: len(self.module.KINDS) * len(ORDERS)]  # the others have their roles
        self.roles = {role: None for example in turn for role in example.roles}

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[type[Drawn], tuple[str, int, int]]:
        return Drawn, (self.name, len(self), self.seed)

    def make(self, number: int) -> Example:
        kinds = self.module.KINDS
        kind, order = kinds[number % len(kinds)], ORDERS[number // len(kinds) % 2]
        one: Contrast = self.module.contrast(random.Random(f"{self.name}/{self.seed}/{number}"), kind)
        options = in_order(order, one.answer, one.foil)
        prompt = one.ask(*options)
        return Example(
            id=self.ids[number],
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

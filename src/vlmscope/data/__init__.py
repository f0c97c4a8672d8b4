"""Data sets: one file each. `drawn` holds those that the package draws by itself."""

from __future__ import annotations

import itertools
from importlib import import_module
from pathlib import Path

from vlmscope.errors import DataError
from vlmscope.example import Example, read_csv

BUILT_IN = ("states", "scenes", "faces")
"""The sets that the package draws from a seed, mirroring the three of the NOTICE paper."""

SIZE = 200
"""How many examples of a built-in set are drawn where no limit is given."""


def examples(name: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Example]:
    """The examples of a built-in set (by its name) or of a CSV file (by its path).

    `limit` takes the first so many; `seed` is that of a built-in set's drawing. Raises `DataError`
    if there is no such set or the file cannot be read.

    >>> [e.answer in e.clean_prompt for e in examples("states", limit=2)]
    [True, True]
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no examples; expected 1 or more")
    if str(name) in BUILT_IN:
        module = import_module(f"vlmscope.data.drawn.{name}")
        return list(module.load(limit or SIZE, seed=seed))
    if not Path(name).exists() and "." not in Path(name).name:
        raise DataError(
            f"no data set '{name}': not a built-in set ({', '.join(BUILT_IN)}) and not a CSV file"
        )
    return list(itertools.islice(read_csv(name), limit))

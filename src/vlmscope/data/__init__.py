"""What is run: examples that the package draws (`drawn`), from CSV files, or from published sets."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from vlmscope.data.drawn import draw
from vlmscope.data.example import Example
from vlmscope.data.table import read_csv
from vlmscope.errors import SEED, DataError, nearest, shown, whole

Examples: TypeAlias = Iterable[Example] | Example | str | Path
"""What is run: examples, a single one, or the name of a built-in set or a CSV file."""

BUILT_IN = ("states", "scenes", "faces", "binding")
"""The sets that the package draws from a seed: the first three mirror those of the NOTICE paper."""

TOY_SETS = BUILT_IN[:3]
"""Those that `toy-llava` was trained on; `toy-blip` was on all."""

SIZE = 200
"""How many examples of a built-in set are drawn where no limit is given."""


def examples(name: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Example]:
    """The examples of a built-in set (by its name) or of a CSV file (by its path).

    `limit` takes the first so many; `seed` is that of a built-in set's drawing. Raises `DataError` if there
    is no such set or the file cannot be read, `VlmscopeError` for a limit or a seed that is none.

    >>> [e.answer in e.clean_prompt for e in examples("states", limit=2)]
    [True, True]
    """
    if not isinstance(name, str | Path):
        raise DataError(f"no data set {shown(name)}; expected the name of one, or the path of a CSV file")
    limit = None if limit is None else whole(limit, "the limit", 1)
    seed = whole(seed, "the seed", most=SEED)
    if str(name) in BUILT_IN:
        return list(draw(str(name), limit or SIZE, seed=seed))
    if not os.path.exists(name) and "." not in Path(name).name:  # noqa: PTH110 - no error for any name
        raise DataError(
            f"no data set {shown(name)}: not a built-in set ({', '.join(BUILT_IN)}) and not a CSV file; name "
            f"one of these{nearest(name, BUILT_IN)}"
        )
    return list(itertools.islice(read_csv(name), limit))


def listed(given: Examples) -> list[Example]:
    """The examples that are meant, as a list; a name is read as `examples` reads it.

    Raises `DataError` for anything else.

    >>> len(listed(examples("states", limit=2)[0]))
    1
    """
    if isinstance(given, (str, Path)):
        return examples(given)
    if isinstance(given, Example):
        return [given]
    found = list(given) if isinstance(given, Iterable) else [given]
    for number, one in enumerate(found):
        if not isinstance(one, Example):
            raise DataError(
                f"example {number} is a {type(one).__name__} ({one!r:.40}); expected an Example, as read_csv "
                "makes them, or the name of a CSV file alone"
            )
    return found

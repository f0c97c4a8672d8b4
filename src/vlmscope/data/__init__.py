"""What is run: examples that the package draws (`drawn`), from CSV files, or from published sets."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vlmscope.data import hub
from vlmscope.data.drawn import Drawn
from vlmscope.data.example import Example
from vlmscope.data.lazy import Lazy
from vlmscope.data.table import read_csv
from vlmscope.errors import SEED, DataError, nearest, shown, whole

Examples: TypeAlias = Iterable[Example] | Example | str | Path
"""What is run: examples, a single one, or the name of a built-in set, a CSV file or a set of `datasets`."""

BUILT_IN = ("states", "scenes", "faces", "binding")
"""The sets that the package draws from a seed: the first three mirror those of the NOTICE paper."""

SIZE = 200
"""How many examples of a built-in set are drawn where no limit is given."""


def is_file(name: str) -> bool:
    """Whether the name of a data set is the path of a CSV file.

    >>> is_file("states"), is_file("hf://owner/name:train"), is_file("mine.csv")
    (False, False, True)
    """
    return name not in BUILT_IN and not name.startswith(hub.HUB)


def examples(
    name: Any, *, limit: int | None = None, seed: int = 0, columns: str | Mapping[str, str] | None = None
) -> Sequence[Example]:
    """The examples of a built-in set (by its name), of a CSV file (by its path), or of a set of `datasets`.

    The last is an object of that library, or `hf://` with its name on the hub, or a folder (`data.hub.read`);
    `columns` then maps names of columns. Examples of the former and the last are made as they are asked for,
    and few are held. `limit` takes the first so many; `seed` is that of a built-in set's drawing. Raises
    `DataError` if there is no such set or it cannot be read, `VlmscopeError` for a limit or a seed that is
    none.

    >>> states = examples("states", limit=3)
    >>> states, [e.answer in e.clean_prompt for e in states]
    (<3 examples, states-0-0000 to states-0-0002>, [True, True, True])
    >>> len(states + examples("faces", limit=2))
    5
    """
    is_set = hub.is_set(name)
    if not isinstance(name, str | Path) and not is_set:
        raise DataError(f"no data set {shown(name)}; expected the name of one, or the path of a CSV file")
    limit = None if limit is None else whole(limit, "the limit", 1)
    seed = whole(seed, "the seed", most=SEED)
    if is_set or str(name).startswith(hub.HUB):
        return hub.read(name, columns, limit)
    if columns is not None:
        raise DataError(f"{name}: its columns have the names that they need; --columns is of {hub.HUB} sets")
    if str(name) in BUILT_IN:
        return Drawn(str(name), limit or SIZE, seed)
    if not os.path.exists(name) and "." not in Path(name).name:  # noqa: PTH110 - no error for any name
        raise DataError(
            f"no data set {shown(name)}: not a built-in set ({', '.join(BUILT_IN)}), not a CSV file, and not "
            f"of the hub ({hub.HUB}NAME); name one of these{nearest(name, BUILT_IN)}"
        )
    return list(itertools.islice(read_csv(name), limit))


def listed(given: Examples) -> Sequence[Example]:
    """The examples that are meant, by their numbers; a name is read as `examples` reads it.

    Raises `DataError` for anything else.

    >>> len(listed(examples("states", limit=2)[0]))
    1
    """
    if isinstance(given, (str, Path)) or hub.is_set(given):
        return examples(given)
    if isinstance(given, Lazy):
        return given
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

"""The error tree.

Every error that a person can cause derives from `VlmscopeError`. Its text is one line that can be printed
anywhere (`line`) and says what was wrong, where, what was expected and the way out. The command line prints
that line and exits with status 1 (2 for a command line that is none); any other exception means a bug.

    VlmscopeError
    ├── SiteError      a site expression that cannot be parsed, or names nothing in this model
    ├── ModelError     a model that cannot be loaded, or does not fit its family's table
    │   └── RoomError      a run that needs more memory than there is
    ├── DataError      a data set or table that cannot be read
    │   └── ExampleError   one example that cannot be run (the others can)
    └── StoreError     a result folder that cannot be read, written or continued
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable
from numbers import Integral, Real

LONGEST = 390
"""Characters in the text of an error, so that a whole line of the command line has at most 400."""
INTERRUPTED = "interrupted; run the same command again to go on"
"""What the command line says when it is stopped with Ctrl-C."""
MOST = 1_000_000
"""What is counted has at most so many: more than this would not end."""
SEED = 2**32 - 1
"""The largest seed."""
LARGEST = 1e30
"""The largest number that is given: float32 holds it, and sums of it."""
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
"""Unicode's categories of what steers a terminal, turns text around, is no character or cannot be encoded."""


class VlmscopeError(Exception):
    """Base of all errors that vlmscope raises on purpose."""

    def __str__(self) -> str:
        return line(super().__str__())


class SiteError(VlmscopeError):
    """A site expression that cannot be parsed, or that names nothing in this model."""


class ModelError(VlmscopeError):
    """A model that cannot be loaded, or that does not fit its family's table."""


class RoomError(ModelError):
    """A run that needs more memory than there is."""


class DataError(VlmscopeError):
    """A data set or table that cannot be read."""


class ExampleError(DataError):
    """One example that cannot be run; a study records it as excluded and goes on."""


class StoreError(VlmscopeError):
    """A result folder that cannot be read, written or continued."""


def plain(text: str) -> str:
    """Text that steers no terminal: all that is not seen is written as an escape, but for line ends and tabs.

    >>> plain("red\\x1b[2J")
    'red\\\\x1b[2J'
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in _UNSEEN else _escaped(c) for c in text)


def line(text: str, longest: int = LONGEST) -> str:
    """Text as one line of printable characters; of a longer one the beginning and the end.

    >>> line("no such\\n  file: " + "x" * 1000 + "; name another", 40)
    'no such file: xxxxxxx … xx; name another'
    """
    words = plain(" ".join(text.split()))
    if len(words) <= longest:
        return words
    behind = longest * 2 // 5
    return f"{words[: longest - behind - 3]} … {words[-behind:]}"


def shown(value: object, longest: int = 60) -> str:
    """What a user gave, in quotes, as an error names it: one line, of a long one the beginning and the end.

    >>> print(shown("a" * 100, 20), shown("it's"))
    'aaaaaaaaa … aaaaaaaa' "it's"
    """
    try:
        text = line(str(value), longest)
    except Exception:  # whole numbers of thousands of digits, and whatever else Python cannot write
        return f"a value of type {type(value).__name__}"
    return f'"{text}"' if "'" in text else f"'{text}'"


def nearest(given: object, known: Iterable[str]) -> str:
    """A question for an error, where one of the known names is much like what was given.

    >>> nearest("toy-blp", ["toy-blip", "toy-llava"]), nearest("x", ["toy-blip"])
    ("; did you mean 'toy-blip'?", '')
    """
    names = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(str(given)[:100].casefold(), names, n=1)
    return f"; did you mean '{names[near[0]]}'?" if near else ""


def written(text: str) -> int | float | str:
    """The number that a text is, in ASCII digits; another text as it is.

    >>> written("12"), written("1e-3"), written("1_0")
    (12, 0.001, '1_0')
    """
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        return float(text)
    return text


def choice(value: object, what: str, names: Collection[str]) -> None:
    """Raises `VlmscopeError`, which names `what`, for a value that is none of these."""
    if value not in tuple(names):
        known = " or ".join(names) if len(names) == 2 else ", ".join(names)
        raise VlmscopeError(f"unknown {what} {shown(value)}; expected {known}")


def whole(value: object, what: str, least: int = 0, most: int = MOST) -> int:
    """A whole number from `least` to `most`; raises `VlmscopeError`, which names `what`, for all else."""
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    raise VlmscopeError(f"{what} is {shown(value)}; expected a whole number from {least:,} to {most:,}")


def number(value: object, what: str, least: float = -LARGEST, most: float = LARGEST) -> float:
    """A number from `least` to `most`; raises `VlmscopeError`, which names `what`, for anything else.

    >>> number(float("nan"), "the scale")
    Traceback (most recent call last):
    ...
    vlmscope.errors.VlmscopeError: the scale is 'nan'; expected a number from -1e+30 to 1e+30
    """
    if isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most:  # type: ignore[operator]
        return float(value)
    raise VlmscopeError(f"{what} is {shown(value)}; expected a number from {least:g} to {most:g}")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")

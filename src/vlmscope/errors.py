"""The error tree.

Every error that a person can cause derives from `VlmscopeError`. Its text is one line that can be printed
anywhere (`line`) and says what was wrong, where, what was expected and the way out. The command line prints
that line and exits with status 1; any other exception means a bug.

    VlmscopeError
    ├── SiteError      a site expression that cannot be parsed, or names nothing in this model
    ├── ModelError     a model that cannot be loaded, or does not fit its family's table
    │   └── RoomError      a run that needs more memory than there is
    ├── DataError      a data set or table that cannot be read
    │   └── ExampleError   one example that cannot be run (the others can)
    └── StoreError     a result folder that cannot be read, written or continued
"""

from __future__ import annotations

import unicodedata

LONGEST = 390
"""Characters in the text of an error, so that a whole line of the command line has at most 400."""
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what steers a terminal, turns text around, or cannot be encoded."""


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
    text = line(str(value), longest)
    return f'"{text}"' if "'" in text else f"'{text}'"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")

"""Lists of words, in text files beside the code that reads them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeAlias

WordLists: TypeAlias = dict[str, dict[str, frozenset[str]]]


def read_words(file: Path) -> WordLists:
    """The sections of a TOML file whose values are words with blanks between them."""
    sections = tomllib.loads(file.read_text("utf-8"))
    return {
        section: {name: frozenset(words.split()) for name, words in lists.items()}
        for section, lists in sections.items()
    }

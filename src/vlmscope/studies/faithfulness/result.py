"""What is said of circuits, as a value and as a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope import files, stored
from vlmscope.errors import StoreError
from vlmscope.stored import formats
from vlmscope.studies.faithfulness.words import lines

IMPORTANCES = "importances.json"


@dataclass(frozen=True)
class Faithful:
    """How much circuits carry.

    `table` has a row a ranking and size (columns `summary.COLUMNS`), `circuit` a row for each part of the
    circuit that is reported, `summary` what is said of it, `cpr` and `cmd`; `importances` are all scores in
    MIB's format, where that has names for all parts.
    """

    table: pd.DataFrame
    circuit: pd.DataFrame
    summary: dict[str, Any] = field(repr=False)
    importances: str | None = field(default=None, repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `faithfulness.parquet`, `circuit.csv`, `importances.json` and, last, `summary.json`."""
        content: dict[str, Any] = {"faithfulness.parquet": self.table, "circuit.csv": self.circuit}
        content |= {IMPORTANCES: self.importances} if self.importances else {}
        formats.FAITHFULNESS.save(folder, self.summary, content)

    @staticmethod
    def claim(folder: str | os.PathLike[str]) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        formats.FAITHFULNESS.claim(folder, IMPORTANCES)

    def lines(self) -> list[str]:
        """What was found, in words; the last line is of the circuit."""
        return [*lines(self.summary)]


def read(folder: str | os.PathLike[str]) -> Faithful:
    """What `Faithful.save` has written; raises `StoreError` where that is not all there."""
    path = Path(folder)
    about, tables = stored.read(path, formats.FAITHFULNESS)
    file = path / IMPORTANCES
    text = files.read(file, "a file of importances", StoreError, within=path) if file.exists() else None
    return Faithful(tables["faithfulness"], tables["circuit"], about, None if text is None else text.decode())

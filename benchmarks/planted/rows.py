"""What was measured of each model, kept as it comes; and means of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scores import summary


class Rows:
    """What was measured of each model, line by line in a file, so that a run goes on where it was stopped.

    None where it is too late to begin.
    """

    def __init__(self, file: Path | None, until: float) -> None:
        self.file, self.until = file, until
        self.known: dict[str, Any] = {}
        self.seconds = 0.0
        """What was spent on the rows that were there."""
        if file and file.exists():
            # The last line of a run that was killed may be half a line.
            lines = [line for line in file.read_text().splitlines() if line.endswith("]")]
            for key, row, seconds in map(json.loads, lines):
                self.known[key] = row
                self.seconds += seconds
            file.write_text("".join(f"{line}\n" for line in lines))

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self.known:
            if time.monotonic() > self.until:
                return None
            start = time.monotonic()
            row = measure()
            line = json.dumps([key, row, round(time.monotonic() - start, 2)])
            self.known[key] = json.loads(line)[1]  # as it is read again: keys are text, pairs are lists
            if self.file:
                with self.file.open("a") as out:
                    out.write(f"{line}\n")
        return self.known[key]


def summarized(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the models of each cell, method and figure, with their lower limits."""
    return {
        cell: {
            method: {figure: summary([row[method][figure] for row in some]) for figure in own}
            for method, own in some[0].items()
        }
        for cell, some in rows.items()
    }

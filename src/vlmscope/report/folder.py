"""Reading the folders that the commands write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope.errors import StoreError


def read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except ValueError as error:
        raise StoreError(f"{file}: is damaged ({error}); write that folder anew") from error


def read_pictures(folder: Path) -> dict[str, Path]:
    """The pictures of a folder of `neurons`, by example."""
    if not (folder / "pictures.csv").is_file():
        return {}
    table = pd.read_csv(folder / "pictures.csv", dtype=str, keep_default_na=False)
    return {row.example: folder / "pictures" / Path(row.file).name for row in table.itertuples()}

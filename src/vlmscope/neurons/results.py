"""What finding, describing, perturbing and editing neurons give: tables and pictures that a folder keeps."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
from PIL import Image

from vlmscope import stored
from vlmscope.data.example import Example
from vlmscope.data.images import open_image, small_png
from vlmscope.errors import StoreError
from vlmscope.stored import formats

R = TypeVar("R", bound="Result")

FILES = {"neurons": "neurons.parquet", "maps": "maps.parquet", "effects": "perturb.csv"}
"""Where a table is kept that is not in the CSV file of its name."""


@dataclass(frozen=True, eq=False)
class Result:
    """`about` says what a result is of: the model, its weights' fingerprint, what was asked."""

    what: ClassVar[str]
    about: Mapping[str, Any]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tables and pictures, and `neurons.json` with what they are of; returns the folder.

        An earlier result of the same command is replaced. Raises `StoreError` as `files.save` does.
        """
        tables = {file: getattr(self, name) for name, file in _files(self).items()}
        content: dict[str, Any] = {file: table for file, table in tables.items() if table is not None}
        pictures = getattr(self, "pictures", None)
        if pictures is not None:
            names = [f"{number:04d}.png" for number in range(len(pictures))]
            content["pictures.csv"] = pd.DataFrame({"example": list(pictures), "file": names})
            for name, picture in zip(names, pictures.values(), strict=True):
                content[f"pictures/{name}"] = small_png(picture)
        formats.NEURONS[self.what].save(folder, {"what": self.what, **self.about}, content)
        return Path(folder)

    @classmethod
    def claim(cls, folder: str | os.PathLike[str]) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        formats.NEURONS[cls.what].claim(folder, "pictures/0000.png")


@dataclass(frozen=True, eq=False)
class Found(Result):
    """The neurons that contribute most to words of captions.

    `neurons` has the columns of `contributions.COLUMNS`; `captions` what was said about each example;
    `layers` how the listed neurons and their scores are spread; `tokens` the top tokens of those listed
    most. `held` are the captions with their neurons, by example and prompt, as far as there is room for them
    in memory; in what was read from a folder there are none.
    """

    what = "find"
    neurons: pd.DataFrame
    captions: pd.DataFrame
    layers: pd.DataFrame
    tokens: pd.DataFrame
    held: Mapping[tuple[Example, str], Any] = field(default_factory=dict, repr=False)

    @property
    def words(self) -> list[str]:
        """The words that neurons were found for."""
        return list(dict.fromkeys(self.neurons["word"]))


@dataclass(frozen=True, eq=False)
class Described(Result):
    """Cards of neurons: their top tokens (`cards`), their `maps` over pictures, the pictures that drive them
    most (`driving`), and the `measures` of the words, where there are enough pictures; `left_out` says what
    was not measured, and why."""

    what = "describe"
    cards: pd.DataFrame
    maps: pd.DataFrame
    driving: pd.DataFrame
    measures: pd.DataFrame | None = None
    left_out: pd.DataFrame | None = None
    pictures: Mapping[str, Image.Image] | None = None


@dataclass(frozen=True, eq=False)
class Perturbed(Result):
    """What happens to words without their neurons, or with noise on their columns."""

    what = "perturb"
    effects: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Assessed(Result):
    """What an edit does to pictures that it was not made on, and the `columns` that it changes."""

    what = "edit"
    measures: pd.DataFrame
    captions: pd.DataFrame
    columns: pd.DataFrame
    objects: pd.DataFrame | None = None
    pictures: Mapping[str, Image.Image] | None = None


def read(folder: str | os.PathLike[str], kind: type[R] = Result) -> R:  # type: ignore[assignment]
    """What `vlmscope neurons` wrote into a folder, as the value that it was.

    Raises `StoreError` if the folder is of something else than `kind`, or a file cannot be read.
    """
    place, kinds = Path(folder), {one.what: one for one in (Found, Described, Perturbed, Assessed)}
    what, about, values, pictures = stored.read_one(place, *formats.NEURONS.values())
    there: Any = kinds[what]
    if not issubclass(there, kind):
        raise StoreError(
            f"{place}: what `vlmscope neurons {what}` writes; expected that of `neurons {kind.what}`"
        )
    given: dict[str, Any] = {name: values.get(Path(file).stem) for name, file in _files(there).items()}
    if hasattr(there, "pictures"):
        given["pictures"] = {e: open_image(Image.open(io.BytesIO(p))) for e, p in pictures.items()}
    return there({name: value for name, value in about.items() if name != "what"}, **given)


def _files(kind: Result | type[Result]) -> dict[str, str]:
    """The file of each table, by its name."""
    names = [one.name for one in fields(kind) if "DataFrame" in str(one.type)]
    return {name: FILES.get(name, f"{name}.csv") for name in names}

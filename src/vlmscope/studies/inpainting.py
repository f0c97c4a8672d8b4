"""Contrast pairs that are made: what a mask shows is replaced, and a model has to answer otherwise."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from PIL import Image

from vlmscope import files
from vlmscope.checkpoint.others import Inpainter
from vlmscope.data import Examples, fills, listed
from vlmscope.data.example import Example, Picture, fingerprint
from vlmscope.data.fills import Fill
from vlmscope.data.images import png
from vlmscope.data.table import write_csv
from vlmscope.errors import SEED, DataError, ExampleError, StoreError, VlmscopeError, nearest, shown, whole
from vlmscope.patching.scores import agrees
from vlmscope.progress import progress
from vlmscope.runs.model import Model
from vlmscope.stats import rng
from vlmscope.stored import fits
from vlmscope.studies.run_writer import hold

FORMAT = "vlmscope-inpaint-1"
EVERY = 10.0
"""Seconds between two looks at the disk, while pairs are made."""
COLUMNS = "example kept reason before after seed share sha256".split()
"""Of the table of all that were tried: why a pair was left out, what the model answers to the picture before
and after, the seed of what was drawn, how much of the picture was replaced, the SHA-256 of the new one."""

SHAPE = {
    "tried": [
        {
            "example": str,
            "kept": bool,
            "reason": (str, None),
            "before": (str, None),
            "after": (str, None),
            "seed": int,
            "share": (float, None),
            "sha256": (str, None),
        }
    ]
}
"""Of the settings, which hold the table until it is whole."""


@dataclass(frozen=True)
class Made:
    """Pairs that were made: the `examples`, and the table of all that were `tried` (`COLUMNS`)."""

    examples: list[Example]
    tried: pd.DataFrame

    def summary(self) -> str:
        """How many were tried, and why others were left out, for a person."""
        lines = [f"{len(self.examples):,} pairs of {len(self.tried):,} that were tried"]
        dropped = self.dropped()
        lines += ["left out:"] * bool(dropped)
        return "\n".join([*lines, *(f"  {number:>6,}  {why}" for why, number in dropped.items())])

    def dropped(self) -> dict[str, int]:
        """How many were left out, by the reason, the most common first."""
        return dict(Counter(self.tried.loc[~self.tried["kept"], "reason"]).most_common())


def inpaint(
    model: Model,
    examples: Examples,
    out: str | os.PathLike[str] | None = None,
    *,
    fill: Fill | None = None,
    pipeline: Inpainter | None = None,
    prompt: str = "{foil}",
    mask: str | None = None,
    seed: int = 0,
    data: str = "examples",
) -> Made:
    """Make the corrupt picture of each example: the clean one, with what its mask or box shows replaced.

    `fill` says by what (`data.fills.fill`), or `pipeline` is a diffusion model that paints there
    (`checkpoint.others.Inpainter`) what `prompt` says, with `{foil}`, `{answer}` and names of groups filled
    in. All other pixels stay bit for bit. `mask` is the name of the mask; by default that of the answer's
    object, or the only one.
    A pair is kept if `model` gives the answer before, and after a fill no longer does, or after a pipeline
    gives the foil.

    `out` is the CSV file for the pairs, to be read by `read_csv`; beside it `…-images` has the pictures,
    `…-tried.csv` the table of all that were tried, and `….json` the settings. It is written as pairs are
    made; called again with the same arguments, it goes on where it stopped.

    Raises `DataError` if no pair is left, or an id is there twice, `StoreError` if `out` is of other
    settings.

    >>> import vlmscope
    >>> made = inpaint(vlmscope.load("toy-blip"), vlmscope.examples("states", limit=2), fill="mean")
    >>> made.tried["before"][0], made.tried["kept"].tolist()
    ('yellow', [True, True])
    """
    known = ", ".join(get_args(Fill))
    if (fill is None) == (pipeline is None):
        many = "nothing" if fill is None else "both"
        raise VlmscopeError(
            f"{many} given of what it is replaced by: name a fill (--fill {known}), or a pipeline (--with)"
        )
    if fill is not None and fill not in get_args(Fill):
        raise VlmscopeError(f"no fill {shown(fill)}; expected one of {known}{nearest(fill, get_args(Fill))}")
    seed = whole(seed, "the seed", most=SEED)
    given = listed(examples)
    if twice := next((name for name, n in Counter(one.id for one in given).items() if n > 1), None):
        raise DataError(f"two examples have the id {shown(twice)}; make it new")
    how = _How(model, fill, pipeline, prompt, mask, seed)
    if out is None:
        return _made(how, given)
    folder = _Folder(Path(out), _spec(how, given, data), len(given))
    with folder.held():
        made = _made(how, given, folder)
        folder.finish(made)
    return made


@dataclass(frozen=True)
class _How:
    """How one pair is made, and judged."""

    model: Model
    fill: Fill | None
    pipeline: Inpainter | None
    prompt: str
    mask: str | None
    seed: int

    def pair(self, example: Example) -> tuple[dict[str, Any], Image.Image | None]:
        """The row of an example, and its new picture where one can be made."""
        own = int(rng(self.seed, "inpaint", example.id).integers(2**31))
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"example": example.id, "kept": False, "seed": own}
        try:
            picture, where = fills.region(example, self.mask)
            row["share"] = round(float(where.mean()), 6)
            row["before"] = self._answer(example, picture)
            if not agrees(row["before"], example.answer):
                return row | {"reason": "the model does not give the answer before"}, None
            made = self._made(example, picture, where, own)
            row["after"] = self._answer(example, made)
        except ExampleError as error:
            return row | {"reason": str(error)}, None
        if self.fill is not None and agrees(row["after"], example.answer):
            return row | {"reason": "the model still gives the answer"}, made
        if self.fill is None and not agrees(row["after"], example.foil):
            return row | {"reason": "the model does not give the foil after"}, made
        return row | {"kept": True}, made

    def _made(self, example: Example, picture: Image.Image, where: Any, seed: int) -> Image.Image:
        if self.pipeline is None:
            return fills.fill(picture, where, self.fill or "mean", seed)
        if not example.foil:
            raise ExampleError("it has no foil to be painted; fill instead")
        words = {**example.groups, "answer": example.answer, "foil": example.foil}
        prompt = re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), self.prompt)
        painted = self.pipeline(picture, Image.fromarray(where), prompt, seed)
        return fills.replaced(picture, where, np.asarray(painted)[where])

    def _answer(self, example: Example, picture: Image.Image) -> str:
        return self.model.answer(self.model.inputs(picture, example.clean_prompt, example.more_images))


def check_out(file: Path) -> None:
    """Refuse, before a model is loaded, what is no name of a CSV file, or a place that cannot be written."""
    if file.suffix.lower() != ".csv":
        raise VlmscopeError(f"{file}: the pairs are a CSV file; expected a name that ends in .csv")
    files.claim_file(file)


def _spec(how: _How, given: Sequence[Example], data: str) -> dict[str, Any]:
    """What has to be the same where a file of pairs is gone on with."""
    return {
        "format": FORMAT,
        "model": how.model.name,
        "weights": how.model.fingerprint(),
        "dtype": how.model.precision,
        "data": data,
        "data_hash": fingerprint(given),
        "fill": how.fill,
        **(
            {
                "with": how.pipeline.name,
                "with_weights": how.pipeline.fingerprint(),
                "steps": how.pipeline.steps,
                "prompt": how.prompt,
            }
            if how.pipeline
            else {}
        ),
        "mask": how.mask,
        "seed": how.seed,
        "kept_if": "the foil" if how.fill is None else "no longer the answer",
    }


class _Folder:
    """The files of some pairs: a CSV file, its pictures, the table of all that were tried, and the settings.

    The settings come first and say `unfinished`; they hold the rows that are done, each with the digest of
    its picture, which is written before. So nothing is made twice behind a kill, and nothing is trusted that
    is not as it was written.
    """

    def __init__(self, file: Path, spec: Mapping[str, Any], many: int) -> None:
        check_out(file)
        self.file, self.spec = file, dict(spec)
        self.manifest, self.tried = file.with_suffix(".json"), file.with_name(f"{file.stem}-tried.csv")
        self.pictures = file.with_name(f"{file.stem}-images")
        names = [self._picture(number) for number in range(many)]
        listed = [path.relative_to(file.parent).as_posix() for path in (file, self.tried, *names)]
        about = files.claim(file.parent, self.manifest.name, FORMAT, listed)
        if odd := [name for name in spec if about and about.get(name) != spec[name]]:
            there, here = shown(about.get(odd[0])), shown(spec[odd[0]])
            raise StoreError(
                f"{self.manifest}: was made with {odd[0]} {there}, here it is {here}; choose another --out"
            )
        if about:
            fits(about, SHAPE, self.manifest, f"delete it, or choose another --out than {file}")
        self.rows = {row["example"]: dict(row) for row in about.get("tried", [])}
        self.files = dict.fromkeys(listed, "")
        self.since: float | None = None  # when rows were last written, once there are new ones

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the files for this process; the system lets go when the process ends, however."""
        with files.storing(self.pictures):
            self.pictures.mkdir(parents=True, exist_ok=True)
        lock = hold(self.pictures, str(self.file))
        try:
            yield
        except BaseException:
            with suppress(StoreError):
                if self.since is not None:  # what is done is kept, and what was finished stays so
                    self._write()
            raise
        finally:
            lock.release()
            if not any(row["kept"] for row in self.rows.values()):  # nothing to keep, nor to be in the way
                self.manifest.unlink(missing_ok=True)
                with suppress(OSError):
                    (self.pictures / ".lock").unlink(missing_ok=True)
                    self.pictures.rmdir()

    def kept(self, number: int, example: Example) -> tuple[dict[str, Any] | None, Path | None]:
        """The row of an example and its picture, where they are there as they were written."""
        row, file = self.rows.get(example.id), self._picture(number)
        if row is None or not row["kept"]:
            return row, None
        try:
            same = hashlib.sha256(files.read(file, "a picture")).hexdigest() == row["sha256"]
        except DataError:
            same = False
        return (row, file) if same else (None, None)

    def keep(self, number: int, row: dict[str, Any], picture: Image.Image | None) -> Path | None:
        """Write a picture, and from time to time the rows."""
        if self.since is None:
            self._write()  # says that the pictures are ours, before the first
            self.since = -EVERY
        if row["kept"] and picture is not None:
            content = png(picture)
            files.write(self._picture(number), content)
            row["sha256"] = hashlib.sha256(content).hexdigest()
        self.rows[row["example"]] = row
        if time.monotonic() - self.since > EVERY:
            self._write()
            self.since = time.monotonic()
        return self._picture(number) if row["kept"] else None

    def finish(self, made: Made) -> None:
        """Write the table and the pairs; the settings, without `unfinished`, come last."""
        if self.since is not None:
            self._write()
        files.write(self.tried, files.to_csv(made.tried))
        write_csv(self.file, made.examples)
        self._write(unfinished=False)

    def _picture(self, number: int) -> Path:
        return self.pictures / f"made-{number:05d}.png"

    def _write(self, unfinished: bool = True) -> None:
        about = {**self.spec, "unfinished": True} if unfinished else self.spec
        files.write_json(self.manifest, {**about, "tried": [*self.rows.values()], "files": self.files})


def _made(how: _How, given: Sequence[Example], folder: _Folder | None = None) -> Made:
    """All pairs, in memory or in files, of which those are not made again that are there."""
    pairs, rows = [], []
    picture: Picture | None
    with progress(len(given)) as step:
        for number, example in enumerate(given):
            row, picture = (None, None) if folder is None else folder.kept(number, example)
            if row is None:
                row, made = how.pair(example)
                picture = made if folder is None else folder.keep(number, row, made)
            rows.append(row)
            if row["kept"]:
                pairs.append(replace(example, corrupt_image=picture))
            step(0, number + 1)
    found = Made(pairs, pd.DataFrame(rows, columns=COLUMNS))
    if not pairs:
        why = "; ".join(f"{reason} ({number:,})" for reason, number in found.dropped().items())
        raise DataError(f"none of {len(given)} pairs is left: {why or 'there are no examples'}")
    return found

"""Shards of one run, put together: the folder that a single process would have written."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from vlmscope import stored
from vlmscope.errors import StoreError, VlmscopeError, shown
from vlmscope.studies.run_folder import (
    BASELINES,
    Run,
    columns_of,
    held_in,
    parts_of,
    pieces_of,
    read_run,
    same_examples,
    table_in,
)
from vlmscope.studies.run_writer import Writer, differing, keep_pictures, open_run

_SHAPE = {"shard": str, "n_examples": int, "sites": [str]}
_SHARD = re.compile(r"([1-9]\d{0,6})/([1-9]\d{0,6})", re.ASCII)


class _Part(NamedTuple):
    """A run that is a shard: which of how many."""

    run: Run
    which: int
    many: int

    @property
    def numbers(self) -> range:
        return range(self.which - 1, self.run.spec["n_examples"], self.many)


def merge(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Run:
    """Put the run folders of all shards of one run together, into the folder `out`.

    Its tables and pictures are those of a run without shards; `check` counts the rows that were recomputed
    in all of them. Goes on where it stopped, as every run folder does. The shards stay as they are.

    Raises `StoreError` for folders that are no shards, or of other specifications or versions, for a shard
    that is named twice, is missing, or lacks examples.

    >>> import tempfile, vlmscope
    >>> model, examples = vlmscope.load("toy-blip"), vlmscope.examples("states", limit=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for which in (1, 2):
    ...         own = {"out": f"{folder}/{which}", "shard": (which, 2)}
    ...         table = vlmscope.sweep(model, examples, "encoder.*.resid@answer", **own)
    ...     run = merge([f"{folder}/1", f"{folder}/2"], f"{folder}/whole")
    ...     table["example"].nunique(), run.effects()["example"].nunique()
    (1, 3)
    """
    shards = _shards([read_run(folder) for folder in folders])
    digests = _digests(shards)
    first = shards[0].run
    spec = {name: value for name, value in first.spec.items() if name != "shard"}
    with open_run(out, spec, first.description, digests=digests) as writer:
        for shard in shards:
            _copy(shard.run, writer)
        writer.flush()
        run = read_run(out)
        _write_beside(run)
        checks = [shard.run.check for shard in shards if shard.run.check]
        if checks:
            largest = max(check["largest"] for check in checks)
            writer.keep_check({"rows": sum(check["rows"] for check in checks), "largest": largest})
        writer.finish()
    return read_run(out)


def _shards(runs: Sequence[Run]) -> list[_Part]:
    """All shards of one run, in their order."""
    if not runs:
        raise VlmscopeError("there are no folders to merge; name those of all shards")
    found: dict[int, _Part] = {}
    for run in runs:
        shard = _shard(run)
        first = next(iter(found.values()), shard)
        if shard.many != first.many:
            raise StoreError(
                f"{run.path}: is shard {run.spec['shard']}, and {first.run.path} is "
                f"{first.run.spec['shard']}; name the shards of one run"
            )
        if differ := differing(first.run.spec, run.spec, ["shard"]):
            raise StoreError(
                f"{run.path}: a shard of another run than {first.run.path}: {differ}. Name those of one run"
            )
        if shard.which in found:
            raise StoreError(
                f"{run.path}: is shard {run.spec['shard']}, as {found[shard.which].run.path} is; "
                "name each once"
            )
        found[shard.which] = shard
    many = next(iter(found.values())).many
    if missing := [number for number in range(1, many + 1) if number not in found]:
        names = ", ".join(f"{number}/{many}" for number in missing[:6])
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        raise StoreError(
            f"{len(missing)} of {many} shards are missing: {names}{more}; run them "
            f"(--shard {missing[0]}/{many}), and name all folders"
        )
    return [found[number] for number in sorted(found)]


def _shard(run: Run) -> _Part:
    way_out = "name folders that were written with --shard I/N"
    if "shard" not in run.spec:
        raise StoreError(f"{run.path}: is no shard, but a whole run; {way_out}")
    stored.fits(run.spec, _SHAPE, run.path / "run.json", way_out)
    found = _SHARD.fullmatch(run.spec["shard"])
    which, many = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= which <= many:
        raise StoreError(f"{run.path / 'run.json'}: is damaged (shard {shown(run.spec['shard'])}); {way_out}")
    return _Part(run, which, many)


def _digests(shards: Sequence[_Part]) -> list[str]:
    """The digest of every example, by its number; all are there, each in its shard."""
    found: dict[int, str] = {}
    for shard in shards:
        run, sites = shard.run, {*range(len(shard.run.spec.get("sites", [])))}
        done: dict[int, set[int]] = {}
        for part in parts_of(run.path):
            for held in held_in(part, "baselines"):
                done.setdefault(held.number, set()).update(sites if held.sites is None else held.sites)
                found[held.number] = held.digest
        if odd := [number for number in done if number not in shard.numbers]:
            raise StoreError(
                f"{run.path}: holds example number {odd[0]}, which is not of shard {run.spec['shard']}; take "
                "it from a copy of the folder, or run the shard again into another --out"
            )
        many = len(shard.numbers)
        if lacking := many - sum(sites <= there for there in done.values()):
            first = next(
                number
                for number in shard.numbers
                if not sites <= done.get(number, {-1}) or number not in done
            )
            raise StoreError(
                f"{run.path}: shard {run.spec['shard']} lacks {lacking} of its {many} examples (the first is "
                f"number {first} of the data); run its command again, it goes on where it stopped"
            )
    return [found[number] for number in sorted(found)]


def _copy(run: Run, writer: Writer) -> None:
    """What a run holds, part by part, and its pictures."""
    for one in run.pictures():
        pictures = {name: one[f"{name}_image"] for name in ("clean", "corrupt")}
        words = {name: text for name, text in one.items() if isinstance(text, str)}
        there = {name: picture for name, picture in pictures.items() if picture is not None}
        keep_pictures(writer.path, one["index"], there, words)
    bases = list(pieces_of(run.path, "baselines", BASELINES))
    rows = pieces_of(run.path, table_in(run.spec), columns_of(run.spec))
    for own, base in zip_longest(same_examples(rows, bases), bases):
        if own is None or base is None or own[1] != base[1]._replace(rows=own[1].rows):
            part = (own or base)[0]
            raise StoreError(
                f"{part}: is not what was written with its rows. Delete it and run the shard's command again"
            )
        writer.copy(own[1], own[2], base[2])


def _write_beside(run: Run) -> None:
    """What else is made of the whole table."""
    if "screen" in run.spec:
        from vlmscope.studies.screen import write_beside
    elif table_in(run.spec) == "edges":
        from vlmscope.studies.edges import write_beside
    elif table_in(run.spec) == "attributions":
        from vlmscope.studies.attribution import write_beside
    else:
        return
    write_beside(run)

"""The section of what `tracing` wrote: the share of P(answer) that clean states restore."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from vlmscope import stored
from vlmscope.report import figures
from vlmscope.report.gallery import Gallery, Section, render
from vlmscope.report.ranking import most_restored
from vlmscope.report.words import KINDS, TOWERS, kinds_in, upper_first
from vlmscope.stored import formats
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import read_run


def section(folder: Path, gallery: Gallery) -> Section:
    about, tables = stored.read(folder, formats.TRACING)
    table, repeat = tables["tracing"], folder / "repeats" / "00"
    known = knows(read_run(repeat, folder).baselines()) if os.path.lexists(repeat) else None
    shown = []
    for tower, of_tower in table.groupby("tower", sort=False):
        for (length, window), rows in of_tower.groupby(["length", "window"]):
            heading = f"{upper_first(TOWERS[str(tower)])}, windows of {window}"
            heading += f", questions of {length} tokens" if length else ""
            tables = {upper_first(KINDS[kind]): cells for kind, cells in tracing_tables(rows).items()}
            drawn = figures.panels(tables, value="restored")
            (best,) = most_restored(rows, 1).itertuples()
            values = {"rows": rows, "best": best, "held": rows["n"].min() < rows["n"].max() / 2}
            shown.append(
                (heading, gallery.show(f"{tower}-{length}-{window}", drawn, rows, "tracing", **values))
            )
    left = about["left_out_of_each_repeat"]
    text = render(
        "tracing.html", known=known, about=about, left_out=sorted({min(left), max(left)}), figures=shown
    )
    is_unknown = known is not None and known.severity == "unknown"
    return Section(f"Causal tracing: {Path(str(about['data'])).name}", text, is_unknown)


def tracing_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Layer x token tables of the share restored, by kind, from rows of the table of `tracing.trace` of one
    tower, window and length."""
    has_lengths = bool((rows["length"] > 0).any())
    found = {}
    for kind in kinds_in(rows):
        cells = rows[rows["kind"] == kind]
        columns = cells.sort_values("order", kind="stable").drop_duplicates("at")
        beside = "" if has_lengths else (" " + columns["token"].astype(object)).fillna("")
        table = cells.pivot(index="layer", columns="at", values="restored")[list(columns["at"])]
        table.columns.name = "token" if has_lengths else "slot"
        table.attrs = {
            "labels": dict(zip(columns["at"], columns["at"] + beside, strict=True)),
            "roles": list(columns.loc[columns["is_role"].astype(bool), "at"]),
            "n": cells.groupby("at")["n"].max().to_dict(),
            "examples": int(cells["n"].max()),
        }
        found[kind] = table
    return found

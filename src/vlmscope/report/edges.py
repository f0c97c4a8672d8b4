"""The section of a run of `edges`: which part feeds which, as a graph."""

from __future__ import annotations

import pandas as pd

from vlmscope import stored
from vlmscope.report.figures import scores_and_effects
from vlmscope.report.gallery import Gallery, Section, render
from vlmscope.report.graph import DRAWN, graph
from vlmscope.report.run import patching
from vlmscope.report.words import ends, short_number
from vlmscope.studies.agreement import agreement, lines
from vlmscope.studies.edge_tables import by_reader, over_examples
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import OF_ATTRIBUTE, SPEC, Run

NEEDED = "model? data? corrupt? method? tower? direction? metric?"


def section(run: Run, title: str, gallery: Gallery) -> Section:
    """The section of a run of `edges`, whose table is read once."""
    needed = {name.removesuffix("?"): (SPEC | OF_ATTRIBUTE)[name] for name in NEEDED.split()}
    stored.fits(run.spec, needed, run.path / "run.json", "score the edges again into another --out")
    base, each = run.baselines(), run.edges()
    known, excluded = knows(base), base["excluded"].astype(bool)
    table = over_examples(each)
    figures = [
        ("The largest edges", gallery.show("graph", graph(table), table, "graph", rows=table, most=DRAWN))
    ]
    found = agreement(by_reader(each), run.spec["verify"]) if run.spec.get("verify") else {}
    if found:
        rows = by_reader(each[each["exact"].notna()])
        drawn = scores_and_effects(rows, found)
        words = {"rows": rows, "method": run.spec["method"], "what": "edge"}
        figures.append(
            ("Scores and exact patches", gallery.show("exact", drawn, rows, "scores_and_effects", **words))
        )
    text = render(
        "edges.html",
        run=run,
        patching=patching(run.spec),
        known=known,
        ran=base[~excluded],
        left=int(excluded.sum()),
        agreement=lines(found) if found else [],
        figures=figures,
        strongest=_strongest(table),
    )
    return Section(f"Edges of the {run.spec['tower']}: {title}", text, known.severity == "unknown")


def _strongest(table: pd.DataFrame) -> pd.DataFrame:
    """The largest edges as the page shows them: text."""
    found = table.head(15)
    return pd.DataFrame(
        {
            "from": found["source"],
            "to": found["target"],
            "mean score": found["score"].map(short_number),
            "95 % interval": list(map(ends, found["low"], found["high"])),
            "exact": ["" if pd.isna(value) else short_number(value) for value in found["exact"]],
        }
    )

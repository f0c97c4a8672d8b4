"""Tables of edges: means over examples, and what is said of each by what reads it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vlmscope.studies.tables import means

KEYS = ["source", "target"]
ENDS = ("logits", "projector")


def over_examples(each: pd.DataFrame) -> pd.DataFrame:
    """The edges of all examples, a row an edge, the largest |score| first: `source`, `target`, the means
    `score` and `exact` (null but where it was patched in all of them, so that both are of the same), and
    `low`, `high`, the 95 % interval of the score.

    >>> rows = {"example": ["a", "b"], "source": "image", "target": "logits", "score": [1.0, 2.0]}
    >>> table = over_examples(pd.DataFrame({**rows, "exact": [1.0, 3.0]}))
    >>> table[["target", "score", "exact"]].to_dict("records")
    [{'target': 'logits', 'score': 1.5, 'exact': 2.0}]
    """
    table = means(each, KEYS, "score", intervals=True).rename(columns={"mean": "score"})
    known = each.groupby(KEYS, sort=False)["exact"].agg(["count", "size", "mean"])
    known = known["mean"].where(known["count"] == known["size"]).astype(float)
    table = table.join(known.rename("exact"), on=KEYS)
    order = np.argsort(-table["score"].abs().to_numpy(), kind="stable")
    return table.iloc[order][[*KEYS, "score", "exact", "low", "high"]].reset_index(drop=True)


def by_reader(each: pd.DataFrame) -> pd.DataFrame:
    """The table with `tower`, `layer`, `kind` and `unit` of what reads, by which `agreement` groups."""
    parts = each["target"].str.split(".", expand=True).reindex(columns=range(4))
    is_end = each["target"].isin(ENDS)
    tower = parts.loc[~is_end, 0].iloc[0] if not is_end.all() else ""
    return each.assign(
        tower=tower,
        kind=parts[2].where(~is_end, parts[0]),
        unit=parts[3],
        layer=pd.to_numeric(parts[1]).fillna(-1).astype(int),
    )

"""How many examples of each group are kept for the sweeps, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from vlmscope.data.example import Example

Sweep = tuple[str, str]
"""The name of a data set, and a corruption."""
MANY = 12
"""A group with more values than this (an id, a noun) is no group to report on."""


def selection(baselines: Mapping[Sweep, pd.DataFrame], sets: Mapping[str, Sequence[Example]]) -> pd.DataFrame:
    """How many examples of each group are answered rightly and how many are kept.

    Columns: `data`, `corruption`, `group`, `value` (`all` for all), `n`, `ran` (could be run at all),
    `correct`, `accuracy` (of those that ran), `kept`, `dropped_wrong`, `dropped_not_following`,
    `dropped_not_run`.
    """
    parts = []
    for (name, corrupt), table in baselines.items():
        base, whole = table.set_index("example"), {"all": "all"}
        groups = pd.DataFrame({e.id: whole | dict(e.groups) | whole for e in sets[name]}).T.reindex(
            base.index
        )
        ran, correct = base["correct"].notna(), base["correct"].fillna(False).astype(bool)
        kept = ~base["excluded"]
        counts = pd.DataFrame({"n": True, "ran": ran, "correct": correct, "kept": kept})
        counts["dropped_wrong"] = ~kept & ran & ~correct
        counts["dropped_not_following"] = ~kept & correct
        counts["dropped_not_run"] = ~ran
        for group in (c for c in groups if groups[c].nunique() <= MANY):
            part = counts.groupby(groups[group].rename("value")).sum().reset_index()
            part.insert(4, "accuracy", part["correct"] / part["ran"])
            parts.append(pd.DataFrame({"data": name, "corruption": corrupt, "group": group, **part}))
    return pd.concat(parts, ignore_index=True)


def lines_of(table: pd.DataFrame) -> str:
    """The same in words."""
    lines = ["Kept for patching (answered rightly, and the answer follows the corruption):"]
    lines += [
        f"  {f'{r.data}, {r.corruption}':<24}{r.kept:>5} of {r.n:<5} right {r.accuracy:>6.1%}   dropped: "
        f"{r.dropped_wrong} wrong, {r.dropped_not_following} not following, {r.dropped_not_run} not run"
        for r in table[table["group"] == "all"].itertuples()
    ]
    return "\n".join(lines)

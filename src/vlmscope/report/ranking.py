"""What moves the answer most: tables, largest first."""

from __future__ import annotations

import pandas as pd

from vlmscope.studies.tables import change_of, means

COLUMNS = ["site", "corruption", "slot", "token", "mean", "sd", "low", "high", "n"]


def strongest(effects: pd.DataFrame, n: int = 10, value: str | None = None) -> pd.DataFrame:
    """The `n` sites with the largest |mean `value`| over examples, largest first; sites that fewer than half
    of the table's examples hold come behind all others. By default `value` is the change against the run that
    was patched: `ld_change`, or `p_change` where there is no logit difference.

    Patches are one site if they agree in tower, layer (and its window), kind, unit and slot. Columns:
    `site`, `corruption`, `slot`, `token` (where it is the same in all examples), `mean`, `sd` (over
    examples; null for one), `low` and `high` (95 % interval), `n`, the number of examples.

    `site` can be swept again. A role, `readout` and a place of the picture name themselves. Any other slot
    (`3`, `answer+1`, `-2`) stands as a position, `@5` or `@-2`, where that is the slot in every example;
    where it is not, no expression means the slot, and `site` ends before the @. Sums `A + B` and edges `A<B`
    are named whole.
    """
    keys = ["corruption", "tower", "depth", "kind", "part", "slot"]
    value = value or change_of(effects)
    if effects.empty or effects[value].isna().all():
        return pd.DataFrame(columns=COLUMNS)
    rows = effects.assign(
        depth=effects["site"].str.split(".", n=2).str[1],  # with the window, where it has one
        part=effects["unit"].astype(object).fillna(""),
    )
    is_whole = rows["site"].str.contains(r" \+ |<")
    rows["part"] = rows["part"].where(~is_whole, rows["site"])
    # One number for six columns of text, which are then not sorted out again each time.
    rows["cell"] = rows.groupby(keys, sort=False).ngroup()
    found = means(rows, ["cell"], value).merge(rows.drop_duplicates("cell")[["cell", *keys]], on="cell")
    examples = found["corruption"].map(rows.groupby("corruption")["example"].nunique())
    found = by_size(found, found["mean"].abs(), examples).head(n)
    shown = rows[rows["cell"].isin(found["cell"])]
    found = found.merge(means(shown, ["cell"], value, intervals=True)[["cell", "low", "high"]], on="cell")
    tokens = shown.groupby("cell")["token"].agg(["first", "nunique"])
    tokens = tokens["first"].where(tokens["nunique"] == 1).rename("token")
    found = found.merge(tokens, left_on="cell", right_index=True)
    found = found.merge(_positions(effects), on=["corruption", "tower", "slot"], how="left")
    place = found["tower"] + "." + found["depth"] + "." + found["kind"]
    unit = found["part"].where(found["part"] == "", "." + found["part"])
    site = place + unit + ("@" + found["at"]).where(found["at"] != "", "")
    found["site"] = site.where(~found["part"].str.contains("@", regex=False), found["part"])
    return found[COLUMNS].reset_index(drop=True)


def _positions(effects: pd.DataFrame) -> pd.DataFrame:
    """How a site expression names each slot of each tower: column `at`, empty where none does."""
    keys = ["corruption", "tower", "slot"]
    rows = effects[[*keys, "example", "position", "role"]].drop_duplicates([*keys, "example"])
    has_name = rows["slot"].str.fullmatch(r"readout|image\[\d+,\d+\]") | rows["position"].isna()
    has_name |= rows["slot"] == rows["role"]
    own = rows[has_name].drop_duplicates(keys)
    parts = [own.assign(at=own["slot"])[[*keys, "at"]]]
    # The end of an example is known from its read-out position, or in an encoder from what is counted
    # from its end.
    from_end = pd.to_numeric(rows["slot"], errors="coerce").where(rows["slot"].str.startswith("-"))
    end = (rows["position"] + 1).where(rows["slot"] == "readout")
    end = end.fillna((rows["position"] - from_end).where(rows["tower"] == "encoder"))
    ends = end.groupby([rows[k] for k in ("corruption", "tower", "example")]).transform("max")
    held = rows.groupby(keys)["slot"].transform("size")
    for place in (rows["position"], rows["position"] - ends):
        at = rows.assign(at=place).dropna(subset=["at"])
        one_slot = at.groupby(["corruption", "tower", "at"])["slot"].transform("nunique") == 1
        one_place = at.groupby(keys)["at"].transform("nunique") == 1
        whole = at.groupby(keys)["at"].transform("size") == held[at.index]
        same = at[one_slot & one_place & whole].drop_duplicates(keys)
        parts.append(same.assign(at=same["at"].astype(int).astype(str))[[*keys, "at"]])
    found = pd.concat([*parts, rows[keys].assign(at="")], ignore_index=True)
    return found.drop_duplicates(keys)


def by_size(table: pd.DataFrame, sizes: pd.Series[float], most: pd.Series[int]) -> pd.DataFrame:
    """The largest first; rows that fewer than half of the examples (`most`) hold, behind all others."""
    order = pd.DataFrame({"few": table["n"] < most / 2, "size": -sizes})
    return table.loc[order.sort_values(["few", "size"], kind="stable").index]


def most_restored(table: pd.DataFrame, n: int = 5) -> pd.DataFrame:
    """The rows of `tracing.trace`'s table with the largest share restored; those that fewer than half of the
    examples hold (of their tower and length) come behind all others."""
    most = table.groupby(["tower", "length"])["n"].transform("max")
    return by_size(table, table["restored"], most).head(n)

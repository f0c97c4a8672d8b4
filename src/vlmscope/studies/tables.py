"""Tables over examples: the one place where examples are averaged.

A column is a slot (`layout.slots`): what a position is called in every example, whatever its length. A
cell is the mean over examples of the mean within each example, where a patch may be twice in a table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.errors import DataError
from vlmscope.stats import interval

VALUES = ("logit_diff", "effect", "p_restored", "p_patched", "ld_change", "p_change", "value")
"""The columns of `effects` that can be averaged."""
CHANGES = ("ld_change", "logit_diff", "p_change")
"""What patches are ranked and drawn by: the first of these that has values."""
TOWERS = ("encoder", "decoder", "qformer", "vision")
KINDS = ("resid", "resid_pre", "resid_mid", "mlp", "attn", "cross", "deepstack", "output")
HEAD_KINDS = ("cross", "attn")
"""What is taken where a table holds several and none is named: the first of these that it has."""

SPEAKER = "decoder"
"""The tower whose last position predicts the answer: nothing is read out in any other."""

_TOGETHER_SITES = r"/| \+ "
"""In a site that is of several layers, or of several places together."""
_ROLE = re.compile(r"(?P<role>[A-Za-z_]\w*)(\[(?P<piece>\d+)\]|\+(?P<steps>\d+))?")
_CELL = re.compile(r"image\[(\d+),(\d+)\]")
_TOGETHER = ("all", "text", "image")


def token_table(
    effects: pd.DataFrame, *, tower: str | None = None, kind: str | None = None, value: str = "logit_diff"
) -> pd.DataFrame:
    """Mean `value` by layer (rows) and slot (columns), of patches of a whole `kind`: no heads, neurons or
    windows of layers.

    Columns: text before the first role and the image, in their order; each role, followed by what stands
    behind it; what is counted from the end; `readout`; last, patches of several positions together.
    Layers without a patch are rows of nulls. Of several towers or kinds in the table and none named, the
    first of `TOWERS` and of `KINDS` is taken.

    `attrs`: `n`, how many examples each column holds; `labels`, each column's slot, with its token where
    that is the same in all examples; `roles`, the columns that are roles; `examples`, how many there are
    in all; `tower`, `kind`, `value`; `gap`, the mean LD(clean) − LD(corrupt), null where it is not known.

    Raises `DataError` for a tower, kind or value that the table does not hold, or several corruptions.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> effects = vlmscope.sweep(model, vlmscope.examples("states", limit=2), "encoder.*.resid@text*")
    >>> token_table(effects).shape
    (3, 9)
    """
    return wide(token_cells(effects, tower=tower, kind=kind, value=value))


def head_table(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    slot: str = "readout",
    value: str = "logit_diff",
) -> pd.DataFrame:
    """Mean `value` by layer (rows) and head (columns) at one slot.

    `readout` is the position whose prediction is scored; in a tower where nothing is read out (BLIP's
    question encoder) it stands for the answer's token, and where no example has one for the last
    (`at_slot`). Towers and kinds are chosen as in `token_table`, kinds by `HEAD_KINDS`. Layers and heads
    without a patch are nulls.

    `attrs` as in `token_table`, and `slot`, the one that is shown.

    Raises `DataError` for a tower, kind, slot or value that the table does not hold, or several
    corruptions.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> effects = vlmscope.sweep(model, vlmscope.examples("states", limit=2), "encoder.*.cross.h*@answer")
    >>> table = head_table(effects)
    >>> table.shape, table.attrs["slot"], table.attrs["n"][0]
    ((3, 4), 'answer', 2)
    """
    return wide(head_cells(effects, tower=tower, kind=kind, slot=slot, value=value))


# --- cells: the same tables, a row a cell, with what the mean is worth -------------------------


def token_cells(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    value: str = "logit_diff",
    intervals: bool = False,
) -> pd.DataFrame:
    """The cells of `token_table`, a row each: `tower`, `kind`, `layer`, `slot`, `mean`, `sd`, `n`.

    With `intervals` also `low` and `high`, the 95 % bootstrap interval of the mean over examples.
    """
    rows = choose(effects, tower=tower, kind=kind, value=value)
    return _cells(rows, "slot", value, intervals)


def head_cells(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    slot: str = "readout",
    value: str = "logit_diff",
    intervals: bool = False,
) -> pd.DataFrame:
    """The cells of `head_table`, a row each: as `token_cells`, with `head` and the `slot` they are at."""
    rows = choose(effects, tower=tower, kind=kind, value=value, heads=True)
    name, rows = at_slot(rows, slot)
    cells = _cells(rows.assign(head=rows["unit"].str.slice(1).astype(int)), "head", value, intervals)
    cells.insert(2, "slot", name)
    cells.attrs["slot"] = name
    return cells


def wide(cells: pd.DataFrame) -> pd.DataFrame:
    """Layers × slots, or layers × heads, of the cells that `token_cells` or `head_cells` gave."""
    attrs = cells.attrs
    table = cells.pivot(index="layer", columns=attrs["column"], values="mean")
    layers = range(int(cells["layer"].min()), int(cells["layer"].max()) + 1)
    table = table.reindex(index=layers, columns=attrs["order"])
    table.index.name, table.columns.name = "layer", attrs["column"]
    table.attrs = {k: v for k, v in attrs.items() if k not in ("column", "order")}
    return table


def means(
    rows: pd.DataFrame, keys: Sequence[str], value: str = "logit_diff", *, intervals: bool = False
) -> pd.DataFrame:
    """Of any rows with an `example`: the mean of `value` by `keys`, within an example first, then over
    examples. Columns: the keys (not null), `mean`, `sd` and `n`, over examples whose value is not null.

    With `intervals` also `low` and `high`: `stats.interval`, null for one example.

    >>> rows = pd.DataFrame({"example": ["a", "a", "b"], "layer": [0, 0, 0], "logit_diff": [1.0, 3.0, 6.0]})
    >>> means(rows, ["layer"])[["mean", "n"]].to_dict("records")
    [{'mean': 4.0, 'n': 2}]
    """
    each = by_example(rows, keys, value)
    found = each.groupby(level=list(keys), sort=False).agg(["mean", "std", "count"])
    found = found.rename(columns={"std": "sd", "count": "n"})
    if intervals:
        found[["low", "high"]] = _intervals(each, list(keys)).reindex(found.index)
    return found.reset_index()


def by_example(rows: pd.DataFrame, keys: Sequence[str], value: str = "logit_diff") -> pd.Series[float]:
    """The mean of `value` within each example, by `keys` and `example`; nulls left out."""
    each = rows.groupby([*keys, "example"], sort=False, observed=True)[value].mean()
    return each.astype(float).dropna()


def _intervals(each: pd.Series[float], keys: list[str]) -> pd.DataFrame:
    """Of all cells that hold the same examples at once: they are drawn anew together."""
    table = each.unstack("example").sort_index(axis=1)
    scores, there = table.to_numpy(dtype=float), table.notna().to_numpy()
    ids = [str(name) for name in table.columns]
    ends = np.full((len(table), 2), np.nan)
    sets, of = np.unique(there, axis=0, return_inverse=True)
    for number, held in enumerate(sets):
        cells = np.flatnonzero(of.reshape(-1) == number)
        names = [name for name, is_there in zip(ids, held, strict=True) if is_there]
        ends[cells] = interval(scores[np.ix_(cells, held)].T, names).T
    return pd.DataFrame(ends, index=table.index, columns=["low", "high"])


def _cells(rows: pd.DataFrame, column: str, value: str, intervals: bool) -> pd.DataFrame:
    tower, kind = rows["tower"].iloc[0], rows["kind"].iloc[0]
    cells = means(rows, ["layer", column], value, intervals=intervals)
    held = rows.loc[rows[value].notna()].groupby(column)["example"].nunique().to_dict()
    slots = [slot for slot in slot_order(rows) if slot in held] if column == "slot" else []
    order: list[Any] = [*slots] or list(range(int(rows[column].max()) + 1))
    place = {name: number for number, name in enumerate(order)}
    cells = cells.sort_values(
        ["layer", column], key=lambda c: c.map(place) if c.name == column else c, ignore_index=True
    )
    cells.insert(0, "tower", tower)
    cells.insert(1, "kind", kind)
    cells.attrs = {
        "column": column,
        "order": order,
        "n": {name: held.get(name, 0) for name in order},
        "examples": int(rows["example"].nunique()),
        "tower": tower,
        "kind": kind,
        "value": value,
        "gap": mean_gap(rows),
    }
    if column == "slot":
        cells.attrs |= {"labels": labels(rows, slots), "roles": [slot for slot in slots if is_role(slot)]}
    return cells


# --- which rows and column --------------------------------------------------------------------------------


def change_of(effects: pd.DataFrame) -> str:
    """The column that says how far each patch moves the answer, against the run that was patched.

    That is `ld_change`; where there is no logit difference, as with `--metric logprob`, `p_change`.
    """
    return next((name for name in CHANGES if name in effects and effects[name].notna().any()), "logit_diff")


def is_single(effects: pd.DataFrame) -> pd.Series[bool]:
    """Which patches are of one layer: no windows `/`, and no sums `A + B`."""
    return ~effects["site"].str.contains(_TOGETHER_SITES).astype(bool)


def is_head(effects: pd.DataFrame) -> pd.Series[bool]:
    """Which patches are of one head each: no sets such as `h[0,2]`, and no sums."""
    unit = effects["unit"].astype("string")
    return unit.str.fullmatch(r"h\d+").fillna(False).astype(bool) & is_single(effects)


def choose(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    value: str = "logit_diff",
    heads: bool = False,
) -> pd.DataFrame:
    """The patches of one tower and kind (with `heads` of its heads), of single layers.

    Raises `DataError` where there is none, or no value is a number.
    """
    if value not in VALUES:
        raise DataError(f"no value '{value}' in a table of effects; expected {', '.join(VALUES)}")
    what = "patches of heads" if heads else "patches of whole kinds"
    rows = effects[is_head(effects) if heads else effects["unit"].isna() & is_single(effects)]
    if rows.empty:
        some = ", ".join(effects["site"].unique()[:3]) or "nothing"
        raise DataError(f"the table has no {what} in single layers; it holds {some}")
    corruptions = rows["corruption"].unique()
    if len(corruptions) > 1:
        raise DataError(
            f"the table holds the corruptions {', '.join(corruptions)}, which are not averaged; keep "
            f"one, as in effects[effects['corruption'] == '{corruptions[0]}']"
        )
    for column, name, known in (("tower", tower, TOWERS), ("kind", kind, HEAD_KINDS if heads else KINDS)):
        if column == "tower" and name is None and kind is not None and kind in set(rows["kind"]):
            rows = rows[rows["kind"] == kind]
        held = sorted(rows[column].unique(), key=lambda x: (*known, x).index(x))
        if name is not None and name not in held:
            where = f" of the {tower} tower" if column == "kind" and tower else ""
            raise DataError(
                f"no {what}{where} with {column} '{name}' in the table; it holds {', '.join(held)}"
            )
        rows = rows[rows[column] == (name or held[0])]
    if value not in rows or rows[value].isna().all():
        has_gap = "logit_diff" in rows and rows["logit_diff"].notna().any()
        why = ": the runs differ too little in LD to divide by" if value == "effect" and has_gap else ""
        others = [name for name in VALUES if name in rows and rows[name].notna().any()]
        raise DataError(
            f"'{value}' is null in all rows of {rows['site'].iloc[0]} and its like{why}; "
            f"columns with values: {', '.join(others) or 'none'}"
        )
    return rows


def at_slot(rows: pd.DataFrame, slot: str = "readout") -> tuple[str, pd.DataFrame]:
    """Of the patches of one tower, those at a slot, and what it is called.

    `readout` is where the answer is predicted, in the decoder. In any other tower nothing is read out: there
    it stands for the answer's token, or, where no example has such a slot, for the last token of a text.
    `last` is the read-out position, too, and elsewhere the last token of each example.

    Raises `DataError` where the rows hold no such slot.
    """
    tower, held = str(rows["tower"].iloc[0]), set(rows["slot"])
    wanted = {"readout": ("readout", "answer", "last"), "last": ("readout", "last")}.get(slot, (slot,))
    wanted = wanted[:1] if tower == SPEAKER else wanted
    for name in wanted:
        if name in held:
            return name, rows[rows["slot"] == name]
        if name == "last" and (slot == "last" or tower == "encoder"):
            single = rows[rows["position"].notna()]
            last = single.groupby("example")["position"].transform("max")
            if len(single):
                return name, single[single["position"] == last]
    there = slot_order(rows)
    more = f" and {len(there) - 12} more" if len(there) > 12 else ""
    raise DataError(
        f"nothing was patched at the slot '{slot}' of the {tower} tower; the table holds "
        f"{', '.join(there[:12])}{more}"
    )


def head_slot(rows: pd.DataFrame) -> str:
    """The slot at which the heads of a tower are drawn: that of `at_slot`, or else the one that most
    examples hold, the first of these."""
    try:
        return at_slot(rows)[0]
    except DataError:
        held = rows.groupby("slot")["example"].nunique()
        return max(slot_order(rows), key=lambda slot: int(held[slot]))


def slot_words(slot: str, tower: str) -> str:
    """A slot in words, for captions."""
    if slot == "readout":
        return "the read-out position, where the answer is predicted"
    words = {"answer": "the answer's token", "last": "the last token"}.get(slot, f"the slot {slot}")
    return words if tower == SPEAKER else f"{words} (nothing is read out in this tower)"


# --- slots in order ----------------------------------------------------------------------------


def slot_order(rows: pd.DataFrame) -> list[str]:
    """The slots of patches of one tower, as the columns of a table stand.

    What is counted from the left, and the image, as they stand in the examples; then each role (in the
    order in which they come in most examples) with what follows it; then what is counted from the right,
    the beginning of the answer and `readout`; then patches of several positions at once.
    """
    places = rows[["example", "slot", "position"]].drop_duplicates(["example", "slot"])
    single = places[places["position"].notna()].sort_values(["example", "position"], kind="stable")
    ranks = _role_ranks(single)
    keys: dict[str, tuple[int, ...]] = {}
    before: tuple[int, ...] = ()
    example = None
    for row in single.itertuples(index=False):
        if row.example != example:
            example, before = row.example, (-1,)
        key = _text_key(str(row.slot), ranks)
        if key is None:  # of the image: behind the text that it follows
            key = (*before, *_image_key(str(row.slot)))
        else:
            before = (*key, *(0,) * (3 - len(key)))
            key = before
        keys[row.slot] = min(keys.get(row.slot, key), key)
    together = sorted(set(places["slot"]) - set(keys), key=lambda s: ((*_TOGETHER, s).index(s), s))
    return [*sorted(keys, key=lambda slot: keys[slot]), *together]


def _role_of(slot: str) -> str | None:
    """The role that a slot belongs to, if it does."""
    found = _ROLE.fullmatch(slot)
    is_other = slot == "readout" or slot.startswith("fed[") or slot in _TOGETHER
    return None if found is None or is_other else found["role"]


def is_role(slot: str) -> bool:
    """Whether a slot is a role's own token.

    >>> [is_role(slot) for slot in ("answer", "noun[1]", "noun+1", "-2", "readout", "image[0,1]")]
    [True, True, False, False, False, False]
    """
    return _role_of(slot) is not None and "+" not in slot


def _role_ranks(single: pd.DataFrame) -> dict[str, int]:
    """The roles by their mean place among the roles of an example, and by name where that is the same."""
    rows = single.assign(role=single["slot"].map(_role_of)).dropna(subset=["role"])
    first = rows.groupby(["example", "role"])["position"].min()
    mean = first.groupby(level="example").rank().groupby(level="role").mean()
    return {str(role): n for n, role in enumerate(sorted(mean.index, key=lambda r: (mean[r], r)))}


def _text_key(slot: str, ranks: dict[str, int]) -> tuple[int, ...] | None:
    """Where text stands among the columns; None for what is no text."""
    if slot == "readout":
        return (4,)
    if slot.startswith("fed["):
        return (3, int(slot[4:-1]))
    if slot.lstrip("-").isdigit():
        return (2, int(slot)) if slot.startswith("-") else (0, int(slot))
    role = _role_of(slot)
    if role is None:
        return None
    match = _ROLE.fullmatch(slot)
    assert match is not None
    steps, piece = match["steps"], match["piece"]
    return (1, ranks[role], 100_000 + int(steps) if steps else int(piece or 0))


def _image_key(slot: str) -> tuple[int, ...]:
    cell = _CELL.fullmatch(slot)
    if cell:
        return (1, int(cell[1]), int(cell[2]))
    return (2, int(re.sub(r"\D", "", slot) or 0), 0)


def labels(rows: pd.DataFrame, order: Sequence[str]) -> dict[str, str]:
    """What stands below each column: its slot, and its token where that is the same in all examples."""
    tokens = rows.groupby("slot")["token"].agg(["first", "nunique"])
    found = {}
    for slot in order:
        token, many = tokens.loc[slot, "first"], tokens.loc[slot, "nunique"]
        is_plain = slot.startswith("image") or many != 1
        found[slot] = slot if is_plain else f"{slot} {token}"
    return found


def mean_gap(rows: pd.DataFrame) -> float | None:
    """The size of the mean LD(clean) − LD(corrupt) of the rows' examples, read off `effect`; null where that
    is not known, as `effect` is of another metric."""
    rows = rows[rows["logit_diff"].notna() & rows["effect"].notna()]
    effect, ld, of = rows["effect"].astype(float), rows["logit_diff"].astype(float), rows["example"]
    sums = pd.DataFrame({"up": ld * effect, "down": effect**2}).groupby(of).sum()
    gaps = (sums["up"] / sums["down"])[sums["down"] > 0]  # as both are zero in a row without effect
    if gaps.empty or (ld - effect * of.map(gaps)).abs().max() > 0.01 * max(1.0, ld.abs().max()):
        return None
    return abs(float(gaps.mean()))

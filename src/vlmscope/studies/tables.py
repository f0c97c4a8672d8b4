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
from vlmscope.stats import interval, p_values, q_values

VALUES = ("logit_diff", "effect", "p_restored", "p_patched", "ld_change", "p_change", "value", "score")
"""The columns of `effects`, and of `attributions`, that can be averaged."""
TOWERS = ("encoder", "decoder", "qformer", "vision")
KINDS = ("resid", "resid_pre", "resid_mid", "mlp", "attn", "cross", "deepstack", "output")
COMPARED = "site slot n n_other mean mean_other difference low high p_value".split()
HEAD_KINDS = ("cross", "attn")
"""What is taken where a table holds several and none is named: the first of these that it has."""

_SLOT = re.compile(
    r"(?P<left>\d+)|(?P<right>-\d+)|fed\[(?P<fed>\d+)\]|readout|all|text|image|"
    r"(?P<role>[A-Za-z_]\w*)(\[(?P<piece>\d+)\]|\+(?P<steps>\d+))?"
)
"""All slots but the image's, by what decides where they stand."""


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
    return wide(cells_of(effects, tower=tower, kind=kind, value=value))


def head_table(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    slot: str = "readout",
    value: str = "logit_diff",
) -> pd.DataFrame:
    """Mean `value` by layer (rows) and head (columns) at one slot; as `token_table`, with `HEAD_KINDS`.

    `readout` is the position whose prediction is scored; in a tower where nothing is read out (BLIP's
    question encoder) it stands for the answer's token, and where no example has one for the last
    (`at_slot`). `attrs` have the `slot` that is shown instead of labels and roles.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> effects = vlmscope.sweep(model, vlmscope.examples("states", limit=2), "encoder.*.cross.h*@answer")
    >>> table = head_table(effects)
    >>> table.shape, table.attrs["slot"], table.attrs["n"][0]
    ((3, 4), 'answer', 2)
    """
    return wide(cells_of(effects, tower=tower, kind=kind, slot=slot, value=value))


def cells_of(
    effects: pd.DataFrame,
    *,
    tower: str | None = None,
    kind: str | None = None,
    slot: str | None = None,
    value: str = "logit_diff",
    intervals: bool = False,
) -> pd.DataFrame:
    """The cells of `token_table`, or of `head_table` where a `slot` is named, a row each: `tower`, `kind`,
    `layer`, `slot` (and `head`), `mean`, `sd`, `n`.

    With `intervals` also `low` and `high`, the 95 % interval of the mean over examples.
    """
    rows = choose(effects, tower, kind, value, heads=slot is not None)
    words, column = {"tower": rows["tower"].iloc[0], "kind": rows["kind"].iloc[0]}, "slot"
    if slot is not None:
        words["slot"], rows = at_slot(rows, slot)
        rows, column = rows.assign(head=rows["unit"].str.slice(1).astype(int)), "head"
    held = rows[rows[value].notna()].groupby(column)["example"].nunique().to_dict()
    order: list[Any] = list(range(int(rows["head"].max()) + 1)) if slot is not None else slot_order(rows)
    if slot is None:
        order = [name for name in order if name in held]
    place = {name: number for number, name in enumerate(order)}
    found = means(rows, ["layer", column], value, intervals=intervals)
    found = found.sort_values(
        ["layer", column], key=lambda c: c.map(place) if c.name == column else c, ignore_index=True
    )
    for number, name in enumerate(words):
        found.insert(number, name, words[name])
    found.attrs = {
        **words,
        "column": column,
        "order": order,
        "n": {name: held.get(name, 0) for name in order},
        "examples": int(rows["example"].nunique()),
        "value": value,
        "gap": mean_gap(rows),
    }
    if slot is None:
        tokens = rows.groupby("slot")["token"].agg(["first", "nunique"])
        one = tokens["first"].where((tokens["nunique"] == 1) & ~tokens.index.str.startswith("image"))
        labels = {name: name if pd.isna(one[name]) else f"{name} {one[name]}" for name in order}
        found.attrs |= {"labels": labels, "roles": [name for name in order if is_role(name)]}
    return found


def wide(cells: pd.DataFrame) -> pd.DataFrame:
    """Layers × slots, or layers × heads, of what `cells_of` gave."""
    attrs = dict(cells.attrs)
    column, order = attrs.pop("column"), attrs.pop("order")
    layers = pd.RangeIndex(cells["layer"].min(), cells["layer"].max() + 1, name="layer")
    table = cells.pivot(index="layer", columns=column, values="mean").reindex(index=layers, columns=order)
    table.columns.name, table.attrs = column, attrs
    return table


def flow_table(effects: pd.DataFrame, *, value: str = "p_change") -> pd.DataFrame:
    """Mean `value` of knock-outs by edge and layer: the flow of information from sources to a position.

    A row is a layer (the middle one of a window) of an edge. Columns: `edge` (such as `last<image`), `tower`,
    `kind`, `unit`, `window`, `layer`, `mean`, `sd`, `n` examples, and the 95 % interval `low`, `high`, null
    below 10 examples. Sums `A + B` are left out.

    Raises `DataError` where the table has no edges, or no such value.

    >>> import vlmscope
    >>> model, examples = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=2)
    >>> flow = flow_table(vlmscope.knockout(model, examples, "decoder.*/3.attn@last<image"))
    >>> [flow[column].tolist()[0] for column in ("edge", "window", "layer", "n")]
    ['last<image', 3, 0, 2]
    """
    rows = effects[is_edge(effects)]
    if rows.empty:
        some = ", ".join(effects["site"].unique()[:3]) or "nothing"
        raise DataError(f"the table has no edges of attention; it holds {some}")
    if value not in VALUES or rows[value].isna().all():
        held = ", ".join(name for name in VALUES if name in rows and rows[name].notna().any())
        raise DataError(f"no values '{value}' of edges in the table; it has {held or 'none'}")
    place, _, edge = rows["site"].str.partition("@").T.to_numpy()
    windows = pd.Series(place, index=rows.index).str.extract(r"/(\d+)", expand=False).fillna("1").astype(int)
    rows = rows.assign(edge=edge, window=windows, unit=rows["unit"].astype(object).fillna(""))
    keys = ["edge", "tower", "kind", "unit", "window", "layer"]
    return means(rows, keys, value, intervals=True)


def means(
    rows: pd.DataFrame, keys: Sequence[str], value: str = "logit_diff", *, intervals: bool = False
) -> pd.DataFrame:
    """Of any rows with an `example`: the mean of `value` by `keys`, within an example first, then over
    examples. Columns: the keys (not null), `mean`, `sd` and `n`, over examples whose value is not null.

    With `intervals` also `low` and `high`: `stats.interval`, null below 10 examples.

    >>> rows = pd.DataFrame({"example": ["a", "a", "b"], "layer": [0, 0, 0], "logit_diff": [1.0, 3.0, 6.0]})
    >>> means(rows, ["layer"])[["mean", "n"]].to_dict("records")
    [{'mean': 4.0, 'n': 2}]
    """
    each = by_example(rows, keys, value)
    found = each.groupby(level=list(keys), sort=False).agg(mean="mean", sd="std", n="count")
    if intervals:
        found[["low", "high"]] = _intervals(each).reindex(found.index)
    return found.reset_index()


def by_example(rows: pd.DataFrame, keys: Sequence[str], value: str = "logit_diff") -> pd.Series[float]:
    """The mean of `value` within each example, by `keys` and `example`; nulls left out."""
    each = rows.groupby([*keys, "example"], sort=False, observed=True)[value].mean()
    return each.astype(float).dropna()


def _intervals(each: pd.Series[float]) -> pd.DataFrame:
    """Of all cells that hold the same examples at once."""
    table = each.unstack("example").sort_index(axis=1)
    scores, ends = table.to_numpy(dtype=float), np.full((len(table), 2), np.nan)
    sets, of = np.unique(table.notna(), axis=0, return_inverse=True)
    for number, held in enumerate(sets):
        cells = np.flatnonzero(of.reshape(-1) == number)
        ends[cells] = interval(scores[np.ix_(cells, held)].T).T
    return pd.DataFrame(ends, index=table.index, columns=["low", "high"])


def compare(
    one: pd.DataFrame, other: pd.DataFrame, *, value: str = "logit_diff", paired: bool = True
) -> pd.DataFrame:
    """Two tables of effects, site by site: the mean `value` of each, and the difference of the two.

    The same examples are compared, each with itself: two models, corruptions or ways to patch. With `paired`
    false the examples of the two are others, whatever their ids: two sets of data. Rows are the sites that
    both tables hold, in the order of the first. Columns: `site` (up to its @) and `slot`; `n` and `n_other`
    examples; `mean`, `mean_other`; `difference`, `mean` − `mean_other`, with its 95 % interval `low`, `high`
    (`stats.interval`); `p_value`, that it is zero; `q_value`, after Benjamini-Hochberg over the sites. Below
    10 examples there is neither interval nor test.

    Raises `DataError` if a table lacks the value or holds several corruptions, or if nothing is in both.

    >>> import vlmscope
    >>> model, given = vlmscope.load("toy-blip"), vlmscope.examples("states", limit=12)
    >>> site = "encoder.*.cross@answer"
    >>> image, noise = (vlmscope.sweep(model, given, site, corrupt) for corrupt in ("image", "noise"))
    >>> compare(image, noise)[["site", "slot", "n"]].head(1).to_dict("records")
    [{'site': 'encoder.0.cross', 'slot': 'answer', 'n': 12}]
    """
    first, second = (_by_site(table, value) for table in (one, other))
    rows = []
    for key, mine in first.items():
        theirs = second.get(key, mine.head(0))
        if paired:
            mine, theirs = mine.align(theirs, join="inner")
        if not (len(mine) and len(theirs)):
            continue
        scores = mine.to_numpy()[:, None], theirs.to_numpy()[:, None]
        given = (scores[0] - scores[1], None) if paired else scores
        (low,), (high,) = interval(*given)
        means = mine.mean(), theirs.mean()
        rows.append((*key, len(mine), len(theirs), *means, means[0] - means[1], low, high, *p_values(*given)))
    if not rows:
        way = "; paired=False compares others" if paired and first.keys() & second.keys() else ""
        raise DataError(f"the two tables have no site of the same examples in common{way}")
    found = pd.DataFrame(rows, columns=COMPARED)
    return found.assign(q_value=q_values(found["p_value"]))


def _by_site(effects: pd.DataFrame, value: str) -> dict[tuple[str, str], pd.Series[float]]:
    """The value of each example, by site (up to its @; sums and edges whole) and slot."""
    if value not in VALUES or value not in effects or effects[value].isna().all():
        held = [name for name in VALUES if name in effects and effects[name].notna().any()]
        raise DataError(f"no values '{value}' in a table of effects; it has {', '.join(held) or 'none'}")
    if len(corruptions := effects["corruption"].unique()) > 1:
        raise DataError(f"a table holds the corruptions {', '.join(corruptions)}; compare one with one")
    is_whole = effects["site"].str.contains(r" \+ |<")  # sums, and edges, which have a source
    place = effects["site"].where(is_whole, effects["site"].str.partition("@")[0])
    if "source_site" in effects:
        place = place + " from " + effects["source_site"]
    each = by_example(effects.assign(place=place), ["place", "slot"], value)
    return {key: rows.droplevel([0, 1]) for key, rows in each.groupby(level=[0, 1], sort=False)}


def change_of(effects: pd.DataFrame) -> str:
    """The column that patches are ranked and drawn by: how far each moves the answer, against the run that
    was patched. That is `ld_change`, or `p_change` where there is no logit difference (`--metric logprob`).
    """
    known = ("ld_change", "logit_diff", "p_change")
    return next((name for name in known if name in effects and effects[name].notna().any()), "logit_diff")


def is_single(effects: pd.DataFrame) -> pd.Series[bool]:
    """Which patches are of one layer: no windows `/`, no sums `A + B`, and no edges `A<B`."""
    return ~effects["site"].str.contains(r"/| \+ |<").astype(bool)


def is_edge(effects: pd.DataFrame) -> pd.Series[bool]:
    """Which rows are knock-outs of single edges `A<B`, of any number of layers."""
    site = effects["site"]
    return site.str.contains("<", regex=False) & ~site.str.contains(" + ", regex=False)


def is_head(effects: pd.DataFrame) -> pd.Series[bool]:
    """Which patches are of one head each: no sets such as `h[0,2]`, and no sums."""
    unit = effects["unit"].astype("string")
    return unit.str.fullmatch(r"h\d+").fillna(False).astype(bool) & is_single(effects)


def choose(
    effects: pd.DataFrame, tower: str | None, kind: str | None, value: str, heads: bool = False
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
    sources = rows["source_site"].str.partition("@")[0].unique().tolist() if "source_site" in rows else []
    if len(sources) > 1:
        raise DataError(
            f"the table holds values from {len(sources)} places, which are not averaged; keep one, as in "
            f"effects[effects['source_site'].str.startswith('{sources[0]}@')]"
        )
    if tower is None and kind in rows["kind"].unique():
        rows = rows[rows["kind"] == kind]
    for column, name, known in (("tower", tower, TOWERS), ("kind", kind, HEAD_KINDS if heads else KINDS)):
        held = sorted(rows[column].unique(), key=lambda x: (*known, x).index(x))
        if name is not None and name not in held:
            where = f" of the {tower} tower" if column == "kind" and tower else ""
            raise DataError(
                f"no {what}{where} with {column} '{name}' in the table; it holds {', '.join(held)}"
            )
        rows = rows[rows[column] == (name or held[0])]
    others = [name for name in VALUES if name in rows and rows[name].notna().any()]
    if value not in others:
        why = ": the runs differ too little in LD to divide by"
        raise DataError(
            f"'{value}' is null in all rows of {rows['site'].iloc[0]} and its like"
            f"{why if value == 'effect' and 'logit_diff' in others else ''}; "
            f"columns with values: {', '.join(others) or 'none'}"
        )
    return rows


def at_slot(rows: pd.DataFrame, slot: str = "readout") -> tuple[str, pd.DataFrame]:
    """Of the patches of one tower, those at a slot, and what it is called.

    `readout` is where the answer is predicted, in the decoder. In any other tower nothing is read out: there
    it stands for the answer's token, or, where no example has such a slot, for the last token of a text.
    `last` is the read-out position, too, and elsewhere the last token of a text, the slot `-1`: not the last
    that happens to be patched.

    Raises `DataError` where the rows hold no such slot.
    """
    tower, held = str(rows["tower"].iloc[0]), rows["slot"].unique()
    wanted = {"readout": ("readout", "answer", "last"), "last": ("readout", "last")}.get(slot, (slot,))
    for name in wanted[:1] if tower == "decoder" else wanted:
        at = "-1" if name == "last" else name
        if at in held:
            return name, rows[rows["slot"] == at]
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
        return str(rows.groupby("slot")["example"].nunique()[slot_order(rows)].idxmax())


def slot_words(slot: str, tower: str) -> str:
    """A slot in words, for captions."""
    if slot == "readout":
        return "the read-out position, where the answer is predicted"
    words = {"answer": "the answer's token", "last": "the last token"}.get(slot, f"the slot {slot}")
    return words if tower == "decoder" else f"{words} (nothing is read out in this tower)"


def slot_order(rows: pd.DataFrame) -> list[str]:
    """The slots of patches of one tower, as the columns of a table stand.

    What is counted from the left, and the image, as they stand in the examples; then each role (in the
    order in which they come in most examples) with what follows it; then what is counted from the right,
    the beginning of the answer and `readout`; then patches of several positions at once.
    """
    places = rows[["example", "slot", "position"]].drop_duplicates(["example", "slot"])
    single = places[places["position"].notna()].sort_values(["example", "position"], kind="stable")
    first = single.assign(role=single["slot"].map(_role_of)).dropna(subset=["role"])
    first = first.groupby(["example", "role"])["position"].min().groupby(level="example").rank()
    mean = first.groupby(level="role").mean()
    ranks = {role: n for n, role in enumerate(sorted(mean.index, key=lambda role: (mean[role], role)))}
    keys: dict[str, tuple[int, ...]] = {}
    for _, slots in single.groupby("example", sort=False)["slot"]:
        before: tuple[int, ...] = (-1,)
        for slot in slots:
            key = _text_key(slot, ranks)
            if key is None:  # the image is behind the text that it follows: its grid, then its other tokens
                numbers = [int(number) for number in re.findall(r"\d+", slot)]
                key = (*before, 3 - len(numbers), *numbers)
            else:
                before = key
            keys[slot] = min(keys.get(slot, key), key)
    together = ("all", "text", "image")
    others = set(places["slot"].unique()) - set(keys)
    last = sorted(others, key=lambda slot: ((*together, slot).index(slot), slot))
    return [*sorted(keys, key=lambda slot: keys[slot]), *last]


def _text_key(slot: str, ranks: dict[str, int]) -> tuple[int, ...] | None:
    """Where text stands among the columns; None for what is no text."""
    found = _SLOT.fullmatch(slot)
    if found is None:
        return None
    if found["role"]:
        steps, piece = found["steps"], found["piece"]
        return (1, ranks[found["role"]], 100_000 + int(steps) if steps else int(piece or 0))
    for rank, name in ((0, "left"), (2, "right"), (3, "fed")):
        if found[name]:
            return (rank, int(found[name]))
    return (4,)


def _role_of(slot: str) -> str | None:
    found = _SLOT.fullmatch(slot)
    return found and found["role"]


def is_role(slot: str) -> bool:
    """Whether a slot is a role's own token.

    >>> [is_role(slot) for slot in ("answer", "noun[1]", "noun+1", "-2", "readout", "image[0,1]")]
    [True, True, False, False, False, False]
    """
    return _role_of(slot) is not None and "+" not in slot


def mean_gap(rows: pd.DataFrame) -> float | None:
    """The size of the mean LD(clean) − LD(corrupt) of the rows' examples, read off `effect`; null where that
    is not known, as `effect` is of another metric."""
    if "effect" not in rows:
        return None
    rows = rows[rows["logit_diff"].notna() & rows["effect"].notna()]
    effect, ld, of = rows["effect"].astype(float), rows["logit_diff"].astype(float), rows["example"]
    sums = pd.DataFrame({"up": ld * effect, "down": effect**2}).groupby(of).sum()
    gaps = (sums["up"] / sums["down"])[sums["down"] > 0]  # as both are zero in a row without effect
    if gaps.empty or (ld - effect * of.map(gaps)).abs().max() > 0.01 * max(1.0, ld.abs().max()):
        return None
    return abs(float(gaps.mean()))

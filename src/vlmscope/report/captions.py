"""Words and numbers of captions: each is computed from the rows that its figure shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from vlmscope.stats import FEWEST
from vlmscope.studies.tables import slot_words

KINDS = {
    "resid": "residual stream after each block",
    "resid_pre": "residual stream before each block",
    "attn": "self-attention",
    "cross": "cross-attention",
    "mlp": "MLP",
    "deepstack": "features added behind each block (DeepStack)",
    "output": "the tower's output",
}
TOWERS = {"vision": "vision tower", "qformer": "Q-Former", "encoder": "text encoder", "decoder": "decoder"}


def kinds_in(rows: pd.DataFrame) -> list[str]:
    """The kinds of sites in a table, in the order in which they are shown."""
    held = set(rows["kind"])
    return [kind for kind in KINDS if kind in held]


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def short_number(number: float) -> str:
    """A signed number of three figures, with a true minus.

    >>> short_number(-0.01234), short_number(12.345), short_number(0.0)
    ('−0.0123', '+12.3', '0')
    """
    if number == 0.0:
        return "0"
    decimals = min(6, max(0, 2 - int(np.floor(np.log10(abs(number))))))
    text = f"{number:+.{decimals}f}" if abs(number) >= 1e-4 else f"{number:+.1e}"
    return text.replace("-", "−")


def percent(number: float) -> str:
    return f"{number:.1%}"


def digits(value: object) -> str:
    """A cell of a table of the page: three digits of a float, nothing for a null.

    >>> digits(0.123456), digits(12), digits(float("nan"))
    ('0.123', '12', '')
    """
    if pd.isna(value):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ends(low: float, high: float, number: object = short_number) -> str:
    """`low to high`, or nothing where there is no interval (of one example)."""
    return "" if pd.isna(low) else f"{number(low)} to {number(high)}"  # type: ignore[operator]


def interval(low: float, high: float, number: object = short_number) -> str:
    """An interval behind its mean."""
    text = ends(low, high, number)
    return f" (95 % interval {text})" if text else ""


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "example"), plural(12, "example")
    ('1 example', '12 examples')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def over_examples(cells: pd.DataFrame) -> str:
    """Over how many examples the means of a figure are."""
    fewest, most = int(cells["n"].min()), int(cells["n"].max())
    hardly = f" (fewer than {FEWEST} can hardly show anything)" if most < FEWEST else ""
    fewer = f", down to {fewest} where the figure says so" if fewest < most else ""
    return f"Means over {plural(most, 'example')}{fewer}{hardly}."


def by_size(table: pd.DataFrame, sizes: pd.Series[float], most: pd.Series[int] | float) -> pd.DataFrame:
    """The largest first; what fewer than half of the examples (`most` in all) hold comes behind all others."""
    order = pd.DataFrame({"few": table["n"] < most / 2, "size": -sizes})
    return table.loc[order.sort_values(["few", "size"], kind="stable").index]


def long(panels: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The cells of all panels of a figure as one table, with the panel's title."""
    return pd.concat([cells.assign(panel=title) for title, cells in panels.items()], ignore_index=True)


def largest_change(cells: Mapping[str, pd.DataFrame], full_colour: float) -> str:
    """What a figure of panels shows, in numbers that are those of its cells."""
    table = long(cells)
    most = table.groupby("panel")["n"].transform("max")
    best = by_size(table, table["mean"].abs(), most).iloc[0]
    held = " that at least half of the examples hold" if (table["n"] < most / 2).any() else ""
    column = "head" if "head" in table else "slot"
    where = ""
    if column == "head":
        slot = "position" if "position" in table else "slot"
        where = f" Heads are shown at {_slots(zip(table[slot], table['tower'], strict=True))}."
    return (
        f"The largest mean change of LD{held} is {short_number(best['mean'])}"
        f"{interval(best['low'], best['high'])}, at layer {best['layer']}, {column} {best[column]} "
        f"({best['panel'][:1].lower() + best['panel'][1:]}).{where} {over_examples(table)} One colour scale for "
        f"all panels, and this figure's own: full colour is {full_colour:.3g} logits. Red moves the model towards "
        "the answer, blue towards the foil."
    )


def _slots(places: Iterable[tuple[str, str]]) -> str:
    return "; ".join(dict.fromkeys(slot_words(slot, tower) for slot, tower in dict.fromkeys(places)))

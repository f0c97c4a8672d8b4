"""Words and numbers, as figures and the page show them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

KINDS = {
    "resid": "residual stream after each block",
    "resid_pre": "residual stream before each block",
    "attn": "self-attention",
    "cross": "cross-attention",
    "resid_mid": "residual stream between attention and MLP",
    "mlp": "MLP",
    "deepstack": "features added behind each block (DeepStack)",
    "output": "the tower's output",
}
TOWERS = {"vision": "vision tower", "qformer": "Q-Former", "encoder": "text encoder", "decoder": "decoder"}


def kinds_in(rows: pd.DataFrame) -> list[str]:
    """The kinds of sites in a table, in the order in which they are shown."""
    held = rows["kind"].unique()
    return [kind for kind in KINDS if kind in held]


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """
    >>> lower_first("Residual stream"), lower_first("MLP"), lower_first("Q-Former")
    ('residual stream', 'MLP', 'Q-Former')
    """
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def short_number(number: float) -> str:
    """A signed number of three figures, with a true minus.

    >>> short_number(-0.01234), short_number(12.345), short_number(0.0)
    ('−0.0123', '+12.3', '0')
    """
    if number == 0.0 or not np.isfinite(number):
        return f"{number:.0f}"
    decimals = min(6, max(0, 2 - int(np.floor(np.log10(abs(number))))))
    text = f"{number:+.{decimals}f}" if abs(number) >= 1e-4 else f"{number:+.1e}"
    return text.replace("-", "−")


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "example"), plural(12, "example")
    ('1 example', '12 examples')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def percent(number: float) -> str:
    """
    >>> percent(0.0712), percent(-0.25), percent(-1e-5)
    ('7.1%', '−25.0%', '0.0%')
    """
    return f"{number:z.1%}".replace("-", "−")


def digits(value: object) -> str:
    """A cell of a table: three digits of a float, nothing for a null.

    >>> digits(0.123456), digits(12), digits(float("nan"))
    ('0.123', '12', '')
    """
    return "" if pd.isna(value) else f"{value:.3g}" if isinstance(value, float) else str(value)


def ends(low: float, high: float, number: Callable[[float], str] = short_number) -> str:
    """`low to high`, or nothing where there is no interval (of one example)."""
    return "" if pd.isna(low) else f"{number(low)} to {number(high)}"

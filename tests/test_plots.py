"""Tables and figures of effects."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vlmscope import plots
from vlmscope.store import EFFECTS, typed

TOKENS = ["[CLS]", "is", "red", "or", "blue", "[SEP]"]
ROLES = {2: "answer", 4: "foil"}


def rows(examples: int = 2, tokens: list[str] | None = None, layers: int = 3) -> pd.DataFrame:
    """Heads and residual streams of an encoder; the effect says where it is."""
    tokens = tokens or TOKENS
    found = []
    for n in range(examples):
        for layer in range(layers):
            for position, token in enumerate(tokens):
                for unit in (None, "h0", "h1"):
                    kind = "resid" if unit is None else "cross"
                    value = layer + position / 10 + (100 if unit == "h1" and position == 2 else 0)
                    suffix = f".{unit}" if unit else ""
                    found.append(
                        {
                            "example": f"e{n}",
                            "corruption": "image",
                            "site": f"encoder.{layer}.{kind}{suffix}@{position}",
                            "tower": "encoder",
                            "layer": layer,
                            "kind": kind,
                            "unit": unit,
                            "position": position,
                            "token": token,
                            "role": ROLES.get(position),
                            "slot": ROLES.get(position, str(position)),
                            "p_patched": 0.5,
                            "p_restored": 0.1,
                            "logit_diff": value + n,
                            "effect": None,
                        }
                    )
    return typed(pd.DataFrame(found, columns=EFFECTS.names), EFFECTS)


def test_the_token_table_is_the_mean_over_examples():
    table = plots.token_table(rows())
    assert list(table.index) == [0, 1, 2]
    assert table.columns[2] == "2 red (answer)"
    assert table.loc[1, "2 red (answer)"] == pytest.approx(1.2 + 0.5)
    assert "4 blue (foil)" in table.attrs["roles"]


def test_examples_of_other_words_meet_by_role():
    other = rows(1, ["[CLS]", "was", "green", "or", "pink", "[SEP]"]).assign(example="other")
    table = plots.token_table(pd.concat([rows(1), other], ignore_index=True))
    assert {"answer", "foil", "[CLS]", "or", "[SEP]", plots.OTHER} == set(table.columns)


def test_the_head_table_takes_the_strongest_place():
    table = plots.head_table(rows())
    assert table.attrs["place"] == "2 red (answer)"
    assert table.loc[0, 1] == pytest.approx(100.2 + 0.5)
    at_foil = plots.head_table(rows(), role="foil")
    assert at_foil.loc[2, 0] == pytest.approx(2.4 + 0.5)


def test_strongest_names_sites_that_can_be_swept_again():
    table = plots.strongest(rows(), n=3)
    assert table["site"].tolist() == [
        "encoder.2.cross.h1@answer",
        "encoder.1.cross.h1@answer",
        "encoder.0.cross.h1@answer",
    ]
    assert table["mean"][0] == pytest.approx(102.2 + 0.5)
    assert table["sd"][0] == pytest.approx(np.std([0, 1], ddof=1))
    assert table["n"].tolist() == [2, 2, 2]


def test_panels_share_one_scale_that_is_centred():
    tables = {"weak": plots.token_table(rows()), "strong": plots.head_table(rows())}
    figure = plots.panels(tables)
    scales = {
        mesh.get_clim()
        for axes in figure.axes
        for mesh in axes.collections
        if mesh.get_array() is not None
    }
    (limits,) = {s for s in scales if s[0] < 0}
    assert limits[0] == -limits[1]
    assert limits[1] == pytest.approx(102.2 + 0.5)


@pytest.mark.parametrize("value", ["logit_diff", "effect", "p_restored", "p_patched"])
def test_figures_of_every_value(value):
    assert isinstance(plots.layer_by_token(rows(), value=value), Figure)
    assert isinstance(plots.layer_by_head(rows(), value=value), Figure)


def test_odd_tables_do_not_break(tmp_path):
    odd = {
        "empty": rows().head(0),
        "one row": rows().query("unit == 'h0'").head(1),
        "all zero": rows().assign(logit_diff=0.0),
        "nothing known": rows().assign(logit_diff=np.nan),
        "long tokens": rows(1, ["$x_{1}$" * 20, "<b>", "\n", "漢字", "é" * 60, "ok"]),
        "many tokens": rows(1, [f"w{n}" for n in range(600)], layers=2),
    }
    for name, table in odd.items():
        for number, figure in enumerate((plots.layer_by_token(table), plots.layer_by_head(table))):
            figure.savefig(tmp_path / f"{name}-{number}.png")
        plots.strongest(table)


def test_the_image_grid():
    cells = rows(1, ["[CLS]", *(f"{r},{c}" for r in range(2) for c in range(3))])
    cells = cells[cells["unit"].isna()].assign(tower="vision", kind="resid")
    figure = plots.image_grid(cells, Image.new("RGB", (30, 20)), (2, 3))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:5] == ["picture", "mean of 3 layers", "layer 0", "layer 1", "layer 2"]


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match="no value 'loudness'"):
        plots.token_table(rows(), value="loudness")

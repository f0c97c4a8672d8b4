"""Tables and figures of effects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vlmscope.errors import DataError
from vlmscope.report import figures
from vlmscope.report.directions import by_layer
from vlmscope.report.heat_maps import FLOOR, full_colour
from vlmscope.report.image_maps import attention, image_grid, neuron_maps
from vlmscope.report.ranking import strongest
from vlmscope.studies.run_folder import EFFECTS, typed
from vlmscope.studies.tables import VALUES, cells_of, head_table, token_table

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


def labels(axes):
    return [tick.get_text() for tick in axes.get_xticklabels()]


def test_labels_say_the_token_where_it_is_the_same():
    other = rows(1, ["[CLS]", "was", "green", "or", "pink", "[SEP]"]).assign(example="other")
    axes = figures.layer_by_token(pd.concat([rows(1), other], ignore_index=True), tower="encoder")
    assert labels(axes) == ["0 [CLS]", "1", "3 or", "5 [SEP]", "answer", "foil"]
    bold = [tick.get_text() for tick in axes.get_xticklabels() if tick.get_fontweight() == "bold"]
    assert bold == ["answer", "foil"]


def test_labels_say_how_many_where_a_column_holds_fewer():
    short = rows(2)
    axes = figures.layer_by_token(short[(short["example"] == "e0") | (short["slot"] != "3")])
    assert labels(axes)[2] == "3 or  n=1" and "n=" not in labels(axes)[0]


def test_strongest_names_sites_that_can_be_swept_again():
    table = strongest(rows(), n=3)
    assert table["site"].tolist() == [
        "encoder.2.cross.h1@answer",
        "encoder.1.cross.h1@answer",
        "encoder.0.cross.h1@answer",
    ]
    assert table["mean"][0] == pytest.approx(102.2 + 0.5)
    assert table["sd"][0] == pytest.approx(np.std([0, 1], ddof=1))
    assert table["n"].tolist() == [2, 2, 2]


def limits_of(axes):
    """The ends of the colour scales of a figure, below zero and above."""
    meshes = [mesh for axes in np.ravel(axes)[0].figure.axes for mesh in axes.collections]
    found = {mesh.get_clim() for mesh in meshes if mesh.get_array() is not None}
    (limits,) = {limits for limits in found if limits[0] < 0}
    return limits


def test_panels_share_one_scale_that_is_centred():
    tables = {"weak": token_table(rows()), "strong": head_table(rows())}
    low, high = limits_of(figures.panels(tables))
    assert low == -high and high == pytest.approx(102.2 + 0.5)
    assert full_colour(tables.values()) == high


def test_next_to_nothing_has_next_to_no_color():
    """The scale does not end below a tenth of the run's gap, nor below what is nothing in any run."""
    weak = rows().assign(logit_diff=0.004, effect=0.004 / 8.0)
    assert limits_of(figures.layer_by_token(weak))[1] == pytest.approx(0.8)
    assert limits_of(figures.layer_by_head(weak))[1] == pytest.approx(0.8)
    assert limits_of(figures.panels({"a": token_table(weak)}, gap=20.0))[1] == pytest.approx(2.0)
    assert limits_of(figures.layer_by_token(rows().assign(logit_diff=0.004)))[1] == 0.05
    assert limits_of(figures.layer_by_token(weak, value="effect"))[1] == FLOOR


def test_titles_do_not_overlap():
    table = token_table(rows())
    titles = {f"{n} a long name of a data set, image corrupted, at the read-out": table for n in range(4)}
    panels = figures.panels(titles)
    panels[0].figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in panels]
    assert len(boxes) == 4
    for n, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[n + 1 :])


def patches() -> pd.DataFrame:
    """Patches of an image of two rows of three, in a vision tower of three layers."""
    cells = rows(1, ["[CLS]", *(f"{r},{c}" for r in range(2) for c in range(3))])
    return cells[cells["unit"].isna()].assign(tower="vision", kind="resid")


def drawn(ax=None) -> dict[str, Callable[[], Axes]]:
    """Each figure that stands in one pair of axes."""
    picture = Image.new("RGB", (30, 20))
    found = cells_of(rows(), slot="readout").rename(columns={"slot": "position"})
    found = found.assign(run="states-image", important=found["mean"] > 50, confirmed=True)
    cells = [{"example": "e0", "row": r, "column": c} for r in range(2) for c in range(3)]
    maps = pd.DataFrame(cells).assign(neuron="L3.N2", activation=range(6), mask=[False, True] * 3)
    looks = pd.DataFrame(cells).assign(site="encoder.0.cross.h1@answer", rows=2, columns=3, object=1.0)
    return {
        "layer_by_token": lambda: figures.layer_by_token(rows(), ax=ax),
        "layer_by_head": lambda: figures.layer_by_head(rows(), ax=ax),
        "universal": lambda: figures.universal(found, ax=ax),
        "none is universal": lambda: figures.universal(found.assign(important=False), ax=ax),
        "restored": lambda: figures.panels({"restored": token_table(rows())}, value="restored", ax=ax)[0],
        "image_grid": lambda: image_grid(patches(), picture, (2, 3), ax=ax),
        "attention": lambda: attention(looks.assign(difference=0.1), {"e0": picture}, patches(), ax=ax),
        "neuron_maps": lambda: neuron_maps(maps, {"e0": picture}, ax=ax),
    }


@pytest.mark.parametrize("name", drawn())
def test_figures_draw_into_the_axes_that_are_given(name):
    left, right = Figure(layout="constrained").subplots(1, 2)
    assert drawn(left)[name]() is left
    assert left.has_data() or left.texts
    assert not right.has_data()
    left.figure.draw_without_rendering()


@pytest.mark.parametrize("name", drawn())
def test_no_text_is_cut_off(name):
    axes = drawn()[name]()
    axes.figure.draw_without_rendering()
    shown = [text for text in axes.figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert shown
    for text in shown:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= axes.figure.bbox.x1 + 1, text.get_text()
        assert box.y0 >= -1 and box.y1 <= axes.figure.bbox.y1 + 1, text.get_text()


@pytest.mark.parametrize("name", ["layer_by_token", "layer_by_head", "universal"])
def test_below_the_last_text_nothing_is_blank(name):
    figure = drawn()[name]().figure
    figure.draw_without_rendering()
    assert 0 <= figure.get_tightbbox().y0 < 0.25, "inches"


def test_universal_heads_say_which_runs_hold_fewer_examples():
    found = cells_of(rows(), slot="readout").rename(columns={"slot": "position"}).assign(important=True)
    runs = [found.assign(run=name, n=n, confirmed=False) for name, n in (("states", 15), ("faces", 16))]
    assert labels(figures.universal(pd.concat(runs))) == ["states  n=15", "faces"]


def test_names_of_columns_stand_upright_where_they_fit():
    def angles(table):
        return {label.get_rotation() for label in figures.layer_by_token(table).get_xticklabels()}

    assert angles(rows(1, ["[DEC]"])) == {0.0} and angles(rows()) == {45.0}


def test_the_strongest_cells_that_are_not_white_are_outlined():
    weak = {"h0": 0.004, "h1": 0.1}
    table = rows().assign(logit_diff=0.0)
    at = (table["role"] == "answer") & table["unit"].isin(list(weak))
    table.loc[at, "logit_diff"] = table["unit"].map(weak) * (1 + (table["layer"] == 2))
    axes = figures.layer_by_head(table, slot="answer")
    edged = [patch for patch in axes.patches if patch.get_linewidth() == 1.4]
    assert sorted(patch.get_xy() for patch in edged) == [(1, 0), (1, 1), (1, 2)]
    table.loc[at, "logit_diff"] = 0.001
    assert not figures.layer_by_head(table, slot="answer").texts, "nothing is told of what is white"


@pytest.mark.parametrize("many", [1, 3])
def test_lines_over_layers_have_whole_layers_and_marks(many):
    """Of a single layer, too, of which a line without marks would show nothing."""
    layers = pd.DataFrame({"layer": range(5, 5 + many)})
    words = layers.assign(place="image", what="answer", beaten=0.5, low=0.4, high=0.6, p=0.1, null_p=0.01)
    scores = layers.assign(effect=1.0, low=0.5, high=1.5)
    line = ("effect", "the direction", "low", "high", "#000000")
    cut = rows().assign(site="decoder.5.attn@last<image", tower="decoder", kind="attn", layer=5, p_change=0.1)
    cut = cut[cut["unit"].isna()].drop_duplicates("example")
    drawn = [*figures.words_over_layers(words), *by_layer({"a": scores}, [("LD", [line])])]
    for axes in [*drawn, *(figures.flow(cut) if many == 1 else ())]:
        axes.figure.draw_without_rendering()
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks == list(range(5, 5 + many))
        assert "o" in [line.get_marker() for line in axes.lines]


def test_an_interval_that_is_not_there_is_not_in_the_legend():
    columns = "ranking fraction kept f low high random random_low random_high".split()
    for low, words in ((0.4, "the best parts, with 95 % interval"), (None, "the best parts")):
        table = pd.DataFrame([("signed", 0.5, 4, 0.5, low, low, 0.1, 0.0, 0.2)], columns=columns)
        (axes,) = figures.carried_by_size(table)
        assert words in axes.get_legend_handles_labels()[1]


def test_panels_need_axes_for_each():
    tables = {"weak": token_table(rows()), "strong": head_table(rows())}
    axes = Figure().subplots(2, 2)
    assert figures.panels(tables, ax=axes[0]) == list(axes[0])
    assert labels(axes[0, 0]) and labels(axes[0, 1])
    with pytest.raises(DataError, match="ax holds 4 axes; this figure has 2 panels"):
        figures.panels(tables, ax=axes)


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_written_by_its_suffix(tmp_path, suffix, begin):
    axes = figures.layer_by_head(rows())
    axes.figure.savefig(tmp_path / f"heads.{suffix}")
    assert (tmp_path / f"heads.{suffix}").read_bytes().startswith(begin)
    assert axes._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"


def test_labels_that_all_panels_share_stand_once():
    table = token_table(rows())
    axes = figures.panels({f"{n}": table for n in range(4)})
    assert [bool(labels(each)) for each in axes] == [False, False, True, True]
    assert [bool(each.get_yticklabels()) for each in axes] == [True, False, True, False]


@pytest.mark.parametrize("value", VALUES[:-1])  # the last is of attributions
def test_figures_of_every_value(value):
    given = rows().assign(effect=0.5, ld_change=0.2, p_change=0.1, value=3.0)
    assert isinstance(figures.layer_by_token(given, value=value), Axes)
    assert isinstance(figures.layer_by_head(given, value=value), Axes)


def test_odd_tables_do_not_break(tmp_path):
    odd = {
        "one row": rows().query("unit == 'h0' and role == 'answer'").head(1),
        "all zero": rows().assign(logit_diff=0.0),
        "long tokens": rows(1, ["$x_{1}$" * 20, "<b>", "\n", "漢字", "é" * 60, "ok"]),
        "many tokens": rows(1, [f"w{n}" for n in range(600)], layers=2),
    }
    for name, table in odd.items():
        if name != "one row":
            figures.layer_by_token(table).figure.savefig(tmp_path / f"{name}.png")
        figures.layer_by_head(table).figure.savefig(tmp_path / f"{name}-heads.png")
        strongest(table)
    assert strongest(rows().head(0)).empty


@pytest.mark.parametrize("draw", [figures.layer_by_token, figures.layer_by_head])
def test_what_is_not_there_is_said_and_not_drawn(draw):
    for table, message in (
        (rows().head(0), "it holds nothing"),
        (rows().assign(logit_diff=np.nan), "'logit_diff' is null"),
    ):
        with pytest.raises(DataError, match=message):
            draw(table)
    with pytest.raises(DataError, match="with tower 'decoder' in the table; it holds encoder"):
        draw(rows(), tower="decoder")
    with pytest.raises(DataError, match="no value 'loudness'"):
        draw(rows(), value="loudness")


def test_the_image_grid():
    axes = image_grid(patches(), Image.new("RGB", (30, 20)), (2, 3))
    titles = [text.get_text() for text in axes.texts][:5]
    assert titles == ["picture", "mean of 3 layers", "layer 0", "layer 1", "layer 2"]


def test_the_stream_between_sublayers_has_a_name():
    axes = figures.layer_by_token(rows().assign(kind="resid_mid"))
    assert axes.get_title().startswith("Residual stream between attention and MLP,\ntext encoder")

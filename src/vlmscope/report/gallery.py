"""Figures on disk and in the page, and the templates that show them; whatever comes from data is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes

from vlmscope.files import read_about, to_csv
from vlmscope.report.canvas import figure_of
from vlmscope.report.heat_maps import CHANGED, IN_LOGITS, full_colour, panels
from vlmscope.report.ranking import by_size
from vlmscope.report.words import digits, ends, lower_first, percent, plural, short_number, upper_first
from vlmscope.stats import FEWEST
from vlmscope.studies.tables import slot_words, wide


class Shown(NamedTuple):
    """A figure in the page: its caption, the picture itself, and the files beside the page."""

    caption: Markup
    image: str
    files: list[tuple[str, str]]


class Section(NamedTuple):
    """A part of the page; greyed out where the model does not know the task."""

    title: str
    text: Markup
    is_unknown: bool = False


@dataclass(frozen=True)
class Gallery:
    """Saves each figure as PNG, in further formats, and its data as CSV, in the folder beside the page."""

    folder: Path
    prefix: str
    formats: tuple[str, ...]

    def show(
        self, name: str, drawn: Axes | list[Axes], data: pd.DataFrame, caption: str, **values: object
    ) -> Shown:
        """Save the figure that these axes are in; its caption is a macro of `captions.html`."""
        stem, png = f"{self.prefix}-{name}", io.BytesIO()
        figure = figure_of(drawn if isinstance(drawn, Axes) else drawn[0])
        # A third of the usual effort to make it small: as small, and sooner.
        figure.savefig(png, format="png", dpi=120, pil_kwargs={"compress_level": 3})
        (self.folder / f"{stem}.png").write_bytes(png.getvalue())
        for ending in self.formats:
            figure.savefig(self.folder / f"{stem}.{ending}")
        (self.folder / f"{stem}.csv").write_bytes(to_csv(data))
        links = {ending: ending.upper() for ending in ("png", *self.formats)} | {"csv": "data"}
        files = [(f"{self.folder.name}/{stem}.{ending}", text) for ending, text in links.items()]
        text = getattr(_templates().get_template("captions.html").module, caption)(**values)
        return Shown(Markup(" ".join(text.split())), data_address(png.getvalue()), files)

    def show_panels(
        self,
        name: str,
        cells: Mapping[str, pd.DataFrame],
        gap: float,
        *,
        tables: Mapping[str, pd.DataFrame] | None = None,
        marks: Mapping[str, list[tuple[int, int]]] | None = None,
        data: pd.DataFrame | None = None,
    ) -> Shown:
        """Tables of layers side by side, by title (by default of all these cells), with the cells as data."""
        tables = tables or {title: wide(each) for title, each in cells.items()}
        rows = pd.concat([each.assign(panel=title) for title, each in cells.items()], ignore_index=True)
        most = rows.groupby("panel")["n"].transform("max")
        value = str(next(iter(cells.values())).attrs.get("value", "logit_diff"))
        at = "position" if "position" in rows else "slot"
        slots = rows[[at, "tower"]].drop_duplicates().to_numpy() if "head" in rows else ()
        return self.show(
            name,
            panels(tables, value=value, marks=marks, gap=gap),
            rows if data is None else data,
            "panels",
            rows=rows,
            best=by_size(rows, rows["mean"].abs(), most).iloc[0],
            held=(rows["n"] < most / 2).any(),
            column="head" if "head" in rows else "slot",
            slots=list(dict.fromkeys(slot_words(*place) for place in slots)),
            full=full_colour(tables.values(), value, gap),
            what=CHANGED[value],
            unit=" logits" if value in IN_LOGITS else "",
            important=None if marks is None else sum(map(len, marks.values())),
        )


def about_of(folder: Path, what: str) -> dict[str, Any]:
    return read_about(folder, f"{what}.json", "write that folder anew")


def data_address(png: bytes | Path) -> str:
    """A PNG as an address that holds it."""
    content = png.read_bytes() if isinstance(png, Path) else png
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def render(template: str, **values: object) -> Markup:
    """A template of `templates/` with these values."""
    return Markup(_templates().get_template(template).render(values))


@cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmscope.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"inline": data_address, "short": short_number, "digits": digits, "percent": percent}
    templates.filters |= {"upper_first": upper_first, "lower_first": lower_first, "plural": plural}
    templates.globals |= {"zip": zip, "ends": ends, "percent": percent, "FEWEST": FEWEST}
    return templates

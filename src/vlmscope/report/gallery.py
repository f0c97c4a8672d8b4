"""Figures on disk and in the page, and the templates that show them; whatever comes from data is escaped."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes

from vlmscope.files import to_csv
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
    """Draws each figure as PNG and in further formats, with its data as CSV: `files`, by their names, of the
    folder of this name beside the page."""

    folder: str
    prefix: str
    formats: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)

    def show(
        self, name: str, drawn: Axes | list[Axes], data: pd.DataFrame, caption: str, **values: object
    ) -> Shown:
        """Save the figure that these axes are in; its caption is a macro of `captions.html`."""
        stem = f"{self.prefix}-{name}"
        figure = figure_of(drawn if isinstance(drawn, Axes) else drawn[0])
        for ending in ("png", *self.formats):
            # A third of the usual effort to make it small: as small, and sooner.
            options: dict[str, Any] = (
                {"dpi": 120, "pil_kwargs": {"compress_level": 3}} if ending == "png" else {}
            )
            figure.savefig(buffer := io.BytesIO(), format=ending, **options)
            self.files[f"{stem}.{ending}"] = buffer.getvalue()
        self.files[f"{stem}.csv"] = to_csv(data)
        links = {ending: ending.upper() for ending in ("png", *self.formats)} | {"csv": "data"}
        files = [(_address(f"{self.folder}/{stem}.{ending}"), text) for ending, text in links.items()]
        # The macro has escaped what it was given; words that are joined again hold no more than it gave.
        text = getattr(_templates().get_template("captions.html").module, caption)(**values)
        return Shown(Markup(" ").join(text.split()), data_address(self.files[f"{stem}.png"]), files)

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


def data_address(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _address(path: str) -> str:
    """A path beside the page as the address of a link, whatever characters it has."""
    return quote(os.fsencode(path))


def hash_of(text: str) -> str:
    """The source that a Content-Security-Policy calls a text by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
    templates.filters |= {"hash_of": hash_of}
    templates.filters |= {"upper_first": upper_first, "lower_first": lower_first, "plural": plural}
    templates.globals |= {"zip": zip, "ends": ends, "percent": percent, "FEWEST": FEWEST}
    return templates

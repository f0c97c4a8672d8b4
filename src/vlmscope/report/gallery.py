"""Figures on disk and in the page, and the templates that show them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes

from vlmscope.report.canvas import figure_of
from vlmscope.report.captions import digits, upper_first


class Shown(NamedTuple):
    """A figure in the page: its caption, the picture itself, and the files beside the page."""

    caption: str
    image: str
    files: list[tuple[str, str]]


class Section(NamedTuple):
    """A part of the page; greyed out where the model does not know the task."""

    title: str
    text: Markup
    is_unknown: bool = False


@dataclass(frozen=True)
class Gallery:
    """Saves each figure, and its data as CSV, in the folder beside the page."""

    folder: Path
    prefix: str
    formats: tuple[str, ...] = ()
    """Beside PNG."""

    def show(self, name: str, drawn: Axes | list[Axes], caption: str, data: pd.DataFrame) -> Shown:
        """Save the figure that these axes are in, in all formats, and its data."""
        stem = f"{self.prefix}-{name}"
        figure = figure_of([drawn] if isinstance(drawn, Axes) else drawn)
        png = io.BytesIO()
        # A third of the usual effort: as small, and sooner.
        figure.savefig(png, format="png", dpi=144, pil_kwargs={"compress_level": 3})
        (self.folder / f"{stem}.png").write_bytes(png.getvalue())
        for ending in self.formats:
            figure.savefig(self.folder / f"{stem}.{ending}")
        data.to_csv(self.folder / f"{stem}.csv", index=False)
        endings = [(ending, ending.upper()) for ending in ("png", *self.formats)]
        files = [
            (f"{self.folder.name}/{stem}.{ending}", text) for ending, text in [*endings, ("csv", "data")]
        ]
        return Shown(caption, data_address(png.getvalue()), files)


def data_address(png: bytes | Path) -> str:
    """A PNG as an address that holds it."""
    content = png.read_bytes() if isinstance(png, Path) else png
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmscope.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"inline": data_address, "upper_first": upper_first, "digits": digits}
    templates.globals["zip"] = zip
    return templates


def render(template: str, **values: object) -> Markup:
    """A template of `templates/`; whatever is no markup is escaped."""
    return Markup(_templates().get_template(template).render(values))

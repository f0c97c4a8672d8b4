"""The page of an explanation: one file with a small script of its own, in which words and cells light up; and
what a report says of it.

All text goes through the templates, or is data that the script sets as text; numbers are rounded to four
figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from vlmscope import __version__, files, stored
from vlmscope.errors import StoreError
from vlmscope.report.canvas import drawable
from vlmscope.report.gallery import Gallery, Section, render
from vlmscope.report.image_maps import word_maps
from vlmscope.report.words import short_number
from vlmscope.stored import formats

GENERATOR = '<meta name="generator" content="vlmscope explain'
"""What a page says of who made it."""
SIDE = 640
"""The longest side, in pixels, of the picture in the page."""
LISTED = 8
"""Heads and neurons of each word in the page."""
DRAWN = 11
"""Words whose maps are in a report, at most: those with the largest effects."""
MAPS = {
    "exact": ("exact", "nats"),
    "knockout": ("not reading the cell", "nats"),
    "gradient": ("gradient's estimate", "nats"),
    "attention": ("attention", "share"),
}
BLANKS = {"blur": "a blurred picture shows", "mean": "a picture of the mean color shows"}


def claim(out: Path) -> None:
    """Refuse, before anything is computed, a place for the page that cannot be written, or where something
    else is than such a page (`StoreError`)."""
    files.claim_file(out)
    if out.exists() and GENERATOR not in files.read(out, "a web page", StoreError)[:2000].decode(
        "utf-8", "replace"
    ):
        raise StoreError(f"{out}: is there, and no page of vlmscope explain; choose another --out")


class Bar(NamedTuple):
    """A bar of a chart, in hundredths of its width: where it begins, its length, whether it is below 0."""

    label: str
    value: float
    start: float
    length: float
    is_below: bool


def render_page(about: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], picture: bytes) -> str:
    """The page as HTML, from the tables of an `Explanation` and a PNG."""
    words, cells = tables["words"], tables["cells"]
    names = [name for name in MAPS if len(cells) and cells[name].notna().any()]
    sizes = cells.groupby("word")["exact"].agg(lambda own: own.abs().max()) if names else words["logprob"]
    return str(
        render(
            "explain.html",
            version=__version__,
            about=about,
            blank=BLANKS[about["reference"]],
            picture=picture,
            pieces=list(_pieces(about["answer"], words)),
            first=int(sizes.to_numpy().argmax()),
            panels=[_panel(about, tables, n) for n in words["word"]],
            maps={name: MAPS[name] for name in names},
            data=_data(about, words, cells, names),
        )
    )


def section(folder: Path, gallery: Gallery) -> Section:
    """The section of a folder that `Explanation.save` wrote: each word's map, and what it says in words."""
    _, about, tables, pictures = stored.read_one(folder, formats.EXPLAIN)
    words, cells = tables["words"], tables["cells"]
    shown, least = None, about["rounding"]
    if len(cells):
        sizes = cells.groupby("word")["exact"].agg(lambda own: own.abs().max())
        most = sorted(sizes.sort_values(ascending=False, kind="stable").index[:DRAWN])
        title = {n: f"{sizes[n]:.2g} nats" if sizes[n] > least else "rounding" for n in most}
        titles = {int(n): drawable(f"{words['text'][n]}: {title[n]}", 24) for n in most}
        drawn = word_maps(cells, pictures["picture"], tuple(about["grid"]), titles, least)
        best = next(cells.loc[[cells["exact"].abs().idxmax()]].itertuples())
        values = {"about": about, "best": best, "word": words["text"][best.word], "words": len(words)}
        shown = gallery.show("words", drawn, cells, "word_maps", many=len(titles), **values)
    names = {"text": "word", "logprob": "log P", "without": "without the picture"}
    names |= {f"spearman_{name}": f"rank correlation, {MAPS[name][0]}" for name in list(MAPS)[1:]}
    text = render(
        "explained.html",
        about=about,
        blank=BLANKS[about["reference"]],
        shown=shown,
        sentences=[
            " ".join(sentences(about, word, cells[cells["word"] == word["word"]]))
            for _, word in words.iterrows()
        ],
        table=words[list(names)].rename(columns=names),
    )
    return Section(f"Where words come from: {about['prompt']}", text)


def _pieces(answer: str, words: pd.DataFrame) -> Iterator[tuple[str, int | None]]:
    """The answer in pieces: those that are explained have their word's number."""
    at = 0
    for row in words.itertuples():
        yield answer[at : row.start], None
        yield answer[row.start : row.end], row.word
        at = row.end
    yield answer[at:], None


def _data(
    about: Mapping[str, Any], words: pd.DataFrame, cells: pd.DataFrame, names: list[str]
) -> dict[str, Any]:
    """What the script reads: units, and maps by name, word and unit."""
    units = cells.loc[cells["word"] == 0, ["row", "column", "rows", "columns"]] if len(cells) else cells
    by_word = [rows for _, rows in cells.groupby("word")] if len(cells) else []
    return {
        "grid": about["grid"],
        "units": units.to_numpy().tolist(),
        "words": words["text"].tolist(),
        "maps": {name: [[_rounded(x) for x in rows[name]] for rows in by_word] for name in names},
        "kinds": {name: list(MAPS[name]) for name in names},
        "region": _in_view(about),
        "gains": about["direction"] == "denoise",
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _in_view(about: Mapping[str, Any]) -> list[float] | None:
    """The region in shares of what is shown of the picture: left, top, width, height."""
    if about["region"] is None:
        return None
    left, top, right, bottom = about["region"]
    x, y, end, low = about["view"]
    return [
        (left - x) / (end - x),
        (top - y) / (low - y),
        (right - left) / (end - x),
        (bottom - top) / (low - y),
    ]


def _panel(about: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], number: int) -> dict[str, Any]:
    """What the page shows of one word."""
    own = {name: table[table["word"] == number] for name, table in tables.items()}
    word = own["words"].iloc[0]
    heads = own["heads"].sort_values("knockout", key=abs, ascending=False, kind="stable").head(LISTED)
    return {
        "text": word["text"],
        "sentences": list(sentences(about, word, own["cells"])),
        "spearman": {
            name: None
            if pd.isna(word[f"spearman_{name}"])
            else f"{word[f'spearman_{name}']:.2f}".replace("-", "−")
            for name in list(MAPS)[1:]
        },
        "layers": list(_bars([(f"layer {row.layer}", row.knockout) for row in own["layers"].itertuples()])),
        "heads": [
            (f"{row.tower}.{row.layer}.{row.kind}.h{row.head}", row.knockout, row.direct)
            for row in heads.itertuples()
        ],
        "neurons": [
            (f"{row.layer}.{row.neuron}", row.score, row.tokens)
            for row in own["neurons"].head(LISTED).itertuples()
        ],
        "region": None if pd.isna(word["region"]) else (word["region"], word["region_knockout"]),
        "sinks": word["sinks"],
        "left": word["left"],
    }


def sentences(about: Mapping[str, Any], word: pd.Series[Any], cells: pd.DataFrame) -> Iterator[str]:
    """What the exact map of a word says, in words."""
    gains = about["direction"] == "denoise"
    p, without, total = _p(word["logprob"]), _p(word["without"]), word["logprob"] - word["without"]
    blank = {"blur": "blurred", "mean": "in its mean color alone"}[about["reference"]]
    yield (
        f"“{word['text']}” is said with P = {p}; with the picture {blank} it would be {without} "
        f"({short_number(-total)} nats)."
    )
    if cells.empty:
        return
    best = cells.loc[cells["exact"].idxmax()]
    row, column, rows, columns = (int(best[name]) for name in ("row", "column", "rows", "columns"))
    place = "cell" if rows == columns == 1 else f"group of {rows} × {columns} cells"
    place += f" at row {row}, column {column}"
    size, least = short_number(best["exact"] if gains else -best["exact"]), f"{about['rounding']:.1g} nats"
    if best["exact"] > about["rounding"] and gains:
        after = _p(word["without"] + best["exact"])
        yield f"The {place} is worth most: it alone makes that P = {after} ({size} nats)."
    elif best["exact"] > about["rounding"]:
        after = _p(word["logprob"] - best["exact"])
        yield f"The {place} matters most: with it replaced P = {after} ({size} nats)."
    elif total <= about["rounding"]:
        if total < -about["rounding"]:
            yield f"What the picture {blank} lacks speaks against it."
        else:
            more = " (--reference mean takes more away)" if about["reference"] == "blur" else ""
            yield f"What it needs is in the picture {blank}, too, or not in the picture at all{more}."
    elif gains:
        yield f"No cell by itself is worth more than rounding ({least})."
    else:
        yield (
            f"No cell by itself matters more than rounding ({least}): what the word needs may be in "
            "several, each of which is enough (--direction denoise)."
        )


def _p(logprob: float) -> str:
    """A probability in percent, of very small ones the power of ten.

    >>> _p(-0.01), _p(-12.0), _p(0.0)
    ('99.0\xa0%', '6e-06', '100.0\xa0%')
    """
    p = math.exp(min(0.0, logprob))
    return f"{100 * p:.1f}\xa0%" if p >= 5e-4 else f"{p:.0e}"


def _bars(values: list[tuple[str, float]]) -> Iterator[Bar]:
    """Bars from a common 0, on a scale that the largest and the smallest decide."""
    low, high = (end([0.0, *(value for _, value in values)]) for end in (min, max))
    wide = (high - low) or 1.0
    for label, value in values:
        yield Bar(label, value, 100 * (min(value, 0.0) - low) / wide, 100 * abs(value) / wide, value < 0)

"""The figures of `docs/information-flow.md`, drawn from what `benchmarks/information_flow.py` has measured.

    python benchmarks/flow_figures.py [--result benchmarks/results/NAME.json] [--out docs/figures]

Each PNG says in its metadata (`Source`) which numbers it was drawn from, so that a test can tell whether it
is out of date. Zhang et al. is arXiv 2411.18620, Neo et al. arXiv 2410.07149.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import vlmscope
from vlmscope.report.canvas import DARK, Margins, figure_of, grid, set_title
from vlmscope.report.image_maps import word_plates

ROOT = Path(__file__).parent.parent
RESULT, FIGURES = ROOT / "benchmarks" / "results" / "information-flow-cpu.json", ROOT / "docs" / "figures"
STYLES = (
    ("#4C78A8", "-"),
    ("#D0502D", "-"),
    ("#3F8F5B", (0, (4, 2))),
    ("#8A5FA8", (0, (1, 1.5))),
    ("#B8860B", (0, (4, 1, 1, 1))),
)
"""Colour and dashes of lines, so that those which lie on each other are all seen."""
CHANGE, FLIPPED = "relative change of P(answer)", "right answers that flip"
TO_LAST = ("last<image", "last<question", "last<last", "question<image")
PARTS = ("last<object+1", "last<-object+1", "question<object+1", "question<-object+1")
SHORT = {"object+1": "object and around", "-object+1": "all other patches"}
PICKED = {"": "the object's, with margins of 0, 1, 2", ": as many by gradient": "as many by gradient"}
PICKED |= {": as many at random": "as many at random"}
PICTURE = 0
"""Which example of `states` (seed 5) the words are drawn on."""


def curves(
    panels: Mapping[str, Mapping[str, pd.DataFrame]], across: int, labels: tuple[str, str]
) -> list[Axes]:
    """A panel each of lines with 95 % intervals: tables with `x`, `y`, `low`, `high`, by title and name."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = len(names) if len(names) < 5 else 3
    below = 0.6 + 0.2 * -(-len(names) // columns)
    axes = grid(None, len(panels), across, (2.7, 1.9), Margins(0.75, below, 0.15, 0.35, 0.5, 0.65))
    for n, (spot, (title, lines)) in enumerate(zip(axes, panels.items(), strict=True)):
        for name, line in lines.items():
            (colour, dashes), x = STYLES[names.index(name)], line["x"].tolist()
            ends = line[["low", "high"]].astype(float)
            spot.plot(x, line["y"].tolist(), color=colour, ls=dashes, lw=1.6, marker="o", ms=3, label=name)
            spot.fill_between(x, ends["low"], ends["high"], color=colour, alpha=0.15, lw=0)
        spot.axhline(0.0, color=DARK, lw=0.6)
        spot.set_xlabel(labels[0], fontsize=9, color=DARK)
        spot.set_ylabel(labels[1] if n % across == 0 else "", fontsize=9, color=DARK)
        spot.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}".replace("-", "−"))
        if not isinstance(x[0], str):
            spot.xaxis.set_major_locator(MaxNLocator(integer=True))
        spot.tick_params(labelsize=8)
        spot.grid(axis="y", color="#e5e5e5")
        spot.set_axisbelow(True)
        spot.spines[["top", "right"]].set_visible(False)
        set_title(spot, title, 9.5)
    ends = [spot.get_ylim() for spot in axes]
    for spot in axes:
        spot.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    handles = {
        name: handle for spot in axes for handle, name in zip(*spot.get_legend_handles_labels(), strict=True)
    }
    shown = [handles[name] for name in names]
    figure_of(axes[0]).legend(shown, names, fontsize=8.5, loc="lower center", ncols=columns, frameon=False)
    return axes


def lines_of(rows: pd.DataFrame, y: str, x: str, names: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """A line for each `what` that is named, in its order along `x`."""
    own = {what: rows[rows["what"] == what] for what in names}
    return {
        names[what]: some.rename(columns={x: "x", y: "y"})[["x", "y", "low", "high"]]
        for what, some in own.items()
        if len(some)
    }


def flow(result: Mapping[str, Any], edges: Sequence[str], others: Mapping[str, str] | None) -> list[Axes]:
    """P(answer) without these edges, over layers: toy-llava by window, below it toy-blip without `others`."""
    panels = {}
    asked = [("toy-llava", window, dict(zip(edges, map(arrow, edges), strict=True))) for window in (1, 3)]
    if others:
        asked.append(("toy-blip", 1, others))
    for name, window, names in asked:
        for data in ("states", "scenes"):
            table = pd.DataFrame(result[f"{name}, {data}"]["flows"])
            own = table[table["window"] == window].sort_values("layer")
            size = "one layer" if window == 1 else f"{window} layers"
            panels[f"{name}, {data}: {size}"] = lines_of(own, "mean", "layer", names)
    return curves(panels, 2, ("layer", CHANGE))


def arrow(edge: str) -> str:
    target, _, source = edge.partition("<")
    return f"{target} ← {SHORT.get(source, source)}"


def ablated(result: Mapping[str, Any]) -> list[Axes]:
    """Answers flipped against how many tokens are replaced by the mean token."""
    panels = {}
    for kind in kinds(result):
        table = pd.DataFrame(result[kind]["objects"])
        own = table[table["how"] == "mean token"]
        panels[kind] = {
            name: own[own["what"].isin([f"object{margin}{picked}" for margin in ("", "+1", "+2")])]
            .rename(columns={"tokens": "x", "share": "y"})
            .sort_values("x")
            for picked, name in PICKED.items()
        }
    return curves(panels, 2, ("tokens replaced, of 36 (mean)", FLIPPED))


def blocked(result: Mapping[str, Any]) -> list[Axes]:
    """Answers flipped by not reading parts of the picture, by layers in which they are not read."""
    names = {"image": "image"} | SHORT
    panels = {}
    for kind in kinds(result):
        table = pd.DataFrame(result[kind]["objects"])
        own = table[table["how"] == "not read"]
        panels[kind] = lines_of(own, "share", "layers", names)
    return curves(panels, 2, ("layers in which it is not read", FLIPPED))


def said(result: Mapping[str, Any]) -> list[Axes]:
    """How well image tokens say the answer, over layers; a half is what any word reaches."""
    panels = {}
    for kind in kinds(result):
        if "said" in result[kind]:
            own = pd.DataFrame(result[kind]["said"]).sort_values("layer")
            panels[kind] = lines_of(own, "mean", "layer", SHORT)
    axes = curves(panels, 2, ("layer", "words beaten by the answer"))
    for spot in axes:
        spot.axhline(0.5, color="#999999", lw=1, ls=":")
        spot.set_ylim(0, 1)
    return axes


def kinds(result: Mapping[str, Any]) -> list[str]:
    return [name for name in result if ", " in name]


def words(_: Mapping[str, Any]) -> list[Axes]:
    """The word that each image token says, on the picture."""
    (one,) = vlmscope.examples("states", limit=1, seed=5)
    found = vlmscope.lens(vlmscope.load("toy-llava"), [one], ["decoder.*.resid@image*"])
    return [word_plates(found.lens, one.clean_image, [0, 3])]


DRAWN: dict[str, Callable[[Mapping[str, Any]], list[Axes]]] = {
    "flow": lambda result: flow(result, TO_LAST, None),
    "flow-parts": lambda result: flow(
        result, PARTS, {f"question<{part}": arrow(f"question<{part}") for part in ("image", *SHORT)}
    ),
    "ablated": ablated,
    "blocked": blocked,
    "said": said,
    "words": words,
}
"""What draws each figure, by its file's name."""


def digest(result: Mapping[str, Any]) -> str:
    """Of all the numbers that figures are drawn from."""
    text = json.dumps({kind: result[kind] for kind in kinds(result)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--out", type=Path, default=FIGURES)
    given = parser.parse_args()
    result = json.loads(given.result.read_text("utf-8"))
    given.out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        figure, file = figure_of(draw(result)[0]), given.out / f"{name}.png"
        figure.savefig(drawn := io.BytesIO(), dpi=110)
        about = PngInfo()
        about.add_text("Source", digest(result))
        Image.open(drawn).quantize(64).save(file, pnginfo=about, optimize=True)
        print(f"{file}: {file.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()

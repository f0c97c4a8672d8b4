"""One self-contained HTML file about runs, circuits, head functions, tracing, lenses and neurons.

Everything is read from the folders that the other commands write; no model and no network is needed.
Each figure is also beside the file, with its data as CSV. Whatever comes from data is escaped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

from vlmscope import __version__, files, stored
from vlmscope.calls import Do, in_turn
from vlmscope.errors import StoreError
from vlmscope.report import (
    attribution,
    directions,
    edges,
    explanation,
    faithfulness,
    heads,
    lens,
    neurons,
    run,
    tracing,
)
from vlmscope.report.gallery import Gallery, render
from vlmscope.studies.run_folder import Run, read_run, table_in

FORMATS = ("svg", "pdf")
"""What figures can be saved as beside PNG."""
MANIFEST, FORMAT = "report.json", "vlmscope-report-1"
"""The file in the folder of figures that lists them and the page: what a report may replace."""
SECTIONS = {
    "circuits": heads.circuits_section,
    "summary": faithfulness.section,
    "heads": heads.section,
    "tracing": tracing.section,
    "lens": lens.section,
    "explain": explanation.section,
    "neurons": neurons.section,
    "steer": directions.steered,
    "probe": directions.probed,
}
"""What writes about a folder, by the JSON file in it."""
PATCHED = ("circuits", "heads", "tracing", "explain")
"""Those that say what patches do."""


def write_report(
    parts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    formats: Sequence[str] = (),
    do: Do = in_turn,
) -> Path:
    """Write the report of a folder, or of several, to `out`, and its figures and data to `<stem>-figures/`.

    A folder is a run, or what `circuits`, `faithfulness`, `heads`, `tracing`, `lens`, `notice`, `neurons`,
    `steer` or `probe` wrote, or an `Explanation` has saved. Each figure is saved as PNG, and in the further
    `formats` that are named (`svg`, `pdf`). `do` gives what calls `(function, *given)` give, in their order,
    which other processes may make. An earlier report is replaced, with its figures, when all is
    drawn. Raises `StoreError`, before anything is written, if a folder is none of these or damaged, or if
    `out` is no `.html`, or something else is there than such a report.
    """
    if not parts:
        raise StoreError("no runs to report on; name at least one run folder")
    if odd := set(formats) - set(FORMATS):
        raise StoreError(f"figures cannot be saved as '{min(odd)}'; expected {', '.join(FORMATS)}")
    out = Path(out)
    claim_report(out)
    figures = _figures(out)
    several = [parts] if isinstance(parts, str | os.PathLike) else parts
    folders = [folder for part in several for folder in _unfold(Path(part))]
    gallery = Gallery(figures.name, "", tuple(dict.fromkeys(formats)))
    page = _page(folders, gallery, do)
    # What a file name lacks of UTF-8 is shown as an escape.
    content = {out.name: page.encode("utf-8", "backslashreplace")}
    content |= {f"{figures.name}/{name}": drawn for name, drawn in gallery.files.items()}
    files.save(out.parent, f"{figures.name}/{MANIFEST}", {"format": FORMAT}, content)
    return out


def claim_report(out: Path) -> None:
    """Refuse, before anything is computed, a place where `write_report` would replace what is no report."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise StoreError(f"{out}: a report is a web page; expected a file that ends in .html")
    figures = _figures(out)
    if figures.is_symlink() or (os.path.lexists(figures) and not figures.is_dir()):
        raise StoreError(f"{figures}: is no folder, and figures go there; choose another --out")
    about = files.claim(out.parent, f"{figures.name}/{MANIFEST}", FORMAT, [out.name])
    # Which figures there will be is not known yet, so nothing else may be among them.
    own = {MANIFEST, *(Path(name).name for name in files.listed(out.parent, about))}
    there = figures.iterdir() if figures.exists() else ()
    if other := [path for path in there if path.name not in own and not files.is_temporary(path)]:
        raise StoreError(
            f"{min(other)}: is no figure of a report, so {figures.name} is not replaced; choose another --out"
        )


def _figures(out: Path) -> Path:
    return out.with_name(f"{out.stem}-figures")


def _unfold(part: Path) -> list[tuple[str, Path]]:
    """What a folder is, and the folders in it where it is of `notice`: `(what, folder)`."""
    if _what(part) != "run" or not os.path.lexists(part / "notice.toml"):
        return [(_what(part), part)]
    names = ("heads/*", "faithfulness/*", "mechanism/*", "runs/*")
    inner = [part / "circuits", *(path for name in names for path in sorted(part.glob(name)))]
    for path in inner:
        stored.no_links(path, part)
    return [(_what(path), path) for path in inner if path.is_dir()]


def _what(part: Path) -> str:
    return next((what for what in SECTIONS if os.path.lexists(part / f"{what}.json")), "run")


def _drawn(section: Callable[..., Any], given: Sequence[Any], gallery: Gallery) -> tuple[Any, Gallery]:
    """What a part of the page is, by its function, and the gallery with its figures."""
    # A dollar sign in a name is no formula.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        return section(*given, gallery), gallery


def _page(folders: Sequence[tuple[str, Path]], gallery: Gallery, do: Do) -> str:
    runs = [read_run(path) for what, path in folders if what == "run"]
    for each in runs:
        each.pictures()  # what is damaged is said before anything is drawn
    others = [folder for folder in folders if folder[0] != "run"]
    others.sort(key=lambda folder: folder[0] != "circuits")
    calls: list[tuple[Any, ...]] = [
        (_drawn, SECTIONS[what], [path], replace(gallery, prefix=f"part{number}", files={}))
        for number, (what, path) in enumerate(others)
    ]
    for number, (each, name) in enumerate(zip(runs, _names(runs), strict=True)):
        own = {"attributions": attribution.section, "edges": edges.section}.get(table_in(each.spec))
        given = [each, name if own is None else name.removesuffix(", ")]
        calls.append((_drawn, own or run.report, given, replace(gallery, prefix=f"run{number}", files={})))
    drawn = []
    for made, place in do(calls):
        drawn.append(made)
        gallery.files.update(place.files)
    sections = [made for made in drawn if not isinstance(made, run.Reported)]
    reported = [made for made in drawn if isinstance(made, run.Reported)]
    if len(reported) > 1 and not any(what == "circuits" for what, _ in others):
        [(several, place)] = do(
            [(_drawn, run.together, [reported], replace(gallery, prefix="all", files={}))]
        )
        sections += several
        gallery.files.update(place.files)
    sections += [each.section for each in reported]
    titles = _unique([section.title for section in sections], ["" for _ in sections])
    return render(
        "page.html",
        version=__version__,
        sections=[section._replace(title=title) for section, title in zip(sections, titles, strict=True)],
        is_patched=bool(reported) or any(what in PATCHED for what, _ in folders),
        is_neurons=all(what == "neurons" for what, _ in folders),
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """What each run is called in the report: data and corruption, with its folder where two are the same."""
    names = []
    for number, each in enumerate(runs):
        data = Path(str(each.spec.get("data", number))).name
        names.append(f"{data}, {run.name(each.spec)}")
    return _unique(names, [each.path.name for each in runs])


def _unique(names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Names that are there twice get their folder beside them, or else a number."""
    count = Counter(names)
    names = [
        f"{name} ({folder})" if folder and count[name] > 1 else name
        for name, folder in zip(names, folders, strict=True)
    ]
    count = Counter(names)
    return [
        f"{name}, {names[: n + 1].count(name)}" if count[name] > 1 else name for n, name in enumerate(names)
    ]

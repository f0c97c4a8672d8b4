"""One self-contained HTML file about runs, circuits, head functions, tracing and neurons.

Everything is read from the folders that the other commands write; no model and no network is needed.
Each figure is also beside the file, with its data as CSV. Whatever comes from data is escaped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

from vlmscope import __version__, files, stored
from vlmscope.errors import StoreError
from vlmscope.report import directions, heads, neurons, run, tracing
from vlmscope.report.gallery import Gallery, render
from vlmscope.studies.run_folder import Run, read_run

FORMATS = ("svg", "pdf")
"""What figures can be saved as beside PNG."""
MARK = b'<meta name="generator" content="vlmscope '
"""By what a page is known to be a report."""
OWN = ".vlmscope-figures"
"""The file in a folder of figures that lists them: such a folder a report may replace."""
SECTIONS = {
    "circuits": heads.circuits_section,
    "heads": heads.section,
    "tracing": tracing.section,
    "neurons": neurons.section,
    "steer": directions.steered,
    "probe": directions.probed,
}
"""What writes about a folder, by the JSON file in it."""


def write_report(
    parts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, formats: Sequence[str] = ()
) -> Path:
    """Write the report of these folders to `out`, and its figures and data to `<stem>-figures/`.

    A folder is a run, or what `circuits`, `heads`, `tracing`, `notice`, `neurons`, `steer` or `probe` wrote.
    Each figure is saved as PNG, and in the further `formats` that are named (`svg`, `pdf`). An earlier report
    is replaced, with its figures, when all is drawn. Raises `StoreError`, before anything is written, if a
    folder is none of these or damaged, or if `out` is no `.html`, or something else is there than such a
    report.
    """
    if not parts:
        raise StoreError("no runs to report on; name at least one run folder")
    if odd := set(formats) - set(FORMATS):
        raise StoreError(f"figures cannot be saved as '{min(odd)}'; expected {', '.join(FORMATS)}")
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise StoreError(f"{out}: a report is a web page; expected a file that ends in .html")
    figures = out.with_name(f"{out.stem}-figures")
    _check_place(out, figures)
    folders = [folder for part in parts for folder in _unfold(Path(part))]
    gallery = Gallery(figures.name, "", tuple(dict.fromkeys(formats)))
    # A dollar sign in a name is no formula.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        page = _page(folders, gallery)
    # What a file name lacks of UTF-8 is shown as an escape.
    _put(out, page.encode("utf-8", "backslashreplace"), figures, gallery.files)
    return out


def _check_place(out: Path, figures: Path) -> None:
    """Raise `StoreError` where a report would replace what is none, or cannot be written."""
    way_out = "choose another --out, or move it away"
    if os.path.lexists(out):
        content = files.read(out, f"a report to replace; {way_out}", StoreError, within=out.parent)
        if MARK not in content[:2000]:
            raise StoreError(
                f"{out}: is there and no report of this version, so it is not replaced; {way_out}"
            )
    if os.path.lexists(figures):
        try:
            listed = (
                files.read(figures / OWN, "a list", StoreError, within=figures.parent).decode().split("\n")
            )
            is_own = {path.name for path in figures.iterdir()} <= {*listed, OWN}
        except (StoreError, OSError, ValueError):
            is_own = False
        if not is_own:
            raise StoreError(
                f"{figures}: is there and not (only) figures of a report, so it is not replaced; {way_out}"
            )
    there = next(path for path in out.absolute().parents if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise StoreError(f"{out}: cannot be written ({there} takes no files); choose another --out")


def _put(out: Path, page: bytes, figures: Path, drawn: Mapping[str, bytes]) -> None:
    """Write beside what is there, then put all in its place, or nothing."""
    with files.storing(out), files.beside(out) as work:
        (work / "new").mkdir()
        for name, content in {OWN: "\n".join(drawn).encode(), **drawn}.items():
            (work / "new" / name).write_bytes(content)
        (work / "page").write_bytes(page)
        if figures.exists():
            figures.rename(work / "old")
        try:
            (work / "new").rename(figures)
            (work / "page").replace(out)
        except OSError:
            if figures.exists():
                figures.rename(work / "new")
            if (work / "old").exists():
                (work / "old").rename(figures)
            raise


def _unfold(part: Path) -> list[tuple[str, Path]]:
    """What a folder is, and the folders in it where it is of `notice`: `(what, folder)`."""
    if _what(part) != "run" or not os.path.lexists(part / "notice.toml"):
        return [(_what(part), part)]
    inner = [part / "circuits", *sorted(part.glob("heads/*")), *sorted(part.glob("runs/*"))]
    for path in inner:
        stored.no_links(path, part)
    return [(_what(path), path) for path in inner if path.is_dir()]


def _what(part: Path) -> str:
    return next((what for what in SECTIONS if os.path.lexists(part / f"{what}.json")), "run")


def _page(folders: Sequence[tuple[str, Path]], gallery: Gallery) -> str:
    runs = [read_run(path) for what, path in folders if what == "run"]
    for each in runs:
        each.pictures()  # what is damaged is said before anything is drawn
    others = [folder for folder in folders if folder[0] != "run"]
    others.sort(key=lambda folder: folder[0] != "circuits")
    sections = [
        SECTIONS[what](path, replace(gallery, prefix=f"part{number}"))
        for number, (what, path) in enumerate(others)
    ]
    reported = [
        run.report(each, name, replace(gallery, prefix=f"run{number}"))
        for number, (each, name) in enumerate(zip(runs, _names(runs), strict=True))
    ]
    if len(runs) > 1 and not any(what == "circuits" for what, _ in others):
        sections += run.together(reported, replace(gallery, prefix="all"))
    sections += [each.section for each in reported]
    titles = _unique([section.title for section in sections], ["" for _ in sections])
    return render(
        "page.html",
        version=__version__,
        sections=[section._replace(title=title) for section, title in zip(sections, titles, strict=True)],
        is_patched=any(what != "neurons" for what, _ in folders),
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

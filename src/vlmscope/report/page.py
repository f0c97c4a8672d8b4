"""One self-contained HTML file about runs, circuits, head functions, tracing and neurons.

Everything is read from the folders that the other commands write; no model and no network is needed.
Each figure is also beside the file, with its data as CSV. Whatever comes from data is escaped.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlmscope.errors import StoreError
from vlmscope.report import heads, neurons, run, tracing
from vlmscope.report.gallery import Gallery, render
from vlmscope.studies.run_folder import Run, read_run

FORMATS = ("svg", "pdf")
"""What figures can be saved as beside PNG."""
SECTIONS = {
    "circuits": heads.circuits_section,
    "heads": heads.section,
    "tracing": tracing.section,
    "neurons": neurons.section,
}
"""What writes about a folder, by the JSON file in it."""


def write_report(
    parts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, formats: Sequence[str] = ()
) -> Path:
    """Write the report of these folders to `out`, and its figures and data to `<stem>-figures/`.

    A folder is a run, or what `circuits`, `heads`, `tracing`, `notice` or `neurons` wrote. Each figure is
    saved as PNG, and in the further `formats` that are named (`svg`, `pdf`). Raises `StoreError` if a folder
    is none of these, or `out` is no `.html` or cannot be written.
    """
    if not parts:
        raise StoreError("no runs to report on; name at least one run folder")
    if odd := set(formats) - set(FORMATS):
        raise StoreError(f"figures cannot be saved as '{min(odd)}'; expected {', '.join(FORMATS)}")
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise StoreError(f"{out}: a report is a web page; expected a file that ends in .html")
    folders = [folder for part in parts for folder in _unfold(Path(part))]
    figures = out.with_name(f"{out.stem}-figures")
    unfinished = out.with_name(f".{figures.name}.part")  # what is there stays until all is drawn
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        drawn = unfinished / figures.name
        drawn.mkdir(parents=True)
        page = _page(folders, Gallery(drawn, "", tuple(dict.fromkeys(formats))))
        if figures.exists():
            shutil.rmtree(figures)
        drawn.replace(figures)
        temporary = out.with_name(f".{out.name}.part")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise StoreError(f"{out}: cannot write the report: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _unfold(part: Path) -> list[tuple[str, Path]]:
    """What a folder is, and the folders in it where it is of `notice`: `(what, folder)`."""
    for what in SECTIONS:
        if (part / f"{what}.json").is_file():
            return [(what, part)]
    if (part / "notice.toml").is_file():
        inner = [part / "circuits", *sorted(part.glob("heads/*")), *sorted(part.glob("runs/*"))]
        return [folder for path in inner if path.is_dir() for folder in _unfold(path)]
    return [("run", part)]


def _page(folders: Sequence[tuple[str, Path]], gallery: Gallery) -> str:
    runs = [read_run(path) for what, path in folders if what == "run"]
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

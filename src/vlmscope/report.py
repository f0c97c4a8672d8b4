"""One self-contained HTML file about runs, circuits, head functions and tracing.

Everything is read from the folders that the other commands write; no model and no network is needed.
Each figure is also beside the file as PNG, with its data as CSV. Whatever comes from data is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
from matplotlib.figure import Figure

from vlmscope import plots
from vlmscope.errors import StoreError
from vlmscope.sites import Site
from vlmscope.stats import FEWEST
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.tables import Known, head_cells, head_slot, knows, slot_words, token_cells, wide

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5c6670; --line: #d9dee3;
  --page: #fdfdfc; --card: #ffffff; --accent: #9c2f2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3acb5; --line: #3a424a;
  --page: #16191c; --card: #1f2429; --accent: #e58d83; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; } h2 { font-size: 1.4rem; margin: 3rem 0 .5rem;
  border-top: 1px solid var(--line); padding-top: 1.5rem; } h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
a { color: var(--accent); } nav ul { columns: 2; padding-left: 1.2rem; }
.soft, figcaption { color: var(--soft); } code { font-size: .9em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } td.site code { white-space: nowrap; overflow-wrap: normal; } table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.25rem 0; } figure img.plot { max-width: 100%; height: auto; background: #fff;
  border-radius: 6px; padding: .4rem; }
figcaption { font-size: .92rem; max-width: 62rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
.pair { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; }
.pair div { display: flex; gap: .6rem; } .pair figure { margin: 0; flex: 1; min-width: 0; }
.pair img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #8884;
  border-radius: 4px; display: block; }
.warning { border-left: 4px solid var(--accent); padding: .2rem .8rem; }
.unknown figure img.plot { opacity: .35; filter: grayscale(1); }
.pair p { margin: .5rem 0 0; font-size: .9rem; overflow-wrap: anywhere; }
"""


def write_report(parts: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write the report of these folders to `out`, and its figures and data to `<stem>-figures/`.

    A folder is a run, or what `circuits`, `heads`, `tracing`, `notice` or `neurons` wrote. Raises `StoreError` if
    one is none of these, or `out` cannot be written.
    """
    if not parts:
        raise StoreError("no runs to report on; name at least one run folder")
    out = Path(out)
    folders = [folder for part in parts for folder in _unfold(Path(part))]
    figures = out.with_name(f"{out.stem}-figures")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if figures.exists():
            shutil.rmtree(figures)
        figures.mkdir()
        page = _page(folders, _Figures(figures))
        temporary = out.with_name(f".{out.name}.part")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise StoreError(f"{out}: cannot write the report: {error.strerror or error}") from error
    return out


def _unfold(part: Path) -> list[tuple[str, Path]]:
    """What a folder is, and the folders in it where it is of `notice`: `(what, folder)`."""
    for what in ("circuits", "heads", "tracing", "neurons"):
        if (part / f"{what}.json").is_file():
            return [(what, part)]
    if (part / "notice.toml").is_file():
        inner = [part / "circuits", *sorted(part.glob("heads/*")), *sorted(part.glob("runs/*"))]
        return [one for path in inner if path.is_dir() for one in _unfold(path)]
    return [("run", part)]


class _Figures:
    """Saves each figure as PNG, and its data as CSV, and gives the HTML that shows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def show(self, name: str, figure: Figure, sentence: str, data: pd.DataFrame) -> str:
        buffer = io.BytesIO()
        # A third of the usual effort: as small, and sooner.
        figure.savefig(buffer, format="png", dpi=144, pil_kwargs={"compress_level": 3})
        (self.folder / f"{name}.png").write_bytes(buffer.getvalue())
        data.to_csv(self.folder / f"{name}.csv", index=False)
        links = " ".join(
            f'<a href="{escape(f"{self.folder.name}/{name}.{end}")}" download>{text}</a>'
            for end, text in (("png", "PNG"), ("csv", "data"))
        )
        return (
            f'<figure><img class="plot" alt="{escape(sentence)}" src="{_inline(buffer.getvalue())}">'
            f"<figcaption>{escape(sentence)} {links}</figcaption></figure>"
        )


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _long(panels: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The cells of all panels as one table, with the panel's title."""
    parts = [cells.assign(panel=panel) for panel, cells in panels.items()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _known(known: Known) -> str:
    """What the model knows, in a paragraph; what to beware of stands out."""
    first, *warnings = known.sentences
    parts = [f"<p>{escape(_upper(first))}.</p>"]
    parts += [f'<p class="warning">{escape(_upper(text))}.</p>' for text in warnings]
    if known.severity == "unknown":
        parts.append(
            '<p class="warning">So the figures below are greyed out: what moves the answer of a '
            "model that does not know it says little about how it would.</p>"
        )
    return "".join(parts)


def _grey(text: str, known: Known) -> str:
    return f'<div class="unknown">{text}</div>' if known.severity == "unknown" else text


def _page(folders: Sequence[tuple[str, Path]], figures: _Figures) -> str:
    runs = [read_run(path) for what, path in folders if what == "run"]
    circuits = [path for what, path in folders if what == "circuits"]
    names = _names(runs)
    sections: list[tuple[str, str]] = []
    for path in circuits:
        sections.append(("Important and universal heads", _circuits(path, len(sections), figures)))
    for what, path in folders:
        if what in ("heads", "tracing", "neurons"):
            write = {"heads": _functions, "tracing": _tracing, "neurons": _neurons}[what]
            title, text = write(path, len(sections), figures)
            sections.append((title, text))
    if len(runs) > 1 and not circuits and (text := _together(names, runs, figures)):
        sections.append(("All runs", text))
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        sections.append((name, _section(number, run, figures)))
    titles = _unique([title for title, _ in sections], ["" for _ in sections])
    sections = [(title, text) for title, (_, text) in zip(titles, sections, strict=True)]
    links = "".join(f'<li><a href="#part{n}">{escape(t)}</a></li>' for n, (t, _) in enumerate(sections))
    body = "".join(f'<h2 id="part{n}">{escape(title)}</h2>{text}' for n, (title, text) in enumerate(sections))
    is_patched = any(what != "neurons" for what, _ in folders)
    intro = (
        '<p class="soft">Which part of the model carries the evidence to the answer? In each run '
        "activations of one run are copied into the other, one site at a time; a figure shows how "
        "far that moves the answer. LD is the logit of the answer minus that of the foil; a "
        "change is LD after the patch minus LD of the corrupt run.</p>"
    )
    intro = (
        intro
        if is_patched
        else (
            '<p class="soft">Which neurons turn what the model sees into a word? A neuron contributes to a token its '
            "activation where the token is predicted, times its column of the down projection on the token's "
            "row of the output embedding.</p>"
        )
    )
    contents = f"<nav><ul>{links}</ul></nav>" if len(sections) > 1 else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vlmscope report</title><style>{STYLE}</style></head><body>"
        "<h1>vlmscope report</h1>"
        f"{intro}"
        f"{contents}{body}</body></html>\n"
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """What each run is called in the report: data and corruption, with its folder where two are the same."""
    names = []
    for number, run in enumerate(runs):
        data = Path(str(run.spec.get("data", number))).name
        way = ", corrupt into clean" if run.spec.get("direction") == "noise" else ""
        names.append(f"{data}, {_corruption(run.spec)}{way}")
    return _unique(names, [run.path.name for run in runs])


def _unique(names: Sequence[str], folders: Sequence[str]) -> list[str]:
    """Names that are there twice get their folder beside them, or else a number."""
    many = Counter(names)
    longer = [
        f"{name} ({folder})" if many[name] > 1 and folder else name
        for name, folder in zip(names, folders, strict=True)
    ]
    again, seen = Counter(longer), Counter[str]()
    found = []
    for name in longer:
        seen[name] += 1
        found.append(f"{name}, {seen[name]}" if again[name] > 1 else name)
    return found


def _corruption(spec: dict[str, Any]) -> str:
    corrupt = spec.get("corrupt") or {}
    if corrupt.get("kind") != "noise":
        return f"{corrupt.get('kind', 'unknown')} corrupted"
    return (
        f"noise on the {corrupt.get('at')} ({corrupt.get('form')}, scale {corrupt.get('scale')}, "
        f"{corrupt.get('draws')} draws)"
    )


# -- circuits, head functions, tracing -----------------------------------------------------------


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except ValueError as error:
        raise StoreError(f"{file}: is damaged ({error}); write that folder anew") from error


def _circuits(folder: Path, number: int, figures: _Figures) -> str:
    about, heads = _json(folder / "circuits.json"), pd.read_parquet(folder / "heads.parquet")
    universal = pd.read_csv(folder / "universal.csv")
    runs = list(dict.fromkeys(heads["run"]))
    gaps = {str(name): float(gap) for name, gap in about.get("gaps", {}).items()}
    everywhere = universal[universal["universal"]]
    said = [f"{r.tower} L{r.layer} {r.kind} H{r.head}" for r in everywhere.itertuples()]
    important, sure = heads["important"], heads["important"] & heads["confirmed"]
    chance = "; ".join(
        f"{c['tower']} {c['kind']}: {c['in_every_run']} of {c['heads']}, {c['expected']:.2g} expected, "
        f"p = {c['p_value']:.2g}"
        for c in about.get("chance", [])
        if c["in_every_run"]
    )
    known = {name: Known(**one) for name, one in about.get("known", {}).items()}
    warned = [f"{name}: {text}" for name, one in known.items() for text in one.sentences[1:]]
    parts = [
        *(f'<p class="warning">{escape(text)}.</p>' for text in warned),
        "<p>A head is important in a run if its mean change of LD is not zero (sign-flip permutation "
        "test over examples, false discovery rate 5 % over the heads of a kind), and its size is at "
        "least the average head's and 1 % of the gap between the clean and the corrupt run. It is "
        "confirmed if one random half of the examples finds it and the other half agrees.</p>",
        figures.show(
            f"part{number}-universal",
            plots.universal(heads, gap=max(gaps.values(), default=0.0)),
            f"{important.sum()} head{'s' if important.sum() != 1 else ''} over {len(runs)} "
            f"run{'s' if len(runs) != 1 else ''} are important (dots), {sure.sum()} of these confirmed "
            f"(rings). Important in every run: {', '.join(said) or 'none'}. "
            + (f"Against chance: {chance}." if chance and len(runs) > 1 else "")
            + f" {_say_n(heads)} The colour scale is this figure's own.",
            heads,
        ),
    ]
    for (tower, kind), rows in heads.groupby(["tower", "kind"], sort=False):
        tables, marks, cells = {}, {}, {}
        for run, table in rows.groupby("run", sort=False):
            title = f"{run}, at {table['position'].iloc[0]}, n = {table['n'].max()}"
            tables[title] = table.pivot(index="layer", columns="head", values="mean")
            cells[title] = table.rename(columns={"ci_low": "low", "ci_high": "high"})
            shown = table[table["important"]]
            marks[title] = list(zip(shown["layer"], shown["head"], strict=True))
        name = f"{plots.KINDS[str(kind)]} heads, {plots.TOWERS[str(tower)]}"
        many = sum(map(len, marks.values()))
        gap = max((gaps.get(str(run), 0.0) for run in rows["run"].unique()), default=0.0)
        parts.append(f"<h3>{escape(_upper(name))}</h3>")
        parts.append(
            figures.show(
                f"part{number}-{tower}-{kind}",
                plots.panels(tables, marks=marks, gap=gap),
                f"{_say(cells, tables, gap)} A dot marks an important head ({many} in all).",
                rows,
            )
        )
    text = "".join(parts)
    is_unknown = bool(known) and all(one.severity == "unknown" for one in known.values())
    return f'<div class="unknown">{text}</div>' if is_unknown else text


def _functions(folder: Path, number: int, figures: _Figures) -> tuple[str, str]:
    about = _json(folder / "heads.json")
    table, together = (pd.read_csv(folder / f"{n}.csv") for n in ("functions", "together"))
    measures = pd.read_csv(folder / "measures.csv")
    maps = pd.read_parquet(folder / "maps.parquet")
    counts = ", ".join(f"{n} {label}" for label, n in table["label"].value_counts().items())
    parts = [
        f"<p>{len(table)} heads of {escape(str(about['model']))} on {table['n'].max()} examples: "
        f"{escape(counts)}. {escape(_say_together(together))}</p>",
        '<div class="wide"><table><tr><th>head</th><th>label</th><th>evidence</th></tr>',
        *(
            f'<tr><td class="site"><code>{escape(r.site)}</code></td><td>{escape(r.label)}</td>'
            f"<td>{escape(r.evidence)}</td></tr>"
            for r in table.itertuples()
        ),
        "</table></div>",
    ]
    if (folder / "patches" / "run.json").is_file() and len(maps):
        run = read_run(folder / "patches")
        pictures = {e["id"]: e["clean_image"] for e in run.pictures() if e.get("clean_image")}
        order = table.assign(size=_size(measures, table)).sort_values("size", ascending=False)
        shown = [s for s in order["site"] if s in set(maps["site"])][:5]
        titles = {r.site: f"{r.tower} L{r.layer} H{r.head}\n{r.label}" for r in table.itertuples()}
        some = maps[maps["site"].isin(shown)].sort_values(
            "site", key=lambda s: s.map(shown.index), kind="stable"
        )
        if shown and set(some["example"]) & set(pictures):
            parts.append("<h3>Where they look, and what the patches do</h3>")
            parts.append(
                figures.show(
                    f"part{number}-attention",
                    plots.attention(some, pictures, run.effects(), titles=titles),
                    "Attention minus the mean over all heads, for the heads that move LD most; the line "
                    "is the object's outline in patches. At the right the change of LD when a single "
                    "patch, as the language model reads it, is taken from the clean image.",
                    some,
                )
            )
    return f"What heads do: {Path(str(about['data'])).name}", "".join(parts)


def _neurons(folder: Path, number: int, figures: _Figures) -> tuple[str, str]:
    """What `vlmscope neurons` found, described, perturbed or edited."""
    about = _json(folder / "neurons.json")
    write = {"find": _found, "describe": _described, "perturb": _perturbed, "edit": _edited}
    if about.get("what") not in write:
        raise StoreError(f"{folder / 'neurons.json'}: is of another version; write that folder anew")
    return write[str(about["what"])](folder, number, figures, about)


def _table(rows: pd.DataFrame, form: str = "{:.3g}") -> str:
    """A table of HTML; numbers in a few digits, text escaped."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows.columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape('' if pd.isna(x) else form.format(x) if isinstance(x, float) else str(x))}</td>"
            for x in row
        )
        + "</tr>"
        for row in rows.itertuples(index=False)
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _kept(folder: Path) -> dict[str, Path]:
    """The pictures of a folder of `neurons`, by example."""
    if not (folder / "pictures.csv").is_file():
        return {}
    table = pd.read_csv(folder / "pictures.csv", dtype=str, keep_default_na=False)
    return {row.example: folder / "pictures" / Path(row.file).name for row in table.itertuples()}


def _found(folder: Path, number: int, figures: _Figures, about: Mapping[str, Any]) -> tuple[str, str]:
    tokens = pd.read_csv(folder / "tokens.csv", keep_default_na=False).head(20)
    layers = pd.read_csv(folder / "layers.csv", keep_default_na=False)
    captions = pd.read_csv(folder / "captions.csv", keep_default_na=False)
    spread = layers.pivot_table(index="word", columns="layer", values="neurons", fill_value=0)
    spread.columns = [f"layer {n}" for n in spread.columns]
    text = (
        f"<p>{escape(str(about['model']))}, {len(captions)} caption{'s' * (len(captions) > 1)}, such as: "
        f"<b>{escape(str(captions['caption'].iloc[0]))}</b>. Neurons that are listed most, with the tokens that "
        f"they move most:</p>{_table(tokens)}<h3>How many of the listed neurons lie in each layer</h3>"
        f"{_table(spread.astype(int).reset_index())}"
    )
    return "Neurons that contribute to words", text


def _described(folder: Path, number: int, figures: _Figures, about: Mapping[str, Any]) -> tuple[str, str]:
    cards = pd.read_csv(folder / "cards.csv", keep_default_na=False)
    maps = pd.read_parquet(folder / "maps.parquet")
    driving = pd.read_csv(folder / "driving.csv", keep_default_na=False)
    pictures = _kept(folder)
    parts = [
        f"<p>{len(cards)} neurons of {escape(str(about['model']))}.</p>",
        _table(cards.drop(columns="weights")),
    ]
    own = maps[~maps["neuron"].str.contains(": mean of top")]
    for what, some, sentence in (
        (
            "maps",
            own,
            "Activation over the patches of the pictures that drive each neuron most; the line is "
            "around the patches above the 95th percentile.",
        ),
        (
            "means",
            maps.drop(own.index),
            "The mean activation of a word's top neurons over the pictures that drive it most.",
        ),
    ):
        for start, names in enumerate(_groups(list(dict.fromkeys(some["neuron"])), 6)):
            rows = some[some["neuron"].isin(names)]
            figure = plots.neuron_maps(rows, pictures)
            parts.append(figures.show(f"part{number}-{what}-{start}", figure, sentence, rows))
    best = driving[driving["rank"] <= 3]
    parts.append(f"<h3>Which pictures drive them most</h3>{_table(best)}")
    if (folder / "measures.csv").is_file():
        table = pd.read_csv(folder / "measures.csv", keep_default_na=True)
        names = [
            n
            for n in ("auc", "selectivity", "overlap", "overlap, shuffled", "p drop, zero")
            if n in set(table["measure"])
        ]
        parts.append("<h3>Are they what they seem?</h3>")
        parts.append(
            figures.show(
                f"part{number}-measures",
                plots.measures(table, names),
                "Measured on pictures on which the neurons were not chosen, with 95 % intervals. The null are neurons "
                "chosen by shuffled labels for the same token; for shuffled patches it is chance.",
                table,
            )
        )
        wide = table[table["method"] == "contribution"].drop(columns="method")
        parts.append(_table(wide))
    return "Neurons, one by one", "".join(parts)


def _groups(items: Sequence[str], many: int) -> list[list[str]]:
    return [list(items[n : n + many]) for n in range(0, len(items), many)]


def _perturbed(folder: Path, number: int, figures: _Figures, about: Mapping[str, Any]) -> tuple[str, str]:
    table = pd.read_csv(folder / "perturb.csv", keep_default_na=False)
    return (
        "Words without their neurons",
        f"<p>{escape(str(about['model']))}: how far the probability of a word falls where the caption says it, "
        f"without its top k neurons and without as many random ones of the same layers.</p>{_table(table)}",
    )


def _edited(folder: Path, number: int, figures: _Figures, about: Mapping[str, Any]) -> tuple[str, str]:
    measures = pd.read_csv(folder / "measures.csv")
    captions = pd.read_csv(folder / "captions.csv", keep_default_na=False)
    columns = pd.read_csv(folder / "columns.csv")
    pictures = _kept(folder)
    shown = captions[captions["example"].isin(pictures)].drop_duplicates("example")
    shown = shown.sort_values("has", ascending=False, kind="stable")
    target = str(about.get("to") or "anything else")
    cards = "".join(
        f'<div class="pair"><div><figure><img alt="picture" src="{_inline(pictures[row.example].read_bytes())}">'
        f'</figure></div><p><span class="soft">before</span> {escape(row.before)}<br>'
        f'<span class="soft">after</span> <b>{escape(row.after)}</b></p></div>'
        for row in shown.itertuples()
    )
    objects = ""
    if (folder / "objects.csv").is_file():
        objects = (
            f"<h3>Objects that are named and not there</h3>{_table(pd.read_csv(folder / 'objects.csv'))}"
        )
    share = (columns["change"] / columns["length"].clip(lower=1e-12)).median()
    return (
        f"Edit: {about['from']} to {target}",
        f"<p>{escape(str(about['model']))}: {len(columns)} columns changed, by a length of {about['size']:.3g} in "
        f"all; the median column by {share:.0%} of its own. Free captions of pictures that the edit was not made "
        f'on, with 95 % intervals:</p>{_table(measures)}<div class="pairs">{cards}</div>{objects}',
    )


def _size(measures: pd.DataFrame, table: pd.DataFrame) -> pd.Series[float]:
    """How far each head moves LD: patched in where that was done, else knocked out."""
    by = measures.pivot_table(index="site", columns="measure", values="value").abs()
    column = "effect" if "effect" in by else "mean"
    return table["site"].map(by[column]).fillna(0.0)


def _say_together(table: pd.DataFrame) -> str:
    whole = table.loc[table["set"] == "none", "accuracy"].iloc[0]
    is_mean = (table["set"] == "these heads") & (table["knockout"] == "mean")
    these = table.loc[is_mean, "accuracy"].iloc[0]
    text = f"With all of them set to their mean at once, accuracy falls from {whole:.0%} to {these:.0%}"
    random = table.loc[table["set"] == "random heads", "accuracy"]
    if random.empty:
        return f"{text}; there are too few other heads to compare with."
    return (
        f"{text}; with equally many random heads of the same layers, to {random.mean():.0%} "
        f"({len(random)} draws, from {random.min():.0%} to {random.max():.0%})."
    )


def _tracing(folder: Path, number: int, figures: _Figures) -> tuple[str, str]:
    about = _json(folder / "tracing.json")
    table = pd.read_parquet(folder / "tracing.parquet")
    noise = about["noise"]
    left = about["left_out_of_each_repeat"]
    span = " to ".join(map(str, dict.fromkeys((min(left), max(left)))))
    repeat = folder / "repeats" / "00"
    known = knows(read_run(repeat).baselines()) if (repeat / "run.json").is_file() else None
    parts = [
        "" if known is None else _known(known),
        f"<p>{about['examples']} examples, {noise['draws']} repeats of noise on the image embedding "
        f"({escape(str(noise['form']))}, scale {noise['scale']}). A figure shows the share of P(answer) "
        "that comes back when clean states are restored at one token, in a window of layers around one "
        f"layer. Left out where ceiling and floor nearly meet: {span} examples a "
        "repeat.</p>",
    ]
    for tower in dict.fromkeys(table["tower"]):
        for length in sorted(table["length"].unique()):
            for window in sorted(table["window"].unique()):
                tables = plots.tracing_tables(table, tower=str(tower), window=int(window), length=int(length))
                if not tables:
                    continue
                rows = table.query("tower == @tower and length == @length and window == @window")
                title = f"{_upper(plots.TOWERS[str(tower)])}, windows of {window}"
                title += f", questions of {length} tokens" if length else ""
                parts.append(f"<h3>{escape(title)}</h3>")
                shown = {_upper(plots.KINDS[k]): t for k, t in tables.items()}
                parts.append(
                    figures.show(
                        f"part{number}-{tower}-{length}-{window}",
                        plots.panels(shown, value="restored"),
                        _say_traced(rows),
                        rows,
                    )
                )
    text = "".join(parts)
    text = text if known is None else _grey(text, known)
    return f"Causal tracing: {Path(str(about['data'])).name}", text


def _say_traced(rows: pd.DataFrame) -> str:
    (best,) = plots.most_restored(rows, 1).itertuples()
    spread = rows["spread"].max()
    some = (
        " of those that at least half of the examples hold" if rows["n"].min() < rows["n"].max() / 2 else ""
    )
    return (
        f"The most that comes back{some} is {best.restored:.1%}{_interval(best.low, best.high, '.1%')}, by "
        f"{best.kind} of layer {best.layer} at {best.at}. {_say_n(rows)} {rows['repeats'].max()} repeats"
        + ("." if pd.isna(spread) else f", which differ by {spread:.2g} (SD) at the most.")
    )


# -- one run -------------------------------------------------------------------------------------


def _section(number: int, run: Run, figures: _Figures) -> str:
    base = run.baselines()
    known, ran = knows(base), int((~base["excluded"]).sum())
    gap = abs(float((base["ld_clean"] - base["ld_corrupt"]).mean())) if ran else 0.0
    parts = [_known(known), _facts(run), _pictures(run)]
    parts.append("<h3>The runs without patches</h3>" + _baselines(base))
    best = []
    for tower in plots.TOWERS:
        # A tower's modules, then its heads: the whole table of a long run would not fit.
        for is_unit in (False, True):
            here = (pc.field("tower") == tower) & (pc.field("unit").is_valid() == is_unit)
            rows = run.effects(here)
            if len(rows):
                best.append(plots.strongest(rows, n=15))
                parts.extend(_figures(f"run{number}", run, tower, rows, figures, gap))
    if best:
        table = pd.concat(best, ignore_index=True)
        order = pd.DataFrame({"few": table["n"] < ran / 2, "size": -table["mean"].abs()})
        table = table.loc[order.sort_values(["few", "size"], kind="stable").index].head(15)
        parts.append("<h3>The strongest sites</h3>" + _strongest(table))
    else:
        parts.append("<p>There are no patches in this run.</p>")
    return _grey("".join(parts), known)


def _facts(run: Run) -> str:
    spec = run.spec
    source, base = ("clean", "corrupt") if spec.get("direction") != "noise" else ("corrupt", "clean")
    versions = spec.get("versions") or {}
    rows = {
        "model": f"{spec.get('model')} (weights {str(spec.get('weights'))[:12]}…)",
        "data": f"{spec.get('data')}, {spec.get('n_examples')} examples",
        "corruption": _corruption(spec),
        "patching": f"{source} activations into the {base} run ({spec.get('direction')})",
        "sites": ", ".join(map(str, spec.get("sites") or [])),
        "computed": f"{spec.get('engine')} engine, {spec.get('dtype')}, {spec.get('device')}, "
        f"seed {spec.get('seed')}; " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "folder": str(run.path) + ("" if run.finished else " (not finished)"),
    }
    cells = "".join(
        f"<tr><th>{escape(k)}</th><td><code>{escape(v)}</code></td></tr>" for k, v in rows.items()
    )
    return f'<div class="wide"><table>{cells}</table></div>'


def _pictures(run: Run) -> str:
    cards = "".join(_card(example) for example in run.pictures())
    return f'<h3>Examples</h3><div class="pairs">{cards}</div>' if cards else ""


def _card(example: dict[str, Any]) -> str:
    shown = "".join(
        f'<figure><img alt="{side} image" src="{_inline(Path(path).read_bytes())}">'
        f"<figcaption>{side}</figcaption></figure>"
        for side in ("clean", "corrupt")
        if (path := example.get(f"{side}_image"))
    )
    lines = [f"<b>{escape(str(example.get('clean_prompt', '')))}</b>"]
    if example.get("corrupt_prompt"):
        lines.append(f"corrupt: {escape(str(example['corrupt_prompt']))}")
    lines.append(
        f"answer <b>{escape(str(example.get('answer')))}</b>, foil <b>{escape(str(example.get('foil')))}</b>"
    )
    lines.append(f'<span class="soft">{escape(str(example.get("id")))}</span>')
    return f'<div class="pair"><div>{shown}</div><p>{"<br>".join(lines)}</p></div>'


def _baselines(table: pd.DataFrame) -> str:
    ran = table[~table["excluded"]]
    if ran.empty:
        text = "No example could be run."
    else:
        turned = (ran["ld_corrupt"] < 0).mean()
        text = (
            f"{len(ran)} examples ran. LD goes from {ran['ld_clean'].mean():+.2f} to "
            f"{ran['ld_corrupt'].mean():+.2f} when the input is corrupted; in {turned:.0%} the foil is then "
            "ahead."
        )
    left = table[table["excluded"]]
    if left.empty:
        return f"<p>{escape(text)}</p>"
    reasons = "".join(
        f"<li>{escape(str(row.example))}: {escape(str(row.reason))}</li>"
        for row in left.head(20).itertuples()
    )
    more = f"<li>and {len(left) - 20} more</li>" if len(left) > 20 else ""
    return f"<p>{escape(text)} {len(left)} were left out:</p><ul>{reasons}{more}</ul>"


def _strongest(table: pd.DataFrame) -> str:
    head = ("site", "token", "mean change of LD", "95 % interval", "SD", "examples")
    names = "".join(f'<th class="{"n" if i > 1 else ""}">{escape(name)}</th>' for i, name in enumerate(head))
    rows = "".join(
        f"<tr><td><code>{escape(str(r.site))}</code>"
        f"{'' if '@' in r.site else escape(f' at {r.slot}')}</td>"
        f"<td>{'' if pd.isna(r.token) else escape(str(r.token))}</td>"
        f'<td class="n">{plots.short_number(r.mean)}</td>'
        f'<td class="n">{_ends(r.low, r.high)}</td>'
        f'<td class="n">{"" if pd.isna(r.sd) else f"{r.sd:.3g}"}</td><td class="n">{r.n}</td></tr>'
        for r in table.itertuples()
    )
    return f'<div class="wide"><table><tr>{names}</tr>{rows}</table></div>'


# -- figures -------------------------------------------------------------------------------------


def _figures(
    name: str, run: Run, tower: str, rows: pd.DataFrame, figures: _Figures, gap: float
) -> Iterator[str]:
    """The figures of one tower's modules, or of its heads."""
    title = escape(plots.TOWERS[tower])
    single = rows[~rows["site"].str.contains("/", regex=False) & rows["logit_diff"].notna()]
    if rows["unit"].notna().any():
        heads = _heads(single, tower)
        if heads:
            yield f"<h3>Heads, {title}</h3>"
            yield _panels(f"{name}-{tower}-heads", heads, figures, gap)
        return
    patches = plots.is_patch(single)
    if patches.any():
        yield from _image(name, run, tower, single[patches], figures, gap)
    tokens = {} if tower == "vision" else _tokens(single, tower)
    if tokens:
        yield f"<h3>Layers and tokens, {title}</h3>"
        yield _panels(f"{name}-{tower}-tokens", tokens, figures, gap)


def _panels(name: str, cells: dict[str, pd.DataFrame], figures: _Figures, gap: float) -> str:
    """A figure of tables of cells side by side; the cells are its data."""
    tables = {title: wide(some) for title, some in cells.items()}
    figure = plots.panels(tables, gap=gap)
    return figures.show(name, figure, _say(cells, tables, gap), _long(cells))


def _heads(rows: pd.DataFrame, tower: str) -> dict[str, pd.DataFrame]:
    """Layer × head of each kind of attention where the tower is read out, by panel."""
    heads = rows[rows["unit"].astype("string").str.startswith("h").fillna(False).astype(bool)]
    cells = {}
    for kind in [k for k in ("attn", "cross") if k in set(heads["kind"])]:
        slot = head_slot(heads[heads["kind"] == kind])
        title = f"{_upper(plots.KINDS[kind])} heads at {slot}"
        cells[title] = head_cells(heads, tower=tower, kind=kind, slot=slot, intervals=True)
    return cells


def _tokens(rows: pd.DataFrame, tower: str) -> dict[str, pd.DataFrame]:
    """Layer × slot of each kind, by panel; patches of the image have figures of their own."""
    rows = rows[~plots.is_patch(rows)]
    return {
        _upper(plots.KINDS[kind]): token_cells(rows, tower=tower, kind=kind, intervals=True)
        for kind in [k for k in plots.KINDS if k in set(rows["kind"])]
    }


def _image(
    name: str, run: Run, tower: str, rows: pd.DataFrame, figures: _Figures, gap: float
) -> Iterator[str]:
    """The effect of image patches, over the first kept picture."""
    places = rows["token"].str.split(",", expand=True).astype(int)
    grid = [int(places[0].max()) + 1, int(places[1].max()) + 1]
    kept = {e["id"]: e for e in run.pictures() if e.get("clean_image")}
    single = rows[rows["unit"].isna() & rows["position"].notna() & rows["example"].isin(list(kept))]
    for kind in [k for k in plots.KINDS if k in set(single["kind"])]:
        first = single[single["kind"] == kind]["example"].iloc[0]
        one = single[(single["kind"] == kind) & (single["example"] == first)]
        if len(one) < 2:
            continue
        picture = kept[first]["clean_image"]
        figure = plots.image_grid(one, picture, (grid[0], grid[1]), kind=kind, tower=tower, gap=gap)
        best = one.loc[one["logit_diff"].abs().idxmax()]
        yield f"<h3>Image patches, {escape(plots.KINDS[kind])}, {escape(plots.TOWERS[tower])}</h3>"
        yield figures.show(
            f"{name}-{tower}-{kind}-image",
            figure,
            f"Each patch of the image on its own, over the clean picture of one example, {first}. The "
            f"colour scale is this figure's own. The largest change of LD is {plots.short_number(best['logit_diff'])}, at layer {best['layer']}, "
            f"patch {best['token']} (row,column).",
            one,
        )


def _say(cells: Mapping[str, pd.DataFrame], tables: Mapping[str, pd.DataFrame], gap: float) -> str:
    """What a figure shows, in numbers that are those of the cells."""
    data = _long(cells)
    few = data["n"] < data.groupby("panel")["n"].transform("max") / 2
    order = pd.DataFrame({"few": few, "size": -data["mean"].abs()}).sort_values(
        ["few", "size"], kind="stable"
    )
    best = data.loc[order.index[0]]
    column = "head" if "head" in data else "slot"
    some = " that at least half of the examples hold" if few.any() else ""
    at = [slot_words(*one) for one in _places(data)] if column == "head" else []
    where = f" Heads are shown at {'; '.join(dict.fromkeys(at))}." if at else ""
    return (
        f"The largest mean change of LD{some} is {plots.short_number(best['mean'])}"
        f"{_interval(best['low'], best['high'])}, at layer {best['layer']}, {column} {best[column]} "
        f"({best['panel'][:1].lower() + best['panel'][1:]}).{where} {_say_n(data)} One colour scale for all "
        f"panels, and this figure's own: full colour is {plots.full_colour(tables.values(), gap=gap):.3g} "
        "logits. Red moves the model towards the answer, blue towards the foil."
    )


def _places(data: pd.DataFrame) -> list[tuple[str, str]]:
    """Where heads are shown: slots and their towers."""
    slot = "position" if "position" in data else "slot"
    pairs = data[[slot, "tower"]].drop_duplicates().itertuples(index=False)
    return [(str(one[0]), str(one[1])) for one in pairs]


def _say_n(data: pd.DataFrame) -> str:
    """Over how many examples the means of a figure are."""
    few, many = int(data["n"].min()), int(data["n"].max())
    hardly = f" (fewer than {FEWEST} can hardly show anything)" if many < FEWEST else ""
    fewer = f", down to {few} where the figure says so" if few < many else ""
    return f"Means over {many} example{'s' if many != 1 else ''}{fewer}{hardly}."


def _interval(low: float, high: float, form: str = "") -> str:
    """An interval behind its mean; nothing where there is none."""
    ends = _ends(low, high, form)
    return f" (95 % interval {ends})" if ends else ""


def _ends(low: float, high: float, form: str = "") -> str:
    if pd.isna(low):
        return ""
    if form:
        return f"{low:{form}} to {high:{form}}"
    return f"{plots.short_number(low)} to {plots.short_number(high)}"


def _together(names: Sequence[str], runs: Sequence[Run], figures: _Figures) -> str:
    """What at least two runs have patched of a tower and kind, beside each other."""
    parts = []
    for (tower, kind, has_heads), held in _common(runs).items():
        panels, gaps = {}, []
        for number in held:
            here = (pc.field("tower") == tower) & (pc.field("kind") == kind)
            rows = runs[number].effects(here & (pc.field("unit").is_valid() == has_heads))
            rows = rows[~rows["site"].str.contains("/", regex=False) & rows["logit_diff"].notna()]
            found = _heads(rows, tower) if has_heads else _tokens(rows, tower)
            for cells in found.values():
                at = f", at {cells.attrs['slot']}" if has_heads else ""
                panels[f"{names[number]}{at}, n = {cells['n'].max()}"] = cells
                gaps.append(cells.attrs["gap"] or 0.0)
        if len(panels) > 1:
            what = f"{_upper(plots.KINDS[kind])}{' heads' if has_heads else ''}, {plots.TOWERS[tower]}"
            name = f"all-{tower}-{kind}{'' if has_heads else '-tokens'}"
            parts.append(f"<h3>{escape(what)}</h3>{_panels(name, panels, figures, max(gaps))}")
    unknown = [n for n, run in zip(names, runs, strict=True) if knows(run.baselines()).severity == "unknown"]
    if parts and unknown:
        text = f"The model does not seem to know the task of {'; '.join(unknown)}: see there."
        parts.insert(0, f'<p class="warning">{escape(text)}</p>')
    text = "".join(parts)
    return f'<div class="unknown">{text}</div>' if len(unknown) == len(runs) else text


def _common(runs: Sequence[Run]) -> dict[tuple[str, str, bool], list[int]]:
    """Which runs patched which tower and kind, whole or by head, where at least two did."""
    held: dict[tuple[str, str, bool], list[int]] = {}
    for number, run in enumerate(runs):
        sites = [Site.parse(text) for text in run.spec.get("sites") or []]
        keys = [
            (s.tower, s.kind, s.unit is not None)
            for s in sites
            if s.tower != "vision" and not (s.unit or "").startswith("n")
        ]
        for key in dict.fromkeys(keys):
            held.setdefault(key, []).append(number)
    return {key: some for key, some in held.items() if len(some) > 1}


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]

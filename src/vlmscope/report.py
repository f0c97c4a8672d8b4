"""One self-contained HTML file about one or more runs, its figures also beside it as PNG.

Everything is read from run folders; no model and no network is needed. Whatever comes from data is
escaped.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from vlmscope import plots
from vlmscope.errors import StoreError
from vlmscope.store import Run, read_run

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
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
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
.pair p { margin: .5rem 0 0; font-size: .9rem; overflow-wrap: anywhere; }
"""


def write_report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write the report of these run folders to `out`, and its figures to `<stem>-figures/`.

    Raises `StoreError` if a folder is no run, or `out` cannot be written.
    """
    if not runs:
        raise StoreError("no runs to report on; name at least one run folder")
    out = Path(out)
    opened = [read_run(run) for run in runs]
    figures = out.with_name(f"{out.stem}-figures")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if figures.exists():
            shutil.rmtree(figures)
        figures.mkdir()
        page = _page(opened, _Figures(figures))
        temporary = out.with_name(f".{out.name}.part")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise StoreError(f"{out}: cannot write the report: {error.strerror or error}") from error
    return out


class _Figures:
    """Saves each figure as a PNG file and gives the HTML that shows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def show(self, name: str, figure: Figure, sentence: str) -> str:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144)
        file = self.folder / f"{name}.png"
        file.write_bytes(buffer.getvalue())
        return (
            f'<figure><img class="plot" alt="{escape(sentence)}" src="{_inline(buffer.getvalue())}">'
            f"<figcaption>{escape(sentence)} "
            f'<a href="{escape(f"{self.folder.name}/{file.name}")}" download>PNG</a></figcaption></figure>'
        )


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _page(runs: Sequence[Run], figures: _Figures) -> str:
    names = [_name(run, number) for number, run in enumerate(runs)]
    links = "".join(f'<li><a href="#run{n}">{escape(x)}</a></li>' for n, x in enumerate(names))
    tables = [run.effects() for run in runs]
    together = _together(names, tables, figures) if len(runs) > 1 else ""
    sections = "".join(
        _section(number, name, run, effects, figures)
        for number, (name, run, effects) in enumerate(zip(names, runs, tables, strict=True))
    )
    contents = f"<nav><ul>{links}</ul></nav>" if len(runs) > 1 else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vlmscope report</title><style>{STYLE}</style></head><body>"
        "<h1>vlmscope report</h1>"
        '<p class="soft">Which part of the model carries the evidence to the answer? In each run '
        "activations of one run are copied into the other, one site at a time; a figure shows how "
        "far that moves the answer. LD is the logit of the answer minus that of the foil; a "
        "change is LD after the patch minus LD of the corrupt run.</p>"
        f"{contents}{together}{sections}</body></html>\n"
    )


def _name(run: Run, number: int) -> str:
    spec = run.spec
    return f"{Path(str(spec.get('data', number))).name}, {_corruption(spec)}"


def _corruption(spec: dict[str, Any]) -> str:
    corrupt = spec.get("corrupt") or {}
    if corrupt.get("kind") != "noise":
        return f"{corrupt.get('kind', 'unknown')} corrupted"
    return (
        f"noise on the {corrupt.get('at')} ({corrupt.get('form')}, scale {corrupt.get('scale')}, "
        f"{corrupt.get('draws')} draws)"
    )


# -- one run -------------------------------------------------------------------------------------


def _section(number: int, name: str, run: Run, effects: pd.DataFrame, figures: _Figures) -> str:
    parts = [f'<h2 id="run{number}">{escape(name)}</h2>', _facts(run), _pictures(run)]
    parts.append("<h3>The runs without patches</h3>" + _baselines(run.baselines()))
    if effects.empty:
        parts.append("<p>There are no patches in this run.</p>")
    parts.extend(_figures(f"run{number}", run, effects, figures))
    if len(effects):
        parts.append("<h3>The strongest sites</h3>" + _strongest(effects))
    return "".join(parts)


def _facts(run: Run) -> str:
    spec = run.spec
    source, base = (
        ("clean", "corrupt") if spec.get("direction") != "noise" else ("corrupt", "clean")
    )
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
    lines.append(f"answer <b>{escape(str(example.get('answer')))}</b>, "
                 f"foil <b>{escape(str(example.get('foil')))}</b>")  # fmt: skip
    lines.append(f'<span class="soft">{escape(str(example.get("id")))}</span>')
    return f'<div class="pair"><div>{shown}</div><p>{"<br>".join(lines)}</p></div>'


def _baselines(table: pd.DataFrame) -> str:
    ran = table[~table["excluded"]]
    if ran.empty:
        text = "No example could be run."
    else:
        turned = (ran["ld_corrupt"] < 0).mean()
        text = (
            f"{len(ran)} examples ran; the model answers {ran['correct'].mean():.0%} of them right. "
            f"P(answer) falls from {ran['p_clean'].mean():.3f} to {ran['p_corrupt'].mean():.3f} when "
            f"the input is corrupted, and LD from {ran['ld_clean'].mean():+.2f} to "
            f"{ran['ld_corrupt'].mean():+.2f}; in {turned:.0%} the foil is then ahead."
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


def _strongest(effects: pd.DataFrame) -> str:
    table = plots.strongest(effects, n=15)
    head = ("site", "token", "mean change of LD", "SD", "examples")
    names = "".join(
        f'<th class="{"n" if i > 1 else ""}">{escape(name)}</th>' for i, name in enumerate(head)
    )
    rows = "".join(
        f"<tr><td><code>{escape(str(r.site))}</code></td>"
        f"<td>{'' if pd.isna(r.token) else escape(str(r.token))}</td>"
        f'<td class="n">{plots.short_number(r.mean)}</td>'
        f'<td class="n">{"" if pd.isna(r.sd) else f"{r.sd:.3g}"}</td><td class="n">{r.n}</td></tr>'
        for r in table.itertuples()
    )
    return f'<div class="wide"><table><tr>{names}</tr>{rows}</table></div>'


# -- figures -------------------------------------------------------------------------------------


def _figures(name: str, run: Run, effects: pd.DataFrame, figures: _Figures) -> Iterator[str]:
    for tower in ("vision", "qformer", "encoder", "decoder"):
        rows = effects[effects["tower"] == tower]
        if rows.empty:
            continue
        title = escape(plots.TOWERS[tower])
        whole = rows[rows["unit"].isna() & (tower != "vision")]
        kinds = [k for k in plots.KINDS if k in set(whole["kind"])]
        tables = {k: plots.token_table(whole, kind=k, tower=tower) for k in kinds}
        if tables:
            named = {_upper(plots.KINDS[k]): t for k, t in tables.items()}
            yield f"<h3>Layers and tokens, {title}</h3>"
            yield figures.show(f"{name}-{tower}-tokens", plots.panels(named), _say(named, "token"))
        heads = _heads(rows, tower)
        if heads:
            yield f"<h3>Heads, {title}</h3>"
            yield figures.show(f"{name}-{tower}-heads", plots.panels(heads), _say(heads, "head"))
        if tower == "vision":
            yield from _image(name, run, rows, figures)


def _heads(rows: pd.DataFrame, tower: str) -> dict[str, pd.DataFrame]:
    """Layer × head of each kind of attention, at the place that is strongest over all kinds."""
    heads = rows[rows["unit"].astype("string").str.startswith("h").fillna(False).astype(bool)]
    if heads.empty:
        return {}
    size = heads.assign(size=heads["logit_diff"].abs())
    at = size.groupby(size["role"].fillna("-"))["size"].mean().drop("-", errors="ignore")
    role = str(at.idxmax()) if len(at) else None
    tables = {}
    for kind in ("attn", "cross"):
        if kind in set(heads["kind"]):
            table = plots.head_table(heads, kind=kind, tower=tower, role=role)
            place = f" at {table.attrs['place']}" if table.attrs.get("place") else ""
            tables[f"{_upper(plots.KINDS[kind])} heads{place}"] = table
    return tables


def _image(name: str, run: Run, rows: pd.DataFrame, figures: _Figures) -> Iterator[str]:
    """The effect of image patches over the first kept picture, and over the mean of all examples."""
    grid = ((run.description.get("towers") or {}).get("vision") or {}).get("grid")
    kept = {e["id"]: e for e in run.pictures() if e.get("clean_image")}
    single = rows[rows["unit"].isna() & rows["position"].notna() & rows["example"].isin(list(kept))]
    for kind in [k for k in plots.KINDS if k in set(single["kind"])]:
        first = single[single["kind"] == kind]["example"].iloc[0]
        one = single[(single["kind"] == kind) & (single["example"] == first)]
        if not grid or len(one) < 2:
            continue
        picture = kept[first]["clean_image"]
        figure = plots.image_grid(one, picture, tuple(grid), kind=kind)
        best = one.loc[one["logit_diff"].abs().idxmax()]
        yield f"<h3>Image patches, {escape(plots.KINDS[kind])}</h3>"
        yield figures.show(
            f"{name}-vision-{kind}",
            figure,
            f"Each patch of the image on its own, over the clean picture of {first}. The largest "
            f"change of LD is {plots.short_number(best['logit_diff'])}, at layer {best['layer']}, "
            f"patch {best['token']} (row,column).",
        )


def _say(tables: dict[str, pd.DataFrame], column: str) -> str:
    """What a figure shows, in numbers."""
    filled = {name: t.stack() for name, t in tables.items() if not t.empty}
    filled = {name: values for name, values in filled.items() if len(values)}
    if not filled:
        return "Nothing of this kind was patched."
    name = max(filled, key=lambda key: filled[key].abs().max())
    layer, where = filled[name].abs().idxmax()
    largest = plots.short_number(float(filled[name].loc[(layer, where)]))
    many = max(t.attrs.get("examples", 0) for t in tables.values())
    return (
        f"The largest mean change of LD is {largest}, at layer {layer}, {column} {where} "
        f"({name[:1].lower() + name[1:]}); mean over {many} "
        f"example{'s' if many != 1 else ''}, one colour scale for all panels. Red moves the model "
        "towards the answer, blue towards the foil."
    )


def _together(names: Sequence[str], tables: Sequence[pd.DataFrame], figures: _Figures) -> str:
    """The heads of all runs beside each other, where they were patched at a common role."""
    parts = []
    for tower, kind in (("encoder", "attn"), ("encoder", "cross"), ("decoder", "cross")):
        panels = {}
        for number, (name, effects) in enumerate(zip(names, tables, strict=True)):
            rows = effects[(effects["tower"] == tower) & (effects["kind"] == kind)]
            role = "answer" if "answer" in set(rows["role"].dropna()) else None
            table = plots.head_table(rows, kind=kind, tower=tower, role=role)
            if not table.empty:
                label = name if names.count(name) == 1 else f"{name} ({number + 1})"
                panels[f"{label}, at {table.attrs['place']}"] = table
        if len(panels) > 1:
            title = f"{_upper(plots.KINDS[kind])} heads, {plots.TOWERS[tower]}"
            parts.append(f"<h3>{escape(title)}</h3>")
            parts.append(
                figures.show(f"all-{tower}-{kind}", plots.panels(panels), _say(panels, "head"))
            )
    return "<h2>All runs</h2>" + "".join(parts) if parts else ""


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]

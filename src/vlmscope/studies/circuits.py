"""Which attention heads are important, how surely, and in which of several runs.

The table `heads` has a row a head: the mean of `logit_diff` over examples at the read-out position,
its bootstrap interval, a sign-flip permutation test with Benjamini-Hochberg control over all heads
of a tower and kind, the rule of NOTICE (arXiv 2406.16320), and whether a head found on one half
of the examples is found again on the other. `universal` says which heads are important in every
run, `overlap` how that compares with chance.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from vlmscope import files, formats, stored
from vlmscope.errors import DataError, StoreError, VlmscopeError, plain
from vlmscope.stats import FEWEST, Scores, interval, rng, sign_flip
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.tables import at_slot, by_example, is_head

HEADS = (
    "run data corruption tower layer kind head position n mean mean_abs ci_low ci_high p_value q_value "
    "important_published important confirmed"
).split()
"""The columns of the table of heads."""
OVERLAP = "run other tower kind heads important important_other both expected p_value".split()

FORMAT = "vlmscope-circuits-1"
MANIFEST = "circuits.json"
LEVEL = 0.05
"""The false discovery rate that `important` and `confirmed` allow."""
SHARE = 0.01
"""A head that moves less than this share of the gap between the clean and the corrupt run is not
important, however significant."""
_HEAD = ["tower", "layer", "kind", "head", "position"]
Folders = Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Found:
    """What `find` gives: three tables, and of what they are (`about`)."""

    heads: pd.DataFrame
    universal: pd.DataFrame
    overlap: pd.DataFrame
    about: dict[str, Any] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tables, and the important heads as site expressions, one a line.

        Files: `heads.parquet`, `heads.csv`, `universal.csv`, `overlap.csv`, `sites.txt` (important in any
        run), `universal-sites.txt` and, last, `circuits.json`.
        """
        sites = {
            "sites.txt": self.heads[self.heads["important"]],
            "universal-sites.txt": self.universal[self.universal["universal"]],
        }
        texts = {name: "".join(f"{site}\n" for site in expressions(table)) for name, table in sites.items()}
        tables = {
            "heads.parquet": self.heads,
            "heads.csv": self.heads,
            "universal.csv": self.universal,
            "overlap.csv": self.overlap,
        }
        files.save(folder, MANIFEST, self.about, tables | texts)


def find(runs: Folders, *, position: str | None = None, across_models: bool = False, seed: int = 0) -> Found:
    """The important heads of each run (`heads_of`) and the universal ones over all (`universal`, `overlap`).

    A folder of `notice` stands for all its runs. `position` is the slot at which heads are read out: a
    role, `answer`, `readout` or `last`. By default it is the read-out position of a decoder, and the
    answer's token in any other tower (`tables.at_slot`).

    Raises `StoreError` if a folder is no run or has no heads at that position, and `VlmscopeError`
    if the runs are of different models (with `across_models`, of different head grids) or patch
    corrupt activations into clean runs.
    """
    opened = [read_run(run) for run in _unfold(runs)]
    _check(opened, across_models)
    baselines = {name: run.baselines() for name, run in zip(_names(opened), opened, strict=True)}
    parts = [
        _heads(run, name, base, position, seed)
        for run, (name, base) in zip(opened, baselines.items(), strict=True)
    ]
    heads = pd.concat(parts, ignore_index=True)
    about = {
        "format": FORMAT,
        "runs": [str(run.path) for run in opened],
        "seed": seed,
        "level": LEVEL,
        "model": opened[0].spec.get("model"),
        "chance": _chance(heads),
        "gaps": {name: _gap(base) for name, base in baselines.items()},
        "known": {name: knows(base)._asdict() for name, base in baselines.items()},
    }
    return Found(heads, universal(heads), overlap(heads), about)


def read(folder: str | os.PathLike[str]) -> Found:
    """What `Found.save` has written; raises `StoreError` where that is not all there."""
    about, tables = stored.read(Path(folder), formats.CIRCUITS)
    return Found(**tables, about=about)


def expressions(heads: pd.DataFrame) -> list[str]:
    """The site expression of each head in a table of heads, each once; `sweep` takes them.

    >>> rows = {"tower": "encoder", "layer": 3, "kind": "cross", "head": 7, "position": "answer"}
    >>> expressions(pd.DataFrame([rows, rows]))
    ['encoder.3.cross.h7@answer']
    """
    rows = heads[_HEAD].drop_duplicates().itertuples()
    return [f"{r.tower}.{r.layer}.{r.kind}.h{r.head}@{r.position}" for r in rows]


# --- one run ---------------------------------------------------------------------------------


def heads_of(run: Run, name: str = "run", *, position: str | None = None, seed: int = 0) -> pd.DataFrame:
    """The heads of one run, columns `HEADS`.

    - `position`: where the heads are read out, a word that can be swept: `readout`, `answer`, a role, `last`.
    - `mean`, `mean_abs`: of `logit_diff` and |`logit_diff`| over examples; `ci_low`, `ci_high`: the
      95 % percentile bootstrap interval of `mean` over examples.
    - `p_value`: of the sign-flip permutation test that `mean` is zero (two-sided); `q_value`: after
      Benjamini-Hochberg over all heads of the tower and kind.
    - `important_published`: `mean_abs` >= mean + 2·SD over all heads of the kind (and tower), as in
      NOTICE, but of `logit_diff` instead of |P(answer)|, which holds the corrupt baseline.
    - `important`: `q_value` <= 0.05, and |`mean`| is at least that of the average head of the kind and
      1 % of the mean gap LD(clean) − LD(corrupt): of many examples the smallest effect is significant.
    - `confirmed`: important on a random half of the examples alone, and then, on the other half,
      of the same sign with a q-value over those heads of at most 0.05.
    """
    return _heads(run, name, run.baselines(), position, seed)


def _heads(run: Run, name: str, base: pd.DataFrame, position: str | None, seed: int) -> pd.DataFrame:
    parts = []
    for (tower, kind, at), scores in head_scores(run, position).items():
        table = assess(scores.to_numpy(), list(scores.index), seed, least=SHARE * _gap(base))
        table = pd.concat([scores.columns.to_frame(index=False), table], axis=1)
        parts.append(table.assign(tower=tower, kind=kind, position=at, n=len(scores)))
    found = pd.concat(parts, ignore_index=True)
    few = int(found["n"].min())
    if few < FEWEST:
        text = f"{name}: heads over {few} examples; fewer than {FEWEST} can hardly show anything"
        warnings.warn(text, stacklevel=3)
    data, corruption = run.spec.get("data", ""), (run.spec.get("corrupt") or {}).get("kind", "")
    found = found.assign(run=name, data=str(data), corruption=str(corruption))
    return found[HEADS].astype({"layer": "int32", "head": "int32", "n": "int64"})


def head_scores(run: Run, position: str | None = None) -> dict[tuple[str, str, str], pd.DataFrame]:
    """`logit_diff` of the heads of a run where they are read out: examples × (layer, head).

    A table for each tower, kind and slot; see `find` for `position`. Examples that lack a head there, or
    have a score that is no number, are left out with a warning.
    """
    rows = run.effects(pc.match_substring_regex(pc.field("unit"), "^h[0-9]+$"))
    rows = rows[is_head(rows)]
    found = {}
    for (tower, kind), table in rows.groupby(["tower", "kind"], sort=False):
        try:
            at, there = at_slot(table, position or "readout")
        except DataError:
            if position is None:
                text = f"{run.path}: heads of {tower}.{kind} were not patched where they are read out"
                warnings.warn(text, stacklevel=4)
            continue
        left = table["example"].nunique() - there["example"].nunique()
        if left:
            warnings.warn(
                f"{run.path}: {left} examples have no {tower}.{kind} heads at '{at}' (a word of several "
                f"tokens has none of its own) and are left out; sweep '{tower}.*.{kind}.h*@{at}', too",
                stacklevel=4,
            )
        found[str(tower), str(kind), at] = there.assign(head=there["unit"].str.slice(1).astype(int))
    if not found:
        where = f"'{position}'" if position else "the answer's token or the read-out position"
        raise StoreError(
            f"{run.path}: no heads were patched at {where}; sweep such sites as "
            "'encoder.*.cross.h*@answer' or 'decoder.*.attn.h*@readout' first"
        )
    broken = {name for t in found.values() for name in t.loc[~np.isfinite(t["logit_diff"]), "example"]}
    if broken:
        text = f"{run.path}: {len(broken)} examples have scores that are no numbers and are left out"
        warnings.warn(text, stacklevel=4)
    return {key: _grid(table[~table["example"].isin(broken)]) for key, table in found.items()}


def _grid(rows: pd.DataFrame) -> pd.DataFrame:
    wide = by_example(rows, ["layer", "head"]).unstack(["layer", "head"])
    return wide.sort_index(axis=1).sort_index().dropna()


def _gap(base: pd.DataFrame) -> float:
    """The size of the mean gap LD(clean) − LD(corrupt) of a run, from its `baselines`."""
    ran = base[~base["excluded"]]
    return abs(float((ran["ld_clean"] - ran["ld_corrupt"]).mean()))


def assess(scores: Scores, ids: Sequence[str], seed: int = 0, *, least: float = 0.0) -> pd.DataFrame:
    """Statistics of heads from their `(examples, heads)` scores: columns `mean` to `confirmed`.

    `ids` name the examples; with the seed they decide which half of them an example is in. A
    |`mean`| below `least` is not important.

    >>> generator = np.random.default_rng(0)
    >>> scores = generator.normal(size=(40, 3)) + [2.0, 0.0, 0.1]
    >>> table = assess(scores, [str(i) for i in range(40)])
    >>> table["important"].tolist(), table["confirmed"].tolist()
    ([True, False, False], [True, False, False])
    """
    size = np.abs(scores).mean(0)
    low, high = interval(scores, ids)
    p, q, important = _important(scores, rng(seed, "signs"), least)
    half = first_half(ids, seed)
    return pd.DataFrame(
        {
            "mean": scores.mean(0),
            "mean_abs": size,
            "ci_low": low,
            "ci_high": high,
            "p_value": p,
            "q_value": q,
            "important_published": size >= size.mean() + 2 * size.std(),
            "important": important,
            "confirmed": _confirmed(scores[half], scores[~half], rng(seed, "halves"), least),
        }
    )


def _important(
    scores: Scores, generator: np.random.Generator, least: float
) -> tuple[Scores, Scores, NDArray[np.bool_]]:
    p = sign_flip(scores, generator)
    q = stats.false_discovery_control(p)
    size = np.abs(scores.mean(0))
    return p, q, (q <= LEVEL) & (size >= max(least, size.mean()))


def _confirmed(
    first: Scores, second: Scores, generator: np.random.Generator, least: float
) -> NDArray[np.bool_]:
    confirmed = np.zeros(first.shape[1], dtype=bool)
    if min(len(first), len(second)) < 2:
        return confirmed
    found = np.flatnonzero(_important(first, generator, least)[2])
    if len(found):
        q = stats.false_discovery_control(sign_flip(second[:, found], generator))
        same = np.sign(first[:, found].mean(0)) == np.sign(second[:, found].mean(0))
        confirmed[found] = same & (q <= LEVEL)
    return confirmed


def first_half(ids: Sequence[str], seed: int = 0) -> NDArray[np.bool_]:
    """Which examples are in the half that heads are found on; the order of the ids is no matter."""
    order = np.argsort([hashlib.sha256(f"{seed}/{x}".encode()).hexdigest() for x in ids])
    half = np.zeros(len(ids), dtype=bool)
    half[order[: len(ids) // 2]] = True
    return half


# --- several runs ----------------------------------------------------------------------------


def universal(heads: pd.DataFrame) -> pd.DataFrame:
    """Every head over the runs in which it was patched, those important in most runs first.

    Columns: the head; `runs` and `important_in`, in how many runs it was patched and is important;
    `confirmed_in`; `same_sign`, whether its means agree in sign; `mean`, of its means; `weakest`,
    the smallest |mean|; `universal` and `universal_published`, important in every run by either rule
    (of the same sign for the former).
    """
    total = heads["run"].nunique()
    signed = heads.assign(size=heads["mean"].abs(), sign=np.sign(heads["mean"]))
    found = signed.groupby(_HEAD, as_index=False).agg(
        runs=("run", "nunique"),
        important_in=("important", "sum"),
        published_in=("important_published", "sum"),
        confirmed_in=("confirmed", "sum"),
        signs=("sign", "nunique"),
        mean=("mean", "mean"),
        weakest=("size", "min"),
    )
    same = found["signs"] == 1
    found = found.assign(
        same_sign=same,
        universal=(found["important_in"] == total) & same,
        universal_published=found["published_in"] == total,
    ).drop(columns=["signs", "published_in"])
    order = ["important_in", "confirmed_in", "weakest"]
    return found.sort_values(order, ascending=False, kind="stable", ignore_index=True)


def overlap(heads: pd.DataFrame) -> pd.DataFrame:
    """Each pair of runs: how many heads of a tower and kind are important in both, against chance.

    `p_value` is that of at least so many in common if the important heads of one run were drawn at
    random (hypergeometric); `q_value` after Benjamini-Hochberg over the table.
    """
    rows = []
    for tower, kind, important in _important_by_run(heads):
        for run, other in itertools.combinations(important.columns, 2):
            both = int((important[run] & important[other]).sum())
            sizes = [len(important), int(important[run].sum()), int(important[other].sum())]
            expected, p = sizes[1] * sizes[2] / sizes[0], float(stats.hypergeom.sf(both - 1, *sizes))
            rows.append([run, other, tower, kind, *sizes, both, expected, p])
    found = pd.DataFrame(rows, columns=OVERLAP)
    return found.assign(q_value=stats.false_discovery_control(found["p_value"]) if rows else [])


def _chance(heads: pd.DataFrame) -> list[dict[str, Any]]:
    """For each tower and kind: heads important in every run, against what chance would give."""
    found = []
    for tower, kind, important in _important_by_run(heads):
        spread = in_common(len(important), [int(n) for n in important.sum()])
        both = int(important.all(axis=1).sum())
        found.append(
            {
                "tower": tower,
                "kind": kind,
                "heads": len(important),
                "runs": important.shape[1],
                "in_every_run": both,
                "expected": float(np.arange(len(spread)) @ spread),
                "p_value": min(1.0, float(spread[both:].sum())),
            }
        )
    return found


def _important_by_run(heads: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """For each tower and kind: which heads (rows) are important in which run (columns)."""
    for (tower, kind), table in heads.groupby(["tower", "kind"], sort=False):
        wide = table.pivot_table(
            index=["layer", "head"], columns="run", values="important", aggfunc="max", sort=False
        )
        yield str(tower), str(kind), wide.dropna().astype(bool)


def in_common(total: int, sizes: Sequence[int]) -> Scores:
    """P(so many members in common) of random subsets of these sizes, drawn from `total` things.

    Two subsets have a hypergeometric number in common; a third meets that many of them in turn.

    >>> in_common(4, [2, 2]).round(4).tolist()
    [0.1667, 0.6667, 0.1667]
    """
    spread = np.zeros(sizes[0] + 1)
    spread[-1] = 1.0
    for size in sizes[1:]:
        counts = np.arange(len(spread))
        spread = sum(
            (p * stats.hypergeom.pmf(counts, total, n, size) for n, p in enumerate(spread) if p),
            start=np.zeros(len(counts)),
        )
    return spread


def _unfold(runs: Folders) -> list[Path]:
    """The run folders, with all runs of a folder of `notice` in its place."""
    found: list[Path] = []
    for run in map(Path, runs):
        inner = sorted(run.glob("runs/*")) if (run / "notice.toml").is_file() else []
        for path in inner:
            stored.no_links(path, run)
        found += inner or [run]
    return found


def _check(runs: Sequence[Run], across_models: bool) -> None:
    if not runs:
        raise StoreError("no runs given; name at least one run folder")
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise VlmscopeError("the same run is given twice; name each folder once")
    first = runs[0]
    for run in runs:
        if run.spec.get("direction") != "denoise":
            raise VlmscopeError(
                f"{run.path}: patches corrupt activations into clean runs; a circuit is read from "
                "runs of --direction denoise"
            )
        if run.spec.get("weights") == first.spec.get("weights"):
            continue
        names = f"{first.path} is of {first.spec.get('model')}, {run.path} of {run.spec.get('model')}"
        if not across_models:
            raise VlmscopeError(
                f"runs of different models ({names}); give runs of one model, or --across-models "
                "if their heads are meant to be compared"
            )
        if _shape(run) != _shape(first):
            raise VlmscopeError(f"the models do not have the same layers and heads ({names})")


def _shape(run: Run) -> dict[str, tuple[int, int]]:
    towers = run.description.get("towers") or {}
    return {name: (tower.get("layers"), tower.get("heads")) for name, tower in towers.items()}


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, or their whole paths where two names are the same."""
    names = [plain(run.path.resolve().name) for run in runs]
    return names if len(set(names)) == len(names) else [plain(str(run.path)) for run in runs]

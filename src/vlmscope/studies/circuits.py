"""Which attention heads are important, how surely, and in which of several runs.

Statistics of a head are over examples, of `logit_diff` at the read-out position: a bootstrap interval, a
sign-flip permutation test, the rule of NOTICE (arXiv 2406.16320), and whether what one half of the examples
finds the other half confirms (`heads_of`).
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

from vlmscope import files, stored
from vlmscope.errors import DataError, StoreError, VlmscopeError, plain
from vlmscope.stats import FEWEST, Scores, interval, rng, sign_flip
from vlmscope.stored import formats
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
NAMES = "heads.parquet heads.csv universal.csv overlap.csv sites.txt universal-sites.txt".split()
LEVEL = 0.05
"""The false discovery rate that `important` and `confirmed` allow."""
SHARE = 0.01
"""A head that moves less than this share of the gap between the clean and the corrupt run is not
important, however significant."""
_HEAD = ["tower", "layer", "kind", "head", "position"]
Truths = NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """What `find` gives: three tables, and what they are of (`about`)."""

    heads: pd.DataFrame
    universal: pd.DataFrame
    overlap: pd.DataFrame
    about: dict[str, Any] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tables, and the important heads as site expressions, one a line.

        Files: `heads.parquet`, `heads.csv`, `universal.csv`, `overlap.csv`, `sites.txt` (important in any
        run), `universal-sites.txt` and, last, `circuits.json`.
        """
        important = self.heads[self.heads["important"]]
        everywhere = self.universal[self.universal["universal"]]
        content = {
            "heads.parquet": self.heads,
            "heads.csv": self.heads,
            "universal.csv": self.universal,
            "overlap.csv": self.overlap,
            "sites.txt": "".join(f"{site}\n" for site in expressions(important)),
            "universal-sites.txt": "".join(f"{site}\n" for site in expressions(everywhere)),
        }
        files.save(folder, MANIFEST, self.about, content)

    @staticmethod
    def claim(folder: str | os.PathLike[str]) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        files.claim(folder, MANIFEST, FORMAT, NAMES)


def find(
    runs: Sequence[str | os.PathLike[str]],
    *,
    position: str | None = None,
    across_models: bool = False,
    seed: int = 0,
) -> Found:
    """The important heads of each run (`heads_of`) and the universal ones over all (`universal`, `overlap`).

    A folder of `notice` stands for all its runs. `position` is the slot at which heads are read out: a
    role, `answer`, `readout` or `last`. By default it is the read-out position of a decoder, and the
    answer's token in any other tower (`tables.at_slot`).

    Raises `StoreError` if a folder is no run or has no heads at that position, and `VlmscopeError`
    if the runs are of different models (with `across_models`, of different head grids) or patch
    corrupt activations into clean runs.
    """
    opened: list[Run] = []
    for run in map(Path, runs):
        inner = sorted(run.glob("runs/*")) if (run / "notice.toml").is_file() else []
        opened += [read_run(path, run) for path in inner] or [read_run(run)]
    paths = [one.path for one in opened]
    _check(opened, across_models)
    names = [plain(path.resolve().name) for path in paths]  # or whole paths where two names are the same
    wholes = (plain(str(path)) for path in paths)
    named = dict(zip(names if len(set(names)) == len(names) else wholes, opened, strict=True))
    parts = [heads_of(one, name, position=position, seed=seed) for name, one in named.items()]
    heads = pd.concat(parts, ignore_index=True)
    baselines = {name: one.baselines() for name, one in named.items()}
    about = {
        "format": FORMAT,
        "runs": list(map(str, paths)),
        "seed": seed,
        "level": LEVEL,
        "model": opened[0].spec.get("model"),
        "chance": list(_chance(heads)),
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
    parts, least = [], SHARE * _gap(run.baselines())
    for (tower, kind, at), scores in head_scores(run, position).items():
        table = assess(scores.to_numpy(), list(scores.index), seed, least=least)
        table = pd.concat([scores.columns.to_frame(index=False), table], axis=1)
        parts.append(table.assign(tower=tower, kind=kind, position=at, n=len(scores)))
    found = pd.concat(parts, ignore_index=True)
    if (few := found["n"].min()) < FEWEST:
        _warn(f"{name}: heads over {few} examples; fewer than {FEWEST} can hardly show anything")
    corruption = str((run.spec.get("corrupt") or {}).get("kind", ""))
    found = found.assign(run=name, data=str(run.spec.get("data", "")), corruption=corruption)
    return found[HEADS].astype({"layer": "int32", "head": "int32", "n": "int64"})


def head_scores(run: Run, position: str | None = None) -> dict[tuple[str, str, str], pd.DataFrame]:
    """`logit_diff` of the heads of a run where they are read out: examples × (layer, head).

    A table for each tower, kind and slot; see `find` for `position`. Examples that lack a head there, or
    have a score that is no number, are left out with a warning.
    """
    rows = run.effects(pc.match_substring_regex(pc.field("unit"), "^h[0-9]+$"))
    found = {}
    for (tower, kind), table in rows[is_head(rows)].groupby(["tower", "kind"], sort=False):
        try:
            at, there = at_slot(table, position or "readout")
        except DataError:
            if position is None:
                _warn(f"{run.path}: heads of {tower}.{kind} were not patched where they are read out")
            continue
        if left := table["example"].nunique() - there["example"].nunique():
            _warn(
                f"{run.path}: {left} examples have no {tower}.{kind} heads at '{at}' (a word of several "
                f"tokens has none of its own) and are left out; sweep '{tower}.*.{kind}.h*@{at}', too"
            )
        found[str(tower), str(kind), at] = there.assign(head=there["unit"].str.slice(1).astype(int))
    if not found:
        where = f"'{position}'" if position else "the answer's token or the read-out position"
        raise StoreError(
            f"{run.path}: no heads were patched at {where}; name another position, or sweep such sites as "
            "'encoder.*.cross.h*@answer' or 'decoder.*.attn.h*@readout' first"
        )
    broken = {name for t in found.values() for name in t.loc[~np.isfinite(t["logit_diff"]), "example"]}
    if broken:
        _warn(f"{run.path}: {len(broken)} examples have scores that are no numbers and are left out")
    grids = {}
    for key, table in found.items():
        scores = by_example(table[~table["example"].isin(broken)], ["layer", "head"])
        grids[key] = scores.unstack(["layer", "head"]).sort_index(axis=1).sort_index().dropna()
    return grids


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


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
    size, half = np.abs(scores).mean(0), first_half(ids, seed)
    low, high = interval(scores, ids)
    p, q, important = _important(scores, rng(seed, "signs"), least)
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


def _important(scores: Scores, generator: np.random.Generator, least: float) -> tuple[Scores, Scores, Truths]:
    p, size = sign_flip(scores, generator), np.abs(scores.mean(0))
    q = stats.false_discovery_control(p)
    return p, q, (q <= LEVEL) & (size >= max(least, size.mean()))


def _confirmed(first: Scores, second: Scores, generator: np.random.Generator, least: float) -> Truths:
    confirmed = np.zeros(first.shape[1], dtype=bool)
    if min(len(first), len(second)) < 2:
        return confirmed
    found = np.flatnonzero(_important(first, generator, least)[2])
    if len(found):
        q = stats.false_discovery_control(sign_flip(second[:, found], generator))
        same = np.sign(first[:, found].mean(0)) == np.sign(second[:, found].mean(0))
        confirmed[found] = same & (q <= LEVEL)
    return confirmed


def first_half(ids: Sequence[str], seed: int = 0) -> Truths:
    """Which examples are in the half that heads are found on; the order of the ids is no matter."""
    order = np.argsort([hashlib.sha256(f"{seed}/{x}".encode()).hexdigest() for x in ids])
    return np.isin(np.arange(len(ids)), order[: len(ids) // 2])


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
        confirmed_in=("confirmed", "sum"),
        mean=("mean", "mean"),
        weakest=("size", "min"),
        signs=("sign", "nunique"),
        published_in=("important_published", "sum"),
    )
    same, published = found.pop("signs") == 1, found.pop("published_in") == total
    everywhere = same & (found["important_in"] == total)
    found = found.assign(same_sign=same, universal=everywhere, universal_published=published)
    order = ["important_in", "confirmed_in", "weakest"]
    return found.sort_values(order, ascending=False, kind="stable", ignore_index=True)


def overlap(heads: pd.DataFrame) -> pd.DataFrame:
    """Each pair of runs: how many heads of a tower and kind are important in both, against chance.

    `p_value` is that of at least so many in common if the important heads of one run were drawn at
    random (hypergeometric); `q_value` after Benjamini-Hochberg over the table.
    """
    rows = []
    for tower, kind, important in _important_by_run(heads):
        for pair in itertools.combinations(important.columns, 2):
            both = important[list(pair)]
            rows.append([*pair, tower, kind, len(both), *both.sum(), *_against_chance(both)])
    found = pd.DataFrame(rows, columns=OVERLAP)
    return found.assign(q_value=stats.false_discovery_control(found["p_value"]) if rows else [])


def _chance(heads: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """For each tower and kind: heads important in every run, against what chance would give."""
    for tower, kind, important in _important_by_run(heads):
        both, expected, p = _against_chance(important)
        counts = {"heads": len(important), "runs": important.shape[1], "in_every_run": both}
        yield {"tower": tower, "kind": kind, **counts, "expected": expected, "p_value": p}


def _against_chance(important: pd.DataFrame) -> tuple[int, float, float]:
    """How many heads are important in all columns, how many chance would give, and P(at least so many)."""
    spread = in_common(len(important), [int(n) for n in important.sum()])
    both = int(important.all(axis=1).sum())
    return both, float(np.arange(len(spread)) @ spread), min(1.0, float(spread[both:].sum()))


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
    counts = np.arange(sizes[0] + 1)
    spread = (counts == sizes[0]).astype(float)
    for size in sizes[1:]:
        parts = [p * stats.hypergeom.pmf(counts, total, n, size) for n, p in enumerate(spread) if p]
        spread = np.sum(parts, axis=0)
    return spread


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

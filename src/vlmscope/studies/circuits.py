"""Which attention heads are important, how surely, and in which of several runs.

Statistics of a head are over examples, of `logit_diff` at the read-out position: an interval, a test that it
moves more than a share of the gap, the rule of NOTICE (arXiv 2406.16320), whether what one half of the
examples finds the other half confirms, and its mean over examples that did not choose it (`heads_of`).
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from numpy.typing import NDArray

from vlmscope import stored
from vlmscope.calls import Do, in_turn
from vlmscope.errors import DataError, StoreError, VlmscopeError, plain
from vlmscope.stats import FEWEST, LEVEL, Scores, interval, p_values, q_values, shuffled
from vlmscope.stored import formats
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.tables import at_slot, by_example, is_head

HEADS, OVERLAP = (formats.CIRCUITS.tables[name].names for name in ("heads.parquet", "overlap.csv"))
"""The columns of the table of heads, and of that of pairs of runs."""
SHARE = 0.01
"""A head that moves no more than this share of the gap between the clean and the corrupt run is not
important, however surely."""
PARTS = 5
"""Into how many parts the examples are cut: what four of them choose is measured on the fifth."""
SPLITS = 50
"""How often the examples are halved, to find heads on one half and confirm them on the other."""
_HEAD = ["tower", "layer", "kind", "head", "position"]
Truths = NDArray[np.bool_]
Where = tuple[str, str, str]
"""Tower, kind and slot."""


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
        formats.CIRCUITS.save(folder, self.about, content)

    @staticmethod
    def claim(folder: str | os.PathLike[str]) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        formats.CIRCUITS.claim(folder, "heads.csv", "sites.txt", "universal-sites.txt")


def find(
    runs: Sequence[str | os.PathLike[str]],
    *,
    position: str | None = None,
    across_models: bool = False,
    seed: int = 0,
    do: Do = in_turn,
) -> Found:
    """The important heads of each run (`heads_of`) and the universal ones over all (`universal`, `overlap`).

    A folder of `notice` stands for all its runs. `position` is the slot at which heads are read out: a
    role, `answer`, `readout` or `last`. By default it is the read-out position of a decoder, and the
    answer's token in any other tower (`tables.at_slot`). `do` calls what finds the heads
    of each run (`calls.Do`).

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
    of_run = partial(heads_of, position=position, seed=seed)
    heads = pd.concat(do((of_run, one, name) for name, one in named.items()), ignore_index=True)
    baselines = {name: one.baselines() for name, one in named.items()}
    groups = _sharing(named, baselines)
    about = {
        "format": formats.CIRCUITS.name,
        "runs": list(map(str, paths)),
        "seed": seed,
        "level": LEVEL,
        "model": opened[0].spec.get("model"),
        "chance": list(_chance(heads, groups)),
        "gaps": {name: gap_of(base) for name, base in baselines.items()},
        "known": {name: knows(base)._asdict() for name, base in baselines.items()},
    }
    return Found(heads, universal(heads), overlap(heads, groups), about)


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
      95 % interval of `mean` (`stats.interval`), null below 10 examples.
    - `mean_held_out`: the mean over examples that did not choose the head. The examples are cut into five
      parts, and each part counts where the other four find the head important; null where none does. Of
      heads that were chosen for being large, `mean` is too large; this is what to quote.
    - `p_value`: of the test that |`mean`| is at most 1 % of the mean gap LD(clean) − LD(corrupt)
      (`stats.p_values`); `q_value`: after Benjamini-Hochberg over all heads of the tower and kind.
    - `important_published`: `mean_abs` >= mean + 2·SD over all heads of the kind (and tower), as in
      NOTICE, but of `logit_diff` instead of |P(answer)|, which holds the corrupt baseline.
    - `important`: `q_value` <= 0.05: of the heads that are called so, 5 % at the most move no more than
      1 % of the gap, on average over such studies. By |`mean`| heads are ranked, never by p.
    - `confirmed`: found on one half of the examples and again, with the same sign, on the other, in most
      of 50 ways to halve them: twice the median of the q-values on the second half, over the heads that
      the first finds (1 for the others), is at most 0.05 (Meinshausen, Meier & Bühlmann 2009). Null below
      20 examples, where it is impossible.
    """
    parts, least = [], SHARE * gap_of(run.baselines())
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


def held_out(run: Run, *, position: str | None = None, seed: int = 0) -> dict[str, list[str]]:
    """For each head that some examples choose, by its site expression: the ids of those that did not.

    These are what `mean_held_out` is over; `heads.functions` takes them, to measure on no example what it
    has chosen.
    """
    found, least = {}, SHARE * gap_of(run.baselines())
    for (tower, kind, at), scores in head_scores(run, position).items():
        unseen = _unseen(scores.to_numpy(), list(scores.index), seed, least)
        for (layer, head), column in zip(scores.columns, unseen.T, strict=True):
            if column.any():
                found[f"{tower}.{layer}.{kind}.h{head}@{at}"] = list(scores.index[column])
    return found


def head_scores(run: Run, position: str | None = None) -> dict[Where, pd.DataFrame]:
    """`logit_diff` of the heads of a run where they are read out: examples × (layer, head).

    A table for each tower, kind and slot; see `find` for `position`. Examples that lack a head there, or
    have a score that is no number, are left out with a warning.
    """
    if "from" in run.spec:
        raise StoreError(
            f"{run.path}: its values come from another site ({run.spec['from']}), so they tell of no head; "
            "give a run without --from"
        )
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


def gap_of(base: pd.DataFrame) -> float:
    """The size of the mean gap LD(clean) − LD(corrupt) of a run, from its `baselines`."""
    ran = base[~base["excluded"]]
    return abs(float((ran["ld_clean"] - ran["ld_corrupt"]).mean()))


def assess(scores: Scores, ids: Sequence[str], seed: int = 0, *, least: float = 0.0) -> pd.DataFrame:
    """Statistics of heads from their `(examples, heads)` scores: columns `mean` to `confirmed`.

    `ids` name the examples; with the seed they decide how the examples are cut and halved. Only a |mean|
    that is surely above `least` is important.

    >>> generator = np.random.default_rng(1)
    >>> scores = generator.normal(size=(40, 3)) + [2.0, 0.0, 0.0]
    >>> table = assess(scores, [str(i) for i in range(40)])
    >>> table["important"].tolist(), table["confirmed"].tolist()
    ([True, False, False], [True, False, False])
    """
    size, unseen = np.abs(scores).mean(0), _unseen(scores, ids, seed, least)
    low, high = interval(scores)
    p = p_values(scores, least=least)
    q, held = q_values(p), unseen.sum(0)
    return pd.DataFrame(
        {
            "mean": scores.mean(0),
            "mean_abs": size,
            "ci_low": low,
            "ci_high": high,
            "mean_held_out": np.where(held > 0, (scores * unseen).sum(0) / np.maximum(held, 1), np.nan),
            "p_value": p,
            "q_value": q,
            "important_published": size >= size.mean() + 2 * size.std(),
            "important": q <= LEVEL,
            "confirmed": _confirmed(scores, ids, seed, least),
        }
    )


def _important(scores: Scores, least: float) -> Truths:
    return q_values(p_values(scores, least=least)) <= LEVEL


def _unseen(scores: Scores, ids: Sequence[str], seed: int, least: float) -> Truths:
    """Which examples had no part in choosing which heads: `(examples, heads)`, false where none chose it."""
    found = np.zeros(scores.shape, dtype=bool)
    for part in np.array_split(shuffled(seed, ids, "parts"), PARTS):
        found[part] = _important(np.delete(scores, part, axis=0), least)
    return found


def _confirmed(scores: Scores, ids: Sequence[str], seed: int, least: float) -> pd.Series[bool]:
    count, heads = scores.shape
    if count < 2 * FEWEST:
        return pd.Series([pd.NA] * heads, dtype="boolean")
    q = np.ones((SPLITS, heads))
    for number in range(SPLITS):
        half = first_half(ids, seed, number)
        found = np.flatnonzero(_important(scores[half], least))
        first, second = scores[half][:, found], scores[~half][:, found]
        same = np.sign(first.mean(0)) == np.sign(second.mean(0))
        again = q_values(np.where(same, p_values(second, least=least) / 2, 1.0))
        q[number, found] = np.where(np.isnan(again), 1.0, again)
    return pd.Series(2 * np.median(q, axis=0) <= LEVEL, dtype="boolean")


def first_half(ids: Sequence[str], seed: int = 0, number: int = 0) -> Truths:
    """Which examples are in the first half, of many ways to halve them; the order of the ids is no matter."""
    return np.isin(np.arange(len(ids)), shuffled(seed, ids, "half", number)[: len(ids) // 2])


def universal(heads: pd.DataFrame) -> pd.DataFrame:
    """Every head over the runs in which it was patched, those important in most runs first.

    Columns: the head; `runs` and `important_in`, in how many runs it was patched and is important;
    `confirmed_in` (null where that is impossible); `same_sign`, whether its means agree in sign; `mean`, of
    its means; `weakest`, the smallest |mean|; `universal` and `universal_published`, important in every run
    by either rule (of the same sign for the former).
    """
    total = heads["run"].nunique()
    signed = heads.assign(size=heads["mean"].abs(), sign=np.sign(heads["mean"]))
    found = signed.groupby(_HEAD, as_index=False).agg(
        runs=("run", "nunique"),
        important_in=("important", "sum"),
        confirmed_in=("confirmed", lambda confirmed: confirmed.sum(min_count=1)),
        mean=("mean", "mean"),
        weakest=("size", "min"),
        signs=("sign", "nunique"),
        published_in=("important_published", "sum"),
    )
    same, published = found.pop("signs") == 1, found.pop("published_in") == total
    everywhere = same & (found["important_in"] == total)
    found = found.assign(same_sign=same, universal=everywhere, universal_published=published)
    found["confirmed_in"] = found["confirmed_in"].astype("Int64")
    order = ["important_in", "confirmed_in", "weakest"]
    return found.sort_values(order, ascending=False, kind="stable", ignore_index=True)


def overlap(heads: pd.DataFrame, groups: Mapping[str, int] | None = None) -> pd.DataFrame:
    """Each pair of runs: how many heads of a tower and kind are important in both, against chance.

    Chance is that of heads exchanged within their layer: late layers matter in every run, and that alone
    makes heads agree. `p_value` is that of at least so many in common then; `q_value` after
    Benjamini-Hochberg over the table. Runs of the same of `groups` have examples in common, so that they
    agree without any chance: no number is expected, and nothing is tested. Nor is it where no exchange
    changes the number, as where one of the two runs has no important head.
    """
    rows = []
    for tower, kind, important in _important_by_run(heads):
        for pair in itertools.combinations(important.columns, 2):
            both = important[list(pair)]
            rows.append([*pair, tower, kind, len(both), *both.sum(), *_against_chance(both, groups)])
    found = pd.DataFrame(rows, columns=OVERLAP[:-1]).astype({"expected": float, "p_value": float})
    return found.assign(q_value=q_values(found["p_value"]))


def _chance(heads: pd.DataFrame, groups: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """For each tower and kind: heads important in every run, against what chance would give."""
    for tower, kind, important in _important_by_run(heads):
        both, expected, p = _against_chance(important, groups)
        counts = {"heads": len(important), "runs": important.shape[1], "in_every_run": both}
        yield {"tower": tower, "kind": kind, **counts, "expected": expected, "p_value": p}


def _against_chance(
    important: pd.DataFrame, groups: Mapping[str, int] | None
) -> tuple[int, float | None, float | None]:
    """How many heads are important in all columns, how many chance would give, and P(at least so many).

    Runs of a group are exchanged together, so it is the heads important in all of them that count.
    """
    both = int(important.all(axis=1).sum())
    of = [run if groups is None else groups[run] for run in important.columns]
    each = important.T.groupby(np.array(of)).all().T
    if each.shape[1] < 2:
        return both, None, None
    spread = np.ones(1)
    for _, layer in each.groupby(level="layer"):
        spread = np.convolve(spread, in_common(len(layer), [int(n) for n in layer.sum()]))
    p = min(1.0, float(spread[both:].sum())) if (spread > 1e-12).sum() > 1 else None
    return both, float(np.arange(len(spread)) @ spread), p


def _sharing(runs: Mapping[str, Run], baselines: Mapping[str, pd.DataFrame]) -> dict[str, int]:
    """A number for each run, the same for runs of one model that share examples, if only by a third run."""
    numbers: dict[str, int] = {}
    held: dict[str, set[tuple[object, ...]]] = {}
    for number, (name, run) in enumerate(runs.items()):
        base, of = baselines[name], (run.spec.get("weights"), run.spec.get("data"))
        held[name] = {(*of, example) for example in base.loc[~base["excluded"], "example"]}
        sharing = {n for other, n in numbers.items() if held[other] & held[name]}
        numbers = {other: number if n in sharing else n for other, n in numbers.items()} | {name: number}
    return numbers


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
    counts = range(sizes[0] + 1)
    spread = np.array([float(n == sizes[0]) for n in counts])
    for size in sizes[1:]:
        all_of_them = comb(total, size)
        ways = [[comb(n, k) * comb(total - n, size - k) if k <= size else 0 for k in counts] for n in counts]
        spread = spread @ [[many / all_of_them for many in row] for row in ways]
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

"""Causal tracing as for BLIP (Palit et al., arXiv 2308.14179), after ROME (arXiv 2202.05262).

Noise on the image embedding takes the answer away; then the clean state of one sublayer, or of a
window of layers around it, is restored at one token, and what comes back of P(answer) is the share
`(P(restored) − P(corrupted)) / (P(clean) − P(corrupted))`. Each repeat draws its noise once, for all
sites, so that sites differ by what they are and not by their noise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc

from vlmscope import stored
from vlmscope.data import Examples, listed
from vlmscope.errors import DataError, VlmscopeError
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern
from vlmscope.stats import rng
from vlmscope.stored import formats
from vlmscope.studies.run_folder import Run
from vlmscope.studies.sweep import Study, into_folder, swept
from vlmscope.studies.tables import is_role, means, slot_order
from vlmscope.studies.task import Shard

CSV = "tracing.csv"
KINDS = ("resid", "attn", "cross", "mlp")
WINDOWS = (1, 3, 5)
MIN_P, MIN_LD = 0.05, 0.5
"""Where ceiling and floor are nearer than this, an example says nothing in that repeat."""

_KEYS = ["window", "layer", "length", "at"]


@dataclass(frozen=True)
class Traced:
    """The table of `trace`, and of what it is."""

    table: pd.DataFrame
    about: dict[str, Any] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tracing.parquet`, `tracing.csv` and, last, `tracing.json`."""
        tables = {"tracing.parquet": self.table, CSV: self.table}
        formats.TRACING.save(folder, self.about, tables)


def read(folder: str | os.PathLike[str]) -> Traced:
    """What `Traced.save` has written; raises `StoreError` where that is not all there."""
    about, tables = stored.read(Path(folder), formats.TRACING)
    return Traced(tables["tracing"], about)


Fill = Callable[[Path, Callable[..., Study], dict[str, Any]], tuple[Run, int]]
"""`fill(place, study, options)`: a run folder of what `study(model, examples, **options)` says, and how many
examples it was asked for; that of a team of workers does it in several processes."""


def trace(
    model: Model,
    examples: Examples,
    out: str | os.PathLike[str],
    *,
    noise: Noise | None = None,
    windows: Sequence[int] = WINDOWS,
    kinds: Sequence[str] | None = None,
    by: str = "slot",
    seed: int = 0,
    data: str = "examples",
) -> Traced:
    """Causal tracing of the text towers (Palit et al. 2023), into the folder `out`; goes on where it stopped.

    Clean states of `kinds` (of `KINDS`, by default all that the model has), in windows of so many layers, are
    restored at each token of a run with `noise` on the image, in `noise.draws` repeats, each in a run folder
    of its own (`repeats/00` …).

    Of the table (`tracing.parquet` and CSV), a row is a tower, kind, window, layer and token: `restored`, the
    mean over examples of the mean over an example's repeats of the share of P(answer), over `n` examples,
    with the 95 % interval `low`, `high`; `spread`, the standard deviation over repeats of the mean over
    examples; `restored_ld`, `spread_ld`, the same for the logit difference. `at` is the token's slot
    (`by="slot"`), or its position in questions of one length in tokens (`by="length"`); `token` is what
    stands there in all of them.

    An example whose clean and corrupted runs are nearer than 0.05 in P(answer), or 0.5 in LD, is left out of
    that repeat; `tracing.json` counts them. Raises `DataError` if none is left.

    >>> import tempfile, vlmscope
    >>> model, examples = vlmscope.load("toy-blip"), vlmscope.examples("states", limit=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     noise = vlmscope.Noise(draws=2)
    ...     found = vlmscope.trace(model, examples, folder, noise=noise, windows=[1], kinds=["resid"])
    ...     found.table["tower"].unique().tolist(), int(found.table["repeats"].max())
    (['encoder', 'decoder'], 2)
    """
    given = listed(examples)

    def fill(place: Path, study: Callable[..., Study], options: dict[str, Any]) -> tuple[Run, int]:
        made = study(model, given, **options)
        return into_folder(made, place), len(made.task.numbers)

    return trace_by(fill, out, noise=noise, windows=windows, kinds=kinds, by=by, seed=seed, data=data)


def trace_by(
    fill: Fill,
    out: str | os.PathLike[str],
    *,
    noise: Noise | None = None,
    windows: Sequence[int] = WINDOWS,
    kinds: Sequence[str] | None = None,
    by: str = "slot",
    seed: int = 0,
    data: str = "examples",
    shard: Shard | None = None,
) -> Traced:
    """`trace`, with the runs of the repeats by `fill`; of a shard, the repeats are that of their runs."""
    noise = noise or Noise()
    if by not in ("slot", "length"):
        raise VlmscopeError(f"tokens cannot be averaged by '{by}'; expected slot or length")
    folder = Path(out)
    formats.TRACING.claim(folder, CSV)
    runs, asked = [], 0
    for n in range(noise.draws):
        options = {"noise": replace(noise, draws=1), "windows": windows, "kinds": kinds}
        options |= {"seed": _seed_of(seed, n), "data": data, "shard": shard}
        run, asked = fill(folder / "repeats" / f"{n:02d}", repeated, options)
        runs.append(run)
    table, left = _average(runs, by)
    sites = map(Pattern.parse, runs[0].spec["sites"])
    about = {
        "format": formats.TRACING.name,
        "model": runs[0].spec["model"],
        "data": data,
        "noise": asdict(noise),
        "windows": list(windows),
        "kinds": list(kinds or dict.fromkeys(site.kind for site in sites)),
        "by": by,
        "seed": seed,
        "examples": asked,
        "left_out_of_each_repeat": left,
    }
    traced = Traced(table, about)
    traced.save(folder)
    return traced


def repeated(
    model: Model,
    examples: Examples,
    *,
    noise: Noise,
    windows: Sequence[int],
    kinds: Sequence[str] | None,
    **options: Any,
) -> Study:
    """One repeat: a sweep of every text token, with one draw of noise."""
    return swept(model, examples, _sites(model, windows, kinds), noise, **options)


def _seed_of(seed: int, repeat: int) -> int:
    """A repeat's own seed: that of no repeat of another."""
    return int(rng(seed, "repeat", repeat).integers(2**31))


def _sites(model: Model, windows: Sequence[int], kinds: Sequence[str] | None) -> list[str]:
    """Every text token of every text tower that has the kind, in windows of every width."""
    known = [k for k in KINDS if any(k in model.shapes[tower].kinds for tower in model.text_towers)]
    kinds = known if kinds is None else kinds
    if odd := [kind for kind in kinds if kind not in known]:
        raise VlmscopeError(f"no kind '{odd[0]}' to trace; expected some of {', '.join(known)}")
    if odd := [str(width) for width in windows if width < 1 or width % 2 == 0]:
        raise VlmscopeError(f"a window of {odd[0]} layers has no middle; expected odd numbers")
    return [
        f"{tower}.*{'' if width == 1 else f'/{width}'}.{kind}@text*"
        for tower in model.text_towers
        for kind in kinds
        if kind in model.shapes[tower].kinds
        for width in windows
    ]


def _average(runs: Sequence[Run], by: str) -> tuple[pd.DataFrame, list[int]]:
    """The table, and how many examples each repeat leaves out."""
    usable = [_usable(run) for run in runs]
    if not sum(map(len, usable)):
        raise DataError(
            f"the noise hardly changes P(answer) in any of {len(runs[0].baselines())} examples; "
            "take stronger noise, or examples that the model answers rightly"
        )
    parts = []
    sites = map(Pattern.parse, runs[0].spec["sites"])
    for tower, kind in dict.fromkeys((site.tower, site.kind) for site in sites):
        here = (pc.field("tower") == tower) & (pc.field("kind") == kind)
        shares = [_shares(run.effects(here), gaps, by) for run, gaps in zip(runs, usable, strict=True)]
        rows = pd.concat([each.assign(repeat=number) for number, each in enumerate(shares)])
        found = means(rows, _KEYS, "p", intervals=True).set_index(_KEYS).rename(columns={"mean": "restored"})
        found["restored_ld"] = means(rows, _KEYS, "ld").set_index(_KEYS)["mean"]
        found["repeats"] = rows.groupby(_KEYS)["repeat"].nunique()
        for value, name in (("p", "spread"), ("ld", "spread_ld")):
            found[name] = means(rows, [*_KEYS, "repeat"], value).groupby(_KEYS)["mean"].std()
        found = found.reset_index().merge(_columns(rows, by), on=["length", "at"])
        parts.append(found.assign(tower=tower, kind=kind, at=found["label"]))
    left = [run.ran() - len(gaps) for run, gaps in zip(runs, usable, strict=True)]
    return pd.concat(parts, ignore_index=True)[formats.TRACING.tables["tracing.parquet"].names], left


def _usable(run: Run) -> pd.DataFrame:
    """The examples of a repeat whose ceiling and floor are apart, with the two gaps."""
    base = run.baselines().query("not excluded").set_index("example")
    gaps = pd.DataFrame({name: base[f"{name}_clean"] - base[f"{name}_corrupt"] for name in ("p", "ld")})
    return gaps[(gaps["p"] >= MIN_P) & (gaps["ld"] >= MIN_LD)]


def _shares(effects: pd.DataFrame, gaps: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of one repeat: the share that each patch restores, `p` and `ld`, and the column it belongs to."""
    rows = effects[effects["example"].isin(gaps.index)]
    rows = rows[["example", "layer", "slot", "position", "token", "role"]].assign(
        window=rows["site"].str.extract(r"/(\d+)\.", expand=False).fillna("1").astype(int),
        length=0,
        at=rows["slot"],
        p=rows["p_restored"] / rows["example"].map(gaps["p"]),
        ld=rows["logit_diff"] / rows["example"].map(gaps["ld"]),
    )
    if by == "length":
        rows["length"] = rows.groupby("example")["position"].transform("max").astype(int) + 1
        rows["at"] = rows["position"].astype(str)
    return rows


def _columns(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """For each `length` and `at`: its place from the left, the token that all examples have there, whether
    that is a role and no one token; `label`, what it is called in the table."""
    each = rows.assign(role=rows["role"].astype(object).fillna("")).groupby(["length", "at"])
    token = each["token"].first().where(each["token"].nunique() == 1)
    found = pd.DataFrame({"token": token, "role": each["role"].first(), "roles": each["role"].nunique()})
    found = found.reset_index()
    if by == "slot":
        place = {slot: float(n) for n, slot in enumerate(slot_order(rows))}
        order, shown = found["at"].map(place), found["at"].map(is_role)
        return found.assign(label=found["at"], order=order, is_role=shown)
    shown = (found["roles"] == 1) & (found["role"] != "") & found["token"].isna()
    beside = (" " + found["token"]).fillna((" (" + found["role"] + ")").where(shown, ""))
    return found.assign(label=found["at"] + beside, order=found["at"].astype(float), is_role=shown)

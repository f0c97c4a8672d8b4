"""Causal tracing as for BLIP (Palit et al., arXiv 2308.14179), after ROME (arXiv 2202.05262).

Noise on the image embedding takes the answer away; then the clean state of one sublayer, or of a
window of layers around it, is restored at one token, and what comes back of P(answer) is the share
`(P(restored) − P(corrupted)) / (P(clean) − P(corrupted))`. Each repeat draws its noise once, for all
sites, so that sites differ by what they are and not by their noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc

from vlmscope.corrupt import Noise
from vlmscope.errors import DataError, StoreError, VlmscopeError
from vlmscope.example import Example
from vlmscope.model import Model
from vlmscope.plots import columns_of
from vlmscope.sites import Site
from vlmscope.store import Run
from vlmscope.study import sweep_to

FORMAT = "vlmscope-tracing-1"
KINDS = ("resid", "attn", "cross", "mlp")
WINDOWS = (1, 3, 5)
MIN_P, MIN_LD = 0.05, 0.5
"""Where ceiling and floor are nearer than this, an example says nothing in that repeat."""

TABLE = ["tower", "kind", "window", "layer", "length", "at", "order", "is_role", "n", "repeats",
         "restored", "spread", "restored_ld", "spread_ld"]  # fmt: skip


def trace(
    out: str | os.PathLike[str],
    model: Model,
    examples: Iterable[Example],
    *,
    noise: Noise | None = None,
    windows: Sequence[int] = WINDOWS,
    kinds: Sequence[str] = KINDS,
    by: str = "role",
    seed: int = 0,
    data: str = "examples",
) -> pd.DataFrame:
    """Causal tracing of the text towers, into the folder `out`; goes on where it stopped.

    `noise.draws` repeats, a run folder each (`repeats/00` …). Of the table (`tracing.parquet` and
    CSV), a row is a tower, kind, window, layer and token: `restored`, the mean over examples and
    repeats of the share of P(answer); `spread`, the standard deviation over repeats of the mean over
    examples; `restored_ld`, `spread_ld`, the same for the logit difference; `n`, how many examples
    count in a repeat on average. Tokens are averaged by their role (`by="role"`), or by position over
    questions of one length in tokens (`by="length"`).

    An example whose clean and corrupted runs are nearer than 0.05 in P(answer), or 0.5 in LD, is
    left out of that repeat; `tracing.json` counts them. Raises `DataError` if none is left.
    """
    noise = Noise() if noise is None else noise
    if by not in ("role", "length"):
        raise VlmscopeError(f"tokens cannot be averaged by '{by}'; expected role or length")
    folder, examples = Path(out), list(examples)
    sites = _sites(model, windows, kinds)
    runs = [
        sweep_to(folder / "repeats" / f"{number:02d}", model, examples, sites,
                 replace(noise, draws=1), seed=seed + number, data=data)
        for number in range(noise.draws)
    ]  # fmt: skip
    table, left = _average(runs, by)
    about = {
        "format": FORMAT,
        "model": model.name,
        "data": data,
        "noise": asdict(noise),
        "windows": list(windows),
        "kinds": list(kinds),
        "by": by,
        "seed": seed,
        "examples": len(examples),
        "left_out_of_each_repeat": left,
    }
    try:
        table.to_parquet(folder / "tracing.parquet", index=False)
        table.to_csv(folder / "tracing.csv", index=False)
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / "tracing.json").write_text(text, "utf-8")
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return table


def _sites(model: Model, windows: Sequence[int], kinds: Sequence[str]) -> list[str]:
    """Every text token of every text tower that has the kind, in windows of every width."""
    towers = {name: shape for name, shape in model.shapes.items() if name != "vision"}
    known = [k for k in KINDS if any(k in shape.kinds for shape in towers.values())]
    if odd := [kind for kind in kinds if kind not in known]:
        raise VlmscopeError(f"no kind '{odd[0]}' to trace; expected some of {', '.join(known)}")
    if odd := [str(width) for width in windows if width < 1 or width % 2 == 0]:
        raise VlmscopeError(f"a window of {odd[0]} layers has no middle; expected odd numbers")
    return [
        f"{tower}.*{'' if width == 1 else f'/{width}'}.{kind}@text*"
        for tower, shape in towers.items()
        for kind in kinds
        if kind in shape.kinds
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
    for tower, kind in _tables(runs[0]):
        here = (pc.field("tower") == tower) & (pc.field("kind") == kind)
        repeats = [
            _mean(run.effects(here), base, by).assign(repeat=number)
            for number, (run, base) in enumerate(zip(runs, usable, strict=True))
            if len(base)
        ]
        keys = ["window", "layer", "length", "at"]
        found = (
            pd.concat(repeats)
            .groupby(keys, as_index=False, sort=False)
            .agg(
                order=("order", "mean"),
                is_role=("is_role", "first"),
                n=("n", "mean"),
                repeats=("repeat", "nunique"),
                restored=("p", "mean"),
                spread=("p", "std"),
                restored_ld=("ld", "mean"),
                spread_ld=("ld", "std"),
            )
        )
        parts.append(found.assign(tower=tower, kind=kind))
    left = [int((~run.baselines()["excluded"]).sum()) - len(base) for run, base in zip(runs, usable, strict=True)]  # fmt: skip
    return pd.concat(parts, ignore_index=True)[TABLE], left


def _tables(run: Run) -> Iterator[tuple[str, str]]:
    """The towers and kinds of a run, in the order of its site expressions."""
    sites = map(Site.parse, run.spec["sites"])
    yield from dict.fromkeys((site.tower, site.kind) for site in sites)


def _usable(run: Run) -> pd.DataFrame:
    """The examples of a repeat whose ceiling and floor are apart, with the two gaps."""
    base = run.baselines().query("not excluded").set_index("example")
    gaps = pd.DataFrame(
        {"p": base["p_clean"] - base["p_corrupt"], "ld": base["ld_clean"] - base["ld_corrupt"]}
    )
    return gaps[(gaps["p"] >= MIN_P) & (gaps["ld"] >= MIN_LD)]


def _mean(effects: pd.DataFrame, gaps: pd.DataFrame, by: str) -> pd.DataFrame:
    """Of one repeat: the mean share restored, by window, layer and token column."""
    rows = effects[effects["example"].isin(gaps.index)]
    labels = columns_of(rows).assign(length=0) if by == "role" else _by_length(rows)
    rows = pd.concat([rows, labels], axis=1)
    rows = rows.assign(
        window=rows["site"].str.extract(r"/(\d+)\.", expand=False).fillna("1").astype(int),
        p=rows["p_restored"].to_numpy() / gaps["p"].loc[rows["example"]].to_numpy(),
        ld=rows["logit_diff"].to_numpy() / gaps["ld"].loc[rows["example"]].to_numpy(),
    ).rename(columns={"column": "at"})
    keys = ["window", "layer", "length", "at"]
    each = rows.groupby([*keys, "example"], as_index=False, sort=False).agg(
        p=("p", "mean"), ld=("ld", "mean"), order=("order", "mean"), is_role=("is_role", "first")
    )
    return each.groupby(keys, as_index=False, sort=False).agg(
        p=("p", "mean"),
        ld=("ld", "mean"),
        order=("order", "mean"),
        is_role=("is_role", "first"),
        n=("example", "nunique"),
    )


def _by_length(rows: pd.DataFrame) -> pd.DataFrame:
    """A column a position, over questions of one length; what all of them have there beside it."""
    length = (rows.groupby(["tower", "example"])["position"].transform("max") + 1).astype(int)
    keys = [length.rename("length"), rows["position"]]
    role, token = rows["role"].astype(object), rows["token"].astype(object)
    same_token = rows.groupby(keys)["token"].transform("nunique") == 1
    same_role = (rows.groupby(keys)["role"].transform("nunique") == 1) & role.notna()
    beside = (" " + token).where(same_token, (" (" + role + ")").where(same_role, ""))
    return pd.DataFrame(
        {
            "column": rows["position"].astype(str) + beside,
            "order": rows["position"].astype(float),
            "is_role": same_role & ~same_token,
            "length": length,
        }
    )

"""How far a ranking by estimates can be trusted: what exact patches of some sites say of it.

In each example, and of each kind of site, the best by |score| are patched and as many others, drawn at
random. The former say whether what is found is there, the latter what was missed (the diagnostic of AtP*,
arXiv 2403.00745).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.stats import ranks, share_bound

KEYS = ["tower", "kind", "part"]
RECALLS = (1, 3, 5, 10, 20, 50, 100, 200, 500)
GOOD, FAIR = 0.9, 0.7
"""Rank correlations with exact patches from which a ranking is called good, or fair; below, it is poor."""
OFF = 0.5
"""A layer is poor where the scores are off by more than this share of the effects."""
UNSIGNED = "atp-star"
"""The method whose scores have no sign."""
FEWEST = 3
"""Of fewer sites there is no correlation."""


def part_of(table: pd.DataFrame) -> pd.Series[str]:
    """The letter of each row's units, or nothing."""
    return table["unit"].astype("string").str.get(0).fillna("").astype(object)


def agreement(table: pd.DataFrame, verify: int, *, signed: bool = True) -> dict[str, Any]:
    """What `exact` says of `score` in a table of `attribute(…, verify=verify)`, by kind of site; where scores
    have no sign (`signed`), what its size says.

    For each kind, such as `decoder.attn.h`: the number of `sites` over all examples, and of those that were
    `verified`; `spearman` and `pearson` of score and exact, and `recall`, by k the share of the k largest
    effects among the k largest scores: of the verified sites, means over examples; `spearman_random` and
    `pearson_random`, of the random ones alone. Correlations leave out patches that change nothing. Of the
    `unseen`, which are not among the best, `drawn` were patched and `above` have an effect larger than the
    smallest of the best; the share of all of them that have is at most `bound` (95 %, Clopper and Pearson
    1934). `off`, by layer, is Σ|score − exact| / Σ|exact|.

    >>> table = pd.DataFrame({"example": "a", "tower": "decoder", "kind": "attn", "unit": "h0", "layer": 0,
    ...     "score": [3.0, 2.0, 1.0, 0.0], "exact": [2.5, 2.0, 0.5, None]})
    >>> found = agreement(table, 2)["decoder.attn.h"]
    >>> round(found["spearman"], 6), found["recall"], found["unseen"], found["drawn"], found["above"]
    (1.0, {'1': 1.0}, 2, 1, 0)
    """
    exact = table["exact"] if signed else table["exact"].abs()
    rows = table.assign(part=part_of(table), exact=exact)
    return {
        ".".join(filter(None, map(str, names))): _of_kind(some, verify)
        for names, some in rows.groupby(KEYS, sort=False)
        if some["exact"].notna().any()
    }


def _of_kind(rows: pd.DataFrame, verify: int) -> dict[str, Any]:
    each: dict[str, list[float]] = {name: [] for name in ("spearman", "pearson", "s_random", "p_random")}
    recalls: dict[int, list[float]] = {}
    above = drawn = unseen = 0
    for _, some in rows.groupby("example", sort=False):
        size = some["score"].abs().to_numpy()
        order = np.argsort(-size, kind="stable")
        exact = some["exact"].to_numpy(dtype=float)
        best, rest = order[:verify], order[verify:]
        random = rest[np.isfinite(exact[rest])]
        seen = np.concatenate([best[np.isfinite(exact[best])], random])
        score = some["score"].to_numpy(dtype=float)
        for names, which in ((("spearman", "pearson"), seen), (("s_random", "p_random"), random)):
            for name, value in zip(names, _correlations(score[which], exact[which]), strict=True):
                each[name] += [value] * bool(np.isfinite(value))
        by_score, by_effect = (seen[np.argsort(-abs(x[seen]), kind="stable")] for x in (score, exact))
        for k in (k for k in RECALLS if k <= verify and 2 * k <= len(seen)):
            recalls.setdefault(k, []).append(len({*by_score[:k]} & {*by_effect[:k]}) / k)
        least = np.abs(exact[best]).min(initial=np.inf)
        unseen, drawn = unseen + len(rest), drawn + len(random)
        above += int((np.abs(exact[random]) > least).sum())
    known = rows[rows["exact"].notna()]
    off = (known["score"] - known["exact"]).abs().groupby(known["layer"]).sum()
    of = known["exact"].abs().groupby(known["layer"]).sum()
    return {
        "sites": len(rows),
        "verified": len(known),
        "spearman": _mean(each["spearman"]),
        "pearson": _mean(each["pearson"]),
        "spearman_random": _mean(each["s_random"]),
        "pearson_random": _mean(each["p_random"]),
        "recall": {str(k): float(np.mean(values)) for k, values in recalls.items()},
        "unseen": unseen,
        "drawn": drawn,
        "above": above,
        "bound": 0.0 if not unseen else share_bound(above, drawn),
        "off": {str(n): float(off[n] / of[n]) if of[n] else None for n in of.index},
    }


def _correlations(score: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Spearman's and Pearson's of the patches that change anything; NaN where there are too few of them, or
    one of the two is the same in all."""
    changes = (score != 0) | (exact != 0)
    score, exact = score[changes], exact[changes]
    if len(score) < FEWEST or np.ptp(score) == 0 or np.ptp(exact) == 0:
        return np.nan, np.nan
    return float(np.corrcoef(ranks(score), ranks(exact))[0, 1]), float(np.corrcoef(score, exact)[0, 1])


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def lines(found: Mapping[str, Any]) -> list[str]:
    """What the agreement means, in words: a line a kind, and what to do."""
    said, words = [], {}
    for name, kind in found.items():
        words[name] = _verdict(kind)
        parts = [f"rank correlation with exact patches {_digits(kind['spearman'])}"]
        if kind["spearman_random"] is not None:
            parts[0] += f" ({_digits(kind['spearman_random'])} of random ones)"
        if kind["recall"]:
            k, share = max(kind["recall"].items(), key=lambda one: int(one[0]))
            parts.append(
                f"of the {k} largest effects that were patched {share:.0%} have one of the {k} largest scores"
            )
        parts.append(_missed(kind))
        poor = [layer for layer, off in kind["off"].items() if off is not None and off > OFF]
        if poor and len(kind["off"]) > 1:
            parts.append(f"off by more than {OFF:.0%} of the effects in layers {', '.join(poor)}")
        said.append(f"{name}: {words[name]}. {upper_first('; '.join(parts))}")
    bad = [name for name, word in words.items() if word in ("poor", "unknown")]
    if bad:
        said.append(f"do not rank {', '.join(bad)} by these scores: patch them exactly")
    return said


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _verdict(kind: Mapping[str, Any]) -> str:
    if kind["spearman"] is None:
        return "unknown"
    # That the best stand above those drawn at random gives .75 by itself: their own order counts, too.
    known = (kind[name] for name in ("spearman", "spearman_random"))
    worst = min(value for value in known if value is not None)
    return "good" if worst >= GOOD else "fair" if worst >= FAIR else "poor"


def _missed(kind: Mapping[str, Any]) -> str:
    if not kind["unseen"]:
        return "nothing is left unpatched"
    return (
        f"at most {kind['bound']:.1%} of the {kind['unseen']:,} others have an effect larger than the "
        f"smallest of the best (95 % bound; {kind['above']} of {kind['drawn']} drawn)"
    )


def _digits(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"

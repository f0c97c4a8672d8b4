"""Linear probes: what can be read off a site, beside what the model reads there.

A probe that is right says that something can be decoded, not that it is used. So each stands beside two
nulls, labels in a random order and objects that were never seen, and beside the causal effect of a patch of
the same site.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope import stored
from vlmscope.data import Examples, listed
from vlmscope.data.example import Example
from vlmscope.errors import SEED, DataError, number, shown, whole
from vlmscope.progress import progress
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.sites import Sites
from vlmscope.stats import rng, share_interval, shuffled
from vlmscope.stored import formats
from vlmscope.studies.sets import FEWEST, values_of
from vlmscope.studies.steering.effects import cases_of, directed_places, mean_states
from vlmscope.studies.sweep import sweep
from vlmscope.studies.tables import change_of, means

FOLDS = 5
SHUFFLES = 20
"""How often labels are put in a random order."""
STEPS = 50
"""Steps of Newton's method at most; it takes about ten."""


@dataclass(frozen=True, eq=False)
class Probed:
    """What can be read off each site.

    `table` has a row a site: the share of examples that a probe labels rightly when it has not seen them
    (`accuracy`, with its exact interval), that of the most frequent label (`chance`), of probes of shuffled
    labels (`shuffled`, and the largest of them), with the `p_value` of the first against these, that on
    objects that were never seen (`held_out`), and the mean `effect` of a patch of the site, in logits, with
    its interval.
    """

    table: pd.DataFrame
    about: Mapping[str, Any] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `probes.csv` and, last, `probe.json`; raises `StoreError`."""
        formats.PROBE.save(folder, self.about, {"probes.csv": self.table})

    @classmethod
    def claim(cls, folder: str | os.PathLike[str]) -> None:
        """Refuse, before anything is computed, a folder that `save` could not write (`StoreError`)."""
        formats.PROBE.claim(folder)


def read(folder: str | os.PathLike[str]) -> Probed:
    """What `Probed.save` has written; raises `StoreError` where that is not all there."""
    about, tables = stored.read(Path(folder), formats.PROBE)
    return Probed(tables["probes"], about)


def probe(
    model: Model,
    examples: Examples,
    sites: Sites,
    label: str,
    *,
    held_out: str | None = None,
    corrupt: str | Noise | None = None,
    shuffles: int = SHUFFLES,
    ridge: float = 1.0,
    seed: int = 0,
    data: str = "examples",
) -> Probed:
    """Linear probes of a label at sites, in the examples' clean runs.

    A site is of a whole kind: one position, or several that are averaged. `label` is a column, a group or
    `answer`, whose values are told apart, or `COLUMN=VALUE` (`shows=dog`), which are told from all others. A
    probe is a logistic regression of standardized features with an L2 penalty (`ridge`, one probe a
    value against the rest), fitted on four fifths of the examples and tested on the fifth. `held_out` is the
    column of objects: then probes are fitted, too, on some of its values and tested on the others.

    The causal effect is that of a patch of the same site: with `corrupt` of the clean run's activation in the
    corrupt run, without of the mean over the examples in the clean run.

    Raises `DataError` where fewer than two values have `sets.FEWEST` examples, or nothing can be held out.

    >>> import vlmscope
    >>> model, examples = vlmscope.load("toy-llava"), vlmscope.examples("states", limit=12)
    >>> found = probe(model, examples, "decoder.1-2.resid@image", "kind", corrupt="image", shuffles=5)
    >>> found.table["site"].tolist()
    ['decoder.1.resid@image', 'decoder.2.resid@image']
    """
    shuffles, seed = whole(shuffles, "the number of shuffles", 1, 1000), whole(seed, "the seed", most=SEED)
    ridge, places = number(ridge, "the ridge", 1e-6), directed_places(model, sites)
    given, labels = _labelled(listed(examples), label)
    folds = _folds([example.id for example in given], seed)
    objects = None if held_out is None else _held_out(given, held_out, seed)
    whole_runs = [replace(one, corrupt_image=None, corrupt_prompt=None) for one in given]
    cases = cases_of(model, whole_runs, None, "probed")
    kept = {case.example.id for case in cases}
    stay = np.array([one.id in kept for one in given])
    labels, folds = labels[stay], folds[stay]
    objects = None if objects is None else objects[stay]
    effects = _effects(
        model, [one for one in given if one.id in kept], [str(site) for site in places], corrupt, seed
    )
    order = [labels, *(rng(seed, "shuffle", n).permutation(labels) for n in range(shuffles))]
    features, rows = mean_states(model, places, cases), []
    with progress(len(places), what="probes") as step:
        for n, site in enumerate(places):
            place = (str(site), site.tower, site.layer, site.kind, site.position, len(labels))
            told = _told(features[site], order, folds, objects, ridge)
            rows.append((*place, *told, *effects[str(site)]))
            step(0, n + 1)
    about = {
        "format": formats.PROBE.name,
        "model": model.name,
        "weights": model.fingerprint(),
        "data": data,
        "label": label,
        "values": dict(Counter(map(str, labels.tolist()))),
        "held_out": held_out,
        "patch": "mean" if corrupt is None else f"clean, {getattr(corrupt, 'form', corrupt)} corrupted",
        "shuffles": shuffles,
        "ridge": ridge,
        "seed": seed,
    }
    return Probed(pd.DataFrame(rows, columns=formats.PROBE.tables["probes.csv"].names), about)


def _told(
    x: Float[Tensor, "examples width"],
    labels: Sequence[np.ndarray[Any, Any]],
    folds: np.ndarray[Any, Any],
    objects: np.ndarray[Any, Any] | None,
    ridge: float,
) -> tuple[float, ...]:
    """What probes of one site tell: of the first of the labellings, the others being its null, and on objects
    that were not seen."""
    right = _right(x, labels, folds, ridge)
    own, nulls = right[0], right[1:].mean(1)
    chance = max(Counter(labels[0].tolist()).values()) / len(x)
    p = (1 + (nulls >= own.mean()).sum()) / len(labels)
    found = (own.mean(), *share_interval(own), chance, nulls.mean(), nulls.max(), p)
    if objects is None:
        return (*found, np.nan, np.nan, np.nan)
    unseen = _right(x, labels[:1], objects, ridge)[0]
    return (*found, unseen.mean(), *share_interval(unseen))


def _labelled(given: Sequence[Example], label: str) -> tuple[list[Example], np.ndarray[Any, Any]]:
    """The examples that have a label that enough others have, and these labels."""
    column, is_value, value = label.partition("=")
    if column == "shows" and not value:
        raise DataError("an example shows several things; name one of them, such as shows=dog")
    held = values_of(given, column)
    if is_value:
        words = [value if value.casefold() in own else f"not {value}" for own in held]
    else:
        words = [next(iter(own), "") for own in held]
    counts = Counter(word for word in words if word)
    enough = {word for word, many in counts.items() if many >= FEWEST}
    if len(enough) < 2:
        raise DataError(
            f"too few examples: {len(enough)} values of {shown(label)} have {FEWEST} examples; expected at "
            f"least two (there are {', '.join(f'{word}: {many}' for word, many in counts.most_common(6))})"
        )
    if left := sum(word not in enough for word in words):
        warnings.warn(f"{left} examples are left out: their label has fewer than {FEWEST}", stacklevel=3)
    kept = [n for n, word in enumerate(words) if word in enough]
    return [given[n] for n in kept], np.array([words[n] for n in kept])


def _folds(ids: Sequence[str], seed: int) -> np.ndarray[Any, Any]:
    """The fold of each example."""
    found = np.zeros(len(ids), dtype=int)
    for turn, n in enumerate(shuffled(seed, ids, "folds")):
        found[n] = turn % FOLDS
    return found


def _held_out(given: Sequence[Example], column: str, seed: int) -> np.ndarray[Any, Any]:
    """The fold of each example, such that the values of a column are in one fold each."""
    held = [next(iter(own), "") for own in values_of(given, column)]
    known = sorted({*held})
    if len(known) < 2:
        raise DataError(
            f"all examples have the same {shown(column)}, {shown(known[0])}; expected at least two values, "
            "some of which can be held out"
        )
    turns = dict(zip(known, _folds(known, seed), strict=True))
    return np.array([turns[value] for value in held])


def _right(
    x: Float[Tensor, "examples width"],
    labels: Sequence[np.ndarray[Any, Any]],
    folds: np.ndarray[Any, Any],
    ridge: float,
) -> np.ndarray[Any, Any]:
    """Whether probes are right on the fold that they were not fitted on: `(labellings, examples)`."""
    names, found = np.unique(labels[0]), np.zeros((len(labels), len(x)), dtype=bool)
    numbers = torch.from_numpy(np.stack([np.searchsorted(names, one) for one in labels]))
    for fold in np.unique(folds):
        test = torch.from_numpy(folds == fold)
        train, away = x[~test], x[test]
        mean, spread = train.mean(0), train.std(0)
        spread = torch.where(spread > 1e-9, spread, 1.0)
        # In the space of the training examples the same probe is found, with fewer numbers.
        left, size, right = torch.linalg.svd((train - mean) / spread, full_matrices=False)
        wanted = torch.nn.functional.one_hot(numbers[:, ~test], len(names)).to(x).transpose(1, 2)
        weights = logistic(left * size, wanted.flatten(0, 1), ridge)
        seen = ((away - mean) / spread) @ right.T
        margins = (weights[:, :-1] @ seen.T + weights[:, -1:]).unflatten(0, (len(labels), len(names)))
        found[:, test.numpy()] = (margins.argmax(1) == numbers[:, test]).numpy()
    return found


def logistic(
    x: Float[Tensor, "examples width"], y: Float[Tensor, "probes examples"], ridge: float
) -> Float[Tensor, "probes width_and_one"]:
    """Logistic regressions of several labels (0 or 1) at once, with the penalty ridge/2·|w|² on all but the
    constant, which is the last column; by Newton's method, halving steps that lead upwards.

    >>> x, y = torch.tensor([[-1.0], [0.5], [2.0]]).double(), torch.tensor([[0.0, 1.0, 1.0]]).double()
    >>> w = logistic(x, y, 1.0)
    >>> slope = (torch.sigmoid(x @ w[:, :1].T + w[:, 1])[:, 0] - y[0]) @ x + w[:, :1]
    >>> bool(slope.abs() < 1e-9)
    True
    """
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    penalty = torch.full_like(x[0], ridge)
    penalty[-1] = 1e-9  # so that a label that all examples have has an end, too

    def loss(w: Tensor) -> Tensor:
        margin = w @ x.T
        return (torch.nn.functional.softplus(margin) - y * margin).sum(1) + (penalty * w**2).sum(1) / 2

    w = x.new_zeros(len(y), x.shape[1])
    for _ in range(STEPS):
        p = torch.sigmoid(w @ x.T)
        slope = (p - y) @ x + penalty * w
        curve = torch.einsum("bn,ni,nj->bij", p * (1 - p), x, x) + torch.diag(penalty)
        step, before = torch.linalg.solve(curve, slope), loss(w)
        size = torch.ones_like(before)
        while (
            worse := loss(w - size[:, None] * step) > before + 1e-9 * before.abs()
        ).any() and size.min() > 1e-6:
            size = torch.where(worse, size / 2, size)
        w = w - size[:, None] * step
        if step.abs().max() < 1e-10:
            break
    return w


def _effects(
    model: Model, given: Sequence[Example], sites: list[str], corrupt: str | Noise | None, seed: int
) -> dict[str, tuple[float, float, float]]:
    """The mean effect of a patch of each site, and the ends of its interval."""
    patch: Any = "mean" if corrupt is None else "clean"
    table = sweep(model, list(given), sites, corrupt, patch=patch, seed=seed)
    found = means(table, ["site"], change_of(table), intervals=True).set_index("site")
    rows = found.reindex(sites)[["mean", "low", "high"]]
    return {
        str(site): (row.mean, row.low, row.high) for site, row in zip(sites, rows.itertuples(), strict=True)
    }

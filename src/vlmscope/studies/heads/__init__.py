"""What a head does: what it reads, what of it moves the answer, and what happens without it.

Attention is not explanation, so every label rests on a number of what is read and one of the cause, each
tested against a null of its own, with q-values over the heads asked about. A head *acts* if it surely moves
LD by more than 1 % of the gap, patched in or knocked out.

Of heads that act by what they read of the image (names of NOTICE, arXiv 2406.16320):

- `detection`: its attention is on the answer's object, and patching the head in favours the answer.
- `suppression`: it is on the object, and patching the head in takes from the answer, or without it the
  answer is *more* likely; or it is on the foil's object, and without it the foil is more likely.

Of those that act by what they read of words:

- `option selector`: its attention goes to the option that the picture shows, and it favours the answer.
- `mover`: of the two options it raises the one first that it reads, and favours the answer; `negative
  mover`: it raises the other first.
- `aggregate reader`: most of its attention is on words that are no option, and what it reads there alone
  brings most of its effect.
- `relay`: what it does on its own way to the answer is less than a fifth of its effect; the rest goes by
  others.

Of heads that do not act:

- `outlier suppression`: most of its attention is on the class token, and on patches off the object that are
  of outlying norm and do not stand out in the picture.
- `sink`: most of its attention is on the first token.
- `none`: neither.

`unclear`: the evidence does not fit together or does not suffice, or the model does not know the task.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlmscope import stored
from vlmscope.data import Examples, listed
from vlmscope.data.example import fingerprint
from vlmscope.data.masks import covered
from vlmscope.errors import DataError, StoreError
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.sites import Sites
from vlmscope.stats import FEWEST, shuffled
from vlmscope.stored import formats
from vlmscope.studies.heads.asked import AskedHeads, asked_heads
from vlmscope.studies.heads.labels import LABELS, Label, doubts, label
from vlmscope.studies.heads.measures import ON_ALL, ON_MASKS, READ, attention_maps, measures_of, together
from vlmscope.studies.heads.observe import Effects, Observed, observe, of_heads
from vlmscope.studies.known import knows
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.run_writer import claim
from vlmscope.studies.sweep import SHOWN, into_folder, swept

__all__ = ["LABELS", "ON_ALL", "ON_MASKS", "READ", "Functions", "covered", "functions", "read", "write"]


@dataclass(frozen=True)
class Functions:
    """What some heads do.

    `functions` has a row a head, `measures` a row a head and measure, `together` a row a set of heads
    knocked out, `maps` the attention of each head to each patch of the first examples; `about` says of
    which heads, model and examples they are.
    """

    functions: pd.DataFrame
    measures: pd.DataFrame
    together: pd.DataFrame
    maps: pd.DataFrame = field(repr=False)
    about: dict[str, Any] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `functions.csv`, `measures.csv`, `together.csv`, `maps.parquet` and, last, `heads.json`."""
        tables = {name: getattr(self, Path(name).stem) for name in formats.HEADS.tables}
        formats.HEADS.save(folder, self.about, tables)


def functions(
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = "image",
    *,
    seed: int = 0,
    effects: Effects | None = None,
    held_out: Mapping[str, Collection[str]] | None = None,
    data: str = "examples",
) -> Functions:
    """Measure and label the heads at `sites` (such as `encoder.*.cross.h*@answer`) on the examples.

    Columns of `functions`: the head; `label`; the `measure` that it rests on with its `value`, `null` and
    `q_value`; `evidence`, all numbers in words. Of `measures`: `measure` (those of `ON_ALL`, `ON_MASKS` and
    `READ`, and changes of LD), `value` with its 95 % interval `low`, `high` over `n` examples, its `null`,
    `p_value` (that `value` is the null) and `q_value` (over heads; Benjamini-Hochberg). `effect` is the
    change of LD when the head is patched from the clean into the corrupt run; `zero`, `mean`, `resample`
    that of the clean run when it is knocked out by zero, by its mean over the examples, or by its value in
    another example. What is not measured has no row: parts of effects (`by_…`, `from_…`, `direct`) where
    the model does not show queries, keys and values; `switch` but where the picture alone is corrupt. Of
    `together`: the accuracy with no head, with these heads, and with equally many random heads of the same
    layers knocked out, where every layer has so many others.

    Nulls: of `auc`, `pointing`, `iou_…` and `mass` the masks of other examples; of `outlier_mass`,
    `norm_rank` and `entropy` the average head; of `on_…` attention that is spread evenly; of changes of LD
    1 % of the gap, up or down; of `from_…` half of the whole effect, of `direct` a fifth; of `copies` the
    words of other examples; of `switch` and `by_…` zero.

    The mask of the answer's object is that called `answer`, or as the example's `kind`, or `object`.
    Without `corrupt` nothing is patched. `effects`, a run of the same model and corruption or its table,
    has the effects of heads that were patched there: these are not patched again.

    Heads that were chosen on some of the examples look larger on these. `held_out` has for each site the ids
    of the examples that it may be measured on (`circuits.held_out`); heads with fewer than two are left out
    with a warning.

    Raises `DataError` if fewer than two examples can be run, or no head has two, `SiteError` if a site is no
    head, `VlmscopeError` for the effects of another model or corruption.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> found = functions(model, vlmscope.examples("states", limit=12), "encoder.1.cross.h2@answer")
    >>> found.functions["label"].item() in LABELS
    True
    """
    examples = listed(examples)
    asked = asked_heads(model, sites, corrupt, seed)
    every, given = asked, observe(asked, examples, effects if corrupt is not None else None)
    # In an order that the ids decide, so that no number depends on the one in which they came.
    observed = [given[n] for n in shuffled(seed, [one.id for one in given])]
    use = np.ones((len(observed), len(asked.heads)), dtype=bool)
    if held_out is not None:
        ids = [set(held_out.get(str(site), ())) for site in asked.heads]
        use = np.array([[one.id in some for some in ids] for one in observed])
        kept = np.flatnonzero(use.sum(0) >= 2)
        if len(kept) < len(ids):
            left = [str(site) for number, site in enumerate(asked.heads) if number not in kept]
            text = f"{len(left)} of {len(ids)} heads have fewer than two held-out examples ({left[0]})"
            if not len(kept):
                raise DataError(f"{text}, so what they do is not measured; take more examples")
            warnings.warn(f"{text} and are left out", stacklevel=2)
        (asked, observed), use = of_heads(asked, observed, kept.tolist()), use[:, kept]
    if (few := use.sum(0).min()) < FEWEST:
        text = f"the fewest examples of a head are {few}; fewer than {FEWEST} can hardly show anything"
        warnings.warn(text, stacklevel=2)
    gap = abs(float(np.mean([one.ld_clean - (one.ld_corrupt or 0.0) for one in observed])))
    measures, by_id = measures_of(asked, observed, use, gap), {one.id: one for one in observed}
    fields = [(s.tower, s.layer, s.kind, s.units[0], s.position, str(s)) for s in asked.heads]
    names = pd.DataFrame(fields, columns=["tower", "layer", "kind", "head", "position", "site"])
    rows = [{r.measure: r for r in some.itertuples()} for _, some in measures.groupby("number")]
    doubt = _doubt(asked, observed, effects)
    labels = pd.DataFrame([label(row, gap, doubt) for row in rows], columns=Label._fields)
    return Functions(
        pd.concat([names, labels], axis=1).assign(n=use.sum(0), gap=gap),
        names.join(measures.set_index("number"), how="right").reset_index(drop=True),
        together(asked, observed, use),
        attention_maps(asked, [by_id[one.id] for one in given[:SHOWN]]),
        _about(every, examples, corrupt, held_out, data) | {"doubt": doubt},
    )


def write(
    out: str | os.PathLike[str],
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = "image",
    *,
    seed: int = 0,
    effects: Effects | None = None,
    held_out: Mapping[str, Collection[str]] | None = None,
    data: str = "examples",
) -> Functions:
    """`functions`, saved in the folder `out`, with what the figures of the report need.

    That is `patches/`, a run that patches the image's patches in the first examples, where there is a
    corrupt image and the language model reads patches. A folder that holds the same already is read, and
    one that holds another call's, or what is none, is refused (`StoreError`) before anything is computed.
    """
    folder, examples = Path(out), listed(examples)
    asked = asked_heads(model, sites, corrupt, seed)
    here = _about(asked, examples, corrupt, held_out, data)
    there = formats.HEADS.claim(folder)
    if odd := [key for key in here if there and there.get(key) != here[key]]:
        raise StoreError(
            f"{folder}: holds what heads do by another call ({', '.join(odd)} differ); choose another --out, "
            "or delete the folder"
        )
    claim(folder / "patches")
    with suppress(StoreError):  # there is nothing, or only a part
        return read(folder)
    found = functions(
        model, examples, sites, corrupt, seed=seed, effects=effects, held_out=held_out, data=data
    )
    names = set(found.maps["example"])
    shown = [e for e in examples if e.id in names and e.corrupt_image is not None]
    patches = replace(model.image_site, position="image*")
    if shown and model.layouts()[patches.tower].cells:
        into_folder(swept(model, shown, str(patches), data=data), folder / "patches")
    found.save(folder)
    return found


def read(folder: str | os.PathLike[str]) -> Functions:
    """What `Functions.save` has written; raises `StoreError` where that is not all there."""
    about, tables = stored.read(Path(folder), formats.HEADS)
    return Functions(**tables, about=about)


def _doubt(asked: AskedHeads, observed: Sequence[Observed], effects: Effects | None) -> str | None:
    """Why the model does not know the task, if so; a run that chose its examples says it of all of them."""
    if isinstance(effects, Run | str | os.PathLike) and asked.corruption is not None:
        known = knows((effects if isinstance(effects, Run) else read_run(effects)).baselines())
        if known.severity == "unknown":
            return known.sentences[1].partition(": ")[2]
    corrupt = [one.ld_corrupt or 0.0 for one in observed] if asked.corruption == "image" else None
    return doubts([one.ld_clean for one in observed], corrupt)


def _about(
    asked: AskedHeads,
    examples: Sequence[Any],
    corrupt: str | Noise | None,
    held_out: Mapping[str, Collection[str]] | None,
    data: str,
) -> dict[str, Any]:
    return {
        "format": formats.HEADS.name,
        "model": asked.model.name,
        "weights": asked.model.fingerprint(),
        "data": data,
        "data_hash": fingerprint(examples),
        "sites": [str(site) for site in asked.heads],
        "corrupt": None if corrupt is None else str(corrupt),
        "held_out": None if held_out is None else {site: len(ids) for site, ids in held_out.items()},
        "seed": asked.seed,
    }

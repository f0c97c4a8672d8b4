"""What a head does: where it looks, what it moves, and what happens without it.

Attention is not explanation, so every label carries a number of the attention and a number of the
cause. The labels are those of NOTICE (arXiv 2406.16320), which reads them off pictures; here they are
rules over measures, each with its interval and its null:

- `detection` (implicit segmentation): the head's attention to the image, less that of the average
  head, separates the answer's object from the rest, and patching the head in favours the answer.
- `suppression`: it lands on the object (or the foil's), and without the head the answer (or the foil)
  is *more* likely.
- `outlier suppression`: most of its attention is on few patches of outlying norm or on the class
  token, and without the head the answer hardly changes.
- `none`: no such attention, and no effect that counts. `unclear`: the evidence does not fit together,
  or the head does not look at the image.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from torch import Tensor

from vlmscope.data import Examples, listed
from vlmscope.data.example import Box, Example, fingerprint
from vlmscope.data.images import open_image
from vlmscope.errors import DataError, ExampleError, SiteError, StoreError
from vlmscope.inputs import Edit, Pair
from vlmscope.layout import grid
from vlmscope.patching import engine
from vlmscope.patching.scores import Baselines, score
from vlmscope.patching.trace import Images
from vlmscope.progress import progress
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.forward import Sites, forward
from vlmscope.runs.model import Model
from vlmscope.sites import Point, Site, expand, parse, place
from vlmscope.stats import bootstrap, rng, shuffled, sign_flip
from vlmscope.studies.sweep import SHOWN, sweep_to

FORMAT = "vlmscope-heads-1"
LABELS = ("detection", "suppression", "outlier suppression", "none", "unclear")
LEVEL = 0.05
SHARE = 0.01
"""An effect below this share of the gap between clean and corrupt runs counts as none ..."""
LITTLE = 0.05
"""... and one that is surely below this share as little."""
AUC = 0.6
"""Attention that separates the object by less than this does not detect it, however surely."""
MASS = 0.5
"""The share of its attention that a head of outliers has on them, at least."""
MOST = 400
"""Over how many examples attention is compared with shuffled masks, at most."""
SHUFFLES, RANDOM = 2_000, 10

Array = NDArray[np.float64]
Key = tuple[str, str]

ON_MASKS = {
    "auc": "area under the ROC curve of attention minus the all-heads mean, object against rest",
    "iou_fixed": "overlap of the object with the patches that get more than from the average head",
    "iou_best": "the same at the best of 19 thresholds",
    "mass": "share of the attention to the image that is on the object",
}
ON_ALL = {
    "outlier_mass": "attention to patches of outlying norm and to the class token",
    "norm_rank": "rank of the norm of what is attended to, from 0 to 1",
    "entropy": "entropy of the attention, 1 if it is uniform",
}


class Functions(NamedTuple):
    """Three tables: a row a head, a row a head and measure, a row a set of heads knocked out."""

    functions: pd.DataFrame
    measures: pd.DataFrame
    together: pd.DataFrame


@dataclass(eq=False)
class _Seen:
    """What is kept of one example, over the heads that were asked for."""

    pair: Pair
    ld_clean: float
    ld_corrupt: float | None
    effect: Array | None
    placed: list[Site]
    activations: dict[Key, Tensor]
    maps: list[Array | None]
    """For each head: attention to all keys, and its difference to the average head, `(2, keys)`."""
    average: dict[Key, Array]
    cells: dict[Key, NDArray[np.intp]]
    """For each key its patch of the image, row by row, or −1."""
    norms: dict[Key, Array]
    masks: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


def functions(
    model: Model, examples: Examples, sites: Sites, corrupt: str | Noise | None = "image", *, seed: int = 0
) -> Functions:
    """Measure and label the heads at `sites` (such as `encoder.*.cross.h*@answer`) on the examples.

    Columns of `functions`: the head; `label`; `evidence`, its numbers in words. Of `measures`:
    `measure`, `value` with its 95 % bootstrap interval `low`, `high` over `n` examples, `null` (of
    shuffled masks, of the all-heads mean, or 0 for a change), `p_value` and `q_value` (over heads).
    `effect` is the change of LD when the head is patched from the clean into the corrupt run;
    `zero`, `mean`, `resample` that of the clean run when it is knocked out by zero, by its mean over
    the examples, or by its value in another example. Of `together`: the accuracy with no head, with
    these heads, and with equally many random heads of the same layers knocked out.

    The mask of the answer's object is that called `answer`, or as the example's `kind`, or `object`.
    Without `corrupt` nothing is patched. Raises `DataError` if fewer than two examples can be run,
    `SiteError` if a site is no head.

    >>> import vlmscope
    >>> model = vlmscope.load("toy-blip")
    >>> found = functions(model, vlmscope.examples("states", limit=8), "encoder.1.cross.h2@answer")
    >>> found.functions["label"].item() in LABELS
    True
    """
    study = _Study(model, listed(examples), sites, corrupt, seed)
    return Functions(*study.tables())


def write(
    out: str | os.PathLike[str],
    model: Model,
    examples: Examples,
    sites: Sites,
    corrupt: str | Noise | None = "image",
    *,
    seed: int = 0,
    data: str = "examples",
) -> Functions:
    """`functions`, with its tables in the folder `out`, and what the figures of the report need.

    Writes `functions.csv`, `measures.csv`, `together.csv`, `maps.parquet` (the attention of each
    head in the first examples), `patches/` (a run that patches the image's patches in those, where
    there is a corrupt image and the language model reads patches) and, last, `heads.json`. A folder that
    holds the same already is read.
    """
    folder, examples = Path(out), listed(examples)
    about = {
        "format": FORMAT,
        "model": model.name,
        "weights": model.fingerprint(),
        "data": data,
        "data_hash": fingerprint(examples),
        "sites": [str(site) for site in _heads(model, sites)],
        "corrupt": None if corrupt is None else str(corrupt),
        "seed": seed,
    }
    if (found := _read(folder, about)) is not None:
        return found
    study = _Study(model, examples, sites, corrupt, seed)
    found = Functions(*study.tables())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "heads.json").unlink(missing_ok=True)
        for name, table in zip(Functions._fields, found, strict=True):
            table.to_csv(folder / f"{name}.csv", index=False)
        study.maps().to_parquet(folder / "maps.parquet", index=False)
        names = [name for name, _ in study.shown]
        shown = [e for e in examples if e.id in names and e.corrupt_image is not None]
        patches = replace(model.image_site, position="image*")
        if shown and len(study.maps()) and model.layouts()[patches.tower].cells:
            sweep_to(folder / "patches", model, shown, str(patches), data=data)
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / "heads.json").write_text(text, "utf-8")
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return found


def _read(folder: Path, about: Mapping[str, Any]) -> Functions | None:
    """The tables that are there, if they are of the same heads on the same examples."""
    try:
        if json.loads((folder / "heads.json").read_text("utf-8")) != about:
            return None
        tables = [pd.read_csv(folder / f"{name}.csv") for name in Functions._fields]
        return Functions(*tables)
    except (OSError, ValueError):
        return None


class _Study:
    """All that is measured of some heads on some examples."""

    def __init__(
        self, model: Model, examples: Sequence[Example], sites: Sites, corrupt: str | Noise | None, seed: int
    ) -> None:
        self.model = model
        self.heads = _heads(model, sites)
        self.keys = list(dict.fromkeys((site.tower, site.kind) for site in self.heads))
        self.corruption = None if corrupt is None else corruptions.parse(corrupt)
        self.seed = seed
        self.seen: list[_Seen] = []
        ids: list[str] = []
        left: list[str] = []
        with progress(len(examples)) as step:
            for number, example in enumerate(examples):
                try:
                    self.seen.append(self._look(example))
                    ids.append(example.id)
                except (ExampleError, SiteError) as error:
                    left.append(f"'{example.id}': {error}")
                step(0, number + 1)
        if len(self.seen) < 2:
            why = f"; {left[0]}" if left else ""
            raise DataError(
                f"{len(self.seen)} of {len(examples)} examples could be run, and what a "
                f"head does takes at least two{why}"
            )
        if left:
            warnings.warn(f"{len(left)} of {len(examples)} examples were left out; {left[0]}", stacklevel=3)
        self.shown = list(zip(ids[:SHOWN], self.seen[:SHOWN], strict=True))
        # In the order of their ids, so that no number depends on the one in which they came.
        self.seen = [self.seen[n] for n in shuffled(seed, ids)]

    # -- one example -----------------------------------------------------------------------------

    def _look(self, example: Example) -> _Seen:
        model = self.model
        if self.corruption is None:
            pair = model.prepare(replace(example, corrupt_image=None, corrupt_prompt=None))
        else:
            pair = corruptions.pairs(model, example, self.corruption, self.seed)[0]
        layout = pair.clean.layout
        placed = [found for site in self.heads for found in place(site, layout)]
        if len(placed) != len(self.heads):
            raise SiteError("what a head does is asked at one place; name it (answer, last), not *")
        points = {
            Point(tower, layer, kind, "h")
            for tower, kind in self.keys
            for layer in model.shapes[tower].having(kind)
        }
        outer = {key: self._residual(key) for key in self.keys}
        values = forward(model, pair.clean, keep=points | set(outer.values())).values
        seen = _Seen(pair, 0.0, None, None, placed, {}, [None] * len(placed), {}, {}, {})
        for key in self.keys:
            positions = next(s.positions for s in placed if (s.tower, s.kind) == key)
            seen.activations[key] = self._activations(values, key, positions)
            self._attend(seen, key, positions, values[outer[key]])
        self._patch(seen)
        rows = {grid(layout[model.attended(*key)]) for key in seen.cells}
        if rows:
            seen.masks = _masks(self.model, example, next(iter(rows)))
        return seen

    def _residual(self, key: Key) -> Point:
        """Where the norms are read of what is attended to: what leaves the vision tower's blocks."""
        tower = self.model.attended(*key)
        if tower == "vision":
            return Point(tower, self.model.shapes[tower].layers - 1, "resid", "")
        return Point(tower, 0, "resid_pre", "")

    def _activations(self, values: Mapping[Point, Tensor], key: Key, at: Sequence[int]) -> Tensor:
        """All heads' outputs, mean over the positions: `(layers that have any, heads, width)`."""
        shape = self.model.shapes[key[0]]
        rows = [values[Point(key[0], layer, key[1], "h")] for layer in shape.having(key[1])]
        return torch.stack(
            [row[0, list(at)].mean(0).unflatten(-1, (shape.heads[key[1]], -1)) for row in rows]
        ).cpu()

    def _attend(self, seen: _Seen, key: Key, at: Sequence[int], residual: Tensor) -> None:
        tower = self.model.attended(*key)
        layout = seen.pair.clean.layout[tower]
        if not layout.cells or key[1] not in self.model.family.towers[key[0]].attention:
            return  # this attention does not look at the image, or is not told
        paid = self.model.attention(seen.pair.clean, *key, at).mean(2).double().cpu().numpy()
        average = paid.mean((0, 1))
        columns = grid(layout)[1]
        cells = np.full(len(average), -1)
        for position, (row, column) in layout.cells.items():
            cells[position] = row * columns + column
        seen.average[key], seen.cells[key] = average, cells
        seen.norms[key] = residual[0].float().norm(dim=-1).double().cpu().numpy()
        for number, site in enumerate(seen.placed):
            if (site.tower, site.kind) == key:
                own = paid[self._place(site)]
                seen.maps[number] = np.stack([own, own - average])

    def _place(self, site: Site) -> tuple[int, int]:
        """Where a head is among those of its kind: not every layer has any."""
        layers = self.model.shapes[site.tower].having(site.kind)
        return layers.index(site.layer), site.units[0]

    def _patch(self, seen: _Seen) -> None:
        if self.corruption is None:
            seen.ld_clean = self._score(seen, self.model.run(seen.pair.clean))
            return
        patched = engine.patch(self.model, seen.pair, seen.placed)
        seen.ld_clean, seen.ld_corrupt = float(patched.clean.ld), float(patched.corrupt.ld)
        effect = np.zeros(len(seen.placed))
        for numbers, scores in patched.chunks:
            effect[numbers] = scores.ld.cpu().numpy() - seen.ld_corrupt
        seen.effect = effect

    # -- knock-out -------------------------------------------------------------------------------

    def _means(self) -> dict[Key, Tensor]:
        return {key: torch.stack([seen.activations[key] for seen in self.seen]).mean(0) for key in self.keys}

    def _knock_out(self, means: Mapping[Key, Tensor]) -> dict[str, Array]:
        """LD without each head, less LD: `(examples, heads)` for each way of knocking it out."""
        many = len(self.seen)
        other = (np.arange(many) + rng(self.seed, "resample").integers(1, many)) % many
        found = {name: np.zeros((len(self.seen), len(self.heads))) for name in ("zero", "mean", "resample")}
        with progress(len(self.seen), what="knock-outs") as step:
            for number, seen in enumerate(self.seen):
                there = self.seen[other[number]]
                given = {"zero": None, "mean": means, "resample": there.activations}
                images = Images()
                alone = replace(seen.pair, corrupt=seen.pair.clean, edits=())
                for name, values in given.items():
                    replaced = {
                        site: torch.zeros(1)
                        if values is None
                        else values[site.tower, site.kind][self._place(site)][None]
                        for site in seen.placed
                    }
                    patched = engine.patch(
                        self.model, alone, seen.placed, "noise", values=replaced, images=images
                    )
                    for numbers, scores in patched.chunks:
                        found[name][number, numbers] = scores.ld.cpu().numpy() - seen.ld_clean
                step(0, number + 1)
        return found

    def together(self, means: Mapping[Key, Tensor]) -> pd.DataFrame:
        """Accuracy and LD with no head, these heads, and random ones of the same layers knocked out."""
        sets: list[tuple[str, str, Sequence[Site]]] = [("none", "", [])]
        sets += [("these heads", how, self.heads) for how in ("mean", "zero")]
        drawn = [self._random(number) for number in range(RANDOM)]
        sets += [("random heads", "mean", one) for one in drawn if len(one) == len(self.heads)]
        rows = []
        with progress(len(sets), what="sets of heads") as step:
            for number, (name, how, heads) in enumerate(sets):
                right, ld = zip(*(self._without(s, heads, how, means) for s in self.seen), strict=True)
                rows.append((name, how, " ".join(map(str, heads)), len(right), np.mean(right), np.mean(ld)))
                step(0, number + 1)
        return pd.DataFrame(rows, columns=["set", "knockout", "heads", "n", "accuracy", "ld"])

    def _without(
        self, seen: _Seen, heads: Sequence[Site], how: str, means: Mapping[Key, Tensor]
    ) -> tuple[bool, float]:
        """Whether the answer's token has the largest logit, and LD, in the clean run without heads."""
        edits = [
            Edit(s, "set", 0.0 if how == "zero" else means[s.tower, s.kind][self._place(s)][None])
            for s in heads
        ]
        logits = self.model.run(seen.pair.clean, edits)
        return int(logits.argmax()) == seen.pair.answer, self._score(seen, logits)

    def _score(self, seen: _Seen, logits: Tensor) -> float:
        base = Baselines(logits[None], logits[None], seen.pair.answers, seen.pair.foil)
        return float(score(logits[None, None], base).ld[0])

    def _random(self, number: int) -> list[Site]:
        """As many other heads of the same layers; of other layers where a layer has too few."""
        taken = {(s.tower, s.kind, s.layer, s.units[0]) for s in self.heads}
        drawn: list[Site] = []
        for tower, kind in self.keys:
            shape = self.model.shapes[tower]
            own = [s for s in self.heads if (s.tower, s.kind) == (tower, kind)]
            free = [
                (layer, head)
                for layer in shape.having(kind)
                for head in range(shape.heads[kind])
                if (tower, kind, layer, head) not in taken
            ]
            rng(self.seed, "random heads", number, tower, kind).shuffle(free)
            for site in own:
                free.sort(key=lambda one, layer=site.layer: one[0] != layer)  # type: ignore[misc]
                if free:
                    layer, head = free.pop(0)
                    drawn.append(replace(site, layer=layer, units=(head,)))
        return drawn

    # -- tables ----------------------------------------------------------------------------------

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        means = self._means()
        gap = self._gap()
        changes = self._knock_out(means)
        effect = [seen.effect for seen in self.seen if seen.effect is not None]
        if effect:
            changes["effect"] = np.stack(effect)
        rows = [self._attention(number) for number in range(len(self.heads))]
        for name, scores in changes.items():
            for number, p in enumerate(sign_flip(scores, rng(self.seed, name, "signs"))):
                own = scores[:, number].copy()
                low, high = self._interval(name, own, self.heads[number])
                rows[number][name] = _Measure(own.mean(), low, high, 0.0, p, len(own))
        measures = self._long(rows)
        labels = [label(one, gap) for one in _by_head(measures, len(self.heads))]
        found = pd.concat([self._names(), pd.DataFrame(labels, columns=["label", "evidence"])], axis=1)
        found = found.assign(n=len(self.seen), gap=gap)
        return found, measures, self.together(means)

    def _interval(self, name: str, values: Array, site: Site) -> tuple[float, float]:
        """The interval of a measure of one head over examples."""
        ((low,), (high,)) = bootstrap(values[:, None], rng(self.seed, name, site, "interval"))
        return float(low), float(high)

    def _gap(self) -> float:
        """What a change of LD is compared with: from the corrupt to the clean run, or from zero."""
        gaps = [s.ld_clean - (s.ld_corrupt or 0.0) for s in self.seen]
        return abs(float(np.mean(gaps)))

    def _names(self) -> pd.DataFrame:
        fields = [(s.tower, s.layer, s.kind, s.units[0], s.position, str(s)) for s in self.heads]
        return pd.DataFrame(fields, columns=["tower", "layer", "kind", "head", "position", "site"])

    def _attention(self, number: int) -> dict[str, _Measure]:
        """The measures of one head's attention; none where it does not look at the image."""
        site = self.heads[number]
        key = (site.tower, site.kind)
        seen = [s for s in self.seen if s.maps[number] is not None][:MOST]
        if not seen:
            return {}
        found = {}
        own, average = (
            np.array([_spread(s, key, which(s)) for s in seen])
            for which in (lambda s: s.maps[number][0], lambda s: s.average[key])
        )
        for column, name in enumerate(ON_ALL):
            low, high = self._interval(name, own[:, column], site)
            more = (own - average)[:, column, None]
            p = sign_flip(more, rng(self.seed, name, site, "signs"))[0]
            found[name] = _Measure(own[:, column].mean(), low, high, average[:, column].mean(), p, len(seen))
        for which in ("object", "foil"):
            masked = [s for s in seen if which in s.masks]
            if len(masked) >= 2:
                found |= self._on_masks(masked, number, key, which)
        return found

    def _on_masks(self, seen: Sequence[_Seen], number: int, key: Key, which: str) -> dict[str, _Measure]:
        """Attention against masks, and against the masks of other examples as the null."""
        scores = defaultdict(list)
        for s in seen:
            shown = np.stack([m for t in seen if (m := t.masks[which]).size == s.masks[which].size])
            own = _overlap(s, number, key, shown)
            for name, row in own.items():
                if len(row) == len(seen):
                    scores[name].append(row)
        order = np.arange(len(seen))
        draw = rng(self.seed, "masks", which, self.heads[number])
        others = [draw.permutation(order) for _ in range(SHUFFLES)]
        found = {}
        for name, table in scores.items():
            values = np.stack(table)
            if len(values) < len(seen):
                continue  # pictures of other grids cannot lend their masks
            real = values[order, order]
            null = np.array([values[order, other].mean() for other in others])
            name = name if which == "object" else f"{name}_foil"
            low, high = self._interval(name, real, self.heads[number])
            p = (1 + (null >= real.mean() - 1e-12).sum()) / (1 + len(null))
            found[name] = _Measure(real.mean(), low, high, null.mean(), p, len(seen))
        return found

    def _long(self, rows: Sequence[Mapping[str, _Measure]]) -> pd.DataFrame:
        names = self._names()
        parts = [
            {**names.iloc[number].to_dict(), "measure": measure, **found._asdict()}
            for number, row in enumerate(rows)
            for measure, found in row.items()
        ]
        table = pd.DataFrame(parts)
        q = table.groupby("measure")["p_value"].transform(
            lambda p: stats.false_discovery_control(p.to_numpy())
        )
        return table.assign(q_value=q)

    def maps(self) -> pd.DataFrame:
        """The attention of each head to each patch of the first examples, for the figures."""
        parts = []
        for name, seen in self.shown:
            for number, site in enumerate(self.heads):
                paid = seen.maps[number]
                if paid is None:
                    continue
                key = (site.tower, site.kind)
                inside = seen.cells[key] >= 0
                rows, columns = grid(seen.pair.clean.layout[self.model.attended(*key)])
                cells = seen.cells[key][inside]
                mask = seen.masks.get("object")
                parts.append(
                    pd.DataFrame(
                        {
                            "example": name,
                            "site": str(site),
                            "row": cells // columns,
                            "column": cells % columns,
                            "attention": paid[0][inside],
                            "difference": paid[1][inside],
                            "object": False if mask is None else mask[cells],
                            "rows": rows,
                            "columns": columns,
                        }
                    )
                )
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"example": []})


class _Measure(NamedTuple):
    value: float
    low: float
    high: float
    null: float
    p_value: float
    n: int


def _heads(model: Model, sites: Sites) -> list[Site]:
    found = expand(parse(sites), model.shapes)
    for site in found:
        if site.part != "h" or len(site.units) > 1 or site.also:
            raise SiteError(f"bad site '{site}': not a head; expected such as encoder.*.cross.h*@answer")
        if site.window > 1:
            raise SiteError(f"bad site '{site}': a window of layers; expected single heads")
        if site.position == "*" or site.position.endswith("*") or "-" in site.position.lstrip("-"):
            raise SiteError(
                f"bad site '{site}': many positions; what a head does is asked at one: answer, last ..."
            )
    places: dict[Key, str] = {}
    for site in found:
        at = places.setdefault((site.tower, site.kind), site.position)
        if at != site.position:
            raise SiteError(
                f"bad site '{site}': other {site.tower} {site.kind} heads are read at '{at}'; "
                "one position a kind"
            )
    return found


def _masks(model: Model, example: Example, size: tuple[int, int]) -> dict[str, NDArray[np.bool_]]:
    """The patches of the answer's object, and of the foil's, where the example says where they are."""
    wanted = ("answer", example.groups.get("kind", ""), "object")
    names = {
        "object": next((n for n in wanted if n in example.masks), None),
        "foil": "foil" if "foil" in example.masks else None,
    }
    found = {which: name for which, name in names.items() if name}
    if not found:
        return {}
    view = model.view(open_image(example.clean_image))
    return {which: covered(example, name, size, view).ravel() for which, name in found.items()}


def covered(example: Example, name: str, size: tuple[int, int], view: Box | None = None) -> NDArray[np.bool_]:
    """Which patches of a grid of `size` (rows, columns) an object covers by half, or else the most.

    The grid lies over the part `view` of the picture (left, top, right, bottom in pixels; see
    `Model.view`), by default over all of it.
    """
    mask = example.masks[name]
    whole = open_image(example.clean_image).size
    if isinstance(mask, tuple):
        shown = Image.new("L", whole, 0)
        left, top, right, bottom = (round(x) for x in mask)
        shown.paste(255, (left, top, right, bottom))
    else:
        shown = open_image(mask).convert("L")
        if shown.size != whole:
            raise ExampleError(
                f"the mask of '{name}' is {shown.size[0]}x{shown.size[1]}, its picture {whole[0]}x{whole[1]}; "
                "draw it in the picture's size"
            )
    if view is not None:
        left, top, right, bottom = (round(x) for x in view)
        shown = shown.crop((left, top, right, bottom))
    share = np.asarray(shown.convert("F").resize(size[::-1], Image.Resampling.BOX)) / 255
    if share.max() <= 0:
        raise ExampleError(f"the mask of '{name}' is empty; draw the object white")
    return np.asarray(share >= min(0.5, float(share.max())))


def _spread(seen: _Seen, key: Key, paid: Array) -> tuple[float, float, float]:
    """Mass on outliers, mean rank of the norm, and entropy, of one head's attention."""
    norms = seen.norms[key]
    use = (
        np.ones(len(norms), bool) if (seen.cells[key] >= 0).sum() + 1 >= len(norms) else seen.cells[key] >= 0
    )
    norms, paid, inside = norms[use], paid[use], seen.cells[key][use] >= 0
    middle = np.median(norms)
    reach = 3 * 1.4826 * np.median(np.abs(norms - middle))
    outlying = (norms > middle + max(reach, 1e-6 * middle)) | ~inside
    share = paid / max(paid.sum(), 1e-300)
    rank = (stats.rankdata(norms) - 0.5) / len(norms)
    entropy = -(share * np.log(np.clip(share, 1e-300, None))).sum() / np.log(len(share))
    return float(share[outlying].sum()), float(share @ rank), float(entropy)


def _overlap(seen: _Seen, number: int, key: Key, masks: NDArray[np.bool_]) -> dict[str, Array]:
    """The measures `ON_MASKS` of one example's attention against each of several masks."""
    cells = seen.cells[key]
    inside = np.flatnonzero(cells >= 0)
    inside = inside[np.argsort(cells[inside])]
    maps = seen.maps[number]
    assert maps is not None
    paid, above = maps[:, inside]
    objects = masks.astype(float)
    many, all_ = objects.sum(1), len(above)
    rest = np.clip(all_ - many, 1, None)
    auc = (objects @ stats.rankdata(above) - many * (many + 1) / 2) / (many * rest)

    def iou(chosen: NDArray[np.bool_]) -> Array:
        both = objects @ chosen.astype(float)
        return np.asarray(both / (many + chosen.sum() - both))

    cuts = np.quantile(above, np.linspace(0.05, 0.95, 19))
    return {
        "auc": auc,
        "iou_fixed": iou(above > 0),
        "iou_best": np.max([iou(above > cut) for cut in cuts], axis=0),
        "mass": objects @ (paid / max(paid.sum(), 1e-300)),
    }


def _by_head(measures: pd.DataFrame, many: int) -> list[dict[str, Any]]:
    sites = measures["site"].unique()
    assert len(sites) == many
    return [{r.measure: r for r in measures[measures["site"] == site].itertuples()} for site in sites]


def label(found: Mapping[str, Any], gap: float) -> tuple[str, str]:
    """The label of a head and its evidence, from its measures (`value`, `low`, `high`, `q_value`).

    An effect counts if its interval excludes zero and it is at least 1 % of `gap`; it is little
    if the interval lies within 5 % of it.
    """

    def up(name: str, sign: int = 1) -> bool:
        one = found.get(name)
        if one is None:
            return False
        away = one.low > 0 if sign > 0 else one.high < 0
        return bool(away and abs(one.value) >= SHARE * gap)

    def lands(name: str) -> bool:
        one = found.get(name)
        return bool(one and one.q_value <= LEVEL and one.low > 0.5 and one.value >= AUC)

    little = all(
        max(abs(found[n].low), abs(found[n].high)) <= LITTLE * gap for n in ("mean", "effect") if n in found
    )
    acts = any(up(name, sign) for name in ("mean", "effect") for sign in (1, -1))
    outliers = "outlier_mass" in found and found["outlier_mass"].low > MASS
    favours = up("effect") if "effect" in found else up("mean", -1)
    if outliers and little:
        name = "outlier suppression"
    elif lands("auc") and favours and not up("mean"):
        name = "detection"
    elif (lands("auc") and up("mean") and not favours) or (lands("auc_foil") and up("mean", -1)):
        name = "suppression"
    elif little and not acts and not outliers and not lands("auc") and not lands("auc_foil"):
        name = "none"
    else:
        name = "unclear"
    shown = ("auc", "auc_foil", "outlier_mass", "effect", "mean")
    said = [_words(n, found[n]) for n in shown if n in found]
    return name, "; ".join([*([] if "entropy" in found else ["does not look at the image"]), *said])


def _words(name: str, one: Any) -> str:
    said = {
        "auc": "attention to the object, AUC",
        "auc_foil": "attention to the foil's object, AUC",
        "outlier_mass": "attention to outliers and class token",
        "effect": "patched in, LD",
        "mean": "knocked out, LD",
    }[name]
    sign = "+" if name in ("effect", "mean") else ""
    null = "" if sign else f" (null {one.null:.2f})"
    return f"{said} {one.value:{sign}.2f} [{one.low:{sign}.2f}, {one.high:{sign}.2f}]{null}"

"""What the runs of each example give of some heads: activations, attention, effects and their parts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmscope.data.example import Example
from vlmscope.data.images import open_image
from vlmscope.data.masks import covered, object_of
from vlmscope.errors import DataError, ExampleError, ModelError, SiteError, VlmscopeError
from vlmscope.layout import grid
from vlmscope.models.inputs import Pair
from vlmscope.patching import engine
from vlmscope.patching.scores import logit_difference
from vlmscope.patching.trace import Images
from vlmscope.progress import progress
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs import forward as running
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.model import Model
from vlmscope.sites import Point, Site, place
from vlmscope.stats import shuffled
from vlmscope.studies.heads.asked import Array, AskedHeads, Key
from vlmscope.studies.heads.reading import Reading, inner_points, read
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.tables import is_head

SPLIT = 100
"""Of how many examples the effects are split into parts, at most."""
VISIBLE = 12.0
"""A patch differs from a picture to the eye from so many of 255 levels on, over red, green and blue."""
Place = tuple[str, str, str, int, str | None, object]
"""Example, tower, kind, layer, unit, and position (or the name of several)."""
Known: TypeAlias = Mapping[Place, float]
"""The change of LD by each head that was patched before."""
Effects: TypeAlias = pd.DataFrame | Run | str | os.PathLike[str]
"""A table of effects, or the run that has them."""


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of the heads of one tower and kind to the image, in one example."""

    maps: Array
    """(heads that are asked about, keys)."""
    average: Array
    """Of all heads of the kind: (keys,)."""
    cells: NDArray[np.intp]
    """For each key its patch of the image, row by row, or −1."""
    norms: Array
    """Of what is attended to: (keys,)."""
    grid: tuple[int, int]
    plain: NDArray[np.bool_]
    """The keys that do not stand out in the picture: `(keys,)`."""


@dataclass(frozen=True, eq=False)
class Observed:
    """What the runs of one example gave; arrays are over the heads that are asked about."""

    id: str
    pair: Pair
    placed: list[Site]
    ld_clean: float
    is_right: bool
    """Whether the answer's token has the largest logit."""
    ld_corrupt: float | None
    effect: Array | None
    activations: dict[Key, Tensor]
    """Outputs of all heads, mean over the positions: (layers that have any, heads, width)."""
    attention: dict[Key, Attention]
    """Of the kinds that look at the image."""
    reading: Reading
    masks: dict[str, NDArray[np.bool_]]


def observe(asked: AskedHeads, examples: Sequence[Example], effects: Effects | None) -> list[Observed]:
    """Run every example; those that cannot be run are left out with a warning."""
    known = {} if effects is None else _known(asked, effects)
    found, left = [], []
    split = {examples[n].id for n in shuffled(asked.seed, [one.id for one in examples], "split")[:SPLIT]}
    with progress(len(examples)) as step:
        for number, example in enumerate(examples):
            try:
                found.append(_observe(asked, example, known, example.id in split))
            except (ExampleError, SiteError) as error:
                left.append(f"'{example.id}': {error}")
            step(0, number + 1)
    if len(found) < 2:
        why = f"; {left[0]}" if left else ""
        many = f"{len(found)} of {len(examples)} examples could be run"
        raise DataError(f"{many}, and what a head does takes at least two{why}")
    if left:
        warnings.warn(f"{len(left)} of {len(examples)} examples were left out; {left[0]}", stacklevel=4)
    return found


def of_heads(
    asked: AskedHeads, observed: Sequence[Observed], heads: Sequence[int]
) -> tuple[AskedHeads, list[Observed]]:
    """Some of the heads, by their numbers, and what the runs gave of these."""
    some = replace(asked, heads=[asked.heads[number] for number in heads])
    rows = {key: [asked.numbers(key).index(n) for n in heads if n in asked.numbers(key)] for key in some.keys}
    found = [
        replace(
            one,
            placed=[one.placed[number] for number in heads],
            effect=None if one.effect is None else one.effect[list(heads)],
            reading=one.reading.of(heads),
            attention={
                key: replace(one.attention[key], maps=one.attention[key].maps[at])
                for key, at in rows.items()
                if key in one.attention
            },
        )
        for one in observed
    ]
    return some, found


def _observe(asked: AskedHeads, example: Example, known: Known, split: bool) -> Observed:
    model = asked.model
    if asked.corruption is None:
        pairs = [model.prepare(replace(example, corrupt_image=None, corrupt_prompt=None))]
    else:
        pairs = corruptions.pairs(model, example, asked.corruption, asked.seed)
    pair = pairs[0]
    placed = [found for site in asked.heads for found in place(site, pair.clean.layout)]
    outputs = {
        (tower, kind): [Point(tower, n, kind, "h") for n in model.shapes[tower].having(kind)]
        for tower, kind in asked.keys
    }
    norms = {key: _norms_at(model, key) for key in asked.keys}
    points = {*norms.values(), *(point for some in outputs.values() for point in some)}
    at = {key: list(placed[asked.numbers(key)[0]].positions) for key in asked.keys}
    # Some families do not tell what is paid.
    told = {key: at[key] for key in asked.keys if key[1] in model.family.towers[key[0]].attention}

    def clean(keep: Collection[Point]) -> tuple[running.Run, dict[Key, Tensor]]:
        with running.paying(model, pair.clean, told) as paid:
            return running.forward(model, pair.clean, keep=keep), paid

    if split := split and asked.corruption is not None:
        try:
            run, paid = clean(points | inner_points(asked))
        except ModelError:  # this model does not show what is within its attention
            split = False
    if not split:
        run, paid = clean(points)
    logits, activations, attention = run.logits[-1], {}, {}
    for key in asked.keys:
        heads = model.shapes[key[0]].heads[key[1]]
        rows = [run.values[point][0, at[key]].mean(0).unflatten(-1, (heads, -1)) for point in outputs[key]]
        activations[key] = torch.stack(rows).cpu()
        if key in paid and pair.clean.layout[model.attended(*key)].cells:
            attention[key] = _attention(asked, example, pair, key, paid[key], run.values[norms[key]])
    effect = _effects(asked, example, pairs, placed, known)
    reading = read(asked, pairs, placed, paid, run.values if split else None, effect)
    ld_corrupt = reading.ld_corrupt
    if ld_corrupt is None and asked.corruption is not None:
        lds = [logit_difference(model.run(one.corrupt, one.edits), one) for one in pairs]
        ld_corrupt = float(np.mean(lds))
    sizes = [one.grid for one in attention.values()]
    return Observed(
        id=example.id,
        pair=pair,
        placed=placed,
        ld_clean=float(logit_difference(logits, pair)),
        is_right=int(logits.argmax()) == pair.answer,
        ld_corrupt=ld_corrupt,
        effect=effect,
        activations=activations,
        attention=attention,
        reading=reading,
        masks=_masks(model, example, sizes[0]) if sizes else {},
    )


def _norms_at(model: Model, key: Key) -> Point:
    """Where the norms are read of what is attended to: what leaves the vision tower's blocks."""
    tower = model.attended(*key)
    if tower == "vision":
        return Point(tower, model.shapes[tower].layers - 1, "resid")
    return Point(tower, 0, "resid_pre")


def _attention(
    asked: AskedHeads, example: Example, pair: Pair, key: Key, paid: Tensor, residual: Tensor
) -> Attention:
    layout = pair.clean.layout[asked.model.attended(*key)]
    maps = paid.mean(2).double().cpu().numpy()
    rows, columns = grid(layout)
    cells = np.full(maps.shape[-1], -1)
    for position, (row, column) in layout.cells.items():
        cells[position] = row * columns + column
    chosen = np.stack([maps[asked.place(asked.heads[number])] for number in asked.numbers(key)])
    norms = residual[0].float().norm(dim=-1).double().cpu().numpy()
    plain = ~_salient(asked.model, example, (rows, columns)).ravel()[cells] | (cells < 0)
    return Attention(chosen, maps.mean((0, 1)), cells, norms, (rows, columns), plain)


def _salient(model: Model, example: Example, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The patches whose color stands out from the picture, as an object before a plain ground does."""
    picture = model.cropped(example.clean_image).convert("RGB")
    colors = np.asarray(picture.resize(size[::-1], Image.Resampling.BOX), float)
    away = np.abs(colors - np.median(colors, axis=(0, 1))).sum(-1)
    return np.asarray(away > max(3 * 1.4826 * float(np.median(away)), VISIBLE))


def _masks(model: Model, example: Example, size: tuple[int, int]) -> dict[str, NDArray[np.bool_]]:
    """The patches of the answer's `object`, and of the `foil`'s, where the example says where they are."""
    names = {"object": object_of(example), "foil": "foil" if "foil" in example.masks else None}
    found = {which: name for which, name in names.items() if name}
    if not found:
        return {}
    view = model.view(open_image(example.clean_image))
    return {which: covered(example, name, size, view).ravel() for which, name in found.items()}


def _effects(
    asked: AskedHeads, example: Example, pairs: Sequence[Pair], placed: Sequence[Site], known: Known
) -> Array | None:
    """The change of LD of the corrupt run by each head: what is known, or else by patching."""
    if asked.corruption is None:
        return None
    where = [site.positions[0] if len(site.positions) == 1 else site.position for site in placed]
    places = [(example.id, s.tower, s.kind, s.layer, s.unit, at) for s, at in zip(placed, where, strict=True)]
    found = [known.get(place) for place in places]
    if None not in found:
        return np.array(found, dtype=float)
    effect, images = np.zeros(len(placed)), Images()
    for pair in pairs:  # of each draw of noise
        patched = engine.patch(asked.model, pair, placed, images=images)
        base = float(patched.corrupt.ld)
        for numbers, scores in patched.chunks:
            effect[numbers] += (scores.ld.cpu().numpy() - base) / len(pairs)
    return effect


def _known(asked: AskedHeads, effects: Effects) -> Known:
    """`logit_diff` of every head that a sweep has patched; raises `VlmscopeError` for another run's."""
    if isinstance(effects, pd.DataFrame):
        rows = effects
    else:
        run = effects if isinstance(effects, Run) else read_run(effects)
        wanted: dict[str, object] = {
            "weights": asked.model.fingerprint(),
            "direction": "denoise",
            "patch": "clean",
            "from": None,
        }
        if isinstance(asked.corruption, Noise):
            wanted |= {"seed": asked.seed, "corrupt": {"kind": "noise", **asdict(asked.corruption)}}
        if odd := [name for name, value in wanted.items() if run.spec.get(name) != value]:
            raise VlmscopeError(
                f"{run.path}: its effects are not those of these heads ({', '.join(odd)} differ); give a run "
                "of this model that patches clean activations, or none"
            )
        rows = run.effects(pc.match_substring_regex(pc.field("unit"), "^h[0-9]+$"))
    kind = "noise" if isinstance(asked.corruption, Noise) else asked.corruption
    if odd := [c for c in rows["corruption"].unique() if c != kind]:
        raise VlmscopeError(
            f"effects with the corruption '{odd[0]}' are not those of '{kind}'; give that run"
        )
    rows = rows[is_head(rows)]
    rows = rows.assign(where=rows["position"].astype(object).where(rows["position"].notna(), rows["slot"]))
    places = rows[["example", "tower", "kind", "layer", "unit", "where"]].itertuples(index=False, name=None)
    return dict(zip(places, rows["logit_diff"], strict=True))

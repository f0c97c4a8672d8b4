"""Where each word of an answer comes from: one picture, one prompt, no contrast set.

Which part of the picture does this word come from? A cell's feature is replaced by that of a blurred or mean
picture, where the language model reads it, and the word's log-probability is looked at: exact, by the engine
of patches. Beside that stand what is often used in its place: attention without sinks (Kang et al. 2025,
arXiv 2503.03321), the gradient's estimate (attribution patching, arXiv 2403.00745) and knock-outs of
attention (Geva et al. 2023, arXiv 2304.14767; in models that see, arXiv 2410.07149 and 2411.18620).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from PIL import Image

from vlmscope import stored
from vlmscope.data.example import Box, Example, Picture
from vlmscope.data.images import open_image, small_png
from vlmscope.data.masks import covered
from vlmscope.errors import ExampleError, ModelError, RoomError, choice, number, whole
from vlmscope.explanation import maps
from vlmscope.explanation.said import At, Reference, Said, say
from vlmscope.layout import Layout, grid
from vlmscope.neurons.contributions import contributions, named, token_weights, top_tokens
from vlmscope.patching.direct import check_place, directs
from vlmscope.report import explanation as page
from vlmscope.runs.forward import SPEECH
from vlmscope.runs.model import Model, check_model
from vlmscope.sites import Site
from vlmscope.stored import formats

PATCHES = 48
"""How many cells and groups of cells are replaced by default."""
NEURONS, TOKENS = 10, 6
"""How many neurons of each word are listed, and how many tokens of each."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What each word of an answer comes from; the columns are those of `stored.formats.EXPLAIN`.

    `words` has a row a word, `cells` a row a word and cell (or group of cells), `layers` a row a word and
    window of layers, `heads` a row a word and head, `neurons` a row a word and neuron; `about` says what was
    asked and what could not be had, `picture` is what the model sees of the picture.
    """

    about: Mapping[str, Any]
    words: pd.DataFrame
    cells: pd.DataFrame
    layers: pd.DataFrame
    heads: pd.DataFrame
    neurons: pd.DataFrame
    picture: Image.Image

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        return {name: getattr(self, name) for name in "words cells layers heads neurons".split()}

    def page(self) -> str:
        """All of it as one HTML file, which needs no network."""
        return page.render_page(self.about, self.tables, small_png(self.picture, page.SIDE))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tables as CSV, the picture, the page (`explain.html`) and, last, `explain.json`.

        An earlier explanation is replaced. Raises `StoreError` as `files.save` does.
        """
        listed = pd.DataFrame({"example": ["picture"], "file": ["0000.png"]})
        content: dict[str, Any] = {f"{name}.csv": table for name, table in self.tables.items()}
        content |= {"pictures.csv": listed, "pictures/0000.png": small_png(self.picture, page.SIDE)}
        formats.EXPLAIN.save(folder, self.about, {**content, "explain.html": self.page()})


def read(folder: str | os.PathLike[str]) -> Explanation:
    """What `Explanation.save` has written; raises `StoreError` where that is not all there."""
    _, about, tables, pictures = stored.read_one(Path(folder), formats.EXPLAIN)
    return Explanation(about, **tables, picture=open_image(Image.open(io.BytesIO(pictures["picture"]))))


def explain(
    model: Model,
    image: Picture | str,
    prompt: str,
    words: Sequence[str] = (),
    *,
    region: Box | None = None,
    reference: Reference = "blur",
    direction: maps.Direction = "noise",
    at: At = "features",
    patches: int = PATCHES,
    length: int = SPEECH,
) -> Explanation:
    """Let a model answer a prompt about a picture, and find where in the picture and where in the model each
    word of its answer (or only `words` of it) comes from.

    A word's log-probability, in nats, is that of its tokens behind all that was said before. The map is
    `cells.exact`: how much of it is lost when the features of a cell, where the language model reads them
    (`Network.image_site`), are replaced by those of the same place in a blurred picture (or with `reference`
    mean, in one of its mean color); below 0 where the word becomes likelier. That is what the word needs, and
    where several cells show the same it needs none of them. With `direction` denoise it is what is enough:
    how much is gained when the features of the cell are put into the run on that other picture.

    A feature holds more than its cell of pixels, since the vision tower mixes them. With `at` pixels what
    enters the vision tower of a cell is replaced, and all of the model computed anew; families that read a
    picture through queries have a map then, too.

    A grid of more cells than `patches` is examined coarse to fine: groups of cells, and then the parts of
    those that matter; `words.left` is the share of the word's effects, by size, that is still in groups. A
    group's counts for what the gradient expects of its cells one by one, if that is more.
    Beside the exact map stand `knockout`: what is lost when what predicts the word cannot read the cell in
    any layer (`about["edge"]`); `gradient`: the gradient times what the features differ by; `attention`: the
    share of it that the cell gets, a mean over layers and heads, without sinks (these get `words.sinks`).
    `words.spearman_*` is the rank correlation of each with the exact map, over its cells and groups.

    `layers.knockout` is what the word loses without reading the picture in a window of layers,
    `heads.knockout` in one head, `heads.direct` what that head writes of the picture to the word's logit by
    itself, `neurons.score` what a neuron contributes to it. With a `region` (left, top, right, bottom in
    pixels of the picture) `words.region` is the effect of all cells that it covers by half, together,
    `words.region_knockout` that of not reading them.

    What a family does not have is null or empty, and `about["lacking"]` says why. Raises `ExampleError` for
    what is no picture, a word that was not said, and a region that is not in the picture.

    >>> import vlmscope
    >>> from PIL import ImageDraw
    >>> picture = Image.new("RGB", (48, 48), "white")
    >>> ImageDraw.Draw(picture).rectangle((4, 4, 20, 20), "red")
    >>> asked = (vlmscope.load("toy-llava"), picture, "describe this picture.", ["red"])
    >>> found = explain(*asked, reference="mean", direction="denoise")
    >>> best = found.cells.loc[found.cells["exact"].idxmax()]
    >>> int(best["row"]) < 3, int(best["column"]) < 3
    (True, True)
    """
    check_model(model)
    choice(reference, "reference", get_args(Reference))
    choice(direction, "direction", get_args(maps.Direction))
    choice(at, "place of cells", get_args(At))
    patches = whole(patches, "the number of patches", 1)
    length = whole(length, "the number of tokens", 1, 1000)
    picture = open_image(image)
    box = None if region is None else check_region(region, picture)
    said = say(model, picture, reference, prompt, [words] if isinstance(words, str) else words, length, at)
    layout, lacking = maps.layout_of(said), list[str]()
    if not layout.cells:
        count = len(layout.image or layout.tokens)
        lacking.append(f"{model.family.name} reads the picture as {count} features that have no place in it")
        if box is not None:
            raise ExampleError(f"{lacking[0]}, so that no region can be asked about; leave the region out")
        lacking[0] = f"there is no map: {lacking[0]}"
    there = () if box is None else _within(said, box, layout)
    slopes = maps.estimate(said, direction) if layout.cells else None
    exact = maps.exact(said, direction, patches, there, None if slopes is None else np.abs(slopes))
    read = maps.reading(said)
    window = max(1, len(model.shapes[read.tower].having(read.kind)) // 4 | 1)
    cut, paid, sinks = _without(said, read, exact, box, window, lacking)
    beside = {
        "knockout": cut.units if cut is not None and len(cut.units) else None,
        "gradient": None if slopes is None else maps.summed(slopes, maps.positions(layout, exact.units)),
        "attention": paid,
    }
    cells = _cells(exact, beside)
    table = _said(said, exact).assign(
        **{f"spearman_{name}": _spearman(cells, name, len(said.words)) for name in beside},
        sinks=sinks,
        left=exact.left,
        region=np.nan if exact.region is None else exact.region,
        region_knockout=np.nan if cut is None or not len(cut.region) else cut.region[0],
    )
    layers, heads = _parts(said, read, cut, window, lacking)
    about = {
        **_of_model(said),
        "reference": reference,
        "direction": direction,
        "at": at,
        "rounding": exact.rounding,
        "alone": sum(unit.is_cell for unit in exact.units),
        "patches": exact.patches,
        "edge": read.edge,
        "window": window,
        "region": None if box is None else list(box),
        "lacking": lacking,
    }
    return Explanation(about, table, cells, layers, heads, _neurons(said), model.cropped(picture))


def _without(
    said: Said, read: maps.Reading, exact: maps.Exact, box: Box | None, window: int, lacking: list[str]
) -> tuple[maps.Cut | None, maps.Array | None, maps.Array]:
    """What words lose without edges to the picture, the attention that its cells get (None where it is read
    in other parts than cells), and what sinks get."""
    seen = said.pair.clean.layout[said.model.image_site.tower]
    units = exact.units if grid(seen) == grid(maps.layout_of(said)) else []
    if len(units) < len(exact.units):
        why = f"{said.model.family.name} reads other features than a cell each"
        lacking.append(f"there are no knock-outs of cells and no attention to them: {why}")
    cut, paid, sinks = None, None, np.full(len(said.words), np.nan)
    with _or_said(lacking, "there are no knock-outs and no attention"):
        own = _within(said, box, seen) if units and box is not None else ()
        cut = maps.knocked_out(said, read, units, own, window)
        paid, sinks = maps.attention(said, read, units)
    return cut, paid if units else None, sinks


def _of_model(said: Said) -> dict[str, Any]:
    """What was asked of which model, and how it reads the picture."""
    model, layout = said.model, maps.layout_of(said)
    return {
        "what": formats.EXPLAIN.name,
        "model": model.name,
        "weights": model.fingerprint(),
        "family": model.family.name,
        "dtype": model.precision,
        "prompt": said.prompt,
        "answer": said.caption.text,
        "grid": list(grid(layout)),
        "cells": len(layout.cells),
        "further": len(layout.image) - len(layout.cells) if layout.cells and layout.image else 0,
        "view": list(model.view(said.picture)),
    }


def _said(said: Said, exact: maps.Exact) -> pd.DataFrame:
    """The words, a row each: where they are in the answer, and how likely with and without the picture."""
    rows = [(n, word.text, *word.span, len(word.tokens)) for n, word in enumerate(said.words)]
    table = pd.DataFrame(rows, columns=["word", "text", "start", "end", "tokens"])
    return table.assign(logprob=exact.logprob, without=exact.without)


@contextmanager
def _or_said(lacking: list[str], what: str) -> Iterator[None]:
    """What a family does not have is said among what is lacking."""
    try:
        yield
    except RoomError:
        raise
    except ModelError as error:
        lacking.append(f"{what}: {error}")


def check_region(region: Sequence[float], picture: Image.Image) -> Box:
    """A region as a box within the picture; raises `ExampleError` where it is none."""
    size = f"{picture.width} x {picture.height} pixels"
    if len(region) != 4:
        raise ExampleError(
            f"the region has {len(region)} numbers; expected left, top, right, bottom in pixels"
        )
    left, top, right, bottom = (number(each, "an edge of the region") for each in region)
    if not (0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height):
        text = ",".join(f"{each:g}" for each in (left, top, right, bottom))
        raise ExampleError(
            f"the region {text} is not within the picture of {size}; expected left < right and top < bottom "
            "in its pixels"
        )
    return left, top, right, bottom


def _within(said: Said, box: Box, layout: Layout) -> tuple[int, ...]:
    """The positions of the cells that a region covers by half, or else the most."""
    view = said.model.view(said.picture)
    if box[0] >= view[2] or box[1] >= view[3] or box[2] <= view[0] or box[3] <= view[1]:
        seen = ",".join(f"{each:g}" for each in view)
        raise ExampleError(f"{said.model.name} does not see that region: it sees {seen}; name one in it")
    one = Example("region", said.picture, said.prompt, "", "", masks={"region": box})
    inside = covered(one, "region", grid(layout), view)
    return tuple(sorted(n for n, cell in layout.cells.items() if inside[cell]))


def _cells(exact: maps.Exact, beside: Mapping[str, maps.Array | None]) -> pd.DataFrame:
    """A row a word and unit."""
    count = exact.effects.shape[1]
    rows = pd.DataFrame(exact.units * count, columns=list(maps.Unit._fields))
    rows.insert(0, "word", np.repeat(np.arange(count), len(exact.units)))
    values = {"exact": exact.effects, **beside}
    return rows.assign(**{name: np.nan if x is None else x.T.ravel() for name, x in values.items()})


def _spearman(cells: pd.DataFrame, name: str, words: int) -> list[float]:
    """The rank correlation of a map with the exact one, by word; null where one of them is flat."""
    found = []
    for word in range(words):
        ranks = cells.loc[cells["word"] == word, ["exact", name]].rank()
        flat = len(ranks) < 3 or (ranks.std() == 0).any() or ranks.isna().any(axis=None)
        found.append(np.nan if flat else float(ranks.corr().iloc[0, 1]))
    return found


def _parts(
    said: Said, read: maps.Reading, cut: maps.Cut | None, window: int, lacking: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of layers and of heads; empty without knock-outs."""
    windows, heads = (read.sites(said.model, text, ()) for text in (f"*/{window}", "*.h*"))
    if cut is None:
        columns = ["word", "tower", "kind", "layer", "head", "knockout", "direct"]
        empty = pd.DataFrame(columns=columns)
        return empty.drop(columns=["head", "direct"]), empty
    direct, many = np.full(cut.heads.shape, np.nan), len(said.words)
    with _or_said(lacking, "heads have no direct effects"):
        if read.targets is not None:
            raise ModelError(f"those that read the picture are in the {read.tower}, which says no word")
        check_place(said.model, heads[0])
        found = directs(said.model, said.pair.clean, said.pair.answers, heads)
        each = np.array([[one.effect(site, read.image) for one in found] for site in heads])
        direct = maps.of_words(said, each)

    def rows(sites: Sequence[Site], **values: Any) -> pd.DataFrame:
        place = {"tower": read.tower, "kind": read.kind, "layer": [site.layer for site in sites] * many}
        return pd.DataFrame({"word": np.repeat(np.arange(many), len(sites)), **place, **values})

    return rows(windows, knockout=cut.windows.T.ravel()), rows(
        heads,
        head=[site.units[0] for site in heads] * many,
        knockout=cut.heads.T.ravel(),
        direct=direct.T.ravel(),
    )


def _neurons(said: Said) -> pd.DataFrame:
    """The neurons that contribute most to each word, the contributions to its tokens summed."""
    model, parts = said.model, []
    for n, word in enumerate(said.words):
        ids = [said.caption.ids[token] for token in word.tokens]
        weights = token_weights(model, ids)
        each = [contributions(said.caption, [t], w)[0] for t, w in zip(word.tokens, weights, strict=True)]
        scores, best = sum(each[1:], each[0]).topk(min(NEURONS, each[0].numel()))
        neurons = named(model, best.tolist())
        tops = top_tokens(model, neurons, TOKENS)
        rows = pd.DataFrame(neurons, columns=["layer", "neuron"])
        rows.insert(0, "word", n)
        rows["score"] = scores.double().cpu().numpy()
        parts.append(rows.assign(tokens=[" ".join(token for token, _ in some) for some in tops]))
    return pd.concat(parts, ignore_index=True)

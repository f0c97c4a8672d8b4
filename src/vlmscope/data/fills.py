"""What can be shown in an object's place without a model: made of the picture around it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmscope.data.example import Example
from vlmscope.data.images import open_image
from vlmscope.data.masks import drawn, object_of
from vlmscope.errors import ExampleError, shown

Fill = Literal["mean", "blur", "shuffle"]
Region = NDArray[np.bool_]
"""Which pixels are replaced, `(height, width)`."""
BLUR = 1 / 8
"""The standard deviation of the blur, as a part of the longer side."""


def region(example: Example, mask: str | None = None) -> tuple[Image.Image, Region]:
    """The clean picture of an example and the pixels that a mask, or a box, shows: all that are not black.

    `mask` is its name; by default the answer's object (`object_of`), or the only one. Raises `ExampleError`
    where there is none, or it covers all of the picture or nothing of it.
    """
    picture = open_image(example.clean_image)
    only = next(iter(example.masks)) if len(example.masks) == 1 else None
    name = mask or object_of(example) or only
    if name is None or name not in example.masks:
        there = f"its masks are {', '.join(map(shown, example.masks))}" if example.masks else "it has none"
        raise ExampleError(f"no mask {shown(name or 'of the answer')}; {there}: name one, or add a box")
    found = np.asarray(drawn(example, name, picture.size)) > 0
    if found.all() or not found.any():
        much = "all of the picture" if found.all() else "nothing of the picture"
        raise ExampleError(f"the mask of {shown(name)} covers {much}; draw white what is to be replaced")
    return picture, found


def fill(picture: Image.Image, where: Region, how: Fill, seed: int = 0) -> Image.Image:
    """A picture with some pixels replaced by what all others make up: nothing of what was there is left.

    `mean` is the mean color of the others; `blur` goes on smoothly from them (the mean of the others,
    weighted by a Gaussian of the distance, an eighth of the longer side wide); `shuffle` draws others at
    random.

    >>> half = np.array([[False, False, True, True]])
    >>> list(fill(Image.new("RGB", (4, 1), "red"), half, "mean").get_flattened_data())[3]
    (255, 0, 0)
    """
    pixels = np.asarray(picture).astype(np.float64)
    others = pixels[~where]
    if how == "shuffle":
        new = others[np.random.default_rng(seed).integers(len(others), size=int(where.sum()))]
    else:
        new = np.broadcast_to(others.mean(0), (int(where.sum()), 3))
        if how == "blur":
            new = _from_around(pixels, where, new)
    return replaced(picture, where, np.round(new).astype(np.uint8))


def replaced(picture: Image.Image, where: Region, new: NDArray[np.uint8]) -> Image.Image:
    """A picture with new pixels at some places `(n, 3)`; all others stay bit for bit."""
    pixels = np.array(picture)
    pixels[where] = new
    return Image.fromarray(pixels)


def _from_around(pixels: NDArray[Any], where: Region, far: NDArray[Any]) -> NDArray[Any]:
    """Weighted means of the pixels outside; `far` where all of these are too far away to count."""
    from scipy.ndimage import gaussian_filter

    wide = max(where.shape) * BLUR
    weights = gaussian_filter((~where).astype(np.float64), wide, mode="constant")[where][:, None]
    bands = (pixels * ~where[..., None]).transpose(2, 0, 1)
    channels = [gaussian_filter(band, wide, mode="constant")[where] for band in bands]
    return np.where(weights > 1e-6, np.stack(channels, 1) / np.maximum(weights, 1e-6), far)

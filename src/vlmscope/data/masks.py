"""Which patches of a picture an object covers."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmscope import errors
from vlmscope.data.example import Box, Example
from vlmscope.data.images import open_image
from vlmscope.errors import ExampleError


def object_of(example: Example) -> str | None:
    """The name of the mask of the answer's object: `answer`, the kind of thing that it is, or `object`."""
    wanted = ("answer", example.groups.get("kind", ""), "object")
    return next((name for name in wanted if name in example.masks), None)


def covered(example: Example, name: str, size: tuple[int, int], view: Box | None = None) -> NDArray[np.bool_]:
    """Which patches of a grid of `size` (rows, columns) an object covers by half, or else the most.

    The grid lies over the part `view` of the picture (left, top, right, bottom in pixels; see
    `Model.view`), by default over all of it.
    """
    shown, quoted = drawn(example, name, open_image(example.clean_image).size), errors.shown(name)
    if view is not None:
        left, top, right, bottom = (round(x) for x in view)
        shown = shown.crop((left, top, right, bottom))
    share = np.asarray(shown.convert("F").resize(size[::-1], Image.Resampling.BOX)) / 255
    if share.max() <= 0:
        raise ExampleError(f"the mask of {quoted} is empty; draw the object white")
    return np.asarray(share >= min(0.5, float(share.max())))


def drawn(example: Example, name: str, whole: tuple[int, int]) -> Image.Image:
    """The mask of an object, or the box around it, in grey, as a picture of the size `whole` (width, height).

    Raises `ExampleError` for a mask that is no picture of that size.
    """
    mask = example.masks[name]
    if isinstance(mask, tuple):
        shown = Image.new("L", whole, 0)
        if not any(map(math.isnan, mask)):
            edges = zip(mask, (*whole, *whole), strict=True)
            left, top, right, bottom = (round(min(max(x, 0), end)) for x, end in edges)
            shown.paste(255, (left, top, right, bottom))
        return shown
    shown = open_image(mask).convert("L")
    if shown.size != whole:
        (width, height), (wide, high) = shown.size, whole
        raise ExampleError(
            f"the mask of {errors.shown(name)} is {width}x{height}, its picture {wide}x{high}; "
            "draw it in the picture's size"
        )
    return shown

"""Which patches of a picture an object covers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmscope.data.example import Box, Example
from vlmscope.data.images import open_image
from vlmscope.errors import ExampleError, shown
from vlmscope.runs.model import Model


def masks_of(model: Model, example: Example, size: tuple[int, int]) -> dict[str, NDArray[np.bool_]]:
    """The patches of the answer's `object`, and of the `foil`'s, where the example says where they are."""
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
        drawn = Image.new("L", whole, 0)
        # Numbers that are none, or beyond all pictures, have no pixels.
        edges = zip(mask, (*whole, *whole), strict=True)
        left, top, right, bottom = (round(min(max(x, 0), end)) if x == x else 0 for x, end in edges)
        drawn.paste(255, (left, top, right, bottom))
    else:
        drawn = open_image(mask).convert("L")
        if drawn.size != whole:
            (width, height), (wide, high) = drawn.size, whole
            raise ExampleError(
                f"the mask of {shown(name)} is {width}x{height}, its picture {wide}x{high}; "
                "draw it in the picture's size"
            )
    if view is not None:
        left, top, right, bottom = (round(x) for x in view)
        drawn = drawn.crop((left, top, right, bottom))
    share = np.asarray(drawn.convert("F").resize(size[::-1], Image.Resampling.BOX)) / 255
    if share.max() <= 0:
        raise ExampleError(f"the mask of {shown(name)} is empty; draw the object white")
    return np.asarray(share >= min(0.5, float(share.max())))

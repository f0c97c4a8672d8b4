"""What a norm does, read off the outputs of its own module, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LARGE = 2.0**15
"""Of inputs this large a norm's ε is nothing."""


class Scaling(NamedTuple):
    """What a norm multiplies an input of mean zero and mean square one by, what it adds, and whether it takes
    the input's mean away first."""

    gain: Float[Tensor, "width"]
    bias: Float[Tensor, "width"]
    is_centred: bool


@torch.no_grad()
def scaling(norm: Callable[[Tensor], Tensor], like: Float[Tensor, "width"]) -> Scaling:
    """Of a norm of vectors such as `like`.

    >>> norm = torch.nn.LayerNorm(4)
    >>> scaling(norm, torch.zeros(4)).gain.tolist(), scaling(norm, torch.zeros(4)).is_centred
    ([1.0, 1.0, 1.0, 1.0], True)
    """
    ones = torch.ones_like(like)
    signs = ones.clone()
    signs[::2] = -1.0  # mean zero, mean square one
    bias = norm(torch.zeros_like(ones))
    gain = (norm(LARGE * signs) - norm(-LARGE * signs)) / (2 * signs)
    return Scaling(gain, bias, torch.allclose(norm(LARGE * ones), bias))

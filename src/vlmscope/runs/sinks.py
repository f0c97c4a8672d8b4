"""Tokens of the image that draw attention whatever they show."""

from __future__ import annotations

import torch

from vlmscope.models.inputs import Inputs
from vlmscope.runs.forward import forward
from vlmscope.runs.network import Network
from vlmscope.sites import Point

TAU = 20.0
"""How much larger than the root mean square of a state a sink's feature is."""


def sinks(network: Network, inputs: Inputs) -> tuple[int, ...]:
    """The positions of sinks in the tower that speaks (Kang et al. 2025, arXiv 2503.03321): tokens of the
    image whose state behind some block has max |x| / RMS(x) above `TAU`, over the few features in which the
    first token, which every model makes a sink, is above it, too.

    >>> from vlmscope.checkpoint import load
    >>> from PIL import Image
    >>> model = load("toy-llava")
    >>> sinks(model, model.inputs(Image.new("RGB", (48, 48), "white"), "describe this picture."))
    ()
    """
    tower = network.speaker
    image = list(inputs.layout[tower].image)
    points = [Point(tower, n, "resid") for n in range(network.shapes[tower].layers)]
    found = torch.zeros(len(image), dtype=torch.bool)
    for value in forward(network, inputs, keep=points).values.values():
        size = value[0].float().abs()
        is_large = (size / size.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30) > TAU).cpu()
        found |= (is_large[image] & is_large[0]).any(-1)
    return tuple(n for n, one in zip(image, found.tolist(), strict=True) if one)

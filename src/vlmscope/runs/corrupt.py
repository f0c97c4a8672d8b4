"""Corruption: from an example to the pairs of runs that are compared.

- `image`: the corrupt image, the clean prompt (a semantic image pair of NOTICE, arXiv 2406.16320).
- `text`: the clean image, the corrupt prompt (symmetric token replacement of NOTICE).
- `noise`: the clean input, with noise on what the language model reads of the image, as in causal
  tracing for BLIP (Palit et al., arXiv 2308.14179), or on the text embeddings, as in ROME (arXiv
  2202.05262).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, VlmscopeError, choice, number, shown, whole
from vlmscope.models.inputs import Edit, Inputs, Pair
from vlmscope.runs.forward import forward
from vlmscope.runs.model import Model
from vlmscope.sites import Site

FORMS = {"multiply": 5.0, "add": 3.0, "factor": 0.7691}
MOST_DRAWS, MOST_SCALE = 1000, 1000.0


@dataclass(frozen=True)
class Noise:
    """How noise corrupts a run; `draws` pairs an example, whose results are averaged.

    - `multiply`: x·ε, ε ~ N(1, scale²), by element; 5 in causal tracing for BLIP.
    - `add`: x + ε, ε ~ N(0, (scale·σ)²), σ the standard deviation of x; 3 in ROME.
    - `factor`: x·scale, no randomness; 0.7691 in a later notebook of the BLIP tracing authors.

    `at` is what the language model reads of the image (`image`: `Model.image_sites`), or the embeddings of
    the prompt's text (`text`); tokens of the answer that are fed have no noise.
    """

    form: Literal["multiply", "add", "factor"] = "multiply"
    at: Literal["image", "text"] = "image"
    scale: float | None = None
    draws: int = 10

    def __post_init__(self) -> None:
        choice(self.form, "noise", FORMS)
        if self.at not in ("image", "text"):
            raise VlmscopeError(f"noise at {shown(self.at)} is unknown; expected image or text")
        draws = whole(self.draws, "the number of draws of noise", 1, MOST_DRAWS)
        scale = FORMS[self.form] if self.scale is None else self.scale
        scale = number(scale, "the scale of the noise", 0, MOST_SCALE)
        if scale == (1 if self.form == "factor" else 0):
            raise VlmscopeError(
                f"noise of scale {scale:g} changes nothing; expected such as {FORMS[self.form]}"
            )
        object.__setattr__(self, "scale", scale)
        # Where nothing is drawn, one draw says it all.
        object.__setattr__(self, "draws", 1 if self.form == "factor" else draws)


Corruption = Literal["image", "text"] | Noise


def parse(corrupt: str | Noise) -> Corruption:
    """`image`, `text`, `noise` (with the published defaults) or a `Noise`.

    >>> parse("noise")
    Noise(form='multiply', at='image', scale=5.0, draws=10)
    """
    match corrupt:
        case Noise() | "image" | "text":
            return corrupt
        case "noise":
            return Noise()
    raise VlmscopeError(f"unknown corruption {shown(corrupt)}; expected image, text or noise")


def pairs(
    model: Model, example: Example, corruption: Corruption, seed: int = 0, whole: bool = False
) -> list[Pair]:
    """The pairs of runs of one example: one, or one a draw of noise.

    Every site of a draw sees the same noise; for `whole` see `prepare`. Raises `ExampleError` if the example
    lacks what the corruption needs, or changes nothing.
    """
    if isinstance(corruption, Noise):
        pair = model.prepare(replace(example, corrupt_image=None, corrupt_prompt=None), whole)
        first, *more = noisy(model, corruption.at)
        seeds = {first: f"{seed}/{example.id}", **{site: f"{seed}/{example.id}/{site}" for site in more}}
        each = [_edits(model, pair.clean, corruption, *one) for one in seeds.items()]
        return [replace(pair, edits=edits) for edits in zip(*each, strict=True)]
    if corruption == "image":
        if example.corrupt_image is None:
            raise ExampleError("there is no corrupt image; fill corrupt_image_path or corrupt the text")
        return [model.prepare(replace(example, corrupt_prompt=None), whole)]
    if example.corrupt_prompt is None:
        raise ExampleError("there is no corrupt prompt; fill corrupt_prompt or corrupt the image")
    if example.corrupt_prompt == example.clean_prompt:
        raise ExampleError("the corrupt prompt is the clean one; nothing would be corrupted")
    return [model.prepare(replace(example, corrupt_image=None), whole)]


def _edits(model: Model, inputs: Inputs, noise: Noise, site: Site, seed: str) -> list[Edit]:
    """One edit a draw, of one site: drawn on the CPU in float32, so that every device and precision agree."""
    assert noise.scale is not None
    (site,) = model.places(site, inputs)
    layout = inputs.layout[site.tower]
    end = len(layout.tokens) - layout.fed  # what is fed, or said, behind the prompt has no noise
    site = replace(site, positions=tuple(position for position in site.positions if position < end))
    if noise.form == "factor":
        return [Edit(site, "scale", noise.scale)]
    at, there = list(site.positions), model.shapes[site.tower]
    shape = (len(at), there.widths.get(site.kind, there.width))
    draws = [_draw(shape, seed, number) for number in range(noise.draws)]
    if noise.form == "multiply":
        return [Edit(site, "scale", 1 + noise.scale * draw) for draw in draws]
    value = forward(model, inputs, keep=[site.point]).values[site.point][0, at]
    sigma = noise.scale * value.float().std().item()
    return [Edit(site, "add", sigma * draw) for draw in draws]


def noisy(model: Model, at: str) -> tuple[Site, ...]:
    """Where noise is: all that the language model reads of the image, or the embeddings of the text.

    >>> from vlmscope.checkpoint import load
    >>> [str(site) for site in noisy(load("toy-llava"), "image")]
    ['decoder.0.resid_pre@image']
    """
    if at == "text":
        return (Site(model.text_towers[0], 0, "resid_pre", position="text"),)
    return model.image_sites


def _draw(shape: tuple[int, int], seed: str, number: int) -> Tensor:
    """Standard normal numbers that depend on the words of the seed and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randn(shape, generator=generator)

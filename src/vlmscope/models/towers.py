"""One table a model family: where its towers and sublayers are, and how an input becomes tensors.

A family adds no arithmetic: everything is computed by the modules of Hugging Face's own model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from vlmscope.data.example import Box, Span
from vlmscope.errors import ExampleError
from vlmscope.layout import Layout
from vlmscope.models.inputs import Inputs

Factor = Callable[[Any], Callable[[Mapping[str, Any]], Any] | None]
"""`factor(block)`: from what the block is called with to what it multiplies a sublayer's output by (a
number, or a tensor that broadcasts to `(rows, pos, width)`); None for a block that does not."""


@dataclass(frozen=True)
class Tower:
    """The paths of one tower: `blocks` in the model, all others but `output` in a block.

    - `attn`, `cross`, `mlp`: the output projection of a sublayer. Its input is the heads (or neurons) side by
      side, its output what the sublayer adds to the residual stream, unless `behind` names, by kind, a norm
      behind it (in the blocks that have all that it names), or `factor` gives what the block multiplies by.
    - `normed`: the blocks normalise the residual stream itself, so that sublayers do not add up to a block's
      output; `middle` are the modules there (the first that a block has) whose output its MLP reads.
    - `output`: the module whose output is the tower's, where a norm or a projection follows the last block.
    - `fold`: the cross-attention module, where no query looks at another, so that rows which share the
      attended image can be laid end to end.
    - `attention`: by kind, the modules that pay attention, through transformers' attention interface, or
      telling what they paid as their second output; `reads`: the tower that `cross` attends to.
    - `gate`: the module whose output gates the neurons.
    - `norms`: by kind, the norm through which a sublayer reads the stream (the first that a block has).
    - `config`: the part of the model's config (attributes or entries with dots between them, empty for the
      config itself) that says how many `heads` there are.
    - `depth`, `joined`, `deepstack`: by the config, how many blocks are used, whether several make up what
      leaves the tower (then its flow is `plain`), and behind how many of them the model adds features of the
      image.
    """

    blocks: str
    config: str
    attn: str | None
    mlp: str
    cross: str | None = None
    behind: Mapping[str, str] = field(default_factory=dict)
    factor: Mapping[str, Factor] = field(default_factory=dict)
    normed: bool = False
    middle: tuple[str, ...] = ()
    output: str | None = None
    fold: str | None = None
    attention: Mapping[str, str] = field(default_factory=dict)
    reads: str | None = None
    heads: str = "num_attention_heads"
    depth: Callable[[Any], int] | None = None
    gate: str | None = None
    norms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flow: Literal["rows", "suffix", "plain"] = "rows"
    joined: Callable[[Any], bool] | None = None
    deepstack: Callable[[Any], int] | None = None


CLIP = Tower(
    blocks="model.vision_tower.encoder.layers",
    config="vision_config",
    attn="self_attn.out_proj",
    mlp="mlp.fc2",
    attention={"attn": "self_attn"},
    norms={"attn": ("layer_norm1",), "mlp": ("layer_norm2",)},
)
"""The vision tower of CLIP, and of all that are built like it (SigLIP's, BLIP's)."""


def whole(processor: Any, image: Image.Image) -> Box:
    """All of a picture, whatever its shape: left, top, right, bottom in pixels."""
    return 0.0, 0.0, float(image.width), float(image.height)


def _plain_only(*_: object) -> Tensor:
    raise NotImplementedError(
        "a tower whose flow is not 'plain', or that says the words, needs its family's leave and finish"
    )


@dataclass(frozen=True)
class Family:
    """A family of models: a Hugging Face class, its towers in the order of the computation.

    - `model`, `processor`: what `load` loads; None where transformers has no code for the class.
    - `variant`: the type of the language model, where a class has several.
    - `encode(hf, processor, images, prompt, roles, prefix)`: the `Inputs` of one run; `prefix` are
      the answer's token ids that are fed before the read-out position.
    - `blank(hf)`: the smallest valid `Inputs`, for `verify`; by default a small picture is encoded.
    - `leave(hf, tower, hidden)`: from the last block's output to the tower's output;
      `finish(hf, inputs, tower, output, keep)`: from there, many rows of it, to the logits at the last `keep`
      positions. For towers whose flow is not `plain`, and the one that says the words; `finish` for a vision
      tower with an `output`, too.
    - `generate(hf, inputs, **options)`: the answer's token ids, by the model's own generation.
    - `cache()`: an object in which a `fold` module keeps the image's keys and values.
    - `options(processor, prompt, answer, images)`: the token ids of an answer as they would follow the
      prompt about so many images, with the token that ends it.
    - `keywords`: what else the model is called with; `pixels`: the one that the picture goes by.
    - `logits`: the module whose output has the logits; `head`: the linear module that gives them; `norm`: the
      norm right before it, where there is nothing else between the two.
    - `view(processor, image)`: the part of a picture that the grid of patches covers.
    - `image`: the tower whose `output` the language model reads of the image; None where the image's tokens
      enter its first block as they are.
    """

    name: str
    architecture: str
    model: type[PreTrainedModel] | None
    processor: Any
    towers: Mapping[str, Tower]
    logits: str
    encode: Callable[..., Inputs]
    blank: Callable[[Any], Inputs] | None
    generate: Callable[..., Tensor]
    cache: Callable[[], Any]
    options: Callable[..., list[int]]
    leave: Callable[..., Float[Tensor, "rows pos width"]] = _plain_only
    finish: Callable[..., Float[Tensor, "rows keep vocabulary"]] = _plain_only
    keywords: Mapping[str, Any] = field(default_factory=dict)
    pixels: str = "pixel_values"
    variant: str | None = None
    view: Callable[[Any, Image.Image], Box] = whole
    head: str = "lm_head"
    norm: str | None = None
    image: str | None = None


def one_picture(many: int) -> None:
    """Raises `ExampleError` if a family whose inputs have one picture is given more, or none."""
    if many > 1:
        raise ExampleError(f"this model takes one image, the example has {many}; leave one")
    if not many:
        raise ExampleError("this model takes no prompt without an image; give one")


def sides(patch: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a patch, as a config gives them."""
    return (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])


def patches(
    pixels: Float[Tensor, "pictures 3 height width"], side: int | Sequence[int], class_token: bool
) -> Layout:
    """The layout of a vision tower: patches of `side` pixels (or height and width) in rows, behind a class
    token if there is one; further pictures behind the first, without cells.

    >>> import torch
    >>> patches(torch.zeros(1, 3, 4, 8), 4, True).tokens
    ('[CLS]', '0,0', '0,1')
    """
    height, width = sides(side)
    rows, columns = pixels.shape[-2] // height, pixels.shape[-1] // width
    first, many = int(class_token), len(pixels)
    cells = {first + r * columns + c: (r, c) for r in range(rows) for c in range(columns)}
    tokens = [*["[CLS]"] * first, *(f"{r},{c}" for r, c in cells.values())]
    further = [f"{n}:{token}" for n in range(1, many) for token in tokens]
    every = range(many * len(tokens))
    images = tuple(n for n in every if n % len(tokens) >= first) if many > 1 else ()
    return Layout((*tokens, *further), cells=cells, image=images, sequences=many)


def behind(spans: Sequence[Span], end: int) -> int:
    """How many tokens at the end stand for no character of a prompt that ends there.

    >>> behind([(0, 2), (3, 6), (7, 9), (0, 0)], 6)
    2
    """
    own = [n for n, (a, b) in enumerate(spans) if a < b and a < end]
    return len(spans) - 1 - max(own, default=-1)

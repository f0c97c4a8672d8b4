"""What families with one causal decoder over image and text tokens have in common.

Their processors write the prompt (through the chat template where there is one), put as many image
tokens in the place of the placeholder as the image has, and the model puts the image's features there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from vlmscope.data.example import Span
from vlmscope.errors import ExampleError
from vlmscope.layout import Layout
from vlmscope.models.families.chat import Tokens, options, special, tokenized, written
from vlmscope.models.inputs import Inputs
from vlmscope.models.towers import Family, Tower, behind

Cells = Callable[[Any, Any, Image.Image, Mapping[str, Tensor], Sequence[int]], dict[int, tuple[int, int]]]
"""`cells(hf, processor, image, tensors, at)`: the row and column of each position in `at` that shows a
place of the (first) image."""

KEYWORDS = {"use_cache": False, "logits_to_keep": 1}
"""A run needs the logits of the last position only, and nothing is generated after it."""


def encode(
    cells: Cells,
    vision: Callable[[Any, Mapping[str, Tensor]], Layout],
    hf: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    prompt: str,
    roles: Mapping[str, Span],
    prefix: Sequence[int],
    *,
    kind: int = 0,
    write: Callable[..., tuple[str, int]] = written,
    tokens: Callable[[Any, str], Tokens] = tokenized,
) -> Inputs:
    """The tensors of one run as the processor makes them, with the answer's beginning behind.

    `kind` is the token type of what the model says; `write` gives the text that the processor gets,
    `tokens` what it makes of that.
    """
    mark = str(processor.image_token)
    if prompt.count(mark) not in (0, len(pictures)):
        given = "there is one image" if len(pictures) == 1 else f"there are {len(pictures) or 'no'} images"
        raise ExampleError(
            f"the prompt has {prompt.count(mark)} placeholders '{mark}' and {given}; write one for each"
        )
    text, start = write(processor, prompt, len(pictures))
    if not pictures:
        return _alone(hf, processor, text, prefix)
    tensors = processed(processor, pictures, text)
    if prefix:
        tensors = {name: _longer(name, value, prefix, kind) for name, value in tensors.items()}
    ids = tensors["input_ids"][0].tolist()
    _check_length(hf, len(ids))
    images = [n for n, token in enumerate(ids) if token == hf.config.image_token_id]
    if not images:
        raise ExampleError(f"the prompt has no image; put '{processor.image_token}' into it")
    first, mine = tensors, images
    if len(pictures) > 1:  # which tokens are the first picture's: as many as it has by itself
        text_of_one = write(processor, "", 1)[0]
        alone = [processed(processor, [one], text_of_one) for one in pictures]
        counts = [int((one["input_ids"] == hf.config.image_token_id).sum()) for one in alone]
        first, mine = alone[0], images[: counts[0]] if sum(counts) == len(images) else []
    there = set(images)
    grid = cells(hf, processor, pictures[0], first, mine) if mine else {}
    names = processor.tokenizer.convert_ids_to_tokens(ids)
    own = tokens(processor, text)
    layout = Layout(
        tuple("{},{}".format(*grid[n]) if n in grid else name for n, name in enumerate(names)),
        tuple(n for n in range(len(ids)) if n not in there),
        _roles(processor, own, start, roles, ids[: len(ids) - len(prefix)]),
        grid,
        tuple(images),
        behind=behind([span for _, span in own], start + len(prompt)),
    )
    return Inputs(tensors, {"vision": vision(hf, tensors), "decoder": layout})


def _check_length(hf: Any, many: int) -> None:
    longest = getattr(hf.config.get_text_config(), "max_position_embeddings", None)
    if longest and many > longest:
        raise ExampleError(
            f"image and prompt are {many} tokens, the model takes at most {longest}; "
            "shorten the prompt or take a smaller image"
        )


def _alone(hf: Any, processor: Any, text: str, prefix: Sequence[int]) -> Inputs:
    """A prompt without a picture."""
    ids = [*processor.tokenizer(text, **special(processor, text))["input_ids"], *prefix]
    _check_length(hf, len(ids))
    tensors = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    tokens = tuple(processor.tokenizer.convert_ids_to_tokens(ids))
    return Inputs(tensors, {"decoder": Layout(tokens, tuple(range(len(ids))))})


def processed(processor: Any, pictures: Sequence[Image.Image], text: str) -> dict[str, Tensor]:
    """What the processor makes of some pictures and the text that places them."""
    try:
        keywords = special(processor, text)
        tensors = dict(processor(images=[list(pictures)], text=[text], return_tensors="pt", **keywords))
    except (ValueError, TypeError, IndexError, ZeroDivisionError, RuntimeError) as error:
        sizes = ", ".join(f"{one.width} x {one.height}" for one in pictures)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExampleError(
            f"the model's processor cannot take {len(pictures)} image(s) of {sizes} pixels with this "
            f"prompt: {first}"
        ) from error
    tensors.pop("labels", None)
    return tensors


def _longer(name: str, value: Tensor, prefix: Sequence[int], kind: int) -> Tensor:
    """What has an entry for each token gets some for the answer's beginning."""
    many = len(prefix)
    if name == "input_ids":
        return torch.cat([value, torch.tensor([prefix])], 1)
    if name == "attention_mask":
        return torch.cat([value, torch.ones_like(value[:, :1]).expand(-1, many)], 1)
    if name in ("token_type_ids", "mm_token_type_ids"):
        return torch.cat([value, torch.full_like(value[:, :1], kind).expand(-1, many)], 1)
    if name == "cross_attention_mask":
        return torch.cat([value, value[:, -1:].expand(-1, many, -1, -1)], 1)
    return value


def _roles(
    processor: Any, tokens: Tokens, start: int, roles: Mapping[str, Span], ids: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Positions of each role's tokens among all tokens of the input."""
    mark = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    places = _places([token for token, _ in tokens], ids, mark) if roles else []
    found = {}
    for role, (begin, end) in roles.items():
        own = [n for n, (_, (a, b)) in enumerate(tokens) if a < start + end and b > start + begin]
        if any(places[n] is None for n in own):
            raise ExampleError("the words of the prompt are not found among the tokens of the input")
        if own:
            found[role] = tuple(places[n] or 0 for n in own)
    return found


def _places(tokens: Sequence[int], ids: Sequence[int], mark: int) -> list[int | None]:
    """Where each token of a text stands in the input, in which every `mark` has become an image.

    What stands before the first image is counted from the left, behind the last from the right; between
    two it is searched for, in the order in which it stands.
    """
    places: list[int | None] = [None] * len(tokens)
    marks = [n for n, token in enumerate(tokens) if token == mark]
    first, last = (marks[0], marks[-1]) if marks else (0, -1)
    for n in range(first):
        if tokens[n] != ids[n]:
            break
        places[n] = n
    shift = len(ids) - len(tokens)
    for n in range(len(tokens) - 1, last, -1):
        if n + shift < 0 or tokens[n] != ids[n + shift]:
            break
        places[n] = n + shift
    begin = first
    for left, right in pairwise(marks):
        own = list(tokens[left + 1 : right])
        # The tokens at both ends may have merged with what the processor writes around images.
        for a, b in ((0, 0), (1, 0), (0, 1), (1, 1)):
            part = own[a : len(own) - b]
            at = next((n for n in range(begin, len(ids)) if list(ids[n : n + len(part)]) == part), None)
            if part and at is not None:
                places[left + 1 + a : right - b] = range(at, at + len(part))
                begin = at + len(part)
                break
    return places


def generate(hf: Any, inputs: Inputs, **options: object) -> Int[Tensor, "pos"]:
    """What the model says after the prompt, by its own greedy generation."""
    found = hf.generate(**inputs.tensors, do_sample=False, num_beams=1, **options)
    return found[0, inputs.tensors["input_ids"].shape[1] :]


def every_tile(hf: Any, tensors: Mapping[str, Tensor]) -> int:
    """How many tiles there are in all."""
    return math.prod(tensors["pixel_values"].shape[:-3])


def tiles(
    patch: Callable[[Any], int],
    *,
    class_token: Callable[[Any], bool] = lambda hf: False,
    count: Callable[[Any, Mapping[str, Tensor]], int] = every_tile,
) -> Callable[[Any, Mapping[str, Tensor]], Layout]:
    """The layout of a vision tower that sees `count` tiles: each one's patches in rows, behind a class
    token if `class_token(hf)` says that it has one."""

    def layout(hf: Any, tensors: Mapping[str, Tensor]) -> Layout:
        height, width = tensors["pixel_values"].shape[-2:]
        rows, columns = height // patch(hf.config), width // patch(hf.config)
        names = [*(["[CLS]"] * class_token(hf)), *(f"{r},{c}" for r in range(rows) for c in range(columns))]
        tokens = [f"{tile}:{name}" for tile in range(count(hf, tensors)) for name in names]
        return Layout(tuple(tokens), image=tuple(n for n, t in enumerate(tokens) if "[" not in t))

    return layout


def put_back(side: Callable[[Any, Any], int], tiles: Callable[[Any, Image.Image], tuple[int, int]]) -> Cells:
    """Tiles put back where they belong: squares of `side(hf, processor)` tokens a side, in as many rows
    and columns as `tiles(processor, image)`. The whole picture, which comes behind them, has no cells,
    unless there are no tiles."""

    def cells(
        hf: Any, processor: Any, image: Image.Image, tensors: Mapping[str, Tensor], at: Sequence[int]
    ) -> dict[int, tuple[int, int]]:
        many, (rows, columns) = side(hf, processor), tiles(processor, image)
        if rows * columns <= 1:
            return {p: divmod(n, many) for n, p in enumerate(at)}
        found = {}
        for n, p in enumerate(at[: rows * columns * many * many]):
            tile, within = divmod(n, many * many)
            down, right = divmod(tile, columns)
            row, column = divmod(within, many)
            found[p] = (down * many + row, right * many + column)
        return found

    return cells


def no_cells(
    hf: Any, processor: Any, image: Image.Image, tensors: Mapping[str, Tensor], images: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """For tokens that are nowhere in the picture."""
    return {}


def square(
    hf: Any, processor: Any, image: Image.Image, tensors: Mapping[str, Tensor], images: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Image tokens in rows from the upper left, as many rows as columns."""
    side = round(len(images) ** 0.5)
    if side * side != len(images):
        return {}
    return {at: divmod(n, side) for n, at in enumerate(images)}


def family(
    name: str,
    architecture: type[PreTrainedModel],
    *,
    vision: Tower,
    decoder: Tower,
    cells: Cells,
    layout: Callable[[Any, Mapping[str, Tensor]], Layout],
    norm: str = "model.language_model.norm",
    head: str = "lm_head",
    kind: int = 0,
    capped: bool = False,
    write: Callable[..., tuple[str, int]] = written,
    tokens: Callable[[Any, str], Tokens] = tokenized,
) -> Family:
    """A family whose vision tower is followed by one causal decoder.

    `norm` and `head` are what follows the decoder's last block, `capped` says that the model bounds its
    logits where its config asks for that, and `kind` is the token type of what it says. Patches in the
    vision tower are one
    forward each: what comes between the towers differs by family, and is left to the model.
    """

    def leave(
        hf: Any, tower: str, hidden: Float[Tensor, "rows pos width"]
    ) -> Float[Tensor, "rows pos width"]:
        return hf.get_submodule(norm)(hidden)

    def finish(
        hf: Any, inputs: Inputs, tower: str, output: Float[Tensor, "rows pos width"], keep: int
    ) -> Float[Tensor, "rows keep vocabulary"]:
        logits = hf.get_submodule(head)(output[:, -keep:])
        cap = getattr(hf.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None or not capped else cap * torch.tanh(logits / cap)

    return Family(
        name=name,
        architecture=architecture.__name__,
        model=architecture,
        processor=AutoProcessor,
        towers={"vision": replace(vision, flow="plain"), "decoder": decoder},
        logits="",
        encode=partial(encode, cells, layout, kind=kind, write=write, tokens=tokens),
        blank=None,
        leave=leave,
        finish=finish,
        generate=generate,
        cache=lambda: None,
        options=partial(options, write=write),
        keywords=KEYWORDS,
        head=head,
        norm=norm,
    )


def multiplied(block: Any) -> Callable[[Mapping[str, Any]], float] | None:
    """Granite multiplies what every sublayer gives by one number."""
    factor: float = getattr(block, "residual_multiplier", 1.0)
    return None if factor == 1.0 else lambda call: factor


def llama(blocks: str = "model.language_model.layers") -> Tower:
    """The decoder of LLaMA and of all that are built like it.

    In Gemma 2 and 3 a norm follows each sublayer. They have LLaMA's `post_attention_layernorm`, which
    there is the norm before the MLP, behind attention.
    """
    return Tower(
        blocks=blocks,
        config="text_config",
        attn="self_attn.o_proj",
        mlp="mlp.down_proj",
        behind={"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
        factor={"attn": multiplied, "mlp": multiplied},
        flow="suffix",
        attention={"attn": "self_attn"},
        gate="mlp.act_fn",
        norms={
            "attn": ("input_layernorm",),
            "cross": ("input_layernorm",),
            "mlp": ("pre_feedforward_layernorm", "post_attention_layernorm"),
        },
    )

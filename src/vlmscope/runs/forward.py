"""The one way to run a model: with edits, looking at places, with gradients where they are asked for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmscope.errors import ModelError, SiteError, VlmscopeError
from vlmscope.layout import grid
from vlmscope.models.inputs import Change, Edit, Inputs, Op, Value
from vlmscope.runs.access import hook, unpadded
from vlmscope.runs.hooks import Hooks, Plain, eager, patterns
from vlmscope.runs.network import Network
from vlmscope.sites import Pattern, Point, Site, Sites, expand, place

SPEECH = 20
"""How many tokens a model generates at most."""
_UNFIT = re.compile(r"image tokens do not match|image size .* doesn't match")
"""How transformers says that pictures or their tokens are not what the model takes."""


class Run(NamedTuple):
    """What a run gave: the logits at its last positions, and whole activations by point, after the edits."""

    logits: Float[Tensor, "positions vocabulary"]
    values: dict[Point, Float[Tensor, "1 pos width"]]


def forward(
    network: Network,
    inputs: Inputs,
    edits: Iterable[Edit] = (),
    keep: Collection[Point] = (),
    positions: int | None = 1,
    grad: bool = False,
) -> Run:
    """Run a model once: a plain forward of the Hugging Face model, with `edits` made as it computes.

    It keeps the activations at the points `keep`, and the logits of the last `positions` (None: all). With
    `grad` these are parts of one graph, for `torch.autograd.grad`; else nothing is recorded for gradients.

    Raises `ModelError` if the model refuses the inputs, `SiteError` for a place that is not in this run.

    >>> from PIL import Image
    >>> from vlmscope.checkpoint import load
    >>> model = load("toy-llava")
    >>> inputs = model.inputs(Image.new("RGB", (48, 48), "white"), "describe this picture.")
    >>> point = Point("decoder", 1, "resid")
    >>> run = forward(model, inputs, keep=[point], grad=True)
    >>> (gradient,) = torch.autograd.grad(run.logits[-1].max(), run.values[point])
    >>> gradient.shape == run.values[point].shape
    True
    """
    found: dict[Point, Tensor] = {}
    logits: list[Tensor] = []
    keywords = dict(network.family.keywords)
    if "logits_to_keep" in keywords:
        keywords["logits_to_keep"] = positions or 0
    mode = torch.enable_grad() if grad else torch.inference_mode()
    with mode, editing(network, inputs, edits), Hooks() as hooks:
        for point in keep:
            hook(hooks, network, point, inputs, partial(keep_value, found, point, grad))
        hooks.on_output(network.module(network.family.logits), lambda out: logits.append(out.logits))
        try:
            network.hf(**inputs.tensors, **keywords)
        except ValueError as error:
            if not _UNFIT.search(str(error)):
                raise
            raise ModelError(
                f"{network.name} refuses what its processor made of the example: {error}; "
                "load the processor that was saved with the model"
            ) from error
    whole = logits[0][0]
    return Run((whole if positions is None else whole[-positions:]).clone(), found)


@torch.inference_mode()
def generate(
    network: Network, inputs: Inputs, edits: Iterable[Edit] = (), most: int = SPEECH
) -> Int[Tensor, "pos"]:
    """The token ids of the model's own greedy generation, at most so many.

    Edits are made as the model reads the prompt; later steps have what came before in their cache.
    """
    with editing(network, inputs, edits, generating=True):
        return network.family.generate(network.hf, inputs, max_new_tokens=room(network, inputs, most))


def room(network: Network, inputs: Inputs, most: int) -> int:
    """How many tokens a model can generate behind a prompt, up to `most`: its positions are numbered, and the
    last token takes none."""
    longest = getattr(network.hf.config.get_text_config(), "max_position_embeddings", None)
    there = len(inputs.layout[network.speaker].tokens)
    return most if longest is None else max(1, min(most, longest - there + 1))


@contextmanager
def editing(
    network: Network, inputs: Inputs, edits: Iterable[Edit], generating: bool = False
) -> Iterator[None]:
    """Within this context all runs of the model, in any number of rows, have the edits; other threads
    wait."""
    with network.alone(), Hooks() as hooks:
        for change in network.changes(inputs, edits):
            point, seen = change.site.point, [0] if generating else None
            hook(hooks, network, point, inputs, partial(_change, change, network.units(point), seen))
        yield


def keep_value(found: dict[Point, Tensor], point: Point, grad: bool, x: Tensor) -> Tensor:
    """Keep what stands at a point: a copy, or the very part of a graph."""
    found[point] = x if grad else x.clone()
    return x


def _change(change: Change, units: int | None, seen: list[int] | None, x: Tensor) -> Tensor:
    """One change, made in every call, or while generating in those that see the prompt."""
    if seen is not None:
        if x.shape[1] <= seen[0]:
            return x
        seen[0] = x.shape[1]
    return edited(x, *change, units=units)


def edited(
    x: Float[Tensor, "rows pos width"], site: Site, op: Op, value: Value, units: int | None
) -> Float[Tensor, "rows pos width"]:
    """A copy of an activation, in which so many units lie side by side, with one change in every row."""
    x = x.clone()
    split: Tensor = x
    at: tuple[Any, ...] = slice(None), list(site.positions)
    if units is not None:
        split = x.unflatten(-1, (units, -1))
        at = (slice(None), torch.tensor(site.positions)[:, None], list(site.units))
    now = split[at].flatten(2)
    if isinstance(value, Tensor):
        # Every edit asks, and torch.broadcast_shapes takes as long as the edit itself.
        sizes = zip(reversed(value.shape), reversed(now.shape), strict=False)
        if value.ndim > now.ndim or any(a not in (1, b) for a, b in sizes):
            raise VlmscopeError(
                f"the value of the edit at '{site}' has the shape {tuple(value.shape)}; expected a "
                f"number, or one that broadcasts to {tuple(now.shape[1:])}: (positions, width)"
            )
        value = value.to(now)
    changed = value if op == "set" else now + value if op == "add" else now * value
    new = torch.as_tensor(changed, dtype=x.dtype, device=x.device).expand_as(now)
    split[at] = new if units is None else new.unflatten(-1, (len(site.units), -1))
    return x


def capture(
    network: Network, inputs: Inputs, sites: Sites, edits: Iterable[Edit] = ()
) -> dict[str, Float[Tensor, "pos width"]]:
    """The activations at sites, by site; one row a position that the site names, as wide as the kind, the
    head (all heads of a set), or 1 for a neuron."""
    placed = network.placed(sites, inputs)
    for site in placed:
        if len(site.parts) > 1:
            raise SiteError(f"bad site '{site}': several layers or sites; expected one here")
    values = forward(network, inputs, edits, {site.point for site in placed}).values
    return {str(site): read(network, values[site.point], site) for site in placed}


def read(network: Network, value: Tensor, site: Site) -> Float[Tensor, "pos width"]:
    """A site's part of the activation `(1, pos, width)` kept at its point."""
    value, units = value[0, list(site.positions)], network.units(site.point)
    return value if units is None else value.unflatten(-1, (units, -1))[:, list(site.units)].flatten(1)


def copied(network: Network, source: Inputs, inputs: Inputs, sites: Sites) -> list[Edit]:
    """Edits of `inputs` that copy the activations at sites from another run; raises `SiteError` if the two
    have other grids of patches, or other numbers of positions."""
    for tower, there in inputs.layout.items():
        here = source.layout[tower]
        same = sorted(there.cells.values()) == sorted(here.cells.values())
        if not same or len(there.tokens) != len(here.tokens):
            this, other = (
                f"{len(x.tokens)} positions ({' x '.join(map(str, grid(x)))} patches)" for x in (there, here)
            )
            raise SiteError(
                f"the {tower} tower has {this} for this picture and {other} for the one that is copied "
                "from, so they do not correspond; resize one picture to the other's size"
            )
    return [Edit(site, "set", value) for site, value in capture(network, source, sites).items()]


@torch.inference_mode()
def attention(
    network: Network,
    inputs: Inputs,
    tower: str,
    kind: str,
    at: Sequence[int] | str,
    edits: Sequence[Edit] = (),
) -> Float[Tensor, "layers heads at keys"]:
    """What every head of a tower's `attn` or `cross` pays attention to, from the positions `at` (numbers, or
    a position of the site language such as `last`) to those of `attended(tower, kind)`, in float32, in a run
    with `edits` (but none of the patterns themselves).

    It is what transformers' own eager attention pays, whichever attention the model runs with. Raises
    `SiteError` for a position or a tower that there is not, `ModelError` where the model does not tell what
    is paid, or where its kernel reads its mask in a form of its own.
    """
    at = _positions(network, inputs, tower, kind, at)
    modules = network.attention_modules(tower, kind)
    rows: list[Tensor] = []

    def pay(plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        rows.append(patterns(plain, module, q, k, v, mask, at, **kw).float())
        return plain(module, q, k, v, mask, **kw)

    with network.alone():
        if eager(modules[0]) is None:  # their second output is what they paid
            with Hooks() as hooks:
                for module in modules:
                    hooks.on_output(module, lambda out: rows.append(out[1][0][:, list(at)].float()))
                forward(network, inputs, edits)
        else:
            with network.attending(tower, pay, kind):
                forward(network, inputs, edits)
    paid = torch.stack([row.to(network.device) for row in rows])
    layout = inputs.layout[network.attended(tower, kind)]
    if paid.shape[-1] < len(layout.tokens):
        every = paid.new_zeros(*paid.shape[:-1], len(layout.tokens))
        every[..., unpadded(layout)] = paid
        return every
    return paid


def _positions(
    network: Network, inputs: Inputs, tower: str, kind: str, at: Sequence[int] | str
) -> Sequence[int]:
    """Positions as numbers, each of which is there, as what they attend to has to be."""
    whole = expand([Pattern.parse(f"{tower}.*.{kind}@all")], network.shapes)[0]
    place(replace(whole, tower=network.attended(tower, kind)), inputs.layout)
    if isinstance(at, str):
        named = replace(whole, position=Pattern.parse(f"{tower}.*.{kind}@{at}").position)
        return [n for site in place(named, inputs.layout) for n in site.positions]
    length = len(inputs.layout[tower].tokens)
    for n in at:
        if not isinstance(n, Integral) or not -length <= n < length:
            raise SiteError(
                f"no position {n!r} in the {tower} tower; expected whole numbers from 0 to {length - 1}, "
                "or a name such as 'last'"
            )
    return [int(n) % length for n in at]

"""The one way to run a model: with edits, looking at places, with gradients where they are asked for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmscope.errors import ModelError, SiteError, VlmscopeError
from vlmscope.layout import Layout, grid, said
from vlmscope.models.inputs import Change, Edit, Inputs, Op, Value
from vlmscope.runs.access import cut, edges_of, hook, unpadded
from vlmscope.runs.edges import Edges
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

    Edits hold for the prompt and for every word behind it: when a word has been said, its position is edited
    if the site names it in the prompt with all that was said so far. So `all`, `*`, `text`, `last` and
    `readout` name each word in turn, and whatever counts from the start or has a name in the prompt none. A
    value with a row for each position of the prompt has none for words, which stay as they are.
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
    edits = list(edits)
    with network.alone(), Hooks() as hooks:
        prompt = network.changes(inputs, edits)
        speech = Speech(network, inputs, edits) if generating else None
        cuts: dict[Point, list[Change]] = defaultdict(list)
        for change in prompt:
            if change.site.source:
                cuts[change.site.point._replace(part="")].append(change)
            elif speech is None:
                hook(hooks, network, change.site.point, inputs, partial(_change, [change], network))
        for point, some in cuts.items():
            turn = Turn(speech, point) if speech else None
            cut(hooks, network, *point[:3], partial(_cut, network, inputs, some, turn))
        for point in dict.fromkeys(change.site.point for change in prompt if not change.site.source):
            if speech:
                hook(hooks, network, point, inputs, partial(_said, network, Turn(speech, point)))
        yield


class Speech:
    """The edits of a generation, call by call: those of the prompt, and of each word that is said behind it,
    placed where it is the last."""

    def __init__(self, network: Network, inputs: Inputs, edits: Sequence[Edit]) -> None:
        self.network, self.inputs, self.edits = network, inputs, edits
        self.prompt = len(inputs.layout[network.speaker].tokens)
        self.placed = {self.prompt: network.changes(inputs, edits)}

    def at(self, position: int) -> list[Change]:
        """The changes of a word, each at its own position alone."""
        if position + 1 not in self.placed:
            tower = self.network.speaker
            longer = said(self.inputs.layout[tower], position + 1 - self.prompt)
            run = replace(self.inputs, layout={**self.inputs.layout, tower: longer})
            self.placed[position + 1] = [
                change._replace(site=replace(change.site, positions=(position,)))
                for change in self.network.changes(run, self.edits)
                if change.site.tower == tower and position in change.site.positions and _is_one(change.value)
            ]
        return self.placed[position + 1]


class Turn:
    """Whose turn it is at one place: the changes of the positions in each call. The tower that speaks is
    called with the prompt, and then with each word alone, or where nothing is cached with all so far."""

    def __init__(self, speech: Speech, point: Point) -> None:
        self.speech, self.point, self.seen = speech, point, 0

    def changes(self, many: int) -> tuple[int, list[Change]]:
        """Of the next call, with so many positions: the first of these, and all changes from there on."""
        first = self.seen if many <= self.seen and self.point.tower == self.speech.network.speaker else 0
        self.seen = first + many
        found = list(self.speech.placed[self.speech.prompt]) if first == 0 else []
        if self.point.tower == self.speech.network.speaker:
            for position in range(max(first, self.speech.prompt), self.seen):
                found += self.speech.at(position)
        return first, [change for change in found if change.site.point[:3] == self.point[:3]]


def _is_one(value: Value) -> bool:
    return not isinstance(value, Tensor) or value.ndim < 2 or len(value) == 1


def keep_value(found: dict[Point, Tensor], point: Point, grad: bool, x: Tensor) -> Tensor:
    """Keep what stands at a point: a copy, or the very part of a graph."""
    found[point] = x if grad else x.clone()
    return x


def _change(changes: Sequence[Change], network: Network, x: Tensor, first: int = 0) -> Tensor:
    """Some changes at one place, whose positions count from `first`."""
    for site, op, value in changes:
        there = replace(site, positions=tuple(position - first for position in site.positions))
        x = edited(x, there, op, value, network.units(site.point))
    return x


def _said(network: Network, turn: Turn, x: Tensor) -> Tensor:
    """The changes at one place in one call of a generation."""
    first, changes = turn.changes(x.shape[1])
    return _change(
        [c for c in changes if not c.site.source and c.site.part == turn.point.part], network, x, first
    )


def _cut(
    network: Network, inputs: Inputs, changes: Sequence[Change], turn: Turn | None, queries: int, keys: int
) -> list[Edges]:
    """The edges that are cut in one call of attention; a cache may have only the last keys."""
    first, behind = 0, 0
    if turn is not None:
        first, found = turn.changes(queries)
        changes = [change for change in found if change.site.source]
        behind = first + queries - keys if turn.point.kind == "attn" else 0
    some = [edges_of(network, inputs, change.site, str(change.op), -first) for change in changes]
    return [one._replace(sources=[n - behind for n in one.sources if n >= behind]) for one in some]


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
    if callable(op):
        changed: Any = torch.stack([op(one) for one in now])
        if changed.shape != now.shape:
            raise VlmscopeError(
                f"the function of the edit at '{site}' gave the shape {tuple(changed.shape[1:])}; expected "
                f"{tuple(now.shape[1:])}: (positions, width)"
            )
    else:
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
        if len(site.parts) > 1 or site.source:
            what = "an edge, which is cut and not read" if site.source else "several layers or sites"
            raise SiteError(f"bad site '{site}': {what}; expected one activation here")
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
    placed = network.placed(sites, source)
    values = capture(network, source, placed)
    return [Edit(site, "set", values[str(site)]) for site in placed]


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
    with paying(network, inputs, {(tower, kind): at}) as paid:
        forward(network, inputs, edits)
    return paid[tower, kind]


@contextmanager
def paying(
    network: Network, inputs: Inputs, where: Mapping[tuple[str, str], Sequence[int] | str]
) -> Iterator[dict[tuple[str, str], Float[Tensor, "layers heads at keys"]]]:
    """What the one run of `inputs` within this context pays, as `attention` gives it, by tower and kind; it
    is there behind the context. `where` has the positions of each."""
    places = {key: _positions(network, inputs, *key, at) for key, at in where.items()}
    rows: dict[tuple[str, str], list[Tensor]] = {key: [] for key in places}
    paid: dict[tuple[str, str], Tensor] = {}
    with network.alone(), Hooks() as hooks:
        for key, at in places.items():
            modules = network.attention_modules(*key)
            if eager(modules[0]) is None:  # their second output is what they paid
                for module in modules:
                    hooks.on_output(module, partial(_keep_paid, rows[key], at))
            else:
                hooks.enter_context(network.attending(key[0], partial(_pay, rows[key], at), key[1]))
        yield paid
    for key, found in rows.items():
        layout = inputs.layout[network.attended(*key)]
        paid[key] = _of_tokens(torch.stack([row.to(network.device) for row in found]), layout)


def _keep_paid(rows: list[Tensor], at: Sequence[int], out: Any) -> None:
    rows.append(out[1][0][:, list(at)].float())


def _pay(
    rows: list[Tensor],
    at: Sequence[int],
    plain: Plain,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    **kw: Any,
) -> Any:
    rows.append(patterns(plain, module, q, k, v, mask, at, **kw).float())
    return plain(module, q, k, v, mask, **kw)


def _of_tokens(paid: Tensor, layout: Layout) -> Tensor:
    """A column a token of what is attended to."""
    if paid.shape[-1] < len(layout.tokens):
        every = paid.new_zeros(*paid.shape[:-1], len(layout.tokens))
        every[..., unpadded(layout)] = paid
        return every
    return paid[..., : len(layout.tokens)]  # InstructBLIP's queries read words behind them, too


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

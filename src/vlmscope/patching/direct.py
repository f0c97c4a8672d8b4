"""Direct effects: what each part of a model writes to the logits by itself, past all that comes behind it.

The stream behind the last block is a sum of what is written to it. The final norm is linear given its own
statistics, and so is the head, so a logit difference of the run is the sum of what each writer gives:
(γ ⊙ z/σ) · (U[answer] − U[foil]), with the run's σ, and of what the biases give (direct logit attribution;
Elhage et al. 2021). A head's share splits further over the positions that it reads, p · W_O v, a neuron's is
its activation times its column. A soft cap is taken as the factor that it is at the run's own logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmscope.errors import ModelError, SiteError, shown
from vlmscope.models.inputs import Edit, Inputs
from vlmscope.runs.access import unpadded
from vlmscope.runs.forward import Run, forward
from vlmscope.runs.hooks import Plain, eager, paid_by
from vlmscope.runs.network import Network, has
from vlmscope.runs.norms import scaling
from vlmscope.sites import Point, Site

WRITERS = ("attn", "cross", "mlp", "deepstack")
"""What blocks add to the stream."""

Vector = Float[Tensor, "width"]
Array = NDArray[np.float64]
Key = tuple[int, str]
"""A layer and a kind."""


def check_place(network: Network, site: Site) -> None:
    """Raises `SiteError` for what does not write to the stream that the words are read from, `ModelError` for
    a model in which that is no sum of what is written."""
    tower, family = network.speaker, network.family
    if family.norm is None or family.towers[tower].normed:
        raise ModelError(
            f"{network.name}: the logits of {family.name} are no sum of what its parts write (behind its "
            "last block stand a dense layer, a GELU and a norm), so it has no direct effects; sweep instead"
        )
    for part in site.parts:
        writes = part.kind in WRITERS and part.part in ("", "h", "n")
        if part.tower != tower or not (writes or (part.kind, part.layer, part.part) == ("resid_pre", 0, "")):
            raise SiteError(
                f"bad site {shown(site)}: that does not write to the stream of the {tower}; expected attn, "
                f"cross or mlp of the {tower}, their heads (h) or neurons (n), or {tower}.0.resid_pre, the "
                "embedding"
            )
    if site.also and any(part.source for part in site.parts):
        raise SiteError(f"bad site {shown(site)}: an edge in a sum; write several sites instead")


class Linear(NamedTuple):
    """A norm as the linear map that it is at one input, its statistics taken from there."""

    gain: Vector
    bias: Vector
    centred: bool

    def back(self, direction: Vector) -> tuple[Vector, float]:
        """What the input is multiplied by where the output is by `direction`, and what the bias adds."""
        found = self.gain * direction
        return found - found.mean() if self.centred else found, float(self.bias @ direction)


def linear(norm: nn.Module, x: Vector, dtype: torch.dtype) -> Linear:
    """The linear map that a norm is at `x`, read off the outputs of its own module.

    Where it subtracts no mean, its factors are the output over the input, each with its own rounding: LLaMA's
    norm computes in float32 in any model.
    """

    def of(value: Tensor) -> Tensor:
        return norm(value.to(dtype)[None, None])[0, 0].double().to(x.device)

    (gain, bias, is_centred), out = scaling(of, x), of(x)
    if is_centred:
        around = x - x.mean()
        scale = (gain * around).norm() / (out - bias).norm()
        return Linear(gain / scale, bias, True)
    scale = (gain * x).norm() / (out - bias).norm()
    return Linear(torch.where(x == 0, gain / scale, (out - bias) / x), bias, False)


@dataclass(frozen=True, eq=False)
class Direct:
    """What one run writes at a position, `at`, and what of it is read there.

    A logit difference, or the logit of one token, is `direction` times the stream plus `bias`: `value`, the
    run's own. `values` are whole activations by point, `peers` what is read at other positions of the run.
    """

    network: Network
    inputs: Inputs
    edits: tuple[Edit, ...]
    logits: Float[Tensor, "vocabulary"]
    values: Mapping[Point, Tensor]
    value: float
    direction: Vector
    bias: float
    at: int
    peers: list[Direct] = field(default_factory=list, repr=False)
    _each: dict[Key, Array] = field(default_factory=dict, init=False, repr=False)
    _backs: dict[Key, tuple[Vector, float]] = field(default_factory=dict, init=False, repr=False)
    _shares: dict[str, dict[int, Array]] = field(default_factory=dict, init=False, repr=False)

    def written(self, layer: int, kind: str, part: str = "") -> Vector | None:
        """What stands at a point, at the last position; None in a layer that the run passes over."""
        found = self.values.get(Point(self.network.speaker, layer, kind, part))
        return None if found is None else found[0, self.at].double().to(self.direction.device)

    @torch.inference_mode()
    def effect(self, site: Site, sources: Sequence[int] = ()) -> float:
        """The direct effect of a site, in logits; over an edge, of what it reads at these positions."""
        return sum(self._effect(part, sources) for part in site.parts)

    def _effect(self, site: Site, sources: Sequence[int]) -> float:
        key = site.layer, site.kind
        if site.source:
            if site.kind not in self._shares:
                self._read(site.kind)
            shares = self._shares[site.kind].get(site.layer)
            if shares is None:
                return 0.0
            rows = shares if not site.units else shares[list(site.units)]
            return float(rows[:, list(sources)].sum())
        if not site.part:
            written = self.written(*key)
            return 0.0 if written is None else float(written @ self.direction)
        return float(self._units(key, site.part)[list(site.units)].sum())

    def _units(self, key: Key, part: str) -> Array:
        """The direct effect of every head, or neuron, of a layer."""
        if key not in self._each:
            active, back = self.written(*key, part), self.back(key)
            many = self.network.units(Point(self.network.speaker, *key, part)) or 1
            each = torch.zeros(many) if active is None else (active * back[0]).unflatten(0, (many, -1)).sum(1)
            self._each[key] = each.double().cpu().numpy()
        return self._each[key]

    @torch.inference_mode()
    def back(self, key: Key) -> tuple[Vector, float]:
        """What the heads (neurons) of a layer side by side are multiplied by, and what the biases between
        them and the stream add."""
        if key not in self._backs:
            self._backs[key] = self._back(*key)
        return self._backs[key]

    def _back(self, layer: int, kind: str) -> tuple[Vector, float]:
        network, tower = self.network, self.network.speaker
        table, block = network.family.towers[tower], network.blocks(tower)[layer]
        module: Any = block.get_submodule(getattr(table, kind))
        weight = network.matrix(module).double().to(self.direction.device)
        active, added = self.written(layer, kind, "n" if kind == "mlp" else "h"), self.written(layer, kind)
        if active is None or added is None:
            return weight.new_zeros(weight.shape[1]), 0.0
        biased = weight.new_zeros(weight.shape[0]) if module.bias is None else module.bias.to(weight)
        out = weight @ active + biased
        direction, bias = self.direction, 0.0
        norm, whole = self._behind(block, kind, out)
        if kind in table.factor and table.factor[kind](block) is not None:
            times = float(added @ whole / (whole @ whole)) if whole.any() else 0.0
            direction = direction * times
        if norm is not None:
            direction, bias = norm.back(direction)
        return direction @ weight, bias + float(direction @ biased)

    def _behind(self, block: nn.Module, kind: str, out: Vector) -> tuple[Linear | None, Vector]:
        """The norm behind a sublayer, where there is one, and what comes out of it."""
        behind = self.network.family.towers[self.network.speaker].behind
        if kind not in behind or not all(has(block, norm) for norm in behind.values()):
            return None, out
        module = block.get_submodule(behind[kind])
        norm = linear(module, out, self.network.dtype)
        return norm, module(out.to(self.network.dtype)[None, None])[0, 0].to(out)

    def _read(self, kind: str) -> None:
        """Keep by layer how much each head brings of each position that it reads, `(heads, positions)`; for
        all peers in one run."""
        network, tower = self.network, self.network.speaker
        modules = network.attention_modules(tower, kind)
        if eager(modules[0]) is None:
            raise ModelError(
                f"{network.name}: the models of {network.family.name} do not show what their {tower} {kind} "
                "heads read of each position; leave '<' out"
            )
        layers = dict(zip(modules, network.shapes[tower].having(kind), strict=True))
        layout = self.inputs.layout.get(network.attended(tower, kind))
        every = self.peers or [self]
        for one in every:
            one._shares[kind] = {}

        def pay(plain: Plain, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
            layer = layers[module]
            values = v.transpose(0, 1).flatten(1, 2).double()  # heads, all keys, width
            values = values.repeat_interleave(q.shape[1] // len(values), 0)
            for one in every:
                tile, row = divmod(one.at, q.shape[2])
                paid = paid_by(plain, module, q, k, mask, tile, [row], **kw).paid[:, 0].double()
                back = one.back((layer, kind))[0].to(values).unflatten(0, (len(paid), -1))
                shares = paid * torch.einsum("hkw,hw->hk", values, back)
                if layout is not None and shares.shape[1] < len(layout.tokens):
                    whole = shares.new_zeros(len(shares), len(layout.tokens))
                    whole[:, unpadded(layout)] = shares
                    shares = whole
                one._shares[kind][layer] = shares.cpu().numpy()
            return plain(module, q, k, v, mask, **kw)

        with network.alone(), network.attending(tower, pay, kind):
            forward(network, self.inputs, self.edits)

    def total(self) -> float:
        """The sum over all writers and biases, which is `value` but for rounding."""
        shape = self.network.shapes[self.network.speaker]
        keys = [(0, "resid_pre"), *((n, kind) for kind in WRITERS for n in shape.having(kind))]
        parts = [written for key in keys if (written := self.written(*key)) is not None]
        return sum(float(part @ self.direction) for part in parts) + self.bias


@torch.inference_mode()
def direct(
    network: Network,
    inputs: Inputs,
    answer: int,
    foil: int | None,
    sites: Iterable[Site] = (),
    edits: Sequence[Edit] = (),
) -> Direct:
    """One run, and what reads LD = logit(answer) − logit(foil) there; without a foil the answer's logit.

    The heads and neurons of `sites` are kept, and all sublayers are.
    """
    return _at(network, inputs, edits, _run(network, inputs, sites, edits, 1), -1, answer, foil)


@torch.inference_mode()
def directs(
    network: Network, inputs: Inputs, answers: Sequence[int], sites: Iterable[Site] = ()
) -> list[Direct]:
    """For each of the last positions of one run what reads the logit of the token that follows there."""
    run, found, many = _run(network, inputs, sites, (), len(answers)), list[Direct](), len(answers)
    for n, token in enumerate(answers):
        found.append(_at(network, inputs, (), run, n - many, token, None, found))
    return found


def _run(
    network: Network, inputs: Inputs, sites: Iterable[Site], edits: Sequence[Edit], positions: int
) -> Run:
    tower, shape = network.speaker, network.shapes[network.speaker]
    keep = {Point(tower, n, kind) for kind in WRITERS for n in shape.having(kind)}
    keep |= {Point(tower, 0, "resid_pre"), Point(tower, shape.layers - 1, "resid")}
    parts = [part for site in sites for part in site.parts if part.part or part.source]
    keep |= {part.point._replace(part="n" if part.kind == "mlp" else "h") for part in parts}
    return forward(network, inputs, edits, keep, positions)


def _at(
    network: Network,
    inputs: Inputs,
    edits: Sequence[Edit],
    run: Run,
    at: int,
    answer: int,
    foil: int | None,
    peers: list[Direct] | None = None,
) -> Direct:
    """What is read at a position of a run, counted from its end."""
    tower, shape = network.speaker, network.shapes[network.speaker]
    logits = run.logits[at].double()
    stream = run.values[Point(tower, shape.layers - 1, "resid")][0, at].double()
    norm = linear(network.module(network.family.norm or ""), stream, network.dtype)
    normed = network.module(network.family.norm or "")(stream.to(network.dtype)[None, None])[0, 0].double()
    head: Any = network.module(network.family.head)
    direction, bias = torch.zeros_like(stream), 0.0
    for token, sign in ((answer, 1.0), (foil, -1.0)):
        if token is None:
            continue
        (row,) = network.unembedding([token]).double()
        more = 0.0 if head.bias is None else float(head.bias[token])
        plain = float(row @ normed) + more
        factor = sign * (float(logits[token]) / plain if plain else 1.0)  # a cap's, or the head's scale
        direction, bias = direction + factor * row, bias + factor * more
    direction, shift = norm.back(direction)
    value = float(logits[answer] - (0.0 if foil is None else logits[foil]))
    place = len(inputs.layout[tower].tokens) + at
    read = (run.logits[at], run.values, value, direction, bias + shift, place)
    return Direct(network, inputs, tuple(edits), *read, [] if peers is None else peers)

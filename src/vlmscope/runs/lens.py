"""The logit lens: what a state of the stream would say, by the model's own final norm and head.

The model's own modules compute softmax(U · norm(h)), with their gain, scale and soft cap, as nostalgebraist
(2020) defines it and Neo et al. (arXiv 2410.07149) use it on image tokens. A state behind the last block says
what the model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmscope.errors import SiteError, shown
from vlmscope.models.inputs import Inputs
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.network import Network, upcast
from vlmscope.sites import Site

KINDS = ("resid_pre", "resid_mid", "resid")
"""States of the stream; what a sublayer adds to it is none."""
ROOM = 2**27
"""Bytes of logits that are held at once."""
KEPT = 64
"""How many words of each state are looked at again where a screen looks first."""


class Words(NamedTuple):
    """What some states say: the tokens with the largest logits, best first, and how some given tokens do.

    `tops` are the logits of `best`, `logits` those of the given tokens, `total` the logsumexp over the
    vocabulary, all in float32 or more. `ranks` count from 1; equal logits share the better one.
    """

    best: Int[Tensor, "states top"]
    tops: Float[Tensor, "states top"]
    logits: Float[Tensor, "states given"]
    ranks: Int[Tensor, "states ranked"]
    total: Float[Tensor, "states"]


def check_place(network: Network, site: Site) -> None:
    """Raises `SiteError` for a place from which there is no way to words."""
    tower, shape = network.speaker, network.shapes[network.speaker]
    there = ", ".join(kind for kind in KINDS if kind in shape.kinds)
    why = f"expected {tower}, and a state of its stream ({there}), such as {tower}.*.resid@readout"
    if site.tower != tower:
        raise SiteError(
            f"bad site {shown(site)}: {network.family.name} has no way from its {site.tower} tower to words "
            f"but through others; {why}"
        )
    if site.kind not in KINDS or site.part:
        raise SiteError(f"bad site {shown(site)}: that is no state that could be read as a word; {why}")
    if site.window > 1 or site.also:
        raise SiteError(f"bad site {shown(site)}: a lens reads one layer at a time; leave windows and + out")


def say(
    network: Network, inputs: Inputs, states: Float[Tensor, "states width"]
) -> Float[Tensor, "states vocabulary"]:
    """The logits of states, by all that follows the last block of the tower that says the words."""
    tower, family = network.speaker, network.family
    output = family.leave(network.hf, tower, states[:, None])
    return family.finish(network.hf, inputs, tower, output, 1)[:, 0]


@torch.inference_mode()
def words(
    network: Network,
    inputs: Inputs,
    states: Float[Tensor, "states width"],
    top: int,
    given: Sequence[int] = (),
    ranked: int = 0,
) -> Words:
    """What states say, some at a time, so that never all their logits are held.

    `given` are further tokens, whose logits are wanted, the first `ranked` of them with their ranks.
    """
    head: Any = network.module(network.family.head)
    blocks = -(-4 * len(states) * head.out_features // ROOM)
    parts = []
    with network.alone():
        for some in states.chunk(blocks):
            logits = upcast(say(network, inputs, some))
            tops, best = logits.topk(min(top, logits.shape[-1]))
            own = logits[:, list(given)]
            ranks = [1 + (logits > own[:, n, None]).sum(-1) for n in range(ranked)]
            placed = torch.stack(ranks, 1) if ranks else best[:, :0]
            # in place, sooner than logsumexp: nobody else has these logits
            total = logits.sub_(tops[:, :1]).exp_().sum(-1).log_() + tops[:, 0]
            parts.append(Words(best, tops, own, placed, total))
    return Words(*map(torch.cat, zip(*parts, strict=True)))


class Screen(NamedTuple):
    """A head rounded to bfloat16, in which some processors multiply faster, and how far that can be from it.

    `largest` is the largest norm of the head's rows, `rounded` that of the rounded rows, `lost` that of the
    differences of the two.
    """

    head: nn.Linear
    half: Float[Tensor, "vocabulary width"]
    largest: float
    rounded: float
    lost: float

    @classmethod
    def of(cls, network: Network) -> Screen | None:
        """The screen of a network's head, where it saves time: on a processor that multiplies bfloat16."""
        head: Any = network.module(network.family.head)
        if head.weight.device.type != "cpu" or not torch.cpu._is_avx512_bf16_supported():
            return None
        is_plain = isinstance(head, nn.Linear) and head.bias is None and head.weight.dtype.itemsize >= 4
        return cls.made(head) if is_plain else None

    @classmethod
    def made(cls, head: nn.Linear) -> Screen:
        whole = head.weight.detach()
        half = whole.bfloat16()
        parts = [
            [float(rows.norm(dim=-1).max()) for rows in (one, near.to(one), one - near)]
            for one, near in zip(whole.split(1024), half.split(1024), strict=True)  # small enough for caches
        ]
        return cls(head, half, *map(max, zip(*parts, strict=True)))

    def best(
        self, x: Float[Tensor, "states width"], top: int
    ) -> tuple[Float[Tensor, "states kept"], Int[Tensor, "states kept"], Bool[Tensor, "states"]]:
        """The logits, as the head gives them, of all words that can be among the `top` best (-inf of others
        beside them), which words they are, and for which states no further word can.

        With x', u' rounded, a product a of these has |a - x·u| <= |x - x'| |u| + |x'| |u - u'| (Cauchy and
        Schwarz) + its own rounding + n eps/2 |x'| |u'| for its sum in float32, as that of x·u has. So each
        a gives two limits of a logit. A word whose upper one is below the `top`-th largest lower one is out.
        """
        half = x.bfloat16()
        near, ids = nn.functional.linear(half, self.half).topk(min(top + KEPT, len(self.half)))
        near, back = near.to(x), half.to(x)
        size, eps = back.norm(dim=-1), torch.finfo(torch.float32).eps / 2
        error = (x - back).norm(dim=-1) * self.largest + size * self.lost
        error += x.shape[-1] * eps * (size * self.rounded + x.norm(dim=-1) * self.largest)
        # the norms are rounded, too
        error = 1.001 * (error[:, None] + near.abs() * torch.finfo(torch.bfloat16).eps / 2)
        least = (near - error)[:, :top].amin(-1, keepdim=True)
        state, place = (near + error >= least).nonzero(as_tuple=True)
        logits = torch.full_like(near, -torch.inf)
        for some in torch.arange(len(state)).split(max(1, ROOM // (4 * x[0].nbytes))):
            rows, words = state[some], ids[state[some], place[some]]
            logits[rows, place[some]] = torch.linalg.vecdot(self.head.weight[words], x[rows])
        return logits, ids, ((near + error)[:, -1:] < least)[:, 0] | (len(self.half) == near.shape[-1])


@torch.inference_mode()
def best_words(
    network: Network, inputs: Inputs, states: Float[Tensor, "states width"], top: int, screen: Screen | None
) -> Words:
    """The `top` words of states and their logits, as `words` gives them but for the order of those that only
    rounding tells apart; there is no `total` (NaN).

    A `screen` looks at all words first. States for which it does not prove that none is missed go through
    `words`, so nothing is guessed.
    """
    if screen is None:
        found = words(network, inputs, states, top)
        return found._replace(total=found.total * torch.nan)
    parts = []
    with network.alone():
        for some in states.split(max(1, ROOM // screen.half[:, :1].nbytes)):
            logits, ids, sure = _screened(network, inputs, some, top, screen)
            tops, order = logits.topk(min(top, logits.shape[-1]))
            best = ids.gather(-1, order)
            if not sure.all():
                again = words(network, inputs, some[~sure], top)
                best[~sure], tops[~sure] = again.best, again.tops
            parts.append((best, tops))
    best, tops = map(torch.cat, zip(*parts, strict=True))
    return Words(best, tops, tops[:, :0], best[:, :0], torch.full_like(tops[:, 0], torch.nan))


def _screened(
    network: Network, inputs: Inputs, states: Tensor, top: int, screen: Screen
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Screen.best`: what the model does before its head and behind it is its own, the head looks at
    nothing."""
    seen: list[Any] = []

    def called(args: Any, kwargs: Any) -> Any:
        seen.extend(screen.best(args[0][:, 0], top))
        return (args[0][:0],), kwargs

    with Hooks() as hooks:
        hooks.on_call(screen.head, called)
        hooks.on_output(screen.head, lambda out: seen[0][:, None])
        return say(network, inputs, states), seen[1], seen[2]

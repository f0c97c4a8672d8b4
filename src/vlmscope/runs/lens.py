"""The logit lens: what a state of the stream would say, by the model's own final norm and head.

The model's own modules compute softmax(U · norm(h)), with their gain, scale and soft cap, as nostalgebraist
(2020) defines it and Neo et al. (arXiv 2410.07149) use it on image tokens. A state behind the last block says
what the model says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmscope.errors import SiteError, shown
from vlmscope.models.inputs import Inputs
from vlmscope.runs.network import Network
from vlmscope.sites import Site

KINDS = ("resid_pre", "resid_mid", "resid")
"""States of the stream; what a sublayer adds to it is none."""
ROOM = 2**27
"""Bytes of logits that are held at once."""


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
            logits = say(network, inputs, some)
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            tops, best = logits.topk(min(top, logits.shape[-1]))
            own = logits[:, list(given)]
            ranks = [1 + (logits > own[:, n, None]).sum(-1) for n in range(ranked)]
            placed = torch.stack(ranks, 1) if ranks else best[:, :0]
            # in place, sooner than logsumexp: nobody else has these logits
            total = logits.sub_(tops[:, :1]).exp_().sum(-1).log_() + tops[:, 0]
            parts.append(Words(best, tops, own, placed, total))
    return Words(*map(torch.cat, zip(*parts, strict=True)))

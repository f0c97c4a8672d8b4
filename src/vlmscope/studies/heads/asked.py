"""Which heads are asked about: heads of single layers, each kind at one position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmscope.errors import SiteError
from vlmscope.runs import corrupt as corruptions
from vlmscope.runs.corrupt import Corruption, Noise
from vlmscope.runs.model import Model
from vlmscope.sites import Site, Sites, expand, parse

Array = NDArray[np.float64]
Key = tuple[str, str]
"""A tower and a kind of attention."""


@dataclass(frozen=True)
class AskedHeads:
    """Which heads are asked about, in which model, and what the corrupt run has changed, if there is one."""

    model: Model
    heads: list[Site]
    corruption: Corruption | None
    seed: int

    @property
    def keys(self) -> list[Key]:
        return list(dict.fromkeys((site.tower, site.kind) for site in self.heads))

    def numbers(self, key: Key) -> list[int]:
        """Which of the heads are of a tower and kind."""
        return [number for number, site in enumerate(self.heads) if (site.tower, site.kind) == key]

    def place(self, site: Site) -> tuple[int, int]:
        """Where a head is among those of its kind: not every layer has any."""
        layers = self.model.shapes[site.tower].having(site.kind)
        return layers.index(site.layer), site.units[0]


def asked_heads(model: Model, sites: Sites, corrupt: str | Noise | None, seed: int) -> AskedHeads:
    """Checked: heads of single layers, each kind at one position."""
    heads = expand(parse(sites), model.shapes)
    places: dict[Key, str] = {}
    for site in heads:
        if site.part != "h" or len(site.units) > 1 or site.also:
            raise SiteError(f"bad site '{site}': not a head; expected such as encoder.*.cross.h*@answer")
        if site.window > 1:
            raise SiteError(f"bad site '{site}': a window of layers; expected single heads")
        if site.position.endswith("*") or "-" in site.position.lstrip("-"):
            raise SiteError(
                f"bad site '{site}': many positions; what a head does is asked at one: answer, last ..."
            )
        at = places.setdefault((site.tower, site.kind), site.position)
        if at != site.position:
            raise SiteError(
                f"bad site '{site}': other {site.tower} {site.kind} heads are read at '{at}'; "
                "one position a kind"
            )
    return AskedHeads(model, heads, None if corrupt is None else corruptions.parse(corrupt), seed)

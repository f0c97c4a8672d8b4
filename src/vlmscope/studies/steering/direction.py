"""A direction at some sites, for one model: what it is added to, and the file that keeps it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vlmscope import files
from vlmscope.errors import ModelError, SiteError, VlmscopeError, nearest, shown
from vlmscope.models.inputs import Edit, Inputs
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern
from vlmscope.stored import tensors as stored_tensors

EXPECTED = "a file of `vlmscope steer`"
WORDS = ("readout", "last", "all", "text")
"""Positions that name each word which is said, too."""
AT = ("read", "words")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Direction:
    """What sets runs with something apart from runs without it: a vector a site, with its own length.

    `vectors` are by site expression, `model` is the fingerprint of the weights that it is for, `best` the
    site at which it moves the answer most, `about` what it was built of.
    """

    vectors: Mapping[str, Float[Tensor, "_width"]]
    model: str
    best: str
    about: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        words = self.about.get("sets", "?")
        return f"{words}: {len(self.vectors)} sites, best {self.best}"

    def vector(self, site: str | None = None) -> Float[Tensor, "_width"]:
        """The vector of a site, by default of the best one; raises `SiteError` for a site that it lacks."""
        if (site or self.best) not in self.vectors:
            raise SiteError(
                f"the direction has no site {shown(site)}; expected one of "
                f"{', '.join(sorted(self.vectors)[:6])}{nearest(site, self.vectors)}"
            )
        return self.vectors[site or self.best]

    def check(self, model: Model) -> None:
        """Raises `ModelError` where it was built for other weights."""
        if self.model != model.fingerprint():
            raise ModelError(
                f"the direction '{self}' was built for another model or revision than {model.name} "
                f"({self.model[:8]}…, not {model.fingerprint()[:8]}…); build it again for this one"
            )

    def edits(
        self,
        model: Model,
        inputs: Inputs,
        strength: float = 1.0,
        *,
        site: str | None = None,
        at: str = "read",
        keep_norm: bool = False,
    ) -> list[Edit]:
        """The edits of a run that add the direction, times a strength, at a site (by default the best one).

        `read` adds it to the positions of the prompt, `words` also to each word that is said, which the
        site's position has to name (`WORDS`). With `keep_norm` each position keeps its length.
        Raises `ModelError` for another model.

        >>> import torch
        >>> from vlmscope.checkpoint import load
        >>> from vlmscope.data import examples
        >>> model = load("toy-llava")
        >>> inputs = model.prepare(examples("states", limit=1)[0]).clean
        >>> direction = Direction({"decoder.1.resid@readout": torch.ones(96)}, model.fingerprint(),
        ...                       "decoder.1.resid@readout")
        >>> direction.edits(model, inputs, 2.0)
        [Edit('decoder.1.resid@readout', 'add', (96,) tensor)]
        """
        self.check(model)
        check_at(at)
        vector, pattern = strength * self.vector(site), Pattern.parse(site or self.best)
        if at == "words" and pattern.position not in WORDS:
            raise SiteError(
                f"{shown(pattern)} names no word that is said; at every word (--at words) a direction needs "
                f"one of the positions {', '.join(WORDS)}: build it there, or add it at read"
            )
        where = [pattern] if at == "words" else model.places(pattern, inputs)
        return [
            Edit(one, partial(moved, vector=vector, keep_norm=True))
            if keep_norm
            else Edit(one, "add", vector)
            for one in where
        ]

    def save(self, path: str | Path) -> None:
        """Write the vectors, the model's fingerprint and what they are about; safetensors.

        Raises `StoreError` if that cannot be, or another file than a direction is there.
        """
        self.claim(Path(path))
        files.write(Path(path), self.bytes())

    def bytes(self) -> bytes:
        """The content of its file."""
        about = json.dumps(dict(self.about), sort_keys=True)
        tensors = {site: vector.cpu().contiguous() for site, vector in self.vectors.items()}
        digest = stored_tensors.digest(tensors, [self.model, self.best, about])
        words = {"model": self.model, "best": self.best, "about": about}
        return stored_tensors.content("direction", tensors, words, digest)

    @classmethod
    def claim(cls, path: Path) -> None:
        """Refuse, before anything is computed, a place that `save` could not write (`StoreError`)."""
        files.claim_file(path)
        if path.exists():
            cls.load(path)

    @classmethod
    def load(cls, path: str | Path, within: Path | None = None) -> Direction:
        """Read what `save` wrote; raises `StoreError` if the file is another or has been changed, or a link
        leads to it out of the folder `within`."""
        return stored_tensors.read(path, "direction", "a direction", EXPECTED, _made, within)


def _made(tensors: dict[str, Tensor], words: dict[str, str]) -> tuple[Direction, str]:
    """The direction of a file, and the digest of all that it is."""
    about, model, best = json.loads(words["about"]), words["model"], words["best"]
    if not (_SHA256.fullmatch(model) and all(isinstance(x, str) for x in [*about, *about.values()])):
        raise ValueError("its metadata are not those of a direction")
    if best not in tensors or any(
        str(Pattern.parse(site)) != site or vector.ndim != 1 or not vector.isfinite().all()
        for site, vector in tensors.items()
    ):
        raise ValueError("its tensors are not those of a direction")
    digest = stored_tensors.digest(tensors, [model, best, words["about"]])
    return Direction(tensors, model, best, about), digest


def moved(
    x: Float[Tensor, "*positions width"], vector: Float[Tensor, "width"], keep_norm: bool = False
) -> Float[Tensor, "*positions width"]:
    """Activations with a vector added to each position; with `keep_norm` as long as they were.

    >>> moved(torch.tensor([[3.0, 0.0]]), torch.tensor([0.0, 4.0]), keep_norm=True)
    tensor([[1.8000, 2.4000]])
    """
    new = x + vector.to(x)
    if not keep_norm:
        return new
    length = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    before = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length > 0, new * (before / length), new)


def check_at(at: str) -> None:
    """Raises `VlmscopeError` for a way to add that there is not."""
    if at not in AT:
        raise VlmscopeError(f"a direction is added at {shown(at)}; expected {' or '.join(AT)}")

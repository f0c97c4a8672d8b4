"""Changes of a few neurons' weights that undo themselves bit for bit.

What a neuron adds to the residual stream is its activation times its column of the down projection, so an
edit of what neurons say is a change of these columns and of nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmscope import files
from vlmscope.errors import ModelError, line, whole
from vlmscope.runs.hooks import Hooks
from vlmscope.runs.model import Model
from vlmscope.stored import tensors as stored_tensors

Columns = Mapping[int, tuple[Int[Tensor, "_chosen"], Float[Tensor, "width _chosen"]]]
"""By layer, neurons and what is added to the column of each."""
EXPECTED = "a file of `vlmscope neurons edit`"
_SHA256, _NEURONS = re.compile("[0-9a-f]{64}"), re.compile(r"layer\.(0|[1-9][0-9]{0,5})\.neurons")


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """What is added to some columns, the fingerprint of the model that it is for, and what it is about.

    `on` are the edits of that model, by their `digest`, that were there when it was made: it is for the
    weights that these leave, and is refused without them. `one + other` is one edit that does what both
    do, in this order; `str` lists what is in one.
    """

    columns: Columns
    model: str
    about: Mapping[str, str] = field(default_factory=dict)
    on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for layer, (neurons, delta) in self.columns.items():
            whole(layer, "the layer of an edit")
            if neurons.dtype != torch.int64 or neurons.ndim != 1 or not delta.is_floating_point():
                raise ModelError(
                    f"an edit of layer {layer} needs whole numbers of neurons, and floats to add"
                )
            if delta.ndim != 2 or delta.shape[1] != len(neurons) or not delta.numel():
                shapes = f"{list(delta.shape)} for {len(neurons)} neurons"
                raise ModelError(f"an edit of layer {layer} adds {shapes}; expected a column for each")
            if (neurons < 0).any() or len(neurons.unique()) < len(neurons):
                raise ModelError(f"an edit of layer {layer} must name each neuron once, counted from 0")
            if not delta.isfinite().all():
                raise ModelError(f"an edit of layer {layer} adds what is no number; make it again")

    @property
    def neurons(self) -> list[tuple[int, int]]:
        """The changed neurons: layer and number."""
        return [(layer, int(n)) for layer, (neurons, _) in sorted(self.columns.items()) for n in neurons]

    @property
    def size(self) -> float:
        """The length of the change, over all columns (Frobenius norm)."""
        return float(sum(float(delta.double().square().sum()) for _, delta in self.columns.values())) ** 0.5

    @property
    def digest(self) -> str:
        """SHA-256 over all that the edit is, as hexadecimal digits: what `on` names it by."""
        return stored_tensors.digest(self._tensors(), [self.model, self._about(), *self.on])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for layer, (neurons, delta) in self.columns.items():
            tensors[f"layer.{layer}.neurons"] = neurons.long().cpu().contiguous()
            tensors[f"layer.{layer}.added"] = delta.cpu().contiguous()
        return tensors

    def _about(self) -> str:
        return json.dumps(dict(self.about), sort_keys=True)

    def __add__(self, other: WeightEdit) -> WeightEdit:
        if self.model != other.model:
            raise ModelError("two edits of different models cannot be made together; remake one")
        if other.on not in (self.on, (*self.on, self.digest)):
            raise ModelError(
                f"the edit '{other}' was made on others than '{self}' was; the two cannot be made one, "
                "apply them one after the other"
            )
        columns = dict(self.columns)
        for layer, (neurons, delta) in other.columns.items():
            before, there = columns.get(layer, (neurons[:0], delta[:, :0]))
            both = torch.unique(torch.cat([before, neurons]))
            total = torch.zeros(len(delta), len(both), dtype=delta.dtype)
            total[:, torch.searchsorted(both, before)] += there
            total[:, torch.searchsorted(both, neurons)] += delta
            columns[layer] = (both, total)
        shared = [name for name in self.about if name in other.about]
        about = {k: " + ".join(dict.fromkeys([self.about[k], other.about[k]])) for k in shared}
        return WeightEdit(columns, self.model, about, self.on)

    def __str__(self) -> str:
        words = line(f"{self.about.get('from', '?')} -> {self.about.get('to', '?')}", 100)
        layers = ", ".join(f"layer {n}: {len(x)}" for n, (x, _) in sorted(self.columns.items()))
        on = f", on {' '.join(digest[:8] for digest in self.on)}" if self.on else ""
        return f"{words}: {len(self.neurons)} neurons ({layers}), size {self.size:.3g}{on}"

    def save(self, path: str | Path) -> None:
        """Write the changed columns, the model's fingerprint and what they are about; safetensors.

        Raises `StoreError` if that cannot be, or another file than an edit is there.
        """
        self.claim(Path(path))
        words = {"model": self.model, "about": self._about(), "on": " ".join(self.on)}
        files.write(Path(path), stored_tensors.content("edit", self._tensors(), words, self.digest))

    @classmethod
    def claim(cls, path: Path) -> None:
        """Refuse, before anything is computed, a place that `save` could not write (`StoreError`)."""
        files.claim_file(path)
        if path.exists():
            cls.load(path)

    @classmethod
    def load(cls, path: str | Path) -> WeightEdit:
        """Read what `save` wrote; raises `StoreError` if the file is another or has been changed."""
        return stored_tensors.read(path, "edit", "an edit", EXPECTED, _made)


def _made(tensors: dict[str, Tensor], words: dict[str, str]) -> tuple[WeightEdit, str]:
    """The edit of a file, and the digest of all that it is."""
    about = json.loads(words["about"])
    if not isinstance(about, dict):
        raise ValueError("about is no object")
    model, on = words["model"], tuple(words["on"].split())
    texts = [*about, *dict(about).values()]
    if not all(map(_SHA256.fullmatch, (model, *on))) or not all(isinstance(x, str) for x in texts):
        raise ValueError("its metadata are not those of an edit")
    layers = sorted(int(found[1]) for found in map(_NEURONS.fullmatch, tensors) if found)
    columns = {n: (tensors[f"layer.{n}.neurons"], tensors[f"layer.{n}.added"]) for n in layers}
    if not columns or len(tensors) != 2 * len(columns):
        raise ValueError("its tensors are not those of an edit")
    made = WeightEdit(columns, model, about, on)
    return made, stored_tensors.digest(tensors, [model, words["about"], *on])


def base_fingerprint(model: Model) -> str:
    """The fingerprint of a model's weights as they are without the edits that are made at present."""
    return model.unedited or model.fingerprint()


@contextmanager
def edited(model: Model, *edits: WeightEdit) -> Iterator[Model]:
    """Within this context a model's weights have the edits; behind it they are as they were, bit for bit.

    Edits are made in the order in which they are given. Raises `ModelError` for an edit that was made for
    other weights, or on other edits that are not made before it.

    >>> import torch
    >>> from vlmscope.checkpoint import load
    >>> model = load("toy-llava")
    >>> weight = model.down(3).weight
    >>> edit = WeightEdit({3: (torch.tensor([7]), torch.ones(96, 1))}, model.fingerprint())
    >>> before = weight.clone()
    >>> with edited(model, edit):
    ...     print(bool((weight != before).any()))
    True
    >>> torch.equal(weight, before)
    True
    """
    fingerprint, made = base_fingerprint(model), model.edits
    for edit in edits:
        if edit.model != fingerprint:
            raise ModelError(
                f"the edit '{edit}' was made for another model or revision than {model.name} "
                f"({edit.model[:8]}…, not {fingerprint[:8]}…); make it again for this one"
            )
        if [digest for digest in made if digest in edit.on] != list(edit.on):
            lacking = next((digest for digest in edit.on if digest not in made), None)
            raise ModelError(
                f"the edit '{edit}' was made on the edits that it names last, "
                + (f"and {lacking[:8]} is not made here" if lacking else "in another order or number")
                + "; give all of them before it, in that order"
            )
        made = (*made, edit.digest)
    outer = model.unedited, model.edits
    with changed(model, [edit.columns for edit in edits]):
        model.unedited, model.edits = fingerprint, made
        try:
            yield model
        finally:
            model.unedited, model.edits = outer


@contextmanager
def changed(model: Model, changes: Sequence[Columns]) -> Iterator[None]:
    """Within this context something is added to columns of a model, one change after the other."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for columns in changes:
            for layer, (neurons, delta) in columns.items():
                shape = model.shapes[model.speaker]
                if layer not in shape.having("mlp"):
                    raise ModelError(f"{model.name} has no neurons in layer {layer}; make the edit again")
                if len(delta) != shape.width or int(neurons.max()) >= shape.neurons:
                    raise ModelError(
                        f"an edit of layer {layer} does not fit {model.name}, which needs columns of "
                        f"{shape.width} numbers, of neurons 0 to {shape.neurons - 1}; make it again"
                    )
                weight: Any = model.down(layer).weight
                if getattr(weight, "quant_state", None) is not None or not weight.is_floating_point():
                    raise ModelError(f"{model.name}: quantized weights cannot be edited; load it in bfloat16")
                weight = weight.detach()  # not `.data`: that would hide the change from `Model.fingerprint`
                at = neurons.to(weight.device)
                kept.append((weight, at, weight[:, at].clone()))
                wide = torch.promote_types(weight.dtype, torch.float32)
                new = weight[:, at].to(wide) + delta.to(weight.device, wide)
                weight[:, at] = new.to(weight.dtype)
        yield
    finally:
        for weight, at, before in reversed(kept):
            weight[:, at] = before


@contextmanager
def ablated(model: Model, neurons: Mapping[int, tuple[Sequence[int], Tensor]]) -> Iterator[None]:
    """Within this context neurons of the tower that speaks are set to a value, at every position."""
    with model.alone(), Hooks() as hooks:
        for layer, (numbers, value) in neurons.items():
            hooks.on_hidden(model.down(layer), partial(_set, list(numbers), value), before=True)
        yield


def _set(numbers: list[int], value: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    x[..., numbers] = value.to(x)
    return x


@contextmanager
def perturbed(
    model: Model, neurons: Mapping[int, Sequence[int]], sigma: float, seed: int = 0
) -> Iterator[None]:
    """Within this context σ·N(0, I) is added to neurons' columns, as in Pan et al.; undone bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    width = model.shapes[model.speaker].width
    columns = {
        layer: (torch.tensor(list(numbers)), sigma * torch.randn(width, len(numbers), generator=generator))
        for layer, numbers in neurons.items()
    }
    with changed(model, [columns]):
        yield


def export(model: Model, edits: Sequence[WeightEdit], folder: str | Path) -> None:
    """Write the edited model and its processor as a checkpoint that plain transformers loads."""
    with edited(model, *edits):
        model.save(folder)

"""`engine.patch` is what plain forward hooks do: read in one run, written in the other, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anatomy
import pytest
import torch
from cases import SECOND, Case
from test_oracle_prompts import example
from torch import Tensor, nn

import vlmscope
from vlmscope.patching import engine


class Place:
    """Where a site is among transformers' modules: rows and columns of what a module reads or gives."""

    def __init__(self, case: Case, site: str, rows: tuple[int, ...]) -> None:
        tower, number, kind, *units = site.partition("@")[0].split(".")
        part = anatomy.towers(case, case.hf)[tower]
        layer, unit = int(number), units[0] if units else None
        block, own = part.blocks[layer], part.kinds[layer]
        self.rows, self.columns = list(rows), slice(None)
        self.reads = unit is not None or kind == "resid_pre"
        if kind in ("resid", "resid_pre"):
            self.module = block
        elif unit is None:
            self.module = block.get_submodule(own.added[kind].path)
        elif unit[0] == "h":
            self.module = block.get_submodule(own.heads[kind])
            width = self.module.weight.shape[1] // part.heads
            self.columns = slice(int(unit[1:]) * width, (int(unit[1:]) + 1) * width)
        else:
            self.module = block.get_submodule(own.neurons)
            self.columns = slice(int(unit[1:]), int(unit[1:]) + 1)

    def _rows(self, value: Tensor) -> Tensor:
        return value.reshape(-1, value.shape[-1])

    def hook(self, change: Any) -> Any:
        """Calls `change` with the tensor; what it gives, if anything, takes its place."""

        def before(m: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
            new = change(anatomy.first(args, named))
            if new is None:
                return None
            return ((new, *args[1:]), named) if args else (args, {**named, "hidden_states": new})

        def after(m: nn.Module, args: Any, out: Any) -> Any:
            new = change(anatomy.tensor(out))
            return None if new is None else anatomy.with_tensor(out, new)

        if self.reads:
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        # Before the hooks with which transformers keeps hidden states (of LLaVA's vision tower).
        return self.module.register_forward_hook(after, prepend=True)

    def keep(self, found: list[Tensor]) -> Any:
        """Reads what is there, and changes nothing."""

        def read(value: Tensor) -> None:
            found.append(self._rows(value)[self.rows, self.columns].clone())

        return self.hook(read)

    def write(self, case: Case, tensors: Mapping[str, Tensor], new: Tensor) -> Tensor:
        def put(value: Tensor) -> Tensor:
            changed = self._rows(value).clone()
            changed[self.rows, self.columns] = new
            return changed.reshape(value.shape)

        with anatomy.hooked() as hold:
            hold(self.hook(put))
            return anatomy.forward(case, tensors)


def handful(case: Case, inputs: vlmscope.Inputs) -> list[tuple[str, tuple[int, ...]]]:
    """A few sites of every tower: blocks, sublayers, heads and neurons, early and late, at few places."""
    found = []
    for tower, shape in case.model.shapes.items():
        part = anatomy.towers(case, case.hf)[tower]
        many = len(inputs.layout[tower].tokens)
        for layer in sorted({0, shape.layers - 1}):
            block, own = part.blocks[layer], part.kinds[layer]
            kinds = [one for one in own.added if anatomy.has(block, own.added[one].path)]
            units = [f"{one}.h1" for one in kinds if one != "mlp"] + ["mlp.n3"]
            whats = ["resid", "resid_pre", *kinds, *units] if layer == 0 else ["resid", *units]
            for n, what in enumerate(whats):
                at = (many - 1, many // 2, many // 3)[n % 3]
                found.append((f"{tower}.{layer}.{what}@{at}", (at,)))
            if layer:
                continue
            found.append((f"{tower}.{layer}.resid@all", tuple(range(many))))
            layout = inputs.layout[tower]
            name, some = ("text", layout.text) if layout.text else ("image", layout.image)
            if some:
                found.append((f"{tower}.{layer}.{units[0]}@{name}", tuple(some)))
    return found


def ld(logits: Tensor, pair: vlmscope.Pair) -> Tensor:
    """P(answer) and the logit difference."""
    p = logits.double().softmax(-1)[pair.answer]
    return torch.stack([p, logits[pair.answer] - logits[pair.foil]])


def patched(model: vlmscope.Model, pair: vlmscope.Pair, sites: list, direction: str) -> Tensor:
    """What the engine says: a row a site, each a text."""
    found = engine.patch(model, pair, [text for text, _ in sites], direction)
    rows = torch.full((len(sites), 2), torch.nan, dtype=torch.float64)
    for numbers, score in found.chunks:
        rows[numbers] = torch.stack([score.p, score.ld], dim=-1).double()
    return rows


@pytest.mark.parametrize("how", ["denoise", "noise", "denoise, two pictures"])
def test_patches_are_those_of_plain_hooks(case, how):
    direction, _, many = how.partition(", ")
    if many and not case.several:
        pytest.skip("takes one picture")
    more = (SECOND,) if many else ()
    pair = case.model.prepare(example(more_images=more))
    sites = handful(case, pair.clean)
    if how != "denoise":
        sites = sites[bool(many) :: 2]
    got = patched(case.model, pair, sites, direction)
    runs = [anatomy.double(case, pair.clean), anatomy.double(case, pair.corrupt)]
    source, base = runs if direction == "denoise" else runs[::-1]
    places = [Place(case, *one) for one in sites]
    values: list[list[Tensor]] = [[] for _ in places]
    with anatomy.hooked() as hold:
        for place, found in zip(places, values, strict=True):
            hold(place.keep(found))
        anatomy.forward(case, source)
    wrong = []
    for number, (site, _) in enumerate(sites):
        want = ld(places[number].write(case, base, values[number][0]), pair)
        try:
            anatomy.close(got[number], want, str(site))
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"{len(wrong)} of {len(sites)} sites: {'; '.join(wrong[:3])}"


def test_patches_do_something(case):
    """The models are such that a patch of a block moves the answer: nothing above is equal for nothing."""
    pair = case.model.prepare(example())
    runs = [anatomy.double(case, one) for one in (pair.clean, pair.corrupt)]
    clean, corrupt = (ld(anatomy.forward(case, one), pair) for one in runs)
    assert abs(clean[1] - corrupt[1]) > 1e-3
    site = "vision.0.resid@all"
    many = len(pair.clean.layout["vision"].tokens)
    [row] = patched(case.model, pair, [(site, tuple(range(many)))], "denoise")
    assert abs(row[1] - corrupt[1]) > 1e-3

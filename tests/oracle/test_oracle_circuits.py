"""A circuit's run is what plain forward hooks give: all parts outside of it as they are in the other run."""

from __future__ import annotations

import random

import anatomy
import pandas as pd
import pytest
import torch
from cases import Case
from test_oracle_engine import Place, ld
from test_oracle_prompts import example
from torch import Tensor

import vlmscope
from vlmscope.patching import reference
from vlmscope.patching.nodes import run_circuits
from vlmscope.patching.sources import zeros
from vlmscope.sites import Site, expand, parse
from vlmscope.studies.faithfulness.curve import Shares


def parts_of(case: Case) -> list[Site]:
    """All heads and MLPs of all towers; of the last MLP all neurons."""
    found = []
    for tower, shape in case.model.shapes.items():
        found += [f"{tower}.*.{kind}.h*@all" for kind in shape.heads]
        found += [f"{tower}.{n}.mlp@all" for n in shape.having("mlp")]
    found[-1] = found[-1].replace(".mlp@", ".mlp.n*@")
    return expand(parse(found), case.model.shapes)


class Other:
    """What the parts have in a run, and runs in which some of them have it."""

    def __init__(self, case: Case, pair: vlmscope.Pair, parts: list[Site], source: dict[str, Tensor]) -> None:
        self.case = case
        rows = {tower: tuple(range(len(there.tokens))) for tower, there in pair.clean.layout.items()}
        self.places = [Place(case, str(part), rows[part.tower]) for part in parts]
        self.values: list[list[Tensor]] = [[] for _ in parts]
        with anatomy.hooked() as hold:
            for place, found in zip(self.places, self.values, strict=True):
                hold(place.keep(found))
            anatomy.forward(case, source)

    def outside(self, base: dict[str, Tensor], circuit: set[int]) -> Tensor:
        """The logits where all parts that are not in a circuit have their values."""
        with anatomy.hooked() as hold:
            for number, (place, (new,)) in enumerate(zip(self.places, self.values, strict=True)):
                if number not in circuit:
                    hold(place.hook(lambda value, place=place, new=new: put(place, value, new)))
            return anatomy.forward(self.case, base)


def put(place: Place, value: Tensor, new: Tensor) -> Tensor:
    changed = value.reshape(-1, value.shape[-1]).clone()
    changed[place.rows, place.columns] = new
    return changed.reshape(value.shape)


def test_circuits_are_those_of_plain_hooks(case):
    pair, parts = case.model.prepare(example()), parts_of(case)
    base, source = (anatomy.double(case, inputs) for inputs in (pair.clean, pair.corrupt))
    draw = random.Random(0)
    circuits = [set(range(len(parts))), set()]
    circuits += [set(draw.sample(range(len(parts)), len(parts) * share // 10)) for share in (2, 9)]
    other = Other(case, pair, parts, source)
    _, corrupt, got = run_circuits(case.model, pair, parts, circuits)
    for found, circuit in zip(got, circuits, strict=True):
        want = ld(other.outside(base, circuit), pair)
        anatomy.close(found[:2], want, f"{len(circuit)} of {len(parts)} parts")
    # Every way of the picture to the read-out position leads through parts.
    assert found[1] != got[1, 1] and got[1, 1].item() == pytest.approx(corrupt.ld.item(), rel=1e-9)
    _, _, slow = run_circuits(case.model, pair, parts, circuits[-1:], way=reference)
    anatomy.close(slow[0], got[-1], "the reference")
    names = ["all", "none", "few", "most"]
    values = pd.DataFrame([got[:, 1].tolist()], columns=names)
    shares = Shares(values, values["all"])
    assert shares.of("all") == pytest.approx(1, abs=1e-9) and shares.of("none") == 0
    gap = got[0, 1] - got[1, 1]
    assert shares.of("few") == pytest.approx(float((got[2, 1] - got[1, 1]) / gap), rel=1e-9)


def test_outside_may_be_zero(case):
    """Zeros instead of the other run's values, at the same places."""
    pair, parts = case.model.prepare(example()), parts_of(case)
    base = anatomy.double(case, pair.clean)
    other = Other(case, pair, parts, base)
    other.values = [[torch.zeros_like(value)] for (value,) in other.values]
    circuit = {n for n in range(len(parts)) if n % 3}
    points = {part.point for part in parts}
    whole = zeros(case.model, pair.clean, points)
    *_, (found,) = run_circuits(case.model, pair, parts, [circuit], values=whole)
    anatomy.close(found[:2], ld(other.outside(base, circuit), pair), "zero")

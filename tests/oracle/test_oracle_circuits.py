"""A circuit's run is what plain forward hooks give: all parts outside of it as they are in the other run, or
each reader given the sum of what the circuit's edges carry of this run, and the others of the other one."""

from __future__ import annotations

import random
from typing import Any

import anatomy
import pandas as pd
import pytest
import torch
from cases import Case
from test_oracle_engine import Place, ld
from test_oracle_prompts import example
from torch import Tensor

import vlmscope
from vlmscope.patching import edge_circuits, reference
from vlmscope.patching.graph import Graph
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


class Summed:
    """A decoder of LLaMA's blocks in which no stream is read: each reader is given a sum of writers.

    What is added to the stream between two blocks (DeepStack) is what enters the next one beyond what left
    the last one.
    """

    def __init__(self, case: Case, image: list[int]) -> None:
        self.case, self.image = case, image
        self.tower = anatomy.towers(case, case.hf)["decoder"]
        blocks = list(self.tower.blocks)
        owner: Any = next(m for m in case.hf.modules() if list(getattr(m, "layers", [])) == blocks)
        self.norm = owner.norm

    def run(self, tensors: dict[str, Tensor], carried: set[Any], other: dict[str, Tensor]) -> Any:
        """The logits, and what each writer wrote; `carried` edges are of this run, the rest of `other`."""
        wrote: dict[str, Tensor] = {}

        def reads(reader: str) -> Tensor:
            each = [x if (name, reader) in carried else other.get(name, x) for name, x in wrote.items()]
            return torch.stack(each).sum(0)

        def enter(m: Any, args: Any, named: Any) -> None:
            x = anatomy.first(args, named)
            at = torch.zeros(x.shape[1], 1, dtype=x.dtype)
            at[self.image] = 1.0
            wrote.update({"embed": x * (1 - at), "image": x * at})

        with anatomy.hooked() as hold:
            hold(self.tower.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
            left: dict[int, Tensor] = {}
            for layer, block in enumerate(self.tower.blocks):
                name, own = f"decoder.{layer}", block.self_attn

                def leave(m: Any, args: Any, out: Any, layer=layer) -> None:
                    left[layer] = out[0] if isinstance(out, tuple) else out

                def between(m: Any, args: Any, named: Any, layer=layer) -> None:
                    wrote[f"decoder.{layer - 1}.deepstack"] = anatomy.first(args, named) - left[layer - 1]

                hold(block.register_forward_hook(leave))
                if layer:
                    hold(block.register_forward_pre_hook(between, with_kwargs=True))
                for part in "qkv":

                    def project(m: Any, args: Any, out: Tensor, part=part, name=name, block=block) -> Tensor:
                        width, out = block.self_attn.head_dim, out.clone()
                        for head in range(out.shape[-1] // width):
                            x = block.input_layernorm(reads(f"{name}.attn.{part}{head}"))
                            rows = slice(head * width, (head + 1) * width)
                            out[..., rows] = m.forward(x)[..., rows]
                        return out

                    hold(getattr(own, f"{part}_proj").register_forward_hook(project))

                def mixed(m: Any, args: Any, name=name) -> None:
                    each = args[0].shape[-1] // self.tower.heads
                    for head in range(self.tower.heads):
                        rows = slice(head * each, (head + 1) * each)
                        wrote[f"{name}.attn.h{head}"] = args[0][..., rows] @ m.weight[:, rows].T

                hold(own.o_proj.register_forward_pre_hook(mixed))
                hold(
                    block.post_attention_layernorm.register_forward_pre_hook(
                        lambda m, args, name=name: (reads(f"{name}.mlp"),)
                    )
                )
                hold(
                    block.mlp.register_forward_hook(
                        lambda m, args, out, name=name: wrote.__setitem__(f"{name}.mlp", out)
                    )
                )
            hold(self.norm.register_forward_pre_hook(lambda m, args: (reads("logits"),)))
            return anatomy.forward(self.case, tensors), wrote


def test_circuits_of_edges_are_those_of_plain_hooks(case):
    """A circuit's readers get sums of writers, written here one by one: f of all edges is 1, of none 0."""
    if any(kind is not anatomy.LLAMA for kind in anatomy.towers(case, case.hf)["decoder"].kinds):
        pytest.skip("not of LLaMA's blocks alone")
    pair = case.model.prepare(example())
    base, source = (anatomy.double(case, inputs) for inputs in (pair.clean, pair.corrupt))
    layout = pair.clean.layout["decoder"]
    summed = Summed(case, sorted({*layout.image, *layout.cells}))
    edges = Graph(case.model, pair.clean).edges
    draw = random.Random(0)
    sets = [edges, [], *(draw.sample(edges, len(edges) * share // 10) for share in (3, 8))]
    _, other = summed.run(source, set(), {})
    found = torch.stack(
        [torch.stack([one.p, one.ld]) for one in edge_circuits.circuits(case.model, pair, sets)]
    )
    for got, some in zip(found, sets, strict=True):
        want, _ = summed.run(base, {tuple(edge) for edge in some}, other)
        anatomy.close(got, ld(want, pair), f"{len(some)} of {len(edges)} edges")
    clean, corrupt = (ld(anatomy.forward(case, tensors), pair)[1] for tensors in (base, source))
    shares = Shares(
        pd.DataFrame([found[:, 1].tolist()], columns=["all", "none", "few", "most"]), pd.Series([clean])
    )
    assert shares.of("all") == pytest.approx(1, abs=1e-9) and shares.of("none") == 0
    assert float(found[1, 1]) == pytest.approx(float(corrupt), abs=1e-9)
    assert abs(shares.of("few")) > 1e-6 and abs(shares.of("most") - 1) > 1e-6

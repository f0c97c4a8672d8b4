"""Edges: identities of EAP, exact edges and circuits, on every family with pre-norm blocks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from models import example, llava
from test_families import MADE, made

from vlmscope.errors import ModelError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.patching import edge_circuits
from vlmscope.patching.backward import Runs
from vlmscope.patching.edge_patches import exact, moved
from vlmscope.patching.edges import score_edges, through_readers
from vlmscope.patching.gradients import estimate
from vlmscope.patching.graph import Graph
from vlmscope.runs import corrupt
from vlmscope.runs.corrupt import Noise

POST = ("blip-vqa", "blip-captioning", "mplug-owl2")
"""Without edges between the words: post-norm, or of a table that names no norms."""
EDGED = [name for name in MADE if name not in POST]
OFTEN = ("llava", "gemma3", "mllama", "blip2-t5", "qwen3-vl")
"""Of which the dear tests are run each time: one of each sort."""
MANY = [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in EDGED]
BEHIND = ("gemma3", "paligemma2")
"""With a norm behind each sublayer, so that a head's part is no linear map of its output."""
NORMS = {
    "attn": ("input_layernorm", "self_attn_layer_norm", "layer.0.layer_norm", "layer_norm1"),
    "cross": ("layer.1.layer_norm", "input_layernorm"),
    "mlp": (
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "layer.2.layer_norm",
        "final_layer_norm",
        "layer_norm2",
    ),
}
ATTENTION = {
    "attn": ("self_attn", "layer.0.SelfAttention"),
    "cross": ("cross_attn", "layer.1.EncDecAttention"),
}


def pair_of(model, corruption="image"):
    return corrupt.pairs(model, example(), corrupt.parse(corruption))[0]


def first(block, paths):
    there = dict(block.named_modules())
    return next(there[path] for path in paths if path in there)


def inside(model, name):
    """The norm in front of a reader and its projection, by names that are written here."""
    if name == "logits":
        return model.hf.get_submodule(model.family.norm), None, None
    tower, layer, kind, *unit = name.split(".")
    block = model.hf.get_submodule(model.family.towers[tower].blocks)[int(layer)]
    norm = first(block, NORMS[kind])
    if kind == "mlp":
        return norm, None, None
    part, number = unit[0][0], int(unit[0][1:])
    linear = first(first(block, ATTENTION[kind]), (f"{part}_proj", part))
    return None if kind == "cross" and part != "q" else norm, linear, number


def plain(model, inputs, name, change):
    """LD of a plain forward in which one reader alone reads `change(x)`, and what it read: plain hooks."""
    norm, linear, number = inside(model, name)
    held, seen, logits = [], [], []

    def before(module, args):
        seen[:] = [args[0]]
        return None if linear is not None else (change(args[0]), *args[1:])

    def projected(module, args, out):
        x = change(seen[0] if norm is not None else args[0])
        if norm is None:
            seen[:] = [args[0]]
        new = module.forward(x if norm is None else norm.forward(x))
        many = model.shapes["decoder"].units("attn", name.split(".")[3][0])
        width = out.shape[-1] // many
        out = out.clone()
        out[..., number * width : (number + 1) * width] = new[..., number * width : (number + 1) * width]
        return out

    if norm is not None:
        held.append(norm.register_forward_pre_hook(before))
    if linear is not None:
        held.append(linear.register_forward_hook(projected))
    held.append(model.hf.register_forward_hook(lambda m, args, out: logits.append(out.logits[0, -1])))
    try:
        model.hf(**inputs.tensors)
    finally:
        for handle in held:
            handle.remove()
    return logits[0], seen[0].detach()


def sampled(graph, seed=0):
    """A reader of each sort."""
    draw, sorts = random.Random(seed), {}
    for group in graph.groups:
        sorts.setdefault((group.reads.kind, group.reads.part), []).extend(group.names)
    return [draw.choice(names) for names in sorts.values()]


def table(found):
    scores = np.zeros((len(found.graph.writers), len(found.graph.readers)))
    scores[found.graph.places(found.graph.edges)] = found.scores
    return scores


@pytest.mark.parametrize("name", EDGED)
def test_edges_sum_to_attribution_patching_of_writers(name, in_float64):
    """Over all readers; of heads as of what they add up to."""
    model = made(name)
    pair = pair_of(model)
    found = score_edges(model, pair)
    graph, sums = found.graph, table(found).sum(1)
    names, wanted = [], {}
    for some in graph.written:
        tower, layer, kind, part = some.point
        if kind == "resid_pre":
            for writer, at in graph.entrances.items():
                wanted |= {writer: [f"{tower}.0.resid_pre@{n}" for n in at]}
        elif graph.has_across(some):
            if model.family.image == tower:
                wanted["image"] = [f"{model.image_site}"]
        elif part and name in BEHIND:
            names.append((some.names, f"{tower}.{layer}.{kind}@all"))
        else:
            names += [((one,), f"{one}@all") for one in some.names]
    names += [((writer,), *sites) for writer, sites in wanted.items() if sites]
    placed = model.placed([site for _, *sites in names for site in sites], pair.clean)
    each = dict(zip(map(str, placed), estimate(model, pair, placed).scores, strict=True))
    numbers = iter(each.values())
    expected = [sum(next(numbers) for _ in sites) for _, *sites in names]
    own = [sum(sums[graph.writers.index(one)] for one in some) for some, *_ in names]
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", MANY)
def test_edges_sum_to_the_gradient_of_readers(name, in_float64):
    """Over all writers: the step of what a reader reads, times the gradient that flows through it alone."""
    model = made(name)
    pair = pair_of(model)
    found = score_edges(model, pair)
    sums, expected, own = table(found).sum(0), [], []
    for reader in sampled(found.graph):
        leaf = []

        def add(x, leaf=leaf):
            leaf.append(torch.zeros_like(x, requires_grad=True))
            return x + leaf[0]

        logits, base = plain(model, pair.corrupt, reader, add)
        _, source = plain(model, pair.clean, reader, lambda x: x)
        (gradient,) = torch.autograd.grad(logits[pair.answer] - logits[pair.foil], leaf[0])
        expected.append(float(((source - base).detach() * gradient).sum()))
        own.append(sums[found.graph.readers.index(reader)])
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("name", MANY)
def test_circuits_of_all_and_no_edges_are_the_runs(name, in_float64):
    model = made(name)
    pair = pair_of(model)
    graph = Graph(model, pair.clean)
    clean, corrupted = (
        float(model.run(x)[pair.answer] - model.run(x)[pair.foil]) for x in (pair.clean, pair.corrupt)
    )
    for run, ends in (("clean", (clean, corrupted)), ("corrupt", (corrupted, clean))):
        found = [float(score.ld) for score in edge_circuits.circuits(model, pair, [graph.edges, []], run=run)]
        assert found == pytest.approx(ends, rel=1e-9, abs=1e-9)
    assert abs(clean - corrupted) > 1e-3


def differences(model, pair, edges):
    """What plain forwards say: the reader's input plus what the writer wrote in one run less in the other."""
    graph = Graph(model, pair.clean)
    clean, corrupted = (edge_circuits.written(graph, run, 1) for run in pair.runs)
    apart = clean.stream - corrupted.stream
    (base, _), found = plain(model, pair.corrupt, "logits", lambda x: x), []
    for writer, reader in edges:
        number = graph.writers.index(writer) - bool(graph.across)
        more = apart[number] if number >= 0 else clean.across - corrupted.across
        logits, _ = plain(model, pair.corrupt, reader, lambda x, more=more: x + more.reshape(x.shape))
        change = (logits - base).detach()
        found.append(float(change[pair.answer] - change[pair.foil]))
    return found


def some_edges(graph, each, seed=0):
    """Some edges into a reader of each sort."""
    draw, found = random.Random(seed), []
    for reader in sampled(graph, seed):
        there = [edge for edge in graph.edges if edge.target == reader]
        found += draw.sample(there, min(each, len(there)))
    return found


@pytest.mark.parametrize("name", MANY)
def test_exact_edges_are_plain_forwards(name, in_float64):
    """With a hook on that reader's input alone; and circuits without that edge, from the other side."""
    model = made(name)
    pair = pair_of(model)
    edges = some_edges(graph := Graph(model, pair.clean), 2)
    found, expected = exact(model, pair, edges), differences(model, pair, edges)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    without = [[edge for edge in graph.edges if edge != one] for one in edges[:4]]
    (whole, *others) = edge_circuits.circuits(model, pair, [graph.edges, *without], run="corrupt")
    cut = [float(other.ld - whole.ld) for other in others]
    np.testing.assert_allclose(cut, expected[:4], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MANY)
def test_edges_are_the_limits_of_exact_ones(name, in_float64):
    model = made(name)
    pair = pair_of(model)
    found = score_edges(model, pair)
    graph, runs = found.graph, Runs(model, pair, "denoise", "ld")
    edges = some_edges(graph, 2)
    source, base = (edge_circuits.written(graph, run, 1) for run in pair.runs)
    ends = []
    for step in (1e-5, -1e-5):
        across = None if base.across is None else base.across + step * (source.across - base.across)
        stream = base.stream + step * (source.stream - base.stream)
        ends.append(moved(runs, graph, base, source._replace(stream=stream, across=across), edges))
    limits = (ends[0] - ends[1]) / 2e-5
    scores = table(found)[graph.places(edges)]
    np.testing.assert_allclose(scores, limits, rtol=1e-5, atol=1e-7 * np.abs(limits).max())


@pytest.mark.parametrize(
    "corruption", ["text", Noise("add", "image", 0.05, 1), Noise("multiply", "image", 0.5, 1)]
)
@pytest.mark.parametrize("name", ["llava", pytest.param("mllama", marks=pytest.mark.slow)])
def test_other_corruptions_and_the_other_direction(name, corruption, in_float64):
    """The corrupt run's own edits are made in rows, too; noise is no function of the engine's rows."""
    model = made(name)
    pair = corrupt.pairs(model, example(), corrupt.parse(corruption))[0]
    graph = Graph(model, pair.clean)
    edges = some_edges(graph, 1)
    for direction in ("denoise", "noise"):
        found = exact(model, pair, edges, direction)
        slow = exact(model, pair, edges, direction, by_rows=False)
        np.testing.assert_allclose(found, slow, rtol=1e-9, atol=1e-9)
        assert np.abs(slow).max() > 1e-6
    whole, none = (
        float(one.ld) for one in edge_circuits.circuits(model, pair, [graph.edges, []], run="corrupt")
    )
    logits = [model.run(pair.corrupt, pair.edits), model.run(pair.clean)]
    ends = [float(one[pair.answer] - one[pair.foil]) for one in logits]
    assert [whole, none] == pytest.approx(ends, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["llava", "mllama", pytest.param("blip2-opt", marks=pytest.mark.slow)])
def test_eap_ig_is_the_mean_over_plain_points(name, in_float64):
    """Of the gradients of runs whose inputs lie between the two: edits of the inputs, written here."""
    model = made(name)
    pair = pair_of(model)
    steps, sites = 3, ["decoder.0.resid_pre@all"]
    if name == "mllama":
        sites.append(str(model.image_site))
    ends = [model.capture(inputs, sites) for inputs in (pair.corrupt, pair.clean)]
    total = 0.0
    for number in range(steps):
        share = (number + 0.5) / steps
        edits = [Edit(s, "set", ends[0][s] + share * (ends[1][s] - ends[0][s])) for s in sites]
        graph = Graph(model, pair.clean)
        runs = Runs(model, pair, "denoise", "ld")
        source, base = (edge_circuits.written(graph, run, 1) for run in pair.runs)
        total = total + through_readers(runs, graph, base, source, edits)[0] / steps
    found = score_edges(model, pair, method="eap-ig", steps=steps)
    np.testing.assert_allclose(table(found), total, rtol=1e-9, atol=1e-12)
    assert np.abs(found.scores - score_edges(model, pair).scores).max() > 1e-3


JOINED = ("mplug-owl2", "mllama", "llava-siglip-layers", "granite-vision", "qwen3-vl")
"""Whose vision towers have no one end."""
VISION = [name for name in MADE if name not in JOINED]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("llava", "blip-vqa") else pytest.mark.slow) for n in VISION]
)
def test_the_vision_tower_is_a_graph_of_its_own(name, in_float64):
    model = made(name)
    pair = pair_of(model)
    found = score_edges(model, pair, tower="vision")
    graph = found.graph
    assert graph.writers[0] == "embed" and graph.readers[-1] == "projector"
    clean, corrupted = (
        float(model.run(x)[pair.answer] - model.run(x)[pair.foil]) for x in (pair.clean, pair.corrupt)
    )
    edges = some_edges(graph, 2)
    rows = exact(model, pair, edges, tower="vision")
    np.testing.assert_allclose(
        rows, exact(model, pair, edges, tower="vision", by_rows=False), rtol=1e-9, atol=1e-9
    )
    without = [[edge for edge in graph.edges if edge != one] for one in edges[:3]]
    some = edge_circuits.circuits(model, pair, [graph.edges, [], *without], run="corrupt", tower="vision")
    whole, none, *others = (float(one.ld) for one in some)
    assert (whole, none) == pytest.approx((corrupted, clean), rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(np.array(others) - whole, rows[:3], rtol=1e-9, atol=1e-9)
    sums, placed = table(found).sum(1), model.placed("vision.*.mlp@all", pair.clean)
    own = [sums[graph.writers.index(f"vision.{n}.mlp")] for n in range(len(placed))]
    expected = estimate(model, pair, placed).scores
    np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "tower", "what"),
    [
        ("blip-vqa", None, "normalise the residual stream itself"),
        ("blip-captioning", "decoder", "normalise the residual stream itself"),
        ("blip2-opt", "qformer", "normalise the residual stream itself"),
        ("mplug-owl2", None, "does not say through which norm"),
        ("mllama", "vision", "made of several of its blocks"),
        ("llava-siglip-layers", "vision", "made of several of its blocks"),
        ("blip2-t5", "encoder", "edges are of the vision tower or of the decoder"),
    ],
)
def test_towers_without_edges(name, tower, what):
    model = made(name)
    with pytest.raises(ModelError, match=what):
        Graph(model, pair_of(model).clean, tower)


def test_what_is_no_edge():
    model = llava()
    pair = pair_of(model)
    graph = Graph(model, pair.clean)
    for edge in [("logits", "embed"), ("decoder.2.mlp", "decoder.0.mlp"), ("a", "logits"), ("embed",)]:
        with pytest.raises(VlmscopeError, match="no edge .* expected a writer and a reader behind it"):
            graph.places([edge])
    with pytest.raises(VlmscopeError, match="has no tower 'hearing'; expected one of vision, decoder"):
        Graph(model, pair.clean, "hearing")
    with pytest.raises(VlmscopeError, match="unknown run 'both'"):
        list(edge_circuits.circuits(model, pair, [[]], run="both"))
    with pytest.raises(VlmscopeError, match="the metric has no gradient"):
        score_edges(model, pair, metric=lambda logits, base: (logits.argmax(-1) == 3).double())


def test_frozen_weights_and_float32():
    model = llava()
    pair = pair_of(model)
    found = score_edges(model, pair).scores
    model.hf.requires_grad_(False)
    np.testing.assert_array_equal(score_edges(model, pair).scores, found)
    model.hf.float()
    some = Graph(model, (pair := pair_of(model)).clean).edges[::37]
    fast, slow = (exact(model, pair, some, by_rows=rows) for rows in (True, False))
    np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-5)

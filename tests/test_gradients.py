"""Estimates of patches from gradients: the limits of the engine's patches, and plain hooks with autograd."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
from models import blip, example, llava
from test_families import MADE, made, reader

from vlmscope.errors import ModelError, SiteError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.patching import engine
from vlmscope.patching.backward import Backward, Index, Runs
from vlmscope.patching.gradients import check_place, estimate
from vlmscope.patching.patterns import Patterns
from vlmscope.runs import corrupt
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.forward import forward, read
from vlmscope.sites import Pattern, Point, Site, expand, place, points_of

STEP = 1e-5


def pair_of(model, corruption="image"):
    return corrupt.pairs(model, example(), corrupt.parse(corruption))[0]


def expressions(model, inputs):
    """Every kind of site in every tower, with units of every sort that the model shows."""
    for tower, shape in model.shapes.items():
        for kind in shape.kinds:
            yield from (f"{tower}.*.{kind}@*", f"{tower}.*.{kind}@all")
        yield from (f"{tower}.*.mlp.n*@*", f"{tower}.*.mlp.n[1,3]@all")
        for kind in shape.heads:
            for unit in "hqkvp" if kind == "attn" else "hqp":
                layer = shape.having(kind)[-1]
                try:
                    model.capture(inputs, f"{tower}.{layer}.{kind}.{unit}0@all")
                except ModelError:
                    continue
                yield f"{tower}.*.{kind}.{unit}*@*"


def drawn(model, pair, each, kinds=None):
    """Some sites of every kind, or of some kinds alone: patches of many are dear."""
    draw, found = random.Random(0), []
    texts = list(expressions(model, pair.clean))
    for text in texts if kinds is None else draw.sample(texts, kinds):
        sites = [p for s in expand([Pattern.parse(text)], model.shapes) for p in place(s, pair.clean.layout)]
        found += draw.sample(sites, min(each, len(sites)))
    return found


def patched(model, pair, sites, direction, **more):
    found = np.full(len(sites), np.nan)
    for numbers, scores in engine.patch(model, pair, sites, direction, **more).chunks:
        found[numbers] = scores.value.numpy()
    return found


def limits(model, pair, sites, direction="denoise", metric="ld"):
    """(m(x + εΔ) − m(x − εΔ)) / 2ε, by the engine."""
    points, count = points_of(sites), len(pair.answers)
    runs = [(pair.clean, ()), (pair.corrupt, pair.edits)]
    base, source = (
        forward(model, *run, points, count).values for run in (runs[::-1] if direction == "denoise" else runs)
    )
    moved = []
    for step in (STEP, -STEP):
        values = {point: base[point] + step * (source[point] - base[point]) for point in points}
        moved.append(patched(model, pair, sites, direction, values=values, metric=metric))
    return (moved[0] - moved[1]) / 2 / STEP


def same(found, wanted):
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7 * np.abs(wanted).max())


def compare(name, each, kinds=None):
    model = made(name)
    pair = pair_of(model)
    sites = drawn(model, pair, each, kinds)
    same(estimate(model, pair, sites).scores, limits(model, pair, sites))


@pytest.mark.parametrize("name", MADE)
def test_estimates_are_the_limits_of_patches(name, in_float64):
    compare(name, 1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_estimates_of_many_sites_are_the_limits_of_patches(name, in_float64):
    compare(name, 100)


@pytest.mark.parametrize("corruption", ["text", "noise"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("make", [blip, llava])
def test_both_directions_and_all_corruptions(make, direction, corruption, in_float64):
    model = make()
    pair = pair_of(model, corruption)
    sites = drawn(model, pair, 1, 10)
    same(estimate(model, pair, sites, direction).scores, limits(model, pair, sites, direction))


def squared(logits, base):
    return (logits[:, base.answers[-1]] - logits[:, 3]) ** 2


@pytest.mark.parametrize("metric", ["p", "logprob", "kl", squared])
def test_metrics(metric, in_float64):
    model = llava()
    pair = pair_of(model)
    sites = drawn(model, pair, 1, 10)
    same(estimate(model, pair, sites, metric=metric).scores, limits(model, pair, sites, metric=metric))


def test_a_whole_answer(in_float64):
    model = llava()
    (pair,) = corrupt.pairs(model, example(answer="red blue circle"), "image", whole=True)
    sites = drawn(model, pair, 1)
    found = estimate(model, pair, sites, metric="logprob").scores
    same(found, limits(model, pair, sites, metric="logprob"))


def plain(model, inputs, modules, before):
    """Logits in a graph and what some modules give, or get, by plain hooks."""
    kept, logits = {}, []

    def keep(name, x):
        kept[name] = x

    held = [
        module.register_forward_pre_hook(lambda m, args, n=n: keep(n, args[0]))
        if before[n]
        else module.register_forward_hook(
            lambda m, args, out, n=n: keep(n, out[0] if isinstance(out, tuple) else out)
        )
        for n, module in modules.items()
    ]
    head = model.hf.text_decoder if hasattr(model.hf, "text_decoder") else model.hf
    held.append(head.register_forward_hook(lambda m, args, out: logits.append(out.logits[0, -1])))
    with torch.enable_grad():
        model.hf(**inputs.tensors)
    for handle in held:
        handle.remove()
    return logits[-1], kept


@pytest.mark.parametrize("name", ["llava", "blip-vqa", "blip2-t5", "gemma3"])
def test_by_plain_hooks_and_autograd(name):
    """Heads, neurons, sublayers, blocks: without any code of ours but the paths of the modules."""
    model = made(name)
    pair = pair_of(model)
    modules, before = {}, {}
    for tower, table in model.family.towers.items():
        for layer, block in enumerate(model.blocks(tower)):
            for kind, path in (("resid", ""), ("attn.h1", table.attn), ("mlp.n3", table.mlp)):
                text = f"{tower}.{layer}.{kind}"
                modules[text], before[text] = block.get_submodule(path), path != ""
            if "cross" in model.shapes[tower].kinds and layer in model.shapes[tower].having("cross"):
                text = f"{tower}.{layer}.cross.h0"
                modules[text], before[text] = block.get_submodule(table.cross), True
    logits, base = plain(model, pair.corrupt, modules, before)
    _, source = plain(model, pair.clean, modules, before)
    metric = logits[pair.answer] - logits[pair.foil]
    gradients = torch.autograd.grad(metric, list(base.values()), allow_unused=True)
    wanted = []
    for (text, x), gradient in zip(base.items(), gradients, strict=True):
        product = (source[text] - x).detach() * gradient
        tower, _, kind, *unit = text.split(".")
        product = product.reshape(-1, product.shape[-1])
        if unit:
            many = model.shapes[tower].units(kind, unit[0][0])
            product = product.unflatten(-1, (many, -1))[:, int(unit[0][1:])]
        wanted += [float(product.sum()), float(product[0].sum())]
    placed = model.placed([f"{text}@{at}" for text in base for at in ("all", "0")], pair.clean)
    found = estimate(model, pair, placed).scores
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert np.abs(wanted).max() > 1e-2


def test_what_a_gradient_says_nothing_about():
    model = llava()
    pair = pair_of(model)
    for site in ("decoder.1/3.resid@last", "decoder.0.mlp@last + decoder.1.mlp@last"):
        with pytest.raises(SiteError, match="patched together, a later layer undoes"):
            check_place(expand([Pattern.parse(site)], model.shapes)[0], "atp")
    for unit in "qkp":
        with pytest.raises(SiteError, match="queries, keys and patterns get nothing"):
            check_place(Site("decoder", 0, "attn", unit, (0,)), "relp")
    for metric in (
        lambda logits, base: (logits.argmax(-1) == base.answers[0]).double(),
        lambda logits, base: 0.0 * logits.sum(-1),
    ):
        with pytest.raises(VlmscopeError, match="the metric has no gradient"):
            estimate(model, pair, "decoder.*.mlp@last", metric=metric)


def test_gradients_pass_layer_by_layer(monkeypatch):
    """One is let go before the next is there."""
    model, seen = llava(), []
    moved = Backward.moved

    def watched(run, point, source, gradient):
        assert all(one() is None for _, one in seen)
        seen.append((point.layer, weakref.ref(gradient)))
        return moved(run, point, source, gradient)

    monkeypatch.setattr(Backward, "moved", watched)
    estimate(model, pair_of(model), "decoder.*.mlp.n*@all")
    assert [layer for layer, _ in seen] == [2, 1, 0]


@pytest.mark.parametrize("method", ["atp", "atp-star", "relp", "ig"])
def test_frozen_weights_change_nothing(method):
    model = llava()
    pair, sites = pair_of(model), ["decoder.*.attn.h*@last", "vision.*.mlp@all"]
    found = estimate(model, pair, sites, method=method).scores
    model.hf.requires_grad_(False)
    np.testing.assert_array_equal(estimate(model, pair, sites, method=method).scores, found)


# -- integrated gradients ------------------------------------------------------------------------


def inputs_of(model):
    """What the language model reads, and what enters the vision tower."""
    text, image = model.text_towers[0], model.family.image
    words = f"{text}.0.resid_pre@"
    behind = [f"{words}all"] if image is None else [f"{words}all", str(model.image_site)]
    return {"behind": behind, "before": ["vision.0.resid_pre@all"]}


@pytest.mark.parametrize(
    ("name", "corruption", "which"),
    [
        ("blip-vqa", "image", "behind"),
        ("blip-vqa", "image", "before"),
        ("mllama", "image", "before"),
        ("llava", Noise("add", "text", 0.05, 1), "behind"),
        ("paligemma", Noise("add", "image", 0.05, 1), "behind"),
    ],
)
def test_integrated_gradients_of_the_inputs_sum_to_the_gap(name, corruption, which, in_float64):
    """But for what goes down with the number of points: at least by half where they are twice as many."""
    model = made(name)
    pair, sites = pair_of(model, corruption), inputs_of(model)[which]
    errors = []
    for steps in (8, 16):
        found = estimate(model, pair, sites, method="ig", steps=steps)
        gap = float(found.clean.value - found.corrupt.value)
        errors.append(abs(found.scores.sum() - gap))
    assert errors[1] < 0.5 * errors[0] + 1e-9 and errors[1] < 0.2 * abs(gap)


def test_integrated_gradients_by_hand():
    """Three points, the decoder's input set to each by a plain hook."""
    model, steps = llava(), 3
    pair = pair_of(model)
    blocks = model.blocks("decoder")
    got, heads = [], []

    def run(inputs, new=None):
        def enter(m, args, kwargs):
            got.append(args[0] if args else kwargs["hidden_states"])
            return None if new is None else ((new, *args[1:]), kwargs)

        held = [
            blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            blocks[1].self_attn.o_proj.register_forward_pre_hook(lambda m, args: heads.append(args[0])),
        ]
        logits = model.hf(**inputs.tensors).logits[0, -1]
        for handle in held:
            handle.remove()
        return logits[pair.answer] - logits[pair.foil], got[-1].detach(), heads[-1]

    (_, base, x), (_, source, y) = run(pair.corrupt), run(pair.clean)
    total = 0.0
    for share in (1 / 6, 3 / 6, 5 / 6):
        metric, _, here = run(pair.corrupt, base + share * (source - base))
        total = total + torch.autograd.grad(metric, here)[0] / steps
    wanted = ((y - x).detach() * total)[0].unflatten(-1, (4, -1)).sum((0, 2))
    found = estimate(model, pair, "decoder.1.attn.h*@all", method="ig", steps=steps).scores
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


# -- AtP* ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "paligemma2", "blip2-t5"])
def test_queries_and_keys_by_the_patterns_that_they_would_make(name, in_float64):
    """A row of a softmax with one query, or one key, of the other run, all by hand: the row's own logarithms
    less those of the other key's."""
    model = made(name)
    pair, tower = pair_of(model), reader(model)
    points = {part: Point(tower, 1, "attn", part) for part in "qkp"}
    source = forward(model, pair.clean, (), points.values())
    run = forward(model, pair.corrupt, (), [points["p"]], grad=True)
    metric = run.logits[-1][pair.answer] - run.logits[-1][pair.foil]
    (gradient,) = torch.autograd.grad(metric, run.values[points["p"]])
    heads, groups = (model.units(points[part]) for part in "pk")
    own, g = (x[0].detach().unflatten(-1, (heads, -1)) for x in (run.values[points["p"]], gradient))
    many = len(own)
    wanted = {"q": np.zeros((many, heads)), "k": np.zeros((many, groups))}

    def pays(part, positions, units):
        """The patterns where these queries or keys are the source's."""
        site = Site(tower, 1, "attn", part, units, "x", positions)
        edit = Edit(site, "set", read(model, source.values[points[part]], site))
        return (
            forward(model, pair.corrupt, [edit], [points["p"]])
            .values[points["p"]][0]
            .unflatten(-1, (heads, -1))
        )

    new = pays("q", tuple(range(many)), tuple(range(heads)))
    wanted["q"] = ((new - own) * g).sum(-1).numpy()
    draw = random.Random(0)
    chosen = draw.sample([(at, unit) for at in range(many) for unit in range(groups)], 6)
    found = estimate_star(model, pair, tower)
    for at, unit in chosen:
        total = float(((pays("k", (at,), (unit,)) - own) * g).sum())
        assert found["k"][at, unit] == pytest.approx(total, rel=1e-7, abs=1e-9)
    np.testing.assert_allclose(found["q"], wanted["q"], rtol=1e-7, atol=1e-9)


def estimate_star(model, pair, tower):
    """The signed numbers, before the mean of their sizes."""
    sites = {
        part: [
            Site(tower, 1, "attn", part, (unit,), str(at), (at,))
            for at in range(len(pair.clean.layout[tower].tokens))
            for unit in range(model.units(Point(tower, 1, "attn", part)))
        ]
        for part in "qk"
    }
    index, runs = Index(model, [*sites["q"], *sites["k"]]), Runs(model, pair, "denoise", "ld")
    patterns = Patterns(runs, index, index.points)
    there = forward(model, *runs.source)
    run = Backward.at_base(runs, index, patterns.points, there.logits)
    scores = index.scores(run.sums(lambda point, gradient: dict(patterns.take(point, gradient))))
    parts = np.split(scores, [len(sites["q"])])
    many = len(pair.clean.layout[tower].tokens)
    return {part: scores.reshape(many, -1) for part, scores in zip("qk", parts, strict=True)}


@pytest.mark.parametrize("name", ["llava", "blip-vqa"])
def test_a_mean_of_sizes_over_backward_passes_without_a_layer(name):
    """By plain hooks: what a layer's sublayers give gets no gradient."""
    model = made(name)
    pair, tower = pair_of(model), reader(model)
    table, blocks = model.family.towers[tower], model.blocks(tower)
    modules = {n: block.get_submodule(table.attn) for n, block in enumerate(blocks)}
    is_input, many = dict.fromkeys(modules, True), model.shapes[tower].heads["attn"]
    base, source = [plain(model, inputs, modules, is_input)[1] for inputs in (pair.corrupt, pair.clean)]
    sizes = []
    for behind in list(model.shapes)[list(model.shapes).index(tower) :]:
        for block in model.blocks(behind):
            own = model.family.towers[behind]
            paths = [own.attn, own.mlp, *([own.cross] if own.cross else [])]
            gone = [block.get_submodule(path) for path in paths]
            held = [module.register_full_backward_pre_hook(lambda m, g: (0 * g[0],)) for module in gone]
            logits, here = plain(model, pair.corrupt, modules, is_input)
            gradients = torch.autograd.grad(logits[pair.answer] - logits[pair.foil], list(here.values()))
            for handle in held:
                handle.remove()
            moved = [(source[n] - base[n]) * g for n, g in zip(modules, gradients, strict=True)]
            each = [x[0].unflatten(-1, (many, -1)) for x in moved]
            sizes.append(torch.stack([x.sum((0, 2)) for x in each]).detach().abs().flatten())
    found = estimate(model, pair, f"{tower}.*.attn.h*@all", method="atp-star").scores
    wanted = torch.stack(sizes).sum(0) / (len(sizes) - 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert (found >= 0).all()


def test_queries_of_models_that_do_not_show_how_they_compare():
    model = blip()
    with pytest.raises(ModelError, match="do not show how their encoder attn heads compare queries and keys"):
        estimate(model, pair_of(model), "encoder.*.attn.q*@all", method="atp-star")

"""Metrics and values at the engine's speed, against the reference and against arithmetic of our own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import blip, example, llava, picture

from vlmscope.errors import ExampleError, VlmscopeError
from vlmscope.layout import slots
from vlmscope.models.inputs import Edit
from vlmscope.patching import engine, reference
from vlmscope.patching.sources import Means, resampled, zeros
from vlmscope.sites import expand, parse, place, points_of

EXPRESSIONS = ["{0}.*.attn.h*@answer", "{0}.*.mlp@*", "{0}.1.resid@last", "vision.*.resid@image[1,1]"]


def placed(model, pair, expressions=EXPRESSIONS):
    reader = "encoder" if "encoder" in model.shapes else "decoder"
    sites = expand(parse([text.format(reader) for text in expressions]), model.shapes)
    return [found for site in sites for found in place(site, pair.clean.layout)]


def table(module, model, pair, sites, **options):
    """p, LD and the metric of each site."""
    patched = module.patch(model, pair, sites, **options)
    rows = torch.full((3, len(sites)), torch.nan, dtype=torch.float64)
    for numbers, scores in patched.chunks:
        rows[:, numbers] = torch.stack(scores[:3])
    base = torch.stack([torch.stack(run[:3]) for run in (patched.clean, patched.corrupt)])
    return rows, base


def margin(logits, base):
    """By how much the answer leads the best other token."""
    others = logits.clone()
    others[:, base.answers[0]] = -torch.inf
    return logits[:, base.answers[0]] - others.amax(-1)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("metric", ["ld", "p", "logprob", "kl", margin])
@pytest.mark.parametrize("make", [blip, llava])
def test_every_metric_is_the_references(make, metric, direction):
    model = make()
    pair = model.prepare(example())
    sites = placed(model, pair)
    tables = [
        table(module, model, pair, sites, direction=direction, metric=metric)
        for module in (engine, reference)
    ]
    for fast, slow in zip(*tables, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def test_named_metrics_are_their_formulas():
    model = llava()
    pair = model.prepare(example())
    clean, corrupt = (x.double().log_softmax(-1) for x in (model.run(pair.clean), model.run(pair.corrupt)))
    wanted = {
        "ld": corrupt[pair.answer] - corrupt[pair.foil],
        "p": corrupt[pair.answer].exp(),
        "logprob": corrupt[pair.answer],
        "kl": (clean.exp() * (clean - corrupt)).sum(),
    }
    for metric, value in wanted.items():
        patched = engine.patch(model, pair, [], metric=metric)
        torch.testing.assert_close(patched.corrupt.value, value, rtol=1e-9, atol=1e-12)
    assert engine.patch(model, pair, [], metric="kl").clean.value.abs() < 1e-12


def test_a_metric_of_another_shape_and_an_unknown_one_are_refused():
    model = llava()
    pair = model.prepare(example())
    with pytest.raises(VlmscopeError, match=r"the metric gave the shape \(\); expected \(1,\)"):
        engine.patch(model, pair, [], metric=lambda logits, base: logits.sum())
    with pytest.raises(VlmscopeError, match="unknown metric 'ldd'; expected one of ld, p, logprob, kl"):
        engine.patch(model, pair, [], metric="ldd")


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("make", [blip, llava])
def test_the_whole_answer_is_scored_token_by_token(make, direction):
    """No foil is needed; the log-probability is the sum over one plain run a token, each fed those before."""
    model = make()
    words = "unhappy" if make is blip else "red blue circle"
    pair = model.prepare(replace(example(), answer=words, foil=""), whole=True)
    assert len(pair.answers) > 1 and pair.foil is None
    sites = placed(model, pair, ["{0}.*.attn.h*@noun", "{0}.*.mlp@*", "vision.*.resid@image[1,1]"])
    tables = [
        table(module, model, pair, sites, direction=direction, metric="logprob")
        for module in (engine, reference)
    ]
    for fast, slow in zip(*tables, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12, equal_nan=True)
    one = replace(example(), corrupt_image=None, corrupt_prompt=None)
    total = 0.0
    for number, token in enumerate(pair.answers):
        fed = model.inputs(one.clean_image, one.clean_prompt, fed=pair.answers[:number])
        total += float(model.run(fed).double().log_softmax(-1)[token])
    found = tables[0][1][0]
    torch.testing.assert_close(found[2], torch.tensor(total, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0], found[2].exp(), rtol=1e-12, atol=0)
    assert found[1].isnan(), "there is no logit difference"


def test_the_read_out_of_a_whole_answer_is_the_prompts_last_position():
    model = llava()
    short = model.prepare(example())
    whole = model.prepare(replace(example(), answer="red blue circle"), whole=True)
    names = [slots(pair.clean.layout["decoder"]) for pair in (short, whole)]
    many = len(whole.answers) - 1
    assert len(names[1]) == len(names[0]) + many and names[0][-1] == "readout"
    assert names[1][len(names[0]) - 1 :] == ("readout", *(f"fed[{n}]" for n in range(many)))


def several(model, many=4):
    prompts = ["is this circle red or blue ?", "is the dark circle red or blue ?"] * many
    made = [
        example(prompts[n], id=f"e{n}", clean_image=picture(n), corrupt_image=picture(40 + n))
        for n in range(many)
    ]
    return [model.prepare(replace(one, corrupt_prompt=None)) for one in made]


@pytest.mark.parametrize("make", [blip, llava])
def test_ablations_at_the_engines_speed_are_single_edits(make):
    """Zero, the mean by slot and another example's activation, each against `run` with the value written
    out."""
    model = make()
    pairs = several(model)
    sites = placed(model, pairs[0])
    points = points_of(sites)
    means = Means(model, points)
    for pair in pairs:
        means.add(pair.clean)
    others = [pair.clean for pair in pairs[1:]]
    given = {
        "zero": zeros(model, pairs[0].clean, points),
        "mean": means.values(pairs[0].clean),
        "resample": resampled(model, pairs[0].clean, others, points),
    }
    for name, values in given.items():
        (rows, _), (slow, _) = (
            table(module, model, pairs[0], sites, direction="noise", values=values)
            for module in (engine, reference)
        )
        torch.testing.assert_close(rows, slow, rtol=1e-9, atol=1e-12)
        for number in (0, len(sites) // 2, len(sites) - 1):
            site = sites[number]
            value = written_out(model, pairs, site, name)
            logits = model.run(pairs[0].clean, [Edit(site, "set", value)])
            ld = float(logits[pairs[0].answer] - logits[pairs[0].foil])
            assert rows[1, number].item() == pytest.approx(ld, rel=1e-9, abs=1e-12)


def written_out(model, pairs, site, name):
    """The value at a site, found by the names of the tokens' slots."""
    if name == "zero":
        return 0.0
    wanted = [slots(pairs[0].clean.layout[site.tower])[p] for p in site.positions]
    runs = []
    for pair in pairs:
        names = slots(pair.clean.layout[site.tower])
        if all(slot in names for slot in wanted):
            at = tuple(names.index(slot) for slot in wanted)
            there = replace(site, position="x", positions=at)
            runs.append((pair, capture_at(model, pair.clean, there)))
    if name == "mean":
        return torch.stack([value for _, value in runs]).mean(0)
    every = set(slots(pairs[0].clean.layout[site.tower]))
    for pair, value in runs[1:]:
        if all(
            set(slots(pairs[0].clean.layout[t])) <= set(slots(pair.clean.layout[t])) for t in model.shapes
        ):
            return value
    raise AssertionError(every)


def capture_at(model, inputs, site):
    from vlmscope.runs.forward import forward, read

    return read(model, forward(model, inputs, keep=[site.point]).values[site.point], site)


def test_what_no_other_example_has_cannot_be_resampled():
    model = llava()
    long, short = several(model)[1], several(model)[0]
    points = points_of(placed(model, long, ["{0}.0.mlp@last"]))
    with pytest.raises(ExampleError, match="no other example has a token at every slot"):
        resampled(model, long.clean, [short.clean], points)


def test_whom_an_example_is_resampled_from_does_not_depend_on_the_sites():
    """The check of a run, and sites that are added later, ask for other sites than the run did."""
    model = llava()
    short, long = several(model)[0], several(model)[1]
    others = [short.clean, several(model)[3].clean]
    vision = points_of(placed(model, long, ["vision.0.resid@image[1,1]"]))
    both = vision | points_of(placed(model, long, ["{0}.0.mlp@last"]))
    (point,) = vision
    found = [resampled(model, long.clean, others, points)[point] for points in (vision, both)]
    assert torch.equal(*found)

"""The engine gives what the reference gives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from models import blip, example, llava

from vlmscope.checkpoint import load
from vlmscope.errors import RoomError
from vlmscope.models.inputs import Edit, Pair
from vlmscope.patching import engine, reference
from vlmscope.patching.flows import Rows
from vlmscope.patching.trace import Images, trace
from vlmscope.runs import corrupt
from vlmscope.runs.corrupt import Noise
from vlmscope.runs.forward import forward
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern, Site, expand, place

TEXT = ("resid_pre", "resid", "attn", "cross", "mlp", "attn.h*", "cross.h*", "mlp.n*")
SITES = [
    *(f"vision.*.{kind}@*" for kind in ("resid_pre", "resid", "attn", "mlp", "attn.h*", "output")),
    "vision.*.mlp.n*@image[1,1]",
    "vision.*.resid@image",
    "vision.*.attn.h*@image",
    "vision.*.output@image",
    *(f"{tower}.*.{kind}@*" for tower in ("encoder", "decoder") for kind in TEXT),
    *(f"{tower}.*.{kind}@all" for tower in ("encoder", "decoder") for kind in TEXT),
    "encoder.*.cross.h*@answer",
    *(f"vision.*/3.{kind}@*" for kind in ("resid_pre", "resid", "attn", "mlp", "attn.h*")),
    *(f"{tower}.*/3.{kind}@*" for tower in ("encoder", "decoder") for kind in TEXT),
    *(f"{tower}.*/5.{kind}@all" for tower in ("encoder", "decoder") for kind in TEXT[:5]),
]
SHAPES = {
    "plain": {},
    "one layer": {"layers": 1, "vision_layers": 1},
    "odd heads": {"heads": 3, "width": 15, "vision_heads": 5, "layers": 3},
    "deep vision": {"layers": 1, "vision_layers": 4, "heads": 4},
    "deep text": {"layers": 4, "vision_layers": 1},
}
CORRUPTIONS = {
    "image": "image",
    "text": "text",
    "noise on the image": Noise("multiply", "image", draws=1),
    "added noise": Noise("add", "image", draws=1),
    "factor": Noise("factor", "image"),
    "noise on the text": Noise("multiply", "text", draws=1),
    "added to the text": Noise("add", "text", draws=1),
}


def placed(model: Model, pair: Pair, expressions: list[str]) -> list[Site]:
    sites = expand([Pattern.parse(text) for text in expressions], model.shapes)
    return [found for site in sites for found in place(site, pair.clean.layout)]


def some(model: Model, pair: Pair, expressions: list[str], each: int, seed: str):
    """A few sites of each expression, drawn by a fixed seed: the reference is slow."""
    draw = random.Random(seed)
    found = [placed(model, pair, [text]) for text in expressions]
    return [p for sites in found for p in draw.sample(sites, min(each, len(sites)))]


def both(
    model: Model,
    pair: Pair,
    expressions: list[str],
    direction: str = "denoise",
    each: int = 3,
    seed: str = "",
):
    """(p, ld) of some sites of each expression, by the engine and by the reference."""
    sites = some(model, pair, expressions, each, seed)
    found = []
    for one in (engine, reference):
        table = torch.full((2, len(sites)), torch.nan, dtype=torch.float64)
        patched = one.patch(model, pair, sites, direction)
        for numbers, scores in patched.chunks:
            assert table[:, numbers].isnan().all(), "each site comes once"
            table[0, numbers], table[1, numbers] = scores.p, scores.ld
        base = torch.stack([*patched.clean[:3], *patched.corrupt[:3]])
        found.append((table, base))
    (fast, fast_base), (slow, slow_base) = found
    torch.testing.assert_close(fast_base, slow_base, rtol=1e-12, atol=1e-12)
    return fast, slow


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_engine_equals_reference(shape, corruption, direction):
    """Each time at other sites."""
    model = blip(**SHAPES[shape])
    (pair,) = corrupt.pairs(model, example(), CORRUPTIONS[corruption])
    fast, slow = both(model, pair, SITES, direction, 1, f"{shape} {corruption} {direction}")
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    assert slow.std(dim=1).min() > 1e-6, "patches of a random model differ"


@pytest.mark.parametrize(
    "prompt", ["red or blue", "is the dark dark circle or the dark square red or blue ? ? ?"]
)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_prompts_of_other_lengths(prompt, direction):
    model = blip()
    (pair,) = corrupt.pairs(model, example(prompt), "image")
    fast, slow = both(model, pair, SITES, direction)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def test_answers_that_share_a_beginning():
    """The decoder then reads more than its start token, and is causal."""
    model = blip()
    (pair,) = corrupt.pairs(model, example(answer="unhappy", foil="unly"), "image")
    assert pair.clean.layout["decoder"].tokens == ("[DEC]", "un")
    for direction in ("denoise", "noise"):
        fast, slow = both(model, pair, SITES, direction)
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def test_a_padded_prompt():
    """Masks of attention, within the encoder and from the decoder to it, reach the rows."""
    model = blip()
    (pair,) = corrupt.pairs(model, example(answer="unhappy", foil="unly"), "image")
    clean, other = (
        replace(i, tensors={**i.tensors, "attention_mask": _padded(i)}) for i in (pair.clean, pair.corrupt)
    )
    assert not torch.equal(model.run(clean), model.run(pair.clean)), "the mask matters"
    fast, slow = both(model, replace(pair, clean=clean, corrupt=other), SITES)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def _padded(inputs):
    mask = inputs.tensors["attention_mask"].clone()
    mask[0, -2:] = 0
    return mask


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_sites_that_leave_the_vision_tower_alone(corruption):
    """The vision tower's output may then be shared, but only by the same image."""
    model = blip()
    (pair,) = corrupt.pairs(model, example(), CORRUPTIONS[corruption])
    fast, slow = both(model, pair, ["encoder.*.cross.h*@*", "vision.*.output@*"])
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_image_and_text_corrupt_together(seed):
    model = blip(seed=seed)
    fast, slow = both(model, model.prepare(example()), SITES)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def test_float32_within_its_tolerance():
    """Rounding only: batches of rows and single rows differ by some units in the last place."""
    model = blip(dtype=torch.float32)
    fast, slow = both(model, model.prepare(example()), SITES)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["states", "scenes", "faces"])
def test_engine_equals_reference_on_the_toy(name):
    from vlmscope.data import examples

    model = load("toy-blip", dtype="float64")
    (one,) = examples(name, limit=1)
    for kind in ("image", "text"):
        (pair,) = corrupt.pairs(model, one, kind)
        sites = [
            "encoder.*.attn.h*@answer",
            "encoder.*.cross.h*@noun",
            "encoder.*.resid@*",
            "decoder.*.cross.h*@last",
            "vision.1.attn.h*@image[2,3]",
            "vision.2.resid@image[3,3]",
        ]
        fast, slow = both(model, pair, sites)
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)


def test_small_batches_give_the_same(monkeypatch):
    model = blip()
    pair = model.prepare(example())
    sites = some(model, pair, SITES, 4, "")
    whole = dict(_rows(engine.patch(model, pair, sites)))
    monkeypatch.setattr(engine, "BUDGET", 1)
    single = dict(_rows(engine.patch(model, pair, sites)))
    assert whole.keys() == single.keys() == set(range(len(sites)))
    for number, ld in whole.items():
        assert single[number] == pytest.approx(ld, rel=1e-9, abs=1e-12)


def _rows(patched):
    for numbers, scores in patched.chunks:
        yield from zip(numbers, scores.ld.tolist(), strict=True)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model = blip()
    pair = model.prepare(example())
    sites = placed(model, pair, ["encoder.*.attn.h*@*"])
    expected = dict(_rows(engine.patch(model, pair, sites)))
    tried = lacking_memory(monkeypatch, beyond=5)
    assert dict(_rows(engine.patch(model, pair, sites))) == pytest.approx(expected, rel=1e-9)
    assert tried[0] > 5 and max(tried[-3:]) <= 5


def lacking_memory(monkeypatch, beyond):
    """Let memory be enough for so many rows; the list of how many were tried."""
    tried = []
    honest = Rows.block

    def short(rows, stage):
        tried.append(len(rows.rows))
        if len(rows.rows) > beyond:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(rows, stage)

    monkeypatch.setattr(Rows, "block", short)
    return tried


def test_a_single_row_that_does_not_fit_is_one_line(monkeypatch):
    model = blip()
    pair = model.prepare(example())
    lacking_memory(monkeypatch, beyond=0)
    sites = placed(model, pair, ["encoder.*.attn.h*@*"])
    with pytest.raises(RoomError, match="needs more memory than there is .* take a smaller picture"):
        list(engine.patch(model, pair, sites).chunks)


def test_a_plain_run_that_does_not_fit_is_one_line(monkeypatch):
    model = blip()
    inputs = model.prepare(example()).clean

    def full(**_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(model.hf.text_encoder, "forward", full)
    with pytest.raises(RoomError, match="needs more memory than there is"):
        model.run(inputs)


def test_other_errors_are_not_taken_for_missing_memory(monkeypatch):
    model = blip()
    pair = model.prepare(example())
    sites = placed(model, pair, ["encoder.*.attn.h*@*"])

    def broken(flow, job, tower, rows):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine, "run", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(engine.patch(model, pair, sites).chunks)


def test_clean_into_clean_changes_nothing():
    model = blip(dtype=torch.float32)
    same = model.prepare(replace(example(), corrupt_image=None, corrupt_prompt=None))
    for one in (engine, reference):
        patched = one.patch(model, same, placed(model, same, ["encoder.*.cross.h*@*", "vision.*.resid@*"]))
        for _, scores in patched.chunks:
            assert (scores.ld == patched.clean.ld).all()


@pytest.mark.parametrize(("corruption", "tower"), [("image", "vision"), ("text", "encoder")])
def test_the_whole_first_input_gives_the_clean_logits(corruption, tower):
    model = blip()
    (pair,) = corrupt.pairs(model, example(), corruption)
    for one in (engine, reference):
        patched = one.patch(model, pair, placed(model, pair, [f"{tower}.0.resid_pre@all"]))
        ((_, scores),) = patched.chunks
        torch.testing.assert_close(scores.ld[0], patched.clean.ld, rtol=1e-12, atol=1e-12)
        assert abs(patched.clean.ld - patched.corrupt.ld) > 1e-3


def test_a_patch_that_cannot_reach_the_answer_has_no_effect():
    """The last block's other positions in a causal decoder; a tower the corruption cannot touch."""
    model = blip()
    (pair,) = corrupt.pairs(model, example(answer="unhappy", foil="unly"), "image")
    for one in (engine, reference):
        sites = placed(model, pair, ["decoder.1.cross.h*@0", "decoder.1.resid@0", "encoder.0.attn@*"])
        patched = one.patch(model, pair, sites)
        for _, scores in patched.chunks:
            assert (scores.ld == patched.corrupt.ld).all()


def test_such_patches_need_no_row(monkeypatch):
    model = blip()
    (pair,) = corrupt.pairs(model, example(answer="unhappy", foil="unly"), "image")
    sites = placed(model, pair, ["decoder.1.cross.h*@0", "decoder.1.resid@0", "encoder.0.attn@*"])

    def refuse(flow, job, tower, rows):
        raise AssertionError("nothing is to be computed")

    monkeypatch.setattr(engine, "run", refuse)
    ((numbers, _),) = engine.patch(model, pair, sites).chunks
    assert sorted(numbers) == list(range(len(sites)))


def test_one_image_is_encoded_once(monkeypatch):
    """Over a text pair and all draws of noise, and however many sites there are."""
    model = blip()
    calls = []
    model.hf.vision_model.register_forward_hook(lambda *_: calls.append(1))
    for corruption in ("text", Noise(draws=4)):
        calls.clear()
        images = Images()
        for pair in corrupt.pairs(model, example(), corruption):
            sites = placed(model, pair, ["encoder.*.cross.h*@*", "decoder.*.resid@*"])
            list(engine.patch(model, pair, sites, images=images).chunks)
        assert len(calls) == 1


def ablate(model, pair, sites, values):
    """Values are written into the clean run, with nothing corrupt beside it."""
    return engine.patch(model, replace(pair, corrupt=pair.clean), sites, "noise", values=values)


def test_an_edit_within_the_vision_tower_is_of_its_own_run():
    """It is made anew where the picture is known, and what it gives stands for no other run."""
    model, images = blip(), Images()
    inputs = model.prepare(example()).clean
    (site,) = placed(model, model.prepare(example()), ["vision.0.resid@all"])
    edits = [Edit(site, "scale", 0.0)]
    plain, edited = (forward(model, inputs, some).logits for some in ((), edits))
    assert (plain - edited).abs().max() > 1e-3
    for some, wanted in ((edits, edited), ((), plain), (edits, edited), ((), plain)):
        found = trace(model, inputs, some, (), images, 1)
        torch.testing.assert_close(found.logits, wanted, rtol=1e-12, atol=1e-12)
    assert len(images) == 1


def test_ablate_sets_what_it_is_given():
    """Against plain runs with one edit each, in every tower."""
    model = blip(layers=3, heads=2)
    pair = model.prepare(example())
    expressions = [
        "vision.*.attn.h*@all",
        "encoder.*.cross.h*@answer",
        "encoder.*.attn.h1@*",
        "encoder.1.mlp@*",
        "decoder.*.cross.h*@last",
        "encoder.*.resid@0",
    ]
    sites = placed(model, pair, expressions)
    noise = torch.Generator().manual_seed(0)
    values = []
    for number, site in enumerate(sites):
        width = (
            model.capture(pair.clean, [replace(site, position="0", positions=(0,))]).popitem()[1].shape[-1]
        )
        shape = (len(site.positions), width) if number % 2 else (1, width)
        values.append(torch.randn(shape, generator=noise, dtype=torch.float64))
    patched = ablate(model, pair, sites, values)
    found = torch.full((len(sites),), torch.nan, dtype=torch.float64)
    for numbers, scores in patched.chunks:
        found[numbers] = scores.ld
    wanted = []
    for site, value in zip(sites, values, strict=True):
        logits = model.run(pair.clean, [Edit(site, "set", value)])
        wanted.append(logits[pair.answer] - logits[pair.foil])
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-9, atol=1e-12)
    plain = model.run(pair.clean)
    assert patched.clean.ld == plain[pair.answer] - plain[pair.foil]


@pytest.mark.parametrize("make", [blip, llava])
def test_sites_that_share_places_are_ablated_alone(make):
    """A whole kind and a head of it, a site at overlapping positions, one position in two ways."""
    model = make()
    pair = model.prepare(example())
    reader = "encoder" if "encoder" in model.shapes else "decoder"
    expressions = [f"{reader}.1.attn@{at}" for at in ("all", "4", "last", "text", "answer")]
    expressions += [f"{reader}.1.attn.h1@{at}" for at in ("4", "all")] + [f"{reader}.1.attn.h0@4"]
    expressions += [f"{reader}.*.mlp@2-4", f"{reader}.*.mlp@all", f"{reader}.0.mlp.n3@all"]
    expressions += [f"{reader}.0.mlp.n3@3", f"{reader}.0.resid@-1", f"{reader}.0.resid@last"]
    expressions += ["vision.0.resid@all", "vision.0.resid@image[1,1]", "vision.0.attn.h0@*"]
    if make is llava:
        expressions[-2] = "vision.0.resid@5"
    sites = placed(model, pair, expressions)
    noise = torch.Generator().manual_seed(0)
    values = []
    for site in sites:
        width = (
            model.capture(pair.clean, [replace(site, position="0", positions=(0,))]).popitem()[1].shape[-1]
        )
        values.append(torch.randn(len(site.positions), width, generator=noise, dtype=torch.float64))
    patched = ablate(model, pair, sites, values)
    found = torch.full((len(sites),), torch.nan, dtype=torch.float64)
    for numbers, scores in patched.chunks:
        found[numbers] = scores.ld
    wanted = []
    for site, value in zip(sites, values, strict=True):
        logits = model.run(pair.clean, [Edit(site, "set", value)])
        wanted.append(logits[pair.answer] - logits[pair.foil])
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-9, atol=1e-12)

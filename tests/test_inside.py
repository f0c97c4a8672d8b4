"""What is inside attention and between sublayers, sets of units, sums of sites: by hooks that are not
ours."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from models import blip, example, llava

from vlmscope.models.inputs import Edit
from vlmscope.patching import engine, reference
from vlmscope.runs.forward import capture, forward
from vlmscope.sites import Pattern, Point, expand, place

PLAIN = {"rtol": 1e-9, "atol": 1e-11}


def recorded(model, inputs, module, change=None, before=False):
    """What a module gets first or gives in a plain run, by torch's own hooks; and the logits."""
    found = []

    def pre(m, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        found.append(x.clone())
        if change is not None:
            return (change(x), *args[1:]) if args else args, kwargs
        return None

    def post(m, args, out):
        x = out if isinstance(out, torch.Tensor) else out[0]
        found.append(x.clone())
        if change is not None:
            return change(x) if isinstance(out, torch.Tensor) else (change(x), *out[1:])
        return None

    handle = (
        module.register_forward_pre_hook(pre, with_kwargs=True)
        if before
        else module.register_forward_hook(post)
    )
    logits = []
    top = model.hf.get_submodule(model.family.logits).register_forward_hook(
        lambda m, a, out: logits.append(out.logits)
    )
    with torch.inference_mode():
        model.hf(**inputs.tensors, **model.family.keywords)
    handle.remove()
    top.remove()
    return found[0], logits[0][0, -1]


@pytest.fixture(scope="module")
def decoder():
    model = llava()
    return model, model.prepare(example())


@pytest.mark.parametrize(("part", "unit"), [("q", 1), ("k", 0), ("v", 0)])
def test_queries_keys_and_values_are_those_of_the_projections(decoder, part, unit):
    """A turned vector is turned alike in both runs, so a patch of it is one of what the projection gives."""
    model, pair = decoder
    at, block = 4, model.hf.model.language_model.layers[1].self_attn
    site = f"decoder.1.attn.{part}{unit}@{at}"
    value = capture(model, pair.clean, [site])[site]
    projection = getattr(block, f"{part}_proj")
    clean, _ = recorded(model, pair.clean, projection)
    wide = slice(unit * value.shape[-1], (unit + 1) * value.shape[-1])

    def change(x):
        x = x.clone()
        x[:, at, wide] = clean[:, at, wide]
        return x

    _, wanted = recorded(model, pair.corrupt, projection, change)
    found = model.run(pair.corrupt, [Edit(site, "set", value)])
    torch.testing.assert_close(found, wanted, **PLAIN)
    assert not torch.allclose(found, model.run(pair.corrupt))
    if part == "v":
        torch.testing.assert_close(value, clean[0, [at], wide], rtol=0, atol=0)


def test_an_attention_pattern_that_sees_one_position_gives_its_value(decoder):
    model, pair = decoder
    names = ["decoder.1.attn.p2@6", "decoder.1.attn.v1@3"]
    paid, value = capture(model, pair.clean, names).values()
    torch.testing.assert_close(paid.sum(), torch.ones((), dtype=paid.dtype))
    wanted = model.attention(pair.clean, "decoder", "attn", [6])[1, 2]
    torch.testing.assert_close(paid.float(), wanted)
    only = torch.zeros_like(paid)
    only[0, 3] = 1.0
    head = capture(model, pair.clean, ["decoder.1.attn.h2@6"], [Edit(names[0], "set", only)])
    torch.testing.assert_close(head["decoder.1.attn.h2@6"], value, **PLAIN)


@pytest.mark.parametrize("part", ["q", "k", "v", "p"])
@pytest.mark.parametrize("site", ["vision.0.attn", "encoder.1.attn"])
def test_blip_shows_the_inside_of_its_attention(site, part):
    """One module gives all three in its vision tower, and dropout is what patterns pass."""
    model = blip()
    pair = model.prepare(example())
    tower, layer, _ = site.split(".")
    block = model.blocks(tower)[int(layer)]
    name = f"{site}.{part}1@2"
    value = capture(model, pair.clean, [name])[name]
    attention = block.self_attn if tower == "vision" else block.attention.self
    if part == "p":
        wanted = recorded(model, pair.clean, attention.dropout)[0][0, 1, 2][None]
    elif tower == "vision":
        third = recorded(model, pair.clean, attention.qkv)[0].chunk(3, -1)["qkv".index(part)]
        wanted = third[0, [2]].unflatten(-1, (-1, value.shape[-1]))[:, 1]
    else:
        layers = {"q": attention.query, "k": attention.key, "v": attention.value}
        wanted = recorded(model, pair.clean, layers[part])[0][0, [2]].unflatten(-1, (-1, value.shape[-1]))[
            :, 1
        ]
    torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    changed = model.run(pair.clean, [Edit(name, "scale", 3.0)])
    assert not torch.allclose(changed, model.run(pair.clean))


def test_the_stream_between_attention_and_mlp(decoder):
    """It is what the second norm reads, and what is written there reaches MLP and stream alike."""
    model, pair = decoder
    block = model.hf.model.language_model.layers[1]
    wanted, _ = recorded(model, pair.clean, block.post_attention_layernorm, before=True)
    site = "decoder.1.resid_mid@all"
    found = capture(model, pair.clean, [site])[site]
    torch.testing.assert_close(found, wanted[0], rtol=1e-12, atol=1e-12)
    new = torch.randn(wanted.shape[1:], generator=torch.Generator().manual_seed(0), dtype=wanted.dtype)
    with torch.inference_mode():
        behind = new + block.mlp(block.post_attention_layernorm(new))
    end = "decoder.1.resid@all"
    torch.testing.assert_close(
        capture(model, pair.clean, [end], [Edit(site, "set", new)])[end], behind, **PLAIN
    )


def test_the_stream_between_in_blocks_that_normalise_it():
    model = blip()
    pair = model.prepare(example())
    block = model.blocks("encoder")[1]
    wanted, _ = recorded(model, pair.clean, block.intermediate, before=True)
    site = "encoder.1.resid_mid@all"
    torch.testing.assert_close(capture(model, pair.clean, [site])[site], wanted[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stream_between_is_read_and_written_in_every_family(name):
    """What is written back changes no bit, and what stood there before the MLP made the block's output."""
    model = FAMILIES[name]()
    inputs = model.prepare(example()).clean
    plain = model.run(inputs)
    for tower, shape in model.shapes.items():
        if "resid_mid" not in shape.kinds:  # it normalises the stream before it attends
            continue
        layer = shape.having("resid_mid")[-1]
        sites = [f"{tower}.{layer}.{kind}@all" for kind in ("resid_mid", "mlp", "resid")]
        middle, mlp, end = capture(model, inputs, sites).values()
        assert torch.equal(model.run(inputs, [Edit(sites[0], "set", middle)]), plain)
        if not model.family.towers[tower].normed:
            torch.testing.assert_close(middle + mlp, end, rtol=1e-9, atol=1e-9)
        twice = [Edit(sites[0], "set", torch.full_like(middle, torch.nan))]
        assert model.run(inputs, twice).isnan().any()


SITES = {
    blip: [
        "vision.*.resid_mid@image*",
        "vision.1.attn.q*@3",
        "vision.1.attn.p1@*",
        "encoder.*.resid_mid@*",
        "encoder.*.cross.h[0,1]@*",
        "encoder.1.mlp.n[0,3,5]@all",
        "encoder.*.attn.k*@answer",
        "encoder.0.cross.p*@answer",
        "encoder.0.attn@answer + encoder.1.cross.h1@last",
        "encoder.1.attn@answer + encoder.1.mlp@answer",
        "encoder.0.resid_pre@1 + encoder.0.mlp@3",
        "vision.1.attn@image[1,1] + encoder.1.cross.h0@answer",
        "vision.1.resid@image[1,1] + vision.1.output@all",
        "encoder.0/3.attn.h[0,1]@text + decoder.1.cross@last",
        "decoder.*.resid_mid@last",
    ],
    llava: [
        "decoder.*.resid_mid@*",
        "decoder.*.attn.q*@last",
        "decoder.*.attn.k*@image",
        "decoder.*.attn.v*@answer",
        "decoder.*.attn.p*@readout",
        "decoder.*.attn.h[0,2,3]@*",
        "decoder.0.mlp.n[1,4]@text",
        "decoder.0.attn@answer + decoder.1.mlp.n3@last",
        "decoder.1.attn.h1@answer + decoder.1.resid_mid@last",
        "vision.0.resid@image[1,1] + decoder.0.attn@last",
        "decoder.0.resid@image[1,1] + decoder.2.resid@last",
    ],
}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("make", [blip, llava])
def test_engine_equals_reference_within_attention_and_for_sums(make, direction):
    model = make(layers=3) if make is blip else make()
    pair = model.prepare(example())
    for text in SITES[make]:
        sites = [p for s in expand([Pattern.parse(text)], model.shapes) for p in place(s, pair.clean.layout)]
        tables = []
        for computed in (engine, reference):
            ld = torch.full((len(sites),), torch.nan, dtype=torch.float64)
            for numbers, scores in computed.patch(model, pair, sites, direction).chunks:
                ld[numbers] = scores.ld
            tables.append(ld)
        torch.testing.assert_close(*tables, rtol=1e-9, atol=1e-12, msg=text)


def test_a_sum_of_sites_is_their_edits_in_one_run():
    """Both places, by two edits of one plain run."""
    model = llava()
    pair = model.prepare(example())
    parts = ["decoder.0.attn@answer", "decoder.2.mlp.n3@last"]
    values = capture(model, pair.clean, parts)
    wanted = model.run(pair.corrupt, [Edit(site, "set", value) for site, value in values.items()])
    (site,) = expand([Pattern.parse(" + ".join(parts))], model.shapes)
    ((_, scores),) = engine.patch(model, pair, place(site, pair.clean.layout)).chunks
    assert scores.ld.item() == pytest.approx(float(wanted[pair.answer] - wanted[pair.foil]), rel=1e-9)


def test_gradients_are_those_of_small_changes():
    """In a model that computes with all digits; a kept activation is one of the graph's."""
    model = blip()
    pair = model.prepare(example())
    points = [Point("encoder", 1, "cross", "h"), Point("encoder", 0, "resid"), Point("vision", 1, "attn")]
    run = forward(model, pair.clean, keep=points, grad=True)
    gradients = torch.autograd.grad(run.logits[-1, pair.answer], [run.values[point] for point in points])
    for site, gradient in zip(
        ("encoder.1.cross@2", "encoder.0.resid@3", "vision.1.attn@4"), gradients, strict=True
    ):
        site = site.replace("cross", "cross.h1")
        value = capture(model, pair.clean, [site])[site]
        step = torch.zeros_like(value)
        step[0, 1] = 1e-5
        up, down = (model.run(pair.clean, [Edit(site, "add", sign * step)])[pair.answer] for sign in (1, -1))
        at = int(site.partition("@")[2])
        column = 1 + value.shape[-1] * ("h1" in site)
        torch.testing.assert_close(gradient[0, at, column], (up - down) / 2e-5, rtol=1e-6, atol=1e-9)


def test_logits_at_several_positions(decoder):
    model, pair = decoder
    whole = forward(model, pair.clean, positions=None).logits
    assert len(whole) == len(pair.clean.layout["decoder"].tokens)
    torch.testing.assert_close(forward(model, pair.clean, positions=3).logits, whole[-3:], **PLAIN)


def test_an_edge_is_not_read(decoder):
    model, pair = decoder
    from vlmscope.errors import SiteError

    with pytest.raises(SiteError, match="'decoder.1.attn@last<image': an edge, which is cut and not read"):
        model.capture(pair.clean, "decoder.1.attn@last<image")


def test_what_is_kept_within_attention_is_what_was_edited(decoder):
    """Whatever is edited first: a pattern is that of the edited query, and an edited pattern is kept."""
    model, pair = decoder
    pattern, query = "decoder.1.attn.p2@6", "decoder.1.attn.q2@6"
    found = capture(model, pair.clean, [pattern], [Edit(pattern, "scale", 0.5)])[pattern]
    torch.testing.assert_close(found, capture(model, pair.clean, [pattern])[pattern] / 2, **PLAIN)
    flat = capture(model, pair.clean, [pattern], [Edit(query, "scale", 0.0)])[pattern]
    torch.testing.assert_close(flat[0, :7], torch.full((7,), 1 / 7, dtype=flat.dtype), **PLAIN)

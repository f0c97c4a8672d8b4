"""Attention functions that are not transformers' own, and threads: what is put in is taken out again."""

from __future__ import annotations

import copy
import sys
import threading
from functools import cache

import pytest
import torch
from families import gemma3, llava_next, paligemma2
from models import blip, example, llava
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmscope.errors import ModelError, VlmscopeError
from vlmscope.models.inputs import Edit
from vlmscope.patching import engine, reference
from vlmscope.runs import corrupt
from vlmscope.runs.forward import editing, forward
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern, expand, place


def placed(model, pair, expressions):
    sites = expand([Pattern.parse(text) for text in expressions], model.shapes)
    return [found for site in sites for found in place(site, pair.clean.layout)]


def answers(patched):
    """The logit differences of all patches, by number."""
    found = {n: x for numbers, s in patched.chunks for n, x in zip(numbers, s.ld, strict=True)}
    return torch.stack([found[n] for n in sorted(found)])


# -- kernels that read their masks in another way --------------------------------------------------


def repeated(module, x):
    return x.repeat_interleave(getattr(module, "num_key_value_groups", 1), 1)


def windowed(module, q, k, v, mask, *, scaling, sliding_window=None, softcap=None, **kw):
    """Like a flash kernel: no mask, but what comes later is left out where the module is causal, and what
    is outside a window, on both sides."""
    assert mask is None
    scores = q @ repeated(module, k).mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if sliding_window is not None:
        seen = seen.tril(sliding_window - 1).triu(1 - sliding_window)
    if module.is_causal:
        seen = seen.tril()
    paid = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (paid @ repeated(module, v)).transpose(1, 2), None


@pytest.fixture
def kernel():
    """Registers attention functions under a name, some with a function that makes their masks."""
    names = []

    def register(name, function, masks=None):
        names.append(name)
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        if masks is not None:
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, masks)
        return name

    yield register
    for known in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        for name in names:
            known._global_mapping.pop(name, None)


@pytest.mark.parametrize("make", [gemma3, paligemma2, llava_next])
def test_a_window_that_is_given_by_keyword(make, kernel):
    """The engine equals the reference, and attention maps have nothing outside the window."""
    model = make()
    model.hf.set_attn_implementation(kernel("windowed", windowed))
    (pair,) = corrupt.pairs(model, example(), "image")
    kinds = ("resid_pre@*", "attn@*", "attn.h*@image", "mlp@text")
    sites = placed(model, pair, [f"decoder.*.{kind}" for kind in kinds])
    fast, slow = (answers(one.patch(model, pair, sites)) for one in (engine, reference))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11)
    many = len(pair.clean.layout["decoder"].tokens)
    paid = model.attention(pair.clean, "decoder", "attn", range(many))
    text = model.hf.config.get_text_config()
    types = getattr(text, "layer_types", None) or ["full_attention"] * len(paid)
    causal = not getattr(text, "use_bidirectional_attention", False)
    behind = torch.arange(many)[:, None] - torch.arange(many)
    for layer, rows in zip(types, paid, strict=True):
        window = text.sliding_window if layer == "sliding_attention" else many
        seen = (behind.abs() < window) & ((behind >= 0) | (not causal))
        assert many > 8 and torch.equal(rows > 0, seen.expand(4, -1, -1))
    assert model.hf.config.text_config._attn_implementation == "windowed"


class Blocks:
    """A mask that only its kernel can read."""

    shape = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("made", "form"),
    [
        (lambda q_length, kv_length, **_: torch.ones(1, kv_length), "one of 2 dimensions"),
        (lambda **_: Blocks(), "a Blocks"),
    ],
)
def test_masks_of_a_form_that_is_not_known(made, form, kernel):
    def plain(module, q, k, v, mask, **kw):
        return windowed(module, q, k, v, None, **kw)

    model = llava()
    (pair,) = corrupt.pairs(model, example(), "image")
    model.hf.set_attn_implementation(kernel("blocks", plain, made))
    sites = placed(model, pair, ["decoder.0.resid@*"])
    assert len(answers(reference.patch(model, pair, sites))) == len(sites), "the model runs"
    message = f"'blocks' of LlamaAttention has {form} as its mask.*expected none.*'sdpa' and 'eager'"
    with pytest.raises(ModelError, match=message):
        engine.patch(model, pair, sites)
    with pytest.raises(ModelError, match=message):
        model.attention(pair.clean, "decoder", "attn", [0])
    assert model.hf.config.text_config._attn_implementation == "blocks"


def test_masks_that_add_to_the_scores(kernel):
    def slope(q_length, kv_length, **_):
        far = torch.arange(kv_length) - torch.arange(q_length)[:, None]
        return far.double().masked_fill(far > 0, -torch.inf)[None, None]

    def plain(module, q, k, v, mask, *, scaling, **kw):
        paid = (q @ repeated(module, k).mT * scaling + mask).softmax(-1)
        return (paid @ repeated(module, v)).transpose(1, 2), paid

    def both(q_length, kv_length, **more):
        one = slope(q_length, kv_length)
        return torch.cat([one, one, one, one], 1)

    model = llava()
    (pair,) = corrupt.pairs(model, example(), "image")
    for masks in (slope, both):
        model.hf.model.language_model.set_attn_implementation(kernel("slope", plain, masks))
        with pytest.raises(ModelError, match="'slope' of LlamaAttention has a mask that differs by"):
            engine.patch(model, pair, placed(model, pair, ["decoder.0.resid@*"]))


# -- what is put in is taken out ---------------------------------------------------------------------


def state(model):
    """All that runs may leave behind: names, configs, hooks, modes."""
    known = [set(x._global_mapping) for x in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    modules = list(model.hf.modules())
    configs = [getattr(m, "config", None) for m in modules]
    names = [getattr(c, "_attn_implementation", None) for c in configs]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    return known, list(map(id, configs)), names, hooks, [m.training for m in modules]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_everything_is_put_back(implementation):
    """Behind runs and behind exceptions within them; the user's own attention stays what it was."""
    model = llava()
    model.hf.set_attn_implementation(implementation)
    (pair,) = corrupt.pairs(model, example(), "image")
    sites = placed(model, pair, ["decoder.*.attn@*"])
    model.run(pair.clean)  # transformers' own hooks stay from the first run on
    before = state(model)
    list(engine.patch(model, pair, sites).chunks)
    model.attention(pair.clean, "decoder", "attn", [0])
    model.attention(pair.clean, "vision", "attn", [0])
    assert state(model) == before

    def fail(*_, **__):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), model.attending("decoder", fail):
        model.run(pair.clean)
    assert state(model) == before
    edit = Edit(Pattern.parse("decoder.0.attn@all"), "set", torch.zeros(3, 3))
    with pytest.raises(VlmscopeError, match=r"has the shape \(3, 3\)"):
        model.run(pair.clean, [edit])
    wrong = pytest.raises(VlmscopeError, match=r"has the shape \(3, 3\)")
    with wrong, editing(model, pair.clean, [edit]):
        model.answer(pair.clean)
    assert state(model) == before


def test_attention_functions_within_each_other():
    """The inner one's plain function is the outer one."""
    model, calls = llava(), []
    inputs = model.prepare(example()).clean
    before, plain = state(model), model.run(inputs)

    def note(name):
        def attend(plain, module, *args, **kw):
            calls.append(name)
            return plain(module, *args, **kw)

        return attend

    with model.attending("decoder", note("outer")):
        with model.attending("decoder", note("inner")), model.attending("vision", note("vision")):
            assert torch.equal(model.run(inputs), plain)
        assert calls == ["vision"] * 2 + ["inner", "outer"] * 3
        model.run(inputs)
    assert calls[-3:] == ["outer"] * 3
    assert state(model)[1:3] == before[1:3] and state(model)[0] == before[0]


# -- threads -----------------------------------------------------------------------------------------


@cache
def pairs(model):
    every = zip([example(), example("red or blue ?")], ("image", "text"), strict=True)
    return [corrupt.pairs(model, one, kind)[0] for one, kind in every]


def sweeps(model, times=1):
    """All that runs a model, over and over: sweeps, attention, captures; and what it says."""
    found = []
    reader = "encoder" if "encoder" in model.shapes else "decoder"
    expressions = [f"{reader}.*.{site}" for site in ("resid@4", "attn@last", "attn.h*@0", "mlp@all")]
    edit = Edit(Pattern.parse(f"{reader}.0.resid@all"), "scale", 0.5)
    for _ in range(times):
        for pair in pairs(model):
            sites = placed(model, pair, [*expressions, "vision.1.attn@all"])
            found.append(answers(engine.patch(model, pair, sites)))
            found.append(answers(reference.patch(model, pair, sites[:2])))
            found.append(model.attention(pair.clean, reader, "attn", [0, 1]).double())
            found += model.capture(pair.clean, [f"{reader}.1.resid@1"], [edit]).values()
        said = model.answer(pairs(model)[0].clean, [edit])
        found.append(torch.tensor([float(ord(c)) for c in said], dtype=torch.float64))
    return found


def at_once(tasks):
    """The results of some functions, each in a thread of its own; raises what one of them raises."""
    results, errors = {}, []
    ready = threading.Barrier(len(tasks))

    def work(number, task):
        ready.wait()
        try:
            results[number] = task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=one) for one in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[n] for n in range(len(tasks))]


def same_config():
    """Two models that were made with one config object."""
    one, other = llava(), llava(seed=1)
    other.hf.config = one.hf.config
    for mine, theirs in zip(one.hf.modules(), other.hf.modules(), strict=True):
        if hasattr(mine, "config"):
            theirs.config = mine.config
    return [one, other]


@pytest.fixture
def often():
    """Threads change places a hundred times more often than by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [llava(), llava(seed=1)],
        lambda: [llava(), gemma3()],
        lambda: [paligemma2(), blip()],
        same_config,
        lambda: [llava()] * 2,
        lambda: [gemma3()] * 3,
        lambda: [blip()] * 2,
    ],
    ids=["one class", "two classes", "two families", "one config", "one model", "one in three", "blip"],
)
def test_threads(make, often):
    """Two models, or one, in several threads: bit for bit what one thread gives, and all put back."""
    models = make()
    alone = [sweeps(model) for model in models]
    before = [state(model) for model in models]
    found = at_once([lambda model=model: sweeps(model, 2) for model in models])
    for mine, wanted in zip(found, alone, strict=True):
        assert len(mine) == 2 * len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted * 2, strict=True))
    assert [state(model) for model in models] == before


def test_models_of_one_hugging_face_model_take_turns():
    one = llava()
    other = Model(one.hf, one.processor)
    (pair,) = corrupt.pairs(one, example(), "image")
    edit = Edit(Pattern.parse("decoder.0.resid@all"), "scale", 0.0)
    plain = one.run(pair.clean)
    inside, leave = threading.Event(), threading.Event()
    results = []

    def hold():
        with editing(one, pair.clean, [edit]):
            inside.set()
            leave.wait(10)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    assert inside.wait(10)
    threads.append(threading.Thread(target=lambda: results.append(other.run(pair.clean))))
    threads[1].start()
    threads[1].join(0.2)
    assert not results, "it waits while another thread edits the model"
    leave.set()
    for thread in threads:
        thread.join()
    assert torch.equal(results[0], plain)


def test_a_sweep_that_is_left_half_done_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(engine, "BUDGET", 1)
    model = llava()
    (pair,) = corrupt.pairs(model, example(), "image")
    chunks = engine.patch(model, pair, placed(model, pair, ["vision.*.attn@*"])).chunks
    next(chunks)
    (logits,) = at_once([lambda: model.run(pair.clean)])
    assert torch.equal(logits, model.run(pair.clean))
    next(chunks)


# -- training ----------------------------------------------------------------------------------------


def dropping():
    """A model whose attention drops half of its weights in training."""
    model = llava()
    model.hf = copy.deepcopy(model.hf)
    for module in model.hf.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    return model


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_a_model_in_training_mode(part):
    """It is run as it is in evaluation mode, says so once, and is left in training mode."""
    model = dropping()
    (pair,) = corrupt.pairs(model, example(), "image")
    sites = placed(model, pair, ["decoder.*.resid@*", "vision.*.attn@all"])

    def everything():
        return [
            model.run(pair.clean),
            answers(engine.patch(model, pair, sites)),
            answers(reference.patch(model, pair, sites[:2])),
            model.attention(pair.clean, "decoder", "attn", [3]),
            forward(model, pair.clean, positions=None).logits,
            torch.tensor([ord(c) for c in model.answer(pair.clean)]),
        ]

    wanted = everything()
    trained = model.hf if part == "model" else model.hf.model.language_model
    trained.train()
    before = state(model)
    with torch.no_grad():
        drawn = [model.hf(**pair.clean.tensors).logits for _ in range(2)]
    assert not torch.equal(*drawn), "dropout makes a plain forward random"
    with pytest.warns(UserWarning, match="tiny-llava is in training mode.* in evaluation mode"):
        found = everything()
    again = everything()  # without a warning, which would be an error
    for one in (found, again):
        assert all(torch.equal(a, b) for a, b in zip(one, wanted, strict=True))
    assert state(model) == before and trained.training

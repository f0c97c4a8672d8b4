"""Loading: folders of save_pretrained, toys, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
from models import blip, example, llava
from transformers import BlipForImageTextRetrieval, LlavaForConditionalGeneration

from vlmscope.checkpoint import load, toys
from vlmscope.errors import ModelError
from vlmscope.models.families import MODULES, families
from vlmscope.patching import engine, reference
from vlmscope.patching.gradients import estimate
from vlmscope.runs import corrupt
from vlmscope.runs.model import Model
from vlmscope.sites import Pattern, expand, place


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder written by `save_pretrained`, of model and processor."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = blip(dtype=torch.float32)
    model.hf.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_saved_folder_gives_the_same_model(saved):
    model, again = blip(dtype=torch.float32), load(saved)
    assert model.fingerprint() == again.fingerprint()
    # Weights that lie elsewhere in memory may be multiplied in another order.
    torch.testing.assert_close(
        model.run(model.prepare(example()).clean),
        again.run(again.prepare(example()).clean),
        rtol=1e-4,
        atol=1e-5,
    )
    assert again.name == str(saved)


def test_dtypes(saved):
    for name, dtype in {"float64": torch.float64, "bfloat16": torch.bfloat16}.items():
        model = load(saved, dtype=name)
        assert model.dtype == dtype
        assert model.run(model.prepare(example()).clean).dtype == dtype


def test_the_fingerprint_is_of_the_weights(saved):
    model = load(saved)
    before = model.fingerprint()
    with torch.no_grad():
        model.hf.text_encoder.embeddings.word_embeddings.weight[3, 2] += 1
    assert model.fingerprint() != before


def test_the_toy_is_built_in():
    assert "toy-blip" in toys()
    assert load("toy-blip").name == "toy-blip"


def test_a_model_that_is_not_there():
    with pytest.raises(ModelError, match=r"no model './nowhere'.*toy-blip"):
        load("./nowhere")


def test_no_network():
    with pytest.raises(ModelError, match="cannot load nobody/nothing: .*network or a copy in the local"):
        load("nobody/nothing")


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ModelError, match=r"config.json: no such file; expected a folder written by"):
        load(tmp_path)


def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights; expected a model.safetensors"):
        load(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="as pickle only.*save_pretrained"):
        load(copy)


def test_an_unsupported_family(copy):
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = [BlipForImageTextRetrieval.__name__]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"is a BlipForImageTextRetrieval.*supported: BLIP-VQA \(BlipForQuestion"
    ):
        load(copy)


def test_truncated_weights(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot load .*copy"):
        load(copy)


def test_missing_weights(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["text_encoder.encoder.layer.0.attention.self.query.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*'text_encoder.encoder.layer.0"):
        load(copy)


def test_a_folder_without_a_processor(copy):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(copy)


def test_a_broken_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged, not JSON"):
        load(copy)


def test_a_flag_that_is_no_flag(copy):
    """An empty object is false to transformers: the picture would not be normalised, without a word."""
    config = json.loads((copy / "processor_config.json").read_text())
    config["image_processor"]["do_normalize"] = {}
    (copy / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"'do_normalize' is '\{\}'; expected true or false"):
        load(copy)


@pytest.mark.parametrize("value", [-1, 0, 255, "x", None])
def test_a_factor_that_turns_colours_round(copy, value):
    config = json.loads((copy / "processor_config.json").read_text())
    config["image_processor"]["rescale_factor"] = value
    (copy / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"'rescale_factor' is .*; expected above 0, 1 at most"):
        load(copy)


def test_a_class_of_a_long_name(copy):
    config = json.loads((copy / "config.json").read_text()) | {"architectures": ["x" * 1000]}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is a x{20,40} … x+, which is not supported; docs/add-a-family.md"):
        load(copy)


def test_an_answer_that_never_ends(copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": null}')
    with pytest.raises(ModelError, match="'eos_token_id' is 'None'; expected the token that ends an answer"):
        load(copy)


def test_a_flag_that_is_null(copy):
    file = copy / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["do_convert_rgb"] = None
    file.write_text(json.dumps(config))
    load(copy)
    config["image_processor"]["do_normalize"] = None
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'do_normalize' is 'None'; expected true or false"):
        load(copy)


@pytest.mark.parametrize("value", [[0.5, -1, 0.5], [0.5, True, 0.5], [], "x", 128])
def test_a_mean_of_pictures_that_is_none(copy, value):
    file = copy / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["image_mean"] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'image_mean' is .*; expected shares of the full brightness"):
        load(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("image_std", [0.5, 0, 0.5]), ("image_std", 0), ("rescale_factor", True)]
)
def test_a_factor_of_pictures_that_is_none(copy, key, value):
    file = copy / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"][key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"'{key}' is .*; expected .*above 0"):
        load(copy)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sep_token_id", 0, "ends an answer with sep_token_id 0, the tokenizer with 3; save"),
        ("sep_token_id", None, "ends an answer with sep_token_id None, the tokenizer with 3; save"),
        ("eos_token_id", True, "'eos_token_id' is 'True'; expected a whole number"),
        ("bos_token_id", 0, "begins an answer with bos_token_id 0, which is padding; save"),
    ],
)
def test_an_answer_with_other_ends(copy, key, value, words):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"][key] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        load(copy)


@pytest.fixture
def toy(tmp_path):
    return shutil.copytree(toys()["toy-llava"], tmp_path / "llava")


@pytest.mark.parametrize("end", [-1, 10**9, [1], 0])
def test_an_end_of_answers_that_ends_nothing(toy, end):
    """Padding, an unknown word, or a token that there is not: the model would speak on and on."""
    (toy / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(
        ModelError, match=r"eos_token_id .* which ends nothing for the tokenizer \(its own end is 3\)"
    ):
        load(toy)


def test_one_of_several_ends(toy):
    (toy / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    load(toy)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rope_theta", 1.5, "at least 10"),
        ("rope_theta", True, "at least 10"),
        ("max_position_embeddings", 0, "at least 1"),
    ],
)
def test_positions_that_are_none(toy, key, value, words):
    config = json.loads((toy / "config.json").read_text())
    (config["text_config"]["rope_parameters"] if key == "rope_theta" else config["text_config"])[key] = value
    (toy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"'{key}' is '{value}'; expected .*{words}"):
        load(toy)


def test_a_mean_of_one_colour(toy):
    file = toy / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["image_mean"] = [0, 0.5, 0.5]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="'image_mean' is .*; expected 0 of all colours or of none"):
        load(toy)


def test_a_tokenizer_without_tokens(copy):
    made = json.loads((copy / "tokenizer.json").read_text())
    made["model"]["vocab"] = None
    (copy / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(ModelError, match="'vocab' is 'None'; expected the tokens"):
        load(copy)


def test_whole_words_that_nothing_parts(toy):
    made = json.loads((toy / "tokenizer.json").read_text()) | {"pre_tokenizer": None}
    (toy / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(
        ModelError, match="knows whole words, and has no pre_tokenizer that parts them; expected"
    ):
        load(toy)


@pytest.mark.parametrize("nested", [False, True])
def test_a_start_that_the_tokenizer_does_not_know(toy, nested):
    """The tokenizers library panics over it, which is no Exception."""
    made = json.loads((toy / "tokenizer.json").read_text())
    made["post_processor"]["single"][0]["SpecialToken"]["id"] = "\x1b[31mred"
    if nested:
        made["post_processor"] = {"type": "Sequence", "processors": [made["post_processor"]]}
    (toy / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(
        ModelError, match=r"post_processor adds '\\x1b\[31mred', which is none of its special_tokens"
    ):
        load(toy)


def test_a_norm_that_leaves_nothing(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["layer_norm_eps"] = 1.5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"'layer_norm_eps' is '1.5'; expected above 0 and below 0.1"):
        load(copy)


@pytest.mark.parametrize(
    "odd",
    [{"text_config": -1}, {"architectures": [{}]}, {"architectures": 1}, {"text_config": {"model_type": []}}],
)
def test_classes_that_are_none(copy, odd):
    config = json.loads((copy / "config.json").read_text()) | odd
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="copy"):
        load(copy)


def test_a_token_that_is_no_number(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 1.5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"'eos_token_id' is '1.5'; expected a whole number"):
        load(copy)


def test_weights_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"weights have another shape than config.json says, the first is"):
        load(copy)


def test_a_folder_without_a_tokenizer(copy):
    for name in ("tokenizer.json", "vocab.txt"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(copy)


def test_more_layers_than_any_model_has(copy):
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 10**9
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"num_hidden_layers '1000000000'; expected 0 to 1,000 layers"):
        load(copy)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for", "fails .TemplateSyntaxError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails .RecursionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails .SecurityError"),
    ],
)
def test_a_chat_template_that_breaks_or_never_ends(tmp_path, template, why):
    folder = shutil.copytree(toys()["toy-llava"], tmp_path / "copy")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=f"chat template .*{why}"):
        load(folder)


def test_a_pipe_in_a_model_folder_is_not_waited_for(copy):
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    with pytest.raises(ModelError, match="a device or a pipe; expected"):
        load(copy)


def test_unknown_dtype_and_device(saved):
    with pytest.raises(ModelError, match="unknown dtype 'float8'; expected one of float64"):
        load(saved, dtype="float8")
    with pytest.raises(ModelError, match="no device 'tpu9'"):
        load(saved, device="tpu9")


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A LLaVA whose matrices are large enough to be quantized on a CPU."""
    small = llava(width=64, dtype=torch.float32)
    config = small.hf.config
    config.text_config.intermediate_size = config.vision_config.intermediate_size = 128
    config.vision_config.hidden_size = config.text_config.vocab_size = 64
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("larger")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    small.processor.save_pretrained(folder)
    return folder


def compare(model, close):
    """The engine's answers and the reference's; returns the latter."""
    pair = corrupt.pairs(model, example(), "image")[0]
    texts = ["decoder.*.attn.h*@last", "decoder.*.resid@text*", "vision.1.resid@*", "decoder.*.mlp@3"]
    found = expand([Pattern.parse(text) for text in texts], model.shapes)
    sites = [p for s in found for p in place(s, pair.clean.layout)]
    results = []
    for one in (engine, reference):
        table = torch.full((len(sites),), torch.nan, dtype=torch.float64)
        for numbers, scores in one.patch(model, pair, sites).chunks:
            table[numbers] = scores.ld.double().cpu()
        results.append(table)
    torch.testing.assert_close(*results, rtol=close, atol=close)
    assert results[1].std() > 4 * close
    return results[1]


def test_weights_of_four_bits(larger, monkeypatch):
    model = load(larger, dtype="4bit", device="cpu")
    assert "Linear4bit" in str(model.hf.model.language_model.layers[0].mlp.down_proj)
    assert model.precision == "4bit"
    # Both ways round to bfloat16 after each layer, in another order.
    compare(model, 0.15)
    pair = corrupt.pairs(model, example(), "image")[0]
    with pytest.raises(ModelError, match="no gradients go through weights of 4 bits on a CPU; take a GPU"):
        estimate(model, pair, "decoder.*.mlp.n*@last")


def test_weights_of_four_bits_that_cannot_be_had(larger, monkeypatch):
    monkeypatch.setattr("vlmscope.checkpoint._weights", None)  # nothing is loaded before it is said
    with pytest.raises(ModelError, match=r"96 inputs, and a CPU .* a multiple of 64; take a GPU, or"):
        load("toy-llava", dtype="4bit", device="cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"4bit needs bitsandbytes.*pip install 'vlmscope\[4bit\]'"):
        load(larger, dtype="4bit")


@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 0.15), ("float16", 0.02), ("float32", 1e-5)])
def test_the_engine_in_other_precisions(larger, dtype, close):
    compare(load(larger, dtype=dtype, device="cpu"), close)


def test_a_model_spread_over_devices(larger):
    """accelerate moves what each module gets to where its weights are: here, from the CPU to itself."""
    from accelerate import dispatch_model

    wanted = compare(load(larger, device="cpu"), 1e-4)
    model = load(larger, device="auto")
    dispatch_model(model.hf, {"": "cpu"}, force_hooks=True)
    assert hasattr(model.hf.model.language_model.layers[0].mlp.down_proj, "_hf_hook")
    torch.testing.assert_close(compare(model, 1e-4), wanted, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_fit(larger, monkeypatch):
    monkeypatch.setattr("vlmscope.checkpoint.free_memory", lambda device: 100_000)
    with pytest.raises(ModelError, match=r"billion weights, .* GB in float32, and 0.0 GB are free on cpu"):
        load(larger, device="cpu")


@pytest.mark.gpu
def test_on_a_gpu(saved):
    model, gpu = load(saved, device="cpu"), load(saved, device="cuda")
    logits = gpu.run(gpu.prepare(example()).clean).cpu()
    torch.testing.assert_close(logits, model.run(model.prepare(example()).clean), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_over_all_gpus(larger):
    wanted = compare(load(larger, device="cpu"), 1e-4)
    torch.testing.assert_close(compare(load(larger, device="auto"), 1e-2), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.checkpoint
def test_the_published_checkpoint():
    model = load("Salesforce/blip-vqa-base")
    assert {tower: shape.layers for tower, shape in model.shapes.items()} == {
        "vision": 12,
        "encoder": 12,
        "decoder": 12,
    }
    assert model.shapes["encoder"].heads == {"attn": 12, "cross": 12}
    assert len(model.layouts()["vision"].cells) == 24 * 24


def test_what_a_model_is_made_of_is_verified_once(monkeypatch, tmp_path):
    """On one machine, by this code; the weights are looked at each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    honest = Model.verify

    def verify(model, fits=False):
        calls.append(fits)
        honest(model, fits)

    monkeypatch.setattr(Model, "verify", verify)
    load("toy-blip")
    load("toy-blip")
    load("toy-llava")
    assert calls == [False, True, False]
    broken = load("toy-blip")
    broken.hf.text_decoder.cls.predictions.decoder.bias.data.fill_(torch.nan)
    broken.save(tmp_path / "broken")
    with pytest.raises(ModelError, match="a run without edits gives NaN"):
        load(tmp_path / "broken")


def test_each_family_is_in_the_file_that_its_class_names():
    """So that the code of the others need not be imported."""
    assert {family.architecture for family in families()} == set(MODULES)
    for architecture in MODULES:
        assert architecture in {family.architecture for family in families([architecture])}

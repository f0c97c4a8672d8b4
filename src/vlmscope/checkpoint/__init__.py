"""From a checkpoint to a verified model; words to tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import BitsAndBytesConfig

from vlmscope import models, runs
from vlmscope.checkpoint.folder import check_folder, config_of, device_of, kind_of, one_line, place_of
from vlmscope.checkpoint.folder import toys as toys
from vlmscope.errors import ModelError, line, shown
from vlmscope.models.dtypes import DTYPES, QUANTIZED
from vlmscope.models.families import family_of
from vlmscope.models.towers import Family
from vlmscope.runs import forward
from vlmscope.runs.model import Model
from vlmscope.runs.network import free_memory

BLOCK = 64
"""How many weights of `4bit` have a factor in common."""


def load(name: str | Path, *, dtype: str | torch.dtype = "float32", device: str | None = None) -> Model:
    """Load a model and its processor, and check that it fits its family's table.

    `name` is a built-in toy's name, a folder written by `save_pretrained` (of the model and of the
    processor), or a Hugging Face id; only the last may use the network. Weights are read from
    safetensors only, and no code that comes with a checkpoint is run. `device` is the GPU where
    there is one, by default; `auto` spreads the model over all GPUs (with accelerate). `dtype` is one
    of `DTYPES`: `4bit` is for quantized weights (with bitsandbytes: `pip install vlmscope[4bit]`).

    Raises `ModelError` in one line if that cannot be done.

    >>> model = load("toy-blip")
    >>> model.shapes["encoder"].heads
    {'attn': 4, 'cross': 4}
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {shown(dtype)}; expected one of {', '.join(DTYPES)}")
    spread = device == "auto"
    place = device_of(None if spread else device)
    for package in ["accelerate"] * spread + ["accelerate", "bitsandbytes"] * (dtype == QUANTIZED):
        try:
            import_module(package)
        except Exception as error:  # one that does not fit the machine raises errors of its own
            raise ModelError(
                f"{'--device auto' if spread else dtype} needs {package}, which cannot be imported "
                f"({line(str(error), 100)}); pip install 'vlmscope[4bit]' brings both"
            ) from error
    path = place_of(name)
    family = family_of(*kind_of(config_of(path)), str(name))
    if family.model is None:
        raise _own_code(family, name)
    if Path(path).is_dir():
        check_folder(Path(path))
    with one_line(name):
        if not (spread and place.type == "cuda"):
            _check_memory(family, path, dtype, place)
        hf = _weights(family, path, str(name), dtype, place, spread)
        processor = family.processor.from_pretrained(path, trust_remote_code=False)
        _check_ends(hf, processor, name)
        model = Model(hf, processor, str(name))
        _verify_once(model)
        # Whether processor and generation work: both have files of their own that nothing else has read.
        forward.generate(model, model.inputs(Image.new("RGB", (64, 64)), "a"), most=1)
    return model


def _weights(
    family: Family, path: str | Path, name: str, dtype: str, place: torch.device, spread: bool
) -> Any:
    """The Hugging Face model of a checkpoint, where it is to run."""
    made: Any = family.model
    where: dict[str, Any] = {"device_map": "auto"} if spread else {}
    if dtype == QUANTIZED:
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        where = {"device_map": {"": place}, **where, "quantization_config": how}
    hf, info = made.from_pretrained(
        path,
        dtype=torch.bfloat16 if dtype == QUANTIZED else getattr(torch, dtype),
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, in one line
        trust_remote_code=False,
        **where,
    )
    if other := sorted(info["mismatched_keys"]):
        key, there, here = other[0]
        raise ModelError(
            f"{name}: {len(other)} weights have another shape than config.json says, the first is '{key}' "
            f"({list(there)}, expected {list(here)}); save the whole model with save_pretrained"
        )
    if lost := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name}: {len(lost)} weights are missing from the checkpoint, the first is "
            f"'{lost[0]}'; save the whole model with save_pretrained"
        )
    elsewhere = {str(d) for d in getattr(hf, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if elsewhere and place.type == "cuda":
        raise ModelError(
            f"{name} does not fit into the memory of the GPUs in {dtype}: part of it would "
            "be fetched again for every patch; load it in bfloat16 or 4bit"
        )
    return hf if where else hf.to(place)


def _check_ends(hf: Any, processor: Any, name: str | Path) -> None:
    """BLIP begins and ends an answer where its text config says; options are tokenized with the tokenizer's
    ends. Others end one where their generation config says."""
    config, tokenizer = hf.config.get_text_config(), processor.tokenizer
    if not hasattr(config, "sep_token_id"):
        ends, own = hf.generation_config.eos_token_id, tokenizer.eos_token_id
        # No word, or one that ends nothing; unless the tokenizer itself ends texts with it.
        no_ends = {tokenizer.pad_token_id, tokenizer.unk_token_id} - {own}
        listed = ends if isinstance(ends, list) else [ends]
        if ends is not None and not any(0 <= one < len(tokenizer) and one not in no_ends for one in listed):
            raise ModelError(
                f"{name}: generation_config.json ends an answer with eos_token_id {shown(ends)}, which ends "
                f"nothing for the tokenizer (its own end is {own}); save both of one checkpoint there"
            )
        return
    for key, does in (("bos_token_id", "begins"), ("sep_token_id", "ends")):
        there, here = getattr(config, key), getattr(tokenizer, key, None)
        if here is not None and here != there:
            raise ModelError(
                f"{name}: config.json {does} an answer with {key} {there}, the tokenizer with {here}; save "
                "model and processor of one checkpoint there"
            )
    if config.bos_token_id == tokenizer.pad_token_id:
        raise ModelError(
            f"{name}: config.json begins an answer with bos_token_id {config.bos_token_id}, which is "
            "padding; save model and processor of one checkpoint there"
        )


def _verify_once(model: Model) -> None:
    """Verify a model unless one of its class and config has been, by this code on this machine.

    What fits depends on nothing else: not on the weights, which are only looked at for NaN.
    """
    code = [*Path(models.__file__).parent.rglob("*.py"), *Path(runs.__file__).parent.rglob("*.py")]
    versions = torch.__version__, transformers.__version__, type(model.hf).__name__
    digest = hashlib.sha256(f"{versions} {model.hf.config.to_json_string()}".encode())
    for file in sorted(code):
        digest.update(file.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    mark = home / "vlmscope" / "verified" / digest.hexdigest()
    model.verify(fits=mark.exists())
    with suppress(OSError):  # a machine without a place for it verifies again
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _check_memory(family: Family, path: str | Path, dtype: str, place: torch.device) -> None:
    """Refuse weights that do not fit, before the system stops the process."""
    made: Any = family.model
    config = made.config_class.from_pretrained(path, trust_remote_code=False)
    with torch.device("meta"):
        empty = made(config)
    weights = sum(one.numel() for one in empty.parameters())
    widths = {one.in_features for one in empty.modules() if isinstance(one, torch.nn.Linear)}
    odd = [width for width in sorted(widths) if width % BLOCK]
    if odd and dtype == QUANTIZED and place.type == "cpu":
        raise ModelError(
            f"{path} has layers with {odd[0]} inputs, and a CPU computes in 4bit only where "
            f"these are a multiple of {BLOCK}; take a GPU, or --dtype bfloat16"
        )
    bits = 4.5 if dtype == QUANTIZED else torch.finfo(getattr(torch, dtype)).bits
    need, free = weights * bits / 8, free_memory(place)
    if need > free:
        raise ModelError(
            f"{path} has {weights / 1e9:.1f} billion weights, {need / 1e9:.1f} GB in {dtype}, and "
            f"{free / 1e9:.1f} GB are free on {place}; load it in bfloat16 or 4bit, or over several "
            "GPUs (device auto)"
        )


def tokenizer(name: str | Path) -> Callable[[str], int]:
    """How many tokens a word is for a model, without loading its weights; as `pieces`.

    >>> tokenizer("toy-blip")("circle")
    1
    """
    path = place_of(name)
    family = family_of(*kind_of(config_of(path)), str(name))
    if family.processor is None:
        raise _own_code(family, name)
    with one_line(name):
        own = family.processor.from_pretrained(path, trust_remote_code=False).tokenizer
    return partial(pieces, own)


def pieces(tokenizer: Any, word: str) -> int:
    """How many tokens a word is: behind a blank, as a word of a prompt stands, where its tokens can be
    others than by itself."""
    whole, before = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (f"a {word}", "a"))
    return len(whole) - len(before)


def _own_code(family: Family, name: str | Path) -> ModelError:
    return ModelError(
        f"{name} is a {family.architecture}, for which transformers has no code; load it with the code "
        "that was published with it, and use vlmscope.Model(hf, processor) in Python"
    )

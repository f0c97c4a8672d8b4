"""From a checkpoint to a verified model; words to tokens and vectors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import cached_file, logging

from vlmscope import files, models, runs
from vlmscope.errors import ExampleError, ModelError, VlmscopeError, line, nearest, shown
from vlmscope.models.families import family_of
from vlmscope.models.towers import Family
from vlmscope.runs import forward
from vlmscope.runs.model import Model
from vlmscope.runs.network import QUANTIZED, free_memory

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TOYS = Path(__file__).parent / "toys"
SAVED = "a folder written by save_pretrained"
READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""The endings of the files that transformers reads in a folder."""
TOKENIZERS = (
    "tokenizer.json vocab.json vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model".split()
)
"""Any of these makes a tokenizer."""
MOST_LAYERS = 1000
BLOCK = 64
"""How many weights of `4bit` have a factor in common."""
_DEPTH = re.compile(r"(\w+_)?(layers|depth)|num_\w*layers")


def load(name: str | Path, *, dtype: str | torch.dtype = "float32", device: str | None = None) -> Model:
    """Load a model and its processor, and check that it fits its family's table.

    `name` is a built-in toy's name, a folder written by `save_pretrained` (of the model and of the
    processor), or a Hugging Face id; only the last may use the network. Weights are read from
    safetensors only, and no code that comes with a checkpoint is run. `device` is the GPU where
    there is one, by default; `auto` spreads the model over all GPUs (with accelerate). `dtype` is one
    of `DTYPES`, or `4bit` for quantized weights (with bitsandbytes: `pip install vlmscope[4bit]`).

    Raises `ModelError` in one line if that cannot be done.

    >>> model = load("toy-blip")
    >>> model.shapes["encoder"].heads
    {'attn': 4, 'cross': 4}
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in (*DTYPES, QUANTIZED):
        known = ", ".join((*DTYPES, QUANTIZED))
        raise ModelError(f"unknown dtype {shown(dtype)}; expected one of {known}")
    spread = device == "auto"
    place = _device(None if spread else device)
    for package in ["accelerate"] * spread + ["accelerate", "bitsandbytes"] * (dtype == QUANTIZED):
        try:
            import_module(package)
        except Exception as error:  # one that does not fit the machine raises errors of its own
            raise ModelError(
                f"{'--device auto' if spread else dtype} needs {package}, which cannot be imported "
                f"({line(str(error), 100)}); pip install 'vlmscope[4bit]' brings both"
            ) from error
    path = _place(name)
    family = family_of(*_kind(_config(path)), str(name))
    if family.model is None:
        raise _own_code(family, name)
    if Path(path).is_dir():
        _check_folder(Path(path))
    with _one_line(name):
        if not (spread and place.type == "cuda"):
            _check_memory(family, path, dtype, place)
        hf = _weights(family, path, str(name), dtype, place, spread)
        processor = family.processor.from_pretrained(path, trust_remote_code=False)
        _check_end(hf, processor, name)
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
        dtype=DTYPES.get(dtype, torch.bfloat16),
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


def _check_end(hf: Any, processor: Any, name: str | Path) -> None:
    """BLIP ends an answer where its text config says; options are tokenized with the tokenizer's end."""
    here, there = (
        getattr(one, "sep_token_id", None) for one in (processor.tokenizer, hf.config.get_text_config())
    )
    if None not in (here, there) and here != there:
        raise ModelError(
            f"{name}: config.json ends an answer with sep_token_id {there}, the tokenizer with {here}; save "
            "model and processor of one checkpoint there"
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
    bits = 4.5 if dtype == QUANTIZED else torch.finfo(DTYPES[dtype]).bits
    need, free = weights * bits / 8, free_memory(place)
    if need > free:
        raise ModelError(
            f"{path} has {weights / 1e9:.1f} billion weights, {need / 1e9:.1f} GB in {dtype}, and "
            f"{free / 1e9:.1f} GB are free on {place}; load it in bfloat16 or 4bit, or over several "
            "GPUs (device auto)"
        )


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def _place(name: str | Path) -> str | Path:
    """The folder, or the Hugging Face id, that a name stands for; `ModelError` for what can be neither."""
    path = toys().get(str(name), name)
    if os.path.isdir(path):  # noqa: PTH112 - a name may have a NUL, or be too long for a path
        return path
    if os.path.exists(path):  # noqa: PTH110
        raise ModelError(f"{shown(name)} is no folder; expected a folder written by save_pretrained")
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name) or len(name) > 96:
        raise ModelError(
            f"no model {shown(name)}: not a folder, not a Hugging Face id (owner/name), and not one of the "
            f"built-in toys ({', '.join(toys())}){nearest(name, toys())}"
        )
    return path


def tokenizer(name: str | Path) -> Callable[[str], int]:
    """How many tokens a word is for a model, without loading its weights; as `pieces`.

    >>> tokenizer("toy-blip")("circle")
    1
    """
    path = _place(name)
    family = family_of(*_kind(_config(path)), str(name))
    if family.processor is None:
        raise _own_code(family, name)
    with _one_line(name):
        own = family.processor.from_pretrained(path, trust_remote_code=False).tokenizer
    return partial(pieces, own)


def pieces(tokenizer: Any, word: str) -> int:
    """How many tokens a word is: behind a blank, as a word of a prompt stands, where its tokens can be
    others than by itself."""
    whole, before = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (f"a {word}", "a"))
    return len(whole) - len(before)


def embedder(name: str | Path) -> Callable[[Sequence[str]], Float[Tensor, "words width"]]:
    """Words to vectors of length one, by the mean of the last hidden states of a small text model.

    `name` is a Hugging Face id or a folder, such as `sentence-transformers/all-MiniLM-L6-v2`. Raises
    `ModelError` if it cannot be loaded.
    """
    with _one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        text = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False).eval()

    @torch.inference_mode()
    def embed(words: Sequence[str]) -> Tensor:
        batch = tokenizer(list(words), padding=True, return_tensors="pt")
        hidden = text(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    return embed


class Inpainter:
    """A pipeline of `diffusers` that replaces what a mask shows: `inpainter(picture, mask, prompt, seed)`.

    `name` is a folder written by `save_pretrained`, or a Hugging Face id. Weights are read from safetensors
    only, and no code that comes with them is run. `steps` are those of denoising, by default the pipeline's
    own. Raises `ModelError` if it cannot be loaded, `ExampleError` for a picture that it withholds.
    """

    def __init__(self, name: str | Path, *, steps: int | None = None, device: str | None = None) -> None:
        try:
            diffusers = import_module("diffusers")
        except Exception as error:  # one that does not fit the machine raises errors of its own
            raise ModelError(
                f"inpainting by a model needs diffusers, which cannot be imported ({line(str(error), 100)}); "
                "pip install 'vlmscope[inpaint]' brings it, or fill instead"
            ) from error
        self.name, self.steps, path = str(name), steps, _place(name)
        bar, verbosity = diffusers.utils.logging, diffusers.utils.logging.get_verbosity()
        bar.disable_progress_bar()
        bar.set_verbosity(CRITICAL)
        try:
            with _one_line(name), warnings.catch_warnings(action="ignore"):
                _check_pipeline(diffusers, path)
                loaded = diffusers.AutoPipelineForInpainting.from_pretrained(
                    path, use_safetensors=True, trust_remote_code=False
                )
                self.pipeline = loaded.to(_device(device))
        finally:
            bar.set_verbosity(verbosity)
            bar.enable_progress_bar()
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, picture: Image.Image, mask: Image.Image, prompt: str, seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on any device
        options = {} if self.steps is None else {"num_inference_steps": self.steps}
        try:
            with warnings.catch_warnings(action="ignore"):
                found = self.pipeline(
                    prompt=prompt, image=picture, mask_image=mask, generator=generator, **options
                )
        except MemoryError:
            raise
        except Exception as error:  # whatever its parts make of it
            size = "{}x{}".format(*picture.size)
            said = line(str(error), 150)
            raise ModelError(
                f"{self.name} cannot paint in a picture of {size} ({said}); fill instead"
            ) from error
        if any(getattr(found, "nsfw_content_detected", None) or ()):
            raise ExampleError("the pipeline's safety checker withholds the picture that it made")
        made = found.images[0].convert("RGB")
        return made if made.size == picture.size else made.resize(picture.size, Image.Resampling.LANCZOS)

    def fingerprint(self) -> str:
        """The SHA-256 over the weights of all of its models, as 64 hex digits."""
        digest = hashlib.sha256()
        for name, part in sorted(self.pipeline.components.items()):
            for key, tensor in sorted(part.state_dict().items() if isinstance(part, torch.nn.Module) else ()):
                digest.update(f"{name} {key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _check_pipeline(diffusers: Any, path: str | Path) -> None:
    """Refuse what is no pipeline, or has parts that neither diffusers nor transformers has the code of."""
    file = "model_index.json"
    place = Path(path, file) if Path(path).is_dir() else Path(cached_file(str(path), file) or "")
    for key, value in _json(place).items():
        library = value[0] if isinstance(value, list) and value else None
        known = library in (None, "diffusers", "transformers") or hasattr(diffusers.pipelines, str(library))
        if not known or (key == "_class_name" and not isinstance(value, str)):
            raise ModelError(f"{path}: {shown(key)} is of code that comes with it, which is not run")


def toys() -> dict[str, Path]:
    """The trained toys that ship with the package: name to folder."""
    return {path.parent.name: path.parent for path in sorted(TOYS.glob("*/config.json"))}


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"no device {shown(device)} here; expected cpu, or cuda where torch sees a GPU"
        ) from error


def _own_code(family: Family, name: str | Path) -> ModelError:
    return ModelError(
        f"{name} is a {family.architecture}, for which transformers has no code; load it with the code "
        "that was published with it, and use vlmscope.Model(hf, processor) in Python"
    )


def _kind(config: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The classes and the type of the language model that a config.json names."""
    text, classes = config.get("text_config"), config.get("architectures")
    names = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    kind = text.get("model_type") if isinstance(text, dict) else None
    return names, kind if isinstance(kind, str) else None


def _config(path: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json, without any of its code."""
    with _one_line(path):
        is_folder = Path(path).is_dir()
        config = _json(
            Path(path, "config.json") if is_folder else Path(cached_file(str(path), "config.json") or "")
        )
    for key, value in _entries(config):
        if _DEPTH.fullmatch(key) and isinstance(value, int) and not 0 <= value <= MOST_LAYERS:
            raise ModelError(
                f"{path}: config.json says {key} {shown(value)}; expected 0 to {MOST_LAYERS:,} layers"
            )
    return config


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.read(file, SAVED, ModelError))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is damaged, not JSON ({error}); expected {SAVED}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is damaged, not a JSON object; expected {SAVED}")
    return content


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)


def _expected(name: str, key: str, value: Any) -> str | None:
    """What an entry has to be that is none, where transformers would go on without a word: it takes an empty
    object for false, waits for a token 1.5 or for none, turns colours round and norms everything away."""
    if key.startswith("do_") and not isinstance(value, bool | None):
        return "true or false"
    ids = value if isinstance(value, list) else [value]
    if key.endswith("_token_id") and not all(isinstance(one, int | None) for one in ids):
        return "a whole number"
    if (name, key, value) == ("generation_config.json", "eos_token_id", None):
        return "the token that ends an answer, or no entry"
    is_number = isinstance(value, int | float)
    if key == "rescale_factor" and not (is_number and 0 < value <= 1):
        return "above 0, 1 at most"
    if key.endswith(("_eps", "_epsilon")) and value is not None and not (is_number and 0 < value < 0.1):
        return "above 0 and below 0.1"
    return None


def _check_folder(path: Path) -> None:
    """Refuse a folder that lacks a file, or holds one that cannot be read, before transformers looks into it:
    it goes on without a tokenizer or a template that is not there."""
    for file in sorted(path.iterdir()):
        if file.suffix == ".json":
            for key, value in _entries(_json(file)):
                if expected := _expected(file.name, key, value):
                    raise ModelError(f"{file}: {shown(key)} is {shown(value)}; expected {expected}")
        elif file.suffix in READ:
            with files.regular(file, SAVED, ModelError) as stream:
                if not stream.read(1):
                    raise ModelError(f"{file}: is empty; expected {SAVED}")
    if not any((path / name).exists() for name in TOKENIZERS):
        raise ModelError(f"{path} has no tokenizer ({', '.join(TOKENIZERS)}); save the whole processor there")
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise ModelError(
            f"{path} has its weights as pickle only, which can run code when it is opened and is not "
            "loaded; convert it: load it in transformers where you trust it, then save_pretrained"
        )
    raise ModelError(f"{path} has no weights; expected a model.safetensors beside config.json")


@contextmanager
def _one_line(name: str | Path) -> Iterator[None]:
    """Load without a bar of its own; turn what transformers and the hub raise into one line."""
    bar, verbosity = logging.is_progress_bar_enabled(), (logging.get_verbosity(), hub_logging.get_verbosity())
    logging.disable_progress_bar()
    # All that they have to say is in the error; the hub would tell of each of its five tries.
    logging.set_verbosity(CRITICAL)
    hub_logging.set_verbosity(CRITICAL)
    try:
        yield
    except (VlmscopeError, MemoryError):
        raise
    # Whatever a config makes the libraries do: their validators and tokenizers raise Exception itself.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        way_out = (
            f"expected {SAVED}"
            if Path(toys().get(str(name), name)).exists()
            else "it needs the network or a copy in the local cache (or give a folder)"
        )
        raise ModelError(f"cannot load {name}: {line(first, 200)}; {way_out}") from error
    finally:
        logging.set_verbosity(verbosity[0])
        hub_logging.set_verbosity(verbosity[1])
        if bar:
            logging.enable_progress_bar()

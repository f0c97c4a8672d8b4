"""The folder of a checkpoint, or what the hub has of it: found, and refused before anything is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import cached_file, logging

from vlmscope import files
from vlmscope.errors import ModelError, VlmscopeError, line, nearest, shown

TOYS = Path(__file__).parents[1] / "toys"
SAVED = "a folder written by save_pretrained"
READ = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""The endings of the files that transformers reads in a folder."""
TOKENIZERS = (
    "tokenizer.json vocab.json vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model".split()
)
"""Any of these makes a tokenizer."""
SAID = ("do_resize", "do_rescale", "do_normalize")
"""Flags that every processor of pictures has; others may be null, which leaves them to its class."""
MOST_LAYERS = 1000
_DEPTH = re.compile(r"(\w+_)?(layers|depth)|num_\w*layers")


def toys() -> dict[str, Path]:
    """The trained toys that ship with the package: name to folder."""
    return {path.parent.name: path.parent for path in sorted(TOYS.glob("*/config.json"))}


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def place_of(name: str | Path) -> str | Path:
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


def device_of(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"no device {shown(device)} here; expected cpu, or cuda where torch sees a GPU"
        ) from error


def kind_of(config: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The classes and the type of the language model that a config.json names."""
    text, classes = config.get("text_config"), config.get("architectures")
    names = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    kind = text.get("model_type") if isinstance(text, dict) else None
    return names, kind if isinstance(kind, str) else None


def config_of(path: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json, without any of its code."""
    with one_line(path):
        is_folder = Path(path).is_dir()
        config = read_json(
            Path(path, "config.json") if is_folder else Path(cached_file(str(path), "config.json") or "")
        )
    for key, value in _entries(config):
        if _DEPTH.fullmatch(key) and isinstance(value, int) and not 0 <= value <= MOST_LAYERS:
            raise ModelError(
                f"{path}: config.json says {key} {shown(value)}; expected 0 to {MOST_LAYERS:,} layers"
            )
    return config


def read_json(file: Path) -> dict[str, Any]:
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
    object for false, waits for a token 1.5 or for none, turns colours round, norms everything away and puts
    all words in one place."""
    if key.startswith("do_") and not (isinstance(value, bool) or (value is None and key not in SAID)):
        return "true or false"
    listed = value if isinstance(value, list) and value else [value]
    if key.endswith("_token_id") and not {type(one) for one in listed} <= {int, type(None)}:
        return "a whole number"
    if (name, key, value) == ("generation_config.json", "eos_token_id", None):
        return "the token that ends an answer, or no entry"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "rope_theta" and value is not None and not (is_number and value >= 10):
        return "a base of angles, at least 10"
    if key == "max_position_embeddings" and value is not None and not (is_number and value >= 1):
        return "at least 1"
    if (name, key, value) == ("tokenizer.json", "vocab", None):
        return "the tokens"
    if key == "rescale_factor" and not (is_number and 0 < value <= 1):
        return "above 0, 1 at most"
    if key in ("image_mean", "image_std") and value is not None and not all(map(_is_share, listed)):
        return "shares of the full brightness, from 0 to 1"
    if key == "image_mean" and 0 in listed and any(listed):
        return "0 of all colours or of none"
    if key == "image_std" and not all(listed):
        return "shares of the full brightness, above 0"
    if key.endswith(("_eps", "_epsilon")) and value is not None and not (is_number and 0 < value < 0.1):
        return "above 0 and below 0.1"
    return None


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _odd_tokenizer(made: Mapping[str, Any]) -> str | None:
    """What tokenizers would take and then answer with a panic of its own, or with unknown words alone."""
    model, after = made.get("model"), made.get("post_processor")
    parts = isinstance(model, dict) and model.get("type") in ("WordLevel", "WordPiece")
    if parts and made.get("pre_tokenizer") is None:
        return "knows whole words, and has no pre_tokenizer that parts them"
    after = after if isinstance(after, dict) else {}
    inner = after.get("processors")
    for one in [after, *(inner if isinstance(inner, list) else [])]:
        if not isinstance(one, dict) or one.get("type") != "TemplateProcessing":
            continue
        known, sides = one.get("special_tokens"), [one.get("single"), one.get("pair")]
        for piece in (piece for side in sides if isinstance(side, list) for piece in side):
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            name = token.get("id") if isinstance(token, dict) else None
            if isinstance(name, str) and isinstance(known, dict) and name not in known:
                return f"its post_processor adds {shown(name)}, which is none of its special_tokens"
    return None


def check_folder(path: Path) -> None:
    """Refuse a folder that lacks a file, or holds one that cannot be read, before transformers looks into it:
    it goes on without a tokenizer or a template that is not there."""
    for file in sorted(path.iterdir()):
        if file.suffix == ".json":
            content = read_json(file)
            for key, value in _entries(content):
                if expected := _expected(file.name, key, value):
                    raise ModelError(f"{file}: {shown(key)} is {shown(value)}; expected {expected}")
            if file.name == "tokenizer.json" and (odd := _odd_tokenizer(content)):
                raise ModelError(f"{file}: {odd}; expected {SAVED}")
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
def one_line(name: str | Path) -> Iterator[None]:
    """Load without a bar of its own; turn what transformers and the hub raise into one line."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(CRITICAL)  # it would tell of each of its five tries
    try:
        with quiet(logging):
            yield
    except (VlmscopeError, MemoryError):
        raise
    # Whatever a config makes the libraries do: their validators and tokenizers raise Exception itself, and a
    # panic in Rust is none.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        way_out = (
            f"expected {SAVED}"
            if Path(toys().get(str(name), name)).exists()
            else "it needs the network or a copy in the local cache (or give a folder)"
        )
        raise ModelError(f"cannot load {name}: {line(first, 200)}; {way_out}") from error
    finally:
        hub_logging.set_verbosity(verbosity)


@contextmanager
def quiet(log: Any) -> Iterator[None]:
    """Within this context a library says nothing and shows no bar, given its module `logging`; all that it
    has to say is in the error. Behind it, it is as the user has set it."""
    bar, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()

"""Files of tensors that say what they are, and whether they are as they were written; safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlmscope import files
from vlmscope.errors import StoreError, VlmscopeError

LARGEST = 2**32
"""Bytes of the largest file that is read."""
Made = TypeVar("Made")


def digest(tensors: Mapping[str, Tensor], words: Sequence[str] = ()) -> str:
    """SHA-256 over words, and the names, types and bytes of tensors, as hexadecimal digits."""
    found = hashlib.sha256("\n".join(words).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(content)
    return found.hexdigest()


def content(kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, str], sha256: str) -> bytes:
    """What a file of this kind holds: tensors, what they are about, and a digest of all that.

    Its names are in order: the library writes them in another order each time, and what the same command
    writes has to be the same.
    """
    whole = save(dict(tensors), {"format": "pt", "vlmscope": kind, **about, "sha256": sha256})
    header = json.dumps(_header(whole), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    size = -len(header) % 8 + len(header)  # the tensors begin at a multiple of eight
    return size.to_bytes(8, "little") + header.ljust(size) + whole[8 + _size(whole) :]


def read(
    path: str | Path,
    kind: str,
    noun: str,
    expected: str,
    make: Callable[[dict[str, Tensor], dict[str, str]], tuple[Made, str]],
    within: Path | None = None,
) -> Made:
    """What `make` makes of the tensors of a file and what they are about, beside the digest that they have.

    Raises `StoreError` if the file is of another kind, `make` raises an error, or the file has been changed.
    """
    whole = files.read(path, expected, StoreError, LARGEST, within=within)
    try:
        tensors, about = load(whole), _header(whole).get("__metadata__", {})
        if about.get("vlmscope") != kind:
            raise StoreError(f"{path}: not {noun}; expected {expected}")
        made, sha256 = make(tensors, about)
    except StoreError:
        raise
    except (
        *(SafetensorError, RecursionError, ValueError, LookupError, TypeError, AttributeError),
        VlmscopeError,
    ) as error:  # the file may be anything: what it lacks or has too much shows in one of these
        raise StoreError(f"{path}: cannot be read as {noun} ({error}); expected {expected}") from error
    if about.get("sha256") != sha256:
        raise StoreError(f"{path}: has been changed since it was written; make the {kind} again")
    return made


def _header(whole: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(whole[8 : 8 + _size(whole)])
    return header


def _size(whole: bytes) -> int:
    return int.from_bytes(whole[:8], "little")

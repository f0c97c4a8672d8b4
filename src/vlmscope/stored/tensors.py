"""The header of a safetensors file: its metadata, and the file with its header in order."""

from __future__ import annotations

import json
from typing import Any


def metadata(content: bytes) -> dict[str, str]:
    """What a safetensors file says of itself; empty if it says nothing."""
    found: dict[str, str] = _header(content).get("__metadata__", {})
    return found


def in_order(content: bytes) -> bytes:
    """The same file with its header's names in order.

    The library writes them in another order each time, and what the same command writes has to be the same.
    """
    header = json.dumps(_header(content), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    size = -len(header) % 8 + len(header)  # the tensors begin at a multiple of eight
    return size.to_bytes(8, "little") + header.ljust(size) + content[8 + _size(content) :]


def _header(content: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(content[8 : 8 + _size(content)])
    return header


def _size(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")

"""The types that a model's weights can be loaded as, by name."""

from __future__ import annotations

from typing import Literal, get_args

DType = Literal["float64", "float32", "bfloat16", "float16", "4bit"]
DTYPES: tuple[str, ...] = get_args(DType)
QUANTIZED = "4bit"
"""Weights of 4 bits (NF4, by bitsandbytes), which compute in bfloat16."""

"""vlmscope: which part of a vision-language model carries the evidence to its answer?

>>> import vlmscope
>>> model = vlmscope.load("toy-blip")
>>> examples = vlmscope.examples("states", limit=2)
>>> table = vlmscope.sweep(model, examples, "encoder.*.cross.h*@answer", corrupt="image")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("vlmscope")

_HOME = {
    "Edit": "inputs",
    "Example": "data.example",
    "Inputs": "inputs",
    "Model": "runs.model",
    "Noise": "runs.corrupt",
    "Pair": "inputs",
    "Site": "sites",
    "VlmscopeError": "errors",
    "WeightEdit": "neurons.weight_edit",
    "baselines": "studies.sweep",
    "edited": "neurons.weight_edit",
    "examples": "data",
    "head_table": "studies.tables",
    "load": "checkpoint",
    "open": "studies.results",
    "read_csv": "data.table",
    "read_run": "studies.run_folder",
    "sweep": "studies.sweep",
    "token_table": "studies.tables",
    "write_csv": "data.table",
    "write_report": "report",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: torch is not needed to read a table."""
    if name not in _HOME:
        raise AttributeError(f"module 'vlmscope' has no attribute '{name}'")
    return getattr(import_module(f"vlmscope.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""vlmscope: which part of a vision-language model carries the evidence to its answer?

>>> import vlmscope
>>> model = vlmscope.load("toy-blip")
>>> examples = vlmscope.examples("states", limit=2)
>>> table = vlmscope.sweep(model, examples, "encoder.*.cross.h*@answer", corrupt="image")
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("vlmscope")

_NAMES = {
    "corrupt": "Noise",
    "data": "examples",
    "errors": "VlmscopeError",
    "example": "Example read_csv write_csv",
    "inputs": "Edit Inputs Pair",
    "model": "Model load",
    "report": "write_report",
    "sites": "Site",
    "store": "read_run",
    "study": "baselines sweep",
    "tables": "head_table token_table",
    "weights": "WeightEdit edited",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # what a type checker sees
    from vlmscope.corrupt import Noise as Noise
    from vlmscope.data import examples as examples
    from vlmscope.errors import VlmscopeError as VlmscopeError
    from vlmscope.example import Example as Example
    from vlmscope.example import read_csv as read_csv
    from vlmscope.example import write_csv as write_csv
    from vlmscope.inputs import Edit as Edit
    from vlmscope.inputs import Inputs as Inputs
    from vlmscope.inputs import Pair as Pair
    from vlmscope.model import Model as Model
    from vlmscope.model import load as load
    from vlmscope.report import write_report as write_report
    from vlmscope.sites import Site as Site
    from vlmscope.store import read_run as read_run
    from vlmscope.study import baselines as baselines
    from vlmscope.study import sweep as sweep
    from vlmscope.tables import head_table as head_table
    from vlmscope.tables import token_table as token_table
    from vlmscope.weights import WeightEdit as WeightEdit
    from vlmscope.weights import edited as edited
else:

    def __getattr__(name: str) -> Any:
        """The public names, imported when they are first used: torch is not needed to read a table."""
        if name not in _HOME:
            raise AttributeError(f"module 'vlmscope' has no attribute '{name}'")
        return getattr(import_module(f"vlmscope.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

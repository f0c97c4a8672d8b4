"""vlmscope: which part of a vision-language model carries the evidence to its answer?

>>> import vlmscope
>>> model = vlmscope.load("toy-blip")
>>> examples = vlmscope.examples("states", limit=2)
>>> table = vlmscope.sweep(model, examples, "encoder.*.cross.h*@answer", corrupt="image")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_NAMES = {
    "checkpoint": "load",
    "data": "examples",
    "data.example": "Example",
    "data.table": "read_csv write_csv",
    "errors": "VlmscopeError",
    "explanation": "explain",
    "models.inputs": "Edit Inputs Pair",
    "neurons.weight_edit": "WeightEdit edited",
    "report": "write_report",
    "runs.corrupt": "Noise",
    "runs.model": "Model",
    "sites": "Pattern Site",
    "studies.attribution": "attribute",
    "studies.edges": "edges",
    "studies.faithfulness": "faithfulness",
    "studies.lens": "lens",
    "studies.inpainting": "inpaint",
    "studies.knockout": "knockout",
    "studies.merge": "merge",
    "studies.run_folder": "read_run",
    "results": "open",
    "studies.probes": "probe",
    "studies.pushed": "push",
    "studies.steering": "steer",
    "studies.steering.direction": "Direction",
    "studies.sweep": "baselines sweep",
    "studies.tables": "compare flow_table head_table token_table",
    "studies.tracing": "trace",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # what a type checker sees
    __version__: str
    from vlmscope.checkpoint import load as load
    from vlmscope.data import examples as examples
    from vlmscope.data.example import Example as Example
    from vlmscope.data.table import read_csv as read_csv
    from vlmscope.data.table import write_csv as write_csv
    from vlmscope.errors import VlmscopeError as VlmscopeError
    from vlmscope.explanation import explain as explain
    from vlmscope.models.inputs import Edit as Edit
    from vlmscope.models.inputs import Inputs as Inputs
    from vlmscope.models.inputs import Pair as Pair
    from vlmscope.neurons.weight_edit import WeightEdit as WeightEdit
    from vlmscope.neurons.weight_edit import edited as edited
    from vlmscope.report import write_report as write_report
    from vlmscope.results import open as open
    from vlmscope.runs.corrupt import Noise as Noise
    from vlmscope.runs.model import Model as Model
    from vlmscope.sites import Pattern as Pattern
    from vlmscope.sites import Site as Site
    from vlmscope.studies.attribution import attribute as attribute
    from vlmscope.studies.edges import edges as edges
    from vlmscope.studies.faithfulness import faithfulness as faithfulness
    from vlmscope.studies.inpainting import inpaint as inpaint
    from vlmscope.studies.knockout import knockout as knockout
    from vlmscope.studies.lens import lens as lens
    from vlmscope.studies.merge import merge as merge
    from vlmscope.studies.probes import probe as probe
    from vlmscope.studies.pushed import push as push
    from vlmscope.studies.run_folder import read_run as read_run
    from vlmscope.studies.steering import steer as steer
    from vlmscope.studies.steering.direction import Direction as Direction
    from vlmscope.studies.sweep import baselines as baselines
    from vlmscope.studies.sweep import sweep as sweep
    from vlmscope.studies.tables import compare as compare
    from vlmscope.studies.tables import flow_table as flow_table
    from vlmscope.studies.tables import head_table as head_table
    from vlmscope.studies.tables import token_table as token_table
    from vlmscope.studies.tracing import trace as trace
else:

    def __getattr__(name: str) -> Any:
        """The public names, imported when they are first used: torch is not needed to read a table."""
        if name == "__version__":
            return import_module("importlib.metadata").version("vlmscope")
        if name not in _HOME:
            raise AttributeError(f"module 'vlmscope' has no attribute '{name}'")
        return getattr(import_module(f"vlmscope.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

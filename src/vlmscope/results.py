"""Any folder that vlmscope wrote, read."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from vlmscope.errors import StoreError
from vlmscope.studies.pushed import HUB, fetched

READERS = {
    "summary.json": "studies.faithfulness:read",  # in a run folder, too
    "run.json": "studies.run_folder:read_run",
    "heads.json": "studies.heads:read",
    "circuits.json": "studies.circuits:read",
    "tracing.json": "studies.tracing:read",
    "lens.json": "studies.lens:read",
    "explain.json": "explanation:read",
    "notice.toml": "notice.written:read",
    "neurons.json": "neurons.results:read",
    "steer.json": "studies.steering:read",
    "probe.json": "studies.probes:read",
}
"""What reads a folder, by the file that says what it is; imported when it is needed."""


def open(folder: str | os.PathLike[str]) -> Any:
    """What is in a folder of results, as the value that wrote it.

    A sweep gives a `Run`, as `attribute` does, `circuits` its `Found`, `faithfulness`
    a `Faithful`, `heads` its `Functions`, `tracing` its
    `Traced`, `lens` its `Lens`, `explain` its
    `Explanation`, `notice` a `Notice` with what it is made of, `neurons` what was found,
    described, perturbed or edited, `steer` a `Steered`, `probe` a `Probed`. `hf://OWNER/NAME` is a run
    that was pushed to the Hugging Face hub (`push`). Raises `StoreError` for any other folder.

    >>> import tempfile, vlmscope
    >>> model, examples = vlmscope.load("toy-blip"), vlmscope.examples("states", limit=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = vlmscope.sweep(model, examples, "encoder.*.resid@answer", out=folder)
    ...     print(len(vlmscope.open(folder).effects()))
    3
    """
    path = fetched(str(folder)) if str(folder).startswith(HUB) else Path(folder)
    for manifest, reader in READERS.items():
        if os.path.lexists(path / manifest):
            module, _, name = reader.partition(":")
            return getattr(import_module(f"vlmscope.{module}"), name)(path)
    what = "not a folder that vlmscope wrote" if os.path.isdir(path) else "no such folder"  # noqa: PTH112
    raise StoreError(f"{path}: {what}; expected one with {', '.join(READERS)} in it")

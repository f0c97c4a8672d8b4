"""Runs by several processes: one model each, examples as they get free, one folder.

They are processes of this machine (`local`), or of a Ray cluster (`cluster`). Workers write parts beside
those of the folder, under temporary names; the driver, which holds the folder, gives them their names, and
that commits them. So what a worker that dies has not handed over is computed again, by another one, and
nothing is there twice. Names and paths travel, no tensors. `Alone` does in this process what a `Team` does in
others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vlmscope.errors import VlmscopeError, whole
from vlmscope.studies.workers import local
from vlmscope.studies.workers.orders import Given

if TYPE_CHECKING:
    from vlmscope.studies.workers.team import Team
    from vlmscope.studies.workers.worker import Alone


def alone(given: Given) -> Alone:
    """Nobody but this process, which imports what a worker does when it is asked."""
    from vlmscope.studies.workers.worker import Alone

    return Alone(given)


def _as_it_is() -> None:
    """Nothing is set up."""


def started(
    *,
    workers: int | None = None,
    address: str | None = None,
    device: str | None = None,
    set_up: Callable[[], object] = _as_it_is,
) -> AbstractContextManager[Callable[[Any], Team]]:
    """Several processes: gives a function of what each is given (`orders.Given`), which gives a `Team`.

    `workers` are as many processes on this machine (by default one a core), or, with the `address` HOST:PORT
    of a Ray cluster's head (or `auto`), on that: by default as many as it has GPUs, or else cores. GPUs are
    shared out evenly, unless the `device` is another. Each process calls `set_up` before it loads anything.
    All machines have the package in the same version, and the model, the data and folders under the same
    paths.

    Raises `VlmscopeError` for a `device` that is one GPU, and where Ray is not installed, not reachable or of
    another version.
    """
    if workers is not None:
        whole(workers, "the number of workers", 1, 10_000)
    if device is not None and ":" in device:
        raise VlmscopeError(
            f"--device {device} names one GPU, and workers are given theirs; say cuda, or nothing"
        )
    if address is None:
        return local.started(workers or os.cpu_count() or 1, device, set_up)
    from vlmscope.studies.workers import cluster

    return cluster.started(workers, address, device, set_up)

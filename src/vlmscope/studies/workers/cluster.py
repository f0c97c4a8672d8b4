"""Ray, on this machine or a cluster, for as long as a command takes."""

from __future__ import annotations

import gc
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

from vlmscope.errors import VlmscopeError, line, shown, whole
from vlmscope.studies.workers.team import Team

STORE = 80 * 2**20
"""Bytes of Ray's store of objects on this machine: nothing large is ever put there."""
PATIENCE = 10.0
"""Seconds for a cluster to answer; and to start a worker, until a line says what is waited for."""


class Process:
    """One process of Ray's, and the `Worker` in it, which is imported there alone."""

    def __init__(self, place: str, set_up: Callable[[], object]) -> None:
        with suppress(OSError):  # paths are as they were typed; where there is no such folder, they say so
            os.chdir(place)
        self.set_up = set_up

    def there(self) -> None:
        """The first call: that it has been started is all that it says."""

    def warm_up(self) -> None:
        """Import what is needed, while the driver does; what is wrong is said by the first `do`."""
        self.worker  # noqa: B018

    def do(self, method: str, *given: Any) -> Any:
        return self.worker.do(method, *given)

    @cached_property
    def worker(self) -> Any:
        gc.disable()  # nothing of what is imported is garbage, and to find none takes a sixth of the time
        try:
            self.set_up()
            from vlmscope.studies.workers.worker import Worker
        finally:
            gc.enable()
        return Worker()


@contextmanager
def started(
    *,
    workers: int | None = None,
    address: str | None = None,
    device: str | None = None,
    set_up: Callable[[], object] = lambda: None,
) -> Iterator[Callable[[Any], Team]]:
    """Several processes: gives a function of what each is given (`worker.Given`), which gives a `team.Team`.

    `workers` are as many processes on this machine, or, with the `address` HOST:PORT of a Ray cluster's head
    (or `auto`), on that: by default as many as it has GPUs, or else cores. GPUs are shared out evenly, unless
    the `device` is another. Each process calls `set_up` before it loads anything; torch has one thread in it
    unless that says more. All machines have the package in the same version, and the model, the data and
    folders under the same paths.

    Raises `VlmscopeError` where Ray is not installed, not reachable or of another version.
    """
    if workers is not None:
        whole(workers, "the number of workers", 1, 10_000)
    # Ray says what becomes of its workers on standard output, which is the command's own.
    with redirect_stdout(StringIO()), connected(workers, address) as ray:
        several, share = shares(ray, workers, device)
        remote = ray.remote(Process).options(num_cpus=1, num_gpus=share, max_restarts=0, max_task_retries=0)
        actors = []

        def start() -> Any:
            actors.append(remote.remote(str(Path.cwd()), set_up))
            return actors[-1]

        first = [start() for _ in range(several)]
        there = [actor.there.remote() for actor in first]
        for actor in first:
            actor.warm_up.remote()

        def team(given: Any) -> Team:
            if not ray.wait(there, timeout=PATIENCE)[0]:
                warnings.warn(_waits(ray, share), stacklevel=2)
            return Team(ray, start, first, given)

        try:
            yield team
        finally:
            for actor in actors:
                with suppress(Exception):  # it is dead already
                    ray.kill(actor)


@contextmanager
def connected(workers: int | None, address: str | None) -> Iterator[Any]:
    """Ray, on this machine or a cluster, for as long as the run takes; or as the caller has connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # not behind all else on the machine, as Ray has it
    try:
        import ray
    except ImportError as error:
        raise VlmscopeError(
            f"several workers need ray, which cannot be imported ({line(str(error), 100)}); "
            "pip install 'vlmscope[ray]', or share the examples out with --shard"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    if address is None:
        options |= {"address": "local", "num_cpus": workers, "object_store_memory": STORE}
        options |= {"_node_ip_address": "127.0.0.1"}
    else:
        _reachable(address)
        options |= {"address": address, "include_dashboard": None}
    try:
        ray.init(**options)
    except Exception as error:  # of any kind: a bare Exception where its own processes start too late
        raise VlmscopeError(_why(address, str(error))) from error
    try:
        yield ray
    finally:
        if address is None:
            with suppress(Exception):  # its autoscaler hears no signal, and would be waited for a second
                ray._private.worker._global_node.kill_monitor()
        ray.shutdown()


def _waits(ray: Any, share: float) -> str:
    """That no worker has started, and what of a cluster is free."""
    there, free = ray.cluster_resources(), ray.available_resources()
    needs = {"CPU": ("core", 1.0), "GPU": ("GPU", share)}
    counts = [
        f"{free.get(name, 0):g} of {there.get(name, 0):g} {noun}s"
        for name, (noun, need) in needs.items()
        if need
    ]
    gpu = f" and {share:g} of a GPU" if share else ""
    return (
        f"no worker has started for {PATIENCE:g} s: each needs a core{gpu}, and {' and '.join(counts)} of "
        "the cluster are free. It goes on as soon as some are: end what else runs there ('ray status' shows "
        "it), or add a machine ('ray start --address')"
    )


def _why(address: str | None, text: str) -> str:
    if address is None:
        return (
            f"Ray does not start on this machine ({line(text, 200)}); try again when it is less busy (its "
            "processes have 30 s for that), or without --workers"
        )
    if "version mismatch" in text.lower():
        return (
            f"the cluster at {shown(address)} has another version: {line(text, 200)}; install the same "
            "versions of ray and Python here and there"
        )
    return (
        f"no Ray cluster at {shown(address)} ({line(text, 200)}); expected HOST:PORT of its head, which "
        "'ray start --head' prints"
    )


def _reachable(address: str) -> None:
    """Say at once what Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise VlmscopeError(
            f"--ray is {shown(address)}; expected HOST:PORT of a cluster's head, such as 10.0.0.1:6379, "
            "or auto"
        )
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except OSError as error:
        raise VlmscopeError(_why(address, f"not reachable: {error.strerror or error}")) from error


def shares(ray: Any, workers: int | None, device: str | None) -> tuple[int, float]:
    """How many workers, and which share of a GPU each has.

    Raises `VlmscopeError` for a `device` that is one GPU.
    """
    there = ray.cluster_resources()
    gpus = 0 if device == "cpu" else int(there.get("GPU", 0))
    if device is not None and ":" in device:
        raise VlmscopeError(
            f"--device {device} names one GPU, and workers are given theirs; say cuda, or nothing"
        )
    several = workers or gpus or max(1, int(there.get("CPU", 1)))
    return several, int(10_000 / -(-several // gpus)) / 10_000 if gpus else 0.0

"""Workers that are processes of a Ray cluster, for as long as a command takes."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from vlmscope.errors import VlmscopeError, line, shown
from vlmscope.studies.workers.orders import Answer, DiedError
from vlmscope.studies.workers.process import Process
from vlmscope.studies.workers.team import Team

PATIENCE = 10.0
"""Seconds for a cluster to answer; and to start a worker, until a line says what is waited for."""


class OnRay:
    """Starts processes through Ray (the module), and asks them; each has `share` of a GPU, and calls `set_up`
    first."""

    def __init__(self, ray: Any, share: float, set_up: Callable[[], object]) -> None:
        self.ray, self.set_up = ray, set_up
        self.actors, self.there = list[Any](), list[Any]()
        remote = ray.remote(Placed)
        self.remote = remote.options(num_cpus=1, num_gpus=share, max_restarts=0, max_task_retries=0)

    def start(self) -> Any:
        self.actors.append(self.remote.remote(str(Path.cwd()), self.set_up))
        self.there.append(self.actors[-1].there.remote())
        self.actors[-1].warm_up.remote()
        return self.actors[-1]

    def ask(self, actor: Any, method: str, *given: Any) -> Any:
        return actor.do.remote(method, *given)

    def wait(self, asked: Sequence[Any]) -> Any:
        [ref], _ = self.ray.wait([*asked])
        return ref

    def answer(self, asked: Any) -> Answer:
        try:
            return self.ray.get(asked)  # type: ignore[no-any-return]
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            raise DiedError(str(error)) from error

    def end(self) -> None:
        for actor in self.actors:
            with suppress(Exception):  # it is dead already
                self.ray.kill(actor)


class Placed(Process):
    """One in a folder, if there is such a one, as paths are as they were typed; if not, they say so."""

    def __init__(self, place: str, set_up: Callable[[], object]) -> None:
        with suppress(OSError):
            os.chdir(place)
        super().__init__(set_up)

    def there(self) -> None:
        """That it has been started is all that it says."""


@contextmanager
def started(
    workers: int | None, address: str, device: str | None, set_up: Callable[[], object]
) -> Iterator[Callable[[Any], Team]]:
    """As `workers.started`, by Ray: as many workers as its cluster has GPUs, or else cores, by default."""
    # Ray says what becomes of its workers on standard output, which is the command's own.
    with redirect_stdout(StringIO()), connected(address) as ray:
        several, share = shares(ray, workers, device)
        crew = OnRay(ray, share, set_up)
        first = [crew.start() for _ in range(several)]

        def team(given: Any) -> Team:
            if not ray.wait(crew.there, timeout=PATIENCE)[0]:
                warnings.warn(_waits(ray, share), stacklevel=2)
            return Team(crew, first, given)

        try:
            yield team
        finally:
            crew.end()


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, on a cluster, for as long as the run takes; or as the caller has connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unasked
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # not behind all else on the machine, as Ray has it
    try:
        import ray
    except ImportError as error:
        raise VlmscopeError(
            f"a cluster needs ray, which cannot be imported ({line(str(error), 100)}); "
            "pip install 'vlmscope[ray]', or share the examples out with --shard"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    _reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of any kind
        raise VlmscopeError(_why(address, str(error))) from error
    try:
        yield ray
    finally:
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


def _why(address: str, text: str) -> str:
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
    """How many workers, and which share of a GPU each has."""
    there = ray.cluster_resources()
    gpus = 0 if device == "cpu" else int(there.get("GPU", 0))
    several = workers or gpus or max(1, int(there.get("CPU", 1)))
    return several, int(10_000 / -(-several // gpus)) / 10_000 if gpus else 0.0

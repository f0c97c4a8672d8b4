"""Ray, on this machine or a cluster, for as long as a command takes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlmscope.errors import VlmscopeError, line, shown

STORE = 80 * 2**20
"""Bytes of Ray's store of objects on this machine: nothing large is ever put there."""
PATIENCE = 10.0
"""Seconds for a cluster to answer."""


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
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise VlmscopeError(_why(address, str(error))) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _why(address: str | None, text: str) -> str:
    where = "Ray does not start on this machine" if address is None else f"no Ray cluster at {shown(address)}"
    if "version mismatch" in text.lower():
        return (
            f"the cluster at {shown(address)} has another version: {line(text, 200)}; install the same "
            "versions of ray and Python here and there"
        )
    return f"{where} ({line(text, 200)}); expected HOST:PORT of its head, which 'ray start --head' prints"


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

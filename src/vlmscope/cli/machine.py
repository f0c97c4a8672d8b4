"""What a command arranges with the machine before its model is loaded: threads, and freed memory."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

SMALL = 50_000_000
"""Bytes of weights up to which a model's operations are too short to be shared out to threads."""
TOYS = Path(__file__).parents[1] / "toys"
LOAD, CGROUP = Path("/proc/loadavg"), Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""Files of a cgroup (version 2, and 1): microseconds of CPU for a container, and in which span."""


def set_up(model: str | None) -> None:
    """For a command with a model: as many threads as it has use for and the machine has cores for.

    After each operation of a model its threads wait for each other, and GNU's OpenMP waits by spinning. Where
    another process is on one of their cores, all wait for that core, operation by operation. So a small
    model has one thread, and no model more than there are idle cores. `OMP_NUM_THREADS` decides otherwise.
    """
    if not model:
        return
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), threads(model)))
    keep_freed_memory()


def set_up_worker(threads: int) -> None:
    """The same for one of several processes, before it loads its model: so many threads."""
    import torch

    torch.set_num_threads(threads)
    keep_freed_memory()


def threads(model: str, workers: int = 1) -> int:
    """How many threads each of several processes with this model has use for."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal():
        return max(1, int(given))
    return 1 if _is_small(model) else max(1, cores() // workers)


def cores() -> int:
    """How many cores are idle now, within the CPUs that a container may use; at least one."""
    free = os.cpu_count() or 1
    with suppress(OSError, ValueError, IndexError):
        free -= round(median(_running() for _ in range(3))) - 1
    for files in QUOTAS:
        with suppress(OSError, ValueError):
            texts = [(CGROUP / file).read_text() for file in files]
            quota, span = map(int, " ".join(texts).split())
            free = min(free, quota // span) if quota > 0 else free
    return max(1, free)


def _running() -> int:
    """How many threads of the whole machine want a core at this moment, with the one that asks."""
    time.sleep(0.01)
    return int(LOAD.read_text().split()[3].split("/")[0])


def _is_small(model: str) -> bool:
    folder = TOYS / model if (TOYS / model).is_dir() else Path(model)
    weights = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return bool(weights) and sum(weights) <= SMALL


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next batch of rows instead of returning it.

    Otherwise the system hands out and clears the same pages for every batch, which costs some
    seven percent of a sweep on a CPU. Elsewhere this does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**30)

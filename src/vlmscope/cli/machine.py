"""What a command arranges with the machine before torch is imported: threads, and freed memory."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

SMALL = 50_000_000
"""Bytes of weights up to which a model's operations are too short to be shared out to threads."""
TOYS = Path(__file__).parents[1] / "toys"
QUOTAS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
"""Where Linux says how many microseconds of CPU a container has, and in which span (cgroup 2 and 1)."""


def set_up(model: str | None) -> None:
    """Choose the threads for a model, unless the environment does, and keep freed memory.

    A thread that waits for others usually spins. Where cores are shared, it then takes the very time that
    the others need; so waiting threads sleep, a small model has one thread, and none has more than the
    container has CPUs. Otherwise torch chooses: one for each physical core.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # GNU's OpenMP, in torch's wheels for Linux
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's and LLVM's, elsewhere
    threads = 1 if _is_small(model) else _quota()
    if threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    _keep_freed_memory()


def _is_small(model: str | None) -> bool:
    if not model:
        return False
    folder = TOYS / model if (TOYS / model).is_dir() else Path(model)
    weights = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return bool(weights) and sum(weights) <= SMALL


def _quota() -> int | None:
    """How many CPUs a container may use, where that is fewer than there are."""
    for files in QUOTAS:
        with suppress(OSError, ValueError):
            time, span = " ".join(Path(file).read_text() for file in files).split()
            cpus = max(1, int(time) // int(span))
            return cpus if int(time) > 0 and cpus < (os.cpu_count() or 1) else None
    return None


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next batch of rows instead of returning it.

    Otherwise the system hands out and clears the same pages for every batch, which costs some
    seven percent of a sweep on a CPU. Elsewhere this does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**30)

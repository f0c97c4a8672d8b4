"""What a run will take, from one or two of its examples: time, memory, disk; and a job array that does it."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from vlmscope.errors import DataError, whole
from vlmscope.studies.rows import run_jobs
from vlmscope.studies.run_folder import bytes_of
from vlmscope.studies.sweep import Study
from vlmscope.studies.task import Task, all_jobs

TRIED = 20
"""How many examples are tried, until two of them are of those that are kept."""


class Estimate(NamedTuple):
    """What a task will take: seconds of computing, bytes on disk, and the patches of one example; as measured
    on the so-manieth of those that were tried."""

    seconds: float
    bytes: int
    patches: int
    tried: int


def estimate(task: Task, is_warm: bool = False) -> Estimate:
    """What the examples will take, from running one or two of them: the first one warms up, unless the model
    `is_warm`.

    An upper bound where `select` leaves some out, and of the bytes (parts compress better than a
    single example).
    """
    many, found = len(task.numbers), [Estimate(0.0, 0, 0, 0)]
    for tried, job in enumerate(all_jobs(task)[:TRIED], start=1):
        start = time.perf_counter()
        [result] = run_jobs(task, [job], quiet=True)
        seconds = time.perf_counter() - start
        if not result.rows.empty:
            size = bytes_of(result.rows) * many
            found.append(Estimate(seconds * many, size, len(result.rows), tried))
            if len(found) > 2 - is_warm or seconds > 10.0:  # a long one has warmed up by itself
                break
    return found[-1]


class Given(Protocol):
    """What a run is of."""

    def load(self) -> Any: ...

    def examples(self) -> Any: ...


@dataclass(frozen=True)
class Plan:
    """What a run will take. Times are in seconds, sizes in bytes; `memory` is the most that this process has
    held, `on_device` what torch has had of a GPU."""

    examples: int
    each: Estimate
    loading: float
    memory: int
    on_device: int | None
    device: str
    threads: int
    shards: int

    def lines(self, out: Path) -> Iterator[str]:
        """All of it, in words."""
        each = self.each
        yield (
            f"{self.examples:,} examples × {each.patches:,} patches: about "
            f"{self.examples * each.patches:,} rows, {size_of(each.bytes)} on disk"
        )
        yield f"one process: {time_of(each.seconds + self.loading)}, {self._room()}"
        if self.shards > 1:
            yield f"each of {self.shards} shards: {time_of(self.seconds)}, {self._room()}"
        yield (
            f"measured on example {each.tried} of the data, here ({self.device}, {self.threads} "
            f"thread{'s' * (self.threads > 1)}); loading took {time_of(self.loading)} of each"
        )
        there = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free
        if each.bytes > free:
            yield f"there is not enough room: {size_of(free)} are free in {there}"

    @property
    def seconds(self) -> float:
        """What a shard takes."""
        return self.each.seconds * math.ceil(self.examples / self.shards) / self.examples + self.loading

    def _room(self) -> str:
        gpu = "" if self.on_device is None else f", {size_of(self.on_device)} of it on the GPU"
        return f"{size_of(self.memory + (self.on_device or 0))} of memory{gpu}"

    def slurm(self, words: Sequence[str], out: Path) -> str:
        """A job array for SLURM in which each job runs a shard: the `words` of a command without --out. Twice
        the time, and half as much memory again, as was measured."""
        minutes = math.ceil(2 * self.seconds / 60) + 5
        shards, where = self.shards, shlex.quote(f"{out}-shards")
        lines = [
            "#!/bin/bash",
            "# Twice the time and 1.5 times the memory that were measured where this was written.",
            "#SBATCH --job-name=vlmscope",
            f"#SBATCH --array=1-{shards}",
            f"#SBATCH --time={minutes // 60}:{minutes % 60:02d}:00",
            f"#SBATCH --mem={math.ceil(1.5 * self.memory / 2**30)}G",
            f"#SBATCH --cpus-per-task={self.threads}",
            *["#SBATCH --gpus-per-task=1", "#SBATCH --ntasks=1"] * (self.on_device is not None),
            "#SBATCH --requeue",
            "#SBATCH --output=vlmscope-%A-%a.log",
            "",
            "# A job that was stopped goes on where it was, and one that is done has nothing to do.",
            f'{shlex.join(words)} --shard "$SLURM_ARRAY_TASK_ID/{shards}" \\',
            f'    --out {where}/"$SLURM_ARRAY_TASK_ID"',
            "",
            "# When all have ended:",
            f"# vlmscope merge {where}/* --out {shlex.quote(str(out))}",
        ]
        return "\n".join(lines) + "\n"


def plan(study: Callable[..., Study], given: Given, options: Mapping[str, Any], shards: int = 1) -> Plan:
    """What `study(model, examples, **options)` will take, as one run or in shards, from running one or two
    examples.

    Raises what the study raises, and `DataError` if none of the first examples can be run.
    """
    shards = whole(shards, "the number of shards", 1)
    examples = given.examples()
    start = time.perf_counter()
    model = given.load()
    loading = time.perf_counter() - start
    made = study(model, examples, shard=(1, shards), **options)
    task = made.task
    each = estimate(task)
    if not each.patches:
        raise DataError(
            f"none of the first {min(TRIED, len(task.numbers))} examples could be run, so nothing was "
            "measured; sweep a few (--limit) to see why"
        )
    many = len(task.examples)
    each = each._replace(
        seconds=each.seconds * many / len(task.numbers), bytes=each.bytes * many // len(task.numbers)
    )
    on_device = None
    if model.device.type == "cuda":
        on_device = torch.cuda.max_memory_allocated(model.device)
    return Plan(many, each, loading, _most(), on_device, str(model.device), torch.get_num_threads(), shards)


def _most() -> int:
    """The most memory that this process has held, in bytes; 0 where the system does not say."""
    with suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return 0


def time_of(seconds: float) -> str:
    """A span of time in two units at most.

    >>> time_of(3.2), time_of(200), time_of(40_000)
    ('3 s', '3 min 20 s', '11 h 6 min')
    """
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def size_of(many: float) -> str:
    """A number of bytes in the unit that fits.

    >>> size_of(900), size_of(2_400_000)
    ('0.9 kB', '2.4 MB')
    """
    for unit in ("kB", "MB", "GB"):
        many /= 1000
        if many < 1000:
            return f"{many:.1f} {unit}"
    return f"{many / 1000:.1f} TB"

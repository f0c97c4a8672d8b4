"""A run by several processes, through Ray: one model each, examples as they get free, one folder.

Workers write parts beside those of the folder, under temporary names; the driver, which holds the folder,
gives them their names, and that commits them. So what a worker that dies has not handed over is computed
again, by another one, and nothing is there twice. Names and paths travel, no tensors.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

import torch

from vlmscope import files
from vlmscope.data.example import Example
from vlmscope.errors import ExampleError, StoreError, VlmscopeError, line, shown, whole
from vlmscope.progress import progress
from vlmscope.runs.model import Model
from vlmscope.studies.rows import run_jobs
from vlmscope.studies.run_folder import Run, read_run, table_in
from vlmscope.studies.run_writer import Part, Waiting, claim, differing, open_run, remove_leftovers
from vlmscope.studies.sweep import Study, jobs_of, show
from vlmscope.studies.task import Todo, description_of, digests_of

DEATHS = 3
"""Workers that die on an example until it is left out, and that die before they begin until the run ends."""
REASON = f"{DEATHS} workers died on it; take fewer of them if they lack memory, or run it alone"
STORE = 80 * 2**20
"""Bytes of Ray's store of objects on this machine: nothing large is ever put there."""
PATIENCE = 10.0
"""Seconds for a cluster to answer."""


class Given(Protocol):
    """What each process loads for itself; a value that can be sent."""

    def load(self) -> Model: ...

    def examples(self) -> list[Example]: ...


class Order(NamedTuple):
    """A run as it travels: what each process makes a study of.

    `study(model, examples, **options)` is one of `sweep.swept`, `knockout.knocked_out`,
    `attribution.attributed` and `screen.screened`.
    """

    given: Given
    study: Callable[..., Study]
    options: dict[str, Any]


class About(NamedTuple):
    """What the driver has to know of a study."""

    spec: dict[str, Any]
    description: dict[str, Any]
    digests: list[str]
    numbers: range
    sites: list[str]
    host: str


class Done(NamedTuple):
    """What a worker hands over: parts, files beside those of the folder, how many patches the example took,
    and what it warns of."""

    parts: list[Part]
    patches: int
    warned: list[str]


class Worker:
    """One process: a model, and the examples that wait to be handed over. Its first call is `begin`."""

    def __init__(self, order: Order, out: Path, place: str, threads: int) -> None:
        self.order, self.out, self.place, self.threads = order, out, place, threads
        self.name, self.count = uuid4().hex, 0

    def begin(self) -> About:
        """Load the model and make the study."""
        with suppress(OSError):  # paths are as they were typed; where there is no such folder, they say so
            os.chdir(self.place)
        model = self.order.given.load()
        torch.set_num_threads(self.threads)
        self.study = self.order.study(model, self.order.given.examples(), **self.order.options)
        task = self.study.task
        self.digests = digests_of(task)
        return About(
            self.study.spec,
            description_of(model),
            self.digests,
            task.numbers,
            task.sites,
            socket.gethostname(),
        )

    def join(self, sites: list[str]) -> None:
        """Make parts for the folder, whose site expressions are these."""
        if not (self.out / "run.json").exists():
            raise StoreError(
                f"{self.out}: is not there on {socket.gethostname()}; choose an --out on a disk that all "
                "machines of the cluster share"
            )
        self.waiting = Waiting(self.study.spec, sites, self.digests)

    def compute(self, job: Todo, reason: str | None = None) -> Done:
        """The rows of an example, or that it is left out for a reason; parts, when it is time."""
        work = self.study.work if reason is None else _refused(reason)
        patches = 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for result in run_jobs(self.study.task, [job], quiet=True, work=work):
                show(self.out, self.study.task, job)
                self.waiting.add(job.number, result.rows, result.baseline, job.sites)
                patches = len(result.rows)
        parts = self.hand_over() if self.waiting.is_due() else []
        return Done(parts, patches, [str(one.message) for one in caught])

    def hand_over(self) -> list[Part]:
        """Write what waits, for the driver to commit."""
        part = self.waiting.part()
        if part is None:
            return []
        found = []
        for folder, content in ((table_in(self.study.spec), part.rows), ("baselines", part.baselines)):
            file = self.out / folder / f".{self.name}-{self.count}.tmp"  # that of a killed run is removed
            files.write(file, content)
            found.append(file)
        self.count += 1
        self.waiting.is_written()
        return [Part(part.held, *found)]

    def check(self) -> dict[str, Any] | None:
        """What the study's check finds of the folder."""
        return self.study.check(read_run(self.out))


def _refused(reason: str) -> Any:
    def refuse(*_: Any) -> Any:
        raise ExampleError(reason)

    return refuse


@dataclass
class _Hand:
    """A worker as the driver sees it: what it computes now, and what it has not handed over."""

    actor: Any
    job: Todo | None = None
    made: list[Todo] = field(default_factory=list)


def spread(
    out: str | os.PathLike[str],
    order: Order,
    *,
    workers: int | None = None,
    address: str | None = None,
    threads: int = 1,
) -> tuple[Run, int]:
    """Fill a run folder with several processes: the run, and how many examples it was asked for.

    The folder is that of one process with as many `threads` for torch, bit for bit on the same kind of
    device, and can be gone on with by one, or by others. `workers` are as many processes on this machine, or,
    with the `address` HOST:PORT of a Ray cluster's head (or `auto`), on that: by default as many as it has
    GPUs, or else cores. GPUs are shared out evenly. All machines have the package in the same version,
    and the model, the data and the folder under the same paths.

    A worker that dies is replaced; an example on which three died is left out, with that reason.

    Raises `VlmscopeError` where Ray is not installed, not reachable or of another version, where workers die
    before they begin, or would compute another run; and what the study raises.
    """
    if workers is not None:
        whole(workers, "the number of workers", 1, 10_000)
    place = Path(out).absolute()
    claim(place)
    # Ray says what becomes of its workers on standard output, which is the command's own.
    with redirect_stdout(StringIO()), _connected(workers, address) as ray:
        several, share = _shares(ray, workers, getattr(order.given, "device", None))
        remote = ray.remote(Worker).options(num_cpus=1, num_gpus=share, max_restarts=0, max_task_retries=0)
        driver = _Driver(ray, lambda: remote.remote(order, place, str(Path.cwd()), threads), several)
        try:
            return driver.run(place)
        finally:
            driver.end()


def _shares(ray: Any, workers: int | None, device: str | None) -> tuple[int, float]:
    """How many workers, and which share of a GPU each has."""
    there = ray.cluster_resources()
    gpus = 0 if device == "cpu" else int(there.get("GPU", 0))
    if device is not None and ":" in device:
        raise VlmscopeError(
            f"--device {device} names one GPU, and workers are given theirs; say cuda, or nothing"
        )
    several = workers or gpus or max(1, int(there.get("CPU", 1)))
    return several, int(10_000 / -(-several // gpus)) / 10_000 if gpus else 0.0


class _Driver:
    """Gives out examples, commits what comes back, and replaces workers that die."""

    def __init__(self, ray: Any, start: Callable[[], Any], several: int) -> None:
        self.ray, self.start, self.several = ray, start, several
        self.busy: dict[Any, _Hand] = {}
        self.idle: list[_Hand] = []
        self.deaths: Counter[int] = Counter()
        self.failed = 0

    def run(self, out: Path) -> tuple[Run, int]:
        about, hand = self.first()
        with open_run(out, about.spec, about.description, digests=about.digests) as writer:
            self.about, self.writer = about, writer
            jobs = jobs_of(writer, about.numbers, about.sites)
            self.queue = deque(jobs)
            if jobs:
                for _ in range(min(self.several, len(jobs)) - 1):
                    self.begin()
                self.work(hand, len(about.numbers))
                remove_leftovers(out)  # of those that died
            else:
                self.idle.append(hand)
            if jobs or not writer.is_checked:
                found = self.checked()
                if found is not None:
                    writer.keep_check(found)
            writer.finish()
        return read_run(out), len(about.numbers)

    def first(self) -> tuple[About, _Hand]:
        """What a worker says of the study; it is the first one."""
        while True:
            hand = _Hand(self.start())
            try:
                return self.ask(hand, "begin"), hand
            except self.ray.exceptions.RayError as error:
                self.fail(error)

    def checked(self) -> dict[str, Any] | None:
        while True:
            try:
                hand = self.idle.pop() if self.idle else self.first()[1]
                return self.ask(hand, "check")  # type: ignore[no-any-return]
            except self.ray.exceptions.RayError as error:
                self.fail(error)

    def work(self, hand: _Hand, total: int) -> None:
        """Until all examples are committed; one worker is ready, others may be on their way."""
        finished = total - len(self.queue)
        self.joined(hand, self.about)
        self.compute(hand)
        with progress(total, finished) as step:
            while self.queue or any(hand.job or hand.made for hand in self.busy.values()):
                ready, _ = self.ray.wait(list(self.busy), timeout=None)
                for ref in ready:
                    hand = self.busy.pop(ref)
                    try:
                        found = self.got(ref)
                        if isinstance(found, About):
                            self.joined(hand, found)
                    except self.ray.exceptions.RayError as error:
                        finished -= len(hand.made)
                        self.lost(hand, error)
                        continue
                    if isinstance(found, Done):
                        hand.made += [hand.job] if hand.job else []
                        finished, hand.job = finished + 1, None
                        for text in found.warned:
                            warnings.warn(text, stacklevel=2)
                        self.commit(hand, found.parts)
                        step(found.patches, finished)
                    elif not isinstance(found, About):
                        self.commit(hand, found)
                    self.compute(hand)

    def commit(self, hand: _Hand, parts: list[Part]) -> None:
        for part in parts:
            self.writer.take(part)
            hand.made.clear()

    def compute(self, hand: _Hand) -> None:
        """Give a worker the next example; where there is none, it hands over what it has."""
        if self.queue:
            hand.job = self.queue.popleft()
            reason = REASON if self.deaths[hand.job.number] >= DEATHS else None
            self.busy[hand.actor.compute.remote(hand.job, reason)] = hand
        elif hand.made:
            self.busy[hand.actor.hand_over.remote()] = hand
        else:
            self.idle.append(hand)

    def begin(self) -> None:
        hand = _Hand(self.start())
        self.busy[hand.actor.begin.remote()] = hand

    def joined(self, hand: _Hand, about: About) -> None:
        """A worker that is to do what the first one does."""
        if differ := differing(self.about.spec, about.spec):
            raise VlmscopeError(
                f"a worker on {about.host} would compute another run than that on {self.about.host}: "
                f"{differ}. Install the same versions and the same model on all machines"
            )
        self.failed = 0
        self.ask(hand, "join", self.writer.sites)

    def lost(self, hand: _Hand, error: Exception) -> None:
        """A worker has died: what it did not hand over waits again, and another one takes its place."""
        self.stop(hand)
        where = "" if hand.job is None else f" at example number {hand.job.number} of the data"
        warnings.warn(f"a worker died{where}; another one takes its place", stacklevel=2)
        self.queue.extendleft(reversed(hand.made))
        if hand.job is None and not hand.made:
            self.fail(error)
        if hand.job is not None:
            self.deaths[hand.job.number] += 1
            self.queue.append(hand.job)
        while self.queue and self.idle:
            self.compute(self.idle.pop())
        if self.queue:
            self.begin()

    def fail(self, error: Exception) -> None:
        self.failed += 1
        if self.failed >= DEATHS:
            raise VlmscopeError(
                f"{self.failed} workers died before they could begin ({line(str(error), 150)}); take fewer "
                "of them if they lack memory, or try without"
            ) from error

    def ask(self, hand: _Hand, method: str, *given: Any) -> Any:
        return self.got(getattr(hand.actor, method).remote(*given))

    def got(self, ref: Any) -> Any:
        """A result; what a worker has raised is raised here."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, VlmscopeError | MemoryError):
                raise error.cause from None
            raise RuntimeError(f"in a worker, {line(str(error.cause), 300)}") from error

    def stop(self, hand: _Hand) -> None:
        with suppress(Exception):  # it is dead already
            self.ray.kill(hand.actor)

    def end(self) -> None:
        for hand in [*self.busy.values(), *self.idle]:
            self.stop(hand)


@contextmanager
def _connected(workers: int | None, address: str | None) -> Iterator[Any]:
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

"""Workers that are processes of this machine."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from subprocess import DEVNULL, Popen
from threading import Thread
from typing import TYPE_CHECKING, Any

from vlmscope.errors import VlmscopeError
from vlmscope.studies.workers.orders import Answer, DiedError
from vlmscope.studies.workers.process import Process

if TYPE_CHECKING:
    from vlmscope.studies.workers.team import Team


DEVICES = Path("/dev")
GPUS = ("nvidia*", "kfd", "dxg", "dri")
"""What Linux calls the devices of NVIDIA, of AMD, of Windows around it, and of others."""


@contextmanager
def started(
    workers: int, device: str | None, set_up: Callable[[], object]
) -> Iterator[Callable[[Any], Team]]:
    """As `workers.started`, on this machine."""
    if os.name == "nt":
        raise VlmscopeError("processes of one machine are not started on Windows; share with --shard instead")
    crew = Local(set_up, device != "cpu" and may_have_gpu())
    try:
        first = crew.start_together(workers)
        from vlmscope.studies.workers.team import Team  # what it needs is imported beside them

        yield partial(Team, crew, first)
    finally:
        crew.end()


def may_have_gpu() -> bool:
    """Whether the machine may have a GPU, as far as can be told without torch."""
    return sys.platform != "linux" or any(any(DEVICES.glob(name)) for name in GPUS)


@dataclass(eq=False)
class Actor:
    """One process, the line to it, and its number among those that live; it is asked one thing at a time.
    `process` is what was started: itself, or what it and others are forks of."""

    process: Popen[bytes]
    line: Connection
    number: int
    is_fork: bool

    @property
    def may_live(self) -> bool:
        """Whether it is not known to have ended; a fork also lives where what it is a fork of was killed."""
        return not self.line.closed and (self.is_fork or self.process.poll() is None)


class Local:
    """Starts processes, and asks them; each calls `set_up` first, and takes one of the machine's GPUs in
    turn if `has_gpu`."""

    def __init__(self, set_up: Callable[[], object], has_gpu: bool) -> None:
        self.set_up, self.has_gpu = set_up, has_gpu
        self.actors, self.processes = list[Actor](), list[Popen[bytes]]()

    def start_together(self, many: int) -> list[Actor]:
        """So many of them. Without GPUs they are forks of one process, which has imported what all need."""
        # CUDA's driver and macOS' own libraries do not work in a fork.
        if sys.platform == "linux" and not self.has_gpu:
            return self._start(many)
        return [self.start() for _ in range(many)]

    def start(self) -> Actor:
        [actor] = self._start(1)
        return actor

    def _start(self, many: int) -> list[Actor]:
        self.actors = [actor for actor in self.actors if actor.may_live]
        self.processes = [process for process in self.processes if process.poll() is None]
        taken = {actor.number for actor in self.actors}
        free = islice((n for n in count() if n not in taken), many)
        lines, others = zip(*(connection.Pipe() for _ in range(many)), strict=True)
        ends = [other.fileno() for other in others]
        code = f"from vlmscope.studies.workers.local import serve; serve(*{ends})"
        process = Popen(
            [sys.executable, "-P", "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=ends,
            start_new_session=True,  # Ctrl-C is the driver's, which ends it
            stdin=DEVNULL,
            stdout=DEVNULL,  # the command's own; errors travel
            stderr=DEVNULL,
        )
        for other in others:
            other.close()  # so that the line ends where the process does
        found = [Actor(process, line, number, many > 1) for line, number in zip(lines, free, strict=True)]
        self.actors += found
        self.processes.append(process)
        for actor in found:
            with suppress(OSError):  # it is dead, as its answer says
                actor.line.send((self.set_up, actor.number if self.has_gpu else None))
        return found

    def ask(self, actor: Actor, method: str, *given: Any) -> Actor:
        with suppress(OSError):
            actor.line.send((method, given))
        return actor

    def wait(self, asked: Sequence[Actor]) -> Actor:
        ready = connection.wait([actor.line for actor in asked])
        return next(actor for actor in asked if actor.line in ready)

    def answer(self, asked: Actor) -> Answer:
        try:
            answer = asked.line.recv()
        except (EOFError, OSError) as error:
            asked.line.close()
            if asked.is_fork:
                raise DiedError("its process ended") from error
            code = asked.process.wait()
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            raise DiedError(f"its process ended with {how}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its forks
            process.wait()
        for actor in self.actors:
            actor.line.close()  # which ends the forks of one that was killed


# -- in the process ------------------------------------------------------------------------------


def serve(*numbers: int) -> None:
    """What a process does, with the line that has this number, until the driver has ended; with the lines of
    several, each of as many forks."""
    number = numbers[0] if len(numbers) == 1 else _forked(numbers)
    line, calls = Connection(number), SimpleQueue[Any]()
    Thread(target=_listen, args=(line, calls), daemon=True).start()
    set_up, gpu = _opened(calls)
    process = Process(partial(_ready, set_up, gpu))
    with suppress(Exception):
        process.warm_up()
    while True:
        try:
            method, given = _opened(calls)
            line.send(process.do(method, *given))
        except Exception as error:
            line.send(_sendable(error))


def _forked(numbers: Sequence[int]) -> int:
    """Import what is needed, and become as many forks; gives each its number. The process itself waits for
    them to end: as long as it is there, no other processes can have the name of their group."""
    with suppress(Exception):  # each says so again when it is asked
        Process.imported()
    gc.freeze()  # so that no fork copies what it only looks through
    for number in numbers:
        with suppress(OSError):  # there are too many processes: its line ends
            if os.fork() == 0:
                for other in {*numbers} - {number}:
                    os.close(other)
                return number
    for number in numbers:
        os.close(number)
    with suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)


def _listen(line: Connection, calls: SimpleQueue[bytes]) -> None:
    """Take what is asked, and end with the driver, also where that was killed and could not say so."""
    with suppress(EOFError, OSError):
        while True:
            calls.put(line.recv_bytes())
    os._exit(1)


def _opened(calls: SimpleQueue[bytes]) -> Any:
    return pickle.loads(calls.get())  # noqa: S301 - the driver's own


def _ready(set_up: Callable[[], object], gpu: int | None) -> None:
    """Set a process up, on one of the GPUs there are, in turn."""
    set_up()
    if gpu is None:
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(gpu % torch.cuda.device_count())


def _sendable(error: Exception) -> Exception:
    """An error, or one that says the same, where it cannot travel."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

"""Runs by several processes, through Ray: one model each, examples as they get free, one folder.

Workers write parts beside those of the folder, under temporary names; the driver, which holds the folder,
gives them their names, and that commits them. So what a worker that dies has not handed over is computed
again, by another one, and nothing is there twice. Names and paths travel, no tensors. `Alone` does in this
process what a `Team` does in others.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope.errors import VlmscopeError, line, whole
from vlmscope.progress import progress
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.run_writer import Writer, claim, differing, open_run, remove_leftovers
from vlmscope.studies.sweep import Study, jobs_of
from vlmscope.studies.task import Todo
from vlmscope.studies.workers.cluster import connected, shares
from vlmscope.studies.workers.worker import About as About
from vlmscope.studies.workers.worker import Alone as Alone
from vlmscope.studies.workers.worker import Answer, Order, Worker
from vlmscope.studies.workers.worker import Given as Given
from vlmscope.studies.workers.worker import alone as alone

DEATHS = 3
"""Workers that die on an example until it is left out, and that die before they begin until the run ends."""
REASON = f"{DEATHS} workers died on it; take fewer of them if they lack memory, or run it alone"


@contextmanager
def team(
    given: Given,
    *,
    workers: int | None = None,
    address: str | None = None,
    set_up: Callable[[], object] = lambda: None,
) -> Iterator[Team]:
    """Several processes, each with what is given to it.

    `workers` are as many processes on this machine, or, with the `address` HOST:PORT of a Ray cluster's head
    (or `auto`), on that: by default as many as it has GPUs, or else cores. GPUs are shared out evenly. Each
    process calls `set_up` before it loads anything; torch has one thread in it unless that says more. All
    machines have the package in the same version, and the model, the data and folders under the same paths.

    Raises `VlmscopeError` where Ray is not installed, not reachable or of another version.
    """
    if workers is not None:
        whole(workers, "the number of workers", 1, 10_000)
    # Ray says what becomes of its workers on standard output, which is the command's own.
    with redirect_stdout(StringIO()), connected(workers, address) as ray:
        several, share = shares(ray, workers, getattr(given, "device", None))
        remote = ray.remote(Worker).options(num_cpus=1, num_gpus=share, max_restarts=0, max_task_retries=0)
        found = Team(ray, lambda: remote.remote(given, str(Path.cwd()), set_up), several)
        try:
            yield found
        finally:
            found.end()


class Piece(NamedTuple):
    """What a worker is to do: a method of it, and with what; its number, of an example or a call."""

    method: str
    number: int = 0
    given: tuple[Any, ...] = ()


HAND_OVER = Piece("hand_over")


@dataclass
class _Hand:
    """A worker as the driver sees it: what it does now, what it has not handed over, and of which order it
    was asked last to make a study."""

    actor: Any
    piece: Piece | None = None
    made: list[Piece] = field(default_factory=list)
    order: Order | None = None


class Team:
    """Gives out what there is to do, commits what comes back, and replaces workers that die.

    Made by `team`. Its methods raise what the workers raise, and `VlmscopeError` where workers die before
    they begin, or over one call again and again.
    """

    def __init__(self, ray: Any, start: Callable[[], Any], several: int) -> None:
        self.ray, self.start = ray, start
        self.busy: dict[Any, _Hand] = {}
        self.idle: list[_Hand] = []
        self.queue = deque[Piece]()
        self.deaths: Counter[int] = Counter()
        self.failed = 0
        for _ in range(several):
            self.begin()

    def fill(
        self, out: str | os.PathLike[str], study: Callable[..., Study], options: dict[str, Any]
    ) -> tuple[Run, int]:
        """Fill a run folder with what `study(model, examples, **options)` says: the run, and how many
        examples it was asked for.

        The folder is that of one process with as many threads for torch, bit for bit on the same kind of
        device, and can be gone on with by one, or by others. What a worker that dies had not handed over is
        computed by another one; an example on which three died is left out, with that reason.
        """
        place = Path(out).absolute()
        claim(place)
        order = Order(study, options, place)
        about = self.made(order)
        with open_run(place, about.spec, about.description, digests=about.digests) as writer:
            jobs = jobs_of(writer, about.numbers, about.sites)
            if jobs:
                self.compute(writer, order, about, jobs)
                remove_leftovers(place)  # of those that died
            if jobs or not writer.is_checked:
                [(_, _, found)] = self.done([Piece("check", 0, (order,))])
                if found is not None:
                    writer.keep_check(found)
            writer.finish()
        return read_run(place), len(about.numbers)

    def each(self, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """`function(given, *some)` of each call `(function, *some)`, in their order."""
        pieces = [Piece("call", number, tuple(call)) for number, call in enumerate(calls)]
        found: dict[int, Any] = {}
        following = 0
        for _, piece, value in self.done(pieces):
            found[piece.number] = value
            while following in found:
                yield found.pop(following)
                following += 1

    def made(self, order: Order) -> About:
        """What the first worker that has made a study says of it; others are on their way."""
        for hand in self.idle:
            self.make(hand, order)
        self.idle.clear()
        while True:
            hand, found = self.one()
            if hand.order == order:
                self.idle.append(hand)
                return found  # type: ignore[no-any-return]
            self.make(hand, order)

    def make(self, hand: _Hand, order: Order) -> None:
        hand.order = order
        self.busy[hand.actor.do.remote("make", order)] = hand

    def compute(self, writer: Writer, order: Order, about: About, jobs: Sequence[Todo]) -> None:
        """Until all examples are committed."""
        pieces = [Piece("compute", job.number, (order, writer.sites, job)) for job in jobs]
        total = len(about.numbers)
        with progress(total, total - len(jobs)) as step:
            for hand, piece, done in self.done(pieces):
                if done.about is not None:
                    _check_same(about, done.about)
                if piece is not HAND_OVER:
                    hand.made.append(piece)
                for part in done.parts:
                    writer.take(part)
                    hand.made.clear()
                left = len(self.queue) + sum(other.piece not in (None, HAND_OVER) for other in self.all())
                step(done.patches, total - left)

    def done(self, pieces: Iterable[Piece]) -> Iterator[tuple[_Hand, Piece, Any]]:
        """What is said of pieces of work, as it comes, until nothing waits to be handed over."""
        self.queue, self.deaths = deque(pieces), Counter()
        self.wake()
        while self.queue or any(hand.piece or hand.made for hand in self.busy.values()):
            hand, found = self.one()
            piece, hand.piece = hand.piece, None
            if piece is not None:  # and it has not just begun
                yield hand, piece, found
            self.give(hand)

    def one(self) -> tuple[_Hand, Any]:
        """A worker that has done what it was given, and what it says; those that died are replaced."""
        while True:
            [ref], _ = self.ray.wait([*self.busy])
            hand = self.busy.pop(ref)
            try:
                answer = self.got(ref)
            except self.ray.exceptions.RayError as error:
                self.lost(hand, error)
                continue
            if hand.piece or hand.order:
                self.failed = 0
            for text in answer.warned:
                warnings.warn(text, stacklevel=2)
            return hand, answer.value

    def got(self, ref: Any) -> Answer:
        """A result; what a worker has raised is raised here."""
        try:
            return self.ray.get(ref)  # type: ignore[no-any-return]
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, VlmscopeError | MemoryError):
                raise error.cause from None
            raise RuntimeError(f"in a worker, {line(str(error.cause), 300)}") from error

    def give(self, hand: _Hand) -> None:
        """Give a worker the next piece; where there is none, it hands over what it has."""
        if self.queue:
            piece = hand.piece = self.queue.popleft()
            refused = piece.method == "compute" and self.deaths[piece.number] >= DEATHS
            more = [REASON] if refused else []
            self.busy[hand.actor.do.remote(piece.method, *piece.given, *more)] = hand
        elif hand.made:
            hand.piece = HAND_OVER
            self.busy[hand.actor.do.remote("hand_over")] = hand
        else:
            self.idle.append(hand)

    def wake(self) -> None:
        while self.queue and self.idle:
            self.give(self.idle.pop())

    def begin(self) -> None:
        hand = _Hand(self.start())
        self.busy[hand.actor.do.remote("begin")] = hand

    def lost(self, hand: _Hand, error: Exception) -> None:
        """A worker has died: what it did not hand over waits again, and another one takes its place."""
        self.stop(hand)
        piece = hand.piece
        where = (
            f" at example number {piece.number} of the data" if piece and piece.method == "compute" else ""
        )
        warnings.warn(f"a worker died{where}; another one takes its place", stacklevel=2)
        self.queue.extendleft(reversed(hand.made))
        if piece is None:
            self.failed += 1
            if self.failed >= DEATHS:
                raise self.given_up("before they could begin", error)
        elif piece is not HAND_OVER:
            self.deaths[piece.number] += 1
            if piece.method != "compute" and self.deaths[piece.number] >= DEATHS:
                raise self.given_up("of the same", error)
            self.queue.append(piece)
        self.wake()
        self.begin()

    def given_up(self, what: str, error: Exception) -> VlmscopeError:
        return VlmscopeError(
            f"{DEATHS} workers died {what} ({line(str(error), 150)}); take fewer of them if they lack "
            "memory, or try without"
        )

    def all(self) -> list[_Hand]:
        return [*self.busy.values(), *self.idle]

    def stop(self, hand: _Hand) -> None:
        with suppress(Exception):  # it is dead already
            self.ray.kill(hand.actor)

    def end(self) -> None:
        for hand in self.all():
            self.stop(hand)


def _check_same(about: About, other: About) -> None:
    if differ := differing(about.spec, other.spec):
        raise VlmscopeError(
            f"a worker on {other.host} would compute another run than that on {about.host}: {differ}. "
            "Install the same versions and the same model on all machines"
        )

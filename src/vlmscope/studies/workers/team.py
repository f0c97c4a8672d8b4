"""The process that holds the folders: it gives out what there is to do, and commits what comes back."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from vlmscope.errors import VlmscopeError, line
from vlmscope.progress import progress
from vlmscope.studies.run_folder import Run, read_run
from vlmscope.studies.run_writer import Todo, Writer, claim, differing, open_run, remove_leftovers
from vlmscope.studies.workers.orders import About, Answer, DiedError, Given, Order

DEATHS = 3
"""Workers that die on an example until it is left out, and that die before they begin until the run ends."""
AT_ONCE = 0.5
"""Seconds of work that a worker is given at once: each call costs it, and this process, some milliseconds."""
REASON = f"{DEATHS} workers died on it; take fewer of them if they lack memory, or run it alone"


class Crew(Protocol):
    """Processes with a `Worker` each: of this machine (`local`), or Ray's (`cluster`)."""

    def start(self) -> Any:
        """One more of them, which begins at once to import what it needs."""

    def ask(self, actor: Any, method: str, *given: Any) -> Any:
        """Call a method of a worker that waits for nothing: what the call is known by."""

    def wait(self, asked: Sequence[Any]) -> Any:
        """One of the calls that are done, as soon as there is one."""

    def answer(self, asked: Any) -> Answer:
        """What a call gave; raises what it raised, or `DiedError`."""


class Piece(NamedTuple):
    """What a worker is to do: a method of it, and with what; its number, of an example or a call. Pieces that
    differ by their `job` may be given at once."""

    method: str
    number: int = 0
    given: tuple[Any, ...] = ()
    job: Todo | None = None


HAND_OVER = Piece("hand_over")


@dataclass
class _Hand:
    """A worker as the driver sees it: what it does now and since when, what it has not handed over, and
    of which order it was asked last to make a study."""

    actor: Any
    pieces: list[Piece] = field(default_factory=list)
    made: list[Piece] = field(default_factory=list)
    order: Order | None = None
    since: float = 0.0


class Team:
    """Gives out what there is to do, commits what comes back, and replaces workers that die.

    `first` are the workers that are there, the crew starts others in their place; `given` is given to all.
    Its methods raise what the workers raise, and `VlmscopeError` where workers die before they begin, or
    over one call again and again.
    """

    def __init__(self, crew: Crew, first: Iterable[Any], given: Given) -> None:
        self.crew, self.given = crew, given
        self.busy: dict[Any, _Hand] = {}
        self.idle: list[_Hand] = []
        self.queue = deque[Piece]()
        self.deaths: Counter[int] = Counter()
        self.seconds = inf  # that a job takes
        self.failed = 0
        for actor in first:
            self.begin(actor)
        self.many = len(self.busy)

    def fill(
        self, out: str | os.PathLike[str], study: Callable[..., Any], options: dict[str, Any]
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

        def same() -> None:
            [_] = self.done([Piece("same", 0, (order,))])

        with open_run(place, about.spec, about.description, same=same) as writer:
            jobs = writer.todo(about.numbers, about.sites)
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
        for _, [piece], value in self.done(pieces):
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
        self.busy[self.crew.ask(hand.actor, "make", order)] = hand

    def compute(self, writer: Writer, order: Order, about: About, jobs: Sequence[Todo]) -> None:
        """Until all examples are committed."""
        pieces = [Piece("compute", job.number, (order, writer.sites), job) for job in jobs]
        total = len(about.numbers)
        with progress(total, total - len(jobs)) as step:
            for hand, some, done in self.done(pieces):
                if done.about is not None:
                    _check_same(about, done.about)
                hand.made += [piece for piece in some if piece is not HAND_OVER]
                for part in done.parts:
                    writer.take(part)
                    hand.made.clear()
                at_hand = [piece for other in self.busy.values() for piece in other.pieces]
                left = len(self.queue) + sum(piece is not HAND_OVER for piece in at_hand)
                step(done.patches, total - left)

    def done(self, pieces: Iterable[Piece]) -> Iterator[tuple[_Hand, list[Piece], Any]]:
        """What is said of pieces of work, as it comes, until nothing waits to be handed over."""
        self.queue, self.deaths, self.seconds = deque(pieces), Counter(), inf
        self.wake()
        while self.queue or any(hand.pieces or hand.made for hand in self.busy.values()):
            hand, found = self.one()
            some, hand.pieces = hand.pieces, []
            if some:  # and it has not just begun
                if some[0].job is not None:
                    self.seconds = (perf_counter() - hand.since) / len(some)
                yield hand, some, found
            self.give(hand)

    def one(self) -> tuple[_Hand, Any]:
        """A worker that has done what it was given, and what it says; those that died are replaced."""
        while True:
            asked = self.crew.wait([*self.busy])
            hand = self.busy.pop(asked)
            try:
                answer = self.got(asked)
            except DiedError as error:
                self.lost(hand, error)
                continue
            if hand.pieces or hand.order:
                self.failed = 0
            for text in answer.warned:
                warnings.warn(text, stacklevel=2)
            return hand, answer.value

    def got(self, asked: Any) -> Answer:
        """A result; what a worker has raised is raised here."""
        try:
            return self.crew.answer(asked)
        except (DiedError, VlmscopeError, MemoryError):
            raise
        except ImportError as error:
            raise VlmscopeError(
                f"a worker cannot import what it needs ({line(str(error), 200)}); install the same "
                "packages on all machines"
            ) from error
        except Exception as error:
            raise RuntimeError(f"in a worker, {line(str(error), 300)}") from error

    def give(self, hand: _Hand) -> None:
        """Give a worker the next pieces; where there are none, it hands over what it has."""
        if not self.queue and not hand.made:
            self.idle.append(hand)
            return
        hand.pieces, hand.since = self.next() if self.queue else [HAND_OVER], perf_counter()
        first = hand.pieces[0]
        jobs = [] if first.job is None else [[piece.job for piece in hand.pieces]]
        more = [REASON] if jobs and self.deaths[first.number] >= DEATHS else []
        self.busy[self.crew.ask(hand.actor, first.method, *first.given, *jobs, *more)] = hand

    def next(self) -> list[Piece]:
        """The next piece, or several jobs: so many that all are busy to the end; one where a worker died."""
        some = [self.queue.popleft()]
        if some[0].job is None or self.deaths[some[0].number]:
            return some
        many = min(AT_ONCE / self.seconds, len(self.queue) / (2 * self.many))
        while len(some) < many and not self.deaths[self.queue[0].number]:
            some.append(self.queue.popleft())
        return some

    def wake(self) -> None:
        while self.queue and self.idle:
            self.give(self.idle.pop())

    def begin(self, actor: Any) -> None:
        self.busy[self.crew.ask(actor, "begin", self.given)] = _Hand(actor)

    def lost(self, hand: _Hand, error: Exception) -> None:
        """A worker has died: what it did not hand over waits again, and another one takes its place."""
        pieces = hand.pieces
        numbers = [str(piece.number) for piece in pieces if piece.job]
        one_of = "example number" if len(numbers) == 1 else "one of the examples number"
        where = f" at {one_of} {', '.join(numbers)} of the data" if numbers else ""
        warnings.warn(f"a worker died{where}; another one takes its place", stacklevel=2)
        self.queue.extendleft(reversed(hand.made))
        if not pieces:
            self.failed += 1
            if self.failed >= DEATHS:
                raise self.given_up("before they could begin", error)
        elif pieces != [HAND_OVER]:
            self.deaths.update(piece.number for piece in pieces)
            if not numbers and self.deaths[pieces[0].number] >= DEATHS:
                raise self.given_up("of the same", error)
            self.queue.extend(pieces)
        self.wake()
        self.begin(self.crew.start())

    def given_up(self, what: str, error: Exception) -> VlmscopeError:
        return VlmscopeError(
            f"{DEATHS} workers died {what} ({line(str(error), 150)}); take fewer of them if they lack "
            "memory, or try without"
        )


def _check_same(about: About, other: About) -> None:
    if differ := differing(about.spec, other.spec):
        raise VlmscopeError(
            f"a worker on {other.host} would compute another run than that on {about.host}: {differ}. "
            "Install the same versions and the same model on all machines"
        )

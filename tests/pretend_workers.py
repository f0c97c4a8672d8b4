"""A crew of workers in this process, which die when a test says so."""

from __future__ import annotations

import itertools
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from vlmscope.studies.workers.orders import DiedError
from vlmscope.studies.workers.team import Team
from vlmscope.studies.workers.worker import Worker


class KilledError(BaseException):
    """Where a process is killed: nothing of it goes on."""


@dataclass
class Actor:
    """A worker, and the calls that wait for it; they are done when they are waited for, one after another."""

    dies: Callable[[str], bool]
    worker: Worker = field(default_factory=Worker)
    calls: deque[tuple[int, str, tuple[Any, ...]]] = field(default_factory=deque)
    answers: dict[int, Any] = field(default_factory=dict)
    is_dead: bool = False

    def advance(self) -> None:
        number, method, given = self.calls.popleft()
        try:
            if self.is_dead or self.dies(f"before {method}"):
                raise KilledError
            self.answers[number] = self.worker.do(method, *given)
            if self.dies(f"after {method}"):
                raise KilledError
        except KilledError:
            self.is_dead = True
            self.answers[number] = DiedError("the actor died")
        except Exception as error:
            self.answers[number] = error


class Pretended:
    """Stands for the processes of a machine or a cluster, in the order that `random` says."""

    def __init__(self, random: Random, dies: Callable[[str], bool] = lambda moment: False) -> None:
        self.random, self.dies, self.numbers = random, dies, itertools.count()
        self.actors: dict[int, Actor] = {}

    def team(self, workers: int, given: Any) -> Team:
        return Team(self, [self.start() for _ in range(workers)], given)

    def start(self) -> Actor:
        return Actor(self.dies)

    def ask(self, actor: Actor, method: str, *given: Any) -> int:
        if method == "begin":  # each has its own
            given = pickle.loads(pickle.dumps(given))  # noqa: S301 - our own
        number = next(self.numbers)
        actor.calls.append((number, method, given))
        self.actors[number] = actor
        return number

    def wait(self, asked: Sequence[int]) -> int:
        number = self.random.choice(asked)
        while number not in self.actors[number].answers:
            self.actors[number].advance()
        return number

    def answer(self, asked: int) -> Any:
        answer = self.actors[asked].answers.pop(asked)
        if isinstance(answer, Exception):
            raise answer
        return answer

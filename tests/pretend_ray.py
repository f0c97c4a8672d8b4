"""What the driver uses of Ray, with workers in this process that die when a test says so; no cluster."""

from __future__ import annotations

import itertools
import pickle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from vlmscope.studies.workers.worker import Worker


class RayError(Exception):
    """A worker has died."""


class RayTaskError(RayError):
    """A worker has raised something."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class DiesError(BaseException):
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
                raise DiesError
            self.answers[number] = self.worker.do(method, *given)
            if self.dies(f"after {method}"):
                raise DiesError
        except DiesError:
            self.is_dead = True
            self.answers[number] = RayError("the actor died")
        except Exception as error:
            self.answers[number] = RayTaskError(error)


class Pretended:
    """Stands for the module `ray` and its actors, in the order that `random` says."""

    class exceptions:  # noqa: N801 - as it is called there
        RayError = RayError
        RayTaskError = RayTaskError

    def __init__(self, random: Random, dies: Callable[[str], bool] = lambda moment: False) -> None:
        self.random, self.dies, self.numbers = random, dies, itertools.count()
        self.actors: dict[int, Actor] = {}

    def start(self) -> Any:
        return Handle(self, Actor(self.dies))

    def wait(self, refs: list[int]) -> tuple[list[int], list[int]]:
        ref = self.random.choice(refs)
        while ref not in self.actors[ref].answers:
            self.actors[ref].advance()
        return [ref], [other for other in refs if other != ref]

    def get(self, ref: int) -> Any:
        answer = self.actors[ref].answers.pop(ref)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Handle:
    """What the driver has of an actor; `handle.do.remote(…)` is a call."""

    def __init__(self, ray: Pretended, actor: Actor) -> None:
        self.ray, self.actor, self.do = ray, actor, self

    def remote(self, method: str, *given: Any) -> int:
        if method == "begin":  # each has its own
            given = pickle.loads(pickle.dumps(given))  # noqa: S301 - our own
        number = next(self.ray.numbers)
        self.actor.calls.append((number, method, given))
        self.ray.actors[number] = self.actor
        return number

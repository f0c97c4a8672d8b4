"""What each of several processes does, and what one does that is alone."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import uuid4

from vlmscope import files
from vlmscope.errors import ExampleError, StoreError
from vlmscope.runs.model import Model
from vlmscope.studies.rows import run_jobs
from vlmscope.studies.run_folder import Run, read_run, table_in
from vlmscope.studies.run_writer import Part, Todo, Waiting, check_examples
from vlmscope.studies.sweep import Study, into_folder, show
from vlmscope.studies.task import description_of
from vlmscope.studies.workers.orders import About, Answer, Done, Given, Order


@dataclass
class Alone:
    """What a team does, done by this process."""

    given: Given

    @cached_property
    def model(self) -> Model:
        return self.given.load()

    @cached_property
    def examples(self) -> Any:
        return self.given.examples()

    def fill(
        self, out: str | os.PathLike[str], study: Callable[..., Study], options: dict[str, Any]
    ) -> tuple[Run, int]:
        """As `Team.fill`."""
        examples = self.examples  # a file that is not there is refused before a model is loaded
        made = study(self.model, examples, **options)
        return into_folder(made, out), len(made.task.numbers)

    def each(self, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """As `Team.each`."""
        for function, *some in calls:
            yield function(self.given, *some)


class Worker(Alone):
    """One process: a model, and the examples that wait to be handed over."""

    def __init__(self) -> None:
        self.name, self.count = uuid4().hex, 0
        self.order: Order | None = None
        self.waiting: Waiting | None = None

    def do(self, method: str, *given: Any) -> Answer:
        """What one of the others gives."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = getattr(self, method)(*given)
        return Answer(value, [str(one.message) for one in caught])

    def begin(self, given: Given) -> None:
        """Load the model. The first call."""
        super().__init__(given)
        self.model  # noqa: B018

    def make(self, order: Order) -> About:
        """Make a study."""
        self.study = order.study(self.model, self.examples, **order.options)
        self.order, self.waiting = order, None
        self.about = About(
            self.study.spec,
            description_of(self.model),
            self.study.task.numbers,
            self.study.task.sites,
            socket.gethostname(),
        )
        return self.about

    def same(self, order: Order) -> None:
        """Refuse a folder that holds other examples."""
        if self.order != order:
            self.make(order)
        check_examples(order.out, self.study.task.digests)

    def compute(self, order: Order, sites: list[str], jobs: list[Todo], reason: str | None = None) -> Done:
        """The rows of some examples, or that they are left out for a reason; parts, when it is time.

        `sites` are the site expressions of the folder.
        """
        if self.order != order:
            self.make(order)
        about = None
        if self.waiting is None:
            about, self.waiting = self.about, self.joined(order, sites)
        work = self.study.work if reason is None else _refused(reason)
        patches = 0
        for result in run_jobs(self.study.task, jobs, quiet=True, work=work):
            show(order.out, self.study.task, result.job)
            self.waiting.add(result.job.number, result.rows, result.baseline, result.job.sites)
            patches += len(result.rows)
        done = self.hand_over() if self.waiting.is_due() else Done([])
        return done._replace(patches=patches, about=about)

    def joined(self, order: Order, sites: list[str]) -> Waiting:
        """What waits for a folder, which has to be there."""
        if not (order.out / "run.json").exists():
            raise StoreError(
                f"{order.out}: is not there on {socket.gethostname()}; choose an --out on a disk that all "
                "machines of the cluster share"
            )
        return Waiting(self.study.spec, sites, self.study.task.digests)

    def hand_over(self) -> Done:
        """Write what waits, for the driver to commit."""
        assert self.order is not None and self.waiting is not None, "nothing is computed yet"
        part = self.waiting.part()
        if part is None:
            return Done([])
        found = []
        for folder, content in ((table_in(self.study.spec), part.rows), ("baselines", part.baselines)):
            # That of a killed run is removed.
            file = self.order.out / folder / f".{self.name}-{self.count}.tmp"
            files.write(file, content)
            found.append(file)
        self.count += 1
        self.waiting.is_written()
        return Done([Part(part.held, *found)])

    def check(self, order: Order) -> dict[str, Any] | None:
        """What the study's check finds of the folder."""
        if self.order != order:
            self.make(order)
        return self.study.finish(read_run(order.out))

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """What a function of what was given to all says."""
        return function(self.given, *given)


def _refused(reason: str) -> Any:
    def refuse(*_: Any) -> Any:
        raise ExampleError(reason)

    return refuse

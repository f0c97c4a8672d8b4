"""The process of a worker, before it has imported what it needs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cached_property
from typing import Any


class Process:
    """What a process is asked for: calls of the `Worker` in it, which is imported there alone."""

    def __init__(self, set_up: Callable[[], object]) -> None:
        self.set_up = set_up

    def warm_up(self) -> None:
        """Import what is needed, while the driver does; what is wrong is said by the first `do`."""
        self.worker  # noqa: B018

    def do(self, method: str, *given: Any) -> Any:
        return self.worker.do(method, *given)

    @cached_property
    def worker(self) -> Any:
        worker = self.imported()
        self.set_up()
        return worker()

    @staticmethod
    def imported() -> Any:
        """The class of a `Worker`."""
        gc.disable()  # nothing of what is imported is garbage, and to find none takes a sixth of the time
        try:
            from vlmscope.studies.workers.worker import Worker
        finally:
            gc.enable()
        return Worker

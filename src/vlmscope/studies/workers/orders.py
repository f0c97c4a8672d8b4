"""What travels between the process that holds the folders and its workers.

Nothing large is imported here, so that workers are started before anything is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from vlmscope.runs.model import Model
    from vlmscope.studies.run_writer import Part


class DiedError(Exception):
    """A worker has died."""


@dataclass(frozen=True)
class Named:
    """A function by its name, such as `studies.sweep:swept`: its module is imported where it is called."""

    name: str

    def __call__(self, *given: Any, **options: Any) -> Any:
        module, _, name = self.name.partition(":")
        return getattr(import_module(f"vlmscope.{module}"), name)(*given, **options)


class Given(Protocol):
    """What each process loads for itself; a value that can be sent. What `examples` gives is for studies."""

    def load(self) -> Model: ...

    def examples(self) -> Any: ...


class Order(NamedTuple):
    """What a folder is filled with, as it travels.

    `study(model, examples, **options)` is one of `sweep.swept`, `knockout.knocked_out`,
    `attribution.attributed`, `screen.screened` and their like, or one `Named`.
    """

    study: Callable[..., Any]
    options: dict[str, Any]
    out: Path


class About(NamedTuple):
    """What the driver has to know of a study."""

    spec: dict[str, Any]
    description: dict[str, Any]
    numbers: range
    sites: list[str]
    host: str


class Done(NamedTuple):
    """What a worker hands over: parts, files beside those of the folder, and how many patches the
    examples took; with the first ones, of which study they are."""

    parts: list[Part]
    patches: int = 0
    about: About | None = None


class Answer(NamedTuple):
    """What a worker answers, and what it warns of."""

    value: Any
    warned: list[str]

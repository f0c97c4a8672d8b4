"""Whose turn it is to run a model: hooks are on its modules, so a model is one thread's at a time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vlmscope.errors import RoomError, line


@dataclass(eq=False)
class _Turn:
    """Whose turn it is to run a model: one thread's at a time."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    taken: bool = False
    warned: bool = False


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_FINDING = threading.Lock()


@contextmanager
def alone(hf: nn.Module, name: str) -> Iterator[None]:
    """Within this context, which may be entered again, no other thread runs the model, and it is in
    evaluation mode: hooks are on the modules, so two runs at once would see each other's edits. Raises
    `RoomError` where what is run is out of memory.
    """
    with _FINDING:  # not kept in the model, so that it can still be copied
        turn = _TURNS.setdefault(hf, _Turn())
    with turn.lock:
        training = [] if turn.taken else _training(hf)
        if training and not turn.warned:
            turn.warned = True
            warnings.warn(
                f"{name} is in training mode, where dropout makes results random; it is run in "
                "evaluation mode and put back behind each run",
                stacklevel=5,
            )
        before, turn.taken = turn.taken, True
        for module in training:
            module.training = False
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise RoomError(
                f"{name}: a run needs more memory than there is ({line(str(error), 120)}); take a smaller "
                "picture, a shorter prompt, another dtype or a device with more memory"
            ) from error
        finally:
            turn.taken = before
            for module in training:
                module.training = True


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "alloc" in str(error).lower() and "memory" in str(error).lower()
    )


def _training(hf: nn.Module) -> list[nn.Module]:
    """The modules in training mode; by `modules()`, which makes all names, it takes five times as long."""
    todo = [hf]
    for module in todo:
        if module._modules:
            todo += [child for child in module._modules.values() if child is not None]
    return [module for module in todo if module.training]

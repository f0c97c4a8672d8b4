"""What the command line writes: nothing that steers a terminal, and one line for whatever goes wrong."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from vlmscope.errors import INTERRUPTED, VlmscopeError, line, plain

TRACEBACK = "VLMSCOPE_TRACEBACK"
"""The environment variable with which an error is followed by where it came from."""


class Plain:
    """A text stream to which texts of data can be printed: what steers a terminal is written as an escape."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failed: VlmscopeError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; raises `VlmscopeError` where that fails (a full disk, a closed pipe), and from then on."""
        return self._tried(lambda: self._stream.write(plain(text) if isinstance(text, str) else text))

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, once: Callable[[], Any]) -> Any:
        if self._failed:  # whoever printed may have kept it to themselves, as typer does with its help
            raise self._failed
        try:
            return once()
        except OSError as error:
            self._failed = _unwritable(self._stream, error)
            raise self._failed from error


def _unwritable(stream: TextIO, error: OSError) -> VlmscopeError:
    # Python would try again when it ends, and say so in lines of its own.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return VlmscopeError(
        f"standard output cannot be written ({error.strerror}); what was written to files is there: "
        "run the same command again with its output elsewhere"
    )


def run(app: Callable[..., Any]) -> int:
    """Run a typer application.

    Its exit status: 0, 1 for an error, 2 for a command line that is none, 130 where it was interrupted.
    """
    out = sys.stdout
    shown = Plain(out or io.StringIO())  # there is none where it was closed
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding lacks is written as an escape.
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        sys.stdout = shown  # type: ignore[assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _warn  # type: ignore[assignment]
            status = int(app(prog_name="vlmscope", standalone_mode=False) or 0)
            shown.flush()
        said = ""
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        said, status = answer(error)
    finally:
        sys.stdout = out
    if status == 130:
        said = INTERRUPTED
    if said:
        with suppress(OSError, ValueError):
            print(said, file=sys.stderr)
    return status


def answer(error: BaseException) -> tuple[str, int]:
    """The line that says what went wrong, and the exit status; the one place that makes it.

    >>> answer(VlmscopeError("no such file; name another"))
    ('error: no such file; name another', 1)
    """
    if isinstance(error, VlmscopeError):
        return f"error: {error}", 1
    if isinstance(error, KeyboardInterrupt):
        return "", 130
    if hasattr(error, "format_message"):  # typer's own: a command line that is none
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "vlmscope"
        if context and type(error).__name__ == "NoArgsIsHelpError":
            return str(context.get_help()), 2
        message = error.format_message().rstrip(".")
        way_out = f"'{command} --help' shows what is expected"
        return line(f"error: {command}: {message}; {way_out}", 400), 2
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        why = line(str(error), 100)
        return f"error: out of memory ({why}); take a smaller model or another --dtype", 1
    what = f"{type(error).__name__}: {line(str(error), 200)}"
    return (f"error: {what}; this is a bug of vlmscope. Please report it with what {TRACEBACK}=1 prints", 1)


def table(rows: Any, digits: int = 3) -> str:
    """A table as it is printed: numbers of so many digits, no index."""
    return str(rows.to_string(index=False, float_format=f"{{:.{digits}g}}".format))


def _warn(text: Warning | str, *_: Any, **__: Any) -> None:
    print(line(f"warning: {text}", 400), file=sys.stderr)

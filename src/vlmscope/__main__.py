"""`python -m vlmscope`, and the entry point: interruptions are answered before anything large is imported."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from vlmscope.errors import INTERRUPTED


def main() -> None:
    """Run the command line; Ctrl-C is one line on standard error and the exit status 130, from the start."""
    asked = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a script's background has none
    if asked:
        # An exception could get lost in an import; nothing is there yet that would have to be tidied up.
        signal.signal(signal.SIGINT, _leave)
    from vlmscope.cli.main import main as run

    if asked:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:
        _leave()
    finally:
        if asked:
            signal.signal(signal.SIGINT, _leave)


def _leave(number: int = 0, frame: FrameType | None = None) -> NoReturn:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    main()

"""Downloading images from addresses that nobody vouches for.

The addresses come from a table that somebody else wrote, and what answers there may have changed since.
Whatever a server does is the failure of its picture alone. What arrives counts only if it decodes as an
image. A file appears under its name when it is whole, in the folder that is given, and never in place of
another.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from PIL import Image

from vlmscope import files
from vlmscope.data.images import MAX_PIXELS, open_image
from vlmscope.data.published.layout import by_stem
from vlmscope.data.published.web import Clock, Failure, Limits, get
from vlmscope.data.table import read_table
from vlmscope.errors import DataError, ExampleError, StoreError, line, shown

BLOCK = 1024
"""Bytes that are decoded at once: hundreds of scans of a progressive JPEG would fit into Pillow's 64 KiB, and
each of them takes a tenth of a second."""
MIN_SIDE = 8
"""Pixels; anything smaller is a placeholder or counts visitors."""
DECODERS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
"""Formats that photographs come in, and suffixes. Some of Pillow's other decoders start programs."""
LONGEST_ADDRESS = 200
"""Characters of an address in the log; what is longer, or cannot be printed, ends with its hash there."""

# Trying again later is of no use where a reason begins with one of these.
_PERMANENT = re.compile(
    "HTTP 4(?!08|25|29)|not an |too (large|small|many redirects)|address not public|credentials in"
)

# Pillow's warnings are silenced while an image is checked, and that holds for all threads.
_ONE_AT_A_TIME = threading.Lock()


def is_permanent(reason: str) -> bool:
    """Whether trying again later is of no use.

    >>> is_permanent("HTTP 404 Not Found"), is_permanent("HTTP 429 Too Many Requests")
    (True, False)
    >>> is_permanent("timed out after 60 s")
    False
    """
    return _PERMANENT.match(reason) is not None


def fetch(
    jobs: Mapping[str, str],
    folder: Path,
    *,
    log: Path | None = None,
    limits: Limits | None = None,
    workers: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Download addresses to files in a folder, and return what could not be had, with the reason.

    `jobs` gives each address the name of its file; the suffix is that of the content. What is there, with
    any suffix of an image, is not fetched again. Ctrl-C stops after the tries in progress and leaves every
    whole file in place. `log` is a CSV file (url, reason) of what failed; what failed for good in an earlier
    call is not tried again: delete the file to do so.

    >>> fetch({"file:///etc/passwd": "a", "http://me:secret@host/": "b"}, Path("images"))
    {'file:///etc/passwd': 'not an http or https address',
     'http://me:secret@host/': 'credentials in the address'}
    """
    known = _read_log(log) if log else {}
    named = {url: _named(url) for url in jobs}
    failed = {url: known[key] for url, key in named.items() if is_permanent(known.get(key, ""))}
    there = by_stem([folder])
    rest = {url: name for url, name in jobs.items() if url not in failed}
    todo: dict[str, str] = {}
    for url, name in rest.items():
        if name in there:
            continue
        if why := _refuse(name, todo):
            failed[url] = why
        else:
            todo[name] = url
    done = len(rest) - len(todo)
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="download")
    try:
        futures = {
            pool.submit(_try, url, folder / name, limits or Limits(), stop): url for name, url in todo.items()
        }
        waiting: set[Future[str | None]] = set(futures)
        while waiting:
            # In short turns, so that Ctrl-C is heard on every system.
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                if reason := future.result():
                    failed[futures[future]] = reason
                done += 1
                if progress:
                    progress(done, len(rest))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        if log:
            others = {key: why for key, why in known.items() if key not in named.values()}
            _write_log(log, others | {named[url]: failed[url] for url in jobs if url in failed})
    return {url: failed[url] for url in jobs if url in failed}


def _named(url: str) -> str:
    """An address as the log has it; a quotation mark would stand there twice."""
    short = line(url, LONGEST_ADDRESS).replace('"', "?")
    digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return url if short == url else f"{short} {digest}"


def _read_log(log: Path) -> dict[str, str]:
    try:
        return (
            {row["url"]: row["reason"] for row in read_table(log, ("url", "reason"))} if log.exists() else {}
        )
    except DataError as error:
        raise DataError(f"{log}: not a list of failures (url, reason); delete it") from error


def _write_log(log: Path, failed: Mapping[str, str]) -> None:
    if not failed:
        with files.storing(log):
            return log.unlink(missing_ok=True)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("url", "reason"), *failed.items()])
    return files.write(log, table.getvalue().encode())


def _refuse(name: str, taken: Collection[str]) -> str | None:
    """Why a file cannot have this name."""
    if not files.is_plain_name(name):
        return f"no plain name for a file: {shown(name, 40)}; expected letters, digits, blanks or .,@+()-_"
    return f"the file {name[:40]} is an earlier address's" if name in taken else None


def _try(url: str, path: Path, limits: Limits, stop: threading.Event) -> str | None:
    """Fetch one address, with retries; returns the reason if it could not be had."""
    clock = Clock(limits, stop)
    reason, pause = "stopped", 0.0
    for attempt in range(limits.retries + 1):
        if stop.wait(pause):
            break
        pause = limits.backoff * 2**attempt * random.uniform(0.5, 1.5)
        try:
            body, kind = get(url, clock)
            with clock.held(), _ONE_AT_A_TIME:
                suffix = _check_image(body, kind, clock)
            _keep(body, path.with_name(path.name + suffix))
            return None
        except Failure as failure:
            reason = str(failure)
            pause = pause if failure.after is None else failure.after
        except Exception as error:  # of a decoder, say: the failure of this picture alone
            reason = f"it failed ({type(error).__name__})"
        if is_permanent(reason) or pause > clock.left():
            break
    return reason


def _keep(body: bytes, path: Path) -> None:
    """Write a file, where no other has come meanwhile."""
    if os.path.lexists(path):
        raise Failure("cannot be written (a file of its name has come meanwhile)")
    try:
        with files.storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, body)
    except StoreError as error:
        why = getattr(error.__cause__, "strerror", None) or type(error.__cause__).__name__
        raise Failure(f"cannot be written ({why})") from error


class _Timed(io.BytesIO):
    """A file that cannot be read to its end if that takes too long: decoders work block by block."""

    def __init__(self, body: bytes, clock: Clock) -> None:
        super().__init__(body)
        self.clock, self.end = clock, time.monotonic() + clock.limits.timeout

    def read(self, size: int | None = -1, /) -> bytes:
        self.check()
        return super().read(size)

    def check(self) -> None:
        if self.clock.stop.is_set():
            raise Failure("stopped")
        if time.monotonic() > self.end:
            raise Failure(f"too large: takes more than {self.clock.limits.timeout:g} s to decode")


def _check_image(body: bytes, kind: str, clock: Clock) -> str:
    """The suffix of what arrived; refuses what is no image that decodes to its end."""
    file = _Timed(body, clock)
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(file, formats=tuple(DECODERS))
    except Exception as error:
        file.check()
        kind = line(kind.partition(";")[0], 40) or "no type given"
        raise Failure(f"not an image ({kind})") from error
    if min(image.size) < MIN_SIDE:
        raise Failure(f"too small: {image.width}x{image.height} pixels, a placeholder")
    if image.width * image.height > MAX_PIXELS:
        raise Failure("too large: more pixels than are read")
    image.decodermaxblock = BLOCK
    try:
        open_image(image)
    except ExampleError as error:
        file.check()
        raise Failure("a broken image, or one that was cut off") from error
    return DECODERS.get(image.format or "", ".jpg")

"""Downloading images from addresses that nobody vouches for.

The addresses come from a table that somebody else wrote, and what answers there may have changed
since. So: http and https only; only to public addresses, which is checked on the connected socket
of every hop, before a byte is sent through it (a name that resolves to another address the second
time gains nothing); no cookies, no credentials, no proxies; a limit on size and on time; and what
arrives counts only if it decodes as an image. A file appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import csv
import ipaddress
import random
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import urllib3
from PIL import Image
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url

from vlmscope.data.images import open_image
from vlmscope.data.published.layout import SUFFIXES, images_in
from vlmscope.errors import DataError, ExampleError

MAX_BYTES = 20 * 1024 * 1024
REDIRECTS = 5
LONGEST_WAIT = 60.0
"""Seconds; a server that asks for more is not waited for."""
CHUNK = 64 * 1024
MIN_SIDE = 8
"""Pixels; anything smaller is a placeholder or counts visitors."""
DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that photographs come in. Some of Pillow's other decoders start other programs."""
SUFFIX = {"PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
"""Of what is no JPEG, of which there are several kinds."""
HEADERS = {"User-Agent": "vlmscope", "Accept": "image/*", "Accept-Encoding": "identity"}

# Reasons begin with one of these where trying again later is of no use.
PERMANENT = (
    "HTTP 4",
    "not an image",
    "too large",
    "too small",
    "too many redirects",
    "address not public",
    "not an http",
    "credentials in",
)
_PASSING = ("HTTP 408", "HTTP 425", "HTTP 429")

# Pillow's warnings are silenced while an image is checked, and that holds for all threads.
_ONE_AT_A_TIME = threading.Lock()


class _Failure(Exception):  # noqa: N818 (never leaves this file)
    """Why an address gave no image; `after` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


@dataclass(frozen=True)
class _Limits:
    timeout: float
    total: float
    retries: int
    backoff: float
    max_bytes: int
    allowed: frozenset[str]


def is_permanent(reason: str) -> bool:
    """Whether trying again later is of no use.

    >>> is_permanent("HTTP 404 Not Found"), is_permanent("HTTP 429 Too Many Requests")
    (True, False)
    >>> is_permanent("timed out after 60 s")
    False
    """
    return reason.startswith(PERMANENT) and not reason.startswith(_PASSING)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also if it is wrapped in IPv6.

    >>> is_public("93.184.215.14"), is_public("169.254.169.254"), is_public("::ffff:10.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # 64:ff9b::/96 leads on to the IPv4 address in its last 32 bits.
        translated = ip in ipaddress.ip_network("64:ff9b::/96")
        last = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if translated else None
        teredo = ip.teredo[1] if ip.teredo else None
        inner = [one for one in (ip.ipv4_mapped, ip.sixtofour, teredo, last) if one]
        if inner:
            return all(is_public(str(one)) for one in inner)
    return ip.is_global and not ip.is_multicast


def fetch(
    jobs: Mapping[str, Path],
    *,
    workers: int = 16,
    timeout: float = 15.0,
    total: float = 60.0,
    retries: int = 3,
    backoff: float = 1.0,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[int, int], None] | None = None,
    _allowed: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """Download addresses to files, and return what could not be had, with the reason.

    A file that is there, with any suffix of an image, is not fetched again; a new one gets the
    suffix of its content. `timeout` (seconds) is for connecting and for each wait for data,
    `total` for one try at one address with its redirects. What may pass is tried `retries` times
    more, after `backoff` seconds, then twice as long, with jitter, or when the server says.
    Ctrl-C stops after the tries in progress and leaves every whole file in place.

    >>> fetch({"file:///etc/passwd": Path("a.jpg"), "http://me:secret@host/": Path("b.jpg")})
    {'file:///etc/passwd': 'not an http or https address',
     'http://me:secret@host/': 'credentials in the address'}
    """
    limits = _Limits(timeout, total, retries, backoff, max_bytes, _allowed)
    todo = _missing(jobs)
    done = len(jobs) - len(todo)
    failed: dict[str, str] = {}
    stop = threading.Event()
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="download")
    try:
        futures = {pool.submit(_try, url, path, limits, stop): url for url, path in todo.items()}
        for future in _finished(futures):
            if reason := future.result():
                failed[futures[future]] = reason
            done += 1
            if progress:
                progress(done, len(jobs))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return {url: failed[url] for url in jobs if url in failed}


def fetch_and_log(
    jobs: Mapping[str, Path], log: Path, *, progress: Callable[[int, int], None] | None = None, **options: Any
) -> dict[str, str]:
    """`fetch`, with what failed kept in a CSV file (url, reason).

    What failed for good in an earlier call is not tried again: delete the file to do so.
    """
    known = read_log(log)
    gone = {url: known[url] for url in jobs if is_permanent(known.get(url, ""))}
    rest = {url: path for url, path in jobs.items() if url not in gone}
    failed = fetch(rest, progress=progress, **options)
    kept = {url: reason for url, reason in known.items() if url not in rest}
    write_log(log, kept | failed)
    return gone | failed


def read_log(log: Path) -> dict[str, str]:
    """The failures in a log; none where there is no such file."""
    try:
        with log.open(encoding="utf-8", newline="") as file:
            return {row["url"]: row["reason"] or "" for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise DataError(f"{log}: not a list of failures (url, reason); delete it") from error


def write_log(log: Path, failed: Mapping[str, str]) -> None:
    """Write the failures, or take an old log away where there are none."""
    if not failed:
        log.unlink(missing_ok=True)
        return
    part = log.with_name(f"{log.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("url", "reason"), *failed.items()])
        part.replace(log)
    except OSError as error:
        raise DataError(f"{log}: cannot be written ({error.strerror or error})") from error


def _missing(jobs: Mapping[str, Path]) -> dict[str, Path]:
    """The jobs whose file is not there under any suffix; their folders are made."""
    there: dict[Path, set[str]] = {}
    for path in jobs.values():
        if path.parent not in there:
            there[path.parent] = {image.stem for image in images_in(path.parent)}
    return {url: path for url, path in jobs.items() if _stem(path) not in there[path.parent]}


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def _finished(futures: Mapping[Future[str | None], str]) -> Iterator[Future[str | None]]:
    """The futures as they finish; waits in short turns, so that Ctrl-C is heard on every system."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from done


def _try(url: str, path: Path, limits: _Limits, stop: threading.Event) -> str | None:
    """Fetch one address, with retries; returns the reason if it could not be had."""
    reason = "stopped"
    for attempt in range(limits.retries + 1):
        if stop.is_set():
            return reason
        pause = limits.backoff * 2**attempt * random.uniform(0.5, 1.5)
        try:
            _fetch_one(url, path, limits, stop)
            return None
        except _Failure as failure:
            reason = str(failure)
            if is_permanent(reason) or (failure.after or 0) > LONGEST_WAIT:
                return reason
            pause = pause if failure.after is None else failure.after
        if attempt < limits.retries:
            stop.wait(pause)
    return reason


def _fetch_one(url: str, path: Path, limits: _Limits, stop: threading.Event) -> None:
    """One try at one address: follow it, write what comes, and keep it if it is an image."""
    part = path.with_name(f".{_stem(path)}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = _download(url, part, limits, stop)
        with _ONE_AT_A_TIME:
            suffix = _check_image(part, kind)
        part.replace(path.with_name(_stem(path) + suffix))
    except OSError as error:
        raise _Failure(f"cannot be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)


def _download(url: str, part: Path, limits: _Limits, stop: threading.Event) -> str:
    """Write the body that an address leads to; returns what the server says that it is."""
    deadline = time.monotonic() + limits.total
    for _ in range(REDIRECTS + 1):
        with _Hop(url, limits, deadline) as hop:
            where = hop.answer.headers.get("Location")
            if hop.answer.status in (301, 302, 303, 307, 308) and where:
                url = urljoin(url, where)
                continue
            _check_answer(hop.answer, limits)
            with part.open("wb") as file:
                size = 0
                for chunk in hop.chunks():
                    size += len(chunk)
                    if size > limits.max_bytes:
                        raise _Failure(_too_large(limits))
                    if stop.is_set():
                        raise _Failure("stopped")
                    file.write(chunk)
            return hop.answer.headers.get("Content-Type", "")
    raise _Failure(f"too many redirects (more than {REDIRECTS})")


class _Hop:
    """One request: a connection of its own, ended at the deadline whatever the server does."""

    answer: urllib3.BaseHTTPResponse

    def __init__(self, url: str, limits: _Limits, deadline: float) -> None:
        self._limits = limits
        self._deadline = deadline
        self._late = False
        try:
            self._url = parse_url(url)
        except urllib3.exceptions.HTTPError as error:
            raise _Failure("not an http or https address") from error
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise _Failure("not an http or https address")
        if self._url.auth is not None:
            raise _Failure("credentials in the address")
        kind = _PublicHTTPS if self._url.scheme == "https" else _PublicHTTP
        left = deadline - time.monotonic()
        if left <= 0:
            raise _Failure(self._too_late())
        seconds = min(limits.timeout, left)
        self._connection = kind(self._url.host.strip("[]"), self._url.port, timeout=seconds)
        self._connection.allowed = limits.allowed
        # Timeouts are for each wait alone: only cutting the line ends a drip of single bytes.
        self._timer = threading.Timer(left, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Hop:
        self._timer.start()
        try:
            with self._said_plainly():
                self._connection.request(
                    "GET", self._url.request_uri, headers=HEADERS, preload_content=False, decode_content=False
                )
                self.answer = self._connection.getresponse()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if hasattr(self, "answer"):
            self.answer.close()
        self._connection.let_go()

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes in."""
        with self._said_plainly():
            while chunk := self.answer.read1(CHUNK):
                yield chunk
            if self._late:
                raise _Failure(self._too_late())

    def _cut(self) -> None:
        self._late = True
        self._connection.cut()

    def _too_late(self) -> str:
        return f"timed out after {self._limits.total:g} s"

    @contextlib.contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """Turns what the network may raise into one short reason."""
        try:
            yield
        except _Failure:
            raise
        except Exception as error:
            if self._late:
                raise _Failure(self._too_late()) from error
            if isinstance(error, (urllib3.exceptions.TimeoutError, TimeoutError)):
                raise _Failure(f"timed out after {self._limits.timeout:g} s of silence") from error
            raise _Failure(_reason(error)) from error


class _Public:
    """Mixed into a connection: it refuses an address that is not public once it is connected.

    Its socket is the one that the request goes through, so what the name resolves to at another
    time does not matter; for https this is before the handshake.
    """

    allowed: frozenset[str] = frozenset()
    _line: socket.socket | None = None

    def _new_conn(self) -> socket.socket:
        line: socket.socket = super()._new_conn()  # type: ignore[misc]
        try:
            address = line.getpeername()[0]
            if address not in self.allowed and not is_public(address):
                raise _Failure(f"address not public ({address})")
            self._line = line.dup()
        except BaseException:
            line.close()
            raise
        return line

    def cut(self) -> None:
        """End the line under a read that would go on; a second handle outlives the TLS wrapping."""
        if self._line:
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)

    def let_go(self) -> None:
        """Close all; `close` alone is also called while the body of the answer is still to come."""
        self.close()
        if self._line:
            self._line.close()
            self._line = None

    def close(self) -> None:
        super().close()  # type: ignore[misc]


class _PublicHTTP(_Public, HTTPConnection):
    pass


class _PublicHTTPS(_Public, HTTPSConnection):
    pass


def _check_answer(answer: urllib3.BaseHTTPResponse, limits: _Limits) -> None:
    """Refuse an answer by its head alone."""
    if answer.status != 200:
        said = f"HTTP {answer.status} {_plain(answer.reason or '')}".strip()
        raise _Failure(said, _wait(answer.headers.get("Retry-After")))
    length = answer.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise _Failure(_too_large(limits))


def _check_image(part: Path, kind: str) -> str:
    """The suffix of what arrived; refuses what is no image that decodes to its end."""
    kind = _plain(kind.partition(";")[0]) or "no type given"
    if not part.stat().st_size:
        raise _Failure("an empty answer")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(part, formats=DECODERS) as image:
            suffix = SUFFIX.get(image.format or "", ".jpg")
            width, height = image.size
    except Exception as error:
        raise _Failure(f"not an image ({kind})") from error
    if min(width, height) < MIN_SIDE:
        raise _Failure(f"too small: {width}x{height} pixels, a placeholder")
    try:
        open_image(part)
    except ExampleError as error:
        if "pixels" in str(error):
            raise _Failure("too large: more pixels than are read") from error
        raise _Failure("a broken image, or one that was cut off") from error
    return suffix


def _wait(header: str | None) -> float | None:
    """The seconds that `Retry-After` asks for, as a number or a date.

    >>> _wait("3"), _wait("Thu, 01 Jan 1970 00:00:00 GMT"), _wait("soon"), _wait(None)
    (3.0, 0.0, None, None)
    """
    if header is None:
        return None
    if re.fullmatch(r"\d{1,9}", header.strip()):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _reason(error: Exception) -> str:
    """A short reason without the addresses of objects that libraries put in."""
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return "the name of the server cannot be resolved"
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return "no connection to the server"
    if isinstance(error, urllib3.exceptions.SSLError) or "SSL" in type(error).__name__:
        return "no trusted connection to the server (TLS)"
    return f"the connection broke ({type(error).__name__})"


def _too_large(limits: _Limits) -> str:
    return f"too large: more than {limits.max_bytes:,} bytes"


def _plain(text: str) -> str:
    """What a server said, short and without anything that a terminal would act on."""
    return re.sub(r"[^ -~]", "?", text)[:40].strip()

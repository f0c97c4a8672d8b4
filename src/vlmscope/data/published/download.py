"""Downloading images from addresses that nobody vouches for.

The addresses come from a table that somebody else wrote, and what answers there may have changed since. So:
http and https only; only to public addresses, which is checked on the connected socket of every hop, before
a byte is sent through it (a name that resolves to another address the second time gains nothing); no
cookies, no credentials, no proxies; a limit on size and on time; and what arrives counts only if it decodes
as an image. A file appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import csv
import io
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
from pathlib import Path
from urllib.parse import urljoin

import urllib3
from PIL import Image
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import Retry, parse_url

from vlmscope.data.images import MAX_PIXELS, open_image
from vlmscope.data.published.layout import SUFFIXES, images_in
from vlmscope.data.table import read_table
from vlmscope.errors import DataError, ExampleError

REDIRECTS = 5
LONGEST_WAIT = 60.0
"""Seconds; a server that asks for more is not waited for."""
CHUNK = 64 * 1024
MIN_SIDE = 8
"""Pixels; anything smaller is a placeholder or counts visitors."""
DECODERS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
"""Formats that photographs come in, and suffixes. Some of Pillow's other decoders start programs."""
HEADERS = {"User-Agent": "vlmscope", "Accept": "image/*", "Accept-Encoding": "identity"}

# Trying again later is of no use where a reason begins with one of these.
_PERMANENT = re.compile(
    "HTTP 4(?!08|25|29)|not an |too (large|small|many redirects)|address not public|credentials in"
)

# Pillow's warnings are silenced while an image is checked, and that holds for all threads.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What an address may cost.

    `timeout` (seconds) is for connecting and for each wait for data, `total` for one try at one address
    with its redirects. What may pass is tried `retries` times more, after `backoff` seconds, then twice as
    long, with jitter, or when the server says. `allowed` are IP addresses that are connected to though they
    are not public.
    """

    timeout: float = 15.0
    total: float = 60.0
    retries: int = 3
    backoff: float = 1.0
    max_bytes: int = 20 * 1024 * 1024
    allowed: frozenset[str] = frozenset()


class _Failure(Exception):  # noqa: N818 (never leaves this file)
    """Why an address gave no image; `after` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, retry_after: str | None = None) -> None:
        super().__init__(reason)
        self.after: float | None = None
        with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
            self.after = Retry().parse_retry_after(retry_after) if retry_after else None


def is_permanent(reason: str) -> bool:
    """Whether trying again later is of no use.

    >>> is_permanent("HTTP 404 Not Found"), is_permanent("HTTP 429 Too Many Requests")
    (True, False)
    >>> is_permanent("timed out after 60 s")
    False
    """
    return _PERMANENT.match(reason) is not None


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
    log: Path | None = None,
    limits: Limits | None = None,
    workers: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Download addresses to files, and return what could not be had, with the reason.

    A file that is there, with any suffix of an image, is not fetched again; a new one gets the suffix of
    its content. Ctrl-C stops after the tries in progress and leaves every whole file in place. `log` is a
    CSV file (url, reason) of what failed; what failed for good in an earlier call is not tried again:
    delete the file to do so.

    >>> fetch({"file:///etc/passwd": Path("a.jpg"), "http://me:secret@host/": Path("b.jpg")})
    {'file:///etc/passwd': 'not an http or https address',
     'http://me:secret@host/': 'credentials in the address'}
    """
    known = _read_log(log) if log else {}
    kept = {url: why for url, why in known.items() if is_permanent(why) or url not in jobs}
    folders = {path.parent for path in jobs.values()}
    there = {image.with_suffix("") for folder in folders for image in images_in(folder)}
    rest = {url: path for url, path in jobs.items() if url not in kept}
    todo = {url: path for url, path in rest.items() if path.with_name(_stem(path)) not in there}
    done = len(rest) - len(todo)
    failed: dict[str, str] = {}
    stop = threading.Event()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="download")
    try:
        futures = {pool.submit(_try, url, path, limits or Limits(), stop): url for url, path in todo.items()}
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
    failed = kept | {url: failed[url] for url in rest if url in failed}
    if log:
        _write_log(log, failed)
    return {url: failed[url] for url in jobs if url in failed}


def _read_log(log: Path) -> dict[str, str]:
    try:
        return (
            {row["url"]: row["reason"] for row in read_table(log, ("url", "reason"))} if log.exists() else {}
        )
    except DataError as error:
        raise DataError(f"{log}: not a list of failures (url, reason); delete it") from error


def _write_log(log: Path, failed: Mapping[str, str]) -> None:
    part = log.with_name(f"{log.name}.part")
    try:
        if not failed:
            return log.unlink(missing_ok=True)
        with part.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("url", "reason"), *failed.items()])
        part.replace(log)
    except OSError as error:
        raise DataError(f"{log}: cannot be written ({error.strerror or error})") from error


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def _try(url: str, path: Path, limits: Limits, stop: threading.Event) -> str | None:
    """Fetch one address, with retries; returns the reason if it could not be had.

    The pauses are our own, because urllib3's retries end with the head of an answer, and cannot be stopped.
    """
    reason, pause = "stopped", 0.0
    for attempt in range(limits.retries + 1):
        if stop.wait(pause):
            break
        try:
            _fetch_one(url, path, limits, stop)
            return None
        except _Failure as failure:
            reason = str(failure)
            if is_permanent(reason) or (failure.after or 0) > LONGEST_WAIT:
                break
            grown = limits.backoff * 2**attempt * random.uniform(0.5, 1.5)
            pause = grown if failure.after is None else failure.after
    return reason


def _fetch_one(url: str, path: Path, limits: Limits, stop: threading.Event) -> None:
    """One try at one address: follow it, and keep what comes if it is an image."""
    body, kind = _download(url, limits, stop)
    with _ONE_AT_A_TIME:
        suffix = _check_image(body, kind)
    part = path.with_name(f".{_stem(path)}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(body)
        part.replace(path.with_name(_stem(path) + suffix))
    except OSError as error:
        raise _Failure(f"cannot be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)


def _download(url: str, limits: Limits, stop: threading.Event) -> tuple[bytes, str]:
    """The body that an address leads to, and what the server says that it is."""
    deadline = time.monotonic() + limits.total
    for _ in range(REDIRECTS + 1):
        with _answer(url, limits, deadline) as answer:
            if where := answer.get_redirect_location():
                url = urljoin(url, where)
                continue
            if answer.status != 200:
                why = f"HTTP {answer.status} {_plain(answer.reason or '')}".strip()
                raise _Failure(why, answer.headers.get("Retry-After"))
            body = bytearray()
            length = answer.headers.get("Content-Length", "")
            size = int(length) if length.isdecimal() else 0
            while size <= limits.max_bytes and (chunk := answer.read1(CHUNK)):
                body += chunk
                size = max(size, len(body))
                if stop.is_set():
                    raise _Failure("stopped")
            if size > limits.max_bytes:
                raise _Failure(f"too large: more than {limits.max_bytes:,} bytes")
            return bytes(body), answer.headers.get("Content-Type", "")
    raise _Failure(f"too many redirects (more than {REDIRECTS})")


class _PublicHTTP(HTTPConnection):
    """A connection that refuses an address that is not public once it is connected.

    Its socket is the one that the request goes through, so what the name resolves to at another time does
    not matter; for https this is before the handshake.
    """

    allowed: frozenset[str] = frozenset()
    is_late = False
    _line: socket.socket | None = None

    def _new_conn(self) -> socket.socket:
        line = super()._new_conn()
        try:
            address = line.getpeername()[0]
            if address not in self.allowed and not is_public(address):
                raise _Failure(f"address not public ({address})")
            # A second handle outlives the wrapping by TLS.
            self._line = line.dup()
        except BaseException:
            line.close()
            raise
        return line

    def cut(self) -> None:
        """End the line under a read that would go on."""
        self.is_late = True
        if self._line:
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)

    def let_go(self) -> None:
        """Close all; `close` alone is also called while the body of the answer is still to come."""
        self.close()
        if self._line:
            self._line.close()


class _PublicHTTPS(_PublicHTTP, HTTPSConnection):
    pass


@contextlib.contextmanager
def _answer(url: str, limits: Limits, deadline: float) -> Iterator[urllib3.BaseHTTPResponse]:
    """The answer to one request, over a line of its own that is cut at the deadline.

    Whatever the network raises becomes one short reason.
    """
    try:
        address = parse_url(url)
    except urllib3.exceptions.HTTPError as error:
        raise _Failure("not an http or https address") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise _Failure("not an http or https address")
    if address.auth is not None:
        raise _Failure("credentials in the address")
    left = max(deadline - time.monotonic(), 0.001)
    kind = _PublicHTTPS if address.scheme == "https" else _PublicHTTP
    connection = kind(address.host.strip("[]"), address.port, timeout=min(limits.timeout, left))
    connection.allowed = limits.allowed
    # Timeouts are for each wait alone: only cutting the line ends a drip of single bytes.
    timer = threading.Timer(left, connection.cut)
    timer.daemon = True
    timer.start()
    try:
        uri = address.request_uri
        connection.request("GET", uri, headers=HEADERS, preload_content=False, decode_content=False)
        with contextlib.closing(connection.getresponse()) as answer:
            yield answer
            if connection.is_late:
                raise TimeoutError
    except _Failure:
        raise
    except Exception as error:
        raise _Failure(_reason(error, connection.is_late, limits)) from error
    finally:
        timer.cancel()
        connection.let_go()


def _reason(error: Exception, is_late: bool, limits: Limits) -> str:
    """A short reason without the addresses of objects that libraries put in."""
    if is_late:
        return f"timed out after {limits.total:g} s"
    if isinstance(error, (urllib3.exceptions.TimeoutError, TimeoutError)):
        return f"timed out after {limits.timeout:g} s of silence"
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return "the name of the server cannot be resolved"
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return "no connection to the server"
    if "SSL" in type(error).__name__:
        return "no trusted connection to the server (TLS)"
    return f"the connection broke ({type(error).__name__})"


def _check_image(body: bytes, kind: str) -> str:
    """The suffix of what arrived; refuses what is no image that decodes to its end."""
    if not body:
        raise _Failure("an empty answer")
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(body), formats=tuple(DECODERS))
    except Exception as error:
        kind = _plain(kind.partition(";")[0]) or "no type given"
        raise _Failure(f"not an image ({kind})") from error
    if min(image.size) < MIN_SIDE:
        raise _Failure(f"too small: {image.width}x{image.height} pixels, a placeholder")
    if image.width * image.height > MAX_PIXELS:
        raise _Failure("too large: more pixels than are read")
    try:
        open_image(image)
    except ExampleError as error:
        raise _Failure("a broken image, or one that was cut off") from error
    return DECODERS.get(image.format or "", ".jpg")


def _plain(text: str) -> str:
    """What a server wrote, short and without anything that a terminal would act on."""
    return re.sub(r"[^ -~]", "?", text)[:40].strip()

"""One address of the web, asked for under limits; nobody vouches for what answers there.

http and https only; only public addresses, and every hop connects to the very address that was checked (a
name that resolves to another one the second time gains nothing); no cookies, no credentials, no proxies; a
limit on size, and one on the time of everything: names, connections, handshakes, heads, bodies, redirects.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from string import punctuation
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from vlmscope.errors import line

REDIRECTS = 5
NO_ADDRESS = "not an http or https address"
CHUNK = 64 * 1024
PORTS = {"http": 80, "https": 443}
HEADERS = {"User-Agent": "vlmscope", "Accept": "image/*", "Accept-Encoding": "identity"}

_UNICAST = ipaddress.IPv6Network("2000::/3")
# The last 32 bits are an IPv4 address that a packet is led on to: compatible, mapped, translated (RFC 2765),
# NAT64 (RFC 6052) and its local use (RFC 8215).
_EMBEDDING = tuple(
    ipaddress.IPv6Network(net)
    for net in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/96")
)
# What IANA's registries of special addresses add to those that older versions of Python know.
_SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))


@dataclass(frozen=True)
class Limits:
    """What a picture may cost.

    `total` (seconds) is for all that the network does for it: names, connections, redirects, data, retries
    and the pauses between them. `timeout` (seconds) is for each single wait, and for decoding. What may pass
    is tried `retries` times more, after `backoff` seconds, then twice as long, with jitter, or when the
    server says, as far as that is within `total`. `allowed` are IP addresses that are connected to though
    they are not public.
    """

    timeout: float = 15.0
    total: float = 120.0
    retries: int = 3
    backoff: float = 1.0
    max_bytes: int = 20 * 1024 * 1024
    allowed: frozenset[str] = frozenset()


class Failure(Exception):  # noqa: N818 (no error: it goes into the log)
    """Why an address gave nothing; `after` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Clock:
    """The time that one picture has, from now on; all waits end when `stop` is set, too."""

    def __init__(self, limits: Limits, stop: threading.Event) -> None:
        self.limits, self.stop = limits, stop
        self.end = time.monotonic() + limits.total

    def left(self) -> float:
        """Seconds, less than 0 where it is late."""
        return self.end - time.monotonic()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What happens meanwhile is not the network's, and takes none of its time."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.end += time.monotonic() - begun

    def turn(self) -> float:
        """How long the next wait may take, in seconds."""
        if self.stop.is_set():
            raise Failure("stopped")
        if self.left() <= 0:
            raise Failure(f"timed out after {self.limits.total:g} s")
        return min(self.left(), self.limits.timeout)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; one that embeds IPv4 counts as what it embeds.

    >>> is_public("93.184.215.14"), is_public("169.254.169.254"), is_public("::ffff:10.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [*(ip.teredo or ()), ip.sixtofour]
        inner += [ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) for net in _EMBEDDING if ip in net]
        if any(inner):
            return all(is_public(str(one)) for one in inner if one)
        if ip not in _UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _SPECIAL)


def get(url: str, clock: Clock) -> tuple[bytes, str]:
    """The body that an address leads to, and the type that the server gives it.

    Raises `Failure` with a short reason, whatever else the network raises.
    """
    try:
        address = _address(url)
        for _ in range(REDIRECTS + 1):
            with _answer(address, clock) as answer:
                where = answer.headers.get("Location")
                if answer.status in (301, 302, 303, 307, 308) and where:
                    # The bytes of a header are read as Latin-1, whatever they are.
                    address = _address(quote(where.encode("latin-1"), safe=punctuation), address.geturl())
                    continue
                if answer.status != 200:
                    why = f"HTTP {answer.status} {line(answer.reason, 40)}".strip()
                    raise Failure(why, _seconds(answer.headers.get("Retry-After", "")))
                return _body(answer, clock.limits.max_bytes), answer.headers.get("Content-Type", "")
    except Failure:
        raise
    except Exception as error:
        raise Failure(_reason(error, clock)) from error
    raise Failure(f"too many redirects (more than {REDIRECTS})")


def _reason(error: Exception, clock: Clock) -> str:
    """A short reason without the addresses of objects that libraries put in."""
    if isinstance(error, TimeoutError):
        clock.turn()  # where it is late, that is the reason
        return f"timed out after {clock.limits.timeout:g} s of silence"
    if isinstance(error, socket.gaierror):
        return "the name of the server cannot be resolved"
    if isinstance(error, ssl.SSLError):
        return "no trusted connection to the server (TLS)"
    return f"the connection broke ({type(error).__name__})"


def _address(url: str, base: str = "") -> SplitResult:
    """The parts of an address that can be asked, which may be relative to another."""
    try:
        parts = urlsplit(urljoin(base, url))
        host, port = (parts.hostname or "").encode("idna"), parts.port or PORTS.get(parts.scheme)
    except ValueError as error:
        raise Failure(NO_ADDRESS) from error
    if parts.scheme not in PORTS or not host or not port:
        raise Failure(NO_ADDRESS)
    if "@" in parts.netloc:
        raise Failure("credentials in the address")
    return parts


def _seconds(retry_after: str) -> float | None:
    """How long a server asks to wait: a number of seconds, or until a date."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _body(answer: http.client.HTTPResponse, most: int) -> bytes:
    told = answer.headers.get_all("Content-Length", ())
    lengths = {one.strip() for some in told for one in some.split(",")}
    if len(lengths) > 1 or not all(re.fullmatch("[0-9]+", one) for one in lengths):
        raise Failure("an answer without a clear length")
    body = bytearray()
    size = max(map(float, lengths), default=0.0)
    while size <= most and (chunk := answer.read(CHUNK)):
        body += chunk
        size = max(size, len(body))
    if size > most:
        raise Failure(f"too large: more than {most:,} bytes")
    if answer.length:
        raise Failure("the connection broke (cut off)")
    if not body:
        raise Failure("an empty answer")
    return bytes(body)


@contextlib.contextmanager
def _answer(address: SplitResult, clock: Clock) -> Iterator[http.client.HTTPResponse]:
    """The answer to one request, over a connection of its own."""
    host = (address.hostname or "").encode("idna").decode()
    port = address.port or PORTS[address.scheme]
    query = f"?{address.query}" if address.query else ""
    target = quote((address.path or "/") + query, safe=punctuation)
    with contextlib.ExitStack() as opened:
        wire = opened.enter_context(_connect(host, port, clock))
        if address.scheme == "https":
            wire.settimeout(clock.turn())
            wire = opened.enter_context(_tls().wrap_socket(wire, server_hostname=host))
        request = http.client.HTTPConnection(host, port)
        request.default_port = PORTS[address.scheme]  # what the header Host leaves out
        request.sock = wire
        request.request("GET", target, headers=HEADERS)
        # All that it asks of a socket is a file to read from.
        answer = http.client.HTTPResponse(_Reader(wire, clock), method="GET")  # type: ignore[arg-type]
        opened.enter_context(contextlib.closing(answer))
        answer.begin()
        yield answer


class _Reader(io.RawIOBase):
    """What comes over a line while the clock allows it; a socket's own timeout is for each wait alone."""

    def __init__(self, wire: socket.socket, clock: Clock) -> None:
        self.wire, self.clock = wire, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.wire.settimeout(self.clock.turn())
        return self.wire.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, CHUNK)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _connect(host: str, port: int, clock: Clock) -> socket.socket:
    """A line to the first of a name's public addresses that answers."""
    found: Future[list[str]] = Future()

    def resolve() -> None:
        try:
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.set_result([str(place[4][0]) for place in places])
        except Exception as error:
            found.set_exception(error)

    # The system's resolver has no limit and cannot be stopped, so it has a thread that can be left.
    threading.Thread(target=resolve, daemon=True).start()
    addresses = found.result(clock.turn())
    public = [one for one in addresses if one in clock.limits.allowed or is_public(one)]
    if not public:
        raise Failure(f"address not public ({addresses[0]})")
    for address in public:
        wait = clock.turn()
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), wait)
    raise Failure("no connection to the server")

"""A server on this machine that does all that servers do wrong, one way a path.

A way is a generator of what goes over the line: bytes are sent, a number is so many seconds of silence, and
`RESET` breaks the line off. Beside it stands the reason that the downloader has to give.
"""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

RESET = object()
Sent = Iterator[object]

GOOD = 20
"""How many good pictures the server has, at `/good-0`, `/good-1`…"""
CUT = "a broken image, or one that was cut off"
BROKE = r"the connection broke \(\w+\)"
LATE = r"timed out after [\d.]+ s( of silence)?"
PRIVATE = r"address not public \([\da-f.:]+\)"
NO_ADDRESS = "not an http or https address"
NO_LENGTH = "an answer without a clear length"
NO_TLS = r"no trusted connection to the server \(TLS\)"
TOO_LARGE = "too large: more than [0-9,]+ bytes"
TOO_SLOW = "too large: takes more than [0-9.]+ s to decode"


@dataclass(frozen=True)
class Way:
    """What a server does, and the reason (a regular expression) that it must end in."""

    reason: str
    answer: Callable[[], Sent]


WAYS: dict[str, Way] = {}
"""By the path."""
TLS: dict[str, Way] = {}
"""What answers where a handshake is expected; each has a port of its own."""


def way(reason: str, ways: dict[str, Way] = WAYS) -> Callable[[Callable[[], Sent]], Callable[[], Sent]]:
    def add(answer: Callable[[], Sent]) -> Callable[[], Sent]:
        ways[answer.__name__.replace("_", "-")] = Way(reason, answer)
        return answer

    return add


def head(status: str = "200 OK", *lines: bytes | str) -> bytes:
    """The head of an answer; what follows it lasts until the line is closed, if no line says otherwise."""
    lines = tuple(line.encode() if isinstance(line, str) else line for line in lines)
    return b"\r\n".join([f"HTTP/1.1 {status}".encode("latin-1"), *lines, b"", b""])


def whole(body: bytes, *lines: bytes | str) -> bytes:
    return head("200 OK", f"Content-Length: {len(body)}", *lines) + body


def picture(kind: str = "JPEG", size: tuple[int, int] = (160, 120), **options: object) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


PHOTO = picture()
PNG = picture("PNG")


class BadServer:
    """Answers on 127.0.0.1, behind TLS where that is given.

    `urls` are its bad addresses by the way, `good` its good ones; `asked` counts requests by the path.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.asked: Counter[str] = Counter()
        self.stop = threading.Event()
        self.lines: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listen(None)}"
        self.urls = {name: f"{self.url}/{name}" for name in WAYS}
        self.urls |= {name: f"https://127.0.0.1:{self._listen(one)}/" for name, one in TLS.items()}
        self.good = [f"{self.url}/good-{n}" for n in range(GOOD)]

    def close(self) -> None:
        self.stop.set()
        for line in self.lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _listen(self, way: Way | None) -> int:
        line = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.lines.append(line)
        threading.Thread(target=self._accept, args=(line, way), daemon=True).start()
        return line.getsockname()[1]

    def _accept(self, line: socket.socket, way: Way | None) -> None:
        with contextlib.suppress(OSError):
            while not self.stop.is_set():
                visitor, _ = line.accept()
                threading.Thread(target=self._serve, args=(visitor, way), daemon=True).start()

    def _serve(self, visitor: socket.socket, way: Way | None) -> None:
        with contextlib.ExitStack() as opened:
            opened.enter_context(contextlib.suppress(OSError, IndexError))
            opened.enter_context(visitor)
            visitor.settimeout(10)
            if self.tls:
                visitor = opened.enter_context(self.tls.wrap_socket(visitor, server_side=True))
            asked = visitor.recv(100_000)
            if way is None:
                path = asked.split()[1].decode("latin-1").removeprefix("/")
                self.asked[path] += 1
                gone = Way("", lambda: iter([head("404 Not Found")]))
                good = Way("", lambda: iter([whole(PHOTO)]))
                way = good if path.startswith("good-") else WAYS.get(path.partition("?")[0], gone)
            for sent in way.answer():
                if self.stop.is_set():
                    break
                if sent is RESET:
                    # Closing then sends a reset instead of an end.
                    visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                if isinstance(sent, bytes):
                    visitor.sendall(sent)
                elif isinstance(sent, float):
                    self.stop.wait(sent)


# Bodies


@way(TOO_LARGE)
def endless_body() -> Sent:
    yield head()
    while True:
        yield b"x" * 65_536


@way(LATE)
def slow_body() -> Sent:
    yield head()
    while True:
        yield 0.05
        yield b"x"


@way(LATE)
def silent_body() -> Sent:
    yield whole(PHOTO)[:-100]
    yield 60.0


@way(r"the connection broke \(cut off\)")
def body_shorter_than_its_length() -> Sent:
    yield head("200 OK", f"Content-Length: {len(PHOTO) + 1}") + PHOTO


@way(CUT)
def body_longer_than_its_length() -> Sent:
    yield head("200 OK", f"Content-Length: {len(PHOTO) // 2}") + PHOTO


@way(NO_LENGTH)
def negative_length() -> Sent:
    yield head("200 OK", "Content-Length: -1") + PHOTO


@way(NO_LENGTH)
def length_in_words() -> Sent:
    yield head("200 OK", "Content-Length: many") + PHOTO


@way(NO_LENGTH)
def two_lengths() -> Sent:
    yield whole(PHOTO, "Content-Length: 7")


@way(NO_LENGTH)
def two_lengths_in_one() -> Sent:
    yield head("200 OK", f"Content-Length: {len(PHOTO)}, 7") + PHOTO


@way(TOO_LARGE)
def huge_length() -> Sent:
    yield head("200 OK", "Content-Length: 99999999999999999999") + PHOTO


@way(TOO_LARGE)
def length_of_5000_digits() -> Sent:
    yield head("200 OK", "Content-Length: " + "9" * 5000) + PHOTO


@way("an empty answer")
def empty_body() -> Sent:
    yield whole(b"")


@way(BROKE)
def nothing_at_all() -> Sent:
    yield b""


@way(BROKE)
def reset_at_once() -> Sent:
    yield RESET


@way(BROKE)
def reset_in_the_middle() -> Sent:
    yield whole(PHOTO)[:-100]
    yield 0.05
    yield RESET


CHUNKED = head("200 OK", "Transfer-Encoding: chunked")


@way(BROKE)
def chunk_of_no_size() -> Sent:
    yield CHUNKED + b"picture\r\n" + PHOTO


@way("|".join((CUT, BROKE, "not an image .*")))
def chunk_of_negative_size() -> Sent:
    yield CHUNKED + b"-5\r\n" + PHOTO


@way(BROKE)
def chunk_size_without_end() -> Sent:
    yield CHUNKED
    while True:
        yield b"1" * 65_536


@way(TOO_LARGE)
def chunks_without_end() -> Sent:
    yield CHUNKED
    while True:
        yield b"10000\r\n" + b"x" * 65_536 + b"\r\n"


@way(f"{TOO_LARGE}|{LATE}")
def small_chunks_without_end() -> Sent:
    yield CHUNKED
    while True:
        yield b"1;comment\r\nx\r\n" * 1000


@way(BROKE)
def huge_chunk_cut_off() -> Sent:
    yield CHUNKED + b"fffffffffffffff\r\n" + PHOTO


@way(LATE)
def trailers_without_end() -> Sent:
    yield CHUNKED + b"%x\r\n" % len(PHOTO) + PHOTO + b"\r\n0\r\n"
    while True:
        yield b"X-More: x\r\n" * 1000


@way(r"not an image \(image/jpeg\)")
def gzip_bomb() -> Sent:
    packer = zlib.compressobj(wbits=31)
    body = b"".join(packer.compress(bytes(1_000_000)) for _ in range(10)) + packer.flush()
    yield whole(body, "Content-Encoding: gzip", "Content-Type: image/jpeg")


@way(r"not an image \(image/jpeg\)")
def encoding_that_is_not_there() -> Sent:
    yield whole(b"\xff" * 100, "Content-Encoding: br, gzip, zstd", "Content-Type: image/jpeg")


# Heads


@way(BROKE)
def headers_without_end() -> Sent:
    yield b"HTTP/1.1 200 OK\r\n"
    while True:
        yield b"X-More: x\r\n"


@way(BROKE)
def header_line_without_end() -> Sent:
    yield b"HTTP/1.1 200 OK\r\nX-Long: "
    while True:
        yield b"x" * 65_536


@way(BROKE)
def huge_headers() -> Sent:
    yield head("200 OK", *[f"X-{n}: " + "x" * 60_000 for n in range(120)]) + PHOTO


@way(LATE)
def slow_head() -> Sent:
    yield b"HTTP/1.1 200 OK\r\nX-Slow: "
    while True:
        yield 0.05
        yield b"x"


@way(LATE)
def silent_head() -> Sent:
    yield b"HTTP/1.1 200"
    yield 60.0


@way(LATE)
def continue_forever() -> Sent:
    while True:
        yield head("100 Continue") * 1000


@way(LATE)
def continue_forever_slowly() -> Sent:
    while True:
        yield head("100 Continue", "X: y")
        yield 0.05


@way("HTTP 103 Early Hints")
def early_hints_forever() -> Sent:
    while True:
        yield head("103 Early Hints", "Link: </style.css>")


@way(BROKE)
def half_a_status() -> Sent:
    yield b"HTTP/1."


@way(BROKE)
def status_in_words() -> Sent:
    yield head("fine") + PHOTO


@way(BROKE)
def status_of_5000_digits() -> Sent:
    yield head("2" * 5000) + PHOTO


@way("HTTP 999 Request denied")
def status_999() -> Sent:
    yield head("999 Request denied")


@way("HTTP 204 No Content")
def no_content() -> Sent:
    yield head("204 No Content") + PHOTO


@way("HTTP 206 Partial Content")
def part_that_nobody_asked_for() -> Sent:
    yield head("206 Partial Content", "Content-Range: bytes 0-1/9") + PHOTO


@way(r"HTTP 404 \\x1b\[31mgone[ -~…]{1,40}")
def reason_that_paints_the_terminal() -> Sent:
    yield head("404 \x1b[31mgone\x1b[0m\t\x9b" + "x" * 5000)


@way("HTTP 403 ÿþ.*")
def reason_that_is_not_text() -> Sent:
    yield head("403 \xff\xfe\x80", b"X-\xff\xfe: \xff\x80", b"Content-Type: \xff\xfe")


@way(r"not an image \(.{1,40}\)")
def type_that_is_not_text() -> Sent:
    yield whole(b"%PDF-1.4", b"Content-Type: image/\xff\x1b[2J" + b"\xe2\x80\xae" * 100)


@way("HTTP 410 Gone")
def cookies() -> Sent:
    yield head("410 Gone", *[f"Set-Cookie: id{n}=1; Domain=.com; Max-Age=99999999" for n in range(90)])


@way(f"{CUT}|{BROKE}|not an image .*")
def header_with_zero_bytes() -> Sent:
    yield b"HTTP/1.1 200 OK\r\nX\0Y: \0\r\nno colon here\r\n\r\n" + PHOTO[:-50]


@way(BROKE)
def picture_without_a_head() -> Sent:
    yield PHOTO


@way(BROKE)
def another_protocol() -> Sent:
    yield b"220 ftp.example.com ready\r\n" + b"SSH-2.0-OpenSSH_9.6\r\n"


@way(BROKE)
def http_2() -> Sent:
    yield b"HTTP/2.0 200 OK\r\n\r\n" + PHOTO


# Redirects


def redirect(name: str, where: str | bytes, reason: str, status: str = "302 Found") -> None:
    line = b"Location: " + (where if isinstance(where, bytes) else where.encode())
    WAYS[f"redirect-{name}"] = Way(reason, lambda: iter([head(status, line, "Content-Length: 0")]))


redirect("loop", "/redirect-loop", "too many redirects .*", "301 Moved Permanently")
redirect("to-and-fro", "/redirect-fro", "too many redirects .*", "307 Temporary Redirect")
redirect("fro", "redirect-to-and-fro", "too many redirects .*", "308 Permanent Redirect")
redirect("growing", "?x", "too many redirects .*")
redirect("to-a-file", "file:///etc/passwd", NO_ADDRESS)
redirect("to-ftp", "ftp://example.com/a.jpg", NO_ADDRESS)
redirect("to-gopher", "gopher://127.0.0.1:25/_HELO", NO_ADDRESS)
redirect("to-data", "data:image/png;base64,AAAA", NO_ADDRESS)
redirect("to-javascript", "javascript:alert(1)", NO_ADDRESS)
redirect("to-half-an-address", "http://[", NO_ADDRESS)
redirect("to-no-host", "http:///a.jpg", "HTTP 404 Not Found")
redirect("to-a-zone", "http://[fe80::1%25eth0]/", f"{NO_ADDRESS}|the name of .* resolved|{PRIVATE}")
redirect("to-port-99999", "http://example.com:99999/", NO_ADDRESS)
redirect("to-port-x", "http://example.com:x/", NO_ADDRESS)
redirect("to-no-name", "http://a..b/", NO_ADDRESS)
redirect("with-credentials", "http://me:secret@127.0.0.1/", "credentials in the address")
redirect("to-a-private-network", "http://10.0.0.1/", PRIVATE)
redirect("to-another-port-here", "http://127.0.0.2:22/", PRIVATE)
redirect("to-metadata", "http://169.254.169.254/latest/meta-data/", PRIVATE)
redirect("to-mapped", "http://[::ffff:10.0.0.1]/", PRIVATE)
redirect("to-translated", "http://[64:ff9b:1::a00:1]/", PRIVATE)
redirect("to-site-local", "http://[fec0::1]/", PRIVATE)
redirect("to-hexadecimal", "http://0x0a.1/", PRIVATE)
redirect("with-control-bytes", b"/\x01\x1b[2J\xff\x00", "HTTP 404 Not Found")
redirect("of-60000-characters", "/" + "x" * 60_000, "HTTP 404 Not Found")
redirect("to-nothing", "", "HTTP 302 Found")


@way("HTTP 301 Moved Permanently")
def redirect_to_nowhere() -> Sent:
    yield head("301 Moved Permanently", "Content-Length: 0")


@way("too many redirects .*|" + LATE)
def redirect_with_a_slow_loop() -> Sent:
    yield 0.4
    yield head("302 Found", "Location: /redirect-with-a-slow-loop", "Content-Length: 0")


# Try again later


def later(name: str, status: str, after: str) -> None:
    WAYS[f"later-{name}"] = Way(f"HTTP {status}", lambda: iter([head(status, f"Retry-After: {after}")]))


later("forever", "429 Too Many Requests", "0")
later("in-years", "503 Service Unavailable", "99999999")
later("in-5000-digits", "503 Service Unavailable", "9" * 5000)
later("in-the-year-9999", "429 Too Many Requests", "Fri, 31 Dec 9999 23:59:59 GMT")
later("in-the-year-99999", "429 Too Many Requests", "Fri, 31 Dec 99999 23:59:59 GMT")
later("yesterday", "429 Too Many Requests", "-5")
later("soon", "503 Service Unavailable", "soon")
later("in-1970", "503 Service Unavailable", "Thu, 01 Jan 1970 00:00:00 GMT")


# What is no picture


def body(name: str, content: bytes, reason: str, kind: str = "image/jpeg") -> None:
    WAYS[f"body-{name}"] = Way(reason, lambda: iter([whole(content, f"Content-Type: {kind}")]))


def bmp(width: int, height: int, depth: int = 24) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, width, height, 1, depth, 0, 0, 1, 1, 0, 0)


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2) -> bytes:
    start = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + png_chunk(b"IEND", b"")


def slow_jpeg(scans: int) -> bytes:
    """A progressive picture whose last scan comes again and again: each is an eighth of a second's work."""
    file = io.BytesIO()
    Image.new("L", (9000, 9000), 128).save(file, "JPEG", progressive=True)
    data, table = file.getvalue(), b"\xff\xc4"
    return data[: data.index(table)] + data[data.rindex(table) : -2] * scans + b"\xff\xd9"


NO_IMAGE = r"not an image \(.+\)"
body("html", b"<!doctype html><title>Sign in</title>", r"not an image \(text/html\)", "text/html; charset=x")
body("html-that-lies", b"<html>gone</html>", r"not an image \(image/jpeg\)")
body("svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", NO_IMAGE, "image/svg+xml")
body("pdf", b"%PDF-1.4\n", NO_IMAGE)
body("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_IMAGE)
body("tiff", picture("TIFF"), NO_IMAGE)
body("icon", picture("ICO"), NO_IMAGE)
body("program", b"\x7fELF" + bytes(100), NO_IMAGE)
body("archive", b"PK\x03\x04" + bytes(100), NO_IMAGE)
body("zeros", bytes(100_000), NO_IMAGE)
body("truncated-jpeg", PHOTO[: len(PHOTO) // 2], CUT)
body("truncated-png", PNG[: len(PNG) // 2], CUT)
body("truncated-webp", picture("WEBP")[:-500], f"{CUT}|{NO_IMAGE}")
body("truncated-gif", picture("GIF")[:-500], CUT)
body("head-of-a-jpeg", PHOTO[:20], f"{CUT}|{NO_IMAGE}")
body("png-with-a-flipped-byte", PNG[:300] + bytes([PNG[300] ^ 255]) + PNG[301:], CUT)
body("one-pixel", picture("GIF", (1, 1)), "too small: 1x1 pixels, a placeholder")
body("huge-png", png(2**31 - 1, 2**31 - 1), f"too large: more pixels than are read|{NO_IMAGE}")
body("huge-bmp", bmp(60_000, 60_000), f"too large: more pixels than are read|{NO_IMAGE}")
body("wide-bmp", bmp(2**31 - 1, 8), f"too large: more pixels than are read|{NO_IMAGE}")
body("bmp-of-no-pixels", bmp(0, 0), f"too small.*|{NO_IMAGE}")
body("negative-bmp", bmp(-100, -100), f"too small.*|{NO_IMAGE}|{CUT}")
ZEROS = png_chunk(b"IDAT", zlib.compress(bytes(99)))
body("zipped-zeros", png(10_000, 9_000, ZEROS, color=0), "too large: more pixels than are read")
TEXT = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
body("png-with-a-bomb-of-text", png(99, 99, *[TEXT] * 200), f"{NO_IMAGE}|{CUT}|{TOO_SLOW}")
body("png-of-chunks", png(99, 99, png_chunk(b"abCd", b"") * 1_000_000), f"{TOO_SLOW}|{CUT}")
body("slow-jpeg", slow_jpeg(1000), TOO_SLOW)


# Where a handshake is expected


@way(NO_TLS, TLS)
def tls_garbage() -> Sent:
    yield bytes(range(256)) * 10


@way(NO_TLS, TLS)
def tls_plain_http() -> Sent:
    yield whole(PHOTO)


@way(LATE, TLS)
def tls_silence() -> Sent:
    yield 60.0


@way(LATE, TLS)
def tls_drip() -> Sent:
    yield b"\x16\x03\x03\x40\x00"
    while True:
        yield 0.05
        yield b"\0"


@way(f"{NO_TLS}|{BROKE}", TLS)
def tls_reset() -> Sent:
    yield RESET


@way(f"{NO_TLS}|{BROKE}", TLS)
def tls_end() -> Sent:
    yield b""


@way(NO_TLS, TLS)
def tls_alert() -> Sent:
    yield b"\x15\x03\x03\x00\x02\x02\x28"

"""The downloader, against a server on this machine that does what a test says."""

from __future__ import annotations

import csv
import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from vlmscope.data.published import build, download
from vlmscope.data.published.download import fetch, is_permanent
from vlmscope.data.published.web import Limits, is_public
from vlmscope.errors import DataError

Answer = Callable[[BaseHTTPRequestHandler], None]
HERE = frozenset({"127.0.0.1"})
LOCAL = Limits(allowed=HERE)
ONCE = Limits(retries=0, allowed=HERE)


def picture(kind: str = "JPEG", size: tuple[int, int] = (32, 24)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, kind)
    return file.getvalue()


PHOTO = picture(size=(160, 120))


def send(
    handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, kind: str = "image/jpeg", **headers: str
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


class Server:
    """Answers what the test says for a path, and keeps what was asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.stop = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked[self.path] += 1
                outer.headers.append(dict(self.headers))
                try:
                    outer.answers[self.path](self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def add(self, path: str, answer: Answer | bytes) -> str:
        self.answers[path] = answer if callable(answer) else lambda one: send(one, answer)
        return self.url + path

    def close(self) -> None:
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


def get(url: str, path: Path, **options: object) -> str | None:
    """Why an address could not be had; quick, and allowed on this machine."""
    quick = Limits(timeout=2.0, total=5.0, retries=0, backoff=0.01, allowed=HERE)
    return fetch({url: path.name}, path.parent, limits=replace(quick, **options)).get(url)


# What is had


@pytest.mark.parametrize(
    ("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")]
)
def test_a_file_has_the_suffix_of_its_content(server: Server, tmp_path: Path, kind: str, suffix: str) -> None:
    body = picture(kind)
    url = server.add("/a.php", body)
    assert get(url, tmp_path / "images" / "7") is None
    assert [one.name for one in (tmp_path / "images").iterdir()] == [f"7.{suffix}"]
    assert (tmp_path / "images" / f"7.{suffix}").read_bytes() == body


def test_sends_no_more_than_it_must(server: Server, tmp_path: Path) -> None:
    url = server.add("/a", lambda one: send(one, PHOTO, Set_Cookie="id=1"))
    other = server.add("/b", PHOTO)
    assert fetch({url: "a", other: "b"}, tmp_path, workers=1, limits=LOCAL) == {}
    assert len(server.headers) == 2
    for headers in server.headers:
        assert set(headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding"}


def test_what_is_there_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture("PNG"))
    jobs = {server.add(f"/{n}", PHOTO): f"{n}" for n in (1, 2, 3)}
    seen: list[tuple[int, int]] = []
    assert fetch(jobs, tmp_path, limits=LOCAL, progress=lambda *now: seen.append(now)) == {}
    assert server.asked == {"/2": 1, "/3": 1}
    assert seen == [(2, 3), (3, 3)]
    assert fetch(jobs, tmp_path, limits=LOCAL) == {}
    assert sum(server.asked.values()) == 2


def test_follows_redirects_by_hand(server: Server, tmp_path: Path) -> None:
    server.add("/end", PHOTO)
    url = server.add("/0", lambda one: send(one, b"", 302, Location="/end"))
    assert get(url, tmp_path / "a") is None
    for n in range(7):
        server.add(f"/r{n}", lambda one, n=n: send(one, b"", 301, Location=f"r{n + 1}"))
    assert get(server.url + "/r0", tmp_path / "b") == "too many redirects (more than 5)"
    assert server.asked["/r5"] == 1
    assert server.asked["/r6"] == 0


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "192.0.0.9",
        "192.88.99.1",
        "::10.0.0.1",
        "::ffff:0:10.0.0.1",
        "64:ff9b:1::a00:1",
        "64:ff9b:1:a00:0:100:808:808",
        "2001:0:808:808:0:0:f5ff:fffe",  # Teredo: the client is 10.0.0.1
        "2001:0:a00:1:0:0:f7f7:f7f7",  # Teredo: the server is
        "fec0::1",
        "fdff::1",
        "ff0e::1",
        "100::1",
        "2001:2::1",
        "2001:db8::1",
        "3fff::1",
        "4000::1",
        "5f00::1",
    ],
)
def test_knows_what_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "2606:4700::1111",
        "::8.8.8.8",
        "::ffff:8.8.8.8",
        "::ffff:0:8.8.8.8",
        "64:ff9b::808:808",
        "64:ff9b:1::808:808",
        "2002:808:808::1",
        "2001:0:808:808:0:0:f7f7:f7f7",
    ],
)
def test_knows_what_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0"])
def test_does_not_even_connect_to_a_private_address(tmp_path: Path, host: str, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as line:
        url = f"{scheme}://{host}:{line.getsockname()[1]}/a.jpg"
        reason = get(url, tmp_path / "a", allowed=frozenset())
        assert reason.startswith("address not public (")
        line.settimeout(0.05)
        with pytest.raises(TimeoutError):
            line.accept()


def test_refuses_a_redirect_to_a_private_address(server: Server, tmp_path: Path) -> None:
    """127.0.0.1 stands for a public server here, 127.0.0.2 for what lies behind it."""
    inner = ThreadingHTTPServer(("127.0.0.2", 0), BaseHTTPRequestHandler)
    with inner:
        target = f"http://127.0.0.2:{inner.server_port}/secret"
        url = server.add("/a", lambda one: send(one, b"", 302, Location=target))
        assert get(url, tmp_path / "a") == "address not public (127.0.0.2)"
    assert server.asked["/a"] == 1


def answer_names(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
    """Addresses of photos.example.com, each time it is asked for; the last ones from then on."""
    real, rest = socket.getaddrinfo, list(answers)

    def ask(host: str, port: int, *more: object, **named: object) -> list[tuple[object, ...]]:
        if host != "photos.example.com":
            return real(host, port, *more, **named)
        addresses = rest.pop(0) if len(rest) > 1 else rest[0]
        return [one for address in addresses for one in real(address, port, *more, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", ask)


def test_connects_to_the_address_that_was_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.1 stands for a public server; a second question would lead elsewhere."""
    answer_names(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    server.add("/a", PHOTO)
    url = f"http://photos.example.com:{server.http.server_port}/a"
    assert get(url, tmp_path / "a") is None
    assert server.headers[0]["Host"] == f"photos.example.com:{server.http.server_port}"


def test_of_a_names_addresses_only_public_ones_count(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://photos.example.com:{server.http.server_port}/a"
    server.add("/a", PHOTO)
    answer_names(monkeypatch, ["10.0.0.1", "127.0.0.1"])
    assert get(url, tmp_path / "a") is None
    assert get(url, tmp_path / "b", allowed=frozenset()) == "address not public (10.0.0.1)"
    assert server.asked["/a"] == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "not an http or https address"),
        ("ftp://example.com/a.jpg", "not an http or https address"),
        ("a.jpg", "not an http or https address"),
        ("", "not an http or https address"),
        ("http://", "not an http or https address"),
        ("http://[::1/a.jpg", "not an http or https address"),
        ("http://[", "not an http or https address"),
        ("http://a:b/", "not an http or https address"),
        ("http://a:65536/", "not an http or https address"),
        ("http://a..b/", "not an http or https address"),
        ("http://me:secret@127.0.0.1/a.jpg", "credentials in the address"),
        ("http://me@127.0.0.1/a.jpg", "credentials in the address"),
        ("http://@127.0.0.1/a.jpg", "credentials in the address"),
    ],
)
def test_refuses_other_addresses(tmp_path: Path, url: str, reason: str) -> None:
    assert get(url, tmp_path / "a") == reason
    assert is_permanent(reason)


# What is no image


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (b"<html>gone</html>", "text/html; charset=utf-8", "not an image (text/html)"),
        (b"<html>gone</html>", "image/jpeg", "not an image (image/jpeg)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/x\x07", "not an image (image/x\\x07)"),
        (picture("TIFF"), "image/tiff", "not an image (image/tiff)"),
        (b"", "image/jpeg", "an empty answer"),
        (PHOTO[: len(PHOTO) // 2], "image/jpeg", "a broken image, or one that was cut off"),
        (picture("GIF", (1, 1)), "image/gif", "too small: 1x1 pixels, a placeholder"),
    ],
)
def test_refuses_what_is_no_image(
    server: Server, tmp_path: Path, body: bytes, kind: str, reason: str
) -> None:
    url = server.add("/a", lambda one: send(one, body, kind=kind))
    assert get(url, tmp_path / "a") == reason
    assert list(tmp_path.iterdir()) == []


def test_decodes_only_what_photographs_come_in() -> None:
    """Others, such as EPS, start other programs."""
    assert set(download.DECODERS) == {"JPEG", "PNG", "WEBP", "GIF", "BMP"}


def test_refuses_an_image_of_too_many_pixels(server: Server, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(file, "PNG")
    url = server.add("/a", file.getvalue())
    assert get(url, tmp_path / "a") == "too large: more pixels than are read"


# Too much, too slow


def test_refuses_a_length_that_is_too_large_at_once(server: Server, tmp_path: Path) -> None:
    url = server.add("/a", lambda one: send(one, PHOTO, Content_Length="99999999"))
    assert get(url, tmp_path / "a") == "too large: more than 20,971,520 bytes"
    assert list(tmp_path.iterdir()) == []


def test_cuts_off_an_endless_body(server: Server, tmp_path: Path) -> None:
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not server.stop.is_set():
            handler.wfile.write(b"x" * 10_000)
            sent.append(10_000)

    url = server.add("/a", endless)
    assert get(url, tmp_path / "a", max_bytes=100_000) == "too large: more than 100,000 bytes"
    assert sum(sent) < 20_000_000  # what the buffers of the system hold
    assert list(tmp_path.iterdir()) == []


def test_ends_a_silence(server: Server, tmp_path: Path) -> None:
    url = server.add("/a", lambda _: server.stop.wait(10) and None)
    assert get(url, tmp_path / "a", timeout=0.2) == "timed out after 0.2 s of silence"


def test_dead_addresses_take_no_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def dead(_: tuple[str, int], seconds: float) -> socket.socket:
        waits.append(seconds)
        time.sleep(seconds)
        raise TimeoutError

    answer_names(monkeypatch, [f"8.8.8.{n}" for n in range(12)])
    monkeypatch.setattr(socket, "create_connection", dead)
    begun = time.monotonic()
    limits = {"timeout": 0.3, "total": 0.7, "retries": 3}
    assert get("http://photos.example.com/", tmp_path / "a", **limits) == "timed out after 0.7 s"
    assert time.monotonic() - begun < 2
    assert len(waits) <= 3 and max(waits) <= 0.3 and sum(waits) <= 0.7


def test_a_slow_name_server_takes_no_more_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stop.wait(20) and [])
    begun = time.monotonic()
    why = get("http://photos.example.com/", tmp_path / "a", timeout=0.2, total=5.0)
    assert why == "timed out after 0.2 s of silence"
    why = get("http://photos.example.com/", tmp_path / "a", timeout=0.2, total=0.3, retries=9)
    assert why == "timed out after 0.3 s"
    assert time.monotonic() - begun < 2
    stop.set()


def test_waiting_for_other_pictures_to_be_decoded_takes_no_time_of_the_networks(
    server: Server, tmp_path: Path
) -> None:
    broken = iter([PHOTO[:-100], PHOTO])
    url = server.add("/a", lambda handler: send(handler, next(broken)))
    download._ONE_AT_A_TIME.acquire()
    threading.Timer(0.6, download._ONE_AT_A_TIME.release).start()
    assert get(url, tmp_path / "a", total=0.5, retries=1) is None


def test_retries_and_redirects_take_no_more_than_the_limit(server: Server, tmp_path: Path) -> None:
    def slow(handler: BaseHTTPRequestHandler) -> None:
        server.stop.wait(0.2)
        send(handler, b"", 302, Location="/b") if handler.path == "/a" else send(handler, b"", 503)

    server.add("/b", slow)
    begun = time.monotonic()
    why = get(server.add("/a", slow), tmp_path / "a", total=1.0, retries=100)
    assert why in ("timed out after 1 s", "HTTP 503 Service Unavailable")
    assert time.monotonic() - begun < 2
    assert 1 <= server.asked["/b"] <= 3


# Trying again


def test_tries_again_what_may_pass(server: Server, tmp_path: Path) -> None:
    def busy(handler: BaseHTTPRequestHandler) -> None:
        if server.asked["/a"] < 3:
            return send(handler, b"busy", 503)
        return send(handler, PHOTO)

    assert get(server.add("/a", busy), tmp_path / "a", retries=3) is None
    assert server.asked["/a"] == 3


def test_gives_up_after_so_many_tries(server: Server, tmp_path: Path) -> None:
    url = server.add("/a", lambda one: send(one, b"", 500))
    assert get(url, tmp_path / "a", retries=2) == "HTTP 500 Internal Server Error"
    assert server.asked["/a"] == 3


def test_what_is_gone_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    url = server.add("/a", lambda one: send(one, b"", 404))
    assert get(url, tmp_path / "a", retries=3) == "HTTP 404 Not Found"
    assert server.asked["/a"] == 1


@pytest.mark.parametrize("how", ["number", "date"])
def test_waits_as_long_as_the_server_says(server: Server, tmp_path: Path, how: str) -> None:
    def busy(handler: BaseHTTPRequestHandler) -> None:
        if server.asked["/a"] < 2:
            # A date counts whole seconds, so two from now may be no more than one.
            later = "1" if how == "number" else formatdate(time.time() + 2, usegmt=True)
            return send(handler, b"", 429, Retry_After=later)
        return send(handler, PHOTO)

    begun = time.monotonic()
    assert get(server.add("/a", busy), tmp_path / "a", retries=1) is None
    assert 1 <= time.monotonic() - begun < 3


def test_does_not_wait_for_hours(server: Server, tmp_path: Path) -> None:
    url = server.add("/b", lambda one: send(one, b"", 503, Retry_After="9999"))
    assert get(url, tmp_path / "b", retries=3) == "HTTP 503 Service Unavailable"
    assert server.asked["/b"] == 1
    url = server.add("/c", lambda one: send(one, b"", 503, Retry_After="6"))
    assert get(url, tmp_path / "c", retries=3, total=5.0) == "HTTP 503 Service Unavailable"
    assert server.asked["/c"] == 1
    url = server.add("/c", lambda one: send(one, b"", 503, Retry_After="soon"))
    assert get(url, tmp_path / "c", retries=1) == "HTTP 503 Service Unavailable"
    assert server.asked["/c"] == 3


def test_the_pauses_grow(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", _recording(threading.Event.wait, pauses))
    url = server.add("/a", lambda one: send(one, b"", 503))
    get(url, tmp_path / "a", retries=4, backoff=0.01)
    assert len(pauses) == 4
    for attempt, pause in enumerate(pauses):
        assert 0.5 <= pause / (0.01 * 2**attempt) <= 1.5


def _recording(
    wait: Callable[[threading.Event, float | None], bool], pauses: list[float]
) -> Callable[..., bool]:
    def record(event: threading.Event, timeout: float | None = None) -> bool:
        # The downloader's threads wait for nothing else with so short a limit.
        if timeout and timeout < 0.4 and threading.current_thread().name.startswith("download"):
            pauses.append(timeout)
        return wait(event, timeout)

    return record


# The log


def test_logs_what_failed_and_leaves_alone_what_failed_for_good(server: Server, tmp_path: Path) -> None:
    gone = server.add("/gone", lambda one: send(one, b"", 404))
    busy = server.add("/busy", lambda one: send(one, b"", 503))
    good = server.add("/good", PHOTO)
    jobs = {url: url.rpartition("/")[2] for url in (gone, busy, good)}
    log = tmp_path / "download-failures.csv"
    first = fetch(jobs, tmp_path, log=log, limits=ONCE)
    assert first == {gone: "HTTP 404 Not Found", busy: "HTTP 503 Service Unavailable"}
    assert log.read_text().splitlines() == [
        "url,reason",
        f"{gone},HTTP 404 Not Found",
        f"{busy},HTTP 503 Service Unavailable",
    ]

    server.add("/busy", PHOTO)
    server.add("/gone", PHOTO)
    assert fetch(jobs, tmp_path, log=log, limits=ONCE) == {gone: "HTTP 404 Not Found"}
    assert server.asked == {"/gone": 1, "/busy": 2, "/good": 1}

    log.unlink()
    assert fetch(jobs, tmp_path, log=log, limits=ONCE) == {}
    assert server.asked == {"/gone": 2, "/busy": 2, "/good": 1}
    assert not log.exists()


def test_says_that_a_log_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"log\.csv: not a list of failures .*; delete it"):
        fetch({"http://a/": "a"}, tmp_path, log=tmp_path / "log.csv")


def test_ctrl_c_leaves_what_is_whole(server: Server, tmp_path: Path) -> None:
    jobs = {server.add(f"/{n}", PHOTO): f"{n}" for n in range(30)}

    def interrupt(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(jobs, tmp_path, workers=1, progress=interrupt, limits=LOCAL)
    names = sorted(one.name for one in tmp_path.iterdir())
    assert 5 <= len(names) < 30
    assert all(name.endswith(".jpg") for name in names)
    assert fetch(jobs, tmp_path, limits=LOCAL) == {}
    assert all(server.asked[f"/{name.removesuffix('.jpg')}"] == 1 for name in names)
    assert len(list(tmp_path.iterdir())) == 30


@pytest.mark.parametrize("error", [ValueError, MemoryError, RecursionError])
def test_what_fails_within_is_the_failure_of_one_picture(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def check(body: bytes, *_: object) -> str:
        if body == b"bad":
            raise error("\n" * 1000)
        return ".jpg"

    monkeypatch.setattr(download, "_check_image", check)
    bad, good = server.add("/bad", b"bad"), server.add("/good", PHOTO)
    log = tmp_path / "log.csv"
    why = f"it failed ({error.__name__})"
    assert fetch({bad: "bad", good: "good"}, tmp_path, log=log, limits=ONCE) == {bad: why}
    assert log.read_text().splitlines() == ["url,reason", f"{bad},{why}"]
    assert (tmp_path / "good.jpg").exists()


def test_a_download_that_is_stopped_keeps_its_log(server: Server, tmp_path: Path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    bad = server.add("/bad", lambda one: send(one, b"", 404))
    log = tmp_path / "log.csv"
    with pytest.raises(KeyboardInterrupt):
        fetch({bad: "bad"}, tmp_path, log=log, progress=interrupt, limits=LOCAL)
    assert log.read_text().splitlines() == ["url,reason", f"{bad},HTTP 404 Not Found"]


def test_the_log_names_what_is_long_or_cannot_be_printed(server: Server, tmp_path: Path) -> None:
    server.add("/", lambda one: send(one, b"", 404))
    urls = [f"{server.url}/{tail}" for tail in ("x" * 1000, "x" * 1001, "\x1b[2J", 'a"b,c', "\u202e", "café")]
    for url in urls:
        server.add(quote(url.removeprefix(server.url), safe='/[",'), lambda one: send(one, b"", 404))
    log, jobs = tmp_path / "log.csv", {url: f"{n}" for n, url in enumerate(urls)}
    assert fetch(jobs, tmp_path, log=log, limits=ONCE) == dict.fromkeys(urls, "HTTP 404 Not Found")
    lines = log.read_text().splitlines()
    assert len(set(lines)) == len(lines) == 7
    assert all(line.isprintable() and len(line) <= 400 for line in lines)
    assert lines[-1] == f"{server.url}/café,HTTP 404 Not Found"
    asked = sum(server.asked.values())
    assert fetch(jobs, tmp_path, log=log, limits=ONCE) == dict.fromkeys(urls, "HTTP 404 Not Found")
    assert sum(server.asked.values()) == asked == 6


# Files


ODD = ("", " ", ".", "..", ".hidden", "-rf", "x ", "x.", "~", "*", "C:x", "a:b", "x" * 201, "é" * 101)
ODD_CHARACTERS = ('"' * 99, "a\0b", "a\nb", "\x1b[2J", "\u202ex", "a\u2044b", "\ud800", "a'b", 'a"b')
ELSEWHERE = ("../x", "../../x", "/abs/x", "a/b", "a\\b", "..\\x")


@pytest.mark.parametrize("name", [*ODD, *ODD_CHARACTERS, *ELSEWHERE])
def test_makes_no_file_but_under_a_plain_name(server: Server, tmp_path: Path, name: str) -> None:
    url, good = server.add("/a", PHOTO), server.add("/good", PHOTO)
    folder, log = tmp_path / "root" / "images", tmp_path / "log.csv"
    why = fetch({url: name, good: "good"}, folder, log=log, limits=ONCE)[url]
    assert why.startswith("no plain name for a file: ")
    assert why.isprintable() and len(why) < 150
    assert list(csv.reader(io.StringIO(log.read_text()))) == [["url", "reason"], [url, why]]
    assert len(log.read_text().splitlines()) == 2
    assert [one.name for one in tmp_path.rglob("*") if one.is_file()] == ["log.csv", "good.jpg"]
    assert not server.asked["/a"]
    # A row that was put right is asked for again.
    assert fetch({url: "a"}, folder, log=log, limits=ONCE) == {}


def test_a_table_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    """The whole way from a published table; neither address is one that is asked."""
    root = tmp_path / "a" / "svo"
    root.mkdir(parents=True)
    cells = {
        "id": "1",
        "sentence": "a girl",
        "pos_triplet": "girl,lie,grass",
        "neg_triplet": "girl,sit,grass",
    }
    cells |= {
        "pos_url": "http://127.0.0.1:1/",
        "pos_image_id": "../../x",
        "neg_image_id": str(tmp_path / "y"),
    }
    cells |= {"neg_url": "http://127.0.0.1:2/", "subj_neg": "False", "verb_neg": "True", "obj_neg": "False"}
    with (root / "svo_probes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([cells, cells.values()])
    with pytest.raises(DataError, match=r"none could be downloaded; see download-failures\.csv"):
        build("svo-probes", root, download=True)
    lines = (root / "download-failures.csv").read_text().splitlines()
    assert [line.partition(",")[2][:26] for line in lines[1:]] == ['"no plain name for a file:'] * 2
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["download-failures.csv", "svo_probes.csv"]


@pytest.mark.parametrize("name", ["7", "a b", "v1.2_x-3@2+4", "ÄÖÜ", "猫", "x" * 200, "_", "@x"])
def test_makes_files_under_plain_names(server: Server, tmp_path: Path, name: str) -> None:
    assert get(server.add("/a", PHOTO), tmp_path / name) is None
    assert [one.name for one in tmp_path.iterdir()] == [f"{name}.jpg"]


def test_two_addresses_never_share_a_file(server: Server, tmp_path: Path) -> None:
    one, other = server.add("/a", PHOTO), server.add("/b", picture("PNG"))
    assert fetch({one: "x", other: "x"}, tmp_path, limits=ONCE) == {
        other: "the file x is an earlier address's"
    }
    assert [file.name for file in tmp_path.iterdir()] == ["x.jpg"]


def test_does_not_replace_a_file_that_has_come_meanwhile(server: Server, tmp_path: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        (tmp_path / "a.jpg").write_bytes(b"mine")
        send(handler, PHOTO)

    why = get(server.add("/a", answer), tmp_path / "a")
    assert why == "cannot be written (a file of its name has come meanwhile)"
    assert (tmp_path / "a.jpg").read_bytes() == b"mine"
    assert [one.name for one in tmp_path.iterdir()] == ["a.jpg"]


def test_does_not_follow_a_link_out_of_the_folder(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        (folder / "a.jpg").symlink_to(tmp_path / "outside")
        send(handler, PHOTO)

    assert get(server.add("/a", answer), folder / "a").startswith("cannot be written")
    (folder / ".b.jpg.tmp").symlink_to(tmp_path / "outside")
    assert get(server.add("/b", PHOTO), folder / "b") is None
    assert sorted(path.name for path in folder.iterdir()) == ["a.jpg", "b.jpg"]
    assert not (folder / "b.jpg").is_symlink()
    assert not (tmp_path / "outside").exists()


def test_a_folder_that_cannot_be_written_is_said(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    url = server.add("/a", PHOTO)
    assert get(url, tmp_path / "file" / "a").startswith("cannot be written (")
    assert (tmp_path / "file").read_bytes() == b""

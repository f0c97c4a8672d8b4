"""One download from a server that does everything wrong, of pictures that can be had among it."""

from __future__ import annotations

import csv
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bad_server
import pytest
from bad_server import TLS, WAYS, BadServer

from vlmscope.data.published import download, web
from vlmscope.data.published.web import Clock, Limits, get

LIMITS = Limits(timeout=1.0, total=3.0, retries=1, backoff=0.01, allowed=frozenset({"127.0.0.1"}))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What is left of one download of everything, good pictures between bad ones."""
    root = tmp_path_factory.mktemp("download")
    folder, log = root / "images", root / "failures.csv"
    server = BadServer()
    bad = {url: name for name, url in server.urls.items()}
    good = {url: f"good-{n}" for n, url in enumerate(server.good)}
    order = sorted([*bad, *good], key=lambda url: hash_of(bad.get(url) or good[url]))
    seconds: dict[str, float] = {}

    def timed(url: str, clock: Clock) -> tuple[bytes, str]:
        begun = time.monotonic()
        try:
            return get(url, clock)
        finally:
            seconds[url] = seconds.get(url, 0) + time.monotonic() - begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "get", timed)
        begun = time.monotonic()
        failed = download.fetch({url: (bad | good)[url] for url in order}, folder, log=log, limits=LIMITS)
        whole = time.monotonic() - begun
    server.close()
    reasons = {bad[url]: why for url, why in failed.items() if url in bad}
    times = {bad[url]: seconds.get(url, 0) for url in bad}
    return SimpleNamespace(
        root=root,
        folder=folder,
        log=log,
        failed=failed,
        reasons=reasons,
        times=times,
        whole=whole,
        server=server,
    )


def hash_of(name: str) -> int:
    """An order that is the same in every run."""
    return sum(ord(char) * 31**n for n, char in enumerate(name)) % 1009


@pytest.mark.parametrize("name", [*WAYS, *TLS])
def test_every_bad_server_is_a_line_of_the_log(done: SimpleNamespace, name: str) -> None:
    assert re.fullmatch((WAYS.get(name) or TLS[name]).reason, done.reasons[name])
    assert done.times[name] < LIMITS.total + 1


def test_every_good_picture_arrives_and_nothing_else(done: SimpleNamespace) -> None:
    files = [path for path in done.root.rglob("*") if path.is_file() and path != done.log]
    assert {path.relative_to(done.folder).as_posix() for path in files} == {
        f"good-{n}.jpg" for n in range(bad_server.GOOD)
    }
    assert all(path.read_bytes() == bad_server.PHOTO for path in files)


def test_the_log_can_be_read_by_people_and_machines(done: SimpleNamespace) -> None:
    lines = done.log.read_text("utf-8").splitlines()
    assert len(lines) == len(done.failed) + 1 == len(WAYS) + len(TLS) + 1
    assert all(line.isprintable() and len(line) <= 400 for line in lines)
    with done.log.open(encoding="utf-8", newline="") as file:
        assert dict(list(csv.reader(file))[1:]) == done.failed


def test_no_server_takes_the_others_time(done: SimpleNamespace) -> None:
    assert done.whole < 15


def test_what_may_pass_is_asked_again_and_nothing_else(done: SimpleNamespace) -> None:
    asked = done.server.asked
    assert asked["later-forever"] == asked["later-soon"] == asked["later-in-1970"] == 2
    assert asked["later-in-years"] == asked["later-in-5000-digits"] == asked["later-in-the-year-9999"] == 1
    assert asked["cookies"] == asked["status-999"] - 1 == asked["body-html"] == asked["body-slow-jpeg"] == 1
    assert asked["redirect-loop"] == 6


# Behind TLS


@pytest.fixture
def secure(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    """A server whose certificate, for localhost and 127.0.0.1, only this test trusts."""
    pem = Path(__file__).with_name("localhost.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    monkeypatch.setattr(web, "_tls", lambda: ssl.create_default_context(cafile=pem))
    server = BadServer(context)
    yield server
    server.close()


def test_a_trusted_server_is_asked_behind_tls(secure: BadServer, tmp_path: Path) -> None:
    for n, host in enumerate(("localhost", "127.0.0.1")):
        url = secure.good[0].replace("http://127.0.0.1", f"https://{host}")
        assert download.fetch({url: f"{n}"}, tmp_path, limits=LIMITS) == {}


@pytest.mark.parametrize(
    "name", ["slow-body", "slow-head", "continue-forever", "silent-body", "endless-body"]
)
def test_bad_servers_behind_tls_have_the_same_limits(secure: BadServer, tmp_path: Path, name: str) -> None:
    url = secure.urls[name].replace("http:", "https:")
    begun = time.monotonic()
    why = download.fetch({url: "a"}, tmp_path, limits=replace(LIMITS, total=0.8))[url]
    assert re.fullmatch(WAYS[name].reason, why)
    assert time.monotonic() - begun < 1.8


def test_a_certificate_must_be_trusted_and_of_this_name(
    secure: BadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = secure.good[0].replace("http:", "https:")
    other = url.replace("127.0.0.1", "photos.example.com")
    connect = web._connect
    monkeypatch.setattr(web, "_connect", lambda _, port, clock: connect("127.0.0.1", port, clock))
    why = "no trusted connection to the server (TLS)"
    assert download.fetch({url: "a", other: "b"}, tmp_path, limits=LIMITS) == {other: why}
    monkeypatch.setattr(web, "_tls", ssl.create_default_context)
    assert download.fetch({url: "c"}, tmp_path, limits=LIMITS) == {url: why}
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]

"""A server on 127.0.0.1 that speaks what is used of the Hugging Face hub's protocol, to its real client.

Names, repositories of data sets, commits (files by themselves, or large ones by LFS), trees, files and parts
of them. Written from what the client sends and reads; it holds everything in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_pretended"
ATTRIBUTES = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repository:
    """The files of a data set, and its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": ATTRIBUTES})
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits}".encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)


@contextmanager
def served() -> Iterator[Hub]:
    """The server, for as long as it is needed."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._do()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        for pattern, needs_token, answer in _ANSWERS:
            if found := re.fullmatch(f"(?:{pattern})", f"{self.command} {path}"):
                if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._say({"error": "Invalid username or password."}, 401)
                else:
                    answer(self, body, *found.groups())
                return
        self._say({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def _say(self, content: Any, status: int = 200, more: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        headers = {"Content-Length": str(len(data)), **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._say({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def whoami(self, body: bytes) -> None:
        self._say({"type": "user", "name": "owner", "auth": {"accessToken": {"role": "write"}}})

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        assert text.startswith("---\n") and text.count("\n---\n") == 1, "a card without its head"
        self._say({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        assert asked["type"] == "dataset"
        if name.startswith("others/"):
            self._say({"error": "You don't have the rights to create a dataset under others"}, 403)
            return
        url = {"url": f"{self.hub.endpoint}/datasets/{name}", "name": name}
        if name in self.hub.repositories:
            self._say(url | {"error": "You already created this dataset repo"}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self._say(url)

    def preupload(self, body: bytes, name: str) -> None:
        modes = {True: "lfs", False: "regular"}
        files = [
            {
                "path": one["path"],
                "uploadMode": modes[one["path"].endswith(".parquet")],
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]
        self._say({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._say({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._say({})

    def commit(self, body: bytes, name: str) -> None:
        found = self._repository(name)
        if found is None:
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                found.files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del found.files[value["path"]]
        found.commits += 1
        url = f"{self.hub.endpoint}/datasets/{name}/commit/{found.sha}"
        self._say({"success": True, "commitOid": found.sha, "commitUrl": url})

    def about(self, body: bytes, name: str, revision: str | None = None) -> None:
        found = self._repository(name)
        if found is not None:
            siblings = [{"rfilename": file} for file in sorted(found.files)]
            more = {"tags": [], "downloads": 0, "likes": 0, "private": found.private, "gated": False}
            self._say({"_id": "0", "id": name, "sha": found.sha, "siblings": siblings, **more})

    def tree(self, body: bytes, name: str, revision: str, under: str | None = None) -> None:
        found = self._repository(name)
        if found is None:
            return
        above = f"{under}/" if under else ""
        names = [file for file in sorted(found.files) if file.startswith(above)]
        folders: dict[str, None] = {}
        if "recursive=true" not in self.path.lower():
            folders = {above + file[len(above) :].partition("/")[0]: None for file in names}
            folders = {name: None for name in folders if name not in found.files}
            names = [file for file in names if "/" not in file[len(above) :]]
        if not (names or folders):
            self._say({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._say([self._folder(name) for name in folders] + [self._entry(found, file) for file in names])

    def paths(self, body: bytes, name: str, revision: str) -> None:
        found = self._repository(name)
        if found is None:
            return
        try:
            asked = json.loads(body)["paths"]
        except ValueError:
            asked = [unquote(pair.partition("=")[2]) for pair in body.decode().split("&") if "paths" in pair]
        said = [self._entry(found, file) for file in asked if file in found.files]
        folders = [one for one in asked if any(file.startswith(f"{one}/") for file in found.files)]
        self._say(said + [self._folder(one) for one in folders])

    def _folder(self, name: str) -> dict[str, Any]:
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}

    def _entry(self, found: Repository, file: str) -> dict[str, Any]:
        content = found.files[file]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": file, "size": len(content), "oid": oid}

    def file(self, body: bytes, name: str, revision: str, file: str) -> None:
        found = self._repository(name)
        if found is None:
            return
        if file not in found.files:
            self._say({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        content = found.files[file]
        headers = {"X-Repo-Commit": found.sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        headers |= {"Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            self.hub.ranges.append(part[0])
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._say(content[first : last + 1], 206, headers)
            return
        self._say(content, 200, headers)


_DATA = r"/api/datasets/([\w.-]+/[\w.-]+)"
_ANSWERS: list[tuple[str, bool, Any]] = [
    (r"GET /api/whoami-v2", True, _Handler.whoami),
    (r"POST /api/validate-yaml", False, _Handler.validate),
    (r"POST /api/repos/create", True, _Handler.create),
    (rf"POST {_DATA}/preupload/main", True, _Handler.preupload),
    (r"POST /datasets/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", True, _Handler.batch),
    (r"PUT /lfs/([0-9a-f]{64})", False, _Handler.put),
    (rf"POST {_DATA}/commit/main", True, _Handler.commit),
    (rf"GET {_DATA}(?:/revision/([\w.-]+))?", False, _Handler.about),
    (rf"GET {_DATA}/tree/([\w.-]+)(?:/(.+))?", False, _Handler.tree),
    (rf"POST {_DATA}/paths-info/([\w.-]+)", False, _Handler.paths),
    (r"(?:GET|HEAD) /datasets/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", False, _Handler.file),
]

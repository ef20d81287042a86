"""A stand-in for the hub, on this machine: as much of its API as an upload and a download by huggingface_hub take."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What it holds, and every request that it was sent."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.requests.append(f"GET {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repository = self._find("/".join(parts[2:4]))
            if repository is not None:
                if parts[4:5] == ["tree"]:
                    held = repository.files.items()
                    self._answer(200, [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in held])
                    return
                siblings = [{"rfilename": name} for name in repository.files]
                info = {"id": "/".join(parts[2:4]), "sha": "0" * 40, "private": repository.private}
                self._answer(200, {**info, "siblings": siblings})
            return
        repository = self._find("/".join(parts[:2]))
        if repository is None:
            return
        content = repository.files.get("/".join(parts[4:]))
        if content is None:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "0" * 40})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self._read()
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[-1] == "validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != "Bearer right":
            self._answer(401, {"error": "Invalid username or password."})
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            if name in self.hub.repositories:
                self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
                return
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(bool(private), {".gitattributes": b""})
            self._answer(200, {"url": f"{self.hub.url}/{name}", "id": name})
        elif parts[4] == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]
            self._answer(200, {"files": modes})
        else:
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines() if line])

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _find(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

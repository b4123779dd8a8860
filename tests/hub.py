"""A stand-in for the Hugging Face Hub: repositories in memory, over HTTP, as far as adapters need it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """Repositories by name: their files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str) -> str:
        held = sorted(self.repositories[name].items())
        return hashlib.sha1(repr(held).encode()).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            told = json.loads(body)
            name = "/".join(filter(None, [told.get("organization"), told["name"]]))
            self.server.repositories.setdefault(name, {})
            self._answer(200, {"url": f"{self.server.endpoint}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            self._answer(200, {"files": files})
        else:
            self._commit("/".join(parts[2:4]), body)

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        commit = self.server.commit(name)
        self._answer(200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    def do_HEAD(self) -> None:
        self._get(False)

    def do_GET(self) -> None:
        self._get(True)

    def _get(self, whole: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            listed = [{"rfilename": path} for path in files]
            self._answer(200, {"id": name, "sha": self.server.commit(name), "siblings": listed})
        else:
            content = files[unquote("/".join(parts[4:]))]
            etag = hashlib.sha1(content).hexdigest()
            self._send(200, content if whole else b"", len(content), {
                "X-Repo-Commit": self.server.commit(name), "ETag": f'"{etag}"',
            })  # fmt: skip

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._send(status, content, len(content), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

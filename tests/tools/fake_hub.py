"""A stand-in for the hub of Hugging Face: the part of its API that a pull of a model uses.

As the hub does, it sends large files from another host, names the hash of every file, and obeys
``Range``. Source: https://huggingface.co/docs/hub/api and the requests of huggingface_hub 2.4.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000
"""Bytes from which the stand-in keeps a file in LFS, as the hub does from 10 MB."""


@dataclass
class Repo:
    """A model of the hub.

    Attributes:
        refs: commits by branch or tag.
        files: contents by commit and name.
        token: who may read it; "" for everybody.
        gated: everybody sees it, and only the token's owner may read its files.
    """

    refs: dict[str, str]
    files: dict[str, dict[str, bytes]]
    token: str = ""
    gated: bool = False


@dataclass
class Request:
    """A request that arrived."""

    method: str
    path: str
    host: str
    token: str
    range: str


@dataclass
class FakeHub:
    """The server.

    Attributes:
        cut: bytes after which the connection of a file's next transfer breaks, by name.
        damaged: files that arrive with another byte.
        failing: answer everything with this status.
    """

    repos: dict[str, Repo]
    cut: dict[str, list[int]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    failing: int = 0
    requests: list[Request] = field(default_factory=list)

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        poll = 0.02  # seconds until it stops
        threading.Thread(target=self._server.serve_forever, args=(poll,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sent(self, name: str) -> int:
        """Return how often a file was sent, in part or whole."""
        return sum(
            each.method == "GET" and each.path.endswith(f"/{name}") for each in self.requests
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        host = self.headers["Host"].partition(":")[0]
        range_ = self.headers.get("Range", "")
        self.server_hub.requests.append(Request(self.command, path, host, token, range_))
        if self.server_hub.failing:
            self._send(self.server_hub.failing, b"out of order")
        elif path.startswith("/cdn/"):
            self._file(*path.split("/", 5)[2:])
        elif path.startswith("/api/models/"):
            self._model(*path.removeprefix("/api/models/").split("/", 3), token=token)
        elif "/resolve/" in path:
            self._resolve(*path.split("/", 5)[1:], token=token)
        else:
            self._send(404, b"{}")

    def _repo(self, org: str, name: str, token: str) -> Repo | None:
        repo = self.server_hub.repos.get(f"{org}/{name}")
        if repo is None or (repo.token and not repo.gated and repo.token != token):
            # The hub answers so to those who are not logged in, to hide private models.
            self._send(404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _model(
        self, org: str, name: str, _: str = "", revision: str = "main", *, token: str
    ) -> None:
        repo = self._repo(org, name, token)
        if repo is None:
            return
        commit = repo.refs.get(revision) or next(
            (each for each in repo.files if each.startswith(revision)), None
        )
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [_sibling(*each) for each in repo.files[commit].items()]
        answer = {"id": f"{org}/{name}", "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, org: str, name: str, _: str, commit: str, file: str, *, token: str) -> None:
        repo = self._repo(org, name, token)
        if repo is None:
            return
        if repo.gated and repo.token != token:
            self._send(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        content = repo.files[commit][file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"'}
        if len(content) < LARGE:
            self._file(org, name, commit, file, headers)
            return
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{self.server_hub.port}/cdn/{org}/{name}/{commit}/{file}",
        }
        self._send(302, b"", headers)

    def _file(
        self, org: str, name: str, commit: str, file: str, headers: dict[str, str] | None = None
    ) -> None:
        content = self.server_hub.repos[f"{org}/{name}"].files[commit][file]
        if file in self.server_hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        more = dict(headers or {})
        if first:
            more["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        cuts = self.server_hub.cut.get(file) if self.command == "GET" else None
        self._send(206 if first else 200, content[first:], more, cuts.pop(0) if cuts else None)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    known: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
    if len(content) >= LARGE:
        digest = hashlib.sha256(content).hexdigest()
        known["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
    return known


def git_hash(content: bytes) -> str:
    """Return the id that git gives a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

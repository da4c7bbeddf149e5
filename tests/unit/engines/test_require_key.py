"""The middleware of a served vLLM: no path is open without the key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from aiflux.engines.vllm.middleware.require_key import RequireKey

PATHS = ["/v1/chat/completions", "/invocations", "/score", "/tokenize", "/metrics", "/health", "//"]


def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: dict[str, Any]) -> list[Any]:
    """Return what the application behind the middleware, or else the middleware, sends."""
    (tmp_path / "key").write_text("the key\n")
    monkeypatch.setenv("AIFLUX_KEY_FILE", str(tmp_path / "key"))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send("passed")

    asyncio.run(RequireKey(app)({"headers": [], **scope}, receive, send))
    return sent


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Bearer ", b"Bearer the ke", b"the key", b"Bearer the key2"]
)
def test_a_request_without_the_key_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    method: str,
    header: bytes | None,
) -> None:
    headers = [] if header is None else [(b"authorization", header)]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    start, body = answered(tmp_path, monkeypatch, scope)
    assert start["status"] == 401
    assert b"error" in body["body"]


def test_a_request_with_the_key_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = [(b"host", b"x"), (b"authorization", b"Bearer the key")]
    scope = {"type": "http", "method": "POST", "path": "/v1/models", "headers": headers}
    assert answered(tmp_path, monkeypatch, scope) == ["passed"]


def test_sockets_need_the_key_and_the_server_itself_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (closed,) = answered(tmp_path, monkeypatch, {"type": "websocket", "path": "/v1/realtime"})
    assert closed["type"] == "websocket.close"
    assert answered(tmp_path, monkeypatch, {"type": "lifespan"}) == ["passed"]


def test_without_a_key_file_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIFLUX_KEY_FILE", raising=False)
    with pytest.raises(KeyError):
        RequireKey(None)  # type: ignore[arg-type]

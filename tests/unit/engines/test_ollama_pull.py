"""Failed pulls: which are retried, and how they are reported."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from aiflux.engines.ollama.api import Ollama
from aiflux.engines.ollama.pull import ensure_model, pull_with, with_reason
from aiflux.errors import ConfigError, EngineError, ModelError
from aiflux.models.name import parse_model_name
from tests.unit.helpers import words_of_python

LOG = r"""time=2026-11-25T20:48:52.5Z level=INFO source=download.go:177 msg="downloading ef96"
time=2026-11-25T20:48:52.6Z level=WARN source=download.go:256 msg="backing off" err="reset"
time=2026-11-25T20:48:52.6Z level=WARN source=download.go:256 msg="backing off" err="500: {\"m\"}"
"""


def test_a_time_limit_is_reported_with_the_slow_step(tmp_path: Path) -> None:
    log = tmp_path / "pull.log"
    log.write_text(LOG, encoding="utf-8")
    words = "context deadline exceeded"
    assert with_reason(words, log) == f'{words} (the last attempt failed with: 500: {{"m"}})'
    assert with_reason("no such host", log) == "no such host"
    log.write_text("", encoding="utf-8")
    assert with_reason(words, log) == words


@contextmanager
def pulling(*answers: dict[str, str]) -> Iterator[tuple[Ollama, list[str]]]:
    """Serve Ollama's API for pulls: each request gets the next answer; the last one is repeated."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() + b"\n")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Ollama(f"http://127.0.0.1:{server.server_port}"), asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


NAME = parse_model_name("m:1")


def test_an_interrupted_pull_is_resumed(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = []
    with pulling({"error": "unexpected EOF"}, {"status": "success"}) as (ollama, asked):
        pull_with(ollama, NAME, tmp_path, steps.append, tmp_path / "pull.log")
    assert len(asked) == 2
    assert steps == [{"status": "success"}]


@pytest.mark.parametrize(
    ("words", "attempts"), [("unexpected EOF", 3), ("pull model manifest: not found", 1)]
)
def test_a_pull_is_retried_only_if_that_can_help(words: str, attempts: int, tmp_path: Path) -> None:
    with (
        pulling({"error": words}) as (ollama, asked),
        pytest.raises(ModelError, match=words) as raised,
    ):
        pull_with(ollama, NAME, tmp_path, lambda _: None, tmp_path / "pull.log")
    assert len(asked) == attempts
    assert raised.value.remedy


def test_a_server_that_went_away_is_reported_in_plain_words(tmp_path: Path) -> None:
    with pulling({"status": "success"}) as (ollama, _):
        pass
    pull = lambda: [*ollama.pull("m:1", insecure=False, stall_timeout=1.0)]  # noqa: E731
    for call in (pull, ollama.version):
        with pytest.raises(EngineError, match="Connection refused") as error:
            call()
        assert not words_of_python(str(error.value)), error.value


def test_missing_certificates_are_reported_before_a_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(ConfigError, match="SSL_CERT_FILE: no certificates can be read from"):
        ensure_model(
            tmp_path / "models", "m:1", "ollama", tmp_path / "pull.log",
            say=lambda _: None, progress=lambda _: None,
        )  # fmt: skip
    assert not (tmp_path / "models").exists()

"""An inference server as a child process: its port, its environment and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aiflux.engines.process import ServerProcess, engine_environment, listening_port
from aiflux.errors import EngineError

SERVER = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "0"]


def test_a_server_that_listens_in_a_child_is_found(tmp_path: Path) -> None:
    """Like vLLM's API server and wrappers of llama-server."""
    shell = ["sh", "-c", '"$@" & wait', "sh", *SERVER]
    environment = engine_environment({"PATH": "/usr/bin:/bin"}, tmp_path, {})
    server = ServerProcess(shell, environment, tmp_path / "log")
    server.start()
    try:
        assert server.pid is not None
        assert server.url == f"http://127.0.0.1:{listening_port(server.pid)}"
    finally:
        server.stop()
    assert not server.running


def test_a_program_that_ends_is_an_error_with_its_last_output(tmp_path: Path) -> None:
    server = ServerProcess(["sh", "-c", "echo no such model; exit 3"], {}, tmp_path / "log")
    with pytest.raises(EngineError, match=r"exited with status 3 during its start:\nno such model"):
        server.start()


def test_a_server_that_was_stopped_does_not_start(tmp_path: Path) -> None:
    server = ServerProcess(["true"], {}, tmp_path / "log")
    server.stop()
    with pytest.raises(EngineError, match="stopped during its start"):
        server.start()


def test_an_engine_gets_no_settings_of_the_workers_python(tmp_path: Path) -> None:
    environ = {"PATH": "/bin", "PYTHONPATH": "/opt/aiflux/site", "AIFLUX_API_KEY": "k"}
    environment = engine_environment(environ, tmp_path, {"A": "1"})
    assert environment == {
        "PATH": "/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "A": "1",
    }  # fmt: skip

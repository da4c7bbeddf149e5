"""The worker serves an engine: key, certificate and address; restarts; and why it ends."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import stat
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from aiflux.core.runs.serve_directory import ServeDirectory
from aiflux.engines.http import Client, ExchangeError
from aiflux.errors import EngineError, RejectedError, StoppedError
from aiflux.slurm.serve import make_certificate
from aiflux.worker.main import main
from tests.unit.made_serves import NODE, MadeServe, until

OTHER = "127.0.0.7"
"""Loopback, too, but not 127.0.0.1: on Linux all of 127/8 is this machine."""


def test_only_the_key_and_the_certificate_open_the_engine(tmp_path: Path) -> None:
    with MadeServe(tmp_path, addresses={NODE: OTHER, "n2": "10.0.0.2"}) as made:
        state = made.start()
        assert (state.host, state.node, state.job, state.model) == (
            OTHER, NODE, "100", "tiny:latest",
        )  # fmt: skip
        assert made.chat("hello") == 200
        assert made.chat("hello", key="wrong") == 401
        assert made.chat("hello", key=None) == 401
        stranger = ServeDirectory(tmp_path / "stranger")
        stranger.path.mkdir()
        make_certificate(stranger, [OTHER])
        with pytest.raises(ExchangeError, match="certificate is not trusted"):
            made.chat("hello", ca=stranger.certificate)
        plain = Client(state.url.replace("https", "http"), 5.0, 1)
        with closing(plain), pytest.raises(ExchangeError):
            plain.get("/health", 5.0)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", state.port)), "it listens on one address"
        key = made.directory.read_key().encode()
        for pid in made.servers():
            for file in ("cmdline", "environ"):
                assert key not in Path(f"/proc/{pid}/{file}").read_bytes()
    assert isinstance(made.error, StoppedError)


def test_a_strict_client_accepts_the_certificate(tmp_path: Path) -> None:
    """Python 3.13 checks by default what RFC 5280 demands of a certificate."""
    with MadeServe(tmp_path) as made:
        state = made.start()
        context = ssl.create_default_context(cafile=made.directory.certificate)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        for name in ("127.0.0.1", "localhost"):
            with socket.create_connection((state.host, state.port)) as plain:
                context.wrap_socket(plain, server_hostname=name).close()


def test_the_files_are_private(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        made.start()
        files = made.directory
        assert stat.S_IMODE(files.path.stat().st_mode) == 0o700
        assert stat.S_IMODE(files.path.parent.stat().st_mode) == 0o700
        for path in (files.key, files.header, files.certificate_key, files.state):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_ends_when_nobody_uses_it(tmp_path: Path) -> None:
    with MadeServe(tmp_path, idle=0.8) as made:
        made.start()
        began = time.monotonic()
        while time.monotonic() - began < 1.2:
            assert made.chat("again") == 200
            time.sleep(0.1)
        state = made.end()
        assert (state.phase, state.reason, made.error) == ("ended", "idle", None)
        assert time.monotonic() - began > 1.8
        assert not made.servers()


def test_a_long_answer_is_use(tmp_path: Path) -> None:
    with MadeServe(tmp_path, idle=0.4) as made:
        made.start()
        (pid,) = made.servers()
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        home = next(word[5:].decode() for word in words if word.startswith(b"HOME="))
        waiting = Path(home) / "waiting"
        waiting.touch()
        status: list[int] = []
        asking = threading.Thread(target=lambda: status.append(made.chat("wait")))
        asking.start()
        time.sleep(1.5)
        assert made.state.phase == "ready"
        waiting.unlink()
        asking.join()
        assert status == [200]
        assert made.end().reason == "idle"


def test_it_ends_before_the_job_does(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        made.begin(deadline=time.time() + 15 + 2)
        assert made.start().phase == "ready"
        assert made.end().reason == "time limit"
        assert made.error is None


def test_after_a_signal_the_same_files_serve_again(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to a job that it preempts, and starts it again."""
    with MadeServe(tmp_path) as made:
        made.start()
        key = made.directory.read_key()
        made.stopper.stop("signal SIGTERM")
        assert made.end().reason == "signal"
        assert isinstance(made.error, StoppedError)
        made.environ["SLURM_RESTART_COUNT"] = "1"
        made.begin()
        made.directory.state.unlink()
        state = made.start()
        assert (state.phase, state.restarts) == ("ready", "1")
        assert made.chat("hello", key=key) == 200


def test_it_is_restarted_after_a_crash(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        first = made.start()
        (pid,) = made.servers()
        os.kill(pid, signal.SIGKILL)
        until(lambda: made.state.phase == "ready" and made.state.port != first.port)
        assert made.chat("hello") == 200


def test_it_is_given_up_after_crashes_without_use(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        made.start()
        killed: set[int] = set()

        def kill_next() -> bool:
            for pid in {*made.servers()} - killed if made.state.phase == "ready" else ():
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            return not made.thread.is_alive()

        until(kill_next, 40)
        assert isinstance(made.error, EngineError)
        assert made.state.reason == "crashed"
        assert "crashed" in made.state.message


def test_a_model_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        for blob in (tmp_path / "models" / "blobs").iterdir():
            if blob.read_bytes()[:4] == b"GGUF":
                blob.write_bytes(b"GGUF, once")
        made.thread.start()
        assert made.end().reason == "crashed"
        assert made.error is not None


@pytest.mark.parametrize(
    ("addresses", "seen"),
    [({"n2": "127.0.0.1"}, "found no address of the node n1"), ({NODE: "192.0.2.1"}, "192.0.2.1")],
)
def test_a_node_without_the_address_is_an_error(
    tmp_path: Path, addresses: dict[str, str], seen: str
) -> None:
    """192.0.2.1 is an address of documentation: no machine has it."""
    with MadeServe(tmp_path, addresses=addresses) as made:
        made.thread.start()
        assert made.end().reason == "crashed"
    assert isinstance(made.error, RejectedError)
    assert seen in made.error.message
    assert "--tunnel" in (made.error.remedy or "")


def test_the_workers_command_serves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MadeServe(tmp_path, idle=0.5) as made:
        for name in ("AIFLUX_ENGINE_PROGRAM", "SLURMD_NODENAME", "TMPDIR"):
            monkeypatch.setenv(name, made.environ[name])
        run = str(made.directory.run.path)
        assert main(["--run-dir", run, "--prepare"], made.stopper) == 0
        assert made.state.phase == "none"
        assert main(["--run-dir", run], made.stopper) == 0
        assert made.state.reason == "idle"

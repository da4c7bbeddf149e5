"""The ssh tunnel to a node, with a stand-in for ssh; the real one is in the integration tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiflux.engines.process import free_port
from aiflux.errors import SlurmError
from aiflux.slurm.tunnel import Tunnel
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.helpers import write_program

SSH = Path(__file__).parents[1] / "fake_ssh.py"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    write_program(tmp_path / "ssh", f'#!/bin/sh\nexec {sys.executable} {SSH} "$@"\n')
    return {**os.environ, "PATH": f"{tmp_path}:{os.defpath}"}


@pytest.fixture
def port() -> Iterator[int]:
    with FaultyEngine() as engine:
        yield int(engine.url.rpartition(":")[2])


def opens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_forwards_until_it_is_closed(environ: dict[str, str], port: int) -> None:
    local = free_port()
    with Tunnel("n1", "127.0.0.1", port, local, environ) as tunnel:
        assert tunnel.open
        with socket.create_connection(("127.0.0.1", local)) as plain:
            plain.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
            assert plain.recv(100).startswith(b"HTTP/1.")
    assert not opens(local)


def test_it_ends_with_a_command_that_is_killed(
    environ: dict[str, str], port: int, tmp_path: Path
) -> None:
    local = free_port()
    code = (
        "import os, time\nfrom aiflux.slurm.tunnel import Tunnel\n"
        f"tunnel = Tunnel('n1', '127.0.0.1', {port}, {local}, dict(os.environ))\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environ, cwd=tmp_path)
    deadline = time.monotonic() + 20
    while not opens(local):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while opens(local):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("program", "seen"),
    [
        ("echo banner >&2; echo 'n1: Permission denied (publickey).' >&2; exit 255",
         "ssh to n1 failed: n1: Permission denied"),
        ("exit 255", "ssh to n1 failed: it did not connect in time"),
    ],
)  # fmt: skip
def test_a_refusal_is_reported_in_the_words_of_ssh(tmp_path: Path, program: str, seen: str) -> None:
    write_program(tmp_path / "ssh", f"#!/bin/sh\n{program}\n")
    with pytest.raises(SlurmError) as caught:
        Tunnel("n1", "127.0.0.1", 1, free_port(), {"PATH": f"{tmp_path}:{os.defpath}"})
    assert seen in caught.value.message
    assert "ssh n1" in (caught.value.remedy or "")


def test_without_ssh_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="no ssh on PATH"):
        Tunnel("n1", "127.0.0.1", 1, free_port(), {"PATH": str(tmp_path)})


def test_a_local_port_that_is_taken_is_an_error(environ: dict[str, str], port: int) -> None:
    with pytest.raises(SlurmError, match="Address already in use"):
        Tunnel("n1", "127.0.0.1", port, port, environ)

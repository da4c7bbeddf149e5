"""An inference server as a child process: its port, its environment and how it ends."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from aiflux.engines.process import (
    LOOPBACK,
    ServerProcess,
    engine_environment,
    free_port,
    listening_port,
    loopback_url,
)
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


def test_an_error_names_the_program_without_its_port(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^false exited with status 1"):
        ServerProcess(["false", "37509"], {}, tmp_path / "log").start()


def test_a_server_that_was_stopped_does_not_start(tmp_path: Path) -> None:
    server = ServerProcess(["true"], {}, tmp_path / "log")
    server.stop()
    with pytest.raises(EngineError, match="stopped during its start"):
        server.start()


def test_two_threads_that_stop_a_server_send_one_signal(tmp_path: Path) -> None:
    text = 'trap "echo ended >>signals; sleep 0.5; kill $!; exit" TERM; "$@" & wait'
    shell = ["sh", "-c", f"cd {shlex.quote(str(tmp_path))}; {text}", "sh", *SERVER]
    server = ServerProcess(shell, {"PATH": os.environ["PATH"]}, tmp_path / "log")
    server.start()
    threads = [threading.Thread(target=server.stop) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert (tmp_path / "signals").read_text() == "ended\n"
    assert not server.running


def test_an_engine_gets_no_settings_of_the_workers_python(tmp_path: Path) -> None:
    environ = {"PATH": "/bin", "PYTHONPATH": "/opt/aiflux/site", "AIFLUX_API_KEY": "k"}
    environment = engine_environment(environ, tmp_path, {"A": "1"})
    assert environment == {
        "PATH": "/bin", "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "A": "1",
    }  # fmt: skip


# Ways in which a program leaves the server's process group, and sleeps on.
LEAVING = {
    "another group": "set -m; sleep 300 & wait",
    "another session": "setsid sleep 300 & wait",
    "into the background": "(setsid sh -c 'sleep 300 & exit' &); sleep 300",
    "without the environment": "env -i setsid sleep 300 & wait",
}


@pytest.mark.parametrize(
    ("how", "killed"),
    # Nothing connects a process without the environment with a server that is gone.
    [(how, killed) for how in LEAVING for killed in {False, "without" not in how}],
)
def test_a_stop_ends_every_process_that_a_server_started(
    tmp_path: Path, how: str, killed: bool
) -> None:
    environment = engine_environment({"PATH": "/usr/bin:/bin"}, tmp_path, {})
    command = ["bash", "-c", LEAVING[how]]
    server = ServerProcess(
        command, environment, tmp_path / "log", url="http://127.0.0.1:1", folder=str(tmp_path)
    )
    server.start()
    assert server.pid is not None
    sleepers = until_there(tmp_path)
    if killed:
        os.kill(server.pid, signal.SIGKILL)
        while server.running:
            time.sleep(0.01)
    server.stop()
    assert sleepers
    assert not [pid for pid in sleepers if is_running(pid)]


SHARING = """
import subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
if len(sys.argv) == 1:
    shared = SharedMemory(create=True, size=4096)
    print(shared.name, flush=True)
    subprocess.Popen([sys.executable, *sys.orig_argv[1:], shared.name])
else:
    shared = SharedMemory(sys.argv[1])
    print("mapped", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_stop_leaves_no_shared_memory(tmp_path: Path, killed: bool) -> None:
    """As vLLM's processes share it."""
    environment = engine_environment({"PATH": "/usr/bin:/bin"}, tmp_path, {})
    command = [sys.executable, "-c", SHARING]
    server = ServerProcess(command, environment, tmp_path / "log", url="http://127.0.0.1:1")
    server.start()
    assert server.pid is not None
    deadline = time.monotonic() + 20
    while "mapped" not in server.log_tail() and time.monotonic() < deadline:
        time.sleep(0.02)
    file = Path("/dev/shm") / server.log_tail().split()[0]  # noqa: S108
    assert file.exists()
    if killed:
        os.kill(server.pid, signal.SIGKILL)
    server.stop()
    assert not file.exists()


def test_a_server_that_is_killed_during_its_start_may_lack_memory(tmp_path: Path) -> None:
    server = ServerProcess(["sh", "-c", "echo loading; kill -9 $$"], {}, tmp_path / "log")
    ended = r"was killed by signal 9 during its start:\nloading"
    with pytest.raises(EngineError, match=ended) as caught:
        server.start()
    assert "--mem" in str(caught.value.remedy)


def until_there(home: Path) -> list[int]:
    """Return the processes ``sleep`` of a home, as soon as there are any."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if is_running(int(path.name)) and started_in(int(path.name), home)
        ]
        if found:
            return found
        time.sleep(0.02)
    return []


def started_in(pid: int, home: Path) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        where = Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return False
    return command == b"sleep\x00300\x00" and where == home


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def test_a_server_is_known_by_the_addresses_on_which_it_listens(tmp_path: Path) -> None:
    for bind, expected in (
        ("127.0.0.1", {LOOPBACK}),
        ("0.0.0.0", {"00000000"}),  # noqa: S104 - on purpose
        ("::", {"0" * 32}),
    ):
        port = free_port()
        command = [sys.executable, "-m", "http.server", "--bind", bind, str(port)]
        environment = engine_environment({"PATH": "/usr/bin:/bin"}, tmp_path, {})
        server = ServerProcess(command, environment, tmp_path / "log", url=loopback_url(port))
        server.start()
        deadline = time.monotonic() + 10
        while not server.listens_on() and time.monotonic() < deadline:
            server.check()
            time.sleep(0.02)
        assert server.listens_on() == expected
        assert server.owns_port() is (bind == "127.0.0.1")
        server.stop()

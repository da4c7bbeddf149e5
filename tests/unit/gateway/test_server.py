"""The address, the key and the directory: who gets in, and who does not."""

from __future__ import annotations

import http.client
import json
import os
import resource
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AuthenticationError, OpenAI

from tests.unit.gateway.running_gateway import RunningGateway

NOWHERE = ["--engine-url", "http://127.0.0.1:9"]


@pytest.mark.parametrize("key", ["wrong", "k" * 10_000])
def test_a_wrong_key_is_refused(gateway: RunningGateway, key: str) -> None:
    with OpenAI(base_url=gateway.url, api_key=key, max_retries=0) as client:
        with pytest.raises(AuthenticationError) as found:
            client.files.list()
        assert found.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic {key}", "{key}", "Bearer {key}x", "Bearer é"]
)
def test_nothing_is_read_without_the_key(gateway: RunningGateway, header: str | None) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/files"), ("GET", "/"), ("PUT", "/x")):
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
        headers = {} if header is None else {"Authorization": header.format(key=gateway.key)}
        connection.request(method, path, b"x" * 100_000 if method == "POST" else None, headers)
        answer = connection.getresponse()
        body: Any = json.loads(answer.read())
        connection.close()
        assert (answer.status, body["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/unknown", 404),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/v1/files/../../../../etc/passwd", 404),
        ("PUT", "/v1/files", 405),
        ("DELETE", "/v1/batches", 405),
        ("POST", "/v1/models", 405),
    ],
)
def test_other_routes_and_methods_are_refused(
    gateway: RunningGateway, method: str, path: str, status: int
) -> None:
    found, body = gateway.ask(method, path)
    assert found == status
    assert body["error"]["type"] == "invalid_request_error"


def test_it_listens_on_loopback_only(gateway: RunningGateway) -> None:
    table = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    port = f"{gateway.port:04X}"
    addresses = {line.split()[1] for line in table if line.split()[1].endswith(f":{port}")}
    listening = {
        line.split()[1]
        for line in table
        if line.split()[3] == "0A" and line.split()[1] in addresses
    }
    assert listening == {f"0100007F:{port}"}


def test_a_socket_is_for_the_user_alone(tmp_path: Path, start: list[RunningGateway]) -> None:
    place = tmp_path / "gateway.sock"
    running = RunningGateway(tmp_path, [*NOWHERE, "--socket", str(place)])
    start.append(running)
    running.start()
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert _models(place, running.key)[0] == 500  # the engine does not answer
    assert _models(place, "wrong")[0] == 401
    running.kill()
    assert place.exists()
    running.start()
    assert _models(place, "wrong")[0] == 401
    assert running.stop() == 0
    assert not place.exists()


def test_the_official_client_can_use_a_socket(tmp_path: Path, start: list[RunningGateway]) -> None:
    """As docs/gateway.md shows it."""
    place = tmp_path / "s"
    running = RunningGateway(tmp_path, [*NOWHERE, "--socket", str(place)])
    start.append(running)
    running.start()
    transport = httpx2.HTTPTransport(uds=str(place))
    with OpenAI(
        base_url="http://localhost/v1",
        api_key=running.key,
        http_client=httpx2.Client(transport=transport),
    ) as client:
        stored = client.files.create(file=b"x\n", purpose="batch")
        assert client.files.content(stored.id).read() == b"x\n"


def _models(place: Path, key: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(str(place))
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


def refused(running: RunningGateway, code: int = 2) -> str:
    """Start a gateway that must not start; return its error."""
    done = subprocess.run(
        running.command(),
        cwd=running.folder,
        env={**os.environ, **running.environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "ready" not in done.stdout
    return done.stderr


def test_two_gateways_cannot_share_a_directory(gateway: RunningGateway) -> None:
    assert "is in use by process" in refused(gateway)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    running = RunningGateway(tmp_path, NOWHERE)
    running.root.mkdir(mode=0o700)
    key = running.root / "key"
    key.write_text("k" * 40, encoding="ascii")
    key.chmod(0o640)
    assert "others may know the key" in refused(running)
    key.chmod(0o600)
    key.write_text("short\n", encoding="ascii")
    assert "contains no key" in refused(running)


def test_the_key_stays_and_can_be_chosen(tmp_path: Path, start: list[RunningGateway]) -> None:
    running = RunningGateway(tmp_path, NOWHERE)
    start.append(running)
    running.start()
    key = running.key
    assert len(key) >= 40
    assert stat.S_IMODE((running.root / "key").stat().st_mode) == 0o600
    running.stop()
    (running.root / "key").write_text("a-key-of-my-own-choice\n", encoding="ascii")
    running.start()
    with running.client() as client:
        assert client.files.list().data == []
    with pytest.raises(AuthenticationError), OpenAI(base_url=running.url, api_key=key) as client:
        client.files.list()


def test_without_memory_for_a_thread_a_request_fails_and_the_next_ones_do_not(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    running = RunningGateway(tmp_path, NOWHERE)
    start.append(running)
    running.start()
    assert running.process is not None
    pid, limit = running.process.pid, resource.RLIMIT_AS
    sizes = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    before = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, ((int(sizes[0]) << 12) + (2 << 20), before[1]))
    status, answer = running.ask("GET", "/v1/files")
    assert status == 500
    assert "memory" in answer["error"]["message"]
    resource.prlimit(pid, limit, before)
    assert running.ask("GET", "/v1/files")[0] == 200


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    running = RunningGateway(tmp_path, NOWHERE)
    running.root.mkdir(mode=0o755)
    assert "chmod 700" in refused(running)
    running.root.rmdir()
    running.root.write_text("a file", encoding="ascii")
    refused(running)


def test_foreign_files_of_the_directory_stay(tmp_path: Path, start: list[RunningGateway]) -> None:
    running = RunningGateway(tmp_path, NOWHERE)
    own = running.root / ".incoming" / "mine"
    own.mkdir(parents=True)
    for folder in (running.root, running.root / ".incoming"):
        folder.chmod(0o700)
    start.append(running)
    running.start()
    assert own.is_dir()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--port", "1", "--socket", "s"], "cannot be combined"),
        (["--port", "99999"], "99999 is more than 65535"),
        (["--local"], "cannot be combined"),
        (["--temperature", "hot"], "temperature"),
        (["--socket", "x" * 200], "too long"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, words: list[str], text: str) -> None:
    command = [sys.executable, "-m", "aiflux.cli", "gateway", "--dir", str(tmp_path / "state")]
    done = subprocess.run(
        [*command, *NOWHERE, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert text in done.stderr


def test_options_of_slurm_have_no_effect_at_a_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aiflux.cli", "gateway", "--dir", str(tmp_path / "state")]
    more = ("--partition", "p", "--socket", "x" * 200)  # it ends at once
    done = subprocess.run(
        [*command, *NOWHERE, *more], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "note: --partition has no effect: a running server needs no job" in done.stderr


def test_a_port_in_use_is_refused_if_it_was_asked_for(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        running = RunningGateway(tmp_path, [*NOWHERE, "--port", str(other.getsockname()[1])])
        assert "cannot listen on port" in refused(running)


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; "
        "from aiflux.cli.main import main; sys.exit(main(['gateway']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "uvicorn" in done.stderr
    assert "pip install" in done.stderr
    assert list(tmp_path.iterdir()) == []

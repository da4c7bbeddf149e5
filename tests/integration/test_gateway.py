"""`aiflux gateway` with the official client on the real Slurm, and a second user of the machine."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import APIStatusError, AuthenticationError, OpenAI

from aiflux.engines.llamacpp.model_file import find_files
from tests.integration.conftest import MODEL, REPOSITORY, Cluster, User, lines, request
from tests.integration.test_command import SERVER, SMALL
from tests.unit.gateway.running_gateway import create, downloaded, ended, wait_until

FOREIGN = "nobody"


@dataclass
class UsersGateway:
    """A gateway of the ordinary user."""

    user: User
    command: list[str | Path]
    place: Path
    process: subprocess.Popen[str] | None = None
    url: str = ""

    @property
    def root(self) -> Path:
        return self.place / "state"

    @property
    def key(self) -> str:
        return (self.root / "key").read_text(encoding="ascii").strip()

    def start(self) -> None:
        self.process = self.user.popen(*self.command, "--dir", self.root, cwd=self.place)
        assert self.process.stdout is not None
        text = ""
        while "Ctrl-C" not in text:
            line = self.process.stdout.readline()
            assert line, text
            text += line
        found = re.search(r"OPENAI_BASE_URL=(\S+)", text)
        assert found is not None
        self.url = found[1]

    def kill(self, number: int = signal.SIGKILL) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            process.wait(30)
            if process.stdout is not None:
                process.stdout.close()

    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=self.key, max_retries=0)


@pytest.fixture(scope="session")
def program(user: User, checkout: Path) -> Path:
    """The command, with the libraries of the gateway."""
    python = checkout / ".venv/bin/python"
    user.run(python, "-m", "pip", "install", "-q", "-e", f"{checkout}[gateway]")
    return checkout / ".venv/bin/aiflux"


@pytest.fixture
def on_slurm(
    user: User, program: Path, place: Path, models: Path, llama_server: Path, cluster: Cluster
) -> Iterator[UsersGateway]:
    setup = f"export PATH={shlex.quote(str(llama_server.parent))}:$PATH"
    gateway = UsersGateway(
        user,
        [
            program, "gateway", "--port", "0", "--model", find_files(models, MODEL).model,
            "--engine-command", SERVER, "--slots", "2", *SMALL, "--setup", setup,
        ],
        place,
    )  # fmt: skip
    gateway.start()
    yield gateway
    gateway.kill(signal.SIGINT)


def questions(count: int, tokens: int = 8) -> bytes:
    text = lines(
        *(request(f"q{index}", f"Count from {index}.", model=None, max_tokens=tokens)
          for index in range(count))
    )  # fmt: skip
    return text.encode()


def test_a_batch_is_a_job_and_survives_the_gateway(
    on_slurm: UsersGateway, user: User, program: Path
) -> None:
    with on_slurm.client() as client:
        batch = create(client, questions(12), extra_body={"aiflux": {"shards": 2}})
        going = wait_until(client, batch.id, lambda b: b.status != "validating")
        assert going.status == "in_progress", going
    on_slurm.kill()
    listed = json.loads(user.run(program, "jobs", "--json"))
    (entry,) = [each for each in listed if batch.id in each["output"]]
    assert len(entry["jobs"]) == 1
    on_slurm.start()
    with on_slurm.client() as client:
        done = ended(client, batch.id, seconds=240)
        assert (done.status, done.errors) == ("completed", None)
        assert len(downloaded(client, done.output_file_id)) == 12
    listed = json.loads(user.run(program, "jobs", "--json"))
    (entry,) = [each for each in listed if batch.id in each["output"]]
    assert (entry["state"], len(entry["jobs"])) == ("finished", 1)


def test_a_job_of_a_batch_is_cancelled(on_slurm: UsersGateway, cluster: Cluster) -> None:
    with on_slurm.client() as client:
        batch = create(client, questions(200, tokens=64))
        wait_until(client, batch.id, lambda b: b.request_counts.completed > 1, seconds=180)  # type: ignore[union-attr]
        assert client.batches.cancel(batch.id).status == "cancelling"
        done = ended(client, batch.id, seconds=180)
        assert done.status == "cancelled"
        counts = done.request_counts
        assert counts is not None
        assert len(downloaded(client, done.output_file_id)) == counts.completed > 1


@pytest.fixture
def nowhere(user: User, program: Path, place: Path) -> Iterator[UsersGateway]:
    """A gateway whose engine does not answer."""
    command: list[str | Path] = [program, "gateway", "--engine-url", "http://127.0.0.1:9"]
    gateway = UsersGateway(user, command, place)
    yield gateway
    gateway.kill(signal.SIGINT)


def as_foreigner(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as another user of this machine."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    ids = str(pwd.getpwnam(FOREIGN).pw_uid)
    words = ["setpriv", "--reuid", ids, "--regid", ids, "--clear-groups", "--", *command]
    return subprocess.run(words, cwd="/", capture_output=True, text=True, check=False)


def test_another_user_gets_neither_the_key_nor_the_socket(nowhere: UsersGateway) -> None:
    # The directories above are open, so that only the gateway's own modes refuse.
    nowhere.user.run("chmod", "o+rx", nowhere.place, nowhere.user.home)
    path = nowhere.place / "s"
    nowhere.command += ["--socket", path]
    nowhere.start()
    assert as_foreigner("ls", str(nowhere.place)).returncode == 0
    for target in (nowhere.root, nowhere.root / "key", nowhere.root / "files"):
        done = as_foreigner("cat" if target.name == "key" else "ls", str(target))
        assert done.returncode != 0
        assert "Permission denied" in done.stderr
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); "
        "sys.exit(13 if s.connect_ex(sys.argv[1]) == 13 else 0)"
    )
    assert as_foreigner("/usr/bin/python3", "-c", code, str(path)).returncode == 13


def test_another_user_at_the_port_needs_the_key(nowhere: UsersGateway) -> None:
    nowhere.command += ["--port", "0"]
    nowhere.start()
    code = (
        "import sys, urllib.request, urllib.error\n"
        "try: urllib.request.urlopen(sys.argv[1])\n"
        "except urllib.error.HTTPError as error: sys.exit(error.code - 400)\n"
    )
    done = as_foreigner("/usr/bin/python3", "-c", code, f"{nowhere.url}/files")
    assert done.returncode == 1, "401"
    client = OpenAI(base_url=nowhere.url, api_key="guess", max_retries=0)
    with client, pytest.raises(AuthenticationError):
        client.files.list()


def test_a_full_file_system_is_reported_and_leaves_nothing(nowhere: UsersGateway) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    small = nowhere.user.folder("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], check=True)
    try:
        nowhere.user.give(small)
        small.chmod(0o700)
        nowhere.place = small
        nowhere.command += ["--port", "0"]
        nowhere.start()
        with nowhere.client() as client:
            kept = client.files.create(file=("a", b"x" * 500_000), purpose="batch")
            for _ in range(3):
                with pytest.raises(APIStatusError) as found:
                    client.files.create(file=("b", b"x" * 5_000_000), purpose="batch")
                assert found.value.status_code == 507
            assert list((nowhere.root / ".incoming").iterdir()) == []
            assert [each.id for each in client.files.list()] == [kept.id]
            assert client.files.content(kept.id).read() == b"x" * 500_000
            with pytest.raises(OSError, match="No space"), open(small / "filler", "wb") as filler:
                filler.write(bytes(5_000_000))
            with pytest.raises(APIStatusError) as found:
                client.batches.create(
                    input_file_id=kept.id, endpoint="/v1/chat/completions", completion_window="24h"
                )
            assert (found.value.status_code, found.value.code) == (507, "insufficient_storage")
            assert client.batches.list().data == []
    finally:
        nowhere.kill(signal.SIGINT)
        subprocess.run(["umount", str(small)], check=True)


def test_the_code_of_the_page_runs_unchanged(
    on_slurm: UsersGateway, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = (REPOSITORY / "docs/gateway.md").read_text(encoding="utf-8")
    block = re.findall(r"```py\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "prompts.jsonl").write_bytes(questions(2))
    environ = {**os.environ, "OPENAI_BASE_URL": on_slurm.url, "OPENAI_API_KEY": on_slurm.key}
    python = REPOSITORY / ".venv/bin/python"
    done = subprocess.run(
        [python, "-W", "ignore", "-c", block],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = {json.loads(line)["custom_id"] for line in done.stdout.splitlines() if line}
    assert names == {"q0", "q1"}

"""`aiflux serve` on the real cluster: llama.cpp in its image as a job, and a real ssh tunnel."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from aiflux.engines.process import free_port
from tests.integration.conftest import (
    FRANCE,
    MODEL,
    Cluster,
    User,
    answers,
    lines,
    recorded,
    request,
    until,
)
from tests.unit.made_serves import MadeServe

JOB = ["--gpus-per-node", "0", "--time", "0:10:00", "--mem", "2G", "--cpus-per-task", "1",
       "--engine-arg", "threads=1"]  # fmt: skip
SSHD = Path("/usr/sbin/sshd")


class Serving:
    """The command line of the user, and what it prints."""

    def __init__(self, user: User, aiflux: Path, env: dict[str, str], place: Path) -> None:
        self.user, self.aiflux, self.env, self.place = user, aiflux, env, place

    def run(self, *words: str | Path, **more: Any) -> str:
        return self.user.run(self.aiflux, *words, cwd=self.place, env=self.env, **more)

    def serve(self, name: str, *words: str) -> str:
        return self.run("serve", "--model", MODEL, "--name", name, *JOB, *words, timeout=180)

    def listed(self, name: str) -> dict[str, Any]:
        entries = json.loads(self.run("serve", "list", "--json"))
        found: dict[str, Any] = next(each for each in entries if each["name"] == name)
        return found

    def wait(self, name: str, *states: str, timeout: float = 120) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            entry = self.listed(name)
            return entry if entry["state"] in states else None

        entry = until(found, f"{name} to be {' or '.join(states)}", timeout, pause=0.5)
        assert entry is not None
        return entry

    def popen(self, *words: str) -> subprocess.Popen[str]:
        return self.user.popen(self.aiflux, *words, cwd=self.place, env=self.env)


@pytest.fixture
def serving(
    user: User,
    aiflux: Path,
    llama_image: Path,
    job_env: dict[str, str],
    place: Path,
    cluster: Cluster,
) -> Serving:
    env = {**job_env, "AIFLUX_ENGINE": "llamacpp", "AIFLUX_IMAGE": str(llama_image)}
    return Serving(user, aiflux, env, place)


def values(printed: str) -> dict[str, str]:
    """Return the variables that the printed lines export."""
    script = "\n".join(re.findall(r"^export .*$", printed, re.MULTILINE))
    done = subprocess.run(["bash", "-c", f"{script}\nenv -0"], capture_output=True, check=True)
    found = dict(each.split("=", 1) for each in done.stdout.decode().split("\0") if "=" in each)
    names = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "SSL_CERT_FILE")
    return {name: found[name] for name in names}


def client_of(printed: str, key: str | None = None) -> openai.OpenAI:
    """Return the official client as the printed variables make it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values(printed).items():
            patch.setenv(name, value)
        if key is not None:
            patch.setenv("OPENAI_API_KEY", key)
        return openai.OpenAI(max_retries=0, timeout=60)


def ask(client: openai.OpenAI) -> str:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=FRANCE["body"]["messages"],
        max_tokens=12,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def test_an_engine_is_served_and_protected(serving: Serving, cluster: Cluster) -> None:
    printed = serving.serve("one")
    assert "Paris" in ask(client_of(printed))
    for key in ("wrong", "none"):
        with pytest.raises(openai.AuthenticationError):
            ask(client_of(printed, key))
    key_file = Path(re.findall(r"cat (\S+/key)", printed)[0].strip("'"))
    assert key_file.read_text().strip() not in printed
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        for path in (key_file, key_file.parent / "header", key_file.parent / "cert.key"):
            command = ["setpriv", "--reuid", str(nobody.pw_uid), "--regid", str(nobody.pw_gid),
                       "--clear-groups", "cat", str(path)]  # fmt: skip
            refused = subprocess.run(command, capture_output=True, text=True, check=False)
            assert "Permission denied" in refused.stderr
    entry = serving.listed("one")
    assert (entry["state"], entry["model"]) == ("ready", MODEL)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        assert key_file.read_bytes().strip() not in words
    curl = next(line for line in printed.splitlines() if line.startswith("curl "))
    assert '"choices"' in serving.user.run("bash", "-c", curl)
    serving.user.write(serving.place / "in.jsonl", lines(request("a", "Name a planet.")))
    serving.run("run", "in.jsonl", "-o", "out.json", "--engine-url", "serve:one")
    assert answers(serving.place / "out.json")["a"]
    taken = serving.run("serve", "--model", MODEL, "--name", "one", *JOB, code=2)
    assert "the name one is taken" in taken
    assert "stopped one" in serving.run("serve", "stop", "one")
    assert serving.wait("one", "ended")["why"] == "stopped"
    assert cluster.end(entry["job"]).state == "CANCELLED"
    assert serving.user.none_left(), serving.user.processes()


def test_it_ends_when_it_is_idle_or_its_time_is_over(serving: Serving, cluster: Cluster) -> None:
    idle = ("--idle-minutes", "0.1", "--detach")
    serving.serve("idle", *idle)
    serving.serve("limited", "--time", "0:01:00", "--detach")
    entry = serving.wait("idle", "ended")
    assert entry["why"] == "idle"
    assert cluster.end(entry["job"]).code == 0
    assert "ended (idle)" in serving.run("connect", "idle", code=4)
    entry = serving.wait("limited", "ended")
    assert entry["why"] == "time limit"
    assert cluster.end(entry["job"]).state == "COMPLETED"


@pytest.fixture
def ssh_to_nodes(user: User, serving: Serving) -> Iterator[Path]:
    """A server of the user that answers for both nodes, and an ssh that knows it: their folder."""
    if not SSHD.exists():
        pytest.skip("openssh-server is not installed; run make cluster")
    folder = user.folder(f"ssh-{uuid.uuid4().hex[:6]}")
    for name in ("host", "own"):
        user.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    shutil.copy(folder / "own.pub", folder / "authorized")
    user.give(folder)
    port = free_port()
    server = (f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nUsePAM no\n"
              f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nPidFile none\n"
              "PasswordAuthentication no\n")  # fmt: skip
    config = user.write(folder / "sshd_config", server)
    client = (f"Host n1 n2\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/own\n"
              f"  User {user.name}\n  UserKnownHostsFile {folder}/known\n"
              "  StrictHostKeyChecking accept-new\n")  # fmt: skip
    user.write(folder / "config", client)
    (folder / "bin").mkdir()
    user.write(folder / "bin/ssh", f'#!/bin/sh\nexec /usr/bin/ssh -F "{folder}/config" "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    user.give(folder)
    serving.env["PATH"] = f"{folder}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    process = user.popen(SSHD, "-D", "-e", "-f", config)
    yield folder
    process.terminate()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()  # a session may hold its other end for longer


def printed_by(process: subprocess.Popen[str], wanted: str) -> Callable[[], str]:
    """Return what returns a process's output so far, once it contains a word."""
    got: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: got.extend(iter(process.stdout.readline, "")))
    reader.start()

    def printed() -> str:
        until(lambda: wanted in "".join(got) or not reader.is_alive(), repr(wanted), 90)
        return "".join(got)

    return printed


def test_a_tunnel_survives_preemption(
    serving: Serving, cluster: Cluster, ssh_to_nodes: Path
) -> None:
    """A job with priority takes both nodes; afterwards the engine is back, with the same key."""
    serving.serve("two", "--tunnel")
    job = serving.listed("two")["job"]
    connecting = serving.popen("connect", "two")
    started = [connecting]
    try:
        printed = printed_by(connecting, "curl ")()
        assert "tunnel to two" in printed
        client = client_of(printed)
        assert "Paris" in ask(client)
        first = serving.listed("two")
        serving.user.write(
            serving.place / "in.jsonl",
            lines(*(request(f"r{at}", f"Say {at}.", max_tokens=16) for at in range(60))),
        )
        run = serving.popen("run", "in.jsonl", "-o", "out.json", "--engine-url", "serve:two",
                            "--engine-wait", "180")  # fmt: skip
        started.append(run)
        until(lambda: recorded(serving.place) > 1, "2 results")
        urgent = serving.user.run(
            "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=1",
            "--exclusive", "--mem=1G", "--time=1", "--output=urgent.out", "--wrap", "sleep 8",
        ).strip()  # fmt: skip
        cluster.wait_for(job, "PENDING", timeout=180)
        assert serving.listed("two")["state"] == "pending"
        assert "requeue" in serving.listed("two")["why"]
        cluster.end(urgent)
        entry = serving.wait("two", "ready", timeout=120)
        assert entry["job"] == first["job"]
        until(lambda: "Paris" in retried(client), "an answer through the tunnel", 60, pause=0.5)
        output, _ = run.communicate(timeout=400)
        assert run.returncode == 0, output
        assert len(answers(serving.place / "out.json")) == 60
        connecting.send_signal(signal.SIGINT)
        assert connecting.wait(20) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    serving.run("serve", "stop", "two")


def retried(client: openai.OpenAI) -> str:
    try:
        return ask(client)
    except openai.APIConnectionError:
        return ""


def test_ssh_that_is_refused_falls_back_to_the_address(
    user: User, serving: Serving, ssh_to_nodes: Path
) -> None:
    serving.serve("three", "--detach")
    user.write(ssh_to_nodes / "authorized", "")
    printed = serving.run("connect", "three", timeout=120)
    assert "Permission denied" in printed
    assert "using the address of the node" in printed
    assert "Paris" in ask(client_of(printed))
    serving.run("serve", "stop", "three")


def test_vllm_requires_the_key_on_every_path(tmp_path: Path, vllm: Path, hub_model: Path) -> None:
    """Its own key protects /v1 and a few others only."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with MadeServe(
        tmp_path, "vllm", engine="vllm", model=str(hub_model), program=vllm, engine_env=settings,
        context_length=2048, slots=4,
    ) as made:  # fmt: skip
        made.start(180)
        assert made.state.phase == "ready", made.error
        assert made.chat("Hello") == 200
        certificate, url = str(made.directory.certificate), made.state.url
        key = {"Authorization": f"Bearer {made.directory.read_key()}"}
        described = requests.get(
            f"{url}/openapi.json", verify=certificate, headers=key, timeout=20
        ).json()["paths"]
        assert {"/invocations", "/tokenize", "/v1/chat/completions"} <= described.keys()
        for path, methods in described.items():
            for method in methods:
                answer = requests.request(
                    method, url + path, json={}, verify=certificate, timeout=20
                )
                assert answer.status_code == 401, (method, path)

"""`aiflux serve` and `aiflux connect`: what they print works; the job runs the real worker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.core.runs.serve_directory import ServeDirectory
from aiflux.slurm.serve import make_certificate
from tests.unit.helpers import write_input, write_program
from tests.unit.made_serves import OneJobSlurm, until
from tests.unit.slurm.test_tunnel import SSH

SERVE = ["serve", "--model", "tiny", "--models-dir", "models", "--gpus-per-node", "0"]
ASK = """\
import openai
client = openai.OpenAI(max_retries=0)
messages = [{"role": "user", "content": "hello"}]
answer = client.chat.completions.create(model="tiny", messages=messages)
print(answer.choices[0].message.content)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OneJobSlurm]:
    slurm = OneJobSlurm(tmp_path, monkeypatch)
    yield slurm
    slurm.end()


def directory() -> ServeDirectory:
    return ServeDirectory.named("tiny", os.environ)


def shell(text: str) -> str:
    """Return what lines print, as a user would paste them."""
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def exports(text: str) -> str:
    return "\n".join(re.findall(r"^export .*$", text, re.MULTILINE))


def asked_with(text: str) -> str:
    """Return the answer to the official client with the printed environment."""
    return shell(f"{exports(text)}\n{sys.executable} - <<'CODE'\n{ASK}CODE\n")


def test_what_it_prints_works(slurm: OneJobSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SERVE) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == "submitted job 100: tiny is served as tiny"
    assert "ends after 30 minutes without requests" in printed.out
    assert "not sealed" in printed.out
    assert directory().read_key() not in printed.out + printed.err
    assert asked_with(printed.out) == "hello\n"
    curl = next(line for line in printed.out.splitlines() if line.startswith("curl "))
    assert json.loads(shell(curl.replace("curl ", "curl -s ")))["choices"]
    without_key = curl.replace("-H @", "-H X:", 1)
    assert "401" in shell(without_key.replace("curl ", "curl -s "))


def test_list_and_stop(slurm: OneJobSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "list"]) == 0
    assert "no engines" in capsys.readouterr().out
    assert main([*SERVE, "--idle-minutes", "0.5"]) == 0
    capsys.readouterr()
    assert main(["serve", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["tiny", "ready", "100", "tiny:latest", "n1"]
    assert main(["serve", "list", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["state"], entry["sealed"]) == ("ready", False)
    assert entry["url"].startswith("https://127.0.0.1:")
    assert main(["serve", "stop", "tiny"]) == 0
    until(lambda: slurm.pid is None)
    capsys.readouterr()
    assert main(["serve", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "stopped"
    assert main(["serve", "stop", "tiny"]) == 0
    assert "its files were removed" in capsys.readouterr().out
    assert not directory().path.exists()


def test_the_list_shows_that_it_was_idle(
    slurm: OneJobSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SERVE, "--idle-minutes", "0.01", "--detach", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["key"] == str(directory().key)
    assert "aiflux connect tiny" in printed.err
    until(lambda: slurm.pid is None)
    assert main(["serve", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "idle"
    assert main(["connect", "tiny"]) == 4
    assert "has ended (idle)" in capsys.readouterr().err


def test_a_job_that_ends_too_early_shows_its_log(
    slurm: OneJobSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(tmp_path / "llama-server", "#!/bin/sh\necho out of luck\nexit 1\n")
    assert main(SERVE) == 4
    error = capsys.readouterr().err
    assert "the engine tiny has ended (crashed: " in error
    assert "out of luck" in error
    assert "slurm-100.out" in error


def test_ctrl_c_while_waiting_leaves_the_job(slurm: OneJobSlurm, tmp_path: Path) -> None:
    slurm.say("sbatch", "100\n")
    slurm.say("squeue", "100|N/A|PENDING|N/A|0:00||Resources\n")
    command = [sys.executable, "-m", "aiflux.cli", *SERVE]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err)
    until(lambda: "job 100: pending (Resources)" in (tmp_path / "err").read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 5
    shown = (tmp_path / "err").read_text()
    assert "the job continues; use it: aiflux connect tiny; stop it: aiflux serve stop" in shown
    assert not slurm.calls("scancel")


def test_a_run_uses_it(
    slurm: OneJobSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SERVE) == 0
    write_input(tmp_path / "in.jsonl", 3, body={"messages": [{"role": "user", "content": "x"}]})
    words = ["run", "in.jsonl", "--model", "tiny", "-o", "out.json", "--engine-url", "serve:tiny"]
    assert main(words) == 0
    assert len(json.loads((tmp_path / "out.json").read_text())) == 3
    assert main([*words[:-3], "b.json", "--engine-url", "serve:other"]) == 2
    assert "no engine is served as 'other'" in capsys.readouterr().err


class Connecting:
    """`aiflux connect` in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.out, self.err = folder / "connect.out", folder / "connect.err"
        command = [sys.executable, "-m", "aiflux.cli", "connect", "tiny", *words]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err)

    def __enter__(self) -> Connecting:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def shows(self, text: str) -> None:
        """Wait until it shows a text."""
        until(lambda: text in self.err.read_text() or self.process.poll() is not None)
        assert text in self.err.read_text(), self.out.read_text() + self.err.read_text()

    def printed(self) -> str:
        """Return what it prints, once it is complete."""
        until(lambda: "curl" in self.out.read_text() or self.process.poll() is not None)
        return self.out.read_text()

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


def test_connect_opens_a_tunnel_and_follows_the_engine(
    slurm: OneJobSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(tmp_path / "bin" / "ssh", f'#!/bin/sh\nexec {sys.executable} {SSH} "$@"\n')
    assert main([*SERVE, "--tunnel"]) == 0
    assert "open a tunnel with aiflux connect tiny" in capsys.readouterr().out
    with Connecting(tmp_path) as connecting:
        printed = connecting.printed()
        state = directory().read_state()
        assert state is not None
        assert f":{state.port}/" not in printed, "the tunnel has a port of its own"
        assert directory().read_key() not in printed
        assert asked_with(printed) == "hello\n"
        slurm.requeue(directory().run.script)
        connecting.shows("is open again")
        assert asked_with(printed) == "hello\n"
        assert connecting.interrupt() == 0


def test_without_ssh_connect_shows_the_nodes_address(
    slurm: OneJobSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = "n1: Permission denied (publickey)."
    write_program(tmp_path / "bin" / "ssh", f"#!/bin/sh\necho '{refusal}' >&2\nexit 255\n")
    assert main([*SERVE, "--detach"]) == 0
    capsys.readouterr()
    assert main(["connect", "tiny"]) == 0
    printed = capsys.readouterr()
    assert f"ssh to n1 failed: {refusal}; using the address of the node" in printed.err
    assert asked_with(printed.out) == "hello\n"


def test_without_ssh_an_engine_on_loopback_cannot_be_reached(
    slurm: OneJobSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(tmp_path / "bin" / "ssh", "#!/bin/sh\nexit 255\n")
    assert main([*SERVE, "--tunnel"]) == 0
    assert main(["connect", "tiny"]) == 2
    error = capsys.readouterr().err
    assert "listens on the loopback of its node only" in error
    assert "without --tunnel" in error


def test_an_address_with_another_certificate_is_not_used(
    slurm: OneJobSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SERVE) == 0
    make_certificate(directory(), ["127.0.0.1"])
    write_program(slurm.folder / "ssh", "#!/bin/sh\nexit 255\n")
    capsys.readouterr()
    assert main(["connect", "tiny"]) == 4
    printed = capsys.readouterr()
    assert "is not the engine tiny" in printed.err
    assert "export" not in printed.out


def test_an_engine_that_cannot_be_reached_is_reported(
    slurm: OneJobSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a machine behind a firewall: here nothing listens at the address."""
    write_program(tmp_path / "bin" / "ssh", "#!/bin/sh\nexit 255\n")
    assert main(SERVE) == 0
    state = directory().read_state()
    assert state is not None
    directory().write_state(replace(state, port=1))
    capsys.readouterr()
    assert main(["connect", "tiny"]) == 4
    error = capsys.readouterr().err
    assert "this machine does not reach it" in error
    assert "aiflux connect tiny" in error


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["serve"], "no model is named"),
        (["serve", "stop"], "needs a name"),
        (["serve", "stop", "other"], "no engine is served as 'other'"),
        (["serve", "lst"], "list"),
        (["serve", "list", "other"], "aiflux serve list has no name"),
        (["serve", "list", "--model", "x"], "aiflux serve list has no"),
        (["serve", "stop", "x", "--detach"], "aiflux serve stop has no --detach"),
        (["connect", "other"], "no engine is served as 'other'"),
        (["connect", "../x"], "cannot be the name"),
        ([*SERVE, "--name", "No Name"], "cannot be the name"),
        ([*SERVE, "--idle-minutes", "0"], "too short"),
        ([*SERVE, "--engine", "ollama"], "cannot require a key"),
    ],
)
def test_mistakes_are_reported(
    slurm: OneJobSlurm, words: list[str], seen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert seen in error
    assert "->" in error
    assert not slurm.calls("sbatch")

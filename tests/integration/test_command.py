"""``--engine-command`` in Slurm jobs: the site's server next to the installed package, no image."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from aiflux.engines.llamacpp.model_file import find_files
from tests.integration.conftest import MODEL, Cluster, User, answers, lines, request, until

SMALL = ["--gpus-per-node", "0", "--time", "0:10:00", "--mem", "2G", "--cpus-per-task", "1",
         "--drain-seconds", "2"]  # fmt: skip
REQUESTS = 16
# With one thread, as several servers share the cores: threads that wait for one another spin.
SERVER = "llama-server -m {model} --host {host} --port {port} -np {slots} -t 1 --no-webui --offline"


def questions(count: int, tokens: int) -> str:
    """Return requests for the model of the run."""
    return lines(
        *(request(f"q{index}", f"Count from {index}.", model=None, max_tokens=tokens)
          for index in range(count))
    )  # fmt: skip


@pytest.fixture
def command(llama_server: Path, models: Path, place: Path, user: User) -> list[str | Path]:
    """The options of a run; the program comes by setup lines, as from a site's module.

    They also set a PYTHONPATH that would break the worker's Python.
    """
    broken = user.folder("a module for another Python")
    user.write(broken / "requests.py", "raise SystemExit('the module reached the worker')\n")
    user.write(place / "json.py", "raise SystemExit('the current folder reached the worker')\n")
    setup = [
        f"export PATH={shlex.quote(str(llama_server.parent))}:$PATH",
        f"export PYTHONPATH={shlex.quote(str(broken))}",
    ]
    return [
        *("--model", find_files(models, MODEL).model, "--engine-command", SERVER, "--slots", "2"),
        *SMALL,
        *(word for line in setup for word in ("--setup", line)),
    ]


def servers(user: User) -> list[int]:
    """Return the user's llama-servers."""
    return [int(line.split()[0]) for line in user.processes() if "llama-server" in line]


def finished(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def until_finished(journal: Path, count: int, seconds: float = 120) -> None:
    until(lambda: finished(journal) >= count, f"{count} results in {journal}", seconds)


def status_of(place: Path, shard: int) -> dict[str, Any]:
    path = place / "out.json.aiflux" / "status" / f"shard-{shard:04d}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["aiflux"]
    return content


def test_a_job_without_an_image_survives_the_kill_of_its_server(
    user: User, checkout: Path, place: Path, command: list[str | Path], cluster: Cluster
) -> None:
    """And then it is put back into the queue."""
    user.write(place / "in.jsonl", questions(24, 40))
    aiflux = checkout / ".venv/bin/aiflux"
    printed = user.run(aiflux, "run", "in.jsonl", "-o", "out.json", *command, cwd=place)
    job = printed.split("submitted job ")[1].split(":")[0]
    journal = place / "out.json.aiflux" / "journal" / "shard-0000.jsonl"
    until_finished(journal, 3)
    (server,) = servers(user)
    os.kill(server, signal.SIGKILL)
    until_finished(journal, finished(journal) + 4)
    user.run("scontrol", "requeue", job)
    end = cluster.end(job)
    log = cluster.log(job, place)
    assert (end.state, end.code, end.fields["Restarts"]) == ("COMPLETED", 0, "1"), log
    assert len(answers(place / "out.json")) == 24
    assert finished(journal) == 24, "no result was recorded twice"
    assert "of 24 requests are done already" in log
    assert "engine 0 is down; restarting it" in log
    assert "engine 0 is up: llama-server b" in log
    status = status_of(place, 0)
    assert (status["sealed"], status["unsealed"]) == (
        False, "--engine-command: there is no container",
    )  # fmt: skip
    assert status["engines"][0]["command"] == SERVER
    assert json.loads((place / "out.json.aiflux/jobs.json").read_text())["image"] is None
    shown = user.run(aiflux, "status", "out.json", cwd=place)
    assert "done" in shown
    user.run(aiflux, "report", "out.json", cwd=place)
    assert user.none_left()


def test_an_array_without_an_image_is_resumed_after_a_cancel(
    user: User, checkout: Path, place: Path, command: list[str | Path], cluster: Cluster
) -> None:
    user.write(place / "in.jsonl", questions(REQUESTS, 64))
    aiflux = checkout / ".venv/bin/aiflux"
    printed = user.run(
        aiflux, "run", "in.jsonl", "-o", "out.json", "--shards", "2", *command, cwd=place
    )
    job = printed.split("submitted job ")[1].split(":")[0]
    journals = [place / f"out.json.aiflux/journal/shard-000{index}.jsonl" for index in range(2)]
    for journal in journals:
        until_finished(journal, 1)
    user.run(aiflux, "cancel", "out.json", cwd=place)
    cluster.wait_for(job, "CANCELLED", "COMPLETED")
    assert user.none_left(40)
    before = sum(map(finished, journals))
    changed = [SERVER.replace("-np", "-c 4096 -np") if word == SERVER else word for word in command]
    refused = user.run(
        aiflux, "run", "in.jsonl", "-o", "out.json", "--shards", "2", *changed, cwd=place, code=2
    )
    assert "was started with engine command (llama-server" in refused
    user.run(aiflux, "resume", "out.json", cwd=place)
    user.run(aiflux, "watch", "out.json", cwd=place, timeout=300)
    assert len(answers(place / "out.json")) == REQUESTS
    assert sum(map(finished, journals)) == REQUESTS
    assert before >= 2
    assert user.none_left()


def printed_json(printed: str) -> dict[str, Any]:
    """Return the JSON in a command's output and messages together."""
    content: dict[str, Any] = json.JSONDecoder().raw_decode(printed[printed.index("{\n") :])[0]
    return content


def test_slurm_says_when_a_run_starts_and_may_shorten_it(
    user: User, checkout: Path, place: Path, command: list[str | Path], cluster: Cluster
) -> None:
    user.write(place / "in.jsonl", questions(40, 4))
    words = ["in.jsonl", "-o", "out.json", *command]
    estimate = [checkout / ".venv/bin/aiflux", "estimate", *words, "--requests", "16", "--json"]
    free = printed_json(user.run(*estimate, "--wait", cwd=place, timeout=300))
    assert free["seconds_to_start"] <= 60
    blocker = user.run(
        *("sbatch", "--parsable", "--exclusive", "--nodes=2", "--time=0:20:00", "--wrap"),
        *("sleep 1200",),
        cwd=place,
    ).strip()
    cluster.wait_for(blocker, "RUNNING")
    busy = printed_json(user.run(*estimate, cwd=place))
    assert 600 < busy["seconds_to_start"] <= 1260
    assert busy["estimate"]["shards"] == 1
    user.run("scancel", blocker)
    run = [checkout / ".venv/bin/aiflux", "run", *words, "--time-min", "0:02:00"]
    printed = user.run(*run, "--shards", "auto", cwd=place)
    job = printed.split("submitted job ")[1].split(":")[0]
    assert cluster.fields(job)["TimeMin"] == "00:02:00"
    user.run(checkout / ".venv/bin/aiflux", "watch", "out.json", cwd=place, timeout=300)
    assert len(answers(place / "out.json")) == 40
    assert user.none_left()

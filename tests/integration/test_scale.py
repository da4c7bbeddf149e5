"""Runs with many jobs on the real Slurm: arrays, time limits, requeues, lost nodes, resume."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import (
    Cluster,
    User,
    answers,
    lines,
    recorded,
    request,
    until,
)
from tests.integration.test_jobs import submitted
from tests.tools.faulty_engine import FaultyEngine


@pytest.fixture
def engine() -> Iterator[FaultyEngine]:
    """An engine that takes half a second per request; the test nodes share its loopback."""
    with FaultyEngine(delay=0.5) as engine:
        yield engine


@pytest.fixture
def other_disk(user: User) -> Iterator[Path]:
    """A directory of the user on a separate file system, which only root can mount."""
    folder = user.folder(f"disk {uuid.uuid4().hex[:6]}")
    if os.geteuid() != 0:
        yield folder
        return
    owner = f"uid={pwd.getpwnam(user.name).pw_uid},size=16m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", owner, "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


Submit = Callable[..., str]


@pytest.fixture
def submit(user: User, checkout: Path, image: Path, place: Path, engine: FaultyEngine) -> Submit:
    """Return a function that submits a run from Python and returns the job's id."""
    script = user.write(
        place / "submit.py",
        "import json, sys\n"
        "from aiflux.slurm import SlurmRunner\n"
        "print(SlurmRunner().run(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3])))\n",
    )

    def submit(name: str, count: int, prompt: str = "say", **options: object) -> str:
        requests = [request(f"{name}-{i}", f"{prompt} {name} {i}") for i in range(count)]
        user.write(place / f"{name}.jsonl", lines(*requests))
        asked = {"engine_url": engine.url, "mem": "1G", "cpus_per_task": 1, "concurrency": 1,
                 "drain_seconds": 2, **options}  # fmt: skip
        python = checkout / ".venv" / "bin" / "python"
        arguments = [f"{name}.jsonl", f"{name}.json", json.dumps(asked)]
        return user.run(python, script, *arguments, cwd=place).strip()

    return submit


def until_done(place: Path, name: str, count: int) -> None:
    """Wait for results of a run."""
    until(lambda: recorded(place, f"{name}.json") >= count, f"{count} results of {name}")


def is_whole(place: Path, name: str, count: int, prompt: str = "say") -> None:
    found = answers(place / f"{name}.json")
    assert list(found) == [f"{name}-{i}" for i in range(count)]
    assert list(found.values()) == [f"echo {prompt} {name} {i}" for i in range(count)]


def test_shards_of_one_run_become_one_output(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str],
    other_disk: Path,
) -> None:  # fmt: skip
    """With the real Ollama; input and output are on different file systems."""
    requests = [request(f"r{i}", f"Say {i}.", max_tokens=3) for i in range(6)]
    user.write(other_disk / "in put.jsonl", lines(*requests))
    printed = user.run(
        aiflux, "run", "--input", other_disk / "in put.jsonl", "--output", "out.json",
        "--shards", "3", "--max-running", "2", "--mem", "2G", "--slots", "1",
        cwd=place, env=job_env,
    )  # fmt: skip
    job = submitted(printed)
    assert "3 of 3 shards" in printed
    listed = json.loads(user.run(aiflux, "jobs", "--json", cwd=place))
    assert [entry for entry in listed if job in json.dumps(entry)]
    code = user.popen(aiflux, "watch", job, "--interval", "1", cwd=place)
    printed, _ = code.communicate(timeout=300)
    assert code.returncode == 0, printed
    assert list(answers(place / "out.json")) == [f"r{i}" for i in range(6)]
    logs = sorted(path.name for path in (place / "out.json.aiflux" / "logs").glob("slurm*"))
    assert logs == [f"slurm-{job}_{task}.out" for task in range(3)]
    view = json.loads(user.run(aiflux, "status", "out.json", "--json", cwd=place))
    assert view["state"] == "finished", view
    assert "finished" in user.run(aiflux, "status", job, cwd=place)


def test_time_limits_shorter_than_the_work(
    user: User, cluster: Cluster, place: Path, submit: Submit, engine: FaultyEngine
) -> None:
    """One job continues by itself, one must not, and one never completes a request."""
    goes_on = submit("on", 110, time="1")
    may_not = submit("not", 110, time="1", max_requeues=0)
    no_way = submit("no", 1, "hang", time="1")
    end = cluster.end(may_not, timeout=150)
    log = cluster.log(may_not, place / "not.json.aiflux")
    assert (end.state, end.code) == ("FAILED", 5), log
    assert "the job's time is nearly over" in log
    assert "--max-requeues" in log
    end = cluster.end(no_way)
    log = cluster.log(no_way, place / "no.json.aiflux")
    assert (end.state, end.code) == ("FAILED", 5), log
    assert "request more time" in log
    assert end.fields["Restarts"] == "0"
    end = cluster.end(goes_on, timeout=300)
    log = cluster.log(goes_on, place / "on.json.aiflux")
    assert (end.state, end.code) == ("COMPLETED", 0), log
    assert int(end.fields["Restarts"]) >= 1
    is_whole(place, "on", 110)
    assert {engine.seen[f"say on {i}"] for i in range(110)} == {1}
    status = json.loads((place / "on.json.aiflux/status/shard-0000.json").read_text("utf-8"))
    assert status["aiflux"]["totals"]["starts"] == int(end.fields["Restarts"]) + 1


def test_a_requeue_and_a_signal_during_a_run(
    user: User, aiflux: Path, cluster: Cluster, place: Path, submit: Submit
) -> None:
    again = submit("again", 24)
    signalled = submit("signalled", 24)
    for name in ("again", "signalled"):
        until_done(place, name, 3)
    user.run("scontrol", "requeue", again)
    user.run("scancel", "--signal=TERM", "--batch", signalled)
    end = cluster.end(signalled)
    assert end.code == 5, cluster.log(signalled, place / "signalled.json.aiflux")
    assert not (place / "signalled.json").exists()
    kept = recorded(place, "signalled.json")
    assert 3 <= kept < 24
    resumed = user.run(aiflux, "resume", signalled, "--time", "00:30:00", cwd=place)
    second = submitted(resumed)
    assert cluster.end(second).code == 0, cluster.log(second, place / "signalled.json.aiflux")
    is_whole(place, "signalled", 24)
    end = cluster.end(again)
    assert (end.state, end.code) == ("COMPLETED", 0)
    assert end.fields["Restarts"] == "1"
    is_whole(place, "again", 24)
    for name in ("again", "signalled"):
        assert recorded(place, f"{name}.json") == 24, "no result was recorded twice"


def test_a_cancelled_array_resumes_the_rest(
    user: User, aiflux: Path, cluster: Cluster, place: Path, submit: Submit, engine: FaultyEngine
) -> None:
    job = submit("arr", 39, shards=3, max_running=2)
    until_done(place, "arr", 8)
    user.run(aiflux, "cancel", "arr.json", cwd=place)
    cluster.left(job)
    assert not (place / "arr.json").exists()
    user.run(aiflux, "merge", "arr.json", cwd=place, code=5)
    user.run(aiflux, "merge", "arr.json", "--partial", cwd=place)
    partial = answers(place / "arr.partial.json")
    assert 8 <= len(partial) < 39
    second = submitted(user.run(aiflux, "resume", "arr.json", cwd=place))
    assert "is already" in user.run(aiflux, "resume", "arr.json", cwd=place, code=2)
    code = user.popen(aiflux, "watch", second, cwd=place)
    printed, _ = code.communicate(timeout=300)
    assert code.returncode == 0, printed
    is_whole(place, "arr", 39)
    assert {engine.seen[f"say arr {i}"] for i in range(39)} <= {1, 2}
    assert "already finished" in user.run(aiflux, "merge", "arr.json", cwd=place)
    assert "already finished" in user.run(aiflux, "resume", "arr.json", cwd=place)


def test_a_killed_shard_is_detected_and_resumed(
    user: User, aiflux: Path, cluster: Cluster, place: Path, submit: Submit
) -> None:
    job = submit("killed", 36, shards=2)
    until_done(place, "killed", 6)
    user.run("scancel", "--signal=KILL", "--full", f"{job}_1")
    cluster.left(job)
    view = json.loads(user.run(aiflux, "status", "killed.json", "--json", cwd=place))
    first, second = (shard["state"] for shard in view["shards"])
    assert first == "done"
    assert second in ("failed", "lost", "stopped")
    assert "aiflux resume" in user.run(aiflux, "status", "killed.json", cwd=place)
    printed = user.run(aiflux, "resume", "killed.json", cwd=place)
    assert "1 of 2 shards" in printed
    code = user.popen(aiflux, "watch", submitted(printed), cwd=place)
    printed, _ = code.communicate(timeout=240)
    assert code.returncode == 0, printed
    is_whole(place, "killed", 36)


def test_more_shards_than_one_array_holds(
    user: User, aiflux: Path, cluster: Cluster, place: Path, submit: Submit
) -> None:
    jobs = submit("wide", 20, shards=10)
    first, _ = jobs.split(":")
    code = user.popen(aiflux, "watch", first, cwd=place)
    printed, _ = code.communicate(timeout=300)
    assert code.returncode == 0, printed
    is_whole(place, "wide", 20)
    listed = json.loads((place / "wide.json.aiflux" / "jobs.json").read_text("utf-8"))
    assert [job["shards"] for job in listed["submissions"][0]["jobs"]] == [
        list(range(8)),
        [8, 9],
    ]


def test_a_preempted_job_continues_by_itself(
    user: User, cluster: Cluster, place: Path, submit: Submit
) -> None:
    job = submit("pre", 24)
    until_done(place, "pre", 4)
    urgent = user.run(
        "sbatch", "--parsable", "--partition", "urgent", "--nodes", "2", "--exclusive",
        "--output", "/dev/null", "--wrap", "sleep 3",
    ).strip()  # fmt: skip
    assert cluster.end(urgent).code == 0
    end = cluster.end(job)
    assert (end.state, end.code) == ("COMPLETED", 0), cluster.log(job, place / "pre.json.aiflux")
    assert int(end.fields["Restarts"]) >= 1
    is_whole(place, "pre", 24)
    assert recorded(place, "pre.json") == 24


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take a node down")
def test_a_node_that_goes_down(
    stack: dict[str, str], user: User, cluster: Cluster, place: Path, submit: Submit
) -> None:
    job = submit("moves", 30)
    until_done(place, "moves", 4)
    node = cluster.fields(job)["NodeList"]
    control(stack, f"nodename={node}", "state=down", "reason=test")
    try:
        end = cluster.end(job, timeout=240)
    finally:
        # The node's daemon may have brought it back already; then there is nothing to resume.
        control(stack, f"nodename={node}", "state=resume", check=False)
    assert (end.state, end.code) == ("COMPLETED", 0), cluster.log(job, place / "moves.json.aiflux")
    assert int(end.fields["Restarts"]) >= 1, "the node was down"
    is_whole(place, "moves", 30)


@pytest.mark.parametrize("more", [0, 1, 3, 6, 12])
def test_with_few_threads_the_worker_is_slower_or_stops(
    more: int, user: User, aiflux: Path, place: Path, engine: FaultyEngine
) -> None:
    """``ulimit -u`` counts the threads of a user in a user namespace (user_namespaces(7)), and does
    not apply to root. In a namespace of its own, other processes of the user do not count.
    """
    user.write(place / "in.jsonl", lines(*(request(str(i), f"say {i}") for i in range(4))))
    words = ["run", "--input", "in.jsonl", "--output", "out.json", "--concurrency", "50"]
    printed = user.run(
        "unshare", "--map-current-user", "prlimit", f"--nproc={1 + more}", "--",
        aiflux, *words, "--engine-url", engine.url, cwd=place, code=None, timeout=60,
    )  # fmt: skip
    if "wrote" in printed:
        assert len(answers(place / "out.json")) == 4
    else:
        assert "ulimit -u" in printed
        assert "run the same command again" in printed
    assert "Traceback" not in printed
    assert ("wrote" in printed) == (more > 4)


def control(stack: dict[str, str], *words: str, check: bool = True) -> None:
    environment = {"SLURM_CONF": stack["SLURM_CONF"], "PATH": "/usr/bin:/bin"}
    subprocess.run(["scontrol", "update", *words], check=check, env=environment)

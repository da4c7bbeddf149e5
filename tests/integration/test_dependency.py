"""Runs and commands that wait for others, with the real Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aiflux.engines.llamacpp.model_file import find_files
from tests.integration.conftest import MODEL, Cluster, User
from tests.integration.test_command import SERVER, SMALL, questions


@pytest.fixture
def command(llama_server: Path, models: Path) -> list[str | Path]:
    """The options of a run with a small server."""
    server = SERVER.replace("llama-server", str(llama_server), 1)
    return ["--model", find_files(models, MODEL).model, "--engine-command", server, "--slots", "2",
            *SMALL]  # fmt: skip


def test_a_run_waits_for_all_arrays_of_another_and_a_command_for_it(
    user: User, checkout: Path, place: Path, command: list[str | Path], cluster: Cluster
) -> None:
    aiflux = checkout / ".venv/bin/aiflux"
    user.write(place / "in.jsonl", questions(9, 4))
    run = [aiflux, "run", "in.jsonl", *command]
    more = ["--shards", "9", "--max-running", "2", "--sbatch-arg", "begin=now+5"]
    printed = user.run(*run, "-o", "a.json", *more, cwd=place)
    arrays = printed.split("submitted jobs ")[1].split(": ")[0].split(":")
    assert len(arrays) == 2, printed
    # The command executes one of AI-Flux's own, in the user's directory.
    then = f"echo \"code $AIFLUX_EXIT_CODE, a 'b'\" > then.txt; {aiflux.as_posix()!r} status a.json"
    printed = user.run(*run, "-o", "b.json", "--after", "a.json", "--then", then, cwd=place)
    job = printed.split("submitted job ")[1].split(":")[0]
    follower = printed.split("  job ")[1].split(" ")[0]
    for array in arrays:
        assert f"afterok:{array}_*" in cluster.fields(job)["Dependency"]
    shown = json.loads(user.run(aiflux, "status", "b.json", "--json", cwd=place))
    assert shown["dependency"] == f"afterok:{job}"
    own = user.run(
        "sbatch", "--parsable", f"--dependency={shown['dependency']}", "--wrap", "cat b.json",
        "--output", "own.txt", cwd=place,
    ).strip()  # fmt: skip
    assert cluster.end(job).code == 0, cluster.log(job, place)
    assert all(cluster.end(array).code == 0 for array in arrays)
    assert cluster.end(own).code == 0
    assert cluster.end(follower).code == 0, cluster.log(follower, place / "b.json.aiflux")
    assert (place / "then.txt").read_text() == "code 0, a 'b'\n"
    assert "a.json  finished" in cluster.log(follower, place / "b.json.aiflux")
    done = user.run(*run, "-o", "c.json", "--after", "a.json", cwd=place)
    assert "starts once" not in done, "a finished run is not waited for"
    user.run(aiflux, "cancel", "c.json", cwd=place, code=None)


def test_a_requeued_job_is_waited_for_and_a_failed_one_cancels(
    user: User, checkout: Path, place: Path, command: list[str | Path], cluster: Cluster
) -> None:
    aiflux = checkout / ".venv/bin/aiflux"
    first = user.write(
        place / "first.sh",
        "#!/bin/bash\nif ((${SLURM_RESTART_COUNT:-0} == 0)); then\n"
        'scontrol requeue "$SLURM_JOB_ID"; sleep 60; fi\nexit "$1"\n',
    )
    user.write(place / "in.jsonl", questions(1, 4))
    ended = {}
    for code in (0, 1):
        before = user.run("sbatch", "--parsable", "--requeue", first, str(code), cwd=place).strip()
        words = ["run", "in.jsonl", "-o", f"{code}.json", *command, "--after", before]
        printed = user.run(aiflux, *words, cwd=place)
        ended[code] = before, printed.split("submitted job ")[1].split(":")[0]
    for code, (before, job) in ended.items():
        assert cluster.end(before).fields["Restarts"] == "1"
        end = cluster.end(job)
        assert end.state == ("COMPLETED" if code == 0 else "CANCELLED"), cluster.log(job, place)
    assert "stopped" in user.run(aiflux, "status", "1.json", cwd=place, code=None)

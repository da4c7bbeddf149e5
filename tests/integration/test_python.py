"""`aiflux.run` in the real Slurm, and in the real image on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import FRANCE, MODEL, Cluster, User, lines, request

# One after the other, so that there is a moment at which some are done.
_MANY = [request(f"r{at}", "Count to ten.", max_tokens=12) for at in range(6)]


@pytest.fixture
def python(checkout: Path, image: Path) -> Path:
    """Python with the package, next to an image."""
    return checkout / ".venv" / "bin" / "python"


def runs(user: User, python: Path, place: Path, env: dict[str, str], *code: str) -> list[Any]:
    """Run a program of a user; return the values that it prints as JSON."""
    text = "\n".join(["import aiflux, json, logging", "logging.disable()", *code])
    script = user.write(place / "program.py", text)
    printed = user.run(python, script, cwd=place, env=env, timeout=600)
    return [json.loads(line) for line in printed.splitlines()]


START = f"run = aiflux.run('in.jsonl', 'out.json', model={MODEL!r}, concurrency=1, mem='2G')"
SHOW = "print(json.dumps([run.status().state.value, run.status().done, len(run.status().jobs)]))"
UNTIL = "while not {}: run.wait(timeout=0.5, progress=False)"


def test_a_run_in_slurm(
    user: User, python: Path, place: Path, job_env: dict[str, str], cluster: Cluster
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE))
    texts = "print(json.dumps([result.text for result in run.results()]))"
    shown = runs(user, python, place, job_env, START, SHOW, "run.wait()", SHOW, texts,
                 "print(json.dumps(str(run.report())))")  # fmt: skip
    assert shown[0] in (["waiting", 0, 1], ["running", 0, 1])
    assert shown[1] == ["finished", 1, 1]
    assert "Paris" in shown[2][0]
    assert Path(shown[3]).stat().st_size > 1000
    again = runs(user, python, place, job_env, START, SHOW)
    assert again == [["finished", 1, 1]], "nothing is submitted again"


def test_a_run_in_slurm_is_cancelled_while_it_works_and_goes_on_later(
    user: User, python: Path, place: Path, job_env: dict[str, str], cluster: Cluster
) -> None:
    user.write(place / "in.jsonl", lines(*_MANY))
    (cancelled, asked, stopped) = runs(
        user, python, place, job_env, START, UNTIL.format("run.status().done"),
        "print(json.dumps(run.cancel()))", "view = run.wait(timeout=120)",
        "print(json.dumps([view.state.value, 0 < view.done < view.total]))",
        "print(json.dumps(len(list(run.results(partial=True))) == view.done))",
    )  # fmt: skip
    assert (cancelled, asked, stopped) == (True, ["stopped", True], True)
    finished = runs(user, python, place, job_env, START, "run.wait()", SHOW)
    assert finished == [["finished", len(_MANY), 2]]


def test_a_job_that_waits_is_cancelled(
    user: User, python: Path, place: Path, job_env: dict[str, str], cluster: Cluster
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE))
    later = START[:-1] + ", sbatch_arg={'begin': 'now+1hour'})"
    shown = runs(user, python, place, job_env, later, SHOW, "print(json.dumps(run.cancel()))",
                 "run.wait(timeout=180)", SHOW, "print(json.dumps(run.cancel()))")  # fmt: skip
    assert shown == [["waiting", 0, 1], True, ["stopped", 0, 1], False]


def test_a_run_in_the_image_outlives_the_program(
    user: User, python: Path, aiflux: Path, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.jsonl", lines(*_MANY))
    here = START.replace("mem='2G'", "local=True, allow_cpu=True")
    begun = runs(user, python, place, job_env, here, SHOW, UNTIL.format("run.status().done"),
                 "print(json.dumps(run.cancel()))", "run.wait(timeout=180)", SHOW)  # fmt: skip
    assert begun[0] == ["running", 0, 0]
    assert begun[1] is True
    assert begun[2][0] == "stopped"
    (running,) = runs(user, python, place, job_env, here, SHOW)
    assert running[0] == "running"
    user.run(aiflux, "watch", "out.json", cwd=place, env=job_env, timeout=600)
    assert len(json.loads((place / "out.json").read_text())) == len(_MANY)
    assert user.none_left()

"""A gateway that is killed at any moment: no batch is lost, none is started twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI

from aiflux.errors import AifluxError
from aiflux.gateway.batch_status import RunWatch, batch_states
from aiflux.gateway.store import BatchFiles
from aiflux.slurm.monitor import RunView, gather
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.gateway.running_gateway import (
    RunningGateway,
    batch_in_mid_run,
    create,
    downloaded,
    ended,
    lines,
    recorded_batch,
    upload,
    wait_until,
)


def test_a_batch_finishes_without_the_gateway(tmp_path: Path, start: list[RunningGateway]) -> None:
    with batch_in_mid_run(tmp_path, 30, start) as (running, id_, engine):
        output = running.root / "batches" / id_ / f"{id_}.jsonl"
        deadline = time.monotonic() + 60
        while not output.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.start()
        with running.client() as client:
            done = ended(client, id_)
            assert done.status == "completed"
            assert len(downloaded(client, done.output_file_id)) == 30
        assert max(engine.seen.values()) == 1


def test_a_batch_that_was_only_recorded_is_started_once(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    with FaultyEngine() as engine:
        running = RunningGateway(tmp_path, ["--engine-url", engine.url])
        start.append(running)
        id_ = recorded_batch(running.root, lines("a", "b"), {"engine_url": engine.url}, tmp_path).id
        for _ in range(3):
            running.start()
            time.sleep(random.uniform(0, 0.3))
            running.kill()
        running.start()
        with running.client() as client:
            assert ended(client, id_).status == "completed"
        assert engine.seen == {"a": 1, "b": 1}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    folder = tmp_path / "slurm"
    folder.mkdir()
    return waiting_slurm(folder, monkeypatch)


def test_a_gateway_killed_at_any_moment_submits_a_batch_once(
    tmp_path: Path, start: list[RunningGateway], slurm: FakeCommands
) -> None:
    running = RunningGateway(tmp_path, ["--engine-command", "sleep {port}", "--no-seal"])
    start.append(running)
    ids = []
    for pause in (0.0, 0.4, 1.2):
        running.start()
        with running.client() as client:
            ids.append(create(client, lines("a")).id)
        time.sleep(pause)
        running.kill()
    running.start()
    with running.client() as client:
        for id_ in ids:
            batch = wait_until(client, id_, lambda b: b.status != "validating")
            assert batch.status == "in_progress", batch
    assert len(slurm.calls("sbatch")) == len(ids)


# The first sbatch accepts the job and kills the process that called it, before that can record it.
_KILLS_ITS_CALLER = """\
if [[ $call == *-0 ]]; then kill -9 $PPID; fi
echo 100
"""
_SHOWS_SCRIPTS = """\
if [[ "$*" == *'%F|%o'* ]]; then
  for each in "$here"/calls/sbatch-*/argv; do
    [[ ! -e $each ]] || printf '100|%s\\n' "$(tr '\\0' '\\n' <"$each" | tail -n 1)"
  done
else
  printf '100|N/A|PENDING|N/A|0:00||Priority\\n'
fi
"""


def test_a_job_whose_submission_was_killed_is_not_submitted_again(
    tmp_path: Path, start: list[RunningGateway], slurm: FakeCommands
) -> None:
    slurm.add("sbatch", _KILLS_ITS_CALLER)
    slurm.add("squeue", _SHOWS_SCRIPTS)
    running = RunningGateway(tmp_path, ["--engine-command", "sleep {port}", "--no-seal"])
    start.append(running)
    running.start()
    with running.client() as client:
        batch = create(client, lines("a"))
        going = wait_until(client, batch.id, lambda b: b.status != "validating")
        assert going.status == "in_progress", going
    assert len(slurm.calls("sbatch")) == 1
    jobs = running.root / "batches" / batch.id / f"{batch.id}.jsonl.aiflux" / "jobs.json"
    assert '"100"' in jobs.read_text(encoding="utf-8")


def test_a_cancellation_survives_the_gateway(tmp_path: Path, start: list[RunningGateway]) -> None:
    with FaultyEngine() as engine:
        running = RunningGateway(tmp_path, ["--engine-url", engine.url, "--drain-seconds", "0"])
        start.append(running)
        running.start()
        with running.client() as client:
            batch = create(client, lines("hang", "b"))
            wait_until(client, batch.id, lambda b: b.request_counts.completed == 1)  # type: ignore[union-attr]
            client.batches.cancel(batch.id)
        running.kill()
        running.start()
        with running.client() as client:
            done = ended(client, batch.id)
            assert done.status == "cancelled"
            assert list(downloaded(client, done.output_file_id)) == ["r1"]


def test_a_run_whose_process_is_gone_is_resumed(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    with batch_in_mid_run(tmp_path, 40, start) as (running, id_, _):
        folder = running.root / "batches" / id_ / f"{id_}.jsonl.aiflux"
        process = json.loads((folder / "process.json").read_text(encoding="utf-8"))
        os.kill(process["pid"], signal.SIGKILL)
        running.start()
        with running.client() as client:
            done = wait_until(client, id_, lambda b: b.status == "completed")
            assert len(downloaded(client, done.output_file_id)) == 40


def test_a_stopped_gateway_keeps_everything(tmp_path: Path, start: list[RunningGateway]) -> None:
    with FaultyEngine() as engine:
        running = RunningGateway(tmp_path, ["--engine-url", engine.url])
        start.append(running)
        running.start()
        with running.client() as client:
            stored = upload(client, lines("a"))
            batch = create(client, lines("b"))
            done = ended(client, batch.id)
        assert running.stop() == 0
        with (
            pytest.raises(APIConnectionError),
            OpenAI(base_url=running.url, api_key="x", max_retries=0) as client,
        ):
            client.files.list()
        running.start()
        with running.client() as client:
            assert client.files.retrieve(stored.id) == stored
            assert client.batches.retrieve(batch.id) == done


class LookingLate(RunWatch):
    """Looks at runs only after another process has ended them."""

    def __init__(self, end: Callable[[], None]) -> None:
        super().__init__()
        self._end = end

    def views(self, batches: Iterable[BatchFiles]) -> dict[str, RunView | AifluxError]:
        self._end()
        return super().views(batches)


def test_a_batch_that_ends_while_it_is_looked_at_has_not_failed(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    with batch_in_mid_run(tmp_path, 30, start) as (running, id_, _):
        batch = BatchFiles(running.root / "batches" / id_)

        def end() -> None:
            deadline = time.monotonic() + 60
            while not gather(batch.run).finished:
                assert time.monotonic() < deadline
                time.sleep(0.05)

        (state,) = batch_states([batch], LookingLate(end))
    assert state.status == "completed"

"""Where batches are processed: on this machine, or where the configuration says."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from aiflux.core.runs.serve_directory import STARTING, ServeState
from tests.tools import make_tiny_gguf
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.fake_commands import waiting_slurm
from tests.unit.gateway.running_gateway import (
    RunningGateway,
    create,
    downloaded,
    ended,
    lines,
    wait_until,
)
from tests.unit.gateway.test_server import refused
from tests.unit.helpers import write_program
from tests.unit.made_serves import MadeServe

TOOLS = Path(make_tiny_gguf.__file__).parent


def test_an_engine_on_this_machine(tmp_path: Path, start: list[RunningGateway]) -> None:
    program = write_program(
        tmp_path / "llama-server",
        f'#!/bin/sh\nexec {sys.executable} {TOOLS}/fake_llama_server.py "$@"\n',
    )
    (tmp_path / "m.gguf").write_bytes(make_tiny_gguf.tiny("llama"))
    running = RunningGateway(
        tmp_path,
        [
            *("--local", "--engine", "llamacpp", "--model", str(tmp_path / "m.gguf")),
            *("--slots", "2", "--context-length", "512", "--allow-cpu"),
        ],
        {"AIFLUX_ENGINE_PROGRAM": str(program)},
    )
    start.append(running)
    running.start()
    with running.client() as client:
        assert [each.id for each in client.models.list()] == [str(tmp_path / "m.gguf")]
        done = ended(client, create(client, lines("a", "b", model=str(tmp_path / "m.gguf"))).id)
        assert (done.status, done.errors) == ("completed", None)
        assert set(downloaded(client, done.output_file_id)) == {"r0", "r1"}


def test_requests_for_a_model_of_openai_can_go_to_another(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    with FaultyEngine(models=("m:1",)) as engine:
        options = ["--engine-url", engine.url, "--model", "m:1", "--replace-model"]
        running = RunningGateway(tmp_path, options)
        start.append(running)
        running.start()
        with running.client() as client:
            done = ended(client, create(client, lines("a", model="gpt-4o-mini")).id)
            assert done.status == "completed", done.errors
        assert [body["model"] for body in engine.bodies] == ["m:1"]


def test_an_engine_of_serve_lists_its_model_once_it_is_ready(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    with MadeServe(tmp_path) as made:
        running = RunningGateway(tmp_path, ["--engine-url", f"serve:{made.directory.name}"])
        start.append(running)
        running.start()
        with running.client() as client:
            assert client.models.list().data == []
            made.directory.write_state(ServeState(STARTING))
            assert client.models.list().data == []
            made.start()
            assert [each.id for each in client.models.list()] == [made.model]


def test_the_settings_of_the_directory_and_of_the_request_reach_the_job(
    tmp_path: Path, start: list[RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm").mkdir()
    slurm = waiting_slurm(tmp_path / "slurm", monkeypatch)
    (tmp_path / "aiflux.yaml").write_text(
        "slurm:\n  account: physics\n  partition: gpu\n  time: '01:00:00'\n"
        "run:\n  engine_command: sleep {port}\n",
        encoding="utf-8",
    )
    running = RunningGateway(tmp_path, ["--partition", "long", "--no-seal"])
    start.append(running)
    running.start()
    with running.client() as client:
        more = {"aiflux": {"time": "00:30:00", "shards": 2}}
        batch = create(client, lines("a", "b", "c"), extra_body=more)
        going = wait_until(client, batch.id, lambda b: b.status != "validating")
        assert going.status == "in_progress", going.errors
        asked = len(slurm.calls("squeue"))
        for _ in range(30):
            assert client.batches.retrieve(batch.id).status == "in_progress"
        assert len(slurm.calls("squeue")) <= asked + 1, "Slurm is asked every ten seconds"
        assert client.models.list().data == []
    (call,) = slurm.calls("sbatch")
    script = Path(call.argv[-1]).read_text(encoding="utf-8")
    for wanted in ("--account=physics", "--partition=long", "--time=00:30:00", "--array=0-1"):
        assert wanted in script
    _, shown = running.ask("GET", f"/v1/batches/{batch.id}")
    assert shown["aiflux"]["jobs"] == ["100"]
    assert shown["aiflux"]["state"] == "waiting"
    record = running.root / "batches" / batch.id / "batch.json"
    settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    assert settings == {"partition": "long", "seal": False, "time": "00:30:00", "shards": 2}


@pytest.mark.parametrize("restart", [False, True])
def test_batches_on_this_machine_wait_for_each_other(
    tmp_path: Path, start: list[RunningGateway], restart: bool
) -> None:
    with FaultyEngine(models=("m:1",)) as engine:
        options = ["--engine-url", engine.url, "--at-once", "1", "--drain-seconds", "0"]
        running = RunningGateway(tmp_path, options)
        start.append(running)
        running.start()
        with running.client() as client:
            first = create(client, lines("hang"))
            wait_until(client, first.id, lambda b: b.status == "in_progress")
        if restart:
            running.kill()
            running.start()
        with running.client() as client:
            second, third = create(client, lines("b")), create(client, lines("c"))
            time.sleep(1.5)
            assert [client.batches.retrieve(each.id).status for each in (second, third)] == [
                "validating",
                "validating",
            ]
            assert ended(client, client.batches.cancel(third.id).id).status == "cancelled"
            assert client.batches.retrieve(second.id).status == "validating"
            client.batches.cancel(first.id)
            assert ended(client, second.id).status == "completed"
        assert engine.seen["c"] == 0


def test_the_number_of_jobs_is_for_slurm_to_decide(tmp_path: Path) -> None:
    running = RunningGateway(tmp_path, ["--engine-command", "sleep {port}", "--at-once", "2"])
    assert "--at-once is for batches on this machine" in refused(running)

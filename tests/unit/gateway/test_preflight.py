"""What would make every batch fail is reported when the gateway starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiflux.core.runs.serve_directory import CRASHED, ENDED, ServeState
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import waiting_slurm
from tests.unit.gateway.running_gateway import RunningGateway, create, lines, wait_until
from tests.unit.gateway.test_server import refused
from tests.unit.helpers import write_program
from tests.unit.made_serves import MadeServe

NOWHERE = "http://127.0.0.1:9"


def warnings(running: RunningGateway, started: list[RunningGateway]) -> str:
    """Start a gateway; return what it printed on stderr."""
    started.append(running)
    running.start()
    return (running.folder / "gateway.log").read_text(encoding="utf-8")


def test_an_unknown_name_of_serve_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with MadeServe(tmp_path) as made:
        name = made.directory.name
        text = refused(RunningGateway(tmp_path, ["--engine-url", f"serve:{name}x"]))
        assert f"no engine is served as '{name}x'" in text
        assert f"did you mean '{name}'?" in text


def test_an_engine_of_serve_that_has_ended_is_reported(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    with MadeServe(tmp_path) as made:
        made.directory.write_state(ServeState(ENDED, reason=CRASHED))
        running = RunningGateway(tmp_path, ["--engine-url", f"serve:{made.directory.name}"])
        assert f"{made.directory.name} has ended (crashed)" in warnings(running, start)


def test_a_model_that_the_server_does_not_list_is_reported(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    with FaultyEngine(models=("llama3.2:3b",)) as engine:
        options = ["--engine-url", engine.url, "--model", "lama3.2:3b"]
        text = warnings(RunningGateway(tmp_path, options), start)
    assert "does not offer the model 'lama3.2:3b'" in text
    assert "did you mean 'llama3.2:3b'?" in text


def test_a_server_that_does_not_answer_is_reported(
    tmp_path: Path, start: list[RunningGateway]
) -> None:
    running = RunningGateway(tmp_path, ["--engine-url", NOWHERE])
    assert f"warning: the engine at {NOWHERE} does not answer" in warnings(running, start)


def local_gateway(folder: Path, engine: str, model: str) -> RunningGateway:
    program = write_program(folder / "server", "#!/bin/sh\necho ollama version is 0.13.3\n")
    options = ["--local", "--engine", engine, "--model", model]
    options += ["--models-dir", str(folder / "models")]
    return RunningGateway(folder, options, {"AIFLUX_ENGINE_PROGRAM": str(program)})


def test_a_misspelt_model_is_refused_with_the_nearest(tmp_path: Path) -> None:
    text = refused(local_gateway(tmp_path, "llamacpp", "lama3.2:3b"), 4)
    assert "the model lama3.2:3b is neither in" in text
    assert "did you mean llama3.2:3b?" in text


def test_a_model_to_pull_is_reported(tmp_path: Path, start: list[RunningGateway]) -> None:
    text = warnings(local_gateway(tmp_path, "ollama", "llama3.2:3bb"), start)
    assert "warning: llama3.2:3bb is not (completely) in" in text
    assert "aiflux models pull llama3.2:3bb" in text


def test_problems_of_jobs_are_listed_unless_the_checks_are_skipped(
    tmp_path: Path, start: list[RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slurm").mkdir()
    slurm = waiting_slurm(tmp_path / "slurm", monkeypatch)
    model, image = "lama3.2:3b", tmp_path / "aiflux.sif"
    options = ["--model", model, "--gpus-per-node", "0", "--image", str(image)]
    text = refused(RunningGateway(tmp_path, options))
    assert "2 problems found" in text
    assert "aiflux.sif" in text
    assert "did you mean llama3.2:3b?" in text
    make_sif(image, version="1", ollama="0.13.3")
    assert "did you mean llama3.2:3b?" in refused(RunningGateway(tmp_path, options))
    assert slurm.calls("sbatch") == []
    running = RunningGateway(tmp_path, ["--no-preflight", *options])
    warnings(running, start)
    with running.client() as client:
        batch = create(client, lines("a", model=model))
        going = wait_until(client, batch.id, lambda b: b.status != "validating")
        assert going.status == "in_progress", going.errors

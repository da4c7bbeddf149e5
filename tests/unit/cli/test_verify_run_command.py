"""``aiflux verify-run``: at a server, with an engine of this machine, and in a job."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.batch.request import request_key
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import NewResult
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import Status
from aiflux.estimates.pilot import Pilot
from tests.tools import make_tiny_gguf
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import waiting_slurm
from tests.unit.helpers import request_line, write_input, write_program
from tests.unit.made_models import put_model
from tests.unit.made_runs import MadeRun

TOOLS = Path(__file__).parents[2] / "tools"
SAMPLE = Pilot(Path("out.json.verify"))


@pytest.fixture(autouse=True)
def place(awkward: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(awkward)
    return awkward


def aiflux(*argv: str, code: int = 0) -> str:
    """Run the command as a process of its own; return what it prints."""
    program = Path(sys.executable).with_name("aiflux")
    done = subprocess.run([program, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code in (0, 3) else done.stderr


def run_at(engine: FaultyEngine, *more: str, count: int = 30, code: int = 0) -> None:
    """Process an input at an engine, with a temperature of 0 unless the options say otherwise."""
    if not Path("in.jsonl").exists():
        write_input(Path("in.jsonl"), count)
    common = ["--engine-url", engine.url, "-i", "in.jsonl", "-o", "out.json", "--temperature", "0"]
    aiflux("run", *common, "--retry-delay", "0.01", *more, code=code)


def verified(*more: str, code: int = 0) -> dict[str, Any]:
    """Verify the run; return the outcome."""
    found: dict[str, Any] = json.loads(aiflux("verify-run", "out.json", "--json", *more, code=code))
    return found["verification"]


def test_a_sample_is_asked_again_and_the_answers_are_the_same() -> None:
    with FaultyEngine() as engine:
        run_at(engine)
        before = Path("out.json").read_bytes()
        found = verified("--sample", "10")
        assert len(engine.bodies) == 40
        assert verified("--sample", "10") == found
        assert len(engine.bodies) == 40, "what is done is not done again"
        printed = aiflux("verify-run", "out.json", "--sample", "10", "--force")
        assert len(engine.bodies) == 50
    assert found["requests"] == 10
    assert found["answers"] == 30
    assert found["fixed"] == {"compared": 10, "identical": 10, "share": 1.0}
    assert found["sampled"] == {"compared": 0, "identical": 0, "share": None}
    assert (found["failed"], found["differences"]) == (0, [])
    assert printed.splitlines() == [
        "asked 10 of 30 answers again (seed 1)",
        "identical: 10 of 10 (100 %)",
        "model m:1: unknown whether it is the same",
        "engine: unknown whether it is the same version",
    ]
    assert Path("out.json").read_bytes() == before
    sent = {json.dumps(body) for body in engine.bodies[30:]}
    assert sent <= {json.dumps(body) for body in engine.bodies[:30]}, "the same bodies are sent"


def test_options_of_slurm_have_no_effect_at_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyEngine() as engine:
        run_at(engine, count=3)
        for command in ("verify-run", "resume"):
            capsys.readouterr()
            assert main([command, "out.json", "--partition", "p"]) == 0
            note = "note: --partition has no effect: a running server needs no job"
            assert note in capsys.readouterr().err


def test_the_sample_of_a_verification_is_not_verified() -> None:
    with FaultyEngine() as engine:
        run_at(engine)
        verified("--sample", "5")
        for name in ("out.json.verify", "out.json.verify/results.json"):
            refused = aiflux("verify-run", name, code=2)
            assert "out.json.verify is the sample of a verification" in refused
            assert "aiflux verify-run out.json\n" in refused
    assert not Path("out.json.verify/results.json.verify").exists()


def test_another_seed_draws_another_sample() -> None:
    with FaultyEngine() as engine:
        run_at(engine)
        samples = []
        for seed in ("1", "2", "1"):
            verified("--sample", "10", "--seed", seed)
            samples.append(SAMPLE.input.read_bytes())
    assert samples[0] == samples[2] != samples[1]


def test_other_answers_are_shown_at_their_first_difference() -> None:
    with FaultyEngine(answer="The sky is blue today.") as engine:
        run_at(engine)
        engine.answer = "The sky is grey today."
        found = verified("--sample", "7")
        printed = aiflux("verify-run", "out.json", "--sample", "7")
    assert found["fixed"] == {"compared": 7, "identical": 0, "share": 0.0}
    assert len(found["differences"]) == 5
    first = found["differences"][0]
    assert first["place"] == "[0].message.content, character 12"
    assert (first["before"], first["now"]) == ("The sky is blue today.", "The sky is grey today.")
    assert "identical: 0 of 7 (0 %)" in printed
    assert f"{first['custom_id']} differs at [0].message.content, character 12" in printed


def test_answers_sampled_without_a_seed_are_counted_separately() -> None:
    message = {"messages": [{"role": "user", "content": "say"}]}
    bodies = [{"temperature": 0.7}, {"temperature": 0.7, "seed": 3}, {"temperature": 0}, {}]
    lines = [request_line(f"r{n}", body={**message, **body}) for n, body in enumerate(bodies)]
    Path("in.jsonl").write_text("\n".join(lines) + "\n")
    with FaultyEngine(answer="a") as engine:
        run_at(engine, "--model", "m:1")
        engine.answer = "b"
        found = verified()
        printed = aiflux("verify-run", "out.json")
    assert (found["fixed"]["compared"], found["sampled"]["compared"]) == (3, 1)
    assert "sampled without a seed: 0 of 1 (0 %) identical; these may differ" in printed
    assert [each["custom_id"] for each in found["differences"]] == ["r1", "r2", "r3"]


def test_the_default_temperature_is_not_taken_for_zero() -> None:
    with FaultyEngine() as engine:
        write_input(Path("in.jsonl"), 3)
        aiflux("run", "--engine-url", engine.url, "-i", "in.jsonl", "-o", "out.json")
        found = verified()
    assert (found["fixed"]["compared"], found["sampled"]["identical"]) == (0, 3)


def test_a_sample_larger_than_the_run_asks_all_answered_requests() -> None:
    message = [{"role": "user", "content": "400"}]
    lines = [request_line("bad", body={"model": "m:1", "messages": message})]
    lines += [request_line(f"r{n}") for n in range(4)]
    Path("in.jsonl").write_text("\n".join(lines) + "\n")
    with FaultyEngine() as engine:
        run_at(engine, "--max-failures", "1")
        found = verified("--sample", "1000")
    assert (found["requests"], found["answers"], found["fixed"]["compared"]) == (4, 4, 4)


def test_requests_that_fail_this_time_are_counted_and_give_exit_code_3() -> None:
    with FaultyEngine() as engine:
        run_at(engine, count=6)
        engine.instead = lambda method, *_: (400, b"{}", {}) if method == "POST" else None
        found = verified("--sample", "4", code=3)
    assert (found["failed"], found["fixed"]["compared"]) == (4, 0)


# --- what is refused -------------------------------------------------------------------------


def test_a_run_without_answers_is_refused() -> None:
    message = [{"role": "user", "content": "400*1000"}]
    line = request_line("bad", body={"model": "m:1", "messages": message})
    Path("in.jsonl").write_text(line + "\n")
    with FaultyEngine() as engine:
        run_at(engine, "--max-failures", "1")
        printed = aiflux("verify-run", "out.json", code=2)
    assert "has no answers to verify" in printed
    assert not SAMPLE.record.exists()


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    made.status(completed=10, state="cancelled")
    printed = aiflux("verify-run", str(made.output), code=2)
    assert "is not finished, so it cannot be verified" in printed
    assert "aiflux status" in printed


@pytest.mark.parametrize(
    ("file", "message"),
    [("out.json", "its output was changed"), ("in.jsonl", "was edited or reordered")],
)
def test_a_changed_file_is_refused(file: str, message: str) -> None:
    with FaultyEngine() as engine:
        run_at(engine, count=3)
        path = Path(file)
        path.write_bytes(path.read_bytes().replace(b"say r1", b"say r7"))
        printed = aiflux("verify-run", "out.json", code=2)
        assert len(engine.bodies) == 3
    assert message in printed


@pytest.mark.parametrize("words", [["--sample", "0"], ["--sample", "many"], ["--seed", "-1"]])
def test_a_wrong_size_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-run", "out.json", *words]) == 2
    assert "is not a whole number" in capsys.readouterr().err


# --- an engine of this machine ---------------------------------------------------------------


@pytest.fixture
def local_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a stand-in of Ollama; returns the models directory."""
    (tmp_path / "bin").mkdir()
    fake = f'#!/bin/bash\nexec {sys.executable} {TOOLS}/fake_ollama.py "$@"\n'
    write_program(tmp_path / "bin" / "ollama", fake)
    models = place / "models"
    put_model(models, "m:1", make_tiny_gguf.tiny())
    monkeypatch.setenv("AIFLUX_MODELS_DIR", str(models))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    write_input(place / "in.jsonl", 12)
    words = ["-i", "in.jsonl", "-o", "out.json", "--temperature", "0", "--context-length", "512"]
    aiflux("run", "--local", *words)
    return models


def test_the_same_model_and_version_are_confirmed(
    local_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIFLUX_MODELS_DIR")  # the run knows where its models are
    found = verified("--sample", "5")
    assert found["fixed"] == {"compared": 5, "identical": 5, "share": 1.0}
    (model,) = found["models"]
    assert model["same"] is True
    assert len(model["now"]) == 1
    assert found["engine"] == {
        "name": "engine", "before": ["0.99.0"], "now": ["0.99.0"], "same": True,
    }  # fmt: skip


def test_another_version_of_the_engine_is_reported(
    local_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_OLLAMA_VERSION", "0.99.1")
    words = [
        f'export FAKE_OLLAMA_VERSION=0.99.1\nexec {sys.executable} {TOOLS}/fake_ollama.py "$@"'
    ]
    program = Path(subprocess.check_output(["which", "ollama"], text=True).strip())
    write_program(program, f"#!/bin/bash\n{words[0]}\n")
    printed = aiflux("verify-run", "out.json", "--sample", "5")
    assert "engine: version 0.99.0 before, 0.99.1 now; another version can give" in printed
    assert "model m:1: the same (sha256:" in printed


def test_a_changed_model_is_refused(local_run: Path) -> None:
    put_model(local_run, "m:1", make_tiny_gguf.tiny(), b"another license")
    printed = aiflux("verify-run", "out.json", code=4)
    assert "the model m:1 is not the one that gave the answers" in printed
    assert not SAMPLE.folder.exists()


def test_a_model_that_is_gone_is_refused(local_run: Path) -> None:
    for path in (local_run / "manifests").rglob("*"):
        if path.is_file():
            path.unlink()
    printed = aiflux("verify-run", "out.json", code=4)
    assert "the model m:1 is no longer stored in" in printed
    assert "aiflux models pull m:1" in printed


# --- in a job --------------------------------------------------------------------------------


def test_a_run_of_jobs_is_verified_by_a_job(
    local_run: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_sif(place / "i.sif", version="1")
    fakes = waiting_slurm(tmp_path / "slurm", monkeypatch)
    run = RunDirectory.of_output(place / "out.json")
    slurm = {"partition": "gpu", "account": "physics", "time": "08:00:00", "shards": 4}
    run.submissions.write_text(json.dumps({"image": str(image), "slurm": slurm, "submissions": []}))
    words = ["verify-run", "out.json", "--sample", "5", "--no-preflight"]
    printed = aiflux(*words, "--account", "biology")
    assert "the sample is waiting (job 100): 0 of 5 requests finished" in printed
    assert "run the same command again for the verification; --wait waits" in printed
    script = SAMPLE.run.script.read_text()
    assert "#SBATCH --partition=gpu" in script
    assert "#SBATCH --account=biology" in script
    assert "#SBATCH --time=01:00:00" in script
    assert "--array" not in script
    assert len(fakes.calls("sbatch")) == 1
    other = make_sif(place / "other.sif", version="2")
    refused = aiflux(*words, "--account", "biology", "--image", str(other), code=2)
    assert "job 100 of a sample with other settings is PENDING" in refused
    refused = aiflux(*words, "--account", "biology", "--force", code=2)
    assert "job 100 of this sample is PENDING; it cannot be started again" in refused
    waiting = json.loads(aiflux(*words, "--account", "biology", "--json"))
    assert waiting["verification"] is None
    assert waiting["sample"]["state"] == "waiting"
    finish_sample()
    (place / "bad.sif").write_text("no image")
    assert "bad.sif" in aiflux(*words, "--account", "biology", "--image", "bad.sif", code=2)
    assert verified(*words[2:], "--account", "biology")["fixed"]["compared"] == 5
    assert len(fakes.calls("sbatch")) == 1


def test_the_job_of_a_command_is_not_sealed_by_the_recorded_default(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = shlex.join([sys.executable, str(TOOLS / "command_server.py")])
    write_input(place / "in.jsonl", 4)
    words = ["-i", "in.jsonl", "-o", "out.json", "--model", "m:1", "--temperature", "0"]
    command = f"{server} --model {{model}} --port {{port}}"
    aiflux("run", "--local", *words, "--engine-command", command)
    fakes = waiting_slurm(tmp_path / "slurm", monkeypatch)
    run = RunDirectory.of_output(place / "out.json")
    run.submissions.write_text('{"image": null, "slurm": {}, "submissions": []}')
    common = ["verify-run", "out.json", "--sample", "2", "--no-preflight"]
    printed = aiflux(*common, "--seal", code=2)
    assert "seal = true (argument), but a run with --engine-command cannot be sealed" in printed
    assert "the sample is waiting (job 100)" in aiflux(*common)
    assert len(fakes.calls("sbatch")) == 1


def finish_sample() -> None:
    """Leave what the job of the sample leaves."""
    run, plan = SAMPLE.run, read_plan(SAMPLE.run)
    with open(run.journal(0), "wb") as journal:
        for line in SAMPLE.input.read_bytes().splitlines():
            metadata = {"model": "m:1", "timestamp": "2026-01-01T00:00:00Z",
                        "processing_time": 1.0, "attempts": 1, "engine": 0}  # fmt: skip
            custom_id = json.loads(line)["custom_id"]
            body = json.dumps({"choices": []}).encode()
            result = NewResult(request_key(line), custom_id, 200, metadata, None, body)
            journal.write(result.to_line())
    status = Status(run.status(0), plan, 0, completed=5)
    status.enter("completed")

"""``aiflux estimate`` and ``run --pilot``: against an engine, and a Slurm that only takes notes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.batch.request import request_key
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import Result
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import EngineFacts, Status, Totals
from aiflux.estimates.pilot import Pilot
from aiflux.util.times import utc_text
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.helpers import request_line, write_input

OUTPUT = Path("out.json")
PILOT = Pilot.of_output(OUTPUT)
SLURM = ["estimate", "--model", "m:1", "--input", "in.jsonl", "--output", "out.json",
         "--requests", "40", "--no-preflight", "--image", "i.sif"]  # fmt: skip
WHOLE = ["run", *SLURM[1:7], *SLURM[9:], "--shards", "auto"]


@pytest.fixture(autouse=True)
def place(awkward: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(awkward)
    write_input(awkward / "in.jsonl", 300)
    return awkward


@pytest.fixture
def slurm(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    make_sif(place / "i.sif", version="1")
    return waiting_slurm(tmp_path / "bin", monkeypatch)


def here(engine: FaultyEngine, *more: str) -> list[str]:
    common = ["--engine-url", engine.url, "--input", "in.jsonl", "--output", "out.json"]
    return ["estimate", *common, "--requests", "40", "--concurrency", "4", *more]


def do_the_pilot(seconds: float = 3.0, lanes: int = 4) -> None:
    """Leave what the pilot's job leaves: a request takes ``seconds``, ``lanes`` are in flight."""
    run = PILOT.run
    plan = read_plan(run)
    start = time.time() - 10_000
    lines = PILOT.input.read_bytes().splitlines()
    with open(run.journal(0), "wb") as journal:
        for number, line in enumerate(lines):
            ended = start + 20 + seconds * (number // lanes + 1)
            usage = {"usage": {"prompt_tokens": 10, "completion_tokens": 50}}
            metadata = {
                "model": "m:1", "timestamp": utc_text(ended), "processing_time": seconds,
                "attempts": 1, "engine": 0,
            }  # fmt: skip
            body = json.dumps(usage).encode()
            result = Result(request_key(line), f"r{number}", 200, metadata, None, body)
            journal.write(result.to_line())
    status = Status(run.status(0), plan, 0, completed=len(lines))
    status.details.started = utc_text(start)
    status.details.engines = (EngineFacts(slots=lanes),)
    status.details.totals = Totals(seconds=50.0, gpu_seconds=50.0, starts=1)
    status.enter("completed")


# --- in the foreground -----------------------------------------------------------------------


def aiflux(*argv: str, code: int = 0) -> str:
    """Run the command as a process of its own; return what it prints."""
    program = Path(sys.executable).with_name("aiflux")
    done = subprocess.run([program, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_a_pilot_against_an_engine() -> None:
    with FaultyEngine(delay=0.05) as engine:
        printed = aiflux(*here(engine))
        assert len(engine.bodies) == 40
        again = aiflux(*here(engine))  # what is done is not done again
        assert len(engine.bodies) == 40
        aiflux(*here(engine, "--force"))
        assert len(engine.bodies) == 80
    lines = printed.splitlines()
    assert again.splitlines()[-1] == lines[-1]
    assert lines[0] == "pilot: 40 of 300 requests finished"
    assert lines[1].startswith("       4 in flight, ")
    assert any(line.startswith("time  ") for line in lines)
    assert lines[-1].startswith("  aiflux run --input in.jsonl --output out.json ")
    assert " --concurrency 4" in lines[-1]
    assert "--shards" not in printed
    assert "GPU" not in printed


def test_run_with_pilot_does_the_same_and_nothing_else() -> None:
    with FaultyEngine() as engine:
        printed = aiflux("run", *here(engine)[1:7], "--pilot", "20")
        assert len(engine.bodies) == 20
    assert not RunDirectory.of_output(OUTPUT).path.exists()
    assert "pilot: 20 of 300 requests finished" in printed


def test_the_estimate_meets_the_run_and_stands_beside_it() -> None:
    with FaultyEngine(delay=0.02) as engine:
        printed = json.loads(aiflux(*here(engine, "--json")))["estimate"]
        aiflux("run", *here(engine)[1:7], "--concurrency", "4")
    rows = {
        row["name"]: row for row in json.loads(aiflux("status", "out.json", "--json"))["estimate"]
    }
    tokens = rows["answer tokens"]
    assert tokens["estimated"] == printed["completion_tokens"]
    assert tokens["estimated"]["low"] <= tokens["actual"] <= tokens["estimated"]["high"]
    assert rows["failed requests"]["actual"] == 0
    assert rows["time of all jobs"]["actual"] > 0
    assert "actual        estimated     95 % between" in aiflux("status", "out.json")


def test_failures_are_estimated(place: Path) -> None:
    lines = []
    for number in range(100):
        text = "400" if number % 4 == 0 else f"say {number}"
        body = {"model": "m:1", "messages": [{"role": "user", "content": text}]}
        lines.append(request_line(f"r{number}", body=body))
    (place / "in.jsonl").write_text("\n".join(lines) + "\n")
    with FaultyEngine() as engine:
        printed = json.loads(aiflux(*here(engine, "--json")))["estimate"]
    assert printed["failures"]["low"] <= 25 <= printed["failures"]["high"]
    assert any("most often with http_400" in text for text in printed["warnings"])


def test_another_pilot_takes_the_place_of_the_first() -> None:
    with FaultyEngine() as engine:
        aiflux(*here(engine))
        aiflux(*here(engine, "--max-tokens", "5"))
        assert len(engine.bodies) == 80
        assert engine.bodies[-1]["max_tokens"] == 5


def stop_after(engine: FaultyEngine, requests: int) -> None:
    """Stop an engine once it was asked so often."""
    while len(engine.bodies) < requests:
        time.sleep(0.01)
    engine.stop()


def test_a_pilot_that_was_stopped_goes_on() -> None:
    with FaultyEngine(delay=0.2) as engine:
        stopper = threading.Thread(target=stop_after, args=(engine, 3))
        stopper.start()
        asked = here(engine, "--concurrency", "1", "--engine-wait", "0.5")
        aiflux(*asked, code=4)
        stopper.join()
        done = len(engine.bodies)
        assert 0 < done < 40
        engine.start()
        engine.delay = 0.0
        printed = aiflux(*asked)
        assert len(engine.bodies) <= 40 + 2
    assert printed.splitlines()[0] == "pilot: 40 of 300 requests finished"


# --- with Slurm ------------------------------------------------------------------------------


def test_a_job_first_and_then_its_estimate(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SLURM, "--time", "02:00:00"]) == 0
    script = (PILOT.run.path / "run.sbatch").read_text()
    assert "--time=01:00:00" in script
    printed = capsys.readouterr().out
    assert "submitted job 100: 40 requests -> " in printed
    assert "the pilot is waiting (job 100): 0 of 40 requests finished" in printed
    assert main([*SLURM, "--time", "02:00:00", "--json"]) == 0
    going = json.loads(capsys.readouterr().out)
    assert (going["estimate"], going["pilot"]["state"]) == (None, "waiting")
    assert len(slurm.calls("sbatch")) == 1

    do_the_pilot()
    assert main([*SLURM, "--time", "02:00:00"]) == 0
    printed = capsys.readouterr().out
    assert "pilot: 40 of 300 requests finished" in printed
    assert "recommended: one job of 00:10:00" in printed
    assert "  aiflux run --input in.jsonl --output out.json --model m:1 " in printed
    assert " --time 00:10:00 " in printed
    assert printed.splitlines()[-1].endswith(" --shards 1")
    assert any(line.startswith("GPU-hours ") for line in printed.splitlines())


def test_a_pilot_with_other_settings_waits_for_the_first_to_end(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    assert main([*SLURM, "--partition", "big"]) == 2
    assert "job 100 of a pilot with other settings is PENDING" in capsys.readouterr().err


def test_a_pilot_that_failed_says_why(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    slurm.say("squeue")
    slurm.say("sacct", "100|FAILED|4:0\n")
    status = Status(PILOT.run.status(0), read_plan(PILOT.run), 0)
    status.details.ended, status.details.exit_code = "there is no such model", 4
    status.enter("failed")
    capsys.readouterr()
    assert main(SLURM) == 4
    printed = capsys.readouterr().err
    assert "the pilot has failed with 0 of 40 requests finished: there is no such model" in printed
    assert "aiflux logs out.json.pilot/results.json" in printed
    slurm.say("squeue", "100|N/A|PENDING|N/A|0:00||Priority\n")


def test_auto_shards_come_from_the_estimate(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    do_the_pilot(seconds=60.0)  # 300 requests, 4 at once: 75 minutes and what is added to them
    assert main([*SLURM, "--json"]) == 0
    slurm.say("squeue")
    capsys.readouterr()
    for limit, shards in (("01:00:00", 2), ("00:20:00", 6)):
        assert main([*WHOLE, "--time", limit, "--dry-run", "--json"]) == 0
        assert len(_plan(capsys)["shards"]) == shards
    assert main([*WHOLE, "--time", "01:00:00", "--max-tokens", "5", "--dry-run", "--json"]) == 0
    assert len(_plan(capsys)["shards"]) == 1  # another run: the rule of thumb


def _plan(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    printed = capsys.readouterr().out
    plan: dict[str, Any] = json.loads(printed)["plan"]
    return plan


def test_the_run_carries_the_estimate(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    do_the_pilot()
    assert main(SLURM) == 0
    slurm.say("squeue")
    assert main([*WHOLE]) == 0
    kept = json.loads(RunDirectory.of_output(OUTPUT).estimate.read_text())
    assert kept == json.loads(PILOT.estimate.read_text())


@pytest.mark.parametrize("count", ["1", "0", "-3", "many"])
def test_a_pilot_needs_two_requests(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SLURM[:-5], "--requests", count]) == 2
    assert "whole number of at least 2" in capsys.readouterr().err

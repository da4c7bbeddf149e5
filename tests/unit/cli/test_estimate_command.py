"""``aiflux estimate`` and ``run --pilot``: against an engine, and a Slurm that only takes notes."""

from __future__ import annotations

import json
import re
import shlex
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
from aiflux.core.runs.journal import NewResult
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import EnergyUse, EngineFacts, Status, Totals
from aiflux.estimates.pilot import Pilot
from aiflux.util.times import utc_text
from tests.tools import make_tiny_gguf
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.helpers import request_line, write_input, write_program
from tests.unit.made_models import put_model

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


def do_the_pilot(
    seconds: float = 3.0,
    lanes: int = 4,
    pilot: Pilot = PILOT,
    failed: int = 0,
    energy: EnergyUse | None = None,
) -> None:
    """Leave what the pilot's job leaves: a request takes ``seconds``, ``lanes`` are in flight."""
    run = pilot.run
    plan = read_plan(run)
    start = time.time() - 10_000
    lines = pilot.input.read_bytes().splitlines()
    with open(run.journal(0), "wb") as journal:
        for number, line in enumerate(lines):
            ended = start + 20 + seconds * (number // lanes + 1)
            usage = {"usage": {"prompt_tokens": 10, "completion_tokens": 50}}
            metadata = {
                "model": "m:1", "timestamp": utc_text(ended), "processing_time": seconds,
                "attempts": 1, "engine": 0,
            }  # fmt: skip
            body = json.dumps(usage).encode()
            error = {"code": "http_400", "message": "no"} if number < failed else None
            result = NewResult(request_key(line), f"r{number}", 200, metadata, error, body)
            journal.write(result.to_line())
    status = Status(run.status(0), plan, 0, completed=len(lines))
    status.details.started = utc_text(start)
    status.details.engines = (EngineFacts(slots=lanes),)
    status.details.totals = Totals(seconds=50.0, gpu_seconds=50.0, starts=1)
    status.details.energy = energy or EnergyUse()
    status.enter("completed")


# --- in the foreground -----------------------------------------------------------------------


def fail_the_pilot(slurm: FakeCommands, pilot: Pilot, job: int, reason: str) -> None:
    """Leave what a job leaves that fails, and let Slurm report it."""
    status = Status(pilot.run.status(0), read_plan(pilot.run), 0)
    status.details.ended, status.details.exit_code = reason, 4
    status.enter("failed")
    slurm.say("squeue")
    slurm.say("sacct", f"{job}|FAILED|4:0\n")


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
    (row,) = [line.split() for line in lines if line.startswith("time ")]
    assert row[2] == "s", "a run of seconds shows a fraction"
    assert 0 < float(row[1]) < 60
    assert any(line.startswith("time  ") for line in lines)
    assert lines[-1].startswith("  aiflux run --input in.jsonl --output out.json ")
    assert " --concurrency 4" in lines[-1]
    assert "--shards" not in printed
    assert "GPU" not in printed


def test_the_printed_command_of_a_pipe_names_the_kept_input(place: Path) -> None:
    program = Path(sys.executable).with_name("aiflux")
    with FaultyEngine() as engine:
        words = ["run", "-", *here(engine)[1:3], "--output", "out.json", "--pilot", "40"]
        text = (place / "in.jsonl").read_text()
        done = subprocess.run([program, *words], input=text, capture_output=True, text=True,
                              check=True)  # fmt: skip
        command = shlex.split(done.stdout.splitlines()[-1])
        assert command[2:4] == ["--input", str(place / "out.json.input.jsonl")]
        assert main(command[1:]) == 0
    assert len(json.loads(OUTPUT.read_text())) == 300


def test_the_printed_command_works_although_the_output_exists(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    OUTPUT.write_text("[]")
    with FaultyEngine() as engine:
        command = aiflux(*here(engine)).splitlines()[-1]
        words = shlex.split(command)[1:]
        assert main([*words, "--dry-run"]) == 0
        (place / "other.jsonl").write_bytes((place / "in.jsonl").read_bytes())
        capfd.readouterr()
        assert main(words) == 0
        OUTPUT.unlink()
        assert main([*here(engine), "--input", "other.jsonl", "--requests", "20"]) == 0
    printed = capfd.readouterr()
    assert "--force" not in printed.out
    assert "the full run is refused until this is solved" in printed.err
    assert "belongs to the input" in printed.err


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


def test_the_same_pilot_is_not_started_again_while_its_job_waits(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    assert main([*SLURM, "--force"]) == 2
    assert "job 100 of this pilot is PENDING; it cannot be" in capsys.readouterr().err


def test_run_with_pilot_names_its_own_options(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no --wait, and its --pilot is the --requests of estimate."""
    words = ["run", *SLURM[1:7], *SLURM[9:], "--pilot", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "run the same command again for the estimate\n" in printed
    assert "--wait" not in printed
    do_the_pilot(lanes=2)
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--pilot 10 is more reliable" in printed
    assert "--requests" not in printed


def test_a_warning_of_the_requests_counts_the_whole_input(
    slurm: FakeCommands, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"messages": [{"role": "user", "content": "say"}], "tool_choice": "required"}
    write_input(place / "in.jsonl", 300, body=body)
    asked = [word for word in SLURM if word != "--no-preflight"]
    main(asked)
    errors = capsys.readouterr().err
    assert "in 300 requests (lines " in errors
    assert "in 40 requests" not in errors


def test_a_pilot_that_failed_says_why(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    fail_the_pilot(slurm, PILOT, 100, "there is no such model")
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


def cluster_of(slurm: FakeCommands, nodes: int, busy_seconds: int = 0) -> None:
    """Let sbatch answer as Slurm 22.05 does; jobs for more than ``nodes`` start two hours later."""
    slurm.add("sbatch", f"""\
[[ " $* " == *" --test-only "* ]] || {{ echo 100; exit; }}
nodes=$(grep -oP -- '--nodes=\\K[0-9]+' <<<"$*")
start=$(($(date +%s) + {busy_seconds} + (nodes > {nodes} ? 7200 : 0)))
grep -q '^#SBATCH --job-name' || exit 1
echo "sbatch: Job 101 to start at $(date -d @$start +%FT%T) using $nodes processors on nodes n1" >&2
""")  # fmt: skip


def test_shards_are_added_for_free_nodes(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    """75 minutes in one job: each doubling ends the run earlier while it starts at once."""
    assert main(SLURM) == 0
    do_the_pilot(seconds=60.0)
    cluster_of(slurm, nodes=4)
    capsys.readouterr()
    limit = ["--time", "02:00:00"]
    assert main([*SLURM, *limit]) == 0
    printed = capsys.readouterr().out
    assert "recommended: 4 shards of 00:30:00" in printed
    assert printed.splitlines()[-1] == "start, if submitted now: at once"
    assert main([*SLURM, *limit, "--max-running", "2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["estimate"]["shards"], content["seconds_to_start"]) == (2, 0)
    slurm.say("squeue")
    assert main([*WHOLE, *limit, "--dry-run", "--json"]) == 0
    assert len(_plan(capsys)["shards"]) == 4


def test_a_start_after_a_job_without_a_time_limit_is_unknown(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    do_the_pilot()
    cluster_of(slurm, nodes=4, busy_seconds=186413 * 86400)
    capsys.readouterr()
    assert main(SLURM) == 0
    assert "start, if submitted now" not in capsys.readouterr().out
    assert main([*SLURM, "--json"]) == 0
    assert "seconds_to_start" not in json.loads(capsys.readouterr().out)


def test_a_run_that_the_site_refuses_has_an_estimate(
    slurm: FakeCommands, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The pilot is short enough for the site; the full run as given is not."""
    (place / "site.yaml").write_text("limits: {time: '02:00:00'}\n", encoding="utf-8")
    monkeypatch.setenv("AIFLUX_SITE_CONFIG", str(place / "site.yaml"))
    asked = [*SLURM, "--time", "10:00:00"]
    assert main(asked) == 0
    do_the_pilot(seconds=60.0)
    cluster_of(slurm, nodes=4)
    capsys.readouterr()
    assert main(asked) == 0
    printed = capsys.readouterr()
    assert "recommended: one job of " in printed.out
    assert "start, if submitted now" not in printed.out
    assert "the full run is refused until this is solved: time is 10:00:00" in printed.err


def test_no_shards_are_added_if_the_wait_is_most_of_the_time(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    do_the_pilot(seconds=60.0)
    cluster_of(slurm, nodes=4, busy_seconds=3 * 3600)
    capsys.readouterr()
    assert main([*SLURM, "--time", "02:00:00"]) == 0
    printed = capsys.readouterr().out
    assert "recommended: one job of " in printed
    assert re.search(r"\nstart, if submitted now: expected in (3:00:0\d|2:59:5\d) ", printed)


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


# --- several engines -------------------------------------------------------------------------

KINDS = ("ollama", "llamacpp")
BY_ENGINE = {kind: Pilot.of_output(OUTPUT, kind) for kind in (*KINDS, "vllm")}
SEVERAL = ["estimate", "--model", "m:1", "--input", "in.jsonl", "--output", "out.json",
           "--requests", "40", "--no-preflight", "--engine", "ollama,llamacpp"]  # fmt: skip


@pytest.fixture
def slurm_of_engines(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    """A Slurm that numbers its jobs, and an image for each engine."""
    make_sif(place / "aiflux.sif", version="1", engine="ollama", engine_version="1")
    for kind in ("llamacpp", "vllm"):
        make_sif(place / f"aiflux-{kind}.sif", version="1", engine=kind, engine_version="1")
    fakes = waiting_slurm(tmp_path / "bin", monkeypatch)
    fakes.add("sbatch", "echo $((100 + number))\n")
    rows = [f"{job}|N/A|PENDING|N/A|0:00||Priority\n" for job in (100, 101, 102)]
    fakes.say("squeue", "".join(rows))
    return fakes


def test_several_engines_are_submitted_together_and_compared_on_one_sample(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SEVERAL) == 0
    printed = capsys.readouterr().out
    assert "ollama: the pilot is waiting (job 100): 0 of 40 requests finished" in printed
    assert "llamacpp: the pilot is waiting (job 101): 0 of 40 requests finished" in printed
    scripts = {k: (pilot.run.path / "run.sbatch").read_text() for k, pilot in BY_ENGINE.items()
               if k in KINDS}  # fmt: skip
    assert "/aiflux.sif" in scripts["ollama"]
    assert "/aiflux-llamacpp.sif" in scripts["llamacpp"]
    inputs = {BY_ENGINE[kind].input.read_bytes() for kind in KINDS}
    assert len(inputs) == 1, "every engine has the same requests"

    do_the_pilot(3.0, pilot=BY_ENGINE["ollama"])
    assert main(SEVERAL) == 0
    printed = capsys.readouterr().out
    assert "ollama: the pilot has ended" in printed
    assert "llamacpp: the pilot is waiting (job 101)" in printed
    assert "tokens/s" not in printed

    do_the_pilot(1.0, pilot=BY_ENGINE["llamacpp"])
    assert main(SEVERAL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(slurm_of_engines.calls("sbatch")) == 2
    assert lines[0] == "pilot: the same 40 of 300 requests"
    assert "                    ollama              llamacpp" in lines
    assert any(line.startswith("answer tokens/s     66.7 ") for line in lines)
    assert "Clearly the lowest GPU-hours: llamacpp." in lines
    assert "recommended: llamacpp, one job of 00:05:00" in lines
    assert lines[-1].startswith("  aiflux run --input in.jsonl --output out.json --model m:1 ")
    assert " --engine llamacpp " in lines[-1]
    assert max(map(len, lines[:-1])) <= 80

    assert not PILOT.folder.exists(), "the pilot of a single engine is another one"
    assert main([*SEVERAL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["engine"] for each in found["estimates"]] == [*KINDS]
    for each in found["estimates"]:
        assert each["estimate"] == json.loads(BY_ENGINE[each["engine"]].estimate.read_text())
        rate = each["tokens_per_second"]
        assert rate["low"] < rate["value"] < rate["high"]
    assert found["recommendation"]["engine"] == "llamacpp"
    assert found["recommendation"]["command"] == lines[-1].strip()


def test_engines_that_are_about_equally_fast_are_not_decided(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SEVERAL) == 0
    do_the_pilot(3.0, pilot=BY_ENGINE["ollama"])
    do_the_pilot(2.9, pilot=BY_ENGINE["llamacpp"])
    capsys.readouterr()
    assert main(SEVERAL) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "does not decide: the intervals of llamacpp and ollama overlap (GPU-hours)" in printed
    assert "recommended" not in printed
    assert "full run with llamacpp" in printed


def test_an_engine_that_fails_its_requests_quickly_is_not_recommended(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SEVERAL) == 0
    do_the_pilot(3.0, pilot=BY_ENGINE["ollama"])
    do_the_pilot(0.1, pilot=BY_ENGINE["llamacpp"], failed=40)
    capsys.readouterr()
    assert main(SEVERAL) == 0
    printed = capsys.readouterr().out
    assert "llamacpp clearly fails more requests." in printed
    assert "recommended: ollama" in printed


def test_one_pilot_that_failed_leaves_the_others_and_its_reason(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(Path("in.jsonl"), 300, body={"messages": [{"role": "user", "content": "x"}]})
    several = [*SEVERAL[:-1], "ollama,llamacpp,vllm=hf:org/name"]
    assert main(several) == 0
    do_the_pilot(3.0, pilot=BY_ENGINE["ollama"])
    do_the_pilot(1.0, pilot=BY_ENGINE["llamacpp"])
    fail_the_pilot(slurm_of_engines, BY_ENGINE["vllm"], 102, "no space for the KV cache")
    capsys.readouterr()
    assert main(several) == 4
    printed = capsys.readouterr().out
    assert "recommended: llamacpp" in printed
    assert "vllm: the pilot has failed with 0 of 40 requests finished: no space for" in printed
    assert "aiflux logs out.json.pilot-vllm/results.json" in printed
    assert main([*several, "--wait", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)["estimates"]
    assert [each["estimate"] is None for each in found] == [False, False, True]
    assert "no space for the KV cache" in found[2]["error"]


def test_with_one_estimate_left_nothing_is_recommended(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SEVERAL) == 0
    do_the_pilot(pilot=BY_ENGINE["ollama"])
    fail_the_pilot(slurm_of_engines, BY_ENGINE["llamacpp"], 101, "the model does not fit")
    capsys.readouterr()
    assert main(SEVERAL) == 4
    printed = capsys.readouterr().out
    assert "full run with ollama, one job of " in printed
    assert "recommended" not in printed


def test_the_shards_and_the_run_use_the_estimate_of_its_engine(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SEVERAL) == 0
    do_the_pilot(60.0, pilot=BY_ENGINE["ollama"])
    do_the_pilot(20.0, pilot=BY_ENGINE["llamacpp"])
    assert main(SEVERAL) == 0
    slurm_of_engines.say("squeue")
    whole = ["run", *SEVERAL[1:7], "--no-preflight", "--shards", "auto", "--time", "00:20:00"]
    for kind, shards in (("ollama", 6), ("llamacpp", 2)):
        capsys.readouterr()
        assert main([*whole, "--engine", kind, "--dry-run", "--json"]) == 0
        assert len(_plan(capsys)["shards"]) == shards
    assert main([*whole, "--engine", "llamacpp"]) == 0
    carried = RunDirectory.of_output(OUTPUT).estimate
    assert carried.read_bytes() == BY_ENGINE["llamacpp"].estimate.read_bytes()
    slurm_of_engines.say("squeue")
    assert main(SEVERAL) == 0
    kept = json.loads(carried.read_text())
    assert kept["plan"] == json.loads(BY_ENGINE["llamacpp"].estimate.read_text())["plan"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--engine", "ollama,llamacp"], "unknown engine 'llamacp'"),
        (["--engine", "ollama,"], "unknown engine ''"),
        (["--engine", "ollama,ollama=m:2"], "ollama is given twice"),
        (["--engine", "ollama", "--engine", "ollama"], "ollama is given twice"),
        (["--engine", "ollama=m:1,b"], "if a path has a comma, give --engine for each engine"),
        (["--engine", "vllm=/a,b", "--engine", "ollama"], 'the run\'s model is "/a,b"'),
        (["--engine", "ollama,vllm="], "no model after 'vllm='"),
        (["--engine", "ollama,external"], "unknown engine 'external'"),
        (["--engine", "ollama,vllm"], "vllm: 'm:1' is not a model of Hugging Face"),
        (["--engine", "ollama,vllm=hf:a/b"], "vllm: 300 lines are wrong"),
        (["--engine", "llamacpp,ollama=m 1"], "ollama: "),
        (["--engine-url", "http://127.0.0.1:9"], "engine and engine_url are both given"),
        (["--engine-command", "serve {port}"], "engine and engine_command are both given"),
        (["--image", "aiflux-nothing.sif"], "ollama: image not found"),
        (["--engine", "llamacpp,ollama", "--engine-arg", "swa-full"], "ollama: "),
    ],
)
def test_what_an_engine_cannot_take_is_refused_before_anything_is_submitted(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    several = SEVERAL[:-2] if "--engine" in more else SEVERAL
    assert main([*several, *more]) == 2
    assert words in capsys.readouterr().err
    assert not slurm_of_engines.calls("sbatch")


def test_a_missing_image_of_one_engine_is_refused_before_the_other_is_submitted(
    slurm_of_engines: FakeCommands, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "aiflux-llamacpp.sif").unlink()
    (place / "aiflux.sif").rename(place / "of-ollama.sif")
    (place / "aiflux.sif").mkdir()  # found for neither
    assert main(SEVERAL) == 2
    assert "ollama: no image aiflux.sif" in capsys.readouterr().err
    assert not slurm_of_engines.calls("sbatch")


def test_an_engine_with_its_model_alone_is_estimated_as_ever(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SEVERAL[:1], *SEVERAL[3:-1], "llamacpp=m:1"]) == 0
    plan = read_plan(PILOT.run)
    assert (plan.options.engine, plan.models) == ("llamacpp", ("m:1",))


def test_engines_can_be_given_one_by_one(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SEVERAL[:-1], "ollama", "--engine", "llamacpp"]) == 0
    assert len(slurm_of_engines.calls("sbatch")) == 2
    inputs = {BY_ENGINE[kind].input.read_bytes() for kind in KINDS}
    assert len(inputs) == 1
    capsys.readouterr()
    assert main(SEVERAL) == 0
    assert "job 101" in capsys.readouterr().out
    assert len(slurm_of_engines.calls("sbatch")) == 2, "it is the same comparison"


def test_pilots_whose_requests_differ_are_not_compared(
    slurm_of_engines: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SEVERAL) == 0
    with open(BY_ENGINE["llamacpp"].input, "a", encoding="utf-8") as sample:
        sample.write(request_line("one more") + "\n")
    assert main(SEVERAL) == 2
    assert "the pilots have different requests" in capsys.readouterr().err


# --- several engines on this machine ---------------------------------------------------------

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def programs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Ollama and llama-server on PATH, which note when they start and end."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, fake in (("ollama", "fake_ollama"), ("llama-server", "fake_llama_server")):
        write_program(
            folder / name,
            f"#!/bin/bash\necho start {name} >>{folder}/notes\n"
            f'{sys.executable} {TOOLS}/{fake}.py "$@" & child=$!\n'
            f"trap 'kill $child; wait $child; echo end {name} >>{folder}/notes; exit' TERM INT\n"
            "wait $child\n",
        )
    put_model(place / "models", "m:1", make_tiny_gguf.tiny())
    monkeypatch.setenv("AIFLUX_MODELS_DIR", str(place / "models"))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


LOCALLY = [*SEVERAL[:-3], *SEVERAL[-2:], "--local", "--slots", "2", "--context-length", "512"]


def test_locally_one_engine_follows_the_other(programs: Path) -> None:
    found = json.loads(aiflux(*LOCALLY, "--json"))
    assert [each["estimate"]["pilot"] for each in found["estimates"]] == [40, 40]
    notes = (programs / "notes").read_text().splitlines()
    assert notes == ["start ollama", "end ollama", "start llama-server", "end llama-server"]
    printed = aiflux(*LOCALLY)
    assert len((programs / "notes").read_text().splitlines()) == 4, "nothing was run again"
    assert " --engine " in printed.splitlines()[-1]
    assert printed.splitlines()[-1].endswith(" --local")


def test_locally_an_engine_that_does_not_start_leaves_the_other(programs: Path) -> None:
    write_program(programs / "ollama", "#!/bin/bash\nexit 1\n")
    found = json.loads(aiflux(*LOCALLY, "--json", code=4))
    assert "ollama" in found["estimates"][0]["error"]
    assert found["estimates"][1]["estimate"]["pilot"] == 40
    assert found["recommendation"] is None


def test_locally_an_engine_that_cannot_start_is_refused_before_the_first_pilot(
    programs: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (programs / "llama-server").unlink()
    assert main(LOCALLY) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: llamacpp: ")
    assert "there is no llama-server on PATH either" in printed
    assert "or install llama.cpp, and name its program in AIFLUX_ENGINE_PROGRAM" in printed
    assert not (programs / "notes").exists()
    assert not BY_ENGINE["ollama"].folder.exists()


def test_one_program_for_several_engines_is_refused(
    programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(programs / "ollama"))
    assert main(LOCALLY) == 2
    assert "names one program, but several engines are compared" in capsys.readouterr().err


def test_a_signal_ends_all_pilots_and_not_only_the_one_that_runs(programs: Path) -> None:
    (programs / "ollama").write_text(f"#!/bin/bash\necho start >>{programs}/notes\nexec sleep 60\n")
    program = Path(sys.executable).with_name("aiflux")
    process = subprocess.Popen([program, *LOCALLY], stderr=subprocess.PIPE, text=True)
    while not (programs / "notes").exists():
        time.sleep(0.02)
    process.terminate()
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 5, printed
    assert (programs / "notes").read_text() == "start\n", "llama-server was not started"


def test_energy_co2_and_billing_units_follow_from_the_pilot(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["--co2-per-kwh", "400", "--billing-per-gpu-hour", "20"]
    assert main([*SLURM, *rates]) == 0
    do_the_pilot(energy=EnergyUse(20_000, 50, 0))  # 400 W
    capsys.readouterr()
    assert main([*SLURM, *rates]) == 0
    printed = capsys.readouterr().out
    names = ("energy of the GPUs", "J per 1,000 answers", "CO2 in grams", "billing units")
    for name in names:
        assert sum(line.startswith(name) for line in printed.splitlines()) == 1, printed
    assert "--co2" not in printed, "the full run has no such option"
    assert "--billing" not in printed
    assert main([*SLURM, *rates, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["estimate"]
    assert found["gpu_watts"] == 400
    hours, costs = found["gpu_hours"]["value"], found["costs"]
    assert costs["gpu_kwh"]["value"] == pytest.approx(0.4 * hours)
    assert costs["co2_grams"]["value"] == pytest.approx(160 * hours)
    assert costs["billing_units"]["value"] == pytest.approx(20 * hours)


def test_without_measured_energy_an_estimate_does_not_name_it(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SLURM) == 0
    do_the_pilot()
    capsys.readouterr()
    assert main(SLURM) == 0
    printed = capsys.readouterr().out
    assert "GPU-hours" in printed
    assert "energy" not in printed
    assert "CO2" not in printed

"""``--json``: stdout holds one JSON value, errors stay on stderr, exit codes are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import Status
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.command_line import leaves, option_names
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.helpers import request_line, write_input
from tests.unit.made_runs import MadeRun

# What a script has no use for as JSON: it prints text that is meant to be kept, or only acts.
_TEXT = {
    "logs", "completion", "examples", "config init", "image build", "image sign", "bundle create",
    "bundle install", "help", "models pull", "models export", "models import", "models remove",
    "connect", "gateway",
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(awkward: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(awkward)
    lines = [
        request_line(f"r{n}", body={"messages": [{"role": "user", "content": text}]})
        for n, text in enumerate(("a", "b 400", "c"))
    ]
    (awkward / "in.jsonl").write_text("\n".join(lines))
    return awkward


def printed_json(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> Any:
    """Return what a command prints with ``--json``."""
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_what_a_script_might_read_is_there_as_json() -> None:
    without = {
        ctx.command_path.removeprefix("aiflux ")
        for ctx in leaves()
        if "--json" not in option_names(ctx.command)
    }
    assert without == _TEXT


@pytest.mark.parametrize(("allowed", "code"), [("1", 0), ("0", 3)])
def test_a_run_here(allowed: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyEngine() as engine:
        words = ["run", "--model", "m:1", "--input", "in.jsonl", "--output", "o.json",
                 "--engine-url", engine.url, "--max-failures", allowed]  # fmt: skip
        run = printed_json(capsys, code, *words)
        again = printed_json(capsys, code, *words)
    assert (run["state"], run["completed"], run["failed"]) == ("finished with failures", 2, 1)
    assert (run["exit_code"], again["exit_code"]) == (code, code)
    assert run.keys() == again.keys()
    assert printed_json(capsys, 0, "merge", "o.json", "--partial")["written"] == 3
    assert printed_json(capsys, code, "merge", "o.json", "--again")["output"] == run["output"]
    assert printed_json(capsys, code, "watch", "o.json")["failed"] == 1
    shown = printed_json(capsys, 0, "results", "show", "o.json", "--failed")
    assert [(entry["custom_id"], entry["prompt"]) for entry in shown] == [("r1", "b 400")]
    assert shown[0]["error"]["code"] == "http_400"
    assert printed_json(capsys, 0, "results", "to-csv", "o.json")["rows"] == 3


def test_a_run_that_finds_no_engine_tells_how_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "m:1", "--input", "in.jsonl", "--output", "o.json", "--engine-wait", "1"]
    assert main(["run", *words, "--engine-url", "http://127.0.0.1:1", "--json"]) == 4
    out, err = capsys.readouterr()
    run = json.loads(out)
    assert (run["state"], run["exit_code"]) == ("failed", 4)
    waiting = "does not respond yet: http://127.0.0.1:1 does not accept connections"
    assert err.count(f"{waiting} (Connection refused); waiting up to 1 s (--engine-wait)") == 1


def test_where_nothing_was_begun_there_is_nothing_on_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", "m:1", "--input", "nowhere.jsonl", "--output", "o.json"]
    assert main(["run", *words, "--engine-url", "http://127.0.0.1:1", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")


@pytest.fixture
def slurm(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    make_sif(place / "i.sif", version="1")
    return waiting_slurm(tmp_path / "bin", monkeypatch)


@pytest.mark.usefixtures("slurm")
def test_a_submitted_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--model", "m:1", "--input", "in.jsonl", "--output", "o.json",
             "--no-preflight", "--image", "i.sif"]  # fmt: skip
    dry = printed_json(capsys, 0, *words, "--dry-run")
    assert dry["plan"]["models"] == ["m:1"]
    assert dry["scripts"][0].startswith("#!")
    assert not Path("o.json.aiflux").exists()
    run = printed_json(capsys, 0, *words)
    assert (run["jobs"], run["state"], run["exit_code"]) == (["100"], "waiting", None)
    assert Path(run["run_dir"]).is_dir()
    gone = printed_json(capsys, 0, "cancel", "100")
    assert (gone["cancelled"], gone["output"]) == (["100"], run["output"])
    assert main(["resume", "100", "--json"]) == 2, "all of it waits"
    assert capsys.readouterr().out == ""


def test_a_resumed_run(slurm: FakeCommands, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--model", "m:1", "--input", "in.jsonl", "--output", "o.json",
             "--no-preflight", "--image", "i.sif"]  # fmt: skip
    printed_json(capsys, 0, *words)
    slurm.say("sbatch", "101\n")
    slurm.say("squeue", "101|N/A|PENDING|N/A|0:00||Priority\n")
    assert printed_json(capsys, 0, "resume", "o.json")["jobs"][-1] == "101"


def test_a_resumed_run_names_the_requests_that_are_left(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(Path("many.jsonl"), 10)
    words = ["run", "--model", "m:1", "--input", "many.jsonl", "--output", "o.json",
             "--no-preflight", "--image", "i.sif", "--shards", "2"]  # fmt: skip
    assert main(words) == 0
    assert "submitted job 100: 10 requests in 2 of 2 shards" in capsys.readouterr().out
    run = RunDirectory.of_output(Path("o.json"))
    Status(run.status(0), read_plan(run), 0, completed=5).enter("completed")
    Status(run.status(1), read_plan(run), 1, completed=1, failed=1).enter("cancelled")
    slurm.say("squeue")
    slurm.say("sbatch", "101\n")
    assert main(["resume", "o.json"]) == 0
    assert "submitted job 101: 3 of 10 requests in 1 of 2 shards" in capsys.readouterr().out
    write_input(Path("many.jsonl"), 9)
    assert main(["resume", "o.json"]) == 2
    assert "many.jsonl is shorter than when the run was planned" in capsys.readouterr().err
    assert len(slurm.calls("sbatch")) == 2


def test_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    good = printed_json(capsys, 0, "check", "in.jsonl", "--model", "m:1")
    assert (good["requests"], good["problems"]) == (3, [])
    bad = printed_json(capsys, 2, "check", "in.jsonl")
    assert len(bad["problems"]) == 2
    assert bad["problems"][1].startswith("lines 1-3: ")
    assert main(["check", "in.jsonl"]) == 2
    assert "nothing was sent" not in capsys.readouterr().err, "a check sends nothing anyway"


def test_a_check_has_the_model_that_the_run_would_have(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "aiflux.yaml").write_text("run:\n  model: m:1\n")
    assert main(["check", "in.jsonl"]) == 0
    assert "models:    m:1 (the run's" in capsys.readouterr().out


def test_a_run_with_other_defaults_is_detected(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--model", "llama3.2:3b", "--input", "in.jsonl", "--output", "o.json"]
    with FaultyEngine() as engine:
        assert main([*words, "--engine-url", engine.url, "--max-failures", "1"]) == 0
    make_sif(place / "i.sif", version="1")
    capsys.readouterr()
    assert main([*words, "--image", "i.sif", "--no-preflight"]) == 2
    begun, _, asked = capsys.readouterr().err.splitlines()[0].partition("; this run has ")
    assert begun.endswith(
        "started with engine external, model llama3.2:3b, else the engine's defaults"
    )
    assert asked.startswith("engine ollama, model llama3.2:3b, model defaults ")


def test_a_conversion(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "in.csv").write_text("text\na\nb\n")
    words = ["convert", "csv", "--input", "in.csv", "--template", "{text}"]
    trial = printed_json(capsys, 0, *words, "--dry-run")
    assert [request["custom_id"] for request in trial["first"]] == ["row-1", "row-2"]
    done = printed_json(capsys, 0, *words, "--output", "out.jsonl")
    assert (done["rows"], done["requests"], done["skipped"]) == (2, 2, 0)
    assert main([*words, "--output", "-", "--json"]) == 2
    assert "cannot be combined" in capsys.readouterr().err


def test_forgotten_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MadeRun(tmp_path / "run")
    assert printed_json(capsys, 0, "jobs", "--prune") == []


def test_no_object_depends_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list", "--json"]) == 0
    assert re.search(r"[\x1b\r]", capsys.readouterr().out) is None

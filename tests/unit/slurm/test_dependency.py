"""Runs that wait for others, and commands that wait for runs."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.cli.start import execute_then
from aiflux.core.config.config import SlurmConfig
from aiflux.core.runs.directory import RunDirectory
from aiflux.errors import ConfigError, RunConflictError, SlurmError, UsageError
from aiflux.slurm import SlurmRunner
from aiflux.slurm.monitor import gather, jobs_to_wait_for
from aiflux.slurm.script import JobScript, render_then
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import request_line, write_input
from tests.unit.made_runs import MadeRun

COUNTING = 'echo $((100 + $(ls -d "$here"/calls/sbatch-* | wc -l)))\n'


@pytest.fixture
def slurm(tmp_path: Path, awkward: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    """A Slurm with arrays of 8 tasks, whose first job is 101; and a place to be in."""
    fakes = FakeCommands(tmp_path / "bin")
    fakes.add("sbatch", COUNTING)
    fakes.say("scontrol", "MaxArraySize            = 8\n")
    for silent in ("squeue", "sacct"):
        fakes.say(silent)
    monkeypatch.setenv("PATH", fakes.path)
    monkeypatch.chdir(awkward)
    write_input(awkward / "in.jsonl", 40)
    make_sif(awkward / "aiflux.sif", version="1", cpu_only="no")
    return fakes


def waits(slurm: FakeCommands) -> list[list[str]]:
    """Return the options of each sbatch that concern dependencies."""
    return [[word for word in call.argv if "dep" in word and word.startswith("--")]
            for call in slurm.calls("sbatch")]  # fmt: skip


def run(*more: str) -> int:
    common = ["run", "in.jsonl", "-o", "out.json", "--model", "m:1", "--no-preflight"]
    return main([*common, *more])


def states(job: str, *tasks: tuple[str, str]) -> str:
    return "".join(f"{job}|{task}|{state}|N/A|0:00||None\n" for task, state in tasks)


def test_each_array_of_a_run_waits_for_every_job(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.say("squeue", "".join(states(job, ("N/A", "RUNNING")) for job in "789"))
    more = ["--shards", "20", "--after", "7", "--after", "8:9"]
    assert run(*more, "--max-running", "2", "--sbatch-arg", "dependency=singleton") == 0
    kill = "--kill-on-invalid-dep=yes"
    assert waits(slurm) == [
        ["--dependency=singleton,afterok:7:8:9", kill],
        ["--dependency=singleton,afterok:7:8:9,afterany:101", kill],
        ["--dependency=singleton,afterok:7:8:9,afterany:102", kill],
    ]
    printed = capsys.readouterr().out
    assert printed.startswith("submitted jobs 101:102:103: 40 requests in 20 of 20 shards")
    assert "  starts once these jobs have succeeded: 7:8:9\n" in printed


def test_a_run_waits_for_all_arrays_of_another(slurm: FakeCommands, awkward: Path) -> None:
    first = SlurmRunner(workspace=awkward).run("in.jsonl", "a.json", shards=20, preflight=False)
    assert first == "101:102:103"
    pending = "".join(states(job, ("[0-7]", "PENDING")) for job in ("101", "102", "103"))
    slurm.say("squeue", pending)
    view = gather(RunDirectory.of_output(awkward / "a.json"))
    assert view.to_json()["dependency"] == f"afterok:{first}"
    for number, name in enumerate(("a.json", "a.json.aiflux", "102", first, "101:102")):
        output = f"b{number}.json"
        SlurmRunner(workspace=awkward).run("in.jsonl", output, after=[name], preflight=False)
        assert waits(slurm)[-1][0] == f"--dependency=afterok:{first}", name


def test_only_jobs_that_can_complete_a_run_are_waited_for(
    slurm: FakeCommands, tmp_path: Path
) -> None:
    made = MadeRun(tmp_path / "r", 2)
    made.submit("100")
    made.status(0, "completed", 100)
    made.submit("105", first=1)
    slurm.say("squeue", states("105", ("0", "RUNNING")))
    (job,) = jobs_to_wait_for(str(made.output))
    assert job.number == "105"
    slurm.say("squeue")
    with pytest.raises(RunConflictError, match="no job in the queue will complete it") as caught:
        jobs_to_wait_for(str(made.output))
    assert caught.value.remedy is not None
    assert "aiflux resume" in caught.value.remedy


def test_a_failed_shard_is_found_although_others_still_run(
    slurm: FakeCommands, tmp_path: Path
) -> None:
    made = MadeRun(tmp_path / "r", 2)
    made.submit("100")
    made.status(0, "failed", 10, exit_code=4)
    slurm.say("squeue", states("100", ("0", "FAILED"), ("1", "RUNNING")))
    with pytest.raises(RunConflictError, match="no job in the queue"):
        jobs_to_wait_for(str(made.output))


def test_a_finished_run_is_waited_for_only_if_it_failed(
    slurm: FakeCommands, tmp_path: Path
) -> None:
    made = MadeRun(tmp_path / "r")
    made.submit("100")
    made.status(0, "completed", 100)
    made.whole("completed", 100)
    assert jobs_to_wait_for(str(made.output)) == ()
    assert gather(made.run).dependency == ""
    made.whole("completed", 90, 10)
    with pytest.raises(RunConflictError, match="finished with failures"):
        jobs_to_wait_for(str(made.output))


def test_what_names_neither_a_run_nor_a_job_is_refused(slurm: FakeCommands) -> None:
    with pytest.raises(UsageError, match=r"no run found at 'nothing\.json'"):
        jobs_to_wait_for("nothing.json")
    with pytest.raises(UsageError, match="no run found for Slurm job 7_1"):
        jobs_to_wait_for("7_1")
    assert run("--after", "nothing.json", "--dry-run") == 2


def test_a_job_that_slurm_does_not_know_is_refused(
    slurm: FakeCommands, awkward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.say("squeue", states("7", ("N/A", "RUNNING")))
    assert run("--after", "7:999999") == 2
    assert "Slurm does not know the job 999999" in capsys.readouterr().err
    with pytest.raises(UsageError, match="999999"):
        SlurmRunner(workspace=awkward).run("in.jsonl", "b.json", after=["999999"])
    assert slurm.calls("sbatch") == []
    assert run("--after", "7") == 0
    assert "warning" not in capsys.readouterr().err


def test_without_accounting_an_unknown_job_may_have_ended(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.say("sacct", stderr="Slurm accounting storage is disabled", status=1)
    assert run("--after", "999999") == 0
    error = capsys.readouterr().err
    assert "warning: Slurm does not know the job 999999" in error
    assert "the run then starts at once" in error


@pytest.mark.parametrize(
    "words",
    [
        ["--after", "7", "--local"],
        ["--after", "7", "--engine-url", "http://127.0.0.1:1"],
        ["--after", "7", "--pilot", "20"],
        ["--then", "true", "--pilot", "20"],
    ],
)
def test_options_without_effect_are_refused(
    slurm: FakeCommands, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert words[0] in capsys.readouterr().err
    assert slurm.calls("sbatch") == []


def test_a_command_waits_in_a_small_job(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str], awkward: Path
) -> None:
    more = ["--shards", "20", "--partition", "gpu", "--gres", "gpu:2", "--mem", "64G"]
    extras = ["comment=mine", "mem-per-gpu=8G", "exclusive=", "core-spec=1", "gpu-bind=closest"]
    for extra in extras:
        more += ["--sbatch-arg", extra]
    assert run(*more, "--then", "wc -l 'a b'") == 0
    call = slurm.calls("sbatch")[-1]
    script = awkward / "out.json.aiflux" / "then.sbatch"
    assert call.argv[1:] == ["--dependency=afterany:101:102:103", "--", str(script)]
    text = script.read_text(encoding="utf-8")
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [line.removeprefix("#SBATCH --") for line in directives if "--output" not in line] == [
        "job-name=aiflux-out-then", "partition=gpu", "ntasks=1", "cpus-per-task=1",
        "time=04:00:00", "no-requeue", "comment=mine",
    ]  # fmt: skip
    assert "  job 104 then executes the command; its log: " in capsys.readouterr().out


def test_a_refused_command_leaves_the_run_and_says_how_to_submit_it(
    slurm: FakeCommands, awkward: Path
) -> None:
    slurm.add("sbatch", f"[[ $* != *then.sbatch ]] || {{ echo no GPU >&2; exit 1; }}\n{COUNTING}")
    runner = SlurmRunner(workspace=awkward)
    with pytest.raises(SlurmError, match="the run is submitted \\(101\\), but not the job of") as e:
        runner.run("in.jsonl", "out.json", then="true", preflight=False)
    script = awkward / "out.json.aiflux" / "then.sbatch"
    command = f"sbatch --dependency=afterany:101 {shlex.quote(str(script))}"
    assert e.value.remedy == f"correct the script and submit it: {command}"


@pytest.mark.parametrize("command", ["a\nb", "a\n", "a\r", "", "  "])
def test_a_command_that_cannot_be_in_a_script_is_refused_at_once(
    slurm: FakeCommands, awkward: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--dry-run"], ["--local"]):
        assert run("--then", command, *more) == 2
        assert "--then" in capsys.readouterr().err
    assert main(["resume", "out.json", "--then", command]) == 2
    assert "--then" in capsys.readouterr().err
    if command:
        with pytest.raises(ConfigError, match="--then"):
            SlurmRunner(workspace=awkward).run("in.jsonl", "out.json", then=command)
    assert slurm.calls("sbatch") == []
    assert not Path("out.json.aiflux").exists()


def test_a_command_is_added_to_a_run_whose_jobs_wait(
    slurm: FakeCommands, awkward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    slurm.say("squeue", states("101", ("N/A", "PENDING")))
    capsys.readouterr()
    assert run("--then", "true") == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "aiflux resume" in line]
    words = shlex.split(line[line.index("aiflux resume") :])[1:]
    assert main(words) == 0
    assert "job 102 then executes the command" in capsys.readouterr().out
    script = awkward / "out.json.aiflux" / "then.sbatch"
    then = slurm.calls("sbatch")[-1]
    assert then.argv[1:] == ["--dependency=afterany:101", "--", str(script)]
    # Slurm lists the jobs of the user with their scripts, or these jobs with their states.
    listed = f"101|x\n102|{script}\n"
    waiting = states("101", ("N/A", "PENDING")) + states("102", ("N/A", "PENDING"))
    slurm.add("squeue", f"case $* in *%o*) printf %s {shlex.quote(listed)} ;;"
                        f" *) printf %s {shlex.quote(waiting)} ;; esac\n")  # fmt: skip
    assert main(words) == 2
    assert "job 102 already waits for the run" in capsys.readouterr().err
    assert len(slurm.calls("sbatch")) == 2


def test_a_finished_run_says_that_the_command_was_not_executed(
    slurm: FakeCommands, awkward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(awkward / "r")
    made.submit()
    made.status(0, "completed", 100)
    made.whole("completed", 100)
    words = ["resume", str(made.output), "--image", "aiflux.sif"]
    assert main([*words, "--then", "touch 'a b'"]) == 0
    error = capsys.readouterr().err
    assert "the command of --then was not executed" in error
    assert """bash -c 'touch '"'"'a b'"'"''""" in error
    assert slurm.calls("sbatch") == []


def executed(made: MadeRun, command: str, environ: dict[str, str]) -> tuple[int, str, str]:
    """Execute the script of the job after a run; return its exit code and what it prints."""
    job = JobScript(
        name="n", slurm=SlurmConfig(), image=None, input=made.folder, output_dir=made.folder,
        models_dir=None, run_dir=made.run.path, log=made.folder,
    )  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", render_then(job, command)],
        env=environ, cwd=made.folder, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("state", "failed", "details", "code"),
    [
        ("completed", 0, {}, 0),
        ("completed", 1, {}, 3),
        ("failed", 0, {"exit_code": 4}, 4),
        ("cancelled", 0, {"exit_code": 5}, 5),
    ],
)
def test_the_command_gets_the_exit_code_of_the_run(
    slurm: FakeCommands, awkward: Path, state: str, failed: int, details: dict[str, int], code: int
) -> None:
    made = MadeRun(awkward / "r")
    made.submit()
    made.status(0, state, 100 - failed, failed, age=600, **details)
    if state == "completed":
        made.whole("completed", 100 - failed, failed)
    command = """printf '<%s>' "$AIFLUX_EXIT_CODE" 'a "b"' "$PWD" > 'the file'; exit 7"""
    ended, _, err = executed(made, command, dict(os.environ))
    file = made.folder / "the file"
    if code == 5:
        assert ended == 5
        assert "the run was stopped and can resume (exit code 5): --then was not executed" in err
        assert not file.exists()
    else:
        assert ended == 7
        assert file.read_text() == f"""<{code}><a "b"><{made.folder}>"""


def test_a_node_without_the_package_says_so(slurm: FakeCommands, awkward: Path) -> None:
    made = MadeRun(awkward / "r")
    environ = {**os.environ, "PYTHONHOME": "/nowhere", "HOSTNAME": "n1"}
    code, _, err = executed(made, "touch here", environ)
    assert code == 2
    assert "AI-Flux cannot run on n1: install it where every node sees it" in err
    assert not (made.folder / "here").exists()


@pytest.mark.parametrize(("prompt", "code"), [("a", 0), ("400", 3), ("403", 4)])
def test_a_run_here_executes_the_command_when_it_has_ended(
    slurm: FakeCommands, prompt: str, code: int, capfd: pytest.CaptureFixture[str], awkward: Path
) -> None:
    body = {"messages": [{"role": "user", "content": prompt}]}
    (awkward / "in.jsonl").write_text(request_line("a", body=body))
    with FaultyEngine() as engine:
        words = ["--engine-url", engine.url, "--then", 'echo "code $AIFLUX_EXIT_CODE"; exit 9']
        assert run(*words) == (code or 9)
        assert f"code {code}\n" in capfd.readouterr().out
        if code != 4:
            assert run(*words) == code, "nothing was left to do"
            printed = capfd.readouterr()
            assert "code" not in printed.out
            assert "the command of --then was not executed" in printed.err


@pytest.mark.parametrize("code", [2, 5])
def test_work_that_was_stopped_or_refused_executes_no_command(awkward: Path, code: int) -> None:
    file = awkward / "here"
    command = f"touch {shlex.quote(str(file))}"
    assert execute_then(command, lambda: code) == code
    assert not file.exists()
    assert execute_then(command, lambda: 0) == 0
    assert file.exists()


@pytest.mark.parametrize(("command", "code"), [("exit 9", 9), ("kill -9 $$", 137), ("true", 0)])
def test_the_exit_code_of_a_command_in_the_foreground_is_shown(
    command: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert execute_then(command, lambda: 0) == code
    error = capfd.readouterr().err
    assert error == (f"aiflux: the command of --then ended with {code}\n" if code else "")

"""``SlurmRunner``: planning and submitting from Python."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import Status, run_status
from aiflux.errors import (
    ConfigError,
    ImageError,
    InputError,
    OutputExistsError,
    PreflightError,
    RunConflictError,
    SlurmError,
    StorageError,
    describe,
)
from aiflux.slurm import SlurmRunner
from aiflux.slurm.jobs import JobState, read_submissions
from aiflux.slurm.submit import plan_job, plan_resume, submit_job
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import write_input


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fakes = FakeCommands(tmp_path / "bin")
    fakes.say("sbatch", "42\n")
    for silent in ("scontrol", "squeue", "sacct"):
        fakes.say(silent)
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


@pytest.fixture
def workspace(awkward: Path) -> Path:
    write_input(awkward / "in.jsonl", 3)
    make_sif(awkward / "aiflux.sif", version="1", cpu_only="no")
    return awkward


def finish(run: RunDirectory) -> None:
    """Write the files of a finished worker."""
    plan = read_plan(run)
    plan.output.write_text("[]", encoding="utf-8")
    run.journal(0).write_text("{}\n", encoding="utf-8")
    for shard in plan.shards:
        finish_shard(run, shard.index)
    whole = run_status(plan, run)
    whole.completed = plan.requests
    whole.enter("completed")


def finish_shard(run: RunDirectory, shard: int) -> None:
    """Write the files of a worker that finished a shard."""
    plan = read_plan(run)
    Status(run.status(shard), plan, shard, completed=plan.shards[shard].requests).enter("completed")


def submitted(run: RunDirectory) -> list[tuple[str, str | None, tuple[int, ...]]]:
    """Return the newest submission's jobs: id, array and shards."""
    records = read_submissions(run)
    jobs = records.submissions[-1].jobs if records else ()
    return [(job.job_id, job.array, job.shards) for job in jobs]


def test_a_run_is_planned_written_and_submitted(slurm: FakeCommands, workspace: Path) -> None:
    runner = SlurmRunner(workspace=workspace)
    job = runner.run("in.jsonl", "out.json", model="m:1", batch_size=8, temperature=0.5,
                     account="proj", time="00:30:00", models_dir="models")  # fmt: skip
    assert job == "42"
    run = RunDirectory.of_output(workspace / "out.json")
    script = run.script.read_text(encoding="utf-8")
    assert "#SBATCH --account=proj\n" in script
    assert "#SBATCH --time=00:30:00\n" in script
    assert slurm.calls("sbatch")[0].argv[-1] == str(run.script)
    plan = json.loads(run.plan.read_text(encoding="utf-8"))
    assert plan["options"]["concurrency"] == 8
    assert plan["options"]["temperature"] == 0.5
    assert plan["models_dir"] == str(workspace / "models")
    assert submitted(run) == [("42", None, (0,))]
    assert Path(json.loads(run.submissions.read_text())["submissions"][-1]["log"]) == run.logs


def test_the_default_output_is_in_the_workspace(slurm: FakeCommands, workspace: Path) -> None:
    assert SlurmRunner(workspace=workspace).run("in.jsonl") == "42"
    assert RunDirectory.of_output(workspace / "in.results.json").plan.is_file()


def test_the_settings_of_the_workspace_apply(slurm: FakeCommands, workspace: Path) -> None:
    (workspace / "aiflux.yaml").write_text("slurm: {account: from-yaml}\n")
    logs = workspace.parent / "logs"
    (workspace / ".env").write_text(f"TEMPERATURE=0.25\nAIFLUX_LOGS_DIR={logs}\n")
    SlurmRunner(workspace=workspace).run("in.jsonl", "out.json")
    run = RunDirectory.of_output(workspace / "out.json")
    assert "--account=from-yaml" in run.script.read_text(encoding="utf-8")
    assert json.loads(run.plan.read_text())["options"]["temperature"] == 0.25
    assert logs.is_dir()


def test_a_given_config_applies_and_options_override_it(
    slurm: FakeCommands, workspace: Path
) -> None:
    config = SlurmConfig(account="a", mem="8G", gpus_per_node="0")
    SlurmRunner(config, workspace).run("in.jsonl", "out.json", memory="16GB")
    script = RunDirectory.of_output(workspace / "out.json").script.read_text(encoding="utf-8")
    assert "--account=a" in script
    assert "--mem=16G" in script
    assert "--gpus-per-node" not in script
    assert config.mem == "8G"


def test_an_unknown_option_lists_the_known_ones(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="'temprature'") as caught:
        SlurmRunner(workspace=workspace).run("in.jsonl", temprature=1)
    assert "temperature" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": "hot"}, ConfigError),
        ({"time": "soon"}, ConfigError),
        ({"nodes": 2}, ConfigError),
        ({"sbatch_arg": {"array": "1-3"}}, ConfigError),
        ({"image": "no.sif"}, ImageError),
    ],
)
def test_an_invalid_call_leaves_no_files(
    slurm: FakeCommands, workspace: Path, options: dict[str, object], error: type[Exception]
) -> None:
    before = sorted(workspace.iterdir())
    with pytest.raises(error):
        SlurmRunner(workspace=workspace).run("in.jsonl", "out.json", **options)
    assert sorted(workspace.iterdir()) == before
    assert slurm.calls("sbatch") == []


def test_a_bad_input_is_refused_before_it_is_queued(slurm: FakeCommands, workspace: Path) -> None:
    (workspace / "in.jsonl").write_text("{}\n")
    with pytest.raises(InputError):
        SlurmRunner(workspace=workspace).run("in.jsonl", "out.json")
    assert slurm.calls("sbatch") == []


def test_all_problems_are_reported_at_once(slurm: FakeCommands, workspace: Path) -> None:
    (workspace / "in.jsonl").write_text("{}\n")
    (workspace / "aiflux.sif").unlink()
    with pytest.raises(PreflightError) as caught:
        SlurmRunner(workspace=workspace).run("in.jsonl", "out.json")
    text = describe(caught.value)
    assert "2 problems found" in text
    assert "1 line is wrong" in text
    assert "custom_id is missing" in text
    assert "aiflux.sif" in text
    assert slurm.calls("sbatch") == []
    with pytest.raises(ImageError):
        SlurmRunner(workspace=workspace).run("in.jsonl", "out.json", preflight=False)


def test_the_script_of_a_refused_job_is_kept(slurm: FakeCommands, workspace: Path) -> None:
    slurm.say("sbatch", stderr="sbatch: error: no\n", status=1)
    with pytest.raises(SlurmError, match=r"run\.sbatch: no"):
        SlurmRunner(workspace=workspace).run("in.jsonl", "out.json")
    run = RunDirectory.of_output(workspace / "out.json")
    assert run.script.is_file()
    assert submitted(run) == []


def test_a_run_whose_job_is_active_is_not_submitted_twice(
    slurm: FakeCommands, workspace: Path
) -> None:
    runner = SlurmRunner(workspace=workspace)
    runner.run("in.jsonl", "out.json")
    slurm.say("squeue", "42|N/A|PENDING|N/A|0:00||Priority\n")
    with pytest.raises(RunConflictError, match="job 42 of this run is already PENDING"):
        runner.run("in.jsonl", "out.json")
    slurm.say("squeue", "42|N/A|TIMEOUT|N/A|0:00||TimeLimit\n")
    slurm.say("sacct", "42|TIMEOUT|0:0|Unknown|00:00:01|n1\n")
    slurm.say("sbatch", "43\n")
    assert runner.run("in.jsonl", "out.json") == "43"


def test_the_copy_of_a_compressed_input_stays_while_a_job_waits(
    slurm: FakeCommands, workspace: Path
) -> None:
    source = workspace / "in.jsonl.gz"
    lines = (workspace / "in.jsonl").read_bytes()
    source.write_bytes(gzip.compress(lines))
    runner = SlurmRunner(workspace=workspace)
    runner.run(source, "out.json")
    slurm.say("squeue", "42|N/A|PENDING|N/A|0:00||Priority\n")
    source.write_bytes(gzip.compress(lines[: lines.index(b"\n") + 1]))
    for dry_run in (False, True):
        with pytest.raises(RunConflictError, match="job 42 of this run is already PENDING"):
            runner.run(source, "out.json", dry_run=dry_run)
    assert (workspace / "out.json.input.jsonl").read_bytes() == lines


def test_a_dry_run_touches_nothing(workspace: Path) -> None:
    before = sorted(workspace.iterdir())
    config = Config(directory=workspace)
    planned = plan_job(
        config,
        config.get_slurm_config(),
        workspace / "in.jsonl",
        workspace / "out.json",
        config.run_options(),
        cwd=workspace,
        write=False,
    )
    assert planned.opened.plan.requests == 3
    assert planned.script.startswith("#!/bin/bash\n#SBATCH ")
    assert sorted(workspace.iterdir()) == before


@pytest.mark.parametrize("url", ["https://h:1", None])
def test_certificates_for_an_engine_elsewhere_are_in_the_script(
    workspace: Path, url: str | None
) -> None:
    ca = workspace / "ca.pem"
    config = Config(directory=workspace)
    planned = plan_job(
        config,
        config.get_slurm_config(),
        workspace / "in.jsonl",
        workspace / "out.json",
        config.run_options(engine_url=url, engine_ca=ca),
        cwd=workspace,
        write=False,
    )
    assert f"\nengine_ca={shlex.quote(str(ca) if url else '')}\n" in planned.script


COMMAND = "vllm serve {model} --uds {socket}"


def test_a_run_with_a_server_of_its_own_needs_no_image(
    slurm: FakeCommands, workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (workspace / "aiflux.sif").unlink()
    runner = SlurmRunner(workspace=workspace)
    options = {"engine_command": COMMAND, "shards": 2}
    assert runner.run("in.jsonl", "out.json", **options) == "42"
    assert "vllm, which --engine-command starts, is not on this machine" in caplog.text
    run = RunDirectory.of_output(workspace / "out.json")
    records = read_submissions(run)
    assert records is not None
    assert records.image is None
    plan = read_plan(run)
    assert (plan.options.engine, plan.models_dir) == ("command", None)
    script = run.script.read_text(encoding="utf-8")
    assert "\nimage=''\n" in script
    assert " -m aiflux.worker)\n" in script
    assert "\nwant_seal=0\n" in script
    planned = plan_resume(run, {"time": "1:00:00"})
    assert (planned.image, "--time=1:00:00" in planned.script) == (None, True)
    with pytest.raises(ConfigError, match=r"aiflux\.sif would not be used"):
        plan_resume(run, {}, workspace / "aiflux.sif")


def test_modules_may_bring_the_server(slurm: FakeCommands, workspace: Path) -> None:
    config = Config(directory=workspace, arguments={"engine_command": COMMAND})
    where = (workspace / "in.jsonl", workspace / "out.json", config.run_options())
    for given, warnings in (({}, 1), ({"modules": ("vllm",)}, 0), ({"setup": ("true",)}, 0)):
        planned = plan_job(config, SlurmConfig(**given), *where, write=False)
        found = [each for each in planned.findings if "--engine-command" in each.what]
        assert [each.level for each in found] == ["warning"] * warnings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seal": True}, r"seal = true \(argument\), but a run with --engine-command cannot be"),
        ({"image": "aiflux.sif"}, "aiflux.sif would not be used"),
        ({"engine": "vllm"}, "engine and engine_command are both given"),
    ],
)
def test_what_cannot_be_had_without_an_image_is_refused(
    slurm: FakeCommands, workspace: Path, options: dict[str, Any], words: str
) -> None:
    runner = SlurmRunner(workspace=workspace)
    with pytest.raises(ConfigError, match=words):
        runner.run("in.jsonl", "out.json", engine_command=COMMAND, **options)
    assert slurm.calls("sbatch") == []


def test_a_finished_run_is_not_submitted_again(slurm: FakeCommands, workspace: Path) -> None:
    runner = SlurmRunner(workspace=workspace)
    runner.run("in.jsonl", "out.json")
    finish(RunDirectory.of_output(workspace / "out.json"))
    with pytest.raises(OutputExistsError, match="the run is finished"):
        runner.run("in.jsonl", "out.json")
    assert len(slurm.calls("sbatch")) == 1
    slurm.say("squeue", "42|N/A|COMPLETED|N/A|0:00||None\n")
    slurm.say("sacct", "42|COMPLETED|0:0|Unknown|00:00:01|n1\n")
    assert runner.run("in.jsonl", "out.json", force=True) == "42"


def test_an_output_of_another_run_is_not_overwritten(slurm: FakeCommands, workspace: Path) -> None:
    (workspace / "out.json").write_text("[]")
    with pytest.raises(OutputExistsError, match="output file already exists"):
        SlurmRunner(workspace=workspace).run("in.jsonl", "out.json")
    assert slurm.calls("sbatch") == []


def test_waiting_polls_until_the_job_has_ended(slurm: FakeCommands, workspace: Path) -> None:
    slurm.say("squeue", "42|N/A|RUNNING|N/A|0:00||None\n")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            slurm.say("squeue", "42|N/A|COMPLETED|N/A|0:00||None\n")
            slurm.say("sacct", "42|COMPLETED|0:0|Unknown|00:00:01|n1\n")

    runner = SlurmRunner(workspace=workspace)
    assert runner.wait("42", interval=3.0, sleep=sleep) == JobState("COMPLETED", 0)
    assert slept == [3.0, 3.0]


def test_waiting_has_a_time_limit(slurm: FakeCommands, workspace: Path) -> None:
    slurm.say("squeue", "42|N/A|RUNNING|N/A|0:00||None\n")
    with pytest.raises(SlurmError, match="still RUNNING"):
        SlurmRunner(workspace=workspace).wait("42", timeout=0.0, sleep=lambda _: None)


def test_a_runner_shows_the_status_and_cancels(slurm: FakeCommands, workspace: Path) -> None:
    slurm.say("squeue", "42|N/A|RUNNING|N/A|0:00||None\n")
    slurm.say("scancel")
    runner = SlurmRunner(workspace=workspace)
    assert runner.status("42;c") == JobState("RUNNING")
    runner.cancel("42;c")
    assert slurm.calls("scancel")[0].argv == ["--clusters=c", "42"]


def test_a_cancelled_run_stays_cancelled_once_slurm_has_forgotten_its_job(
    slurm: FakeCommands, workspace: Path
) -> None:
    runner = SlurmRunner(workspace=workspace)
    job = runner.run("in.jsonl", "out.json")
    slurm.say("scancel")
    runner.cancel(job)
    submissions = read_submissions(RunDirectory.of_output(workspace / "out.json"))
    assert submissions is not None
    assert [each.cancelled for each in submissions.submissions[0].jobs] == [True]


@pytest.fixture
def many(slurm: FakeCommands, workspace: Path) -> Path:
    """A workspace with an input of 40 requests, on a cluster with arrays of at most 8 tasks."""
    write_input(workspace / "in.jsonl", 40)
    slurm.say("scontrol", "MaxArraySize            = 8\n")
    return workspace


def run_of(workspace: Path) -> RunDirectory:
    return RunDirectory.of_output(workspace / "out.json")


def test_shards_become_one_array(slurm: FakeCommands, many: Path) -> None:
    SlurmRunner(workspace=many).run(
        "in.jsonl", "out.json", shards=8, max_running=3, preflight=False
    )
    assert submitted(run_of(many)) == [("42", "0-7%3", tuple(range(8)))]
    assert "#SBATCH --array=0-7%3\n" in run_of(many).script.read_text(encoding="utf-8")
    assert len(read_plan(run_of(many)).shards) == 8


def test_shards_beyond_the_largest_array_go_to_further_arrays(
    slurm: FakeCommands, many: Path
) -> None:
    SlurmRunner(workspace=many).run(
        "in.jsonl", "out.json", shards=20, max_running=4, preflight=False
    )
    arrays = [(array, shards) for _, array, shards in submitted(run_of(many))]
    assert arrays == [
        ("0-7%4", tuple(range(8))),
        ("0-7%4", tuple(range(8, 16))),
        ("0-3%4", tuple(range(16, 20))),
    ]
    waits = [[a for a in call.argv if "dependency" in a] for call in slurm.calls("sbatch")]
    assert waits == [[], ["--dependency=afterany:42"], ["--dependency=afterany:42"]]
    assert "first=16" in run_of(many).script_part(3).read_text(encoding="utf-8")


def test_a_run_is_submitted_again_with_the_remaining_shards(
    slurm: FakeCommands, many: Path
) -> None:
    runner = SlurmRunner(workspace=many)
    runner.run("in.jsonl", "out.json", shards=6, preflight=False)
    run = run_of(many)
    run.journal(1).write_text("{}\n", encoding="utf-8")
    for shard in (0, 1, 4):
        finish_shard(run, shard)
    runner.run("in.jsonl", "out.json", shards=6, preflight=False)
    assert submitted(run) == [("42", "0-1,3", (2, 3, 5))]


def test_resume_submits_no_finished_or_queued_shard(slurm: FakeCommands, many: Path) -> None:
    SlurmRunner(workspace=many).run(
        "in.jsonl", "out.json", shards=6, time="01:00:00", preflight=False
    )
    run = run_of(many)
    finish_shard(run, 0)
    slurm.say("squeue", "42|1|RUNNING|N/A|0:01|n1|None\n42|2|PENDING|N/A|0:00||Priority\n")
    planned = plan_resume(run, {"time": "02:00:00"})
    assert planned.opened.open_shards == (3, 4, 5)
    assert planned.active == 2
    slurm.say("sbatch", "43\n")
    submit_job(planned)
    assert submitted(run) == [("43", "0-2", (3, 4, 5))]
    script = run.script.read_text(encoding="utf-8")
    assert "#SBATCH --time=02:00:00\n" in script
    assert "first=3" in script
    records = read_submissions(run)
    assert records is not None
    assert [len(each.jobs) for each in records.submissions] == [1, 1]


def test_a_run_that_was_never_submitted_cannot_be_resumed(workspace: Path) -> None:
    config = Config(directory=workspace)
    plan_job(
        config, config.get_slurm_config(), workspace / "in.jsonl", workspace / "out.json",
        config.run_options(), cwd=workspace,
    )  # fmt: skip
    with pytest.raises(RunConflictError, match="never submitted"):
        plan_resume(run_of(workspace), {})


def test_a_refused_second_array_leaves_the_first_on_record(slurm: FakeCommands, many: Path) -> None:
    config = Config(directory=many)
    asked = config.get_slurm_config({"shards": 12})
    planned = plan_job(
        config,
        asked,
        many / "in.jsonl",
        many / "out.json",
        config.run_options(),
        cwd=many,
        check=False,
    )
    run_of(many).script_part(2).mkdir()
    with pytest.raises(StorageError):
        submit_job(planned)
    assert submitted(run_of(many)) == [("42", "0-7", tuple(range(8)))]


def test_auto_shards_follow_the_time_limit(slurm: FakeCommands, many: Path) -> None:
    def shards(time: str) -> int:
        SlurmRunner(workspace=many).run(
            "in.jsonl", "out.json", shards="auto", time=time, preflight=False
        )
        return len(read_plan(run_of(many)).shards)

    assert shards("1-00:00:00") == 1
    assert shards("0:30") > 1


def test_nothing_is_submitted_while_slurm_does_not_answer(
    slurm: FakeCommands, workspace: Path
) -> None:
    runner = SlurmRunner(workspace=workspace)
    runner.run("in.jsonl", "out.json")
    slurm.say("squeue", stderr="slurm_load_jobs error: Unable to contact controller\n", status=1)
    with pytest.raises(SlurmError, match="Unable to contact"):
        runner.run("in.jsonl", "out.json")
    assert len(slurm.calls("sbatch")) == 1, "the job may still be there"

"""Slurm's commands: submitting, cancelling, and parsing the output of queries."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiflux.errors import SlurmError
from aiflux.slurm.commands import (
    cancel,
    clean_environment,
    consumed_energy,
    job_state,
    max_array_size,
    submit,
    task_states,
)
from aiflux.slurm.jobs import JobId, JobState, TaskState, join_jobs, overall_state, parse_jobs
from tests.unit.fake_commands import FakeCommands


@pytest.fixture
def slurm(tmp_path: Path) -> FakeCommands:
    return FakeCommands(tmp_path / "bin")


def environ(fakes: FakeCommands, **more: str) -> dict[str, str]:
    return {"PATH": fakes.path, **more}


SCRIPT = Path("/r u n/run.sbatch")


@pytest.mark.parametrize(
    ("text", "job"),
    [("12345\n", JobId("12345")), ("7;cluster-2\n", JobId("7", "cluster-2"))],
)
def test_job_ids_are_read_strictly(text: str, job: JobId) -> None:
    assert JobId.parse(text) == job
    assert str(job) == text.strip()


@pytest.mark.parametrize("text", ["", "0", "Submitted batch job 7", "7_1", "-7", "7;", "7;a b"])
def test_an_invalid_job_id_is_refused(text: str) -> None:
    with pytest.raises(SlurmError, match="not a Slurm job id"):
        JobId.parse(text)


@pytest.mark.parametrize(
    ("text", "jobs"),
    [
        ("101", (JobId("101"),)),
        ("101:102", (JobId("101"), JobId("102"))),
        ("101:102;c", (JobId("101", "c"), JobId("102", "c"))),
    ],
)
def test_several_jobs_are_joined_to_one_word(text: str, jobs: tuple[JobId, ...]) -> None:
    assert parse_jobs(text) == jobs
    assert parse_jobs(text.replace(":", ",")) == jobs, "as earlier versions wrote it"
    assert join_jobs(jobs) == text


@pytest.mark.parametrize("text", ["", ",", "1,", "1,b", "1;c,2", "1;", "1,2;"])
def test_an_invalid_list_of_jobs_is_refused(text: str) -> None:
    with pytest.raises(SlurmError, match="not a Slurm job id"):
        parse_jobs(text)


def test_submitting_returns_the_job_id(slurm: FakeCommands) -> None:
    slurm.say("sbatch", "42\n")
    assert submit(SCRIPT, ["--hold"], environ(slurm)) == JobId("42")
    assert slurm.calls("sbatch")[0].argv == ["--parsable", "--hold", "--", str(SCRIPT)]


def test_output_of_a_site_s_wrapper_before_the_id_is_skipped(slurm: FakeCommands) -> None:
    slurm.say("sbatch", "Welcome!\n42;c\n")
    assert submit(SCRIPT, (), environ(slurm)) == JobId("42", "c")


def test_the_caller_s_environment_cannot_change_a_submission(slurm: FakeCommands) -> None:
    slurm.say("sbatch", "42\n")
    outer = environ(
        slurm, SBATCH_PARTITION="x", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="1", SLURMD_NODENAME="n",
        CUDA_VISIBLE_DEVICES="3", SLURM_CONF="/c", SLURM_JWT="t", HOME="/h",
    )  # fmt: skip
    submit(SCRIPT, (), outer)
    seen = slurm.calls("sbatch")[0].environ
    kept = {name: v for name, v in seen.items() if name.startswith(("SLURM", "SBATCH", "CUDA"))}
    assert kept == {"SLURM_CONF": "/c", "SLURM_JWT": "t"}
    assert seen["HOME"] == "/h"


def test_outside_a_job_the_user_s_choice_of_gpus_is_kept() -> None:
    assert clean_environment({"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_refusal_shows_sbatch_s_message_and_the_script(slurm: FakeCommands) -> None:
    slurm.say(
        "sbatch",
        stderr="sbatch: error: Batch job submission failed: Requested node configuration is not "
        "available\n",
        status=1,
    )
    with pytest.raises(SlurmError) as caught:
        submit(SCRIPT, (), environ(slurm))
    assert "Batch job submission failed: Requested node configuration" in caught.value.message
    assert str(SCRIPT) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    "words",
    [
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "Batch job submission failed: Socket timed out on send/recv operation",
    ],
)
def test_a_controller_that_does_not_respond_is_not_an_option_to_change(
    slurm: FakeCommands, words: str
) -> None:
    slurm.say("sbatch", stderr=f"sbatch: error: {words}\n", status=1)
    with pytest.raises(SlurmError, match="Slurm does not respond") as caught:
        submit(SCRIPT, (), environ(slurm))
    assert words in caught.value.message
    assert "check with squeue before you try again" in str(caught.value.remedy)


def test_a_machine_without_a_configuration_of_slurm_is_named(slurm: FakeCommands) -> None:
    words = "Could not establish a configuration source"
    slurm.say("sbatch", stderr=f"sbatch: fatal: {words}\n", status=1)
    with pytest.raises(SlurmError, match="this machine is not set up for Slurm") as caught:
        submit(SCRIPT, (), environ(slurm))
    assert "--local" in str(caught.value.remedy)


def test_a_wrong_account_lists_the_user_s_accounts(slurm: FakeCommands) -> None:
    slurm.say("sbatch", stderr="sbatch: error: Invalid account or account/partition\n", status=1)
    slurm.say("sacctmgr", "proj-b\nproj-a\nproj-b\n")
    with pytest.raises(SlurmError) as caught:
        submit(SCRIPT, (), environ(slurm))
    assert caught.value.remedy == (
        "set the account to charge: --account NAME (yours: proj-a, proj-b)"
    )


def test_a_wrong_account_without_accounting_is_reported(slurm: FakeCommands) -> None:
    slurm.say("sbatch", stderr="sbatch: error: Invalid account\n", status=1)
    slurm.say("sacctmgr", stderr="disabled", status=1)
    with pytest.raises(SlurmError) as caught:
        submit(SCRIPT, (), environ(slurm))
    assert caught.value.remedy == "set the account to charge: --account NAME"


def test_output_without_a_job_id_is_an_error(slurm: FakeCommands) -> None:
    slurm.say("sbatch", "all good\n")
    with pytest.raises(SlurmError, match="all good"):
        submit(SCRIPT, (), environ(slurm))


def test_a_missing_sbatch_shows_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="sbatch is not on PATH") as caught:
        submit(SCRIPT, (), {"PATH": str(tmp_path)})
    assert "--local" in str(caught.value.remedy)


# --- asking ------------------------------------------------------------------------------------

SQUEUE = "%F|%K|%T|%S|%M|%N|%r"
SACCT = "JobID,State,ExitCode,Start,Elapsed,NodeList"


def forgotten(slurm: FakeCommands) -> None:
    slurm.say("squeue", stderr="slurm_load_jobs error: Invalid job id specified\n", status=1)


def no_accounting(slurm: FakeCommands) -> None:
    slurm.say("sacct", stderr="Slurm accounting storage is disabled", status=1)


def record(job: str, state: str, code: str = "0:0", task: str = "") -> str:
    """Return a job as ``scontrol -o show job`` of Slurm 22.05 prints it, shortened."""
    array = f" ArrayJobId={job} ArrayTaskId={task} ArrayTaskThrottle=2" if task else ""
    return (
        f"JobId={job}{array} JobName=a b=c |d UserId=u(1) JobState={state} Reason=None "
        f"Dependency=(null) Requeue=1 Restarts=3 ExitCode={code} RunTime=00:01:40 "
        "StartTime=2026-11-23T22:21:29 EndTime=Unknown ReqNodeList=(null) NodeList=n1 "
        "BatchHost=n1 Comment=x JobState=NONE Reason=y \n"
    )


def test_the_state_of_an_active_job_is_read_from_squeue(slurm: FakeCommands) -> None:
    slurm.say("squeue", "7|N/A|PENDING|N/A|0:00||Resources\n")
    state = job_state(JobId("7", "c"), environ(slurm))
    assert state == JobState("PENDING", None, "Resources")
    assert state.active
    asked = slurm.calls("squeue")[0]
    assert asked.argv == [
        *("--clusters=c", "-h", "-r", "-t", "all", "-j", "7", "-o", SQUEUE)
    ]  # fmt: skip
    assert asked.environ["SLURM_BITSTR_LEN"] == "0", "long lists of tasks come whole"


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("7|COMPLETED|0:0|2026-01-02T03:04:05|01:00:00|n1\n", JobState("COMPLETED", 0)),
        ("7|FAILED|5:0|2026-01-02T03:04:05|01:00:00|n1\n", JobState("FAILED", 5)),
        ("7|CANCELLED by 1000|0:15|Unknown|00:00:00|None assigned\n", JobState("CANCELLED", 0)),
    ],
)
def test_the_state_of_an_ended_job_is_read_from_sacct(
    slurm: FakeCommands, line: str, state: JobState
) -> None:
    forgotten(slurm)
    slurm.say("sacct", line)
    assert job_state(JobId("7"), environ(slurm)) == state
    assert not state.active
    assert slurm.calls("sacct")[0].argv == ["-X", "-n", "-P", "-j", "7", "-o", SACCT]


def test_without_accounting_the_state_is_read_from_scontrol(slurm: FakeCommands) -> None:
    slurm.say("squeue", "7|N/A|FAILED|2026-11-23T22:21:29|1:40|n1|NonZeroExitCode\n")
    no_accounting(slurm)
    slurm.say("scontrol", record("7", "FAILED", "5:0"))
    assert job_state(JobId("7"), environ(slurm)) == JobState("FAILED", 5)
    assert task_states([JobId("7")], environ(slurm)) == {
        "7": {None: TaskState("FAILED", 5, None, "n1", "2026-11-23T22:21:29", "00:01:40", 3)}
    }


def test_squeue_s_state_is_used_if_nothing_else_answers(slurm: FakeCommands) -> None:
    slurm.say("squeue", "7|N/A|TIMEOUT|2026-11-23T22:21:29|1:40|n1|TimeLimit\n")
    for name in ("sacct", "scontrol"):
        slurm.say(name, status=1)
    assert job_state(JobId("7"), environ(slurm)) == JobState("TIMEOUT", None, "TimeLimit")


def test_an_unknown_job_is_an_error(slurm: FakeCommands) -> None:
    forgotten(slurm)
    for name in ("sacct", "scontrol"):
        slurm.say(name, status=1)
    with pytest.raises(SlurmError, match="does not know the job 7"):
        job_state(JobId("7"), environ(slurm))
    assert task_states([JobId("7")], environ(slurm)) == {}


def test_a_controller_that_is_down_is_not_an_unknown_job(slurm: FakeCommands) -> None:
    slurm.say("squeue", stderr="squeue: error: Unable to contact slurm controller\n", status=1)
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        job_state(JobId("7"), environ(slurm))


def test_accounting_is_used_if_the_controller_is_down(slurm: FakeCommands) -> None:
    slurm.say("squeue", stderr="squeue: error: Unable to contact slurm controller\n", status=1)
    slurm.say("sacct", "7|COMPLETED|0:0|2026-01-02T03:04:05|01:00:00|n1\n")
    assert job_state(JobId("7"), environ(slurm)) == JobState("COMPLETED", 0)


def test_a_missing_slurm_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="squeue is not on PATH"):
        task_states([JobId("7")], {"PATH": str(tmp_path)})


def test_the_tasks_of_all_arrays_are_queried_together(slurm: FakeCommands) -> None:
    slurm.say(
        "squeue",
        "7|2|RUNNING|2026-01-02T03:04:05|1:00|n1|None\n"
        "7|1|COMPLETING|2026-01-02T03:04:05|1:00|n2|None\n"
        "9|N/A|PENDING|N/A|0:00||Priority | high\n",
    )
    slurm.say(
        "sacct",
        "7_0|COMPLETED|0:0|2026-01-02T03:04:05|00:01:00|n1\n"
        "7_1|COMPLETED|0:0|2026-01-02T03:04:05|00:01:00|n2\n"
        "7_[4-6,8%2]|PENDING|0:0|Unknown|00:00:00|None assigned\n",
    )
    states = task_states([JobId("7"), JobId("9"), JobId("11")], environ(slurm))
    assert {number: [*tasks] for number, tasks in states.items()} == {
        "7": [0, 1, 2, 4, 5, 6, 8],
        "9": [None],
    }
    assert states["7"][0] == TaskState(
        "COMPLETED", 0, None, "n1", "2026-01-02T03:04:05", "00:01:00"
    )
    assert states["7"][1].name == "COMPLETING", "squeue knows first"
    assert states["7"][4] == TaskState("PENDING", 0, None, None, None, "00:00:00")
    assert states["9"][None].reason == "Priority | high"
    assert [call.argv[5] for call in slurm.calls("squeue")] == ["7,9,11"]
    assert [call.argv[4] for call in slurm.calls("sacct")] == ["7,11"]


def test_without_accounting_the_tasks_of_an_array_are_read_from_scontrol(
    slurm: FakeCommands,
) -> None:
    forgotten(slurm)
    no_accounting(slurm)
    slurm.say(
        "scontrol",
        record("7", "PENDING", task="4-8:2%2")
        + record("7", "FAILED", "3:0", task="1")
        + record("7", "COMPLETED", task="0"),
    )
    states = task_states([JobId("7")], environ(slurm))["7"]
    assert {task: (state.name, state.exit_code) for task, state in states.items()} == {
        0: ("COMPLETED", 0),
        1: ("FAILED", 3),
        4: ("PENDING", 0),
        6: ("PENDING", 0),
        8: ("PENDING", 0),
    }
    assert slurm.calls("scontrol")[0].argv == ["-o", "show", "job", "7"]


def test_accounting_that_lags_behind_does_not_revive_a_job(slurm: FakeCommands) -> None:
    slurm.say("squeue", "7|N/A|FAILED|2026-11-23T22:21:29|1:40|n1|NonZeroExitCode\n")
    slurm.say("sacct", "7|RUNNING|0:0|2026-11-23T22:21:29|00:01:40|n1\n")
    slurm.say("scontrol", record("7", "FAILED", "4:0"))
    assert job_state(JobId("7"), environ(slurm)) == JobState("FAILED", 4)


def test_jobs_on_several_clusters_are_queried_there(slurm: FakeCommands) -> None:
    slurm.add("squeue", 'case $1 in *=a) echo "1|N/A|RUNNING|x|x|x|None" ;; *=b) exit 0 ;; esac')
    states = task_states([JobId("1", "a"), JobId("2", "b")], environ(slurm))
    assert [*states] == ["1"]
    assert [call.argv[0] for call in slurm.calls("squeue")] == ["--clusters=a", "--clusters=b"]


@pytest.mark.parametrize(
    ("tasks", "state"),
    [
        ([("COMPLETED", 0), ("RUNNING", None), ("PENDING", None)], JobState("RUNNING")),
        ([("FAILED", 5), ("PENDING", None)], JobState("PENDING")),
        ([("COMPLETED", 0), ("CANCELLED", 0), ("TIMEOUT", 0)], JobState("TIMEOUT", 0)),
        ([("FAILED", 3), ("NODE_FAIL", None), ("FAILED", 5)], JobState("FAILED", 5)),
        ([("COMPLETED", 0), ("CANCELLED", 0)], JobState("CANCELLED", 0)),
        ([("COMPLETED", 0), ("COMPLETED", 0)], JobState("COMPLETED", 0)),
        ([], None),
    ],
)
def test_an_array_has_the_most_active_or_the_worst_state_of_its_tasks(
    tasks: list[tuple[str, int | None]], state: JobState | None
) -> None:
    assert overall_state(TaskState(name, code) for name, code in tasks) == state


@pytest.mark.parametrize(
    ("config", "status", "size"),
    [
        ("MaxArraySize            = 5001\n", 0, 5001),
        ("MaxArraySize = 0\n", 0, 0),
        ("SchedulerType = x\n", 0, 1001),
        ("", 1, 1001),
    ],
)
def test_the_largest_array_size_is_read_from_the_configuration(
    slurm: FakeCommands, config: str, status: int, size: int
) -> None:
    slurm.say("scontrol", config, status=status)
    assert max_array_size(environ(slurm)) == size


# --- cancelling --------------------------------------------------------------------------------


def test_cancelling_calls_scancel(slurm: FakeCommands) -> None:
    slurm.say("scancel")
    cancel(JobId("7"), environ(slurm))
    cancel(JobId("7", "c"), environ(slurm), tasks=[3, 5, 4, 9])
    calls = [call.argv for call in slurm.calls("scancel")]
    assert calls == [["7"], ["--clusters=c", "7_[3-5,9]"]]
    slurm.say(
        "scancel", stderr="scancel: error: Kill job error on job id 7: Access denied\n", status=1
    )
    with pytest.raises(SlurmError, match="Access denied"):
        cancel(JobId("7"), environ(slurm))


ENERGY = """\
100|0
100.batch|36000
100.extern|36500
100|0
100.batch|1000
100.extern|
101_0|0
101_0.batch|0
101_1|4294967294
101_1.batch|18446744073709551614
102|7200000
"""


def test_the_energy_of_jobs_is_the_largest_figure_of_each_record(slurm: FakeCommands) -> None:
    """Job 100 was requeued; what Slurm does not measure is not an energy of 0."""
    slurm.say("sacct", ENERGY)
    jobs = [JobId("100"), JobId("101"), JobId("102")]
    assert consumed_energy(jobs, environ(slurm)) == {"100": 37500.0, "102": 7200000.0}
    (call,) = slurm.calls("sacct")
    assert call.argv[:5] == ["-D", "-n", "-P", "-j", "100,101,102"]


def test_without_accounting_no_energy_is_kept(slurm: FakeCommands) -> None:
    slurm.say("sacct", stderr="Slurm accounting storage is disabled", status=1)
    assert consumed_energy([JobId("100")], environ(slurm)) == {}

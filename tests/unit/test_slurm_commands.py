"""Slurm's commands: what is asked, and what their words become."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiflux.errors import SlurmError
from aiflux.slurm.commands import (
    JobId,
    JobState,
    cancel,
    check_account,
    clean_environment,
    job_state,
    submit,
)
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
def test_what_is_no_job_id_is_refused(text: str) -> None:
    with pytest.raises(SlurmError, match="no Slurm job id"):
        JobId.parse(text)


def test_submission(slurm: FakeCommands) -> None:
    slurm.say("sbatch", "42\n")
    assert submit(SCRIPT, ["--hold"], environ(slurm)) == JobId("42")
    assert slurm.calls("sbatch")[0].argv == ["--parsable", "--hold", "--", str(SCRIPT)]


def test_what_a_site_s_wrapper_says_first_is_passed_over(slurm: FakeCommands) -> None:
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


def test_outside_a_job_the_devices_are_the_user_s_own_choice() -> None:
    assert clean_environment({"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_refusal_has_sbatch_s_own_words_and_the_script(slurm: FakeCommands) -> None:
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


def test_a_wrong_account_is_answered_with_the_user_s_accounts(slurm: FakeCommands) -> None:
    slurm.say("sbatch", stderr="sbatch: error: Invalid account or account/partition\n", status=1)
    slurm.say("sacctmgr", "proj-b\nproj-a\nproj-b\n")
    with pytest.raises(SlurmError) as caught:
        submit(SCRIPT, (), environ(slurm))
    assert caught.value.remedy == (
        "name the account to charge: --account NAME (yours: proj-a, proj-b)"
    )


def test_a_wrong_account_without_accounting(slurm: FakeCommands) -> None:
    slurm.say("sbatch", stderr="sbatch: error: Invalid account\n", status=1)
    slurm.say("sacctmgr", stderr="disabled", status=1)
    with pytest.raises(SlurmError) as caught:
        submit(SCRIPT, (), environ(slurm))
    assert caught.value.remedy == "name the account to charge: --account NAME"


def test_an_answer_that_is_no_id_is_an_error(slurm: FakeCommands) -> None:
    slurm.say("sbatch", "all good\n")
    with pytest.raises(SlurmError, match="all good"):
        submit(SCRIPT, (), environ(slurm))


def test_no_sbatch_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="sbatch is not on PATH") as caught:
        submit(SCRIPT, (), {"PATH": str(tmp_path)})
    assert "--local" in str(caught.value.remedy)


ENFORCED = "AccountingStorageEnforce = associations,limits,qos\n"


@pytest.mark.parametrize(
    ("config", "default", "status"),
    [
        (ENFORCED, "proj\n", 0),
        (ENFORCED, "", 1),
        ("AccountingStorageEnforce = none\n", "", 0),
        ("", "", 0),
    ],
)
def test_an_account_is_not_demanded_where_it_may_do_without(
    slurm: FakeCommands, config: str, default: str, status: int
) -> None:
    slurm.say("scontrol", config)
    slurm.say("sacctmgr", default, status=status)
    check_account(None, environ(slurm))


def test_a_missing_account_is_refused_before_submission(slurm: FakeCommands) -> None:
    slurm.say("scontrol", ENFORCED)
    slurm.add("sacctmgr", "[[ $* != *assoc* ]] || echo proj")
    with pytest.raises(SlurmError, match="no default account") as caught:
        check_account(None, environ(slurm))
    assert "--account NAME (yours: proj)" in str(caught.value.remedy)
    check_account("proj", environ(slurm))


def test_an_active_job_is_known_to_squeue(slurm: FakeCommands) -> None:
    slurm.say("squeue", "PENDING|Resources\n")
    state = job_state(JobId("7", "c"), environ(slurm))
    assert state == JobState("PENDING", None, "Resources")
    assert state.active
    assert slurm.calls("squeue")[0].argv == [
        *("--clusters=c", "-h", "-t", "all", "-j", "7", "-o", "%T|%r")
    ]


def forgotten(slurm: FakeCommands) -> None:
    slurm.say("squeue", stderr="slurm_load_jobs error: Invalid job id specified\n", status=1)


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("COMPLETED|0:0\n", JobState("COMPLETED", 0)),
        ("FAILED|5:0\n", JobState("FAILED", 5)),
        ("CANCELLED by 1000|0:15\n", JobState("CANCELLED", 0)),
    ],
)
def test_an_ended_job_is_known_to_sacct(slurm: FakeCommands, line: str, state: JobState) -> None:
    forgotten(slurm)
    slurm.say("sacct", line)
    assert job_state(JobId("7"), environ(slurm)) == state
    assert not state.active


def test_without_accounting_scontrol_is_asked(slurm: FakeCommands) -> None:
    slurm.say("squeue", "FAILED|NonZeroExitCode\n")
    slurm.say("sacct", stderr="Slurm accounting storage is disabled", status=1)
    slurm.say(
        "scontrol", "JobId=7 JobName=x JobState=FAILED Reason=NonZeroExitCode ExitCode=5:0 \n"
    )
    expected = JobState("FAILED", 5, "NonZeroExitCode")
    assert job_state(JobId("7"), environ(slurm)) == expected


def test_squeue_s_word_holds_where_nothing_else_answers(slurm: FakeCommands) -> None:
    slurm.say("squeue", "TIMEOUT|TimeLimit\n")
    for name in ("sacct", "scontrol"):
        slurm.say(name, status=1)
    assert job_state(JobId("7"), environ(slurm)) == JobState("TIMEOUT", None, "TimeLimit")


def test_a_job_that_nobody_knows_is_an_error(slurm: FakeCommands) -> None:
    forgotten(slurm)
    for name in ("sacct", "scontrol"):
        slurm.say(name, status=1)
    with pytest.raises(SlurmError, match="knows no job 7"):
        job_state(JobId("7"), environ(slurm))


def test_a_controller_that_is_down_is_not_an_unknown_job(slurm: FakeCommands) -> None:
    slurm.say("squeue", stderr="squeue: error: Unable to contact slurm controller\n", status=1)
    with pytest.raises(SlurmError, match="Unable to contact slurm controller"):
        job_state(JobId("7"), environ(slurm))


def test_cancel(slurm: FakeCommands) -> None:
    slurm.say("scancel")
    cancel(JobId("7"), environ(slurm))
    assert slurm.calls("scancel")[0].argv == ["7"]
    slurm.say(
        "scancel", stderr="scancel: error: Kill job error on job id 7: Access denied\n", status=1
    )
    with pytest.raises(SlurmError, match="Access denied"):
        cancel(JobId("7"), environ(slurm))

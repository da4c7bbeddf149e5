"""The state of a run, from its files and Slurm, and the next command."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.render.run import Frame, overview
from aiflux.core.config.settings import RunOptions
from aiflux.errors import AifluxError, ExitCode, RunConflictError
from aiflux.slurm.commands import run_directory_of
from aiflux.slurm.jobs import JobId, TaskState
from aiflux.slurm.monitor import (
    Observer,
    active_jobs,
    gather,
    gather_all,
    read_facts,
)
from aiflux.slurm.run_view import RunState, RunView, assemble, outcome
from aiflux.util.lease import acquire, identity
from tests.unit.fake_commands import FakeCommands
from tests.unit.made_runs import MadeRun

PENDING = TaskState("PENDING", None, "Resources")
RUNNING = TaskState("RUNNING")
OWN = {"slurm": {"SLURM_JOB_ID": "100"}}


@pytest.fixture
def made(awkward: Path) -> MadeRun:
    return MadeRun(awkward)


def look(made: MadeRun, task: TaskState | None = None, *, asked: bool = True) -> RunView:
    """Return the view of a run of one job in a given state of Slurm."""
    now = time.time()
    tasks = {"100": {} if task is None else {None: task}} if asked else None
    return assemble(read_facts(made.run, now), tasks, now)


def shard_of(view: RunView) -> tuple[str, str]:
    (shard,) = view.shards
    return shard.state.value, shard.reason


Case = tuple[dict[str, Any] | None, TaskState | None, str, str, str]
CASES: dict[str, Case] = {
    # status of the worker, Slurm's word, the shard's state, its reason, the run's state
    "queued": (None, PENDING, "waiting", "Resources", "waiting"),
    "queued with a start": (
        None,
        TaskState("PENDING", None, "Priority", None, "2026-01-01T10:00:00"),
        "waiting",
        "Priority, expected to start 2026-01-01T10:00:00",
        "waiting",
    ),
    "queued behind a job without a time limit": (
        None,
        TaskState("PENDING", None, "Priority", None, "2537-04-12T10:00:00"),
        "waiting",
        "Priority",
        "waiting",
    ),
    "starting": (None, RUNNING, "running", "starting", "running"),
    "working": ({"state": "in_progress"}, RUNNING, "running", "", "running"),
    "loading": ({"state": "validating"}, RUNNING, "running", "", "running"),
    "silent": (
        {"state": "in_progress", "age": 600.0},
        RUNNING,
        "running",
        "no sign of life for 10 min",
        "running",
    ),
    "suspended": (
        {"state": "in_progress", "age": 600.0},
        TaskState("SUSPENDED"),
        "waiting",
        "suspended",
        "waiting",
    ),
    "draining": (
        {"state": "in_progress"},
        TaskState("COMPLETING"),
        "stopping",
        "completing",
        "running",
    ),
    "just stopped, its job still there": (
        {"state": "cancelled", "ended": "stopped", **OWN},
        RUNNING,
        "stopping",
        "stopped",
        "running",
    ),
    "stopped long ago, started again": (
        {"state": "cancelled", "age": 600.0, "lease": False, **OWN},
        RUNNING,
        "running",
        "starting",
        "running",
    ),
    "stopped by another job, started again": (
        {"state": "cancelled", "slurm": {"SLURM_JOB_ID": "99"}},
        RUNNING,
        "running",
        "starting",
        "running",
    ),
    "requeued": (
        {"state": "cancelled", **OWN},
        TaskState("PENDING", None, "BeginTime"),
        "waiting",
        "BeginTime",
        "waiting",
    ),
    "killed and requeued": (
        {"state": "in_progress", "age": 600.0},
        PENDING,
        "waiting",
        "Resources",
        "waiting",
    ),
    "stopped": (
        {"state": "cancelled", "ended": "stopped (TERM)", "exit_code": 5},
        TaskState("CANCELLED", 0),
        "stopped",
        "stopped (TERM)",
        "stopped",
    ),
    "failed": (
        {"state": "failed", "ended": "no engine", "exit_code": 4},
        TaskState("FAILED", 4),
        "failed",
        "no engine",
        "failed",
    ),
    "killed": (
        {"state": "in_progress", "age": 600.0},
        TaskState("OUT_OF_MEMORY", 0),
        "lost",
        "its job ended: OUT_OF_MEMORY",
        "lost",
    ),
    "cancelled and killed before it could say so": (
        {"state": "in_progress", "age": 600.0},
        TaskState("CANCELLED", 0),
        "stopped",
        "its job ended: CANCELLED",
        "stopped",
    ),
    "node failed": (
        {"state": "in_progress", "age": 600.0},
        TaskState("NODE_FAIL", 1, "NodeDown"),
        "lost",
        "its job ended: NODE_FAIL, exit code 1 (NodeDown)",
        "lost",
    ),
    "forgotten": (
        {"state": "in_progress", "age": 600.0},
        None,
        "lost",
        "Slurm no longer has its job",
        "lost",
    ),
    "about to end": ({"state": "in_progress"}, TaskState("TIMEOUT", 0), "stopping", "", "running"),
    "cancelled in the queue": (
        None,
        TaskState("CANCELLED", 0),
        "stopped",
        "its job ended before the work began: CANCELLED",
        "stopped",
    ),
    "refused in the job": (
        None,
        TaskState("FAILED", 2, "NonZeroExitCode"),
        "failed",
        "its job ended before the work began: FAILED, exit code 2",
        "failed",
    ),
    "ended early on a signal": (
        None,
        TaskState("FAILED", 5),
        "stopped",
        "its job ended before the work began: FAILED, exit code 5",
        "stopped",
    ),
    "gone without a trace": (
        None,
        None,
        "lost",
        "Slurm no longer has its job, and it left no status",
        "lost",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_state_of_a_shard_follows_from_its_files_and_slurm(made: MadeRun, case: Case) -> None:
    status, task, state, reason, of_run = case
    made.submit()
    if status is not None:
        made.status(0, **status)
    view = look(made, task)
    assert shard_of(view) == (state, reason)
    assert view.state.value == of_run
    ends = {"stopped", "failed", "lost"}
    assert view.ended == (of_run in ends)
    assert (view.next_command is not None) == (of_run in ends)


def test_a_worker_that_recorded_its_stop_is_stopping_until_it_has_ended(made: MadeRun) -> None:
    made.submit()
    made.status(0, "cancelled", ended="stopped", host=socket.gethostname(), pid=os.getpid())
    with acquire(made.run.lease(0), "a test"):
        assert shard_of(look(made)) == ("stopping", "stopped")
    assert shard_of(look(made)) == ("stopped", "stopped")


@pytest.mark.parametrize(
    ("details", "completed", "remedy", "resumes"),
    [
        ({"exit_code": 4, "remedy": "check --engine-arg, or leave it out"}, 0,
         "check --engine-arg, or leave it out; correct --engine-arg, and run the whole `aiflux "
         "run` command again", False),
        ({"exit_code": 4, "ended": "vLLM does not accept --engine-arg: x"}, 0,
         "correct --engine-arg, and run the whole `aiflux run` command again", False),
        ({"exit_code": 4, "remedy": "pull the model"}, 0, "pull the model", True),
        ({"exit_code": 4, "remedy": "check --engine-arg, or leave it out"}, 5,
         "check --engine-arg, or leave it out", True),
        ({"exit_code": 1}, 0, "", True),
    ],
)  # fmt: skip
def test_a_failed_run_shows_what_to_fix_and_is_resumed_if_its_options_can_be_right(
    tmp_path: Path, details: dict[str, Any], completed: int, remedy: str, resumes: bool
) -> None:
    made = MadeRun(tmp_path, options=RunOptions(engine="vllm", engine_arg={"x": ""}))
    made.submit()
    made.status(0, "failed", completed, **details)
    view = look(made)
    assert (view.state, view.remedy) == (RunState.FAILED, remedy)
    assert (view.next_command is not None) == resumes
    lines = [line.plain for line in overview(view, Frame(width=60))]
    assert all(len(line) <= 60 or line.strip() == str(made.output) for line in lines)
    assert any(line.startswith("fix: ") for line in lines) == bool(remedy)


@pytest.mark.parametrize("height", [None, 20])
def test_a_long_reason_is_wrapped_and_never_cut(tmp_path: Path, height: int | None) -> None:
    made = MadeRun(tmp_path)
    made.submit()
    reason = "the engine ended: " + "out of memory on the device " * 5 + "at the last layer"
    made.status(0, "failed", 3, ended=reason)
    lines = [line.plain for line in overview(look(made), Frame(width=60, height=height))]
    assert reason in " ".join(line.strip() for line in lines)


@pytest.mark.parametrize(
    ("status", "state", "of_run"),
    [
        (None, "waiting", "waiting"),
        ({"state": "in_progress"}, "running", "running"),
        ({"state": "in_progress", "age": 600.0}, "lost", "lost"),
        ({"state": "in_progress", "lease": False}, "running", "running"),
        ({"state": "in_progress", "lease": False, "age": 600.0}, "lost", "lost"),
        ({"state": "cancelling"}, "stopping", "running"),
        ({"state": "cancelled"}, "stopped", "stopped"),
        ({"state": "failed"}, "failed", "failed"),
    ],
)
def test_without_slurm_the_state_follows_from_the_files(
    made: MadeRun, status: dict[str, Any] | None, state: str, of_run: str
) -> None:
    made.submit()
    if status is not None:
        made.status(0, **status)
    view = look(made, asked=False)
    assert (view.shards[0].state.value, view.state.value) == (state, of_run)


def test_a_run_in_the_foreground_is_running_while_its_process_is(made: MadeRun) -> None:
    made.status(0, "in_progress", age=600)
    lease = made.run.lease(0)
    lease.write_bytes(b"0" * 12 + b" " + json.dumps(identity()).encode() + b"\n")
    os.utime(lease, (0, 0))
    view = gather(made.run, {"PATH": ""})
    assert (view.state, view.shards[0].pid) == (RunState.RUNNING, 4711)
    lease.write_bytes(b"0" * 12 + b" " + json.dumps({**identity(), "started": "0"}).encode())
    view = gather(made.run, {"PATH": ""})
    assert shard_of(view) == ("lost", "its process is gone")


def test_a_planned_run_can_be_submitted(made: MadeRun) -> None:
    view = gather(made.run, {"PATH": ""})
    assert shard_of(view) == ("not submitted", "")
    assert (view.state, outcome(view)) == (RunState.STOPPED, ExitCode.STOPPED)
    assert view.slurm is None


def test_a_status_of_another_plan_is_ignored(made: MadeRun) -> None:
    made.status(0, "completed", completed=100, plan="another")
    view = look(made)
    assert (view.done, view.shards[0].state.value) == (0, "not submitted")


@pytest.mark.parametrize(
    ("failed", "allowed", "state", "code"),
    [
        (0, "0", "finished", ExitCode.OK),
        (2, "0", "finished with failures", ExitCode.FAILURES),
        (2, "5%", "finished with failures", ExitCode.OK),
    ],
)
def test_a_finished_run_needs_no_slurm(
    tmp_path: Path, failed: int, allowed: str, state: str, code: ExitCode
) -> None:
    made = MadeRun(tmp_path / "r", options=RunOptions(max_failures=allowed))
    made.submit()
    made.status(0, "completed", 100 - failed, failed)
    made.whole("completed", 100 - failed, failed)
    view = gather(made.run, {"PATH": ""})
    assert (view.state.value, outcome(view), view.slurm) == (state, code, None)
    assert (view.completed, view.failed, view.next_command) == (100 - failed, failed, None)


def test_a_deleted_output_can_be_written_again(made: MadeRun) -> None:
    made.status(0, "completed", 100, age=600)
    made.whole("completed", 100)
    made.output.unlink()
    view = look(made)
    assert view.state is RunState.NOT_MERGED
    assert str(view.next_command).startswith("aiflux merge ")


def test_a_run_is_merging_while_a_process_merges_it(made: MadeRun) -> None:
    made.submit()
    made.status(0, "completed", 100)
    assert look(made).state is RunState.MERGING  # it was done a moment ago
    made.status(0, "completed", 100, age=600)
    assert look(made).state is RunState.NOT_MERGED
    assert look(made, RUNNING).state is RunState.MERGING
    made.whole("finalizing", 0)
    made.hold(made.run.merge_lease)
    assert look(made).state is RunState.MERGING
    made.hold(made.run.merge_lease, age=600)
    assert look(made).state is RunState.NOT_MERGED


def array(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "r", 4)
    made.submit(last=1)
    made.submit("200", first=2)
    return made


def test_the_counts_of_a_run_are_the_sums_of_its_shards(tmp_path: Path) -> None:
    made = array(tmp_path)
    made.status(0, "completed", 95, 5, totals={"starts": 3, "gpu_seconds": 50})
    made.status(1, "in_progress", 50, 10)
    made.status(2, "in_progress", 20, progress={"requests_per_second": 0.5})
    now = time.time()
    tasks = {"100": {1: RUNNING}, "200": {0: RUNNING, 1: PENDING}}
    view = assemble(read_facts(made.run, now), tasks, now)
    assert [shard.state.value for shard in view.shards] == ["done", "running", "running", "waiting"]
    assert [shard.job for shard in view.shards] == ["100_0", "100_1", "200_0", "200_1"]
    assert (view.total, view.completed, view.failed, view.done) == (400, 165, 15, 180)
    assert view.requests_per_second == 2.5
    assert view.restarts == 2
    assert view.gpu_seconds == 50 + 2 * 36
    # 220 requests at 2.5/s are 88 s; but shard 2 alone has 80 requests at 0.5/s.
    assert view.shards[2].remaining_seconds == 160
    assert view.remaining_seconds == 160


def test_what_tune_chose_is_shown_once_for_each_model(tmp_path: Path) -> None:
    made = array(tmp_path)
    for shard, slots in enumerate((None, 8, 16)):
        tuning = {"model": "m:1", "slots": slots, "concurrency": slots}
        made.status(shard, "in_progress", tunings=[tuning])
    view = look(made)
    assert [each.slots for each in view.tunings] == [8]
    assert view.to_json()["tunings"][0]["concurrency"] == 8
    printed = [line.plain for line in overview(view, Frame())]
    assert [line for line in printed if line.startswith("tuned m:1; to keep it: --slots 8")]


def test_the_remaining_time_excludes_stopped_shards(tmp_path: Path) -> None:
    made = array(tmp_path)
    made.status(1, "in_progress", 50)
    for shard in (0, 2, 3):
        made.status(shard, "failed", exit_code=4)
    now = time.time()
    view = assemble(read_facts(made.run, now), {"100": {1: RUNNING}}, now)
    assert view.state is RunState.RUNNING
    assert view.remaining_seconds == 25
    assert str(view.next_command).startswith("aiflux resume ")


@pytest.mark.parametrize(
    ("codes", "code"),
    [((4, 2), 4), ((None, 2), 2), ((None, 137), 5), ((0, 0), 5)],
)
def test_a_failed_run_ends_with_the_code_of_its_shard(
    tmp_path: Path, codes: tuple[int | None, int | None], code: int
) -> None:
    made = MadeRun(tmp_path / "r", 2)
    for shard, of_shard in enumerate(codes):
        made.status(shard, "failed", exit_code=of_shard)
    assert outcome(gather(made.run, {"PATH": ""})) == code


def test_the_last_errors_are_the_newest_of_all_shards(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r", 3)
    made.status(0, errors=(("a", "1"), ("b", "2")), age=5)
    made.status(1, errors=tuple((f"c{n}", "3") for n in range(9)), age=1)
    made.status(2, age=3)
    view = gather(made.run, {"PATH": ""})
    named = [(error.shard, error.custom_id) for error in view.errors]
    assert named == [(1, "c8"), (0, "b"), (1, "c7"), (0, "a"), (1, "c6")]


def test_damaged_status_files_are_ignored(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r", 4)
    odd = [
        {"aiflux": {"plan": made.plan.id}},
        {"status": "failed", "aiflux": {"plan": made.plan.id, "progress": 3, "exit_code": "x"}},
        {"status": 7, "request_counts": [], "errors": [], "aiflux": {"plan": made.plan.id}},
        {"aiflux": [1]},
    ]
    for shard, content in enumerate(odd):
        made.run.status(shard).write_text(json.dumps(content))
    made.run.submissions.write_text("{")
    view = gather(made.run, {"PATH": ""})
    assert view.done == 0
    json.dumps(view.to_json())


def test_without_a_plan_there_is_no_run(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r")
    made.run.plan.write_text("{}")
    with pytest.raises(RunConflictError):
        gather(made.run)
    found = gather_all([made.run])
    assert isinstance(found[made.run.path], AifluxError)


@pytest.fixture
def slurm(tmp_path: Path) -> FakeCommands:
    fakes = FakeCommands(tmp_path / "bin")
    for name in ("sacct", "scontrol"):
        fakes.say(name, status=1)
    return fakes


ROW = "100|N/A|RUNNING|2026-01-01T10:00:00|1:00|n1|None\n"


def test_slurm_is_queried_once_for_all_runs(tmp_path: Path, slurm: FakeCommands) -> None:
    runs = [MadeRun(tmp_path / str(number)) for number in range(3)]
    for number, made in enumerate(runs):
        made.submit(f"10{number}")
    runs[2].whole("completed", 100)
    slurm.say("squeue", ROW)
    views = gather_all([made.run for made in runs], {"PATH": slurm.path})
    states = [view.state.value for view in views.values() if isinstance(view, RunView)]
    assert states == ["running", "lost", "finished"]
    (call,) = slurm.calls("squeue")
    assert call.argv[call.argv.index("-j") + 1] == "100,101"


def test_an_unresponsive_slurm_is_reported(made: MadeRun, slurm: FakeCommands) -> None:
    made.submit()
    made.status(0)
    slurm.say("squeue", stderr="squeue: error: Unable to contact slurm controller", status=1)
    view = gather(made.run, {"PATH": slurm.path})
    assert view.state is RunState.RUNNING
    assert "Unable to contact slurm controller" in str(view.slurm)


def test_jobs_submitted_by_hand_are_known_from_their_status(
    made: MadeRun, slurm: FakeCommands
) -> None:
    made.status(0, **OWN)
    slurm.say("squeue", ROW)
    view = gather(made.run, {"PATH": slurm.path})
    assert (view.shards[0].job, view.state) == ("100", RunState.RUNNING)
    assert active_jobs(made.run, {"PATH": slurm.path}) == [JobId("100")]


def test_jobs_of_earlier_submissions_are_active_too(tmp_path: Path, slurm: FakeCommands) -> None:
    made = MadeRun(tmp_path / "r")
    made.submit("99")
    made.submit("100")
    slurm.say("squeue", ROW.replace("100", "99", 1) + ROW.replace("RUNNING", "FAILED"))
    assert active_jobs(made.run, {"PATH": slurm.path}) == [JobId("99")]


def test_an_observer_limits_its_queries_of_slurm(made: MadeRun, slurm: FakeCommands) -> None:
    made.submit()
    slurm.say("squeue", ROW)
    observer = Observer(made.run, {"PATH": slurm.path})
    assert [observer.look().state for _ in range(5)] == [RunState.RUNNING] * 5
    assert len(slurm.calls("squeue")) == 1
    made.status(0, "completed", 100)
    made.whole("completed", 100)
    assert observer.look().state is RunState.FINISHED
    assert len(slurm.calls("squeue")) == 1


def test_a_thousand_shards_are_gathered(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "r", 1000)
    made.submit()
    for shard in range(1000):
        made.status(shard, "in_progress" if shard % 2 else "completed", 50)
    view = gather(made.run, {"PATH": ""})
    assert view.done == 50000


@pytest.mark.parametrize("source", ["scontrol", "sacct"])
def test_slurm_names_the_run_of_a_job(awkward: Path, slurm: FakeCommands, source: str) -> None:
    made = MadeRun(awkward)
    script = made.run.script
    answers = {
        "scontrol": f"JobId=7 JobName=x\n   Command={script}\n   WorkDir=/\n",
        "sacct": f"sbatch --parsable -- {script}\n",
    }
    slurm.say(source, answers[source])
    environ = {"PATH": slurm.path}
    assert run_directory_of("7_3", environ) == made.run.path
    assert slurm.calls("scontrol")[0].argv == ["show", "job", "7"]
    assert run_directory_of("7;c", environ) == made.run.path
    assert slurm.calls("scontrol")[1].argv == ["--clusters=c", "show", "job", "7"]
    made.run.plan.unlink()
    assert run_directory_of("7", environ) is None
    assert run_directory_of("x", environ) is None


def test_without_slurm_the_run_of_a_job_is_unknown(tmp_path: Path) -> None:
    assert run_directory_of("7", {"PATH": str(tmp_path)}) is None

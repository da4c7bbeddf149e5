"""Call Slurm's commands with a clean environment: submit, cancel and query jobs.

The formats are the same in every Slurm since 20.11 (``squeue -o``, ``sacct -P``,
``scontrol -o``); ``--json`` differs by version. Source: the man pages of these commands.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.registry import JOB, find_run
from aiflux.errors import SlurmError
from aiflux.slurm.jobs import (
    JobId,
    JobState,
    TaskState,
    array_ranges,
    join_jobs,
    note_cancelled,
    overall_state,
    parse_ranges,
)

Tasks = dict[int | None, TaskState]

_SQUEUE = "%F|%K|%T|%S|%M|%N|%r"  # the reason comes last: it is free text
_UNSET_ENERGY = 0xFFFFFFF0  # of 32 bits: more than 1,000 kWh in one job
_SACCT = "JobID,State,ExitCode,Start,Elapsed,NodeList"
_JOB_ID = re.compile(r"(\d+)(?:_(\d+|\[.*))?\Z")
_DEFAULT_MAX_ARRAY_SIZE = 1001
_BUSY = "the controller may be busy: check with squeue before you try again"
_ELSEWHERE = (
    "submit it where Slurm's commands work, such as a login node (aiflux doctor checks a machine); "
    "or use --local"
)
_NO_CONTROLLER = re.compile(r"unable to contact slurm controller|socket timed out", re.I)
_NO_CONFIGURATION = re.compile(r"establish a configuration source", re.I)  # no slurm.conf


def submit(
    script: Path, extra: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> JobId:
    """Submit a batch script and return the job's id.

    Args:
        extra: more options of sbatch, such as ``--dependency=afterany:101``; they take precedence
            over the script's directives.
        environ: the environment for the job (default: the process's), cleaned by
            ``clean_environment``.

    Raises:
        SlurmError: sbatch is missing, refused the job, or its answer is not a job id.
    """
    environment = clean_environment(os.environ if environ is None else environ)
    done = call(["sbatch", "--parsable", *extra, "--", str(script)], environment)
    if done.returncode != 0:
        message, unsent = words(done), f"sbatch did not submit {script}"
        if _NO_CONTROLLER.search(message):
            raise SlurmError(f"{unsent}: Slurm does not respond: {message}", _BUSY)
        if _NO_CONFIGURATION.search(message):
            raise SlurmError(
                f"{unsent}: this machine is not set up for Slurm: {message}", _ELSEWHERE
            )
        raise SlurmError(
            f"sbatch refused {script}: {message}", _remedy(message, script, environment)
        )
    # A site's wrapper can print something first; the id is on the last line.
    lines = done.stdout.strip().splitlines()
    try:
        return JobId.parse(lines[-1] if lines else "")
    except SlurmError:
        raise SlurmError(
            f"sbatch answered {done.stdout!r} to {script}, which is not a job id",
            "check with squeue whether the job exists",
        ) from None


def jobs_of_script(script: Path, environ: Mapping[str, str] | None = None) -> list[JobId]:
    """Return the user's jobs with this batch script that Slurm still knows, oldest first.

    Raises:
        SlurmError: Slurm is missing or does not answer.
    """
    # %o, the script's path, comes last: it can contain spaces.
    asked = ["squeue", "-u", _user(), "-h", "-t", "all", "-o", "%F|%o"]
    done = call(asked, _environment(environ))
    if done.returncode != 0:
        raise SlurmError(f"squeue did not answer: {words(done)}", "try again in a minute")
    pairs = (line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    numbers = {int(number) for number, path in pairs if path.strip() == str(script)}
    return [JobId(str(number)) for number in sorted(numbers)]


def cancel(
    job: JobId,
    environ: Mapping[str, str] | None = None,
    *,
    tasks: Sequence[int] | None = None,
) -> None:
    """Cancel a job, or some tasks of an array; those that have ended are unchanged.

    Raises:
        SlurmError: scancel is missing or refused.
    """
    environment = clean_environment(os.environ if environ is None else environ)
    target = job.number if tasks is None else f"{job.number}_[{array_ranges(tasks)}]"
    done = call(["scancel", *job.options, target], environment)
    if done.returncode != 0:
        raise SlurmError(f"scancel did not cancel {job}: {words(done)}", "check the job id")


def cancel_jobs(
    run: RunDirectory | None, jobs: Iterable[JobId], environ: Mapping[str, str] | None = None
) -> None:
    """Cancel jobs of a run, and record that for when Slurm has forgotten them.

    Args:
        run: None if the jobs' run is not known.

    Raises:
        SlurmError: scancel is missing or refused.
        RunConflictError: the record of the run's jobs is damaged.
        StorageError: it cannot be read or written.
    """
    cancelled = list(jobs)
    for job in cancelled:
        cancel(job, environ)
    if run is not None:
        note_cancelled(run, cancelled)


def _remedy(message: str, script: Path, environment: Mapping[str, str]) -> str:
    if "account" in message.lower():
        return _account_remedy(environment)
    if "partition" in message.lower():
        return "use a partition of this cluster (sinfo lists them): --partition NAME"
    return f"change the option that Slurm reports; the script is {script}"


def _account_remedy(environment: Mapping[str, str]) -> str:
    listed = attempt(
        ["sacctmgr", "-nP", "show", "assoc", f"user={_user()}", "format=account"], environment
    )
    accounts = sorted({line.strip() for line in (listed or "").splitlines() if line.strip()})
    yours = f" (yours: {', '.join(accounts)})" if accounts else ""
    return f"set the account to charge: --account NAME{yours}"


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


_TIMEOUT = 120.0  # seconds; a busy controller answers slowly
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without variables that would change a submission.

    ``SBATCH_*`` act as options. Inside a job, its ``SLURM_*`` and its devices would leak into the
    new job.
    """
    inside = "SLURM_JOB_ID" in environ
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT
        or not (name.startswith(("SBATCH_", "SLURM_", "SLURMD_")) or (inside and name in _DEVICES))
    }


def call(
    command: list[str], environment: Mapping[str, str], text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output, whatever its exit code.

    Args:
        text: its standard input.

    Raises:
        SlurmError: it is missing, or did not answer in time.
    """
    try:
        return subprocess.run(
            command,
            env=dict(environment),
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise missing(command[0]) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer within {_TIMEOUT:.0f} s",
            _BUSY,
        ) from None


def missing(command: str) -> SlurmError:
    """Return the error for a command of Slurm that is not on PATH."""
    return SlurmError(
        f"{command} is not on PATH: this machine cannot submit to Slurm",
        "log in to a login node, or module load slurm; or run it here with aiflux run --local",
    )


def attempt(command: list[str], environment: Mapping[str, str]) -> str | None:
    """Return the output of a command; None if it is missing or fails."""
    try:
        done = call(command, environment)
    except SlurmError:
        return None
    return done.stdout if done.returncode == 0 else None


def words(done: subprocess.CompletedProcess[str]) -> str:
    """Return a command's messages in one line, without its name before each part."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    cleaned = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in lines]
    return "; ".join(line for line in cleaned if line) or f"exit status {done.returncode}"


def max_array_size(environ: Mapping[str, str] | None = None) -> int:
    """Return the cluster's ``MaxArraySize``: one more than the highest task number it takes."""
    config = attempt(["scontrol", "show", "config"], _environment(environ)) or ""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return int(match[1]) if match else _DEFAULT_MAX_ARRAY_SIZE


def task_states(
    jobs: Sequence[JobId], environ: Mapping[str, str] | None = None
) -> dict[str, dict[int | None, TaskState]]:
    """Return the states of jobs by their number, and for each by task.

    The task of a job that is not an array is None. squeue shows waiting and running jobs, sacct (or
    scontrol without accounting) those that have ended. Jobs and tasks that Slurm no longer knows
    are absent.

    Raises:
        SlurmError: Slurm is missing or does not answer, so that a job is unknown.
    """
    found: dict[str, Tasks] = {}
    for cluster in dict.fromkeys(job.cluster for job in jobs):
        group = [job for job in jobs if job.cluster == cluster]
        for number, tasks in _states_on(group, _environment(environ)).items():
            found.setdefault(number, {}).update(tasks)
    return {
        job.number: dict(sorted(found[job.number].items(), key=lambda item: item[0] or 0))
        for job in jobs
        if job.number in found
    }


def has_accounting(job: JobId, environ: Mapping[str, str] | None = None) -> bool:
    """Return whether Slurm's accounting answers, which also knows jobs that ended long ago."""
    asked = ["sacct", *job.options, "-X", "-n", "-P", "-j", job.number, "-o", "JobID"]
    return attempt(asked, _environment(environ)) is not None


def job_state(jobs: JobId | Sequence[JobId], environ: Mapping[str, str] | None = None) -> JobState:
    """Return a job's state; that of an array, or of several jobs, is its tasks' overall state.

    Raises:
        SlurmError: Slurm is missing or does not answer, or does not know the job (any longer).
    """
    wanted = [jobs] if isinstance(jobs, JobId) else jobs
    states = task_states(wanted, environ)
    state = overall_state(task for tasks in states.values() for task in tasks.values())
    if state is None:
        raise SlurmError(
            f"Slurm does not know the job {join_jobs(wanted)}",
            "check the id; for a job that ended long ago, use aiflux status RUN",
        )
    return state


def _environment(environ: Mapping[str, str] | None) -> dict[str, str]:
    cleaned = clean_environment(os.environ if environ is None else environ)
    # Without it, Slurm truncates long lists of tasks.
    return cleaned | {"SLURM_BITSTR_LEN": "0"}


def _states_on(jobs: Sequence[JobId], environment: Mapping[str, str]) -> dict[str, Tasks]:
    """Return the states of jobs on one cluster."""
    failure = None
    found: dict[str, Tasks] = {}
    try:
        _add(found, _from_squeue(jobs, environment))
    except SlurmError as error:
        failure = error
    # squeue soon forgets ended jobs, and never shows their exit codes.
    rest = [job for job in jobs if not _settled(found.get(job.number, {}))]
    ended: dict[str, Tasks] = {}
    if rest:
        _add(ended, _from_sacct(rest, environment))
        _complete(found, ended)
    for job in rest:
        if not _known(found.get(job.number, {})):
            _complete(found, _collected(_from_scontrol(job, environment)))
    if failure is not None and any(job.number not in found for job in jobs):
        raise failure
    return found


def _settled(tasks: Tasks) -> bool:
    """Return whether the state is complete: an active job that is not an array."""
    return None in tasks and tasks[None].active


def _known(tasks: Tasks) -> bool:
    return bool(tasks) and all(task.active or task.exit_code is not None for task in tasks.values())


def _complete(found: dict[str, Tasks], more: dict[str, Tasks]) -> None:
    """Add states that squeue does not show; it takes precedence for active and just ended jobs."""
    for number, tasks in more.items():
        known = found.setdefault(number, {})
        for task, state in tasks.items():
            if task not in known or not (known[task].active or state.active):
                known[task] = state


def _collected(rows: Iterable[tuple[str, int | None, TaskState]]) -> dict[str, Tasks]:
    found: dict[str, Tasks] = {}
    _add(found, rows)
    return found


def _add(found: dict[str, Tasks], rows: Iterable[tuple[str, int | None, TaskState]]) -> None:
    for number, task, state in rows:
        found.setdefault(number, {})[task] = state


def _from_squeue(
    jobs: Sequence[JobId], environment: Mapping[str, str]
) -> Iterator[tuple[str, int | None, TaskState]]:
    asked = ["squeue", *jobs[0].options, "-h", "-r", "-t", "all", "-j", _numbers(jobs)]
    done = call([*asked, "-o", _SQUEUE], environment)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise SlurmError(f"squeue did not answer: {words(done)}", "try again in a minute")
    for line in done.stdout.splitlines():
        fields = line.split("|", 6)
        if len(fields) == 7:
            number, task, name, start, elapsed, nodes, reason = fields
            state = TaskState(name, None, _told(reason), _told(nodes), _told(start), _told(elapsed))
            yield from ((number, index, state) for index in _indexes(task))


def _from_sacct(
    jobs: Sequence[JobId], environment: Mapping[str, str]
) -> Iterator[tuple[str, int | None, TaskState]]:
    asked = ["sacct", *jobs[0].options, "-X", "-n", "-P", "-j", _numbers(jobs), "-o", _SACCT]
    for line in (attempt(asked, environment) or "").splitlines():
        fields = line.split("|")
        match = _JOB_ID.match(fields[0])
        if match and len(fields) == 6 and fields[1].strip():
            _, name, code, start, elapsed, nodes = fields
            # CANCELLED is shown as "CANCELLED by 1000".
            name = name.split()[0]
            state = TaskState(
                name, _exit_code(code), None, _told(nodes), _told(start), _told(elapsed)
            )
            yield from ((match[1], index, state) for index in _indexes(match[2] or ""))


def consumed_energy(
    jobs: Sequence[JobId], environ: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return the joules of each ended job, or task of an array, for which Slurm keeps them.

    Without a plugin that measures energy (``AcctGatherEnergyType``), sacct shows 0 or nothing, or
    an unset number of 32 or 64 bits: none of these is an energy. A requeued job has several
    records; each has a line of its own and lines of its steps. The steps batch and extern both
    measure the whole node, so the largest figure of a record counts.
    """
    found: dict[str, float] = {}
    for cluster in dict.fromkeys(job.cluster for job in jobs):
        group = [job for job in jobs if job.cluster == cluster]
        asked = ["sacct", *group[0].options, "-D", "-n", "-P", "-j", _numbers(group)]
        printed = attempt([*asked, "-o", "JobID,ConsumedEnergyRaw"], _environment(environ)) or ""
        for name, joules in _records_of_energy(printed):
            if joules:
                found[name] = found.get(name, 0.0) + joules
    return found


def _records_of_energy(printed: str) -> Iterator[tuple[str, float]]:
    """Yield the job and the largest figure of each record."""
    name, most = "", 0.0
    for line in printed.splitlines():
        job, _, text = line.partition("|")
        if "." not in job:
            if name:
                yield name, most
            name, most = job.strip(), 0.0
        joules = float(text) if text.strip().isdigit() else 0.0
        most = max(most, joules if joules < _UNSET_ENERGY else 0.0)
    if name:
        yield name, most


def _from_scontrol(
    job: JobId, environment: Mapping[str, str]
) -> Iterator[tuple[str, int | None, TaskState]]:
    asked = ["scontrol", *job.options, "-o", "show", "job", job.number]
    for line in (attempt(asked, environment) or "").splitlines():
        # A job's name and comment are free text: the state is directly before its reason.
        states = re.findall(r" JobState=([A-Z_]+) Reason=(\S*)", line)
        if not states or not line.startswith("JobId="):
            continue
        name, reason = states[0]
        restarts = _field(line, "Restarts")
        state = TaskState(
            name,
            _exit_code(_field(line, "ExitCode")),
            _told(reason),
            _told(_field(line, "NodeList")),
            _told(_field(line, "StartTime")),
            _told(_field(line, "RunTime")),
            int(restarts) if restarts.isdigit() else None,
        )
        yield from ((job.number, index, state) for index in _indexes(_field(line, "ArrayTaskId")))


def _numbers(jobs: Sequence[JobId]) -> str:
    return ",".join(job.number for job in jobs)


def _indexes(text: str) -> list[int | None]:
    return [*parse_ranges(text)] if text not in ("", "N/A") else [None]


def _field(line: str, name: str) -> str:
    match = re.search(rf" {name}=(\S*)", line)
    return match[1] if match else ""


def _exit_code(text: str) -> int | None:
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    return int(match[1]) if match else None


def _told(text: str) -> str | None:
    empty = ("", "None", "N/A", "Unknown", "(null)", "None assigned")
    return None if text.strip() in empty else text.strip()


def run_directory_of(text: str, environ: Mapping[str, str]) -> Path | None:
    """Return the run directory of a job's script; None if Slurm does not know it.

    Args:
        text: ``123``, ``123_4`` or ``123;cluster``.
    """
    match = JOB.fullmatch(text)
    if match is None:
        return None
    job = JobId(match["number"], match["cluster"])
    scripts = (Path(path) for path in _scripts(job, clean_environment(environ)))
    folders = (path.parent for path in scripts if path.suffix == ".sbatch" and path.is_absolute())
    return next((folder for folder in folders if RunDirectory(folder).plan.is_file()), None)


def located(text: str, environ: Mapping[str, str] | None = None) -> RunDirectory:
    """Return the run that a job id, a run directory or an output path names (see ``find_run``).

    Raises:
        UsageError: it names no run.
        RunConflictError: the run may not be read.
    """
    environment = os.environ if environ is None else environ
    return find_run(text, environment, lambda job: run_directory_of(job, environment))


def _scripts(job: JobId, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield possible paths of the job's script."""
    # Without -o, each field has its own line, and a path can contain spaces.
    shown = attempt(["scontrol", *job.options, "show", "job", job.number], environment) or ""
    yield from re.findall(r"^\s*Command=(/.*\.sbatch)\s*$", shown, re.MULTILINE)
    asked = ["sacct", *job.options, "-X", "-n", "-P", "-j", job.number, "-o", "SubmitLine"]
    for line in (attempt(asked, environment) or "").splitlines():
        yield from re.findall(r" -- (/.*\.sbatch)\s*$", line)

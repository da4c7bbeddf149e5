"""Start a planned run: as Slurm jobs, in the image on this machine, or in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import TYPE_CHECKING, Any

from aiflux.api.local_run import draft_here, local_image, local_script, with_vendor
from aiflux.cli.render.run import typed
from aiflux.core.config.config import Config
from aiflux.core.config.settings import BY_NAME
from aiflux.core.runs.directory import RunDirectory, checked_output, user_output
from aiflux.core.runs.open import OpenedRun, RunDraft
from aiflux.core.runs.output import merge
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.registry import register_plan
from aiflux.core.runs.status_file import (
    Counts,
    finished_line,
    refuse_failures,
    requests_left,
)
from aiflux.engines.kinds import kind_named
from aiflux.errors import (
    AifluxError,
    EngineError,
    ExitCode,
    RunConflictError,
    TooManyFailuresError,
    UsageError,
)
from aiflux.estimates.estimate import carry_estimate
from aiflux.image.container import local_choices
from aiflux.slurm.monitor import active_jobs
from aiflux.slurm.preflight.local import check_fields, finding_text
from aiflux.slurm.script import render_models
from aiflux.util.files import short, temporary_folder
from aiflux.util.text import counted, joined

if TYPE_CHECKING:
    from aiflux.engines.base import EngineKind
    from aiflux.slurm.jobs import JobId
    from aiflux.slurm.submit import PlannedRun
    from aiflux.worker.progress import Reporter


def show_local_choices(config: Config, image: Path | None) -> None:
    """Print on stderr which decisive settings come from the current directory."""
    line = local_choices(config, image)
    if line is not None:
        print(f"note: {line}", file=sys.stderr)


def refuse_local_at_url(config: Config, *, local: bool) -> None:
    """Refuse ``--local`` with the address of a server, which aiflux.yaml may name.

    Raises:
        UsageError: both are given.
    """
    if local and config.get("engine_url"):
        raise UsageError(
            "--local and --engine-url cannot be combined",
            "--local starts an engine; --engine-url uses a server that is already running",
        )


# Of the settings for Slurm, what an image on this machine obeys, too.
_OF_IMAGE = ("seal", "gpu_vendor")


def show_unused_settings(
    kind: EngineKind,
    given: Mapping[str, Any],
    *,
    local: bool = False,
    instead: Mapping[str, str] | None = None,
) -> None:
    """Print on stderr which options for Slurm have no effect, since no job is submitted.

    Args:
        kind: of the engine that does the work.
        given: the settings of the command line; those of files are for all commands.
        local: the engine runs on this machine, and nothing is estimated for a job.
        instead: options that may be meant, by setting.
    """
    if kind.managed and not local:
        return
    kept = _OF_IMAGE if kind.managed else ()
    unused = [
        name
        for name, value in given.items()
        if value is not None and BY_NAME[name].section == "slurm" and name not in kept
    ]
    if not unused:
        return
    options = joined([BY_NAME[name].option for name in unused])
    verb = "has" if len(unused) == 1 else "have"
    why = "no job is submitted" if kind.managed else "a running server needs no job"
    meant = {name: option for name, option in (instead or {}).items() if name in unused}
    hints = "".join(f"; for the input: {option}" for option in meant.values())
    print(f"note: {options} {verb} no effect: {why}{hints}", file=sys.stderr)


@dataclass(frozen=True)
class RunArguments:
    """What a command line asks for."""

    config: Config
    input: Path
    output: Path
    force: bool
    force_resume: bool
    preflight: bool
    as_json: bool
    after: tuple[JobId, ...] = ()
    then: str = ""

    @property
    def managed(self) -> bool:
        """Whether AI-Flux starts the engine; if not, a server is already running."""
        return kind_named(self.config.engine).managed


def draft_asked(asked: RunArguments) -> RunDraft:
    """Plan a run that is processed here."""
    force, force_resume = asked.force, asked.force_resume
    return draft_here(
        asked.config, asked.input, asked.output, force=force, force_resume=force_resume
    )


def open_here(asked: RunArguments) -> OpenedRun:
    """Plan a run that is processed in the foreground, and register it for `aiflux jobs`."""
    if not asked.managed:
        show_local_choices(asked.config, None)
    opened = draft_asked(asked).open()
    if not opened.finished:
        register(opened.plan)
        carry_estimate(opened.plan, opened.run)
        for finding in check_fields(opened.plan):
            print(f"warning: {finding_text(finding)}", file=sys.stderr)
    return opened


def plan_asked(asked: RunArguments, *, write: bool) -> PlannedRun:
    """Plan a run for Slurm; print what the checks found."""
    from aiflux.slurm.submit import plan_job

    planned = plan_job(
        asked.config,
        asked.config.get_slurm_config(),
        asked.input,
        asked.output,
        asked.config.run_options(),
        force=asked.force,
        force_resume=asked.force_resume,
        check=asked.preflight,
        write=write,
    )
    show_local_choices(asked.config, planned.image)
    for finding in planned.findings:
        print(f"warning: {finding_text(finding)}", file=sys.stderr)
    return planned


def submit(asked: RunArguments) -> int:
    """Submit a run.

    Raises:
        RunConflictError: a job works on it already; with the way to add a command.
    """
    try:
        planned = plan_asked(asked, write=True)
    except RunConflictError as error:
        run = RunDirectory.of_output(checked_output(asked.output))
        if asked.then and run.submissions.exists() and active_jobs(run):
            command = f"aiflux resume {typed(short(run.path))} --then {quote(asked.then)}"
            error.remedy = f"{error.remedy}; only to execute the command afterwards: {command}"
        raise
    return submit_planned(planned, asked.after, asked.then)


def submit_planned(planned: PlannedRun, after: Sequence[JobId] = (), then: str = "") -> int:
    """Submit a planned run, or write its output if only that is missing.

    Args:
        after: jobs that have to succeed first.
        then: shell command to execute once the run is over.
    """
    from aiflux.slurm.jobs import join_jobs
    from aiflux.slurm.submit import submit_job

    opened = planned.opened
    if not opened.open_shards:
        warn_not_executed(then)
    if opened.counts is not None:
        return print_finished(opened.plan, opened.counts)
    if not opened.open_shards:
        return write_output(opened.plan, opened.run)
    plan, shards = opened.plan, len(opened.open_shards)
    left = requests_left(plan, opened.run, opened.open_shards)
    jobs = submit_job(planned, after=after)
    register(opened.plan, jobs)
    some = "" if left == plan.requests else f"{left} of "
    requests = f"{some}{counted(plan.requests, 'request')}"
    parts = "" if len(plan.shards) == 1 else f" in {shards} of {len(plan.shards)} shards"
    noun = "job" if len(jobs) == 1 else "jobs"
    output = user_output(plan.output)
    print(f"submitted {noun} {join_jobs(jobs)}: {requests}{parts} -> {output}")
    print(f"  run directory: {opened.run.path}")
    name = jobs[0].number
    print(f"  follow: aiflux watch {name}    cancel: aiflux cancel {name}")
    print(f"  afterwards: aiflux results show {name}    aiflux report {name}")
    if after:
        print(f"  starts once these jobs have succeeded: {join_jobs(after)}")
    if then:
        _submit_then(planned, then, jobs)
    return 0


def add_then(planned: PlannedRun, then: str) -> int:
    """Submit the job of a command for a run whose jobs all wait or run.

    Raises:
        RunConflictError: such a job already waits or runs.
    """
    from aiflux.slurm.monitor import active_jobs
    from aiflux.slurm.submit import refuse_second_then

    refuse_second_then(planned, then)
    _submit_then(planned, then, active_jobs(planned.run))
    return 0


def _submit_then(planned: PlannedRun, then: str, jobs: Sequence[JobId]) -> None:
    from aiflux.slurm.submit import submit_then

    job, log = submit_then(planned, then, jobs)
    print(f"  job {job.number} then executes the command; its log: {log}")


def warn_not_executed(then: str) -> None:
    """Print that the command of --then was not executed, because nothing was left to do."""
    if then:
        print(
            "warning: nothing was left to do, so the command of --then was not executed; execute "
            f"it yourself: bash -c {quote(then)}",
            file=sys.stderr,
        )


def register(plan: Plan, jobs: Sequence[JobId] = ()) -> None:
    """Add a run to the list of `aiflux jobs`."""
    warning = register_plan(plan, jobs)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def write_output(plan: Plan, run: RunDirectory, *, again: bool = False) -> int:
    """Write a run's output from its journals.

    Raises:
        TooManyFailuresError: more requests failed than are allowed.
    """
    counts = merge(plan, run, print, again=again)
    refuse_failures(plan, counts.failed)
    return 0


def run_local(opened: OpenedRun, config: Config, reporter: Reporter | None = None) -> int:
    """Run in the image if Apptainer and an image with the engine are available, else without.

    Args:
        reporter: shows the progress outside an image, instead of the usual one.
    """
    if opened.counts is not None:
        return print_finished(opened.plan, opened.counts)
    image = local_image(opened.plan, config, Path.cwd())
    show_local_choices(config, None if image is None else image.path)
    if image is None:
        return run_here(opened, config.get("gpu_vendor"), reporter)
    return _run(local_script(opened, image.path, config))


def run_here(opened: OpenedRun, vendor: str = "auto", reporter: Reporter | None = None) -> int:
    """Process the run in this process, in the foreground.

    Args:
        vendor: that of the GPUs, or ``auto``.
        reporter: shows the progress, instead of the usual one.
    """
    from aiflux.worker.progress import make_reporter
    from aiflux.worker.shard import Context, work
    from aiflux.worker.stop import Stopper

    if opened.counts is not None:
        return print_finished(opened.plan, opened.counts)
    stopper = Stopper()
    stopper.install()
    context = Context(
        reporter or make_reporter(), stopper, api_key=os.environ.get("AIFLUX_API_KEY")
    )
    context = replace(context, environ=with_vendor(vendor))
    try:
        work(opened.plan, opened.run, 0, context, pull=True)
    finally:
        context.reporter.close()
    return 0


def execute_then(command: str, work: Callable[[], int]) -> int:
    """Do the work, then execute a shell command unless the work was stopped or did not begin.

    Returns:
        the exit code of the work, or if that is 0, that of the command; 128 and the number of the
        signal if one ended it.

    Raises:
        AifluxError: what the work raised.
    """
    failure: AifluxError | None = None
    try:
        code = work()
    except (TooManyFailuresError, EngineError) as error:
        code, failure = int(error.exit_code), error
    ended = code in (ExitCode.OK, ExitCode.FAILURES, ExitCode.ENGINE)
    if ended and command:
        environ = {**os.environ, "AIFLUX_EXIT_CODE": str(code)}
        sys.stdout.flush()
        done = subprocess.run(["bash", "-c", command], env=environ, stdout=sys.stdout, check=False)
        ended_with = done.returncode if done.returncode >= 0 else 128 - done.returncode
        if ended_with:
            print(f"aiflux: the command of --then ended with {ended_with}", file=sys.stderr)
        code = code or ended_with
    if failure is not None:
        raise failure
    return code


def print_finished(plan: Plan, counts: Counts) -> int:
    """Report that a run was already finished.

    Raises:
        TooManyFailuresError: more requests failed than are allowed.
    """
    print(finished_line(plan, counts))
    refuse_failures(plan, counts.failed)
    return 0


_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def pull_in_container(model: str, models_dir: Path, image: Path, *, again: bool = False) -> int:
    """Pull a model with the image's Ollama; return the exit code."""
    return _run(
        render_models(image, models_dir, ["--pull", model, *(["--again"] if again else [])])
    )


def create_in_container(model: str, models_dir: Path, image: Path) -> int:
    """Create a model from the staged GGUF file with the image's Ollama; return the exit code."""
    return _run(render_models(image, models_dir, ["--create", model]))


def _run(script: str) -> int:
    """Run a script in the foreground and pass signals on; it ends the container in good order."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # Under nohup SIGHUP is ignored, and stays so.
    numbers = [n for n in _FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        with temporary_folder() as folder:
            file = folder / "run.sh"
            file.write_bytes(script.encode("utf-8", "surrogateescape"))
            sys.stdout.flush()
            process = subprocess.Popen(["bash", str(file)], start_new_session=True)
            for number in early:
                process.send_signal(number)
            return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

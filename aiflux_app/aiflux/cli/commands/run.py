"""``aiflux run``, ``resume`` and ``merge``: start a run, continue it, and write its output.

A run is processed in Slurm jobs, in the image on this machine, or by a running server.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiflux.api.refusal import undone_if_refused
from aiflux.cli.chains import chain_named
from aiflux.cli.json_output import json_option, print_json, then_status
from aiflux.cli.parser import (
    FILE,
    WholeNumber,
    command,
    input_parameters,
    option,
    settings_options,
    the_input,
)
from aiflux.cli.pipes import kept_input
from aiflux.cli.render.run import dry_run_summary, typed
from aiflux.cli.run_argument import run_argument
from aiflux.cli.start import (
    RunArguments,
    add_then,
    draft_asked,
    execute_then,
    open_here,
    plan_asked,
    print_finished,
    refuse_local_at_url,
    register,
    run_here,
    run_local,
    show_unused_settings,
    submit,
    submit_planned,
    warn_not_executed,
    write_output,
)
from aiflux.core.config.config import Config
from aiflux.core.config.declaration import parse_setting
from aiflux.core.config.settings import BY_NAME, given_settings
from aiflux.core.runs.directory import (
    RunDirectory,
    checked_output,
    named_output,
    own_command,
    user_output,
)
from aiflux.core.runs.input_copy import copy_of_input
from aiflux.core.runs.open import (
    draft_run,
    refuse_contradiction,
    refuse_own_input,
)
from aiflux.core.runs.output import merge_partial
from aiflux.core.runs.plan import Plan, read_plan, refuse_changed_input
from aiflux.core.runs.status_file import (
    failed_text,
    finished_counts,
    finished_line,
    refuse_failures,
)
from aiflux.engines.kinds import engine_kind, kind_named
from aiflux.errors import MissingResultsError, SlurmError, UsageError
from aiflux.estimates.pilot import FEWEST
from aiflux.slurm.commands import located
from aiflux.slurm.monitor import gather
from aiflux.slurm.preflight.local import finding_text
from aiflux.slurm.script import checked_then
from aiflux.util.files import short
from aiflux.util.streams import STDIN
from aiflux.util.text import counted

if TYPE_CHECKING:
    from aiflux.slurm.jobs import JobId
    from aiflux.slurm.submit import PlannedRun


_then_option = option(
    "--then",
    metavar="COMMAND",
    rare=True,
    help="Execute a shell command once the run is over; AIFLUX_EXIT_CODE is the run's",
)


@command(
    "run",
    examples=[
        "aiflux run prompts.jsonl --model llama3.2:3b --output results.json",
        "aiflux run prompts.jsonl --model llama3.2:3b --shards 4 --dry-run",
    ],
    exclusive=[("local", "dry_run"), ("local", "after"), ("pilot", "after"), ("pilot", "then")],
    note="Exit status: 0 success; 2 wrong usage, configuration or input; 3 more requests failed "
    "than --max-failures allows; 4 no engine or model; 5 stopped early, the same command resumes; "
    "1 a bug.",
)
@input_parameters("Requests, *.jsonl; - for stdin", rare=True)
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    help="Results, .json or .jsonl (default: from INPUT's name)",
)
@option("--local", is_flag=True, help="Run on this machine, in the foreground")
@option("--dry-run", is_flag=True, help="Check and plan the run, but do not start it")
@option("--show-script", is_flag=True, help="Print the batch script with --dry-run", rare=True)
@option("--force", is_flag=True, help="Replace an existing output; start a finished run over")
@option(
    "--force-resume",
    is_flag=True,
    rare=True,
    help="Resume although the model or its parameters changed",
)
@option(
    "--no-preflight",
    is_flag=True,
    rare=True,
    help="Skip the checks of Slurm, image and disk space",
)
@option(
    "--pilot",
    type=WholeNumber(FEWEST),
    metavar="K",
    help="Run only K sample requests and estimate the full run",
)
@option(
    "--after",
    multiple=True,
    metavar="RUN|JOB",
    rare=True,
    help="Start once this run, or this job of Slurm, has succeeded (repeatable)",
)
@_then_option
@json_option()
@settings_options("run", "slurm", "paths")
def run(
    input_argument: str | None, input_option: str | None, output: str | None, **more: Any
) -> int:
    """Process a file of requests in Slurm or on this machine, or resume such a run."""
    source = the_input(input_argument, input_option)
    config = Config(arguments=given_settings(more))
    refuse_local_at_url(config, local=more["local"])
    # The estimate of a pilot is of the jobs of the whole run.
    local = more["local"] and more["pilot"] is None
    show_unused_settings(kind_named(config.engine), given_settings(more), local=local)
    refuse_contradiction(
        force=more["force"],
        force_resume=more["force_resume"],
        retry_failed=config.get("retry_failed"),
    )
    path = kept_input(sys.stdin.buffer, output) if source == STDIN else Path(source)
    asked = RunArguments(
        config,
        path,
        named_output(output, path),
        force=more["force"],
        force_resume=more["force_resume"],
        preflight=not more["no_preflight"],
        as_json=more["as_json"],
        after=_jobs_before(config, more["after"]),
        then=_command_after(more["then"]),
    )
    if more["pilot"] is not None:
        from aiflux.cli.commands.estimate import estimate_run
        from aiflux.cli.pilots import Asked

        return estimate_run(
            Asked(
                config,
                asked.input,
                asked.output,
                more["pilot"],
                given={
                    "input": str(path) if source == STDIN else source,
                    "output": output,
                    **given_settings(more),
                },
                local=more["local"],
                again=asked.force,
                preflight=asked.preflight,
                as_json=asked.as_json,
                size_option="--pilot",
                can_wait=False,
            )
        )
    if more["dry_run"]:
        return _dry_run(asked, script=more["show_script"])
    start = _start_here if more["local"] or not asked.managed else submit
    output_path = checked_output(asked.output)
    directory = RunDirectory.of_output(output_path)
    # What came from a pipe is kept: it may not come again.
    copies = () if source == STDIN else (copy_of_input(output_path),)
    with undone_if_refused(directory, directory.path, *copies):
        return then_status(lambda: start(asked), directory) if asked.as_json else start(asked)


def _jobs_before(config: Config, names: Sequence[str]) -> tuple[JobId, ...]:
    """Return the jobs that have to succeed before a run starts.

    Raises:
        UsageError: the run needs no job; or a name is wrong (see ``jobs_to_wait_for``).
    """
    if not names:
        return ()
    if not kind_named(config.engine).managed:
        raise UsageError(
            "--after needs a job, but this run is processed here, by a server that is running",
            "start it when the other one has ended: aiflux watch RUN && aiflux run ...",
        )
    from aiflux.slurm.monitor import jobs_to_wait_for

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    return tuple(dict.fromkeys(job for name in names for job in jobs_to_wait_for(name, warn=warn)))


def _command_after(given: str | None) -> str:
    """Return the command of --then; "" for none.

    Raises:
        ConfigError: it cannot be executed.
    """
    return "" if given is None else checked_then(given)


def _start_here(asked: RunArguments) -> int:
    opened = open_here(asked)

    def work() -> int:
        return run_local(opened, asked.config) if asked.managed else run_here(opened)

    if opened.finished:
        warn_not_executed(asked.then)
    code = work() if opened.finished else execute_then(asked.then, work)
    if not code and not opened.finished:
        name = typed(short(opened.plan.output))
        print(f"answers: aiflux results show {name}    report: aiflux report {name}")
    return code


def _dry_run(asked: RunArguments, *, script: bool) -> int:
    """Show a run's plan; a run whose server is already running needs neither Slurm nor image."""
    planned = plan_asked(asked, write=False) if asked.managed else None
    plan = draft_asked(asked).plan if planned is None else planned.opened.plan
    if asked.as_json:
        print_json(_as_json(plan, planned))
        return 0
    for line in dry_run_summary(plan, planned):
        print(line)
    for _, text in planned.scripts if planned and script else ():
        print()
        print(text, end="")
    return 0


def _as_json(plan: Plan, planned: PlannedRun | None) -> dict[str, Any]:
    """Return what a dry run shows."""
    return {
        "plan": plan.to_json(),
        "image": planned.image if planned else None,
        "scripts": [text for _, text in planned.scripts] if planned else [],
        "warnings": [finding_text(finding) for finding in planned.findings] if planned else [],
    }


@command("resume", examples=["aiflux resume results.json --time 08:00:00"])
@run_argument
@option("--local", is_flag=True, help="Continue on this machine, in the foreground")
@option("--image", metavar="PATH", type=FILE, help="Use another image than before")
@_then_option
@json_option()
@settings_options("slurm")
def resume(
    run: str, as_json: bool, local: bool, image: str | None, then: str | None, **settings: Any
) -> int:
    """Submit the shards of a run that are neither finished nor in the queue.

    Options change the resources requested from Slurm; the others stay as before. A run with
    --engine-url that was started here continues here, in the foreground; --local does so with any
    other run.
    """
    command = _command_after(then)
    chain = chain_named(run)
    if chain is not None:
        from aiflux.api.chain import chain_view

        raise UsageError(
            f"{run!r} is a chain of several runs",
            f"continue it: {chain_view(chain).command()}",
        )
    directory = located(run)

    def work() -> int:
        if local or _started_here(directory):
            kind = engine_kind(read_plan(directory).options)
            show_unused_settings(kind, given_settings(settings), local=True)
            return _resume_here(directory, {"image": image, **given_settings(settings)}, command)
        return _submit_rest(run, directory, image, settings, command)

    return then_status(work, directory) if as_json else work()


def _started_here(run: RunDirectory) -> bool:
    # Jobs can use a server elsewhere, too (SlurmRunner): submitted runs are submitted again.
    return not engine_kind(read_plan(run).options).managed and not run.submissions.exists()


def _submit_rest(
    name: str, run: RunDirectory, image: str | None, settings: Mapping[str, Any], then: str
) -> int:
    from aiflux.slurm.submit import plan_resume

    changes = {
        name: parse_setting(BY_NAME[name], value, f"the argument {BY_NAME[name].option}")
        for name, value in given_settings(settings).items()
        if value is not None
    }
    path = Config(arguments={"image": image}).image if image else None
    planned = plan_resume(run, changes, path, os.environ)
    if planned.opened.open_shards:
        refuse_changed_input(planned.opened.plan, "; nothing was sent")
    if planned.opened.open_shards or planned.opened.finished or not planned.active:
        return submit_planned(planned, then=then)
    if then:
        return add_then(planned, then)
    raise SlurmError(
        f"the rest of {planned.opened.plan.output} is already pending or running "
        f"({counted(planned.active, 'shard')})",
        f"aiflux watch {typed(name)}",
    )


def _resume_here(run: RunDirectory, settings: Mapping[str, Any], then: str) -> int:
    """Continue a run in the foreground, like `aiflux run` with the same options.

    Args:
        settings: of the image and its container.
        then: shell command to execute afterwards.
    """
    from aiflux.slurm.submit import refuse_second

    if run.submissions.exists():
        refuse_second(run)
    run.refuse_foreign()
    plan = read_plan(run)
    counts = finished_counts(plan, run)
    if counts is not None and not plan.options.retry_failed:
        warn_not_executed(then)
        return print_finished(plan, counts)
    refuse_changed_input(plan, "; nothing was sent")
    kind = engine_kind(plan.options)
    opened = draft_run(
        plan.input_path, plan.output, plan.options, plan.models_dir, kind, shards=len(plan.shards)
    ).open()

    def work() -> int:
        return run_local(opened, Config(arguments=settings)) if kind.managed else run_here(opened)

    if opened.finished:
        warn_not_executed(then)
        return work()
    register(opened.plan)
    return execute_then(then, work)


@command(
    "merge", examples=["aiflux merge results.json --partial"], exclusive=[("again", "partial")]
)
@run_argument
@option("--again", is_flag=True, help="Write the output although it already exists")
@option(
    "--partial",
    is_flag=True,
    help="Write the results so far to OUTPUT.partial.json, .jsonl, .csv, ...; the run continues",
)
@json_option()
def merge(run: str, again: bool, partial: bool, as_json: bool) -> int:
    """Write the output of a run whose requests are all finished.

    The last job of a run does this itself. It is needed by hand only if that job was killed
    while it merged.
    """
    directory = located(run)
    if partial:
        return _merge_partial(directory, as_json=as_json)
    if as_json:
        return then_status(lambda: _merge(directory, again=again), directory)
    return _merge(directory, again=again)


def _merge_partial(run: RunDirectory, *, as_json: bool) -> int:
    plan = read_plan(run)
    path, counts = merge_partial(plan, run)
    if user_output(plan.output) != plan.output:
        path = _partial_table(user_output(plan.output), path, counts.failed)
    if as_json:
        done = {
            "written": counts.total,
            "failed": counts.failed - counts.left_out,
            "left_out": counts.left_out,
        }
        print_json({"output": path, **done, "total": plan.requests})
    else:
        failed = failed_text(counts.failed, counts.left_out)
        results = counted(plan.requests, "result")
        print(f"wrote {counts.total} of {results} ({failed}) to {path}")
    return 0


def _partial_table(path: Path, results: Path, failed: int) -> Path:
    """Write the answers so far as a table next to the one that the user named; return its path."""
    from aiflux.converters.answer_table import AnswerTable
    from aiflux.converters.results import results_to_table

    table = AnswerTable(path)
    record = table.record()
    if record is None:
        return results
    target = path.with_name(f"{path.stem}.partial{path.suffix}")
    results_to_table(results, target, table.options(record, failed))
    return target


def _merge(run: RunDirectory, *, again: bool) -> int:
    plan = read_plan(run)
    refuse_own_input(plan.input_path, plan.output)
    done = finished_counts(plan, run, changed_ok=again)
    if done is not None and not again:
        print(finished_line(plan, done))
        refuse_failures(plan, done.failed)
        return 0
    try:
        return write_output(plan, run, again=again)
    except MissingResultsError as error:
        name, view = typed(short(user_output(plan.output))), gather(run)
        how = view.next_command or f"run the same `{own_command(plan.output)}` command again"
        raise MissingResultsError(
            error.message,
            f"{f'continue it: {how}' if view.ended else f'wait for it: aiflux watch {name}'}; or "
            f"write the results so far: aiflux merge --partial {name}",
            error.shards,
        ) from error

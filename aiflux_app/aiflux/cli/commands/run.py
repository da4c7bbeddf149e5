"""``aiflux run``: in a Slurm job, in the image on this machine, or on a running server."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from aiflux.cli.start import (
    register,
    run_here,
    run_local,
    show_local_choices,
    submit_planned,
)
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.directory import RunDirectory, checked_output, named_output
from aiflux.core.runs.open import RunDraft, draft_run
from aiflux.core.runs.plan import Plan
from aiflux.engines.kinds import engine_kind, kind_named
from aiflux.errors import UsageError
from aiflux.estimates.estimate import carry_estimate
from aiflux.estimates.pilot import FEWEST
from aiflux.slurm.preflight.local import check_fields, finding_text
from aiflux.util.files import short
from aiflux.util.streams import STDIN

if TYPE_CHECKING:
    from aiflux.slurm.submit import PlannedRun


@command(
    "run",
    examples=[
        "aiflux run prompts.jsonl --model llama3.2:3b --output results.json",
        "aiflux run prompts.jsonl --model llama3.2:3b --shards 4 --dry-run",
    ],
    exclusive=[("local", "dry_run")],
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
@option("--force", is_flag=True, help="Overwrite an existing output")
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
@json_option()
@settings_options("run", "slurm", "paths")
def run(
    input_argument: str | None, input_option: str | None, output: str | None, **more: Any
) -> int:
    """Process a file of requests in Slurm or on this machine, or resume such a run."""
    source = the_input(input_argument, input_option)
    config = Config(arguments=given_settings(more))
    if more["local"] and config.get("engine_url"):
        raise UsageError(
            "--local and --engine-url cannot be combined",
            "--local starts an engine; --engine-url uses a server that is already running",
        )
    path = kept_input(sys.stdin.buffer, output) if source == STDIN else Path(source)
    asked = _Asked(
        config,
        path,
        named_output(output, path),
        force=more["force"],
        force_resume=more["force_resume"],
        preflight=not more["no_preflight"],
        as_json=more["as_json"],
    )
    if more["pilot"] is not None:
        from aiflux.cli.commands.estimate import Asked, estimate_run

        return estimate_run(
            Asked(
                config,
                asked.input,
                asked.output,
                more["pilot"],
                given={"input": source, "output": output, **given_settings(more)},
                local=more["local"],
                preflight=asked.preflight,
                as_json=asked.as_json,
            )
        )
    if more["dry_run"]:
        return _dry_run(asked, script=more["show_script"])
    start = _start_here if more["local"] or not asked.managed else _submit
    if asked.as_json:
        directory = RunDirectory.of_output(checked_output(asked.output))
        return then_status(lambda: start(asked), directory)
    return start(asked)


@dataclass(frozen=True)
class _Asked:
    """What a command line asks for."""

    config: Config
    input: Path
    output: Path
    force: bool
    force_resume: bool
    preflight: bool
    as_json: bool

    @property
    def managed(self) -> bool:
        """Whether AI-Flux starts the engine; if not, a server is already running."""
        return kind_named(self.config.engine).managed


def _draft(asked: _Asked) -> RunDraft:
    """Plan a run that is processed here."""
    options = asked.config.run_options()
    return draft_run(
        asked.input,
        asked.output,
        options,
        asked.config.models_dir,
        engine_kind(options),
        force=asked.force,
        force_resume=asked.force_resume,
    )


def _start_here(asked: _Asked) -> int:
    """Process a run in the foreground, and register it for `aiflux jobs`."""
    if not asked.managed:
        show_local_choices(asked.config, None)
    opened = _draft(asked).open()
    if not opened.finished:
        register(opened.plan)
        carry_estimate(opened.plan, opened.run)
        for finding in check_fields(opened.plan):
            print(f"warning: {finding_text(finding)}", file=sys.stderr)
    code = run_local(opened, asked.config) if asked.managed else run_here(opened)
    if not code and not opened.finished:
        name = typed(short(opened.plan.output))
        print(f"answers: aiflux results show {name}    report: aiflux report {name}")
    return code


def _plan_job(asked: _Asked, *, write: bool) -> PlannedRun:
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


def _submit(asked: _Asked) -> int:
    return submit_planned(_plan_job(asked, write=True))


def _dry_run(asked: _Asked, *, script: bool) -> int:
    """Show a run's plan; a run whose server is already running needs neither Slurm nor image."""
    planned = _plan_job(asked, write=False) if asked.managed else None
    plan = _draft(asked).plan if planned is None else planned.opened.plan
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

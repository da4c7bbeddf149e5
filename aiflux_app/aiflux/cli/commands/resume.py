"""``aiflux resume``: submit the rest of a run, or continue it on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from aiflux.cli.json_output import json_option, then_status
from aiflux.cli.parser import FILE, command, option, settings_options
from aiflux.cli.run_argument import located, run_argument
from aiflux.cli.start import register, run_here, run_local, submit_planned
from aiflux.core.config.config import Config
from aiflux.core.config.declaration import parse_setting
from aiflux.core.config.settings import BY_NAME, given_settings
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.open import draft_run
from aiflux.core.runs.plan import read_plan
from aiflux.engines.kinds import engine_kind
from aiflux.errors import SlurmError
from aiflux.util.text import counted


@command("resume", examples=["aiflux resume results.json --time 08:00:00"])
@run_argument
@option("--local", is_flag=True, help="Continue on this machine, in the foreground")
@option("--image", metavar="PATH", type=FILE, help="Use another image than before")
@json_option()
@settings_options("slurm")
def resume(run: str, as_json: bool, local: bool, image: str | None, **settings: Any) -> int:
    """Submit the shards of a run that are neither finished nor in the queue.

    Options change the resources requested from Slurm; the others stay as before. A run with
    --engine-url that was started here continues here, in the foreground; --local does so with any
    other run.
    """
    directory = located(run)

    def work() -> int:
        if local or _started_here(directory):
            return _continue_here(directory, image)
        return _submit(run, directory, image, settings)

    return then_status(work, directory) if as_json else work()


def _started_here(run: RunDirectory) -> bool:
    # Jobs can use a server elsewhere, too (SlurmRunner): submitted runs are submitted again.
    return not engine_kind(read_plan(run).options).managed and not run.submissions.exists()


def _submit(name: str, run: RunDirectory, image: str | None, settings: Mapping[str, Any]) -> int:
    from aiflux.slurm.submit import plan_resume

    changes = {
        name: parse_setting(BY_NAME[name], value, f"the argument {BY_NAME[name].option}")
        for name, value in given_settings(settings).items()
        if value is not None
    }
    path = Config(arguments={"image": image}).image if image else None
    planned = plan_resume(run, changes, path, os.environ)
    if planned.opened.open_shards or planned.opened.finished or not planned.active:
        return submit_planned(planned)
    raise SlurmError(
        f"the rest of {planned.opened.plan.output} is already pending or running "
        f"({counted(planned.active, 'shard')})",
        f"aiflux watch {name}",
    )


def _continue_here(run: RunDirectory, image: str | None) -> int:
    """Continue a run in the foreground, like `aiflux run` with the same options."""
    from aiflux.slurm.submit import refuse_second

    if run.submissions.exists():
        refuse_second(run)
    plan = read_plan(run)
    kind = engine_kind(plan.options)
    opened = draft_run(
        plan.input_path, plan.output, plan.options, plan.models_dir, kind, shards=len(plan.shards)
    ).open()
    if not opened.finished:
        register(opened.plan)
    if not kind.managed:
        return run_here(opened)
    return run_local(opened, Config(arguments={"image": image}))

"""``aiflux.chain``: the steps of a `steps.yaml` one after another, and the path of their table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aiflux.api.chain import answering, refuse_settings, step_view
from aiflux.api.run import Run, run
from aiflux.converters.chain.folder import ChainRuns, StepRecord
from aiflux.converters.chain.steps_file import layered, read_chain
from aiflux.core.config.settings import option_words
from aiflux.core.runs.output import merge
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import refuse_failures
from aiflux.errors import StoppedError
from aiflux.slurm.monitor import gather
from aiflux.slurm.run_view import RunState, RunView, ended_early
from aiflux.slurm.runner import SlurmRunner
from aiflux.util.files import absolute, expanded


def chain(
    steps: str | Path,
    output: str | Path | None = None,
    *,
    local: bool = False,
    force: bool = False,
    progress: bool = True,
    workspace: str | Path | None = None,
    **options: Any,
) -> Path:
    """Ask about each row of a table in several steps; return the path of the table.

    It waits for each step. Called again with the same arguments, it finishes what is missing. In
    Slurm, a step is submitted when the one before has ended.

    Args:
        steps: the file of the steps, as for `aiflux chain`.
        output: the table to write, instead of the file's.
        local: start the engines on this machine.
        force: overwrite a table; run steps again that changed.
        progress: show the progress in a notebook or on a terminal.
        options: settings of all steps, which replace those of the file; as in ``aiflux.run``.

    Raises:
        AifluxError: as ``aiflux.run`` does; TooManyFailuresError if more requests of a step failed
            than are allowed, or more rows end without a usable answer, which the table then
            shows; StoppedError if its run ended before it was finished.
    """
    folder = Path.cwd() if workspace is None else absolute(workspace)
    target = None if output is None else folder / expanded(output)
    runs = ChainRuns.of(read_chain(folder / expanded(steps), target))
    runner = SlurmRunner(workspace=folder)
    given = {step.name: layered(step.settings, options) for step in runs.chain.steps}
    options_of = {
        name: runner.configured(**settings)[0].run_options() for name, settings in given.items()
    }
    for step in runs.chain.steps:
        refuse_settings(step, options_of[step.name])
    made_with = [answering(each) for each in options_of.values()]
    active = [name for name in runs.names if _active(runs, name)]
    given_words = option_words({**options, "retry_failed": None, "local": local or None})
    runs.begin(made_with, force=force, active=active, options=given_words, place=folder)
    for step in runs.chain.steps:
        started = Run(runs.folder.run(step.name).path, runs.folder.results(step.name))
        if not _active(runs, step.name):
            again = force or bool(given[step.name].get("retry_failed"))
            allowed = options_of[step.name].allowed_failures
            _, replaced = runs.prepare(step, allowed, force=again)
            if runs.folder.asks_nothing(step.name):
                continue
            run(
                runs.folder.requests(step.name),
                runs.folder.results(step.name),
                local=local,
                force=replaced,
                workspace=folder,
                **given[step.name],
            )
        _refuse_unfinished(step.name, started.wait(progress=progress), started)
    runs.write({name: each.allowed_failures for name, each in options_of.items()}, force=force)
    runs.refuse_unusable()
    return runs.folder.output


def _active(runs: ChainRuns, step: str) -> bool:
    return step_view(runs.folder, StepRecord(step, {}, {})).active


def _refuse_unfinished(step: str, view: RunView, started: Run) -> None:
    """Raise an error unless a step is finished, with as many failures as are allowed.

    Raises:
        StoppedError, TooManyFailuresError: it is not.
    """
    plan = read_plan(started.directory)
    if view.state is RunState.NOT_MERGED:
        merge(plan, started.directory, lambda _: None)
        view = gather(started.directory)
    if not view.finished:
        raise StoppedError(
            ended_early(view, f"step {step}"),
            f"{view.remedy or 'see aiflux status'}; call aiflux.chain again to resume it",
        )
    refuse_failures(plan, view.without_answer)

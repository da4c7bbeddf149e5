"""Estimate a chain: a sample of its rows goes through all steps."""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.api.chain import chain_view
from aiflux.cli.commands.chain import ChainWork
from aiflux.cli.engine_list import given_engines
from aiflux.cli.json_output import print_json
from aiflux.cli.pilots import hardware, pilot_walltime
from aiflux.cli.render.estimate import chain_forecast, full_command
from aiflux.cli.run_argument import make_console, show, text_width
from aiflux.converters.chain.folder import ChainFolder, ChainRuns
from aiflux.converters.chain.steps_file import Step, layered, read_chain
from aiflux.core.batch.request import custom_id_of
from aiflux.core.config.settings import CHUNK, SKIP, given_settings, option_words
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import read_status
from aiflux.errors import (
    InputError,
    RunConflictError,
    StoppedError,
    UsageError,
)
from aiflux.estimates.chain import ChainEstimate, StepEstimate, step_requests
from aiflux.estimates.energy import Rates
from aiflux.estimates.estimate import LOCAL, SLURM, SampledRows
from aiflux.estimates.estimate import estimate as make_estimate
from aiflux.estimates.pilot import Drawn, Pilot, draw_requests, observe
from aiflux.util.files import absolute, expanded, write_json
from aiflux.util.lines import read_lines


def estimate_chain(source: str, output: str | None, more: Mapping[str, Any]) -> int:
    """Ask about a sample of the rows in all steps, and estimate the whole chain.

    Args:
        source: the file of the steps.
        more: the options of `aiflux estimate`.
    """
    (given,) = _one_engine(given_engines("estimate", given_settings(more)))
    path = expanded(source)
    target = None if output is None else absolute(output)
    whole = ChainWork(ChainRuns.of(read_chain(path, target)), {**more, **given})
    whole.show_unused(given)
    pilot = Pilot.of_output(whole.folder.output)
    drawn = _drawn(whole, pilot, more)
    lines = [line for _, _, line in read_lines(pilot.input)]
    names = [custom_id_of(line) or "" for line in lines]
    chain = whole.runs.chain
    steps = tuple(_pilot_step(whole, step) for step in chain.steps)
    small = replace(chain, output=pilot.output, steps=steps, only=tuple(names))
    kept = {name: value for name, value in more.items() if name not in given_settings(more)}
    asked = {"input": source, "output": output, **given, "local": more["local"] or None}
    asked["no_preflight"] = more["no_preflight"] or None
    work = ChainWork(
        ChainRuns.of(small),
        {**kept, "no_wait": not (more["wait"] or whole.local), "force": False},
    )
    work.options = option_words({**asked, "requests": more["requests"], "input": None})
    work.again = "run the same command again for the estimate; --wait waits for the jobs"
    code = None
    if not all(work.folder.finished(step.name) for step in steps):
        with redirect_stdout(sys.stderr):
            code = work.run_steps()
    if code is not None:
        if more["as_json"]:
            print_json({"estimate": None, "pilot": chain_view(work.folder).to_json()})
        return code
    sizes = [len(line) for line in lines]
    found = ChainEstimate(
        drawn.whole,
        drawn.requests,
        tuple(_step_estimate(whole, work, step, drawn, names, sizes) for step in chain.steps),
    )
    rates = Rates.of(whole.configs[chain.steps[0].name])
    write_json(pilot.estimate, found.to_json(rates))
    command = full_command(asked, False, None, "chain")
    if more["as_json"]:
        print_json({"estimate": found.to_json(rates), "command": command})
    else:
        console = make_console()
        show(console, chain_forecast(found, command, rates, text_width(console)))
    return 0


def _one_engine(given: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    if len(given) > 1:
        raise UsageError(
            "several engines cannot be compared with a chain",
            "give one --engine, or name the engine of each step in the file",
        )
    return given


def _drawn(whole: ChainWork, pilot: Pilot, more: Mapping[str, Any]) -> Drawn:
    """Return the sample of rows; a new one if the chain or its settings changed.

    Raises:
        RunConflictError: a job or a process works on a pilot with other settings.
    """
    chain, first = whole.runs.chain, whole.steps[0]
    settings = {
        "chain": [[step.name, step.asked, step.chosen_by] for step in chain.steps],
        "options": [config.run_options().to_json() for config in whole.configs.values()],
        "hardware": [
            hardware(whole.configs[step.name]) for step in chain.steps if whole.in_slurm(step)
        ],
        "local": more["local"],
        "source": whole.runs.source_state,
        "requests": more["requests"],
    }
    known = None if more["force"] else pilot.drawn(settings)
    if known is not None:
        return known
    folder = ChainFolder(pilot.output)
    if folder.record() is not None and any(step.active for step in chain_view(folder).steps):
        raise RunConflictError(
            "a pilot of this chain is still at work",
            f"wait for it, or cancel it: aiflux cancel {quote(str(pilot.output))}",
        )

    def draw(target: Path) -> Drawn:
        every = target.with_name("all.jsonl")
        try:
            allowed = whole.configs[first.name].run_options().allowed_failures
            count = whole.runs.draft(first, allowed, every)
            if not count:
                raise InputError(
                    f"no row of {str(chain.source)!r} passes the filter of the step {first.name}",
                    "correct the filter: there is nothing to estimate",
                )
            drawn = draw_requests(every, count, more["requests"], target)
            return replace(drawn, whole=count)
        finally:
            every.unlink(missing_ok=True)

    return pilot.begin_with(settings, draw)


def _pilot_step(whole: ChainWork, step: Step) -> Step:
    """Return a step as its pilot does it: in one small job, with any number of failures."""
    config = whole.configs[step.name]
    own = layered(step.settings, given_settings(whole.given))
    own.pop("time_min", None)
    too_long = CHUNK if config.get("too_long") == CHUNK else SKIP
    own |= {"max_failures": "100%", "retry_failed": False, "too_long": too_long}
    if whole.in_slurm(step):
        limit = pilot_walltime(config.get_slurm_config())
        own |= {"shards": 1, **({} if limit is None else {"time": limit})}
    return replace(step, settings=own)


def _step_estimate(
    whole: ChainWork,
    work: ChainWork,
    step: Step,
    drawn: Drawn,
    names: Sequence[str],
    sizes: Sequence[int],
) -> StepEstimate:
    """Return the estimate of a step, whose requests are of some of the sampled rows."""
    folder, config = work.folder, whole.configs[step.name]
    asked = [custom_id_of(line) or "" for _, _, line in read_lines(folder.requests(step.name))]
    known = {name: place for place, name in enumerate(names)}
    places = [known[_row_of(name, known)] for name in asked]
    rows = SampledRows(sizes, drawn.whole, drawn.bytes, places)
    requests = step_requests(rows, first=step is whole.steps[0])
    if not asked:
        return StepEstimate(step.name, requests, None)
    run = folder.run(step.name)
    plan, status = read_plan(run), read_status(run, 0)
    observations = observe(plan, run)
    if status is None or len(observations) != len(asked):
        raise StoppedError(f"the pilot in {run.path} left no results", "run it again: --force")
    plan = replace(plan, options=config.run_options())
    slurm = whole.in_slurm(step)
    where = SLURM if slurm else LOCAL if whole.given["local"] else config.get("engine_url") or LOCAL
    limit = config.get_slurm_config().time if slurm else None
    found = make_estimate(plan, drawn, observations, status, limit, where, rows=rows)
    return StepEstimate(step.name, requests, found)


def _row_of(name: str, rows: Container[str]) -> str:
    """Return the row of a sample: the name of the third sample of ``row-1`` is ``row-1.3``."""
    row = name
    while row and row not in rows:
        row = row.rpartition(".")[0]
    if not row:
        raise StoppedError(
            f"the pilot has a request {name!r} of no row of its sample", "run it again: --force"
        )
    return row

"""Find what would make every batch fail, before the gateway accepts any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from aiflux.api.local_run import local_image, local_program
from aiflux.core.batch.input_file import InputSummary, Mark
from aiflux.core.config.config import Config
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan, make_plan
from aiflux.engines.external.served import models_at
from aiflux.engines.kinds import engine_kind
from aiflux.engines.ranks import refuse_several_nodes
from aiflux.errors import EngineError
from aiflux.slurm.limits import site_limits
from aiflux.slurm.preflight.cluster import preflight
from aiflux.slurm.preflight.local import Finding, check_models, refuse
from aiflux.slurm.submit import job_script


def check_gateway(
    config: Config, folder: Path, workspace: Path, *, local: bool
) -> tuple[Finding, ...]:
    """Make the checks of `aiflux run` that do not depend on the requests of a batch.

    Args:
        folder: directory of the batches.
        workspace: first directory to search for an image.

    Returns:
        warnings.

    Raises:
        AifluxError: no batch could be processed.
    """
    options = config.run_options()
    kind = engine_kind(options)
    if local or not kind.managed:
        refuse_several_nodes(options)
    plan = _plan(config, options, folder / "batch.jsonl")
    if not kind.managed:
        return tuple(_check_server(options))
    if local:
        if plan is None:
            local_program(options, config, workspace)
            return ()
        local_image(plan, config, workspace)
        findings = tuple(check_models(plan, local=True))
        refuse(findings)
        return findings
    slurm = config.get_slurm_config().checked()
    paths = (folder / "input.jsonl", folder / "batch.jsonl")
    limits = site_limits(os.environ)
    _, image = job_script(config, slurm, *paths, options, workspace, limits, check=True)
    findings = preflight(config, slurm, options, image, plan, cwd=workspace)
    refuse(findings)
    return findings


def _plan(config: Config, options: RunOptions, output: Path) -> Plan | None:
    """Return the plan of a batch without requests; None if the requests are to name the model."""
    if options.model is None and not options.replace_model:
        return None
    nothing = InputSummary(
        path=output.with_name("input.jsonl"),
        size=0,
        requests=0,
        digest="",
        endpoints={},
        models=(),
        unnamed=0,
        marks=(Mark(0, 0),),
    )
    return make_plan(nothing, output, options, config.models_dir, engine_kind(options))


def _check_server(options: RunOptions) -> Iterator[Finding]:
    """Yield warnings: a server that does not answer, or lacks the model, may be fixed later.

    Raises:
        UsageError: no engine is served under the name.
    """
    url = options.engine_url or ""
    try:
        models = models_at(url, options.engine_ca)
    except EngineError as error:
        yield Finding("warning", error.message, error.remedy or "")
        return
    refusal = None if options.model is None else models.refusal(options.model)
    if refusal is not None:
        yield Finding("warning", refusal.message, refusal.remedy or "")

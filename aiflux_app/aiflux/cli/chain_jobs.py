"""Check the runs of a chain's steps before the first one starts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from aiflux.api.local_run import local_image
from aiflux.core.config.config import Config
from aiflux.core.config.settings import SEND
from aiflux.core.runs.open import draft_run
from aiflux.engines.kinds import engine_kind
from aiflux.engines.ranks import refuse_several_nodes
from aiflux.errors import AifluxError, PreflightError
from aiflux.slurm.preflight.local import Finding, check_fields, finding_text
from aiflux.slurm.submit import plan_job
from aiflux.util.text import counted


@dataclass(frozen=True)
class StepRun:
    """The run of a step as it would be started.

    Attributes:
        requests: its own, or those of an earlier step if they are not known yet.
        own: whether they are its own.
        in_slurm: whether it is done by jobs.
        replaces: whether its requests are to replace others of the run.
    """

    name: str
    config: Config
    requests: Path
    output: Path
    own: bool
    in_slurm: bool
    replaces: bool = False

    def check(self, *, preflight: bool) -> tuple[Finding, ...]:
        """Plan the run without a trace on the disk; return the warnings.

        Raises:
            AifluxError: it cannot work.
        """
        config, options = self.config, self.config.run_options()
        if not self.own:  # the prompts of another step can be longer
            options = replace(options, too_long=SEND)
        if self.in_slurm:
            return plan_job(
                config,
                config.get_slurm_config(),
                self.requests,
                self.output,
                options,
                force=self.replaces,
                check=preflight,
                write=False,
            ).findings
        refuse_several_nodes(options)
        kind = engine_kind(options)
        plan = draft_run(
            self.requests, self.output, options, config.models_dir, kind, force=self.replaces
        ).plan
        if kind.managed:
            local_image(plan, config, Path.cwd())
        return tuple(check_fields(plan))


def check_steps(runs: Iterable[StepRun], *, preflight: bool) -> dict[str, tuple[Finding, ...]]:
    """Check the runs of steps; return the warnings of each.

    Args:
        preflight: check Slurm, image and disk space, too.

    Raises:
        AifluxError: some cannot work; names all steps that have the problems.
    """
    found: dict[str, tuple[Finding, ...]] = {}
    refused: dict[str, AifluxError] = {}
    for run in runs:
        try:
            found[run.name] = run.check(preflight=preflight)
        except AifluxError as error:
            refused[run.name] = error
    _refuse(refused)
    return found


def show_warnings(found: Mapping[str, Iterable[Finding]]) -> None:
    """Print the warnings of steps on stderr."""
    for name, findings in found.items():
        for finding in findings:
            print(f"warning: step {name}: {finding_text(finding)}", file=sys.stderr)


def _refuse(refused: Mapping[str, AifluxError]) -> None:
    """Raise one error for the problems of all steps, if there are any."""
    if not refused:
        return
    one, *others = refused.values()
    steps = f"{'step' if not others else 'steps'} {', '.join(refused)}"
    if not others:
        one.message = f"{steps}: {one.message}"
        raise one
    texts = (text for error in refused.values() for text in _problems(error))
    problems = tuple(dict.fromkeys(texts))
    raise PreflightError(
        f"{steps}: {counted(len(problems), 'problem')} found; no job was submitted",
        "fix them, or skip the checks with --no-preflight",
        tuple(f"{number}. {text}" for number, text in enumerate(problems, start=1)),
    ) from one


def _problems(error: AifluxError) -> list[str]:
    if isinstance(error, PreflightError) and error.problems:
        return [text.partition(". ")[2] for text in error.problems]  # they are numbered
    text = "".join([error.message, *(f"\n     {problem}" for problem in error.problems)])
    return [f"{text}\n     -> {error.remedy}" if error.remedy else text]

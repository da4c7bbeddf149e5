"""Batch scripts as text: pure functions of what is to be run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from aiflux.core.config.config import SlurmConfig
from aiflux.errors import ConfigError
from aiflux.slurm.directives import job_directives, wants_gpus

_NAME_LENGTH = 64


@dataclass(frozen=True)
class JobScript:
    """What one job's script says. Paths are absolute and not resolved.

    Attributes:
        name: the job's name.
        log: folder of the job's logs.
        models_dir: None when the engine is elsewhere; the job is then not sealed.
        shard: what a job that is no array works on.
        tasks: the value of ``--array``, such as ``0-99%8``; None for a job that is no array.
        first: the shard of an array's task 0.
        drain_seconds: what requests in flight get when the time is up.
        max_requeues: 0 keeps the job from going back to the queue by itself; the worker counts.
        engine_ca: certificates to trust at an engine elsewhere; the container must see them.
    """

    name: str
    slurm: SlurmConfig
    image: Path
    input: Path
    output_dir: Path
    models_dir: Path | None
    run_dir: Path
    log: Path
    shard: int = 0
    tasks: str | None = None
    first: int = 0
    drain_seconds: float = 30.0
    max_requeues: int = 20
    engine_ca: str | None = None


def job_name(output: Path) -> str:
    """Return ``aiflux-<output stem>``, of letters, digits and ``._-`` only."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", output.stem).strip("-")
    return f"aiflux-{stem}"[:_NAME_LENGTH].rstrip("-")


def render(job: JobScript) -> str:
    """Return the script that works on one shard of a plan, or on several as an array.

    Raises:
        ConfigError: a value is wrong, or cannot stand in a batch script.
    """
    slurm = job.slurm.checked()
    lines = [
        "#!/bin/bash",
        *job_directives(job.name, slurm, job.log, tasks=job.tasks, drain_seconds=job.drain_seconds),
        "",
        "# Written by `aiflux run`. Submitted again as it is, the run goes on where it stopped.",
        "",
        _assign("image", job.image),
        _assign("input", job.input),
        _assign("output_dir", job.output_dir),
        _assign("models_dir", job.models_dir or ""),
        _assign("engine_ca", job.engine_ca or ""),
        _assign("run_dir", job.run_dir),
        *_shard(job),
        _assign("max_requeues", job.max_requeues),
        _assign("want_seal", int(slurm.seal)),
        'prepare_args=(--run-dir "$run_dir" --prepare)',
        *_site(slurm),
    ]
    for line in lines:
        _refuse_ends(line)
    return "\n".join([*lines, "", _part("job.sh")])


def generic_script() -> str:
    """Return ``slurm/run.sbatch``: any input, named on sbatch's command line."""
    slurm = SlurmConfig().checked()
    lines = [
        "#!/bin/bash",
        *job_directives("aiflux", slurm, None),
        "",
        "# Made by `make slurm/run.sbatch`; edit aiflux_app/aiflux/slurm/*.sh instead.",
        "",
        _part("lookup.sh"),
        *_site(slurm),
        "",
        _part("job.sh"),
    ]
    return "\n".join(lines)


def _shard(job: JobScript) -> Iterator[str]:
    if job.tasks is None:
        yield _assign("shard", job.shard)
    else:
        yield _assign("first", job.first)
        yield "shard=$((first + SLURM_ARRAY_TASK_ID))"


def _site(slurm: SlurmConfig) -> Iterator[str]:
    yield _array("gpu_flags", ["--nv"] if wants_gpus(slurm) else [])
    yield _array("modules", slurm.modules)
    yield "site_setup() {"
    yield "    :"
    yield from (f"    {line}" for line in slurm.setup)
    yield "}"


def _assign(name: str, value: str | int | Path) -> str:
    return f"{name}={shlex.quote(str(value))}"


def _array(name: str, values: Iterable[str]) -> str:
    return f"{name}=({' '.join(shlex.quote(value) for value in values)})"


def _part(name: str) -> str:
    text = files("aiflux.slurm").joinpath(name).read_text(encoding="utf-8")
    return re.sub(r"\A# shellcheck .*\n", "", text)


def _refuse_ends(line: str) -> None:
    """Refuse what would end a line early: of the directives, of an assignment or of ``setup``.

    sbatch refuses a script with DOS line ends, and bash drops a NUL.
    """
    if re.search(r"[\n\0]|\r\Z", line):
        raise ConfigError(
            f"a line of the batch script cannot hold a line break or a NUL: {line!r}",
            "remove it from the setting, or choose another name for the file",
        )

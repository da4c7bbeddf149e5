"""Check Slurm on this site for ``aiflux doctor``."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping

from aiflux.core.config.config import SlurmConfig
from aiflux.slurm.cluster import Facts, ask_cluster
from aiflux.slurm.commands import call, clean_environment, words
from aiflux.slurm.preflight.cluster import cluster_checks, gpu_partitions
from aiflux.slurm.preflight.local import collect
from aiflux.util.diagnosis import Diagnosis, fail, ok, warn
from aiflux.util.text import counted

_OLDEST = (20, 11)
_NEEDED = ("sbatch", "squeue", "scancel", "scontrol")


def scheduler(slurm: SlurmConfig, environ: Mapping[str, str] | None = None) -> Iterator[Diagnosis]:
    """Report Slurm's version, its limits, and whether the default job would fit."""
    environment = os.environ if environ is None else environ
    missing = [name for name in _NEEDED if shutil.which(name, path=environment.get("PATH")) is None]
    if missing:
        yield fail(
            "slurm",
            f"{', '.join(missing)} not on PATH: jobs cannot be submitted from here",
            "log in to a login node, or run `module load slurm`; aiflux run --local needs no Slurm",
        )
        return
    asked = call(["scontrol", "show", "config"], clean_environment(environment))
    if asked.returncode != 0:
        yield fail(
            "slurm",
            f"Slurm does not respond: {words(asked)}",
            "try again in a minute; if the problem persists, ask the site",
        )
        return
    facts = ask_cluster(environment)
    yield _version(facts)
    yield from _limits(facts)
    yield from _accounting(facts)
    yield from gpu_partitions(facts, slurm)
    yield from _defaults(facts, slurm)


def _version(facts: Facts) -> Diagnosis:
    text = facts.settings.get("SLURM_VERSION", "?")
    found = f"{text}, cluster {facts.settings.get('ClusterName', '?')}"
    match = re.match(r"(\d+)\.(\d+)", text)
    if match and (int(match[1]), int(match[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return warn(
            "slurm", f"{found}: AI-Flux requires {oldest} or later", "check the script (--dry-run)"
        )
    return ok("slurm", found)


def _limits(facts: Facts) -> Iterator[Diagnosis]:
    size = facts.settings.get("MaxArraySize", "1001")
    if size in ("0", "1"):
        yield warn("arrays", "job arrays are disabled", "keep --shards at 1")
    elif size.isdigit():
        yield ok(
            "arrays", f"up to {int(size) - 1} tasks; more shards are split over several arrays"
        )
    requeue = facts.settings.get("JobRequeue") == "1"
    yield ok("requeue", "by default" if requeue else "only on request; AI-Flux's jobs request it")
    kind = facts.settings.get("PreemptType", "preempt/none").removeprefix("preempt/")
    mode = facts.settings.get("PreemptMode", "OFF")
    yield ok("preemption", "none" if kind == "none" else f"{kind}, {mode}: preempted runs resume")


def _accounting(facts: Facts) -> Iterator[Diagnosis]:
    if facts.accounts is None:
        age = facts.settings.get("MinJobAge", "300 sec")
        yield ok("accounting", f"not available; Slurm forgets jobs after {age}")
        return
    enforced = "is enforced" if facts.enforces("associations") else "is not enforced"
    names = ", ".join(facts.accounts.names) or "none"
    default = facts.accounts.default or "none"
    yield ok("accounting", f"{enforced}; your accounts: {names}; default: {default}")


def _resources(slurm: SlurmConfig) -> str:
    gpus, cpus = slurm.gpus_per_node, slurm.cpus_per_task
    asked = [counted(int(gpus), "GPU") if gpus.isdecimal() else f"GPUs {gpus}"]
    if slurm.gres:
        asked = [f"gres {slurm.gres}"]
    return ", ".join([*asked, *([] if cpus is None else [counted(cpus, "CPU")])])


def _defaults(facts: Facts, slurm: SlurmConfig) -> Iterator[Diagnosis]:
    """Check the job that a run without further options would request."""
    found = collect(cluster_checks(facts, slurm))
    for finding in found:
        fix = f"{finding.fix}; set it as an option or in aiflux.yaml"
        yield warn("your settings", f"a job as configured: {finding.what}", fix)
    if not found:
        asked = (
            f"{_resources(slurm)}, {slurm.mem}, {slurm.time} "
            f"in partition {slurm.partition or '(default)'}"
        )
        yield ok("your settings", f"a job as configured fits: {asked}")

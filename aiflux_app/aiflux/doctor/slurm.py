"""What Slurm offers on this site, as ``aiflux doctor`` tells it."""

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

_OLDEST = (20, 11)
_NEEDED = ("sbatch", "squeue", "scancel", "scontrol")


def scheduler(slurm: SlurmConfig, environ: Mapping[str, str] | None = None) -> Iterator[Diagnosis]:
    """Tell what Slurm is here, what it allows, and whether what would be asked for fits."""
    environment = os.environ if environ is None else environ
    missing = [name for name in _NEEDED if shutil.which(name, path=environment.get("PATH")) is None]
    if missing:
        yield fail(
            "slurm",
            f"{', '.join(missing)} not on PATH: no job can be submitted from here",
            "log in to a login node, or module load slurm; aiflux run --local works without",
        )
        return
    asked = call(["scontrol", "show", "config"], clean_environment(environment))
    if asked.returncode != 0:
        yield fail(
            "slurm",
            f"Slurm does not answer: {words(asked)}",
            "try again in a minute; if it stays so, ask the site",
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
    told = f"{text}, cluster {facts.settings.get('ClusterName', '?')}"
    match = re.match(r"(\d+)\.(\d+)", text)
    if match and (int(match[1]), int(match[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return warn(
            "slurm", f"{told}: AI-Flux is made for {oldest} and later", "look at --dry-run first"
        )
    return ok("slurm", told)


def _limits(facts: Facts) -> Iterator[Diagnosis]:
    size = facts.settings.get("MaxArraySize", "1001")
    if size in ("0", "1"):
        yield warn("arrays", "job arrays are switched off", "leave --shards at 1")
    elif size.isdigit():
        yield ok("arrays", f"of up to {int(size) - 1} tasks; more shards make more arrays")
    requeue = facts.settings.get("JobRequeue") == "1"
    yield ok("requeue", "by default" if requeue else "only as asked for; AI-Flux's jobs ask for it")
    kind = facts.settings.get("PreemptType", "preempt/none").removeprefix("preempt/")
    mode = facts.settings.get("PreemptMode", "OFF")
    yield ok("preemption", "none" if kind == "none" else f"{kind}, {mode}: a run goes on after it")


def _accounting(facts: Facts) -> Iterator[Diagnosis]:
    if facts.accounts is None:
        age = facts.settings.get("MinJobAge", "300 sec")
        yield ok("accounting", f"none, or it does not answer; Slurm forgets jobs after {age}")
        return
    enforced = "is enforced" if facts.enforces("associations") else "is not enforced"
    names = ", ".join(facts.accounts.names) or "none"
    default = facts.accounts.default or "none"
    yield ok("accounting", f"{enforced}; your accounts: {names}; default: {default}")


def _defaults(facts: Facts, slurm: SlurmConfig) -> Iterator[Diagnosis]:
    """Judge what a run would ask for with no further options."""
    found = collect(cluster_checks(facts, slurm))
    for finding in found:
        fix = f"{finding.fix}; as an option, or in aiflux.yaml"
        yield warn("your settings", f"a job as configured: {finding.what}", fix)
    if not found:
        asked = (
            f"{slurm.gpus_per_node} GPU, {slurm.cpus_per_task} CPUs, {slurm.mem}, {slurm.time} "
            f"in partition {slurm.partition or '(default)'}"
        )
        yield ok("your settings", f"a job as configured fits: {asked}")

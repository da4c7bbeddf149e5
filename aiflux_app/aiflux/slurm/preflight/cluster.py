"""Find what Slurm would refuse, or leave waiting forever, before a job is submitted.

What Slurm does not show is not a finding. If a site's plugins rewrite jobs, unset options are not
checked. For sites whose rules are not visible here, there is ``--no-preflight``.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.core.config.engine_command import command_words
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ConfigError, ImageError
from aiflux.image.container import find_image
from aiflux.slurm.cluster import (
    UNLIMITED,
    Facts,
    JobLimits,
    Node,
    Partition,
    ask_cluster,
    megabytes,
)
from aiflux.slurm.commands import missing
from aiflux.slurm.preflight.local import (
    Check,
    Finding,
    check_fields,
    check_image,
    check_models,
    check_space,
    collect,
    finding_of,
)
from aiflux.slurm.preflight.nodes import (
    check_division,
    check_endpoints,
    check_memory,
    check_names,
    check_nodes,
    gpu_room,
    job_vendor,
    possible_nodes,
    requested_gpus,
)
from aiflux.slurm.script import wants_gpus
from aiflux.util.diagnosis import Diagnosis, ok, warn
from aiflux.util.text import counted
from aiflux.util.times import walltime_given, walltime_seconds, walltime_text


def preflight(
    config: Config,
    slurm: SlurmConfig,
    options: RunOptions,
    image: Path | None,
    plan: Plan | None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    *,
    submits: bool = True,
) -> tuple[Finding, ...]:
    """Return all problems of a run as a Slurm job, errors first.

    Args:
        slurm: the requested resources.
        image: None to find it, if it needs one, and report a missing one with the other problems.
        plan: None if the input is wrong, so that there is no plan.
        environ: environment of Slurm's commands.
        cwd: first directory to search for ``aiflux.sif`` (default: the current one).
        submits: whether a job is submitted afterwards; a dry run needs no Slurm.
    """
    slurm = slurm.checked()
    facts = ask_cluster(environ)

    def of_slurm() -> Iterable[Finding]:
        path = (os.environ if environ is None else environ).get("PATH")
        if submits and shutil.which("sbatch", path=path) is None:
            yield finding_of(missing("sbatch"))
        elif not facts.settings and shutil.which("scontrol", path=path) is not None:
            yield Finding(
                "warning",
                "Slurm does not respond: partition, account and nodes are not checked",
                "scontrol show config shows why",
            )

    def of_image() -> Iterable[Finding]:
        if not engine_kind(options).worker_in_image:
            return check_program(options, slurm, environ)
        try:
            path = image or find_image(config, cwd or Path.cwd(), engine=options.engine)
        except ImageError as error:
            return [finding_of(error)]
        return check_job_image(path, facts, slurm, options)

    return collect(
        [
            of_slurm,
            of_image,
            lambda: () if plan is None else _check_all_models(plan, config),
            lambda: () if plan is None else check_shards(plan, slurm),
            lambda: () if plan is None else check_fields(plan),
            lambda: () if plan is None else check_space(plan),
            lambda: () if plan is None else check_room(plan, config, facts, slurm),
            *cluster_checks(facts, slurm, options.nodes_per_engine),
        ]
    )


def check_job_image(
    image: Path, facts: Facts, slurm: SlurmConfig, options: RunOptions
) -> Iterator[Finding]:
    """Check the image against the engine and the possible nodes."""
    kind = engine_kind(options)
    partitions = _partitions(facts, slurm)
    machines = {node.arch for node in possible_nodes(facts, slurm, partitions) if node.arch}
    return check_image(
        image,
        machines or {platform.machine()},
        kind,
        certain=bool(machines) or slurm.constraint is None,
        wants_gpus=wants_gpus(slurm) and kind.managed,
        allow_cpu=options.allow_cpu,
        vendor=job_vendor(facts, slurm, partitions),
    )


def check_program(
    options: RunOptions, slurm: SlurmConfig, environ: Mapping[str, str] | None
) -> Iterator[Finding]:
    """Check that the program of an engine's command can be there, if no module brings it."""
    if options.engine_command is None or slurm.modules or slurm.setup:
        return
    name = command_words(options.engine_command)[0]
    path = (os.environ if environ is None else environ).get("PATH")
    if shutil.which(name, path=path) is None:
        yield Finding(
            "warning",
            f"{name}, which --engine-command starts, is not on this machine, and the job loads no "
            "modules",
            "name the site's module (--modules NAME), or check the path",
        )


def _check_all_models(plan: Plan, config: Config) -> Iterator[Finding]:
    """Check names and files of the models; a misspelt one is reported once."""
    misspelt: dict[str, Finding] = {}
    with suppress(ConfigError):  # check_room reports a wrong catalog
        misspelt = dict(check_names(plan, config.catalog()))
    yield from misspelt.values()
    yield from check_models(plan, misspelt)


def check_shards(plan: Plan, slurm: SlurmConfig) -> Iterator[Finding]:
    """Report that there are fewer requests than the shards that were asked for."""
    if isinstance(slurm.shards, int) and 0 < len(plan.shards) < slurm.shards and plan.requests:
        most = len(plan.shards)
        yield Finding(
            "warning",
            f"{slurm.shards} shards are requested, but the run has only {most}: its input has "
            f"{counted(plan.requests, 'request')}",
            f"use --shards {most} or less",
        )


def check_room(plan: Plan, config: Config, facts: Facts, slurm: SlurmConfig) -> Iterator[Finding]:
    """Check that the models support the requests, and fit the GPUs if their memory is known."""
    if not engine_kind(plan.options).managed:
        return
    try:
        catalog = config.catalog()
    except ConfigError as error:
        yield finding_of(error)
        return
    yield from check_endpoints(plan, catalog)
    yield from check_division(plan, catalog, sum(requested_gpus(slurm).values()))
    room = gpu_room(facts, slurm, _partitions(facts, slurm))
    if room is not None and not plan.options.allow_cpu:
        yield from check_memory(plan, catalog, room)


def cluster_checks(facts: Facts, slurm: SlurmConfig, nodes: int = 1) -> list[Check]:
    """Return the checks of the requested resources; none if Slurm does not answer.

    Args:
        nodes: of one job.
    """
    if not facts.settings:
        return []
    return [
        lambda: _check_partitions(facts, slurm),
        lambda: _check_account(facts, slurm),
        lambda: _check_qos(facts, slurm, nodes),
        lambda: _check_association(facts, slurm, nodes),
        lambda: _check_any_partition(facts, slurm, nodes),
    ]


def _partitions(facts: Facts, slurm: SlurmConfig) -> list[str]:
    """Return the possible partitions of a job: those that it names, or else the default one."""
    if slurm.partition is not None:
        return slurm.partition.split(",")
    if facts.rewrites_jobs:
        return []
    return [partition.name for partition in facts.partitions if partition.default]


def _check_partitions(facts: Facts, slurm: SlurmConfig) -> Iterator[Finding]:
    if not facts.partitions:
        return
    known = ", ".join(partition.name for partition in facts.partitions)
    if slurm.partition is None and not facts.rewrites_jobs and not _partitions(facts, slurm):
        yield Finding(
            "error",
            "this cluster has no default partition, and no partition is set",
            f"--partition NAME (there are: {known})",
        )
    for name in _partitions(facts, slurm):
        if facts.partition(name) is None:
            yield Finding(
                "error",
                f"this cluster has no partition {name!r} that you can see",
                f"--partition NAME (there are: {known})",
            )


def _check_account(facts: Facts, slurm: SlurmConfig) -> Iterator[Finding]:
    accounts = facts.accounts
    if accounts is None:
        return
    enforced = facts.enforces("associations")
    yours = ", ".join(accounts.names)
    remedy = f"--account NAME (yours: {yours})" if yours else "ask the site for an account"
    if slurm.account is None:
        if enforced and accounts.default is None and not facts.rewrites_jobs:
            yield Finding(
                "error",
                "this cluster charges jobs to accounts, and you have no default account",
                remedy,
            )
    elif accounts.names and not _contains(accounts.names, slurm.account):
        yield Finding(
            "error" if enforced else "warning",
            f"you cannot use the account {slurm.account!r}",
            remedy,
        )


def _check_qos(facts: Facts, slurm: SlurmConfig, nodes: int) -> Iterator[Finding]:
    accounts = facts.accounts
    if accounts is None or not accounts.qos:
        return
    account = slurm.account or accounts.default or ""
    usable = accounts.usable.get(account.lower(), ())
    qos = slurm.qos or next(iter(usable), None)
    if qos is None or (slurm.qos is None and facts.rewrites_jobs):
        return
    limits = next((accounts.qos[name] for name in accounts.qos if _contains([name], qos)), None)
    level: Literal["error", "warning"] = "error" if facts.enforces("qos") else "warning"
    if limits is None:
        names = ", ".join(sorted(accounts.qos))
        yield Finding(level, f"this cluster has no QOS {qos!r}", f"--qos NAME (there are: {names})")
        return
    if usable and not _contains(usable, qos):
        yield Finding(
            level,
            f"you cannot use the QOS {qos!r} with the account {account!r}",
            f"--qos NAME (you can use: {', '.join(usable)})",
        )
    yield from _check_time(f"QOS {qos!r}", limits, slurm)
    if facts.enforces("limits"):
        yield from _check_resources(f"QOS {qos!r}", "--qos NAME", limits, slurm, nodes)


def _check_association(facts: Facts, slurm: SlurmConfig, nodes: int) -> Iterator[Finding]:
    """Check the limits of the user's account and those above it.

    The limits of a QOS take precedence (man sacctmgr).
    """
    accounts = facts.accounts
    if accounts is None or slurm.qos is not None or not facts.enforces("limits"):
        return
    account = (slurm.account or accounts.default or "").lower()
    limits = accounts.limits.get(account)
    if limits is not None and not (slurm.account is None and facts.rewrites_jobs):
        what = f"account {account!r}"
        yield from _check_time(what, limits, slurm)
        yield from _check_resources(what, "--account NAME", limits, slurm, nodes)
        for name, shared in accounts.from_below(account):
            above = "" if name == account else f" (above {account!r})"
            what = f"group limit of account {name!r}{above}"
            yield from _check_resources(what, "--account NAME", shared, slurm, nodes)


def _check_time(what: str, limits: JobLimits, slurm: SlurmConfig) -> Iterator[Finding]:
    if slurm.time is not None and _seconds(slurm) > limits.seconds:
        yield Finding(
            "error",
            f"--time {walltime_given(slurm.time)} is more than the {what} allows",
            f"use --time {walltime_text(limits.seconds)} or less; a run resumes where its time "
            "ended",
        )


def _check_resources(
    what: str, option: str, limits: JobLimits, slurm: SlurmConfig, nodes: int
) -> Iterator[Finding]:
    """Find resources of one job that are never granted: it would wait forever.

    Args:
        what: what has the limits.
        option: names another one.
    """
    gpus = requested_gpus(slurm)
    wanted: dict[str, tuple[float, str]] = {
        "gres/gpu": (sum(gpus.values()) * nodes, "GPUs"),
        "cpu": ((slurm.cpus_per_task or 0) * nodes, "CPU cores"),
        "mem": (megabytes(slurm.mem or "") * nodes, "MB of memory"),
        "node": (nodes, "nodes"),
        **{f"gres/gpu:{kind}": (n * nodes, f"GPUs {kind}") for kind, n in gpus.items() if kind},
    }
    for name, (amount, unit) in wanted.items():
        most = limits.resources.get(name, math.inf)
        if amount > most:
            yield Finding(
                "error",
                f"a job requests {amount:.0f} {unit}, but the {what} permits {most:.0f}: it would "
                "wait forever",
                f"request less, or use another: {option}",
            )


def _check_any_partition(facts: Facts, slurm: SlurmConfig, nodes: int) -> list[Finding]:
    """Return the problems of all possible partitions; nothing if one partition has none."""
    known = [facts.partition(name) for name in _partitions(facts, slurm)]
    verdicts = [
        [
            *refused_access(one, facts, slurm),
            *_check_limits(one, slurm),
            *check_nodes(one, facts, slurm, nodes),
        ]
        for one in known
        if one is not None
    ]
    failed = [any(finding.level == "error" for finding in verdict) for verdict in verdicts]
    if verdicts and all(failed):
        return [finding for verdict in verdicts for finding in verdict]
    passed = [verdict for verdict, bad in zip(verdicts, failed, strict=True) if not bad]
    return min(passed, key=len, default=[])


def refused_access(partition: Partition, facts: Facts, slurm: SlurmConfig) -> Iterator[Finding]:
    """Yield the reasons why a partition does not accept the user's jobs."""
    name = partition.name
    other = "use another: --partition NAME (sinfo lists them)"
    if partition.state in ("DRAIN", "INACTIVE"):
        yield Finding("error", f"partition {name} is {partition.state}: it accepts no jobs", other)
    elif partition.state == "DOWN":
        yield Finding("warning", f"partition {name} is DOWN: jobs wait until it is up", other)
    if partition.root_only:
        yield Finding("error", f"partition {name} is for administrators", other)
    if partition.reservation_only and slurm.reservation is None:
        yield Finding(
            "error", f"partition {name} is for reservations only", "--reservation NAME, or " + other
        )
    account = slurm.account or (facts.accounts.default if facts.accounts else None)
    for kind, value, allowed, denied in (
        ("account", account, partition.allow_accounts, partition.deny_accounts),
        ("QOS", slurm.qos, partition.allow_qos, partition.deny_qos),
    ):
        if value is not None and _refused(value, allowed, denied):
            names = f" (it accepts: {', '.join(allowed)})" if allowed else ""
            yield Finding(
                "error",
                f"partition {name} does not accept the {kind} {value!r}",
                f"--{kind.lower()} NAME{names}, or {other}",
            )
    if partition.allow_groups and facts.groups and not facts.groups & {*partition.allow_groups}:
        yield Finding(
            "error",
            f"partition {name} is for the groups {', '.join(partition.allow_groups)}; "
            "you are in none of them",
            other,
        )


def _check_limits(partition: Partition, slurm: SlurmConfig) -> Iterator[Finding]:
    if _seconds(slurm) > partition.max_seconds and slurm.time is not None:
        limit = walltime_text(partition.max_seconds)
        # A QOS can have higher limits than its partition.
        yield Finding(
            "error" if slurm.qos is None else "warning",
            f"--time {walltime_given(slurm.time)} is more than partition {partition.name} allows: "
            "the job would be refused, or wait forever",
            f"use --time {limit} or less; a run resumes where its time ended",
        )


def _refused(value: str, allowed: tuple[str, ...], denied: tuple[str, ...]) -> bool:
    if allowed:
        return not _contains(allowed, value)
    return _contains(denied, value)


def _contains(names: Iterable[str], value: str) -> bool:
    """Return whether a name is among others; Slurm stores these names in lower case."""
    return value.lower() in (name.lower() for name in names)


def _seconds(slurm: SlurmConfig) -> float:
    """Return the requested time; without one, the partition's default always fits."""
    return 0 if slurm.time is None else walltime_seconds(slurm.time)


def gpu_partitions(facts: Facts, slurm: SlurmConfig) -> Iterator[Diagnosis]:
    """Return a diagnosis of each partition with GPUs: types, time limit and access."""
    lines = [
        _partition_line(partition, facts, slurm)
        for partition in facts.partitions
        if any(node.gpus for node in facts.nodes_of(partition.name))
    ]
    yield from lines
    if not lines:
        yield warn(
            "GPUs",
            "no partition that you can see has GPUs",
            "ask the site, or run on CPUs: --gpus-per-node 0",
        )


def _partition_line(partition: Partition, facts: Facts, slurm: SlurmConfig) -> Diagnosis:
    nodes = facts.nodes_of(partition.name)
    gpus = _gpu_text(node for node in nodes if node.gpus)
    unlimited = partition.max_seconds == UNLIMITED
    time = "no time limit" if unlimited else f"up to {walltime_text(partition.max_seconds)}"
    alive = sum(node.alive for node in nodes if node.gpus)
    name = f"partition {partition.name}"
    default = " (default)" if partition.default else ""
    text = f"{gpus}; {time}{default}"
    closed = [finding.what for finding in refused_access(partition, facts, slurm)]
    if closed:
        # A partition that is closed to the user is not a problem while others are open.
        return ok(name, f"{text}; not for you: {closed[0]}")
    if not alive:
        return warn(name, f"{text}; all nodes are down or drained", "see sinfo -R for the reasons")
    return ok(name, text)


def _gpu_text(nodes: Iterable[Node]) -> str:
    kinds = Counter(
        " and ".join(f"{count} {kind or 'GPUs'}" for kind, count in sorted(node.gpus.items()))
        for node in nodes
    )
    return ", ".join(
        f"{count} node{'s' if count > 1 else ''} with {kind}" for kind, count in kinds.most_common()
    )

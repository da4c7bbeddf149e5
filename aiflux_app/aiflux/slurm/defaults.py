"""What to ask of a cluster by default: chosen from what Slurm tells, judged as a run is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aiflux.core.config.config import SlurmConfig
from aiflux.slurm.cluster import Facts, Node, Partition, megabytes
from aiflux.slurm.preflight.cluster import cluster_checks
from aiflux.slurm.preflight.local import Finding, collect
from aiflux.util.durations import walltime_seconds, walltime_text

_COUNTED = 512  # MB; nodes whose memory Slurm does not know are said to have 1 MB


@dataclass(frozen=True)
class Proposal:
    """Settings of Slurm that a cluster takes.

    Attributes:
        values: by the names of the settings; None leaves a directive out.
        partition: None where Slurm tells of none.
        findings: what stands in the way of even the best of them.
    """

    values: dict[str, Any]
    partition: Partition | None = None
    findings: tuple[Finding, ...] = ()


def propose(facts: Facts) -> Proposal:
    """Choose the default partition with GPUs, or the first that takes the user's jobs."""
    proposals = [
        _judged(partition, account, facts)
        for partition in _candidates(facts)
        for account in (None, *(facts.accounts.names if facts.accounts else ()))
    ]
    return min(proposals, key=_badness, default=Proposal({}))


def share(partition: Partition, facts: Facts) -> tuple[float, float]:
    """Return the MB and the CPUs of a node that fall to each of its GPUs, where they are fewest."""
    nodes = _useful(partition, facts)
    shares = [(_per_gpu(node.memory, node), _per_gpu(node.cpus, node)) for node in nodes]
    memory = min((memory for memory, _ in shares), default=0)
    cpus = min((cpus for _, cpus in shares), default=0)
    return min(memory, partition.max_memory), min(cpus, partition.max_cpus)


def _candidates(facts: Facts) -> list[Partition]:
    """Return the partitions with GPUs, or all where none has; the likeliest first."""
    with_gpus = [one for one in facts.partitions if _has_gpus(one, facts)]
    return sorted(with_gpus or facts.partitions, key=lambda one: not one.default)


def _judged(partition: Partition, account: str | None, facts: Facts) -> Proposal:
    values = dict(_values(partition, account, facts))
    findings = collect(cluster_checks(facts, SlurmConfig(**values).checked()))
    return Proposal(values, partition, findings)


def _badness(proposal: Proposal) -> tuple[int, int]:
    errors = sum(finding.level == "error" for finding in proposal.findings)
    return errors, len(proposal.findings)


def _values(partition: Partition, account: str | None, facts: Facts) -> Iterator[tuple[str, Any]]:
    if account is not None:
        yield "account", account
    yield "partition", partition.name
    if not _has_gpus(partition, facts):
        yield "gpus_per_node", "0"
    elif knows_gpus(facts):
        yield "gpus_per_node", "1"
    else:
        yield "gres", "gpu:1"
    usual = SlurmConfig()
    memory, cpus = share(partition, facts)
    yield "cpus_per_task", max(1, int(min(usual.cpus_per_task or 1, cpus))) if cpus else 1
    yield "mem", _memory_text(memory, usual.mem or "0")
    within = min(walltime_seconds(usual.time), partition.max_seconds)
    yield "time", walltime_text(within)


def knows_gpus(facts: Facts) -> bool:
    """Return whether Slurm's scheduler has --gpus-per-node; the older ones have --gres alone."""
    return facts.settings.get("SelectType", "select/cons_tres") == "select/cons_tres"


def _memory_text(megabytes_there: float, usual: str) -> str | None:
    if megabytes_there < _COUNTED:
        return None
    if megabytes_there >= megabytes(usual):
        return usual
    gigabytes = int(megabytes_there // 1024)
    return f"{gigabytes}G" if gigabytes else f"{int(megabytes_there)}M"


def _has_gpus(partition: Partition, facts: Facts) -> bool:
    return any(node.gpus for node in facts.nodes_of(partition.name))


def _useful(partition: Partition, facts: Facts) -> list[Node]:
    """Return the nodes that count: those with GPUs and those that are up, where there are any."""
    nodes = [*facts.nodes_of(partition.name)]
    nodes = [node for node in nodes if node.gpus] or nodes
    return [node for node in nodes if node.alive] or nodes


def _per_gpu(amount: int, node: Node) -> float:
    return amount / max(1, node.gpus_of(""))

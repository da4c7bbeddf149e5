"""Whether any node of a partition could ever run a job: GPUs, CPUs, memory, features."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from aiflux.core.config.config import SlurmConfig
from aiflux.slurm.cluster import UNLIMITED, Facts, Node, Partition, megabytes, parse_gpus
from aiflux.slurm.preflight.local import Finding


@dataclass(frozen=True)
class Demand:
    """One thing that a node must have enough of.

    Attributes:
        option: as it was given, such as ``--mem 32G``.
        unit: of ``wanted`` and ``most``.
        enough: the option with the most that can be had.
    """

    option: str
    wanted: float
    most: float
    unit: str
    enough: str = ""

    @property
    def fits(self) -> bool:
        """Whether there is enough of it."""
        return self.wanted <= self.most


def check_nodes(partition: Partition, facts: Facts, slurm: SlurmConfig) -> Iterator[Finding]:
    """Check that some node of a partition could ever run the job."""
    nodes = with_features(facts.nodes_of(partition.name), slurm)
    where = f"any node of partition {partition.name}"
    if not facts.nodes_of(partition.name):
        return
    if not nodes:
        yield Finding(
            "error",
            f"no node of partition {partition.name} has the feature {slurm.constraint!r}",
            _feature_remedy(facts, partition),
        )
        return
    short = [demand for demand in _demands(nodes, partition, slurm) if not demand.fits]
    for demand in short:
        yield Finding(
            "error",
            f"{demand.option} is more than {where} has ({demand.most:.0f} {demand.unit})",
            demand.enough or _gpu_remedy(facts, slurm),
        )
    able = [node for node in nodes if all(d.fits for d in _demands([node], partition, slurm))]
    if not short and not able:
        yield Finding(
            "error",
            f"no one node of partition {partition.name} has enough GPUs, CPUs and memory together",
            "ask for less of one of them: --gpus-per-node, --cpus-per-task, --mem",
        )
    if able and not any(node.alive for node in able):
        yield Finding(
            "warning",
            f"every node of partition {partition.name} that could run this job is down or drained "
            "now: the job will wait",
            "sinfo -R tells why; or name another partition: --partition NAME",
        )


def _demands(
    candidates: Iterable[Node], partition: Partition, slurm: SlurmConfig
) -> Iterator[Demand]:
    nodes = [*candidates]
    asked = f"--gres {slurm.gres}" if slurm.gres else f"--gpus-per-node {slurm.gpus_per_node}"
    for kind, count in requested_gpus(slurm).items():
        most = max(node.gpus_of(kind) for node in nodes)
        yield Demand(asked, count, most, f"{kind} GPUs".strip())
    if slurm.cpus_per_task is not None:
        most_cpus = min(max(node.cpus for node in nodes) or UNLIMITED, partition.max_cpus)
        enough = f"--cpus-per-task {most_cpus:.0f} at most"
        cpus = slurm.cpus_per_task
        yield Demand(f"--cpus-per-task {cpus}", cpus, most_cpus, "CPUs", enough)
    if slurm.mem is not None and not {"mem-per-cpu", "mem-per-gpu"} & slurm.sbatch_arg.keys():
        memory = min(max(node.memory for node in nodes) or UNLIMITED, partition.max_memory)
        enough = f"--mem {memory:.0f}M at most"
        yield Demand(f"--mem {slurm.mem}", megabytes(slurm.mem), memory, "MB", enough)


def requested_gpus(slurm: SlurmConfig) -> dict[str, int]:
    """Return how many GPUs of each type a job asks for on its node; "" is any type."""
    if slurm.gres is not None:
        return parse_gpus(slurm.gres)
    found: dict[str, int] = {}
    for item in str(slurm.gpus_per_node).split(","):
        kind, _, count = item.rpartition(":")
        if count.isdigit() and int(count):
            found[kind] = found.get(kind, 0) + int(count)
    return found


def _gpu_remedy(facts: Facts, slurm: SlurmConfig) -> str:
    """Name the partitions whose nodes have what is asked for."""
    wanted = requested_gpus(slurm)
    names = [
        partition.name
        for partition in facts.partitions
        if any(
            all(node.gpus_of(kind) >= count for kind, count in wanted.items())
            for node in facts.nodes_of(partition.name)
        )
    ]
    if names:
        return f"--partition NAME (these have such nodes: {', '.join(names)}), or ask for less"
    return "ask for what a node has (aiflux doctor lists GPUs), or for none: --gpus-per-node 0"


def with_features(nodes: Iterable[Node], slurm: SlurmConfig) -> list[Node]:
    """Return the nodes that meet a constraint; all of them where it is more than one name."""
    wanted = slurm.constraint
    if wanted is None or not re.fullmatch(r"[\w.-]+", wanted):
        return [*nodes]
    return [node for node in nodes if wanted in node.features]


def _feature_remedy(facts: Facts, partition: Partition) -> str:
    names = sorted({name for node in facts.nodes_of(partition.name) for name in node.features})
    return f"--constraint NAME (there are: {', '.join(names)})" if names else "leave it out"

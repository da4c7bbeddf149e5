"""How much memory the GPUs have that a job may get, as far as their names tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from aiflux.core.config.config import SlurmConfig
from aiflux.models.gpu_memory import Room, gpu_bytes, gpu_bytes_of_features
from aiflux.slurm.cluster import Facts, Node
from aiflux.slurm.preflight.nodes import requested_gpus, with_features


def gpu_room(facts: Facts, slurm: SlurmConfig, partitions: Iterable[str]) -> Room | None:
    """Return the largest GPUs that a job may get; None where any of them may be of unknown size.

    Args:
        partitions: that the job may go to.
    """
    asked = requested_gpus(slurm)
    if not asked:
        return None
    nodes = [node for name in partitions for node in facts.nodes_of(name)]
    nodes = [node for node in with_features(nodes, slurm) if _has(node, asked)]
    kinds = [pair for kind in asked for pair in _sizes(kind, nodes)]
    known = [(size, kind) for kind, size in kinds if size is not None]
    if not known or len(known) < len(kinds):
        return None
    size, kind = max(known)
    wanted = next(iter(asked)) if len(asked) == 1 else ""
    most = max((node.gpus_of(wanted) for node in nodes), default=0)
    return Room(kind, size, sum(asked.values()), most, _option(slurm, wanted))


def _option(slurm: SlurmConfig, kind: str) -> str:
    typed = f"{kind}:{{}}" if kind else "{}"
    return f"--gres gpu:{typed}" if slurm.gres is not None else f"--gpus-per-node {typed}"


def _has(node: Node, asked: dict[str, int]) -> bool:
    return all(node.gpus_of(kind) >= count for kind, count in asked.items())


def _sizes(kind: str, nodes: Iterable[Node]) -> Iterator[tuple[str, int | None]]:
    """Yield the names and sizes of the GPUs that a request for a kind may bring; "" is any."""
    if kind and gpu_bytes(kind) is not None:
        yield kind, _told_by_nodes(kind, nodes) or gpu_bytes(kind)
        return
    for node in nodes:
        for own in node.gpus:
            if not kind or own.lower() == kind.lower():
                featured = gpu_bytes_of_features(node.features)
                name = own or next(filter(gpu_bytes, node.features), "gpu")
                exact = _told_by_nodes(own, [node]) if gpu_bytes(own) else None
                yield name, exact or gpu_bytes(own) or featured


def _told_by_nodes(kind: str, nodes: Iterable[Node]) -> int | None:
    """Return a size that features tell more exactly than a type does: a100 and a100-40gb."""
    sizes = []
    for node in nodes:
        exact = [
            f for f in node.features if kind.lower() in f.lower() and f.lower() != kind.lower()
        ]
        sizes.append(gpu_bytes_of_features(exact))
    told = [size for size in sizes if size is not None]
    return max(told) if told and len(told) == len(sizes) else None

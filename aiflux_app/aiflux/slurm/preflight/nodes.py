"""Whether a node of a partition can run a job, and whether its GPUs hold the models.

The memory of GPUs is derived from the names that clusters give to them. A name used for several
sizes counts as the largest: a model is only refused if it certainly does not fit. Sources: the
manufacturers' data sheets.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from aiflux.core.config.settings import AMD, NVIDIA, SlurmConfig
from aiflux.core.runs.plan import Plan
from aiflux.engines.base import EngineKind
from aiflux.engines.kinds import engine_kind
from aiflux.engines.sizing import context_length, gpus_needed, smaller_division
from aiflux.models.catalog import Catalog
from aiflux.models.endpoints import ENDPOINTS, USES
from aiflux.models.figures import Figures
from aiflux.models.name import is_hub_name
from aiflux.slurm.cluster import UNLIMITED, Facts, Node, Partition, megabytes, parse_gpus
from aiflux.slurm.preflight.local import Finding

GIGABYTE = 2**30
"""A GB of GPU memory, as manufacturers count it."""

# GB of the largest GPU with a name; a longer name comes before a name that is part of it. Each of
# the two halves of an MI250 is a GPU, for ROCm and for Slurm.
_KNOWN = {
    "gb300": 288, "gb200": 192, "gh200": 144, "b300": 288, "b200": 192, "b100": 192, "h200": 141,
    "h100": 96, "h800": 80, "h20": 141, "a100": 80, "a800": 80, "a40": 48, "a30": 24, "a16": 16,
    "a10g": 24, "a10": 24, "a2": 16, "a6000": 48, "a5500": 24, "a5000": 32, "a4500": 20,
    "a4000": 20, "l40s": 48, "l40": 48, "l4": 24, "v100s": 32, "v100": 32, "p100": 16, "p40": 24,
    "p4": 8, "t4": 16, "k80": 12, "m40": 24, "rtx8000": 48, "rtx6000": 96, "rtx5000": 32,
    "rtx4000": 20, "rtxpro6000": 96, "5090": 32, "5080": 16, "4090": 24, "4080": 16, "3090": 24,
    "3080": 12, "2080ti": 11, "1080ti": 11, "2080": 11, "1080": 11, "titanv": 12, "titanrtx": 24,
    "mi100": 32, "mi210": 64, "mi250x": 64, "mi250": 64, "mi300a": 128, "mi300x": 192,
    "mi300": 192, "mi325x": 256, "mi350x": 288, "mi355x": 288,
}  # fmt: skip
_NAMED_SIZE = re.compile(r"(?<![0-9.])(\d{1,3})\s*gi?b?(?![a-z0-9.])")
_SLICE = re.compile(r"\dg[._](\d+)gb")


@dataclass(frozen=True)
class Room:
    """The largest GPUs that a job can get.

    Attributes:
        kind: name of the GPUs.
        size: bytes per GPU.
        count: number of GPUs that the job requests.
        most: number of GPUs in one node.
        option: the option that requests another number, which replaces its ``{}``.
    """

    kind: str
    size: int
    count: int
    most: int
    option: str = "--gpus-per-node {}"


def is_slice(name: str) -> bool:
    """Return whether a GPU is a slice (MIG); a process can only use one slice."""
    return _SLICE.search(name.lower()) is not None


def gpu_bytes(name: str) -> int | None:
    """Return the memory of a GPU by its name, or None if it is unknown.

    Names are Slurm's GPU types and node features, such as ``a100``, ``nvidia_a100_80gb``,
    ``h100.1g.10gb`` or ``rtx_2080_ti``.
    """
    text = name.lower().strip()
    part = _SLICE.search(text)
    if part:
        return int(part[1]) * GIGABYTE
    known = _by_model(text)
    sized = _NAMED_SIZE.search(text)
    if sized and known is not None:
        return int(sized[1]) * GIGABYTE
    return known


def gpu_bytes_of_features(features: Iterable[str]) -> int | None:
    """Return the GPU memory of a node with these features; the largest if several match."""
    sizes = [size for size in map(gpu_bytes, features) if size is not None]
    return max(sizes, default=None)


def vendor_of(name: str) -> str | None:
    """Return the vendor of a GPU by its name, or None if it is unknown."""
    text = name.lower()
    if re.search(r"(?<![a-z])(amd|radeon|instinct|mi\d{2,3}[ax]?|gfx\d+)(?![a-z])", text):
        return AMD
    known = "nvidia" in text or _SLICE.search(text) or _by_model(text) is not None
    return NVIDIA if known else None


def _by_model(text: str) -> int | None:
    words = re.sub(r"[^a-z0-9]+", " ", text).split()
    # Spellings such as rtx_2080_ti, titan_rtx and gtx1080ti vary, so adjacent parts are joined.
    tries = [*words, *(a + b for a, b in itertools.pairwise(words))]
    tries += [re.sub(r"^(rtx|gtx|geforce|tesla|nvidia|amd|gpu)(?=[a-z]?\d)", "", w) for w in tries]
    sizes = [_KNOWN[word] for word in tries if word in _KNOWN]
    return max(sizes) * GIGABYTE if sizes else None


@dataclass(frozen=True)
class Demand:
    """One resource that a node must have.

    Attributes:
        option: as given, such as ``--mem 32G``.
        unit: of ``wanted`` and ``most``.
        enough: the option with the highest possible value.
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


def check_nodes(
    partition: Partition, facts: Facts, slurm: SlurmConfig, wanted: int = 1
) -> Iterator[Finding]:
    """Check that enough nodes of a partition can run the job.

    Args:
        wanted: nodes of one job.
    """
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
            f"no single node of partition {partition.name} has enough GPUs, CPUs and memory",
            "reduce one of them: --gpus-per-node, --cpus-per-task, --mem",
        )
    most = min(len(able), partition.max_nodes)
    if able and wanted > most:
        yield Finding(
            "error",
            f"--nodes-per-engine {wanted} is more than partition {partition.name} has for a job "
            f"like this ({most:.0f})",
            f"--nodes-per-engine {most:.0f} at most, or another: --partition NAME",
        )
    elif wanted > 1 and wanted > sum(node.alive for node in able):
        yield Finding(
            "warning",
            f"fewer than {wanted} nodes of partition {partition.name} that can run this job are up "
            "now: the job will wait",
            "see sinfo -R for the reasons, or use another: --partition NAME",
        )
    elif able and not any(node.alive for node in able):
        yield Finding(
            "warning",
            f"every node of partition {partition.name} that can run this job is down or drained "
            "now: the job will wait",
            "see sinfo -R for the reasons, or use another: --partition NAME",
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
    """Return the number of requested GPUs of each type; "" is any type."""
    if slurm.gres is not None:
        return parse_gpus(slurm.gres)
    found: dict[str, int] = {}
    for item in str(slurm.gpus_per_node).split(","):
        kind, _, count = item.rpartition(":")
        if count.isdigit() and int(count):
            found[kind] = found.get(kind, 0) + int(count)
    return found


def _gpu_remedy(facts: Facts, slurm: SlurmConfig) -> str:
    """Return a remedy that lists the partitions with suitable nodes."""
    wanted = requested_gpus(slurm)
    names = [
        partition.name
        for partition in facts.partitions
        if any(_has(node, wanted) for node in facts.nodes_of(partition.name))
    ]
    if names:
        return f"--partition NAME (suitable: {', '.join(names)}), or request less"
    return "request what a node has (aiflux doctor lists GPUs), or none: --gpus-per-node 0"


def with_features(nodes: Iterable[Node], slurm: SlurmConfig) -> list[Node]:
    """Return the nodes with a feature; all nodes if the constraint is more than one name."""
    wanted = slurm.constraint
    if wanted is None or not re.fullmatch(r"[\w.-]+", wanted):
        return [*nodes]
    return [node for node in nodes if wanted in node.features]


def possible_nodes(facts: Facts, slurm: SlurmConfig, partitions: Iterable[str]) -> list[Node]:
    """Return the nodes of partitions, with the requested feature."""
    return with_features((node for name in partitions for node in facts.nodes_of(name)), slurm)


def _feature_remedy(facts: Facts, partition: Partition) -> str:
    names = sorted({name for node in facts.nodes_of(partition.name) for name in node.features})
    return f"--constraint NAME (there are: {', '.join(names)})" if names else "leave it out"


def check_memory(plan: Plan, catalog: Catalog, room: Room) -> Iterator[Finding]:
    """Check that the plan's models can fit the GPUs of one engine.

    A model is refused if it needs more memory than the GPUs have even with one slot (or the
    requested slots) and the smallest buffers. A model with unknown figures has no finding.

    Args:
        room: GPUs of the job.
    """
    options = plan.options
    if options.nodes_per_engine > 1 and is_slice(room.kind):
        yield Finding(
            "error",
            f"--nodes-per-engine {options.nodes_per_engine}: slices of GPUs ({room.kind}) cannot "
            "work together",
            "request whole GPUs",
        )
        return
    if options.gpus_per_engine > room.count:
        yield Finding(
            "error",
            f"--gpus-per-engine {options.gpus_per_engine} is more than the job's GPUs "
            f"({room.count})",
            room.option.format(options.gpus_per_engine),
        )
    elif options.gpus_per_engine > 1 and is_slice(room.kind):
        yield Finding(
            "error",
            f"--gpus-per-engine {options.gpus_per_engine}: an engine can use one slice of a GPU "
            f"only, and the job gets slices ({room.kind})",
            "leave it out, and request a larger slice or a whole GPU for a larger model",
        )
        return
    for name in plan.models:
        figures = engine_kind(options).figures(plan.models_dir, name, catalog)
        if figures is not None:
            yield from _check_fit(plan, plan.served(name), figures, room)


def check_names(plan: Plan, catalog: Catalog) -> Iterator[tuple[str, Finding]]:
    """Find models that are absent and whose names look like misspellings of known ones.

    Each finding comes with the name.

    The error of an absent model of Hugging Face has such advice (``EngineKind.absent_model``).
    """
    kind = engine_kind(plan.options)
    for name in plan.models:
        served = plan.served(name)
        known = kind.catalog_name(name)
        near = None if known is None or is_hub_name(known) else catalog.nearest(known)
        if near and plan.models_dir and not kind.is_stored(plan.models_dir, name):
            yield (
                name,
                Finding(
                    "error",
                    f"the model {served} is neither in {plan.models_dir} nor in the catalog",
                    f"did you mean {near}? If not, pull it first: aiflux models pull {served}",
                ),
            )


def check_endpoints(plan: Plan, catalog: Catalog) -> Iterator[Finding]:
    """Check that the model of a plan supports the endpoints of its requests."""
    name = engine_kind(plan.options).catalog_name(plan.models[0])
    if name is None or len(plan.models) > 1:
        return
    model = catalog.find(name)
    if model is None:
        return
    shown = name if is_hub_name(name) else model.name
    able = {ENDPOINTS[each].use for each in model.endpoints}
    if is_hub_name(name):  # vLLM also makes vectors with models for text, and scores with those
        able |= {each.use for each in ENDPOINTS.values() if not each.generates}
    for url, count in plan.input.endpoints.items():
        if USES[url] not in able:
            yield Finding(
                "error",
                f"{shown} is for {', '.join(model.endpoints)}, and {count} "
                f"request{'s' * (count > 1)} ask{'s' * (count == 1)} for {url}",
                "use another model or endpoint; if the model supports it, add it to your own "
                "models.yaml (endpoints)",
            )


def check_division(plan: Plan, catalog: Catalog, gpus: int) -> Iterator[Finding]:
    """Check that each engine's GPUs, or its nodes without GPUs, can share a model.

    Args:
        gpus: requested GPUs of a node.
    """
    options, kind = plan.options, engine_kind(plan.options)
    several = options.nodes_per_engine > 1
    if not gpus and not several:
        return
    each = max(1, gpus) if several else options.gpus_per_engine
    parts = options.nodes_per_engine * each
    for name in plan.models:
        figures = kind.figures(plan.models_dir, name, catalog)
        if figures is None or kind.divides(figures, parts):
            continue
        yield Finding(
            "error",
            f"{kind.title} cannot divide {plan.served(name)} among {parts} "
            f"{'GPUs' if gpus or not several else 'nodes'}: it has {figures.architecture.heads} "
            f"attention heads and {figures.architecture.kv_heads} key-value heads",
            smaller_division(partial(kind.divides, figures), options, each),
        )


def _check_fit(plan: Plan, model: str, figures: Figures, room: Room) -> Iterator[Finding]:
    options = plan.options
    kind = engine_kind(options)
    context = context_length(plan, figures.architecture.context)
    slots, nodes = options.slots or 1, options.nodes_per_engine
    each = options.gpus_per_engine if nodes == 1 else nodes * room.count

    def least(count: int, gpus: int = each) -> int:
        return kind.memory_needed(figures, context, count, gpus, options)

    if not kind.divides(figures, each):
        return
    has = each * room.size
    if least(slots) <= has:
        return
    fits = [count for count in range(1, slots) if least(count) <= has]
    enough = gpus_needed(
        lambda gpus: least(slots, gpus) if kind.divides(figures, gpus) else None,
        figures,
        room.size,
    )
    remedies = [f"--slots {fits[-1]} at most"] if fits else []
    remedies += [] if enough is None else _more_gpus(enough, room, kind, nodes)
    remedies.append("GPUs with more memory, a smaller model, or a smaller --context-length")
    kept = f"{each} such GPUs have" if each > 1 else "it has"
    yield Finding(
        "error",
        f"{model} does not fit a GPU {room.kind!r}: with {slots} slot{'s' * (slots > 1)} of "
        f"{context} tokens it takes at least {_gigabytes(least(slots))}, and {kept} "
        f"{_gigabytes(has)}",
        "; or ".join(remedies),
    )


def _more_gpus(enough: int, room: Room, kind: EngineKind, nodes: int) -> list[str]:
    """Return remedies with the necessary number of GPUs."""
    if nodes > 1:
        return [f"{enough} such GPUs are enough: more nodes (--nodes-per-engine), or more of each"]
    if is_slice(room.kind):
        return ["a whole GPU or a larger slice of one (an engine can use one slice only)"]
    if room.most < enough:
        text = f"{enough} such GPUs for each engine are enough"
        if not room.most:  # no node is known that has them
            return [f"{text}: --gpus-per-engine {enough} {room.option.format(enough)}"]
        several = kind.spans_nodes and enough % room.most == 0
        option = (
            f"; --nodes-per-engine {enough // room.most} {room.option.format(room.most)}, without "
            "--gpus-per-engine"
        )
        return [f"{text}, but no node here has more than {room.most}{option if several else ''}"]
    more = "" if enough <= room.count else f" {room.option.format(enough)}"
    return [f"{enough} such GPUs for each engine are enough: --gpus-per-engine {enough}{more}"]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def gpu_room(facts: Facts, slurm: SlurmConfig, partitions: Iterable[str]) -> Room | None:
    """Return the largest possible GPUs of a job; None if any of them can have an unknown size.

    Args:
        partitions: possible partitions of the job.
    """
    asked = requested_gpus(slurm)
    if not asked:
        return None
    nodes = [node for node in possible_nodes(facts, slurm, partitions) if _has(node, asked)]
    kinds = [pair for kind in asked for pair in _sizes(kind, nodes)]
    known = [(size, kind) for kind, size in kinds if size is not None]
    if not known or len(known) < len(kinds):
        return None
    size, kind = max(known)
    wanted = next(iter(asked)) if len(asked) == 1 else ""
    most = max((node.gpus_of(wanted) for node in nodes), default=0)
    return Room(kind, size, sum(asked.values()), most, _option(slurm, wanted))


def job_vendor(facts: Facts, slurm: SlurmConfig, partitions: Iterable[str]) -> str | None:
    """Return the vendor of a job's GPUs: as set, or that of all GPUs that it may get.

    Args:
        partitions: possible partitions of the job.
    """
    if slurm.gpu_vendor != "auto":
        return slurm.gpu_vendor
    asked = requested_gpus(slurm)
    nodes = [node for node in possible_nodes(facts, slurm, partitions) if _has(node, asked)]
    # A feature can be the vendor of the processor, so only names of GPUs count there.
    names = {name for kind in asked for name, _ in _sizes(kind, nodes)} | (asked.keys() - {""})
    vendors = {vendor_of(name) for name in names}
    return vendors.pop() if len(vendors) == 1 else None


def _option(slurm: SlurmConfig, kind: str) -> str:
    typed = f"{kind}:{{}}" if kind else "{}"
    return f"--gres gpu:{typed}" if slurm.gres is not None else f"--gpus-per-node {typed}"


def _has(node: Node, asked: dict[str, int]) -> bool:
    return all(node.gpus_of(kind) >= count for kind, count in asked.items())


def _sizes(kind: str, nodes: Iterable[Node]) -> Iterator[tuple[str, int | None]]:
    """Yield the names and sizes of the possible GPUs for a requested kind; "" is any."""
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
    """Return the size from a node's features, which can be more exact: a100 and a100-40gb."""
    sizes = []
    for node in nodes:
        exact = [
            f for f in node.features if kind.lower() in f.lower() and f.lower() != kind.lower()
        ]
        sizes.append(gpu_bytes_of_features(exact))
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None

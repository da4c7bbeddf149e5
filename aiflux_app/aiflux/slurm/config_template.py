"""Write an ``aiflux.yaml``: a first one that suits this cluster, or chosen settings of a run."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aiflux.core.config.config import SlurmConfig
from aiflux.core.config.declaration import Setting
from aiflux.core.config.settings import SETTINGS, TITLES
from aiflux.slurm.cluster import UNLIMITED, Facts, Node, Partition, megabytes
from aiflux.slurm.preflight.cluster import cluster_checks, gpu_partitions
from aiflux.slurm.preflight.local import Finding, collect
from aiflux.util.times import walltime_seconds, walltime_text

_WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*\Z")
_SECTIONS = ("slurm", "paths", "run", "accounting")
_INTRODUCTION = (
    "A setting behind a # has its default: remove the # to change it. The command line and the "
    "environment take precedence over this file. `aiflux config show` lists all values and their "
    "origins, `aiflux doctor` checks whether they will work."
)


def initial_file(facts: Facts, proposal: Proposal) -> str:
    """Return the file; without an answer from Slurm every setting is a comment."""
    lines = [*_header(facts, proposal)]
    notes = {name: [*listed] for name, listed in _notes(facts, proposal)}
    for section in _SECTIONS:
        lines += ["", f"{section}:  # {TITLES[section]}"]
        for setting in SETTINGS:
            if setting.section == section and setting.offered:
                lines += ["", *_entry(setting, proposal.values, notes.get(setting.name, []))]
    return "\n".join(lines) + "\n"


def _header(facts: Facts, proposal: Proposal) -> Iterator[str]:
    yield from _comment("Settings of AI-Flux, made by `aiflux config init`.", "")
    if facts.settings:
        cluster = facts.settings.get("ClusterName", "?")
        listed = f"Slurm {facts.settings.get('SLURM_VERSION', '?')} of the cluster {cluster} listed"
        yield from _comment(f"{listed} its resources; the settings chosen from them have no #.", "")
    else:
        yield from _comment(
            "Slurm was missing, or did not answer, when this was written: nothing was chosen. "
            "On a login node, `aiflux config init --force` asks it again.",
            "",
        )
    yield "#"
    yield from _comment(_INTRODUCTION, "")
    if facts.rewrites_jobs:
        yield from _comment("This site's plugins can change the options of a job.", "")
    for finding in proposal.findings:
        yield "#"
        yield from _comment(f"PROBLEM: {finding.what} ({finding.fix})", "")


def _entry(setting: Setting, values: Mapping[str, Any], notes: list[str]) -> Iterator[str]:
    yield from _comment(setting.help, "  ")
    for note in notes:
        yield from _comment(note, "  ", "  ")
    chosen = setting.name in values
    value = values[setting.name] if chosen else setting.default
    yield f"  {'' if chosen else '# '}{setting.name}: {_yaml(value, left_out=chosen)}".rstrip()


def _yaml(value: Any, *, left_out: bool = False) -> str:
    if value is None:
        return "null" if left_out else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list | dict):
        return json.dumps(value)
    text = str(value)
    return text if _PLAIN.match(text) else json.dumps(text, ensure_ascii=False)


def run_settings(values: Mapping[str, Any]) -> str:
    """Return settings of a run as the content of a file."""
    return "".join(["run:\n", *(f"  {name}: {_yaml(each)}\n" for name, each in values.items())])


def _comment(text: str, indent: str, hang: str = "") -> list[str]:
    mark = f"{indent}# {hang}"
    return textwrap.wrap(
        text, _WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False
    )


def _notes(facts: Facts, proposal: Proposal) -> Iterator[tuple[str, Iterator[str]]]:
    """Yield the values that Slurm offers for a setting."""
    if not facts.settings:
        return
    partition = proposal.partition
    yield "account", _accounts(facts)
    yield "partition", _partitions(facts)
    yield "qos", _qos(facts, partition)
    yield "max_running", _arrays(facts)
    if partition is not None:
        yield "gpus_per_node", _gpus(facts, partition)
        yield "gres", iter([f"as in --gres={facts.settings.get('GresTypes', 'gpu')}:1"])
        yield "constraint", _features(facts, partition)
        yield "time", _time(partition)
        yield "mem", _memory(facts, partition)
        yield "cpus_per_task", _cpus(facts, partition)


def _accounts(facts: Facts) -> Iterator[str]:
    if facts.accounts is None:
        yield "there is no accounting here, or it does not answer"
        return
    names = ", ".join(facts.accounts.names) or "none"
    default = facts.accounts.default
    yield f"yours: {names}; " + (f"without one: {default}" if default else "it has to be named")


def _partitions(facts: Facts) -> Iterator[str]:
    for line in gpu_partitions(facts, SlurmConfig()):
        yield f"{line.name.removeprefix('partition ')}: {line.what}"
    others = [
        one.name
        for one in facts.partitions
        if not any(node.gpus for node in facts.nodes_of(one.name))
    ]
    if others:
        yield f"without GPUs: {', '.join(others)}"


def _qos(facts: Facts, partition: Partition | None) -> Iterator[str]:
    known = facts.accounts.qos if facts.accounts else {}
    if known:
        limits = (
            name if limit.seconds == UNLIMITED else f"{name} (up to {walltime_text(limit.seconds)})"
            for name, limit in known.items()
        )
        yield f"there are: {', '.join(limits)}"
    if partition is not None and partition.allow_qos:
        yield f"partition {partition.name} takes: {', '.join(partition.allow_qos)}"


def _arrays(facts: Facts) -> Iterator[str]:
    size = facts.settings.get("MaxArraySize", "")
    if size.isdigit():
        yield f"an array has up to {max(int(size) - 1, 0)} tasks; more shards make more arrays"


def _gpus(facts: Facts, partition: Partition) -> Iterator[str]:
    nodes = facts.nodes_of(partition.name)
    kinds = sorted({kind for node in nodes for kind in node.gpus if kind})
    most = max((node.gpus_of("") for node in nodes), default=0)
    if most:
        yield f"a node of {partition.name} has up to {most}; each GPU gets its own engine"
    if kinds:
        yield f"with a type: {', '.join(f'{kind}:1' for kind in kinds)}"


def _features(facts: Facts, partition: Partition) -> Iterator[str]:
    names = sorted({name for node in facts.nodes_of(partition.name) for name in node.features})
    if names:
        yield f"nodes of {partition.name} have: {', '.join(names)}"


def _time(partition: Partition) -> Iterator[str]:
    if partition.max_seconds != UNLIMITED:
        yield f"partition {partition.name} allows up to {walltime_text(partition.max_seconds)}"
    yield "a run resumes by itself where its time ended"


def _memory(facts: Facts, partition: Partition) -> Iterator[str]:
    memory, _ = share(partition, facts)
    if memory < 512:
        yield "Slurm does not count memory here: null leaves --mem out"
    else:
        yield f"a GPU's share of a node of {partition.name} is {memory / 1024:.0f}G"


def _cpus(facts: Facts, partition: Partition) -> Iterator[str]:
    _, cpus = share(partition, facts)
    yield f"a GPU's share of a node of {partition.name} is {cpus:.0f}"


_COUNTED = 512  # MB; Slurm shows 1 MB for nodes of unknown memory


@dataclass(frozen=True)
class Proposal:
    """Slurm settings that suit a cluster.

    Attributes:
        values: by setting name; None omits a directive.
        partition: None if Slurm shows none.
        findings: problems that even the best values have.
    """

    values: dict[str, Any]
    partition: Partition | None = None
    findings: tuple[Finding, ...] = ()


def propose(facts: Facts) -> Proposal:
    """Choose the default partition with GPUs, or the first that accepts the user's jobs."""
    proposals = [
        _judged(partition, account, facts)
        for partition in _candidates(facts)
        for account in (None, *(facts.accounts.names if facts.accounts else ()))
    ]
    return min(proposals, key=_badness, default=Proposal({}))


def share(partition: Partition, facts: Facts) -> tuple[float, float]:
    """Return the smallest MB and CPUs per GPU of any node."""
    nodes = _useful(partition, facts)
    shares = [(_per_gpu(node.memory, node), _per_gpu(node.cpus, node)) for node in nodes]
    memory = min((memory for memory, _ in shares), default=0)
    cpus = min((cpus for _, cpus in shares), default=0)
    return min(memory, partition.max_memory), min(cpus, partition.max_cpus)


def _candidates(facts: Facts) -> list[Partition]:
    """Return the partitions with GPUs, or all if none has any; the most suitable first."""
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
    """Return whether Slurm's scheduler has --gpus-per-node; older ones have only --gres."""
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
    """Return the relevant nodes: those with GPUs, and of these the ones that are up."""
    nodes = [*facts.nodes_of(partition.name)]
    nodes = [node for node in nodes if node.gpus] or nodes
    return [node for node in nodes if node.alive] or nodes


def _per_gpu(amount: int, node: Node) -> float:
    return amount / max(1, node.gpus_of(""))

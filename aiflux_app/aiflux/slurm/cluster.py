"""Read a cluster's settings, partitions and nodes, and the user's accounts, from Slurm.

The sources are ``scontrol`` (``-o``: one record per line, ``NAME=VALUE`` words) and
``sacctmgr -P``, whose formats are the same in every Slurm since 20.11. Sources: scontrol(1),
sacctmgr(1), slurm.conf(5).
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from aiflux.slurm.commands import attempt, clean_environment
from aiflux.util.times import walltime_seconds

UNLIMITED = float("inf")
_DEAD = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "ERROR", "INVAL", "FUTURE"}
_MEMORY = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


@dataclass(frozen=True)
class Partition:
    """One partition; an empty tuple of names means that no list was given.

    Attributes:
        max_seconds: its time limit; infinite if it has none.
        max_memory: MB of one job on one node; infinite if there is no limit.
        max_cpus: CPUs of one job on one node.
        max_nodes: nodes of one job.
    """

    name: str
    default: bool = False
    state: str = "UP"
    max_seconds: float = UNLIMITED
    max_memory: float = UNLIMITED
    max_cpus: float = UNLIMITED
    max_nodes: float = UNLIMITED
    allow_accounts: tuple[str, ...] = ()
    deny_accounts: tuple[str, ...] = ()
    allow_groups: tuple[str, ...] = ()
    allow_qos: tuple[str, ...] = ()
    deny_qos: tuple[str, ...] = ()
    root_only: bool = False
    reservation_only: bool = False


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        arch: as in ``uname -m``; None until it registers.
        memory: MB.
        gpus: number of each type; the type of GPUs without one is "".
        alive: it is not down, drained or failing.
        address: name or address at which Slurm reaches it.
    """

    name: str
    arch: str | None = None
    cpus: int = 0
    memory: int = 0
    gpus: dict[str, int] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    partitions: tuple[str, ...] = ()
    alive: bool = True
    address: str = ""

    def gpus_of(self, kind: str) -> int:
        """Return the number of GPUs of a type; "" stands for any."""
        same = (name for name in self.gpus if not kind or name.lower() == kind.lower())
        return sum(self.gpus[name] for name in same)


@dataclass(frozen=True)
class JobLimits:
    """What a quality of service, or the association of a user and an account, permits.

    Attributes:
        seconds: wall time of a job.
        resources: the most of each resource (``cpu``, ``mem`` in megabytes, ``node``, ``gres/gpu``,
            ``gres/gpu:TYPE``) for one job, or for all jobs of a user or group: a job with more than
            that never starts.
    """

    seconds: float = UNLIMITED
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Accounts:
    """The user's data in the accounting database.

    Attributes:
        default: the default account; None if there is none, or it is unknown.
        names: the accounts that the user can charge.
        qos: the limits of every QOS that exists.
        usable: the QOS that the user can use with each account; the default one is the first.
        limits: those of each account, for this user.
        groups: of each account: the one above it, and the limits of all its jobs together.
    """

    default: str | None = None
    names: tuple[str, ...] = ()
    qos: Mapping[str, JobLimits] = field(default_factory=dict)
    usable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limits: Mapping[str, JobLimits] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, JobLimits]] = field(default_factory=dict)

    def from_below(self, account: str) -> Iterator[tuple[str, JobLimits]]:
        """Yield an account and those above it, each with the limits of all its jobs together."""
        left = dict(self.groups)
        while account in left:
            above, limits = left.pop(account)
            yield account, limits
            account = above


@dataclass(frozen=True)
class Facts:
    """A cluster according to Slurm; unknown facts are empty.

    Attributes:
        settings: ``scontrol show config``.
        accounts: None if there is no accounting, or it does not answer.
        groups: the user's groups on this machine.
    """

    settings: dict[str, str] = field(default_factory=dict)
    partitions: tuple[Partition, ...] = ()
    nodes: tuple[Node, ...] = ()
    accounts: Accounts | None = None
    groups: frozenset[str] = frozenset()

    @property
    def rewrites_jobs(self) -> bool:
        """Whether the site has plugins that can change the options of a job."""
        names = ("JobSubmitPlugins", "CliFilterPlugins")
        return any(self.settings.get(name, "(null)") not in ("(null)", "") for name in names)

    def enforces(self, what: str) -> bool:
        """Whether accounting enforces ``associations``, ``qos``, ...; some imply associations."""
        words = self.settings.get("AccountingStorageEnforce", "none").lower().split(",")
        implied = {"associations": {"limits", "qos", "wckeys", "safe"}, "limits": {"safe"}}
        return not {what, "all", *implied.get(what, ())}.isdisjoint(words)

    def partition(self, name: str) -> Partition | None:
        """Return a partition by its name."""
        return next((one for one in self.partitions if one.name == name), None)

    def nodes_of(self, partition: str) -> tuple[Node, ...]:
        """Return the nodes of a partition."""
        return tuple(node for node in self.nodes if partition in node.partitions)


def ask_cluster(environ: Mapping[str, str] | None = None) -> Facts:
    """Query Slurm; raise nothing if it is missing or does not answer."""
    environment = clean_environment(os.environ if environ is None else environ)
    settings = parse_settings(attempt(["scontrol", "show", "config"], environment) or "")
    if not settings:
        return Facts()
    partitions = attempt(["scontrol", "-o", "show", "partition"], environment) or ""
    nodes = attempt(["scontrol", "-o", "show", "node"], environment) or ""
    return Facts(
        settings,
        tuple(parse_partition(line) for line in partitions.splitlines() if "=" in line),
        tuple(parse_node(line) for line in nodes.splitlines() if "=" in line),
        _ask_accounts(settings, environment),
        frozenset(_groups()),
    )


def parse_settings(text: str) -> dict[str, str]:
    """Read ``scontrol show config``: ``Name = value`` lines."""
    return dict(re.findall(r"^([A-Za-z_]\w*)(?:\[\d+\])?\s*= ?(.*?)\s*$", text, re.MULTILINE))


def parse_partition(line: str) -> Partition:
    """Read one line of ``scontrol -o show partition``."""
    words = _words(line)
    return Partition(
        name=words.get("PartitionName", ""),
        default=words.get("Default") == "YES",
        state=words.get("State", "UP"),
        max_seconds=limit_seconds(words.get("MaxTime", "UNLIMITED")),
        max_memory=_limit(words.get("MaxMemPerNode", "")),
        max_cpus=_limit(words.get("MaxCPUsPerNode", "")),
        max_nodes=_limit(words.get("MaxNodes", "")),
        allow_accounts=_names(words.get("AllowAccounts", "ALL")),
        deny_accounts=_names(words.get("DenyAccounts", "ALL")),
        allow_groups=_names(words.get("AllowGroups", "ALL")),
        allow_qos=_names(words.get("AllowQos", "ALL")),
        deny_qos=_names(words.get("DenyQos", "ALL")),
        root_only=words.get("RootOnly") == "YES",
        reservation_only=words.get("ReqResv") == "YES",
    )


def parse_node(line: str) -> Node:
    """Read one line of ``scontrol -o show node``."""
    words = _words(line)
    states = set(re.split(r"[+*~#!%$@^-]", words.get("State", "")))
    return Node(
        name=words.get("NodeName", ""),
        arch=words.get("Arch") or None,
        cpus=_whole(words.get("CPUTot", "")),
        memory=_whole(words.get("RealMemory", "")),
        gpus=parse_gpus(words.get("Gres", "")),
        features=_names(words.get("AvailableFeatures", "")),
        partitions=_names(words.get("Partitions", "")),
        alive=not states & _DEAD,
        address=words.get("NodeAddr", ""),
    )


def parse_gpus(gres: str) -> dict[str, int]:
    """Return the GPUs in a list of generic resources, of a node or of a request.

    Items are ``gpu``, ``gpu:2``, ``gpu:a100`` and ``gpu:a100:4(S:0-1)``.
    """
    found: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = item.strip().removeprefix("gres/").replace("=", ":").split(":")
        if name == "gpu":
            count = int(rest.pop()) if rest and rest[-1].isdigit() else 1
            kind = rest[0] if rest else ""
            found[kind] = found.get(kind, 0) + count
    return found


def limit_seconds(text: str) -> float:
    """Return a time limit in seconds; infinite if it is none, or not a time."""
    try:
        return walltime_seconds(text.strip())
    except ValueError:
        return UNLIMITED


def megabytes(text: str) -> float:
    """Return a memory size of ``--mem`` in MB; 0 requests all memory of a node."""
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip().upper())
    return int(match[1]) * _MEMORY[match[2] or "M"] if match else 0


def _words(line: str) -> dict[str, str]:
    # Reasons and comments contain spaces and come last: the first match of a name is the field.
    words: dict[str, str] = {}
    for name, value in re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", line):
        words.setdefault(name, value)
    return words


def _names(text: str) -> tuple[str, ...]:
    if text in ("", "ALL", "(null)", "N/A", "NONE"):
        return ()
    return tuple(name for name in text.split(",") if name)


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _limit(text: str) -> float:
    return int(text) if text.isdigit() and text != "0" else UNLIMITED


def _groups() -> Iterator[str]:
    user = pwd.getpwuid(os.getuid())
    for number in os.getgrouplist(user.pw_name, user.pw_gid):
        try:
            yield grp.getgrgid(number).gr_name
        except KeyError:
            continue


def _ask_accounts(settings: Mapping[str, str], environment: Mapping[str, str]) -> Accounts | None:
    if "none" in settings.get("AccountingStorageType", "none"):
        return None
    user = pwd.getpwuid(os.getuid()).pw_name
    asked = ["sacctmgr", "-nP", "show"]
    default = attempt([*asked, "user", user, "format=defaultaccount"], environment)
    cluster = f"cluster={settings.get('ClusterName', '')}"
    columns = "account,defaultqos,qos,maxwall,maxtres,grptres"
    listed = attempt([*asked, "assoc", f"user={user}", cluster, f"format={columns}"], environment)
    if default is None or listed is None:
        return None
    fields_ = ",".join(("name", "maxwall", *_LIMITED_RESOURCES))
    qos = attempt([*asked, "qos", f"format={fields_}"], environment) or ""
    # The rows of no user are the accounts. A user's row inherits their limits for one job, but not
    # those for all jobs together.
    columns = "account,parentname,grptres"
    shared = attempt([*asked, "assoc", "user=''", cluster, f"format={columns}"], environment) or ""
    rows = [line.strip().split("|") for line in listed.splitlines() if line.strip()]
    limits = [line.split("|") for line in qos.splitlines() if line.strip()]
    groups = [line.split("|") for line in shared.splitlines() if line.strip()]
    return Accounts(
        default.strip().splitlines()[0] if default.strip() else None,
        tuple(sorted({row[0] for row in rows})),
        {name: JobLimits(limit_seconds(wall), _least(most)) for name, wall, *most in limits},
        {account: _usable(first, names) for account, first, names, *_ in rows},
        {account: JobLimits(limit_seconds(wall), _least(most))
         for account, _, _, wall, *most in rows},
        {account: (above, JobLimits(resources=_least(most))) for account, above, *most in groups},
    )  # fmt: skip


# The resources of one job, of all jobs of a user, of an account, and of all together.
_LIMITED_RESOURCES = ("maxtres", "maxtrespu", "maxtrespa", "grptres")


def _least(texts: Iterable[str]) -> dict[str, float]:
    """Return the lowest limit of each resource in texts such as ``cpu=8,gres/gpu=2,mem=16G``."""
    least: dict[str, float] = {}
    for text in texts:
        for item in filter(None, text.split(",")):
            name, _, value = item.partition("=")
            number = int(value) if value.isdigit() else UNLIMITED
            amount = megabytes(value) if name == "mem" else number
            least[name] = min(amount, least.get(name, UNLIMITED))
    return least


def _usable(default: str, names: str) -> tuple[str, ...]:
    found = [name for name in (default, *names.split(",")) if name]
    return tuple(dict.fromkeys(found))

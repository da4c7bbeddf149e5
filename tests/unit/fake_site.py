"""A fake cluster, with real output of ``scontrol`` and ``sacctmgr``."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field

from tests.unit.fake_commands import FakeCommands

SETTINGS = {
    "AccountingStorageEnforce": "none",
    "AccountingStorageType": "accounting_storage/none",
    "ClusterName": "delta",
    "JobRequeue": "1",
    "JobSubmitPlugins": "(null)",
    "MaxArraySize": "1001",
    "MinJobAge": "300 sec",
    "PowerPlugin": "",
    "PreemptMode": "REQUEUE",
    "PreemptType": "preempt/partition_prio",
    "SlurmctldHost[0]": "head(10.0.0.1)",
    "SLURM_VERSION": "23.11.4",
}
ACCOUNTING = {
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "AccountingStorageEnforce": "associations,limits,qos,safe",
}

# For rows of no user, sacctmgr answers another question.
_ACCOUNTS_ONLY = """[ "$4" != "user=''" ] || set -- "$1" "$2" groups\n"""


def partition(name: str, **changes: str) -> str:
    """Return a line of ``scontrol -o show partition``."""
    words = {
        "PartitionName": name, "AllowGroups": "ALL", "AllowAccounts": "ALL", "AllowQos": "ALL",
        "Default": "NO", "QoS": "N/A", "MaxTime": "2-00:00:00", "RootOnly": "NO",
        "ReqResv": "NO", "MaxCPUsPerNode": "UNLIMITED", "State": "UP",
        "MaxMemPerNode": "UNLIMITED", "TRES": "cpu=64,mem=250G,node=2,billing=64",
    }  # fmt: skip
    return " ".join(f"{key}={value}" for key, value in {**words, **changes}.items())


def node(name: str, **changes: str) -> str:
    """Return a line of ``scontrol -o show node``."""
    words = {
        "NodeName": name, "Arch": "x86_64", "CoresPerSocket": "16 ", "CPUTot": "64",
        "AvailableFeatures": "(null)", "Gres": "(null)", "State": "IDLE",
        "OS": "Linux 5.14.0 #1 SMP State=odd", "RealMemory": "256000", "Partitions": "gpu",
        "Reason": "ok Gres=none [root@2026-01-01]",
    }  # fmt: skip
    return " ".join(f"{key}={value}" for key, value in {**words, **changes}.items())


@dataclass
class FakeSite:
    """A cluster's configuration; ``install`` creates the commands that print it."""

    settings: dict[str, str] = field(default_factory=dict)
    partitions: list[str] = field(
        default_factory=lambda: [
            partition("cpu", Default="YES"),
            partition("gpu", MaxTime="1-00:00:00"),
            partition("big"),
        ]
    )
    nodes: list[str] = field(
        default_factory=lambda: [
            node("c1", Partitions="cpu"),
            node("g1", Gres="gpu:a100:4(S:0-1)", AvailableFeatures="amd,a100"),
            node("g2", Gres="gpu:v100:2(S:0),gpu:p4:1", CPUTot="32", State="DOWN*+DRAIN"),
            node("b1", Gres="gpu:a100:8(S:0-7)", Partitions="big", Arch="aarch64"),
        ]
    )
    default_account: str = "physics"
    accounts: tuple[str, ...] = ("physics|normal|normal,short|||", "chem|normal|normal,short|||")
    groups: tuple[str, ...] = ("physics|science|", "chem|science|", "science|root|", "root||")
    qos: tuple[str, ...] = ("normal|||||", "short|04:00:00|cpu=32,mem=64G|gres/gpu=2||gres/gpu=100")

    def install(self, commands: FakeCommands) -> dict[str, str]:
        """Create the commands; return an environment with them as the only Slurm commands."""
        config = "\n".join(
            f"{key:23} = {value}" for key, value in (SETTINGS | self.settings).items()
        )
        commands.add("scontrol", _cases("$*", {
            "show config": f"Configuration data as of 2026-11-23T22:20:49\n{config}\n",
            "-o show partition": "\n".join(self.partitions),
            "-o show node": "\n".join(self.nodes),
        }))  # fmt: skip
        commands.add("sacctmgr", _ACCOUNTS_ONLY + _cases("$3", {
            "user": self.default_account,
            "assoc": "\n".join(self.accounts),
            "groups": "\n".join(self.groups),
            "qos": "\n".join(self.qos),
        }))  # fmt: skip
        return {"PATH": commands.path, "HOME": os.environ["HOME"]}


def _cases(word: str, answers: dict[str, str]) -> str:
    cases = "".join(
        f"{shlex.quote(given)}) printf '%s\\n' {shlex.quote(output)} ;;\n"
        for given, output in answers.items()
    )
    return f'case "{word}" in\n{cases}*) exit 1 ;;\nesac\n'

"""The resources that are requested from Slurm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from aiflux.core.config.declaration import (
    Setting,
    by_every_name,
    declared_settings,
    known_setting,
    parse_setting,
    refuse_two_names,
    setting,
)
from aiflux.errors import ConfigError
from aiflux.util import value_parsers as parse

NVIDIA, AMD = "nvidia", "amd"
VENDOR_TITLES = {NVIDIA: "NVIDIA", AMD: "AMD"}
"""The vendors of GPUs, with their names in messages."""

LEFT_OUT = ("time", "mem", "cpus_per_task")
"""Settings whose null omits their directive; for the others it means "not set here"."""


@dataclass(init=False)
class SlurmConfig:
    """The resources that are requested from Slurm; fields are keywords, or assigned later.

    Each value is checked when it is given, and is then of the field's type. None leaves the
    directive out, or takes the default where there has to be a value.

    Raises:
        ConfigError: a value is wrong, or a name unknown; names the field and what it must be.
    """

    account: str | None = setting(
        parse.text, None, "Account to charge", metavar="NAME", env="SLURM_ACCOUNT", common=True
    )
    partition: str | None = setting(
        parse.text, None, "Partition", metavar="NAME", env="SLURM_PARTITION", common=True
    )
    qos: str | None = setting(parse.text, None, "Quality of service", metavar="NAME")
    nodes: int = setting(
        parse.integer(1), 1, "Nodes of a job; only 1 is possible", env="SLURM_NODES", offered=False
    )
    gpus_per_node: str = setting(
        parse.gpus,
        "1",
        "GPUs; 0 for none",
        metavar="N|TYPE:N",
        env="SLURM_GPUS_PER_NODE",
        common=True,
    )
    gres: str | None = setting(
        parse.text, None, "Generic resources, instead of --gpus-per-node", metavar="LIST"
    )
    gpu_vendor: str = setting(
        parse.choice("auto", NVIDIA, AMD),
        "auto",
        "Vendor of the GPUs: nvidia, amd, or auto for that of the node",
        metavar="NAME",
        env="AIFLUX_GPU_VENDOR",
    )
    constraint: str | None = setting(parse.text, None, "Required node features", metavar="LIST")
    time: str | None = setting(
        parse.walltime, "04:00:00", "Time limit", metavar="TIME", env="SLURM_TIME", common=True
    )
    mem: str | None = setting(
        parse.memory,
        "32G",
        "Memory per node",
        metavar="SIZE",
        env="SLURM_MEM",
        aliases=("memory",),
        common=True,
    )
    cpus_per_task: int | None = setting(parse.integer(1), 4, "CPU cores", env="SLURM_CPUS_PER_TASK")
    mail_user: str | None = setting(
        parse.text, None, "Address for Slurm's mails", metavar="ADDRESS"
    )
    mail_type: str | None = setting(
        parse.text, None, "Events that Slurm sends mails about, such as END,FAIL", metavar="LIST"
    )
    exclude: str | None = setting(parse.text, None, "Nodes not to use", metavar="NODES")
    reservation: str | None = setting(parse.text, None, "Reservation to use", metavar="NAME")
    shards: int | str = setting(
        parse.shards,
        1,
        "Jobs to split the input into",
        metavar="N|auto",
        common=True,
    )
    max_running: int | None = setting(
        parse.integer(1), None, "Shards that may run at the same time"
    )
    sbatch_arg: dict[str, str] = setting(
        parse.pairs,
        {},
        "Any other sbatch option (repeatable)",
        metavar="KEY=VALUE",
        repeatable=True,
        decisive=True,
    )
    seal: bool = setting(
        parse.boolean,
        True,
        "Process requests without network access; --no-seal keeps the network",
        env="AIFLUX_SEAL",
        decisive=True,
    )
    modules: tuple[str, ...] = setting(
        parse.lines,
        (),
        "Environment module to load in the job (repeatable)",
        metavar="NAME",
        repeatable=True,
        decisive=True,
    )
    setup: tuple[str, ...] = setting(
        parse.lines,
        (),
        "Shell line to run in the job before the work (repeatable)",
        metavar="LINE",
        repeatable=True,
        decisive=True,
    )

    def __init__(self, **values: Any) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _default(item.name))
        refuse_two_names(values, lambda _: "SlurmConfig", _settings())
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        known = known_setting(name, "SlurmConfig: ", _settings())
        parsed = parse_setting(known, value, "SlurmConfig") if value is not None else None
        if parsed is None and known.name not in LEFT_OUT:
            parsed = _default(known.name)
        object.__setattr__(self, known.name, parsed)

    @property
    def memory(self) -> str | None:
        """Another name for ``mem``."""
        return self.mem

    @memory.setter
    def memory(self, value: str | None) -> None:
        self.mem = value

    def checked(self) -> SlurmConfig:
        """Return a copy whose values fit together.

        Raises:
            ConfigError: they do not.
        """
        if self.nodes != 1:
            raise ConfigError(
                f"nodes = {self.nodes}: one job uses one node",
                "leave --nodes at 1; more GPUs of one node are used with --gpus-per-node",
            )
        checked = SlurmConfig(**{item.name: getattr(self, item.name) for item in fields(self)})
        if checked.gres is not None and self.gpus_per_node == SlurmConfig.gpus_per_node:
            checked.gpus_per_node = "0"
        return checked


@cache
def _settings() -> Mapping[str, Setting]:
    return by_every_name(declared_settings(SlurmConfig, "slurm"))


def _default(name: str) -> Any:
    (item,) = (item for item in fields(SlurmConfig) if item.name == name)
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else None

"""What is asked of Slurm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from aiflux.core.config.settings import (
    Setting,
    known_setting,
    parse_setting,
    refuse_two_names,
    section_settings,
)
from aiflux.errors import ConfigError

LEFT_OUT = ("time", "mem", "cpus_per_task")
"""Settings whose null leaves their directive out; for the others it means "not said here"."""


@dataclass(init=False)
class SlurmConfig:
    """What is asked of Slurm; fields are given by keyword, or assigned later.

    Each value is checked when it is given, and is then of the field's type. None leaves the
    directive out, or takes the default where there has to be a value.

    Raises:
        ConfigError: a value is wrong, or a name unknown; names the field and what it must be.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus_per_node: str = "1"
    gres: str | None = None
    constraint: str | None = None
    time: str | None = "04:00:00"
    mem: str | None = "32G"
    cpus_per_task: int | None = 4
    mail_user: str | None = None
    mail_type: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    shards: int | str = 1
    max_running: int | None = None
    seal: bool = True
    sbatch_arg: dict[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    def __init__(self, **values: Any) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _default(item.name))
        refuse_two_names(values, lambda _: "SlurmConfig")
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        setting = known_setting(name, "SlurmConfig: ", _settings())
        parsed = parse_setting(setting, value, "SlurmConfig") if value is not None else None
        if parsed is None and setting.name not in LEFT_OUT:
            parsed = _default(setting.name)
        object.__setattr__(self, setting.name, parsed)

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


def _settings() -> Mapping[str, Setting]:
    return section_settings("slurm")


def _default(name: str) -> Any:
    (item,) = (item for item in fields(SlurmConfig) if item.name == name)
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else None

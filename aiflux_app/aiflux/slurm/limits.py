"""The limits of a site: the most that a run can request, whatever its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiflux.core.config.config import SlurmConfig
from aiflux.core.config.settings import BY_NAME, RunOptions
from aiflux.core.config.sources import LIMITS, site_files
from aiflux.errors import ConfigError
from aiflux.slurm.preflight.nodes import requested_gpus
from aiflux.util import value_parsers as parse
from aiflux.util.times import walltime_given, walltime_seconds
from aiflux.util.yaml_file import read_yaml

_PARSERS: Mapping[str, parse.Parser] = {
    "shards": parse.integer(1),
    "gpus_per_node": parse.integer(0),
    "nodes_per_engine": parse.integer(1),
    "time": parse.walltime,
}
# sbatch also accepts the beginning of a name. A job with --exclusive gets all GPUs of its node,
# whatever it requests; specialized cores or threads imply it (man sbatch).
_MORE_GPUS = (
    "core-spec",
    "exclusive",
    "gpus-per-socket",
    "thread-spec",
    "tres-per-job",
    "tres-per-node",
    "tres-per-socket",
    "tres-per-task",
)


@dataclass(frozen=True)
class SiteLimit:
    """The most of one setting.

    Attributes:
        value: as the site wrote it.
        amount: the same as a number; seconds for a time.
        origin: file and line.
    """

    value: Any
    amount: float
    origin: str


def site_limits(environ: Mapping[str, str]) -> dict[str, SiteLimit]:
    """Return the limits of the site by setting; of several files, the lowest.

    Raises:
        ConfigError: a limit is unknown or wrong; shows its place.
    """
    found: dict[str, SiteLimit] = {}
    for path in site_files(environ):
        for name, limit in _limits_of(path):
            if name not in found or limit.amount < found[name].amount:
                found[name] = limit
    return found


def _limits_of(path: Path) -> Iterator[tuple[str, SiteLimit]]:
    file = read_yaml(path)
    file.mapping()
    if not file.content or LIMITS not in file.content:
        return
    for name, given in file.mapping(LIMITS, known=_PARSERS, noun="limit").items():
        try:
            value = _PARSERS[name](given)
        except ValueError as error:
            raise ConfigError(
                f"{file.place(LIMITS, name)}: {given!r} is wrong", f"{name} must be {error}"
            ) from None
        amount = walltime_seconds(value) if name == "time" else value
        yield name, SiteLimit(value, amount, file.line(LIMITS, name))


def most_shards(slurm: SlurmConfig, limits: Mapping[str, SiteLimit]) -> float:
    """Return how many shards of a run may start together."""
    permitted = limits["shards"].amount if "shards" in limits else math.inf
    return permitted if slurm.max_running is None else min(permitted, slurm.max_running)


def refuse_excess(slurm: SlurmConfig, options: RunOptions, limits: Mapping[str, SiteLimit]) -> None:
    """Refuse a run that requests more than the site permits.

    Raises:
        ConfigError: it does; names the limit and the site's file.
    """
    gpus = sum(requested_gpus(slurm).values())
    time = walltime_given(slurm.time) if slurm.time else "the partition's default"
    requested: Mapping[str, tuple[object, float]] = {
        "shards": (slurm.shards, slurm.shards if isinstance(slurm.shards, int) else 1),
        "gpus_per_node": (gpus, gpus),
        "nodes_per_engine": (options.nodes_per_engine, options.nodes_per_engine),
        "time": (time, walltime_seconds(slurm.time)),
    }
    for name, limit in limits.items():
        value, amount = requested[name]
        if amount > limit.amount:
            option = "--gres or --gpus-per-node" if slurm.gres else BY_NAME[name].option
            raise ConfigError(
                f"{name} is {value}, but this site permits at most {limit.value} ({limit.origin})",
                f"request less with {option if name == 'gpus_per_node' else BY_NAME[name].option}",
            )
    more = next(
        (key for key in slurm.sbatch_arg if any(name.startswith(key) for name in _MORE_GPUS)), None
    )
    if more is not None and "gpus_per_node" in limits:
        raise ConfigError(
            f"sbatch_arg {more!r} could request more GPUs than this site permits: "
            f"{limits['gpus_per_node'].value} ({limits['gpus_per_node'].origin})",
            "request them with --gpus-per-node or --gres",
        )

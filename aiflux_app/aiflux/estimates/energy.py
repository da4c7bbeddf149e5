"""The energy of a run, and what follows from it at a site's rates: CO2 and billing units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aiflux.core.config.config import Config
from aiflux.core.runs.status_file import EnergyUse, StatusDetails
from aiflux.util.records import to_json

JOULES_PER_KWH = 3.6e6
COUNTED, SAMPLED, BOTH = "counter", "power samples", "counter and power samples"
"""How the energy of the GPUs was measured."""


@dataclass(frozen=True)
class Rates:
    """A site's rates; None is unknown.

    Attributes:
        co2_per_kwh: grams.
        billing_per_gpu_hour: the site's units for an hour of a GPU.
    """

    co2_per_kwh: float | None = None
    billing_per_gpu_hour: float | None = None

    @classmethod
    def of(cls, config: Config) -> Rates:
        """Return the rates in the settings."""
        return cls(config.get("co2_per_kwh"), config.get("billing_per_gpu_hour"))

    def co2_grams(self, joules: float | None) -> float | None:
        """Return the CO2 of an energy; None if either is unknown."""
        if joules is None or self.co2_per_kwh is None:
            return None
        return joules / JOULES_PER_KWH * self.co2_per_kwh

    def billing_units(self, gpu_hours: float) -> float | None:
        """Return the price of GPU-hours; None if it is unknown."""
        return None if self.billing_per_gpu_hour is None else gpu_hours * self.billing_per_gpu_hour


UNKNOWN_RATES = Rates()


@dataclass(frozen=True)
class SlurmEnergy:
    """Slurm's ``ConsumedEnergy`` of a run's jobs, which is that of whole nodes.

    Attributes:
        joules: sum of the jobs for which it is kept.
        kept, tasks: number of jobs (or tasks of arrays) for which it is kept, and of all.
    """

    joules: float
    kept: int
    tasks: int


@dataclass(frozen=True)
class EnergyFigures:
    """The energy of a run. None is unknown, or not measured.

    Attributes:
        gpu_kwh: of the GPUs.
        method: how that was measured.
        measured_share: share of the GPU-hours in which it was measured.
        slurm_kwh: of the jobs' nodes, according to Slurm.
        slurm_jobs_kept, slurm_jobs: for how many jobs Slurm keeps it; 0 of 0 if it was not asked.
        source: ``gpus`` or ``slurm``: what the next two figures are computed from.
        joules_per_1000_answers, co2_grams: of that energy.
        billing_units: of the GPU-hours.
    """

    gpu_kwh: float | None = None
    method: str | None = None
    measured_share: float | None = None
    slurm_kwh: float | None = None
    slurm_jobs_kept: int = 0
    slurm_jobs: int = 0
    source: str | None = None
    joules_per_1000_answers: float | None = None
    co2_grams: float | None = None
    co2_per_kwh: float | None = None
    billing_units: float | None = None
    billing_per_gpu_hour: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return to_json(self)


def energy_figures(
    details: Iterable[StatusDetails], answers: int, rates: Rates, slurm: SlurmEnergy | None = None
) -> EnergyFigures:
    """Return the energy of a run.

    Args:
        details: of all shards that have a status.
        answers: number of requests that were answered.
        slurm: None if Slurm was not asked.
    """
    known = list(details)
    use = sum_of(each.energy for each in known)
    gpu_seconds = sum(each.totals.gpu_seconds for each in known)
    of_gpus = use.joules if use.gpu_seconds else None
    of_slurm = slurm.joules if slurm is not None and slurm.kept else None
    joules = of_slurm if of_gpus is None else of_gpus
    hours = gpu_seconds / 3600
    return EnergyFigures(
        gpu_kwh=_kwh(of_gpus),
        method=method_of(use),
        measured_share=_share(use.gpu_seconds, gpu_seconds) if of_gpus is not None else None,
        slurm_kwh=_kwh(of_slurm),
        slurm_jobs_kept=slurm.kept if slurm is not None else 0,
        slurm_jobs=slurm.tasks if slurm is not None else 0,
        source=None if joules is None else "slurm" if of_gpus is None else "gpus",
        joules_per_1000_answers=_rounded(joules / answers * 1000 if joules and answers else None),
        co2_grams=_rounded(rates.co2_grams(joules)),
        co2_per_kwh=rates.co2_per_kwh,
        billing_units=_rounded(rates.billing_units(hours) if gpu_seconds else None),
        billing_per_gpu_hour=rates.billing_per_gpu_hour,
    )


def sum_of(uses: Iterable[EnergyUse]) -> EnergyUse:
    """Return the sum of measured energies."""
    total = EnergyUse()
    for use in uses:
        total = total.plus(use)
    return total


def method_of(use: EnergyUse) -> str | None:
    """Return how an energy was measured; None if it was not."""
    if use.counted_gpu_seconds and use.sampled_gpu_seconds:
        return BOTH
    if use.counted_gpu_seconds:
        return COUNTED
    return SAMPLED if use.sampled_gpu_seconds else None


def mean_watts(use: EnergyUse) -> float | None:
    """Return the mean power of one GPU; None if it was not measured."""
    return use.joules / use.gpu_seconds if use.gpu_seconds else None


def _share(measured: float, whole: float) -> float:
    return round(min(1.0, measured / whole), 4) if whole else 1.0


def _kwh(joules: float | None) -> float | None:
    return None if joules is None else round(joules / JOULES_PER_KWH, 6)


def _rounded(figure: float | None) -> float | None:
    return None if figure is None else round(figure, 3)


def kwh_text(kwh: float) -> str:
    """Return an energy with three digits."""
    if kwh < 1:
        return f"{1000 * kwh:.3g} Wh"
    return f"{kwh:.3g} kWh" if kwh < 1000 else f"{kwh:,.0f} kWh"

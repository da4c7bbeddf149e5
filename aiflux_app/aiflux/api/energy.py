"""The energy of a run: of its GPUs by its files, and of its nodes by Slurm's accounting."""

from __future__ import annotations

from aiflux.core.config.config import Config
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.status_file import read_status
from aiflux.estimates.energy import EnergyFigures, Rates, SlurmEnergy, energy_figures
from aiflux.slurm.commands import consumed_energy
from aiflux.slurm.jobs import known_submissions


def slurm_energy(run: RunDirectory) -> SlurmEnergy | None:
    """Return what Slurm keeps about the energy of a run's jobs; None for a run without jobs."""
    submissions = known_submissions(run)
    if submissions is None or not submissions.submissions:
        return None
    jobs = [job for each in submissions.submissions for job in each.jobs]
    ids = [id_ for each in submissions.submissions for id_ in each.ids]
    found = consumed_energy(ids)
    return SlurmEnergy(sum(found.values()), len(found), sum(len(job.shards) for job in jobs))


def run_energy(run: RunDirectory, plan: Plan, answers: int, *, ended: bool) -> EnergyFigures:
    """Return the energy of a run, with the rates of the settings.

    Args:
        ended: whether the run has ended: Slurm is only asked then, as its figure is not final
            before, and programs ask for the status of an active run often.
    """
    statuses = (read_status(run, shard.index, plan) for shard in plan.shards)
    details = [status.details for status in statuses if status is not None]
    return energy_figures(
        details, answers, Rates.of(Config()), slurm_energy(run) if ended else None
    )

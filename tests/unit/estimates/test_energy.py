"""Energy, CO2 and billing units of a run, and what an estimate expects of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from aiflux.core.config.config import Config
from aiflux.core.runs.status_file import EnergyUse, StatusDetails, Totals
from aiflux.errors import ConfigError
from aiflux.estimates.energy import (
    BOTH,
    COUNTED,
    SAMPLED,
    EnergyFigures,
    Rates,
    SlurmEnergy,
    energy_figures,
    kwh_text,
    method_of,
)
from aiflux.estimates.estimate import Estimate, Range

RATES = Rates(co2_per_kwh=400, billing_per_gpu_hour=2.5)
KWH = 3.6e6


def details(
    joules: float, counted: float = 0, sampled: float = 0, gpus: float = 0
) -> StatusDetails:
    return StatusDetails(
        energy=EnergyUse(joules, counted, sampled), totals=Totals(gpu_seconds=gpus)
    )


def test_the_figures_of_two_shards() -> None:
    found = energy_figures(
        [details(KWH, counted=3600, gpus=3600), details(KWH, sampled=1800, gpus=3600)],
        4000,
        RATES,
        SlurmEnergy(5 * KWH, 1, 2),
    )
    assert found == EnergyFigures(
        gpu_kwh=2.0,
        method=BOTH,
        measured_share=0.75,
        slurm_kwh=5.0,
        slurm_jobs_kept=1,
        slurm_jobs=2,
        source="gpus",
        joules_per_1000_answers=1_800_000,
        co2_grams=800,
        co2_per_kwh=400,
        billing_units=5.0,
        billing_per_gpu_hour=2.5,
    )


def test_what_is_not_measured_is_not_zero() -> None:
    assert energy_figures([StatusDetails()], 10, Rates()) == EnergyFigures()
    found = energy_figures([details(0, gpus=3600)], 10, RATES, SlurmEnergy(0, 0, 3))
    assert (found.gpu_kwh, found.slurm_kwh, found.source, found.co2_grams) == (None,) * 4
    assert (found.slurm_jobs_kept, found.slurm_jobs, found.billing_units) == (0, 3, 2.5)


def test_slurms_figure_counts_where_the_gpus_were_not_measured() -> None:
    found = energy_figures([details(0)], 500, RATES, SlurmEnergy(KWH, 1, 1))
    assert (found.source, found.joules_per_1000_answers, found.co2_grams) == ("slurm", 2 * KWH, 400)
    assert found.billing_units is None  # no GPU-hours


def test_a_run_without_answers_has_no_energy_for_each() -> None:
    assert energy_figures([details(KWH, 10)], 0, RATES).joules_per_1000_answers is None


@pytest.mark.parametrize(
    ("use", "method"),
    [
        (EnergyUse(1, 1, 0), COUNTED),
        (EnergyUse(1, 0, 1), SAMPLED),
        (EnergyUse(1, 1, 1), BOTH),
        (EnergyUse(), None),
    ],
)
def test_the_method_is_named(use: EnergyUse, method: str | None) -> None:
    assert method_of(use) == method


@pytest.mark.parametrize(
    ("kwh", "text"),
    [(0.01234, "12.3 Wh"), (1.5, "1.5 kWh"), (123.4, "123 kWh"), (4567, "4,567 kWh")],
)
def test_an_energy_is_shown_with_three_digits(kwh: float, text: str) -> None:
    assert kwh_text(kwh) == text


def test_the_rates_are_settings(tmp_path: Path) -> None:
    (tmp_path / "aiflux.yaml").write_text("accounting: {co2_per_kwh: 380}\n")
    environ = {"AIFLUX_BILLING_PER_GPU_HOUR": "12"}
    assert Rates.of(Config(environ=environ, directory=tmp_path)) == Rates(380, 12)
    for wrong in ("-1", "much", "nan"):
        with pytest.raises(ConfigError, match=r"\(AIFLUX_CO2_PER_KWH\): co2_per_kwh = .* is wrong"):
            Config(environ={"AIFLUX_CO2_PER_KWH": wrong}, directory=tmp_path)


def estimate(watts: float | None, gpus: int = 2) -> Estimate:
    exactly = Range(3600, 3000, 4200)
    none = Range(0, 0, 0)
    return Estimate(
        "p", "slurm", "", 1000, 10, 0, none, none, 4, exactly, none, 1.0, gpus, none,
        gpu_watts=watts,
    )  # fmt: skip


def test_without_an_answer_there_is_no_energy_for_1000_answers() -> None:
    found = estimate(500)
    every = Range(float(found.requests), found.requests * 0.9, float(found.requests))
    costs = replace(found, failures=every).costs(RATES, 1)
    assert costs.gpu_kwh is not None
    assert costs.joules_per_1000_answers is None


def test_an_estimate_has_the_costs_of_all_jobs() -> None:
    costs = estimate(500).costs(RATES, 1)
    assert costs.gpu_kwh is not None
    assert (costs.gpu_kwh.value, costs.gpu_kwh.low) == pytest.approx((1.0, 3000 / 3600))
    assert costs.joules_per_1000_answers is not None
    assert costs.joules_per_1000_answers.value == pytest.approx(KWH)
    assert costs.co2_grams is not None
    assert costs.co2_grams.high == pytest.approx(400 * 4200 / 3600)
    assert costs.billing_units is not None
    assert costs.billing_units.value == pytest.approx(5.0)


def test_an_estimate_without_measured_power_has_no_energy() -> None:
    costs = estimate(None).costs(Rates(400), 1)
    assert (costs.gpu_kwh, costs.co2_grams, costs.billing_units) == (None, None, None)
    assert estimate(500).to_json()["costs"]["co2_grams"] is None
    assert estimate(500, gpus=0).costs(RATES, 1).billing_units is None

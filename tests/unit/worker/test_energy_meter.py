"""The energy of the job's GPUs, with a small library in place of NVML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.core.runs.status_file import EnergyUse, GpuUse
from aiflux.engines.gpu_readings import PowerReading, nvidia_uuids
from aiflux.engines.gpus import power_readings
from aiflux.worker.energy_meter import EnergyMeter, energy_between
from aiflux.worker.node import GpuWatch
from tests.tools.engine_contract import until
from tests.unit.fake_commands import FakeCommands

AMD = {"AIFLUX_GPU_VENDOR": "amd"}
LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
GPU 2: NVIDIA A100-SXM4-80GB (UUID: GPU-cccc)
  MIG 1g.20gb     Device  0: (UUID: MIG-dddd)
"""
# GPU-aaaa counts: 1 J more with each call. GPU-bbbb has no counter, as before Volta.
NVML = r"""
#include <string.h>
static int calls;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    if (strcmp(uuid, "GPU-aaaa") == 0) { *device = (void *)1; return 0; }
    if (strcmp(uuid, "GPU-bbbb") == 0) { *device = (void *)2; return 0; }
    return 6;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
    if (device != (void *)1) return 3;
    *energy = 5000000000000ULL + 1000ULL * (unsigned)calls++;
    return 0;
}
"""
READ = """
import json
from dataclasses import astuple
from aiflux.engines.nvml import nvidia_power
print(json.dumps([[astuple(one) for one in nvidia_power(DEVICES)] for _ in range(2)]))
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fakes = FakeCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


def read_twice(
    folder: Path, fakes: FakeCommands, devices: tuple[str, ...], *, library: bool = True
) -> list[list[list[float | None]]]:
    """Return two readings of a process that finds the stand-in of NVML."""
    (folder / "nvml.c").write_text(NVML)
    if library:
        target = folder / "libnvidia-ml.so.1"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-o", target, folder / "nvml.c"],
            check=True,
            env={"PATH": os.defpath},
        )
    done = subprocess.run(
        [sys.executable, "-c", READ.replace("DEVICES", repr(devices))],
        env={"PATH": fakes.path, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[list[list[float | None]]] = json.loads(done.stdout)
    return found


def test_the_driver_counts_the_energy_or_else_the_power_is_read(
    tmp_path: Path, commands: FakeCommands
) -> None:
    commands.add(
        "nvidia-smi",
        f"[[ $1 != -L ]] || {{ cat <<'E'\n{LISTED}E\nexit; }}\necho 'GPU-bbbb, 250.50'",
    )
    devices = ("0", "GPU-bbbb", "MIG-dddd", "7")
    first, second = read_twice(tmp_path, commands, devices)
    assert first == [[5e9, None], [None, 250.5], [None, None], [None, None]]
    assert second[0] == [5e9 + 1, None]
    asked = [call.argv for call in commands.calls("nvidia-smi")]
    # The cards are listed once; only the card without a counter is asked for its power.
    assert [argv[0] for argv in asked] == ["-L", "--id=GPU-bbbb", "--id=GPU-bbbb"]


def test_without_the_library_the_power_is_read(tmp_path: Path, commands: FakeCommands) -> None:
    commands.add(
        "nvidia-smi",
        f"[[ $1 != -L ]] || {{ cat <<'E'\n{LISTED}E\nexit; }}\n"
        "printf 'GPU-aaaa, 100.00\\nGPU-bbbb, [N/A]\\n'",
    )
    first, _ = read_twice(tmp_path, commands, ("0", "1"), library=False)
    assert first == [[None, 100.0], [None, None]]


def test_a_slice_has_no_energy_of_its_own(commands: FakeCommands) -> None:
    commands.say("nvidia-smi", LISTED)
    assert nvidia_uuids(("1", "2", "MIG-dddd")) == ("GPU-bbbb", None, None)


ROCM = {
    "card0": {
        "Unique ID": "0xabc",
        "Average Graphics Package Power (W)": "90.0",
        "Energy counter": "1000",
        "Accumulated Energy (uJ)": "15259000.2",
    },
    "card1": {"Current Socket Graphics Package Power (W)": "120.0"},
    "system": {"Driver version": "6"},
}
AMD_SMI = [
    {
        "gpu": 0,
        "power": {"socket_power": {"value": 90, "unit": "W"}},
        "energy": {"total_energy_consumption": {"value": 15.25, "unit": "J"}},
    },
    {"gpu": 1, "power": {"socket_power": "N/A"}, "energy": "N/A"},
]


def test_rocm_smi_reports_energy_and_power(commands: FakeCommands) -> None:
    commands.say("rocm-smi", json.dumps(ROCM))
    one, two, same = power_readings(("0", "1", "GPU-abc"), AMD)
    assert one == same == PowerReading(pytest.approx(15.2590002), 90.0)
    assert two == PowerReading(None, 120.0)


def test_amd_smi_is_asked_where_rocm_smi_is_missing(commands: FakeCommands) -> None:
    commands.say("amd-smi", json.dumps(AMD_SMI))
    assert power_readings(("0", "1"), AMD) == (PowerReading(15.25, 90.0), PowerReading())
    commands.say("amd-smi", json.dumps({"gpu_data": AMD_SMI}))
    assert power_readings(("0",), AMD) == (PowerReading(15.25, 90.0),)


@pytest.mark.parametrize(
    ("before", "after", "energy"),
    [
        (PowerReading(10, 5), PowerReading(70, 5), EnergyUse(60, 10, 0)),
        (PowerReading(None, 100), PowerReading(None, 300), EnergyUse(2000, 0, 10)),
        (PowerReading(70), PowerReading(10), EnergyUse()),  # the driver was loaded again
        (PowerReading(), PowerReading(10), EnergyUse()),
        (PowerReading(None, 100), PowerReading(), EnergyUse()),
    ],
)
def test_energy_between_two_readings(
    before: PowerReading, after: PowerReading, energy: EnergyUse
) -> None:
    assert energy_between(before, after, 10) == energy


def test_the_energy_continues_that_of_earlier_starts(commands: FakeCommands) -> None:
    commands.say("rocm-smi", json.dumps({"card0": {"Average Graphics Package Power (W)": "100"}}))
    noted: list[EnergyUse] = []
    moments = iter((0.0, 30.0, 50.0))
    before = EnergyUse(500.0, 7.0, 3.0)
    meter = EnergyMeter(("0", "1"), before, noted.append, AMD, lambda: next(moments))
    assert not meter.works
    for _ in range(3):
        meter.read()
    assert meter.works
    assert noted == [before, EnergyUse(3500, 7, 33), EnergyUse(5500, 7, 53)]


def test_a_watch_reads_the_energy_at_the_beginning_and_at_the_end(commands: FakeCommands) -> None:
    """A run that ends before the first sample has its energy, too."""
    commands.say("rocm-smi", json.dumps({"card0": {"Average Graphics Package Power (W)": "100"}}))
    noted: list[EnergyUse] = []
    moments = iter((0.0, 20.0))
    meter = EnergyMeter(("0",), EnergyUse(), noted.append, AMD, lambda: next(moments))
    with GpuWatch(("0",), GpuUse(), lambda _: None, interval=600, environ=AMD, meter=meter):
        until(lambda: bool(noted), 20)
    assert noted == [EnergyUse(), EnergyUse(2000, 0, 20)]


def test_a_watch_without_any_figure_ends(commands: FakeCommands) -> None:
    commands.say("rocm-smi", "{}")
    noted: list[EnergyUse] = []
    meter = EnergyMeter(("0",), EnergyUse(), noted.append, AMD)
    with GpuWatch(("0",), GpuUse(), lambda _: None, interval=0.01, environ=AMD, meter=meter):
        until((commands.folder / "calls" / "rocm-smi-1").is_dir, 20)
    assert noted == []

"""GPUs of both vendors, with stand-ins of nvidia-smi and rocm-smi that print recorded outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aiflux.engines.gpu_readings import GpuReading
from aiflux.engines.gpus import (
    device_settings,
    free_memory,
    gpu_names,
    gpu_vendor,
    group,
    kfd_devices,
    own_devices,
    readings,
    visible_devices,
)
from aiflux.engines.process import engine_environment
from aiflux.errors import EngineError
from tests.unit.fake_commands import FakeCommands

MIB = 2**20
NVIDIA = {"AIFLUX_GPU_VENDOR": "nvidia"}
AMD = {"AIFLUX_GPU_VENDOR": "amd"}

# The first GPU is that of the XML below; the form is that of an A100 in vllm-project/vllm#41850.
LISTED = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-513536b6-7d19-9063-b049-1e69664bb298)
  MIG 1g.20gb     Device  0: (UUID: MIG-377e0049-554c-540b-93c6-d0976f8426cb)
  MIG 1g.20gb     Device  1: (UUID: MIG-f39aa248-6f1b-5769-b119-8d650bb34b27)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-8c7c9c30-f12f-20bf-e14e-d3c4c965af32)
"""
SLICES = ("MIG-377e0049-554c-540b-93c6-d0976f8426cb", "MIG-f39aa248-6f1b-5769-b119-8d650bb34b27")
# Shortened from plugins/inputs/nvidia_smi/testdata/a100-sxm4-v12.xml of influxdata/telegraf.
XML = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
    <driver_version>535.54.03</driver_version>
    <gpu id="00000000:01:00.0">
        <product_name>NVIDIA A100-SXM4-80GB</product_name>
        <mig_devices>
            <mig_device>
                <index>0</index>
                <gpu_instance_id>3</gpu_instance_id>
                <fb_memory_usage>
                    <total>19968 MiB</total>
                    <reserved>0 MiB</reserved>
                    <used>12 MiB</used>
                    <free>19955 MiB</free>
                </fb_memory_usage>
                <bar1_memory_usage>
                    <total>32767 MiB</total>
                </bar1_memory_usage>
            </mig_device>
            <mig_device>
                <index>1</index>
                <gpu_instance_id>4</gpu_instance_id>
                <fb_memory_usage>
                    <total>19968 MiB</total>
                    <reserved>0 MiB</reserved>
                    <used>12 MiB</used>
                    <free>19955 MiB</free>
                </fb_memory_usage>
            </mig_device>
        </mig_devices>
        <uuid>GPU-513536b6-7d19-9063-b049-1e69664bb298</uuid>
        <fb_memory_usage>
            <total>81920 MiB</total>
            <reserved>869 MiB</reserved>
            <used>50 MiB</used>
            <free>80999 MiB</free>
        </fb_memory_usage>
        <utilization>
            <gpu_util>N/A</gpu_util>
        </utilization>
    </gpu>
</nvidia_smi_log>
"""
SMI = f"""\
case "$*" in
-L) cat <<'END'
{LISTED}END
;;
"-q -x") cat <<'END'
{XML}END
;;
*--id=1*--query-gpu=index,*) echo "1, 37, 81559, 559, 81000" ;;
*) exit 9 ;;
esac
"""
SLICE = GpuReading(
    "NVIDIA A100-SXM4-80GB MIG 1g.20gb", 19968 * MIB, 12 * MIB, 19955 * MIB, None
)  # fmt: skip
WHOLE = GpuReading("NVIDIA H100 80GB HBM3", 81559 * MIB, 559 * MIB, 81000 * MIB, 37.0)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fakes = FakeCommands(tmp_path / "fakes")
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


def test_every_slice_of_a_gpu_is_a_gpu(commands: FakeCommands) -> None:
    commands.add("nvidia-smi", SMI)
    devices = visible_devices(NVIDIA)
    assert devices == (*SLICES, "1")
    assert group(devices, 1) == ((SLICES[0],), (SLICES[1],), ("1",))
    assert gpu_names(NVIDIA) == (SLICE.name, SLICE.name, WHOLE.name)


def test_a_slice_has_its_own_memory_not_that_of_the_card(commands: FakeCommands) -> None:
    commands.add("nvidia-smi", SMI)
    job = {**NVIDIA, "CUDA_VISIBLE_DEVICES": ",".join(SLICES)}
    assert visible_devices(job) == SLICES
    assert readings(SLICES, job) == (SLICE, SLICE)
    assert free_memory(SLICES, job) == (19955 * MIB, 19955 * MIB)
    # CUDA uses the first slice of a card that it gets by number, and accepts the start of a UUID.
    for device in ("0", "GPU-513536b6-7d19-9063-b049-1e69664bb298", "MIG-377e"):
        assert readings((device,), job) == (SLICE,)
    assert readings(("1", "GPU-8c7c9c30"), job) == (WHOLE, WHOLE)


@pytest.mark.parametrize("xml", ["", "no XML", XML.replace("19955 MiB", "N/A"), "<gpu></gpu>"])
def test_a_slice_of_unknown_memory_does_not_get_that_of_the_card(
    commands: FakeCommands, xml: str
) -> None:
    commands.add("nvidia-smi", SMI.replace(XML, f"{xml}\n"))
    assert free_memory((SLICES[0],), NVIDIA) == ()
    assert gpu_names({**NVIDIA, "CUDA_VISIBLE_DEVICES": SLICES[0]}) == (SLICE.name,)
    assert free_memory(("MIG-unknown",), NVIDIA) == ()


def test_without_a_driver_there_is_no_gpu(commands: FakeCommands) -> None:
    assert visible_devices(NVIDIA) == ()
    assert gpu_names(NVIDIA) == ()
    assert readings(("0",), NVIDIA) == (GpuReading(),)
    assert readings(("0",), AMD) == (GpuReading(),)
    commands.say("nvidia-smi", "NVIDIA-SMI has failed", status=9)
    assert visible_devices(NVIDIA) == ()


def test_an_engine_uses_one_slice_only() -> None:
    with pytest.raises(EngineError, match="an engine can use one only"):
        group(SLICES, 2)
    with pytest.raises(EngineError, match="the job has 2 GPUs"):
        group(("0", "1"), 3)
    assert group(("0", "1", "2"), 2) == (("0", "1"),)
    assert group((), 4) == ((),)


# --- AMD ---------------------------------------------------------------------------------------

# From marimo-team/marimo#9237, henrygd/beszel#414 and, for an MI250X, gpu_amd_test.go of
# wandb/wandb: three versions, whose keys differ. The third is shortened; it has no memory in bytes.
RX_7900_XT = {
    "GPU use (%)": "0",
    "VRAM Total Memory (B)": "21458059264",
    "VRAM Total Used Memory (B)": "27856896",
    "Card Series": "Radeon RX 7900 XT",
    "Card Model": "0x744c",
    "Card Vendor": "Advanced Micro Devices, Inc. [AMD/ATI]",
    "GUID": "26967",
    "GFX Version": "gfx1100",
}
RX_7900_XTX = {
    "Temperature (Sensor edge) (C)": "49.0",
    "Average Graphics Package Power (W)": "19.0",
    "GPU use (%)": "0",
    "VRAM Total Memory (B)": "25753026560",
    "VRAM Total Used Memory (B)": "794341376",
}
MI250X = {
    "GPU ID": "0x740c",
    "Unique ID": "0x719d230578348e8c",
    "Average Graphics Package Power (W)": "89.0",
    "GPU use (%)": "10",
    "GPU memory use (%)": "0",
}


def recorded(*cards: dict[str, str]) -> str:
    found = {f"card{number}": card for number, card in enumerate(cards)}
    return json.dumps({**found, "system": {"Driver version": "6.14.14"}})


def test_rocm_smi_gives_the_same_figures_as_nvidia_smi(commands: FakeCommands) -> None:
    printed = recorded(RX_7900_XT, RX_7900_XTX, MI250X)
    commands.say(
        "rocm-smi", f"\nWARNING: AMD GPU device(s) is/are in a low-power state.\n{printed}"
    )
    first, second, third = readings(("0", "1", "2"), AMD)
    assert first == GpuReading(
        "Radeon RX 7900 XT", 21458059264, 27856896, 21458059264 - 27856896, 0.0
    )
    assert (second.name, second.total, second.used) == ("AMD GPU", 25753026560, 794341376)
    assert third == GpuReading("AMD GPU", utilization=10.0)
    assert readings(("GPU-719d230578348e8c",), AMD) == (third,)
    assert free_memory(("0", "1"), AMD) == (first.free, second.free)
    assert free_memory(("0", "2"), AMD) == ()
    assert readings(("7", "GPU-0"), AMD) == (GpuReading(), GpuReading())
    (call, *_) = commands.calls("rocm-smi")
    assert "--json" in call.argv


# Recorded on MI300X with ROCm 7.2.1, as the project Hyperloom's tests have it, shortened; amd-smi
# counts in units of 2^20 bytes and writes MB.
METRIC = {
    "gpu_data": [
        {
            "gpu": 0,
            "usage": {"gfx_activity": {"value": 94, "unit": "%"}, "mm_activity": "N/A"},
            "mem_usage": {
                "total_vram": {"value": 196592, "unit": "MB"},
                "used_vram": {"value": 17153, "unit": "MB"},
            },
        },
        {"gpu": 1, "usage": {"gfx_activity": "N/A"}, "mem_usage": {"total_vram": "N/A"}},
    ]
}
ASIC = [{"gpu": 0, "asic": {"market_name": "AMD Instinct MI300X"}}, {"gpu": 1, "asic": "N/A"}]


def test_amd_smi_is_read_where_rocm_smi_is_missing(commands: FakeCommands) -> None:
    outputs = f"[[ $1 == static ]] && echo '{json.dumps(ASIC)}' || echo '{json.dumps(METRIC)}'"
    commands.add("amd-smi", outputs)
    first, second = readings(("0", "1"), AMD)
    total, used = 196592 * MIB, 17153 * MIB
    assert first == GpuReading("AMD Instinct MI300X", total, used, total - used, 94.0)
    assert second == GpuReading("AMD GPU")
    assert commands.calls("amd-smi")[1].argv == ["metric", "--usage", "--mem-usage", "--json"]
    commands.say("rocm-smi", recorded(RX_7900_XT))
    assert gpu_names({**AMD, "ROCR_VISIBLE_DEVICES": "0"}) == ("Radeon RX 7900 XT",)


@pytest.mark.parametrize("printed", ["", "no JSON", "{", "[1]", '{"card0": 1}', "{}"])
def test_other_output_of_rocm_smi_is_no_reading(commands: FakeCommands, printed: str) -> None:
    commands.say("rocm-smi", printed)
    assert readings(("0",), AMD) == (GpuReading(),)


def test_the_vendor_is_that_of_the_device_files(tmp_path: Path) -> None:
    assert gpu_vendor({}, tmp_path) == "nvidia"
    (tmp_path / "kfd").touch()
    assert gpu_vendor({}, tmp_path) == "amd"
    assert gpu_vendor({"AIFLUX_GPU_VENDOR": "auto"}, tmp_path) == "amd"
    assert gpu_vendor({"AIFLUX_GPU_VENDOR": "nvidia"}, tmp_path) == "nvidia"
    (tmp_path / "nvidiactl").touch()  # an AMD processor with graphics, and an NVIDIA GPU
    assert gpu_vendor({}, tmp_path) == "nvidia"
    assert gpu_vendor(AMD, tmp_path) == "amd"


@pytest.mark.parametrize(
    ("variables", "devices", "engine"),
    [
        # Slurm with and without a vendor in its configuration; ROCr's list is the one that counts.
        ({"ROCR": "0,1"}, ("0", "1"), {"ROCR": "0"}),
        ({"ROCR": "2,3", "CUDA": "2,3"}, ("2", "3"), {"ROCR": "2"}),
        # HIP numbers what ROCr left.
        ({"ROCR": "4,5,6", "HIP": "2,0"}, ("6", "4"), {"ROCR": "6"}),
        ({"ROCR": "2,3", "HIP": "2,3"}, ("2", "3"), {"ROCR": "2"}),
        ({"ROCR": "GPU-719d230578348e8c", "HIP": "0"}, ("GPU-719d230578348e8c",),
         {"ROCR": "GPU-719d230578348e8c"}),
        # Without ROCr's, the numbers are those of HIP, which can differ.
        ({"HIP": "1"}, ("1",), {"HIP": "1"}),
        ({"CUDA": "1,2"}, ("1", "2"), {"HIP": "1"}),
        ({"ROCR": ""}, (), {}),
        ({"ROCR": "0", "HIP": "-1"}, (), {}),
    ],
)  # fmt: skip
def test_an_engine_gets_one_variable_of_amd_s(
    tmp_path: Path, variables: dict[str, str], devices: tuple[str, ...], engine: dict[str, str]
) -> None:
    environ = AMD | {f"{name}_VISIBLE_DEVICES": value for name, value in variables.items()}
    assert visible_devices(environ) == devices
    settings = device_settings(environ, devices[:1])
    assert settings == {f"{name}_VISIBLE_DEVICES": value for name, value in engine.items()}
    inside = engine_environment({**environ, "GPU_DEVICE_ORDINAL": "9"}, tmp_path, settings)
    if devices:
        assert {name: v for name, v in inside.items() if "DEVICE" in name} == settings
        own = own_devices({**environ, "GPU_DEVICE_ORDINAL": "9", "PATH": "/bin"}, devices[:1])
        assert own == {**AMD, "PATH": "/bin", **settings}


def test_rocr_s_gpus_are_counted_by_the_kernel(tmp_path: Path) -> None:
    for node, gpu_id in enumerate(("0", "0", "51964", "2654")):  # two processors, two GPUs
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "gpu_id").write_text(f"{gpu_id}\n")
    assert kfd_devices(tmp_path) == ("0", "1")
    (tmp_path / "3" / "gpu_id").unlink()
    (tmp_path / "3" / "gpu_id").mkdir()  # cannot be read, as that of a GPU of another job
    assert kfd_devices(tmp_path) == ("0",)
    assert kfd_devices(tmp_path / "absent") == ()

"""The seal in a run's status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiflux.core.config.config import Config
from aiflux.errors import ConfigError, EngineError, ExitCode
from aiflux.worker.node import refuse_wrong_image, unsealed_reason
from tests.tools.faulty_engine import FaultyEngine
from tests.unit.working import Working


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"sealed": False, "unsealed": "the engine is elsewhere"}),
        ({"AIFLUX_SEALED": "0", "AIFLUX_UNSEALED": "--no-seal"},
         {"sealed": False, "unsealed": "--no-seal"}),
        ({"AIFLUX_SEALED": "0", "AIFLUX_UNSEALED": "no \udcff netns"},
         {"sealed": False, "unsealed": "no ? netns"}),
    ],
)  # fmt: skip
def test_the_status_says_why_a_run_is_not_sealed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    expected: dict[str, Any],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with FaultyEngine() as engine:
        working = Working(tmp_path, engine.url).prompts("fine")
        assert working.run() is ExitCode.OK
    facts = working.status["aiflux"]
    assert {name: facts[name] for name in ("sealed", "unsealed") if name in facts} == expected


FOURTH = "Iface\tDestination\tGateway\tFlags\n"
SIXTH = f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 00000001 00000000 00200200       lo\n"


@pytest.mark.parametrize(
    ("fourth", "sixth", "out"),
    [
        (None, None, None),
        ("", SIXTH, None),
        (FOURTH, SIXTH, None),
        (FOURTH + "lo\t0000007F\t00000000\t0001\n", SIXTH, None),
        (FOURTH + "eth0\t00000000\t010011AC\t0003\n", SIXTH, "eth0"),
        (FOURTH, SIXTH + SIXTH.replace("  lo", "  ib0"), "ib0"),
    ],
)
def test_an_ineffective_seal_is_reported(
    tmp_path: Path, fourth: str | None, sixth: str | None, out: str | None
) -> None:
    tables = (tmp_path / "route", tmp_path / "ipv6_route")
    for table, text in zip(tables, (fourth, sixth), strict=True):
        if text is not None:
            table.write_text(text)
    why = unsealed_reason({"AIFLUX_SEALED": "1"}, engine_here=True, tables=tables)
    assert why == (f"the container still has a network ({out})" if out else "")


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("No", False), ("0", False)])
def test_the_seal_is_a_setting(tmp_path: Path, text: str, value: bool) -> None:
    config = Config(environ={"AIFLUX_SEAL": text}, directory=tmp_path)
    assert config.get_slurm_config().checked().seal is value
    (tmp_path / "aiflux.yaml").write_text(f"slurm: {{seal: {text}}}\n")
    assert Config(environ={}, directory=tmp_path).get("seal") is value
    with pytest.raises(ConfigError, match="AIFLUX_SEAL"):
        Config(environ={"AIFLUX_SEAL": "perhaps"}, directory=tmp_path)


@pytest.mark.parametrize(
    ("vendors", "vendor", "message"),
    [
        ("nvidia", "amd", "for GPUs of NVIDIA, but the job has GPUs of AMD"),
        ("amd", "nvidia", "for GPUs of AMD, but the job has GPUs of NVIDIA"),
        ("amd", "amd", None),
        ("amd nvidia", "nvidia", None),
        ("", "amd", None),  # an image of an earlier version, or a back end for any GPU
    ],
)
def test_an_image_for_other_gpus_is_refused_in_the_job(
    vendors: str, vendor: str, message: str | None
) -> None:
    environ = {"AIFLUX_IMAGE_GPU_VENDORS": vendors, "AIFLUX_GPU_VENDOR": vendor}
    if message is None:
        refuse_wrong_image(environ, ("0",))
        return
    with pytest.raises(EngineError, match=message) as caught:
        refuse_wrong_image(environ, ("0",))
    assert f"GPU={vendor}" in str(caught.value.remedy)
    with pytest.raises(EngineError, match="on the CPU only, but the job has the GPUs 0, 1"):
        refuse_wrong_image({**environ, "AIFLUX_IMAGE_CPU_ONLY": "1"}, ("0", "1"))

"""The seal in a run's status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aiflux.core.config.config import Config
from aiflux.errors import ConfigError, ExitCode
from aiflux.worker.node import unsealed_reason
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

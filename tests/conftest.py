"""What every test shares: a clean environment and a directory with an awkward name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no defect: examples are judged by what they show, not by how long they take.
settings.register_profile("aiflux", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aiflux")

_KEPT = {"PATH", "HOME", "LANG", "USER", "LOGNAME", "SHELL", "CI", "AIFLUX_REQUIRE_STACK",
         "AIFLUX_STACK_DIR"}  # fmt: skip
_KEPT_PREFIXES = ("PIP_", "SSL_", "REQUESTS_", "CURL_")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No variable of the caller's that could change a result gets into a test."""
    for name in set(os.environ) - _KEPT:
        if not name.startswith(_KEPT_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg-state"))
    return


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """A directory whose name breaks whatever does not quote."""
    path = tmp_path / "a b,c:d 'e' \"f\" $(g) `h` #i %j ü\\k"
    path.mkdir()
    return path

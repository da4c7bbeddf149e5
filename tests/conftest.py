"""Shared fixtures: a clean environment, an ordinary user, a directory with an awkward name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# On a busy machine examples may be slow, so hypothesis must not check their duration.
settings.register_profile("aiflux", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aiflux")

# A start in the background (`make test &`, nohup) ignores signals, and every program that the tests
# start inherits this. Some tests need Ctrl-C and a closed terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(_number, signal.SIG_DFL)

_KEPT = {"PATH", "HOME", "LANG", "USER", "LOGNAME", "SHELL", "CI", "AIFLUX_REQUIRE_STACK",
         "AIFLUX_STACK_DIR", "AIFLUX_STACK_WITHOUT_VLLM"}  # fmt: skip
_KEPT_PREFIXES = ("PIP_", "SSL_", "REQUESTS_", "CURL_")

OUTSIDE = "outside this machine: "
LEFT_OUT = "left out: "
"""Prefixes of skip reasons that are accepted even with AIFLUX_REQUIRE_STACK=1."""
_REQUIRED = os.environ.get("AIFLUX_REQUIRE_STACK") == "1"
_CAP_DAC_OVERRIDE = 1 << 1  # capabilities(7): root can write regardless of permissions
_AS_OTHERS = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """If the stack is required, fail tests that are skipped for a reason in the machine."""
    report = yield
    if _REQUIRED and report.skipped and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        if OUTSIDE not in reason and LEFT_OUT not in reason:
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: skipped although the stack is required: {reason}"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that depends on permissions in a child that cannot bypass them."""
    if pyfuncitem.get_closest_marker("ordinary_user") is None or not _ignores_permissions():
        return None
    # A separate base: pytest removes old ones, but cannot access files locked by other tests.
    with tempfile.TemporaryDirectory() as folder:
        base = f"--basetemp={folder}/base"
        pytest_words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", base, pyfuncitem.nodeid]
        done = subprocess.run(
            [*_AS_OTHERS, sys.executable, *pytest_words], cwd=pyfuncitem.config.rootpath,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    if done.returncode or " passed" not in done.stdout:
        pytest.fail(done.stdout, pytrace=False)
    return True


def _ignores_permissions() -> bool:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) & _CAP_DAC_OVERRIDE)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Remove variables of the caller that could change a test's result."""
    for name in set(os.environ) - _KEPT:
        if not name.startswith(_KEPT_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg-state"))
    return


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """A directory whose name breaks code without quoting."""
    path = tmp_path / "a b,c:d 'e' \"f\" $(g) `h` #i %j ü\\k"
    path.mkdir()
    return path

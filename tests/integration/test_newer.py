"""Debian's next release with its newer Slurm and Python: the tests of jobs pass there too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import User, second_stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]  # it installs a Debian
STACK = Path("/var/tmp/aiflux-newer")  # noqa: S108 - users must be able to read it
SCRIPT = "tests/stack/newer.sh"
FILES = ("site", "command", "dependency", "scale", "jobs")


@pytest.fixture(scope="module")
def inside() -> Iterator[Callable[..., str]]:
    """Return a function that runs a command on the other system."""
    parts = "user apptainer slurm registry ollama llamacpp"
    with second_stack(STACK, SCRIPT, {"AIFLUX_STACK_PARTS": parts}) as run:
        yield lambda *words: run(SCRIPT, "run", *words)


def test_slurm_and_python_are_newer(user: User, inside: Callable[..., str]) -> None:
    def version(printed: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", printed)]

    for asked in (["sinfo", "-V"], ["/usr/bin/python3", "--version"]):
        assert version(inside(*asked)) > version(user.run(*asked))


def test_jobs_pass_there(inside: Callable[..., str]) -> None:
    """A skipped test fails. Doctor, refusals, arrays, estimates, requeues, cancels, chains ..."""
    files = [f"tests/integration/test_{name}.py" for name in FILES]
    required = ["env", "AIFLUX_REQUIRE_STACK=1"]
    printed = inside(*required, ".venv/bin/pytest", "-q", "-m", "not slow", *files)
    assert re.search(r"^\d\d+ passed", printed.splitlines()[-1]), printed[-6000:]


def test_accounts_are_used_there(inside: Callable[..., str]) -> None:
    test = "tests/integration/test_accounting.py"
    printed = inside("env", "AIFLUX_REQUIRE_STACK=1", ".venv/bin/pytest", "-q", test)
    assert re.search(r"^\d+ passed", printed.splitlines()[-1]), printed[-6000:]

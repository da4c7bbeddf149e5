"""A gateway whose batches go to an engine on this machine, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.tools.faulty_engine import FaultyEngine
from tests.unit.gateway.running_gateway import RunningGateway


@pytest.fixture(scope="module")
def engine() -> Iterator[FaultyEngine]:
    with FaultyEngine(models=("m:1",)) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(
    engine: FaultyEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    environ = {
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_STATE_HOME": str(folder / "xdg-state"),
    }
    with RunningGateway(folder, ["--engine-url", engine.url], environ) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[OpenAI]:
    with gateway.client() as opened:
        yield opened


@pytest.fixture
def start(tmp_path: Path) -> Iterator[list[RunningGateway]]:
    """Gateways that a test starts itself; they are ended after it."""
    started: list[RunningGateway] = []
    yield started
    for running in started:
        running.stop()

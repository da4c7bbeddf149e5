"""The real engines keep the promises of the seam: the cases of ``EngineContract``."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiflux.core.config.engine_kinds import KINDS
from aiflux.engines.base import Engine
from aiflux.engines.kinds import kind_named
from aiflux.engines.llamacpp.model_file import find_files
from aiflux.engines.ollama.store import model_digest
from aiflux.engines.process import ServerProcess, engine_environment, free_port, loopback_url
from aiflux.engines.vllm.hub import snapshot_digest
from aiflux.errors import EngineError
from aiflux.models.name import parse_model_name
from tests.integration.conftest import MODEL
from tests.tools.engine_contract import (
    EngineContract,
    EngineSite,
    ProgramSite,
    command_of,
    sessions,
    until,
)
from tests.tools.make_tiny_snapshot import put_tiny


class RealProgram(ProgramSite):
    """A program with the small model that Ollama stored."""

    model = MODEL
    slots = 2

    def __init__(self, folder: Path, models: Path, program: Path) -> None:
        super().__init__(folder)
        self._models = models
        self.digest = model_digest(models, parse_model_name(MODEL))
        self.wrap([str(program)])

    @property
    def models_dir(self) -> Path:
        return self._models


class RealOllama(RealProgram):
    """The CPU Ollama."""

    kind = kind_named("ollama")
    rejects_others = True


class TestOllama(EngineContract):
    @pytest.fixture
    def site(self, tmp_path: Path, models: Path, ollama: Path) -> Iterator[EngineSite]:
        made = RealOllama(tmp_path, models, ollama)
        yield made
        made.close()


class OfLlamaServer(EngineContract):
    """The cases of a llama-server, however it is started."""

    made: type[RealProgram]

    @pytest.fixture
    def site(self, tmp_path: Path, models: Path, llama_server: Path) -> Iterator[EngineSite]:
        made = self.made(tmp_path, models, llama_server)
        yield made
        made.close()


class RealLlamaServer(RealProgram):
    """llama-server."""

    kind = kind_named("llamacpp")


class TestLlamaServer(OfLlamaServer):
    made = RealLlamaServer


class LlamaServerByCommand(RealProgram):
    """The same llama-server, started by ``--engine-command`` on a socket."""

    kind = kind_named("command")

    def __init__(self, folder: Path, models: Path, program: Path) -> None:
        super().__init__(folder, models, program)
        self.model, self.digest = str(find_files(models, MODEL).model), None
        self.absent = str(folder / "absent.gguf")
        options = "-m {model} --alias {model} --host {socket} -np {slots} --no-webui --offline"
        self.options["engine_command"] = f"{shlex.quote(str(self.program))} {options}"


class TestCommand(OfLlamaServer):
    made = LlamaServerByCommand


class RunningLlamaServer(RealProgram):
    """The same llama-server at ``--engine-url``: somebody else starts it, late if it is held."""

    kind = kind_named("external")
    absent = "nobody/1b"

    def __init__(self, folder: Path, models: Path, program: Path) -> None:
        super().__init__(folder, models, program)
        self.digest = None
        self.port = free_port()
        self.options["engine_url"] = loopback_url(self.port)
        self.server = self._start()

    def _start(self) -> ServerProcess:
        command = [
            str(self.program), "-m", str(find_files(self._models, MODEL).model), "--alias", MODEL,
            "--host", "127.0.0.1", "--port", str(self.port), "-np", "2", "--no-webui", "--offline",
        ]  # fmt: skip
        environment = engine_environment(os.environ, self.folder, {})
        server = ServerProcess(command, environment, self.folder / "log", loopback_url(0))
        server.start()
        return server

    def recover(self) -> None:
        """Start it again, as somebody else would."""
        self.server.stop()
        self.server = self._start()

    def servers(self) -> set[int]:
        """Return none: its engines start no server."""
        return set()

    def crash(self, index: int = 0) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGKILL)

    def hold(self) -> None:
        super().hold()
        self.recover()

    def close(self) -> None:
        super().close()
        self.server.stop()


class TestExternal(OfLlamaServer):
    made = RunningLlamaServer


class RealVllm(ProgramSite):
    """vLLM with the smallest model that it loads. A start takes half a minute, so cases share it.

    The cache contains what vLLM finds out about an architecture, in a process of its own.
    """

    kind = kind_named("vllm")
    slots = 2
    rejects_others = True
    patience = 300.0

    def __init__(self, folder: Path, program: Path) -> None:
        super().__init__(folder)
        model = put_tiny(folder / "tiny")
        self.model, self.digest = str(model), snapshot_digest(model)
        self.absent = str(folder / "absent")
        self.options["engine_env"] = {
            "VLLM_CACHE_ROOT": str(folder / "cache"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.options["context_length"] = 256
        self.wrap([str(program)])

    def running(self) -> Engine:
        return next(filter(lambda engine: engine.is_ready(), self.made), None) or super().running()


def spawned(server: int) -> list[int]:
    """Return the processes that Python's multiprocessing started in a server's session."""
    return [pid for pid in sessions().get(server, []) if b"spawn_main" in command_of(pid)]


@pytest.fixture(scope="module")
def shared_vllm(tmp_path_factory: pytest.TempPathFactory, vllm: Path) -> Iterator[RealVllm]:
    made = RealVllm(tmp_path_factory.mktemp("vllm"), vllm)
    yield made
    made.close()


class TestVllm(EngineContract):
    @pytest.fixture
    def site(self, shared_vllm: RealVllm) -> RealVllm:
        return shared_vllm

    def test_a_stop_in_mid_start_leaves_no_server_behind(self, site: EngineSite) -> None:
        """While its processes are starting."""
        others = site.servers()
        engine = site.make()
        start = site.start(engine)
        until(lambda: site.servers() > others)
        (server,) = site.servers() - others
        until(
            lambda: any(b"spawn_main" in command_of(pid) for pid in sessions().get(server, [])), 300
        )
        engine.stop()
        assert isinstance(start.ended(site.patience), EngineError)
        assert not engine.is_ready()
        until(lambda: site.servers() == others)


SITES: tuple[type[EngineSite], ...] = (
    RealOllama, RealLlamaServer, LlamaServerByCommand, RunningLlamaServer, RealVllm,
)  # fmt: skip


def test_every_kind_of_the_table_is_tested() -> None:
    assert {site.kind.name for site in SITES} == KINDS.keys()

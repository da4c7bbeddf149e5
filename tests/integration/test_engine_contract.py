"""The real engines keep the promises of the seam: the cases of ``EngineContract``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiflux.engines.kinds import kind_named
from aiflux.engines.llamacpp.model_file import find_files
from aiflux.engines.ollama.store import model_digest
from aiflux.models.name import parse_model_name
from tests.integration.conftest import MODEL
from tests.tools.engine_contract import EngineContract, EngineSite, ProgramSite


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


class TestOllama(EngineContract):
    @pytest.fixture
    def site(self, tmp_path: Path, models: Path, ollama: Path) -> Iterator[EngineSite]:
        made = RealOllama(tmp_path, models, ollama)
        yield made
        made.close()


class RealLlamaServer(RealProgram):
    """llama-server."""

    kind = kind_named("llamacpp")


class TestLlamaServer(EngineContract):
    @pytest.fixture
    def site(self, tmp_path: Path, models: Path, llama_server: Path) -> Iterator[EngineSite]:
        made = RealLlamaServer(tmp_path, models, llama_server)
        yield made
        made.close()


class LlamaServerByCommand(RealProgram):
    """The same llama-server, started by ``--engine-command`` on a socket."""

    kind = kind_named("command")

    def __init__(self, folder: Path, models: Path, program: Path) -> None:
        super().__init__(folder, models, program)
        self.model, self.digest = str(find_files(models, MODEL).model), None
        self.absent = str(folder / "absent.gguf")
        options = "-m {model} --alias {model} --host {socket} -np {slots} --no-webui --offline"
        self.options["engine_command"] = f"{shlex.quote(str(self.program))} {options}"


class TestCommand(EngineContract):
    @pytest.fixture
    def site(self, tmp_path: Path, models: Path, llama_server: Path) -> Iterator[EngineSite]:
        made = LlamaServerByCommand(tmp_path, models, llama_server)
        yield made
        made.close()

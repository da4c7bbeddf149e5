"""Every kind of the table fulfils the interface: the cases of ``EngineContract``."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from aiflux.core.config.engine_kinds import KINDS
from aiflux.engines.kinds import kind_named
from aiflux.engines.vllm.hub import snapshot_digest
from aiflux.errors import RejectedError
from tests.tools import make_tiny_gguf
from tests.tools.engine_contract import EngineContract, EngineSite, ProgramSite
from tests.tools.faulty_engine import FaultyEngine, Reply
from tests.unit.made_models import put_model
from tests.unit.made_snapshots import COMMIT, put_folder, put_snapshot

TOOLS = Path(__file__).parents[2] / "tools"


class FakeOllama(ProgramSite):
    """The small stand-in for Ollama; paused before it listens."""

    kind = kind_named("ollama")
    model = "tiny:latest"
    slots = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        name = put_model(self.models_dir, self.model, b"weights")
        manifest = (self.models_dir / name.manifest_path).read_bytes()
        self.digest = hashlib.sha256(manifest).hexdigest()
        self.wrap([sys.executable, str(TOOLS / "fake_ollama.py")])


class Loading(ProgramSite):
    """Paused while it loads its model."""

    def hold(self) -> None:
        (self.folder / "home-0").mkdir(exist_ok=True)
        (self.folder / "home-0" / "loading").touch()

    def release(self) -> None:
        (self.folder / "home-0" / "loading").unlink(missing_ok=True)


class LoadingOllama(Loading, FakeOllama):
    """The stand-in for Ollama, paused later."""


class FakeLlamaServer(Loading):
    """The small stand-in for llama-server, with a model that Ollama pulled."""

    kind = kind_named("llamacpp")
    model = "tiny:latest"
    slots = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        name = put_model(self.models_dir, self.model, make_tiny_gguf.tiny())
        manifest = (self.models_dir / name.manifest_path).read_bytes()
        self.digest = hashlib.sha256(manifest).hexdigest()
        self.wrap([sys.executable, str(TOOLS / "fake_llama_server.py")])


class LlamaServerOfFile(FakeLlamaServer):
    """The same, with the path of a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / "a model.gguf"
        path.write_bytes(make_tiny_gguf.tiny())
        self.model, self.digest = str(path), None


class FakeVllm(Loading):
    """The small stand-in for vLLM, with a snapshot of the hub; paused while it loads."""

    kind = kind_named("vllm")
    model = "hf:org/tiny@main"
    digest = COMMIT
    absent = "hf:nobody/1b"
    rejects_others = True
    slots = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        put_snapshot(self.models_dir / "hub", "org/tiny")
        self.wrap([sys.executable, str(TOOLS / "fake_vllm.py")])


class FakeVllmOfFolder(FakeVllm):
    """The same, with the directory of a model; paused before it starts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        model = put_folder(folder / "a model, of mine")
        self.model, self.digest = str(model), snapshot_digest(model)

    def hold(self) -> None:
        ProgramSite.hold(self)

    def release(self) -> None:
        ProgramSite.release(self)


class External(EngineSite):
    """A server that AI-Flux did not start, which may not be ready yet."""

    kind = kind_named("external")
    model = "m:1"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.loading = False
        self.server = FaultyEngine(models=(self.model,), instead=self._instead)
        self.server.start()
        self.options["engine_url"] = self.server.url

    def _instead(self, method: str, path: str, headers: Mapping[str, str]) -> Reply | None:
        return (503, b'{"error": {"message": "Loading model"}}', {}) if self.loading else None

    @property
    def models_dir(self) -> Path:
        return self.folder

    def hold(self) -> None:
        self.loading = True

    def release(self) -> None:
        self.loading = False

    def crash(self, index: int = 0) -> None:
        self.server.stop()

    def recover(self) -> None:
        self.server.start()

    def close(self) -> None:
        super().close()
        self.server.stop()


class CommandOnPort(ProgramSite):
    """A server of ``--engine-command`` on a port, with an unknown number of slots."""

    kind = kind_named("command")
    model = "a model: 'of mine' {1}"
    words = "--port {port} --host {host}"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        engine, loading = str(TOOLS / "command_server.py"), str(folder / "loading")
        self.wrap([sys.executable, engine, "--model", self.model, "--loading", loading])
        self.options["engine_command"] = f"{shlex.quote(str(self.program))} {self.words}"


class CommandOnSocket(CommandOnPort):
    """One on a Unix socket, with a number of slots, paused while it loads its model."""

    words = "--socket {socket} --slots={slots}"
    slots = 3

    def hold(self) -> None:
        (self.folder / "loading").touch()

    def release(self) -> None:
        (self.folder / "loading").unlink(missing_ok=True)


SITES: tuple[type[EngineSite], ...] = (
    FakeOllama,
    LoadingOllama,
    FakeLlamaServer,
    LlamaServerOfFile,
    FakeVllm,
    FakeVllmOfFolder,
    CommandOnPort,
    CommandOnSocket,
    External,
)


class TestContract(EngineContract):
    """The cases on stand-ins; those on the real engines are in ``tests/integration``."""

    @pytest.fixture(params=SITES, ids=lambda site: site.__name__)
    def site(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineSite]:
        made: EngineSite = request.param(tmp_path)
        yield made
        made.close()


def test_every_kind_of_the_table_is_tested() -> None:
    assert {site.kind.name for site in SITES} == KINDS.keys()


@pytest.mark.parametrize("version", ["0.13.2", "0.13.3"])
def test_an_ollama_without_responses_is_refused_at_the_start(tmp_path: Path, version: str) -> None:
    """Otherwise it would answer every request with 404."""
    site = FakeOllama(tmp_path)
    site.url, site.options = "/v1/responses", {"engine_env": {"FAKE_OLLAMA_VERSION": version}}
    engine = site.make()
    try:
        if version == "0.13.3":
            engine.start()
            return
        with pytest.raises(RejectedError, match=r"Ollama 0\.13\.2 has no /v1/resp") as error:
            engine.start()
        assert "--engine llamacpp" in str(error.value.remedy)
    finally:
        site.close()

"""The engine `vllm`: ``vllm serve`` as a child of the worker, with one model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from aiflux.core.batch.request import EMBEDDINGS, WITHOUT_TEXT
from aiflux.core.runs.status_file import EngineFacts
from aiflux.engines.base import EngineKind, EngineSpec, HttpFactory, Listener
from aiflux.engines.gpus import device_settings
from aiflux.engines.managed import ManagedEngine
from aiflux.engines.process import engine_environment, free_port
from aiflux.engines.ranks import Address
from aiflux.engines.server_load import get, reported
from aiflux.engines.sizing import smaller_division
from aiflux.engines.vllm.adapter import adapter_words
from aiflux.engines.vllm.hub import (
    find_snapshot,
    parse_hub_model,
    refuse_missing_tokenizer,
    snapshot_digest,
    stored_snapshot,
)
from aiflux.engines.vllm.memory import divides
from aiflux.engines.vllm.options import option_words, parser_words
from aiflux.errors import ConfigError

_MIDDLEWARE = str(Path(__file__).parent / "middleware")


class VllmEngine(ManagedEngine):
    """A vLLM that the worker starts.

    Raises:
        EngineError: there is no ``vllm``.
        ModelError: the model is not stored completely.
        ConfigError: the model cannot be divided among the engine's GPUs.
    """

    # Loopback is the only interface of a sealed container.
    _address = Address("127.0.0.1", "lo")

    def __init__(self, kind: EngineKind, spec: EngineSpec, make_client: HttpFactory) -> None:
        super().__init__(kind, spec, make_client)
        if spec.listener is not None:
            self._folder = _MIDDLEWARE  # the launcher of the CPU build replaces PYTHONPATH
        model = parse_hub_model(spec.model)
        # A branch may have moved since, and the snapshot is still stored.
        planned = replace(model, revision=spec.plan.digest(spec.model) or None)
        known = model.folder is None and find_snapshot(self._models_dir, planned) is not None
        self._snapshot = stored_snapshot(self._models_dir, planned if known else model)
        if not any("tokenizer" in name for name in self._options.engine_arg):
            refuse_missing_tokenizer(self._snapshot)
        self._refuse_division()
        self._refuse_changed_adapters()

    def start(self) -> None:
        """Start the server and wait until its model is loaded.

        Raises:
            EngineError: it did not start, or the model did not load within ``load_timeout``.
        """
        port = free_port(self._host)
        server = self._serve(self._command(port), self._environment(), self._url(port))
        client = self._await_ready(server, "/health", self._options.load_timeout)
        self._digest = snapshot_digest(self._snapshot)
        weights = self._figures.weights if self._figures else 0
        self.facts = EngineFacts(
            self.index,
            self.spec.devices,
            version=reported(partial(get, client), "/version").get("version"),
            slots=self.slots,
            context_length=self._context,
            size_bytes=weights,
            gpu_bytes=weights if self.spec.devices else 0,
            log=str(self.spec.log),
        )
        self._use(client)

    def _refuse_division(self) -> None:
        parts = self._parts
        if self._figures is None or parts < 2 or divides(self._figures.architecture, parts):
            return
        shape = self._figures.architecture
        raise ConfigError(
            f"{self._served} has {shape.heads} attention heads and {shape.kv_heads} key-value "
            f"heads: {parts} {'GPUs' if self.spec.devices else 'nodes'} cannot divide them evenly",
            smaller_division(partial(divides, shape), self._options, len(self.spec.devices)),
        )

    @property
    def _parts(self) -> int:
        """Number of parts into which the model is divided; 0 for none."""
        return len(self.spec.devices)

    def _command(self, port: int) -> list[str]:
        words = [
            self._program, "serve", str(self._snapshot),
            f"--served-model-name={self._served}",  # a name may begin with a dash
            "--host", self._host, "--port", str(port),
            "--max-model-len", str(self._context),
            "--max-num-seqs", str(self.slots),
            # Else the model's own generation_config.json would change the requests' parameters.
            "--generation-config", "vllm",
            "--disable-uvicorn-access-log",
        ]  # fmt: skip
        listener = self.spec.listener
        if listener is not None:
            words += ["--ssl-certfile", str(listener.certificate)]
            words += ["--ssl-keyfile", str(listener.certificate_key)]
            words += ["--middleware", "require_key.RequireKey"]
        if self._parts > 1:
            words += ["--tensor-parallel-size", str(self._parts)]
        if not self.spec.devices:
            words.append("--enforce-eager")  # on a CPU, compiling takes longer than it saves
        endpoints = {*self.spec.plan.input.endpoints}
        if endpoints <= WITHOUT_TEXT:
            words += ["--runner", "pooling"]
        if endpoints == {EMBEDDINGS}:
            words += ["--convert", "embed"]
        if not endpoints <= WITHOUT_TEXT:
            words += parser_words(self._options)
        adapters = self.spec.plan.adapters
        words += adapter_words(adapters, self._served, on_gpus=bool(self.spec.devices))
        # Of an option that is given twice, the last value counts.
        return words + option_words(self._options.engine_arg)

    def _environment(self) -> dict[str, str]:
        """Return its environment. HOME is the engine's own, and vLLM's caches are below it."""
        self.spec.home.mkdir(parents=True, exist_ok=True)
        listener = self.spec.listener
        own = {
            **({} if listener is None else _guarded(listener)),
            **device_settings(self.spec.environ, self.spec.devices),
            # Its processes also talk over Unix sockets, whose names are UUIDs.
            "VLLM_RPC_BASE_PATH": str(self._socket_folder(36)),
            **self._settings(self._address),
        }
        return engine_environment(self.spec.environ, Path(self.spec.home), own)

    def _settings(self, address: Address) -> dict[str, str]:
        """Return the variables that do not depend on GPUs and folders of this node."""
        debug = {"VLLM_LOGGING_LEVEL": "DEBUG"} if self._options.log_level == "DEBUG" else {}
        # A part of vLLM that divides a model is compiled in spite of --enforce-eager, by a C++
        # compiler, which the image lacks.
        eager = {} if self.spec.devices else {"TORCHDYNAMO_DISABLE": "1"}
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_ENGINE_READY_TIMEOUT_S": str(int(self._options.load_timeout)),
            **debug,
            **eager,
            **_network(address),
            **self._options.engine_env,
        }


def _guarded(listener: Listener) -> dict[str, str]:
    """Return the variables of the middleware that requires the key on every path.

    vLLM's own key does not protect /invocations, /score, /tokenize and others
    (vllm/entrypoints/serve/middleware/authenticate.py of 0.32.0).
    """
    return {"PYTHONPATH": _MIDDLEWARE, "AIFLUX_KEY_FILE": str(listener.key)}


def _network(address: Address) -> dict[str, str]:
    """Return the variables of the network over which vLLM's processes talk.

    NCCL chooses the fastest interface itself, but not loopback.
    """
    return {
        "VLLM_HOST_IP": address.ip,
        **({"GLOO_SOCKET_IFNAME": address.interface} if address.interface else {}),
        **({"NCCL_SOCKET_IFNAME": "lo"} if address.interface == "lo" else {}),
    }

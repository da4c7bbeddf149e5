"""The engine `llamacpp`: one ``llama-server`` with one model.

Source: llama.cpp, ``tools/server/README.md``; checked with build 11669.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

from aiflux.core.batch.request import EMBEDDINGS, RERANK
from aiflux.engines.base import EngineKind, EngineSpec, HttpFactory
from aiflux.engines.gpus import device_settings
from aiflux.engines.http import Client, ExchangeError
from aiflux.engines.llamacpp.model_file import ModelFiles, find_files
from aiflux.engines.llamacpp.options import option_words
from aiflux.engines.managed import ManagedEngine
from aiflux.engines.process import engine_environment, free_port
from aiflux.engines.server_log import find_cause
from aiflux.engines.sizing import in_flight
from aiflux.errors import EngineError, RejectedError
from aiflux.util.text import error_text

_PROBE_TIMEOUT = 5.0
_LIST_TIMEOUT = 60.0
_ALL_LAYERS = "999"
# Threads for connections other than those of requests, as many as the server adds by default.
_MORE_THREADS = 4
# Verbosity of the log; the default of 3 writes ten lines for each request.
_WARNINGS, _DEBUG = "2", "5"
# What ``llama-server --list-devices`` prints of each GPU, such as "  CUDA0: NVIDIA H100 (...)".
_DEVICE = re.compile(r"^\s+\S+: ", re.MULTILINE)
# Why a model cannot be loaded.
_REASON = re.compile(r"(?:error loading model: |(?=failed to (?:allocate|initialize)))(.*)")


class LlamaCppEngine(ManagedEngine):
    """A ``llama-server`` that the worker starts.

    If its model does not fit the GPUs, the number of slots is halved, down to one, unless the run
    sets a number of slots.

    Raises:
        EngineError: there is no ``llama-server``.
        ModelError: the model is not stored, or llama.cpp cannot read it.
    """

    def __init__(self, kind: EngineKind, spec: EngineSpec, make_client: HttpFactory) -> None:
        super().__init__(kind, spec, make_client)
        self._log_start = 0

    def start(self) -> None:
        """Start the server and wait until its model is in memory.

        Raises:
            EngineError: the server did not start, the model did not load, or it landed on the CPU.
        """
        files = self._files()
        self.spec.home.mkdir(parents=True, exist_ok=True)
        self._refuse_cpu()
        self._refuse_changed_adapters()
        while True:
            try:
                client = self._load(files)
                break
            except RejectedError:
                raise
            except EngineError:
                if not self._shrink():
                    raise
        self._digest = files.digest
        self._note_facts(files, self._props(client))
        self._use(client)

    def _files(self) -> ModelFiles:
        model = self.spec.model
        if not self.kind.is_stored(self._models_dir, model):
            raise EngineError(
                f"{self._served} is not stored in {self._models_dir}",
                f"pull it: aiflux models pull {self._served}; or check the path",
            )
        self.kind.refuse_model(self._models_dir, model)
        return find_files(self._models_dir, model)

    def _load(self, files: ModelFiles) -> Client:
        """Start the server; return a client once it is ready."""
        log = self.spec.log
        self._log_start = log.stat().st_size if log.exists() else 0
        # The kernel chooses a port that only the worker uses.
        port = 0 if self.spec.listener is None else free_port(self._host)
        url = self._url(port) if port else None
        server = self._serve(self._command(files, port), self._environment(), url)
        try:
            # Until the model is in memory, every path answers 503.
            return self._await_ready(server, "/health", self._options.load_timeout)
        except RejectedError:
            raise
        except EngineError as error:
            reason = self._reason()
            if reason is None:
                raise
            cause = find_cause(self._log_text())
            remedy = (
                f"{cause.remedy}; its log is" if cause and cause.remedy else "see the engine's log:"
            )
            raise EngineError(
                f"{self._served} could not be loaded: {reason}", f"{remedy} {log}"
            ) from error

    def _command(self, files: ModelFiles, port: int) -> list[str]:
        # A connection keeps its thread: with fewer, some requests wait until another one closes.
        busy = max(in_flight(self.slots), self._options.concurrency or 0)
        # Every slot gets an equal share of the context.
        command = [
            self._program,
            *("-m", str(files.model), "--alias", self._served),
            *("--host", self._host, "--port", str(port)),
            *("-np", str(self.slots), "-c", str(self._context * self.slots)),
            *("--threads-http", str(busy + _MORE_THREADS)),
            *("--metrics", "--offline", "--no-webui"),
        ]
        listener = self.spec.listener
        if listener is not None:
            command += ["--api-key-file", str(listener.key)]
            command += ["--ssl-cert-file", str(listener.certificate)]
            command += ["--ssl-key-file", str(listener.certificate_key)]
        if files.projector is not None:
            command += ["--mmproj", str(files.projector)]
        threads = self.spec.threads
        command += [] if threads is None else ["-t", str(threads)]
        if self.spec.devices and not self._options.allow_cpu:
            command += ["-ngl", _ALL_LAYERS]
        command += ["-lv", _DEBUG if self._options.log_level == "DEBUG" else _WARNINGS]
        command += ["--jinja"]  # without it, older builds do not parse tool calls
        if self._options.reasoning_parser is not None:
            command += ["--reasoning-format", self._options.reasoning_parser]
        if self.spec.plan.adapters:
            command += ["--lora", ",".join(each.path for each in self.spec.plan.adapters)]
        # Of an option that is given twice, the last value counts.
        return command + self._pooling_options() + option_words(self._options.engine_arg)

    def _pooling_options(self) -> list[str]:
        """Return the options for embeddings and reranking: each input must fit one batch."""
        endpoints = self.spec.plan.input.endpoints
        batch = ["-b", str(self._context), "-ub", str(self._context)]
        if RERANK in endpoints:
            return ["--reranking", *batch]
        if EMBEDDINGS not in endpoints:
            return []
        # An embedding model has its own pooling.
        own = self._figures is not None and self._figures.architecture.embeds
        return ["--embeddings", *batch, *([] if own else ["--pooling", "mean"])]

    def _environment(self) -> dict[str, str]:
        """Return the environment of this engine; the run's own variables take precedence."""
        settings = device_settings(self.spec.environ, self.spec.devices)
        settings |= self._options.engine_env
        return engine_environment(self.spec.environ, self.spec.home, settings)

    def _props(self, client: Client) -> dict[str, Any]:
        try:
            props = json.loads(client.get("/props", _PROBE_TIMEOUT).body)
        except (ExchangeError, ValueError) as error:
            raise EngineError(
                f"llama-server does not report its slots (/props): {error_text(error)}",
                "use a llama-server of 2025 or later",
            ) from error
        return props if isinstance(props, dict) else {}

    def _note_facts(self, files: ModelFiles, props: dict[str, Any]) -> None:
        facts = self.facts
        size = files.model.stat().st_size
        settings = props.get("default_generation_settings") or {}
        facts.version = str(props.get("build_info") or "unknown")
        facts.slots = self.slots = int(props.get("total_slots") or self.slots)
        facts.context_length = int(settings.get("n_ctx") or self._context)
        on_gpu = bool(self.spec.devices) and not self._options.allow_cpu
        facts.size_bytes, facts.gpu_bytes = size, size if on_gpu else 0
        facts.log = str(self.spec.log)

    def _sees_gpus(self) -> bool:
        """Return whether the program has a back end for the job's GPUs, and finds them."""
        try:
            done = subprocess.run(
                [self._program, "--list-devices"],
                env=self._environment(),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LIST_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EngineError(
                f"cannot run {self._program} --list-devices: {error_text(error)}",
                "check the installation",
            ) from error
        return bool(_DEVICE.search(done.stdout.partition("Available devices:")[2]))

    def _refuse_cpu(self) -> None:
        """Refuse to run on the CPU in a job with GPUs.

        With GPUs, all layers have to go there (``-ngl``), or the model is not loaded at all.
        """
        if self.spec.devices and not self._options.allow_cpu and not self._sees_gpus():
            raise EngineError(
                f"llama-server sees no GPU in a job with the GPUs {', '.join(self.spec.devices)}",
                "use a llama-server with GPU support (aiflux image info); or --allow-cpu",
            )

    def _shrink(self) -> bool:
        """Halve the slots; return False if that is not allowed, or would not help."""
        fixed = self._options.slots is not None or not self.spec.devices
        if fixed or self.slots == 1 or self._closing.is_set() or "memory" not in self._log_text():
            return False
        self.slots //= 2
        return True

    def _reason(self) -> str | None:
        """Return why the model could not be loaded, in the server's words; None without any."""
        found = [match for match in map(_REASON.search, self._log_text().splitlines()) if match]
        return found[-1][1].strip() if found else None

    def _log_text(self) -> str:
        """Return the current server's log; "" if the disk was too full for a log."""
        try:
            with open(self.spec.log, "rb") as log:
                log.seek(self._log_start)
                return log.read().decode("utf-8", "replace")
        except OSError:
            return ""

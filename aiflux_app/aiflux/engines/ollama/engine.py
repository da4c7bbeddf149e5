"""The engine `ollama`: a server of the worker that loads one model before the first request."""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from aiflux.engines.base import EngineKind, EngineSpec, HttpFactory
from aiflux.engines.gpus import device_settings
from aiflux.engines.managed import ManagedEngine
from aiflux.engines.ollama.api import Loaded, Ollama, ollama_environment
from aiflux.engines.ollama.store import refuse_other_digest
from aiflux.engines.ollama.threads import store_with_threads
from aiflux.errors import EngineError, RejectedError
from aiflux.models.endpoints import newer_version
from aiflux.models.name import parse_model_name

# Ollama truncates a prompt to the context (0.9) or to about half of it (0.33).
_SLACK_TOKENS = 16
_TRUNCATION = re.compile(rb"truncating input prompt.*\bnew=(\d+)")


class TruncationLog:
    """Prompts truncated according to Ollama's log: ``truncating input prompt ... new=TOKENS``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._lengths: set[int] = set()
        self._lock = threading.Lock()

    def left(self, tokens: int) -> bool:
        """Return whether a prompt was truncated to this many tokens since the last call."""
        # There is no log if the disk was too full.
        with self._lock, suppress(FileNotFoundError), open(self._path, "rb") as log:
            log.seek(self._offset)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                match = _TRUNCATION.search(line)
                if match:
                    self._lengths.add(int(match[1]))
        return tokens in self._lengths


class OllamaEngine(ManagedEngine):
    """An Ollama that the worker starts.

    If its model does not fit the GPUs, the number of slots is halved, down to one, unless the run
    sets a number of slots.

    Raises:
        EngineError: there is no ``ollama``.
        ModelError: the plan names no models directory.
    """

    def __init__(self, kind: EngineKind, spec: EngineSpec, make_client: HttpFactory) -> None:
        super().__init__(kind, spec, make_client)
        self._truncations = TruncationLog(spec.log)
        self._viewed: str | None = None  # digest of the model that a view was made from

    def start(self) -> None:
        """Start the server, load the model and check its placement.

        Raises:
            EngineError: the server did not start, the model did not load, or it landed on the CPU.
            RejectedError: its version lacks an endpoint that the run needs.
        """
        while True:
            ollama = self._serve_ollama()
            self._refuse_older(ollama.version())
            loaded = self._load(ollama)
            if self._fits(loaded) or not self._shrink(loaded):
                break
        self._check_placement(loaded)
        self.facts = replace(
            self.facts,
            version=ollama.version(),
            slots=self.slots,
            context_length=loaded.context_length or self._context,
            size_bytes=loaded.size,
            gpu_bytes=loaded.size_vram,
            log=str(self.spec.log),
        )
        self._use(self._make_client(ollama.url))

    def was_truncated(self, prompt_tokens: int) -> bool:
        """Return whether a prompt was truncated, which Ollama only reports in its log."""
        if prompt_tokens < self._context // 2 - _SLACK_TOKENS:
            return False
        return self._truncations.left(prompt_tokens)

    def _serve_ollama(self) -> Ollama:
        environment = ollama_environment(
            self.spec.environ,
            self._models_view(),
            self.spec.home,
            self._settings(),
        )
        return Ollama(self._serve([self._program, "serve"], environment).url)

    def _models_view(self) -> Path:
        """Return the models directory for the server: a link, or a view with fewer threads."""
        threads = self.spec.threads
        if threads is None:
            return _models_link(self.spec.home, self._models_dir)
        view, name = self.spec.home / "store", parse_model_name(self.spec.model)
        self._viewed = store_with_threads(self._models_dir, name, threads, view)
        return view

    def _refuse_older(self, version: str) -> None:
        """Refuse a version without an endpoint of the run: it answers each request with 404.

        Raises:
            RejectedError: it is one.
        """
        for url in self.spec.plan.input.endpoints:
            first = newer_version(self.kind.name, url, version)
            if first is not None:
                raise RejectedError(
                    f"Ollama {version} has no {url}; Ollama {first} and later have it",
                    "use a newer Ollama or image, or --engine llamacpp, which runs the same models",
                )

    def _settings(self) -> dict[str, str]:
        """Return the variables of this engine; the run's own variables take precedence."""
        settings = {
            "OLLAMA_NUM_PARALLEL": str(self.slots),
            "OLLAMA_CONTEXT_LENGTH": str(self._context),
            "OLLAMA_MAX_QUEUE": str(max(512, 4 * self.slots)),
            "OLLAMA_LOAD_TIMEOUT": f"{int(self._options.load_timeout)}s",
        }
        settings |= device_settings(self.spec.environ, self.spec.devices)
        if self._options.log_level == "DEBUG":
            settings["OLLAMA_DEBUG"] = "1"
        return {**settings, **self._options.engine_env}

    def _load(self, ollama: Ollama) -> Loaded:
        model = self._served
        listed = _digest(ollama.tags(), model)
        if listed is None:
            raise EngineError(
                f"Ollama does not list {model} in {self._models_dir}",
                f"pull it: aiflux models pull {model}",
            )
        digest = self._viewed or listed
        insisted = parse_model_name(self.spec.model).digest
        name = replace(parse_model_name(model), digest=insisted)
        refuse_other_digest(name, digest, str(self._models_dir))
        self._digest = digest
        try:
            ollama.load(model, self._options.load_timeout)
            return next(iter(ollama.loaded()))
        except StopIteration:
            raise EngineError(f"{model} was loaded but is not in memory", str(self.spec.log)) \
                from None  # fmt: skip
        except EngineError as error:
            raise EngineError(
                f"{model} could not be loaded: {error.message}",
                f"see the engine's log: {self.spec.log}",
            ) from error

    def _fits(self, loaded: Loaded) -> bool:
        return not self.spec.devices or loaded.size_vram >= loaded.size

    def _shrink(self, loaded: Loaded) -> bool:
        """Halve the slots; return False if that is not allowed, or would not help."""
        if self._options.slots is not None or self.slots == 1 or not loaded.size_vram:
            return False
        self.slots //= 2
        return True

    def _check_placement(self, loaded: Loaded) -> None:
        if self._fits(loaded) or self._options.allow_cpu:
            return
        share = 100 - 100 * loaded.size_vram // max(loaded.size, 1)
        raise EngineError(
            f"{share} % of {self._served} landed on the CPU in a job with the GPUs "
            f"{', '.join(self.spec.devices)}",
            "request more or larger GPUs, fewer --slots or a smaller --context-length; check that "
            "the image has GPU support (aiflux image info); or use --allow-cpu",
        )


def _models_link(home: Path, models_dir: Path) -> Path:
    """Return a plain path to the models directory.

    Ollama finds models with a glob pattern made from this path, so a backslash or a bracket in it
    would hide all models (``Manifests`` in ollama's server/manifest.go).
    """
    home.mkdir(parents=True, exist_ok=True)
    link = home / "models"
    if not link.is_symlink():
        link.symlink_to(models_dir)
    return link


def _digest(tags: dict[str, str], model: str) -> str | None:
    """Return a model's digest; Ollama's names are not case-sensitive."""
    return next((digest for name, digest in tags.items() if name.lower() == model.lower()), None)

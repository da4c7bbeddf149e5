"""The engines of a shard: bundled Ollamas, one for each group of GPUs, or one that is up already.

Each engine has a keeper: a thread that starts it, opens its lane to requests, and brings it back
when it fails: at most three times without a result in between.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiflux.engines.external import ExternalEngine
from aiflux.engines.http import Client
from aiflux.engines.ollama.api import Loaded, Ollama
from aiflux.engines.ollama.store import refuse_other_digest
from aiflux.engines.process import Server, engine_environment
from aiflux.errors import AifluxError, EngineError, RejectedError
from aiflux.models.name import parse_model_name
from aiflux.util.process_limits import start_thread
from aiflux.worker.scheduler import Lane, Scheduler

RESTARTS_WITHOUT_PROGRESS = 3
_DEATH_NOTICE = 1.0
_POLL = 0.05
# Ollama cuts a prompt to the context (0.9) or to about half of it (0.33).
_SLACK_TOKENS = 16
_TRUNCATION = re.compile(rb"truncating input prompt.*\bnew=(\d+)")


@dataclass(frozen=True)
class EngineSettings:
    """How a bundled engine is started.

    Attributes:
        devices: GPUs as CUDA_VISIBLE_DEVICES names them; empty means the CPU.
        slots: sequences decoded in parallel; tried are also halves of it, down to one, where
            ``may_shrink`` says so and the model does not fit the GPUs.
        context_length: tokens of context of each slot.
        insisted: what the model's digest has to begin with.
        extra: further environment of the engine.
    """

    index: int
    program: str
    models_dir: Path
    model: str
    devices: tuple[str, ...]
    slots: int
    context_length: int
    home: Path
    log: Path
    may_shrink: bool = True
    allow_cpu: bool = False
    load_timeout: float = 1800.0
    insisted: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def environment(self, slots: int) -> dict[str, str]:
        """Return what is set beside ``engine_environment``'s own."""
        settings = {
            "OLLAMA_NUM_PARALLEL": str(slots),
            "OLLAMA_CONTEXT_LENGTH": str(self.context_length),
            "OLLAMA_MAX_QUEUE": str(max(512, 4 * slots)),
            "OLLAMA_LOAD_TIMEOUT": f"{int(self.load_timeout)}s",
        }
        if self.devices:
            settings["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        return {**settings, **self.extra}


class TruncationLog:
    """Prompts that Ollama cut, as its log tells: ``truncating input prompt ... new=TOKENS``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._lengths: set[int] = set()
        self._lock = threading.Lock()

    def left(self, tokens: int) -> bool:
        """Tell whether a prompt was cut to this many tokens since this object was made."""
        # There is no log where the disk had no room for one.
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


class BundledEngine:
    """An Ollama of our own.

    Attributes:
        slots: how many slots it runs with.
        facts: what the status shows of it.
    """

    bundled = True

    def __init__(self, settings: EngineSettings, make_client: Callable[[str], Client]) -> None:
        self.settings = settings
        self.index = settings.index
        self.slots = settings.slots
        self.facts: dict[str, Any] = {"index": settings.index, "devices": list(settings.devices)}
        self.client = make_client("")
        self._make_client = make_client
        self._server: Server | None = None
        self._truncations = TruncationLog(settings.log)
        self._closing = threading.Event()

    def start(self) -> None:
        """Start the server, load the model and see where it landed.

        Raises:
            EngineError: it did not start, the model did not load, or it landed on the CPU.
        """
        while True:
            ollama = self._serve()
            loaded = self._load(ollama)
            if self._fits(loaded) or not self._shrink(loaded):
                break
        self._check_placement(loaded)
        self.facts |= {
            "version": ollama.version(),
            "slots": self.slots,
            "context_length": loaded.context_length or self.settings.context_length,
            "size_bytes": loaded.size,
            "gpu_bytes": loaded.size_vram,
            "log": str(self.settings.log),
        }
        self.client.close()
        self.client = self._make_client(ollama.url)

    def stop(self) -> None:
        """Stop the server and its runner."""
        if self._server is not None:
            self._server.stop()

    def close(self) -> None:
        """Stop for good, also in the middle of a start. From any thread."""
        self._closing.set()
        self.stop()
        self.client.close()

    def alive(self) -> bool:
        """Tell whether the server lives; waits a moment for a death to show."""
        deadline = time.monotonic() + _DEATH_NOTICE
        while time.monotonic() < deadline:
            if self._server is None or not self._server.running:
                return False
            time.sleep(_POLL)
        return True

    def ready(self) -> bool:
        """Tell whether the server runs: it says 503 where it is busy, not where it loads."""
        return self._server is not None and self._server.running

    def refusal(self, model: str) -> RejectedError | None:
        """Nothing: the model was loaded, so that Ollama takes requests for it."""
        return None

    def offers(self, model: str) -> bool | None:
        """The model was loaded."""
        return True

    def ran(self, asked: str, answered: str | None) -> str:
        """Return the model's name: the one that was loaded."""
        return asked

    def truncated(self, prompt_tokens: int) -> bool:
        """Tell whether a prompt was cut: Ollama says so in its log only."""
        if prompt_tokens < self.settings.context_length // 2 - _SLACK_TOKENS:
            return False
        return self._truncations.left(prompt_tokens)

    def model_digest(self) -> str | None:
        """Return the digest under which the server lists the model."""
        if self._server is None:
            return None
        return _digest(Ollama(self._server.url).tags(), self.settings.model)

    def _serve(self) -> Ollama:
        self.stop()
        if self._closing.is_set():
            raise EngineError("the engine was stopped as it started")
        settings = self.settings
        environment = engine_environment(
            os.environ, _models_link(settings), settings.home, settings.environment(self.slots)
        )
        self._server = Server(settings.program, environment, settings.log)
        self._server.start()
        return Ollama(self._server.url)

    def _load(self, ollama: Ollama) -> Loaded:
        model = self.settings.model
        digest = _digest(ollama.tags(), model)
        if digest is None:
            raise EngineError(
                f"Ollama does not list {model} in {self.settings.models_dir}",
                f"pull it: aiflux models pull {model}",
            )
        name = replace(parse_model_name(model), digest=self.settings.insisted)
        refuse_other_digest(name, digest, str(self.settings.models_dir))
        try:
            ollama.load(model, self.settings.load_timeout)
            return next(iter(ollama.loaded()))
        except StopIteration:
            raise EngineError(f"{model} was loaded but is not in memory", str(self.settings.log)) \
                from None  # fmt: skip
        except EngineError as error:
            raise EngineError(
                f"{model} could not be loaded: {error.message}",
                f"see the engine's log: {self.settings.log}",
            ) from error

    def _fits(self, loaded: Loaded) -> bool:
        return not self.settings.devices or loaded.size_vram >= loaded.size

    def _shrink(self, loaded: Loaded) -> bool:
        """Take half the slots; False where that is not allowed, or would not help."""
        if not self.settings.may_shrink or self.slots == 1 or not loaded.size_vram:
            return False
        self.slots //= 2
        return True

    def _check_placement(self, loaded: Loaded) -> None:
        if self._fits(loaded) or self.settings.allow_cpu:
            return
        share = 100 - 100 * loaded.size_vram // max(loaded.size, 1)
        raise EngineError(
            f"{share} % of {self.settings.model} landed on the CPU in a job with the GPUs "
            f"{', '.join(self.settings.devices)}",
            "ask for more or larger GPUs, fewer --slots or a smaller --context-length; check that "
            "the image has GPU support (aiflux image info); or say --allow-cpu",
        )


def _models_link(settings: EngineSettings) -> Path:
    """Return a plain path to the models directory.

    Ollama finds models with a glob pattern made from this path, so that a backslash or a bracket
    in it would hide them all (``Manifests`` in ollama's server/manifest.go).
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    link = settings.home / "models"
    if not link.is_symlink():
        link.symlink_to(settings.models_dir)
    return link


def _digest(tags: dict[str, str], model: str) -> str | None:
    """Return a model's digest; Ollama's names do not depend on case."""
    return next((digest for name, digest in tags.items() if name.lower() == model.lower()), None)


Engine = BundledEngine | ExternalEngine


class Keeper:
    """Starts an engine and brings it back; one thread for each engine."""

    def __init__(
        self,
        engine: Engine,
        lane: Lane,
        scheduler: Scheduler,
        *,
        say: Callable[[str], None],
        on_ready: Callable[[Engine, Lane], None],
    ) -> None:
        self.engine = engine
        self.lane = lane
        self.failure: BaseException | None = None
        self.restarts = 0
        self._scheduler = scheduler
        self._say = say
        self._on_ready = on_ready
        self._changed = threading.Condition()
        self._down_in = -1
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to start the engine; returns at once."""
        self._thread = start_thread(self._keep, f"engine-{self.engine.index}")

    def close(self) -> None:
        """Stop the engine for good and wait for that."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.engine.close()
        if self._thread is not None:
            self._thread.join()

    def report_down(self, generation: int) -> None:
        """Have the engine restarted, unless it has been since ``generation``.

        Every request in flight reports the same death, some of them while the engine starts again
        or after that: it is the generation that tells that they mean the one before.
        """
        with self._changed:
            self._down_in = max(self._down_in, generation)
            self._changed.notify()

    def _wait_until_down(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._down_in >= self.lane.generation)

    def _keep(self) -> None:
        try:
            self._run()
        except AifluxError as error:
            if not self._closing:
                self.failure = error
                self._say(f"engine {self.engine.index} is gone: {error.message}")
            self._scheduler.close_lane(self.lane, gone=True)
        except BaseException as error:  # noqa: BLE001 - the pool would wait for this engine for ever
            self.failure = error
            self._scheduler.close_lane(self.lane, gone=True)
        finally:
            self.engine.stop()

    def _run(self) -> None:
        fruitless = 0
        completed = -1
        while not self._closing:
            try:
                self.engine.start()
            except RejectedError:
                raise
            except EngineError:
                if completed < 0 or fruitless >= RESTARTS_WITHOUT_PROGRESS:
                    raise
            else:
                self._open()
                self._wait_until_down()
            if self._closing:
                return
            self._scheduler.close_lane(self.lane)
            fruitless = 1 if self.lane.completed > completed >= 0 else fruitless + 1
            completed = self.lane.completed
            if fruitless > RESTARTS_WITHOUT_PROGRESS:
                raise EngineError(
                    f"engine {self.engine.index} died {fruitless} times without a result between",
                    f"see its log: {self.engine.facts.get('log', self.engine.facts.get('url'))}",
                )
            self.restarts += 1
            self._say(f"engine {self.engine.index} is down; starting it again ({fruitless})")

    def _open(self) -> None:
        self._on_ready(self.engine, self.lane)
        self._scheduler.open_lane(self.lane)

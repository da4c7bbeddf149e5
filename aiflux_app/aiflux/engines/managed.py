"""A server that the worker starts: what engines of all such kinds have in common."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from aiflux.core.runs.status_file import EngineFacts
from aiflux.engines.base import EngineKind, EngineSpec, HttpFactory
from aiflux.engines.http import Client
from aiflux.engines.process import ServerProcess
from aiflux.engines.server_load import get
from aiflux.engines.sizing import in_flight
from aiflux.errors import EngineError, RejectedError

_DEATH_NOTICE = 1.0
_POLL = 0.05
_READY_POLL = 0.2


class ManagedEngine:
    """Base class of such engines; they add ``start``.

    Attributes:
        slots: sequences that the server decodes in parallel.
    """

    def __init__(
        self, kind: EngineKind, spec: EngineSpec, make_client: HttpFactory, slots: int
    ) -> None:
        self.kind = kind
        self.spec = spec
        self.index = spec.index
        self.slots = slots
        self.facts = EngineFacts(spec.index, spec.devices)
        self.client = make_client("")
        self._make_client = make_client
        self._server: ServerProcess | None = None
        self._closing = threading.Event()
        self._digest: str | None = None

    def stop(self) -> None:
        """Stop the server and every process that it started."""
        server = self._server
        if server is not None:
            server.stop()

    def close(self) -> None:
        """Stop for good, also during a start. From any thread."""
        self._closing.set()
        self.stop()
        self.client.close()

    def is_alive(self) -> bool:
        """Tell whether the server is up; wait a moment for a death to show."""
        deadline = time.monotonic() + _DEATH_NOTICE
        while time.monotonic() < deadline:
            if not self.is_ready():
                return False
            time.sleep(_POLL)
        return True

    def is_ready(self) -> bool:
        """Tell whether the server runs: its model was loaded before the first request."""
        return self._server is not None and self._server.running

    def max_in_flight(self) -> int | None:
        """Return the requests that keep all its slots busy."""
        return in_flight(self.slots)

    def model_digest(self) -> str | None:
        """Return the digest of the model that the current start loaded."""
        return self._digest

    def was_truncated(self, prompt_tokens: int) -> bool:
        """Tell that no prompt is cut, unless a kind knows better."""
        return False

    def refusal(self, model: str) -> RejectedError | None:
        """Nothing: the model was loaded, so the server accepts requests for it."""
        return None

    def offers(self, model: str) -> bool | None:
        """The model was loaded."""
        return True

    def ran(self, asked: str, answered: str | None) -> str:
        """Return the model's name: the one that was loaded."""
        return asked

    def describe(self) -> str:
        """Return where it runs, its version and its slots."""
        facts = self.facts
        where = "GPU " + ",".join(facts.devices or ()) if facts.gpu_bytes else "the CPU"
        return (
            f"engine {self.index} is up on {where}: {self.kind.title} {facts.version}, "
            f"{self.slots} slot{'s' * (self.slots > 1)} of {facts.context_length} tokens"
        )

    def _serve(
        self, command: Sequence[str], environment: Mapping[str, str], port: int | None = None
    ) -> ServerProcess:
        """Start the server in the place of an earlier one, and return it.

        Args:
            port: as the command has it; None where the kernel picks it.

        Raises:
            EngineError: it did not start, or the engine was closed.
        """
        self.stop()
        server = ServerProcess(command, environment, self.spec.log, port)
        self._server = server
        # In this order: ``close`` stops the server that it finds, or this finds it closing.
        if self._closing.is_set():
            raise EngineError("the engine was stopped during its start")
        server.start()
        return server

    def _await_ready(self, server: ServerProcess, path: str, timeout: float) -> Client:
        """Return a client of the server, once it answers a path with status 200.

        Raises:
            EngineError: it ended, was closed, did not get ready in time, or another program
                listens on its port.
        """
        client = self._make_client(server.url)
        deadline = time.monotonic() + timeout
        try:
            while get(client, path) is None:
                server.check()
                if self._closing.wait(_READY_POLL):
                    raise EngineError("the engine was stopped during its start")
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{self.kind.title} was not ready within {timeout:g} s",
                        f"see its log: {self.spec.log}; or allow more time: --load-timeout SECONDS",
                    )
            if not server.owns_port():
                raise EngineError(
                    f"another program took the port of {self.kind.title}: {server.url}",
                    "run the same command again",
                )
        except BaseException:
            client.close()
            self.stop()
            raise
        return client

    def _use(self, ready: str | Client) -> None:
        """Send requests to a server that is ready: at an address, or through a client of it."""
        self.client.close()
        self.client = self._make_client(ready) if isinstance(ready, str) else ready

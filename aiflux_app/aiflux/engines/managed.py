"""Base class of engines that the worker starts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from aiflux.core.runs.status_file import EngineFacts
from aiflux.engines.base import EngineKind, EngineSpec, HttpFactory
from aiflux.engines.http import Client
from aiflux.engines.process import (
    EMPTY_LOG,
    ServerEndedError,
    ServerProcess,
    engine_program,
    loopback_url,
)
from aiflux.engines.server_load import get
from aiflux.engines.server_log import refused_option
from aiflux.engines.server_options import given_options
from aiflux.engines.sizing import context_length, engine_slots, in_flight
from aiflux.errors import EngineError, ModelError, RejectedError
from aiflux.util.files import temporary_folder
from aiflux.util.text import joined

_LONGEST_SOCKET = 107  # bytes of a path: unix(7), sun_path
_SHORT_FOLDER = Path("/tmp")  # noqa: S108 - a private folder in it is used
_DEATH_NOTICE = 1.0
_POLL = 0.05
_READY_POLL = 0.2
_MEMORY_SHARE = 0.6


class ManagedEngine:
    """A server that the worker starts; subclasses implement ``start``.

    Attributes:
        slots: sequences that the server decodes in parallel.
        _folder: where its program starts; None for the worker's current directory.

    Raises:
        EngineError: its program is missing.
    """

    _folder: str | None = None

    def __init__(self, kind: EngineKind, spec: EngineSpec, make_client: HttpFactory) -> None:
        plan = spec.plan
        self.kind = kind
        self.generates_n = kind.generates_n
        self.spec = spec
        self.index = spec.index
        self._options = plan.options
        self._served = plan.served(spec.model)
        # Once: they are read from the headers of the model's files.
        self._figures = figures = kind.figures(plan.models_dir, spec.model, None)
        self.slots = engine_slots(kind, spec, figures)
        self._context = context_length(plan, figures.architecture.context if figures else 0)
        self._program = self._find_program()
        self.facts = EngineFacts(spec.index, spec.devices)
        self.client = make_client("")
        self._make_client = make_client
        self._server: ServerProcess | None = None
        self._closing = threading.Event()
        self._folders = ExitStack()
        self._short_folder: Path | None = None
        self._digest: str | None = None

    @property
    def _models_dir(self) -> Path:
        """The models directory of the plan.

        Raises:
            ModelError: the plan names none.
        """
        if self.spec.plan.models_dir is None:
            raise ModelError("the plan names no models directory", "plan the run again")
        return self.spec.plan.models_dir

    def _refuse_changed_adapters(self) -> None:
        """Refuse adapters that are not those of the plan.

        Raises:
            ModelError: one changed, or cannot be read.
        """
        plan = self.spec.plan
        for each in plan.adapters:
            found = self.kind.read_adapter(plan.models_dir, self.spec.model, each.name, each.path)
            each.refuse_changed(found)

    @property
    def _host(self) -> str:
        """The address on which the server listens."""
        listener = self.spec.listener
        return "127.0.0.1" if listener is None else listener.host

    def _url(self, port: int) -> str:
        """Return the address of the server on a port."""
        return loopback_url(port) if self.spec.listener is None else f"https://{self._host}:{port}"

    def _find_program(self) -> str:
        return engine_program(self.kind, self.spec.environ)

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
        self._folders.close()

    def is_alive(self) -> bool:
        """Return whether the server is running; wait a moment, as a crash may show late."""
        deadline = time.monotonic() + _DEATH_NOTICE
        while time.monotonic() < deadline:
            if not self._running:
                return False
            time.sleep(_POLL)
        return True

    @property
    def _running(self) -> bool:
        return self._server is not None and self._server.running

    def is_ready(self) -> bool:
        """Return whether the server is running: its model was loaded before the first request."""
        return self._running

    def max_in_flight(self) -> int | None:
        """Return the requests that keep all its slots busy."""
        return in_flight(self.slots)

    def can_have(self, slots: int) -> bool:
        """Return whether another start can have this number of slots.

        On GPUs, only the start shows whether they fit: it takes fewer slots then, or fails.
        """
        figures = self._figures
        if self._options.slots is not None or (figures and self.kind.one_slot(figures)):
            return slots == self.slots
        if slots > self.kind.slot_limits.most:
            return False
        return slots <= self.slots or bool(self.spec.devices) or self._fit_in_memory(slots)

    def use_slots(self, count: int) -> None:
        """Have this number of slots from the next start on."""
        self.slots = self.facts.slots = count

    def _fit_in_memory(self, count: int) -> bool:
        """Return whether slots on the CPU clearly fit into the memory of the job, or the node."""
        if self._figures is None:
            return False
        needed = self.kind.memory_needed(self._figures, self._context, count, 1, self._options)
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        job = int(self.spec.environ.get("SLURM_MEM_PER_NODE") or 0) * 2**20  # in MB
        return needed < (job or pages) * _MEMORY_SHARE

    def model_digest(self) -> str | None:
        """Return the digest of the model that the current start loaded."""
        return self._digest

    def was_truncated(self, prompt_tokens: int) -> bool:
        """Return False, unless a subclass detects truncated prompts."""
        return False

    def refusal(self, model: str) -> RejectedError | None:
        """Return None: the model was loaded, so the server accepts requests for it."""
        return None

    def offers(self, model: str) -> bool | None:
        """Return True: the model was loaded."""
        return True

    def ran(self, asked: str, answered: str | None) -> str:
        """Return the model's name: the one that was loaded."""
        return asked

    def describe(self) -> str:
        """Return where it runs, its version and its slots."""
        facts = self.facts
        where = "GPU " + ",".join(facts.devices or ()) if facts.gpu_bytes else "the CPU"
        where += f" of {joined(facts.nodes)}" if facts.nodes else ""
        return (
            f"engine {self.index} is up on {where}: {self.kind.title} {facts.version}, "
            f"{self.slots} slot{'s' * (self.slots > 1)} of {facts.context_length} tokens"
        )

    def _socket_folder(self, longest: int) -> Path:
        """Return a private folder for Unix sockets: the engine's home if their paths are valid.

        Args:
            longest: length of the longest name of a socket.

        Raises:
            EngineError: no other folder can be made.
        """
        home = self.spec.home
        if len(os.fsencode(home)) + 1 + longest <= _LONGEST_SOCKET:
            return home
        try:
            if self._short_folder is None:
                folder = temporary_folder(_SHORT_FOLDER)
                self._short_folder = self._folders.enter_context(folder)
        except OSError as error:
            raise EngineError(
                f"the path of a socket in {home} is too long, and no folder can be made in "
                f"{_SHORT_FOLDER}: {error.strerror}",
                "use a shorter TMPDIR",
            ) from error
        return self._short_folder

    def _serve(
        self, command: Sequence[str], environment: Mapping[str, str], url: str | None = None
    ) -> ServerProcess:
        """Start the server, replacing an earlier one, and return it.

        Args:
            url: address in the command; None if the kernel chooses the port.

        Raises:
            EngineError: the server did not start, or the engine was closed.
        """
        self.stop()
        server = ServerProcess(command, environment, self.spec.log, url, self._folder)
        self._server = server
        # This order matters: either ``close`` finds the server and stops it, or this finds it
        # closed.
        if self._closing.is_set():
            raise EngineError("the engine was stopped during its start")
        try:
            server.start()
        except ServerEndedError as error:
            raise self._explained(error) from error
        return server

    def _explained(self, error: ServerEndedError) -> EngineError:
        """Return the error of a server that ended, which names the run's options for it."""
        given = given_options(self._options)
        line = refused_option(error.log) if given else None
        if line is not None:
            return RejectedError(
                f"{self.kind.title} does not accept {given}: {line}",
                f"correct it, or leave it out; the engine's log is {self.spec.log}",
            )
        remedy = f"check {given}, or leave it out; {error.remedy}" if given else error.remedy
        return EngineError(error.message, remedy)

    def _await_ready(self, server: ServerProcess, path: str, timeout: float) -> Client:
        """Return a client of the server once it answers a path with status 200.

        Raises:
            EngineError: the server ended, was closed, was not ready in time, or another program
                listens on its port.
        """
        listener = self.spec.listener
        client = self._make_client(server.url, str(listener.certificate) if listener else None)
        deadline = time.monotonic() + timeout
        try:
            while not self._answers(client, path):
                server.check()
                if self._closing.wait(_READY_POLL):
                    raise EngineError("the engine was stopped during its start")
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{self.kind.title} was not ready within {timeout:g} s: "
                        f"{self._unready(server)}\n{server.log_tail() or EMPTY_LOG}",
                        f"see its log: {self.spec.log}; or allow more time: --load-timeout SECONDS",
                    )
            self._refuse_other_server(server)
        except BaseException as error:
            client.close()
            self.stop()
            if isinstance(error, ServerEndedError):
                raise self._explained(error) from error
            raise
        return client

    def _answers(self, client: Client, path: str) -> bool:
        return get(client, path) is not None

    def _unready(self, server: ServerProcess) -> str:
        """Return what a server lacks that is not ready."""
        if server.listens_on():
            return "it listens, but is not ready"
        return f"it does not listen on {server.url}"

    def _refuse_other_server(self, server: ServerProcess) -> None:
        """Refuse a server at the address that is not the one that was started."""
        if not server.owns_port():
            raise EngineError(
                f"another program took the port of {self.kind.title}: {server.url}",
                "run the same command again",
            )

    def _use(self, client: Client) -> None:
        """Use the client of a server that is ready."""
        self.client.close()
        self.client = client

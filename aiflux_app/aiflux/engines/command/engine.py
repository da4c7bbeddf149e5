"""The engine `command`: a server that ``--engine-command`` starts, with the OpenAI API.

It is ready when ``/health`` answers 200, or ``/v1/models`` if it has no ``/health``. It listens on
a Unix socket in a private folder, or on a port of 127.0.0.1.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aiflux.core.config.engine_command import command_words, filled_words, placeholders_of
from aiflux.engines.base import LIBRARY_VARIABLES, EngineKind, EngineSpec, HttpFactory
from aiflux.engines.gpus import own_devices
from aiflux.engines.http import Client, ExchangeError, socket_url
from aiflux.engines.managed import ManagedEngine
from aiflux.engines.outcome import RETRIED_STATUSES
from aiflux.engines.process import LOOPBACK, ServerProcess, free_port, loopback_url
from aiflux.engines.served_models import MODELS_PATH, ServedModels
from aiflux.engines.server_load import Get, get, reported, total_slots
from aiflux.engines.sizing import in_flight, in_flight_at
from aiflux.errors import ConfigError, EngineError, RejectedError
from aiflux.util.text import counted

_READY = ("/health", MODELS_PATH)
_UNREADY = RETRIED_STATUSES - {429}
_PROBE_TIMEOUT = 2.0
# 127.0.0.1 in an IPv6 socket, as the kernel writes it.
_LOOPBACKS = {LOOPBACK, "0000000000000000FFFF00000100007F"}
# Paths that report a version, and the key: vLLM and TensorRT-LLM, llama-server, SGLang.
_VERSIONS = (("/version", "version"), ("/props", "build_info"), ("/get_server_info", "version"))


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job for its programs, from that of the worker."""
    kept = {name: value for name, value in environ.items() if not name.startswith("AIFLUX_")}
    for name in LIBRARY_VARIABLES:
        value = environ.get(f"AIFLUX_JOB_{name}")
        if value is not None:
            kept.pop(name, None)
        if value:
            kept[name] = value
    return kept


class CommandEngine(ManagedEngine):
    """A server that the worker starts with the user's command.

    Raises:
        EngineError: its program is missing.
    """

    def __init__(self, kind: EngineKind, spec: EngineSpec, make_client: HttpFactory) -> None:
        command = spec.plan.options.engine_command
        if command is None:
            raise ConfigError("the plan names no command", "plan it again with --engine-command")
        self._line = command
        self._named = placeholders_of(command)
        super().__init__(kind, spec, make_client)
        self._folder = spec.environ.get("AIFLUX_JOB_DIR")
        self._models = ServedModels(f"engine {spec.index}", spec.say)
        self._socket: Path | None = None
        self._reported: int | None = None

    def _find_program(self) -> str:
        name = command_words(self._line)[0]
        path = self._environment().get("PATH")
        program = shutil.which(name, path=path)
        if program is None:
            what = f"{name} is not an executable file" if "/" in name else f"no {name} on PATH"
            raise EngineError(
                f"{what} on {socket.gethostname()}, but --engine-command starts it",
                "load the site's module that has it (--modules NAME, or --setup LINE), or give "
                "its absolute path",
            )
        return program

    def start(self) -> None:
        """Start the server and wait until it is ready.

        Raises:
            EngineError: it did not start, or was not ready within ``load_timeout``; a RejectedError
                if other machines could reach it.
        """
        self.spec.home.mkdir(parents=True, exist_ok=True)
        port = free_port() if "port" in self._named else 0
        url = loopback_url(port) if "socket" not in self._named else socket_url(self._new_socket())
        words = filled_words(self._line, self._values(port))
        server = self._serve([self._program, *words[1:]], self._environment(), url)
        client = self._await_ready(server, "", self._options.load_timeout)
        self._note_models(client)
        self._note_facts(client)
        self._use(client)

    def is_ready(self) -> bool:
        """Return whether the server accepts requests; one that is too busy to answer does."""
        return self._running and self._readiness(self.client) is not False

    def max_in_flight(self) -> int | None:
        """Return the requests that keep its slots busy; None if their number is unknown."""
        slots = self.facts.slots
        if self._reported is not None:
            return in_flight_at(self._reported)
        return None if slots is None else in_flight(slots)

    def refusal(self, model: str) -> RejectedError | None:
        """Return why requests for a model cannot succeed, according to the server's list."""
        self._note_models(self.client)
        return self._models.refusal(model)

    def offers(self, model: str) -> bool | None:
        """Return whether the server lists a model; None if it lists no models."""
        return self._models.offers(model)

    def ran(self, asked: str, answered: str | None) -> str:
        """Return the name of the model that gave an answer; see ``ServedModels.ran``."""
        return self._models.ran(asked, answered)

    def describe(self) -> str:
        """Return its program, its GPUs, and its slots if they are known."""
        facts = self.facts
        parts = [
            " ".join(filter(None, [Path(self._program).name, facts.version])),
            f"GPU {','.join(facts.devices)}" if facts.devices else "no GPU",
            *([] if facts.slots is None else [counted(facts.slots, "slot")]),
        ]
        return f"engine {self.index} is up: {', '.join(parts)}"

    def _values(self, port: int) -> dict[str, Any]:
        return {
            "model": self._served,
            "socket": self._socket,
            "port": port,
            "host": "127.0.0.1",
            "slots": self.slots,
            "context": self._context,
            "gpus": max(1, len(self.spec.devices)),
            "log": self.spec.log,
        }

    def _new_socket(self) -> Path:
        """Return the path of the socket, in a folder that only this user can enter."""
        if self._socket is None:
            name = "engine.sock"  # llama-server wants the ending
            self._socket = self._socket_folder(len(name)) / name
        self._socket.unlink(missing_ok=True)  # a server that was killed leaves it
        return self._socket

    def _environment(self) -> dict[str, str]:
        """Return the job's environment, with this engine's GPUs and the run's variables."""
        environment = job_environment(own_devices(self.spec.environ, self.spec.devices))
        return {**environment, **self._options.engine_env}

    def _answers(self, client: Client, path: str) -> bool:
        return self._readiness(client) is True

    def _readiness(self, client: Client) -> bool | None:
        """Return whether the server is ready; None if it does not answer in time.

        A server that has neither path, or wants a key for them, is ready: its answers to requests
        show the rest.
        """
        for path in _READY:
            try:
                status = client.get(path, _PROBE_TIMEOUT).status
            except ExchangeError as error:
                return None if error.code == "timeout" else False
            if status == 200 or status in _UNREADY:
                return status == 200
        return True

    def _unready(self, server: ServerProcess) -> str:
        if self._socket is None:
            return super()._unready(server)
        if self._socket.exists():
            return "it listens, but is not ready"
        return f"it does not listen on {self._socket}"

    def _refuse_other_server(self, server: ServerProcess) -> None:
        """Refuse another program at the port, and a server that other machines can reach."""
        if self._socket is not None:
            return
        addresses = server.listens_on()
        if addresses - _LOOPBACKS:
            raise RejectedError(
                f"engine {self.index} listens on every address of {socket.gethostname()}, not only "
                "on 127.0.0.1: others could read and send requests",
                "add the server's option for the address, such as --host {host}; or use {socket}",
            )
        if not addresses:
            super()._refuse_other_server(server)

    def _note_models(self, client: Client) -> None:
        try:
            self._models.note(client.hidden(client.get(MODELS_PATH, _PROBE_TIMEOUT)))
        except ExchangeError:
            return  # a list is not required; requests report a server that does not answer

    def _note_facts(self, client: Client) -> None:
        facts = self.facts
        given = self._options.slots is not None or "slots" in self._named
        fetch = partial(get, client)
        slots = self._reported = total_slots(fetch)
        self.generates_n = self.kind.generates_n if slots is None else False
        facts.slots = slots or (self.slots if given else None)
        facts.context_length = self._context if "context" in self._named else None
        facts.version = _version(fetch)
        facts.command = self._line
        facts.log = str(self.spec.log)


def _version(fetch: Get) -> str | None:
    """Return the version that a server reports, if it does."""
    found = (reported(fetch, path).get(key) for path, key in _VERSIONS)
    return next((version for version in found if isinstance(version, str)), None)

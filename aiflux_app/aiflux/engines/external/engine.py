"""A server that is already running, at ``--engine-url``: its readiness and models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from shlex import quote
from urllib.parse import urlsplit

from aiflux.core.runs.status_file import EngineFacts
from aiflux.engines.base import EngineKind
from aiflux.engines.http import Answer, Client, ExchangeError, speaks_tls
from aiflux.engines.outcome import RETRIED_STATUSES, error_message
from aiflux.engines.served_models import MODELS_PATH, ServedModels
from aiflux.engines.server_load import get, total_slots
from aiflux.engines.sizing import in_flight_at
from aiflux.errors import EngineError, RejectedError
from aiflux.util.text import counted, public_url

_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0
_PROBE_TIMEOUT = 5.0
_DENIED = {401: "refuses the key", 403: "denies access"}


class ExternalEngine:
    """An engine that AI-Flux did not start."""

    def __init__(
        self,
        kind: EngineKind,
        url: str,
        make_client: Callable[[str], Client],
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        self.kind = kind
        self.generates_n = kind.generates_n
        self.index = 0
        self.url = public_url(url)
        self.client = make_client(url)
        self.facts = EngineFacts(url=self.url)
        self._slots: int | None = None
        self._patience = patience
        self._say = say
        self._closing = threading.Event()
        self._models = ServedModels(f"the engine at {self.url}", say)
        self._probing = threading.Lock()
        self._ready_at = float("-inf")
        self._status = 0
        self._denied = False

    def start(self) -> None:
        """Wait until the server is ready.

        Raises:
            EngineError: it is not ready in time; a RejectedError if waiting cannot help.
        """
        deadline = time.monotonic() + self._patience
        delay = _FIRST_DELAY
        last = ""
        while (problem := self._probe()) is not None:
            if problem != last:
                last = problem
                self._say(
                    f"{problem}; waiting up to {max(0, deadline - time.monotonic()):.0f} s "
                    "(--engine-wait)"
                )
            if time.monotonic() + delay > deadline or self._closing.is_set():
                raise EngineError(problem, "check the address, and that the server is running")
            self._closing.wait(delay)
            delay = min(2 * delay, _LONGEST_DELAY)
        self._denied = self._status in _DENIED
        self._slots = total_slots(partial(get, self.client))
        self.generates_n = self.kind.generates_n if self._slots is None else False

    def stop(self) -> None:
        """Do nothing: the server is not ours."""

    def close(self) -> None:
        """Close the connections and stop waiting. Can be called from any thread."""
        self._closing.set()
        self.client.close()

    def is_alive(self) -> bool:
        """Return whether the server answers and does not report that it is not ready."""
        try:
            return self._probe() is None
        except RejectedError:
            return False  # ``start`` reports the reason

    def is_ready(self) -> bool:
        """Return the same; concurrent callers share a probe that started after their call."""
        asked = time.monotonic()
        with self._probing:
            return self._ready_at >= asked or self.is_alive()

    def refusal(self, model: str) -> RejectedError | None:
        """Return why requests for a model cannot succeed, according to the server."""
        try:
            answer = self.client.hidden(self.client.get(MODELS_PATH, _PROBE_TIMEOUT))
        except ExchangeError:
            return self._models.refusal(model)
        if answer.status in _DENIED and not self._denied:
            return RejectedError(
                f"the engine at {self.url} {_DENIED[answer.status]} ({answer.status}): "
                f"{_words(answer)}",
                "set AIFLUX_API_KEY to a key that is valid for this model and address",
            )
        self._models.note(answer)
        return self._models.refusal(model)

    def offers(self, model: str) -> bool | None:
        """Return whether the engine lists a model; None if it lists no models."""
        return self._models.offers(model)

    def ran(self, asked: str, answered: str | None) -> str:
        """Return the name of the model that gave an answer; see ``ServedModels.ran``."""
        return self._models.ran(asked, answered)

    def was_truncated(self, prompt_tokens: int) -> bool:
        """Return False: the engine's context is unknown."""
        return False

    def max_in_flight(self) -> int | None:
        """Return the requests that keep its slots busy, or None if their number is unknown."""
        if self._slots is None:
            return None
        self.facts.slots = self._slots
        return in_flight_at(self._slots)

    def can_have(self, slots: int) -> bool:
        """Return False: the server has its own."""
        return False

    def use_slots(self, count: int) -> None:
        """Do nothing: the server has its own."""

    def model_digest(self) -> str | None:
        """Return None: the engine's model file is unknown."""
        return None

    def describe(self) -> str:
        """Return its address, and its slots if it reports them."""
        known = "" if self._slots is None else f" with {counted(self._slots, 'slot')}"
        return f"engine at {self.url} is ready{known}"

    def _probe(self) -> str | None:
        """Query the models. Return why the server is not ready, or None.

        A server without ``/v1/models``, or one that requires another key for it, counts as ready:
        its answers to requests show the rest.

        Raises:
            RejectedError: waiting cannot help.
        """
        began = time.monotonic()
        try:
            answer = self.client.hidden(self.client.get(MODELS_PATH, _PROBE_TIMEOUT))
        except ExchangeError as error:
            if error.code == "connection":
                self._refuse_plain_http()
            if error.remedy:
                raise self._rejected(error) from error
            return f"the engine does not respond yet: {error.message}"
        if answer.location and 300 <= answer.status < 400:
            self._refuse_redirect(answer.location)
        elif answer.status in RETRIED_STATUSES - {429}:
            return f"the engine at {self.url} is not ready ({answer.status}): {_words(answer)}"
        elif answer.status == 400:
            self._refuse_plain_http()
        self._models.note(answer)
        self._status = answer.status
        self._ready_at = began
        return None

    def _rejected(self, error: ExchangeError) -> RejectedError:
        """Return the error for an exchange that failed, and would fail again."""
        return RejectedError(f"the engine: {error.message}", error.remedy)

    def _refuse_plain_http(self) -> None:
        if self.url.startswith("http://") and speaks_tls(self.url, _PROBE_TIMEOUT):
            raise RejectedError(
                f"the engine at {self.url} speaks HTTPS on this port",
                f"use --engine-url {quote('https' + self.url.removeprefix('http'))}",
            )

    def _refuse_redirect(self, target: str) -> None:
        here, there = urlsplit(self.url + MODELS_PATH), urlsplit(target)
        if here[:2] == there[:2] and here.path == there.path.rstrip("/"):
            return  # only a trailing slash, which is irrelevant for other paths
        raise redirect_error(self.url, MODELS_PATH, target)


def redirect_error(url: str, path: str, target: str) -> RejectedError:
    """Return the error for a server that redirects, with the address to use instead."""
    base = target.rstrip("/").removesuffix(path).removesuffix("/v1")
    moved = target.rstrip("/").endswith(path)
    return RejectedError(
        f"the engine at {url} redirects {path} to {target}",
        f"use that address: --engine-url {quote(base)}" if moved else
        "check --engine-url, and whether the server requires a login",
    )  # fmt: skip


def _words(answer: Answer) -> str:
    return error_message(answer.body.decode("utf-8", "replace")) or "no reason given"

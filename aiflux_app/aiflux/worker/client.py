"""One HTTP exchange with an engine, with a deadline for the whole of it.

``requests`` is used at the level of its transport adapter, with a request that is prepared once for
each endpoint: what is left out (cookies, redirects, hooks, environment) takes two thirds of the CPU
time of ``Session.send`` and has no use here. A watchdog shuts down the socket of an exchange that
is overdue, so that neither a hanging server nor one that drips byte by byte outlives its deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from socket import SHUT_RDWR
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ConnectionError as RequestsConnectionError
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

CONNECT_TIMEOUT = 10.0
_WATCH_INTERVAL = 0.25
_MARGIN = 5.0


class ExchangeError(Exception):
    """No whole answer came.

    Attributes:
        code: ``timeout``, ``aborted``, ``refused`` or ``connection``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer.

    Attributes:
        retry_after: seconds that the server asks to wait; None where it does not.
    """

    status: int
    body: bytes
    retry_after: float | None = None


class _Exchange:
    """What the watchdog knows of an exchange under way."""

    __slots__ = ("connection", "deadline", "verdict")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.connection: HTTPConnection | None = None
        self.verdict: str | None = None

    def end(self, verdict: str) -> None:
        self.verdict = verdict
        sock = None if self.connection is None else self.connection.sock
        if sock is not None:
            try:
                sock.shutdown(SHUT_RDWR)
            except OSError:
                return  # it ended by itself in the meantime


_current = threading.local()


class _TrackedConnection(HTTPConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        _current.exchange.connection = self
        super().request(*args, **kwargs)


class _TrackedTLSConnection(HTTPSConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        _current.exchange.connection = self
        super().request(*args, **kwargs)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _TrackedConnection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TrackedTLSConnection


class Client:
    """Sends requests to one engine. Thread-safe; keeps connections alive.

    Args:
        base_url: e.g. ``http://127.0.0.1:11434``, without ``/v1``.
        timeout: seconds that one exchange may take, from connecting to the last byte.
        connections: how many are kept.
        api_key: sent as a bearer token.
    """

    def __init__(
        self, base_url: str, timeout: float, connections: int, api_key: str | None = None
    ) -> None:
        self.base_url = base_url
        self._timeout = timeout
        self._adapter = HTTPAdapter(pool_connections=1, pool_maxsize=connections)
        self._adapter.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._prepared: dict[str, requests.PreparedRequest] = {}
        self._exchanges: set[_Exchange] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watchdog.start()

    def post(self, url: str, payload: bytes) -> Answer:
        """Send one request and return the whole answer, whatever its status.

        Raises:
            ExchangeError: no whole answer came.
        """
        exchange = _Exchange(time.monotonic() + self._timeout)
        _current.exchange = exchange
        with self._lock:
            self._exchanges.add(exchange)
        try:
            answer = self._send(self._request(url, payload))
        except (requests.RequestException, HTTPError, OSError) as error:
            raise self._explain(exchange, error) from error
        finally:
            with self._lock:
                self._exchanges.discard(exchange)
        if exchange.verdict is not None:
            # A socket that was shut down among the headers looks like a whole, empty answer.
            raise self._explain(exchange, OSError("shut down"))
        return answer

    def abort(self) -> None:
        """End every exchange under way; their requests count as not attempted."""
        with self._lock:
            exchanges = list(self._exchanges)
        for exchange in exchanges:
            exchange.end("aborted")

    def close(self) -> None:
        """Close the connections and stop the watchdog."""
        self._closed.set()
        self._watchdog.join()
        self._adapter.close()

    def _request(self, url: str, payload: bytes) -> requests.PreparedRequest:
        prepared = self._prepared.get(url)
        if prepared is None:
            prepared = requests.Request("POST", self.base_url + url, self._headers).prepare()
            self._prepared[url] = prepared
        copy = requests.PreparedRequest()
        copy.method, copy.url, copy.body = "POST", prepared.url, payload
        copy.headers = prepared.headers.copy()
        copy.headers["Content-Length"] = str(len(payload))
        return copy

    def _send(self, request: requests.PreparedRequest) -> Answer:
        # The socket's own timeout lies behind the deadline: the watchdog comes first.
        timeouts = (min(CONNECT_TIMEOUT, self._timeout), self._timeout + _MARGIN)
        response = self._adapter.send(request, stream=True, timeout=timeouts)
        raw = response.raw
        body = raw.read(decode_content=True)
        raw.release_conn()
        return Answer(raw.status, body, _retry_after(raw.headers))

    def _explain(self, exchange: _Exchange, error: Exception) -> ExchangeError:
        if exchange.verdict == "timeout" or isinstance(error, requests.ReadTimeout):
            return ExchangeError("timeout", f"no whole answer within {self._timeout:g} s")
        if exchange.verdict == "aborted":
            return ExchangeError("aborted", "ended by the worker")
        if isinstance(error, RequestsConnectionError) and "NewConnectionError" in repr(error):
            return ExchangeError("refused", f"{self.base_url} does not accept connections")
        if isinstance(error, requests.ConnectTimeout):
            return ExchangeError("refused", f"{self.base_url} does not answer")
        return ExchangeError("connection", f"the connection broke: {_root(error)}")

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_INTERVAL):
            now = time.monotonic()
            with self._lock:
                overdue = [item for item in self._exchanges if item.deadline < now]
            for exchange in overdue:
                exchange.end("timeout")


def _root(error: BaseException) -> str:
    """Return the innermost cause's own words."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After in its seconds form (RFC 9110, 10.2.3); a date is left to the backoff."""
    text = headers.get("Retry-After")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        return None

"""One HTTP exchange with an engine, with a deadline for the whole exchange.

``requests`` is used at the level of its transport adapter, with a request that is prepared once per
endpoint. The parts left out (cookies, redirects, hooks, environment) take two thirds of the CPU
time of ``Session.send`` and are not needed. A watchdog shuts down the socket of an overdue
exchange, so that neither a hanging server nor one that sends byte by byte exceeds the deadline.

An event loop (``worker.dispatcher``) sends on connections that such an exchange has opened
(``Client.begin``), and receives answers of the usual form itself, because urllib3 and a thread for
each request take most of the CPU time. Everything else is left to a thread and to urllib3
(``Client.finish``): other statuses, encodings, connections that end, and errors.
"""

from __future__ import annotations

import io
import queue
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from http.client import BadStatusLine, HTTPException
from http.client import HTTPResponse as PlainResponse
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ConnectionError as RequestsConnectionError
from urllib3 import HTTPHeaderDict, HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection, _get_default_user_agent
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NewConnectionError
from urllib3.util.connection import is_connection_dropped

from aiflux.engines.secrets import Secrets
from aiflux.errors import ConfigError
from aiflux.util.process_limits import exhausted, start_thread
from aiflux.util.text import context, error_text, public_url, terminal_line

CONNECT_TIMEOUT = 10.0
_CERT_FILE = "SSL_CERT_FILE"
_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", _CERT_FILE)
_WATCH_INTERVAL = 0.25
_MARGIN = 5.0
LARGEST_ANSWER = 1 << 28
"""Bytes; the embeddings of 2,048 texts are a tenth of it."""


def ca_bundle(engine_ca: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the file or directory of certificates to trust; None for those of certifi.

    Raises:
        ConfigError: it cannot be read, or contains no certificate.
    """
    given = {"--engine-ca": engine_ca, **{name: environ.get(name) for name in _CA_VARIABLES}}
    for name, value in given.items():
        if value:
            _check_certificates(name, Path(value))
            return str(value)
    return None


def check_cert_file(environ: Mapping[str, str]) -> None:
    """Check SSL_CERT_FILE for a program or library that reads it itself.

    If the file is missing, OpenSSL and Go trust no certificate, without naming the variable.

    Raises:
        ConfigError: it cannot be read, or contains no certificate.
    """
    value = environ.get(_CERT_FILE)
    if value:
        _check_certificates(_CERT_FILE, Path(value))


def _check_certificates(name: str, path: Path) -> None:
    """Read certificates as a test; in a directory, OpenSSL reads them on demand."""
    try:
        if not path.is_dir():
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # includes ssl.SSLError
        raise ConfigError(
            f"{name}: no certificates can be read from {path}: {error.strerror or error}",
            "use a PEM file with certificates, such as /etc/ssl/certs/ca-certificates.crt",
        ) from error


class ExchangeError(Exception):
    """No complete answer arrived.

    Attributes:
        code: ``timeout``, ``aborted``, ``refused`` or ``connection``.
        remedy: what to change if waiting or retrying cannot help; else empty.
    """

    def __init__(self, code: str, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete HTTP answer.

    Attributes:
        retry_after: seconds that the server asks to wait, or None.
        location: target of a redirect, without user, password and query; else empty.
        content_type: as the server names it, or empty.
    """

    status: int
    body: bytes
    retry_after: float | None = None
    location: str = ""
    content_type: str = ""


class _Exchange:
    """The watchdog's state of a running exchange."""

    __slots__ = ("connection", "deadline", "sock", "verdict")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.connection: HTTPConnection | None = None
        self.sock: socket.socket | None = None
        self.verdict: str | None = None

    def end(self, verdict: str) -> None:
        self.verdict = verdict
        sock = self.sock
        if sock is None and self.connection is not None:
            sock = self.connection.sock
        if sock is not None:
            try:
                sock.shutdown(SHUT_RDWR)
            except OSError:
                return  # it has ended by itself


class PendingExchange(_Exchange):
    """An exchange on a kept connection, received by an event loop; see ``Client.begin``.

    Attributes:
        url: path of the endpoint.
        kept: the connection.
        complete: whether an answer of the usual form has arrived: status 200 with a length and
            without an encoding.
    """

    __slots__ = (
        "_error",
        "_largest",
        "_received",
        "_socket",
        "_span",
        "_unsent",
        "complete",
        "kept",
        "url",
    )

    def __init__(
        self,
        connection: HTTPConnection,
        sock: socket.socket,
        url: str,
        deadline: float,
        largest: int,
    ) -> None:
        super().__init__(deadline)
        self._largest = largest
        self.url = url
        self.kept = connection
        self.complete = False
        self.sock = self._socket = sock
        self._error: OSError | None = None
        self._unsent = b""
        self._received = bytearray()
        self._span: tuple[int, int] | None = (0, 0)

    def fileno(self) -> int:
        """Return the socket's descriptor, for the event loop."""
        return self._socket.fileno()

    @property
    def stuck(self) -> bool:
        """Whether a part of the request could not be sent without waiting."""
        return bool(self._unsent)

    def send(self, request: bytes) -> None:
        """Send what the socket takes at once."""
        if self._socket.gettimeout() != 0:
            self._socket.setblocking(False)
        try:
            sent = self._socket.send(request)
        except OSError:
            sent = 0  # ``wait`` tries again, or meets the same error
        self._unsent = request[sent:]

    def receive(self) -> bool:
        """Receive what has arrived; return whether to call ``Client.finish``.

        That waits for the rest of the answer, unless this exchange is ``complete``.
        """
        try:
            data = self._socket.recv(_BLOCK)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError as error:
            self._error = error
            return True
        received = self._received
        received += data
        if self._span == (0, 0):
            self._span = _body_span(received, self._largest)
        if self._span is None or not data:
            return True
        end = self._span[1]
        self.complete = 0 < end <= len(received)
        return self.complete

    def answer(self) -> tuple[Answer, bool]:
        """Return the complete answer, and whether nothing follows it."""
        start, end = self._span or (0, 0)
        body = bytes(memoryview(self._received)[start:end])
        kind = _content_type(self._received, start)
        return Answer(200, body, content_type=kind), len(self._received) == end

    def wait(self, timeout: float) -> PlainResponse:
        """Send the rest of the request, and wait for the head of the answer.

        Args:
            timeout: limit on each operation of the socket, in seconds.
        """
        if self._error is not None:
            raise self._error
        self._socket.settimeout(timeout)
        with suppress(BrokenPipeError):  # as in urllib3: the server may have answered already
            self._socket.sendall(self._unsent)
        sock: Any = _Resumed(self._received, self._socket)
        response = PlainResponse(sock, method="POST")
        response.begin()
        return response


class _Resumed(io.RawIOBase):
    """A socket of which some bytes have been received already."""

    def __init__(self, received: bytearray, sock: socket.socket) -> None:
        self._received = received
        self._sock = sock

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return a file to read from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._received:
            return self._sock.recv_into(buffer)
        first = self._received[: len(buffer)]
        buffer[: len(first)] = first
        del self._received[: len(first)]
        return len(first)


def _body_span(received: bytearray, largest: int) -> tuple[int, int] | None:
    """Return start and end of an answer's body; (0, 0) if unknown yet, None if it is not usual."""
    found = _HEAD_END.search(received)
    if found is None:
        usual = _USUAL.startswith(received[: len(_USUAL)]) and len(received) < _LONGEST_HEAD
        return (0, 0) if usual else None
    start = found.end()
    lengths = _LENGTH.findall(received, 0, start)
    if not received.startswith(_USUAL) or len(lengths) != 1 or _UNUSUAL.search(received, 0, start):
        return None
    size = int(lengths[0])
    return None if size > largest else (start, start + size)


def _content_type(received: bytearray, end: int) -> str:
    found = _TYPE.search(received, 0, end)
    return "" if found is None else found[1].decode("latin-1").strip()


_BLOCK = 1 << 16
_LARGEST_AT_ONCE = 1 << 18
_LONGEST_HEAD = 1 << 16
_USUAL = b"HTTP/1.1 200 "
_HEAD_END = re.compile(rb"\n\r?\n")
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n", re.IGNORECASE)
_TYPE = re.compile(rb"\ncontent-type:([^;\r\n]*)", re.IGNORECASE)
# A header in several lines, a line without a carriage return, an encoded body, or a connection
# that is not kept.
_UNUSUAL = re.compile(
    rb"\n[ \t]|[^\r]\n|\n(?:transfer|content)-encoding:|\nconnection:(?![ \t]*keep-alive[ \t]*\r)",
    re.IGNORECASE,
)

_current = threading.local()


class _Tracked:
    """A connection of urllib3 that the running exchange knows."""

    sock: socket.socket | None

    def request(self, *args: Any, **kwargs: Any) -> None:
        _current.exchange.connection = self
        super().request(*args, **kwargs)  # type: ignore[misc]

    def getresponse(self) -> Any:
        # The connection forgets its socket if the server closes it after the answer.
        _current.exchange.sock = self.sock
        return super().getresponse()  # type: ignore[misc]


class _TrackedConnection(_Tracked, HTTPConnection):
    pass


class _TrackedTLSConnection(_Tracked, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _TrackedConnection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TrackedTLSConnection


class _SocketConnection(_TrackedConnection):
    """A connection to a Unix socket; host and port have no meaning."""

    def __init__(self, path: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._path = path

    def _new_conn(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        # Python's own timeout makes connect(2) fail at once when the server's queue is full.
        patience = struct.pack("ll", int(CONNECT_TIMEOUT), 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        try:
            connection.connect(self._path)
        except OSError as error:
            connection.close()
            raise NewConnectionError(self, innermost(error)) from error
        return connection


class _SocketPool(_Pool):
    def __init__(self, path: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ConnectionCls = partial(_SocketConnection, path)  # type: ignore[assignment]


_SOCKET = "unix:"


def socket_url(path: Path) -> str:
    """Return the ``base_url`` of a server that listens on a Unix socket."""
    return f"{_SOCKET}{path}"


class Client:
    """Sends requests to one engine. Thread-safe; keeps connections alive.

    Args:
        base_url: e.g. ``http://127.0.0.1:11434``, without ``/v1``; or see ``socket_url``.
        timeout: time limit of an exchange in seconds, from connecting to the last byte.
        connections: number of connections to keep.
        api_key: sent as a bearer token, or unchanged if it starts with ``Basic `` or ``Bearer ``.
        ca: file or directory of certificates to trust instead of the usual ones.
        largest: bytes of an answer; a larger one is not read to its end.

    Attributes:
        secrets: hides the key in what the server sends.
    """

    def __init__(
        self,
        base_url: str,
        timeout: float,
        connections: int,
        api_key: str | None = None,
        ca: str | None = None,
        largest: int = LARGEST_ANSWER,
    ) -> None:
        self.base_url = base_url
        self._largest = largest
        self.secrets = Secrets.of(api_key)
        self._timeout = timeout
        self._verify: bool | str = ca or True
        self._adapter = HTTPAdapter(pool_connections=1, pool_maxsize=connections)
        self._address = base_url
        pools: dict[str, Any] = {"http": _Pool, "https": _TLSPool}
        if base_url.startswith(_SOCKET):
            self._address = "http://localhost"
            pools["http"] = partial(_SocketPool, base_url.removeprefix(_SOCKET))
        self._adapter.poolmanager.pool_classes_by_scheme = pools
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            whole = api_key.startswith(("Basic ", "Bearer "))
            self._headers["Authorization"] = api_key if whole else f"Bearer {api_key}"
        self._prepared: dict[tuple[str, str], requests.PreparedRequest] = {}
        self._heads: dict[str, bytes] = {}
        self._idle: list[HTTPConnection] = []
        self._exchanges: set[_Exchange] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watchdog = start_thread(self._watch, "watchdog")

    def post(self, url: str, payload: bytes) -> Answer:
        """Send one request and return the complete answer, whatever its status.

        Raises:
            ExchangeError: no complete answer arrived.
        """
        return self._exchange(self._request("POST", url, payload), self._timeout)

    def get(self, url: str, timeout: float) -> Answer:
        """Send a GET request, for example for the list of models; see ``post``."""
        return self._exchange(self._request("GET", url, None), timeout)

    def begin(self, url: str, payload: bytes) -> PendingExchange | None:
        """Send a request like ``post``, but without waiting for anything.

        Returns:
            None if no connection is open and idle, or if the request is too large.
        """
        connection = self._idle_connection()
        if connection is None or connection.sock is None:
            return None
        if len(payload) > _LARGEST_AT_ONCE:
            self._pool._put_conn(connection)  # for ``post``
            return None
        deadline = time.monotonic() + self._timeout
        exchange = PendingExchange(connection, connection.sock, url, deadline, self._largest)
        with self._lock:
            self._exchanges.add(exchange)
        exchange.send(b"%b%d\r\n\r\n%b" % (self._head(url), len(payload), payload))
        return exchange

    def finish(self, exchange: PendingExchange) -> Answer:
        """Return the answer of an exchange; see ``post``. Waits for it if it is not complete."""
        if not exchange.complete:
            return self._complete(exchange, partial(self._read, exchange), self._timeout)
        answer, keep = exchange.answer()
        self._release(exchange, keep=keep)
        return answer

    def _release(self, exchange: PendingExchange, *, keep: bool) -> None:
        with self._lock:
            self._exchanges.discard(exchange)
            keep = keep and not self._closed.is_set()
            if keep:
                self._idle.append(exchange.kept)
        if not keep:
            exchange.kept.close()

    def _exchange(self, request: requests.PreparedRequest, timeout: float) -> Answer:
        exchange = _Exchange(time.monotonic() + timeout)
        _current.exchange = exchange
        with self._lock:
            self._exchanges.add(exchange)
        return self._complete(exchange, partial(self._send, request, timeout), timeout)

    def _complete(
        self, exchange: _Exchange, receive: Callable[[], Answer], timeout: float
    ) -> Answer:
        try:
            answer = receive()
        except (requests.RequestException, HTTPError, HTTPException, OSError) as error:
            stop = exhausted(error)
            if stop is not None:
                raise stop from error
            raise self._explain(exchange, error, timeout) from error
        finally:
            with self._lock:
                self._exchanges.discard(exchange)
        if exchange.verdict is not None:
            # A socket that was shut down within the headers looks like a complete, empty answer.
            raise self._explain(exchange, OSError("shut down"), timeout)
        return answer

    def abort(self) -> None:
        """Abort all running exchanges; their requests count as not attempted."""
        self._end_all("aborted")

    def close(self) -> None:
        """Close the connections and stop the watchdog."""
        self._closed.set()
        self._watchdog.join()
        self._adapter.close()
        with self._lock:
            while self._idle:
                self._idle.pop().close()
        self._end_all("closed")  # an event loop has no other limit on its exchanges

    def _end_all(self, verdict: str) -> None:
        with self._lock:
            for exchange in self._exchanges:
                exchange.end(verdict)

    def _request(self, method: str, url: str, payload: bytes | None) -> requests.PreparedRequest:
        prepared = self._prepared.get((method, url))
        if prepared is None:
            prepared = requests.Request(method, self._address + url, self._headers).prepare()
            self._prepared[method, url] = prepared
        copy = requests.PreparedRequest()
        copy.method, copy.url, copy.body = method, prepared.url, payload
        copy.headers = prepared.headers.copy()
        if payload is not None:
            copy.headers["Content-Length"] = str(len(payload))
        return copy

    def _send(self, request: requests.PreparedRequest, timeout: float) -> Answer:
        # The socket's own timeout is later than the deadline, so the watchdog acts first.
        timeouts = (min(CONNECT_TIMEOUT, timeout), timeout + _MARGIN)
        response = self._adapter.send(request, stream=True, timeout=timeouts, verify=self._verify)
        raw = response.raw
        answer = self._answer(raw, str(request.url))
        raw.release_conn()
        return answer

    def _read(self, exchange: PendingExchange) -> Answer:
        """Send and receive what is left of an exchange; its socket waits from here on."""
        keep = False
        try:
            plain = exchange.wait(self._timeout + _MARGIN)
            headers = HTTPHeaderDict(plain.msg.items())
            raw = HTTPResponse(
                plain, headers, plain.status, preload_content=False, original_response=plain
            )
            keep = not plain.will_close
            return self._answer(raw, self._address + exchange.url)
        except BaseException:
            keep = False
            raise
        finally:
            self._release(exchange, keep=keep)

    def _answer(self, raw: HTTPResponse, url: str) -> Answer:
        body = raw.read(self._largest + 1, decode_content=True)
        if len(body) > self._largest:
            raw.close()
            raise OSError(f"the answer is larger than {self._largest:,} bytes")
        location = raw.headers.get("Location", "")
        if location:
            location = public_url(urljoin(url, location))
        content_type = raw.headers.get("Content-Type", "").partition(";")[0].strip()
        return Answer(raw.status, body, _retry_after(raw.headers), location, content_type)

    @cached_property
    def _pool(self) -> Any:
        """The connections that ``requests`` keeps to the engine."""
        request = self._request("GET", "/", None)
        return self._adapter.get_connection_with_tls_context(request, self._verify)

    def _idle_connection(self) -> HTTPConnection | None:
        """Return a connection that is open and idle, if there is one."""
        while (connection := self._kept_connection()) is not None:
            if not is_connection_dropped(connection):
                return connection
            connection.close()
        return None

    def _kept_connection(self) -> HTTPConnection | None:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        idle: queue.LifoQueue[HTTPConnection | None] | None = self._pool.pool
        if idle is None:  # the client is closed
            return None
        try:
            connection = idle.get(block=False)
        except queue.Empty:
            return None
        if connection is None:
            idle.put(None)  # urllib3's placeholder for a connection that was never opened
        return connection

    def _head(self, url: str) -> bytes:
        """Return the head of a request as urllib3 sends it, up to the value of Content-Length."""
        head = self._heads.get(url)
        if head is None:
            request = self._request("POST", url, b"")
            address = urlsplit(str(request.url))
            default = ":443" if address.scheme == "https" else ":80"
            headers = {
                "Host": address.netloc.rpartition("@")[2].removesuffix(default),
                "Accept-Encoding": "identity",
                "User-Agent": _get_default_user_agent(),
                **request.headers,
            }
            del headers["Content-Length"]
            lines = (f"{name}: {value}\r\n" for name, value in headers.items())
            text = f"POST {request.path_url} HTTP/1.1\r\n{''.join(lines)}Content-Length: "
            self._heads[url] = head = text.encode("latin-1")
        return head

    def hidden(self, answer: Answer) -> Answer:
        """Return an answer without the key, in case the server echoes it."""
        secrets = self.secrets
        location = secrets.hide(answer.location)
        return replace(answer, body=secrets.hide_bytes(answer.body), location=location)

    def _explain(self, exchange: _Exchange, error: Exception, timeout: float) -> ExchangeError:
        if exchange.verdict == "timeout" or isinstance(error, requests.ReadTimeout):
            return ExchangeError("timeout", f"no complete answer within {timeout:g} s")
        if exchange.verdict == "aborted":
            return ExchangeError("aborted", "ended by the worker")
        where = public_url(self.base_url)
        found = _known_cause(error)
        if found is not None:
            code, what, remedy = found
            return ExchangeError(code, self.secrets.hide(f"{where}: {what}"), remedy)
        if isinstance(error, RequestsConnectionError) and "NewConnectionError" in repr(error):
            return ExchangeError(
                "refused", f"{where} does not accept connections ({innermost(error)})"
            )
        if isinstance(error, requests.ConnectTimeout):
            return ExchangeError("refused", f"{where} does not respond")
        text = terminal_line(self.secrets.hide(innermost(error)).strip())
        what, remedy = "broke the connection:", ""
        if any(type(each) is BadStatusLine for each in _causes(error)):
            what = "does not answer in HTTP, but with"
            remedy = "check the port in --engine-url: another program listens there"
        return ExchangeError("connection", f"{where} {what} {text}", remedy)

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_INTERVAL):
            now = time.monotonic()
            with self._lock:  # until it is ended, no exchange may release its connection
                for exchange in self._exchanges:
                    if exchange.deadline < now:
                        exchange.end("timeout")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes; urllib3 also keeps causes in ``reason``."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        linked = (context(each), each.__cause__, getattr(each, "reason", None), *each.args)
        waiting += [other for other in linked if isinstance(other, BaseException)]


def _known_cause(error: BaseException) -> tuple[str, str, str] | None:
    """Return code, message and remedy of a failure that waiting cannot fix."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            seen, remedy = _VERIFICATION.get(cause.verify_code, _UNTRUSTED)
            return "connection", f"{seen}: {cause.verify_message}", remedy
        if isinstance(cause, ssl.SSLError) and cause.reason in _NOT_TLS:
            return "connection", "the server speaks plain HTTP", "use http:// in --engine-url"
        if isinstance(cause, ssl.SSLError) and not isinstance(
            cause, ssl.SSLEOFError | ssl.SSLZeroReturnError
        ):
            return "connection", f"TLS failed: {cause.reason or cause}", "check --engine-url"
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return "refused", f"unknown host ({cause.strerror})", "check --engine-url"
    return None


_UNTRUSTED = (
    "its certificate is not trusted",
    "pass the certificate of the authority that signed it: --engine-ca FILE (or "
    "REQUESTS_CA_BUNDLE)",
)
_OTHER_NAME = (
    "its certificate is for another address",
    "use a name or address in --engine-url that the certificate contains",
)
_WRONG_TIME = (
    "its certificate, or that of its authority, is not valid now",
    "ask the server's operators to renew it; also check this machine's date (date)",
)
# By X509_V_ERR_*: not yet valid, expired, and the mismatch of a host name or an IP address.
_VERIFICATION = {9: _WRONG_TIME, 10: _WRONG_TIME, 62: _OTHER_NAME, 64: _OTHER_NAME}

# OpenSSL's errors for an answer that is not a TLS record; they differ by version.
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
)


def speaks_tls(url: str, timeout: float) -> bool:
    """Return whether the server at a plain ``http://`` address completes a TLS handshake."""
    parts = urlsplit(url)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only detects the protocol; nothing is sent
    try:
        with (
            socket.create_connection((parts.hostname, parts.port or 80), timeout) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname),
        ):
            return True
    except (OSError, ValueError):
        return False


def innermost(error: BaseException) -> str:
    """Return the message of the innermost cause, without the names of libraries."""
    while (below := context(error)) is not None:
        error = below
    return error_text(error)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After in its seconds form (RFC 9110, 10.2.3); dates are ignored."""
    text = headers.get("Retry-After")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        return None

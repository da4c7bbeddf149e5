"""Exchanges of an event loop on kept connections: the same answers and errors as on new ones."""

from __future__ import annotations

import gzip
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from typing import IO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiflux.engines.http import Answer, Client, ExchangeError
from tests.tools.faulty_engine import FaultyEngine

URL = "/v1/completions"
FIRST = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def _head(file: IO[bytes]) -> bytes:
    """Read the head of a request; return an empty one once the client has closed."""
    lines = []
    while (line := file.readline()).strip():
        lines.append(line)
    return b"".join(lines)


class Server:
    """Answers the payload ``first`` with FIRST, and others with the given pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.close = False
        self.heads: list[bytes] = []
        self._closing: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def stop(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        closes = False
        with connection, connection.makefile("rb") as file, suppress(OSError):
            while not closes and (head := _head(file)):
                length = next(line for line in head.split(b"\r\n") if b"Length" in line)
                first = file.read(int(length.split(b":")[1])) == b"first"
                self.heads.append(head)
                # Decided before the client has the answer and goes on.
                closes = self.close and not first
                if closes:
                    self._closing.append(connection)
                for piece in [FIRST] if first else self.pieces:
                    time.sleep(0.001)
                    connection.sendall(piece)
        if closes:
            self._closing.remove(connection)

    def settle(self) -> None:
        """Wait until the connections are closed that are to be closed after their answer."""
        deadline = time.monotonic() + 30
        while self._closing:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with closing(Client(server.url, 5.0, 4)) as client:
        yield client


@pytest.fixture(scope="module")
def threaded(server: Server) -> Iterator[Client]:
    with closing(Client(server.url, 5.0, 4)) as client:
        yield client


def outcome(exchange: Callable[[], Answer]) -> Answer | tuple[str, str]:
    try:
        return exchange()
    except ExchangeError as error:
        return error.code, error.message


def looped(client: Client, payload: bytes = b"{}") -> Answer:
    """Make an exchange as the dispatcher does."""
    exchange = client.begin(URL, payload)
    if exchange is None:
        client.post(URL, b"first")
        exchange = client.begin(URL, payload)
    assert exchange is not None, "a connection is idle"
    while not exchange.stuck:
        select.select([exchange], [], [])
        if exchange.receive():
            break
    return client.finish(exchange)


BODIES = {
    "length": lambda body: b"Content-Length: %d\r\n\r\n%b" % (len(body), body),
    "lower": lambda body: (
        b"content-type: text/plain; x=1\r\ncontent-length:%d\r\n\r\n%b" % (len(body), body)
    ),
    "two lengths": lambda body: (
        b"Content-Length: %d\r\nContent-Length: %d\r\n\r\n%b" % (len(body), len(body), body)
    ),
    "keep": lambda body: (
        b"Connection: keep-alive\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    ),
    "line feeds": lambda body: b"Content-Length: %d\n\n%b" % (len(body), body),
    "folded": lambda body: b"X: a\r\n b\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
    "chunked": lambda body: (
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        if body
        else b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "gzip": lambda body: (
        b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b"
        % (len(gzip.compress(body, mtime=0)), gzip.compress(body, mtime=0))
    ),
    "until closed": lambda body: b"\r\n%b" % body,
    "closing": lambda body: (
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    ),
    "cut": lambda body: b"Content-Length: %d\r\n\r\n%b" % (len(body) + 5, body),
    "no head": lambda body: b"Content-Length: 7",
    "wait": lambda body: (
        b"Retry-After: 3\r\nLocation: /x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    ),
}
CLOSED = ("until closed", "closing", "cut", "no head")
STARTS = (b"HTTP/1.1 200 OK", b"HTTP/1.1 200", b"HTTP/1.0 200 OK", b"HTTP/1.1 201 Created",
          b"HTTP/1.1 503 No", b"HTTP/1.1 307 Go", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK",
          b"SSH-2.0", b"")  # fmt: skip


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    start=st.sampled_from(STARTS),
    form=st.sampled_from(sorted(BODIES)),
    body=st.binary(max_size=300) | st.just(bytes(200_000)),
    cuts=st.lists(st.integers(0, 400), max_size=3),
)
def test_answers_of_every_form_are_the_same_as_in_a_thread(
    server: Server,
    client: Client,
    threaded: Client,
    start: bytes,
    form: str,
    body: bytes,
    cuts: list[int],
) -> None:
    whole = start + b"\r\n" + BODIES[form](body)
    places = [0, *sorted(cuts), len(whole)]
    server.pieces = [whole[a:b] for a, b in pairwise(places) if a < b]
    server.close = form in CLOSED or b"1.1" not in start
    expected = outcome(lambda: threaded.post(URL, b"{}"))
    server.settle()
    seen = outcome(lambda: looped(client))
    server.settle()  # the next exchange must not meet a connection that is about to close
    if isinstance(expected, Answer) and isinstance(seen, Answer) and seen.status == 200:
        assert (seen.body, seen.content_type) == (expected.body, expected.content_type)
    else:
        assert seen == expected


def test_the_same_request_is_sent(server: Server) -> None:
    server.pieces, server.close = [FIRST], False
    server.heads.clear()
    with closing(Client(server.url, 5.0, 4, api_key="hunter22")) as client:
        client.post(URL, b"{}")
        looped(client)
        looped(client)
    first, *others = [sorted(head.split(b"\r\n")) for head in server.heads]
    assert others == [first, first]


def test_a_connection_is_kept_until_the_server_closes_it(server: Server, client: Client) -> None:
    server.pieces, server.close = [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1"], False
    assert looped(client).body == b"1"
    server.close = True
    assert looped(client).body == b"1"
    server.settle()
    assert client.begin(URL, b"{}") is None
    assert looped(client).body == b"1", "on a new connection"
    server.settle()


def test_a_large_request_is_left_to_a_thread(server: Server, client: Client) -> None:
    server.pieces, server.close = [FIRST], False
    assert looped(client, bytes(1 << 18)).body == b"{}"
    assert client.begin(URL, bytes(1 << 20)) is None
    assert looped(client).body == b"{}", "and the connection is still idle"


@pytest.mark.parametrize("fault", ["hang", "drip", "closing", "headers", "reset"])
def test_the_deadline_and_an_abort_end_it(fault: str) -> None:
    payload = b'{"prompt": "%s"}' % fault.encode()
    with FaultyEngine() as engine, closing(Client(engine.url, 0.5, 4)) as client:
        client.post(URL, b'{"prompt": "x"}')
        seen = outcome(lambda: looped(client, payload))
        assert seen == outcome(lambda: client.post(URL, payload))
        assert isinstance(seen, tuple)
        assert seen[0] == ("connection" if fault == "reset" else "timeout")
    if fault != "reset":
        with FaultyEngine() as engine, closing(Client(engine.url, 60.0, 4)) as client:
            client.post(URL, b'{"prompt": "x"}')
            threading.Timer(0.1, client.abort).start()
            assert outcome(lambda: looped(client, payload)) == ("aborted", "ended by the worker")


def test_closing_the_client_ends_it() -> None:
    with FaultyEngine() as engine:
        client = Client(engine.url, 60.0, 4)
        client.post(URL, b'{"prompt": "x"}')
        threading.Timer(0.1, client.close).start()
        seen = outcome(lambda: looped(client, b'{"prompt": "hang"}'))
    assert isinstance(seen, tuple)
    assert seen[0] == "connection"


def test_an_answer_that_is_too_large_is_refused(server: Server) -> None:
    body = b"x" * 4001
    server.pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)]
    server.close = False
    with closing(Client(server.url, 5.0, 4, largest=4000)) as client:
        for _ in range(2):
            with pytest.raises(ExchangeError, match="larger than 4,000 bytes"):
                looped(client)

"""Engines to measure the worker against: ``python -m bench.engine``, one process each.

``--slots N`` simulates continuous batching (``bench.decoding``) in real time. A step ends when its
cost has passed since it started, however late the process is woken. A request takes part in steps
that start after its arrival. ``--slots 0`` answers at once. Only the part of HTTP/1.1 that clients
of the OpenAI API need is implemented, so that the engine uses little of the shared machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any, Protocol

from bench.decoding import Cost, Decoder, mixed_lengths

MODEL = "m:1"
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_HEADERS_END = b"\r\n\r\n"
_BACKLOG = 4096
_ANSWER_BYTES = 1024

Reply = Callable[[bytes], None]


class Service(Protocol):
    """A service that answers requests."""

    def post(self, body: bytes, reply: Reply) -> None:
        """Accept a request; ``reply`` is called with the answer's JSON, now or later."""

    def stats(self) -> dict[str, Any]:
        """Return the content of ``GET /stats``; times are from the system's monotonic clock."""


def answer(tokens: int, size: int = _ANSWER_BYTES) -> bytes:
    """Return a chat completion of about ``size`` bytes that reports ``tokens`` tokens."""
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ""},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": tokens + 9},
    }
    missing = size - len(json.dumps(body))
    body["choices"][0]["message"]["content"] = "word " * max(1, missing // 5)  # type: ignore[index]
    return json.dumps(body).encode()


class Instant:
    """Answers every request immediately, always with the same answer."""

    def __init__(self) -> None:
        self._answer = answer(200)
        self._done = 0
        self._first: float | None = None
        self._last = 0.0

    def post(self, body: bytes, reply: Reply) -> None:
        """Answer."""
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last
        self._done += 1
        reply(self._answer)

    def stats(self) -> dict[str, Any]:
        """Return the count and the times."""
        makespan = 0.0 if self._first is None else self._last - self._first
        return {"done": self._done, "first": self._first, "makespan": makespan}


class Others:
    """Another user, who keeps some requests in flight for some time.

    Args:
        in_flight: number of requests, of mixed lengths.
        start, end: seconds after the first measured request.
    """

    def __init__(self, in_flight: int, start: float, end: float) -> None:
        self._in_flight = in_flight
        self._start, self._end = start, end
        self._lengths = cycle(mixed_lengths(1000))
        self._waiting = 0

    def top_up(self, decoder: Decoder, now: float) -> None:
        """Send the missing requests."""
        since = 0.0 if decoder.first is None else now - decoder.first
        while self._start <= since < self._end and self._waiting < self._in_flight:
            decoder.submit((self._answered, 1), next(self._lengths), now)
            self._waiting += 1

    def _answered(self, body: bytes) -> None:
        self._waiting -= 1


class Simulated:
    """Continuous batching in real time."""

    def __init__(self, slots: int, cost: Cost, others: Others) -> None:
        self._decoder = Decoder(slots, cost)
        self._others = others
        self._last_arrival = 0.0
        self._stepping = False
        self._step_end = 0.0
        self._loop = asyncio.get_running_loop()

    def post(self, body: bytes, reply: Reply) -> None:
        """Queue a request whose length is its ``max_tokens``."""
        tokens = int(json.loads(body)["max_tokens"])
        self._last_arrival = self._loop.time()
        self._decoder.submit((reply, tokens), tokens, self._last_arrival)
        if not self._stepping:
            self._advance()

    def stats(self) -> dict[str, Any]:
        """Return the decoder's statistics."""
        decoder = self._decoder
        return {
            "slots": decoder.slots,
            "done": decoder.done,
            "steps": decoder.steps,
            "first": decoder.first,
            "makespan": decoder.makespan,
            "busy": decoder.busy,
            "occupancy": decoder.occupancy,
            "busy_by_second": decoder.busy_by_second,
            "arriving": self._last_arrival - (decoder.first or 0.0),
        }

    def _advance(self) -> None:
        """End finished steps and start the next ones."""
        while True:
            if self._stepping:
                if self._loop.time() < self._step_end:
                    self._loop.call_at(self._step_end, self._advance)
                    return
                for reply, tokens in self._decoder.end():
                    reply(answer(tokens, 512))
            self._others.top_up(self._decoder, self._decoder.now)
            end = self._decoder.begin()
            self._stepping = end is not None
            if end is None:
                return
            self._step_end = end


class Connection(asyncio.Protocol):
    """One client connection."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the transport, and with it pending answers."""
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """Serve all complete messages."""
        self._buffer += data
        while True:
            headers = self._buffer.find(_HEADERS_END)
            if headers < 0:
                return
            found = _LENGTH.search(self._buffer, 0, headers + 2)
            start = headers + len(_HEADERS_END)
            end = start + (int(found.group(1)) if found else 0)
            if len(self._buffer) < end:
                return
            message, self._buffer = self._buffer[:end], self._buffer[end:]
            self._serve(message, start)

    def _serve(self, message: bytes, start: int) -> None:
        if message.startswith(b"POST /v1/"):
            self._service.post(message[start:], self._reply)
        elif message.startswith(b"GET /stats"):
            usage = resource.getrusage(resource.RUSAGE_SELF)
            cpu = {"engine_cpu": usage.ru_utime + usage.ru_stime}
            self._reply(json.dumps(self._service.stats() | cpu).encode())
        elif message.startswith(b"GET /api/tags"):
            self._reply(json.dumps({"models": [{"name": MODEL}]}).encode())
        else:
            self._reply(json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())

    def _reply(self, body: bytes) -> None:
        if self._transport is not None:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            )


async def serve(slots: int, cost: Cost, others: Others, port: int = 0) -> None:
    """Serve on a loopback port (0: a free one), which is printed, until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    service: Service = Simulated(slots, cost, others) if slots else Instant()
    server = await loop.create_server(
        lambda: Connection(service), "127.0.0.1", port, backlog=_BACKLOG
    )
    try:
        print(server.sockets[0].getsockname()[1], flush=True)
        await stopped.wait()
    except BrokenPipeError:
        sys.stdout = None  # who started it was interrupted; nothing is left to be flushed
    server.close()


def main(argv: list[str] | None = None) -> None:
    """Serve."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--base", type=float, default=Cost.base, help="seconds of every step")
    parser.add_argument("--each", type=float, default=Cost.each, help="seconds for each sequence")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--others", type=int, default=0, help="another user's requests in flight")
    parser.add_argument("--others-start", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--others-end", type=float, default=0.0, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    others = Others(arguments.others, arguments.others_start, arguments.others_end)
    cost = Cost(arguments.base, arguments.each)
    asyncio.run(serve(arguments.slots, cost, others, arguments.port))


if __name__ == "__main__":
    main(sys.argv[1:])

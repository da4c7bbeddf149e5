"""The process on another node of an engine: it starts and stops its rank as the worker orders."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from aiflux.engines.gpus import device_settings, visible_devices
from aiflux.engines.process import LOG_SEARCHED, ServerProcess, engine_environment
from aiflux.engines.ranks import (
    ENDED,
    HELLO,
    STOPPED,
    Address,
    RankOrder,
    RankReport,
    node_name,
    own_address,
)
from aiflux.engines.server_log import find_cause
from aiflux.errors import EngineError
from aiflux.util.files import temporary_folder
from aiflux.util.process_limits import start_thread
from aiflux.util.records import from_json, to_json

_POLL = 0.1
_FOLDER = Path("/tmp")  # noqa: S108 - the container's own; paths of sockets in it are short
_TEXT = 500  # characters in a report
_UNPLAIN = re.compile(r"[^ !#-\[\]-~]")  # would be longer in JSON
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Follower:
    """One of the other ranks: obeys the orders of rank 0 until they end.

    Args:
        first: address of the first node.
        orders: stream to read from.
        reports: stream to write to.
    """

    def __init__(
        self,
        rank: int,
        first: str,
        orders: BinaryIO,
        reports: BinaryIO,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._rank = rank
        self._first = first
        self._orders = orders
        self._reports = reports
        self._environ = environ
        self._gpus = visible_devices(environ)
        self._queue: queue.SimpleQueue[RankOrder | None] = queue.SimpleQueue()
        self._server: ServerProcess | None = None
        self._start = 0

    def run(self) -> None:
        """Obey orders, and report the end of what was started, until the orders end.

        Signals have no effect: Slurm sends them to all processes of a job, but requests in flight
        still need this one. Main thread only.
        """
        for number in _SIGNALS:
            signal.signal(number, _do_nothing)  # unlike SIG_IGN, programs do not inherit it
        address = Address.of_this_node(own_address(self._first))
        start_thread(self._read, "orders")
        with temporary_folder(_FOLDER) as home, suppress(BrokenPipeError), closing(self):
            self._report(HELLO, address=address, first=self._first, gpus=len(self._gpus))
            while (order := self._next()) is not None:
                self._obey(order, home)

    def close(self) -> None:
        """Stop every process that was started."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def _read(self) -> None:
        try:
            for line in self._orders:
                self._queue.put(from_json(RankOrder, json.loads(line)))
        finally:
            self._queue.put(None)

    def _next(self) -> RankOrder | None:
        while True:
            with suppress(queue.Empty):
                return self._queue.get(timeout=_POLL)
            status = self._server.exit_status if self._server is not None else None
            if self._server is not None and status is not None:
                self._report_end(status, self._server.log_tail(LOG_SEARCHED))

    def _obey(self, order: RankOrder, home: Path) -> None:
        self.close()
        if not order.commands:
            self._report(STOPPED, start=order.start)
            return
        command = order.commands[self._rank - 1]
        settings = {**device_settings(self._environ, self._gpus), **command.settings}
        log = Path(order.log)
        self._start = order.start
        self._server = ServerProcess(
            command.words,
            engine_environment(self._environ, home, settings),
            log.with_name(f"{log.stem}-rank-{self._rank}{log.suffix}"),
            f"tcp://{self._first}",  # rank 0 has the ports
        )
        try:
            self._server.start()
        except EngineError as error:
            self._server = None
            self._report(ENDED, f"did not start: {error.message}", start=order.start)

    def _report_end(self, status: int, tail: str) -> None:
        self.close()  # its children may still run
        cause = find_cause(tail)
        last = f": {cause.line}" if cause else "".join(f": {x}" for x in tail.splitlines()[-1:])
        how = f"exited with status {status}{last}"
        if status < 0:
            how = f"was killed by signal {-status}"
        self._report(ENDED, how, start=self._start)

    def _report(self, what: str, text: str = "", **more: Any) -> None:
        node = node_name(self._environ)
        report = RankReport(
            self._rank, what, node=node, text=_UNPLAIN.sub("?", text)[:_TEXT], **more
        )
        self._reports.write(json.dumps(to_json(report)).encode() + b"\n")
        self._reports.flush()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass

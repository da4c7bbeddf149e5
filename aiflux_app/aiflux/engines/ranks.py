"""The ranks of an engine on several nodes: rank 0 orders, and a process on each other node obeys.

The worker and rank 0 run in the batch script, on the job's first node. One ``srun`` runs a process
on each of the other nodes, for as long as the worker runs (see ``slurm/job.sh``). Orders go to
srun's standard input, which it copies to every node; reports come from its standard output. Both
are pipes in the job's private directory, as srun itself is not in the container.

Slurm's own connections were chosen because nothing else has all of this: they need no further port
and no secret; nobody else can write to them; they do not depend on how soon one node sees the files
of another; and their end is noticed. If the worker is killed, every node reads the end of the
orders, and stops its part of the engine. If a process or a node is lost, srun ends, and the worker
reads the end of the reports. The script then makes new pipes, and starts srun again once the worker
opens them, for the next start of the engine.

A line is one JSON object. srun writes up to 1024 bytes at once, so reports are shorter: those of
several nodes never mix.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from aiflux.core.config.settings import RunOptions
from aiflux.errors import ConfigError, EngineError
from aiflux.util.process_limits import start_thread
from aiflux.util.records import from_json, to_json

_POLL = 0.1
_STOP_WAIT = 30.0
HELLO, ENDED, STOPPED = "hello", "ended", "stopped"


@dataclass(frozen=True)
class Address:
    """A node's IP address, and the network interface that has it; "" if unknown."""

    ip: str = ""
    interface: str = ""

    @classmethod
    def of_this_node(cls, ip: str) -> Address:
        """Return an address of this node, with its interface."""
        return cls(ip, _interface_of(ip))


@dataclass(frozen=True)
class RankCommand:
    """What one rank starts.

    Attributes:
        settings: variables in addition to those of ``engine_environment`` and its GPUs.
    """

    words: tuple[str, ...]
    settings: dict[str, str]


@dataclass(frozen=True)
class RankOrder:
    """An order to all ranks: to start their parts of the engine, or to stop them.

    Attributes:
        start: number of the start, which reports repeat.
        commands: those of the ranks 1, 2, ...; none to stop.
        log: the engine's log; each rank writes its own next to it.
    """

    start: int
    commands: tuple[RankCommand, ...] = ()
    log: str = ""


@dataclass(frozen=True)
class RankReport:
    """A report of one rank.

    Attributes:
        what: HELLO, ENDED (by itself) or STOPPED (by order).
        start: the start that it is about.
        node: the node's name.
        address: of the node, on the network over which Slurm connects the nodes.
        first: IP address of the first node there.
        gpus: number of the node's GPUs.
        text: what happened, and the end of the log.
    """

    rank: int
    what: str
    start: int = 0
    node: str = ""
    address: Address = Address()
    first: str = ""
    gpus: int = 0
    text: str = ""


def own_address(other: str) -> str:
    """Return this machine's address on the network on which it reaches another; sends nothing."""
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        address: str = probe.getsockname()[0]
        return address


def _interface_of(address: str) -> str:
    """Return the network interface with an IPv4 address; "" if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # an interface without an address
                # SIOCGIFADDR; the address is at byte 20 of the answer (netdevice(7)).
                answer = fcntl.ioctl(probe.fileno(), 0x8915, asked)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


class Ranks:
    """The other ranks of an engine, as the worker commands them. Thread-safe.

    Args:
        folder: of the pipes ``orders`` and ``reports``.
        count: number of the other ranks.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count
        self._changed = threading.Condition()
        self._orders: BinaryIO | None = None
        self._opened = self._ended = 0  # pairs of pipes; one at a time
        self._known: dict[int, RankReport] = {}
        self._start = 0
        self._running: set[int] = set()
        self._on_end: Callable[[str], None] | None = None

    def connect(self, closing: threading.Event, timeout: float) -> tuple[RankReport, ...]:
        """Wait until a process runs on every node; return their first reports, by rank.

        Args:
            closing: ends the wait.
            timeout: seconds.

        Raises:
            EngineError: there is none on some node.
        """
        deadline = time.monotonic() + timeout
        earlier = self._opened
        while (connected := self._connected()) is None:
            if self._ended > earlier:  # not the step of an earlier start
                raise EngineError(
                    "the step of the job on the other nodes ended before it was ready",
                    "see the job's log",
                )
            if closing.wait(_POLL):
                raise EngineError("the engine was stopped during its start")
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the other nodes were not ready within {timeout:g} s",
                    "see the job's log; or allow more time: --load-timeout SECONDS",
                )
        return connected

    def start(
        self, commands: Sequence[RankCommand], log: Path, on_end: Callable[[str], None]
    ) -> None:
        """Start the ranks' parts of the engine, after ``stop``.

        Args:
            on_end: called once if one of them ends by itself; the others are stopped then. Not
                called from this thread.

        Raises:
            EngineError: the nodes are not connected.
        """
        with self._changed:
            self._start += 1
            self._running = set(range(1, self._count + 1))
            self._on_end = on_end
            self._send(RankOrder(self._start, tuple(commands), str(log)))
            if self._orders is None:
                raise EngineError("the connection to the other nodes ended", "see the job's log")

    def order_stop(self) -> None:
        """Let the ranks stop their parts of the engine; do not wait for it."""
        with self._changed:
            self._on_end = None
            if self._running:
                self._send(RankOrder(self._start))

    def stop(self) -> None:
        """Stop the ranks' parts of the engine; return when no process is left.

        Ranks that do not confirm that are disconnected, and end.
        """
        self.order_stop()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, _STOP_WAIT):
                self._disconnect()

    def close(self) -> None:
        """Let the processes on the other nodes end."""
        with self._changed:
            self._on_end = None
            self._disconnect()

    def _connected(self) -> tuple[RankReport, ...] | None:
        with self._changed:
            if self._orders is None:
                self._open()
            known = [self._known.get(rank) for rank in range(1, self._count + 1)]
            return tuple(each for each in known if each) if all(known) else None

    def _open(self) -> None:
        """Open the pipes, if srun is about to be started; it is when both are open."""
        if self._ended < self._opened:
            return  # an earlier step still has its pipes, which have the same names
        try:
            descriptor = os.open(self._folder / "orders", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return  # nobody reads it yet
        os.set_blocking(descriptor, True)
        self._orders = os.fdopen(descriptor, "wb", buffering=0)
        self._opened += 1
        self._known = {}
        start_thread(self._read, "ranks")

    def _read(self) -> None:
        with suppress(OSError), open(self._folder / "reports", "rb") as reports:
            for line in reports:
                self._note(line)
        with self._changed:
            self._ended += 1
            self._disconnect()
            self._report_end("the step of the job on the other nodes ended")

    def _note(self, line: bytes) -> None:
        try:
            report = from_json(RankReport, json.loads(line))
        except ValueError:
            return  # a site's prolog may print, too
        with self._changed:
            if report.what == HELLO:
                self._known[report.rank] = report
            elif report.start == self._start:
                self._running.discard(report.rank)
                if report.what == ENDED:
                    self._report_end(f"rank {report.rank} on {report.node} {report.text}")
                    self._send(RankOrder(self._start))
            self._changed.notify_all()

    def _report_end(self, text: str) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            start_thread(partial(on_end, text), "rank-end")

    def _send(self, order: RankOrder) -> None:
        if self._orders is None:
            return
        try:
            self._orders.write(json.dumps(to_json(order)).encode() + b"\n")
        except OSError:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._orders is not None:
            with suppress(OSError):
                self._orders.close()
        self._orders = None
        self._known = {}
        self._running = set()
        self._changed.notify_all()


def node_name(environ: Mapping[str, str]) -> str:
    """Return the name of this process's node."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def refuse_several_nodes(options: RunOptions) -> None:
    """Refuse a run whose engine needs several nodes, where there is one.

    Raises:
        ConfigError: it does.
    """
    if options.nodes_per_engine > 1:
        raise missing_nodes(options)


def missing_nodes(options: RunOptions) -> ConfigError:
    """Return the error of ``refuse_several_nodes``."""
    return ConfigError(
        f"nodes_per_engine = {options.nodes_per_engine}, but only a job that `aiflux run` submits "
        "has several nodes",
        "submit the run with `aiflux run`, without --local; or leave nodes_per_engine at 1",
    )

"""vLLM on several nodes: rank 0 is the worker's child, the others run on the job's other nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from aiflux.engines.base import EngineKind, EngineSpec, HttpFactory
from aiflux.engines.process import ServerEndedError, ServerProcess, free_port
from aiflux.engines.ranks import Address, RankCommand, RankReport, missing_nodes, node_name
from aiflux.engines.server_log import find_cause
from aiflux.engines.vllm.engine import VllmEngine
from aiflux.errors import EngineError, RejectedError
from aiflux.util.text import counted


class VllmOnNodes(VllmEngine):
    """A vLLM that divides its model among all GPUs of several nodes.

    vLLM does not notice that a rank was killed before the next request, and its other ranks stay.
    Here, the end of one rank ends all of them, and the next start starts all of them.

    Raises:
        ConfigError: the job has one node, or the model cannot be divided.
    """

    def __init__(self, kind: EngineKind, spec: EngineSpec, make_client: HttpFactory) -> None:
        if spec.ranks is None:
            raise missing_nodes(spec.plan.options)
        self._ranks = spec.ranks
        self._others: tuple[RankReport, ...] = ()
        self._master_port = 0
        self._lost: str | None = None
        super().__init__(kind, spec, make_client)

    def start(self) -> None:
        """Start all ranks and wait until the model is loaded.

        Raises:
            EngineError: a rank did not start, or the model did not load within ``load_timeout``.
        """
        self.stop()
        self._server = None  # a late report about it is not about the next one
        self._others = self._ranks.connect(self._closing, self._options.load_timeout)
        self._refuse_unequal()
        self._address = Address.of_this_node(self._others[0].first)
        self._master_port = free_port("")
        self._lost = None
        try:
            super().start()
        except EngineError as error:
            lost = self._lost
            self.stop()
            if lost is None or isinstance(error, RejectedError):
                raise
            cause = find_cause(lost)
            remedy = f"{cause.remedy}; " if cause and cause.remedy else ""
            logs = f"{remedy}see the logs in {self.spec.log.parent}"
            ended = ServerEndedError(lost, logs, lost)
            raise self._explained(ended) from error
        own = node_name(self.spec.environ)
        self.facts.nodes = (own, *(other.node for other in self._others))

    def stop(self) -> None:
        """Stop every process of every rank."""
        self._ranks.order_stop()
        super().stop()
        self._ranks.stop()

    def _serve(
        self, command: Sequence[str], environment: Mapping[str, str], url: str | None = None
    ) -> ServerProcess:
        server = super()._serve(command, environment, url)
        commands = [
            RankCommand(
                (*command[:-1], str(other.rank), "--headless"), self._settings(other.address)
            )
            for other in self._others
        ]
        self._ranks.start(commands, self.spec.log, partial(self._end, server))
        return server

    def _end(self, server: ServerProcess, why: str) -> None:
        """End rank 0 because another rank ended: its requests break, and so it is restarted.

        A vLLM that may end in good order could answer requests with what it has of them.
        """
        if server is self._server:
            self._lost = f"vLLM: {why}"
            self.spec.say(f"engine {self.index}: {why}")
        server.kill()

    @property
    def _running(self) -> bool:
        return self._lost is None and super()._running

    @property
    def _parts(self) -> int:
        return self._options.nodes_per_engine * max(1, len(self.spec.devices))

    def _command(self, port: int) -> list[str]:
        return [
            *super()._command(port),
            "--distributed-executor-backend", "mp",
            "--nnodes", str(self._options.nodes_per_engine),
            "--master-addr", self._address.ip, "--master-port", str(self._master_port),
            "--node-rank", "0",
        ]  # fmt: skip

    def _refuse_unequal(self) -> None:
        own = len(self.spec.devices)
        for other in self._others:
            if other.gpus != own:
                raise RejectedError(
                    f"the job has {counted(other.gpus, 'GPU')} on {other.node}, but {own} on "
                    f"{node_name(self.spec.environ)}",
                    "request the same number on each node: --gpus-per-node N",
                )

"""The kind of a server at ``--engine-url``, of which only the address is known."""

from __future__ import annotations

import os
from collections.abc import Mapping

from aiflux.core.batch.prompt_lengths import PromptLimit
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.serve_directory import ServeDirectory
from aiflux.engines.base import Engine, EngineKind, EngineSpec, ForeignModelsKind, HttpFactory
from aiflux.engines.own_benchmark import OwnBenchmark
from aiflux.engines.vllm.benchmark import ServeBench
from aiflux.errors import ConfigError


class ExternalKind(ForeignModelsKind):
    """A server that AI-Flux did not start and whose models it does not manage."""

    name = "external"
    title = "external server"
    managed = False
    options_place = "set them where the server is started"
    own_benchmark: OwnBenchmark | None = ServeBench()

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse settings of the server, and a name under which no engine is served.

        Raises:
            UsageError: one is set; or there is no such engine.
        """
        super().refuse_run(options, endpoints)
        ServeDirectory.of_url(options.engine_url or "", os.environ)

    def prompt_limit(self, plan: Plan, model: str) -> PromptLimit | None:
        """Return the context that the server reports, and its tokenizer; None if it is not ready.

        For an engine of `aiflux serve`, its plan has both.
        """
        from aiflux.engines.external.served import running_limit, served_limit

        served = ServeDirectory.of_url(plan.options.engine_url or "", os.environ)
        return running_limit(plan, model) if served is None else served_limit(served, plan, model)

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return the server at ``--engine-url``."""
        from aiflux.engines.external.engine import ExternalEngine
        from aiflux.engines.http import ca_bundle

        options = spec.plan.options
        if options.engine_url is None:
            raise ConfigError("the plan names no server", "plan the run again with --engine-url")
        served = ServeDirectory.of_url(options.engine_url, spec.environ)
        if served is not None:
            from aiflux.engines.external.served import ServedEngine

            return ServedEngine(self, served, make_client, options.engine_wait, spec.say)
        secure = options.engine_url.startswith("https:")
        ca = ca_bundle(options.engine_ca, spec.environ) if secure else None
        return ExternalEngine(
            self,
            options.engine_url,
            lambda url: make_client(url, ca),
            options.engine_wait,
            spec.say,
        )


KIND: EngineKind = ExternalKind()

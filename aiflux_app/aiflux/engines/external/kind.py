"""The kind of a server at ``--engine-url``, of which only the address is known."""

from __future__ import annotations

from aiflux.engines.base import Engine, EngineKind, EngineSpec, ForeignModelsKind, HttpFactory
from aiflux.errors import ConfigError


class ExternalKind(ForeignModelsKind):
    """A server that AI-Flux did not start and whose models it does not manage."""

    name = "external"
    title = "external server"
    managed = False
    options_place = "set them where the server is started"

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return the server at ``--engine-url``."""
        from aiflux.engines.external.engine import ExternalEngine
        from aiflux.engines.http import ca_bundle

        options = spec.plan.options
        if options.engine_url is None:
            raise ConfigError("the plan names no server", "plan the run again with --engine-url")
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

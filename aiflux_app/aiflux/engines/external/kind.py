"""The kind of a server at ``--engine-url``, of which only the address is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiflux.core.batch.input_file import InputRules
from aiflux.core.config.run_options import RunOptions
from aiflux.engines.base import (
    Engine,
    EngineKind,
    EngineSpec,
    FetchContext,
    HttpFactory,
    ModelStore,
    SlotLimits,
)
from aiflux.errors import ConfigError, ModelError
from aiflux.models.catalog import Catalog
from aiflux.models.figures import Figures
from aiflux.models.name import accepts_model, same_model


class ExternalKind:
    """A server that AI-Flux did not start and whose models it does not manage."""

    name = "external"
    title = "external server"
    managed = False
    program = ""
    program_variables: tuple[str, ...] = ()
    cached_program = ""
    # The server may be an Ollama, whose names have two forms; equal names always match.
    input_rules = InputRules(accepts_model)
    slot_limits = SlotLimits()
    store: ModelStore | None = None

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse nothing: the server gets every parameter."""

    def served_name(self, model: str) -> str:
        """Return the name unchanged."""
        return model

    def same_model(self, one: str, other: str) -> bool:
        """Return whether two names mean the same model."""
        return same_model(one, other)

    def distinct_models(self, models: Sequence[str]) -> list[str]:
        """Return the names, each once.

        Raises:
            ConfigError: a name contains a digest.
        """
        for name in models:
            if "@sha256:" in name:
                raise ConfigError(
                    f"the model {name!r} contains a digest, but an engine at --engine-url does not "
                    "report the digests of its models",
                    "omit @sha256:...",
                )
        return [*models]

    def model_path(self, model: str) -> Path | None:
        """Return None: the server has its models."""
        return None

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """Return True: the server has its models."""
        return True

    def catalog_name(self, model: str) -> str | None:
        """Return None: the catalog does not describe a server's models."""
        return None

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """Refuse nothing: the server's models are unknown."""

    def model_digest(self, models_dir: Path, model: str) -> str | None:
        """Return None: the model is not stored here."""
        return None

    def absent_model(self, models_dir: Path, model: str) -> ModelError | None:
        """Return None: no model has to be stored."""
        return None

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Fetch nothing."""
        return False

    def figures(
        self, models_dir: Path | None, model: str, catalog: Catalog | None
    ) -> Figures | None:
        """Return None: the server may have the model in any format."""
        return None

    def one_slot(self, figures: Figures) -> bool:
        """Unknown."""
        return False

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """Return 0: it runs elsewhere."""
        return 0

    def divides(self, figures: Figures, gpus: int) -> bool:
        """Return True: it runs elsewhere."""
        return True

    def adapt_body(self, url: str, body: Mapping[str, Any], served: str) -> Mapping[str, Any]:
        """Change nothing."""
        return {}

    def crash_code(self, status: int, message: str) -> str | None:
        """Apply the generic rule."""
        return None

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

"""What is known of a server at ``--engine-url`` before it is asked: nothing but its address."""

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
    SlotLimits,
)
from aiflux.errors import ConfigError, ModelError
from aiflux.models.catalog import Catalog
from aiflux.models.figures import Figures
from aiflux.models.name import accepts_model, same_model


class ExternalKind:
    """A server that somebody else started. Its models are its own."""

    name = "external"
    title = "external server"
    managed = False
    program = ""
    program_variables: tuple[str, ...] = ()
    cached_program = ""
    # The server may be an Ollama, whose names have two forms; equal names always match.
    input_rules = InputRules(accepts_model)
    slot_limits = SlotLimits()

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """The server gets every parameter."""

    def served_name(self, model: str) -> str:
        """Return the name as it is given."""
        return model

    def same_model(self, one: str, other: str) -> bool:
        """Tell whether two names mean the same model."""
        return same_model(one, other)

    def distinct_models(self, models: Sequence[str]) -> list[str]:
        """Return the names.

        Raises:
            ConfigError: one insists on a digest.
        """
        for name in models:
            if "@sha256:" in name:
                raise ConfigError(
                    f"the model {name!r} insists on a digest, and an engine at --engine-url does "
                    "not tell the digests of its models",
                    "leave @sha256:... out",
                )
        return [*models]

    def model_path(self, model: str) -> Path | None:
        """Nothing: the server has its models."""
        return None

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """The server's models are not ours to look for."""
        return True

    def catalog_name(self, model: str) -> str | None:
        """The catalog does not describe what a server has."""
        return None

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """The server's models are not known here."""

    def absent_model(self, models_dir: Path, model: str) -> ModelError | None:
        """None: no model has to be stored."""
        return None

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Nothing is fetched."""
        return False

    def figures(
        self, models_dir: Path | None, model: str, catalog: Catalog | None
    ) -> Figures | None:
        """Unknown: the server may have the model in any form."""
        return None

    def one_slot(self, figures: Figures) -> bool:
        """Unknown."""
        return False

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """None here: it runs elsewhere."""
        return 0

    def divides(self, figures: Figures, gpus: int) -> bool:
        """Unknown: it runs elsewhere."""
        return True

    def adapt_body(self, url: str, body: Mapping[str, Any], served: str) -> Mapping[str, Any]:
        """The server gets bodies as they are."""
        return {}

    def crash_code(self, status: int, message: str) -> str | None:
        """The generic rule holds."""
        return None

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return the server at ``--engine-url``."""
        from aiflux.engines.external.engine import ExternalEngine, ca_bundle

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

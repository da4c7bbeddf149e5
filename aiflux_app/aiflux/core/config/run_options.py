"""The options of a run that the worker obeys; part of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aiflux.errors import ConfigError


@dataclass(frozen=True)
class RunOptions:
    """How a run is to be done. Times are seconds; None leaves the choice to the worker.

    Attributes:
        model: the run's model; None takes the model that each body names.
        concurrency: requests in flight per engine.
        slots: sequences that an engine decodes in parallel.
        context_length: tokens of context per slot.
        save_frequency: results after which the journal is synced.
        max_retries: further attempts after the first.
        retry_delay: base of the exponential backoff.
        validate: check answers against the JSON Schema that their request asks for.
        revalidate_attempts: times that an answer which does not fit is asked for again.
        max_requeues: times that a job goes back to the queue by itself when its time is up.
        max_failures: a count, or a percentage such as ``"2%"``.
        retry_failed: try those again that failed before the plan was made.
        engine_url: an engine that is up already; None means a bundled Ollama.
        engine_ca: path of the certificates to trust at ``engine_url``.
        model_defaults: parameters that the catalogue has of models, by the name they are served
            under; in a plan, those of its models. They fill only what is left open.
    """

    model: str | None = None
    concurrency: int | None = None
    slots: int | None = None
    context_length: int | None = None
    gpus_per_engine: int = 1
    engine_env: dict[str, str] = field(default_factory=dict)
    save_frequency: int = 64
    max_retries: int = 3
    retry_delay: float = 1.0
    request_timeout: float = 600.0
    validate: bool = False
    revalidate_attempts: int = 2
    max_failures: str = "0"
    max_requeues: int = 20
    drain_seconds: float = 30.0
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    allow_cpu: bool = False
    engine_url: str | None = None
    engine_wait: float = 300.0
    engine_ca: str | None = None
    load_timeout: float = 1800.0
    retry_failed: bool = False
    log_level: str = "INFO"
    model_defaults: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))  # JSON has lists only
        if self.engine_ca is not None:
            object.__setattr__(self, "engine_ca", str(self.engine_ca))  # and no paths
        if self.top_k is not None and self.engine_url is None:
            raise ConfigError(
                "top_k is set, but Ollama's OpenAI API does not know it",
                "leave out --top-k, TOP_K and top_k in aiflux.yaml (aiflux config show tells which "
                "it is), or set it in the model (ollama create, PARAMETER top_k)",
            )

    @property
    def parameters(self) -> dict[str, Any]:
        """Body fields that are filled in where a body lacks them."""
        names = ("max_tokens", "temperature", "top_p", "top_k")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**given, "stop": [*self.stop]} if self.stop else given

    def parameters_of(self, served: str) -> dict[str, Any]:
        """Return the same for one model, whose own defaults are the weakest."""
        return {**self.model_defaults.get(served.lower(), {}), **self.parameters}

    @property
    def advised(self) -> dict[str, dict[str, Any]]:
        """What fills in a body's field that the run leaves open, too, for each model."""
        return left_open(self.model_defaults, self.parameters)

    def allowed_failures(self, requests: int) -> int:
        """Return how many of ``requests`` may fail before the run counts as failed."""
        if self.max_failures.endswith("%"):
            return int(requests * float(self.max_failures[:-1]) / 100)
        return int(self.max_failures)

    def to_json(self) -> dict[str, Any]:
        """Return the options as they stand in the plan."""
        return asdict(self)


def left_open(
    defaults: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the defaults of each model that nothing given takes the place of."""
    left = {
        model: {name: value for name, value in values.items() if name not in given}
        for model, values in defaults.items()
    }
    return {model: values for model, values in left.items() if values}

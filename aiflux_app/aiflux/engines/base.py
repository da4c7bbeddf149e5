"""The seam between AI-Flux and inference engines: the rest of the code knows them by these classes.

A kind is stateless and cheap to import: the login node uses it for names, limits and memory. An
engine is one running server. CONTRIBUTING.md shows how to add a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aiflux.core.batch.request import WITHOUT_TEXT
from aiflux.core.config.run_options import RunOptions
from aiflux.core.runs.plan import Plan, PlanningKind
from aiflux.core.runs.status_file import EngineFacts
from aiflux.errors import InputError, ModelError, RejectedError
from aiflux.models.catalog import Catalog
from aiflux.models.figures import Figures
from aiflux.util.text import joined

if TYPE_CHECKING:
    from aiflux.engines.http import Client  # imports requests


class HttpFactory(Protocol):
    """Makes the client of a server."""

    def __call__(self, url: str, ca: str | None = None) -> Client:
        """Return it.

        Args:
            ca: certificates to trust: a file or a directory.
        """


def refuse_mixed_uses(title: str, endpoints: Mapping[str, int]) -> None:
    """Refuse text, embeddings and reranking in one input, for servers that do one of the three.

    Raises:
        InputError: there are several.
    """
    uses = {url if url in WITHOUT_TEXT else "text" for url in endpoints}
    if len(uses) > 1:
        raise InputError(
            f"requests ask for {joined(sorted(uses))}, and a {title} server does only one of "
            "text, embeddings and reranking",
            "put them into inputs of their own",
        )


@dataclass(frozen=True)
class FetchContext:
    """What a kind needs to fetch a model.

    Attributes:
        environ: the environment, which names the engine's program.
        log: log of what fetches.
        say: told one line where there is something to wait for.
        progress: given each progress object.
        again: fetch the model although it is stored already.
    """

    environ: Mapping[str, str]
    log: Path
    say: Callable[[str], None]
    progress: Callable[[dict[str, Any]], None]
    again: bool = False


@dataclass(frozen=True)
class SlotLimits:
    """Slots of a kind's servers, where a run does not name a number.

    Attributes:
        gpu: on GPUs whose memory is unknown.
        ladder: what is tried where it is known, the most first.
        cpu: on a CPU, at most.
        per_core: on a CPU, for each core.
    """

    gpu: int = 16
    ladder: tuple[int, ...] = (32, 24, 16, 12, 8, 6, 4, 3, 2, 1)  # beyond 32 little is gained
    cpu: int = 4
    per_core: int = 1


@dataclass(frozen=True)
class EngineSpec:
    """One engine of a run: what it serves, on which GPUs, and where it keeps its files.

    Attributes:
        model: as the plan names it.
        devices: GPUs as CUDA_VISIBLE_DEVICES names them; empty means the CPU.
        home: writable folder of its own, removed after the run.
        log: file that its output is appended to.
        environ: the worker's environment.
        say: told one line where there is something to wait for.
    """

    index: int
    plan: Plan
    model: str
    devices: tuple[str, ...]
    home: Path
    log: Path
    environ: Mapping[str, str]
    say: Callable[[str], None]


class EngineKind(PlanningKind, Protocol):
    """One supported type of engine, such as Ollama. Stateless.

    A managed kind has its servers started and stopped by the worker, on the node where it runs.

    Attributes:
        name: in ``--engine``, ``plan.json`` and the image's label.
        title: in messages and in the report.
        program: name of the executable to start; "" where none is.
        program_variables: older names of AIFLUX_ENGINE_PROGRAM for this kind.
        cached_program: where a demo leaves the program, below the cache folder; "" for nowhere.
        slot_limits: slots that suit its servers.
    """

    name: str
    title: str
    program: str
    program_variables: tuple[str, ...]
    cached_program: str
    slot_limits: SlotLimits

    def same_model(self, one: str, other: str) -> bool:
        """Tell whether two names mean the same model."""

    def model_path(self, model: str) -> Path | None:
        """Return what a container has to see of a model besides the models directory."""

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """Tell whether a model is stored completely."""

    def catalog_name(self, model: str) -> str | None:
        """Return the name of a model in the catalog; None where the catalog cannot know it."""

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """Refuse a stored model that the engine cannot use; pass one that is not stored.

        Raises:
            ModelError: it has another digest than its name insists on, or another form.
        """

    def absent_model(self, models_dir: Path, model: str) -> ModelError | None:
        """Return the error of a model that is not stored; None where the job can fetch it."""

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Make sure that a model is stored; return whether it had to be fetched.

        Raises:
            ModelError: it is unknown or not available.
            StorageError: the models directory cannot be written.
        """

    def figures(
        self, models_dir: Path | None, model: str, catalog: Catalog | None
    ) -> Figures | None:
        """Return what the memory of a model depends on; None where it is unknown."""

    def one_slot(self, figures: Figures) -> bool:
        """Tell whether the engine runs a model with one slot, whatever it is given."""

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """Return the least bytes of GPU memory that a model needs, on all ``gpus`` together.

        Args:
            context: tokens of context of each slot.
        """

    def divides(self, figures: Figures, gpus: int) -> bool:
        """Tell whether one server can divide a model among GPUs."""

    def adapt_body(self, url: str, body: Mapping[str, Any], served: str) -> Mapping[str, Any]:
        """Return the fields of a request's body to change for this engine.

        Args:
            url: the request's endpoint.
            served: the model's name as the engine serves it.
        """

    def crash_code(self, status: int, message: str) -> str | None:
        """Return the code of an error answer which means that the engine broke down.

        None leaves the answer to the generic rule. The codes are those of ``engines.outcome``.
        """

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return an engine that is not started yet.

        Raises:
            EngineError: its program is missing.
            ConfigError: an option does not suit it.
        """


class Engine(Protocol):
    """One running server. Thread-safe.

    Attributes:
        client: for its OpenAI API; another one after each start.
        facts: what the status file shows of it.
    """

    kind: EngineKind
    index: int
    client: Client
    facts: EngineFacts

    def start(self) -> None:
        """Return when the model answers. Called again after a crash.

        Raises:
            EngineError: it did not start; a RejectedError where another try cannot help.
        """

    def stop(self) -> None:
        """Stop the server; harmless where none runs."""

    def close(self) -> None:
        """Stop for good, also during a start. From any thread."""

    def is_alive(self) -> bool:
        """Tell whether the server is up; may take a moment to be sure."""

    def is_ready(self) -> bool:
        """Tell whether it accepts requests; asked after a 502, 503 or 504."""

    def max_in_flight(self) -> int | None:
        """Return the requests that keep all its slots busy; None where they are unknown."""

    def model_digest(self) -> str | None:
        """Return the digest of the model that the current start loaded; None if unknown."""

    def was_truncated(self, prompt_tokens: int) -> bool:
        """Tell whether it cut a prompt that it counted as ``prompt_tokens``."""

    def refusal(self, model: str) -> RejectedError | None:
        """Return why requests for a model cannot succeed, according to the server."""

    def offers(self, model: str) -> bool | None:
        """Tell whether it has a model; None where it does not say."""

    def ran(self, asked: str, answered: str | None) -> str:
        """Return the name of the model that gave an answer; RejectedError where it is wrong."""

    def describe(self) -> str:
        """Return where it runs and what it is, for a line of the log."""

"""The seam between AI-Flux and inference engines: the rest of the code uses only these classes.

A kind is stateless and cheap to import: the login node uses it for names, limits and memory. An
engine is one running server. CONTRIBUTING.md shows how to add a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aiflux.core.batch.input_file import InputRules
from aiflux.core.batch.prompt_lengths import PromptLimit
from aiflux.core.batch.request import RESPONSES, FieldRule, FieldRules
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Adapter, Plan, PlanningKind
from aiflux.core.runs.status_file import EngineFacts
from aiflux.engines.own_benchmark import OwnBenchmark
from aiflux.engines.server_options import SERVER_SETTINGS, refuse_unsupported
from aiflux.errors import ConfigError, InputError, ModelError, RejectedError
from aiflux.models.catalog import Catalog
from aiflux.models.endpoints import USES
from aiflux.models.figures import Figures
from aiflux.models.name import accepts_model, same_model
from aiflux.util.process_limits import engine_cpus, engine_threads
from aiflux.util.text import joined

if TYPE_CHECKING:
    from aiflux.engines.http import Client  # imports requests
    from aiflux.engines.ranks import Ranks


LIBRARY_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD")
"""Variables that decide which code a program loads.

A job without a container gives the worker those of `aiflux run`, and its engines those of the job's
modules, as ``AIFLUX_JOB_NAME``.
"""


class HttpFactory(Protocol):
    """Makes the client of a server."""

    def __call__(self, url: str, ca: str | None = None, key: str | None = None) -> Client:
        """Return the client.

        Args:
            ca: certificates to trust: a file or a directory.
            key: the server's own key, instead of the run's.
        """


def refuse_mixed_uses(title: str, endpoints: Mapping[str, int]) -> None:
    """Refuse a mix of text, embeddings and scores, for servers that support only one of them.

    Raises:
        InputError: the input mixes them.
    """
    uses = {USES[url] for url in endpoints}
    if len(uses) > 1:
        raise InputError(
            f"requests ask for {joined(sorted(uses))}, but a {title} server supports only one of "
            "text, embeddings and scores",
            "split them into separate inputs",
        )


_EARLIER = FieldRule(
    "it stores no earlier messages",
    verb="does not support",
    fix="write them into input",
    url=RESPONSES,
)
STORED: FieldRules = {"previous_response_id": _EARLIER, "conversation": _EARLIER}
"""Rules for fields of ``/v1/responses`` that refer to what a server stores. A new one has nothing:
some answer without it, others with an error."""
_LIMIT = FieldRule("answers are not limited", fix="name it max_output_tokens", url=RESPONSES)
OF_CHAT: FieldRules = {
    "max_tokens": _LIMIT,
    "max_completion_tokens": _LIMIT,
    "response_format": FieldRule(
        "answers are not bound to it", fix="name the form in text.format", url=RESPONSES
    ),
}
"""Rules for fields of chat that have other names in ``/v1/responses``."""


@dataclass(frozen=True)
class FetchContext:
    """What a kind needs to fetch a model.

    Attributes:
        environ: the environment, which names the engine's program.
        log: log of the program that fetches.
        say: called with a line of text when there is something to wait for.
        progress: called with each progress object.
        again: fetch the model even if it is already stored.
    """

    environ: Mapping[str, str]
    log: Path
    say: Callable[[str], None]
    progress: Callable[[dict[str, Any]], None]
    again: bool = False


@dataclass(frozen=True)
class ListedModel:
    """A model in a models directory.

    Attributes:
        digest: what identifies its files.
        size: bytes of them.
        problem: what is missing or damaged; "" if nothing is.
    """

    name: str
    digest: str
    size: int
    problem: str


@dataclass(frozen=True)
class PackedModel:
    """A stored model, as archives and bundles contain it.

    Attributes:
        name: under which its store finds it.
        digest: what identifies its files.
        manifest: JSON in the form of Ollama's manifests, with the SHA-256 and size of each blob.
        blobs: its files by digest, ``sha256:...``.
        folder: of its own below the models directory, where the layers' ``path`` and ``blob`` are
            names of files; "" for a model in Ollama's layout.
    """

    name: str
    digest: str
    manifest: bytes
    blobs: Mapping[str, Path]
    folder: str = ""


class ModelStore(Protocol):
    """The models of a kind that have a format of their own, for ``aiflux models``.

    Attributes:
        prefix: with which their names begin.
    """

    prefix: str

    def listed(self, models_dir: Path) -> list[ListedModel]:
        """Return the stored models."""

    def find(self, models_dir: Path, name: str) -> ListedModel:
        """Return a stored model; ModelError if it is not stored."""

    def damaged(self, models_dir: Path, name: str, on_bytes: Callable[[int], None]) -> list[str]:
        """Read every file of a model, and return what is wrong with which."""

    def remove(self, models_dir: Path, name: str, say: Callable[[str], None]) -> int:
        """Remove a model; return the bytes that are free now."""

    def pack(self, models_dir: Path, name: str) -> PackedModel:
        """Return a stored model for an archive; ModelError if it is incomplete or damaged."""

    def packed_digest(self, name: str, manifest: bytes) -> str:
        """Return the digest of the model in an archive.

        Raises:
            ValueError: the manifest is not valid, or is that of another model.
        """

    def arrival_folder(self, models_dir: Path, manifest: bytes) -> Path:
        """Return where the blobs of an archive are put, in ``blobs``, before ``place``."""

    def place(self, models_dir: Path, manifest: bytes, folder: Path) -> None:
        """Move a model that arrived into place.

        Raises:
            ModelError: a file is not the one that the model had where it was published.
            OSError: the models directory cannot be written.
        """


@dataclass(frozen=True)
class SlotLimits:
    """Slots of a kind's servers, if the run does not set a number.

    Attributes:
        gpu: on GPUs whose memory is unknown.
        ladder: numbers to try if it is known, largest first.
        cpu: on a CPU, at most.
        per_core: on a CPU, per core.
        most: that the servers, and ``--slots``, permit.
    """

    gpu: int = 16
    ladder: tuple[int, ...] = (32, 24, 16, 12, 8, 6, 4, 3, 2, 1)  # more than 32 gains little
    cpu: int = 4
    per_core: int = 1
    most: int = 1024


@dataclass(frozen=True)
class Listener:
    """Where a server listens for others than the worker, and the files that protect it.

    Attributes:
        host: IPv4 address of this node.
        key: the key that every request needs.
        certificate: for TLS; clients trust it and no other.
        certificate_key: its private key.
    """

    host: str
    key: Path
    certificate: Path
    certificate_key: Path


@dataclass(frozen=True)
class EngineSpec:
    """One engine of a run: what it serves, on which GPUs, and where it keeps its files.

    Attributes:
        model: name in the plan.
        devices: GPUs as the job names them (see ``engines.gpus``); empty means the CPU.
        home: its own writable folder, removed after the run.
        log: file to append its output to.
        environ: the worker's environment.
        say: called with a line of text when there is something to wait for.
        ranks: the job's other nodes; None if it has one.
        listener: None if only the worker uses the engine.
        engines: those of the worker, which share the job's CPUs.
    """

    index: int
    plan: Plan
    model: str
    devices: tuple[str, ...]
    home: Path
    log: Path
    environ: Mapping[str, str]
    say: Callable[[str], None]
    ranks: Ranks | None = None
    listener: Listener | None = None
    engines: int = 1

    @property
    def cpus(self) -> int:
        """The engine's share of the CPUs that the job may use."""
        return engine_cpus(self.environ, self.engines)

    @property
    def threads(self) -> int | None:
        """The number of threads to start; None for the engine's own choice."""
        return engine_threads(self.environ, self.engines)


class EngineKind(PlanningKind, Protocol):
    """One supported type of engine, such as Ollama. Stateless.

    The worker starts and stops the servers of a managed kind, on its own node.

    Attributes:
        name: in ``--engine``, ``plan.json`` and the image's label.
        title: in messages and in the report.
        program: name of the executable to start; "" for none.
        program_variables: older names of AIFLUX_ENGINE_PROGRAM for this kind.
        cached_program: path of the program below the cache folder after a demo; "" for none.
        slot_limits: suitable numbers of slots.
        store: its models; None if they are Ollama's, or not ours.
        worker_in_image: a job runs its worker, and a managed kind's servers, in an image.
        shares_prefixes: requests in flight share the key-value cache of a common beginning.
        can_be_served: its servers can require a key and use TLS (see ``Listener``).
        generates_n: its servers give as many answers as ``n`` asks for. If not, the worker sends a
            request for each answer; None if unknown: it does so if they refuse ``n`` or ignore it.
        without_room: what happens to requests whose max_tokens exceeds the rest of the context.
        own_benchmark: its own benchmark tool; None if it has none.
    """

    name: str
    title: str
    program: str
    program_variables: tuple[str, ...]
    cached_program: str
    slot_limits: SlotLimits
    store: ModelStore | None
    worker_in_image: bool
    shares_prefixes: bool
    can_be_served: bool
    generates_n: bool | None
    without_room: str
    own_benchmark: OwnBenchmark | None

    def same_model(self, one: str, other: str) -> bool:
        """Return whether two names mean the same model."""

    def model_path(self, model: str) -> Path | None:
        """Return the path of a model that a container needs in addition to the models directory."""

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """Return whether a model is stored completely."""

    def catalog_name(self, model: str) -> str | None:
        """Return the name of a model for the catalog; None if it cannot contain such a model."""

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """Refuse a stored model that the engine cannot use; accept one that is not stored.

        Raises:
            ModelError: its digest is not the one in its name, or its format is wrong.
        """

    def absent_model(self, models_dir: Path, model: str) -> ModelError | None:
        """Return the error for a model that is not stored; None if the job can fetch it."""

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Make sure that a model is stored; return whether it was fetched.

        Raises:
            ModelError: it is unknown or not available.
            StorageError: the models directory cannot be written.
        """

    def figures(
        self, models_dir: Path | None, model: str, catalog: Catalog | None
    ) -> Figures | None:
        """Return what the memory of a model depends on; None if unknown."""

    def one_slot(self, figures: Figures) -> bool:
        """Return whether the engine runs a model with one slot, whatever was requested."""

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """Return the minimum GPU memory of a model in bytes, on all ``gpus`` together.

        Args:
            context: context of each slot, in tokens.
        """

    def divides(self, figures: Figures, gpus: int) -> bool:
        """Return whether one server can split a model across GPUs."""

    def adapt_body(self, url: str, body: Mapping[str, Any], served: str) -> Mapping[str, Any]:
        """Return the fields of a request's body to change for this engine.

        Args:
            url: the request's endpoint.
            served: the model's name as the engine serves it.
        """

    def select_adapter(self, index: int | None, count: int) -> Mapping[str, Any]:
        """Return the fields of a body that select an adapter, or the model without any.

        Args:
            index: its position among those of the run; None for the model.
            count: number of those of the run.
        """

    def crash_code(self, status: int, message: str) -> str | None:
        """Return the code of an error answer that means an engine crash.

        None applies the generic rule. The codes are those of ``engines.outcome``.
        """

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return an engine that is not started yet.

        Raises:
            EngineError: its program is missing.
            ConfigError: an option is not supported.
        """


class CommonKind:
    """What most kinds have in common. A kind derives from it and replaces what differs."""

    managed = True
    stores_models = True
    spans_nodes = False
    program_variables: tuple[str, ...] = ()
    cached_program = ""
    slot_limits = SlotLimits()
    store: ModelStore | None = None
    worker_in_image = True
    shares_prefixes = False
    can_be_served = False
    generates_n: bool | None = None
    without_room = "their answers end where the context ends"
    own_benchmark: OwnBenchmark | None = None

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse nothing: the server gets every parameter and every request."""

    def model_path(self, model: str) -> Path | None:
        """Return None: its models are in the models directory, or with the server."""
        return None

    def catalog_name(self, model: str) -> str | None:
        """Return None: the server brings its models."""
        return None

    def absent_model(self, models_dir: Path, model: str) -> ModelError | None:
        """Return None: the job fetches it, or the server has it."""
        return None

    def one_slot(self, figures: Figures) -> bool:
        """Return False: every model can use several slots."""
        return False

    def divides(self, figures: Figures, gpus: int) -> bool:
        """Return True: it puts layers on each GPU, or decides itself."""
        return True

    def prompt_limit(self, plan: Plan, model: str) -> PromptLimit | None:
        """Return None: the context of the server is not known before the run."""
        return None

    def adapt_body(self, url: str, body: Mapping[str, Any], served: str) -> Mapping[str, Any]:
        """Change nothing."""
        return {}

    def read_adapter(self, models_dir: Path | None, model: str, name: str, path: str) -> Adapter:
        """Refuse an adapter: most engines load none for single requests.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"the engine does not load the adapter {name}", "use --engine vllm or --engine llamacpp"
        )

    def select_adapter(self, index: int | None, count: int) -> Mapping[str, Any]:
        """Return no field: the body names the adapter as its model."""
        return {}

    def crash_code(self, status: int, message: str) -> str | None:
        """Apply the generic rule: a crashed server does not answer."""
        return None


class ForeignModelsKind(CommonKind):
    """A kind whose servers bring their models: AI-Flux neither stores nor knows them.

    Attributes:
        title: of one server, in messages.
        options_place: where its options are set.
    """

    title: str
    options_place: str
    stores_models = False
    program = ""
    without_room = "their answers end where the context ends, or the server refuses them"
    # The server may be an Ollama, whose names have two forms; equal names always match.
    input_rules = InputRules(accepts_model)

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse settings of the server, which has options of its own.

        Raises:
            ConfigError: one is set.
        """
        refuse_unsupported(
            f"the {self.title}", options, dict.fromkeys(SERVER_SETTINGS, self.options_place)
        )

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
                    f"the model {name!r} contains a digest, but the {self.title} does not report "
                    "the digests of its models",
                    "omit @sha256:...",
                )
        return [*models]

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """Return True: the server has its models."""
        return True

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """Refuse nothing: the server's models are unknown."""

    def model_digest(self, models_dir: Path, model: str) -> str | None:
        """Return None: the model is not stored here."""
        return None

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Fetch nothing."""
        return False

    def figures(
        self, models_dir: Path | None, model: str, catalog: Catalog | None
    ) -> Figures | None:
        """Return None: the server may have the model in any format."""
        return None

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """Return 0: it is unknown."""
        return 0


class Engine(Protocol):
    """One running server. Thread-safe.

    Attributes:
        client: client of its OpenAI API; a new one after each start.
        facts: what the status file shows about it.
        generates_n: as of its kind, or False if it turned out to be a llama-server, which counts
            the tokens of one answer only.
    """

    kind: EngineKind
    index: int
    client: Client
    facts: EngineFacts
    generates_n: bool | None

    def start(self) -> None:
        """Start the server; return when the model answers. Called again after a crash.

        Raises:
            EngineError: it did not start; a RejectedError if another try cannot help.
        """

    def stop(self) -> None:
        """Stop the server; does nothing if none runs."""

    def close(self) -> None:
        """Stop for good, even during a start. May be called from any thread."""

    def is_alive(self) -> bool:
        """Return whether the server is running; may take a moment."""

    def is_ready(self) -> bool:
        """Return whether it accepts requests; called after a 502, 503 or 504."""

    def max_in_flight(self) -> int | None:
        """Return the number of requests that keeps all its slots busy; None if unknown."""

    def can_have(self, slots: int) -> bool:
        """Return whether another start can have this number of slots."""

    def use_slots(self, count: int) -> None:
        """Have this number of slots from the next start on; see ``can_have``."""

    def model_digest(self) -> str | None:
        """Return the digest of the model that the current start loaded; None if unknown."""

    def was_truncated(self, prompt_tokens: int) -> bool:
        """Return whether it truncated a prompt that it counted as ``prompt_tokens``."""

    def refusal(self, model: str) -> RejectedError | None:
        """Return why the server cannot answer requests for a model; None if it can."""

    def offers(self, model: str) -> bool | None:
        """Return whether it has a model; None if unknown."""

    def ran(self, asked: str, answered: str | None) -> str:
        """Return the name of the model that answered; RejectedError if it is the wrong one."""

    def describe(self) -> str:
        """Return what it is and where it runs, for a line of the log."""

